"""What every affinity shares, against the dense float64 oracle: grids, dtypes, orders, properties and edges."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dlprop import derivative_similarity

from .oracles import features
from .propagation_cases import (
    KINDS,
    case,
    expected,
    forms,
    inputs,
    kinds,
    propagate,
    random_mask,
    resolutions,
    similarities,
)
from .strategies import operators, seeds
from .tolerances import assert_close

SCHEMES = features.SCHEMES
NORMALIZATIONS = features.NORMALIZATIONS


# Against the oracle


@pytest.mark.parametrize("align_corners", [True, False])
@resolutions
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@kinds
def test_every_combination(form, similarity, normalize, resolution, align_corners):
    """Masked or not, own or other targets on the same or another grid, up, down and across, in two precisions."""
    options = {
        "similarity": similarity,
        "normalize": normalize,
        "resolution": resolution,
        "align_corners": align_corners,
    }
    grids = {"same": ((3, 3), (3, 3)), "up": ((5, 4), (3, 2)), "down": ((2, 3), (4, 3)), "across": ((6, 1), (2, 3))}
    odd = NORMALIZATIONS.index(normalize)
    for (g, (name, (grid, feats_grid))), (t, target), masked in itertools.product(
        enumerate(grids.items()), enumerate(("none", "same", "other")), (False, True)
    ):
        if (odd + g + t + masked) % 2:  # half of them, in which all values of any three options still meet
            continue
        target_grid = {"none": None, "same": feats_grid, "other": (2, 4)}[target]
        logits, feats, target_feats = inputs(form, grid, feats_grid, target_grid)
        mask = random_mask(2, *grid) if masked else None
        want = expected(form, logits, feats, target_feats, mask=mask, **options)
        assert want.shape[2:] == (target_grid if target == "other" else grid)
        for dtype in (torch.float64, torch.float32):
            with case(grids=name, target=target, masked=masked, dtype=dtype):
                tensors = (None if x is None else x.to(dtype) for x in (logits, feats, target_feats))
                out = propagate(form, *tensors, mask=mask, **options)
                assert out.dtype == dtype
                assert_close(out, want, "propagation")


@pytest.mark.parametrize("max_order", [0, 1, 2, 3])
@pytest.mark.parametrize("scheme", SCHEMES)
@kinds
def test_schemes_orders_and_weights(form, similarity, scheme, max_order):
    options = {"similarity": similarity, "scheme": scheme}
    D = max_order * features.STEP[scheme] + 2
    smallest = max_order * features.STEP[scheme] + 1
    logits, feats, _ = inputs(form, D=D)
    ones = (1.0,) * (max_order + 1)
    wide = (4.0, 0.5, 0.25, 0.125)[: max_order + 1]
    for weights in (ones, wide, (0.0,) * max_order + (2.0,)):
        if form == "degree" and weights[0] == 0:
            continue  # its degree is near zero somewhere: see the tests of the fallback
        with case(weights=weights):
            out = propagate(form, logits, feats, weights=weights, **options)
            assert_close(out, expected(form, logits, feats, weights=weights, **options), "propagation")
    if form != "degree":
        logits, feats, _ = inputs(form, D=smallest)
        out = propagate(form, logits, feats, weights=ones, **options)
        assert_close(out, expected(form, logits, feats, weights=ones, **options), "propagation")


@forms
def test_flat_inputs(form):
    """(N, C, M) with (N, D, M), targets of any length; the same numbers as on a grid."""
    logits, feats, target_feats = inputs(form, (3, 4), None, (2, 5))
    mask = random_mask(2, 3, 4)
    for targets, m in itertools.product((None, target_feats), (None, mask)):
        flat = [None if x is None else x.flatten(2) for x in (logits, feats, targets)]
        flat_mask = None if m is None else m.flatten(1)
        out = propagate(form, *flat, mask=flat_mask)
        assert_close(out, expected(form, *flat, mask=flat_mask), "propagation")
        assert_close(out, propagate(form, logits, feats, targets, mask=m).flatten(2).numpy(), "propagation")


@resolutions
@forms
def test_other_targets_are_not_the_sources(form, resolution):
    """Passing `feats` as targets means the same, except for the fallback; other images give other results."""
    logits, feats, target_feats = inputs(form, (5, 4), (3, 2), (3, 2))
    own = propagate(form, logits, feats, resolution=resolution)
    assert_close(propagate(form, logits, feats, feats, resolution=resolution), own.numpy(), "propagation")
    assert (propagate(form, logits, feats, target_feats, resolution=resolution) - own).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@resolutions
@kinds
def test_dtypes(form, similarity, resolution, dtype, device):
    """Half-precision inputs are propagated in float32: the result carries one rounding."""
    options = {"similarity": similarity, "resolution": resolution}
    logits, feats, target_feats = (x.to(device) for x in inputs(form, (7, 9), (4, 5), (4, 5), D=16, dtype=dtype))
    mask = random_mask(2, 7, 9).to(device)
    for targets, m in ((None, mask), (target_feats, None)):
        out = propagate(form, logits, feats, targets, mask=m, **options)
        assert out.dtype == dtype
        assert out.device.type == device.type
        assert_close(out, expected(form, logits, feats, targets, mask=m, **options), "propagation")


# Properties


@given(st.sampled_from(KINDS), operators(max_order=2, max_channels=7), seeds)
def test_linear_in_logits(kind, operator, seed):
    """Also the degree's fallback: features of any sign."""
    (form, similarity), (D, max_order, scheme) = kind, operator
    torch.manual_seed(seed)
    logits, feats, _ = inputs("sum", (2, 4), D=D)
    options = {"similarity": similarity, "weights": (1.0,) * (max_order + 1), "scheme": scheme}
    if form == "degree":
        options["similarity"] = "dot"
        feats = feats.abs() + 0.1
        feats[:, :, 1, 2] = 0  # falls back
    other = torch.randn_like(logits)
    combined = propagate(form, 2 * logits - 3 * other, feats, **options)
    separate = 2 * propagate(form, logits, feats, **options) - 3 * propagate(form, other, feats, **options)
    scale = max(1.0, separate.abs().max().item())
    torch.testing.assert_close(combined, separate, rtol=0, atol=1e-8 * scale)


