"""Class statistics: against sums pixel by pixel, in blocks, merged, stored, moved and reduced over processes."""

import copy
import io
import itertools
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from dlprop import statistics
from dlprop._kernels import moments as kernel
from dlprop.features import Pixels, Upsampling
from dlprop.propagation import derivative_label_propagation
from dlprop.statistics import ClassStatistics, image_statistics

from .classifier_cases import inputs
from .oracles import classifier as oracle
from .oracles import features
from .propagation_cases import random_mask
from .strategies import seeds
from .tolerances import assert_close

F64, F32 = torch.float64, torch.float32
MIB = 2**20
forward_mode = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")  # torch calls it
corners = pytest.mark.parametrize("align_corners", [True, False])


def assert_statistics(actual, expected, kind="classifier", dtype=F64):
    """Of one image or several: every field."""
    for x, y in zip(actual, expected, strict=True):
        assert_close(x, y, kind, dtype)


def of_images(weights, V):
    """The oracle's, stacked over the batch."""
    images = [oracle.statistics(w.numpy(), v.numpy()) for w, v in zip(weights.double(), V.double(), strict=True)]
    return [np.stack(x) for x in zip(*images, strict=True)]


def updated(logits, feats, C=3, D=4, **options):
    result = ClassStatistics(C, D)
    result.update(logits, feats, **options)
    return result


def labelled(labels, feats, C=3, D=4, **options):
    result = ClassStatistics(C, D)
    result.update_labels(labels, feats, **options)
    return result


def expected_update(logits, feats, mask=None, align_corners=True):
    """The sums of all images, whose logits come to the grid of the features."""
    images = []
    for n in range(len(logits)):
        given_mask = None if mask is None else mask[n].numpy()
        arrays = (x[n].double().numpy() for x in (logits, feats))
        P, counts, V, _ = oracle.sources(*arrays, given_mask, "feats", align_corners)
        images.append(oracle.statistics(P * counts, V))
    return oracle.together(images)


# The sums of one image


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("M", [1, 7, 11])
@pytest.mark.parametrize(("size", "rows"), [(1, 1), (3, 3), (7, 2), (4096, 128)])
@pytest.mark.parametrize("are_shares", [False, True])
def test_moments_in_blocks(are_shares, size, rows, M, dtype, monkeypatch):
    monkeypatch.setattr(kernel, "PIXELS", size)
    monkeypatch.setattr(kernel, "ROWS", rows)
    weights, V = torch.rand(2, 3, M).to(dtype), torch.randn(2, 4, M).to(dtype)
    if are_shares:
        weights = weights.softmax(dim=1)
    actual = kernel.moments(weights, V, are_shares=are_shares)
    assert {x.dtype for x in actual} == {F64}
    assert_statistics(actual, of_images(weights, V), dtype=dtype)


@pytest.mark.parametrize("size", [3, 4096])
def test_shares_give_the_same_statistics_and_the_same_gradients_of_logits(size, monkeypatch):
    """Of weights that a softmax made; twice, because the weights' own gradients differ by a number a pixel."""
    monkeypatch.setattr(kernel, "PIXELS", size)
    logits, V = torch.randn(2, 3, 7, dtype=F64).requires_grad_(), torch.randn(2, 4, 7, dtype=F64).requires_grad_()
    probe = torch.randn(2 * (3 + 12 + 16), dtype=F64)
    results = []
    for are_shares in (True, False):
        out = torch.cat([x.flatten() for x in kernel.moments(logits.softmax(1), V, are_shares=are_shares)])
        grads = torch.autograd.grad(out, (logits, V), probe, create_graph=True)
        seconds = torch.autograd.grad(sum(x.square().sum() for x in grads), (logits, V))
        results.append((out, *grads, *seconds))
    for x, y in zip(*results, strict=True):
        assert_close(x, y.detach().numpy(), "gradient")


def test_moments_of_blocks_without_a_source(monkeypatch):
    monkeypatch.setattr(kernel, "PIXELS", 2)
    weights, V = torch.zeros(1, 2, 7, dtype=F64), torch.randn(1, 3, 7, dtype=F64)
    assert not any(x.any() for x in kernel.moments(weights, V))
    weights[0, 1, 4] = 2.0
    counts, sums, second = kernel.moments(weights, V)
    assert counts.tolist() == [[0.0, 2.0]]
    assert_close(sums[0, 1], 2 * V[0, :, 4].numpy(), "classifier")
    assert not second.any()


