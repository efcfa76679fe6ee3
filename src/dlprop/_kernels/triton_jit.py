"""Device code of the Triton kernels; `triton.py` lays out their inputs and launches them.

A program owns a block of pixels and keeps their channels in shared memory. It walks over blocks of other pixels, forms
the tile of similarities in registers, turns it into weights (the signs of the residuals, or softmax probabilities) and
multiplies these into a sum of its own. No two programs write to one place, so a result is the same every time.

Pixels are rows, padded with zeros to whole blocks of owned pixels and to CHANNELS, a power of two, so that loads need
no masks. A number is a sum of PIECES, largest first; a product of two numbers is the sum of those products of pieces
that are not below the error of the smallest piece. Products are accumulated in float32 (float64 for float64).
"""

# No annotations as strings here: the compiler reads `tl.constexpr` off them.
import triton
import triton.language as tl

# A kernel is compiled anew for every combination of arguments that are multiples of 16, and knowing it of these gains
# nothing.
SIZES = ["owners", "visits"]


@triton.jit
def _block(pixels, first, SIZE: tl.constexpr, CHANNELS: tl.constexpr):
    """(SIZE, CHANNELS) of ``pixels`` from pixel ``first`` on, a 64-bit number; offsets in a block fit 32 bits."""
    offsets = tl.arange(0, SIZE)[:, None] * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    return tl.load(pixels + first * CHANNELS + offsets)


INTERPRETED = tl.constexpr(not isinstance(_block, triton.runtime.JITFunction))


@triton.jit
def _pieces(pixels, first, step, SIZE: tl.constexpr, CHANNELS: tl.constexpr, PIECES: tl.constexpr):
    """The three pieces of a block, ``step`` pixels apart in memory; the first again for those that do not exist."""
    x = _block(pixels, first, SIZE, CHANNELS)
    y = x
    z = x
    if PIECES > 1:
        y = _block(pixels, first + step, SIZE, CHANNELS)
    if PIECES > 2:
        z = _block(pixels, first + 2 * step, SIZE, CHANNELS)
    return x, y, z


@triton.jit
def _dot(x, y, total):
    if INTERPRETED and x.dtype == tl.bfloat16:  # the interpreter holds it as integers and would multiply those
        x = x.to(tl.float32)
        y = y.to(tl.float32)
    return tl.dot(x, y, total, input_precision="ieee", out_dtype=total.dtype)


@triton.jit
def _similarities(a0, a1, a2, c0, c1, c2, ACCUMULATOR: tl.constexpr, PIECES: tl.constexpr):
    """`a_i . c_j`, smallest products first."""
    tile = tl.zeros((a0.shape[0], c0.shape[0]), ACCUMULATOR)
    if PIECES > 2:
        tile = _dot(a2, tl.trans(c0), tile)
        tile = _dot(a1, tl.trans(c1), tile)
        tile = _dot(a0, tl.trans(c2), tile)
    if PIECES > 1:
        tile = _dot(a1, tl.trans(c0), tile)
        tile = _dot(a0, tl.trans(c1), tile)
    return _dot(a0, tl.trans(c0), tile)


@triton.jit
def _add_signed(total, signs, v0, v1, v2, PIECES: tl.constexpr):
    """`total_id + sum_j signs_ij v_jd`; signs are exact in every dtype."""
    signs = signs.to(v0.dtype)
    if PIECES > 2:
        total = _dot(signs, v2, total)
    if PIECES > 1:
        total = _dot(signs, v1, total)
    return _dot(signs, v0, total)


@triton.jit
def _add_weighted(total, weights, v0, v1, v2, PIECES: tl.constexpr):
    """`total_id + sum_j weights_ij v_jd`, the weights split into pieces as well."""
    w0 = weights.to(v0.dtype)
    if PIECES > 1:
        rest = weights - w0.to(tl.float32)
        w1 = rest.to(v0.dtype)
        if PIECES > 2:
            w2 = (rest - w1.to(tl.float32)).to(v0.dtype)
            total = _dot(w2, v0, total)
            total = _dot(w1, v1, total)
            total = _dot(w0, v2, total)
        total = _dot(w1, v0, total)
        total = _dot(w0, v1, total)
    return _dot(w0, v0, total)


