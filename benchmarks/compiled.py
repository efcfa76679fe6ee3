"""What the compiler makes of the Triton kernels, for a GPU that need not be there: registers, spills, shared memory.

    python -m benchmarks.compiled --capability 90

A spilled register is a trip to memory in the innermost loop, and a product without a matrix instruction is many times
slower; neither shows in a result. A line is one kernel at one depth, with the blocks that `dlprop` chooses for it.

Under TF32 or autocast float32 comes in 1 x float16 or 2 x bfloat16, in full precision in one piece more, which
`backend="auto"` leaves to torch's own kernels.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dlprop._kernels import triton as kernels
from dlprop._kernels import triton_jit

# Shared memory that one program may have, KiB (CUDA C++ Programming Guide, technical specifications).
SHARED_MEMORY = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
MATRIX_INSTRUCTIONS = ("wgmma", "tcgen05.mma", "mma.sync")
PRODUCTS = ("HGMMA", "UTCHMMA", "HMMA", "FFMA")
BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
LAUNCH_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
# Arguments that are multiples of 16 whatever the sizes; pointers are, too.
MULTIPLES = ("row_pad", "column_pad", "walk")


class Form(NamedTuple):
    """A kernel, and what its depth makes of its constants: channels held, passing and summed, and their names."""

    title: str
    kernel: Any
    held: int
    passing: int
    summed: int
    constants: dict[str, Any]


@dataclass
class Compiled:
    """What came out."""

    form: str
    operands: kernels.Operands
    blocks: kernels.Blocks
    registers: int
    stack: int  # bytes a thread; spilled registers, as the kernels index no arrays
    shared: int  # bytes
    instruction: str  # of its products in PTX
    counts: Counter[str]  # of instructions in machine code

    @property
    def is_serialized(self) -> bool:
        """Whether every product of a warp group is waited for before the next, as ptxas has it where it must."""
        return self.counts["WARPGROUP"] >= self.counts["HGMMA"] > 0


def forms(channels: int, classes: int) -> Iterator[Form]:
    """All the kernels at a depth of ``channels``, for so many ``classes``."""
    D, C = kernels.padded(channels), kernels.padded(classes)
    loss = {"NEED_GRADIENT": True, "CHANNELS": D}
    softmax = {"CHANNELS": D, "CARRIED_CHANNELS": 0, "VALUE_CHANNELS": C}
    softmax |= {"SOURCES_OWN": False, "GRADIENT": False, "COLUMNS_ARE_VALUES": False}
    gradient = softmax | {"GRADIENT": True, "COLUMNS_ARE_VALUES": True, "CARRIED_CHANNELS": C, "VALUE_CHANNELS": D}
    jit = triton_jit
    yield Form("loss, labels", jit.pairwise_kernel, D, D, D, loss | {"LABELS": True, "TARGET_CHANNELS": 0})
    yield Form("loss, features", jit.pairwise_kernel, 2 * D, 2 * D, D, loss | {"LABELS": False, "TARGET_CHANNELS": D})
    yield Form("log-sum-exp", jit.log_sum_exp_kernel, D, D, 0, {"CHANNELS": D})
    yield Form("softmax", jit.softmax_kernel, D, D + C, C, softmax)
    yield Form("softmax, gradient", jit.softmax_kernel, D + C, D + C, D, gradient)


def compile_form(form: Form, operands: kernels.Operands, capability: int) -> Compiled:
    """Compile one kernel with the blocks chosen for it; raises `kernels.TooManyChannelsError` where none fit."""
    device = kernels.Device(capability, SHARED_MEMORY[capability] << 10, processors=100)
    blocks = next(kernels.fitting_blocks(operands, form.held, form.passing, form.summed, None, device), None)
    if blocks is None:
        raise kernels.TooManyChannelsError(f"{form.title}: no blocks fit")
    options = kernels.options(operands, blocks)
    constants = form.constants | {name: value for name, value in options.items() if name not in LAUNCH_OPTIONS}
    signature: dict[str, str] = {}
    values: dict[tuple[int], Any] = {}
    hints: dict[tuple[int], Any] = {}
    for i, name in enumerate(form.kernel.arg_names):
        if name in constants:
            signature[name], values[i,] = "constexpr", constants[name]
            continue
        signature[name] = _type(name, operands, constants)
        if signature[name].startswith("*") or name in MULTIPLES:
            hints[i,] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(fn=form.kernel, signature=signature, constexprs=values, attrs=hints),
        target=GPUTarget("cuda", capability, 32),
        options={name: options[name] for name in LAUNCH_OPTIONS},
    )
    registers, stack, counts = _machine_code(compiled.asm["cubin"])
    found = [name for name in MATRIX_INSTRUCTIONS if name in compiled.asm["ptx"]]
    return Compiled(
        form.title, operands, blocks, registers, stack, compiled.metadata.shared, " ".join(found) or "none", counts
    )


def _type(name: str, operands: kernels.Operands, constants: dict[str, Any]) -> str:
    element = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}[operands.dtype]
    if name in ("row_targets", "column_targets"):
        return "*i32" if constants["LABELS"] else f"*{element}"
    if name in ("rows", "columns", "row_carried", "column_carried", "values"):
        return f"*{element}"
    if name in ("one", "gradient", "sums", "lse", "shift", "out"):
        return "*fp64" if element == "fp64" else "*fp32"
    return "i32"


def _machine_code(cubin: bytes) -> tuple[int, int, Counter[str]]:
    """Registers and bytes of stack of a thread, and how often each instruction occurs."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run("cuobjdump", "--dump-resource-usage", file.name)
        listing = _run("nvdisasm", "--print-code", file.name)
    resources = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if resources is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {usage}")
    instructions = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z]\w+)", listing, flags=re.MULTILINE)
    return int(resources[1]), int(resources[2]), Counter(instructions)


def _run(program: str, *arguments: str) -> str:
    return subprocess.run([BINARIES / program, *arguments], capture_output=True, text=True, check=True).stdout


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text}")
    return int(text)


def main() -> None:
    """Print one line for every kernel, depth and kind of product."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compiled", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--capability", type=int, default=90, choices=SHARED_MEMORY, help="90 for compute capability 9.0"
    )
    parser.add_argument("--channels", type=_positive, nargs="+", default=[256], help="of the features")
    parser.add_argument("--classes", type=_positive, default=21, help="of the logits")
    options = parser.parse_args()
    row = "{:<18} {:>8} {:<12} {:>11} {:>9} {:>11} {:>10}  {}"
    print(row.format("kernel", "channels", "operands", "blocks", "registers", "spilled, B", "shared", "instructions"))
    for channels in options.channels:
        for form in forms(channels, options.classes):
            pieces = [torch.float16] * 2 if form.title.startswith("loss") else [torch.bfloat16] * 3
            for operands in (kernels.Operands(dtype, i + 1) for i, dtype in enumerate(pieces)):
                name = f"{operands.pieces} x {str(operands.dtype).removeprefix('torch.')}"
                try:
                    done = compile_form(form, operands, options.capability)
                except kernels.TooManyChannelsError:
                    print(row.format(form.title, channels, name, "do not fit", "", "", "", ""))
                    continue
                blocks = " x ".join(str(size) for size in done.blocks)
                products = ", ".join(f"{done.counts[x]} {x}" for x in PRODUCTS if done.counts[x])
                products += ", one after the other" if done.is_serialized else ""
                shared = f"{done.shared / 1024:.0f} KiB"
                print(row.format(form.title, channels, name, blocks, done.registers, done.stack, shared, products))


if __name__ == "__main__":
    main()