@pytest.mark.parametrize("size", [3, 4096])
@forward_mode
def test_every_derivative_of_the_moments(size, monkeypatch):
    monkeypatch.setattr(kernel, "PIXELS", size)
    weights, V = torch.rand(2, 3, 7, dtype=F64).requires_grad_(), torch.randn(2, 4, 7, dtype=F64).requires_grad_()

    def function(weights, V):
        return torch.cat([x.flatten() for x in kernel.moments(weights, V)])

    assert gradcheck(function, (weights, V), check_forward_ad=True)
    assert gradgradcheck(function, (weights, V))
    probe = torch.randn(2 * (3 + 12 + 16), dtype=F64)
    ours = torch.autograd.grad(function(weights, V), (weights, V), probe)
    plain = torch.cat([x.flatten() for x in kernel._plain(weights, V)])
    for x, y in zip(ours, torch.autograd.grad(plain, (weights, V), probe), strict=True):
        assert_close(x, y, "gradient")


def test_moments_under_transforms():
    weights, V = torch.rand(3, 1, 2, 5, dtype=F64), torch.randn(3, 1, 4, 5, dtype=F64)
    each = [kernel.moments(w, v) for w, v in zip(weights, V, strict=True)]
    stacked = [torch.stack(x).numpy() for x in zip(*each, strict=True)]
    assert_statistics(torch.func.vmap(kernel.moments)(weights, V), stacked)

    def energy(v):
        return sum(x.square().sum() for x in kernel.moments(weights[0], v))

    leaf = V[0].clone().requires_grad_()
    assert_close(torch.func.grad(energy)(V[0]), torch.autograd.grad(energy(leaf), leaf)[0].numpy(), "gradient")


@pytest.mark.parametrize("dtype", [F64, F32])
def test_a_large_mean_does_not_cancel(dtype):
    """A mean of 1e3: off by little where the uncentred formula has no digit left."""
    weights, V = torch.rand(1, 3, 500).to(dtype), (torch.randn(1, 4, 500) + 1e3).to(dtype)
    actual, wanted = kernel.moments(weights, V), of_images(weights, V)
    assert_statistics(actual, wanted, dtype=dtype)
    if dtype == F32:
        w = weights.sum(1, keepdim=True)
        mean = (V @ w.mT) / w.sum()
        uncentred = (w * V) @ V.mT - w.sum() * mean @ mean.mT
        with pytest.raises(AssertionError, match="error"):
            assert_close(uncentred, wanted[2], "large mean", F32)


@pytest.mark.parametrize("kind", ["shifted", "another first eighth", "constant"])
def test_the_mean_of_the_first_pixels_will_do(kind, monkeypatch):
    """Shares of 1 are centred on it."""
    monkeypatch.setattr(kernel, "PIXELS", 10)
    weights, V = torch.rand(1, 3, 800).softmax(dim=1), torch.randn(1, 4, 800)
    V = torch.full_like(V, 1e3) if kind == "constant" else V + 1e3
    if kind == "another first eighth":
        V[:, :, :100] -= 1e3
    actual = kernel.moments(weights, V, are_shares=True)
    assert_statistics(actual, of_images(weights, V), dtype=F32)
    if kind == "constant":
        assert actual.second.abs().max() < 1e-9 * V.square().sum()


# The second moment of upsampled features


@corners
@given(data=st.data())
def test_weighted_is_the_dense_product(align_corners, data):
    """`x U diag(w) U^T`, also onto coarser grids and from or to a single row."""
    sides = st.integers(1, 7)
    grid, size = (data.draw(st.tuples(sides, sides)) for _ in range(2))
    generator = torch.Generator().manual_seed(data.draw(seeds))
    x = torch.randn(2, 3, grid[0] * grid[1], generator=generator, dtype=F64)
    w = torch.rand(2, 1, size[0] * size[1], generator=generator, dtype=F64)
    U = features.resizing_matrix(grid, size, align_corners)
    dense = np.stack([x[n].numpy() @ U @ np.diag(w[n, 0].numpy()) @ U.T for n in range(2)])
    assert_close(Upsampling(grid, size, align_corners).weighted(x, w), dense, "classifier")


