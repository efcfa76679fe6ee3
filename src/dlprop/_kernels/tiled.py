"""The pairwise ops tile by tile: the M x M matrices exist one cache-sized tile at a time, on any device.

Pixels are laid out as rows, (M, D), so that a tile is a contiguous block of memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

# On CPUs the residual tile should stay in the second-level caches between the products that fill it and the two that
# consume it: edge = sqrt(bytes x threads / itemsize), 512 pixels in float32 on two threads. On accelerators a tile
# must amortise five kernel launches.
CPU_TILE_BYTES, DEVICE_TILE = 512 << 10, 4096

# Bytes that the rows of one softmax chunk may take: on CPUs what a third-level cache may hold.
CPU_CHUNK_BYTES, DEVICE_CHUNK_BYTES = 16 << 20, 256 << 20


def pairwise_l1(a: Tensor, g: Tensor, tile: int | None, need_grad: bool) -> tuple[Tensor, Tensor | None]:
    """`sum_ij |R_ij|` of every image with `R = a^T a - G`, and its gradient, in one pass over the tiles i <= j.

    R is symmetric, so the tile above the diagonal stands for the one below: its absolute sum counts twice, and its
    signs are multiplied into the gradient of both its row blocks. 4 M^2 D operations for values and gradient
    against features (dense autograd: 8 M^2 D), 3 M^2 D against labels (6 M^2 D); memory O(M D + tile^2).
    """
    rows, target = a.mT.contiguous(), _Target(g, g)
    grad = torch.zeros_like(rows) if need_grad else None
    loss = a.new_zeros(len(a))
    blocks = _blocks(a.shape[2], tile, a)
    for n in range(len(a)):
        for p, i in enumerate(blocks):
            for j in blocks[p:]:
                R = rows[n, i] @ rows[n, j].T
                target.subtract_from(R, n, i, j)
                loss[n] += R.abs().sum() * (1 if i == j else 2)
                if grad is not None:
                    R.sign_()
                    grad[n, i].addmm_(R, rows[n, j], alpha=2)
                    if i != j:
                        grad[n, j].addmm_(R.T, rows[n, i], alpha=2)
    return loss, None if grad is None else grad.mT


def pairwise_l1_cross(
    a: Tensor, c: Tensor, g: Tensor, h: Tensor, tile: int | None, need_grad: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`sum_ik |R_ik|` of every image with `R = a^T c - G`, and its gradients in `a` and `c`."""
    rows, columns, target = a.mT.contiguous(), c.mT.contiguous(), _Target(g, h)
    grad_a = torch.zeros_like(rows) if need_grad else None
    grad_c = torch.zeros_like(columns) if need_grad else None
    loss = a.new_zeros(len(a))
    for n in range(len(a)):
        for i in _blocks(a.shape[2], tile, a):
            for k in _blocks(c.shape[2], tile, a):
                R = rows[n, i] @ columns[n, k].T
                target.subtract_from(R, n, i, k)
                loss[n] += R.abs().sum()
                if grad_a is not None and grad_c is not None:
                    R.sign_()
                    grad_a[n, i].addmm_(R, columns[n, k])
                    grad_c[n, k].addmm_(R.T, rows[n, i])
    if grad_a is None or grad_c is None:
        return loss, None, None
    return loss, grad_a.mT, grad_c.mT


class _Target:
    """The target similarity `G = g^T h` of features (N, E, M), or the equality of labels (N, M), tile by tile."""

    def __init__(self, g: Tensor, h: Tensor) -> None:
        self.is_features = g.is_floating_point()
        if self.is_features:
            self.rows = g.mT.contiguous()
            self.columns = self.rows if h is g else h.mT.contiguous()
        else:
            self.rows = g
            self.columns = torch.where(h < 0, -2, h)  # an ignored pixel equals nothing, not even itself

    def subtract_from(self, R: Tensor, n: int, i: slice, j: slice) -> None:
        """Subtract the tile of rows i and columns j of image n, in place."""
        if self.is_features:
            R.addmm_(self.rows[n, i], self.columns[n, j].T, alpha=-1)
        else:
            R -= (self.rows[n, i, None] == self.columns[n, None, j]).to(R.dtype)


def _blocks(M: int, tile: int | None, like: Tensor) -> list[slice]:
    """M pixels in blocks of ``tile``, or of equal size up to the default, so that no thin block is left over."""
    if tile is None:
        tile = math.ceil(M / math.ceil(M / _tile_limit(like))) if M else 1
    return [slice(i, min(i + tile, M)) for i in range(0, M, tile)]


