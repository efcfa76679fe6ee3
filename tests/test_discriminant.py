"""Discriminant propagation, and what both closed forms share: grids, masks, batches, degenerate images, transforms."""

import copy
import pickle
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch.autograd import gradcheck, gradgradcheck
from torch.export import Dim, export

from dlprop import DerivativeLabelPropagation
from dlprop._kernels import moments as kernel
from dlprop.affinity import Discriminant, Ridge
from dlprop.statistics import ClassStatistics
from dlprop.theory import derivative_metric

from .classifier_cases import FORMS, assert_matches, expected, inputs, propagate
from .propagation_cases import case, random_mask
from .strategies import seeds
from .tolerances import assert_close

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
forms = pytest.mark.parametrize("form", FORMS)
corners = pytest.mark.parametrize("align_corners", [True, False])
forward_mode = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")  # torch calls it


def stored(C=3, D=4, seed=3):
    """Statistics of other images."""
    generator = torch.Generator().manual_seed(seed)
    result = ClassStatistics(C, D)
    logits, feats = (torch.randn(2, size, 9, generator=generator, dtype=F64) for size in (C, D))
    result.update(2 * logits, feats + 0.5)
    return result


def compare(form, *tensors, kind="classifier", **options):
    actual = propagate(form, *tensors, **options)
    assert actual.dtype == tensors[0].dtype
    assert_matches(form, actual, expected(form, *tensors, **options), kind)


# ---------------------------------------------------------------------------------------------------------------------
# Against the oracle


OPTIONS = [
    {},
    {"shrinkage": 0.0},
    {"shrinkage": 2.0, "weights": (1.0, 3.0, 0.5)},
    {"weights": (2.0,)},
    {"scheme": "sum", "shrinkage": 0.5},
    {"scheme": "laplacian", "shrinkage": 0.5},
    {"scheme": "central", "shrinkage": 0.5, "weights": (1, 0)},
    {"normalize": "l1"},
    {"normalize": "l2", "across": "batch"},
    {"normalize": "softmax"},
    {"across": "batch"},
]


@forms
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options(form, options):
    logits, feats, target_feats = inputs(target_grid=(3, 2))
    for targets in (None, target_feats):
        compare(form, logits, feats, targets, **options)


@forms
@pytest.mark.parametrize("resolution", ["feats", "logits"])
@corners
def test_grids_and_masks(form, resolution, align_corners):
    """Logits finer, coarser and of one row; targets of the same image, of another, and on another grid."""
    for grid in ((9, 7), (2, 3), (1, 8)):
        for target_grid in (None, (4, 5), (3, 2)):
            logits, feats, target_feats = inputs(grid, (4, 5), target_grid)
            for mask in (None, random_mask(2, *grid)):
                options = {"resolution": resolution, "align_corners": align_corners, "mask": mask}
                with case(grid=grid, target_grid=target_grid, masked=mask is not None):
                    compare(form, logits, feats, target_feats, **options)
                    if mask is None or target_grid is None:
                        compare(form, logits, feats, target_feats, across="batch", normalize="l2", **options)


@forms
@corners
def test_full_resolution_is_that_of_upsampled_features(form, align_corners):
    """Exactly, at the price of the features' grid, also where every source counts differently."""
    for size in ((13, 10), (3, 2)):
        logits, feats, _ = inputs(size, (4, 5))
        full = torch.nn.functional.interpolate(feats, size, mode="bilinear", align_corners=align_corners)
        for mask in (None, random_mask(2, *size)):
            options = {"align_corners": align_corners, "mask": mask}
            wanted = propagate(form, logits, full, **options)
            assert_matches(form, propagate(form, logits, feats, resolution="logits", **options), wanted.numpy())


@forms
def test_flat_inputs(form):
    logits, feats, target_feats = inputs(target_grid=(3, 2))
    mask = random_mask(2, 4, 5)
    flat = [x.flatten(2) for x in (logits, feats, target_feats)]
    out = propagate(form, *flat, mask=mask.flatten(1))
    assert out.shape == (2, 3, 6)
    assert_close(out, propagate(form, logits, feats, target_feats, mask=mask).flatten(2).numpy(), "classifier")


@forms
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("resolution", ["feats", "logits"])
def test_lower_precision(form, dtype, resolution):
    for grid in ((4, 5), (9, 7)):
        logits, feats, target_feats = inputs(grid, (4, 5), (3, 2), dtype=dtype)
        for targets in (None, target_feats):
            compare(form, logits, feats, targets, resolution=resolution, mask=random_mask(2, *grid))