def test_gradients_of_weighted():
    upsampling = Upsampling((2, 3), (5, 4), False)
    x, w = torch.randn(1, 2, 6, dtype=F64).requires_grad_(), torch.rand(1, 1, 20, dtype=F64).requires_grad_()
    assert gradcheck(upsampling.weighted, (x, w))
    assert gradgradcheck(upsampling.weighted, (x, w))


@corners
@pytest.mark.parametrize("size", [(9, 7), (2, 3), (1, 8)])
def test_statistics_of_upsampled_features(size, align_corners):
    grid, dtype = (4, 5), F64
    V, weights = torch.randn(2, 3, 20, dtype=dtype) + 5, torch.rand(2, 2, size[0] * size[1], dtype=dtype)
    U = features.resizing_matrix(grid, size, align_corners)
    pixels = Pixels(V, weights, upsampling=Upsampling(grid, size, align_corners))
    assert_statistics(image_statistics(pixels, weights), of_images(weights, V @ torch.from_numpy(U)))


# What a ClassStatistics adds up


def test_the_example_by_hand():
    result = labelled(torch.tensor([[0, 0, 1]]), torch.tensor([[[1.0, 3.0, 8.0]]]), 2, 1)
    assert result.counts.tolist() == [2, 1]
    assert result.sums.tolist() == [[4], [8]]
    assert result.second.tolist() == [[9 + 1 + 16]]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("grid", [(4, 5), (9, 7), (2, 3)])
@corners
def test_update(grid, masked, align_corners):
    logits, feats, _ = inputs(grid, (4, 5))
    mask = random_mask(2, *grid) if masked else None
    result = ClassStatistics(3, 4, align_corners=align_corners)
    result.update(logits, feats, mask=mask)
    assert_statistics(result.statistics, expected_update(logits, feats, mask, align_corners))
    if masked:  # every source counts once, on whatever grid
        assert_close(result.counts.sum(), mask.sum(), "classifier")


def test_update_of_flat_tensors_and_no_images():
    logits, feats, _ = inputs()
    flat = updated(logits.flatten(2), feats.flatten(2))
    assert_statistics(flat.statistics, updated(logits, feats).statistics)
    before = copy.deepcopy(flat)
    flat.update(logits[:0], feats[:0])
    assert_statistics(flat.statistics, before.statistics)


@pytest.mark.parametrize("dtype", [F32, torch.float16, torch.bfloat16])
def test_update_in_lower_precision(dtype):
    logits, feats, _ = inputs(dtype=dtype)
    assert_statistics(updated(logits, feats).statistics, expected_update(logits, feats), dtype=F32)
    labels = logits.argmax(1)
    assert_statistics(labelled(labels, feats).statistics, labelled(labels, feats.double()).statistics, dtype=F32)


def test_update_under_autocast():
    """Inputs of two dtypes, and no product in half precision."""
    logits, feats, _ = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        result = updated(logits.float(), feats)
        half = updated(logits.bfloat16(), feats.float())
        of_labels = labelled(logits.argmax(1), feats.float())
    assert_statistics(result.statistics, expected_update(logits, feats), dtype=F32)
    assert_statistics(half.statistics, expected_update(logits.bfloat16(), feats), dtype=F32)
    assert_statistics(of_labels.statistics, labelled(logits.argmax(1), feats).statistics, dtype=F32)


def test_masked_logits_may_be_anything():
    logits, feats, _ = inputs()
    mask = random_mask(2, 4, 5)
    wanted = updated(logits, feats, mask=mask)
    for nothing in (float("nan"), float("inf"), -float("inf")):
        spoilt = torch.where(mask[:, None], logits, nothing)
        assert_statistics(updated(spoilt, feats, mask=mask).statistics, wanted.statistics)


def test_nan_shows():
    logits, feats, _ = inputs()
    feats[0, 1, 0, 0] = float("nan")
    result = updated(logits, feats)
    assert result.counts.isfinite().all()
    assert result.sums[:, 1].isnan().all()
    assert result.second[1].isnan().all()


@pytest.mark.parametrize("size", [1, 3, 7])
@pytest.mark.parametrize("grid", [(4, 5), (9, 7)])
def test_blocks_change_nothing(size, grid, monkeypatch):
    logits, feats, _ = inputs(grid, (4, 5))
    mask, labels = random_mask(2, *grid), logits.argmax(1)
    whole = updated(logits, feats, mask=mask), labelled(labels, feats)
    monkeypatch.setattr(statistics, "PIXELS", size)
    for x, y in zip((updated(logits, feats, mask=mask), labelled(labels, feats)), whole, strict=True):
        assert_statistics(x.statistics, y.statistics)


