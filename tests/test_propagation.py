"""Propagation against the dense float64 oracle in every combination of options, and what it promises around it."""

import contextlib
import copy
import inspect
import itertools
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import forward_ad

from dlprop import DerivativeLabelPropagation, derivative_similarity
from dlprop.propagation import derivative_label_propagation as propagate

from .oracles import features
from .oracles import propagation as oracle
from .strategies import operators, seeds
from .tolerances import assert_close

SCHEMES = features.SCHEMES
NORMALIZATIONS = features.NORMALIZATIONS
SIMILARITIES = ("dot", "cosine")
FORMS = {
    "sum": {"affinity": "linear", "scale": "sum"},
    "mean": {"affinity": "linear", "scale": "mean"},
    "degree": {"affinity": "linear", "scale": "degree"},
    "softmax": {"affinity": "softmax"},
}
DEFAULTS = {
    "max_order": 1,
    "weights": None,
    "scheme": "forward",
    "normalize": "l1",
    "similarity": "dot",
    "affinity": "linear",
    "scale": "sum",
    "resolution": "feats",
    "align_corners": True,
    "chunk_size": None,
    "backend": "auto",
}
forms = pytest.mark.parametrize("form", FORMS)
similarities = pytest.mark.parametrize("similarity", SIMILARITIES)


def expected(logits, feats, target_feats=None, **options):
    """The oracle, image by image."""
    return oracle.batched(oracle.propagate, logits, feats, target_feats, **options)


def inputs(form, grid=(3, 4), feats_grid=None, target_grid=None, *, N=2, C=3, D=5, dtype=torch.float64):
    """Logits, features and target features (or None) whose values float32 holds exactly.

    Features are positive for "degree", so that no degree is near zero, and of either sign otherwise.
    """
    draw = (lambda *shape: torch.rand(*shape) + 0.3) if form == "degree" else torch.randn
    logits = torch.randn(N, C, *grid)
    feats = draw(N, D, *(feats_grid or grid))
    target_feats = None if target_grid is None else draw(N, D, *target_grid)
    return tuple(None if x is None else x.to(dtype) for x in (logits, feats, target_feats))


def random_mask(N, *grid):
    """Two thirds of the pixels, at least one an image; the last image has only one."""
    mask = torch.rand(N, *grid) < 0.67
    mask.flatten(1)[:, 0] = True
    mask.flatten(1)[-1, 1:] = False
    return mask


@contextlib.contextmanager
def case(**facts):
    """Name the case in a loop that failed."""
    try:
        yield
    except Exception as error:
        error.add_note(f"case: {facts}")
        raise


# Against the oracle


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("resolution", ["feats", "logits"])
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@similarities
@forms
def test_every_combination(form, similarity, normalize, resolution, align_corners):
    """Masked or not, own or other targets on the same or another grid, up, down and across, in two precisions."""
    options = {
        **FORMS[form],
        "similarity": similarity,
        "normalize": normalize,
        "resolution": resolution,
        "align_corners": align_corners,
    }
    grids = {"same": ((3, 3), (3, 3)), "up": ((5, 4), (3, 2)), "down": ((2, 3), (4, 3)), "across": ((6, 1), (2, 3))}
    for (name, (grid, feats_grid)), target, masked in itertools.product(
        grids.items(), ("none", "same", "other"), (False, True)
    ):
        target_grid = {"none": None, "same": feats_grid, "other": (2, 4)}[target]
        logits, feats, target_feats = inputs(form, grid, feats_grid, target_grid)
        mask = random_mask(2, *grid) if masked else None
        want = expected(logits, feats, target_feats, mask=mask, **options)
        assert want.shape[2:] == (target_grid if target == "other" else grid)
        for dtype in (torch.float64, torch.float32):
            with case(grids=name, target=target, masked=masked, dtype=dtype):
                tensors = (None if x is None else x.to(dtype) for x in (logits, feats, target_feats))
                out = propagate(*tensors, mask=mask, **options)
                assert out.dtype == dtype
                assert_close(out, want, "propagation")


@pytest.mark.parametrize("max_order", [0, 1, 2, 3])
@pytest.mark.parametrize("scheme", SCHEMES)
@similarities
@forms
def test_schemes_orders_and_weights(form, similarity, scheme, max_order):
    options = {**FORMS[form], "similarity": similarity, "scheme": scheme, "max_order": max_order}
    D = max_order * features.STEP[scheme] + 2
    smallest = max_order * features.STEP[scheme] + 1
    logits, feats, _ = inputs(form, D=D)
    wide = [4.0, 0.5, 0.25, 0.125][: max_order + 1]
    for weights in (None, wide, [0.0] * max_order + [2.0]):
        if form == "degree" and weights is not None and weights[0] == 0:
            continue  # its degree is near zero somewhere: see the tests of the fallback
        with case(weights=weights):
            out = propagate(logits, feats, weights=weights, **options)
            assert_close(out, expected(logits, feats, weights=weights, **options), "propagation")
    if form != "degree":
        logits, feats, _ = inputs(form, D=smallest)
        out = propagate(logits, feats, **options)
        assert_close(out, expected(logits, feats, **options), "propagation")


def test_negative_weights_are_allowed():
    logits, feats, _ = inputs("sum")
    out = propagate(logits, feats, weights=(1, -0.5))
    assert_close(out, expected(logits, feats, weights=[1, -0.5]), "propagation")


