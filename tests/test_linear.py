"""The linear affinity: Eq. 4 on paper, the two scales, and the degree of a target that has none to speak of."""

import numpy as np
import pytest
import torch

from dlprop import DerivativeLabelPropagation
from dlprop.affinity import Linear
from dlprop.theory import derivative_metric

from .oracles import features
from .propagation_cases import SIMILARITIES, expected, inputs, propagate, random_mask
from .tolerances import assert_close

similarities = pytest.mark.parametrize("similarity", SIMILARITIES)
resolutions = pytest.mark.parametrize("resolution", ["feats", "logits"])


def test_eq_4_by_hand():
    """L (S + D1S) for three pixels, on paper."""
    logits = torch.tensor([[[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]]])
    feats = torch.tensor([[[1.0, 0.0, 1.0], [0.0, 2.0, 1.0], [0.0, 0.0, 0.0]]])
    # V = e1, e2, (e1 + e2) / 2; D1 v = (-1, 0), (1, -1), (0, -1/2)
    # S = [[1, 0, 1/2], [0, 1, 1/2], [1/2, 1/2, 1/2]]; D1S = [[1, -1, 0], [-1, 2, 1/2], [0, 1/2, 1/4]]
    assert propagate("sum", logits, feats).tolist() == [[[4.0, -2.0, 1.0], [-1.0, 3.0, 1.0]]]


def test_negative_weights_are_allowed():
    logits, feats, _ = inputs("sum")
    out = propagate("sum", logits, feats, weights=(1, -0.5))
    assert_close(out, expected("sum", logits, feats, weights=(1, -0.5)), "propagation")


@pytest.mark.parametrize("scheme", features.SCHEMES)
def test_it_is_the_metric_of_the_theory(scheme):
    logits, feats, _ = inputs("sum", (12,), D=7)
    K = torch.from_numpy(derivative_metric(7, 2, (1.0, 0.5, 0.25), scheme))
    out = propagate("sum", logits, feats, weights=(1.0, 0.5, 0.25), scheme=scheme, normalize=None)
    assert_close(out, (logits @ feats.mT @ K @ feats).numpy(), "propagation")


@pytest.mark.parametrize("align_corners", [True, False])
def test_full_resolution_is_that_of_upsampled_features(align_corners):
    """The adjoint of the upsampling on the logits, and the upsampling after: as if the features had been upsampled."""
    logits, feats, _ = inputs("sum", (13, 10), (4, 3), D=6)
    full = torch.nn.functional.interpolate(feats, (13, 10), mode="bilinear", align_corners=align_corners)
    mask = random_mask(2, 13, 10)
    for m in (None, mask):
        options = {"normalize": None, "align_corners": align_corners, "mask": m}
        out = propagate("sum", logits, feats, resolution="logits", **options)
        assert_close(out, propagate("sum", logits, full, **options).numpy(), "propagation")


# The mean


def test_mean_is_sum_over_the_count_of_sources():
    logits, feats, _ = inputs("sum", (3, 4))
    mask = random_mask(2, 3, 4)
    total = propagate("sum", logits, feats)
    assert_close(propagate("mean", logits, feats), total.numpy() / 12, "propagation")
    total, counts = propagate("sum", logits, feats, mask=mask), mask.sum((1, 2))
    mean = propagate("mean", logits, feats, mask=mask)
    assert counts.tolist()[-1] == 1
    assert_close(mean, (total / counts[:, None, None, None]).numpy(), "propagation")


def test_mean_counts_the_points_it_propagates_on():
    """Without a mask feature pixels for "feats" and logit pixels for "logits", whatever grid the targets have."""
    logits, feats, target_feats = inputs("sum", (6, 8), (3, 2), (4, 5))
    for targets in (None, target_feats):
        for resolution, count in (("feats", 6), ("logits", 48)):
            total, mean = (propagate(form, logits, feats, targets, resolution=resolution) for form in ("sum", "mean"))
            assert_close(mean, total.numpy() / count, "propagation")


