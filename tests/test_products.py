"""Products over pixels with gradients of their own: against plain autograd, in every mode and under transforms."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from dlprop._kernels import products
from dlprop._kernels.products import gram, grams_of_difference, low_rank
from dlprop.difference import metric
from tests.tolerances import assert_close

F64 = torch.float64
forward_mode = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")  # torch calls it


def _normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def _inputs(M=7):
    """Logits, features and features of targets."""
    return _normal(2, 3, M, seed=1), _normal(2, 5, M), _normal(2, 5, M + 2, seed=2)


def _target(V):
    return torch.arange(V.numel(), dtype=F64).cos().view(V.shape)  # no generator: it is compiled and transformed too


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
        lambda L, V: low_rank(L, V, V, WEIGHTS, "forward"),
        lambda L, V: metric(L @ V.mT, WEIGHTS, 2, "forward") @ V,
        (0, 1),
    ),
    "low_rank to targets": (
        lambda L, V, T: low_rank(L, V, T, WEIGHTS, "forward"),
        lambda L, V, T: metric(L @ V.mT, WEIGHTS, 2, "forward") @ T,
        (0, 1, 2),
    ),
}
every_case = pytest.mark.parametrize("name", CASES)


@every_case
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


@every_case
@forward_mode
def test_every_derivative(name):
    ours, _, chosen = CASES[name]
    inputs = tuple(_inputs()[i].requires_grad_() for i in chosen)
    assert gradcheck(ours, inputs, check_forward_ad=True)
    assert gradgradcheck(ours, inputs)


@pytest.mark.parametrize("size", [1, 3, 7])
def test_blocks_of_pixels_change_nothing(size, monkeypatch):
    monkeypatch.setattr(products, "PIXELS", size)
    test_value_and_gradient("grams_of_difference", 7)


def test_the_target_of_a_difference_is_a_constant():
    V, W = _normal(2, 5, 7).requires_grad_(), _normal(2, 5, 7, seed=1).requires_grad_()
    pair = grams_of_difference(V, W)
    assert not pair[2].requires_grad
    sum(x.sum() for x in pair).backward()
    assert W.grad is None
    assert V.grad.any()
    assert not torch.func.grad(lambda w: sum(x.sum() for x in grams_of_difference(_normal(2, 5, 7), w)))(W).any()


@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
def test_a_gradient_for_one_input_only(wanted):
    L, V, _ = _inputs()
    both = torch.autograd.grad(low_rank(L.requires_grad_(), V.requires_grad_(), V, WEIGHTS, "sum").sum(), (L, V))
    L, V = (x.detach().requires_grad_(need) for x, need in zip((L, V), wanted, strict=True))
    low_rank(L, V, V, WEIGHTS, "sum").sum().backward()
    for x, need, expected in zip((L, V), wanted, both, strict=True):
        assert (x.grad is not None) == need
        if need:
            assert_close(x.grad, expected, "gradient")


@every_case
@forward_mode
def test_transforms(name):
    ours, plain, chosen = CASES[name]
    inputs = [_inputs()[i] for i in chosen]
    batches = [torch.stack((x, x.flip(2), x.square())) for x in inputs]
    assert_close(torch.func.vmap(ours)(*batches), torch.func.vmap(plain)(*batches), "propagation")
    where = tuple(range(len(inputs)))

    def energies(function):
        return lambda *x: function(*x).square().sum()

    for transform in (torch.func.grad, torch.func.hessian):
        actual, expected = (transform(energies(f), argnums=where)(*inputs) for f in (ours, plain))
        for x, y in zip(
            torch.utils._pytree.tree_leaves(actual), torch.utils._pytree.tree_leaves(expected), strict=True
        ):
            assert_close(x, y, "gradient")
    vectorised, rowwise = (
        torch.autograd.functional.jacobian(ours, tuple(inputs), vectorize=vectorize) for vectorize in (True, False)
    )
    for x, y in zip(vectorised, rowwise, strict=True):
        assert_close(x, y, "gradient")


@every_case
def test_compiled(name):
    ours, plain, chosen = CASES[name]
    inputs = [_inputs()[i].requires_grad_() for i in chosen]
    value, expected = torch.compile(ours, backend="aot_eager", fullgraph=True)(*inputs), plain(*inputs)
    assert_close(value, expected.detach(), "propagation")
    gradients = (torch.autograd.grad(x.square().sum(), inputs) for x in (value, expected))
    for x, y in zip(*gradients, strict=True):
        assert_close(x, y, "gradient")
