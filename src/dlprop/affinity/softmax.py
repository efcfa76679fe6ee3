"""The softmax affinity: each source spreads its logits over all targets, most of them to those most similar."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _checks
from .._ops import Backend, softmax_affinity
from ..difference import metric
from ..features import Pixels
from ..similarity import Similarity
from ._orders import Orders

__all__ = ["Softmax"]


@dataclass(frozen=True, kw_only=True)
class Softmax(Orders):
    r"""Each source spreads its logits over all targets: `L'_j = \sum_i L_i softmax(S_i)_j`, as the paper's code does.

    `S = \sum_q w_q (A_q V)^T (A_q V')`, see `derivative_similarity`; the shares that one source gives sum to 1. The
    larger the weights, the fewer targets receive from a source: small ones blur the prediction, and with
    `similarity="cosine"` and weights of 30 it stays close to what it was.

    Args:
        weights: of the orders, as in `Linear`.
        scheme: "forward", "central", "sum" or "laplacian", see `finite_difference`.
        normalize: "l1", "l2", "softmax" (all over channels) or None.
        similarity: "dot" or "cosine", see `derivative_similarity`.
        chunk_size: source rows that exist at once; None chooses by memory.
        backend: "auto", "tiled" (any device) or "triton" (NVIDIA GPUs of compute capability 8.0 or newer). "auto" is
            "tiled": no other kernel's speed has been measured yet.

    Raises:
        TypeError, ValueError: as `Linear`, `chunk_size < 1`; in use, a backend that cannot run here.

    Cost:
        Time O(N M M' (D + C)), memory O(chunk_size * M'), at full resolution with M pixels of the logits.

    Example:
        >>> Softmax(similarity="cosine", weights=(30.0, 30.0)).similarity
        'cosine'

    Reference:
        DerProp, Eq. 4, 15 and 16. The softmax is that of the released code.
    """

    similarity: Similarity = "dot"
    chunk_size: int | None = None
    backend: Backend = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        _checks.choice("similarity", self.similarity, Similarity)
        _checks.optional_integer("chunk_size", self.chunk_size, 1)
        _checks.choice("backend", self.backend, Backend)

    def propagate(self, sources: Pixels, targets: Pixels) -> Tensor:
        """`L'` of the targets; all orders are one product, `S = (K V)^T V'` or `S = [w_q Z_q]^T [Z'_q]`."""
        self.check_channels(sources.feats)
        if self.similarity == "dot":
            V, keys = self.normalized(sources, targets)
            queries = metric(V, self.weights, 1, self.scheme)
        else:
            rows, columns = self.unit_differences(sources, targets)
            queries = torch.cat([w * Z for w, Z in zip(self.weights, rows, strict=True)], dim=1)
            keys = torch.cat(columns, dim=1)
        L = sources.weighted(sources.logits)
        return softmax_affinity(L.mT, queries.mT, keys.mT, self.chunk_size, self.backend).mT.contiguous()
