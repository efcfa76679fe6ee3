"""Ridge propagation: by hand, against scikit-learn, and what it leaves alone; the rest is in test_classifiers.py."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn import linear_model

from dlprop.affinity import Ridge
from dlprop.theory import derivative_metric

from .classifier_cases import assert_matches, draw, expected, inputs, propagate
from .propagation_cases import random_mask
from .strategies import seeds
from .tolerances import assert_close


def linear_probabilities(seed, M, *, C=3, D=4):
    """Features, and probabilities that are linear in them and far from 0."""
    _, feats = draw(seed, M, D=D)
    slopes = np.random.default_rng(seed + 1).standard_normal((C, D))
    slopes = slopes - slopes.mean(axis=0)
    P = torch.from_numpy(slopes) @ (feats - feats.mean(2, keepdim=True))
    return 1 / C + P * (0.8 / C / P.abs().max()), feats


def test_least_squares_by_hand():
    """Two pairs of pixels: the fit through two points is the mean of either pair."""
    P = torch.tensor([[[0.8, 0.4, 0.2, 0.2], [0.2, 0.6, 0.8, 0.8]]], dtype=torch.float64)
    feats = torch.tensor([[[-1.0, -1.0, 1.0, 1.0]]], dtype=torch.float64)
    out = propagate("ridge", P.log(), feats, shrinkage=0, balance=0, weights=(1,))
    assert_close(out.exp(), [[[0.6, 0.6, 0.2, 0.2], [0.4, 0.4, 0.8, 0.8]]], "classifier")
    # With shrinkage 1 the variance doubles: halfway back to the mean of all, 0.4 and 0.6.
    out = propagate("ridge", P.log(), feats, shrinkage=1, balance=0, weights=(1,))
    assert_close(out.exp(), [[[0.5, 0.5, 0.3, 0.3], [0.5, 0.5, 0.7, 0.7]]], "classifier")


def test_a_fit_outside_of_the_simplex_is_clipped():
    P = torch.tensor([[[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]], dtype=torch.float64)
    feats = torch.tensor([[[0.0, 1.0, 2.0]]], dtype=torch.float64)  # fitted: 7/6, 2/3, 1/6
    out = propagate("ridge", 200 * P, feats, shrinkage=0, balance=0, weights=(1,))
    first = np.array([7 / 6 / (7 / 6 + 1e-6), 2 / 3, 1 / 6])
    assert_close(out[0].exp(), np.stack([first, 1 - first]), "classifier")
    assert_close(out[0, 1, 0], np.log(1e-6 / (7 / 6 + 1e-6)), "classifier")


@given(seeds, st.integers(6, 25), st.sampled_from([1e-3, 0.03, 1.0, 30.0]), st.sampled_from([0.0, 0.3, 1.0]))
def test_it_is_weighted_ridge_regression(seed, M, shrinkage, balance):
    """scikit-learn's, with an intercept, where the prior is the identity."""
    logits, feats = draw(seed, M)
    P, V = logits[0].softmax(0).numpy(), feats[0].numpy().T
    sizes = P.sum(axis=1)
    w = ((sizes + 1) / M) ** -balance @ P
    mean = w @ V / w.sum()
    alpha = shrinkage * (w @ (V - mean) ** 2).sum() / 4
    fitted = linear_model.Ridge(alpha=alpha, solver="cholesky").fit(V, P.T, sample_weight=w).predict(V).T
    clipped = np.maximum(fitted, 1e-6)
    out = propagate("ridge", logits, feats, shrinkage=shrinkage, balance=balance, weights=(1.0,))
    assert_close(out[0].exp(), clipped / clipped.sum(axis=0), "classifier")


@given(seeds, st.integers(8, 20), st.sampled_from([0.0, 0.5, 1.0]))
def test_a_prediction_linear_in_the_features_comes_back(seed, M, balance):
    P, feats = linear_probabilities(seed, M)
    out = propagate("ridge", P.log(), feats, shrinkage=0.0, balance=balance)
    assert_close(out.exp(), P.numpy(), "invariance")


def test_noise_that_no_feature_explains_is_removed():
    P, feats = linear_probabilities(0, 4000)
    rng = np.random.default_rng(2)
    noisy = (P + 0.05 * torch.from_numpy(rng.uniform(-1, 1, P.shape))).clamp_min(1e-3)
    noisy = noisy / noisy.sum(1, keepdim=True)
    out = propagate("ridge", noisy.log(), feats, balance=0.0)
    before, after = ((x - P).square().mean() for x in (noisy, out.exp()))
    assert after < before / 20


def test_balance_hears_small_classes():
    """A class of few pixels that one channel explains: the more balance, the nearer its pixels come to it."""
    labels = torch.zeros(200, dtype=torch.long)
    labels[:6] = 1
    feats = torch.randn(1, 3, 200, dtype=torch.float64)
    feats[0, 0] += 2.0 * labels
    logits = 4.0 * torch.nn.functional.one_hot(labels, 2).double().T[None]
    found = [propagate("ridge", logits, feats, balance=b).exp()[0, 1, :6].mean() for b in (0.0, 0.5, 1.0)]
    assert found[0] < found[1] - 0.1 < found[2] - 0.2


def test_balance_counts_the_sources_of_a_mask_and_of_a_batch():
    logits, feats, _ = inputs()
    mask = random_mask(2, 4, 5)
    for options in ({"balance": 0.0}, {"balance": 1}, {"balance": 1.0, "across": "batch"}):
        out = propagate("ridge", logits, feats, mask=mask, **options)
        assert_matches("ridge", out, expected("ridge", logits, feats, mask=mask, **options))


@pytest.mark.parametrize(
    ("balance", "error"), [(-0.1, ValueError), (1.1, ValueError), ("1", TypeError), (True, TypeError)]
)
def test_balance_is_checked_at_construction(balance, error):
    with pytest.raises(error, match="balance"):
        Ridge(balance=balance)


def test_tends_to_the_metric_as_shrinkage_grows():
    """What is left of the fit lies along the cross covariance times K."""
    (logits, feats), weights, shrinkage = draw(0, 30), (1.0, 0.5), 1e6
    K = derivative_metric(4, 1, weights)
    out = propagate("ridge", logits, feats, shrinkage=shrinkage, balance=0.0, weights=weights)[0].exp().numpy()
    P, V = logits[0].softmax(0).numpy(), feats[0].numpy()
    pi, E = P.mean(axis=1, keepdims=True), V - V.mean(axis=1, keepdims=True)
    scale = np.linalg.inv(K).trace() / np.trace(np.cov(V, bias=True)) / shrinkage
    wanted = scale * ((P - pi) @ E.T / 30) @ K @ E
    np.testing.assert_allclose(out - pi, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())
