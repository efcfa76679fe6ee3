"""Derivative label propagation: every pixel's logits carried along the derivative similarities of features."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial, reduce
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from . import _checks
from ._kernels import dense
from ._ops import BACKENDS, Backend, check_backend, softmax_affinity
from ._products import low_rank
from .difference import SCHEMES, STEP, Scheme, difference, metric
from .features import (
    NORMALIZATIONS,
    Normalize,
    at_least_float32,
    flatten,
    full_precision,
    inverse_norm,
    normalize_features,
    resize,
    resize_adjoint,
)
from .similarity import SIMILARITIES, Similarity

__all__ = ["DerivativeLabelPropagation", "derivative_label_propagation"]

Affinity = Literal["linear", "softmax"]
AFFINITIES = get_args(Affinity)
Scale = Literal["sum", "mean", "degree"]
SCALES = get_args(Scale)
Resolution = Literal["feats", "logits"]
RESOLUTIONS = get_args(Resolution)


def derivative_label_propagation(
    logits: Tensor,
    feats: Tensor,
    target_feats: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    max_order: int = 1,
    weights: Sequence[float] | None = None,
    scheme: Scheme = "forward",
    normalize: Normalize = "l1",
    similarity: Similarity = "dot",
    affinity: Affinity = "linear",
    scale: Scale = "sum",
    resolution: Resolution = "feats",
    align_corners: bool = True,
    chunk_size: int | None = None,
    backend: Backend = "auto",
) -> Tensor:
    r"""Propagate logits `L` from source pixels `i` to target pixels `j` along `S = \sum_q w_q S_q`.

    - affinity "linear": `L'_j = \sum_i L_i S_ij`, Eq. 4 as written
    - affinity "softmax": `L'_j = \sum_i L_i softmax(S_i)_j`: each source spreads its logits over all targets

    with `S_q(i, j) = (A_q v_i) . (A_q v'_j)`, see `derivative_similarity`. No M x M matrix is formed. With the dot
    similarity the linear form is a low-rank product, `L S = ((L V^T) K) V'` with the banded
    `K = \sum_q w_q A_q^T A_q`: class prototypes made of this image's own logits, then every pixel classified by them.

    The defaults are the paper's Eq. 4, which over-smooths predictions that were not trained with it;
    `affinity="softmax", similarity="cosine"` with larger weights is milder.

    Args:
        logits: class logits `L`, floating, `(N, C, H, W)` or `(N, C, M)`, the sources. Probabilities work as well.
        feats: features `V` of the sources, `(N, D, h, w)` or `(N, D, M)`.
        target_feats: features `V'` of the targets, `(N, D, h', w')` or `(N, D, M')`; another image, frame or grid is
            allowed. None means `feats`.
        mask: bool on the logits' grid, `(N, H, W)` or `(N, M)`. False sources carry nothing and do not count in
            "mean" and "degree". Where the logits are resized it is resized with the same weights, and features under
            masked logits still count where a neighbour is unmasked.
        max_order: highest order `Q` of the difference.
        weights: the `Q + 1` weights `w_q` of the orders 0..Q; None means ones.
        scheme: "forward", "central", "sum" or "laplacian", see `finite_difference`.
        normalize: "l1", "l2", "softmax" (all over channels) or None.
        similarity: "dot" or "cosine", see `derivative_similarity`.
        affinity: "linear" or "softmax".
        scale: of the linear affinity. "sum" is Eq. 4; "mean" divides by the number of source pixels; "degree" divides
            by `\sum_i S_ij`, an affine combination, and a target whose degree is not positive keeps its own logits
            (gets 0 when `target_feats` is given).
        resolution: for logits on another grid than `feats`. "feats" resizes the logits to the grid of the features and
            the result back; "logits" propagates at full resolution with upsampled features, which for the linear dot
            form costs little more, because the adjoint of the upsampling is applied to the logits instead.
        align_corners: of every bilinear resize.
        chunk_size: source rows of the softmax affinity that exist at once; None chooses by memory. Ignored by linear.
        backend: "auto", "dense" (the M x M matrices, for reference), "tiled", or "triton" (NVIDIA GPUs of compute
            capability 8.0 or newer, the softmax affinity). "auto" takes "triton" on 9.0 and 10.x where products need
            only 16 bits: if torch's setting for float32 products allows TF32, and under autocast. The linear affinity
            knows only "dense" and its low-rank form.

    Returns:
        `L'` in the dtype of `logits`, `(N, C, H, W)` on the logits' grid, or `(N, C, h', w')` if `target_feats` has
        another grid than `feats`; flat inputs give `(N, C, M')`. float16 overflows where Eq. 4 exceeds 65,504: use
        "mean" or "degree".

    Raises:
        TypeError: tensors that are not floating or differ in dtype outside autocast, a mask that is not bool,
            options of the wrong type.
        ValueError: shapes, grids, batches or devices that disagree, `Q * step >= D`, unknown options, a `scale` other
            than "sum" with the softmax affinity, or a backend that cannot run here.

    Cost:
        Linear dot: time O(N M D C), memory O(N M (C + D)). Linear cosine: the same times Q + 1.
        Softmax: time O(N M M' (D + C)), memory O(chunk_size * M').

    Example:
        >>> logits = torch.tensor([[[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]]])  # N=1, C=2, M=3: the last pixel is undecided
        >>> feats = torch.tensor([[[1.0, 0.0, 0.9], [0.0, 1.0, 0.1], [0.0, 0.0, 0.0]]])  # D=3
        >>> derivative_label_propagation(logits, feats)
        tensor([[[ 4.0000, -2.0000,  3.4000],
                 [-1.0000,  3.0000, -0.6000]]])

    Reference:
        DerProp, Eq. 1, 4 and 9. The softmax form is that of the paper's released code.
    """
    options = _check_options(
        max_order,
        weights,
        scheme,
        normalize,
        similarity,
        affinity,
        scale,
        resolution,
        align_corners,
        chunk_size,
        backend,
    )
    _check_tensors(logits, feats, target_feats, mask, max_order, scheme)
    check_backend(backend, logits, "affinity='linear'" if affinity == "linear" else None)
    propagate = partial(
        _propagate,
        weights=options["weights"] or (1.0,) * (max_order + 1),
        scheme=scheme,
        similarity=similarity,
        affinity=affinity,
        chunk_size=chunk_size,
        backend=backend,
        reduced=_checks.autocast_enabled(logits),
    )
    grid, logits_grid = feats.shape[2:], logits.shape[2:]
    is_resized = logits.ndim == 4 and logits_grid != grid
    returns_to_logits_grid = target_feats is None or target_feats.shape[2:] == grid

    tensors = (logits, feats) if target_feats is None else (logits, feats, target_feats)
    dtype = reduce(torch.promote_types, (x.dtype for x in tensors), torch.float32)
    V = feats.to(dtype)
    targets = V if target_feats is None else target_feats.to(dtype)
    own = logits.to(dtype)
    source = own
    if mask is not None:
        source = torch.where(mask[:, None], own, 0)
        if not is_resized:
            V = torch.where(mask[:, None], V, 0)  # 0 * NaN would carry a masked source's features after all
    if scale != "sum":
        # One more channel counts the sources, each a fraction of one where a mask is resized.
        count = torch.ones_like(own[:, :1]) if mask is None else mask[:, None].to(dtype)
        source = torch.cat((source, count), dim=1)

    with full_precision(logits):
        if not is_resized:
            out = propagate(source, V, targets, normalize)
        elif resolution == "feats":
            source, own = (resize(x, grid, align_corners) for x in (source, own))
            out = propagate(source, V, targets, normalize)
        elif affinity == "linear" and similarity == "dot" and backend != "dense":
            # L (U^T V^T K V U) = ((L U^T) V^T K V) U: propagate on the grid of the features.
            source = resize_adjoint(source, grid, align_corners)
            out = propagate(source, V, targets, normalize)
            if returns_to_logits_grid:
                out = resize(out, logits_grid, align_corners)
        else:
            V_full = resize(normalize_features(V, normalize), logits_grid, align_corners)
            targets_full = V_full if targets is V else normalize_features(targets, normalize)
            if returns_to_logits_grid:
                targets_full = resize(targets_full, logits_grid, align_corners)
            out = propagate(source, V_full, targets_full, None)
        out = _rescale(out, source, own if target_feats is None else None, scale)
        if is_resized and resolution == "feats" and returns_to_logits_grid:
            out = resize(out, logits_grid, align_corners)
    return out.to(logits.dtype)


class DerivativeLabelPropagation(nn.Module):
    """Derivative label propagation as a Module: options at construction, tensors at the call.

    It has no parameters, no buffers and no state_dict keys. The formulas, every option, the errors and the cost are
    those of `dlprop.propagation.derivative_label_propagation`.

    Example:
        >>> propagate = DerivativeLabelPropagation(affinity="softmax", similarity="cosine", weights=(30.0, 30.0))
        >>> logits, feats = torch.randn(2, 21, 65, 65), torch.randn(2, 256, 33, 33)
        >>> propagate(logits, feats).shape
        torch.Size([2, 21, 65, 65])

    Reference:
        DerProp, Eq. 4.
    """

    def __init__(
        self,
        *,
        max_order: int = 1,
        weights: Sequence[float] | None = None,
        scheme: Scheme = "forward",
        normalize: Normalize = "l1",
        similarity: Similarity = "dot",
        affinity: Affinity = "linear",
        scale: Scale = "sum",
        resolution: Resolution = "feats",
        align_corners: bool = True,
        chunk_size: int | None = None,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        self.options: dict[str, Any] = _check_options(
            max_order, weights, scheme, normalize, similarity, affinity, scale, resolution, align_corners, chunk_size,
            backend,
        )  # fmt: skip

    def forward(
        self, logits: Tensor, feats: Tensor, target_feats: Tensor | None = None, *, mask: Tensor | None = None
    ) -> Tensor:
        """Propagate ``logits`` along the similarities of ``feats``; see `derivative_label_propagation`."""
        return derivative_label_propagation(logits, feats, target_feats, mask=mask, **self.options)

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
            target_feats: likewise, on the grid of `feats`: the blend needs both predictions at the same pixels.
            mask: likewise.

        Returns:
            Probabilities of the shape and dtype of `logits`, which sum to 1 over the classes.

        Raises:
            TypeError: as the propagation, or `ramp` is no number.
            ValueError: as the propagation, `ramp` outside [0, 1], or a `target_feats` on a grid that is neither that of
                `feats` nor that of `logits`.

        Example:
            >>> logits, feats = torch.zeros(1, 4, 8, 8), torch.rand(1, 16, 8, 8)
            >>> DerivativeLabelPropagation().rectify(logits, feats, ramp=0.5)[0, :, 0, 0]
            tensor([0.2500, 0.2500, 0.2500, 0.2500])

        Reference:
            DerProp, Eq. 5.
        """
        ramp = _checks.real("ramp", ramp, 0.0, 1.0)
        _check_tensors(logits, feats, target_feats, mask, self.options["max_order"], self.options["scheme"])
        # Rounded once, after the softmax: in float16 the propagated logits may overflow.
        whole, *features = (None if x is None else at_least_float32(x) for x in (logits, feats, target_feats))
        propagated = self(whole, *features, mask=mask)
        if propagated.shape != logits.shape:
            raise ValueError(
                "target_feats must have the grid of feats for rectify, which blends both predictions pixel by pixel, "
                f"got propagated logits {tuple(propagated.shape)} for logits {tuple(logits.shape)}"
            )
        with full_precision(logits):
            dtype = torch.promote_types(logits.dtype, torch.float32)
            P, P_propagated = (x.softmax(dim=1, dtype=dtype) for x in (logits, propagated))
            return ((1 - ramp) * P + ramp * P_propagated).to(logits.dtype)

    def extra_repr(self) -> str:
        """The options, for print."""
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


