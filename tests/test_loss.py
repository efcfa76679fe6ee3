"""The derivative loss, Eq. 8 and 9, against the float64 oracle and at every edge of its domain."""

import copy
import dataclasses
import itertools
import pickle
from functools import partial

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

from dlprop import DerivativeLoss, _ops
from dlprop import loss as loss_module
from dlprop._kernels import tiled
from tests.loss_cases import FORMS, assert_matches, draw, draw_away_from_kinks, draw_mask, evaluate, expect, loss_of
from tests.oracles import loss as oracle
from tests.oracles.features import NORMALIZATIONS, SCHEMES
from tests.tolerances import assert_close

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
NORMS = ("l1", "frobenius")
REDUCTIONS = ("none", "mean", "sum")

# The squared norm takes no anchors.
every_pair_term = pytest.mark.parametrize(("norm", "num_anchors"), [("l1", None), ("l1", 4), ("frobenius", None)])
every_exact_pair_term = pytest.mark.parametrize(
    ("norm", "num_anchors"), [("l1", None), ("l1", 10**6), ("frobenius", None)]
)


def _direction(feats):
    """A random direction that is not the features': normalised losses do not change along those."""
    return torch.randn(feats.shape, generator=torch.Generator().manual_seed(1234), dtype=F64)


# ---------------------------------------------------------------------------------------------------------------------
# The formula


def test_oracle_against_numbers_worked_out_by_hand():
    # Two one-hot pixels of different classes, D = 3: S = I meets the labels, D1S = [[1, -1], [-1, 2]] misses them by 3,
    # |D2V| = (1, 2) is 3.
    V = np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    assert oracle.image_loss(V, [0, 1], sums=True).value == 3 + 0.5 * 3
    assert oracle.image_loss(V, [0, 1]).value == 3 / 4 + 0.5 * 3 / 2
    # The second pixel as the only anchor: its column of D1S misses by 1 + 1, scaled by M / K = 2.
    assert oracle.image_loss(V, [0, 1], sums=True, anchors=[1], eta=0.0).value == 2 * 2
    # Squared, by hand again: (-1)^2 + (-1)^2 + 1^2.
    assert oracle.image_loss(V, [0, 1], sums=True, norm="frobenius", eta=0.0).value == 3
    # The same pixels against themselves exchanged: the diagonal of D1S misses by 1 twice.
    assert oracle.image_loss(V, V[:, ::-1], sums=True, eta=0.0).value == 2


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_oracle_gradient_is_the_slope_of_its_value(form, norm, normalize):
    options = {"norm": norm, "normalize": normalize, "max_order": 2, "anchors": [0, 2, 3]}
    feats, target, expected = draw_away_from_kinks(form, N=1, D=6, grid=(2, 3), margin=1e-4, options=options)
    direction = _direction(feats)
    above, below = (expect(feats + step * direction, target, **options).value for step in (1e-6, -1e-6))
    slope = (expected.gradient * direction.numpy()).sum()
    assert abs((above - below) / 2e-6 - slope) <= 1e-6 * abs(slope) + 1e-8


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("max_order", [0, 1, 2, 3])
def test_matches_the_oracle(form, norm, scheme, max_order):
    masks = itertools.cycle([None, draw_mask()])  # every other one: of any two options all values meet
    for (normalize, reduction), mask in zip(itertools.product(NORMALIZATIONS, REDUCTIONS), masks, strict=False):
        formula = {"norm": norm, "scheme": scheme, "max_order": max_order, "normalize": normalize}
        formula |= {"reduction": reduction, "mask": mask, "eta": 0.3}
        feats, target, expected = draw_away_from_kinks(form, margin=1e-5, options=formula)
        assert_matches(evaluate(feats, target, chunk_size=7, **formula), expected)
        single = feats.float(), target.float() if form == "features" else target
        assert_matches(evaluate(*single, **formula), expect(*single, **formula))


def test_defaults_are_the_paper():
    feats, target, _ = draw_away_from_kinks("labels", N=1)
    expected = expect(
        feats, target, max_order=1, eta=0.5, norm="l1", scheme="forward", normalize="l1", reduction="mean"
    )
    assert_matches(evaluate(feats, target), expected)


@pytest.mark.parametrize("form", FORMS)
def test_reductions(form):
    feats, target = draw(form, N=3)
    none = loss_of(feats, target, reduction="none")
    mean = loss_of(feats, target)
    total = loss_of(feats, target, reduction="sum")
    assert none.shape == (3,)
    assert mean.shape == total.shape == ()
    assert_close(mean, none.mean(), "loss")
    alone = [loss_of(feats[n : n + 1], target[n : n + 1], reduction="sum") for n in range(3)]
    assert_close(total, sum(alone), "loss")
    assert abs(total - none.sum()) > 1  # "sum" is Eq. 8 as written, over pairs and elements, not over images


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("norm", NORMS)
def test_eta_zero_leaves_the_pair_terms(form, norm):
    feats, target, expected = draw_away_from_kinks(form, options={"eta": 0.0, "norm": norm})
    assert_matches(evaluate(feats, target, eta=0, norm=norm), expected)
    assert_matches(evaluate(feats, target, eta=0.0, norm=norm), expected)


@pytest.mark.parametrize("normalize", ["l1", "softmax"])
@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("max_order", [0, 1])
def test_non_negative_features_with_labels(normalize, dtype, max_order):
    # Where 0 <= s <= 1 is known, order 0 has a closed form; it must give the same numbers.
    options = {"normalize": normalize, "max_order": max_order, "reduction": "sum"}
    feats, target, expected = draw_away_from_kinks("labels", nonnegative=True, dtype=dtype, options=options)
    assert_matches(evaluate(feats, target, **options), expected)


