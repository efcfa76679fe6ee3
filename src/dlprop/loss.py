"""The pairwise derivative loss: pull the similarities of every order towards those of labels or of another view."""

from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import _checks
from ._ops import Backend, pairwise_l1
from ._precision import at_least_float32, exact
from .difference import STEP, Scheme, difference
from .features import Normalize, flatten, normalize_features, sample_nearest
from .squared import clamped, class_sums, squared_pairs

__all__ = ["DerivativeLoss"]

Norm = Literal["l1", "frobenius"]
Reduction = Literal["none", "mean", "sum"]

# Pixels of one step of the sparsity term.
SPARSITY_PIXELS = 2048


@dataclass(kw_only=True, eq=False, repr=False)
class DerivativeLoss(nn.Module):
    r"""Distance of the derivative similarities of features to a target's, plus a sparsity term.

    `loss(feats, target)` is `\sum_{q=0}^{Q} \sum_ij |S_q(i, j) - G_q(i, j)| + eta \sum |A_{Q+1} V|`, with
    `S_q = (A_q V)^T (A_q V)` and

    - labelled form (`target` integer): `G_q(i, j) = 1` where the labels of pixels i and j are equal, else 0,
    - consistency form (`target` floating): `G_q = (A_q V')^T (A_q V')` of the target features `V'`, without gradient.

    No matrix of all pairs is formed: value and gradient of an order come from one pass over tiles. The module has no
    parameters, no buffers and no state_dict keys.

    Args:
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
        num_anchors: compare all pixels with only `K` targets, drawn anew at each call from the valid pixels of each
            image (without replacement, torch's default generator). Unbiased, O(M K D); exact where an image has at
            most `K` valid pixels. Not with "frobenius".
        chunk_size: tile edge in pixels; None chooses by device.
        backend: "auto", "tiled" (any device) or "triton" (NVIDIA GPUs of compute capability 8.0 or newer; not with
            "frobenius"). "auto" is "tiled": no other kernel's speed has been measured yet.

    Raises:
        TypeError: at construction, options of the wrong type; at the call, `feats` not floating, a floating target of
            another dtype outside autocast, a mask that is not bool.
        ValueError: at construction, unknown options, `eta < 0`, `num_anchors` or "triton" with "frobenius"; at the
            call, shapes, batches or devices that disagree, `(Q + 1) * step >= D`, negative labels other than
            `ignore_index` (CPU, eager mode), or a backend that cannot run here.

    Warns:
        UserWarning: labels on a grid that cannot be of the same image, as in `DerivativeLabelPropagation`.

    Cost:
        "l1": time 4 M^2 D an image and order against features, 3 M^2 D against labels, value and gradient together; on
        CPUs in eager mode labels at order 0 take O(M D) where features are known to be non-negative with sum 1, with
        another of the subgradients where a feature is 0. Memory
        O(M D): at its peak six times the features (two orders). With `num_anchors=K`: time O(M K D).
        Against features, torch's setting "medium" for float32 products takes bfloat16 for those over pairs on CPUs
        where torch does, which is slower where the processor only emulates it, and "high" two of it for a float32 on
        CPUs with AMX. Differences of the views are formed before they are rounded: close views do not suffer.
        "frobenius": time O(M D^2) whatever the order, memory O(M D); in float32 a value below 1e-7 of a mean pair of
        labels is rounding.

    Example:
        >>> feats = torch.eye(3)[None]  # N=1, D=3, M=3: three pixels on three channels
        >>> loss = DerivativeLoss(eta=0.0, max_order=0)
        >>> loss(feats, torch.tensor([[0, 1, 2]]))  # every pixel is similar to itself alone
        tensor(0.)
        >>> loss(feats, torch.tensor([[0, 0, 1]]))  # pixels 0 and 1 should be alike: 2 of 9 pairs are off by 1
        tensor(0.2222)
        >>> loss(feats, torch.rand(1, 3, 3)).ndim  # consistency with another view's features
        0

    Reference:
        DerProp, Eq. 3, 8 and 9.
    """

    max_order: int = 1
    eta: float = 0.5
    norm: Norm = "l1"
    scheme: Scheme = "forward"
    normalize: Normalize = "l1"
    ignore_index: int = 255
    reduction: Reduction = "mean"
    align_corners: bool = True
    num_anchors: int | None = None
    chunk_size: int | None = None
    backend: Backend = "auto"

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, (nn.Parameter, nn.Module)):
            raise TypeError(f"{name} must be a plain value, got {type(value).__name__}")
        super().__setattr__(name, value)

    def __post_init__(self) -> None:
        super().__init__()
        self._check_options()

    def _check_options(self) -> None:
        self.max_order = _checks.integer("max_order", self.max_order, 0)
        self.eta = _checks.real("eta", self.eta, 0.0)
        _checks.choice("norm", self.norm, Norm)
        _checks.choice("scheme", self.scheme, Scheme)
        _checks.choice("normalize", self.normalize, Normalize)
        self.ignore_index = _checks.integer("ignore_index", self.ignore_index, -(2**63), 2**63 - 1)
        _checks.choice("reduction", self.reduction, Reduction)
        _checks.boolean("align_corners", self.align_corners)
        self.num_anchors = _checks.optional_integer("num_anchors", self.num_anchors, 1)
        self.chunk_size = _checks.optional_integer("chunk_size", self.chunk_size, 1)
        _checks.choice("backend", self.backend, Backend)
        if self.norm == "frobenius" and (self.num_anchors is not None or self.backend == "triton"):
            raise ValueError(
                "num_anchors must be None and backend not 'triton' with norm='frobenius', which is a few matrix "
                f"products, linear in the pixels anyway, got {self.num_anchors} and {self.backend!r}"
            )

    def forward(self, feats: Tensor, target: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """The loss of ``feats`` against labels or against the features of another view.

        Args:
            feats: features `V`, floating, `(N, D, H, W)` or `(N, D, M)`.
            target: integer labels `(N, H', W')` (or `(N, M)` with flat features), each `>= 0` or equal to
                `ignore_index` and compared only for equality; or features of the shape of `feats`. Labels on another
                grid are sampled at the points of the features. The dtype decides: a floating target is always read as
                features.
            mask: bool on the target's grid; False pixels are ignored, in both forms. They stay in the sparsity term, so
                their features must be finite where `eta > 0`.

        Returns:
            A scalar, or `(N,)` with reduction "none", in the dtype of `feats` but at least float32. With no valid pair
            the pair terms are 0 with zero gradient; an empty batch gives 0. Differentiating the pairs of "l1" twice
            raises, in eager mode (but for labels at order 0 in closed form, see Cost); `torch.compile` itself does not
            support second derivatives and may return 0 for them.
        """
        self._check_tensors(feats, target, mask)
        with exact(feats):
            # Pixels as rows for the kernels of "l1"; products over pixels want them along memory, as they come.
            channels, valid = 1 if self.norm == "frobenius" else 2, mask
            if not target.is_floating_point():
                target, valid = self._classes(feats, target, mask)
            if valid is not None:
                valid = None if _checks.values_are_known(valid) and bool(valid.all()) else valid.flatten(1)
                if self.eta == 0:  # so that the gradient of an ignored pixel that is not finite is 0 as well
                    feats = _only(valid, flatten(feats), 1)
            V = self._normalized(feats, channels)
            G = self._normalized(target.detach(), channels).to(V.dtype) if target.is_floating_point() else target
            N, M = V.shape[0], V.shape[3 - channels]
            count = V.new_full((N,), M) if valid is None else valid.sum(dim=1).to(V.dtype)
            if self.norm == "l1":
                loss = self._l1(V, G, valid, count)
            else:
                loss = squared_pairs(_only(valid, V, 1), _only(valid, G, 1), self.max_order, self.scheme)
            if self.reduction != "sum":
                loss = loss / count.square().clamp_min(1)
            if self.eta != 0:
                size = M * (V.shape[channels] - (self.max_order + 1) * STEP[self.scheme])
                share = self.eta if self.reduction == "sum" else self.eta / size
                loss = loss + share * self._changes(V, channels)
            if self.reduction == "none":
                return loss
            return loss.sum() / (max(N, 1) if self.reduction == "mean" else 1)

    def _normalized(self, x: Tensor, channels: int) -> Tensor:
        """Flat normalised features with their channels along axis 1 or, copied once, 2."""
        x = at_least_float32(flatten(x))
        return normalize_features(x if channels == 1 else x.mT.contiguous(), self.normalize, channels)

    def _changes(self, V: Tensor, channels: int) -> Tensor:
        """`sum |A_{Q+1} V|` of every image, (N,); on CPUs a few pixels at a time, whose temporaries stay in cache."""
        in_one = V.device.type != "cpu" or torch.compiler.is_compiling()
        parts = [V] if in_one else V.split(SPARSITY_PIXELS, dim=3 - channels)
        sums = [difference(x, self.max_order + 1, channels, self.scheme).abs().sum(dim=(1, 2)) for x in parts]
        return torch.stack(sums).sum(dim=0)

    def _classes(self, feats: Tensor, target: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Class numbers (N, M) at the points of the features, -1 where they do not count, and where they do."""
        if feats.ndim == 4:
            target = sample_nearest(target, feats.shape[2:], self.align_corners)
            mask = None if mask is None else sample_nearest(mask, feats.shape[2:], self.align_corners)
        labels = target.flatten(1).long()  # before comparing: a uint8 map would wrap a negative ignore_index
        valid = (labels != self.ignore_index) & (labels >= 0)  # nobody could check negative ones off the CPU
        if mask is not None:
            valid = valid & mask.flatten(1)
        # Labels may be any numbers: sorted, they number their classes themselves, and the host waits for nothing.
        ordered, pixels = labels.sort(dim=1)
        numbers = F.pad((ordered[:, 1:] != ordered[:, :-1]).cumsum(dim=1), (1, 0))
        return torch.empty_like(labels).scatter(1, pixels, numbers).masked_fill(~valid, -1), valid

    def _l1(self, V: Tensor, G: Tensor, valid: Tensor | None, count: Tensor) -> Tensor:
        """`sum_q sum_ij |S_q - G_q|` of every image, (N,), for rows V and G (N, M, D), or class numbers G (N, M)."""
        is_labels = not G.is_floating_point()
        anchors, scale = self._anchors(V, valid, count)
        total = torch.zeros_like(count)
        for q in range(self.max_order, -1, -1):  # order 0, whose differences are V itself, when most memory is taken
            a, g = difference(V, q, 2, self.scheme), G if is_labels else difference(G, q, 2, self.scheme)
            a, g = _only(valid, a, 2), _only(valid, g, 2)
            if anchors is None and is_labels and q == 0 and self._similarities_are_fractions(V):
                total = total + _label_l1_of_fractions(a, g)
                continue
            g = g.int() if is_labels else g
            columns = () if anchors is None else (_at(anchors, a), _at(anchors, g))
            total = total + scale * pairwise_l1(a, g, *columns, tile=self.chunk_size, backend=self.backend)
        return total

    def _anchors(self, V: Tensor, valid: Tensor | None, count: Tensor) -> tuple[Tensor | None, Tensor | float]:
        """Distinct valid pixels (N, K) of every image to compare with, and what each then counts for, (N,).

        An image with fewer valid pixels than K gets them all, and for the rest ignored ones, which add nothing.
        """
        K = self.num_anchors
        if K is None or V.shape[1] <= K:
            return None, 1.0
        lots = torch.rand(V.shape[:2], device=V.device, dtype=torch.float32)  # in bfloat16 most would tie
        if valid is not None:
            lots = lots.masked_fill(~valid, -1)
        return lots.topk(K, dim=1, sorted=False).indices, count / count.clamp(1, K)

    def _similarities_are_fractions(self, V: Tensor) -> bool:
        """Whether the features are known to be non-negative with sum 1, so that every similarity is in [0, 1].

        Looking at them costs a pass on the CPU. Elsewhere it would make the host wait, as numbering the classes would,
        so there every pair is computed.
        """
        if self.backend == "triton" or not _checks.values_are_known(V) or V.numel() == 0:
            return False
        return self.normalize == "softmax" or (self.normalize == "l1" and bool(V.detach().amin() >= 0))

    def _check_tensors(self, feats: Tensor, target: Tensor, mask: Tensor | None) -> None:
        if not torch.compiler.is_compiling():
            self._check_options()  # they are attributes, which anyone may set
        _checks.pixels("feats", feats)
        D, taken = feats.shape[1], (self.max_order + 1) * STEP[self.scheme]
        if taken >= D:
            raise ValueError(
                f"feats must have more than (max_order + 1) * step = {taken} channels for the sparsity term of scheme "
                f"{self.scheme!r}, got D = {D}; lower max_order or widen the features"
            )
        if not isinstance(target, Tensor):
            raise TypeError(f"target must be a tensor of labels or of features, got {type(target).__name__}")
        if target.is_floating_point():
            if target.shape != feats.shape:
                raise ValueError(
                    f"a floating target must have the shape of feats, {tuple(feats.shape)}, got {tuple(target.shape)}; "
                    "convert labels with target.long(), one-hot or probabilities with target.argmax(1)"
                )
            _checks.same_kind("feats", feats, "target", target)
            grid = (feats.shape[0], *feats.shape[2:])
        else:
            _checks.labels(feats, target, self.ignore_index)
            grid = tuple(target.shape)
        if mask is not None:
            _checks.pixel_mask(mask, "target", grid, target)

    def extra_repr(self) -> str:
        """The options, for print."""
        return ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in fields(self))


def _label_l1_of_fractions(rows: Tensor, classes: Tensor) -> Tensor:
    """`sum_ij |a_i . a_j - [y_i = y_j]|` of every image where all similarities are in [0, 1], in time O(M D).

    The residual of a pair of equal labels is then `1 - s_ij` and that of another pair `s_ij`, so the sum is
    `sum_c n_c^2 - 2 sum_c |a 1_c|^2 + |a 1|^2`.
    """
    sums, counts = class_sums(rows, classes)
    own, all_pairs = sums.square().sum(dim=(1, 2)), sums.sum(dim=1).square().sum(dim=1)
    return clamped(counts.square().sum(dim=1) - 2 * own + all_pairs).to(rows.dtype)


def _only(valid: Tensor | None, x: Tensor, channels: int) -> Tensor:
    """Zeros for ignored pixels, NaN or not, whose residuals then vanish; class numbers, which are -1 there, stay."""
    return torch.where(valid.unsqueeze(channels), x, 0) if valid is not None and x.is_floating_point() else x


def _at(pixels: Tensor, x: Tensor) -> Tensor:
    """Rows (N, K, D) or class numbers (N, K) of the pixels (N, K)."""
    return x.gather(1, pixels) if x.ndim == 2 else x.gather(1, pixels[:, :, None].expand(-1, -1, x.shape[2]))