# ---------------------------------------------------------------------------------------------------------------------
# The propagation itself, on one grid.


def _propagate(
    source: Tensor,
    V: Tensor,
    targets: Tensor,
    normalize: Normalize,
    *,
    weights: tuple[float, ...],
    scheme: Scheme,
    similarity: Similarity,
    affinity: Affinity,
    chunk_size: int | None,
    backend: Backend,
    reduced: bool,
) -> Tensor:
    """Carry ``source`` (N, C, H, W) along features of its own grid to the grid of ``targets``; flat inputs likewise."""
    L, flat_V = flatten(source), flatten(V)
    flat_targets = flat_V if targets is V else flatten(targets)
    if affinity == "softmax":
        out = _softmax(L, flat_V, flat_targets, weights, scheme, normalize, similarity, chunk_size, backend, reduced)
    elif backend == "dense":
        out = _dense_linear(L, flat_V, flat_targets, weights, scheme, normalize, similarity)
    elif similarity == "cosine":
        out = _linear_cosine(L, flat_V, flat_targets, weights, scheme, normalize)
    else:
        out = _linear_dot(L, flat_V, flat_targets, weights, scheme, normalize)
    return out.unflatten(2, targets.shape[2:]) if targets.ndim == 4 else out


def _rescale(out: Tensor, source: Tensor, own: Tensor | None, scale: Scale) -> Tensor:
    """Divide by the count in the last channel of ``source``, or by its propagated self, the degree."""
    if scale == "mean":
        total = source[:, -1].flatten(1).sum(dim=1).view(-1, *(1,) * (out.ndim - 1))
        return out[:, :-1] / torch.where(total == 0, 1, total)
    if scale == "degree":
        degree = out[:, -1:]
        is_isolated = degree <= 0  # false for NaN, which therefore stays NaN
        fallback = 0 if own is None else own
        return torch.where(is_isolated, fallback, out[:, :-1] / torch.where(is_isolated, 1, degree))
    return out