@pytest.mark.parametrize(
    ("ignore_index", "dtype"), [(255, torch.uint8), (255, torch.int16), (-1, torch.int64), (1, torch.uint8)]
)
def test_update_labels(ignore_index, dtype):
    """Labels to be ignored are, also where they would be a class."""
    _, feats, _ = inputs()
    labels = torch.randint(3, (2, 4, 5))
    labels[:, 0] = ignore_index
    one_hot = torch.stack([(labels == c) & (labels != ignore_index) for c in range(3)], 1).double()
    result = labelled(labels.to(dtype), feats, ignore_index=ignore_index)
    images = zip(one_hot.flatten(2).numpy(), feats.flatten(2).numpy(), strict=True)
    assert_statistics(result.statistics, oracle.together([oracle.statistics(*x) for x in images]))
    assert result.counts.sum() == (labels != ignore_index).sum()


def test_no_class_wraps_around_a_small_dtype():
    """More classes than uint8 has numbers, and a marker that it does not have."""
    feats = torch.arange(3.0)[None, None]
    for C, y, ignore_index in ((300, [0, 1, 44], 255), (256, [0, 1, 255], -1)):
        result = ClassStatistics(C, 1)
        result.update_labels(torch.tensor([y], dtype=torch.uint8), feats, ignore_index=ignore_index)
        assert result.counts.nonzero().flatten().tolist() == y


def test_scatter_that_overflows_is_not_taken_for_rounding():
    logits, feats = torch.randn(1, 2, 6, 6), 1e20 * torch.randn(1, 3, 3, 3)
    for resolution in ("feats", "logits"):
        out = derivative_label_propagation(logits, feats, affinity="ridge", resolution=resolution)
        assert out.isnan().all()


@corners
@pytest.mark.parametrize("size", [(9, 7), (2, 3)])
def test_every_label_counts_once_on_another_grid(size, align_corners):
    """By the adjoint of the upsampling, label by label."""
    _, feats, _ = inputs()
    labels = torch.where(torch.rand(2, *size) < 0.8, torch.randint(3, (2, *size)), 255)
    result = ClassStatistics(3, 4, align_corners=align_corners)
    result.update_labels(labels, feats)
    for c in range(3):
        assert_close(result.counts[c], (labels == c).sum(), "classifier")
    U = features.resizing_matrix((4, 5), size, align_corners)
    images = []
    for n in range(2):
        one_hot = np.stack([labels[n].numpy().reshape(-1) == c for c in range(3)]).astype(float)
        images.append(oracle.statistics(one_hot @ U.T, feats[n].flatten(1).numpy()))
    assert_statistics(result.statistics, oracle.together(images))


def test_no_gradient_and_no_trace_in_the_inputs():
    logits, feats, _ = inputs()
    before = logits.clone(), feats.clone()
    leaves = logits.requires_grad_(), feats.requires_grad_()
    result = updated(*leaves)
    result.update_labels(torch.zeros(2, 4, 5, dtype=torch.long), leaves[1])
    assert not any(x.requires_grad for x in result.buffers())
    assert not list(result.parameters())
    for x, y in zip(leaves, before, strict=True):
        assert torch.equal(x, y)


def test_strides_change_nothing():
    logits, feats, _ = inputs()
    wanted = updated(logits, feats)
    for layout in (
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: x.mT.contiguous().mT,
        lambda x: torch.cat((x, x), 3)[..., :5],
    ):
        assert_statistics(updated(layout(logits), layout(feats)).statistics, wanted.statistics)


# Merging


def draw(seed, M, scale=1.0, C=3, D=4):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(1, C, M, generator=generator, dtype=F64)
    return logits, scale * torch.randn(1, D, M, generator=generator, dtype=F64) + scale


sizes = st.integers(1, 9)


@given(seeds, sizes, sizes, st.sampled_from([1.0, 1e-3, 1e3]))
def test_merging_is_concatenating(seed, m, n, scale):
    first, second = draw(seed, m), draw(seed + 1, n, scale)
    both = updated(*(torch.cat(x, 2) for x in zip(first, second, strict=True)))
    merged = updated(*first)
    merged.merge(updated(*second))
    assert_statistics(merged.statistics, both.statistics)