def _tile_limit(like: Tensor) -> int:
    if like.device.type != "cpu":
        return DEVICE_TILE
    return max(1, int((CPU_TILE_BYTES * torch.get_num_threads() / like.element_size()) ** 0.5))


def softmax_affinity(logits: Tensor, queries: Tensor, keys: Tensor, chunk: int | None) -> tuple[Tensor, Tensor]:
    """`L softmax(Q^T K, -1)` and the log-sum-exp of every row, whole rows of a chunk of sources at a time.

    A chunk is made tile by tile, each exponentiated in cache below the largest entry that its rows have shown so far;
    what a row learns later about its largest entry and its sum becomes a factor of its logits.
    """
    N, C, K = len(keys), logits.shape[1], keys.shape[2]
    out, lse = logits.new_zeros(N, C, K), queries.new_empty(queries.shape[0], queries.shape[2])
    for n, i, q, k, tiles in _chunks(queries, keys, chunk):
        top = queries.new_full((q.shape[0], 1), -torch.inf)
        sums, tops = [], []
        for j, P in tiles:
            torch.mm(q, k[j].T, out=P)
            top = torch.maximum(top, P.amax(dim=1, keepdim=True))
            P.sub_(top).exp_()
            sums.append(P.sum(dim=1, keepdim=True))
            tops.append(top)
        factors = [(earlier - top).exp_() for earlier in tops]
        total = torch.stack([x * factor for x, factor in zip(sums, factors, strict=True)]).sum(dim=0)
        lse[n, i] = (top + total.log())[:, 0]
        carried = logits[n, :, i] / total.T
        for (j, P), factor in zip(tiles, factors, strict=True):
            out[n, :, j].addmm_(carried * factor.T, P)
    return out, lse


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
    """Gradients of `softmax_affinity`, each chunk of rows recomputed from the log-sum-exp.

    The row sum `sum_j P_ij dP_ij` of the softmax's gradient is `L_i . (grad P_i)`, the gradient of the logits.
    """
    grad_logits = torch.zeros_like(logits)
    grad_queries = torch.zeros_like(queries.mT, memory_format=torch.contiguous_format) if need_queries else None
    grad_keys = torch.zeros_like(keys.mT, memory_format=torch.contiguous_format) if need_keys else None
    for n, i, q, k, tiles in _chunks(queries, keys, chunk):
        for j, P in tiles:
            torch.mm(q, k[j].T, out=P)
            P.sub_(lse[n, i, None]).exp_()
            grad_logits[n, :, i].addmm_(grad[n, :, j], P.T)
        if grad_queries is None and grad_keys is None:
            continue
        row_sum = (logits[n, :, i] * grad_logits[n, :, i]).sum(dim=0)[:, None]
        for j, P in tiles:
            grad_S = P.mul_((logits[n, :, i].T @ grad[n, :, j]).sub_(row_sum))
            if grad_queries is not None:
                grad_queries[n, i].addmm_(grad_S, k[j])
            if grad_keys is not None:
                grad_keys[n, j].addmm_(grad_S.T, q)
    return (
        grad_logits,
        None if grad_queries is None else grad_queries.mT,
        None if grad_keys is None else grad_keys.mT,
    )


def _chunks(
    queries: Tensor, keys: Tensor, chunk: int | None
) -> Iterator[tuple[int, slice, Tensor, Tensor, list[tuple[slice, Tensor]]]]:
    """The chunks of sources: image n, slice i, the queries of i and all keys of n as rows, and the chunk's tiles.

    A tile is a slice of targets and memory for it, which every chunk uses again.

    By default a chunk has the rows of a tile, fewer where `rows x targets` would not fit in the budget.
    """
    N, _, M = queries.shape
    K = keys.shape[2]
    budget = CPU_CHUNK_BYTES if keys.device.type == "cpu" else DEVICE_CHUNK_BYTES
    if chunk is None:
        chunk = max(1, min(_tile_limit(keys), budget // max(1, K * keys.element_size())))
        chunk = math.ceil(M / math.ceil(M / chunk)) if M else chunk
    columns = _blocks(K, None, keys)
    memory = queries.new_empty(min(chunk, M) * K)
    query_rows, key_rows = queries.mT.contiguous(), keys.mT.contiguous()
    for n in range(N):
        for i in _blocks(M, chunk, keys):
            rows = i.stop - i.start
            tiles = [(j, memory[rows * j.start : rows * j.stop].view(rows, j.stop - j.start)) for j in columns]
            yield n, i, query_rows[n, i], key_rows[n], tiles