# ---------------------------------------------------------------------------------------------------------------------
# The four ways to propagate flat logits L (N, C, M) along flat features V (N, D, M) to targets V' (N, D, M').


def _linear_dot(
    L: Tensor, V: Tensor, targets: Tensor, weights: tuple[float, ...], scheme: Scheme, normalize: Normalize
) -> Tensor:
    """`((L V^T) K) V'`, Eq. 4 in O(M D C); the norms of the pixels fold into `L` and into the output."""
    if normalize == "softmax":
        same = targets is V
        V = V.softmax(dim=1)
        targets = V if same else targets.softmax(dim=1)
    norm = target_norm = None
    if normalize in ("l1", "l2"):
        p = 1 if normalize == "l1" else 2
        norm = inverse_norm(V, p)
        target_norm = norm if targets is V else inverse_norm(targets, p)
    L = L if norm is None else L * norm
    out = low_rank(L, V, None if targets is V else targets, weights, scheme)
    return out if target_norm is None else out * target_norm


def _linear_cosine(
    L: Tensor, V: Tensor, targets: Tensor, weights: tuple[float, ...], scheme: Scheme, normalize: Normalize
) -> Tensor:
    """`sum_q w_q (L Z_q^T) Z'_q` with the unit differences `Z_q`, Eq. 15-16."""
    rows, columns = _unit_differences(V, targets, weights, scheme, normalize)
    terms = [w * ((L @ Z.mT) @ Z_target) for w, Z, Z_target in zip(weights, rows, columns, strict=True)]
    return torch.stack(terms).sum(dim=0)


