"""The Triton backend: its kernels in the interpreter and on a GPU, their compilation, and where it cannot run.

The kernels' own tests are in `triton_kernels.py`. They run in a process of their own, because Triton decides at its
first import whether it interprets kernels or compiles them.
"""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from dlprop import DerivativeLabelPropagation, DerivativeLoss, _ops

ROOT = Path(__file__).parents[1]

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
not_interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="Triton's interpreter is on")


def _run(*arguments, **environment):
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _pytest(marker, **environment):
    options = ("-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider")
    report = _run(*options, "-m", marker, "tests/triton_kernels.py", **environment)
    summary = re.search(r"^(\d+) passed", report, flags=re.MULTILINE)
    assert summary, report
    assert int(summary[1]) > 80
    assert "skipped" not in report


@pytest.mark.slow
@needs_triton
def test_the_kernels_in_the_interpreter():
    _pytest("not gpu", TRITON_INTERPRET="1")


@pytest.mark.slow
@pytest.mark.gpu
@needs_triton
def test_the_kernels_on_the_gpu():
    _pytest("gpu")


# ---------------------------------------------------------------------------------------------------------------------
# What the interpreter does not see: types, shapes and shared memory of the compiled kernels. Compiling needs no GPU.

COMPILE = """
import sys, torch, triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from dlprop._kernels import triton as kernels

capability, dtype, precision = int(sys.argv[1]), getattr(torch, sys.argv[2]), sys.argv[3]
element = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float64: "fp64"}[dtype]
accumulator = "fp64" if element == "fp64" else "fp32"
torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
FEATURES = ("rows", "columns", "row_carried", "column_carried", "values")
UNIT = "value_channel" if dtype.itemsize < 4 else "value_pixel"
MULTIPLES = ("row_pad", "column_pad", "channels", "target_channels", "value_image", "value_channel", "value_pixel")

def compile(kernel, depth, **constants):
    blocks = kernels._blocks(dtype, depth, None)
    constants |= dict(ACCUMULATOR=getattr(tl, "float64" if element == "fp64" else "float32"), OWNED=blocks.owned,
                      VISITED=blocks.visited, CHUNK=blocks.chunk, DEPTH=blocks.depth, PRECISION=precision, UPCAST=False)
    constants |= {UNIT: 1, "depth_blocks": 1}
    signature, values, hints = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], values[i,] = "constexpr", constants[name]
        elif name in FEATURES:
            signature[name] = "*" + element
        elif name in ("row_targets", "column_targets"):
            signature[name] = "*i64" if constants["LABELS"] else "*" + element
        elif name in ("gradient", "sums", "out", "lse", "shift"):
            signature[name] = "*" + accumulator
        else:
            signature[name] = "i32"
        if signature[name][0] == "*" or signature[name] == "i32" and name in MULTIPLES:
            hints[i,] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=hints)
    options = dict(num_warps=blocks.warps, num_stages=blocks.stages, enable_fp_fusion=True)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert len(compiled.asm["cubin"]) > 1000
    print("shared", compiled.metadata.shared)
    print("product", *sorted({w for w in ("wgmma", "mma.sync") if w in compiled.asm["ptx"]}))

compile(kernels._pairwise_kernel, 255, LABELS=True, NEED_GRADIENT=True)
compile(kernels._pairwise_kernel, 100, LABELS=False, NEED_GRADIENT=False)
compile(kernels._log_sum_exp_kernel, 16)
compile(kernels._softmax_kernel, 255, SOURCES_OWN=True, GRADIENT=True)
"""


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize(
    ("capability", "dtype", "precision", "instruction"),
    [
        (80, "float32", "tf32", "mma.sync"),
        (90, "float32", "tf32", "wgmma"),
        (90, "bfloat16", "ieee", "wgmma"),
    ],
)
def test_the_kernels_compile(capability, dtype, precision, instruction, tmp_path):
    import triton

    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 3):
        pytest.skip("the compiler's interface was another before Triton 3.3")
    report = _run("-c", COMPILE, str(capability), dtype, precision, TRITON_CACHE_DIR=str(tmp_path))
    shared = [int(size) for size in re.findall(r"^shared (\d+)", report, flags=re.MULTILINE)]
    assert len(shared) == 4
    assert max(shared) <= 99 * 1024  # what one program may have on the smallest GPUs since 8.0
    # A kernel that falls back to plain multiply-adds would be right, and many times slower.
    assert set(re.findall(r"^product ?(.*)$", report, flags=re.MULTILINE)) == {instruction}


# ---------------------------------------------------------------------------------------------------------------------
# Where it cannot run

FEATS = torch.ones(1, 5, 3)
LABELS = torch.zeros(1, 3, dtype=torch.long)


def test_importing_the_library_does_not_import_the_kernels():
    _run("-c", "import sys, dlprop; assert 'dlprop._kernels.triton' not in sys.modules")


@needs_triton
@not_interpreted
def test_cpu_tensors_without_the_interpreter():
    for call in (
        lambda: DerivativeLoss(backend="triton")(FEATS, LABELS),
        lambda: DerivativeLoss(backend="triton", num_anchors=2)(FEATS, LABELS),
        lambda: DerivativeLabelPropagation(affinity="softmax", backend="triton")(FEATS, FEATS),
        lambda: torch.ops.dlprop.softmax_affinity(FEATS, FEATS, FEATS, None, "triton"),
        lambda: torch.compile(DerivativeLoss(backend="triton"), fullgraph=True, backend="eager")(FEATS, LABELS),
    ):
        with pytest.raises(ValueError, match=r"backend='triton' .*CUDA tensors.* on cpu .*TRITON_INTERPRET.*'auto'"):
            call()


def test_without_triton(monkeypatch):
    monkeypatch.setattr(_ops, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"backend='triton' .*not installed.* on cpu.*'auto'"):
        DerivativeLoss(backend="triton")(FEATS, LABELS)


def test_other_devices_than_the_two():
    with pytest.raises(ValueError, match=r"CUDA tensors, and these are on meta|not installed"):
        _ops.check_backend("triton", FEATS.to("meta"))


def test_options_without_a_kernel():
    with pytest.raises(ValueError, match=r"backend='triton' .*affinity='linear' has no Triton kernel.*'auto'"):
        DerivativeLabelPropagation(backend="triton")(FEATS, FEATS)
    with pytest.raises(ValueError, match=r"backend='triton' .*norm='frobenius' has no Triton kernel.*'auto'"):
        DerivativeLoss(norm="frobenius", backend="triton")(FEATS, LABELS)
