"""Class statistics of features: counts, sums and scatter, which add over pixels, images, data sets and processes."""

from collections.abc import Callable, Iterator
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import _checks
from ._kernels.moments import Statistics, centred, moments
from ._precision import exact, statistics_dtype, working_dtype
from .features import Pixels, at_points, flatten, upsampling_between

__all__ = ["ClassStatistics"]

# Pixels whose probabilities exist at once while statistics are updated.
PIXELS = 1 << 14
# The roundings that a sum over pixels may be off by.
ROUNDINGS = 16


def image_statistics(sources: Pixels, weights: Tensor, *, are_shares: bool = False) -> Statistics:
    """The statistics of every image, for class weights (N, C, M) of the sources, in float64 where there is that."""
    if sources.upsampling is None:
        return moments(weights, sources.feats, are_shares=are_shares)
    # sum_i w_i v_i v_i^T = V (U diag(w) U^T) V^T with the features V on their own grid
    gathered = sources.gather(weights)
    counts, sums, E = centred(gathered, sources.feats)
    second = sources.upsampling.weighted(E, weights.sum(dim=1, keepdim=True)) @ E.mT
    # Interpolating lessens the scatter, to nothing for a single source; what is left then is rounding, of either sign.
    uninterpolated = (gathered.sum(dim=1) * E.square().sum(dim=1)).sum(dim=1)
    rounding = ROUNDINGS * torch.finfo(E.dtype).eps * uninterpolated
    is_rounding = (second.diagonal(dim1=1, dim2=2).sum(dim=1) <= rounding) & rounding.isfinite()
    second = torch.where(is_rounding[:, None, None], 0, second)
    return Statistics(counts, sums, second.to(counts.dtype))


def _blocks(V: Tensor) -> Iterator[slice]:
    return (slice(i, i + PIXELS) for i in range(0, V.shape[2], PIXELS))


