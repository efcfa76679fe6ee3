"""What the Triton kernels are launched with: pieces of numbers, blocks of pixels that fit, and their layout in memory.

Tensor cores multiply in half precision and add in float32, so float32 is cut into pieces, more of them the more exact
the products should be:

- The loss takes float16 and scales every image by a power of two, so that its largest feature is near the largest
  float16. One piece then has the 11 bits of TF32, for features down to 2^-28 of the largest, at twice its rate and half
  its size; two pieces have 22. The signs that multiply into the gradient are exact.
- The softmax multiplies probabilities, whose range is unknown beforehand, and takes bfloat16: two pieces have 16 bits,
  three all 24.

The fewer are taken where torch's setting allows TF32 for float32 products. TF32 itself would want the values of the
last product once more with their pixels contiguous: that copy is half of what the loop reads, and it passes through
registers that the sum needs.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._precision import allows_tf32
from .triton_jit import INTERPRETED

Result = TypeVar("Result")

VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])


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


class Channels(NamedTuple):
    """What the pixels of a kernel have, padded."""

    held: int  # of an owned pixel, in shared memory
    passing: int  # of a visited pixel
    summed: int  # of the sum


class Blocks(NamedTuple):
    """What one program holds."""

    owned: int  # pixels that it owns, a multiple of those of a step
    visited: int  # pixels of one step of its walk
    stages: int  # blocks of visited pixels in shared memory: with two, one is fetched while the other is multiplied
    warps: int = 8


# In the order of preference: large tiles read less for every product, and a tensor core wants 64 pixels or more.
BLOCKS = [Blocks(*x) for x in ((128, 64, 2), (128, 32, 2), (64, 64, 2), (64, 32, 2), (64, 32, 1))]
BLOCKS += [Blocks(*x, warps=4) for x in ((32, 32, 2), (32, 16, 2), (32, 16, 1), (16, 16, 2), (16, 16, 1))]
SUM_WORDS = 128 * 256  # that the sum may take: half of the registers
RESERVED = 2 << 10  # bytes of shared memory for the compiler's own use


def check_device(device: torch.device) -> None:
    """Raise ValueError unless the kernels can run on ``device``."""
    reason = ""
    if device.type == "cuda":
        if torch.version.hip is not None or torch.cuda.get_device_capability(device) < (8, 0):
            reason = f"it needs an NVIDIA GPU of compute capability 8.0 or newer, and {device} is none"
    elif not (device.type == "cpu" and INTERPRETED):
        reason = (
            f"it needs CUDA tensors, and these are on {device} (to try it on a CPU, set TRITON_INTERPRET=1 before "
            "Triton is first imported)"
        )
    if reason:
        raise ValueError(f"backend='triton' cannot run here: {reason}; use backend='auto'")


def operands_of(dtype: torch.dtype, piece: torch.dtype) -> Operands:
    """How numbers of ``dtype`` are multiplied: float64 as it is, float32 in pieces of dtype ``piece``."""
    if dtype == torch.float64:
        if VERSION < (3, 5):
            raise ValueError(
                "backend='triton' cannot run here: it multiplies float64 from Triton 3.5 on, and this is "
                f"{triton.__version__}; use backend='auto'"
            )
        return Operands(dtype, 1)
    return Operands(piece, (1 if piece == torch.float16 else 2) + (not allows_tf32()))


def with_fitting_blocks(
    run: Callable[[Blocks], Result], operands: Operands, channels: Channels, tile: int | None, device: torch.device
) -> Result:
    """``run`` with the first blocks that fit, by count and then in the compiler's view."""
    gpu = _device(device)
    for blocks in fitting_blocks(operands, channels, tile, gpu):
        try:
            return run(blocks)
        except triton.runtime.errors.OutOfResources:
            continue  # compilers of other versions need more
    raise ValueError(
        f"backend='triton' cannot run here: its smallest blocks of pixels, of {channels.held} channels (feats and what "
        f"goes with them, each padded to a power of two), take more than the {gpu.shared_memory >> 10} KiB of shared "
        "memory of this device; reduce the channels, or use backend='auto'"
    )


