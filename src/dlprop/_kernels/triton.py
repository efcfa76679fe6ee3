"""The pairwise ops as Triton kernels: a tile of the M x M matrices exists in registers only.

The device code, which says how a program works, is in `triton_jit.py`; this module chooses its blocks, lays out its
inputs and launches it.

Tensor cores multiply in half precision and add in float32. Half precision inputs are multiplied as they are. Float32
inputs are cut into pieces, more of them the more exact the products should be:

- The loss takes float16 and scales every image by a power of two, so that its largest feature is near the largest
  float16. One piece then has the 11 bits of TF32, for features down to 2^-28 of the largest, at twice its rate and half
  its size; two pieces have 22. The signs that multiply into the gradient are exact.
- The softmax multiplies probabilities, whose range is unknown beforehand, and takes bfloat16: two pieces have 16 bits,
  three all 24.

The fewer are taken where torch's setting allows TF32 for float32 products, or under autocast. TF32 itself would want
the values of the last product once more with their pixels contiguous: that copy is half of what the loop reads, and it
passes through registers that the sum needs.

Import this module only where Triton is installed. Its kernels run on CUDA tensors, or, if TRITON_INTERPRET=1 was set
before Triton was first imported, on CPU tensors in Triton's interpreter.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from . import dense
from .triton_jit import log_sum_exp_kernel, pairwise_kernel, softmax_kernel

Result = TypeVar("Result")

KERNELS = ("pairwise_l1", "pairwise_l1_cross", "softmax_affinity", "softmax_affinity_backward")
VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
INTERPRETED = not isinstance(pairwise_kernel, triton.runtime.JITFunction)


class Device(NamedTuple):
    """What the launches ask of a GPU."""

    capability: int  # 90 for 9.0
    shared_memory: int  # bytes that one program may have
    processors: int

    @property
    def multiplies_shared_memory(self) -> bool:
        """Whether its tensor cores read operands from shared memory (Hopper, data-centre Blackwell), not registers."""
        return self.capability // 10 in (9, 10, 11)


# In the interpreter, the sizes of an H100, and few programs in all, so that walks are split there as well.
INTERPRETER = Device(90, 227 << 10, 6)
PROGRAMS_PER_PROCESSOR = 2  # to start at least, so that none is idle; one is resident at a time


class Operands(NamedTuple):
    """How numbers are handed to the kernels."""

    dtype: torch.dtype
    pieces: int


class Blocks(NamedTuple):
    """What one program holds."""

    owned: int  # pixels that it owns
    visited: int  # pixels of one step of its walk
    stages: int  # blocks of visited pixels in shared memory: with two, one is fetched while the other is multiplied
    warps: int = 8


# In the order of preference: large tiles read less for every product, and a tensor core wants 64 pixels or more.
BLOCKS = [Blocks(*x) for x in ((128, 64, 2), (128, 32, 2), (64, 64, 2), (64, 32, 2), (64, 32, 1))]
BLOCKS += [Blocks(*x, warps=4) for x in ((32, 32, 2), (32, 16, 2), (32, 16, 1), (16, 16, 2), (16, 16, 1))]
SUM_WORDS = 128 * 256  # that the sum may take: half of the registers
RESERVED = 2 << 10  # bytes of shared memory for the compiler's own use


class TooManyChannelsError(ValueError):
    """A block of pixels does not fit in the shared memory of the device."""


def pays(op: str, dtype: torch.dtype, device: torch.device, channels: tuple[int, int], reduced: bool) -> bool:
    """Whether "auto" should take these kernels for ``op`` on features of ``dtype``.

    It should where tensor cores may do the products and two stages of large blocks fit. Float32 in full precision takes
    so many products of pieces that torch's own are expected to be as fast, and so does the softmax of two pieces where
    tensor cores multiply registers.

    Args:
        op: "derivative_l1" or "softmax_affinity".
        dtype: of the features.
        device: where they are.
        channels: of the features, and of the target (0 for labels) or the logits.
        reduced: whether float32 products need not be exact.
    """
    if dtype == torch.float64 or (dtype == torch.float32 and not (reduced or allows_tf32())):
        return False
    if VERSION < (3, 4):  # whose code waits for every single product on compute capability 9.0
        return False
    # While a graph is captured nothing can be tried out.
    is_capturing = not INTERPRETED and torch.cuda.is_current_stream_capturing()
    if not is_capturing and not works(_index(device)):
        return False
    gpu = _device(device)
    operands = _operands(dtype, torch.float16 if op == "derivative_l1" else torch.bfloat16, reduced)
    if operands.pieces > 1 and not gpu.multiplies_shared_memory:
        return False
    own, other = (padded(c) if c else 0 for c in channels)
    blocks = next(fitting_blocks(operands, own + other, own + other, own, None, gpu), BLOCKS[-1])
    smallest = 64 if gpu.multiplies_shared_memory else 32
    return blocks.stages > 1 and blocks.owned >= smallest and blocks.visited >= 32


@lru_cache
def works(index: int) -> bool:
    """Whether the kernels compile on a GPU and are right there for a small problem; else a warning says what is wrong.

    Triton needs a C compiler on the machine, for one, already when it is asked for the GPU's properties.
    """
    device = torch.device("cpu") if INTERPRETED else torch.device("cuda", index)
    draw = partial(torch.rand, generator=torch.Generator("cpu").manual_seed(0), device="cpu", dtype=torch.float32)
    try:
        x, y = (draw(1, 20, 40).to(device) for _ in range(2))
        results = _small_problem(sys.modules[__name__], x, y, reduced=True)
        for result, expected in zip(results, _small_problem(dense, x.double(), y.double()), strict=True):
            error = float((result - expected).abs().max() / expected.abs().max())
            if not error < 0.02:
                raise ArithmeticError(f"a small problem came out wrong, by {error:.1e} of its largest entry")
    except torch.OutOfMemoryError:  # says nothing about the kernels
        raise
    except Exception as error:
        warnings.warn(
            f"dlprop: the Triton kernels do not work on {device}, so backend='auto' takes the slower tiled ones: "
            f"{type(error).__name__}: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True


def _small_problem(kernels: Any, x: Tensor, y: Tensor, **options: Any) -> tuple[Tensor, ...]:
    out, lse = kernels.softmax_affinity(y, x, y, None, **options)
    grads = kernels.softmax_affinity_backward(out, y, x, y, lse, None, **options)
    return *kernels.pairwise_l1(x, y, None, True, **options), out, *grads


# ---------------------------------------------------------------------------------------------------------------------
# The pairwise loss


def pairwise_l1(
    a: Tensor, g: Tensor, tile: int | None, need_grad: bool, *, reduced: bool = False
) -> tuple[Tensor, Tensor | None]:
    """`sum_ij |R_ij|` of every image with `R = a^T a - G`, and its gradient, in one pass over all tiles.

    Against features 6 M^2 D operations for value and gradient, against labels 4 M^2 D, times the products of pieces;
    memory O(M D). Both halves of the symmetric R are visited, because a program that adds to the gradient of the other
    half's pixels as well would need atomics. Values and gradients are in at least float32. With ``reduced`` float32
    products have 11 bits whatever torch's setting.
    """
    loss, grad = _pairwise(a, a, g, g, tile, need_grad, reduced)
    return loss, None if grad is None else grad.mul_(2)


def pairwise_l1_cross(
    a: Tensor, c: Tensor, g: Tensor, h: Tensor, tile: int | None, need_grad: bool, *, reduced: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`sum_ik |R_ik|` of every image with `R = a^T c - G`, and its gradients in `a` and `c`, a pass for each."""
    loss, grad_a = _pairwise(a, c, g, h, tile, need_grad, reduced)
    if not need_grad:
        return loss, None, None
    _, grad_c = _pairwise(c, a, h, g, tile, need_grad, reduced)
    return loss, grad_a, grad_c