@forms
def test_autocast_lowers_nothing(form):
    """Not even where the inputs are of two dtypes."""
    logits, feats, _ = inputs(dtype=F32)
    with torch.autocast("cpu", BF16):
        assert_matches(form, propagate(form, logits, feats), expected(form, logits, feats))
        mixed = propagate(form, logits, feats.bfloat16())
    assert_matches(form, mixed, expected(form, logits, feats.bfloat16()))


@forms
def test_a_large_mean_errs_little(form):
    """Features of spread 1 around 1e3, in float32; a scatter that is not centred fails the same tolerance."""
    logits, feats, _ = inputs((20, 25), dtype=F32)
    feats = feats + 1e3
    compare(form, logits, feats, kind="large mean")

    def uncentred(weights, V, *, are_shares=False):
        w = weights.sum(1, keepdim=True)
        mean = (V @ w.mT) / w.sum(2, keepdim=True)
        second = (w * V) @ V.mT - w.sum(2, keepdim=True) * mean @ mean.mT
        return kernel.Statistics(*(x.double() for x in (weights.sum(2), weights @ V.mT, second)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dlprop.statistics.moments", uncentred)
        with pytest.raises((AssertionError, ValueError), match=r"error|singular"):
            compare(form, logits, feats, kind="large mean")


# ---------------------------------------------------------------------------------------------------------------------
# Whose statistics


@forms
def test_images_are_apart_unless_asked_for(form):
    logits, feats, _ = inputs(N=3)
    out = propagate(form, logits, feats)
    for n in range(3):
        assert_close(out[n : n + 1], propagate(form, logits[n : n + 1], feats[n : n + 1]).numpy(), "classifier")
    together = propagate(form, logits, feats, across="batch")
    beside = [x.movedim(1, 0).flatten(1)[None] for x in (logits, feats)]  # one image with the pixels of all
    alone = propagate(form, *beside).unflatten(2, (3, 20)).movedim(2, 0)[:, 0]
    assert_close(together.flatten(2), alone.numpy(), "classifier")
    assert (together - out).abs().max() > 1e-2


@pytest.mark.parametrize("across", ["image", "batch", "stored"])
def test_stored_statistics(across):
    logits, feats, target_feats = inputs((9, 7), (4, 5), (3, 2))
    statistics = stored()
    before = [x.clone() for x in statistics.buffers()]
    for targets in (None, target_feats):
        for resolution in ("feats", "logits"):
            options = {"across": across, "statistics": statistics, "resolution": resolution}
            compare("discriminant", logits, feats, targets, mask=random_mask(2, 9, 7), **options)
    assert all(torch.equal(x, y) for x, y in zip(before, statistics.buffers(), strict=True))


def test_stored_statistics_are_more_pixels():
    """Those of an image that is stored, and no pixel of one's own: as if one were that image."""
    logits, feats, target_feats = inputs(N=1, target_grid=(3, 2))
    statistics = ClassStatistics(3, 4)
    statistics.update(logits, feats)
    other, other_feats, _ = inputs(N=1)
    pair = torch.cat((logits, other), 3), torch.cat((feats, other_feats), 3)
    wanted = propagate("discriminant", *pair, target_feats)
    actual = propagate("discriminant", other, other_feats, target_feats, statistics=statistics)
    assert_close(actual, wanted.numpy(), "classifier")


def test_stored_statistics_alone_leave_the_logits_unread():
    """An image that they contain is not counted twice, and features alone are judged."""
    logits, feats, _ = inputs()
    statistics = ClassStatistics(3, 4)
    statistics.update(logits, feats)
    by_stored = partial(propagate, "discriminant", across="stored", statistics=statistics)
    out = by_stored(logits, feats)
    assert_close(out, propagate("discriminant", logits, feats, across="batch").numpy(), "classifier")
    assert torch.equal(by_stored(torch.randn_like(logits), feats), out)
    one = by_stored(logits[:1, :, :1, :1], feats[:1, :, :1, :1])
    assert_close(one, out[:1, :, :1, :1].numpy(), "classifier")
    assert gradcheck(lambda x: by_stored(logits, x), (feats.requires_grad_(),))
    assert not by_stored(logits.requires_grad_(), feats.detach()).requires_grad


def test_an_empty_store_adds_nothing():
    logits, feats, _ = inputs()
    out = propagate("discriminant", logits, feats, statistics=ClassStatistics(3, 4))
    assert_close(out, propagate("discriminant", logits, feats).numpy(), "classifier")


def test_backward_after_another_update():
    """What backward needs of the statistics is no buffer, which the update overwrites."""
    logits, feats, _ = inputs()
    statistics = stored()
    wanted = torch.autograd.grad(
        propagate("discriminant", logits.requires_grad_(), feats.requires_grad_(), statistics=statistics)[0, 0].sum(),
        (logits, feats),
    )
    out = propagate("discriminant", logits, feats, statistics=statistics)
    statistics.update(logits, feats)
    assert not any(x.requires_grad for x in statistics.buffers())
    for x, y in zip(torch.autograd.grad(out[0, 0].sum(), (logits, feats)), wanted, strict=True):
        assert torch.equal(x, y)


def test_statistics_of_other_sizes_are_refused():
    logits, feats, _ = inputs()
    for C, D in ((2, 4), (3, 5)):
        with pytest.raises(ValueError, match=rf"statistics .*\(3, 4\), got \({C}, {D}\)"):
            propagate("discriminant", logits, feats, statistics=ClassStatistics(C, D))


# ---------------------------------------------------------------------------------------------------------------------
# Gradients and transforms


@forward_mode
@pytest.mark.parametrize(
    ("form", "resolution"),
    [
        ("discriminant", "logits"),
        ("ridge", "feats"),
        pytest.param("discriminant", "feats", marks=pytest.mark.exhaustive),
        pytest.param("ridge", "logits", marks=pytest.mark.exhaustive),
    ],
)
def test_gradients(form, resolution):
    logits, feats, target_feats = inputs((5, 4), (2, 3), (2, 1), N=1, D=3)
    options = {"resolution": resolution, "mask": random_mask(2, 5, 4)[:1], "shrinkage": 0.3, "weights": (1.0, 0.5)}
    logits = 0.3 * logits  # far from the clip of the ridge
    leaves = [x.requires_grad_() for x in (logits, feats, target_feats)]
    assert gradcheck(lambda *x: propagate(form, *x, **options), leaves, check_forward_ad=True)
    assert gradcheck(lambda *x: propagate(form, *x, across="batch", **options), leaves[:2])
    assert gradgradcheck(lambda *x: propagate(form, *x, **options), leaves)


@pytest.mark.parametrize("options", [{}, {"statistics": stored(), "across": "batch"}])
def test_gradients_beside_stored_statistics(options):
    logits, feats, _ = inputs((2, 3))
    leaves = logits.requires_grad_(), feats.requires_grad_()
    assert gradcheck(lambda *x: propagate("discriminant", *x, **options), leaves)


@forms
@pytest.mark.parametrize("M", [3, 11])
def test_gradients_in_blocks(form, M, monkeypatch):
    """And a second backward, which is the same to the last bit."""
    logits, feats, _ = inputs((5, 4), (2, 3) if M == 3 else None)
    leaves = logits.requires_grad_(), feats.requires_grad_()
    probe = torch.randn(logits.shape, dtype=F64)
    wanted = torch.autograd.grad(propagate(form, *leaves, normalize="l1"), leaves, probe)
    monkeypatch.setattr(kernel, "PIXELS", M)
    out = propagate(form, *leaves, normalize="l1")
    first, second = (torch.autograd.grad(out, leaves, probe, retain_graph=True) for _ in range(2))
    for x, y, z in zip(first, second, wanted, strict=True):
        assert torch.equal(x, y)
        assert_close(x, z.numpy(), "gradient")


@forms
def test_a_gradient_for_one_input_only(form):
    logits, feats, _ = inputs()
    both = torch.autograd.grad(
        propagate(form, logits.requires_grad_(), feats.requires_grad_())[0, 0].sum(), (logits, feats)
    )
    for i in range(2):
        given_leaves = [x.detach().requires_grad_(i == k) for k, x in enumerate((logits, feats))]
        propagate(form, *given_leaves)[0, 0].sum().backward()
        assert given_leaves[1 - i].grad is None
        assert_close(given_leaves[i].grad, both[i].numpy(), "gradient")


@forms
@pytest.mark.parametrize("resolution", ["feats", "logits"])
def test_transforms(form, resolution):
    logits, feats, _ = inputs((5, 4), (2, 3), N=3)
    mask = random_mask(3, 5, 4)

    def one(L, V, m):
        return propagate(form, L[None], V[None], mask=m[None], resolution=resolution)[0]

    together = propagate(form, logits, feats, mask=mask, resolution=resolution)
    assert_close(torch.func.vmap(one)(logits, feats, mask), together.numpy(), "classifier")

    def energy(L, V):
        return one(L, V, mask[0]).square().sum()

    leaves = logits[0].clone().requires_grad_(), feats[0].clone().requires_grad_()
    wanted = torch.autograd.grad(energy(*leaves), leaves)
    for x, y in zip(torch.func.grad(energy, argnums=(0, 1))(logits[0], feats[0]), wanted, strict=True):
        assert_close(x, y.numpy(), "gradient")
    jacobians = (
        torch.autograd.functional.jacobian(lambda V: one(logits[0], V, mask[0]), feats[0], vectorize=v)
        for v in (True, False)
    )
    x, y = jacobians
    assert_close(x, y.numpy(), "gradient")


@pytest.mark.slow
@pytest.mark.exhaustive
@forms
def test_compiles_whole_and_trains(form):
    """Through autograd, too, at any size; and what was prepared without a graph serves with one."""
    options = {"statistics": stored()} if form == "discriminant" else {"balance": 1.0}
    module = DerivativeLabelPropagation(FORMS[form](**options), resolution="logits")
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=True)
    for grid in ((9, 7), (11, 10)):
        logits, feats, _ = inputs(grid, (4, 5))
        mask, probe = random_mask(2, *grid), torch.randn(2, 3, *grid, dtype=F64)
        leaves = logits.requires_grad_(), feats.requires_grad_()
        results = [f(*leaves, mask=mask) for f in (compiled, module)]
        assert_matches(form, results[0].detach(), results[1].detach().numpy())
        gradients = (torch.autograd.grad(x, leaves, probe) for x in results)
        for x, y in zip(*gradients, strict=True):
            assert_close(x, y.numpy(), "gradient")


@pytest.mark.filterwarnings("ignore:.*get_attr:UserWarning")  # of the statistics, by torch 2.6
@forms
def test_exports_with_dynamic_sizes(form):
    options = {"statistics": stored()} if form == "discriminant" else {}
    module = DerivativeLabelPropagation(FORMS[form](across="batch", **options))
    logits, feats, _ = inputs()
    # With a largest size, for torch 2.6.
    axes = {axis: Dim(name, min=2, max=4096) for axis, name in ((0, "N"), (2, "H"), (3, "W"))}
    program = export(module, (logits, feats), dynamic_shapes={"logits": axes, "feats": axes}).module()
    other = inputs((7, 9), N=3)[:2]
    for given_inputs in ((logits, feats), other):
        assert_matches(form, program(*given_inputs), module(*given_inputs).numpy())


@forms
def test_inference_mode_first(form):
    """Nothing that is kept between calls remembers the mode of the first one."""
    logits, feats, _ = inputs(D=6)
    options = {"weights": (1.0, 0.123), "shrinkage": 0.3}  # of no other test
    with torch.inference_mode():
        wanted = propagate(form, logits.clone(), feats.clone(), **options)
    out = propagate(form, logits, feats.requires_grad_(), **options)
    assert torch.equal(out, wanted)
    out.sum().backward()
    assert feats.grad.isfinite().all()


@forms
def test_strides_change_nothing_and_inputs_stay(form):
    logits, feats, target_feats = inputs(target_grid=(3, 2))
    mask = random_mask(2, 4, 5)
    wanted = propagate(form, logits, feats, target_feats, mask=mask)
    for layout in (
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: x.mT.contiguous().mT,
        lambda x: torch.stack((x, x), 4)[..., 1],
    ):
        given_inputs = [layout(x) for x in (logits, feats, target_feats)]
        before = [x.clone() for x in given_inputs]
        assert_close(propagate(form, *given_inputs, mask=mask), wanted.numpy(), "classifier")
        assert all(torch.equal(x, y) for x, y in zip(given_inputs, before, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Images with little in them


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


def test_all_sources_masked_beside_stored_statistics():
    """What is stored decides alone."""
    logits, feats, _ = inputs()
    statistics = stored()
    module = DerivativeLabelPropagation(Discriminant(statistics=statistics))
    mask = torch.zeros(2, 4, 5, dtype=torch.bool)
    out = torch.compile(module, backend="eager")(logits, feats, mask=mask)
    assert_matches("discriminant", out, expected("discriminant", logits, feats, mask=mask, statistics=statistics))


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


@forms
def test_rectify(form):
    """The posterior is the softmax of the output, also where the output was resized."""
    for grid in ((4, 5), (9, 7)):
        logits, feats, _ = inputs(grid, (4, 5), dtype=F32)
        module = DerivativeLabelPropagation(FORMS[form]())
        out = module.rectify(logits, feats, 0.25)
        wanted = 0.75 * logits.softmax(1) + 0.25 * module(logits, feats).softmax(1)
        assert_close(out, wanted.numpy(), "classifier")
        assert_close(out.sum(1), np.ones((2, *grid)), "classifier")
    half = module.rectify(logits.half(), feats.half(), 1.0)
    assert half.dtype == F16


@forms
def test_the_output_is_a_log_probability_where_it_is_computed(form):
    for resolution, grid in (("feats", (4, 5)), ("logits", (9, 7))):
        logits, feats, _ = inputs(grid, (4, 5))
        out = propagate(form, logits, feats, resolution=resolution)
        assert_close(out.exp().sum(1), np.ones((2, *grid)), "classifier")


# ---------------------------------------------------------------------------------------------------------------------
# Options


@forms
@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"shrinkage": -0.1}, ValueError, "shrinkage must be finite and at least 0"),
        ({"shrinkage": float("nan")}, ValueError, "shrinkage"),
        ({"shrinkage": float("inf")}, ValueError, "shrinkage"),
        ({"shrinkage": "0.1"}, TypeError, "shrinkage"),
        ({"shrinkage": None}, TypeError, "shrinkage"),
        ({"weights": (0.0, 1.0)}, ValueError, "above 0 for order 0"),
        ({"weights": (-1.0,)}, ValueError, "above 0 for order 0"),
        ({"weights": (1.0, -0.5)}, ValueError, "at least 0 for the others"),
        ({"weights": ()}, ValueError, "weights"),
        ({"weights": 1.0}, TypeError, "weights"),
        ({"across": "images"}, ValueError, "across must be one of"),
        ({"across": 1}, TypeError, "across"),
        ({"scheme": "backward"}, ValueError, "scheme"),
        ({"normalize": "l3"}, ValueError, "normalize"),
    ],
    ids=str,
)
def test_options_are_checked_at_construction(form, options, error, match):
    with pytest.raises(error, match=match):
        FORMS[form](**options)


