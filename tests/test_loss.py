"""The derivative loss, Eq. 8 and 9, against the float64 oracle and at every edge of its domain."""

import itertools

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

from dlprop import DerivativeLoss
from tests.loss_cases import (
    FORMS,
    assert_matches,
    draw,
    draw_away_from_kinks,
    draw_direction,
    draw_mask,
    evaluate,
    every_pair_term,
    expect,
    loss_of,
)
from tests.oracles import loss as oracle
from tests.oracles.features import NORMALIZATIONS, SCHEMES
from tests.tolerances import assert_close

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
NORMS = ("l1", "frobenius")
REDUCTIONS = ("none", "mean", "sum")

every_exact_pair_term = pytest.mark.parametrize(
    ("norm", "num_anchors"), [("l1", None), ("l1", 10**6), ("frobenius", None)]
)


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
    direction = draw_direction(feats)
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
    assert not gradient[ignored].any()
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