def _softmax(
    L: Tensor,
    V: Tensor,
    targets: Tensor,
    weights: tuple[float, ...],
    scheme: Scheme,
    normalize: Normalize,
    similarity: Similarity,
    chunk_size: int | None,
    backend: str,
    reduced: bool,
) -> Tensor:
    """`L softmax(S, -1)`; all orders are one product, `S = (K V)^T V'` or `S = [w_q Z_q]^T [Z'_q]`."""
    if similarity == "dot":
        keys = normalize_features(targets, normalize)
        queries = metric(keys if targets is V else normalize_features(V, normalize), weights, 1, scheme)
    else:
        rows, columns = _unit_differences(V, targets, weights, scheme, normalize)
        queries = torch.cat([w * Z for w, Z in zip(weights, rows, strict=True)], dim=1)
        keys = torch.cat(columns, dim=1)
    return softmax_affinity(L, queries, keys, chunk_size, backend, reduced)


def _dense_linear(
    L: Tensor,
    V: Tensor,
    targets: Tensor,
    weights: tuple[float, ...],
    scheme: Scheme,
    normalize: Normalize,
    similarity: Similarity,
) -> Tensor:
    """`L S` with the M x M' matrix `S`, as the equation reads."""
    rows, columns = (
        [difference(normalize_features(x, normalize), q, 1, scheme) for q in range(len(weights))] for x in (V, targets)
    )
    if similarity == "cosine":
        rows, columns = ([normalize_features(Z, "l2") for Z in orders] for orders in (rows, columns))
    return dense.linear_affinity(L, rows, columns, weights)


