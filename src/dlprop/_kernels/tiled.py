"""The pairwise ops tile by tile: the matrices of all pairs exist one small tile at a time, on any device.

Pixels are rows, (N, M, D) and contiguous, so that a block of them is one piece of memory.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .compared import Compared, Gradients, Needed
from .exponentials import exponential
from .residuals import residuals_of

# On CPUs the residual tile should stay in the second-level caches between the products that fill it and the two that
# consume it: edge = sqrt(bytes x threads / itemsize), 512 pixels in float32 on two threads. On accelerators a tile
# must amortise five kernel launches.
CPU_TILE_BYTES, DEVICE_TILE = 512 << 10, 4096

# Bytes that the rows of one softmax chunk may take: on CPUs what a third-level cache may hold.
CPU_CHUNK_BYTES, DEVICE_CHUNK_BYTES = 16 << 20, 256 << 20

# Bytes of a tile with few keys, on CPUs: wide products and few calls are worth more there than a second-level cache.
CPU_NARROW_BYTES = 8 << 20


def pairwise_l1(rows: Tensor, target: Tensor, tile: int | None, need_grad: bool) -> tuple[Tensor, Tensor | None]:
    """`sum_ij |R_ij|` of every image with `R_ij = a_i . a_j - G_ij`, and its gradient, in one pass over tiles i <= j.

    R is symmetric, so the tile above the diagonal stands for the one below: its absolute sum counts twice, and its
    signs are multiplied into the gradient of both its row blocks. 4 M^2 D operations for values and gradient
    against features (dense autograd: 8 M^2 D), 3 M^2 D against labels (6 M^2 D); memory O(M D + tile^2).
    """
    residuals = residuals_of(rows, target, rows, target)
    features = rows.to(residuals.rows.dtype)
    grad = torch.zeros_like(rows) if need_grad else None
    loss = rows.new_zeros(len(rows))
    blocks = _blocks(rows.shape[1], tile, features)
    for n in range(len(rows)):
        for p, i in enumerate(blocks):
            for j in blocks[p:]:
                R = residuals.tile(n, i, j)
                loss[n] += R.abs().sum(dtype=loss.dtype) * (1 if i == j else 2)
                if grad is not None:
                    R.sign_()
                    _add_product(grad[n, i], R, features[n, j], alpha=2)
                    if i != j:
                        _add_product(grad[n, j], R.T, features[n, i], alpha=2)
    return loss, grad


def pairwise_l1_cross(
    rows: Tensor, target: Tensor, columns: Tensor, column_target: Tensor, tile: int | None, need_grad: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`sum_ik |R_ik|` of every image with `R_ik = a_i . c_k - G_ik`, and its gradients in the rows and the columns."""
    residuals = residuals_of(rows, target, columns, column_target)
    features, others = (x.to(residuals.rows.dtype) for x in (rows, columns))
    grad_rows = torch.zeros_like(rows) if need_grad else None
    grad_columns = torch.zeros_like(columns) if need_grad else None
    loss = rows.new_zeros(len(rows))
    for n in range(len(rows)):
        for i in _blocks(rows.shape[1], tile, features):
            for k in _blocks(columns.shape[1], tile, features):
                R = residuals.tile(n, i, k)
                loss[n] += R.abs().sum(dtype=loss.dtype)
                if grad_rows is not None and grad_columns is not None:
                    R.sign_()
                    _add_product(grad_rows[n, i], R, others[n, k])
                    _add_product(grad_columns[n, k], R.T, features[n, i])
    return loss, grad_rows, grad_columns


def _add_product(grad: Tensor, signs: Tensor, features: Tensor, alpha: int = 1) -> None:
    """Add ``alpha`` times the product of a tile of signs to a gradient, which has at least float32 to add it up in."""
    if signs.dtype == grad.dtype:
        grad.addmm_(signs, features, alpha=alpha)
    else:
        grad.add_(signs @ features, alpha=alpha)


def _blocks(M: int, tile: int | None, like: Tensor) -> list[slice]:
    """M pixels in blocks of ``tile``, or of equal size up to the default, so that no thin block is left over."""
    if tile is None:
        tile = math.ceil(M / math.ceil(M / _tile_limit(like))) if M else 1
    return [slice(i, min(i + tile, M)) for i in range(0, M, tile)]


def _tile_limit(like: Tensor) -> int:
    if like.device.type != "cpu":
        return DEVICE_TILE
    return max(1, int((CPU_TILE_BYTES * torch.get_num_threads() / like.element_size()) ** 0.5))


