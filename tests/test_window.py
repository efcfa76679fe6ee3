"""Windows: every target averages the sources around it, against the oracle, all pairs at once, and unfold."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from dlprop import DerivativeLabelPropagation
from dlprop._kernels import window as kernels
from dlprop._kernels.compared import Compared, Needed
from dlprop.affinity import Pixels, Softmax

from .oracles import features
from .oracles import propagation as oracle
from .propagation_cases import case, dense, expected, inputs, propagate, random_mask
from .strategies import seeds
from .tolerances import assert_close

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
SIMILARITIES = ("dot", "cosine", "gaussian")
similarities = pytest.mark.parametrize("similarity", SIMILARITIES)
resolutions = pytest.mark.parametrize("resolution", ["feats", "logits"])
WINDOWS = [(1, 1), (2, 1), (1, 2), (2, (1, 3)), (1, (4, 1, 2)), (6, 1)]


def inside(grid, radius, dilation=1):
    """Which source (row) is in the window of which target (column)."""
    return torch.from_numpy(oracle.window(grid, radius, dilation))


def windowed(*tensors, radius=1, dilation=1, **options):
    return propagate("attention", *tensors, radius=radius, dilation=dilation, **options)


def wanted(*tensors, radius=1, dilation=1, **options):
    return expected("attention", *tensors, radius=radius, dilation=dilation, **options)


# Against the oracle


@pytest.mark.parametrize("align_corners", [True, False])
@resolutions
@pytest.mark.parametrize("normalize", features.NORMALIZATIONS)
@similarities
def test_every_combination(similarity, normalize, resolution, align_corners):
    """Masked or not, own or another frame's targets, up, down and across, in two precisions."""
    options = {
        "similarity": similarity,
        "normalize": normalize,
        "resolution": resolution,
        "align_corners": align_corners,
        "dilation": (1, 2),
    }
    grids = {"same": ((3, 5), (3, 5)), "up": ((7, 5), (3, 4)), "across": ((6, 1), (2, 3))}
    for (name, (grid, feats_grid)), other_frame, masked in itertools.product(
        grids.items(), (False, True), (False, True)
    ):
        logits, feats, targets = inputs("attention", grid, feats_grid, feats_grid if other_frame else None)
        mask = random_mask(2, *grid) if masked else None
        want = wanted(logits, feats, targets, mask=mask, **options)
        for dtype in (F64, F32):
            with case(grids=name, other_frame=other_frame, masked=masked, dtype=dtype):
                tensors = (None if x is None else x.to(dtype) for x in (logits, feats, targets))
                out = windowed(*tensors, mask=mask, **options)
                assert out.dtype == dtype
                assert_close(out, want, "propagation")


@pytest.mark.parametrize("masked", [False, True])
def test_targets_of_the_grid_that_the_sources_are_brought_to(masked):
    """Sources upsampled to their logits, and the features of another frame on that grid already."""
    logits, feats, targets = inputs("attention", (6, 8), (3, 4), (6, 8))
    options = {"mask": random_mask(2, 6, 8) if masked else None, "resolution": "logits"}
    assert_close(windowed(logits, feats, targets, **options), wanted(logits, feats, targets, **options), "propagation")


@pytest.mark.parametrize(("radius", "dilation"), WINDOWS)
@pytest.mark.parametrize("grid", [(1, 1), (1, 7), (6, 1), (3, 3), (5, 8)])
def test_every_window_on_every_grid(grid, radius, dilation):
    """Windows that reach beyond the border, beyond it on both sides, and past the whole image."""
    logits, feats, targets = inputs("attention", grid, None, grid)
    options = {"radius": radius, "dilation": dilation, "weights": (3.0, 1.0)}
    for W, mask in itertools.product((None, targets), (None, random_mask(2, *grid))):
        out = windowed(logits, feats, W, mask=mask, **options)
        assert_close(out, wanted(logits, feats, W, mask=mask, **options), "propagation")


