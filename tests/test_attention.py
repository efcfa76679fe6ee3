"""Softmax over the sources: every target averages them, each as often as it counts, and nothing else has a share."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from dlprop import DerivativeLabelPropagation, derivative_similarity
from dlprop.affinity import Pixels, Softmax

from .oracles import propagation as oracle
from .propagation_cases import case, expected, inputs, propagate, random_mask
from .strategies import seeds
from .tolerances import assert_close

F64, F32 = torch.float64, torch.float32
SIMILARITIES = ("dot", "cosine", "gaussian")
similarities = pytest.mark.parametrize("similarity", SIMILARITIES)
resolutions = pytest.mark.parametrize("resolution", ["feats", "logits"])


def of_pixels(V, L, W, counts=None, *, points_per_source=1.0, **options):
    """The affinity alone: features and logits of the sources, features of the targets, how often sources count."""
    sources = Pixels(V, L, counts, points_per_source=points_per_source)
    return Softmax(over="sources", **options).propagate(sources, Pixels(W, L.new_zeros(*L.shape[:2], 1)))


# Shares


@pytest.mark.parametrize("align_corners", [True, False])
@resolutions
@similarities
def test_shares_of_a_target_sum_to_one(similarity, resolution, align_corners):
    """What is the same at all sources stays, on every grid and with every mask."""
    options = {"similarity": similarity, "resolution": resolution, "align_corners": align_corners}
    for grid, target_grid, masked in itertools.product(((3, 2), (5, 4)), (None, (3, 2), (2, 4)), (False, True)):
        logits, feats, targets = inputs("attention", grid, (3, 2), target_grid)
        logits = logits[:, :, :1, :1].expand_as(logits)
        mask = random_mask(2, *grid) if masked else None
        out = propagate("attention", logits, feats, targets, mask=mask, weights=(5.0, 5.0), **options)
        assert_close(out, logits[:, :, :1, :1].expand_as(out).numpy(), "propagation")


@given(st.sampled_from(SIMILARITIES), st.sampled_from((0.1, 1.0, 30.0, 1000.0)), seeds)
def test_what_a_target_receives_lies_within_what_the_sources_have(similarity, scale, seed):
    """Probabilities stay probabilities."""
    torch.manual_seed(seed)
    logits, feats, targets = inputs("attention", (3, 3), None, (2, 5))
    mask = random_mask(2, 3, 3)
    P = logits.softmax(1)
    out = propagate("attention", P, feats, targets, mask=mask, similarity=similarity, weights=(scale, scale))
    assert_close(out.sum(1), torch.ones(2, 2, 5, dtype=F64), "propagation")
    left = P.masked_fill(~mask[:, None], torch.inf).amin((2, 3), keepdim=True)
    most = P.masked_fill(~mask[:, None], -torch.inf).amax((2, 3), keepdim=True)
    assert (out >= left - 1e-12).all()
    assert (out <= most + 1e-12).all()


@similarities
def test_the_sharpest_takes_the_most_similar_source(similarity):
    """Of every target, also where the mask leaves out a source more similar by far than any that it keeps."""
    logits, feats, targets = inputs("attention", (4, 5), None, (3, 3), D=8)
    options = {"similarity": similarity, "normalize": None}
    S = sum(torch.as_tensor(oracle_similarity(feats, targets, q, similarity)) for q in (0, 1))
    for mask in (None, random_mask(2, 4, 5)):
        kept = S if mask is None else S.masked_fill(~mask.flatten(1)[:, :, None], -torch.inf)
        nearest = logits.flatten(2).gather(2, kept.argmax(1)[:, None].expand(-1, 3, -1))
        for dtype, weight in ((F64, 1e5), (F32, 1e5)):
            out = propagate(
                "attention",
                *(x.to(dtype) for x in (logits, feats, targets)),
                mask=mask,
                weights=(weight, weight),
                **options,
            )
            assert_close(out.flatten(2), nearest.numpy(), "propagation")


def oracle_similarity(feats, targets, order, similarity):
    """The matrix of one order with weight 1 and no normalisation."""
    weights = (0.0,) * order + (1.0,)
    return oracle.batched(
        lambda V, W: oracle.affinity_matrix(V, W, weights, similarity=similarity), feats.flatten(2), targets.flatten(2)
    )


def test_a_pixel_keeps_its_own_where_nothing_else_is_as_similar():
    """Unit vectors: the cosine with itself is the largest of all."""
    logits, feats, _ = inputs("attention", (4, 5), D=8)
    out = propagate("attention", logits, feats, similarity="cosine", normalize=None, weights=(1e4, 1e4))
    assert_close(out, logits.numpy(), "propagation")


# Counts and masks


@similarities
def test_a_mask_is_the_same_as_those_sources_alone(similarity):
    """Values and gradients; image by image, for each has other sources, and another number of them."""
    options = {"similarity": similarity, "weights": (3.0, 2.0), "normalize": None}
    for grid, target_grid in itertools.product(((4, 5), (7, 6)), (None, (2, 3))):
        leaves = [x.requires_grad_() for x in inputs("attention", grid, (4, 5), target_grid, N=3) if x is not None]
        mask = random_mask(3, *grid)
        out = propagate("attention", *leaves, mask=mask, resolution="logits", **options)
        logits, feats, *targets = leaves
        if grid != (4, 5):
            feats = F.interpolate(feats, size=grid, mode="bilinear", align_corners=True)
        flat = [x.flatten(2) for x in (logits, feats, targets[0] if targets else feats)]
        alone = []
        for n in range(3):
            L, V, W = (x[n : n + 1] for x in flat)
            alone.append(propagate("attention", *(x[..., mask[n].flatten()] for x in (L, V)), W, **options))
        alone = torch.cat(alone).view_as(out)
        assert_close(out, alone.detach().numpy(), "propagation")
        grad = torch.randn_like(out)
        grads = (torch.autograd.grad(x, leaves, grad) for x in (out, alone))
        for a, b in zip(*grads, strict=True):
            assert_close(a, b.numpy(), "gradient")


@given(st.sampled_from(SIMILARITIES), st.lists(st.integers(0, 3), min_size=5, max_size=5), seeds)
def test_a_source_that_counts_twice_is_two_sources(similarity, times, seed):
    """Whole counts against sources repeated, or left out; the gradient of a source is then that of all its copies."""
    if not any(times):
        times[seed % 5] = 2
    generator = torch.Generator().manual_seed(seed)
    V, L, W = (torch.randn(1, k, m, generator=generator, dtype=F64) for k, m in ((4, 5), (2, 5), (4, 3)))
    options = {"similarity": similarity, "normalize": None}
    counts = torch.tensor(times, dtype=F64)
    grad = torch.randn(1, 2, 3, generator=generator, dtype=F64)
    found = []
    for repeated in (False, True):
        leaves = [x.clone().requires_grad_() for x in (V, L, W)]
        if repeated:
            copies = (x.repeat_interleave(counts.long(), dim=2) for x in leaves[:2])
            out = of_pixels(*copies, leaves[2], **options)
        else:
            out = of_pixels(*leaves, counts[None, None], **options)
        found.append((out, *torch.autograd.grad(out, leaves, grad)))
    for a, b, kind in zip(*found, ("propagation", *["gradient"] * 3), strict=True):
        assert_close(a, b.detach().numpy(), kind)


@similarities
def test_only_the_ratios_of_counts_matter(similarity):
    """Shares of a source count too; neither a common factor nor the number of points changes anything."""
    V, L, W = (torch.randn(2, k, m, dtype=F64) for k, m in ((4, 6), (3, 6), (4, 5)))
    counts = torch.rand(2, 1, 6, dtype=F64)
    counts[0, 0, 2] = 0
    out = of_pixels(V, L, W, counts, similarity=similarity)
    for factor, points_per_source in ((1e-9, 1.0), (1e9, 1.0), (1.0, 0.01), (3.0, 40.0)):
        other = of_pixels(V, L, W, factor * counts, points_per_source=points_per_source, similarity=similarity)
        assert_close(other, out.numpy(), "propagation")
    ones = of_pixels(V, L, W, torch.full_like(counts, 0.25), similarity=similarity)
    assert_close(ones, of_pixels(V, L, W, similarity=similarity).numpy(), "propagation")
    assert (of_pixels(V, L, W, torch.ones_like(counts), similarity=similarity) - out).abs().max() > 1e-3


@pytest.mark.parametrize("align_corners", [True, False])
def test_clicks_on_a_finer_grid_count_alike(align_corners):
    """Features that are all alike: every target has the mean of the clicks, wherever these lie between the points."""
    mask = torch.rand(2, 40, 31) < 0.02
    logits, feats = torch.randn(2, 3, 40, 31, dtype=F64), torch.ones(2, 4, 6, 5, dtype=F64)
    out = propagate("attention", logits, feats, mask=mask, align_corners=align_corners)
    mean = (logits * mask[:, None]).sum((2, 3)) / mask.sum((1, 2))[:, None]
    assert_close(out, mean[:, :, None, None].expand_as(out).numpy(), "propagation")


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize(("size", "points"), [(27, 9), (28, 4), (50, 10)])
def test_a_source_on_a_point_has_no_share_in_the_next(size, points, dtype):
    """Its weight there is 0 up to rounding; 1e-8 of a source would be one for whatever resembles that point."""
    logits, feats, _ = inputs("attention", (size, size), (points, points), N=1, D=16)
    mask = torch.zeros(1, size, size, dtype=torch.bool)
    stride = size / points
    on_points = [int((i + 0.5) * stride) for i in range(points)]
    rows, columns = torch.randint(points, (2, 6)).tolist()
    for y, x in zip(rows, columns, strict=True):
        mask[0, on_points[y], on_points[x]] = True
    options = {"similarity": "cosine", "normalize": None, "weights": (40.0, 40.0), "mask": mask, "align_corners": False}
    out = propagate("attention", logits.to(dtype), feats.to(dtype), **options)
    assert_close(out, expected("attention", logits, feats, **options), "propagation")


@similarities
def test_what_a_mask_leaves_out_has_no_influence(similarity):
    """Neither its logits nor its features, however large: value and gradient; its gradients are 0."""
    logits, feats, targets = inputs("attention", (4, 5), None, (3, 3))
    mask = random_mask(2, 4, 5)
    options = {"mask": mask, "similarity": similarity, "normalize": None}
    found = []
    for scale in (1.0, 300.0):
        leaves = [torch.where(mask[:, None], x, scale * x).requires_grad_() for x in (logits, feats)]
        leaves.append(targets.clone().requires_grad_())
        out = propagate("attention", *leaves, **options)
        grads = torch.autograd.grad(out, leaves, torch.ones_like(out) + out.detach())
        assert (grads[0][~mask[:, None].expand_as(logits)] == 0).all()
        if similarity != "gaussian":  # there the features are taken from their mean, whose gradients cancel
            assert (grads[1][~mask[:, None].expand_as(feats)] == 0).all()
        found.append((out, *grads))
    for a, b, kind in zip(*found, ("propagation", *["gradient"] * 3), strict=True):
        assert_close(a, b.detach().numpy(), kind)


class Keys(TorchDispatchMode):
    """Notes how many sources reach the op of the library."""

    def __init__(self):
        super().__init__()
        self.sources = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "dlprop":
            self.sources.append(args[2].shape[1])
        return func(*args, **(kwargs or {}))


def test_sources_that_a_mask_leaves_out_cost_nothing():
    """7 and 3 clicks of 1200 pixels in a batch are 7 sources; on a coarser grid the points beside them, not all."""
    logits, feats, _ = inputs("attention", (30, 40))
    mask = torch.zeros(2, 30, 40, dtype=torch.bool)
    mask.view(2, -1)[0, torch.randperm(1200)[:7]] = True
    mask.view(2, -1)[1, torch.randperm(1200)[:3]] = True
    with Keys() as keys:
        out = propagate("attention", logits, feats, mask=mask)
        propagate("attention", logits, feats[:, :, ::2, ::2], mask=mask, resolution="logits")
        propagate("attention", logits, feats[:, :, ::2, ::2], mask=mask)
        propagate("attention", logits, feats)
    assert keys.sources[:2] == [7, 7]
    assert 7 <= keys.sources[2] <= 4 * 7
    assert keys.sources[3] == 1200
    assert_close(out[1:], expected("attention", logits[1:], feats[1:], mask=mask[1:]), "propagation")


# Against torch's own attention


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("masked", [False, True])
def test_one_order_is_scaled_dot_product_attention(masked, dtype):
    """Values and gradients: targets are queries, sources keys, logits values."""
    leaves = inputs("attention", (5, 7), None, (6, 3), D=16, C=4, dtype=dtype)
    leaves = [x.requires_grad_() for x in leaves]
    logits, feats, targets = (x.flatten(2) for x in leaves)
    mask = random_mask(2, 5, 7) if masked else None
    out = propagate("attention", *leaves, mask=mask, weights=(0.25,), normalize=None)
    attended = F.scaled_dot_product_attention(
        targets.mT, feats.mT, logits.mT, mask.flatten(1)[:, None] if masked else None, scale=0.25
    ).mT
    assert_close(out.flatten(2), attended.detach().double().numpy(), "propagation")
    grad = torch.randn_like(attended)
    grads = torch.autograd.grad(out.flatten(2), leaves, grad), torch.autograd.grad(attended, leaves, grad)
    for a, b in zip(*grads, strict=True):
        assert_close(a, b.double().numpy(), "gradient")


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_all_orders_are_the_softmax_of_the_summed_similarities(similarity):
    """What `derivative_similarity` shows, column by column."""
    logits, feats, targets = inputs("attention", (4, 4), None, (3, 5))
    weights, options = (2.0, 0.5, 1.5), {"similarity": similarity, "normalize": "l2", "scheme": "central"}
    logits, feats, targets = (x.flatten(2) for x in (logits, feats, targets))
    S = sum(w * derivative_similarity(feats, targets, order=q, **options) for q, w in enumerate(weights))
    out = propagate("attention", logits, feats, targets, weights=weights, **options)
    assert_close(out, (logits @ S.softmax(1)).numpy(), "propagation")


def test_the_gaussian_is_a_kernel_density():
    """`sum_i k(i, j) L_i / sum_i k(i, j)` with the product over the orders of what `derivative_similarity` shows."""
    logits, feats, targets = (x.flatten(2) for x in inputs("attention", (4, 4), None, (3, 5)))
    options = {"similarity": "gaussian", "normalize": None}
    k = derivative_similarity(feats, targets, order=0, **options) * derivative_similarity(feats, targets, **options)
    out = propagate("attention", logits, feats, targets, **options)
    assert_close(out, (logits @ k / k.sum(1, keepdim=True)).numpy(), "propagation")


def test_cross_image_videos_need_no_grid_in_common():
    """A memory of two frames, side by side as flat sources, to a third of another size."""
    frames = [inputs("attention", (4, 5))[:2] for _ in range(2)]
    memory = [torch.cat([frame[k].flatten(2) for frame in frames], dim=2) for k in (0, 1)]
    target = torch.randn(2, 5, 18, dtype=F64)
    module = DerivativeLabelPropagation("attention")
    options = {"similarity": "cosine", "weights": (10.0, 10.0), "normalize": None}
    assert_close(module(*memory, target), expected("attention", *memory, target, **options), "propagation")


# What is not finite, and what is not there


@similarities
def test_nan_of_a_target_is_its_own_and_of_a_source_everybodys(similarity):
    options = {"similarity": similarity, "normalize": None, "chunk_size": 3}
    logits, feats, targets = inputs("attention", (3, 4), None, (2, 5))
    bad = targets.clone()
    bad[0, 2, 1, 1] = torch.nan
    out = propagate("attention", logits, feats, bad, **options)
    assert torch.equal(out.isnan().any(1), bad.isnan().any(1))
    bad = feats.clone()
    bad[0, 2, 1, 1] = torch.nan
    out = propagate("attention", logits, bad, targets, **options)
    assert out[0].isnan().all()
    assert out[1].isfinite().all()
    # The gradient of the other image is a gradient as ever.
    leaf = bad.clone().requires_grad_()
    propagate("attention", logits, leaf, targets, **options)[1].sum().backward()
    assert leaf.grad[1].isfinite().all()


@pytest.mark.parametrize("dtype", [F64, F32, torch.float16])
@similarities
def test_an_image_without_a_source_gives_zeros_and_no_gradient(similarity, dtype):
    logits, feats, targets = inputs("attention", (3, 4), None, (2, 5), dtype=dtype)
    mask = torch.zeros(2, 3, 4, dtype=torch.bool)
    mask[0, 1, 1] = True
    for own in (False, True):
        leaves = [x.clone().requires_grad_() for x in ((logits, feats) if own else (logits, feats, targets))]
        out = propagate("attention", *leaves, mask=mask, similarity=similarity)
        assert (out[1] == 0).all()
        # The other image has one source: every target has its logits, whatever its features.
        with case(similarity=similarity, own=own):
            assert_close(out[0], logits[0, :, 1:2, 1:2].expand_as(out[0]).double().numpy(), "propagation")
        out.backward(torch.randn_like(out))
        for leaf in leaves:
            assert leaf.grad.isfinite().all()
            assert (leaf.grad[1] == 0).all()
