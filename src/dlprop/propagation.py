"""Derivative label propagation: average logits over pixels with similar features. Grids, masks and the two predictions.

How a source is weighted at a target is the affinity's business, see `dlprop.affinity`.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from . import _checks
from ._precision import at_least_float32, exact, working_dtype
from .affinity import Affinity, Discriminant, Linear, Ridge, Softmax
from .features import Pixels, at_points, flatten, upsampling_between

__all__ = ["DerivativeLabelPropagation", "derivative_label_propagation"]

Resolution = Literal["feats", "logits"]
AffinityName = Literal["linear", "softmax", "attention", "ridge", "discriminant"]
AFFINITIES: dict[str, Callable[[], Affinity]] = {
    "linear": Linear,
    "softmax": Softmax,
    "attention": partial(Softmax, over="sources", normalize=None, similarity="cosine", weights=(10.0, 10.0)),
    "ridge": Ridge,
    "discriminant": Discriminant,
}


def derivative_label_propagation(
    logits: Tensor,
    feats: Tensor,
    target_feats: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    affinity: Affinity | AffinityName = "linear",
    resolution: Resolution = "feats",
    align_corners: bool = True,
) -> Tensor:
    r"""Propagate logits `L` from source pixels to target pixels with similar features.

    What a target receives is up to the affinity: `L' = L S` of `dlprop.affinity.Linear`, the paper's Eq. 4;
    `L' = L softmax(S)` of `Softmax`, over the targets as in the released code, or over the sources, which is attention;
    or the log-probabilities of a classifier estimated from the sources, `Ridge` and `Discriminant`. No matrix of all
    pairs of pixels is formed.

    The default is the paper's Eq. 4, which over-smooths a prediction that was not trained with it. `Ridge` changes it
    least; `Discriminant` helps dense scenes whose small classes collapse, and harms images that are mostly background.

    Args:
        logits: class logits `L`, floating, `(N, C, H, W)` or `(N, C, M)`, the sources. `Linear` and `Softmax`
            take probabilities or one-hot labels as well; `Ridge`, `Discriminant` and `rectify` take their softmax, so
            give them logits, or the logarithm of probabilities.
        feats: features `V` of the sources, `(N, D, h, w)` or `(N, D, M)`.
        target_feats: features `V'` of the targets, `(N, D, h', w')` or `(N, D, M')`; another image, frame or grid is
            allowed. None means `feats`.
        mask: bool on the logits' grid, `(N, H, W)` or `(N, M)`. False sources give nothing and count nowhere, True
            ones count alike on every grid; the features of either must be finite. A mask without a single True is an
            error for CPU tensors in eager mode; elsewhere it gives zeros, or equal probabilities of a classifier that
            knows no other pixels (an image of a batch that it leaves none, likewise).
        affinity: an object of `dlprop.affinity`, or "linear", "softmax", "ridge" or "discriminant" for one with its
            defaults, or "attention" for `Softmax(over="sources", normalize=None, similarity="cosine", weights=(10.0,
            10.0))`.
        resolution: for logits on another grid than `feats`. "feats" propagates on the grid of the features and resizes
            the result back; without a mask the logits are resized there, with one every source is shared out among the
            points beside it (the adjoint of the upsampling), and a point holds their mean. "logits" propagates with
            features that are upsampled after normalising, which costs hardly more, but for the softmax and the cosine.
        align_corners: of every bilinear resize.

    Returns:
        `L'` in the dtype of `logits`, `(N, C, H, W)` on the logits' grid, or `(N, C, h', w')` if `target_feats` has
        another grid than `feats`; flat inputs give `(N, C, M')`. float16 overflows where Eq. 4 exceeds 65,504: use
        `Linear(scale="mean")` or "degree".

    Raises:
        TypeError: tensors that are not floating or differ in dtype outside autocast, a mask that is not bool, an
            affinity without a method `propagate`, options of the wrong type.
        ValueError: shapes, grids, batches or devices that disagree, unknown options, a mask that leaves no source, or
            what the affinity refuses: too few channels, a backend that cannot run here.

    Warns:
        UserWarning: grids of logits and `feats` that cannot be of one image, as where axes are transposed or channels
            come last (eager mode; grids of 8 x 8 and more).

    Cost:
        That of the affinity, and O(M C (h + w)) at most for the resizes, which are products with interpolation
        matrices.

    Example:
        >>> logits = torch.tensor([[[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]]])  # N=1, C=2, M=3: the last pixel is undecided
        >>> feats = torch.tensor([[[1.0, 0.0, 0.9], [0.0, 1.0, 0.1], [0.0, 0.0, 0.0]]])  # D=3
        >>> derivative_label_propagation(logits, feats)
        tensor([[[ 4.0000, -2.0000,  3.4000],
                 [-1.0000,  3.0000, -0.6000]]])

    Reference:
        DerProp, Eq. 1, 4 and 9.
    """
    affinity = _affinity(affinity)
    _checks.choice("resolution", resolution, Resolution)
    _checks.boolean("align_corners", align_corners)
    _checks.sources(logits, feats, mask)
    _checks.target_features(feats, target_feats)

    tensors = (logits, feats) if target_feats is None else (logits, feats, target_feats)
    dtype = working_dtype(*tensors)
    own, V, *other = (flatten(x.to(dtype)) for x in tensors)
    upsampling = upsampling_between(feats, logits, align_corners)
    full = upsampling if resolution == "logits" else None
    keeps_grid = target_feats is None or target_feats.shape[2:] == feats.shape[2:]
    with exact(logits):
        pixels = own.shape[2]
        L, own, counts = at_points(own, mask, upsampling if full is None else None)
        grid = None if logits.ndim == 3 else (feats if full is None else logits).shape[2:]
        sources = Pixels(V, L, counts, grid, L.shape[2] / pixels, full)
        if target_feats is None:
            targets = Pixels(V, own, grid=grid, upsampling=full)
        else:
            nothing, other_grid = L.new_zeros(*L.shape[:2], 1), grid if keeps_grid else target_feats.shape[2:]
            targets = Pixels(other[0], nothing, grid=other_grid, upsampling=full if keeps_grid else None)
        out = affinity.propagate(sources, targets)
        if upsampling is not None and full is None and keeps_grid:
            out = upsampling(out)
    if logits.ndim == 4:
        out = out.unflatten(2, logits.shape[2:] if keeps_grid else tensors[-1].shape[2:])
    return out.to(logits.dtype)


class DerivativeLabelPropagation(nn.Module):
    """Derivative label propagation as a Module: options at construction, tensors at the call.

    It has no parameters, no buffers and no state_dict keys. See
    `dlprop.propagation.derivative_label_propagation` for the options, the errors and the cost, and `dlprop.affinity`
    for the formulas.

    Example:
        >>> from dlprop.affinity import Ridge
        >>> propagate = DerivativeLabelPropagation(Ridge())
        >>> logits, feats = torch.randn(2, 21, 65, 65), torch.randn(2, 256, 33, 33)
        >>> propagate(logits, feats).shape
        torch.Size([2, 21, 65, 65])

    Reference:
        DerProp, Eq. 4.
    """

    def __init__(
        self,
        affinity: Affinity | AffinityName = "linear",
        *,
        resolution: Resolution = "feats",
        align_corners: bool = True,
    ) -> None:
        super().__init__()
        self.affinity = _affinity(affinity)
        self.resolution: Resolution = _checks.choice("resolution", resolution, Resolution)
        self.align_corners = _checks.boolean("align_corners", align_corners)

    def forward(
        self, logits: Tensor, feats: Tensor, target_feats: Tensor | None = None, *, mask: Tensor | None = None
    ) -> Tensor:
        """Propagate ``logits`` to pixels with similar ``feats``; see `derivative_label_propagation`."""
        return derivative_label_propagation(
            logits,
            feats,
            target_feats,
            mask=mask,
            affinity=self.affinity,
            resolution=self.resolution,
            align_corners=self.align_corners,
        )

    @torch.no_grad()
    def rectify(
        self,
        logits: Tensor,
        feats: Tensor,
        ramp: float,
        target_feats: Tensor | None = None,
        *,
        mask: Tensor | None = None,
    ) -> Tensor:
        r"""Rectified class probabilities `(1 - ramp) softmax(L) + ramp softmax(L')`, without gradient.

        Args:
            logits: as in `derivative_label_propagation`.
            feats: likewise.
            ramp: share of the propagated prediction in [0, 1]; the paper's is epoch / epochs.
            target_feats: likewise, on the grid of `feats` or of `logits`: both predictions are of the same pixels.
            mask: likewise.

        Returns:
            Probabilities of the shape and dtype of `logits`, which sum to 1 over the classes.

        Raises:
            TypeError: as the propagation, or `ramp` is no number.
            ValueError: as the propagation, `ramp` outside [0, 1], or a `target_feats` on a third grid.

        Example:
            >>> logits, feats = torch.zeros(1, 4, 8, 8), torch.rand(1, 16, 8, 8)
            >>> DerivativeLabelPropagation().rectify(logits, feats, ramp=0.5)[0, :, 0, 0]
            tensor([0.2500, 0.2500, 0.2500, 0.2500])

        Reference:
            DerProp, Eq. 5.
        """
        ramp = _checks.real("ramp", ramp, 0.0, 1.0)
        _checks.sources(logits, feats, mask)
        _checks.target_features(feats, target_feats)
        # Rounded once, after the softmax: in float16 the propagated logits may overflow.
        whole, *features = (None if x is None else at_least_float32(x) for x in (logits, feats, target_feats))
        propagated = self(whole, *features, mask=mask)
        if propagated.shape != logits.shape:
            raise ValueError(
                "target_feats must have the grid of feats or of logits for rectify, which blends both pixel by pixel, "
                f"got propagated logits {tuple(propagated.shape)} for logits {tuple(logits.shape)}"
            )
        with exact(logits):
            dtype = working_dtype(logits)
            P, P_propagated = (x.softmax(dim=1, dtype=dtype) for x in (logits, propagated))
            return ((1 - ramp) * P + ramp * P_propagated).to(logits.dtype)

    def extra_repr(self) -> str:
        """The options, for print."""
        return f"{self.affinity!r}, resolution={self.resolution!r}, align_corners={self.align_corners!r}"


def _affinity(affinity: Affinity | str) -> Affinity:
    """The object itself, or that of a short name with its defaults."""
    if isinstance(affinity, str):
        return AFFINITIES[_checks.choice("affinity", affinity, AffinityName)]()
    if isinstance(affinity, type) or not callable(getattr(affinity, "propagate", None)):
        came = f"the class {affinity.__name__}" if isinstance(affinity, type) else f"{type(affinity).__name__}"
        raise TypeError(
            f"affinity must be one of {tuple(AFFINITIES)}, or an object with a method propagate(sources, targets) such "
            f"as dlprop.affinity.Linear(), got {came}"
        )
    return affinity