# ---------------------------------------------------------------------------------------------------------------------
# Labels


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("ignore_index", [255, -1, -100, 2])
def test_ignored_labels_of_every_dtype(dtype, ignore_index):
    fits = torch.iinfo(dtype).min <= ignore_index <= torch.iinfo(dtype).max
    feats, labels, _ = draw_away_from_kinks("labels", ignored=None)
    if fits:
        labels[0, 1, :3] = ignore_index
        labels[1, 0, 2] = ignore_index
    labels = labels.to(dtype)
    expected = expect(feats, labels, ignore_index=ignore_index)
    assert_matches(evaluate(feats, labels, ignore_index=ignore_index), expected)


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64])
def test_labels_of_the_wide_unsigned_dtypes(dtype):
    feats, labels, expected = draw_away_from_kinks("labels")
    assert_matches(evaluate(feats, labels.to(dtype)), expected)
    finer = labels.repeat_interleave(3, 1).repeat_interleave(3, 2)
    assert_matches(evaluate(feats, finer.to(dtype), align_corners=False), expected)


@pytest.mark.parametrize(("ignore_index", "twin"), [(-100, 156), (-1, 255), (511, 255)])
def test_a_uint8_label_is_not_ignored_because_it_wraps(ignore_index, twin):
    feats, labels, _ = draw_away_from_kinks("labels", ignored=None)
    labels = labels.to(torch.uint8)
    labels[0, 0] = twin
    plain = torch.where(labels == twin, 9, labels)
    expected = expect(feats, plain, ignore_index=200)
    assert_matches(evaluate(feats, labels, ignore_index=ignore_index), expected)


def test_labels_are_only_compared_for_equality():
    # Large, far apart, and neighbours that float32, float64 or int32 would confuse.
    feats, labels, expected = draw_away_from_kinks("labels", classes=6)
    values = torch.tensor([0, 10**12, 2**32, 2**24 + 1, 2**53, 2**53 + 1])
    large = torch.where(labels == 255, 255, values[labels.clamp(max=5)])
    assert_matches(evaluate(feats, large), expected)
    assert_matches(evaluate(feats.float(), large), expect(feats.float(), labels))


GRIDS = [
    ((7, 9), (3, 5)),
    ((8, 6), (3, 4)),
    ((3, 4), (3, 4)),
    ((2, 3), (5, 4)),
    ((6, 10), (4, 4)),
    ((5, 7), (1, 1)),
    ((4, 7), (1, 3)),
    ((1, 1), (3, 2)),
    ((33, 17), (9, 5)),
]


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize(("label_grid", "grid"), GRIDS)
def test_labels_on_another_grid(label_grid, grid, align_corners):
    feats, _ = draw("features", grid=grid)
    _, labels = draw("labels", seed=1, grid=label_grid, classes=4)
    mask = draw_mask(2, grid=label_grid)
    for given in (None, mask):
        expected = expect(feats, labels, mask=given, align_corners=align_corners, reduction="none")
        actual = evaluate(feats, labels, mask=given, align_corners=align_corners, reduction="none")
        assert_matches(actual, expected)


def test_label_sampling_by_hand():
    # Rows 0..6 at three points: round(0), round(3), round(6), else floor((i + 0.5) * 7 / 3) = 1, 3, 5.
    assert oracle.sample_positions(7, 3, align_corners=True) == [0, 3, 6]
    assert oracle.sample_positions(7, 3, align_corners=False) == [1, 3, 5]
    assert oracle.sample_positions(5, 1, align_corners=True) == [2]
    feats, _ = draw("features", N=1, grid=(3, 1))
    ramp = torch.arange(7).reshape(1, 7, 1)
    for align_corners, rows in ((True, [0, 3, 6]), (False, [1, 3, 5])):
        blank = torch.full_like(ramp, 255)
        blank[:, rows[:2]] = 1  # rows that no feature falls on stay ignored and must not matter
        expected = expect(feats, torch.tensor([[[1], [1], [255]]]))
        assert_matches(evaluate(feats, blank, align_corners=align_corners), expected)


def test_flat_inputs():
    for form in FORMS:
        feats, target, expected = draw_away_from_kinks(form, options={"reduction": "none"})
        flat = target.flatten(1) if form == "labels" else target.flatten(2)
        value, gradient = evaluate(feats.flatten(2), flat, reduction="none")
        assert_matches((value, gradient.reshape(feats.shape)), expected)
        mask = draw_mask()
        value, gradient = evaluate(feats.flatten(2), flat, mask=mask.flatten(1), reduction="none")
        assert_matches((value, gradient.reshape(feats.shape)), expect(feats, target, mask=mask, reduction="none"))


# ---------------------------------------------------------------------------------------------------------------------
# Ignored pixels and other edges


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("norm", NORMS)
def test_ignored_pixels_count_in_the_sparsity_only(form, norm):
    feats, target = draw(form, ignored=None)
    mask = draw_mask()
    kept = evaluate(feats, target, mask=mask, eta=0.0, norm=norm)[1]
    assert (kept.abs().sum(1)[~mask] == 0).all()
    assert (kept.abs().sum(1)[mask] > 0).all()
    both = evaluate(feats, target, mask=mask, eta=0.5, norm=norm)[1]
    assert (both.abs().sum(1) > 0).all()


