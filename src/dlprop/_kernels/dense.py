"""The pairwise ops written out with their M x M matrices: what the other kernels must agree with."""

from __future__ import annotations

import torch
from torch import Tensor


def pairwise_l1(a: Tensor, g: Tensor, tile: int | None, need_grad: bool) -> tuple[Tensor, Tensor | None]:
    """`sum_ij |R_ij|` of every image with `R = a^T a - G`, and its gradient `2 a sign(R)` (R is symmetric)."""
    R = a.mT @ a - target_similarity(g, g, a.dtype)
    return R.abs().sum(dim=(1, 2)), 2 * a @ R.sign() if need_grad else None


def pairwise_l1_cross(
    a: Tensor, c: Tensor, g: Tensor, h: Tensor, tile: int | None, need_grad: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`sum_ik |R_ik|` of every image with `R = a^T c - G`, and its gradients in `a` and `c`."""
    R = a.mT @ c - target_similarity(g, h, a.dtype)
    loss = R.abs().sum(dim=(1, 2))
    return (loss, c @ R.sign().mT, a @ R.sign()) if need_grad else (loss, None, None)


def target_similarity(g: Tensor, h: Tensor, dtype: torch.dtype) -> Tensor:
    """`g^T h` of features (N, E, M), or label equality of (N, M), where -1 equals nothing."""
    if g.is_floating_point():
        return g.mT @ h
    return ((g[:, :, None] == h[:, None, :]) & (g[:, :, None] >= 0)).to(dtype)


def linear_affinity(L: Tensor, rows: list[Tensor], columns: list[Tensor], weights: tuple[float, ...]) -> Tensor:
    """`L S` with `S = sum_q w_q rows_q^T columns_q`."""
    S = torch.stack([w * (a.mT @ b) for w, a, b in zip(weights, rows, columns, strict=True)]).sum(dim=0)
    return L @ S


def softmax_affinity(logits: Tensor, queries: Tensor, keys: Tensor, chunk: int | None) -> tuple[Tensor, Tensor]:
    """`L softmax(Q^T K, -1)` and the log-sum-exp of every row."""
    S = queries.mT @ keys
    return logits @ S.softmax(dim=-1), S.logsumexp(dim=-1)


def softmax_affinity_backward(
    grad: Tensor,
    logits: Tensor,
    queries: Tensor,
    keys: Tensor,
    lse: Tensor,
    chunk: int | None,
    need_queries: bool = True,
    need_keys: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of `softmax_affinity` in logits, queries and keys for the gradient of its first output."""
    P = (queries.mT @ keys).softmax(dim=-1)
    grad_P = logits.mT @ grad
    grad_S = P * (grad_P - (P * grad_P).sum(dim=-1, keepdim=True))
    return grad @ P.mT, keys @ grad_S.mT if need_queries else None, queries @ grad_S if need_keys else None
