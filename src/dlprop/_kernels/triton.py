"""The pairwise ops as Triton kernels: a tile of the M x M matrices exists in registers only.

Every kernel has the same form. A program owns a block of pixels, walks over blocks of other pixels, and for each forms
the tile of similarities chunk by chunk of the channels, turns it into weights (the signs of the residuals, or softmax
probabilities) and multiplies these into a sum of its own. No two programs write to one place, so there are no atomics
and a result is the same every time. Products are accumulated in float32 (float64 for float64 inputs).

Pixels and channels are padded with zeros to whole blocks while they are copied into the layout the kernels read, so
the loads over pixels need no masks: a padded pixel has zero features and equals no label, so its residuals vanish.

Import this module only where Triton is installed. Its kernels run on CUDA tensors, or, if TRITON_INTERPRET=1 was set
before Triton was first imported, on CPU tensors in Triton's interpreter.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Blocks(NamedTuple):
    """The block sizes of one launch: what a program holds."""

    owned: int  # pixels that a program owns
    visited: int  # pixels of one step of its walk
    chunk: int  # channels of one step of a similarity
    depth: int  # channels of the sum that it accumulates
    warps: int
    stages: int  # chunks on the way from memory while another is multiplied


# Programs to start for every multiprocessor at least, so that none is idle; one is resident at a time. In the
# interpreter a few in all, so that walks are split there as well.
PROGRAMS_PER_PROCESSOR = 2
INTERPRETED_PROGRAMS = 12


# ---------------------------------------------------------------------------------------------------------------------
# Device code. Pointers are advanced by 64-bit scalars to the block; offsets inside a block fit 32 bits.


@triton.jit
def _dot(x, y, accumulator, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    if UPCAST:  # the interpreter holds bfloat16 as integers and would multiply those
        x = x.to(tl.float32)
        y = y.to(tl.float32)
    return tl.dot(x, y, accumulator, input_precision=PRECISION)


@triton.jit
def _add_products(
    tile,
    rows,
    columns,
    channels,
    OWNED: tl.constexpr,
    VISITED: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """`tile_ij + x_i . y_j` for the blocks that begin at ``rows`` and ``columns``, both (pixels, channels)."""
    chunk = tl.arange(0, CHUNK)
    row_pointers = rows + tl.arange(0, OWNED)[:, None] * channels + chunk[None, :]
    column_pointers = columns + tl.arange(0, VISITED)[None, :] * channels + chunk[:, None]
    for _ in range(0, channels, CHUNK):
        tile = _dot(tl.load(row_pointers), tl.load(column_pointers), tile, PRECISION, UPCAST)
        row_pointers += CHUNK
        column_pointers += CHUNK
    return tile


@triton.jit
def _add_weighted(
    total,
    weights,
    values,
    first_channel,
    channels,
    channel_stride,
    pixel_stride,
    VISITED: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """`total_id + sum_j weights_ij values_dj` for the block of pixels that begins at ``values``."""
    d = tl.arange(0, DEPTH)
    pointers = values + tl.cast(first_channel, tl.int64) * channel_stride
    pointers += tl.arange(0, VISITED)[:, None] * pixel_stride + d[None, :] * channel_stride
    block = tl.load(pointers, mask=(first_channel + d < channels)[None, :], other=0.0)
    return _dot(weights.to(block.dtype), block, total, PRECISION, UPCAST)


@triton.jit
def _store_total(out, total, owner, owners, first_channel, channels, OWNED: tl.constexpr, DEPTH: tl.constexpr):
    """Write ``total`` (owner, channel) into ``out`` (channels, owners)."""
    d = tl.arange(0, DEPTH)
    i = owner + tl.arange(0, OWNED)
    pointers = out + tl.cast(first_channel, tl.int64) * owners + d[None, :] * owners + i[:, None]
    tl.store(pointers, total, mask=(i < owners)[:, None] & (first_channel + d < channels)[None, :])


@triton.jit
def _pairwise_kernel(
    rows,  # (N, row_pad, channels)
    columns,  # (N, column_pad, channels)
    row_targets,  # (N, row_pad, target_channels), or labels (N, row_pad)
    column_targets,
    values,  # columns once more, in the layout that the second product wants
    gradient,  # (splits, N, depth, owners)
    sums,  # (splits, N, blocks of owners)
    owners,
    visits,
    row_pad,
    column_pad,
    channels,
    target_channels,
    depth,
    value_image,
    value_channel,
    value_pixel,
    walk,  # pixels that one split visits
    depth_blocks,
    LABELS: tl.constexpr,
    NEED_GRADIENT: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    OWNED: tl.constexpr,
    VISITED: tl.constexpr,
    CHUNK: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """`sum_j |R_ij|` over the owned pixels i, and `sum_j sign(R_ij) c_j` of each, with `R_ij = a_i . c_j - G_ij`.

    A sum of more channels than a program has registers for is divided among programs, each of which forms the signs
    anew: that costs D more products per pair and block of channels. Keeping the signs and walking over the channels
    instead would read and write the unfinished sum, OWNED x D, once per tile.
    """
    block = tl.program_id(0)
    split = tl.program_id(1) // depth_blocks
    depth_block = tl.program_id(1) % depth_blocks
    n = tl.program_id(2).to(tl.int64)
    owner = block * OWNED
    first_channel = depth_block * DEPTH

    row = n * row_pad + owner
    if LABELS:
        own_labels = tl.load(row_targets + row + tl.arange(0, OWNED))[:, None]
    sums_of_rows = tl.zeros((OWNED,), ACCUMULATOR)
    total = tl.zeros((OWNED, DEPTH), ACCUMULATOR)
    start = split * walk
    for visited in range(start, min(start + walk, visits), VISITED):
        column = n * column_pad + visited
        if LABELS:
            labels = tl.load(column_targets + column + tl.arange(0, VISITED))[None, :]
            tile = tl.where((own_labels == labels) & (own_labels >= 0), -1.0, 0.0).to(ACCUMULATOR)
        else:
            tile = -_add_products(
                tl.zeros((OWNED, VISITED), ACCUMULATOR),
                row_targets + row * target_channels,
                column_targets + column * target_channels,
                target_channels,
                OWNED,
                VISITED,
                CHUNK,
                PRECISION,
                UPCAST,
            )
        tile = _add_products(
            tile,
            rows + row * channels,
            columns + column * channels,
            channels,
            OWNED,
            VISITED,
            CHUNK,
            PRECISION,
            UPCAST,
        )
        sums_of_rows += tl.sum(tl.abs(tile), axis=1)
        if NEED_GRADIENT:
            signs = tl.where(tile > 0, 1.0, tl.where(tile < 0, -1.0, 0.0))
            total = _add_weighted(
                total,
                signs,
                values + n * value_image + tl.cast(visited, tl.int64) * value_pixel,
                first_channel,
                depth,
                value_channel,
                value_pixel,
                VISITED,
                DEPTH,
                PRECISION,
                UPCAST,
            )

    part = split * tl.num_programs(2) + n
    if depth_block == 0:
        tl.store(sums + part * tl.num_programs(0) + block, tl.sum(sums_of_rows, axis=0))
    if NEED_GRADIENT:
        _store_total(gradient + part * depth * owners, total, owner, owners, first_channel, depth, OWNED, DEPTH)


@triton.jit
def _log_sum_exp_kernel(
    rows,  # (N, row_pad, channels)
    columns,  # (N, column_pad, channels)
    out,  # (splits, N, owners)
    owners,
    visits,
    row_pad,
    column_pad,
    channels,
    walk,
    ACCUMULATOR: tl.constexpr,
    OWNED: tl.constexpr,
    VISITED: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """`log sum_j exp(S_ij)` of the owned pixels i over one split of the others; a split is never empty."""
    block = tl.program_id(0)
    split = tl.program_id(1)
    n = tl.program_id(2).to(tl.int64)
    owner = block * OWNED
    largest = tl.full((OWNED,), float("-inf"), ACCUMULATOR)
    total = tl.zeros((OWNED,), ACCUMULATOR)
    start = split * walk
    for visited in range(start, min(start + walk, visits), VISITED):
        S = _add_products(
            tl.zeros((OWNED, VISITED), ACCUMULATOR),
            rows + (n * row_pad + owner) * channels,
            columns + (n * column_pad + visited) * channels,
            channels,
            OWNED,
            VISITED,
            CHUNK,
            PRECISION,
            UPCAST,
        )
        S = tl.where((visited + tl.arange(0, VISITED) < visits)[None, :], S, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(S, axis=1))
        total = total * tl.exp(largest - new_largest) + tl.sum(tl.exp(S - new_largest[:, None]), axis=1)
        largest = new_largest
    i = owner + tl.arange(0, OWNED)
    part = split * tl.num_programs(2) + n
    tl.store(out + part * owners + i, largest + tl.log(total), mask=i < owners)


@triton.jit
def _softmax_kernel(
    rows,  # (N, row_pad, channels)
    columns,  # (N, column_pad, channels)
    row_carried,  # (N, row_pad, carried_channels), read for the gradient of the similarities only
    column_carried,
    lse,  # (N, pad) of the sources
    shift,  # (N, pad) of the sources, likewise
    values,
    out,  # (splits, N, depth, owners)
    owners,
    visits,
    row_pad,
    column_pad,
    channels,
    carried_channels,
    depth,
    value_image,
    value_channel,
    value_pixel,
    walk,
    depth_blocks,
    SOURCES_OWN: tl.constexpr,
    GRADIENT: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    OWNED: tl.constexpr,
    VISITED: tl.constexpr,
    CHUNK: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """`sum_j W_ij v_j` of the owned pixels i, for `W = P` or, with GRADIENT, `W = P * (L^T G - shift)`.

    P is the softmax over the targets; the owned pixels are its sources (rows) or its targets (columns).
    """
    block = tl.program_id(0)
    split = tl.program_id(1) // depth_blocks
    depth_block = tl.program_id(1) % depth_blocks
    n = tl.program_id(2).to(tl.int64)
    owner = block * OWNED
    first_channel = depth_block * DEPTH

    row = n * row_pad + owner
    if SOURCES_OWN:
        row_lse = tl.load(lse + row + tl.arange(0, OWNED))[:, None]
        if GRADIENT:
            row_shift = tl.load(shift + row + tl.arange(0, OWNED))[:, None]
    owned_is_pixel = (owner + tl.arange(0, OWNED) < owners)[:, None]
    total = tl.zeros((OWNED, DEPTH), ACCUMULATOR)
    start = split * walk
    for visited in range(start, min(start + walk, visits), VISITED):
        column = n * column_pad + visited
        S = _add_products(
            tl.zeros((OWNED, VISITED), ACCUMULATOR),
            rows + row * channels,
            columns + column * channels,
            channels,
            OWNED,
            VISITED,
            CHUNK,
            PRECISION,
            UPCAST,
        )
        # A padded target has similarity 0, which may be far above the log-sum-exp.
        is_pixel = owned_is_pixel & (visited + tl.arange(0, VISITED) < visits)[None, :]
        S = tl.where(is_pixel, S, float("-inf"))
        W = tl.exp(S - (row_lse if SOURCES_OWN else tl.load(lse + column + tl.arange(0, VISITED))[None, :]))
        if GRADIENT:
            carried = _add_products(
                tl.zeros((OWNED, VISITED), ACCUMULATOR),
                row_carried + row * carried_channels,
                column_carried + column * carried_channels,
                carried_channels,
                OWNED,
                VISITED,
                CHUNK,
                PRECISION,
                UPCAST,
            )
            W *= carried - (row_shift if SOURCES_OWN else tl.load(shift + column + tl.arange(0, VISITED))[None, :])
        if PRECISION == "tf32":  # rounded, as in `_as_rows`; signs, the other kind of weights, are exact as they are
            W = tl.where(W == W, ((W.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True), W)
        total = _add_weighted(
            total,
            W,
            values + n * value_image + tl.cast(visited, tl.int64) * value_pixel,
            first_channel,
            depth,
            value_channel,
            value_pixel,
            VISITED,
            DEPTH,
            PRECISION,
            UPCAST,
        )
    part = split * tl.num_programs(2) + n
    _store_total(out + part * depth * owners, total, owner, owners, first_channel, depth, OWNED, DEPTH)


INTERPRETED = not isinstance(_pairwise_kernel, triton.runtime.JITFunction)


# ---------------------------------------------------------------------------------------------------------------------
# The pairwise loss


def pairwise_l1(a: Tensor, g: Tensor, tile: int | None, need_grad: bool) -> tuple[Tensor, Tensor | None]:
    """`sum_ij |R_ij|` of every image with `R = a^T a - G`, and its gradient, in one pass over all tiles.

    4 M^2 D operations for value and gradient, and 2 M^2 D more for every further block of channels that the gradient
    is divided into; memory O(M D). Both halves of the symmetric R are visited, because a program that adds to the
    gradient of the other half's pixels as well would need atomics.
    """
    loss, grad = _pairwise(a, a, g, g, tile, need_grad)
    return loss, None if grad is None else grad.mul_(2)


def pairwise_l1_cross(
    a: Tensor, c: Tensor, g: Tensor, h: Tensor, tile: int | None, need_grad: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`sum_ik |R_ik|` of every image with `R = a^T c - G`, and its gradients in `a` and `c`, a pass for each."""
    loss, grad_a = _pairwise(a, c, g, h, tile, need_grad)
    if not need_grad:
        return loss, None, None
    _, grad_c = _pairwise(c, a, h, g, tile, need_grad)
    return loss, grad_a, grad_c


