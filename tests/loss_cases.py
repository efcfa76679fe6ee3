"""Inputs for the tests of the loss, and the one comparison with the oracle that they all use."""

import pytest
import torch

from dlprop import DerivativeLoss
from tests.oracles import loss as oracle
from tests.tolerances import assert_close

FORMS = ("labels", "features")
# The squared norm takes no anchors.
every_pair_term = pytest.mark.parametrize(("norm", "num_anchors"), [("l1", None), ("l1", 4), ("frobenius", None)])
ROUNDING = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-5, torch.bfloat16: 1e-5}


def draw(form, seed=0, *, N=2, D=11, grid=(3, 5), classes=3, dtype=torch.float64, ignored=255, nonnegative=False):
    """Random features and a target of either form; every fifth pixel or so of a label map is `ignored`."""
    generator = torch.Generator().manual_seed(seed)
    feats = torch.randn(N, D, *grid, generator=generator, dtype=torch.float64)
    target = torch.randn(N, D, *grid, generator=generator, dtype=torch.float64)
    if nonnegative:
        feats, target = feats.abs() + 0.01, target.abs() + 0.01
    if form == "labels":
        target = torch.randint(classes, (N, *grid), generator=generator)
        if ignored is not None:
            target[torch.rand(N, *grid, generator=generator) < 0.2] = ignored
        return feats.to(dtype), target
    return feats.to(dtype), target.to(dtype)


def draw_direction(feats):
    """A random direction that is not the features': normalised losses do not change along those."""
    return torch.randn(feats.shape, generator=torch.Generator().manual_seed(1234), dtype=torch.float64)


def draw_mask(seed=0, *, N=2, grid=(3, 5)):
    """A random mask, True for about three quarters of the pixels."""
    return torch.rand(N, *grid, generator=torch.Generator().manual_seed(seed)) < 0.75


def draw_away_from_kinks(form, *, seed=0, dtype=torch.float64, margin=None, options=None, **shape):
    """The first draw whose residuals are all farther from 0 than rounding reaches: (feats, target, oracle's answer)."""
    margin = ROUNDING[dtype] if margin is None else margin
    for attempt in range(seed, seed + 200):
        feats, target = draw(form, attempt, dtype=dtype, **shape)
        expected = expect(feats, target, **(options or {}))
        if expected.kink > margin:
            return feats, target, expected
    raise AssertionError(f"no draw is farther than {margin} from a kink")


def expect(feats, target, *, mask=None, **options):
    """The oracle's loss and gradient."""
    arrays = (
        feats.detach().double().numpy(),
        target.double().numpy() if target.is_floating_point() else target.numpy(),
    )
    return oracle.derivative_loss(*arrays, mask=None if mask is None else mask.numpy(), **options)


def loss_of(feats, target, *, mask=None, **options):
    """The library's loss, its options beside the tensors."""
    return DerivativeLoss(**options)(feats, target, mask=mask)


def evaluate(feats, target, *, grad_output=None, **options):
    """The library's loss and the gradient of its sum, or of its product with `grad_output`."""
    leaf = feats.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    value = loss_of(leaf, target, **options)
    value.backward(torch.ones_like(value) if grad_output is None else grad_output)
    return value.detach(), leaf.grad


def assert_matches(actual, expected, dtype=None):
    """Compare (value, gradient) with the oracle's; `dtype` only where it is not the gradient's own."""
    value, gradient = actual
    dtype = dtype or gradient.dtype
    assert_close(value, expected.value, "loss", dtype=dtype)
    assert_close(gradient, expected.gradient, "gradient", dtype=dtype)