@resolutions
def test_mean_of_masked_sources_is_over_what_they_weigh(resolution):
    """On the features' grid of 6 points for 48 pixels each weighs an eighth, and neither gets lost on the way."""
    logits, feats, target_feats = inputs("sum", (6, 8), (3, 2), (4, 5))
    mask = random_mask(2, 6, 8)
    weight = mask.sum((1, 2))[:, None, None, None] * (1 / 8 if resolution == "feats" else 1)
    for targets in (None, target_feats):
        total, mean = (
            propagate(form, logits, feats, targets, mask=mask, resolution=resolution) for form in ("sum", "mean")
        )
        assert_close(mean, (total / weight).numpy(), "propagation")


def test_one_source_weighs_the_same_wherever_it_falls():
    """On a point of the features or between them; without a mask it would be a fraction, or nothing."""
    feats = torch.ones(1, 2, 3, 3, dtype=torch.float64)
    logits = torch.full((1, 1, 6, 6), 7.0, dtype=torch.float64)
    for at in ((0, 0), (2, 2), (1, 4), (5, 5)):
        mask = torch.zeros(1, 6, 6, dtype=torch.bool)
        mask[0, at[0], at[1]] = True
        for align_corners in (True, False):
            for form, want in (("sum", 7 * 9 / 36), ("mean", 7), ("degree", 7)):
                options = {"mask": mask, "normalize": None, "weights": (0.5,), "align_corners": align_corners}
                out = propagate(form, logits, feats, **options)
                assert_close(out, np.full(out.shape, want), "propagation")


@resolutions
def test_all_sources_weigh_as_much_as_none_masked(resolution):
    """Where nothing varies a mask of True alone changes nothing, on a finer and on a coarser grid."""
    for grid in ((6, 8), (2, 3), (4, 5)):
        logits, feats = (torch.full((1, k, *size), 2.0, dtype=torch.float64) for k, size in ((3, grid), (5, (4, 5))))
        mask = torch.ones(1, *grid, dtype=torch.bool)
        for form in ("sum", "mean", "degree", "softmax"):
            plain, masked = (propagate(form, logits, feats, mask=m, resolution=resolution) for m in (None, mask))
            assert_close(masked.mean(), plain.mean().numpy(), "propagation")


# The degree


@similarities
def test_degree_is_an_affine_combination(similarity):
    """Constant logits stay constant, whatever the mask and the grid."""
    for grid in ((3, 4), (7, 5)):
        logits, feats, _ = inputs("degree", grid, (3, 4))
        logits = torch.ones_like(logits) * torch.tensor([1.0, -2.0, 5.0], dtype=logits.dtype)[:, None, None]
        for mask in (None, random_mask(2, *grid)):
            out = propagate("degree", logits, feats, mask=mask, similarity=similarity)
            assert_close(out, logits.numpy(), "propagation")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_target_without_positive_degree_keeps_its_logits(dtype):
    """Degrees 2 v_j: positive, positive, positive, negative, zero."""
    feats = torch.tensor([[[1.0, 2.0, 3.0, -4.0, 0.0]]], dtype=dtype)
    logits = torch.tensor([[[1.0, 2.0, 3.0, 7.0, -5.0]]], dtype=dtype)
    options = {"weights": (1.0,), "normalize": None}
    out = propagate("degree", logits, feats, **options)
    assert out[0, 0, 3:].tolist() == [7.0, -5.0]
    assert_close(out[0, 0, :3], np.full(3, (1 + 4 + 9 - 28) / 2), "propagation")
    out = propagate("degree", logits, feats, feats.clone(), **options)
    assert out[0, 0, 3:].tolist() == [0.0, 0.0]
    assert_close(out[0, 0, :3], np.full(3, (1 + 4 + 9 - 28) / 2), "propagation")
    masked = propagate("degree", logits, feats, mask=torch.tensor([[True, False, True, False, False]]), **options)
    assert_close(masked, [[[2.5, 2.5, 2.5, 7.0, -5.0]]], "propagation")


