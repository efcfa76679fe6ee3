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
from dlprop._kernels import tiled

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
# What the interpreter does not see: types, registers and shared memory of the compiled kernels. This needs no GPU.

FP16, BF16 = torch.float16, torch.bfloat16


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    import triton

    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 3):
        pytest.skip("the compiler's interface was another before Triton 3.3")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from benchmarks import compiled

    return compiled


# What "auto" takes with 256 channels, and one form on other chips, where the compiler goes other ways.
COMPILED = [(90, form, FP16, 1) for form in ("loss, labels", "loss, features")]
COMPILED += [(90, form, BF16, 2) for form in ("log-sum-exp", "softmax", "softmax, gradient")]
COMPILED += [(80, form, FP16, 1) for form in ("loss, labels", "loss, features")]
COMPILED += [(80, form, BF16, 1) for form in ("log-sum-exp", "softmax", "softmax, gradient")]
COMPILED += [(capability, "loss, features", FP16, 1) for capability in (86, 89, 100, 120)]
INSTRUCTIONS = {80: "mma.sync", 86: "mma.sync", 89: "mma.sync", 90: "wgmma", 100: "tcgen05.mma", 120: "mma.sync"}


@pytest.mark.slow
@needs_triton
@not_interpreted
@pytest.mark.parametrize(("capability", "title", "dtype", "pieces"), COMPILED)
def test_the_kernels_compile_without_waste(compiled, capability, title, dtype, pieces):
    form = next(form for form in compiled.forms(256, 21) if form.title == title)
    result = compiled.compile_form(form, compiled.kernels.Operands(dtype, pieces), capability)
    assert result.shared <= compiled.SHARED_MEMORY[capability] << 10
    # A kernel that falls back to plain multiply-adds would be right, and many times slower.
    assert result.instruction == INSTRUCTIONS[capability]
    assert result.stack <= (100 if capability == 80 else 0)
    assert not result.is_serialized


@pytest.mark.slow
@needs_triton
@not_interpreted
def test_the_report_of_the_compiler(compiled, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["compiled", "--channels", "40", "5000", "--classes", "3"])
    compiled.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 2 * (2 * 2 + 3 * 3)
    assert sum("HGMMA" in line for line in lines) == 2 * 2 + 3 * 3
    assert sum("do not fit" in line for line in lines) == 2 * 2 + 3 * 3
    for wrong in ("0", "-3", "many"):
        monkeypatch.setattr(sys, "argv", ["compiled", "--channels", wrong])
        with pytest.raises(SystemExit):
            compiled.main()
        assert f"at least 1, got {wrong}" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# Where it cannot run

FEATS = torch.ones(1, 5, 3)
LABELS = torch.zeros(1, 3, dtype=torch.long)


def test_neither_importing_the_library_nor_using_it_on_the_cpu_imports_the_kernels():
    use = "x = torch.rand(1, 5, 3); dlprop.DerivativeLoss()(x, x); "
    use += "dlprop.DerivativeLabelPropagation(affinity='softmax')(x, x); "
    _run("-c", f"import sys, torch, dlprop; {use} assert 'dlprop._kernels.triton' not in sys.modules")


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
    with pytest.raises(ValueError, match=r"backend='triton' .*not installed.*'auto'"):
        DerivativeLoss(backend="triton")(FEATS, LABELS)


def test_other_devices_than_the_two():
    with pytest.raises(ValueError, match=r"CUDA tensors, and these are on meta|not installed"):
        _ops.check_backend("triton", FEATS.to("meta"))


def test_options_without_a_kernel():
    with pytest.raises(ValueError, match=r"backend='triton' .*affinity='linear' has no Triton kernel.*'auto'"):
        DerivativeLabelPropagation(backend="triton")(FEATS, FEATS)
    with pytest.raises(ValueError, match=r"backend='triton' .*norm='frobenius' has no Triton kernel.*'auto'"):
        DerivativeLoss(norm="frobenius", backend="triton")(FEATS, LABELS)


# ---------------------------------------------------------------------------------------------------------------------
# What "auto" takes