@pytest.mark.parametrize("scheme", features.SCHEMES)
@similarities
def test_schemes_orders_and_weights(similarity, scheme):
    for weights in ((2.0,), (0.0, 3.0), (1.0, 0.5, 0.25)):
        logits, feats, _ = inputs("attention", (4, 5), D=(len(weights) - 1) * features.STEP[scheme] + 2)
        options = {"similarity": similarity, "scheme": scheme, "weights": weights, "normalize": "l2"}
        assert_close(windowed(logits, feats, **options), wanted(logits, feats, **options), "propagation")


@pytest.mark.parametrize("dtype", [F16, BF16, F32, F64])
@resolutions
@similarities
def test_dtypes(similarity, resolution, dtype, device):
    """Half-precision inputs are averaged in float32: values carry one rounding, gradients those of the table."""
    options = {"similarity": similarity, "resolution": resolution, "dilation": (1, 3)}
    logits, feats, targets = inputs("attention", (7, 9), (4, 5), (4, 5), D=16, dtype=dtype)
    mask = random_mask(2, 7, 9)
    grad = torch.randn(2, 3, 7, 9).to(dtype)
    for W, m in ((None, mask), (targets, None)):
        leaves = [x.to(device).detach().requires_grad_() for x in (logits, feats, W) if x is not None]
        out = windowed(*leaves, mask=None if m is None else m.to(device), **options)
        assert out.dtype == dtype
        assert_close(out, wanted(logits, feats, W, mask=m, **options), "propagation")
        grads = torch.autograd.grad(out, leaves, grad.to(device))
        doubles = [x.detach().cpu().double().requires_grad_() for x in leaves]
        exact = torch.autograd.grad(windowed(*doubles, mask=m, **options), doubles, grad.double())
        for a, b in zip(grads, exact, strict=True):
            assert a.dtype == dtype
            assert_close(a, b.numpy(), "gradient")


@pytest.mark.parametrize("dtype", [BF16, F16])
@similarities
def test_autocast(similarity, dtype):
    logits, feats, targets = inputs("attention", (5, 6), None, (5, 6), D=16, dtype=F32)
    with torch.autocast("cpu", dtype=dtype):
        out = windowed(logits, feats, targets, similarity=similarity)
        mixed = windowed(logits.to(dtype), feats, targets, similarity=similarity)
    assert out.dtype == F32
    assert mixed.dtype == dtype
    want = wanted(logits, feats, targets, similarity=similarity)
    assert_close(out, want, "autocast", dtype)
    assert_close(mixed, want, "autocast", dtype)


# What a window is


@similarities
def test_as_large_as_the_image_it_is_none(similarity):
    """Values and gradients, with a mask and another frame; a radius of one less is another thing."""
    tensors = inputs("attention", (4, 6), None, (4, 6))
    mask = random_mask(2, 4, 6)
    options = {"similarity": similarity, "mask": mask, "weights": (3.0, 2.0), "normalize": "l2"}
    leaves = [x.requires_grad_() for x in tensors]
    every = propagate("attention", *leaves, **options)
    grad = torch.randn_like(every)
    grads = torch.autograd.grad(every, leaves, grad)
    for radius in (5, 6, 8):
        out = windowed(*leaves, radius=radius, **options)
        assert_close(out, every.detach().numpy(), "propagation")
        for a, b in zip(torch.autograd.grad(out, leaves, grad), grads, strict=True):
            assert_close(a, b.numpy(), "gradient")
    assert (windowed(*leaves, radius=4, **options) - every).abs().max() > 1e-3


def test_dilations_are_united():
    """Each offset counts once, however many dilations share it, in whatever order they are given."""
    logits, feats, _ = inputs("attention", (9, 10))
    one = windowed(logits, feats, radius=1)
    for dilation in ([1], (1, 1), [1, 1, 1]):
        assert torch.equal(windowed(logits, feats, radius=1, dilation=dilation), one)
    several = windowed(logits, feats, radius=2, dilation=(1, 2, 4))
    for dilation in itertools.permutations([1, 2, 4]):
        assert_close(windowed(logits, feats, radius=2, dilation=dilation), several.numpy(), "propagation")
    # All offsets of radius 2 at dilation 1 and 2 that a radius of 4 at dilation 1 has too, and no others.
    alike = torch.ones_like(feats)
    counts = windowed(torch.eye(90, dtype=F64).view(1, 90, 9, 10), alike[:1], radius=2, dilation=(1, 2))
    window = inside((9, 10), 2, (1, 2)).double()
    assert window[:, 44].sum() == 25 + 16
    assert_close(counts.flatten(2)[0], (window / window.sum(0)).numpy(), "propagation")


