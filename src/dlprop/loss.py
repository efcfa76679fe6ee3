"""The pairwise derivative loss: similarities of every order drawn to those of labels or of another view."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from . import _checks
from ._kernels import dense
from ._ops import BACKENDS, Backend, check_backend, derivative_l1
from ._products import gram, grams_of_difference, sum_abs_difference
from .difference import SCHEMES, STEP, Scheme, difference
from .features import NORMALIZATIONS, Normalize, flatten, full_precision, normalize_features, sample_nearest

__all__ = ["DerivativeLoss", "derivative_loss"]

Norm = Literal["l1", "frobenius"]
NORMS = get_args(Norm)
Reduction = Literal["none", "mean", "sum"]
REDUCTIONS = get_args(Reduction)

# Ignored pixels carry this label inside the kernels, where it equals nothing.
IGNORED = -1


def derivative_loss(
    feats: Tensor,
    target: Tensor,
    *,
    mask: Tensor | None = None,
    max_order: int = 1,
    eta: float = 0.5,
    norm: Norm = "l1",
    scheme: Scheme = "forward",
    normalize: Normalize = "l1",
    ignore_index: int = 255,
    reduction: Reduction = "mean",
    align_corners: bool = True,
    num_anchors: int | None = None,
    chunk_size: int | None = None,
    backend: Backend = "auto",
) -> Tensor:
    r"""Distance of the derivative similarities of `feats` to a target's, plus a sparsity term.

    `\sum_{q=0}^{Q} \sum_ij |S_q(i, j) - G_q(i, j)| + eta \sum |A_{Q+1} V|`, with `S_q = (A_q V)^T (A_q V)` and

    - labelled form (`target` integer): `G_q(i, j) = 1` where the labels of pixels i and j are equal, else 0,
    - consistency form (`target` floating): `G_q = (A_q V')^T (A_q V')` of the target features `V'`, without gradient.

    No M x M matrix is formed: value and gradient come from one pass over tiles.

    Args:
        feats: features `V`, floating, `(N, D, H, W)` or `(N, D, M)`.
        target: integer labels `(N, H', W')` (or `(N, M)` with flat features), each `>= 0` or equal to `ignore_index`
            and compared only for equality; or features of the shape of `feats`. Labels on another grid are sampled at
            the points of the features. The dtype decides: a floating target is always read as features.
        mask: bool on the target's grid; False pixels are ignored, in both forms.
        max_order: highest order `Q` of the difference in the pair terms; the sparsity term has order `Q + 1`.
        eta: weight of the sparsity term, `>= 0`.
        norm: "l1", the paper's, or "frobenius", the squared residuals in time linear in M (the sparsity term stays L1).
        scheme: "forward", "central", "sum" or "laplacian", see `finite_difference`.
        normalize: "l1", "l2", "softmax" (all over channels) or None.
        ignore_index: label whose pixels are ignored. Ignored pixels leave the pair terms only; the sparsity term runs
            over all pixels.
        reduction: "none" gives one value an image: each order's mean over its valid pairs, summed over orders, plus
            eta times the sparsity's mean over elements; "mean" is the mean of these over the batch; "sum" is the
            formula above summed over images.
        align_corners: how labels on another grid are sampled: row `round(i (H' - 1) / (H - 1))` if True, else
            `floor((i + 1/2) H' / H)`.
        num_anchors: compare all pixels with `K` target pixels only, drawn anew at each call without replacement from
            torch's default generator: unbiased, O(M K D). Not with "frobenius".
        chunk_size: tile edge in pixels; None chooses by device.
        backend: "auto", "dense" (the M x M matrices, for reference), "tiled", or "triton" (NVIDIA GPUs of compute
            capability 8.0 or newer, `norm` "l1"). "auto" takes "triton" there where products need only the 11 bits of
            TF32: if torch's setting for float32 products allows TF32, and against labels under autocast. All else is
            computed in the dtype of `feats`, but at least float32. "frobenius" knows only "dense" and its linear-time
            form.

    Returns:
        A scalar, or `(N,)` with reduction "none", in the dtype of `feats` but at least float32. With no valid pair the
        pair terms are 0 with zero gradient; an empty batch gives 0. Differentiating twice raises, in eager mode;
        `torch.compile` itself does not support second derivatives and may return 0 for them.

    Raises:
        TypeError: `feats` not floating, a floating target of another dtype outside autocast, a mask that is not bool,
            options of the wrong type.
        ValueError: shapes, batches or devices that disagree, `(Q + 1) * step >= D`, negative labels other than
            `ignore_index` (CPU, eager mode), `eta < 0`, unknown options, `num_anchors` with "frobenius", or a backend
            that cannot run here.

    Cost:
        "l1": time 4 M^2 D an image and order against features, 3 M^2 D against labels, value and gradient together; on
        CPUs labels at order 0 take O(M D) where features are known to be non-negative with sum 1. Memory O(M D): three
        times the features at the peak, beside inputs and gradient.
        "frobenius": time O(M D^2) whatever the order, memory O(M D); in float32 a value below 1e-7 of a mean pair of
        labels is rounding.
        With `num_anchors=K`: time O(M K D).

    Example:
        >>> feats = torch.eye(3)[None]  # N=1, D=3, M=3: three pixels on three channels
        >>> derivative_loss(feats, torch.tensor([[0, 1, 2]]), eta=0.0, max_order=0)  # S is already Y^T Y
        tensor(0.)
        >>> derivative_loss(feats, torch.tensor([[0, 0, 255]]), eta=0.0, max_order=0, reduction="sum")
        tensor(2.)

    Reference:
        DerProp, Eq. 3, 8 and 9.
    """
    options = _check_options(
        max_order,
        eta,
        norm,
        scheme,
        normalize,
        ignore_index,
        reduction,
        align_corners,
        num_anchors,
        chunk_size,
        backend,
    )
    _check_tensors(feats, target, mask, max_order, scheme, ignore_index)
    check_backend(backend, feats, "norm='frobenius'" if norm == "frobenius" else None)

    eta = options["eta"]
    # Residuals of labels are large. Those of another view may be smaller than what rounding the products leaves.
    reduced = _checks.autocast_enabled(feats) and not target.is_floating_point()
    with full_precision(feats):
        V = normalize_features(flatten(feats), normalize)
        N, D, M = V.shape
        if target.is_floating_point():
            labels, valid = None, None if mask is None else mask.reshape(N, M)
        else:
            labels, valid = _labels(target, mask, feats, ignore_index, align_corners)
        if reduction == "sum":
            pair_weight = V.new_ones(N)
        else:
            pairs = V.new_full((N,), M) if valid is None else valid.sum(dim=1).to(V.dtype)
            pair_weight = 1 / pairs.square().clamp_min(1)

        if norm == "frobenius":
            G = normalize_features(flatten(target.detach()), normalize).to(V.dtype) if labels is None else labels
            per_image = pair_weight * _frobenius(V, G, valid, max_order, scheme, is_dense=backend == "dense")
            if eta != 0:
                elements = 1 if reduction == "sum" else (D - (max_order + 1) * STEP[scheme]) * M
                per_image = per_image + eta / elements * sum_abs_difference(V, max_order + 1, scheme)
        else:
            V = V.mT.contiguous().mT  # pixels as rows, as the kernels read them: they need no copy beside V
            per_image = derivative_l1(
                V,
                flatten(target.detach()) if labels is None else labels,
                valid,
                None if num_anchors is None or num_anchors >= M else _draw(num_anchors, V),
                pair_weight,
                None if eta == 0 else eta * V.new_ones(()),
                reduction == "sum",
                max_order,
                scheme,
                normalize,
                chunk_size,
                backend,
                reduced,
            )
        if reduction == "none":
            return per_image
        return per_image.sum() if reduction == "sum" else per_image.sum() / max(N, 1)


class DerivativeLoss(nn.Module):
    """The pairwise derivative loss as a Module: options at construction, tensors at the call.

    It has no parameters, no buffers and no state_dict keys. See `dlprop.loss.derivative_loss` for the formula, every
    option, the errors and the cost.

    Example:
        >>> loss = DerivativeLoss()
        >>> feats = torch.rand(2, 64, 33, 33, requires_grad=True)
        >>> labels = torch.randint(0, 21, (2, 129, 129))
        >>> loss(feats, labels).backward()  # labelled form
        >>> loss(feats, torch.rand(2, 64, 33, 33)).ndim  # consistency with another view's features
        0

    Reference:
        DerProp, Eq. 3, 8 and 9.
    """

    def __init__(
        self,
        *,
        max_order: int = 1,
        eta: float = 0.5,
        norm: Norm = "l1",
        scheme: Scheme = "forward",
        normalize: Normalize = "l1",
        ignore_index: int = 255,
        reduction: Reduction = "mean",
        align_corners: bool = True,
        num_anchors: int | None = None,
        chunk_size: int | None = None,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        self.options: dict[str, Any] = _check_options(
            max_order, eta, norm, scheme, normalize, ignore_index, reduction, align_corners, num_anchors, chunk_size,
            backend,
        )  # fmt: skip

    def forward(self, feats: Tensor, target: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """The loss of ``feats`` against labels or features; see `derivative_loss`."""
        return derivative_loss(feats, target, mask=mask, **self.options)

    def extra_repr(self) -> str:
        """The options, for print."""
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


# ---------------------------------------------------------------------------------------------------------------------
# The squared norm


def _frobenius(V: Tensor, G: Tensor, valid: Tensor | None, max_order: int, scheme: Scheme, *, is_dense: bool) -> Tensor:
    """`sum_q ||a^T a - G_q||_F^2` of every image, (N,), for features V (N, D, M) and features G or labels (N, M).

    With `a = A_q V` it needs D x D products only, and those of every order are the differences, along both axes, of
    those of order 0: a product over the pixels is made once, whatever the order.
    """
    V = _on_valid(V, valid)
    if G.is_floating_point():
        G = _on_valid(G, valid)
    if is_dense:
        orders = ((difference(V, q, 1, scheme), q) for q in range(max_order + 1))
        terms = [
            (a.mT @ a - dense.target_similarity(g, g, a.dtype)).square().sum(dim=(1, 2))
            for a, q in orders
            for g in [difference(G, q, 1, scheme) if G.is_floating_point() else G]
        ]
        return torch.stack(terms).sum(dim=0)
    terms = (
        _feature_squares(V, G, max_order, scheme) if G.is_floating_point() else _label_squares(V, G, max_order, scheme)
    )
    return _clamped(torch.stack(terms)).sum(dim=0)


def _feature_squares(V: Tensor, G: Tensor, max_order: int, scheme: Scheme) -> list[Tensor]:
    """The squared norm of every order against features, written in `E = V - G`.

    `V^T V - G^T G = E^T E + E^T G + G^T E`. For features that are close, as those of two views are, each term below is
    of the size of the result, where `||V V^T||^2 - 2 ||V G^T||^2 + ||G G^T||^2` would cancel.
    """
    products = grams_of_difference(V, G)
    terms = []
    for q in range(max_order + 1):
        EE, EG, GG = (difference(difference(x, q, 1, scheme), q, 2, scheme) for x in products)
        terms.append((EE * (EE + 2 * GG + 4 * EG) + 2 * EG * EG.mT).sum(dim=(1, 2)))
    return terms


def _label_squares(V: Tensor, labels: Tensor, max_order: int, scheme: Scheme) -> list[Tensor]:
    """The squared norm of every order against labels: `||a a^T||^2 - 2 sum_c |a 1_c|^2 + sum_c n_c^2`."""
    VV = gram(V)
    sums, counts = _class_sums(V, labels)
    terms = []
    for q in range(max_order + 1):
        aa = difference(difference(VV, q, 1, scheme), q, 2, scheme)
        own = difference(sums, q, 1, scheme).square().sum(dim=(1, 2))
        terms.append(aa.square().sum(dim=(1, 2)) - 2 * own + counts.square().sum(dim=1))
    return terms


def _clamped(squares: Tensor) -> Tensor:
    """``squares`` without the negative values that rounding makes, and with the gradient of the unclamped sum."""
    return squares + (squares.clamp_min(0) - squares).detach()


def _class_sums(V: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of the columns of ``V`` and the number of pixels of every class, (N, D, K) and (N, K).

    Labels are compared, never used as an index: sorted, they number their classes themselves. K is the number of
    classes where the host can see it, and M elsewhere.
    """
    ordered, pixels = labels.sort(dim=1)
    is_new = torch.ones_like(ordered)
    is_new[:, 1:] = (ordered[:, 1:] != ordered[:, :-1]).long()
    numbers = is_new.cumsum(dim=1) - 1
    classes = torch.empty_like(labels).scatter(1, pixels, numbers)
    N, D, M = V.shape
    K = int(numbers.amax()) + 1 if _checks.values_are_known(labels) and numbers.numel() else M
    counts = V.new_zeros(N, K).scatter_add(1, classes, (labels != IGNORED).to(V.dtype))
    sums = V.new_zeros(N, D, K).scatter_add(2, classes[:, None].expand_as(V), V)
    return sums, counts


