"""Hypothesis profiles, seeds and devices shared by all tests."""

import gc
import os
import sys

# The tensors here are tiny: threads that wait for each other on shared cores cost ten times the arithmetic. This is for
# BLAS and for the processes that tests start; torch has its own setting below.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings

# No deadline: the first call of an operator compiles or dispatches, and test machines are shared.
_COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow], "print_blob": True}
settings.register_profile("dev", max_examples=40, **_COMMON)
settings.register_profile("ci", max_examples=40, derandomize=True, database=None, **_COMMON)
settings.load_profile("ci" if os.environ.get("CI") else "dev")


@pytest.fixture(autouse=True)
def _as_alone():
    """Every test starts as if it were the first: seed, threads, and what the compiler has seen."""
    # torch.manual_seed also notes the call, with a traceback, for devices that are not there.
    torch.default_generator.manual_seed(0)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(0)
    torch.set_num_threads(1)  # a command under test sets its own
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()  # how often one function may be compiled is limited


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Run the test on the CPU and, where there is one, on the GPU."""
    return torch.device(request.param)


def pytest_collection_finish():
    """Keep what is there before the first test out of the garbage collector, which would walk it again and again."""
    gc.freeze()


def pytest_collection_modifyitems(items):
    """Skip tests marked `gpu` on a machine without a CUDA device, with the reason in the report."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