def _pairwise(
    a: Tensor, c: Tensor, g: Tensor, h: Tensor, tile: int | None, need_grad: bool, reduced: bool
) -> tuple[Tensor, Tensor | None]:
    """The sums of `|a_i . c_k - G_ik|` and their gradient in `a` alone."""
    N, D, M = a.shape
    accumulator = _accumulator(a.dtype)
    if N == 0:
        return a.new_zeros(N, dtype=accumulator), torch.zeros_like(a, dtype=accumulator) if need_grad else None
    labels = not g.is_floating_point()
    channels, target_channels = padded(D), 0 if labels else padded(g.shape[1])
    operands = _operands(a.dtype, torch.float16, reduced)
    scale = _headroom(a, c, g, h) if operands.dtype == torch.float16 else a.new_ones(N, dtype=accumulator)
    if labels:
        g, h = _numbered(g, h)

    def run(blocks: Blocks) -> tuple[Tensor, Tensor | None]:
        rows = _as_rows(a, operands, blocks, scale)
        columns = rows if c is a else _as_rows(c, operands, blocks, scale)
        if labels:
            row_targets, column_targets = _pad(g, rows.shape[2], -1), _pad(h, columns.shape[2], -2)
        else:
            row_targets = _as_rows(g.to(a.dtype), operands, blocks, scale)
            column_targets = row_targets if h is g else _as_rows(h.to(a.dtype), operands, blocks, scale)
        owner_blocks = triton.cdiv(M, blocks.owned)
        walk, splits = _walk(c.shape[2], blocks.visited, owner_blocks * N, _device(a.device))
        sums = a.new_empty((splits, N, owner_blocks), dtype=accumulator)
        gradient = a.new_empty((splits, N, M, channels) if need_grad else 1, dtype=accumulator)
        _launch(
            pairwise_kernel,
            (owner_blocks, splits, N),
            operands,
            blocks,
            rows,
            columns,
            row_targets,
            column_targets,
            scale * scale,
            gradient,
            sums,
            M,
            c.shape[2],
            rows.shape[2],
            columns.shape[2],
            walk,
            LABELS=labels,
            NEED_GRADIENT=need_grad,
            CHANNELS=channels,
            TARGET_CHANNELS=target_channels,
        )
        loss = sums.sum(dim=(0, 2)) / (scale * scale)
        return loss, _sum_of_splits(gradient)[..., :D].div_(scale[:, None, None]).mT if need_grad else None

    pairs = channels + target_channels
    return _with_fitting_blocks(run, operands, pairs, pairs, channels if need_grad else 0, tile, _device(a.device))


