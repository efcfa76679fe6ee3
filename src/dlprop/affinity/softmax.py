"""The softmax affinity: over the targets of each source, as the paper's code has it, or over the sources: attention."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .. import _checks
from .._ops import Backend, softmax_affinity, window_affinity
from ..difference import metric
from ..features import Pixels
from ..similarity import Similarity
from ._orders import Orders

__all__ = ["Softmax"]

Over = Literal["targets", "sources"]


@dataclass(frozen=True, kw_only=True)
class Softmax(Orders):
    r"""Softmax of the similarities `S = \sum_q w_q (A_q V)^T (A_q V')`, over the targets or over the sources.

    - `over="targets"`: `L'_j = \sum_i softmax_j(S_ij) L_i`. Each source spreads its logits over all targets, as the
      paper's code does; its shares sum to 1, what a target receives has no fixed sum.
    - `over="sources"`: `L'_j = \sum_i softmax_i(S_ij + log n_i) L_i`. Each target averages the sources, and source i
      counts `n_i` times: attention, as label propagation in videos, pixel-adaptive refinement and a normalised message
      of a dense CRF are. With few sources (clicks, labelled frames) this is the one to take; probabilities or one-hot
      labels may stand for the logits, and stay what they are.

    The larger the weights, the fewer pixels a softmax chooses. With `similarity="cosine"` and weights that sum to 20 a
    pixel at an angle of 60 degrees counts e^10 times less than an equal one. On CPUs shares below e^-87 of the largest
    are 0 (float64: e^-708), so that the sharpest kernels take no longer than mild ones.

    Args:
        weights: of the orders, as in `Linear`; for "gaussian" `1 / sigma^2` each, at least 0.
        scheme: "forward", "central", "sum" or "laplacian", see `finite_difference`.
        normalize: "l1", "l2", "softmax" (all over channels) or None.
        similarity: "dot", "cosine", or "gaussian": `S_ij = -\sum_q w_q ||A_q v_i - A_q v'_j||^2 / 2`, which is
            `-(v_i - v'_j)^T K (v_i - v'_j) / 2`.
        over: "targets" or "sources".
        radius: of a window, over sources only: a target at `(y, x)` averages the sources at `(y + d a, x + d b)` for
            `|a|, |b| <= radius`, as far as they lie in the image. Sources and targets need one grid. None: all sources.
        dilation: `d`, or several: the window is the union of theirs.
        chunk_size: rows of S that exist at once; None chooses by memory.
        backend: "auto", "tiled" (any device) or "triton" (NVIDIA GPUs of compute capability 8.0 or newer; over targets,
            not "gaussian"). "auto" is "tiled": no other kernel's speed has been measured yet.

    Raises:
        TypeError, ValueError: options of the wrong type or out of range, or that do not go together; in use,
            `Q * step >= D`, a window on flat pixels or on two grids, a backend that cannot run here.

    Cost:
        Time O(N M M' (D + C)), at full resolution with M pixels of the logits. Memory: over targets O(chunk_size * M'),
        over sources chunk_size times a tile, and up to six copies of the features. Over sources those
        that a mask leaves out cost nothing more on CPUs in eager mode; elsewhere pass the others alone, as flat
        `(N, C, k)` and `(N, D, k)` with the image as `target_feats`. A window of k offsets costs O(N M k (D + C)) and
        O(N M (C + D)) memory.

    Example:
        >>> from dlprop import DerivativeLabelPropagation
        >>> feats = torch.tensor([[[0.0, 1.0, 8.0, 9.0]]])  # N=1, D=1, M=4
        >>> clicks = torch.tensor([[[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]]])  # C=2: the first and the last pixel
        >>> propagate = DerivativeLabelPropagation(
        ...     Softmax(over="sources", similarity="gaussian", weights=(0.1,), normalize=None)
        ... )
        >>> propagate(clicks, feats, mask=clicks.sum(dim=1) > 0)
        tensor([[[0.9829, 0.9589, 0.0411, 0.0171],
                 [0.0171, 0.0411, 0.9589, 0.9829]]])

    Reference:
        DerProp, Eq. 4, 15 and 16, and its released code (over targets); Vaswani et al., Attention is all you need,
        2017; Jabri, Owens and Efros, Space-time correspondence as a contrastive random walk, 2020; Araslanov and Roth,
        Single-stage semantic segmentation from image labels, 2020 (windows).
    """

    similarity: Similarity = "dot"
    over: Over = "targets"
    radius: int | None = None
    dilation: int | Sequence[int] = 1
    chunk_size: int | None = None
    backend: Backend = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        _checks.choice("similarity", self.similarity, Similarity)
        _checks.choice("over", self.over, Over)
        if self.similarity == "gaussian" and min(self.weights) < 0:
            raise ValueError(f"weights of a Gaussian are 1 / sigma^2, so at least 0, got {self.weights}")
        object.__setattr__(self, "radius", _checks.optional_integer("radius", self.radius, 1))
        object.__setattr__(self, "dilation", _checks.integer_or_integers("dilation", self.dilation, 1))
        object.__setattr__(self, "chunk_size", _checks.optional_integer("chunk_size", self.chunk_size, 1))
        _checks.choice("backend", self.backend, Backend)
        if self.radius is None and self.dilation != 1:
            raise ValueError(f"dilation needs a radius, such as radius=1, got dilation = {self.dilation} without one")
        if self.radius is not None and self.over == "targets":
            raise ValueError(f"radius needs over='sources', got radius = {self.radius} and over = 'targets'")
        if self.radius is not None and self.chunk_size is not None:
            raise ValueError(f"chunk_size must be None with a radius, got {self.chunk_size}; a window needs no chunks")
        if self.backend == "triton" and (self.over == "sources" or self.similarity == "gaussian"):
            raise ValueError(
                "backend='triton' has a kernel for over='targets' with similarity 'dot' or 'cosine' only, got "
                f"over = {self.over!r} and similarity = {self.similarity!r}; use backend='auto'"
            )

    def propagate(self, sources: Pixels, targets: Pixels) -> Tensor:
        """`L'` of the targets; all orders are one product of queries and keys."""
        self.check_channels(sources.feats)
        V, W = self.normalized(sources, targets)
        if self.over == "targets":
            queries, keys, bias = self._compared(V, W)
            L = sources.weighted(sources.logits)
            out = softmax_affinity(L.mT, queries.mT, keys.mT, bias, chunk=self.chunk_size, backend=self.backend)
            return out.mT.contiguous()
        if self.radius is not None:
            return self._in_window(V, W, sources, targets)
        V, L, counts = _that_count(V, sources)
        keys, queries, bias = self._compared(V, W)
        out = softmax_affinity(
            L.mT,
            queries.mT,
            keys.mT,
            _times(counts, bias),
            over_sources=True,
            chunk=self.chunk_size,
            backend=self.backend,
        )
        return out.mT.contiguous()

    def _compared(self, V: Tensor, W: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Of sources and targets (N, E, M) what is multiplied, and a bias (N, M) of those that the softmax runs over.

        `S = (K V)^T V'` or `S = [w_q Z_q]^T [Z'_q]`. A Gaussian is a dot product with a bias: of
        `-(v - v')^T K (v - v') / 2` the softmax cancels one square.
        """
        if self.similarity == "cosine":
            units = self.unit_differences(V)
            others = units if W is V else self.unit_differences(W)
            rows = torch.cat([w * Z for w, Z in zip(self.weights, units, strict=True)], dim=1)
            return rows, torch.cat(others, dim=1), None
        bias = None
        if self.similarity == "gaussian":  # distances do not change with the origin, and small squares round less
            origin = V.detach().mean(dim=2, keepdim=True).nan_to_num(0, 0, 0)
            is_same, V = W is V, V - origin
            W = V if is_same else W - origin
            x = V if self.over == "sources" else W
            bias = (x * metric(x, self.weights, 1, self.scheme)).sum(dim=1) / -2
        return metric(V, self.weights, 1, self.scheme), W, bias

    def _in_window(self, V: Tensor, W: Tensor, sources: Pixels, targets: Pixels) -> Tensor:
        grid, other = sources.grid, targets.grid
        if grid is None or other is None or tuple(grid) != tuple(other):
            came = " and ".join("flat pixels" if x is None else str(tuple(x)) for x in (grid, other))
            raise ValueError(
                f"radius needs sources and targets on one grid (H, W), got {came}; pass (N, C, H, W) logits and "
                "(N, D, H, W) feats, and target_feats of the grid of feats"
            )
        keys, queries, bias = self._compared(V, W)
        bias = _times(sources.counts, bias)
        logits, queries, keys = (x.unflatten(2, tuple(grid)) for x in (sources.logits, queries, keys))
        bias = None if bias is None else bias[:, None].unflatten(2, tuple(grid))
        radius = self.radius or 0
        if not torch.compiler.is_compiling():  # which would fix the sizes; beyond the image there is nothing to see
            radius = min(radius, max(grid))
        offsets = _offsets(radius, self.dilation)
        if not torch.compiler.is_compiling():
            offsets = [(dy, dx) for dy, dx in offsets if abs(dy) < grid[0] and abs(dx) < grid[1]]
        return window_affinity(logits, queries, keys, bias, offsets).flatten(2)