@triton.jit
def _place(owners, visits, OWNED: tl.constexpr, VISITED: tl.constexpr):
    """What a program of the grid (blocks of owners, splits, N) works on: pixels of one image, and pixels in memory.

    Returns its first owned pixel; the first pixel that it visits and the end of its walk; its part of the result, one
    of (splits, N); then in memory the first owned pixel, the image's first pixel to visit, and the steps from one piece
    to the next of both.
    """
    n = tl.program_id(2).to(tl.int64)
    images = tl.num_programs(2).to(tl.int64)
    owner = tl.program_id(0) * OWNED
    row_pad = tl.num_programs(0) * OWNED
    column_pad = tl.cdiv(visits, OWNED) * OWNED
    walk = tl.cdiv(tl.cdiv(visits, VISITED), tl.num_programs(1)) * VISITED
    start = tl.program_id(1) * walk
    stop = min(start + walk, visits)
    part = tl.program_id(1) * images + n
    return owner, start, stop, part, n * row_pad + owner, n * column_pad, images * row_pad, images * column_pad


@triton.jit
def _store_total(out, total, part, owner, owners):
    """Write ``total`` into one part of ``out`` (parts, owners, channels), padded channels and all."""
    d = tl.arange(0, total.shape[1])[None, :]
    i = tl.arange(0, total.shape[0])[:, None]
    first = (part * owners + owner) * total.shape[1]
    tl.store(out + first + i * total.shape[1] + d, total, mask=owner + i < owners)


@triton.jit(do_not_specialize=SIZES)
def pairwise_kernel(
    rows,  # (PIECES, N, padded owners, CHANNELS)
    columns,  # (PIECES, N, padded visits, CHANNELS)
    row_targets,  # (PIECES, N, padded owners, TARGET_CHANNELS), or class numbers (N, padded owners), of 32 bits:
    column_targets,  # comparing 64 would make the compiler wait for every product; likewise of the visited
    one,  # (N,), the similarity of equal labels in the scale of the features
    gradient,  # (splits, N, owners, CHANNELS)
    sums,  # (splits, N, blocks of owners)
    owners,
    visits,
    NEED_GRADIENT: tl.constexpr,
    CHANNELS: tl.constexpr,
    TARGET_CHANNELS: tl.constexpr,  # 0 for class numbers; those that equal nothing differ between rows and columns
    OWNED: tl.constexpr,
    VISITED: tl.constexpr,
    PIECES: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
):
    """`sum_j |R_ij|` over the owned pixels i, and `sum_j sign(R_ij) c_j` of each, with `R_ij = a_i . c_j - G_ij`."""
    owner, start, stop, part, row, first_column, row_step, column_step = _place(owners, visits, OWNED, VISITED)
    a0, a1, a2 = _pieces(rows, row, row_step, OWNED, CHANNELS, PIECES)
    if TARGET_CHANNELS == 0:
        own_labels = tl.load(row_targets + row + tl.arange(0, OWNED))[:, None]
        same = tl.load(one + tl.program_id(2))
    else:
        g0, g1, g2 = _pieces(row_targets, row, row_step, OWNED, TARGET_CHANNELS, PIECES)
    sums_of_rows = tl.zeros((OWNED,), ACCUMULATOR)
    total = tl.zeros((OWNED, CHANNELS), ACCUMULATOR)
    for visited in range(start, stop, VISITED):
        column = first_column + visited
        c0, c1, c2 = _pieces(columns, column, column_step, VISITED, CHANNELS, PIECES)
        R = _similarities(a0, a1, a2, c0, c1, c2, ACCUMULATOR, PIECES)
        if TARGET_CHANNELS == 0:
            labels = tl.load(column_targets + column + tl.arange(0, VISITED))[None, :]
            R -= tl.where(own_labels == labels, same, 0.0)
        else:
            h0, h1, h2 = _pieces(column_targets, column, column_step, VISITED, TARGET_CHANNELS, PIECES)
            R -= _similarities(g0, g1, g2, h0, h1, h2, ACCUMULATOR, PIECES)
        sums_of_rows += tl.sum(tl.abs(R), axis=1)
        if NEED_GRADIENT:
            signs = tl.where(R > 0, 1.0, tl.where(R < 0, -1.0, 0.0))
            total = _add_signed(total, signs, c0, c1, c2, PIECES)

    tl.store(sums + part * tl.num_programs(0) + tl.program_id(0), tl.sum(sums_of_rows, axis=0))
    if NEED_GRADIENT:
        _store_total(gradient, total, part, owner, owners)