@given(seeds, sizes, sizes, sizes, st.sampled_from([1.0, 1e3]))
def test_merging_is_associative_and_commutative(seed, m, n, k, scale):
    a, b, c = (updated(*draw(seed + i, size, scale**i)).statistics for i, size in enumerate((m, n, k)))
    assert_statistics(a.merged(b), b.merged(a))
    assert_statistics(a.merged(b).merged(c), a.merged(b.merged(c)))


def test_nothing_is_the_neutral_element():
    full, empty = updated(*draw(0, 7)), ClassStatistics(3, 4)
    assert_statistics(full.statistics.merged(empty.statistics), full.statistics)
    assert_statistics(empty.statistics.merged(full.statistics), full.statistics)
    empty.merge(ClassStatistics(3, 4))
    assert not any(x.any() for x in empty.buffers())


def test_merging_with_itself_counts_twice():
    once = updated(*draw(0, 7))
    twice = copy.deepcopy(once)
    twice.merge(twice)
    assert_statistics(twice.statistics, [2 * x for x in once.buffers()])


def test_the_images_of_a_batch_together():
    logits, feats, _ = inputs(N=3)
    each = kernel.moments(logits.flatten(2).softmax(1), feats.flatten(2))
    assert_statistics([x[0] for x in each.over_batch()], updated(logits, feats).statistics)


def test_other_statistics_are_refused():
    own = ClassStatistics(3, 4)
    for other in (ClassStatistics(3, 5), ClassStatistics(2, 4)):
        with pytest.raises(ValueError, match="3 classes and 4 channels, got"):
            own.merge(other)
    with pytest.raises(TypeError, match="ClassStatistics, got dict"):
        own.merge(dict(own.named_buffers()))


# Running statistics


def test_decay_and_reset():
    own, more = updated(*draw(0, 7)), updated(*draw(1, 5))
    mean = own.statistics.mean()
    wanted = oracle.together(
        [
            oracle.Statistics(*(0.25 * x.numpy() for x in own.buffers())),
            oracle.Statistics(*(x.numpy() for x in more.buffers())),
        ]
    )
    own.decay(0.25)
    assert_close(own.statistics.mean(), mean.numpy(), "classifier")
    own.merge(more)
    assert_statistics(own.statistics, wanted)
    own.decay(1)
    assert_statistics(own.statistics, wanted)
    own.decay(0)
    assert not any(x.any() for x in own.buffers())
    own.update(*draw(1, 5))
    assert_statistics(own.statistics, more.statistics)
    own.reset()
    assert not any(x.any() for x in own.buffers())


@pytest.mark.parametrize("factor", [-0.1, 1.1, float("nan")])
def test_a_factor_is_a_share(factor):
    with pytest.raises(ValueError, match="factor"):
        ClassStatistics(3, 4).decay(factor)
    with pytest.raises(TypeError, match="factor"):
        ClassStatistics(3, 4).decay("0.5")


# Errors


def test_sizes_are_checked():
    for C, D, error in ((0, 4, ValueError), (3, 0, ValueError), (3.0, 4, TypeError), (True, 4, TypeError)):
        with pytest.raises(error, match=r"num_classes|channels"):
            ClassStatistics(C, D)
    with pytest.raises(TypeError, match="align_corners"):
        ClassStatistics(3, 4, align_corners=1)
    logits, feats, _ = inputs()
    with pytest.raises(ValueError, match=r"D = 4 channels and C = 2 classes here, got 4 channels and 3 classes"):
        ClassStatistics(2, 4).update(logits, feats)
    with pytest.raises(ValueError, match=r"D = 5 channels and C = 3 classes here, got 4 channels and 3"):
        ClassStatistics(3, 5).update(logits, feats)
    with pytest.raises(ValueError, match="D = 5 channels"):
        ClassStatistics(3, 5).update_labels(logits.argmax(1), feats)