def test_the_window_of_alike_features_is_a_mean_filter():
    """Of the sources that exist: four at a corner, six at an edge, nine inside."""
    logits, feats = torch.randn(2, 3, 6, 7, dtype=F64), torch.ones(2, 4, 6, 7, dtype=F64)
    mean = F.avg_pool2d(logits, 3, stride=1, padding=1, count_include_pad=False)
    assert_close(windowed(logits, feats), mean.numpy(), "propagation")


@pytest.mark.parametrize(("radius", "dilation"), [(1, 1), (2, 1), (1, 3)])
@pytest.mark.parametrize("masked", [False, True])
def test_against_unfold(masked, radius, dilation):
    """The formulation that people use: k copies of everything; values and gradients."""
    leaves = [x.requires_grad_() for x in inputs("attention", (6, 5), None, (6, 5), D=4)]
    mask = random_mask(2, 6, 5) if masked else None
    options = {"radius": radius, "dilation": dilation, "weights": (1.5,), "normalize": None}

    def unfold(x):
        padding, size = radius * dilation, 2 * radius + 1
        return F.unfold(x, size, padding=padding, dilation=dilation).unflatten(1, (x.shape[1], -1))  # (N, D, k, M)

    logits, feats, targets = leaves
    exists = torch.ones(2, 1, 6, 5, dtype=F64) if mask is None else mask[:, None].double()
    S = 1.5 * (unfold(feats) * targets.flatten(2)[:, :, None]).sum(1)
    S = S.masked_fill(unfold(exists)[:, 0] == 0, -torch.inf)
    nothing = S.isneginf().all(1, keepdim=True)
    shares = S.masked_fill(nothing, 0).softmax(1).masked_fill(nothing, 0)
    unfolded = (unfold(logits) * shares[:, None]).sum(2).view(2, 3, 6, 5)
    out = windowed(*leaves, mask=mask, **options)
    assert_close(out, unfolded.detach().numpy(), "propagation")
    grad = torch.randn_like(out)
    grads = (torch.autograd.grad(x, leaves, grad) for x in (out, unfolded))
    for a, b in zip(*grads, strict=True):
        assert_close(a, b.numpy(), "gradient")


@given(st.sampled_from(SIMILARITIES), st.integers(1, 3), st.sampled_from([1, 2, (1, 3)]), seeds)
def test_only_targets_near_a_source_see_it(similarity, radius, dilation, seed):
    """Its logits and its features: changed, they change the targets whose window they are in, and no others."""
    torch.manual_seed(seed)
    grid = (5, 6)
    logits, feats, targets = inputs("attention", grid, None, grid, N=1)
    at = int(torch.randint(30, ()))
    near = inside(grid, radius, dilation)[at].view(grid)
    options = {"radius": radius, "dilation": dilation, "similarity": similarity, "normalize": "l2"}
    out = windowed(logits, feats, targets, **options)
    for changed in (0, 1):
        tensors = [logits.clone(), feats.clone(), targets]
        tensors[changed].view(1, -1, 30)[:, :, at] += torch.randn(tensors[changed].shape[1])
        moved = (windowed(*tensors, **options) - out).abs().amax((0, 1))
        assert (moved[near] > 1e-9).any()
        assert moved.masked_fill(near, 0).max() <= 1e-13


@resolutions
@similarities
def test_shares_of_a_target_sum_to_one(similarity, resolution):
    """What is the same at all sources stays, at the border too, wherever there is a source in the window."""
    for grid in ((4, 5), (7, 6)):
        logits, feats, _ = inputs("attention", grid, (4, 5))
        ones = torch.ones_like(logits)
        out = windowed(ones, feats, similarity=similarity, resolution=resolution, dilation=(1, 2), weights=(9.0, 4.0))
        assert_close(out, np.ones(out.shape), "propagation")
    mask = random_mask(2, 4, 5)
    out = windowed(ones[..., :4, :5], feats, similarity=similarity, mask=mask)
    reached = F.max_pool2d(mask[:, None].double(), 3, stride=1, padding=1)
    assert_close(out, reached.expand_as(out).numpy(), "propagation")