def test_statistics_must_be_statistics():
    with pytest.raises(ValueError, match="across='stored' needs statistics"):
        Discriminant(across="stored")
    with pytest.raises(ValueError, match="across must be one of"):
        Ridge(across="stored")
    with pytest.raises(TypeError, match="statistics must be a ClassStatistics or None, got dict"):
        Discriminant(statistics={})
    with pytest.raises(TypeError, match="statistics"):
        Ridge(statistics=stored())


@forms
def test_too_few_channels(form):
    logits, feats, _ = inputs(D=2)
    with pytest.raises(ValueError, match="D = 2"):
        propagate(form, logits, feats, weights=(1, 1, 1))
    compare(form, logits[:, :, :1], feats[:, :1, :1], weights=(1,))


@forms
def test_options_are_kept_compared_and_copied(form):
    affinity = FORMS[form](shrinkage=1, weights=[1, 0.5])
    assert affinity == FORMS[form](shrinkage=1.0, weights=(1.0, 0.5))
    assert affinity != FORMS[form](shrinkage=1.0)
    assert {affinity: 1}[pickle.loads(pickle.dumps(affinity))] == 1
    module = DerivativeLabelPropagation(affinity)
    assert repr(affinity) in repr(module)
    assert not module.state_dict()
    logits, feats, _ = inputs()
    assert torch.equal(copy.deepcopy(module)(logits, feats), module(logits, feats))
    assert torch.equal(propagate(form, logits, feats), DerivativeLabelPropagation(form)(logits, feats))


