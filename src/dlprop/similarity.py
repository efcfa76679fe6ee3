"""Derivative similarity of pixels: the dense matrix, or a few of its rows."""

from typing import Literal

import torch
from torch import Tensor

from . import _checks
from ._precision import exact, statistics_dtype, working_dtype
from .difference import STEP, Scheme, difference
from .features import Normalize, flatten, normalize_features

__all__ = ["derivative_similarity"]

Similarity = Literal["dot", "cosine", "gaussian"]


def derivative_similarity(
    feats: Tensor,
    target_feats: Tensor | None = None,
    *,
    order: int = 1,
    scheme: Scheme = "forward",
    normalize: Normalize = "l1",
    similarity: Similarity = "dot",
    query: Tensor | None = None,
) -> Tensor:
    r"""Similarity `S_q(i, j) = (A_q v_i) . (A_q v'_j)` of the order-`q` differences of pixel features.

    The features are normalised over their channels first, so that with "l1" the dot product is the paper's similarity.
    "cosine" divides by `||A_q v_i||_2 ||A_q v'_j||_2`, and "gaussian" is `exp(-||A_q v_i - A_q v'_j||_2^2 / 2)`.

    This is the matrix to look at. `DerivativeLabelPropagation` and `DerivativeLoss` never form it.

    Args:
        feats: features `V`, floating, `(N, D, H, W)` or `(N, D, M)`: the rows.
        target_feats: features `V'` of the columns, `(N, D, H', W')` or `(N, D, M')`; None means `feats`.
        order: order `q >= 0` of the difference.
        scheme: "forward", "central", "sum" or "laplacian", see `finite_difference`.
        normalize: "l1", "l2", "softmax" (all over channels) or None.
        similarity: "dot", "cosine" or "gaussian".
        query: indices of source pixels (row-major), int64, `(K,)` or `(N, K)`: only these rows are computed. Values
            outside `[0, M)` are an error for CPU tensors in eager mode.

    Returns:
        `(N, M, M')`, or `(N, K, M')` with `query`, in the dtype of `feats`. A zero vector has dot product and cosine
        0; normalising it, or taking its cosine, gives it zero gradient.

    Raises:
        TypeError: a tensor of the wrong kind or dtype, or an order that is no int.
        ValueError: shapes or devices that disagree, an unknown option, `order * step >= D`, or `query` out of range.

    Cost:
        Time O(N M M' D), memory O(N M M'); with `query` O(N K M' D) and O(N K M').

    Example:
        >>> feats = torch.tensor([[[1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [0.0, 1.0, 1.0]]])  # N=1, D=3, M=3
        >>> derivative_similarity(feats, order=0)
        tensor([[[1.0000, 0.0000, 0.5000],
                 [0.0000, 0.5000, 0.2500],
                 [0.5000, 0.2500, 0.5000]]])
        >>> derivative_similarity(feats, order=1, query=torch.tensor([0]))
        tensor([[[ 1.0000, -0.5000,  0.5000]]])

    Reference:
        DerProp, Eq. 3 and 15-16.
    """
    order = _checks.integer("order", order, 0)
    _checks.choice("scheme", scheme, Scheme)
    _checks.choice("normalize", normalize, Normalize)
    _checks.choice("similarity", similarity, Similarity)
    _checks.pixels("feats", feats)
    _checks.enough_channels("feats", feats.shape[1], order, STEP[scheme], scheme)
    _checks.target_features(feats, target_feats)

    def differences(x: Tensor) -> Tensor:
        y = difference(normalize_features(flatten(x), normalize), order, 1, scheme)
        return normalize_features(y, "l2") if similarity == "cosine" else y

    columns = differences(feats if target_feats is None else target_feats)
    rows = columns if target_feats is None else differences(feats)
    if query is not None:
        rows = _query_pixels(rows, query)
    # Squares of length cancel in a distance.
    dtype = statistics_dtype(feats) if similarity == "gaussian" else working_dtype(rows, columns)
    rows, columns = rows.mT.to(dtype), columns.mT.to(dtype)
    with exact(feats):
        if similarity == "gaussian":
            lengths, others = (x.square().sum(dim=2, keepdim=True) for x in (rows, columns))
            return torch.exp(rows @ columns.mT - (lengths + others.mT) / 2).to(feats.dtype)
        return (rows @ columns.mT).to(feats.dtype)


def _query_pixels(feats: Tensor, query: Tensor) -> Tensor:
    """The features (N, D, K) of the queried pixels."""
    N, D, M = feats.shape
    if not isinstance(query, Tensor) or query.dtype != torch.int64:
        came = query.dtype if isinstance(query, Tensor) else type(query).__name__
        raise TypeError(f"query must be an int64 tensor of pixel indices, got {came}")
    _checks.same_device("query", query, "feats", feats)
    if query.ndim == 1:
        query = query.expand(N, -1)
    elif query.ndim != 2 or query.shape[0] != N:
        raise ValueError(f"query must have shape (K,) or (N, K) with N = {N}, got {tuple(query.shape)}")
    if _checks.values_are_known(query) and query.numel():
        low, high = int(query.min()), int(query.max())
        if not 0 <= low <= high < M:
            raise ValueError(f"query must hold pixel indices in [0, {M - 1}], got values from {low} to {high}")
    return feats.gather(2, query[:, None, :].expand(-1, D, -1))
