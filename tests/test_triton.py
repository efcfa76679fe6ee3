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
from dlprop._kernels.compared import Compared, Needed
from dlprop.affinity import Softmax

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


def _pytest(marker, at_least=75, **environment):
    options = ("-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider")
    report = _run(*options, "-m", marker, "tests/triton_kernels.py", **environment)
    summary = re.search(r"^(\d+) passed", report, flags=re.MULTILINE)
    assert summary, report
    assert int(summary[1]) > at_least
    assert "skipped" not in report


@pytest.mark.slow
@needs_triton
def test_the_kernels_in_the_interpreter():
    _pytest("not gpu and not exhaustive", TRITON_INTERPRET="1")


@pytest.mark.slow
@pytest.mark.exhaustive
@needs_triton
def test_the_rest_in_the_interpreter_where_wrong_kernels_fail():
    _pytest("not gpu and exhaustive", at_least=30, TRITON_INTERPRET="1")


@pytest.mark.slow
@pytest.mark.gpu
@needs_triton
def test_the_kernels_on_the_gpu():
    _pytest("gpu")


# ---------------------------------------------------------------------------------------------------------------------
# What the interpreter does not see: types, matrix instructions and shared memory of the compiled kernels, for GPUs that
# need not be there. Shared memory of one program in KiB (CUDA C++ Programming Guide, technical specifications).

GPUS = {80: ("mma.sync", 163), 90: ("wgmma", 227)}


@pytest.fixture
def compiled(monkeypatch, tmp_path, request):
    """The Triton kernels, which compile what they would launch on a GPU, and a list of what came out."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from dlprop._kernels import triton as kernels
    from dlprop._kernels import triton_blocks

    if triton_blocks.VERSION < (3, 3):
        pytest.skip("the compiler's interface was another before Triton 3.3")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    capability, memory = request.param, GPUS[request.param][1]
    types = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.int32: "i32"}
    results = []

    def compile_instead(kernel, grid, operands, blocks, *args, **constants):
        constants |= triton_blocks.options(operands, blocks)
        names = kernel.arg_names
        options = {name: constants.pop(name) for name in [*constants] if name not in names}
        values = dict(zip(names, args, strict=False))
        pointers = {name: f"*{types[x.dtype]}" for name, x in values.items() if isinstance(x, torch.Tensor)}
        signature = dict.fromkeys(names, "i32") | pointers | dict.fromkeys(constants, "constexpr")
        source = ASTSource(
            fn=kernel,
            signature=signature,
            constexprs={(names.index(name),): value for name, value in constants.items()},
            attrs={(names.index(name),): [["tt.divisibility", 16]] for name in pointers},
        )
        results.append(triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options))

    monkeypatch.setattr(kernels, "launch", compile_instead)
    gpu = triton_blocks.Device(capability, memory << 10, processors=100)
    monkeypatch.setattr(triton_blocks, "_device", lambda _: gpu)
    return kernels, results, capability


@pytest.mark.slow
@needs_triton
@not_interpreted
@pytest.mark.parametrize("compiled", [pytest.param(80, marks=pytest.mark.exhaustive), 90], indirect=True)
def test_the_kernels_compile(compiled):
    kernels, results, capability = compiled
    rows, logits = torch.rand(1, 40, 64), torch.rand(1, 40, 16)
    kernels.pairwise_l1(rows, torch.zeros(1, 40, dtype=torch.int32), None, True)
    kernels.pairwise_l1(rows, rows, None, True)
    _, lse = kernels.softmax_affinity(logits, Compared(rows, rows), None)
    kernels.softmax_affinity_backward(logits, logits, Compared(rows, rows), lse, None, Needed(True, True, False))
    instruction, memory = GPUS[capability]
    assert len(results) == 7
    for result in results:
        assert result.metadata.shared <= memory << 10
        # A kernel that falls back to plain multiply-adds would be right, and many times slower.
        assert instruction in result.asm["ptx"]


# ---------------------------------------------------------------------------------------------------------------------
# Where it cannot run

FEATS = torch.ones(1, 5, 3)
LABELS = torch.zeros(1, 3, dtype=torch.long)


def test_neither_importing_the_library_nor_using_it_on_the_cpu_imports_the_kernels():
    use = "x = torch.rand(1, 5, 3); dlprop.DerivativeLoss()(x, x); "
    use += "dlprop.DerivativeLabelPropagation('softmax')(x, x); "
    _run("-c", f"import sys, torch, dlprop; {use} assert 'dlprop._kernels.triton' not in sys.modules")


@needs_triton
@not_interpreted
def test_cpu_tensors_without_the_interpreter():
    for call in (
        lambda: DerivativeLoss(backend="triton")(FEATS, LABELS),
        lambda: DerivativeLoss(backend="triton", num_anchors=2)(FEATS, LABELS),
        lambda: DerivativeLabelPropagation(Softmax(backend="triton"))(FEATS, FEATS),
        lambda: torch.ops.dlprop.softmax_affinity(FEATS, FEATS, FEATS, None, False, None, "triton"),
        lambda: torch.compile(DerivativeLoss(backend="triton"), fullgraph=True, backend="eager")(FEATS, LABELS),
    ):
        with pytest.raises(ValueError, match=r"backend='triton' .*CUDA tensors.* on cpu .*TRITON_INTERPRET.*'auto'"):
            call()


class _OnCuda:
    """What the choice of kernels asks of a tensor on a GPU, where there is none."""

    device = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of compute capability 9.0, as far as the choice of kernels can see."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    return monkeypatch


@needs_triton
def test_the_backends_on_a_gpu(gpu):
    from dlprop._kernels import tiled, triton

    assert _ops._kernels("triton", _OnCuda) is triton
    assert _ops._kernels("tiled", _OnCuda) is tiled
    assert _ops._kernels("auto", _OnCuda) is tiled


@pytest.mark.parametrize("fact", ["no Triton", "an older GPU", "another maker's GPU", "another device"])
def test_what_triton_does_not_run_on(gpu, fact):
    if fact != "no Triton" and find_spec("triton") is None:
        pytest.skip("needs Triton")
    x, reason = _OnCuda, "8.0 or newer"
    if fact == "no Triton":
        gpu.setattr(_ops, "find_spec", lambda name: None)
        reason = "not installed"
    elif fact == "an older GPU":
        gpu.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    elif fact == "another maker's GPU":
        gpu.setattr(torch.version, "hip", "6.0")
    else:
        x, reason = FEATS.to("meta"), "CUDA tensors, and these are on meta"
    with pytest.raises(ValueError, match=rf"backend='triton' cannot run here: .*{reason}.*backend='auto'"):
        _ops._kernels("triton", x)