# ---------------------------------------------------------------------------------------------------------------------
# What holds for every image


def draw(seed, M, *, C=3, D=4, spread=2.0):
    """Flat logits and features of one image; more pixels than channels."""
    rng = np.random.default_rng(seed)
    mixing = np.eye(D) + 0.3 * rng.standard_normal((D, D))
    logits = spread * rng.standard_normal((1, C, M))
    return torch.from_numpy(logits), torch.from_numpy(mixing @ rng.standard_normal((1, D, M)) + rng.standard_normal())


@forms
@given(seed=seeds, M=st.integers(8, 20))
def test_pixels_may_be_permuted(form, seed, M):
    logits, feats = draw(seed, M)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(M))
    out = propagate(form, logits[..., order], feats[..., order])
    assert_matches(form, out, propagate(form, logits, feats)[..., order].numpy())


@forms
@given(seed=seeds, M=st.integers(12, 20))
def test_invertible_maps_of_the_features_change_nothing_without_shrinkage(form, seed, M):
    logits, feats = draw(seed, M)
    rng = np.random.default_rng(seed + 1)
    B = np.linalg.qr(rng.standard_normal((4, 4)))[0] * rng.uniform(0.3, 3, 4)
    mapped = torch.from_numpy(B) @ feats + torch.from_numpy(rng.standard_normal((4, 1)))
    options = {"shrinkage": 0.0, "weights": (1.0, 2.0)}
    wanted = propagate(form, logits, feats, **options)
    assert_matches(form, propagate(form, logits, mapped, **options), wanted.numpy(), "invariance")
    shifted = propagate(form, logits, feats + 3.0)  # an offset changes nothing at any shrinkage
    assert_matches(form, shifted, propagate(form, logits, feats).numpy(), "invariance")