@triton.jit(do_not_specialize=SIZES)
def log_sum_exp_kernel(
    rows,  # (PIECES, N, padded owners, CHANNELS)
    columns,  # (PIECES, N, padded visits, CHANNELS)
    out,  # (splits, N, owners)
    owners,
    visits,
    CHANNELS: tl.constexpr,
    OWNED: tl.constexpr,
    VISITED: tl.constexpr,
    PIECES: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
):
    """`log sum_j exp(S_ij)` of the owned pixels i over one split of the others; a split is never empty."""
    owner, start, stop, part, row, first_column, row_step, column_step = _place(owners, visits, OWNED, VISITED)
    a0, a1, a2 = _pieces(rows, row, row_step, OWNED, CHANNELS, PIECES)
    largest = tl.full((OWNED,), float("-inf"), ACCUMULATOR)
    total = tl.zeros((OWNED,), ACCUMULATOR)
    for visited in range(start, stop, VISITED):
        c0, c1, c2 = _pieces(columns, first_column + visited, column_step, VISITED, CHANNELS, PIECES)
        S = _similarities(a0, a1, a2, c0, c1, c2, ACCUMULATOR, PIECES)
        S = tl.where((visited + tl.arange(0, VISITED) < visits)[None, :], S, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(S, axis=1))
        total = total * tl.exp(largest - new_largest) + tl.sum(tl.exp(S - new_largest[:, None]), axis=1)
        largest = new_largest
    i = owner + tl.arange(0, OWNED)
    tl.store(out + part * owners + i, largest + tl.log(total), mask=i < owners)


@triton.jit(do_not_specialize=SIZES)
def softmax_kernel(
    rows,  # (PIECES, N, padded owners, CHANNELS)
    columns,  # (PIECES, N, padded visits, CHANNELS)
    row_values,  # (PIECES, N, padded owners, VALUE_CHANNELS), read with GRADIENT only
    column_values,  # (PIECES, N, padded visits, VALUE_CHANNELS)
    lse,  # (N, padded pixels) of the sources
    shift,  # (N, padded pixels) of the sources, read with GRADIENT only
    out,  # (splits, N, owners, VALUE_CHANNELS), or with GRADIENT (splits, N, owners, CHANNELS)
    owners,
    visits,
    SOURCES_OWN: tl.constexpr,
    GRADIENT: tl.constexpr,
    CHANNELS: tl.constexpr,
    VALUE_CHANNELS: tl.constexpr,
    OWNED: tl.constexpr,
    VISITED: tl.constexpr,
    PIECES: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
):
    """`sum_j P_ij v_j` of the owned pixels i or, with GRADIENT, `sum_j P_ij (u_i . v_j - shift) y_j`.

    P is the softmax over the targets, and the owned pixels are its sources or its targets. u are the values of the
    owned pixels, v those of the visited ones, y the columns, and the shift is that of the source.
    """
    owner, start, stop, part, row, first_column, row_step, column_step = _place(owners, visits, OWNED, VISITED)
    a0, a1, a2 = _pieces(rows, row, row_step, OWNED, CHANNELS, PIECES)
    if SOURCES_OWN:
        row_lse = tl.load(lse + row + tl.arange(0, OWNED))[:, None]
    if GRADIENT:
        u0, u1, u2 = _pieces(row_values, row, row_step, OWNED, VALUE_CHANNELS, PIECES)
        if SOURCES_OWN:
            row_shift = tl.load(shift + row + tl.arange(0, OWNED))[:, None]
    owned_is_pixel = (owner + tl.arange(0, OWNED) < owners)[:, None]
    total = tl.zeros((OWNED, CHANNELS if GRADIENT else VALUE_CHANNELS), ACCUMULATOR)
    for visited in range(start, stop, VISITED):
        column = first_column + visited
        c0, c1, c2 = _pieces(columns, column, column_step, VISITED, CHANNELS, PIECES)
        S = _similarities(a0, a1, a2, c0, c1, c2, ACCUMULATOR, PIECES)
        # A padded target has similarity 0, which may be far above the log-sum-exp.
        is_pixel = owned_is_pixel & (visited + tl.arange(0, VISITED) < visits)[None, :]
        S = tl.where(is_pixel, S, float("-inf"))
        W = tl.exp(S - (row_lse if SOURCES_OWN else tl.load(lse + column + tl.arange(0, VISITED))[None, :]))
        v0, v1, v2 = _pieces(column_values, column, column_step, VISITED, VALUE_CHANNELS, PIECES)
        if GRADIENT:
            carried = _similarities(u0, u1, u2, v0, v1, v2, ACCUMULATOR, PIECES)
            W *= carried - (row_shift if SOURCES_OWN else tl.load(shift + column + tl.arange(0, VISITED))[None, :])
            total = _add_weighted(total, W, c0, c1, c2, PIECES)
        else:
            total = _add_weighted(total, W, v0, v1, v2, PIECES)
    _store_total(out, total, part, owner, owners)
