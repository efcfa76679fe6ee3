"""Products over pixels with gradients of their own: against plain autograd, to the second order and forwards."""

import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck

from dlprop import DerivativeLabelPropagation, DerivativeLoss, _products
from dlprop._products import gram, grams_of_difference, low_rank, pixel_norm, sum_abs_difference
from dlprop.difference import difference, metric
from tests.tolerances import assert_close

F64, F32 = torch.float64, torch.float32


def _normal(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def _inputs(M=7):
    """Logits, features and features of targets."""
    return _normal(2, 3, M, seed=1), _normal(2, 5, M), _normal(2, 5, M + 2, seed=2)


def _target(V):
    return _normal(*V.shape, seed=7)


def _pairs_of_difference(V):
    W = _target(V)
    return (V - W, V - W), (V - W, W), (W, W)


WEIGHTS = (1.0, 0.5, 0.25)
CASES = {
    "gram": (gram, lambda x: x @ x.mT, (1,)),
    "grams_of_difference": (
        lambda V: torch.cat(grams_of_difference(V, _target(V)), 1),
        lambda V: torch.cat([a @ b.mT for a, b in _pairs_of_difference(V)], 1),
        (1,),
    ),
    "low_rank": (
        lambda L, V: low_rank(L, V, None, WEIGHTS, "forward"),
        lambda L, V: metric(L @ V.mT, WEIGHTS, 2, "forward") @ V,
        (0, 1),
    ),
    "low_rank to targets": (
        lambda L, V, T: low_rank(L, V, T, WEIGHTS, "forward"),
        lambda L, V, T: metric(L @ V.mT, WEIGHTS, 2, "forward") @ T,
        (0, 1, 2),
    ),
    "pixel_norm 1": (lambda x: pixel_norm(x, 1), lambda x: x.abs().sum(1, keepdim=True), (1,)),
    "pixel_norm 2": (lambda x: pixel_norm(x, 2), lambda x: x.square().sum(1, keepdim=True).sqrt(), (1,)),
    "sum_abs_difference": (
        lambda x: sum_abs_difference(x, 2, "forward"),
        lambda x: difference(x, 2, 1, "forward").abs().sum((1, 2)),
        (1,),
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("M", [1, 7, 4099])
def test_value_and_gradient(name, M):
    ours, plain, chosen = CASES[name]
    inputs = [_inputs(M)[i].requires_grad_() for i in chosen]
    value, expected = ours(*inputs), plain(*inputs)
    assert_close(value, expected.detach(), "propagation")
    upstream = _normal(*value.shape, seed=5)
    gradients = (torch.autograd.grad(x, inputs, upstream) for x in (value, expected))
    for x, y in zip(*gradients, strict=True):
        assert_close(x, y, "gradient")


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")  # torch calls it itself
def test_every_derivative(name):
    ours, _, chosen = CASES[name]
    inputs = tuple(_inputs()[i].requires_grad_() for i in chosen)
    assert gradcheck(ours, inputs, check_forward_ad=True)
    assert gradgradcheck(ours, inputs)


def test_the_gradient_of_many_pixels_is_written_in_blocks(monkeypatch):
    monkeypatch.setattr(_products, "OUTER_ROWS", 2)
    monkeypatch.setattr(_products, "OUTER_PIXELS", 3)
    test_value_and_gradient("low_rank", 7)


@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
def test_a_gradient_for_one_input_only(wanted):
    L, V, _ = _inputs()
    both = torch.autograd.grad(low_rank(L.requires_grad_(), V.requires_grad_(), None, WEIGHTS, "sum").sum(), (L, V))
    L, V = (x.detach().requires_grad_(need) for x, need in zip((L, V), wanted, strict=True))
    low_rank(L, V, None, WEIGHTS, "sum").sum().backward()
    for x, need, expected in zip((L, V), wanted, both, strict=True):
        assert (x.grad is not None) == need
        if need:
            assert_close(x.grad, expected, "gradient")


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("shape", [(2, 5, 3), (1, 70, 70, 60), (1, 3, 600, 500), (0, 4, 3), (2, 5, 0)])
def test_norms_of_many_and_of_few_pixels(p, shape):
    x = _normal(*shape, dtype=F32)
    expected = torch.linalg.vector_norm(x.double(), p, dim=1, keepdim=True)
    for layout in (x, x.mT.contiguous().mT):
        norm = pixel_norm(layout, p)
        assert norm.shape == expected.shape
        assert_close(norm, expected, "similarity")


@pytest.mark.parametrize("p", [1, 2])
def test_norms_of_zeros_and_of_what_is_not_finite(p):
    x = torch.tensor([[[0.0, 3.0, torch.inf, torch.nan], [0.0, -4.0, 1.0, 1.0]]], requires_grad=True)
    norm = pixel_norm(x, p)
    assert norm[0, 0, :2].tolist() == [0, 7 if p == 1 else 5]
    assert norm[0, 0, 2] == torch.inf
    assert norm[0, 0, 3].isnan()
    norm[0, 0, 0].backward()
    assert x.grad[0, :, 0].tolist() == [0, 0]


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")  # torch calls it itself
@pytest.mark.parametrize(
    "function",
    [
        lambda logits, feats: DerivativeLabelPropagation(scale="degree")(logits, feats.abs()),
        lambda logits, feats: DerivativeLoss(norm="frobenius")(feats, logits.argmax(1)),
    ],
)
def test_what_promises_forward_derivatives_has_them(function):
    logits, feats, _ = _inputs()
    direction = _normal(*feats.shape, seed=9)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(function(logits, forward_ad.make_dual(feats, direction))).tangent
    step = 1e-6
    slope = (function(logits, feats + step * direction) - function(logits, feats - step * direction)) / (2 * step)
    torch.testing.assert_close(tangent, slope, rtol=1e-5, atol=1e-7)
