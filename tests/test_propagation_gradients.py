"""Gradients of every affinity, in lower precision and under autocast."""

import itertools

import pytest
import torch

from dlprop import DerivativeLabelPropagation

from .oracles import features
from .propagation_cases import (
    expected,
    forms,
    inputs,
    kinds,
    make,
    propagate,
    random_mask,
    resolutions,
)
from .tolerances import assert_close

SCHEMES = features.SCHEMES
NORMALIZATIONS = features.NORMALIZATIONS


# Gradients


@pytest.mark.parametrize("cross", [False, True])
@resolutions
@kinds
def test_gradcheck(form, similarity, resolution, cross):
    """Every entry of every Jacobian, in float64, resized both ways, with a mask."""
    options = {"similarity": similarity, "resolution": resolution}
    for grid, feats_grid in (((2, 3), (2, 2)), ((2, 2), (2, 2))):
        tensors = inputs(form, grid, feats_grid, (1, 2) if cross else None, N=1, C=2, D=3)
        tensors = [x.requires_grad_() for x in tensors if x is not None]
        mask = torch.ones(1, *grid, dtype=torch.bool)
        mask[0, 0, 1] = False
        assert torch.autograd.gradcheck(lambda *x, mask=mask: propagate(form, *x, mask=mask, **options), tensors)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@kinds
def test_gradcheck_of_every_normalisation_and_scheme(form, similarity, normalize, scheme):
    options = {"similarity": similarity, "normalize": normalize, "scheme": scheme, "weights": (1, 0.5)}
    logits, feats, _ = inputs(form, (2, 2), N=2, C=2, D=4)
    tensors = [x.requires_grad_() for x in (logits, feats)]
    assert torch.autograd.gradcheck(lambda *x: propagate(form, *x, **options), tensors, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@resolutions
@kinds
def test_gradients_of_lower_precision(form, similarity, resolution, dtype):
    """As in float64 at the same values, up to the roundings of the table."""
    options = {"similarity": similarity, "resolution": resolution}
    tensors = inputs(form, (6, 5), (4, 3), D=8, dtype=dtype)[:2]
    grad = torch.randn(2, 3, 6, 5).to(dtype)
    grads = {}
    for precision in (dtype, torch.float64):
        leaves = [x.to(precision).detach().requires_grad_() for x in tensors]
        grads[precision] = torch.autograd.grad(propagate(form, *leaves, **options), leaves, grad.to(precision))
    for a, b in zip(grads[dtype], grads[torch.float64], strict=True):
        assert a.dtype == dtype
        assert_close(a, b.numpy(), "gradient")


@forms
def test_repeated_backward_is_exact(form):
    logits, feats, target_feats = inputs(form, (5, 4), (3, 2), (2, 2))
    leaves = [x.requires_grad_() for x in (logits, feats, target_feats)]
    out = propagate(form, *leaves)
    grad = torch.randn_like(out)
    first = torch.autograd.grad(out, leaves, grad, retain_graph=True)
    again = torch.autograd.grad(out, leaves, grad, retain_graph=True)
    doubled = torch.autograd.grad(out, leaves, 2 * grad)
    for a, b, c in zip(first, again, doubled, strict=True):
        assert torch.equal(a, b)
        assert_close(c, 2 * a.numpy(), "gradient")


@forms
def test_only_what_requires_grad_receives_it(form):
    for wanted in itertools.product([False, True], repeat=3):
        tensors = inputs(form, (2, 3), None, (2, 2))
        leaves = [x.requires_grad_(w) for x, w in zip(tensors, wanted, strict=True)]
        out = propagate(form, *leaves)
        assert out.requires_grad == any(wanted)
        if any(wanted):
            out.backward(torch.randn_like(out))
        assert [x.grad is not None for x in leaves] == list(wanted)


@forms
def test_no_grad_and_inference_mode(form):
    logits, feats, _ = inputs(form)
    want = propagate(form, logits, feats)
    feats.requires_grad_()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            out = propagate(form, logits, feats)
            assert not out.requires_grad
            assert torch.equal(out, want)


# Autocast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@resolutions
@kinds
def test_autocast(form, similarity, resolution, dtype):
    """float32 in, float32 out; only the products may have been rounded; gradients too."""
    options = {"similarity": similarity, "resolution": resolution}
    logits, feats, _ = inputs(form, (7, 6), (4, 3), D=16, dtype=torch.float32)
    for mask in (None, random_mask(2, 7, 6)):
        leaves = [x.clone().requires_grad_() for x in (logits, feats)]
        with torch.autocast("cpu", dtype=dtype):
            out = propagate(form, *leaves, mask=mask, **options)
        assert out.dtype == torch.float32
        assert_close(out, expected(form, logits, feats, mask=mask, **options), "autocast", dtype)
        grad = torch.randn_like(out)
        grads = torch.autograd.grad(out, leaves, grad)
        leaves = [x.double().requires_grad_() for x in (logits, feats)]
        exact = torch.autograd.grad(propagate(form, *leaves, mask=mask, **options), leaves, grad.double())
        for a, b in zip(grads, exact, strict=True):
            assert_close(a, b.numpy(), "autocast", dtype)


@forms
def test_autocast_takes_mixed_dtypes(form):
    """A network's logits may be half and its features float32: the output follows the logits."""
    logits, feats, target_feats = inputs(form, (5, 4), (3, 2), (3, 2), dtype=torch.float32)
    half = logits.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = propagate(form, half, feats, target_feats)
        other = propagate(form, logits, feats.bfloat16())
        probabilities = DerivativeLabelPropagation(make(form)).rectify(half, feats, 0.5)
    assert out.dtype == torch.bfloat16
    assert_close(out, expected(form, half, feats, target_feats), "autocast")
    assert other.dtype == torch.float32
    assert_close(other, expected(form, logits, feats.bfloat16()), "autocast", torch.bfloat16)
    assert probabilities.dtype == torch.bfloat16