@pytest.mark.parametrize("dtype", [F64, F32, F16])
@similarities
def test_a_window_without_a_source_gives_zeros_and_no_gradient(similarity, dtype):
    """Also a whole image without one. One source far away: its window has its logits, the rest nothing."""
    logits, feats, targets = inputs("attention", (5, 6), None, (5, 6), dtype=dtype)
    mask = torch.zeros(2, 5, 6, dtype=torch.bool)
    mask[0, 0, 1] = True
    leaves = [x.requires_grad_() for x in (logits, feats, targets)]
    out = windowed(*leaves, mask=mask, similarity=similarity)
    want = torch.zeros_like(out)
    want[0, :, :2, :3] = logits[0, :, :1, 1:2]
    assert_close(out, want.detach().double().numpy(), "propagation")
    out.backward(torch.randn_like(out))
    for leaf in leaves:
        assert leaf.grad.isfinite().all()
        assert (leaf.grad[1] == 0).all()
    assert (leaves[0].grad[0, :, 0, 1] != 0).all()


@similarities
def test_what_a_mask_leaves_out_has_no_influence(similarity):
    """However large and near."""
    logits, feats, targets = inputs("attention", (4, 5), None, (4, 5))
    mask = random_mask(2, 4, 5)
    found = []
    for scale in (1.0, 300.0):
        loud = (torch.where(mask[:, None], x, scale * x) for x in (logits, feats))
        found.append(windowed(*loud, targets, mask=mask, similarity=similarity, normalize=None))
    assert_close(found[1], found[0].numpy(), "propagation")


@similarities
def test_counts_weight_the_sources_of_a_window(similarity):
    """Sources of a finer grid, brought to the points: fractions, against all pairs at once."""
    V, W = torch.randn(2, 4, 12, dtype=F64), torch.randn(2, 4, 12, dtype=F64)
    L, counts = torch.randn(2, 3, 12, dtype=F64), torch.rand(2, 1, 12, dtype=F64)
    counts[0, 0, 5:8] = 0
    options = {"similarity": similarity, "normalize": None}
    for factor, points_per_source in ((1.0, 1.0), (1e9, 0.01)):
        sources = Pixels(V, L, factor * counts, grid=(3, 4), points_per_source=points_per_source)
        targets = Pixels(W, torch.zeros(2, 3, 1, dtype=F64), grid=(3, 4))
        out = Softmax(over="sources", radius=1, **options).propagate(sources, targets)
        want = dense(L, V, W, counts[:, 0], inside((3, 4), 1), over="sources", **options)
        assert_close(out, want.numpy(), "propagation")


# Numbers at their limits


@pytest.mark.parametrize("scale", [1e-3, 30.0, 3000.0])
def test_sharp_and_flat_similarities(scale):
    """Similarities far beyond what exp can hold, in either precision."""
    logits, feats, _ = inputs("attention", (4, 5), D=6)
    for similarity, normalize, masked in itertools.product(SIMILARITIES, features.NORMALIZATIONS, (False, True)):
        options = {"weights": (scale, scale), "similarity": similarity, "normalize": normalize, "dilation": (1, 2)}
        mask = random_mask(2, 4, 5) if masked else None
        with case(**options):
            leaves = [x.clone().requires_grad_() for x in (logits, feats)]
            out = windowed(*leaves, mask=mask, **options)
            assert_close(out, wanted(logits, feats, mask=mask, **options), "sharp")
            assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), leaves))
            assert windowed(logits.float(), feats.float(), mask=mask, **options).isfinite().all()


def test_gaussian_does_not_see_a_large_common_shift():
    logits, feats, targets = inputs("attention", (4, 5), None, (4, 5), dtype=F32)
    shift = 1000 * torch.randn(1, 5, 1, 1)
    options = {"similarity": "gaussian", "normalize": None}
    for W in (None, targets + shift):
        out = windowed(logits, feats + shift, W, **options)
        assert_close(out, wanted(logits, feats + shift, W, **options), "large mean")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("normalize", ["l1", "softmax"])