def softmax_affinity(logits: Tensor, compared: Compared, chunk: int | None) -> tuple[Tensor, Tensor]:
    """`sum_i P_ij l_i` of every key j with `P_ij = softmax_j(q_i . k_j + b_j)`, and the log-sum-exp of every query i.

    A chunk is made tile by tile, each exponentiated in cache below the largest entry that its rows have shown so far;
    what a row learns later about its largest entry and its sum becomes a factor of its logits.
    """
    queries, keys, _ = compared
    out = logits.new_zeros(len(keys), logits.shape[2], keys.shape[1])  # few channels: pixels along memory
    lse, exp_ = queries.new_empty(queries.shape[:2]), exponential(compared)
    for n, i, tiles in _chunks(queries, keys, chunk):
        top = queries.new_full((i.stop - i.start, 1), -torch.inf)
        sums, tops = [], []
        for j, P in tiles:
            _similarities(compared, n, i, j, P)
            top = torch.maximum(top, P.amax(dim=1, keepdim=True))
            exp_(P.sub_(top))
            sums.append(P.sum(dim=1, keepdim=True))
            tops.append(top)
        factors = [exp_(earlier - top) for earlier in tops]
        total = torch.stack([x * factor for x, factor in zip(sums, factors, strict=True)]).sum(dim=0)
        lse[n, i] = (top + total.log())[:, 0]
        carried = logits[n, i] / total
        for (j, P), factor in zip(tiles, factors, strict=True):
            out[n, :, j].addmm_((carried * factor).T, P)
    return out.mT, lse


def softmax_affinity_backward(
    grad: Tensor, logits: Tensor, compared: Compared, lse: Tensor, chunk: int | None, needed: Needed
) -> tuple[Tensor | None, ...]:
    """Gradients of `softmax_affinity`, each chunk of sources recomputed from the log-sum-exp.

    The row sum `sum_j P_ij dP_ij` of the softmax's gradient is `l_i . (P grad)_i`, the gradient of the logits.
    """
    grad_logits, gradients, exp_ = torch.zeros_like(logits), compared.zeros(needed), exponential(compared)
    for n, i, tiles in _chunks(compared.queries, compared.keys, chunk):
        for j, P in tiles:
            _similarities(compared, n, i, j, P)
            exp_(P.sub_(lse[n, i, None]))
            grad_logits[n, i].addmm_(P, grad[n, j])
        if not any(needed):
            continue
        row_sum = (logits[n, i] * grad_logits[n, i]).sum(dim=1, keepdim=True)
        for j, P in tiles:
            grad_S = P.mul_((logits[n, i] @ grad[n, j].T).sub_(row_sum))
            _add_gradients(gradients, compared, n, i, j, grad_S)
    return grad_logits, *gradients


def attention(logits: Tensor, compared: Compared, chunk: int | None) -> tuple[Tensor, Tensor]:
    """`sum_j P_ij l_j` of every query i with `P_ij = softmax_j(q_i . k_j + b_j)`, and its log-sum-exp.

    One tile exists at a time; what a row has summed shrinks whenever a tile shows a larger entry. Where all keys have a
    bias of -inf every query receives 0.
    """
    queries, keys, bias = compared
    out = logits.new_zeros(len(queries), logits.shape[2], queries.shape[1])  # few channels: pixels along memory
    lse, exp_ = queries.new_empty(queries.shape[:2]), exponential(compared)
    # A row of nothing but -inf is an infinity of the features and shows, unless there is no key to hear.
    nothing = queries.new_full((len(queries),), torch.nan)
    if bias is not None:
        nothing = torch.where((bias == -torch.inf).all(dim=1), 1, nothing)
    for n, i, tiles in _tiles(queries, keys, chunk):
        top = queries.new_full((i.stop - i.start, 1), torch.finfo(queries.dtype).min)
        total = torch.zeros_like(top)
        for j, P in tiles:
            _similarities(compared, n, i, j, P)
            highest = torch.maximum(top, P.amax(dim=1, keepdim=True))
            exp_(P.sub_(highest))
            factor = exp_(top - highest)
            total = total * factor + P.sum(dim=1, keepdim=True)
            out[n, :, i].mul_(factor.T).addmm_(logits[n, j].T, P.T)
            top = highest
        total = torch.where(total == 0, nothing[n], total)
        out[n, :, i] /= total.T
        lse[n, i] = (top + total.log())[:, 0]
    return out.mT, lse