def test_eq_4_by_hand():
    """L (S + D1S) for three pixels, on paper."""
    logits = torch.tensor([[[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]]])
    feats = torch.tensor([[[1.0, 0.0, 1.0], [0.0, 2.0, 1.0], [0.0, 0.0, 0.0]]])
    # V = e1, e2, (e1 + e2) / 2; D1 v = (-1, 0), (1, -1), (0, -1/2)
    # S = [[1, 0, 1/2], [0, 1, 1/2], [1/2, 1/2, 1/2]]; D1S = [[1, -1, 0], [-1, 2, 1/2], [0, 1/2, 1/4]]
    assert propagate(logits, feats).tolist() == [[[4.0, -2.0, 1.0], [-1.0, 3.0, 1.0]]]


@forms
def test_flat_inputs(form):
    """(N, C, M) with (N, D, M), targets of any length; the same numbers as on a grid."""
    logits, feats, target_feats = inputs(form, (3, 4), None, (2, 5))
    mask = random_mask(2, 3, 4)
    for targets, m in itertools.product((None, target_feats), (None, mask)):
        flat = [None if x is None else x.flatten(2) for x in (logits, feats, targets)]
        flat_mask = None if m is None else m.flatten(1)
        out = propagate(*flat, mask=flat_mask, **FORMS[form])
        assert_close(out, expected(*flat, mask=flat_mask, **FORMS[form]), "propagation")
        assert_close(out, propagate(logits, feats, targets, mask=m, **FORMS[form]).flatten(2).numpy(), "propagation")


@pytest.mark.parametrize("resolution", ["feats", "logits"])
@forms
def test_other_targets_are_not_the_sources(form, resolution):
    """Passing `feats` as targets means the same, except for the fallback; other images give other results."""
    logits, feats, target_feats = inputs(form, (5, 4), (3, 2), (3, 2))
    options = {**FORMS[form], "resolution": resolution}
    own = propagate(logits, feats, **options)
    assert_close(propagate(logits, feats, feats, **options), own.numpy(), "propagation")
    assert (propagate(logits, feats, target_feats, **options) - own).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("resolution", ["feats", "logits"])
@similarities
@forms
def test_dtypes(form, similarity, resolution, dtype, device):
    """Half-precision inputs are propagated in float32: the result carries one rounding."""
    options = {**FORMS[form], "similarity": similarity, "resolution": resolution}
    logits, feats, target_feats = (x.to(device) for x in inputs(form, (7, 9), (4, 5), (4, 5), D=16, dtype=dtype))
    mask = random_mask(2, 7, 9).to(device)
    for targets, m in itertools.product((None, target_feats), (None, mask)):
        out = propagate(logits, feats, targets, mask=m, **options)
        assert out.dtype == dtype
        assert out.device.type == device.type
        assert_close(out, expected(logits, feats, targets, mask=m, **options), "propagation")


# Properties


@given(st.sampled_from(list(FORMS)), st.sampled_from(SIMILARITIES), operators(max_order=2, max_channels=7), seeds)
def test_linear_in_logits(form, similarity, operator, seed):
    """Also the degree's fallback: features of any sign."""
    D, max_order, scheme = operator
    torch.manual_seed(seed)
    logits, feats, _ = inputs("sum", (2, 4), D=D)
    options = {**FORMS[form], "similarity": similarity, "max_order": max_order, "scheme": scheme}
    if form == "degree":
        options["similarity"] = "dot"
        feats = feats.abs() + 0.1
        feats[:, :, 1, 2] = 0  # falls back
    other = torch.randn_like(logits)
    combined = propagate(2 * logits - 3 * other, feats, **options)
    separate = 2 * propagate(logits, feats, **options) - 3 * propagate(other, feats, **options)
    scale = max(1.0, separate.abs().max().item())
    torch.testing.assert_close(combined, separate, rtol=0, atol=1e-8 * scale)


@given(st.sampled_from(list(FORMS)), st.sampled_from(SIMILARITIES), seeds)
def test_pixel_permutation_equivariance(form, similarity, seed):
    """Sources in any order give the same; targets in any order are permuted alike."""
    torch.manual_seed(seed)
    options = {**FORMS[form], "similarity": similarity}
    logits, feats, target_feats = inputs(form, (7,), None, (5,))
    sources, targets = torch.randperm(7), torch.randperm(5)
    mask = random_mask(2, 7)
    out = propagate(logits, feats, mask=mask, **options)
    permuted = propagate(logits[..., sources], feats[..., sources], mask=mask[:, sources], **options)
    assert_close(permuted, out[..., sources].numpy(), "propagation")
    out = propagate(logits, feats, target_feats, **options)
    permuted = propagate(logits[..., sources], feats[..., sources], target_feats[..., targets], **options)
    assert_close(permuted, out[..., targets].numpy(), "propagation")


def test_images_of_a_batch_do_not_meet():
    for form in FORMS:
        logits, feats, target_feats = inputs(form, (5, 4), (3, 2), (2, 2), N=3)
        mask = random_mask(3, 5, 4)
        out = propagate(logits, feats, target_feats, mask=mask, **FORMS[form])
        for n in range(3):
            one = (x[n : n + 1] for x in (logits, feats, target_feats))
            alone = propagate(*one, mask=mask[n : n + 1], **FORMS[form])
            assert_close(out[n : n + 1], alone.numpy(), "propagation")