def _pairwise(
    a: Tensor, c: Tensor, g: Tensor, h: Tensor, tile: int | None, need_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """The sums of `|a_i . c_k - G_ik|` and their gradient in `a` alone."""
    N, D, M = a.shape
    if N == 0:
        return a.new_zeros(N), torch.zeros_like(a) if need_grad else None
    labels = not g.is_floating_point()
    blocks = _blocks(a.dtype, D if need_grad else 16, tile)
    rows = _as_rows(a, blocks)
    columns = rows if c is a else _as_rows(c, blocks)
    if labels:
        row_targets = _pad(g, rows.shape[1], -1)
        column_targets = row_targets if h is g else _pad(h, columns.shape[1], -1)
    else:
        row_targets = _as_rows(g.to(a.dtype), blocks)
        column_targets = row_targets if h is g else _as_rows(h.to(a.dtype), blocks)
    values = _as_values(c, columns)
    accumulator = _accumulator(a.dtype)
    owner_blocks = triton.cdiv(M, blocks.owned)
    depth_blocks = triton.cdiv(D, blocks.depth) if need_grad else 1
    walk, splits = _walk(c.shape[2], blocks.visited, owner_blocks * depth_blocks * N, a.device)
    sums = a.new_empty((splits, N, owner_blocks), dtype=accumulator)
    gradient = a.new_empty((splits, N, D, M) if need_grad else 1, dtype=accumulator)
    _launch(
        _pairwise_kernel,
        (owner_blocks, splits * depth_blocks, N),
        blocks,
        a.dtype,
        rows,
        columns,
        row_targets,
        column_targets,
        values,
        gradient,
        sums,
        M,
        c.shape[2],
        rows.shape[1],
        columns.shape[1],
        rows.shape[2],
        1 if labels else row_targets.shape[2],
        D,
        *values.stride(),
        walk,
        depth_blocks,
        LABELS=labels,
        NEED_GRADIENT=need_grad,
        DEPTH=blocks.depth,
    )
    return sums.sum(dim=(0, 2)).to(a.dtype), _sum_of_splits(gradient, a.dtype) if need_grad else None


# ---------------------------------------------------------------------------------------------------------------------
# The softmax affinity


def softmax_affinity(logits: Tensor, queries: Tensor, keys: Tensor, chunk: int | None) -> tuple[Tensor, Tensor]:
    """`L softmax(Q^T K, -1)` and the log-sum-exp of every row: one pass owned by the sources, one by the targets."""
    if logits.shape[0] == 0:
        return logits.new_zeros(0, logits.shape[1], keys.shape[2]), logits.new_zeros(0, queries.shape[2])
    lse = _log_sum_exp(queries, keys, chunk)
    out = _softmax(keys, queries, logits, lse, chunk, sources_own=False)
    return out.to(logits.dtype), lse.to(logits.dtype)


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
    """Gradients of `softmax_affinity`: the probabilities are formed again from the log-sum-exp, for each gradient.

    The row sum `sum_j P_ij dP_ij` of the softmax's gradient is `L_i . (grad P_i)`, already at hand.
    """
    if logits.shape[0] == 0:
        return torch.zeros_like(logits), torch.zeros_like(queries), torch.zeros_like(keys)
    if lse.dtype.itemsize < 4:
        lse = _log_sum_exp(queries, keys, chunk)  # rounded to half precision it would put P off by per cents
    carried = _softmax(queries, keys, grad, lse, chunk, sources_own=True)
    shift = (logits * carried).sum(dim=1)
    grad_queries = grad_keys = None
    if need_queries:
        pairs = logits, grad, shift
        grad_queries = _softmax(queries, keys, keys, lse, chunk, sources_own=True, pairs=pairs).to(queries.dtype)
    if need_keys:
        pairs = grad, logits, shift
        grad_keys = _softmax(keys, queries, queries, lse, chunk, sources_own=False, pairs=pairs).to(keys.dtype)
    return carried.to(logits.dtype), grad_queries, grad_keys


def _log_sum_exp(queries: Tensor, keys: Tensor, chunk: int | None) -> Tensor:
    """(N, M), in at least float32."""
    N, _, M = queries.shape
    blocks = _blocks(queries.dtype, 16, chunk)
    rows = _as_rows(queries, blocks)
    columns = _as_rows(keys, blocks)
    owner_blocks = triton.cdiv(M, blocks.owned)
    walk, splits = _walk(keys.shape[2], blocks.visited, owner_blocks * N, queries.device)
    out = queries.new_empty((splits, N, M), dtype=_accumulator(queries.dtype))
    _launch(
        _log_sum_exp_kernel,
        (owner_blocks, splits, N),
        blocks,
        queries.dtype,
        rows,
        columns,
        out,
        M,
        keys.shape[2],
        rows.shape[1],
        columns.shape[1],
        rows.shape[2],
        walk,
    )
    return out[0] if splits == 1 else out.logsumexp(dim=0)


def _softmax(
    x: Tensor,
    y: Tensor,
    v: Tensor,
    lse: Tensor,
    chunk: int | None,
    *,
    sources_own: bool,
    pairs: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """`sum_j W_ij v_j` of every pixel i of ``x``, over the pixels j of ``y``, in at least float32."""
    N, _, M = x.shape
    D = v.shape[1]
    blocks = _blocks(x.dtype, D, chunk)
    rows = _as_rows(x, blocks)
    columns = _as_rows(y, blocks)
    sources = rows if sources_own else columns
    lse = _pad(lse, sources.shape[1], float("inf"))
    if pairs is None:
        row_carried, column_carried, shift, carried_channels = rows, columns, lse, 0
    else:
        row_carried = _as_rows(pairs[0].to(x.dtype), blocks)
        column_carried = _as_rows(pairs[1].to(x.dtype), blocks)
        shift = _pad(pairs[2], sources.shape[1], 0)
        carried_channels = row_carried.shape[2]
    v = v.to(x.dtype)
    values = _as_values(v, columns if v is y else _as_rows(v, blocks))
    owner_blocks = triton.cdiv(M, blocks.owned)
    depth_blocks = triton.cdiv(D, blocks.depth)
    walk, splits = _walk(y.shape[2], blocks.visited, owner_blocks * depth_blocks * N, x.device)
    out = x.new_empty((splits, N, D, M), dtype=_accumulator(x.dtype))
    _launch(
        _softmax_kernel,
        (owner_blocks, splits * depth_blocks, N),
        blocks,
        x.dtype,
        rows,
        columns,
        row_carried,
        column_carried,
        lse,
        shift,
        values,
        out,
        M,
        y.shape[2],
        rows.shape[1],
        columns.shape[1],
        rows.shape[2],
        carried_channels,
        D,
        *values.stride(),
        walk,
        depth_blocks,
        SOURCES_OWN=sources_own,
        GRADIENT=pairs is not None,
        DEPTH=blocks.depth,
    )
    return _sum_of_splits(out, out.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Layouts and launches


def _blocks(dtype: torch.dtype, depth: int, tile: int | None) -> Blocks:
    """The block sizes for sums over ``depth`` channels; ``tile`` makes them smaller, never larger.

    Registers bound them: the sum takes owned * depth of the 64 Ki words of a multiprocessor and the tile
    owned * visited, twice as much in float64, and a block of values, visited * depth, passes through registers too.
    With these sizes at most 80 KiB of shared memory hold `stages` chunks of both blocks of pixels and one block of
    values. Compiled for compute capability 9.0 at most 16 bytes a thread spill from registers; for 8.0 up to 284, in
    TF32 sums of 256 channels. Twice the owned pixels at that depth would spill hundreds of bytes on both.
    """
    depth = max(16, triton.next_power_of_2(depth))
    if dtype == torch.float64:
        blocks = Blocks(owned=32, visited=32, chunk=16, depth=min(depth, 64), warps=4, stages=2)
    elif dtype == torch.float32 and _precision(dtype) == "ieee":
        # No tensor cores: operands are held by each thread, in more registers than the fragments of a matrix product.
        blocks = Blocks(owned=128, visited=32, chunk=16, depth=min(depth, 128), warps=8, stages=2)
    else:
        chunk = 128 // dtype.itemsize  # 128 bytes, one line of the cache and of swizzled shared memory
        owned = 128 if depth <= 128 else 64
        blocks = Blocks(owned, visited=64, chunk=chunk, depth=min(depth, 256), warps=8, stages=3)
    if tile is None:
        return blocks
    tile = max(16, triton.next_power_of_2(tile))
    return blocks._replace(owned=min(tile, blocks.owned), visited=min(tile, blocks.visited))


def _walk(pixels: int, visited: int, programs: int, device: torch.device) -> tuple[int, int]:
    """How many pixels a program visits, and by how many programs each walk is shared.

    Few owned blocks would leave most of the GPU idle, so their walks are split, and torch adds the parts in order.
    """
    if INTERPRETED:
        wanted = INTERPRETED_PROGRAMS
    else:
        wanted = PROGRAMS_PER_PROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count
    steps = triton.cdiv(pixels, visited)
    steps_of_one = triton.cdiv(steps, min(steps, triton.cdiv(wanted, programs)))
    return steps_of_one * visited, triton.cdiv(steps, steps_of_one)


def _as_rows(x: Tensor, blocks: Blocks) -> Tensor:
    """``x`` (N, D, M) as contiguous (N, M, D), padded to whole blocks, of owned as well as of visited pixels."""
    N, D, M = x.shape
    pixels = max(blocks.owned, blocks.visited)
    rows = x.new_zeros(N, triton.cdiv(M, pixels) * pixels, triton.cdiv(D, blocks.chunk) * blocks.chunk)
    rows[:, :M, :D] = x.mT
    if _precision(x.dtype) == "tf32":
        # Rounded here, because the tensor cores would cut: features are often all positive, so that would be a bias.
        bits = rows.view(torch.int32).add(0x1000).bitwise_and_(-0x2000)
        rows = torch.where(rows.isnan(), rows, bits.view(torch.float32))  # the sum may carry a NaN over to 0
    return rows


def _as_values(x: Tensor, rows: Tensor) -> Tensor:
    """``rows`` of ``x`` as (N, D, M): with contiguous pixels in float32, the sum's index, as tensor cores want it.

    They read half precision in either order, and a view of the rows will do.
    """
    values = rows.mT[:, : x.shape[1]]
    return values if x.dtype.itemsize < 4 else values.contiguous()


def _pad(x: Tensor, size: int, value: float) -> Tensor:
    """``x`` (N, M) contiguous and filled up with ``value`` to (N, size)."""
    padded = x.new_full((x.shape[0], size), value)
    padded[:, : x.shape[1]] = x
    return padded


def _sum_of_splits(parts: Tensor, dtype: torch.dtype) -> Tensor:
    return (parts[0] if parts.shape[0] == 1 else parts.sum(dim=0)).to(dtype)


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _precision(dtype: torch.dtype) -> str:
    """How float32 is multiplied: "tf32" where torch's own products on CUDA are allowed to be, else "ieee"."""
    if dtype != torch.float32:
        return "ieee"
    # The newer of torch's two settings first: once it has been used, reading the older one may raise.
    setting = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    if setting is None:
        return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    return "tf32" if setting == "tf32" else "ieee"


def _launch(
    kernel: Any, grid: tuple[int, int, int], blocks: Blocks, dtype: torch.dtype, *args: Any, **constants: Any
) -> None:
    with torch.cuda.device_of(args[0]):
        kernel[grid](
            *args,
            ACCUMULATOR=tl.float64 if dtype == torch.float64 else tl.float32,
            OWNED=blocks.owned,
            VISITED=blocks.visited,
            CHUNK=blocks.chunk,
            PRECISION=_precision(dtype),
            UPCAST=INTERPRETED and dtype == torch.bfloat16,
            num_warps=blocks.warps,
            num_stages=blocks.stages,
            enable_fp_fusion=True,  # where there are no tensor cores, a product is a chain of fused multiply-adds
            **constants,
        )