@given(st.sampled_from(KINDS), seeds)
def test_pixel_permutation_equivariance(kind, seed):
    """Sources in any order give the same; targets in any order are permuted alike."""
    form, similarity = kind
    torch.manual_seed(seed)
    logits, feats, target_feats = inputs(form, (7,), None, (5,))
    sources, targets = torch.randperm(7), torch.randperm(5)
    mask = random_mask(2, 7)
    out = propagate(form, logits, feats, mask=mask, similarity=similarity)
    permuted = propagate(form, logits[..., sources], feats[..., sources], mask=mask[:, sources], similarity=similarity)
    assert_close(permuted, out[..., sources].numpy(), "propagation")
    out = propagate(form, logits, feats, target_feats, similarity=similarity)
    permuted = (logits[..., sources], feats[..., sources], target_feats[..., targets])
    assert_close(propagate(form, *permuted, similarity=similarity), out[..., targets].numpy(), "propagation")


@forms
def test_images_of_a_batch_do_not_meet(form):
    logits, feats, target_feats = inputs(form, (5, 4), (3, 2), (2, 2), N=3)
    mask = random_mask(3, 5, 4)
    out = propagate(form, logits, feats, target_feats, mask=mask)
    for n in range(3):
        one = (x[n : n + 1] for x in (logits, feats, target_feats))
        alone = propagate(form, *one, mask=mask[n : n + 1])
        assert_close(out[n : n + 1], alone.numpy(), "propagation")


@pytest.mark.parametrize("scheme", SCHEMES)
@similarities
def test_linear_propagation_is_the_sum_of_derivative_similarities(similarity, scheme):
    logits, feats, target_feats = inputs("sum", (3, 4), None, (2, 2), D=6)
    options = {"scheme": scheme, "similarity": similarity, "normalize": "l2"}
    weights = (1.0, 0.5, 0.25)
    S = sum(w * derivative_similarity(feats, target_feats, order=q, **options) for q, w in enumerate(weights))
    out = propagate("sum", logits, feats, target_feats, weights=weights, **options)
    assert_close(out.flatten(2), (logits.flatten(2) @ S).numpy(), "propagation")


# Edges


@resolutions
@forms
def test_empty_batch(form, resolution):
    logits, feats, target_feats = inputs(form, (5, 4), (3, 2), (2, 2), N=0)
    logits.requires_grad_()
    feats.requires_grad_()
    mask = torch.zeros(0, 5, 4, dtype=torch.bool)
    assert propagate(form, logits, feats, mask=mask, resolution=resolution).shape == (0, 3, 5, 4)
    out = propagate(form, logits, feats, target_feats, resolution=resolution)
    assert out.shape == (0, 3, 2, 2)
    out.sum().backward()
    assert logits.grad.shape == logits.shape
    flat = propagate(form, logits.flatten(2), feats.new_zeros(0, 5, 20), resolution=resolution)
    assert flat.shape == (0, 3, 20)


@kinds
def test_one_pixel_one_class_and_the_fewest_channels(form, similarity):
    logits = torch.tensor([[[[3.0]]]], dtype=torch.float64)
    feats = torch.tensor([[[[1.0]], [[3.0]]]], dtype=torch.float64)
    out = propagate(form, logits, feats, similarity=similarity)
    assert_close(out, expected(form, logits, feats, similarity=similarity), "propagation")
    large = torch.randn(1, 1, 4, 5, dtype=torch.float64)  # a grid of one feature pixel
    for resolution, align_corners, m in itertools.product(
        ("feats", "logits"), (True, False), (None, random_mask(1, 4, 5))
    ):
        options = {"similarity": similarity, "resolution": resolution, "align_corners": align_corners, "mask": m}
        assert_close(propagate(form, large, feats, **options), expected(form, large, feats, **options), "propagation")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@kinds