class ClassStatistics(nn.Module):
    r"""Counts, feature sums and scatter of the classes over any number of images: C + C D + D^2 numbers.

    They are what `dlprop.affinity.Discriminant` estimates its classifier from. Given to it, they let an image lean on a
    data set: one pass over the images, and a memory that does not grow with them.

    Args:
        num_classes: C.
        channels: D.
        align_corners: how logits or labels on a finer grid than the features are brought to it, as in
            `DerivativeLabelPropagation`.

    Attributes:
        counts: `n_c = \sum_i P_ci`, `(C,)`, float64 (float32 on devices without it), a buffer like the others.
        sums: `\sum_i P_ci v_i`, `(C, D)`.
        second: `\sum_i (v_i - \mu) (v_i - \mu)^T` around the mean of all pixels, `(D, D)`.

    Raises:
        TypeError, ValueError: sizes that are no ints above 0; in use, tensors of other classes, channels, grids,
            devices or dtypes, labels out of range (CPU), a factor outside [0, 1].

    Cost:
        `update`: one product `V V^T` and one with C rows; beyond the inputs O(C D + D^2) and blocks of pixels, up to
        13 MiB for 21 classes and 256 channels (30 of half precision), and the C shares of an image at the
        points of its features where its logits or labels have another grid.

    Example:
        >>> statistics = ClassStatistics(num_classes=2, channels=1)
        >>> feats = torch.tensor([[[1.0, 3.0, 8.0]]])  # N=1, D=1, M=3
        >>> statistics.update_labels(torch.tensor([[0, 0, 1]]), feats)
        >>> statistics.counts, statistics.sums.flatten(), statistics.second.item()
        (tensor([2., 1.], dtype=torch.float64), tensor([4., 8.], dtype=torch.float64), 26.0)

    Reference:
        Chan, Golub and LeVeque, Updating formulae and a pairwise algorithm for computing sample variances, 1979.
    """

    counts: Tensor
    sums: Tensor
    second: Tensor

    def __init__(self, num_classes: int, channels: int, *, align_corners: bool = True) -> None:
        super().__init__()
        C, D = _checks.integer("num_classes", num_classes, 1), _checks.integer("channels", channels, 1)
        self.align_corners = _checks.boolean("align_corners", align_corners)
        for name, shape in (("counts", (C,)), ("sums", (C, D)), ("second", (D, D))):
            self.register_buffer(name, torch.zeros(shape, dtype=statistics_dtype(torch.empty(0))))

    @property
    def statistics(self) -> Statistics:
        """The three buffers together."""
        return Statistics(self.counts, self.sums, self.second)

    @torch.no_grad()
    def update(self, logits: Tensor, feats: Tensor, *, mask: Tensor | None = None) -> None:
        """Add the pixels of a batch, each to every class by its probability `P = softmax(L)`.

        Args:
            logits: class logits `L`, `(N, C, H, W)` or `(N, C, M)`.
            feats: features, `(N, D, h, w)` or `(N, D, M)`.
            mask: bool on the logits' grid; False pixels are left out, their features must be finite. One without a
                True adds nothing.

        Raises:
            TypeError, ValueError: see the class; nothing is added then.
        """
        _checks.sources(logits, feats, mask, may_be_none=True)
        self._check_sizes(feats, logits)
        upsampling, dtype = upsampling_between(feats, logits, self.align_corners), working_dtype(logits, feats)
        with exact(logits):
            for n in range(feats.shape[0]):
                L, V = flatten(logits[n : n + 1]), flatten(feats[n : n + 1])
                is_source = None if mask is None else mask[n : n + 1]
                counts = None if is_source is None else is_source.flatten(1)[:, None]
                if upsampling is not None:
                    L, _, counts = at_points(L.to(dtype), is_source, upsampling)
                for at in _blocks(V):
                    P = L[:, :, at].to(dtype).softmax(dim=1)
                    if counts is not None:
                        P = torch.where(counts[:, :, at] == 0, 0, P * counts[:, :, at])
                    self._add(P, V[:, :, at].to(dtype), are_shares=counts is None)

    @torch.no_grad()
    def update_labels(self, labels: Tensor, feats: Tensor, *, ignore_index: int = 255) -> None:
        """Add the labelled pixels of a batch.

        Args:
            labels: `(N, H, W)` or `(N, M)`, integers below C, or `ignore_index` for pixels to leave out. On a finer
                grid than the features every label counts once, at the points it lies between.
            feats: features, `(N, D, h, w)` or `(N, D, M)`; those of ignored pixels must be finite.
            ignore_index: the label to ignore.

        Raises:
            TypeError, ValueError: see the class; nothing is added then.
        """
        _checks.pixels("feats", feats)
        ignore_index = _checks.integer("ignore_index", ignore_index, -(2**63), 2**63 - 1)
        _checks.labels(feats, labels, ignore_index, "labels", self.sums.shape[0])
        self._check_sizes(feats)
        upsampling = upsampling_between(feats, labels[:, None], self.align_corners)
        dtype = working_dtype(feats)

        def members(y: Tensor) -> list[Tensor]:
            classes = ((y == c) & (y != ignore_index) for c in range(self.sums.shape[0]))
            return [x.to(dtype) if upsampling is None else upsampling.adjoint(x.to(dtype)) for x in classes]

        with exact(feats):
            for n in range(feats.shape[0]):
                y, V = labels[n].flatten()[None, None].long(), flatten(feats[n : n + 1])
                whole = None if upsampling is None else torch.cat(members(y), dim=1)
                for at in _blocks(V):
                    weights = torch.cat(members(y[:, :, at]), dim=1) if whole is None else whole[:, :, at]
                    self._add(weights, V[:, :, at].to(dtype))

    def merge(self, other: "ClassStatistics") -> None:
        """Add the pixels of other statistics, which stay as they are: O(C D + D^2).

        Args:
            other: statistics of as many classes and channels, on any device.

        Raises:
            TypeError, ValueError: `other` is something else.
        """
        if not isinstance(other, ClassStatistics):
            raise TypeError(f"other must be a ClassStatistics, got {type(other).__name__}")
        if other.sums.shape != self.sums.shape:
            raise ValueError(
                f"other must have {self.sums.shape[0]} classes and {self.sums.shape[1]} channels, "
                f"got {other.sums.shape[0]} and {other.sums.shape[1]}"
            )
        self._set(self.statistics.merged(Statistics(*(x.to(self.sums) for x in other.statistics))))

    def decay(self, factor: float) -> None:
        """Let what was added until now count `factor` times, for running statistics.

        Args:
            factor: in [0, 1].

        Raises:
            TypeError, ValueError: `factor` is no number, or outside.
        """
        factor = _checks.real("factor", factor, 0.0, 1.0)
        self._set(Statistics(*(factor * x for x in self.statistics)))

    def reset(self) -> None:
        """Forget all pixels."""
        self._set(Statistics(*(torch.zeros_like(x) for x in self.statistics)))

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> None:
        """Add the pixels of every process of a `torch.distributed` group; all then hold the same statistics.

        Once: what they then hold together a second call would count as often as there are processes. The buffers must
        be on a device that the group's backend can send from, so with NCCL `to("cuda")` first.

        Args:
            group: of processes, all of which must call this; None is the default one, which must have been initialised.

        Cost:
            Three all-reduces, of C, C D and D^2 numbers.
        """
        own = self.statistics
        counts, sums = own.counts.clone(), own.sums.clone()
        for x in (counts, sums):
            dist.all_reduce(x, group=group)
        gap = own.mean() - Statistics(counts, sums, own.second).mean()
        second = own.second + own.total() * gap[:, None] * gap
        dist.all_reduce(second, group=group)
        self._set(Statistics(counts, sums, second))

    def _load_from_state_dict(self, *args: Any) -> None:
        """Load, but not in a lower precision, which `assign=True` would take over."""
        super()._load_from_state_dict(*args)
        for name, x in self.named_buffers(recurse=False):
            setattr(self, name, x.to(statistics_dtype(x)))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follow a module to its device, but not to a lower precision."""
        dtype = statistics_dtype(fn(torch.empty(0)))
        for name, x in self.named_buffers(recurse=False):
            moved = fn(x.to(dtype))
            setattr(self, name, moved if moved.dtype == dtype else x.to(moved.device, dtype))
        return self

    def extra_repr(self) -> str:
        """The sizes, for print."""
        C, D = self.sums.shape
        return f"num_classes={C}, channels={D}, align_corners={self.align_corners}"

    def _add(self, weights: Tensor, V: Tensor, *, are_shares: bool = False) -> None:
        added = moments(weights, V, are_shares=are_shares)
        self._set(self.statistics.merged(Statistics(*(x[0].to(self.sums) for x in added))))

    def _set(self, statistics: Statistics) -> None:
        for name, buffer, value in zip(Statistics._fields, self.statistics, statistics, strict=True):
            if buffer.is_inference():  # made in inference mode, outside which nothing can be written into it
                setattr(self, name, value.clone())
            else:
                buffer.copy_(value)

    def _check_sizes(self, feats: Tensor, logits: Tensor | None = None) -> None:
        C, D = self.sums.shape
        if feats.shape[1] != D or (logits is not None and logits.shape[1] != C):
            if logits is None:
                raise ValueError(f"feats must have D = {D} channels here, got {feats.shape[1]}")
            came = f"{feats.shape[1]} channels and {logits.shape[1]} classes"
            raise ValueError(f"feats and logits must have D = {D} channels and C = {C} classes here, got {came}")
