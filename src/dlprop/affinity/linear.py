"""The linear affinity: Eq. 4 as a low-rank product."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .. import _checks
from .._kernels.products import low_rank
from ..difference import difference
from ..features import Pixels, inverse_norm
from ._orders import Orders

__all__ = ["Linear"]

Similarity = Literal["dot", "cosine"]
Scale = Literal["sum", "mean", "degree"]

# A degree that is not above this share of the mean absolute degree of its image is rounding or cancellation.
SMALLEST_DEGREE = 1e-3
# So is one that is not above so many roundings of what its terms would add up to if none cancelled.
DEGREE_ROUNDINGS = 8
# The most that one order of the difference lengthens a vector.
GAIN = {"forward": 2, "central": 1, "sum": 2, "laplacian": 4}


@dataclass(frozen=True, kw_only=True)
class Linear(Orders):
    r"""Every target adds up the logits of all sources, each times their similarity: `L' = L S`, Eq. 4 as written.

    `S = \sum_q w_q (A_q V)^T (A_q V')`, see `derivative_similarity`. With the dot similarity this is a low-rank
    product, `L S = ((L V^T) K) V'` with the banded `K = \sum_q w_q A_q^T A_q`: one prototype a class, made of this
    image's own logits, and every pixel classified by these.

    Args:
        weights: the weights `w_q` of the orders 0..Q, so `Q = len(weights) - 1`.
        scheme: "forward", "central", "sum" or "laplacian", see `finite_difference`.
        normalize: "l1", "l2", "softmax" (all over channels) or None.
        similarity: "dot" or "cosine", see `derivative_similarity`.
        scale: "sum" is Eq. 4; "mean" divides by the number of sources; "degree" divides by `\sum_i S_ij`, an affine
            combination of the logits. It is meant for non-negative features: a target whose degree is not above 0.001
            of the mean absolute degree of its image, or no more than rounding, keeps its own logits, as all do in an
            image without a source (gets 0 where `target_feats` is given).

    Raises:
        TypeError: options of the wrong type.
        ValueError: unknown options, no weights, or weights that are not finite; in use, `Q * step >= D`.

    Cost:
        Dot: time O(N M D C), memory O(N M (C + D)), at full resolution on the grid of the features. Cosine: the same
        times Q + 1, at full resolution on the grid of the logits.

    Example:
        >>> Linear(weights=(1.0, 0.5))
        Linear(weights=(1.0, 0.5), scheme='forward', normalize='l1', similarity='dot', scale='sum')

    Reference:
        DerProp, Eq. 1, 4 and 9.
    """

    similarity: Similarity = "dot"
    scale: Scale = "sum"

    def __post_init__(self) -> None:
        super().__post_init__()
        _checks.choice("similarity", self.similarity, Similarity)
        _checks.choice("scale", self.scale, Scale)

    def propagate(self, sources: Pixels, targets: Pixels) -> Tensor:
        """`L'` of the targets; see `dlprop.affinity.Affinity`."""
        self.check_channels(sources.feats)
        L = sources.weighted(sources.logits)
        if self.scale == "degree":  # one more class, of which every source has 1: propagated, it is the degree
            ones = sources.weighted(torch.ones_like(L[:, :1]))
            L = torch.cat((L, ones), dim=1)
        out = self._dot(L, sources, targets) if self.similarity == "dot" else self._cosine(L, sources, targets)
        if self.scale == "mean":
            if sources.counts is None:
                return out / L.shape[2]
            total = sources.weighted(torch.ones_like(sources.counts)).sum(dim=2, keepdim=True)
            return out / torch.where(total == 0, 1, total)
        if self.scale == "degree":
            rounding = DEGREE_ROUNDINGS * torch.finfo(out.dtype).eps * self._uncancelled(ones, sources, targets)
            return _over_degree(out, targets.logits, rounding)
        return out

    def _uncancelled(self, ones: Tensor, sources: Pixels, targets: Pixels) -> Tensor:
        """What the terms of a target's degree would add up to, or more, if none cancelled: (N, 1, M') or (N, 1, 1)."""
        if self.similarity == "cosine":
            return ones.sum(dim=2, keepdim=True) * sum(map(abs, self.weights))
        V, W = (x.detach() for x in self.normalized_at_points(sources, targets))
        totals = [(sources.gather(ones) * x).sum(dim=2, keepdim=True) for x in self._lengths(V)]
        lengths = self._lengths(W)
        terms = [
            abs(w) * GAIN[self.scheme] ** q * (totals[0] * lengths[q] + totals[q] * lengths[0])
            for q, w in enumerate(self.weights)
        ]
        return targets.upsample(torch.stack(terms).sum(dim=0))

    def _lengths(self, V: Tensor) -> list[Tensor]:
        """The lengths (N, 1, m) of the differences of every order."""
        orders = (difference(V, q, 1, self.scheme) for q in range(len(self.weights)))
        return [torch.linalg.vector_norm(x, dim=1, keepdim=True) for x in orders]

    def _dot(self, L: Tensor, sources: Pixels, targets: Pixels) -> Tensor:
        """`((L V^T) K) V'`; the norms of the pixels fold into `L` and into the output."""
        L, V, W = sources.gather(L), sources.feats, targets.feats
        if self.normalize in ("softmax", None):
            V, W = self.normalized_at_points(sources, targets)
            return targets.upsample(low_rank(L, V, W, self.weights, self.scheme))
        p = 1 if self.normalize == "l1" else 2
        norm = inverse_norm(V, p)
        target_norm = norm if W is V else inverse_norm(W, p)
        return targets.upsample(low_rank(L * norm, V, W, self.weights, self.scheme) * target_norm)

    def _cosine(self, L: Tensor, sources: Pixels, targets: Pixels) -> Tensor:
        """`sum_q w_q (L Z_q^T) Z'_q` with the unit differences `Z_q`."""
        V, W = self.normalized(sources, targets)
        rows = self.unit_differences(V)
        columns = rows if W is V else self.unit_differences(W)
        terms = [w * ((L @ Z.mT) @ Z_target) for w, Z, Z_target in zip(self.weights, rows, columns, strict=True)]
        return torch.stack(terms).sum(dim=0)


def _over_degree(out: Tensor, own: Tensor, rounding: Tensor) -> Tensor:
    """Divide by the degree in the last channel of ``out``, or fall back on a target's ``own`` logits."""
    degree = out[:, -1:]
    smallest = torch.maximum(SMALLEST_DEGREE * degree.abs().mean(dim=2, keepdim=True), rounding)
    is_isolated = (degree <= smallest) & (smallest < torch.inf)  # false for NaN and inf, which therefore show
    return torch.where(is_isolated, own, out[:, :-1] / torch.where(is_isolated, 1, degree))