# ---------------------------------------------------------------------------------------------------------------------


def _labels(
    target: Tensor, mask: Tensor | None, feats: Tensor, ignore_index: int, align_corners: bool
) -> tuple[Tensor, Tensor]:
    """Labels (N, M) at the points of the features, `IGNORED` where they do not count, and where they do."""
    if feats.ndim == 4:
        target = sample_nearest(target, feats.shape[2:], align_corners)
        mask = None if mask is None else sample_nearest(mask, feats.shape[2:], align_corners)
    labels = target.flatten(1).long()  # before comparing: a uint8 map would wrap a negative ignore_index
    valid = (labels != ignore_index) & (labels >= 0)  # where negative labels are no error, no kernel may see them
    if mask is not None:
        valid = valid & mask.flatten(1)
    return torch.where(valid, labels, IGNORED), valid


def _draw(num_anchors: int, V: Tensor) -> Tensor:
    """``num_anchors`` distinct pixels of every image, (N, K), from the default generator of the device."""
    return torch.rand(V.shape[0], V.shape[2], device=V.device).topk(num_anchors, dim=1, sorted=False).indices


def _on_valid(x: Tensor, valid: Tensor | None) -> Tensor:
    """``x`` (N, D, M) with zeros for ignored pixels, NaN or not, so that their residuals vanish."""
    return x if valid is None else torch.where(valid[:, None], x, 0)