def test_tensors_are_checked():
    logits, feats, _ = inputs()
    own = ClassStatistics(3, 4)
    labels = logits.argmax(1)
    for wrong, error, message in (
        (lambda: own.update(logits.float(), feats), TypeError, "one dtype"),
        (lambda: own.update(logits[:1], feats), ValueError, "batch size"),
        (lambda: own.update(logits.flatten(2)[..., 1:], feats.flatten(2)), ValueError, "pixels M"),
        (lambda: own.update(logits, feats, mask=torch.ones(2, 4, 5)), TypeError, "bool"),
        (lambda: own.update_labels(labels + 1, feats), ValueError, r"in \[0, 2\]"),
        (lambda: own.update_labels(labels - 1, feats), ValueError, r"in \[0, 2\]"),
        (lambda: own.update_labels(labels.double(), feats), TypeError, "integer dtype"),
        (lambda: own.update_labels(labels, feats, ignore_index=None), TypeError, "ignore_index must be an int"),
        (lambda: own.update_labels(labels[:, None], feats), ValueError, "squeeze"),
        (lambda: own.update_labels(labels, feats.long()), TypeError, "floating"),
    ):
        with pytest.raises(error, match=message):
            wrong()
    assert not any(x.any() for x in own.buffers())


def test_labels_that_are_all_ignored_add_nothing():
    _, feats, _ = inputs()
    own = updated(*draw(0, 7))
    before = copy.deepcopy(own)
    for size in ((4, 5), (9, 7)):
        own.update_labels(torch.full((2, *size), 255), feats)
    assert_statistics(own.statistics, before.statistics)


@pytest.mark.filterwarnings("ignore:.*isinstance\\(treespec, LeafSpec\\).*:FutureWarning")
def test_nothing_but_masked_sources_adds_nothing():
    logits, feats, _ = inputs()
    own = updated(*draw(0, 7))
    before = copy.deepcopy(own)
    mask = torch.zeros(2, 4, 5, dtype=torch.bool)
    compiled = torch.compile(lambda: own.update(logits, feats, mask=mask), backend="eager")
    for add in (compiled, lambda: own.update(logits, feats, mask=mask)):
        add()
        assert_statistics(own.statistics, before.statistics)


# Stored and moved