# ---------------------------------------------------------------------------------------------------------------------
# The softmax affinity


def softmax_affinity(
    logits: Tensor, queries: Tensor, keys: Tensor, chunk: int | None, *, reduced: bool = False
) -> tuple[Tensor, Tensor]:
    """`L softmax(Q^T K, -1)` and the log-sum-exp of every row: one pass owned by the sources, one by the targets.

    Both are in at least float32. With ``reduced`` float32 products have 16 bits whatever torch's setting.
    """
    if logits.shape[0] == 0:
        dtype = _accumulator(queries.dtype)
        out = logits.new_zeros(0, logits.shape[1], keys.shape[2], dtype=dtype)
        return out, queries.new_zeros(0, queries.shape[2], dtype=dtype)
    operands = _operands(queries.dtype, torch.bfloat16, reduced)
    lse = _log_sum_exp(queries, keys, chunk, operands)
    return _softmax(keys, queries, logits, lse, chunk, operands, sources_own=False), lse


def softmax_affinity_backward(
    grad: Tensor,
    logits: Tensor,
    queries: Tensor,
    keys: Tensor,
    lse: Tensor,
    chunk: int | None,
    need_queries: bool = True,
    need_keys: bool = True,
    *,
    reduced: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of `softmax_affinity`: the probabilities are formed again from the log-sum-exp, for each gradient.

    The row sum `sum_j P_ij dP_ij` of the softmax's gradient is `L_i . (grad P_i)`, already at hand.
    """
    if logits.shape[0] == 0:
        return torch.zeros_like(logits), torch.zeros_like(queries), torch.zeros_like(keys)
    operands = _operands(queries.dtype, torch.bfloat16, reduced)
    carried = _softmax(queries, keys, grad, lse, chunk, operands, sources_own=True)
    shift = (logits * carried).sum(dim=1)
    grad_queries = grad_keys = None
    if need_queries:
        pairs = logits, grad, shift
        grad_queries = _softmax(queries, keys, keys, lse, chunk, operands, sources_own=True, pairs=pairs)
    if need_keys:
        pairs = grad, logits, shift
        grad_keys = _softmax(keys, queries, queries, lse, chunk, operands, sources_own=False, pairs=pairs)
    return carried, grad_queries, grad_keys


def _log_sum_exp(queries: Tensor, keys: Tensor, chunk: int | None, operands: Operands) -> Tensor:
    """(N, M), in at least float32."""
    N, D, M = queries.shape
    channels = padded(D)

    def run(blocks: Blocks) -> Tensor:
        rows = _as_rows(queries, operands, blocks)
        columns = _as_rows(keys, operands, blocks)
        owner_blocks = triton.cdiv(M, blocks.owned)
        walk, splits = _walk(keys.shape[2], blocks.visited, owner_blocks * N, _device(queries.device))
        out = queries.new_empty((splits, N, M), dtype=_accumulator(queries.dtype))
        _launch(
            log_sum_exp_kernel,
            (owner_blocks, splits, N),
            operands,
            blocks,
            rows,
            columns,
            out,
            M,
            keys.shape[2],
            rows.shape[2],
            columns.shape[2],
            walk,
            CHANNELS=channels,
        )
        return out[0] if splits == 1 else out.logsumexp(dim=0)

    return _with_fitting_blocks(run, operands, channels, channels, 0, chunk, _device(queries.device))


def _softmax(
    x: Tensor,
    y: Tensor,
    v: Tensor,
    lse: Tensor,
    chunk: int | None,
    operands: Operands,
    *,
    sources_own: bool,
    pairs: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """`sum_j W_ij v_j` of every pixel i of ``x``, over the pixels j of ``y``, in at least float32."""
    N, D, M = x.shape
    channels, value_channels = padded(D), padded(v.shape[1])
    carried_channels = 0 if pairs is None else padded(pairs[0].shape[1])

    def run(blocks: Blocks) -> Tensor:
        rows = _as_rows(x, operands, blocks)
        columns = _as_rows(y, operands, blocks)
        values = columns if v is y else _as_rows(v.to(x.dtype), operands, blocks)
        sources = rows if sources_own else columns
        padded_lse = _pad(lse, sources.shape[2], float("inf"))
        if pairs is None:
            row_carried, column_carried, shift = rows, columns, padded_lse
        else:
            row_carried = _as_rows(pairs[0].to(x.dtype), operands, blocks)
            column_carried = _as_rows(pairs[1].to(x.dtype), operands, blocks)
            shift = _pad(pairs[2], sources.shape[2], 0)
        owner_blocks = triton.cdiv(M, blocks.owned)
        walk, splits = _walk(y.shape[2], blocks.visited, owner_blocks * N, _device(x.device))
        out = x.new_empty((splits, N, M, value_channels), dtype=_accumulator(x.dtype))
        _launch(
            softmax_kernel,
            (owner_blocks, splits, N),
            operands,
            blocks,
            rows,
            columns,
            row_carried,
            column_carried,
            padded_lse,
            shift,
            values,
            out,
            M,
            y.shape[2],
            rows.shape[2],
            columns.shape[2],
            walk,
            SOURCES_OWN=sources_own,
            GRADIENT=pairs is not None,
            COLUMNS_ARE_VALUES=v is y,
            CHANNELS=channels,
            CARRIED_CHANNELS=carried_channels,
            VALUE_CHANNELS=value_channels,
        )
        return _sum_of_splits(out)[..., : v.shape[1]].mT

    held = channels + carried_channels
    passing = held if v is y else held + value_channels
    return _with_fitting_blocks(run, operands, held, passing, value_channels, chunk, _device(x.device))


# ---------------------------------------------------------------------------------------------------------------------
# Layouts and launches


def _operands(dtype: torch.dtype, piece: torch.dtype, reduced: bool) -> Operands:
    """How numbers of ``dtype`` are multiplied: float32 in pieces, fewer if products may be ``reduced``."""
    if dtype == torch.float64 and VERSION < (3, 5):
        raise ValueError(
            "backend='triton' cannot run here: it multiplies float64 from Triton 3.5 on, and this is "
            f"{triton.__version__}; use backend='auto'"
        )
    if dtype != torch.float32:
        return Operands(dtype, 1)
    fewer = reduced or allows_tf32()
    return Operands(piece, (1 if fewer else 2) if piece == torch.float16 else (2 if fewer else 3))


def allows_tf32() -> bool:
    """Whether torch's own float32 products on CUDA may have the 11 bits of TF32."""
    # The newer of torch's two settings first: once it has been used, reading the older one may raise.
    setting = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    return torch.get_float32_matmul_precision() != "highest" if setting is None else bool(setting == "tf32")


def _headroom(*tensors: Tensor) -> Tensor:
    """The power of two of every image, (N,), that lifts its largest feature among ``tensors`` to [2^14, 2^15).

    It is at most 2^40, because equal labels are compared with its square, and as many of these as there are pairs must
    not overflow; and 1 for an image that is not finite, whose results are not in any scale.
    """
    features = [x.float() for x in tensors if x.is_floating_point()]
    largest = torch.stack([torch.linalg.vector_norm(x, torch.inf, dim=(1, 2)) for x in features]).amax(dim=0)
    exponent = (largest.view(torch.int32) >> 23) - 127
    bits = ((14 - exponent).clamp(-126, 40) + 127) << 23  # exact on every device, which pow need not be
    return torch.where(largest.isfinite(), bits.view(torch.float32), 1.0)


def fitting_blocks(
    operands: Operands, held: int, passing: int, summed: int, tile: int | None, device: Device
) -> Iterator[Blocks]:
    """Those of `BLOCKS` that fit by count, the best first; ``tile`` makes blocks smaller, never larger.

    Args:
        operands: how numbers are handed to the kernel.
        held: channels of an owned pixel in shared memory.
        passing: channels of a visited pixel.
        summed: channels of the sum.
        tile: the largest block of pixels, None for any.
        device: where they must fit.
    """
    limit = 128 if tile is None else max(16, triton.next_power_of_2(tile))
    size = operands.dtype.itemsize
    words = 2 if operands.dtype == torch.float64 else 1
    for blocks in BLOCKS:
        sum_words = blocks.owned * summed * words
        if max(blocks.owned, blocks.visited) > limit or sum_words > SUM_WORDS:
            continue
        # Where tensor cores read registers, what is fetched in a single stage passes through memory twice. The fifth
        # generation keeps what both products read for one stage more.
        copies = blocks.stages if device.multiplies_shared_memory else 2
        kept = summed if device.capability >= 100 else 0
        pixels = blocks.owned * held + blocks.visited * (passing * copies + kept)
        weights = blocks.owned * blocks.visited
        needed = max(
            (pixels * operands.pieces + weights) * size, 4 * sum_words
        )  # the sum changes its layout at the end
        if needed + RESERVED <= device.shared_memory:
            is_small = blocks.owned == 64 and summed <= 64  # more warps would form the similarities twice
            yield blocks._replace(warps=4) if is_small and device.multiplies_shared_memory else blocks


def _with_fitting_blocks(
    run: Callable[[Blocks], Result],
    operands: Operands,
    held: int,
    passing: int,
    summed: int,
    tile: int | None,
    device: Device,
) -> Result:
    """``run`` with the first blocks that fit, by count and then in the compiler's view.

    Raises:
        TooManyChannelsError: if none do.
    """
    for blocks in fitting_blocks(operands, held, passing, summed, tile, device):
        try:
            return run(blocks)
        except triton.runtime.errors.OutOfResources:
            continue  # compilers of other versions need more
    raise TooManyChannelsError(
        f"backend='triton' cannot run here: its smallest blocks of pixels, of {held} channels (feats and what goes "
        f"with them, each padded to a power of two), take more than the {device.shared_memory >> 10} KiB of shared "
        "memory of this device; reduce the channels, or use backend='auto'"
    )


def _walk(pixels: int, visited: int, programs: int, device: Device) -> tuple[int, int]:
    """How many pixels a program visits, and by how many programs each walk is shared.

    Few owned blocks would leave most of the GPU idle, so their walks are split, and torch adds the parts in order.
    """
    steps = triton.cdiv(pixels, visited)
    wanted = triton.cdiv(PROGRAMS_PER_PROCESSOR * device.processors, programs)
    steps_of_one = triton.cdiv(steps, min(steps, wanted))
    return steps_of_one * visited, triton.cdiv(steps, steps_of_one)


def _as_rows(x: Tensor, operands: Operands, blocks: Blocks, scale: Tensor | None = None) -> Tensor:
    """``x`` (N, D, M) as (pieces, N, M, D), padded with zeros to whole blocks of pixels and a power of two channels.

    Every image is multiplied by its ``scale``, (N,).
    """
    N, D, M = x.shape
    pixels = max(blocks.owned, blocks.visited)
    shape = operands.pieces, N, triton.cdiv(M, pixels) * pixels, padded(D)
    rows = x.new_zeros(shape, dtype=operands.dtype)
    pieces = rows[:, :, :M, :D]
    rest = x.mT if scale is None else x.mT * scale[:, None, None]
    pieces[0] = rest
    for previous, piece in pairwise(pieces):
        rest = (rest - previous.to(x.dtype)).nan_to_num_(0, 0, 0)  # the first piece alone carries inf and NaN
        piece.copy_(rest)
    return rows


def _numbered(g: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """Labels (N, M) and (N, K) as int32, equal where they were; negative ones become -1 in the first, -2 in the other.

    Without `unique`, for whose size the host would wait.
    """
    every = torch.cat((g, h), dim=1)
    values, order = every.sort(dim=1)
    changes = (values[:, 1:] != values[:, :-1]).cumsum(dim=1, dtype=torch.int32)
    numbers = torch.empty_like(every, dtype=torch.int32).scatter_(1, order, F.pad(changes, (1, 0)))
    rows, columns = numbers.split((g.shape[1], h.shape[1]), dim=1)
    return rows.masked_fill(g < 0, -1), columns.masked_fill(h < 0, -2)


def padded(channels: int) -> int:
    return max(16, int(triton.next_power_of_2(channels)))


def _pad(x: Tensor, size: int, value: float) -> Tensor:
    """``x`` (N, M) contiguous and filled up with ``value`` to (N, size)."""
    padded = x.new_full((x.shape[0], size), value)
    padded[:, : x.shape[1]] = x
    return padded


def _sum_of_splits(parts: Tensor) -> Tensor:
    return parts[0] if parts.shape[0] == 1 else parts.sum(dim=0)


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _device(device: torch.device) -> Device:
    return INTERPRETER if INTERPRETED else _gpu(_index(device))


def _index(device: torch.device) -> int:
    if device.index is not None:
        return device.index
    return int(torch.cuda.current_device()) if device.type == "cuda" else 0


@lru_cache
def _gpu(index: int) -> Device:
    properties = triton.runtime.driver.active.utils.get_device_properties(index)
    major, minor = torch.cuda.get_device_capability(index)
    return Device(10 * major + minor, properties["max_shared_mem"], properties["multiprocessor_count"])


def _launch(
    kernel: Any, grid: tuple[int, int, int], operands: Operands, blocks: Blocks, *args: Any, **constants: Any
) -> None:
    with torch.cuda.device_of(args[0]):
        kernel[grid](*args, **options(operands, blocks), **constants)


def options(operands: Operands, blocks: Blocks) -> dict[str, Any]:
    """What every kernel is compiled with."""
    return {
        "OWNED": blocks.owned,
        "VISITED": blocks.visited,
        "PIECES": operands.pieces,
        "ACCUMULATOR": tl.float64 if operands.dtype == torch.float64 else tl.float32,
        "UPCAST": INTERPRETED and operands.dtype == torch.bfloat16,
        "num_warps": blocks.warps,
        "num_stages": blocks.stages,
        "enable_fp_fusion": True,  # Triton's own default warns that it will change
    }