def attention_backward(
    grad: Tensor, logits: Tensor, compared: Compared, out: Tensor, lse: Tensor, chunk: int | None, needed: Needed
) -> tuple[Tensor | None, ...]:
    """Gradients of `attention`, each tile recomputed from the log-sum-exp; `sum_j P_ij dP_ij` is `grad_i . out_i`."""
    grad_logits, gradients, exp_ = torch.zeros_like(logits), compared.zeros(needed), exponential(compared)
    row_sums = (grad * out).sum(dim=2, keepdim=True)
    for n, i, tiles in _tiles(compared.queries, compared.keys, chunk):
        for j, P in tiles:
            _similarities(compared, n, i, j, P)
            exp_(P.sub_(lse[n, i, None]))
            grad_logits[n, j].addmm_(P.T, grad[n, i])
            if any(needed):
                is_narrow = P.stride(0) == 1  # and so is its gradient laid out
                grad_P = (logits[n, j] @ grad[n, i].T).T if is_narrow else grad[n, i] @ logits[n, j].T
                grad_S = P.mul_(grad_P.sub_(row_sums[n, i]))
                _add_gradients(gradients, compared, n, i, j, grad_S)
    return grad_logits, *gradients


def _similarities(compared: Compared, n: int, i: slice, j: slice, out: Tensor) -> None:
    queries, keys, bias = compared
    torch.mm(queries[n, i], keys[n, j].T, out=out)
    if bias is not None:
        out += bias[n, j]


def _add_gradients(gradients: Gradients, compared: Compared, n: int, i: slice, j: slice, grad_S: Tensor) -> None:
    """Add what the gradient of a tile of similarities gives to its queries, its keys and their bias."""
    if gradients.queries is not None:
        gradients.queries[n, i].addmm_(grad_S, compared.keys[n, j])
    if gradients.keys is not None:
        gradients.keys[n, j].addmm_(grad_S.T, compared.queries[n, i])
    if gradients.bias is not None:
        gradients.bias[n, j] += grad_S.sum(dim=0)


Tiles = Iterator[tuple[int, slice, list[tuple[slice, Tensor]]]]


def _chunks(queries: Tensor, keys: Tensor, chunk: int | None) -> Tiles:
    """The chunks of queries: image n, queries i, and the tiles of the chunk, keys j with memory for `S_ij`.

    By default a chunk has the rows of a tile, fewer where `rows x keys` would not fit in the budget.
    """
    N, M, _ = queries.shape
    K = keys.shape[1]
    budget = CPU_CHUNK_BYTES if keys.device.type == "cpu" else DEVICE_CHUNK_BYTES
    if chunk is None:
        chunk = max(1, min(_tile_limit(keys), budget // max(1, K * keys.element_size())))
        chunk = math.ceil(M / math.ceil(M / chunk)) if M else chunk
    columns = _blocks(K, None, keys)
    memory = queries.new_empty(min(chunk, M) * K)
    for n in range(N):
        for i in _blocks(M, chunk, keys):
            size = i.stop - i.start
            yield n, i, [(j, memory[size * j.start : size * j.stop].view(size, j.stop - j.start)) for j in columns]


def _tiles(queries: Tensor, keys: Tensor, chunk: int | None) -> Tiles:
    """The same, but all tiles share the memory of one, which has more rows where there are few keys.

    Few keys make a narrow tile. On CPUs its columns lie along memory, as reductions of short rows are slow.
    """
    N, M, _ = queries.shape
    columns = _blocks(keys.shape[1], None, keys)
    width = max((j.stop - j.start for j in columns), default=1)
    is_narrow = keys.device.type == "cpu" and 2 * width <= _tile_limit(keys)
    if chunk is None:
        numbers = _tile_limit(keys) ** 2
        if is_narrow:
            numbers = max(numbers, CPU_NARROW_BYTES // keys.element_size())
        chunk = max(1, numbers // width)
        chunk = math.ceil(M / math.ceil(M / chunk)) if M else chunk
    memory = queries.new_empty(min(chunk, M) * width)

    def tile(rows: int, j: slice) -> Tensor:
        size = j.stop - j.start
        used = memory[: rows * size]
        return used.view(size, rows).T if is_narrow else used.view(rows, size)

    for n in range(N):
        for i in _blocks(M, chunk, keys):
            yield n, i, [(j, tile(i.stop - i.start, j)) for j in columns]