@similarities
def test_degree_is_an_affine_combination(similarity):
    """Constant logits stay constant, whatever the mask."""
    logits, feats, _ = inputs("degree")
    logits = torch.ones_like(logits) * torch.tensor([1.0, -2.0, 5.0], dtype=logits.dtype)[:, None, None]
    for mask in (None, random_mask(2, 3, 4)):
        out = propagate(logits, feats, mask=mask, scale="degree", similarity=similarity)
        assert_close(out, logits.numpy(), "propagation")


def test_softmax_spreads_each_source_over_all_targets():
    """Its rows sum to one, so the sum of the logits over the pixels is kept; the columns' sums are not one."""
    logits, feats, target_feats = inputs("softmax", (3, 4), None, (5, 1))
    out = propagate(logits, feats, target_feats, affinity="softmax", normalize=None)
    assert_close(out.sum((2, 3)), logits.sum((2, 3)).numpy(), "propagation")
    columns = propagate(torch.ones_like(logits), feats, affinity="softmax", normalize=None)
    assert (columns - 1).abs().max() > 0.1


def test_mean_is_sum_over_the_count_of_sources():
    logits, feats, _ = inputs("sum", (3, 4))
    mask = random_mask(2, 3, 4)
    total = propagate(logits, feats)
    assert_close(propagate(logits, feats, scale="mean"), total.numpy() / 12, "propagation")
    total, counts = propagate(logits, feats, mask=mask), mask.sum((1, 2))
    mean = propagate(logits, feats, scale="mean", mask=mask)
    assert counts.tolist()[-1] == 1
    assert_close(mean, (total / counts[:, None, None, None]).numpy(), "propagation")


def test_mean_counts_pixels_of_the_grid_it_propagates_on():
    """Feature pixels for "feats", logit pixels for "logits", whatever grid the targets have."""
    logits, feats, target_feats = inputs("sum", (6, 8), (3, 2), (4, 5))
    for targets in (None, target_feats):
        for resolution, count in (("feats", 6), ("logits", 48)):
            total, mean = (
                propagate(logits, feats, targets, resolution=resolution, scale=scale) for scale in ("sum", "mean")
            )
            assert_close(mean, total.numpy() / count, "propagation")


def test_a_resized_mask_has_fractional_weights():
    """One source pixel of a large grid weighs less than one on the small grid, in the logits and in the count."""
    logits, feats, _ = inputs("degree", (6, 6), (3, 3), N=1)
    mask = torch.zeros(1, 6, 6, dtype=torch.bool)
    mask[0, 2, 2] = True
    weights = features.resize(mask.double().numpy(), (3, 3), True)
    assert 0 < weights.sum() < 1
    for form in ("mean", "degree"):
        out = propagate(logits, feats, mask=mask, **FORMS[form])
        assert_close(out, expected(logits, feats, mask=mask, **FORMS[form]), "propagation")
    # The one pixel's logits are all there is to average, up to its own similarity.
    degree = propagate(logits, feats, mask=mask, scale="degree")
    assert_close(degree, np.broadcast_to(logits[:, :, 2, 2].numpy()[..., None, None], degree.shape), "propagation")


# The degree's fallback


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_target_without_positive_degree_keeps_its_logits(dtype):
    """Degrees 2 v_j: positive, positive, positive, negative, zero."""
    feats = torch.tensor([[[1.0, 2.0, 3.0, -4.0, 0.0]]], dtype=dtype)
    logits = torch.tensor([[[1.0, 2.0, 3.0, 7.0, -5.0]]], dtype=dtype)
    options = {"max_order": 0, "normalize": None, "scale": "degree"}
    out = propagate(logits, feats, **options)
    assert out[0, 0, 3:].tolist() == [7.0, -5.0]
    assert_close(out[0, 0, :3], np.full(3, (1 + 4 + 9 - 28) / 2), "propagation")
    out = propagate(logits, feats, feats.clone(), **options)
    assert out[0, 0, 3:].tolist() == [0.0, 0.0]
    assert_close(out[0, 0, :3], np.full(3, (1 + 4 + 9 - 28) / 2), "propagation")
    masked = propagate(logits, feats, mask=torch.tensor([[True, False, True, False, False]]), **options)
    assert_close(masked, [[[2.5, 2.5, 2.5, 7.0, -5.0]]], "propagation")


def test_a_masked_target_without_positive_degree_keeps_its_logits_too():
    """The mask is about sources: as a target, the pixel is as good as any."""
    feats = torch.tensor([[[1.0, 2.0, -1.0, 0.0]]])
    logits = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]])
    mask = torch.tensor([[True, True, False, False]])
    out = propagate(logits, feats, mask=mask, max_order=0, normalize=None, scale="degree")
    assert_close(out, [[[5 / 3, 5 / 3, 3.0, 4.0]]], "propagation")


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("resolution", ["feats", "logits"])
@pytest.mark.parametrize("target", [None, (3, 2), (2, 2)])
def test_fallback_on_another_grid(target, resolution, align_corners):
    """A zero feature vector has degree zero; on the features' grid it falls back to the resized logits."""
    options = {"scale": "degree", "resolution": resolution, "align_corners": align_corners}
    logits, feats, target_feats = inputs("degree", (5, 4), (3, 2), target)
    feats[:, :, 1] = 0
    if target is not None:
        target_feats[:, :, 1] = 0
    mask = random_mask(2, 5, 4)
    for m in (None, mask):
        out = propagate(logits, feats, target_feats, mask=m, **options)
        assert_close(out, expected(logits, feats, target_feats, mask=m, **options), "propagation")


