"""What every affinity shares, against the dense float64 oracle: grids, masks, dtypes, edges, gradients, the Module."""

import copy
import inspect
import itertools
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dlprop import DerivativeLabelPropagation, derivative_similarity
from dlprop.affinity import Linear, Softmax
from dlprop.propagation import derivative_label_propagation

from .oracles import features
from .oracles import propagation as oracle
from .propagation_cases import (
    FORMS,
    KINDS,
    SIMILARITIES,
    NearestMean,
    case,
    expected,
    inputs,
    make,
    propagate,
    random_mask,
)
from .strategies import operators, seeds
from .tolerances import assert_close

SCHEMES = features.SCHEMES
NORMALIZATIONS = features.NORMALIZATIONS
forms = pytest.mark.parametrize("form", FORMS)
similarities = pytest.mark.parametrize("similarity", SIMILARITIES)
kinds = pytest.mark.parametrize(("form", "similarity"), KINDS)
resolutions = pytest.mark.parametrize("resolution", ["feats", "logits"])


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


# Masks


class Seen:
    """An affinity that keeps what it is given."""

    def propagate(self, sources, targets):
        self.sources, self.targets = sources, targets
        return torch.zeros_like(targets.logits).expand(-1, -1, targets.feats.shape[2])


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("stride", [1, 2, 4, 8, 16, 32])
def test_every_source_counts_once(stride, align_corners):
    """Whatever the grid of the features, the counts add up to the sources, and the counted logits to theirs."""
    size = (64, 96)
    grid = tuple(s // stride for s in size) if not align_corners else tuple((s - 1) // stride + 1 for s in size)
    logits = torch.randn(2, 3, *size, dtype=torch.float64)
    for share in (1.0, 0.3, 0.003):
        mask = torch.rand(2, *size) < share
        seen = Seen()
        feats = torch.rand(2, 4, *grid, dtype=torch.float64)
        derivative_label_propagation(logits, feats, mask=mask, affinity=seen, align_corners=align_corners)
        counts = seen.sources.counts
        assert counts.shape == (2, 1, grid[0] * grid[1])
        assert (counts >= 0).all()
        assert_close(counts.sum((1, 2)), mask.sum((1, 2)).double(), "propagation")
        given = (logits * mask[:, None]).sum((2, 3))
        assert_close((seen.sources.logits * counts).sum(2), given, "propagation")
        # A point with sources has their mean, within what they range over; one without has nothing.
        assert (seen.sources.logits[counts.expand(-1, 3, -1) == 0] == 0).all()
        assert seen.sources.logits.abs().max() <= logits.abs().max()


@pytest.mark.parametrize("align_corners", [True, False])
@kinds
def test_no_click_is_lost(form, similarity, align_corners):
    """20 clicks of 6 classes on 320 x 227 pixels, features at stride 8: every class that was clicked arrives."""
    classes, size, grid = 6, (227, 320), (29, 40)
    feats = torch.rand(1, 8, *grid)
    points = torch.randperm(size[0] * size[1])[:20]
    mask = torch.zeros(1, size[0] * size[1], dtype=torch.bool)
    mask[0, points] = True
    clicked = torch.arange(20) % classes
    logits = torch.zeros(1, classes, size[0] * size[1])
    logits[0, clicked, points] = 1
    logits, mask = logits.view(1, classes, *size), mask.view(1, *size)
    out = propagate(form, logits, feats, mask=mask, similarity=similarity, align_corners=align_corners)
    assert (out.abs().amax((2, 3)) > 0).all()
    if form == "softmax":  # each click spreads its 1, in shares of points to pixels
        points_out = derivative_label_propagation(
            logits, feats, feats[:, :, :, 1:], mask=mask, affinity=make(form), align_corners=align_corners
        )
        share = grid[0] * grid[1] / (size[0] * size[1])
        assert_close(points_out.sum((2, 3)), torch.bincount(clicked).double()[None] * share, "propagation")


def test_a_mask_without_a_true_is_refused():
    for form, resolution in itertools.product(FORMS, ("feats", "logits")):
        for grid, target_grid in (((3, 2), None), ((5, 4), None), ((5, 4), (2, 2))):
            tensors = inputs(form, grid, (3, 2), target_grid)
            mask = torch.zeros(2, *grid, dtype=torch.bool)
            with pytest.raises(ValueError, match=r"mask must leave at least one source.*True"):
                propagate(form, *tensors, mask=mask, resolution=resolution)


@resolutions
@forms
def test_an_image_without_a_source(form, resolution):
    """Beside one that has some: 0, or the targets' own logits for "degree"; finite gradients, graph-connected."""
    for grid, target_grid in (((3, 2), None), ((5, 4), None), ((5, 4), (3, 2)), ((5, 4), (2, 2))):
        logits, feats, target_feats = inputs(form, grid, (3, 2), target_grid)
        logits.requires_grad_()
        feats.requires_grad_()
        mask = torch.stack((torch.zeros(grid, dtype=torch.bool), torch.ones(grid, dtype=torch.bool)))
        out = propagate(form, logits, feats, target_feats, mask=mask, resolution=resolution)
        want = expected(form, logits, feats, target_feats, mask=mask, resolution=resolution)
        assert_close(out, want, "propagation")
        out[0].sum().backward()
        assert logits.grad.isfinite().all()
        assert feats.grad.isfinite().all()
        if form != "degree" or target_feats is not None:
            assert (out[0] == 0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@resolutions
@kinds
def test_non_finite_logits_of_a_masked_pixel_do_not_leak(form, similarity, resolution, value):
    options = {"resolution": resolution, "similarity": similarity}
    for grid in ((3, 2), (5, 4)):
        logits, feats, targets = inputs(form, grid, (3, 2), (2, 2))
        mask = torch.ones(2, *grid, dtype=torch.bool)
        mask[0, 1, 0] = False
        # The degree's own logits are those of the target, masked or not.
        targets = targets if form == "degree" else None
        want = expected(form, logits, feats, targets, mask=mask, **options)
        logits[0, :, 1, 0] = value
        logits.requires_grad_()
        feats.requires_grad_()
        out = propagate(form, logits, feats, targets, mask=mask, **options)
        assert_close(out, want, "propagation")
        out.backward(torch.randn_like(out))
        assert feats.grad.isfinite().all()
        assert logits.grad.isfinite().all()
        assert (logits.grad[0, :, 1, 0] == 0).all()


@pytest.mark.parametrize("grid", [(3, 3), (5, 4)])
@pytest.mark.parametrize(("form", "similarity"), [kind for kind in KINDS if kind[0] != "attention"])
def test_features_of_masked_sources_must_be_finite(form, similarity, grid):
    """They are neither copied nor masked, and 0 times NaN is NaN: what is wrong with them shows.

    Attention may leave them out altogether.
    """
    logits, feats, targets = inputs(form, grid, (3, 3), (2, 2), N=1)
    mask = torch.ones(1, *grid, dtype=torch.bool)
    mask[0, 1, 1] = False
    assert propagate(form, logits, feats, targets, mask=mask, similarity=similarity).isfinite().all()
    feats[0, :, 1, 1] = torch.nan
    assert propagate(form, logits, feats, targets, mask=mask, similarity=similarity).isnan().all()


class NewTensors(TorchDispatchMode):
    """The bytes of the storages that operations make, each counted once, where they reach a size."""

    def __init__(self, size):
        super().__init__()
        self.size, self.bytes, self.storages = size, 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in given:
                self.storages.append(x)  # kept, so that no address is used twice
                nbytes = x.untyped_storage().nbytes()
                self.bytes += nbytes if nbytes >= self.size else 0
        return out


@pytest.mark.parametrize("normalize", ["l1", None])
@pytest.mark.parametrize("form", ["sum", "mean", "softmax", "attention"])
@resolutions
def test_a_mask_copies_no_features(form, resolution, normalize):
    """Forward and backward, it makes no tensor of the features' size more than a call without one."""
    for grid, feats_grid in (((24, 24), (24, 24)), ((48, 48), (24, 24))):
        logits = torch.randn(1, 2, *grid, requires_grad=True)
        feats = torch.rand(1, 128, *feats_grid, requires_grad=True)
        made = {}
        for name, mask in {"all": None, "some": random_mask(2, *grid)[:1]}.items():
            with NewTensors(feats.nbytes // 2) as made[name]:
                out = propagate(form, logits, feats, mask=mask, resolution=resolution, normalize=normalize)
                out.sum().backward()
        assert made["some"].bytes <= made["all"].bytes, f"on {grid}"


def test_new_tensors_are_counted():
    x = torch.zeros(1000)
    with NewTensors(4000) as made:
        (x.view(10, 100) + 1).mul_(2).sum()
        torch.where(x > 0, x, 0)
    assert made.bytes == 8000


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


# Rectify, Eq. 5


def rectified(form, logits, feats, ramp, target_feats=None, **options):
    """The oracle's Eq. 5, image by image."""
    return oracle.batched(
        lambda L, V, W=None, **keywords: oracle.rectify(L, V, ramp, W, **keywords),
        *(logits, feats, target_feats),
        **FORMS[form],
        **options,
    )


@pytest.mark.parametrize("ramp", [0, 0.25, 1.0])
@forms
def test_rectify_is_eq_5(form, ramp):
    module = DerivativeLabelPropagation(make(form))
    for grid, target_grid in (((3, 2), None), ((5, 4), None), ((5, 4), (3, 2)), ((5, 4), (5, 4))):
        logits, feats, target_feats = inputs(form, grid, (3, 2), target_grid)
        for mask in (None, random_mask(2, *grid)):
            out = module.rectify(logits, feats, ramp, target_feats, mask=mask)
            masked = {} if mask is None else {"mask": mask}
            assert_close(out, rectified(form, logits, feats, ramp, target_feats, **masked), "propagation")
            assert_close(out.sum(1), np.ones((2, *grid)), "propagation")


@forms
def test_rectify_has_no_gradient(form):
    logits, feats, _ = inputs(form)
    leaves = [x.requires_grad_() for x in (logits, feats)]
    assert not DerivativeLabelPropagation(make(form)).rectify(*leaves, 0.5).requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_rectify_dtype_and_flat_inputs(dtype):
    logits, feats, _ = inputs("sum", dtype=dtype)
    out = DerivativeLabelPropagation().rectify(logits, feats, 0.5)
    assert out.dtype == dtype
    assert_close(out, rectified("sum", logits, feats, 0.5), "propagation")
    flat = DerivativeLabelPropagation().rectify(logits.flatten(2), feats.flatten(2), 0.5)
    assert_close(flat, rectified("sum", logits.flatten(2), feats.flatten(2), 0.5), "propagation")


def test_rectify_is_rounded_once_in_half_precision():
    # L' exceeds the range of float16 here; its softmax does not.
    logits, feats = (40 + torch.randn(1, 4, 60, 60)).half(), torch.rand(1, 32, 60, 60).half()
    module = DerivativeLabelPropagation(Linear(normalize="l2"))
    assert module(logits, feats).isinf().any()
    probabilities = module.rectify(logits, feats, 1.0)
    exact = module.rectify(logits.double(), feats.double(), 1.0)
    assert probabilities.dtype == torch.float16
    # float32 resolves L' near 1e5 to 0.01, and the softmax passes at most half of an error on.
    assert (probabilities.double() - exact).abs().max() < 0.02


# The Module, short names and a user's own affinity

WIDE = {"weights": [1.0, 0.5, 2.0], "scheme": "sum", "normalize": "l2", "similarity": "cosine"}


@pytest.mark.parametrize("affinity", [Linear(scale="mean", **WIDE), Softmax(chunk_size=3, backend="tiled", **WIDE)])
def test_module_is_the_function(affinity):
    logits, feats, target_feats = inputs("sum", (5, 4), (3, 2), (2, 2))
    mask = random_mask(2, 5, 4)
    form = "mean" if isinstance(affinity, Linear) else "softmax"
    for resolution in ("feats", "logits"):
        grids = {"resolution": resolution, "align_corners": False}
        out = DerivativeLabelPropagation(affinity, **grids)(logits, feats, target_feats, mask=mask)
        function = derivative_label_propagation(logits, feats, target_feats, mask=mask, affinity=affinity, **grids)
        assert torch.equal(out, function)
        assert_close(out, expected(form, logits, feats, target_feats, mask=mask, **grids, **WIDE), "propagation")


def test_names_are_affinities_with_their_defaults():
    logits, feats, _ = inputs("sum", (5, 4), (3, 2))
    sharp = {"normalize": None, "similarity": "cosine", "weights": (10.0, 10.0)}
    for name, affinity, form, options in (
        ("linear", Linear(), "sum", {}),
        ("softmax", Softmax(), "softmax", {}),
        ("attention", Softmax(over="sources", **sharp), "attention", sharp),
    ):
        module = DerivativeLabelPropagation(name)
        assert module.affinity == affinity
        assert_close(module(logits, feats), expected(form, logits, feats, **options), "propagation")
        assert torch.equal(derivative_label_propagation(logits, feats, affinity=name), module(logits, feats))
    assert DerivativeLabelPropagation().affinity == Linear()
    assert torch.equal(derivative_label_propagation(logits, feats), DerivativeLabelPropagation()(logits, feats))


NOT_DEFAULT = DerivativeLabelPropagation(
    Softmax(
        weights=(1.0, 0.5, 0.25),
        scheme="central",
        normalize="softmax",
        similarity="cosine",
        chunk_size=77,
        backend="tiled",
    ),
    resolution="logits",
    align_corners=False,
)


def test_repr_shows_the_options():
    assert repr(NOT_DEFAULT) == (
        "DerivativeLabelPropagation(Softmax(weights=(1.0, 0.5, 0.25), scheme='central', normalize='softmax', "
        "similarity='cosine', over='targets', radius=None, dilation=1, chunk_size=77, backend='tiled'), "
        "resolution='logits', align_corners=False)"
    )
    assert "scale='degree'" in repr(DerivativeLabelPropagation(Linear(scale="degree")))


def test_pickle_and_deepcopy():
    logits, feats, _ = inputs("sum", (5, 4), (3, 2), D=7)
    for clone in (pickle.loads(pickle.dumps(NOT_DEFAULT)), copy.deepcopy(NOT_DEFAULT)):
        assert repr(clone) == repr(NOT_DEFAULT)
        assert torch.equal(clone(logits, feats), NOT_DEFAULT(logits, feats))


def test_module_has_no_state():
    module = DerivativeLabelPropagation(Linear(weights=(1.0, 0.5)))
    assert module.state_dict() == {}
    assert not list(module.parameters())
    module.load_state_dict({}, strict=True)
    logits, feats, _ = inputs("sum")
    want = module(logits, feats)
    for moved in (module.half(), module.double(), module.eval(), module.train(), module.to("meta")):
        assert torch.equal(moved(logits, feats), want)


def nearest_mean(P, V, target_V=None, *, mask=None, resolution="feats", align_corners=True):
    """`NearestMean` by the book, one image at a time."""
    P, V = P.numpy(), V.numpy()
    W = V if target_V is None else target_V.numpy()
    out = []
    for n in range(len(P)):
        m = np.ones(P.shape[2:], dtype=bool) if mask is None else mask[n].numpy()
        grid = V.shape[2:]
        if resolution == "feats" and mask is None:
            shares = features.resize(P[n], grid, align_corners).reshape(P.shape[1], -1)
        else:
            U = features.resizing_matrix(grid, P.shape[2:], align_corners)
            shares = np.where(m, P[n], 0).reshape(P.shape[1], -1) @ U.T
        means = shares @ V[n].reshape(V.shape[1], -1).T / shares.sum(1, keepdims=True)
        points = W[n].reshape(W.shape[1], -1)
        distances = np.sqrt(((means[:, :, None] - points[None]) ** 2).sum(1))
        distances = -distances.reshape(P.shape[1], *W.shape[2:])
        out.append(features.resize(distances, P.shape[2:], align_corners) if W.shape == V.shape else distances)
    return np.stack(out)


@resolutions
def test_a_users_own_affinity(resolution):
    """At both resolutions, with masks, to other targets, and rectified; under torch.compile in its own file."""
    for align_corners in (True, False):
        module = DerivativeLabelPropagation(NearestMean(), resolution=resolution, align_corners=align_corners)
        for grid, target_grid, masked in itertools.product(((3, 4), (7, 6)), (None, (2, 5)), (False, True)):
            logits, feats, targets = inputs("sum", grid, (3, 4), target_grid)
            P = logits.softmax(1)
            mask = random_mask(2, *grid) if masked else None
            out = module(P, feats, targets, mask=mask)
            options = {"mask": mask, "resolution": resolution, "align_corners": align_corners}
            assert_close(out, nearest_mean(P, feats, targets, **options), "propagation")
            if targets is None:
                rectified = module.rectify(P, feats, 0.5, mask=mask)
                assert_close(rectified, ((P.softmax(1) + out.softmax(1)) / 2).numpy(), "propagation")


def test_a_users_own_affinity_is_short_and_learns():
    assert len(inspect.getsource(NearestMean).splitlines()) <= 15
    logits, feats, _ = inputs("sum", (5, 4), (3, 2), N=1)
    leaves = [x.requires_grad_() for x in (logits.softmax(1).detach(), feats)]
    mask = random_mask(2, 5, 4)[:1]
    module = DerivativeLabelPropagation(NearestMean())
    assert torch.autograd.gradcheck(lambda *x: module(*x, mask=mask), leaves)
    assert "NearestMean object" in repr(module)


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