def fitting_blocks(operands: Operands, channels: Channels, tile: int | None, device: Device) -> Iterator[Blocks]:
    """Those of `BLOCKS` that fit by count, the best first; ``tile`` makes blocks smaller, never larger."""
    limit = 128 if tile is None else max(16, triton.next_power_of_2(tile))
    size = operands.dtype.itemsize
    words = 2 if operands.dtype == torch.float64 else 1
    for blocks in BLOCKS:
        sum_words = blocks.owned * channels.summed * words
        if blocks.owned > limit or sum_words > SUM_WORDS:
            continue
        # Where tensor cores read registers, what is fetched in a single stage passes through memory twice. The fifth
        # generation keeps what both products read for one stage more.
        copies = blocks.stages if device.multiplies_shared_memory else 2
        kept = channels.summed if device.capability >= 100 else 0
        pixels = blocks.owned * channels.held + blocks.visited * (channels.passing * copies + kept)
        inputs = (pixels * operands.pieces + blocks.owned * blocks.visited) * size
        if max(inputs, 4 * sum_words) + RESERVED <= device.shared_memory:  # the sum changes its layout at the end
            is_small = blocks.owned == 64 and channels.summed <= 64  # more warps would form the similarities twice
            yield blocks._replace(warps=4) if is_small and device.multiplies_shared_memory else blocks


def grid_of(owners: Tensor, visits: Tensor, blocks: Blocks) -> tuple[int, int, int]:
    """Blocks of the owned pixels (N, M, D), programs that share the walk of each over (N, K, D), and images.

    Few owned blocks would leave most of the GPU idle, so their walks are split, and torch adds the parts in order. Of
    as many splits as steps allow, those are left out that would have none.
    """
    N, M, _ = owners.shape
    owned, steps = triton.cdiv(M, blocks.owned), triton.cdiv(visits.shape[1], blocks.visited)
    wanted = triton.cdiv(PROGRAMS_PER_PROCESSOR * _device(owners.device).processors, owned * N)
    return owned, triton.cdiv(steps, triton.cdiv(steps, min(steps, wanted))), N


def padded(channels: int) -> int:
    """The channels of a pixel in memory: a power of two."""
    return max(16, int(triton.next_power_of_2(channels)))


def laid_out(x: Tensor, operands: Operands, blocks: Blocks, scale: Tensor | None = None) -> Tensor:
    """Rows (N, M, D) as (pieces, N, M, D), padded with zeros to whole blocks of pixels and a power of two channels.

    Every image is multiplied by its ``scale``, (N,).
    """
    N, M, D = x.shape
    shape = operands.pieces, N, triton.cdiv(M, blocks.owned) * blocks.owned, padded(D)
    out = x.new_zeros(shape, dtype=operands.dtype)
    pieces = out[:, :, :M, :D]
    rest = x if scale is None else x * scale[:, None, None]
    pieces[0] = rest
    for previous, piece in pairwise(pieces):
        rest = (rest - previous.to(x.dtype)).nan_to_num_(0, 0, 0)  # the first piece alone carries inf and NaN
        piece.copy_(rest)
    return out


def filled_up(x: Tensor, blocks: Blocks, value: float) -> Tensor:
    """One number a pixel, (N, M), filled up with ``value`` to whole blocks of pixels."""
    N, M = x.shape
    out = x.new_full((N, triton.cdiv(M, blocks.owned) * blocks.owned), value)
    out[:, :M] = x
    return out


def sum_of_splits(parts: Tensor) -> Tensor:
    """The sum over the first axis, which often has one entry and is large."""
    return parts[0] if parts.shape[0] == 1 else parts.sum(dim=0)


def launch(
    kernel: Any, grid: tuple[int, int, int], operands: Operands, blocks: Blocks, *args: Any, **constants: Any
) -> None:
    """Run a kernel, compiled for the blocks and the constants, on the device of its first argument."""
    with torch.cuda.device_of(args[0]):
        kernel[grid](*args, **options(operands, blocks), **constants)


def options(operands: Operands, blocks: Blocks) -> dict[str, Any]:
    """What every kernel is compiled with."""
    return {
        "OWNED": blocks.owned,
        "VISITED": blocks.visited,
        "PIECES": operands.pieces,
        "ACCUMULATOR": tl.float64 if operands.dtype == torch.float64 else tl.float32,
        "num_warps": blocks.warps,
        "num_stages": blocks.stages,
        "enable_fp_fusion": True,  # Triton's own default warns that it will change
    }


def _device(device: torch.device) -> Device:
    return INTERPRETER if INTERPRETED else _gpu(device.index)


@lru_cache
def _gpu(index: int) -> Device:
    properties = triton.runtime.driver.active.utils.get_device_properties(index)
    major, minor = torch.cuda.get_device_capability(index)
    return Device(10 * major + minor, properties["max_shared_mem"], properties["multiprocessor_count"])
