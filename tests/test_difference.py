"""`finite_difference` is A_q x along any dimension, in every dtype, with A_q^T as its gradient."""

import inspect

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dlprop import finite_difference, theory
from dlprop.difference import difference_adjoint

from .oracles import features
from .strategies import integer_features, operators, seeds
from .tolerances import assert_close

SCHEMES = features.SCHEMES
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@given(operators(), st.integers(1, 4), st.data())
def test_equals_the_toeplitz_product(operator, M, data):
    """Exactly: the entries are small integers."""
    D, order, scheme = operator
    x = data.draw(integer_features(D, M))
    y = finite_difference(torch.from_numpy(x), order, dim=0, scheme=scheme).numpy()
    np.testing.assert_array_equal(y, features.toeplitz(D, order, scheme) @ x)
    np.testing.assert_array_equal(y, theory.toeplitz_matrix(D, order, scheme) @ x)
    np.testing.assert_array_equal(y, features.difference(x, order, scheme))


@given(operators(max_order=2), st.integers(0, 3), st.data())
def test_orders_compose(operator, more, data):
    """D^p D^q = D^{p+q}."""
    D, order, scheme = operator
    D += more * features.STEP[scheme]
    x = torch.from_numpy(data.draw(integer_features(D, 2)))
    twice = finite_difference(finite_difference(x, order, dim=0, scheme=scheme), more, dim=0, scheme=scheme)
    assert torch.equal(twice, finite_difference(x, order + more, dim=0, scheme=scheme))


@given(operators(schemes=("laplacian",)), st.data())
def test_laplacian_is_forward_of_twice_the_order(operator, data):
    D, order, _ = operator
    x = torch.from_numpy(data.draw(integer_features(D, 2)))
    assert torch.equal(finite_difference(x, order, dim=0, scheme="laplacian"), finite_difference(x, 2 * order, dim=0))


@given(operators(schemes=("central",)), st.data())
def test_central_is_forward_of_sum(operator, data):
    D, order, _ = operator
    x = torch.from_numpy(data.draw(integer_features(D, 2)))
    sums = finite_difference(x, order, dim=0, scheme="sum")
    expected = finite_difference(sums, order, dim=0) / 2**order
    assert torch.equal(finite_difference(x, order, dim=0, scheme="central"), expected)


@given(operators(min_order=1), st.integers(-3, 3), st.data())
def test_adding_a_constant_to_all_channels(operator, constant, data):
    """Differences do not see it, sums see 2^q of it."""
    D, order, scheme = operator
    x = torch.from_numpy(data.draw(integer_features(D, 2)))
    shift = 2**order * constant if scheme == "sum" else 0
    y = finite_difference(x + constant, order, dim=0, scheme=scheme)
    assert torch.equal(y, finite_difference(x, order, dim=0, scheme=scheme) + shift)


@given(operators(), st.data())
def test_gradient_is_the_adjoint(operator, data):
    """<A x, y> = <x, A^T y>, with A^T by autograd and by the library's own adjoint."""
    D, order, scheme = operator
    x = torch.from_numpy(data.draw(integer_features(D, 3))).requires_grad_()
    y = torch.from_numpy(data.draw(integer_features(D - order * features.STEP[scheme], 3)))
    Ax = finite_difference(x, order, dim=0, scheme=scheme)
    Ax.backward(y, inputs=[x])
    expected = features.toeplitz(D, order, scheme).T @ y.numpy()
    np.testing.assert_array_equal(x.grad.numpy(), expected)
    np.testing.assert_array_equal(difference_adjoint(y, order, 0, scheme).numpy(), expected)
    assert (Ax * y).sum() == (x * x.grad).sum()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_adjoint_along_inner_dimensions(scheme):
    y = torch.randn(2, 3, 4, dtype=torch.float64)
    D = 3 + 2 * features.STEP[scheme]
    expected = np.einsum("dn,bdc->bnc", features.toeplitz(D, 2, scheme).T.T, y.numpy())
    assert_close(difference_adjoint(y, 2, 1, scheme), expected, "difference")
    assert_close(difference_adjoint(y, 2, -2, scheme), expected, "difference")


