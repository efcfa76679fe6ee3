"""The pairwise ops tile by tile: the M x M matrices exist one cache-sized tile at a time, on any device.

Pixels are laid out as rows, (M, D), so that a tile is a contiguous block of memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

# On CPUs the residual tile (1 MiB in float32) should stay in the second-level cache between the product that fills it
# and the two that consume it; on accelerators a tile must amortise five kernel launches.
CPU_TILE, DEVICE_TILE = 512, 4096

# Bytes that the rows of one softmax chunk may take; three buffers of this size live at once in backward.
CPU_CHUNK_BYTES, DEVICE_CHUNK_BYTES = 16 << 20, 256 << 20


def pairwise_l1(a: Tensor, g: Tensor, tile: int | None, need_grad: bool) -> tuple[Tensor, Tensor | None]:
    """`sum_ij |R_ij|` of every image with `R = a^T a - G`, and its gradient, in one pass over the tiles i <= j.

    R is symmetric, so the tile above the diagonal stands for the one below: its absolute sum counts twice, and its
    signs are multiplied into the gradient of both its row blocks. 4 M^2 D operations for values and gradient
    against features (dense autograd: 8 M^2 D), 3 M^2 D against labels (6 M^2 D); memory O(M D + tile^2).
    """
    N, _, M = a.shape
    tile = tile or _default_tile(a, M)
    rows = a.mT.contiguous()
    grad = torch.zeros_like(rows) if need_grad else None
    loss = a.new_zeros(N)
    for n in range(N):
        residual = _Residual(rows[n], rows[n], g[n], g[n])
        for i in range(0, M, tile):
            for j in range(i, M, tile):
                block_i, block_j = slice(i, i + tile), slice(j, j + tile)
                R = residual.tile(block_i, block_j)
                loss[n] += R.abs().sum() * (1 if i == j else 2)
                if grad is not None:
                    R.sign_()
                    grad[n, block_i].addmm_(R, rows[n, block_j], alpha=2)
                    if i != j:
                        grad[n, block_j].addmm_(R.T, rows[n, block_i], alpha=2)
    return loss, None if grad is None else grad.mT


def pairwise_l1_cross(
    a: Tensor, c: Tensor, g: Tensor, h: Tensor, tile: int | None, need_grad: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`sum_ik |R_ik|` of every image with `R = a^T c - G`, and its gradients in `a` and `c`."""
    N, _, M = a.shape
    K = c.shape[2]
    tile = tile or _default_tile(a, max(M, K))
    rows, columns = a.mT.contiguous(), c.mT.contiguous()
    grad_a = torch.zeros_like(rows) if need_grad else None
    grad_c = torch.zeros_like(columns) if need_grad else None
    loss = a.new_zeros(N)
    for n in range(N):
        residual = _Residual(rows[n], columns[n], g[n], h[n])
        for i in range(0, M, tile):
            for k in range(0, K, tile):
                block_i, block_k = slice(i, i + tile), slice(k, k + tile)
                R = residual.tile(block_i, block_k)
                loss[n] += R.abs().sum()
                if grad_a is not None and grad_c is not None:
                    R.sign_()
                    grad_a[n, block_i].addmm_(R, columns[n, block_k])
                    grad_c[n, block_k].addmm_(R.T, rows[n, block_i])
    if grad_a is None or grad_c is None:
        return loss, None, None
    return loss, grad_a.mT, grad_c.mT


class _Residual:
    """Tiles of `a^T c - G` of one image, for `G = g^T h` of features or the equality of labels."""

    def __init__(self, rows: Tensor, columns: Tensor, g: Tensor, h: Tensor) -> None:
        if g.is_floating_point():
            # One product instead of two: [a, g] . [c, -h] = a.c - g.h.
            self.rows = torch.cat((rows, g.mT), dim=1)
            self.columns = torch.cat((columns, -h.mT), dim=1)
            self.row_labels = self.column_labels = None
        else:
            self.rows, self.columns = rows, columns
            self.row_labels = g
            self.column_labels = torch.where(h < 0, -2, h)  # an ignored pixel equals nothing, not even itself

    def tile(self, i: slice, j: slice) -> Tensor:
        R = self.rows[i] @ self.columns[j].T
        if self.row_labels is not None and self.column_labels is not None:
            R -= (self.row_labels[i, None] == self.column_labels[None, j]).to(R.dtype)
        return R


def _default_tile(a: Tensor, M: int) -> int:
    return min(M, CPU_TILE if a.device.type == "cpu" else DEVICE_TILE)


def softmax_affinity(logits: Tensor, queries: Tensor, keys: Tensor, chunk: int | None) -> tuple[Tensor, Tensor]:
    """`L softmax(Q^T K, -1)` and the log-sum-exp of every row, whole rows of a chunk of sources at a time."""
    N, _, M = queries.shape
    out = logits.new_zeros(N, logits.shape[1], keys.shape[2])
    lse = logits.new_empty(N, M)
    step = chunk or _default_chunk(keys)
    for n in range(N):
        for i in range(0, M, step):
            block = slice(i, i + step)
            S = queries[n, :, block].T @ keys[n]
            torch.logsumexp(S, dim=-1, out=lse[n, block])
            P = S.sub_(lse[n, block, None]).exp_()
            out[n].addmm_(logits[n, :, block], P)
    return out, lse


def softmax_affinity_backward(
    grad: Tensor, logits: Tensor, queries: Tensor, keys: Tensor, lse: Tensor, chunk: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `softmax_affinity`, each chunk of rows recomputed from the log-sum-exp.

    The row sum `sum_j P_ij dP_ij` of the softmax's gradient is `L_i . (grad P_i)`, already at hand.
    """
    N, _, M = queries.shape
    grad_logits, grad_queries, grad_keys = (
        torch.empty_like(logits),
        torch.empty_like(queries),
        torch.zeros_like(keys),
    )
    step = chunk or _default_chunk(keys)
    for n in range(N):
        for i in range(0, M, step):
            block = slice(i, i + step)
            P = queries[n, :, block].T @ keys[n]
            P.sub_(lse[n, block, None]).exp_()
            carried = grad[n] @ P.T
            grad_logits[n, :, block] = carried
            row_sum = (logits[n, :, block] * carried).sum(dim=0)
            grad_S = P.mul_((logits[n, :, block].T @ grad[n]).sub_(row_sum[:, None]))
            grad_queries[n, :, block] = keys[n] @ grad_S.T
            grad_keys[n].addmm_(queries[n, :, block], grad_S)
    return grad_logits, grad_queries, grad_keys


def _default_chunk(keys: Tensor) -> int:
    budget = CPU_CHUNK_BYTES if keys.device.type == "cpu" else DEVICE_CHUNK_BYTES
    return max(1, budget // (keys.shape[2] * keys.element_size()))