def test_a_masked_target_without_positive_degree_keeps_its_logits_too():
    """The mask is about sources: as a target, the pixel is as good as any."""
    feats = torch.tensor([[[1.0, 2.0, -1.0, 0.0]]])
    logits = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]])
    mask = torch.tensor([[True, True, False, False]])
    out = propagate("degree", logits, feats, mask=mask, weights=(1.0,), normalize=None)
    assert_close(out, [[[5 / 3, 5 / 3, 3.0, 4.0]]], "propagation")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("cross", [False, True])
def test_the_threshold_is_a_thousandth_of_the_images_mean_degree(cross, dtype):
    """One channel and one source of 1, so the degree of a target is its feature: the last one is in question."""
    logits = torch.tensor([[[10.0, 3.0, 3.0, 3.0, 3.0]]], dtype=dtype)
    mask = torch.tensor([[True, False, False, False, False]])
    for last, falls_back in ((0.0008, True), (0.0012, False), (-0.5, True), (0.0, True)):
        feats = torch.tensor([[[1.0, 2.0, 1.0, 1.0, last]]], dtype=dtype)  # the mean is 1, or 1.1 with -0.5
        out = propagate(
            "degree", logits, feats, feats.clone() if cross else None, mask=mask, normalize=None, weights=(1,)
        )
        kept = 0.0 if cross else 3.0
        assert_close(out, [[[10.0] * 4 + [kept if falls_back else 10.0]]], "propagation")


def test_the_threshold_is_that_of_the_image():
    """A batch of a bright image and a dark one: what is small in the one is not in the other."""
    bright = torch.rand(1, 5, 6, dtype=torch.float64) + 0.3
    feats = torch.cat((bright, 1e-4 * bright))
    logits = torch.randn(2, 3, 6, dtype=torch.float64)
    out = propagate("degree", logits, feats, normalize=None)
    for n in range(2):
        assert_close(
            out[n : n + 1], propagate("degree", logits[n : n + 1], bright, normalize=None).numpy(), "propagation"
        )
    feats[0, :, 0] *= 1e-4
    assert torch.equal(propagate("degree", logits, feats, normalize=None)[0, :, 0], logits[0, :, 0])


@pytest.mark.parametrize("normalize", ["l1", "l2", None])
@similarities
def test_signed_features_do_not_explode(similarity, normalize):
    """An output is at most 1000 times the plain sum over the image's mean absolute degree, or the target's own logits.

    With inputs in [0, 1] the plain sum is a few mean degrees, so a few thousand at most. Among 200 images of random
    features of either sign are many divisors nearer to zero than that.
    """
    options = {"similarity": similarity, "normalize": normalize}
    L, V = torch.rand(200, 3, 256, dtype=torch.float64), torch.randn(200, 16, 256, dtype=torch.float64)
    degree = propagate("sum", torch.ones_like(L[:, :1]), V, **options)
    mean_degree = degree.abs().mean(2, keepdim=True)
    total = propagate("sum", L, V, **options)
    out = propagate("degree", L, V, **options)
    falls_back = degree <= mean_degree / 1000
    assert (falls_back & (degree > 0)).sum() >= 5
    assert torch.equal(out.where(falls_back, 0), L.where(falls_back, 0))
    assert (out.abs() <= 1000 * total.abs() / mean_degree + 1e-9).logical_or(falls_back).all()
    assert out.abs().max() < 5000


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("normalize", ["l1", "l2", None])
@pytest.mark.parametrize("scheme", ["forward", "central", "sum", "laplacian"])
@similarities
def test_degrees_that_are_roundings_count_as_none(similarity, scheme, normalize, dtype):
    """Every vector has its negative, so all degrees are 0 but for roundings; divided by these, logits were 1e16."""
    options = {"similarity": similarity, "scheme": scheme, "normalize": normalize, "weights": (0.5, 9.0)}
    half = torch.randn(2, 7, 50, dtype=torch.float64).to(dtype)
    for size in (1.0, 1e-4, 300.0):
        V = size * torch.cat((half, -half), dim=2)
        L = torch.randn(2, 3, 100, dtype=torch.float64).to(dtype)
        assert torch.equal(propagate("degree", L, V, **options), L)
        assert not propagate("degree", L, V, V.flip(2), **options).any()
        ones = torch.ones_like(L)  # come back where degrees are no roundings, however small the features
        affine = propagate("degree", ones, V.abs(), V.flip(2).abs(), **options | {"weights": (1.0,)})
        assert_close(affine, ones.double().numpy(), "propagation")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("normalize", ["l1", "l2", None])