@similarities
def test_what_is_not_finite_shows_where_it_reaches(similarity, normalize, value):
    """Features of a source in its window at least, of a target at that target, logits in their window only."""
    grid = (5, 6)
    options = {"similarity": similarity, "normalize": normalize}
    tensors = inputs("attention", grid, None, grid)
    near = inside(grid, 1)[13].view(grid)
    for position in range(3):
        bad = [x.clone() for x in tensors]
        bad[position].view(2, -1, 30)[0, 1, 13] = value
        out = windowed(*bad, **options)
        assert out[1].isfinite().all()
        reached = ~out[0].isfinite()
        if position == 0:
            assert torch.equal(reached[1], near)
            assert not reached[[0, 2]].any()
        elif position == 1:
            assert reached[:, near].all()
            if similarity != "gaussian":  # whose origin is the mean of the sources
                assert not reached[:, ~near].any()
        else:
            assert torch.equal(reached, (torch.arange(30) == 13).view(1, *grid).expand(3, -1, -1))


@pytest.mark.parametrize("mask", [None, torch.ones(1, 4, 5, dtype=torch.bool)], ids=["no mask", "mask"])
def test_a_window_of_minus_infinity_is_no_window_without_sources(mask):
    """Products that overflow show as NaN; a pixel is 0 only where a mask leaves all its sources out."""
    sources, targets = torch.full((1, 2, 4, 5), 1e30), torch.full((1, 2, 4, 5), -1e30)
    propagate = DerivativeLabelPropagation(Softmax(over="sources", radius=1, weights=(1.0,), normalize=None))
    assert propagate(torch.randn(1, 3, 4, 5), sources, targets, mask=mask).isnan().all()


@similarities
def test_smallest_shapes(similarity):
    """No image, one pixel, one class, the fewest channels, a zero vector."""
    logits, feats, targets = inputs("attention", (5, 4), (3, 2), (3, 2), N=0)
    leaves = [x.requires_grad_() for x in (logits, feats, targets)]
    for resolution in ("feats", "logits"):
        out = windowed(*leaves, similarity=similarity, resolution=resolution)
        assert out.shape == (0, 3, 5, 4)
        out.sum().backward()
    assert leaves[1].grad.shape == (0, 5, 3, 2)
    one = torch.tensor([[[[3.0]]]], dtype=F64)
    feats = torch.tensor([[[[1.0]], [[3.0]]]], dtype=F64)
    assert_close(windowed(one, feats, similarity=similarity, radius=3), one.numpy(), "propagation")
    logits, feats, _ = inputs("attention", (3, 4), D=2, C=1)
    feats[:, :, 1, 1] = 0
    leaves = [x.requires_grad_() for x in (logits, feats)]
    out = windowed(*leaves, similarity=similarity)
    assert_close(out, wanted(*leaves, similarity=similarity), "propagation")
    out.backward(torch.randn_like(out))
    assert (leaves[1].grad[:, :, 1, 1] == 0).all()
    assert leaves[1].grad.isfinite().all()


# Gradients


@pytest.mark.parametrize(("radius", "dilation"), WINDOWS[:4])
@similarities
def test_gradients_of_all_pairs_at_once(similarity, radius, dilation):
    """With a mask; sources and targets the same, and not; in bands of one row, of some, and of all."""
    grid = (5, 4)
    tensors = inputs("attention", grid, None, grid)
    mask = random_mask(2, *grid)
    window = inside(grid, radius, dilation)
    options = {"similarity": similarity, "weights": (2.0, 1.0), "normalize": "l2"}
    for cross in (False, True):
        leaves = [x.clone().requires_grad_() for x in tensors[: 3 if cross else 2]]
        flat = [x.flatten(2) for x in leaves]
        if not cross:
            flat.append(None)
        counts = mask.flatten(1).double()
        whole = dense(*flat, counts, window, over="sources", **options)
        out = windowed(*leaves, mask=mask, radius=radius, dilation=dilation, **options)
        assert_close(out.flatten(2), whole.detach().numpy(), "propagation")
        grad = torch.randn_like(out)
        grads = torch.autograd.grad(out, leaves, grad), torch.autograd.grad(whole, leaves, grad.flatten(2))
        for a, b in zip(*grads, strict=True):
            assert_close(a, b.numpy(), "gradient")