def _unit_differences(
    V: Tensor, targets: Tensor, weights: tuple[float, ...], scheme: Scheme, normalize: Normalize
) -> tuple[list[Tensor], list[Tensor]]:
    """The differences of every order with unit length, of the sources and of the targets."""

    def unit(x: Tensor) -> list[Tensor]:
        x = normalize_features(x, normalize)
        return [normalize_features(difference(x, q, 1, scheme), "l2") for q in range(len(weights))]

    rows = unit(V)
    return rows, rows if targets is V else unit(targets)


# ---------------------------------------------------------------------------------------------------------------------


def _check_options(
    max_order: int,
    weights: Sequence[float] | None,
    scheme: str,
    normalize: str | None,
    similarity: str,
    affinity: str,
    scale: str,
    resolution: str,
    align_corners: bool,
    chunk_size: int | None,
    backend: str,
) -> dict[str, Any]:
    """Check every option and return them by name."""
    max_order = _checks.integer("max_order", max_order, 0)
    options = {
        "max_order": max_order,
        "weights": _checks.order_weights(weights, max_order),
        "scheme": _checks.choice("scheme", scheme, SCHEMES),
        "normalize": _checks.choice("normalize", normalize, NORMALIZATIONS),
        "similarity": _checks.choice("similarity", similarity, SIMILARITIES),
        "affinity": _checks.choice("affinity", affinity, AFFINITIES),
        "scale": _checks.choice("scale", scale, SCALES),
        "resolution": _checks.choice("resolution", resolution, RESOLUTIONS),
        "align_corners": _checks.boolean("align_corners", align_corners),
        "chunk_size": _checks.optional_integer("chunk_size", chunk_size, 1),
        "backend": _checks.choice("backend", backend, BACKENDS),
    }
    if affinity == "softmax" and scale != "sum":
        raise ValueError(f"scale must be 'sum' with affinity='softmax', whose rows already sum to one, got {scale!r}")
    return options


def _check_tensors(
    logits: Tensor,
    feats: Tensor,
    target_feats: Tensor | None,
    mask: Tensor | None,
    max_order: int,
    scheme: Scheme,
) -> None:
    _checks.pixels("logits", logits, "N, C, H, W")
    _checks.pixels("feats", feats)
    _checks.same_kind("logits", logits, "feats", feats)
    _checks.enough_channels("feats", feats.shape[1], max_order, STEP[scheme], scheme)
    if logits.ndim == 3 and logits.shape[2] != feats.shape[2]:
        raise ValueError(
            f"flat logits and feats must have the same number of pixels M, got {logits.shape[2]} and {feats.shape[2]}; "
            "pass (N, C, H, W) and (N, D, h, w) to have one resized to the other"
        )
    if target_feats is not None:
        _checks.pixels("target_feats", target_feats)
        _checks.same_kind("feats", feats, "target_feats", target_feats)
        _checks.same_channels("feats", feats, "target_feats", target_feats)
    if mask is not None:
        _checks.pixel_mask(mask, "logits", (logits.shape[0], *logits.shape[2:]), logits)