def _times(counts: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """The bias (N, M) with which a source counts as often as ``counts`` (N, 1, M) says."""
    if counts is None:
        return bias
    log = counts[:, 0].log()
    return log if bias is None else log + bias


def _that_count(V: Tensor, sources: Pixels) -> tuple[Tensor, Tensor, Tensor | None]:
    """Features, logits and counts without the sources that a mask leaves out, where looking at it costs nothing.

    An image with fewer sources than another of its batch is filled up with some that count 0. Counts that are all 1 say
    nothing and go.
    """
    L, counts = sources.logits, sources.counts
    if counts is None or not _checks.values_are_known(counts):
        return V, L, counts
    kept = [is_source.nonzero()[:, 0] for is_source in counts[:, 0] > 0]
    sizes = torch.tensor([len(index) for index in kept], device=counts.device)
    if not kept or sizes.max() in (0, V.shape[2]):
        return V, L, counts
    index = pad_sequence(kept, batch_first=True)[:, None]
    is_padding = torch.arange(index.shape[2], device=counts.device) >= sizes[:, None, None]
    V, L, counts = (x.gather(2, index.expand(-1, x.shape[1], -1)) for x in (V, L, counts))
    counts = counts.masked_fill(is_padding, 0)
    return V, L, None if (counts == 1).all() else counts


def _offsets(radius: int, dilation: int | Sequence[int]) -> list[tuple[int, int]]:
    """The rows and columns from a target to the sources of its window."""
    dilations = (dilation,) if isinstance(dilation, int) else dilation
    steps = range(-radius, radius + 1)
    return sorted({(d * a, d * b) for d in dilations for a, b in product(steps, steps)})