@pytest.mark.parametrize("dim", [0, 1, 2, 3, -1, -2, -3, -4])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_any_dimension(dim, scheme):
    x = torch.randn(6, 7, 5, 8, dtype=torch.float64)
    y = finite_difference(x, 2, dim=dim, scheme=scheme)
    expected = np.moveaxis(features.difference(np.moveaxis(x.numpy(), dim, 0), 2, scheme), 0, dim)
    assert_close(y, expected, "difference")


def test_defaults_are_order_one_forward_along_channels():
    x = torch.randn(2, 5, 3, 3)
    assert torch.equal(finite_difference(x), x[:, 1:] - x[:, :-1])
    parameters = inspect.signature(finite_difference).parameters
    assert {k: p.default for k, p in parameters.items() if k != "x"} == {"order": 1, "dim": 1, "scheme": "forward"}
    assert {k for k, p in parameters.items() if p.kind is p.KEYWORD_ONLY} == {"dim", "scheme"}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_order_zero_returns_its_argument(scheme):
    x = torch.randn(2, 3)
    assert torch.equal(finite_difference(x, 0, scheme=scheme), x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_dtypes(dtype, scheme, device):
    """Half precision is computed in float32 and rounded once, whatever the order."""
    x = torch.randn(2, 13, 40, device=device).to(dtype)
    for order in (1, 2, 4):
        y = finite_difference(x, order, scheme=scheme)
        assert y.dtype == dtype
        assert y.device.type == device.type
        expected = np.moveaxis(features.difference(np.moveaxis(x.cpu().double().numpy(), 1, 0), order, scheme), 0, 1)
        assert_close(y, expected, "difference")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_strides_do_not_matter_and_the_input_is_left_alone(scheme):
    x = torch.randn(2, 8, 3, 5)
    expected = finite_difference(x.clone(), 2, scheme=scheme)
    channels_last = x.clone(memory_format=torch.preserve_format).to(memory_format=torch.channels_last)
    transposed = x.transpose(1, 3).contiguous().transpose(1, 3)
    every_other = torch.randn(2, 16, 3, 5)
    every_other[:, ::2] = x
    for view in (channels_last, transposed, every_other[:, ::2]):
        before = view.clone()
        assert torch.equal(finite_difference(view, 2, scheme=scheme), expected)
        assert torch.equal(view, before)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradcheck(scheme):
    x = torch.randn(2, 6, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: finite_difference(x, 2, scheme=scheme), x)
    assert torch.autograd.gradgradcheck(lambda x: finite_difference(x, 2, scheme=scheme), x)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_empty_batch_and_smallest_length(scheme):
    assert finite_difference(torch.zeros(0, 5, 2, 2), 1, scheme=scheme).shape[0] == 0
    D = 2 * features.STEP[scheme] + 1
    assert finite_difference(torch.randn(D), 2, dim=0, scheme=scheme).shape == (1,)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_non_finite_entries_show(scheme, value):
    x = torch.randn(1, 7, 2)
    x[0, 3, 1] = value
    y = finite_difference(x, 1, scheme=scheme)
    reached = torch.from_numpy(features.toeplitz(7, 1, scheme)[:, 3] != 0)
    assert not y[0, reached, 1].isfinite().any()
    assert y[0, :, 0].isfinite().all()


@given(operators(), seeds)
def test_linear(operator, seed):
    D, order, scheme = operator
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, D, 3, dtype=torch.float64, generator=generator)
    combined = finite_difference(2 * x - 3 * y, order, dim=0, scheme=scheme)
    separate = 2 * finite_difference(x, order, dim=0, scheme=scheme)
    separate = separate - 3 * finite_difference(y, order, dim=0, scheme=scheme)
    assert_close(combined, separate.numpy(), "similarity")