class TotalCovariance:
    """What scikit-learn asks for the covariance of a class: that of all pixels."""

    def __init__(self, covariance):
        self.covariance_ = covariance

    def fit(self, X):
        return self


@given(seeds, st.integers(2, 4), st.integers(15, 30), st.sampled_from([0.0, 0.1, 1.0]))
def test_hard_labels_are_linear_discriminant_analysis(seed, C, M, shrinkage):
    """scikit-learn's, with the covariance of all pixels for that within classes, means that are `n_c / (n_c + 1)` of
    the way from the mean of all to those of the classes, and the prior `n_c / n + 1e-4`."""
    _, feats = draw(seed, M)
    labels = np.r_[np.arange(C), np.arange(C), np.random.default_rng(seed).integers(0, C, M - 2 * C)]
    logits = 80.0 * torch.nn.functional.one_hot(torch.from_numpy(labels), C).double().T[None]
    V = feats[0].numpy().T
    mean, counts = V.mean(axis=0), np.bincount(labels)
    Sigma = np.cov(V.T, bias=True)
    Sigma = Sigma + shrinkage * np.trace(Sigma) / 4 * np.eye(4)
    offsets = np.stack([V[labels == c].mean(axis=0) - mean for c in range(C)])
    prior = counts / M + 1e-4
    analysis = LinearDiscriminantAnalysis(
        solver="lsqr", covariance_estimator=TotalCovariance(Sigma), priors=prior / prior.sum()
    )
    analysis.fit(V - mean - (offsets / (counts + 1)[:, None])[labels], labels)
    out = propagate("discriminant", logits, feats, shrinkage=shrinkage, weights=(1.0,))
    assert_close(out[0], analysis.predict_log_proba(V - mean).T, "classifier")


