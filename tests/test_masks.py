"""Which pixels are sources: every one counts once, none is lost, and what is left out has no influence."""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dlprop.propagation import derivative_label_propagation

from .propagation_cases import (
    FORMS,
    KINDS,
    expected,
    forms,
    inputs,
    kinds,
    make,
    propagate,
    random_mask,
    resolutions,
)
from .tolerances import assert_close


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