def test_state_dict_round_trip():
    own, other = updated(*draw(0, 7)), ClassStatistics(3, 4)
    assert list(own.state_dict()) == ["counts", "sums", "second"]
    file = io.BytesIO()
    torch.save(own.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    for x, y in zip(own.buffers(), other.buffers(), strict=True):
        assert torch.equal(x, y)
        assert x.data_ptr() != y.data_ptr()
    with pytest.raises(RuntimeError, match="size mismatch"):
        ClassStatistics(2, 4).load_state_dict(own.state_dict())


@pytest.mark.parametrize("assign", [False, True])
def test_state_of_half_precision_is_loaded_in_float64(assign):
    own, other = updated(*draw(0, 7)), ClassStatistics(3, 4)
    halves = {f"0.{name}": x.half() for name, x in own.state_dict().items()}
    nn.Sequential(other).load_state_dict(halves, assign=assign)
    assert {x.dtype for x in other.buffers()} == {torch.float64}
    assert torch.equal(other.counts, own.counts.half().double())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_go_their_own_way(copied):
    own = updated(*draw(0, 7))
    other = copied(own)
    before = [x.clone() for x in own.buffers()]
    assert_statistics(other.statistics, before)
    other.update(*draw(1, 5))
    assert_statistics(own.statistics, before)
    assert repr(other) == "ClassStatistics(num_classes=3, channels=4, align_corners=True)"


@pytest.mark.parametrize(
    "move",
    [
        nn.Module.half,
        nn.Module.float,
        nn.Module.double,
        nn.Module.bfloat16,
        lambda x: x.to(torch.float16),
        lambda x: x.to("cpu"),
        lambda x: x.to("cpu", torch.bfloat16),
        lambda x: x.type(torch.float32),
        lambda x: x.share_memory(),
    ],
)
def test_a_lower_precision_is_not_followed(move):
    """Alone or inside of a network that is moved."""
    own = updated(*draw(0, 7))
    before = [x.clone() for x in own.buffers()]
    network = nn.ModuleDict({"head": nn.Linear(2, 2), "statistics": own})
    assert move(own) is own
    move(network)
    for x, y in zip(own.buffers(), before, strict=True):
        assert x.dtype == F64
        assert torch.equal(x, y)
    own.update(*draw(1, 5))


def test_to_another_device():
    own = updated(*draw(0, 7)).to("meta")
    assert {x.device.type for x in own.buffers()} == {"meta"}
    assert own.to_empty(device="cpu").counts.dtype == F64


@pytest.mark.gpu
def test_on_a_gpu():
    logits, feats, _ = inputs((9, 7), (4, 5), dtype=F32)
    own = ClassStatistics(3, 4).cuda()
    own.update(logits.cuda(), feats.cuda())
    assert own.second.is_cuda
    assert own.second.dtype == F64
    assert_statistics(own.cpu().statistics, expected_update(logits, feats), dtype=F32)


def test_statistics_made_in_inference_mode_are_updated_outside():
    logits, feats = torch.randn(1, 3, 4, 5), torch.randn(1, 2, 4, 5)
    with torch.inference_mode():
        made = ClassStatistics(3, 2)
    other = ClassStatistics(3, 2)
    for each in (made, other):
        each.update(logits, feats)
    assert all(map(torch.equal, made.statistics, other.statistics))


def test_updates_with_and_without_inference_mode():
    own = ClassStatistics(3, 4)
    with torch.inference_mode():
        own.update(*draw(0, 7))
    own.update(*draw(1, 5))
    wanted = updated(*draw(0, 7))
    wanted.update(*draw(1, 5))
    assert_statistics(own.statistics, wanted.statistics)


# Over processes

WORKER = """
import sys
import torch
import torch.distributed as dist
from dlprop.statistics import ClassStatistics

rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=3)
given = torch.load(f"{folder}/inputs.pt", weights_only=True)
own = ClassStatistics(3, 4)
for logits, feats in given[rank]:
    own.update(logits, feats)
own.all_reduce()
torch.save(own.state_dict(), f"{folder}/{rank}.pt")
empty = ClassStatistics(3, 4)
empty.all_reduce(dist.new_group([0, 1, 2]))
assert not any(x.any() for x in empty.buffers())
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
def test_three_processes_are_one(tmp_path):
    """Also where one has seen less and other features, and one nothing."""
    inputs = [[draw(0, 7), draw(1, 5, 10.0)], [draw(2, 9, 100.0)], []]
    torch.save(inputs, tmp_path / "inputs.pt")
    command = [sys.executable, "-c", WORKER]
    workers = [
        subprocess.Popen([*command, str(rank), str(tmp_path)], stderr=subprocess.PIPE, text=True) for rank in range(3)
    ]
    errors = [worker.communicate(timeout=120)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0, 0], errors
    wanted = ClassStatistics(3, 4)
    for logits, feats in itertools.chain(*inputs):
        wanted.update(logits, feats)
    for rank in range(3):
        result = ClassStatistics(3, 4)
        result.load_state_dict(torch.load(tmp_path / f"{rank}.pt", weights_only=True))
        assert_statistics(result.statistics, wanted.statistics)


def test_one_process_alone(tmp_path):
    own = updated(*draw(0, 7))
    before = copy.deepcopy(own)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        own.all_reduce()
    finally:
        torch.distributed.destroy_process_group()
    assert_statistics(own.statistics, before.statistics)


# Memory

MEASURE = """
import torch
from dlprop.statistics import ClassStatistics

def peak():
    # Not ru_maxrss: a new process inherits that from the one that started it.
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))

torch.set_num_threads(1)
C, D, edge = 21, 64, {edge}
statistics = ClassStatistics(C, D)

def run(edge, scale):
    feats = torch.ones(1, D, edge, edge, dtype={dtype})
    logits = torch.ones(1, C, edge, edge, dtype={dtype})
    labels = torch.ones(1, edge, edge, dtype=torch.uint8)
    mask = labels == 1
    before = peak()
    {call}
    return peak() - before

run(16, 1)
print(run(edge, 2))
"""
UPDATES = {
    "update": "statistics.update(logits, feats)",
    "masked": "statistics.update(logits, feats, mask=mask)",
    "labels": "statistics.update_labels(labels, feats)",
}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("update", "torch.float32"),
        *(pytest.param(name, "torch.float16", marks=pytest.mark.exhaustive) for name in UPDATES),
    ],
)
def test_memory_beyond_the_inputs(name, dtype):
    """A copy of the features, 2^20 pixels of 64 channels, would take 256 MiB, one of the logits 84."""
    script = MEASURE.format(edge=1024, dtype=dtype, call=UPDATES[name])
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    added = 1024 * int(result.stdout)
    assert added < 32 * MIB, added / MIB
