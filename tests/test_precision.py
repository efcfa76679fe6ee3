"""The one place that knows autocast, float32 and TF32."""

import re
from pathlib import Path

import pytest
import torch

import dlprop
from dlprop._precision import allows_tf32, at_least_float32, autocast_enabled, exact, working_dtype

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16


def test_at_least_float32():
    for dtype, expected in ((F16, F32), (BF16, F32), (F32, F32), (F64, F64)):
        x = torch.ones(2, dtype=dtype)
        assert at_least_float32(x).dtype == expected
        assert (at_least_float32(x) is x) == (dtype == expected)


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [((F16,), F32), ((BF16, F16), F32), ((F32, BF16), F32), ((F64, F16), F64), ((F32, F64), F64), ((), F32)],
)
def test_working_dtype(dtypes, expected):
    assert working_dtype(*(torch.ones(1, dtype=dtype) for dtype in dtypes)) == expected


@pytest.mark.parametrize("dtype", [F16, BF16])
def test_exact_products_under_autocast(dtype):
    x = torch.randn(4, 64, 64)
    expected = x @ x
    with torch.autocast("cpu", dtype=dtype):
        assert autocast_enabled(x)
        assert (x @ x).dtype == dtype
        with exact(x):
            assert not autocast_enabled(x)
            assert torch.equal(x @ x, expected)
        assert autocast_enabled(x)
        assert not autocast_enabled(x.to("meta"))  # the device type has no autocast, and asking raises
    assert not autocast_enabled(x)


def test_exact_without_autocast_changes_nothing():
    x = torch.randn(3, 3)
    with exact(x), torch.autocast("cpu", dtype=BF16):
        assert autocast_enabled(x)  # it does not forbid what comes later
    with exact(x.to("meta")):
        pass


@pytest.fixture
def tf32():
    """Torch's setting, put back afterwards."""
    before = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


def test_allows_tf32(tf32):
    for setting, expected in (("highest", False), ("high", True), ("medium", True), ("highest", False)):
        tf32(setting)
        assert allows_tf32() is expected


def test_no_other_file_decides_a_precision():
    source = Path(dlprop.__file__).parent
    asks = re.compile(r"torch\.autocast|is_autocast|matmul_precision|fp32_precision|allow_tf32|custom_(fwd|bwd)")
    found = {path.name for path in source.rglob("*.py") if asks.search(path.read_text())}
    assert found == {"_precision.py"}