@pytest.mark.parametrize("budget", [1, 700, 2000, 1 << 30])
def test_bands_meet_at_their_edges(budget, monkeypatch):
    """However many rows the budget lets a band have: the same values and gradients."""
    leaves = [x.requires_grad_() for x in inputs("attention", (11, 4), None, (11, 4))]
    options = {"radius": 2, "dilation": (1, 3), "mask": random_mask(2, 11, 4), "similarity": "gaussian"}
    whole = windowed(*leaves, **options)
    grad = torch.randn_like(whole)
    wanted_grads = torch.autograd.grad(whole, leaves, grad)
    monkeypatch.setattr(kernels, "CPU_BAND_BYTES", budget)
    out = windowed(*leaves, **options)
    assert_close(out, whole.detach().numpy(), "propagation")
    for a, b in zip(torch.autograd.grad(out, leaves, grad), wanted_grads, strict=True):
        assert_close(a, b.numpy(), "gradient")


@pytest.mark.parametrize("cross", [False, True])
@resolutions
@similarities
def test_gradcheck(similarity, resolution, cross):
    """In float64, resized, with a mask, along random directions."""
    for grid, feats_grid in (((3, 4), (2, 3)), ((2, 3), (2, 3))):
        tensors = inputs("attention", grid, feats_grid, feats_grid if cross else None, N=1, C=2, D=3)
        tensors = [x.requires_grad_() for x in tensors if x is not None]
        mask = torch.ones(1, *grid, dtype=torch.bool)
        mask[0, 0, 1] = False
        options = {"similarity": similarity, "resolution": resolution, "mask": mask}
        assert torch.autograd.gradcheck(lambda *x, o=options: windowed(*x, **o), tensors, fast_mode=True)


@similarities
def test_repeated_backward_is_exact_and_inputs_are_left_alone(similarity):
    tensors = inputs("attention", (5, 4), (3, 2), (3, 2))
    leaves = [x.clone().requires_grad_() for x in tensors]
    mask = random_mask(2, 5, 4)
    out = windowed(*leaves, mask=mask, similarity=similarity)
    grad = torch.randn_like(out)
    first, again = (torch.autograd.grad(out, leaves, grad, retain_graph=True) for _ in range(2))
    doubled = torch.autograd.grad(out, leaves, 2 * grad)
    for a, b, c in zip(first, again, doubled, strict=True):
        assert torch.equal(a, b)
        assert_close(c, 2 * a.numpy(), "gradient")
    assert all(torch.equal(a, b) for a, b in zip(leaves, tensors, strict=True))


def test_only_what_requires_grad_receives_it():
    for needed in itertools.product([False, True], repeat=3):
        tensors = inputs("attention", (3, 4), None, (3, 4))
        together = [x.clone().requires_grad_() for x in tensors]
        grad = torch.randn(2, 3, 3, 4, dtype=F64)
        all_of_them = torch.autograd.grad(windowed(*together, similarity="gaussian"), together, grad)
        leaves = [x.requires_grad_(w) for x, w in zip(tensors, needed, strict=True)]
        out = windowed(*leaves, similarity="gaussian")
        assert out.requires_grad == any(needed)
        if any(needed):
            out.backward(grad)
        assert [x.grad is not None for x in leaves] == list(needed)
        for leaf, want in zip(leaves, all_of_them, strict=True):
            if leaf.grad is not None:
                assert_close(leaf.grad, want.numpy(), "gradient")


def test_it_cannot_be_differentiated_twice():
    leaves = [x.requires_grad_() for x in inputs("attention", (3, 4), None, (3, 4))]
    for first, second in itertools.product(leaves, repeat=2):
        out = windowed(*leaves)
        (grad,) = torch.autograd.grad((out**2).sum(), first, create_graph=True)
        with pytest.raises(RuntimeError, match=r"dlprop: .*cannot be differentiated twice"):
            torch.autograd.grad((grad**2).sum(), second)


