"""Ridge and discriminant on images with little in them: empty classes, single pixels, constant features, NaN."""

import numpy as np
import pytest
import torch

from dlprop import DerivativeLabelPropagation

from .classifier_cases import FORMS, assert_matches, compare, expected, forms, inputs, propagate
from .propagation_cases import random_mask
from .tolerances import assert_close

F64, F32 = torch.float64, torch.float32


@forms
@pytest.mark.parametrize("dtype", [F64, F32])
def test_an_empty_class(form, dtype):
    """No pixel has it, or next to none: its logit is low and finite, and nothing else is disturbed."""
    logits, feats, _ = inputs(dtype=dtype)
    logits[:, 2] = -float("inf")
    out = propagate(form, logits, feats)
    assert out.isfinite().all()
    assert (out[:, 2] < np.log(1e-3)).all()
    if form == "discriminant":
        assert_close(out[:, :2].softmax(1), propagate(form, logits[:, :2], feats).softmax(1).numpy(), "classifier")


@forms
def test_one_class(form):
    logits, feats, _ = inputs(C=1)
    assert_close(propagate(form, logits, feats), np.zeros((2, 1, 4, 5)), "classifier")


@forms
@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("grids", [((1, 1), None), ((3, 4), (1, 1)), ((1, 1), (2, 3))], ids=str)
def test_one_pixel(form, dtype, grids):
    for resolution in ("feats", "logits"):
        logits, feats, _ = inputs(*grids, dtype=dtype)
        leaves = logits.requires_grad_(), feats.requires_grad_()
        out = propagate(form, *leaves, resolution=resolution)
        assert_matches(form, out.detach(), expected(form, logits, feats, resolution=resolution))
        out[:, 0].sum().backward()
        assert all(x.grad.isfinite().all() for x in leaves)


@forms
@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("shrinkage", [0.1, 0.0])
def test_one_source(form, dtype, shrinkage):
    """Whatever the others are: one class mean is the mean, and nothing but the prior is left."""
    logits, feats, _ = inputs((9, 7), dtype=dtype)
    mask = torch.zeros(2, 9, 7, dtype=torch.bool)
    mask[0, 3, 4] = mask[1, 8, 0] = True
    leaves = logits.requires_grad_(), feats.requires_grad_()
    out = propagate(form, *leaves, mask=mask, shrinkage=shrinkage)
    assert_matches(form, out.detach(), expected(form, logits, feats, mask=mask, shrinkage=shrinkage))
    assert_close(out.detach().flatten(2), out.detach().flatten(2)[..., :1].expand(-1, -1, 63).numpy(), "classifier")
    out[:, 0].sum().backward()
    assert all(x.grad.isfinite().all() for x in leaves)


@forms
@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("M", [2, 7, 100, 9001])
@pytest.mark.parametrize("value", [0.0, 0.1, 1e3])
def test_constant_features(form, dtype, M, value):
    """All pixels alike: the class shares of the image, not what rounding makes of a covariance."""
    logits, feats = 2 * torch.randn(2, 3, M).to(dtype), torch.full((2, 8, M), value).to(dtype)
    for options in ({}, {"across": "batch"}, {"shrinkage": 0.0}):
        out = propagate(form, logits, feats, **options)
        P = logits.double().softmax(1)
        if form == "ridge":
            sizes = P.sum(2, keepdim=True)
            sizes = sizes.sum(0, keepdim=True) if options.get("across") else sizes
            P = P * (P * ((sizes + 1) / sizes.sum(1, keepdim=True)) ** -0.5).sum(1, keepdim=True)
        shares = P.sum(2, keepdim=True)
        shares = shares.sum(0, keepdim=True) if options.get("across") else shares
        shares = shares / shares.sum(1, keepdim=True)
        shares = shares + 1e-4 if form == "discriminant" else shares
        wanted = (shares / shares.sum(1, keepdim=True)).expand(2, 3, M)
        assert_close(out.double().exp(), wanted.numpy(), "classifier", F32)


@forms
def test_constant_channels_beside_others(form):
    """Dead channels, as after a ReLU."""
    logits, feats, _ = inputs(dtype=F32)
    feats[:, 1] = 0.0
    feats[:, 2] = 0.3
    compare(form, logits, feats)
    with pytest.raises(ValueError, match="singular"):
        propagate(form, logits, feats, shrinkage=0.0)


@forms
@pytest.mark.parametrize("dtype", [F64, F32])
def test_fewer_pixels_than_channels(form, dtype):
    logits, feats, _ = inputs((2, 3), D=16, dtype=dtype)
    compare(form, logits, feats)
    for seed in range(10):
        torch.manual_seed(seed)
        logits, feats, _ = inputs((2, 3), D=16, dtype=dtype)
        with pytest.raises(ValueError, match="singular, and shrinkage = 0 does not mend it: raise shrinkage"):
            propagate(form, logits, feats + 10 * seed, shrinkage=0)
    compare(form, *inputs((6, 6), D=16)[:2], shrinkage=0)