@pytest.mark.parametrize("form", FORMS)
@every_pair_term
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_valid_pair(form, norm, reduction, num_anchors):
    feats, target, _ = draw_away_from_kinks(form)
    mask = torch.zeros(2, 3, 5, dtype=torch.bool)
    options = {"mask": mask, "norm": norm, "reduction": reduction}
    assert_matches(evaluate(feats, target, num_anchors=num_anchors, **options), expect(feats, target, **options))
    value, gradient = evaluate(feats, target, num_anchors=num_anchors, eta=0.0, **options)
    assert torch.equal(value, torch.zeros_like(value))
    assert torch.equal(gradient, torch.zeros_like(feats))
    # One image without a valid pixel beside one that has some.
    mask[1] = draw_mask()[1]
    assert_matches(evaluate(feats, target, **options), expect(feats, target, **options))


@pytest.mark.parametrize("norm", NORMS)
def test_all_labels_ignored(norm):
    feats, _ = draw("labels")
    value, gradient = evaluate(feats, torch.full((2, 3, 5), 255), eta=0.0, norm=norm)
    assert value == 0
    assert torch.equal(gradient, torch.zeros_like(feats))


@pytest.mark.parametrize("form", FORMS)
@every_pair_term
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_empty_batch(form, norm, reduction, num_anchors):
    feats, target = draw(form)
    value, gradient = evaluate(feats[:0], target[:0], norm=norm, reduction=reduction, num_anchors=num_anchors)
    assert value.shape == ((0,) if reduction == "none" else ())
    assert value.sum() == 0
    assert gradient.shape == (0, 11, 3, 5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("norm", NORMS)
def test_one_pixel(form, norm):
    feats, target, expected = draw_away_from_kinks(form, grid=(1, 1), ignored=None, options={"norm": norm})
    assert_matches(evaluate(feats, target, norm=norm), expected)
    assert_matches(
        evaluate(feats.flatten(2), target.flatten(2 if form == "features" else 1), norm=norm),
        (expected._replace(gradient=expected.gradient.reshape(2, 11, 1))),
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("normalize", ["l1", "l2"])
@pytest.mark.parametrize("dtype", [F64, F32, F16, BF16])
def test_zero_vectors_receive_zero_gradient(form, norm, normalize, dtype):
    feats, target = draw(form, dtype=dtype)
    feats[0, :, 1] = 0
    feats[1, :, :, 4] = 0
    if form == "features":
        target[:, :, 2, 0] = 0
    options = {"norm": norm, "normalize": normalize, "reduction": "none"}
    value, gradient = evaluate(feats, target, **options)
    assert_close(value, expect(feats, target, **options).value, "loss", dtype=dtype)
    assert gradient.isfinite().all()
    zero = (feats == 0).all(1, keepdim=True).expand_as(feats)
    assert (gradient[zero] == 0).all()
    assert (gradient.abs().sum(1)[~zero[:, 0]] > 0).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("dtype", [F64, F32, F16, BF16])
def test_all_features_zero(form, norm, normalize, dtype):
    feats, target = draw(form, dtype=dtype)
    feats = torch.zeros_like(feats)
    options = {"norm": norm, "normalize": normalize}
    value, gradient = evaluate(feats, target, **options)
    assert_close(value, expect(feats, target, **options).value, "loss", dtype=dtype)
    assert gradient.isfinite().all()
    if normalize in ("l1", "l2"):
        assert (gradient == 0).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_features_are_never_hidden(form, norm, normalize, bad):
    feats, target = draw(form, ignored=None, dtype=F32)
    feats[0, 3, 1, 2] = bad
    value, gradient = evaluate(feats, target, norm=norm, normalize=normalize, reduction="none")
    if bad == -float("inf") and normalize == "softmax":  # exp(-inf) is 0, a proper limit
        expected = expect(feats, target, norm=norm, normalize=normalize, reduction="none")
        assert_close(value, expected.value, "loss")
    else:
        assert not value[0].isfinite()
        assert not gradient[0].isfinite().all()
    # The other image has nothing to do with it.
    alone = evaluate(feats[1:], target[1:], norm=norm, normalize=normalize, reduction="none")
    assert_close(value[1:], alone[0], "loss")
    assert_close(gradient[1:], alone[1], "gradient")


@pytest.mark.parametrize("norm", NORMS)
def test_a_non_finite_target_is_never_hidden(norm):
    feats, target = draw("features")
    target[0, 3, 1, 2] = float("nan")
    value = loss_of(feats, target, norm=norm, reduction="none")
    assert value[0].isnan()
    assert value[1].isfinite()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_features_of_ignored_pixels_stay_out_of_the_pairs(form, norm, bad):
    feats, target = draw(form, ignored=None)
    mask = draw_mask()
    ignored = ~mask[:, None].expand_as(feats)
    options = {"norm": norm, "mask": mask}
    expected = expect(feats, target, eta=0.0, norm=norm, mask=mask)
    poisoned = feats.masked_fill(ignored, bad)
    poisoned_target = target.masked_fill(ignored, bad) if form == "features" else target
    value, gradient = evaluate(poisoned, poisoned_target, eta=0.0, **options)
    assert_close(value, expected.value, "loss")
    assert_close(gradient[~ignored], expected.gradient[~ignored.numpy()], "gradient")
    # The sparsity runs over all pixels, and there they show.
    assert not loss_of(poisoned, target, eta=0.5, **options).isfinite()


@pytest.mark.parametrize("form", FORMS)
def test_non_finite_ignored_anchors_stay_out_of_the_pairs(form):
    feats, target = draw(form, N=1, ignored=None)
    mask = draw_mask(N=1)
    poisoned = feats.masked_fill(~mask[:, None].expand_as(feats), float("nan"))
    for _ in range(5):
        state = torch.get_rng_state()
        clean = loss_of(feats, target, mask=mask, num_anchors=6, eta=0.0)
        torch.set_rng_state(state)
        assert_close(loss_of(poisoned, target, mask=mask, num_anchors=6, eta=0.0), clean, "loss")


# ---------------------------------------------------------------------------------------------------------------------
# Dtypes, strides, autocast


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [F64, F32, F16, BF16])
def test_dtypes(form, norm, dtype):
    for normalize in NORMALIZATIONS:
        options = {"norm": norm, "normalize": normalize}
        feats, target, expected = draw_away_from_kinks(form, dtype=dtype, options=options)
        value, gradient = evaluate(feats, target, **options)
        assert value.dtype == (F64 if dtype == F64 else F32)
        assert gradient.dtype == dtype
        assert_matches((value, gradient), expected)


@pytest.mark.parametrize("form", FORMS)
@every_exact_pair_term
@pytest.mark.parametrize("dtype", [F16, BF16])
def test_a_grad_scaler_neither_overflows_nor_loses_small_gradients(form, norm, dtype, num_anchors):
    # Unscaled, some of these gradients are below the smallest normal float16.
    options = {"norm": norm, "eta": 1e-3}
    feats, target, expected = draw_away_from_kinks(form, N=1, grid=(8, 8), dtype=dtype, options=options)
    assert (np.abs(expected.gradient) < 2.0**-14).mean() > 0.05
    value, gradient = evaluate(feats, target, grad_output=torch.tensor(65536.0), num_anchors=num_anchors, **options)
    assert gradient.isfinite().all()
    assert_matches((value, gradient), expected._replace(gradient=65536 * expected.gradient))


@pytest.mark.parametrize("form", FORMS)
@every_exact_pair_term
@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("inputs", [F32, "autocast"])
def test_autocast_rounds_nothing(form, norm, num_anchors, dtype, inputs):
    options = {"norm": norm, "eta": 0.1, "max_order": 2, "reduction": "none"}
    shape = {"dtype": F32 if inputs == F32 else dtype}
    feats, target, expected = draw_away_from_kinks(form, options=options, **shape)
    leaf = feats.clone().requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        value = loss_of(leaf, target, num_anchors=num_anchors, **options)
    value.sum().backward()  # outside, as torch asks for: its own products would be rounded
    assert value.dtype == F32
    assert leaf.grad.dtype == feats.dtype
    assert_matches((value, leaf.grad), expected)


def test_autocast_may_mix_dtypes():
    feats, target = draw("features", dtype=F32)
    half = target.bfloat16()
    with torch.autocast("cpu", dtype=BF16):
        assert_close(loss_of(feats, half), expect(feats, half).value, "loss")
        assert_close(loss_of(half, feats), expect(half, feats).value, "loss")


def test_autocast_with_anchors():
    feats, target = draw("features", dtype=F32)
    values = []
    for enabled in (False, True):
        torch.manual_seed(3)
        with torch.autocast("cpu", dtype=BF16, enabled=enabled):
            values.append(loss_of(feats, target, num_anchors=5))
    assert torch.equal(*values)


def _channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


def _transposed(x):
    return x.mT.contiguous().mT


def _sliced(x):
    return torch.stack((x, torch.full_like(x, 7)), dim=-1)[..., 0]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", [_channels_last, _transposed, _sliced])
def test_strides(form, layout):
    feats, target, expected = draw_away_from_kinks(form, options={"reduction": "none"})
    strided = layout(feats)
    assert not strided.is_contiguous()
    strided_target = _transposed(target) if form == "labels" else layout(target)
    assert not strided_target.is_contiguous()
    mask = torch.ones(1, 1, 1, dtype=torch.bool).expand(2, 3, 5)
    leaf = strided.detach().requires_grad_()
    value = loss_of(leaf, strided_target, mask=mask, reduction="none")
    (gradient,) = torch.autograd.grad(value, leaf, torch.ones_like(value))
    assert_matches((value, gradient), expected)
    # A gradient that comes with strides of its own, here 0.
    (gradient,) = torch.autograd.grad(
        loss_of(leaf, strided_target, reduction="none"),
        leaf,
        torch.ones(()).double().expand(2),
    )
    assert_matches((value, gradient), expected)


# ---------------------------------------------------------------------------------------------------------------------
# Sampled target pixels: drawn among those that count, each standing for n_valid / K of them


def _many_draws(feats, target, valid, draws, **options):
    """The values, or values and gradients, of so many draws for one image: a batch of copies draws for each."""
    copies = [x.expand(draws, *x.shape[1:]) for x in (feats, target, valid)]
    return evaluate(*copies[:2], mask=copies[2], reduction="none", **options)


def _sparse(edge, labelled, *, D=6, classes=3, seed=0):
    """Signed features and labels of an image of which `labelled` pixels count, (1, D, H, W), (1, H, W) and the mask."""
    generator = torch.Generator().manual_seed(seed)
    feats = torch.randn(1, D, edge, edge, generator=generator, dtype=F64)
    labels = torch.randint(classes, (1, edge, edge), generator=generator)
    valid = torch.zeros(edge * edge, dtype=torch.bool)
    valid[torch.randperm(edge * edge, generator=generator)[:labelled]] = True
    return feats, labels, valid.view(1, edge, edge)


def _dense(feats, labels, valid):
    """The pixels that count as an image of their own."""
    return feats[:, :, valid[0]], labels[valid][None]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("max_order", [0, 1])
def test_a_sampled_loss_is_the_loss_of_one_subset_and_all_subsets_are_equally_likely(form, max_order):
    # Five of M = 7 pixels count, K = 2: ten subsets. Each draw must be one of them, in value and gradient (through both
    # roles).
    feats, target = draw(form, N=1, D=7, grid=(1, 7), ignored=None)
    mask = torch.tensor([[[True, True, False, True, True, False, True]]])
    options = {"max_order": max_order, "eta": 0.1}
    subsets = list(itertools.combinations([0, 1, 3, 4, 6], 2))
    expected = [expect(feats, target, mask=mask, anchors=x, reduction="none", **options) for x in subsets]
    values = np.array([subset.value[0] for subset in expected])
    assert np.diff(np.sort(values)).min() > 1e-9
    exact = expect(feats, target, mask=mask, reduction="none", **options)
    assert_close(values.mean(), exact.value[0], "loss")  # unbiased, once the draws are uniform
    draws = 400
    value, gradient = _many_draws(feats, target, mask, draws, num_anchors=2, **options)
    drawn = np.abs(values[:, None] - value.numpy()).argmin(0)
    assert_close(value, values[drawn], "loss")
    assert_close(gradient, np.concatenate([expected[n].gradient for n in drawn]), "gradient")
    # Pearson's statistic, chi-squared with 9 degrees of freedom: above 33.7 once in ten thousand.
    counts = np.bincount(drawn, minlength=10)
    assert ((counts - draws / 10) ** 2 / (draws / 10)).sum() < 33.7
    # The sum of Eq. 8 is scaled the same way.
    options |= {"mask": mask, "reduction": "sum"}
    sums = [expect(feats, target, anchors=subset, **options) for subset in subsets]
    value, gradient = evaluate(feats, target, num_anchors=2, **options)
    drawn = np.abs(np.array([subset.value for subset in sums]) - value.item()).argmin()
    assert_matches((value, gradient), sums[drawn])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("labelled", [40, 100])
def test_a_sampled_loss_is_unbiased_and_as_steady_as_that_of_a_dense_image(form, labelled):
    feats, target, valid = _sparse(10, labelled)
    if form == "features":
        target = _direction(feats)
    dense = feats[:, :, valid[0]], target[:, :, valid[0]] if form == "features" else target[valid][None]
    exact, slope = evaluate(feats, target, mask=valid, reduction="none")
    K, draws = 8, 400
    value, gradient = _many_draws(feats, target, valid, draws, num_anchors=K)
    samples = torch.stack((value, (gradient * slope).sum((1, 2, 3))))  # the gradient is seen along itself
    exact = torch.stack((exact[0], slope.square().sum()))
    error = samples.std(1) / draws**0.5
    # Four standard errors: a right estimator leaves this interval once in 15,000 choices of the seed; a wrong factor
    # of 0.9 or 1.1 would be far outside.
    assert (error > 0).all()
    assert (4 * error < 0.1 * exact.abs()).all()
    assert ((samples.mean(1) - exact).abs() < 4 * error).all()
    everywhere = torch.ones(1, labelled, dtype=torch.bool)
    of_dense = _many_draws(*dense, everywhere, draws, num_anchors=K, eta=0.0)[0]
    pairs = _many_draws(feats, target, valid, draws, num_anchors=K, eta=0.0)[0]
    spread, wanted = (x.std() / x.mean() for x in (pairs, of_dense))
    assert wanted / 1.5 < spread < 1.5 * wanted


@pytest.mark.parametrize(("edge", "labelled", "num_anchors"), [(129, 166, 1024), (41, 40, 64), (41, 40, 40)])
def test_as_many_anchors_as_labels_is_exact(edge, labelled, num_anchors):
    # 1 % of the pixels, and fewer labels than anchors: every draw takes them all.
    feats, labels, valid = _sparse(edge, labelled)
    labels = torch.where(valid, labels, 255)
    value, gradient = evaluate(*_dense(feats, labels, valid), eta=0.0)
    for _ in range(3):
        sampled = evaluate(feats, labels, num_anchors=num_anchors, eta=0.0)
        assert_close(sampled[0], value, "loss")
        assert_close(sampled[1][:, :, valid[0]], gradient, "gradient")
        assert not sampled[1][:, :, ~valid[0]].any()


def test_every_image_counts_its_own_valid_pixels():
    # 4 and 6 valid pixels, all 15, and none; K = 6.
    feats, target = draw("features", N=4)
    mask = torch.zeros(4, 15, dtype=torch.bool)
    for n, labelled in enumerate((4, 6, 15)):
        mask[n, torch.randperm(15)[:labelled]] = True
    mask = mask.view(4, 3, 5)
    exact = expect(feats, target, mask=mask, reduction="none", eta=0.0)
    copies = [x.repeat(200, *(1,) * (x.ndim - 1)) for x in (feats, target, mask)]
    values = loss_of(*copies[:2], mask=copies[2], num_anchors=6, reduction="none", eta=0.0).view(200, 4)
    for n in (0, 1, 3):
        assert_close(values[:, n], np.broadcast_to(exact.value[n], 200), "loss")
    error = values[:, 2].std() / 200**0.5
    assert 0 < (values[:, 2].mean() - exact.value[2]).abs() < 4 * error


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("num_anchors", [15, 16, 10**9])
def test_as_many_anchors_as_pixels_is_exact(form, num_anchors):
    options = {"mask": draw_mask(), "reduction": "none"}
    feats, target, expected = draw_away_from_kinks(form, options=options)
    assert_matches(evaluate(feats, target, num_anchors=num_anchors, **options), expected)


@pytest.mark.parametrize("form", FORMS)
def test_anchors_come_from_the_default_generator(form):
    feats, target = draw(form)
    values = []
    for chunk_size in (None, None, 1, 4, 7, 15, 100):
        torch.manual_seed(1)
        values.append(evaluate(feats, target, num_anchors=4, reduction="none", chunk_size=chunk_size))
    assert torch.equal(values[0][0], values[1][0])
    for value, gradient in values:
        assert_close(value, values[0][0], "loss")
        assert_close(gradient, values[0][1], "gradient")
    calls = [loss_of(feats, target, num_anchors=4).item() for _ in range(4)]
    assert len(set(calls)) == 4  # anew each call


def test_each_image_draws_its_own_anchors():
    feats, target = draw("labels", N=1)
    values = loss_of(feats.expand(8, -1, -1, -1), target.expand(8, -1, -1), num_anchors=4, reduction="none")
    assert len(set(values.tolist())) == 8


def test_compiled_anchors_are_drawn_among_the_valid_pixels():
    feats, labels, valid = _sparse(9, 20)
    labels = torch.where(valid, labels, 255)
    compiled = torch.compile(DerivativeLoss(num_anchors=32, eta=0.0), backend="eager", fullgraph=True)
    assert_close(compiled(feats, labels), loss_of(*_dense(feats, labels, valid), eta=0.0), "loss")


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")  # torch calls it itself
@pytest.mark.parametrize("form", FORMS)
def test_transforms_of_a_sampled_loss(form):
    loss = DerivativeLoss(num_anchors=4)
    feats, target = draw(form, N=3)

    def one(x):
        torch.manual_seed(0)  # the anchors of every call
        return loss(x, target)

    batch = torch.stack((feats, feats.flip(1), feats.square()))
    vmapped = partial(torch.func.vmap, randomness="same")
    assert_close(vmapped(one)(batch), torch.stack([one(x) for x in batch]), "loss")
    gradients = torch.stack([torch.autograd.grad(one(x.requires_grad_()), x)[0] for x in batch.clone()])
    assert_close(vmapped(torch.func.grad(one))(batch), gradients, "gradient")
    with pytest.raises(RuntimeError, match=r"dlprop.*forward-mode"):
        torch.func.jvp(one, (feats,), (feats,))
    with pytest.raises(RuntimeError, match=r"dlprop.*twice"):
        torch.func.grad(lambda x: torch.func.grad(one)(x).square().sum())(feats)


@every_pair_term
@pytest.mark.parametrize("form", FORMS)
def test_the_host_waits_for_nothing(form, norm, num_anchors):
    # A meta tensor has no value that could be read.
    feats, target = (x.to("meta") for x in draw(form))
    mask = draw_mask().to("meta")
    feats.requires_grad_()
    loss_of(feats, target, mask=mask, norm=norm, num_anchors=num_anchors).backward()
    assert feats.grad.shape == feats.shape


# ---------------------------------------------------------------------------------------------------------------------
# The closed form of labels at order 0


@pytest.fixture
def closed_forms(monkeypatch):
    """A list that grows by one at every use of the closed form."""
    taken = []
    formula = loss_module._label_l1_of_fractions

    def spy(*arguments):
        taken.append(1)
        return formula(*arguments)

    monkeypatch.setattr(loss_module, "_label_l1_of_fractions", spy)
    return taken


@pytest.mark.parametrize(
    ("holds", "options", "sign"),
    [
        (True, {}, 1),
        (True, {"normalize": "softmax"}, 1),
        (True, {"normalize": "softmax"}, -1),
        (True, {"backend": "tiled", "max_order": 0, "reduction": "none"}, 1),
        (False, {}, -1),
        (False, {"normalize": "l2"}, 1),
        (False, {"normalize": None}, 1),
        (False, {"num_anchors": 4}, 1),
        (False, {"norm": "frobenius"}, 1),
    ],
)
def test_the_closed_form_is_taken_only_where_it_holds(closed_forms, holds, options, sign):
    formula = {name: value for name, value in options.items() if name not in ("backend", "num_anchors")}
    feats, labels, expected = draw_away_from_kinks("labels", nonnegative=True, options=formula)
    if sign < 0:
        feats[0, 2, 1, 1] *= -1
        expected = expect(feats, labels, **formula)
    actual = evaluate(feats, labels, **options)
    assert len(closed_forms) == holds
    if "num_anchors" not in options:
        assert_matches(actual, expected)


def test_the_closed_form_is_not_for_features(closed_forms):
    feats, target = draw("features", nonnegative=True)
    loss_of(feats, target)
    assert not closed_forms


def test_the_closed_form_is_never_the_answer_of_triton(closed_forms, monkeypatch):
    # The tiles answer in Triton's place, so that it runs anywhere.
    monkeypatch.setattr(_ops, "find_spec", lambda _: True)
    monkeypatch.setattr(tiled, "check_device", lambda _: None, raising=False)
    monkeypatch.setitem(_ops.KERNELS, "triton", "tiled")
    feats, labels, expected = draw_away_from_kinks("labels", nonnegative=True)
    assert_matches(evaluate(feats, labels, backend="triton"), expected)
    assert not closed_forms


def test_the_closed_form_looks_at_no_value_under_a_transform_or_a_compiler(closed_forms):
    feats, labels, expected = draw_away_from_kinks("labels", nonnegative=True)
    loss = DerivativeLoss()
    assert_matches((loss(feats, labels), torch.func.grad(loss)(feats, labels)), expected)
    assert len(closed_forms) == 1  # of the value alone
    del closed_forms[:]
    assert_close(torch.func.vmap(loss, (0, None))(feats[None], labels)[0], expected.value, "loss")
    assert_close(torch.compile(loss, backend="eager", fullgraph=True)(feats, labels), expected.value, "loss")
    assert not closed_forms


def test_a_zero_vector_or_nan_among_fractions(closed_forms):
    feats, labels = draw("labels", nonnegative=True, ignored=None)
    feats[0, :, 1, 1] = 0
    assert_close(loss_of(feats, labels), expect(feats, labels).value, "loss")
    assert len(closed_forms) == 1
    feats[0, 2, 0, 0] = torch.nan
    assert loss_of(feats, labels).isnan()


# ---------------------------------------------------------------------------------------------------------------------
# Autograd


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_gradcheck(form, norm, normalize):
    options = {"norm": norm, "normalize": normalize, "reduction": "none", "max_order": 1}
    feats, target, _ = draw_away_from_kinks(form, D=5, grid=(2, 2), margin=1e-4, options=options)
    gradcheck(lambda x: loss_of(x, target, chunk_size=3, **options), feats.requires_grad_())


@pytest.mark.parametrize("form", FORMS)
@every_exact_pair_term
def test_non_uniform_grad_output(form, norm, num_anchors):
    options = {"norm": norm, "reduction": "none"}
    feats, target, expected = draw_away_from_kinks(form, N=3, options=options)
    weights = torch.tensor([0.5, -2.0, 0.0], dtype=F64)
    actual = evaluate(feats, target, grad_output=weights, num_anchors=num_anchors, **options)
    gradient = expected.gradient * weights.reshape(3, 1, 1, 1).numpy()
    assert_matches(actual, expected._replace(gradient=gradient))


@pytest.mark.parametrize("form", FORMS)
@every_pair_term
def test_repeated_backward_is_exact(form, norm, num_anchors):
    feats, target = draw(form)
    feats.requires_grad_()
    value = loss_of(feats, target, norm=norm, num_anchors=num_anchors)
    first, second, doubled = (
        torch.autograd.grad(value, feats, torch.tensor(scale, dtype=F64), retain_graph=True)[0]
        for scale in (1.0, 1.0, 2.0)
    )
    assert torch.equal(first, second)
    assert torch.equal(2 * first, doubled)
    value.backward(retain_graph=True)
    value.backward()
    assert torch.equal(feats.grad, 2 * first)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("num_anchors", [None, 4])
@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_differentiating_twice_raises(form, normalize, num_anchors, eta):
    feats, target = draw(form)
    feats.requires_grad_()
    value = loss_of(feats, target, normalize=normalize, num_anchors=num_anchors, eta=eta)
    with pytest.raises(RuntimeError, match="twice"):
        torch.autograd.grad(torch.autograd.grad(value, feats, create_graph=True)[0].square().sum(), feats)


@every_pair_term
def test_no_gradient_flows_into_a_consistency_target(norm, num_anchors):
    options = {"norm": norm, "num_anchors": num_anchors}
    feats, target = draw("features")
    feats.requires_grad_()
    target.requires_grad_()
    loss_of(feats, target, **options).backward()
    assert target.grad is None
    assert feats.grad.abs().sum() > 0
    # Not even where the target is made of the features.
    alone = feats.detach().clone().requires_grad_()
    torch.manual_seed(0)
    loss_of(alone, alone.roll(1, 1), **options).backward()
    torch.manual_seed(0)
    assert torch.equal(alone.grad, evaluate(alone, alone.detach().roll(1, 1), **options)[1])
    # And with features that need no gradient there is no graph at all.
    assert not loss_of(feats.detach(), target, **options).requires_grad


def test_a_view_matched_to_itself_costs_only_the_sparsity():
    feats, _ = draw("features")
    for norm in NORMS:
        value = loss_of(feats, feats, norm=norm, eta=0.0)
        assert 0 <= value < 1e-15


def test_without_gradients_there_is_no_graph():
    for form, norm in itertools.product(FORMS, NORMS):
        feats, target = draw(form)
        expected = expect(feats, target, norm=norm)
        plain = loss_of(feats, target, norm=norm)
        assert not plain.requires_grad
        assert_close(plain, expected.value, "loss")
        with torch.no_grad():
            silent = loss_of(feats.requires_grad_(), target, norm=norm)
        assert not silent.requires_grad
        assert_close(silent, expected.value, "loss")
        with torch.inference_mode():
            assert_close(loss_of(feats.detach(), target, norm=norm), expected.value, "loss")


@pytest.mark.parametrize("form", FORMS)
@every_pair_term
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_inputs_are_never_modified(form, norm, normalize, num_anchors):
    feats, target = draw(form)
    inputs = (feats.requires_grad_(), target, draw_mask())
    before = [(x.detach().clone(), x._version) for x in inputs]
    options = {"norm": norm, "normalize": normalize, "num_anchors": num_anchors}
    loss_of(feats, target, mask=inputs[2], **options).backward()
    for x, (values, version) in zip(inputs, before, strict=True):
        assert torch.equal(x, values)
        assert x._version == version


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("max_order", [0, 1, 2])
def test_chunk_size_changes_nothing(form, max_order):
    options = {"max_order": max_order, "mask": draw_mask(grid=(5, 7)), "reduction": "none"}
    feats, target, expected = draw_away_from_kinks(form, grid=(5, 7), options=options)
    for chunk_size in (None, 1, 6, 34, 35, 36):
        assert_matches(evaluate(feats, target, chunk_size=chunk_size, **options), expected)
        sampled = {"num_anchors": 30, "chunk_size": chunk_size}  # more than there are valid pixels: all of them
        assert_matches(evaluate(feats, target, **sampled, **options), expected)


# ---------------------------------------------------------------------------------------------------------------------
# The dataclass that is a Module

OTHERS = {
    "max_order": 2,
    "eta": 0.25,
    "norm": "l1",
    "scheme": "central",
    "normalize": "softmax",
    "ignore_index": -1,
    "reduction": "none",
    "align_corners": False,
    "num_anchors": 3,
    "chunk_size": 5,
    "backend": "tiled",
}
every_module = pytest.mark.parametrize("options", [{}, OTHERS, {"norm": "frobenius"}], ids=["plain", "all", "squared"])


def test_options_are_attributes_and_fields():
    loss = DerivativeLoss(**OTHERS)
    assert {name: getattr(loss, name) for name in OTHERS} == OTHERS
    assert [field.name for field in dataclasses.fields(loss)] == list(OTHERS)
    assert all(field.kw_only for field in dataclasses.fields(loss))
    assert dataclasses.replace(loss, eta=0.5).eta == 0.5
    numbers = DerivativeLoss(max_order=np.int64(2), eta=np.float32(0.25), num_anchors=np.int32(3))
    assert [type(x) for x in (numbers.max_order, numbers.eta, numbers.num_anchors)] == [int, float, int]


@every_module
def test_module_prints_pickles_and_copies(options):
    loss = DerivativeLoss(**options)
    for field in dataclasses.fields(loss):
        assert f"{field.name}={getattr(loss, field.name)!r}" in repr(loss)
    assert repr(loss).startswith("DerivativeLoss(")
    feats, labels = draw("labels", ignored=loss.ignore_index)
    torch.manual_seed(0)
    expected = loss(feats, labels)
    for twin in (pickle.loads(pickle.dumps(loss)), copy.deepcopy(loss), copy.copy(loss).double().to("cpu")):
        assert repr(twin) == repr(loss)
        torch.manual_seed(0)
        assert torch.equal(twin(feats, labels), expected)


def test_module_has_no_state():
    loss = DerivativeLoss()
    assert not loss.state_dict()
    assert not list(loss.parameters())
    assert not list(loss.buffers())
    loss.load_state_dict({})
    assert loss.eval().training is False
    assert loss.train().training is True


def test_module_is_a_key_and_a_part_of_others():
    loss, twin = DerivativeLoss(), DerivativeLoss()
    assert loss != twin  # as every Module: equal options do not make two parts of a network one
    assert len({loss: 1, twin: 2}) == 2

    class Matched(torch.nn.Sequential):
        def forward(self, feats):
            return self[1](self[0](feats), feats)

    network = Matched(torch.nn.Conv2d(11, 7, 1), DerivativeLoss(eta=0.0, max_order=0))
    assert list(network.state_dict()) == ["0.weight", "0.bias"]
    network[0] = torch.nn.Identity()
    feats, _ = draw("features", dtype=F32)
    assert network(feats) < 1e-12
    losses = torch.nn.ModuleList([loss, twin, loss])
    assert list(losses.modules()) == [losses, loss, twin]
    assert "DerivativeLoss(max_order=1" in repr(losses)


@every_module
def test_compiled_module(options):
    loss = DerivativeLoss(**options)
    feats, labels = draw("labels", ignored=loss.ignore_index)
    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    values = []
    for module in (loss, compiled):
        torch.manual_seed(0)
        leaf = feats.clone().requires_grad_()
        value = module(leaf, labels)
        value.sum().backward()
        values.append((value, leaf.grad))
    assert_close(values[1][0], values[0][0].detach(), "loss")
    assert_close(values[1][1], values[0][1], "gradient")


# ---------------------------------------------------------------------------------------------------------------------
# Where a plausible implementation would answer wrongly without a word


def test_negative_labels_that_nobody_could_check_are_ignored():
    feats = torch.rand(1, 6, 4, dtype=F64)
    labels = torch.tensor([[-2, -2, -1, 3]])
    expected = loss_of(feats, torch.tensor([[255, 255, 255, 3]]))
    for backend in ("tiled", "auto"):
        compiled = torch.compile(DerivativeLoss(backend=backend), backend="eager", fullgraph=True)
        assert_close(compiled(feats, labels), expected, "loss")


def test_labels_of_a_tensor_subclass_are_checked():
    class Mask(torch.Tensor):
        pass

    labels = torch.full((1, 3, 3), -7).as_subclass(Mask)
    with pytest.raises(ValueError, match="target must hold labels"):
        loss_of(torch.rand(1, 6, 3, 3), labels)


def test_eight_bit_floats_are_refused():
    feats = torch.rand(1, 6, 3, 3).to(torch.float8_e4m3fn)
    with pytest.raises(TypeError, match=r"feats .* 16 bits or more.*float8"):
        loss_of(feats, torch.zeros(1, 3, 3, dtype=torch.int64))