def strided(x):
    """The same values in other memory layouts, of which one has strides of zero."""
    yield x.to(memory_format=torch.channels_last)
    yield x.transpose(1, 3).contiguous().transpose(1, 3)
    yield F.pad(x, (3, 2, 1, 4))[..., 1:-4, 3:-2]
    yield x[:1].expand_as(x)


@pytest.mark.parametrize("masked", [False, True])
def test_strides_do_not_matter(masked):
    tensors = inputs("attention", (4, 5), None, (4, 5))
    mask = random_mask(2, 4, 5) if masked else None
    for views in zip(*(strided(x) for x in tensors), strict=True):
        found = []
        for copies in (views, [v.contiguous() for v in views]):
            leaves = [v.detach().requires_grad_() for v in copies]
            out = windowed(*leaves, mask=mask, dilation=(1, 2))
            found.append((out, *torch.autograd.grad(out, leaves, torch.ones_like(out) + out.detach())))
        for a, b, kind in zip(*found, ("propagation", *["gradient"] * 3), strict=True):
            assert_close(a, b.detach().numpy(), kind)


def test_images_of_a_batch_do_not_meet():
    logits, feats, targets = inputs("attention", (5, 4), (3, 4), (3, 4), N=3)
    mask = random_mask(3, 5, 4)
    out = windowed(logits, feats, targets, mask=mask)
    for n in range(3):
        alone = windowed(*(x[n : n + 1] for x in (logits, feats, targets)), mask=mask[n : n + 1])
        assert_close(out[n : n + 1], alone.numpy(), "propagation")


# What it costs, and several steps


class Largest(TorchDispatchMode):
    """The most numbers that any one tensor made has."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = out if isinstance(out, (tuple, list)) else (out,)
        sizes = (x.untyped_storage().nbytes() // x.element_size() for x in made if isinstance(x, torch.Tensor))
        self.numbers = max(self.numbers, *sizes, 0)
        return out


def test_nothing_is_larger_than_the_image(monkeypatch):
    """O(M C), forward and backward: of radius 3 the neighbours of the image take 49 times its size."""
    monkeypatch.setattr(kernels, "CPU_BAND_BYTES", (512 << 10) // torch.get_num_threads())
    logits, queries, keys, grad = (torch.randn(1, k, 200, 300) for k in (6, 4, 4, 6))
    compared = Compared(queries, keys, torch.randn(1, 1, 200, 300))
    offsets = [step for offset in itertools.product(range(-3, 4), repeat=2) for step in offset]
    with Largest() as largest:
        out, lse = kernels.window_affinity(logits, compared, offsets)
        kernels.window_affinity_backward(grad, logits, compared, out, lse, offsets, Needed(True, True, True))
    assert largest.numbers == logits.numel()


def test_several_steps_refine_a_prediction_on_the_image():
    """Pixel-adaptive refinement: ten steps of probabilities, a noisy edge becomes that of the image."""
    image = torch.zeros(1, 3, 12, 16, dtype=F64)
    image[..., 8:] = 1.0
    truth = (image[:, :1] > 0.5).double()
    P = torch.cat((1 - truth, truth), dim=1)
    P = 0.75 * P + 0.25 * torch.rand(1, 2, 12, 16, dtype=F64)
    P[..., 7] = P[..., 7].flip(1)  # a column on the wrong side
    P = P / P.sum(1, keepdim=True)
    options = {"over": "sources", "radius": 1, "dilation": (1, 2, 4), "similarity": "gaussian", "normalize": None}
    module = DerivativeLabelPropagation(Softmax(weights=(50.0,), **options))
    for _ in range(10):
        P = module(P, image)
    assert_close(P.sum(1), np.ones((1, 12, 16)), "propagation")
    assert torch.equal(P.argmax(1), truth[:, 0].long())


def test_a_radius_beyond_the_image_lists_no_offsets_beyond_it():
    """All offsets of this radius would not fit any memory."""
    logits, feats = torch.randn(1, 2, 3, 4), torch.randn(1, 3, 3, 4)
    wide, whole = (
        DerivativeLabelPropagation(Softmax(over="sources", radius=radius))(logits, feats) for radius in (10**6, 3)
    )
    assert torch.equal(wide, whole)