@forms
@pytest.mark.parametrize("dtype", [F64, F32])
def test_a_channel_that_others_explain(form, dtype):
    """What is left of it is rounding, and as often as not of the sign that a factorisation does not mind."""
    for seed in range(20):
        torch.manual_seed(seed)
        logits, feats, _ = inputs((6, 6), D=5, dtype=dtype)
        feats[:, 3] = feats[:, :3].sum(1) + 1
        with pytest.raises(ValueError, match="singular"):
            propagate(form, logits, feats, shrinkage=0)
        compare(form, logits, feats)


@forms
def test_a_singular_covariance_is_nan_where_values_are_unknown(form):
    logits, feats, _ = inputs((2, 3), D=16)
    feats[1] = feats[1] * 0 + 1.0  # constant: defined, also beside the other image
    affinity = FORMS[form](shrinkage=0.0)
    compiled = torch.compile(DerivativeLabelPropagation(affinity), backend="eager", fullgraph=True)
    mapped = torch.func.vmap(lambda L, V: DerivativeLabelPropagation(affinity)(L[None], V[None])[0])
    for function in (compiled, mapped):
        out = function(logits, feats)
        assert out[0].isnan().all()
        assert out[1].isfinite().all()


@forms
def test_all_sources_masked(form):
    """Where the mask is not refused, all classes are alike; gradients are zero, not NaN."""
    for grid in ((4, 5), (9, 7)):
        logits, feats, _ = inputs(grid, (4, 5))
        mask = random_mask(2, *grid)
        mask[0] = False
        for resolution in ("feats", "logits"):
            module = DerivativeLabelPropagation(FORMS[form](), resolution=resolution)
            mapped = torch.func.vmap(lambda L, V, m, f=module: f(L[None], V[None], mask=m[None])[0])
            leaves = logits[:1].clone().requires_grad_(), feats[:1].clone().requires_grad_()
            outs = [module(logits, feats, mask=mask), mapped(logits, feats, mask)]  # the other image has sources
            if grid == (9, 7):
                compiled = torch.compile(lambda *x, m=module, **mask: m(*x, **mask), backend="eager", fullgraph=True)
                outs.append(compiled(*leaves, mask=mask[:1]))
                for x in torch.autograd.grad(outs[-1][:, 0].sum(), leaves):
                    assert not x.any()
            for out in outs:
                assert_close(out[0].detach(), np.full((3, *grid), -np.log(3)), "classifier")
    both = propagate(form, logits, feats, mask=mask, across="batch")
    assert_close(both[1:], propagate(form, logits[1:], feats[1:], mask=mask[1:]).numpy(), "classifier")
    with pytest.raises(ValueError, match="at least one source"):
        propagate(form, logits, feats, mask=mask & False)


@forms
def test_masked_logits_may_be_anything(form):
    logits, feats, _ = inputs()
    mask = random_mask(2, 4, 5)
    wanted = propagate(form, logits, feats, mask=mask)
    for nothing in (float("nan"), float("inf")):
        leaf = torch.where(mask[:, None], logits, nothing).requires_grad_()
        out = propagate(form, leaf, feats, mask=mask)
        assert torch.equal(out, wanted)
        out[:, 0].sum().backward()
        assert not leaf.grad[~mask[:, None].expand_as(leaf)].any()


@forms
def test_nan_in_nan_out(form):
    """Of its image and no other, and no error about the covariance."""
    logits, feats, _ = inputs()
    wanted = propagate(form, logits, feats)
    for at in (0, 1):
        for value in (float("nan"), float("inf")):
            spoilt = [logits.clone(), feats.clone()]
            spoilt[at][0, 1, 2, 3] = value
            for options in ({}, {"shrinkage": 0.0}):
                out = propagate(form, *spoilt, **options)
                assert out[0].isnan().all()
            assert_close(propagate(form, *spoilt)[1], wanted[1].numpy(), "classifier")
    target_feats = feats.clone()
    target_feats[0, 1, 2, 3] = float("nan")
    out = propagate(form, logits, feats, target_feats)
    assert out[0, :, 2, 3].isnan().all()
    assert out.isnan().sum() == 3


@forms
def test_no_images(form):
    logits, feats, _ = inputs(N=1)
    for across in ("image", "batch"):
        for grid in (logits, torch.zeros(1, 3, 9, 7, dtype=F64)):
            out = propagate(form, grid[:0], feats[:0], across=across)
            assert out.shape == grid[:0].shape


@forms
def test_large_and_small_features(form):
    """The unit of the features changes nothing."""
    logits, feats, _ = inputs(dtype=F32)
    wanted = propagate(form, logits, feats)
    for factor in (2.0**-30, 2.0**20):
        assert_matches(form, propagate(form, logits, factor * feats), wanted.numpy())