@pytest.mark.parametrize("cross", [False, True])
def test_gradient_through_the_fallback(cross):
    """Finite, and the identity (or zero) for the target that fell back."""
    _, feats, _ = inputs("degree", (2, 3), N=1)
    feats[..., 0, 0] = 0
    logits = torch.randn(1, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    feats.requires_grad_()
    out = propagate(logits, feats, feats.detach() if cross else None, scale="degree")
    grad = torch.zeros_like(out)
    grad[..., 0, 0] = torch.tensor([1.0, -2.0])
    out.backward(grad)
    want = torch.zeros_like(grad) if cross else grad
    assert torch.equal(logits.grad, want)
    assert torch.equal(feats.grad, torch.zeros_like(feats))


# Edges


@forms
@pytest.mark.parametrize("resolution", ["feats", "logits"])
def test_empty_batch(form, resolution):
    logits, feats, target_feats = inputs(form, (5, 4), (3, 2), (2, 2), N=0)
    logits.requires_grad_()
    feats.requires_grad_()
    mask = torch.zeros(0, 5, 4, dtype=torch.bool)
    options = {**FORMS[form], "resolution": resolution}
    assert propagate(logits, feats, mask=mask, **options).shape == (0, 3, 5, 4)
    out = propagate(logits, feats, target_feats, **options)
    assert out.shape == (0, 3, 2, 2)
    out.sum().backward()
    assert logits.grad.shape == logits.shape
    flat = propagate(logits.flatten(2), feats.new_zeros(0, 5, 20), **options)
    assert flat.shape == (0, 3, 20)


@forms
@similarities
def test_one_pixel_one_class_and_the_fewest_channels(form, similarity):
    options = {**FORMS[form], "similarity": similarity}
    logits = torch.tensor([[[[3.0]]]], dtype=torch.float64)
    feats = torch.tensor([[[[1.0]], [[3.0]]]], dtype=torch.float64)
    assert_close(propagate(logits, feats, **options), expected(logits, feats, **options), "propagation")
    large = torch.randn(1, 1, 4, 5, dtype=torch.float64)  # a grid of one feature pixel
    for resolution, align_corners in itertools.product(("feats", "logits"), (True, False)):
        options |= {"resolution": resolution, "align_corners": align_corners}
        assert_close(propagate(large, feats, **options), expected(large, feats, **options), "propagation")


@pytest.mark.parametrize("resolution", ["feats", "logits"])
@forms
def test_no_source_left(form, resolution):
    """All sources masked: 0, or the targets' own logits for "degree"; finite gradients, graph-connected."""
    options = {**FORMS[form], "resolution": resolution}
    for grid, target_grid in (((3, 2), None), ((5, 4), None), ((5, 4), (3, 2)), ((5, 4), (2, 2))):
        logits, feats, target_feats = inputs(form, grid, (3, 2), target_grid)
        logits.requires_grad_()
        feats.requires_grad_()
        mask = torch.zeros(2, *grid, dtype=torch.bool)
        out = propagate(logits, feats, target_feats, mask=mask, **options)
        assert_close(out, expected(logits, feats, target_feats, mask=mask, **options), "propagation")
        out.sum().backward()
        for x in (logits, feats):
            assert x.grad is None or x.grad.isfinite().all()
        if form != "degree" or target_feats is not None:
            assert (out == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@similarities
@forms
def test_zero_features_have_zero_gradient(form, similarity, dtype):
    logits, feats, _ = inputs(form, (2, 3), dtype=dtype)
    feats[:, :, 1, 1] = 0
    logits.requires_grad_()
    feats.requires_grad_()
    out = propagate(logits, feats, similarity=similarity, **FORMS[form])
    assert out.isfinite().all()
    out.backward(torch.randn_like(out))
    assert (feats.grad[:, :, 1, 1] == 0).all()
    assert feats.grad.isfinite().all()
    assert (feats.grad != 0).any()
    assert logits.grad.isfinite().all()
    nothing = torch.zeros_like(feats).requires_grad_()
    out = propagate(logits, nothing, similarity=similarity, **FORMS[form])
    assert_close(out, expected(logits, nothing, similarity=similarity, **FORMS[form]), "propagation")
    out.backward(torch.randn_like(out))
    assert (nothing.grad == 0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("resolution", ["feats", "logits"])
@similarities
@forms
def test_non_finite_logits_of_a_masked_pixel_do_not_leak(form, similarity, resolution, value):
    options = {**FORMS[form], "resolution": resolution, "similarity": similarity}
    for grid in ((3, 2), (5, 4)):
        logits, feats, _ = inputs(form, grid, (3, 2))
        mask = torch.ones(2, *grid, dtype=torch.bool)
        mask[0, 1, 0] = False
        want = expected(logits, feats, mask=mask, **options)
        logits[0, :, 1, 0] = value
        logits.requires_grad_()
        feats.requires_grad_()
        out = propagate(logits, feats, mask=mask, **options)
        assert_close(out, want, "propagation")
        out.backward(torch.randn_like(out))
        assert feats.grad.isfinite().all()
        assert logits.grad.isfinite().all()
        assert (logits.grad[0, :, 1, 0] == 0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@similarities
@forms
def test_non_finite_features_are_not_hidden(form, similarity, normalize, value):
    """One source that is no number leaves no target with one; the fallback of the degree does not hide it."""
    options = {**FORMS[form], "similarity": similarity, "normalize": normalize}
    logits, feats, target_feats = inputs(form, (2, 3), None, (4, 1), N=1)
    bad = feats.clone()
    bad[0, 1, 1, 1] = value
    assert not propagate(logits, bad, **options).isfinite().any()
    assert not propagate(logits, bad, target_feats, **options).isfinite().any()
    target_feats[0, 1, 2] = value
    out = propagate(logits, feats, target_feats, **options)
    if (form, normalize, value) != ("softmax", None, float("inf")):  # where S_ij = -inf is a weight of zero
        assert not out[..., 2, :].isfinite().any()
    if form != "softmax":  # there every source's normaliser has met the target
        assert out[..., [0, 1, 3], :].isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@forms
def test_non_finite_logits_show(form, value):
    logits, feats, _ = inputs(form, (2, 3), N=1)
    logits[0, 1, 0, 0] = value
    out = propagate(logits, feats, **FORMS[form])
    assert not out[0, 1].isfinite().any()
    assert out[0, [0, 2]].isfinite().all()


@pytest.mark.parametrize("form", ["mean", "degree", "softmax"])
def test_half_precision_sums_do_not_overflow(form):
    """The sums over pixels pass float16's largest number, 65,504, though the result does not."""
    logits = torch.full((1, 2, 64, 64), 200.0, dtype=torch.float16)
    feats = torch.zeros(1, 3, 64, 64, dtype=torch.float16)
    feats[:, 0] = 1
    options = {**FORMS[form], "max_order": 0}
    out = propagate(logits, feats, **options)
    assert_close(out, np.full(out.shape, 200.0), "propagation")
    with torch.autocast("cpu", dtype=torch.float16):
        out = propagate(logits.float(), feats.float(), **options)
        total = propagate(logits.float(), feats.float(), max_order=0)
    assert_close(out, np.full(out.shape, 200.0), "autocast", torch.float16)
    assert_close(total, np.full(out.shape, 200.0 * 4096), "autocast", torch.float16)


def strided(x):
    """The same values in every other kind of memory layout."""
    doubled = torch.zeros(*(2 * s for s in x.shape), dtype=x.dtype)
    doubled[tuple(slice(None, None, 2) for _ in x.shape)] = x
    yield x.to(memory_format=torch.channels_last)
    yield x.transpose(1, 3).contiguous().transpose(1, 3)
    yield x.transpose(0, 2).contiguous().transpose(0, 2)
    yield doubled[tuple(slice(None, None, 2) for _ in x.shape)]


@pytest.mark.parametrize("resolution", ["feats", "logits"])
@similarities
@forms
def test_strides_do_not_matter_and_inputs_are_left_alone(form, similarity, resolution):
    options = {**FORMS[form], "similarity": similarity, "resolution": resolution}
    for grid in ((3, 2), (5, 4)):
        logits, feats, target_feats = inputs(form, grid, (3, 2), (2, 2))
        mask = random_mask(2, *grid)
        want = propagate(logits, feats, target_feats, mask=mask, **options).numpy()
        for views in zip(*(strided(x) for x in (logits, feats, target_feats)), strict=True):
            before, mask_before = [v.clone() for v in views], mask.clone()
            mask_view = mask.transpose(1, 2).contiguous().transpose(1, 2)
            leaves = [v.requires_grad_() for v in views]
            out = propagate(*leaves, mask=mask_view, **options)
            assert_close(out, want, "propagation")
            out.sum().backward()
            assert all(torch.equal(a, b) for a, b in zip(views, before, strict=True))
            assert torch.equal(mask_view, mask_before)


def test_one_image_expanded_to_a_batch():
    """expand() is the way to share features; its strides are zero."""
    logits, feats, _ = inputs("sum", (3, 4))
    shared = feats[:1].expand(2, -1, -1, -1)
    for form in FORMS:
        out = propagate(logits, shared, **FORMS[form])
        assert_close(out, propagate(logits, shared.contiguous(), **FORMS[form]).numpy(), "propagation")


# Chunks and backends


@pytest.mark.parametrize("chunk_size", [1, 2, 5, 29, 30, 31, 1000])
def test_chunk_size_does_not_matter_to_softmax(chunk_size):
    """30 sources in ragged chunks: values and gradients."""
    logits, feats, target_feats = inputs("softmax", (5, 6), None, (7, 3))
    for targets in (None, target_feats):
        leaves = [x.clone().requires_grad_() for x in (logits, feats, targets) if x is not None]
        options = {"affinity": "softmax", "similarity": "cosine", "weights": (3.0, 2.0)}
        out = propagate(*leaves, chunk_size=chunk_size, **options)
        assert_close(out, expected(logits, feats, targets, **options), "propagation")
        grad = torch.randn_like(out)
        grads = torch.autograd.grad(out, leaves, grad)
        whole = torch.autograd.grad(propagate(*leaves, backend="dense", **options), leaves, grad)
        for a, b in zip(grads, whole, strict=True):
            assert_close(a, b.numpy(), "gradient")


def test_chunk_size_is_ignored_by_linear():
    logits, feats, _ = inputs("sum")
    assert torch.equal(propagate(logits, feats, chunk_size=1), propagate(logits, feats))


@pytest.mark.parametrize("resolution", ["feats", "logits"])
@similarities
@forms
def test_backends_agree(form, similarity, resolution):
    options = {**FORMS[form], "similarity": similarity, "resolution": resolution}
    logits, feats, target_feats = inputs(form, (7, 5), (4, 3), (2, 5))
    mask = random_mask(2, 7, 5)
    for targets, m in itertools.product((None, target_feats), (None, mask)):
        want = expected(logits, feats, targets, mask=m, **options)
        results = {}
        for backend in ("dense", "tiled", "auto"):
            leaves = [x.clone().requires_grad_() for x in (logits, feats, targets) if x is not None]
            out = propagate(*leaves, mask=m, backend=backend, **options)
            assert_close(out, want, "propagation")
            out.backward(torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out))
            results[backend] = [x.grad for x in leaves]
        for backend in ("tiled", "auto"):
            for a, b in zip(results[backend], results["dense"], strict=True):
                assert_close(a, b.numpy(), "gradient")


# Gradients


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("resolution", ["feats", "logits"])
@similarities
@forms
def test_gradcheck(form, similarity, resolution, cross):
    """Every entry of every Jacobian, in float64, resized both ways, with a mask."""
    options = {**FORMS[form], "similarity": similarity, "resolution": resolution}
    for grid, feats_grid in (((2, 3), (2, 2)), ((2, 2), (2, 2))):
        tensors = inputs(form, grid, feats_grid, (1, 2) if cross else None, N=1, C=2, D=3)
        tensors = [x.requires_grad_() for x in tensors if x is not None]
        mask = torch.ones(1, *grid, dtype=torch.bool)
        mask[0, 0, 1] = False
        assert torch.autograd.gradcheck(lambda *x, mask=mask: propagate(*x, mask=mask, **options), tensors)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@similarities
@forms
def test_gradcheck_of_every_normalisation_and_scheme(form, similarity, normalize, scheme):
    options = {**FORMS[form], "similarity": similarity, "normalize": normalize, "scheme": scheme}
    logits, feats, _ = inputs(form, (2, 2), N=2, C=2, D=4)
    tensors = [x.requires_grad_() for x in (logits, feats)]
    assert torch.autograd.gradcheck(lambda *x: propagate(*x, weights=(1, 0.5), **options), tensors, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("resolution", ["feats", "logits"])
@similarities
@forms
def test_gradients_of_lower_precision(form, similarity, resolution, dtype):
    """As in float64 at the same values, up to the roundings of the table."""
    options = {**FORMS[form], "similarity": similarity, "resolution": resolution}
    tensors = inputs(form, (6, 5), (4, 3), D=8, dtype=dtype)[:2]
    grad = torch.randn(2, 3, 6, 5).to(dtype)
    grads = {}
    for precision in (dtype, torch.float64):
        leaves = [x.to(precision).detach().requires_grad_() for x in tensors]
        grads[precision] = torch.autograd.grad(propagate(*leaves, **options), leaves, grad.to(precision))
    for a, b in zip(grads[dtype], grads[torch.float64], strict=True):
        assert a.dtype == dtype
        assert_close(a, b.numpy(), "gradient")


@pytest.mark.parametrize("backend", ["auto", "dense", "tiled"])
@forms
def test_repeated_backward_is_exact(form, backend):
    logits, feats, target_feats = inputs(form, (5, 4), (3, 2), (2, 2))
    leaves = [x.requires_grad_() for x in (logits, feats, target_feats)]
    out = propagate(*leaves, backend=backend, **FORMS[form])
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
        out = propagate(*leaves, **FORMS[form])
        assert out.requires_grad == any(wanted)
        if any(wanted):
            out.backward(torch.randn_like(out))
        assert [x.grad is not None for x in leaves] == list(wanted)


@forms
def test_no_grad_and_inference_mode(form):
    logits, feats, _ = inputs(form)
    want = propagate(logits, feats, **FORMS[form])
    feats.requires_grad_()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            out = propagate(logits, feats, **FORMS[form])
            assert not out.requires_grad
            assert torch.equal(out, want)


@pytest.mark.parametrize("backend", ["auto", "dense", "tiled"])
def test_softmax_affinity_cannot_be_differentiated_twice(backend):
    """An error, never a silent zero."""
    logits, feats, _ = inputs("softmax")
    leaves = [x.requires_grad_() for x in (logits, feats)]

    def twice(first, second):
        out = propagate(*leaves, affinity="softmax", backend=backend)
        (grad,) = torch.autograd.grad((out**2).sum(), first, create_graph=True)
        torch.autograd.grad((grad**2).sum(), second)

    for first, second in itertools.product(leaves, repeat=2):
        with pytest.raises(RuntimeError, match=r"(?i)twice|second|double|once"):
            twice(first, second)


# Rectify, Eq. 5


@pytest.mark.parametrize("ramp", [0, 0.25, 1.0])
@forms
def test_rectify_is_eq_5(form, ramp):
    for grid, target_grid in (((3, 2), None), ((5, 4), None), ((5, 4), (3, 2)), ((5, 4), (5, 4))):
        logits, feats, target_feats = inputs(form, grid, (3, 2), target_grid)
        for mask in (None, random_mask(2, *grid)):
            module = DerivativeLabelPropagation(**FORMS[form])
            out = module.rectify(logits, feats, ramp, target_feats, mask=mask)
            masked = [{} if mask is None else {"mask": mask[n].numpy()} for n in range(2)]
            targets = [None, None] if target_feats is None else target_feats.numpy()
            want = np.stack(
                [
                    oracle.rectify(logits[n].numpy(), feats[n].numpy(), ramp, targets[n], **FORMS[form], **masked[n])
                    for n in range(2)
                ]
            )
            assert_close(out, want, "propagation")
            assert_close(out.sum(1), np.ones((2, *grid)), "propagation")


@forms
def test_rectify_has_no_gradient(form):
    logits, feats, _ = inputs(form)
    leaves = [x.requires_grad_() for x in (logits, feats)]
    assert not DerivativeLabelPropagation(**FORMS[form]).rectify(*leaves, 0.5).requires_grad


def test_rectify_between_the_two_probabilities():
    logits, feats, _ = inputs("sum")
    module = DerivativeLabelPropagation()
    P, P_tilde = logits.softmax(1), module(logits, feats).softmax(1)
    assert_close(module.rectify(logits, feats, 0.0), P.numpy(), "propagation")
    assert_close(module.rectify(logits, feats, 1), P_tilde.numpy(), "propagation")
    assert_close(module.rectify(logits, feats, 0.75), (0.25 * P + 0.75 * P_tilde).numpy(), "propagation")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_rectify_dtype(dtype):
    logits, feats, _ = inputs("sum", dtype=dtype)
    out = DerivativeLabelPropagation().rectify(logits, feats, 0.5)
    assert out.dtype == dtype
    want = oracle.batched(lambda L, V: oracle.rectify(L, V, 0.5), logits, feats)
    assert_close(out, want, "propagation")


def test_rectify_flat():
    logits, feats, _ = inputs("sum", (6,))
    out = DerivativeLabelPropagation().rectify(logits, feats, 0.5)
    want = oracle.batched(lambda L, V: oracle.rectify(L, V, 0.5), logits, feats)
    assert_close(out, want, "propagation")


# The Module


def test_module_is_the_function():
    logits, feats, target_feats = inputs("sum", (5, 4), (3, 2), (2, 2))
    mask = random_mask(2, 5, 4)
    for form, resolution in itertools.product(FORMS, ("feats", "logits")):
        options = {
            **FORMS[form],
            "max_order": 2,
            "weights": [1.0, 0.5, 2.0],
            "scheme": "sum",
            "normalize": "l2",
            "similarity": "cosine",
            "resolution": resolution,
            "align_corners": False,
            "chunk_size": 3,
            "backend": "tiled",
        }
        module = DerivativeLabelPropagation(**options)
        out = module(logits, feats, target_feats, mask=mask)
        assert torch.equal(out, propagate(logits, feats, target_feats, mask=mask, **options))
        options.pop("chunk_size"), options.pop("backend")
        assert_close(out, expected(logits, feats, target_feats, mask=mask, **options), "propagation")


def test_defaults_of_module_and_function_agree():
    module = inspect.signature(DerivativeLabelPropagation.__init__).parameters
    function = inspect.signature(propagate).parameters
    assert {k: p.default for k, p in module.items() if k != "self"} == DEFAULTS
    assert all(p.kind is p.KEYWORD_ONLY for k, p in module.items() if k != "self")
    keywords = {k: p.default for k, p in function.items() if p.kind is p.KEYWORD_ONLY}
    assert keywords == {"mask": None, **DEFAULTS}
    assert list(function)[:3] == ["logits", "feats", "target_feats"]
    forward = inspect.signature(DerivativeLabelPropagation.forward).parameters
    assert list(forward) == ["self", "logits", "feats", "target_feats", "mask"]
    assert forward["mask"].kind is inspect.Parameter.KEYWORD_ONLY
    rectify = inspect.signature(DerivativeLabelPropagation.rectify).parameters
    assert list(rectify) == ["self", "logits", "feats", "ramp", "target_feats", "mask"]
    logits, feats, _ = inputs("sum", (5, 4), (3, 2))
    assert_close(
        DerivativeLabelPropagation()(logits, feats),
        expected(logits, feats, **{k: v for k, v in DEFAULTS.items() if k not in ("chunk_size", "backend")}),
        "propagation",
    )


NON_DEFAULT = {
    "max_order": 2,
    "weights": (1.0, 0.5, 0.25),
    "scheme": "central",
    "normalize": "softmax",
    "similarity": "cosine",
    "affinity": "softmax",
    "resolution": "logits",
    "align_corners": False,
    "chunk_size": 77,
    "backend": "tiled",
}


def test_repr_shows_the_options():
    text = repr(DerivativeLabelPropagation(**NON_DEFAULT))
    for name, value in NON_DEFAULT.items():
        assert f"{name}={value!r}" in text
    assert "scale='degree'" in repr(DerivativeLabelPropagation(scale="degree"))
    assert "normalize=None" in repr(DerivativeLabelPropagation(normalize=None))


def test_pickle_and_deepcopy():
    logits, feats, _ = inputs("sum", (5, 4), (3, 2), D=7)
    module = DerivativeLabelPropagation(**NON_DEFAULT)
    for clone in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
        assert repr(clone) == repr(module)
        assert torch.equal(clone(logits, feats), module(logits, feats))


def test_module_has_no_state():
    module = DerivativeLabelPropagation(weights=(1.0, 0.5))
    assert module.state_dict() == {}
    assert not list(module.parameters())
    module.load_state_dict({}, strict=True)
    logits, feats, _ = inputs("sum")
    want = module(logits, feats)
    for moved in (module.half(), module.double(), module.eval(), module.train(), module.to("meta")):
        assert torch.equal(moved(logits, feats), want)


def test_weights_are_copied():
    weights = [1.0, 0.5]
    module = DerivativeLabelPropagation(weights=weights)
    weights[1] = 100.0
    logits, feats, _ = inputs("sum")
    assert torch.equal(module(logits, feats), propagate(logits, feats, weights=[1.0, 0.5]))


# Autocast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("resolution", ["feats", "logits"])
@similarities
@forms
def test_autocast(form, similarity, resolution, dtype):
    """float32 in, float32 out; only the products may have been rounded; gradients too."""
    options = {**FORMS[form], "similarity": similarity, "resolution": resolution}
    logits, feats, _ = inputs(form, (7, 6), (4, 3), D=16, dtype=torch.float32)
    for mask in (None, random_mask(2, 7, 6)):
        leaves = [x.clone().requires_grad_() for x in (logits, feats)]
        with torch.autocast("cpu", dtype=dtype):
            out = propagate(*leaves, mask=mask, **options)
        assert out.dtype == torch.float32
        assert_close(out, expected(logits, feats, mask=mask, **options), "autocast", dtype)
        grad = torch.randn_like(out)
        grads = torch.autograd.grad(out, leaves, grad)
        leaves = [x.double().requires_grad_() for x in (logits, feats)]
        exact = torch.autograd.grad(propagate(*leaves, mask=mask, **options), leaves, grad.double())
        for a, b in zip(grads, exact, strict=True):
            assert_close(a, b.numpy(), "autocast", dtype)


@forms
def test_autocast_takes_mixed_dtypes(form):
    """A network's logits may be half and its features float32: the output follows the logits."""
    logits, feats, target_feats = inputs(form, (5, 4), (3, 2), (3, 2), dtype=torch.float32)
    half = logits.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = propagate(half, feats, target_feats, **FORMS[form])
        other = propagate(logits, feats.bfloat16(), **FORMS[form])
        probabilities = DerivativeLabelPropagation(**FORMS[form]).rectify(half, feats, 0.5)
    assert out.dtype == torch.bfloat16
    assert_close(out, expected(half, feats, target_feats, **FORMS[form]), "autocast")
    assert other.dtype == torch.float32
    assert_close(other, expected(logits, feats.bfloat16(), **FORMS[form]), "autocast", torch.bfloat16)
    assert probabilities.dtype == torch.bfloat16


# The documented relation to derivative_similarity


@pytest.mark.parametrize("scheme", SCHEMES)
@similarities
def test_linear_propagation_is_the_sum_of_derivative_similarities(similarity, scheme):
    logits, feats, target_feats = inputs("sum", (3, 4), None, (2, 2), D=6)
    options = {"scheme": scheme, "similarity": similarity, "normalize": "l2"}
    S = sum(w * derivative_similarity(feats, target_feats, order=q, **options) for q, w in enumerate((1.0, 0.5, 0.25)))
    out = propagate(logits, feats, target_feats, max_order=2, weights=(1.0, 0.5, 0.25), **options)
    assert_close(out.flatten(2), (logits.flatten(2) @ S).numpy(), "propagation")


# ---------------------------------------------------------------------------------------------------------------------
# Where a plausible implementation would answer wrongly without a word


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")  # torch calls it itself
def test_forward_mode_of_the_softmax_affinity_is_refused():
    # A custom op drops the tangent: the derivative would come out as 0.
    logits, feats = torch.randn(1, 2, 9), torch.rand(1, 5, 9)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode"):
        propagate(forward_ad.make_dual(logits, torch.ones_like(logits)), feats, affinity="softmax")


def test_rectify_is_rounded_once_in_half_precision():
    # L' exceeds the range of float16 here; its softmax does not.
    logits, feats = (40 + torch.randn(1, 4, 60, 60)).half(), torch.rand(1, 32, 60, 60).half()
    module = DerivativeLabelPropagation(normalize="l2")
    assert module(logits, feats).isinf().any()
    probabilities = module.rectify(logits, feats, 1.0)
    expected = module.rectify(logits.double(), feats.double(), 1.0)
    assert probabilities.dtype == torch.float16
    # float32 resolves L' near 1e5 to 0.01, and the softmax passes at most half of an error on.
    assert (probabilities.double() - expected).abs().max() < 0.02


@pytest.mark.parametrize("affinity", ["linear", "softmax"])
@pytest.mark.parametrize("similarity", ["dot", "cosine"])
@pytest.mark.parametrize("backend", ["auto", "dense"])
def test_a_masked_source_with_nan_features_carries_nothing(affinity, similarity, backend):
    logits, feats, targets = torch.randn(1, 2, 9), torch.rand(1, 5, 9), torch.rand(1, 5, 7)
    mask = torch.ones(1, 9, dtype=torch.bool)
    mask[0, 3] = False
    options = {"mask": mask, "affinity": affinity, "similarity": similarity, "backend": backend}
    expected = propagate(logits, feats, targets, **options)
    feats[0, :, 3] = torch.nan
    assert torch.equal(propagate(logits, feats, targets, **options), expected)
