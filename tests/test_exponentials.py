"""Shares that underflow are 0, and the plain exponential is taken where none can."""

import math
import time

import pytest
import torch

from dlprop import DerivativeLabelPropagation
from dlprop._kernels.compared import Compared
from dlprop._kernels.exponentials import LOWEST, exp_, exponential
from dlprop.affinity import Softmax
from tests.tolerances import assert_close

DTYPES = pytest.mark.parametrize("dtype", LOWEST)


@DTYPES
def test_small_shares_are_zero_and_others_as_they_are(dtype):
    lowest = LOWEST[dtype]
    kept = torch.tensor([0.0, -1.0, lowest / 2, lowest + 0.1], dtype=dtype)
    gone = torch.tensor([lowest - 0.1, 1.5 * lowest, 100 * lowest, -torch.inf], dtype=dtype)
    assert torch.equal(exp_(kept.clone()), kept.exp())
    assert math.exp(lowest) > torch.finfo(dtype).tiny > math.exp(lowest - 1)
    assert (exp_(gone) == 0).all()
    assert exp_(torch.tensor([torch.nan], dtype=dtype)).isnan().all()
    # One vector is not one number: every length has a tail of its own.
    assert all((exp_(torch.full((n,), 2 * lowest, dtype=dtype)) == 0).all() for n in range(1, 70))


@DTYPES
def test_what_cannot_underflow_is_not_looked_at_twice(dtype):
    units = torch.eye(3, dtype=dtype)[None]
    far = -LOWEST[dtype] / 3  # the bound is 2 |q| |k|, and may take two thirds
    bias = torch.zeros(1, 3, dtype=dtype)
    assert exponential(Compared(0.99 * far * units, units)) == torch.Tensor.exp_
    assert exponential(Compared(1.01 * far * units, units)) == exp_
    assert exponential(Compared(units, units, bias)) == torch.Tensor.exp_
    for last in (3 * far, -3 * far, -torch.inf, torch.nan):
        assert exponential(Compared(units, units, torch.tensor([[0.0, 0.0, last]], dtype=dtype))) == exp_
    assert exponential(Compared(units * torch.nan, units)) == exp_
    assert exponential(Compared(units, units[:, :2])) == exp_  # looking would cost more than it saves


OVER = pytest.mark.parametrize("options", [{"over": "targets"}, {"over": "sources"}, {"over": "sources", "radius": 2}])


@OVER
@pytest.mark.parametrize("D", [2, 40])
def test_sharp_kernels_are_right(options, D):
    """Most shares underflow, and some do not."""
    affinity = Softmax(similarity="gaussian", normalize=None, weights=(300.0,), **options)
    feats, logits = torch.rand(1, D, 5, 6) / D**0.5, torch.randn(1, 3, 5, 6)
    found, expected = [], []
    for values, dtype in ((found, torch.float32), (expected, torch.float64)):
        leaves = [x.to(dtype).requires_grad_() for x in (logits, feats)]
        out = DerivativeLabelPropagation(affinity)(*leaves)
        values += [out, *torch.autograd.grad(out.square().sum(), leaves)]
    for x, y in zip(found, expected, strict=True):
        assert_close(x, y.detach(), "gradient", slack=3e-4 * max(1, y.abs().max().item()))  # similarities are 300


@pytest.mark.parametrize("M", [1, 600])
def test_a_target_that_hears_little_hears_it_right(M):
    """Over the targets nothing large stands beside a small share: it is all that a target gets, and its arg max."""
    # Every source is near the first target and far from the second.
    logits = torch.randn(1, 3, M)
    sources = torch.tensor([[[1.0], [0.0]]]).expand(1, 2, M)
    targets = torch.tensor([[[75.0, 0.0], [0.0, 1.0]]])
    propagate = DerivativeLabelPropagation(Softmax(weights=(1.0,), normalize=None))
    out = propagate(logits, sources, targets)
    expected = (
        torch.tensor([75.0, 0.0], dtype=torch.float64).softmax(0) * logits.double().sum(2, keepdim=True)
    ).squeeze()
    for found, wanted in zip(out[0].T, expected.T, strict=True):
        assert_close(found / wanted.abs().max(), wanted / wanted.abs().max(), "propagation", slack=2e-5)


@OVER
def test_sharp_kernels_take_no_longer_than_mild_ones(options):
    """Where they underflowed, on some processors, they took fifteen times as long."""
    feats, logits = torch.rand(1, 3, 40, 40), torch.randn(1, 3, 40, 40)

    def seconds(sharpness):
        affinity = Softmax(similarity="gaussian", normalize=None, weights=(sharpness,), **options)
        propagate = DerivativeLabelPropagation(affinity)
        start = time.perf_counter()
        propagate(logits, feats)
        return time.perf_counter() - start

    mild, sharp = zip(*((seconds(1.0), seconds(1e4)) for _ in range(7)), strict=True)  # in turns, beside other work
    assert min(sharp) < 4 * min(mild)