@pytest.mark.parametrize("scheme", ["forward", "central", "sum", "laplacian"])
def test_tends_to_the_metric_as_shrinkage_grows(scheme):
    """`Sigma_s^{-1}` becomes a multiple of K, and what is left of the scores lies along `m_c^T K (v_j - mu)`."""
    (logits, feats), weights, shrinkage = draw(0, 30), (1.0, 0.5), 1e6
    K = derivative_metric(4, 1, weights, scheme)
    out = propagate("discriminant", logits, feats, shrinkage=shrinkage, weights=weights, scheme=scheme)[0].numpy()
    P, V = logits[0].softmax(0).numpy(), feats[0].numpy()
    mean, counts = V.mean(axis=1, keepdims=True), P.sum(axis=1)
    m = (P @ (V - mean).T) / (counts + 1)[:, None]
    scores = m @ K @ (V - mean) - np.diag(m @ K @ m.T)[:, None] / 2
    left = out - np.log(counts / 30 + 1e-4)[:, None]
    x, y = (a - a[:1] for a in (left, scores))  # the classes against the first: the normalisation drops out
    cosine = (x * y).sum() / np.sqrt((x**2).sum() * (y**2).sum())
    assert cosine > 1 - 1e-9
    scale = np.linalg.inv(K).trace() / np.trace(np.cov(V, bias=True)) / shrinkage
    np.testing.assert_allclose(x, scale * y, rtol=1e-4, atol=1e-9)