def _check_options(
    max_order: int,
    eta: float,
    norm: str,
    scheme: str,
    normalize: str | None,
    ignore_index: int,
    reduction: str,
    align_corners: bool,
    num_anchors: int | None,
    chunk_size: int | None,
    backend: str,
) -> dict[str, Any]:
    """Check every option and return them by name."""
    options = {
        "max_order": _checks.integer("max_order", max_order, 0),
        "eta": _checks.real("eta", eta, 0.0),
        "norm": _checks.choice("norm", norm, NORMS),
        "scheme": _checks.choice("scheme", scheme, SCHEMES),
        "normalize": _checks.choice("normalize", normalize, NORMALIZATIONS),
        "ignore_index": _checks.integer("ignore_index", ignore_index, -(2**63), 2**63 - 1),
        "reduction": _checks.choice("reduction", reduction, REDUCTIONS),
        "align_corners": _checks.boolean("align_corners", align_corners),
        "num_anchors": _checks.optional_integer("num_anchors", num_anchors, 1),
        "chunk_size": _checks.optional_integer("chunk_size", chunk_size, 1),
        "backend": _checks.choice("backend", backend, BACKENDS),
    }
    if norm == "frobenius" and num_anchors is not None:
        raise ValueError(
            f"num_anchors must be None with norm='frobenius', which is linear in the pixels anyway, got {num_anchors}"
        )
    return options


