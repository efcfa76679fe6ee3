"""What ridge and discriminant share: grids, masks, batches, precision, gradients, transforms, options."""

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck
from torch.export import Dim, export

from dlprop import DerivativeLabelPropagation
from dlprop._kernels import moments as kernel

from .classifier_cases import FORMS, assert_matches, compare, draw, expected, forms, inputs, propagate, stored
from .propagation_cases import case, random_mask
from .strategies import seeds
from .tolerances import assert_close

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
corners = pytest.mark.parametrize("align_corners", [True, False])
forward_mode = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")  # torch calls it


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