def test_zero_features_have_zero_gradient(form, similarity, dtype):
    logits, feats, _ = inputs(form, (2, 3), dtype=dtype)
    feats[:, :, 1, 1] = 0
    logits.requires_grad_()
    feats.requires_grad_()
    out = propagate(form, logits, feats, similarity=similarity)
    assert out.isfinite().all()
    out.backward(torch.randn_like(out))
    assert (feats.grad[:, :, 1, 1] == 0).all()
    assert feats.grad.isfinite().all()
    assert (feats.grad != 0).any()
    assert logits.grad.isfinite().all()
    nothing = torch.zeros_like(feats).requires_grad_()
    out = propagate(form, logits, nothing, similarity=similarity)
    assert_close(out, expected(form, logits, nothing, similarity=similarity), "propagation")
    out.backward(torch.randn_like(out))
    assert (nothing.grad == 0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@kinds
def test_non_finite_features_are_not_hidden(form, similarity, normalize, value):
    """One source that is no number leaves no target with one; the fallback of the degree does not hide it.

    Of an infinite feature S_ij may be -inf, which is a weight of zero.
    """
    options = {"similarity": similarity, "normalize": normalize}
    logits, feats, target_feats = inputs(form, (2, 3), None, (4, 1), N=1)
    bad = feats.clone()
    bad[0, 1, 1, 1] = value
    is_far = normalize is None and value == float("inf")
    if not (form == "attention" and is_far):
        assert not propagate(form, logits, bad, **options).isfinite().any()
        assert not propagate(form, logits, bad, target_feats, **options).isfinite().any()
    target_feats[0, 1, 2] = value
    out = propagate(form, logits, feats, target_feats, **options)
    if not (form == "softmax" and is_far):
        assert not out[..., 2, :].isfinite().any()
    if form != "softmax":  # there every source's normaliser has met the target
        assert out[..., [0, 1, 3], :].isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@forms
def test_non_finite_logits_show(form, value):
    logits, feats, _ = inputs(form, (2, 3), N=1)
    logits[0, 1, 0, 0] = value
    out = propagate(form, logits, feats)
    assert not out[0, 1].isfinite().any()
    assert out[0, [0, 2]].isfinite().all()


@pytest.mark.parametrize("form", ["mean", "degree", "softmax", "attention"])
def test_half_precision_sums_do_not_overflow(form):
    """The sums over pixels pass float16's largest number, 65,504, though the result does not."""
    logits = torch.full((1, 2, 48, 48), 200.0, dtype=torch.float16)
    feats = torch.zeros(1, 3, 48, 48, dtype=torch.float16)
    feats[:, 0] = 1
    out = propagate(form, logits, feats, weights=(1.0,))
    assert_close(out, np.full(out.shape, 200.0), "propagation")
    with torch.autocast("cpu", dtype=torch.float16):
        out = propagate(form, logits.float(), feats.float(), weights=(1.0,))
        total = propagate("sum", logits.float(), feats.float(), weights=(1.0,))
    assert_close(out, np.full(out.shape, 200.0), "autocast", torch.float16)
    assert_close(total, np.full(out.shape, 200.0 * 2304), "autocast", torch.float16)


def strided(x):
    """The same values in every other kind of memory layout."""
    doubled = torch.zeros(*(2 * s for s in x.shape), dtype=x.dtype)
    doubled[tuple(slice(None, None, 2) for _ in x.shape)] = x
    yield x.to(memory_format=torch.channels_last)
    yield x.transpose(1, 3).contiguous().transpose(1, 3)
    yield x.transpose(0, 2).contiguous().transpose(0, 2)
    yield doubled[tuple(slice(None, None, 2) for _ in x.shape)]


@resolutions
@kinds
def test_strides_do_not_matter_and_inputs_are_left_alone(form, similarity, resolution):
    options = {"similarity": similarity, "resolution": resolution}
    for grid in ((3, 2), (5, 4)):
        logits, feats, target_feats = inputs(form, grid, (3, 2), (2, 2))
        mask = random_mask(2, *grid)
        want = propagate(form, logits, feats, target_feats, mask=mask, **options).numpy()
        for views in zip(*(strided(x) for x in (logits, feats, target_feats)), strict=True):
            before, mask_before = [v.clone() for v in views], mask.clone()
            mask_view = mask.transpose(1, 2).contiguous().transpose(1, 2)
            leaves = [v.requires_grad_() for v in views]
            out = propagate(form, *leaves, mask=mask_view, **options)
            assert_close(out, want, "propagation")
            out.sum().backward()
            assert all(torch.equal(a, b) for a, b in zip(views, before, strict=True))
            assert torch.equal(mask_view, mask_before)


@forms
def test_one_image_expanded_to_a_batch(form):
    """expand() is the way to share features; its strides are zero."""
    logits, feats, _ = inputs("sum", (3, 4))
    feats = feats.abs() if form == "degree" else feats
    shared = feats[:1].expand(2, -1, -1, -1)
    out = propagate(form, logits, shared)
    assert_close(out, propagate(form, logits, shared.contiguous()).numpy(), "propagation")