def _check_tensors(
    feats: Tensor, target: Tensor, mask: Tensor | None, max_order: int, scheme: Scheme, ignore_index: int
) -> None:
    _checks.pixels("feats", feats)
    D = feats.shape[1]
    if (max_order + 1) * STEP[scheme] >= D:
        raise ValueError(
            f"feats must have more than (max_order + 1) * step = {(max_order + 1) * STEP[scheme]} channels for the "
            f"sparsity term of scheme {scheme!r}, got D = {D}; lower max_order or widen the features"
        )
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a tensor of labels or of features, got {type(target).__name__}")
    if target.is_floating_point():
        if target.shape != feats.shape:
            raise ValueError(
                f"a floating target must have the shape of feats, {tuple(feats.shape)}, got {tuple(target.shape)}; "
                "if these are labels, convert them with target.long(), one-hot or probabilities with target.argmax(1)"
            )
        _checks.same_kind("feats", feats, "target", target)
        grid = (feats.shape[0], *feats.shape[2:])
    else:
        if target.dtype == torch.bool or target.is_complex():
            raise TypeError(f"target must have an integer or a floating dtype, got {target.dtype}")
        _check_labels(feats, target, ignore_index)
        grid = tuple(target.shape)
    if mask is not None:
        _checks.pixel_mask(mask, "target", grid, target)


def _check_labels(feats: Tensor, target: Tensor, ignore_index: int) -> None:
    _checks.same_device("feats", feats, "target", target)
    expected = "(N, H, W)" if feats.ndim == 4 else "(N, M)"
    if target.ndim != feats.ndim - 1:
        raise ValueError(
            f"target must be labels {expected} for feats {tuple(feats.shape)}, got {tuple(target.shape)}; "
            "drop a channel axis with target.squeeze(1); turn one-hot labels into indices with argmax over their class "
            "axis, target.argmax(1) for (N, C, H, W) and target.argmax(-1) for (N, H, W, C)"
        )
    _checks.same_batch("feats", feats, "target", target)
    if feats.ndim == 3 and target.shape[1] != feats.shape[2]:
        raise ValueError(
            f"target must have one label for each of the M = {feats.shape[2]} pixels of feats, "
            f"got {target.shape[1]}; pass (N, D, H, W) feats and (N, H, W) labels to have the labels sampled"
        )
    if any(size < 1 for size in target.shape[1:]):
        raise ValueError(f"target must have sizes of at least 1 in every axis but the batch, got {tuple(target.shape)}")
    if _checks.values_are_known(target) and target.dtype.is_signed:
        wrong = target[(target < 0) & (target != ignore_index)]
        if wrong.numel():
            raise ValueError(
                f"target must hold labels >= 0 or equal to ignore_index = {ignore_index}, got {int(wrong[0])}; "
                "set ignore_index to the label that marks ignored pixels"
            )