class _OnCuda:
    """What a choice of kernels asks of a tensor on a GPU, where there is none."""

    device = torch.device("cuda", 0)
    dtype = torch.float32


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of compute capability 9.0, as far as the choice of kernels can see."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return monkeypatch


def _chosen(backend, reduced=True):
    return _ops._kernels(backend, _OnCuda, "derivative_l1", (256, 0), reduced)


@needs_triton
def test_auto_takes_the_triton_kernels_where_they_pay(gpu):
    from dlprop._kernels import triton

    asked = []
    gpu.setattr(triton, "pays", lambda *call: asked.append(call) or True)
    kernels = _chosen("auto")
    assert kernels.pairwise_l1.func is triton.pairwise_l1
    assert kernels.softmax_affinity_backward.keywords == {"reduced": True}
    assert asked == [("derivative_l1", torch.float32, _OnCuda.device, (256, 0), True)]
    gpu.setattr(triton, "pays", lambda *_: False)
    assert _chosen("auto") is tiled
    assert _chosen("triton").pairwise_l1.func is triton.pairwise_l1
    assert _chosen("tiled") is tiled


@needs_triton
@not_interpreted
def test_auto_goes_on_where_triton_is_broken(gpu):
    from dlprop._kernels import triton

    def no_compiler():
        raise RuntimeError("Failed to find C compiler")

    # Triton compiles its driver when it is first asked for one.
    gpu.setattr(type(triton.triton.runtime.driver), "active", property(lambda _: no_compiler()))
    gpu.setattr(torch.Tensor, "to", lambda x, _: x)
    triton.works.cache_clear()
    with pytest.warns(
        RuntimeWarning, match="do not work on cuda:0, .*slower tiled ones: RuntimeError: Failed to find C"
    ):
        assert _chosen("auto") is tiled
    triton.works.cache_clear()


def test_auto_goes_on_where_triton_cannot_be_imported(gpu):
    gpu.setattr(_ops, "find_spec", lambda name: True)
    gpu.setitem(sys.modules, "dlprop._kernels.triton", None)
    gpu.delattr("dlprop._kernels.triton", raising=False)
    _ops._import_triton.cache_clear()
    with pytest.warns(RuntimeWarning, match="cannot be imported, .*slower tiled kernels: ModuleNotFound"):
        assert _chosen("auto") is tiled
    _ops._import_triton.cache_clear()


@needs_triton
def test_auto_on_the_cpu_is_tiled():
    for interpreted in (False, True):
        assert _ops._kernels("auto", FEATS, "derivative_l1", (5, 0), interpreted) is tiled


@pytest.mark.parametrize("fact", ["no Triton", "an older GPU", "another maker's GPU"])
def test_auto_elsewhere_is_tiled(gpu, fact):
    if fact == "no Triton":
        gpu.setattr(_ops, "find_spec", lambda name: None)
        reason = "not installed"
    elif fact == "an older GPU":
        gpu.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
        reason = "8.0 or newer"
    else:
        gpu.setattr(torch.version, "hip", "6.0")
        reason = "an NVIDIA GPU"
    if fact != "no Triton" and find_spec("triton") is None:
        pytest.skip("needs Triton")
    assert _chosen("auto") is tiled
    with pytest.raises(ValueError, match=rf"backend='triton' cannot run here: .*{reason}.*backend='auto'"):
        _chosen("triton")


def test_autocast_is_what_reduces(monkeypatch):
    calls = []
    monkeypatch.setattr(_ops, "_kernels", lambda *call: calls.append(call[-1]) or tiled)
    feats = torch.rand(1, 5, 3, requires_grad=True)
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=BF16, enabled=enabled):
            loss = DerivativeLoss()(feats, LABELS)
            out = DerivativeLabelPropagation(affinity="softmax")(feats, feats)
            DerivativeLoss()(feats, torch.rand(1, 5, 3))  # whose residuals may be smaller than the rounding
        assert calls == [enabled, enabled, False]
        calls.clear()
        loss.backward()
        out.sum().backward()  # outside autocast, as usual
        assert calls == [enabled]
        calls.clear()