def test_differences_of_smooth_features(normalize, dtype):
    """Of order 1 alone: degrees between constant vectors and others are roundings, between slight ramps not."""
    options = {"normalize": normalize, "weights": (0.0, 1.0)}
    constant, L = torch.rand(2, 1, 50, dtype=dtype).expand(-1, 7, -1) + 0.3, torch.randn(2, 3, 50, dtype=dtype)
    other = torch.rand(2, 7, 50, dtype=dtype)
    assert not propagate("degree", L, other, constant, **options).any()
    assert not propagate("degree", L, constant, other, **options).any()
    ramps = constant + 0.01 * torch.arange(7, dtype=dtype)[:, None]
    ones = torch.ones_like(L)
    assert_close(propagate("degree", ones, ramps, ramps.flip(2), **options), ones.double().numpy(), "propagation")


def test_infinite_degrees_are_not_hidden():
    """No degree is above a thousandth of an infinite mean; that is no reason to keep the logits."""
    for weights in ((1.0,), (1.0, 1.0)):
        logits, feats, targets = inputs("degree", (6,), None, (4,), N=1)
        feats[0, 1, 4] = torch.inf
        assert not propagate("degree", logits, feats, weights=weights, normalize=None).isfinite().any()
        assert not propagate("degree", logits, feats, targets, weights=weights, normalize=None).isfinite().any()


@pytest.mark.parametrize("align_corners", [True, False])
@resolutions
@pytest.mark.parametrize("target", [None, (3, 2), (2, 2)])
def test_fallback_on_another_grid(target, resolution, align_corners):
    """A zero feature vector has degree zero; on the features' grid it falls back to the resized logits."""
    options = {"resolution": resolution, "align_corners": align_corners}
    logits, feats, target_feats = inputs("degree", (5, 4), (3, 2), target)
    feats[:, :, 1] = 0
    if target is not None:
        target_feats[:, :, 1] = 0
    mask = random_mask(2, 5, 4)
    for m in (None, mask):
        out = propagate("degree", logits, feats, target_feats, mask=m, **options)
        assert_close(out, expected("degree", logits, feats, target_feats, mask=m, **options), "propagation")


@pytest.mark.parametrize("cross", [False, True])
def test_gradient_through_the_fallback(cross):
    """Finite, and the identity (or zero) for the target that fell back."""
    _, feats, _ = inputs("degree", (2, 3), N=1)
    feats[..., 0, 0] = 0
    logits = torch.randn(1, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    feats.requires_grad_()
    out = propagate("degree", logits, feats, feats.detach() if cross else None)
    grad = torch.zeros_like(out)
    grad[..., 0, 0] = torch.tensor([1.0, -2.0])
    out.backward(grad)
    want = torch.zeros_like(grad) if cross else grad
    assert torch.equal(logits.grad, want)
    assert torch.equal(feats.grad, torch.zeros_like(feats))


# The object


def test_weights_are_copied():
    weights = [1.0, 0.5]
    affinity = Linear(weights=weights)
    weights[1] = 100.0
    assert affinity.weights == (1.0, 0.5)
    logits, feats, _ = inputs("sum")
    assert_close(
        DerivativeLabelPropagation(affinity)(logits, feats),
        expected("sum", logits, feats, weights=(1.0, 0.5)),
        "propagation",
    )


def test_it_is_frozen_and_compares_by_its_options():
    assert Linear(weights=[1, 1]) == Linear() != Linear(scale="mean")
    assert hash(Linear(weights=[1, 1])) == hash(Linear())
    with pytest.raises(AttributeError, match="weights"):
        Linear().weights = (2.0,)
