"""What a user would write or install instead: dense PyTorch, KeOps, the released formula, attention."""

from __future__ import annotations

import math
import os
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .problem import UnavailableError


def unit(feats: Tensor) -> Tensor:
    """Flat features with channels that sum to one in absolute value."""
    return (feats / feats.abs().sum(dim=1, keepdim=True).clamp_min(1e-12)).flatten(2)


def similarity(V: Tensor) -> Tensor:
    """`S + D1S`, Eq. 1 and 9, as M x M matrices."""
    A = V.diff(dim=1)
    return V.mT @ V + A.mT @ A


def dense_propagation(logits: Tensor, feats: Tensor) -> Tensor:
    """Eq. 4 as it reads."""
    return (logits.flatten(2) @ similarity(unit(feats))).view_as(logits)


def dense_softmax(logits: Tensor, feats: Tensor) -> Tensor:
    """`L softmax(S, -1)`: every source spreads its logits over all targets."""
    return (logits.flatten(2) @ similarity(unit(feats)).softmax(dim=-1)).view_as(logits)


def released_affinity(logits: Tensor, f1: Tensor, f2: Tensor) -> Tensor:
    """The released affinity by its formula: two projections, scaled by their channels, a softmax over each row."""
    C = f1.shape[1]
    f1, f2 = f1.flatten(2), f2.flatten(2)
    S = f1.mT @ f2 / math.sqrt(C) + f1.diff(dim=1).mT @ f2.diff(dim=1) / math.sqrt(C - 1)
    return (logits.flatten(2) @ S.softmax(dim=-1)).view_as(logits)


def attention(logits: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    """The same products under a softmax over the SOURCES of each target, `scaled_dot_product_attention`.

    The values are padded to the channels of the keys: torch's streaming kernel wants them equal, and without it the
    M x M matrix is formed and takes three times as long.
    """
    queries, keys = (x.mT.contiguous()[:, None] for x in (queries, keys))
    values = F.pad(logits.flatten(2).mT, (0, keys.shape[3] - logits.shape[1]))[:, None]
    out = F.scaled_dot_product_attention(queries, keys, values.contiguous(), scale=1.0)
    return out[:, 0, :, : logits.shape[1]].mT.reshape(logits.shape)


def dense_loss(feats: Tensor, view: Tensor, eta: float = 0.5) -> Tensor:
    """Eq. 8 against another view, as one would write it: a residual matrix for each order, and the sparsity."""
    V, W = unit(feats), unit(view)
    A, B = V.diff(dim=1), W.diff(dim=1)
    return (V.mT @ V - W.mT @ W).abs().mean() + (A.mT @ A - B.mT @ B).abs().mean() + eta * _sparsity(V)


def dense_labelled_loss(feats: Tensor, labels: Tensor, eta: float = 0.5) -> Tensor:
    """Eq. 8 against labels, as one would write it."""
    V, y = unit(feats), labels.flatten(1)
    A = V.diff(dim=1)
    Y = (y[:, :, None] == y[:, None, :]).to(V.dtype)
    return (V.mT @ V - Y).abs().mean() + (A.mT @ A - Y).abs().mean() + eta * _sparsity(V)


def dense_squared_loss(feats: Tensor, view: Tensor, eta: float = 0.5) -> Tensor:
    """The squared residuals of both orders as matrices."""
    V, W = unit(feats), unit(view)
    A, B = V.diff(dim=1), W.diff(dim=1)
    return (V.mT @ V - W.mT @ W).square().mean() + (A.mT @ A - B.mT @ B).square().mean() + eta * _sparsity(V)


def keops_propagation(logits: Tensor, feats: Tensor) -> Tensor:
    """Eq. 4 with symbolic matrices: no memory, all pairs."""
    lazy = _lazy_tensor()
    S = _keops_similarity(lazy, unit(feats))
    L = lazy(logits.flatten(2).mT.contiguous()[:, :, None, :])
    return (S * L).sum(dim=1).mT.reshape(logits.shape)


def keops_softmax(logits: Tensor, feats: Tensor) -> Tensor:
    """`L softmax(S, -1)` with symbolic matrices: the rows' log-sum-exp first, then the sum over sources."""
    lazy = _lazy_tensor()
    S = _keops_similarity(lazy, unit(feats))
    lse = S.logsumexp(dim=2)
    L = lazy(logits.flatten(2).mT.contiguous()[:, :, None, :])
    P = (S - lazy(lse[:, :, None, :].contiguous())).exp()
    return (P * L).sum(dim=1).mT.reshape(logits.shape)


def keops_loss(feats: Tensor, view: Tensor) -> Tensor:
    """Eq. 8 against another view with symbolic matrices."""
    lazy = _lazy_tensor()
    V, W = unit(feats), unit(view)
    total = 0.5 * _sparsity(V)
    for a, g in ((V, W), (V.diff(dim=1), W.diff(dim=1))):
        R = _keops_product(lazy, a) - _keops_product(lazy, g)
        total = total + R.abs().sum(dim=2).sum() / (a.shape[0] * a.shape[2] ** 2)
    return total


def _sparsity(V: Tensor) -> Tensor:
    return V.diff(n=2, dim=1).abs().mean()


def _keops_product(lazy: Any, V: Tensor) -> Any:
    rows = V.mT.contiguous()
    return (lazy(rows[:, :, None, :]) * lazy(rows[:, None, :, :])).sum(dim=3)


def _keops_similarity(lazy: Any, V: Tensor) -> Any:
    return _keops_product(lazy, V) + _keops_product(lazy, V.diff(dim=1))


def _lazy_tensor() -> Any:
    os.environ.setdefault("PYKEOPS_VERBOSE", "0")
    try:
        from pykeops.torch import LazyTensor
    except ImportError as error:
        raise UnavailableError("pykeops is not installed (pip install pykeops)") from error
    except Exception as error:
        raise UnavailableError(f"pykeops does not start here: {error}") from error
    return LazyTensor
