"""The discriminant: stored statistics, against scikit-learn, and the metric; the rest is in test_classifiers.py."""

import itertools
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch.autograd import gradcheck

from dlprop import DerivativeLabelPropagation
from dlprop.affinity import Discriminant, Ridge
from dlprop.statistics import ClassStatistics
from dlprop.theory import derivative_metric

from .classifier_cases import assert_matches, compare, draw, expected, inputs, propagate, stored
from .propagation_cases import random_mask
from .strategies import seeds
from .tolerances import assert_close


@pytest.mark.parametrize("across", ["image", "batch", "stored"])
def test_stored_statistics(across):
    logits, feats, target_feats = inputs((9, 7), (4, 5), (3, 2))
    statistics = stored()
    before = [x.clone() for x in statistics.buffers()]
    for targets in (None, target_feats):
        for resolution in ("feats", "logits"):
            options = {"across": across, "statistics": statistics, "resolution": resolution}
            compare("discriminant", logits, feats, targets, mask=random_mask(2, 9, 7), **options)
    assert all(torch.equal(x, y) for x, y in zip(before, statistics.buffers(), strict=True))


def test_stored_statistics_are_more_pixels():
    """Those of an image that is stored, and no pixel of one's own: as if one were that image."""
    logits, feats, target_feats = inputs(N=1, target_grid=(3, 2))
    statistics = ClassStatistics(3, 4)
    statistics.update(logits, feats)
    other, other_feats, _ = inputs(N=1)
    pair = torch.cat((logits, other), 3), torch.cat((feats, other_feats), 3)
    wanted = propagate("discriminant", *pair, target_feats)
    actual = propagate("discriminant", other, other_feats, target_feats, statistics=statistics)
    assert_close(actual, wanted.numpy(), "classifier")


def test_stored_statistics_alone_leave_the_logits_unread():
    """An image that they contain is not counted twice, and features alone are judged."""
    logits, feats, _ = inputs()
    statistics = ClassStatistics(3, 4)
    statistics.update(logits, feats)
    by_stored = partial(propagate, "discriminant", across="stored", statistics=statistics)
    out = by_stored(logits, feats)
    assert_close(out, propagate("discriminant", logits, feats, across="batch").numpy(), "classifier")
    assert torch.equal(by_stored(torch.randn_like(logits), feats), out)
    one = by_stored(logits[:1, :, :1, :1], feats[:1, :, :1, :1])
    assert_close(one, out[:1, :, :1, :1].numpy(), "classifier")
    assert gradcheck(lambda x: by_stored(logits, x), (feats.requires_grad_(),))
    assert not by_stored(logits.requires_grad_(), feats.detach()).requires_grad


@pytest.mark.parametrize("statistics", [None, stored()], ids=["batch", "stored"])
def test_class_means_lean_on_others(statistics):
    logits, feats, target_feats = inputs((9, 7), (4, 5), (3, 2), N=3)
    logits[0, 1] = -50.0  # a class that the first image does not have
    for k, mask in itertools.product((0.5, 10.0), (None, random_mask(3, 9, 7))):
        for targets, resolution in itertools.product((None, target_feats), ("feats", "logits")):
            options = {"pseudo_counts": k, "statistics": statistics, "resolution": resolution}
            compare("discriminant", logits, feats, targets, mask=mask, **options)


def test_an_image_alone_leans_on_itself():
    logits, feats, _ = inputs(N=1)
    out = propagate("discriminant", logits, feats, pseudo_counts=10.0)
    assert_close(out, propagate("discriminant", logits, feats).numpy(), "classifier")
    empty = propagate("discriminant", logits, feats, pseudo_counts=1e-9, statistics=ClassStatistics(3, 4))
    assert_close(empty, out.numpy(), "classifier")


def test_an_image_without_a_source_knows_nothing():
    logits, feats, _ = inputs()
    mask = torch.ones(2, 4, 5, dtype=torch.bool)
    mask[1] = False
    for options in ({}, {"statistics": stored()}):
        out = propagate("discriminant", logits, feats + 9, mask=mask, pseudo_counts=10.0, **options)
        assert_close(out[1].exp(), np.full((3, 4, 5), 1 / 3), "classifier")


def test_gradients_through_what_others_lean_on():
    logits, feats, _ = inputs((2, 3))
    for options in ({}, {"statistics": stored()}):
        leaning = partial(propagate, "discriminant", pseudo_counts=2.0, **options)
        assert gradcheck(leaning, (logits.requires_grad_(), feats.requires_grad_()))


def test_an_empty_store_alone_is_refused():
    logits, feats, _ = inputs()
    with pytest.raises(ValueError, match="statistics hold no pixel yet"):
        propagate("discriminant", logits, feats, statistics=ClassStatistics(3, 4), across="stored")


def test_an_empty_store_adds_nothing():
    logits, feats, _ = inputs()
    out = propagate("discriminant", logits, feats, statistics=ClassStatistics(3, 4))
    assert_close(out, propagate("discriminant", logits, feats).numpy(), "classifier")


@pytest.mark.parametrize("pseudo_counts", [0.0, 10.0])
def test_backward_after_another_update(pseudo_counts):
    """What backward needs of the statistics is no buffer, which the update overwrites."""
    logits, feats, _ = inputs()
    statistics = stored()
    judged = partial(propagate, "discriminant", statistics=statistics, pseudo_counts=pseudo_counts)
    wanted = torch.autograd.grad(judged(logits.requires_grad_(), feats.requires_grad_())[0, 0].sum(), (logits, feats))
    out = judged(logits, feats)
    statistics.update(logits, feats)
    assert not any(x.requires_grad for x in statistics.buffers())
    for x, y in zip(torch.autograd.grad(out[0, 0].sum(), (logits, feats)), wanted, strict=True):
        assert torch.equal(x, y)


def test_statistics_of_other_sizes_are_refused():
    logits, feats, _ = inputs()
    for C, D in ((2, 4), (3, 5)):
        with pytest.raises(ValueError, match=rf"statistics .*\(3, 4\), got \({C}, {D}\)"):
            propagate("discriminant", logits, feats, statistics=ClassStatistics(C, D))


@pytest.mark.parametrize("options", [{}, {"statistics": stored(), "across": "batch"}])
def test_gradients_beside_stored_statistics(options):
    logits, feats, _ = inputs((2, 3))
    leaves = logits.requires_grad_(), feats.requires_grad_()
    assert gradcheck(lambda *x: propagate("discriminant", *x, **options), leaves)


def test_all_sources_masked_beside_stored_statistics():
    """What is stored decides alone."""
    logits, feats, _ = inputs()
    statistics = stored()
    module = DerivativeLabelPropagation(Discriminant(statistics=statistics))
    mask = torch.zeros(2, 4, 5, dtype=torch.bool)
    out = torch.compile(module, backend="eager")(logits, feats, mask=mask)
    assert_matches("discriminant", out, expected("discriminant", logits, feats, mask=mask, statistics=statistics))


def test_statistics_must_be_statistics():
    with pytest.raises(ValueError, match="across='stored' needs statistics"):
        Discriminant(across="stored")
    with pytest.raises(ValueError, match="across must be one of"):
        Ridge(across="stored")
    with pytest.raises(ValueError, match="normalize must be None with statistics"):
        Discriminant(statistics=stored(), normalize="l2")
    with pytest.raises(ValueError, match="pseudo_counts must be finite and at least 0"):
        Discriminant(pseudo_counts=-1)
    with pytest.raises(ValueError, match="pseudo_counts are for across='image', got 10 with 'batch'"):
        Discriminant(pseudo_counts=10, across="batch")
    with pytest.raises(TypeError, match="statistics must be a ClassStatistics or None, got dict"):
        Discriminant(statistics={})
    with pytest.raises(TypeError, match="statistics"):
        Ridge(statistics=stored())


class TotalCovariance:
    """What scikit-learn asks for the covariance of a class: that of all pixels."""

    def __init__(self, covariance):
        self.covariance_ = covariance

    def fit(self, X):
        return self


@given(seeds, st.integers(2, 4), st.integers(15, 30), st.sampled_from([0.0, 0.1, 1.0]))
def test_hard_labels_are_linear_discriminant_analysis(seed, C, M, shrinkage):
    """scikit-learn's, with the covariance of all pixels for that within classes, means that are `n_c / (n_c + 1)` of
    the way from the mean of all to those of the classes, and the prior `n_c / n + 1e-4`."""
    _, feats = draw(seed, M)
    labels = np.r_[np.arange(C), np.arange(C), np.random.default_rng(seed).integers(0, C, M - 2 * C)]
    logits = 80.0 * torch.nn.functional.one_hot(torch.from_numpy(labels), C).double().T[None]
    V = feats[0].numpy().T
    mean, counts = V.mean(axis=0), np.bincount(labels)
    Sigma = np.cov(V.T, bias=True)
    Sigma = Sigma + shrinkage * np.trace(Sigma) / 4 * np.eye(4)
    offsets = np.stack([V[labels == c].mean(axis=0) - mean for c in range(C)])
    prior = counts / M + 1e-4
    analysis = LinearDiscriminantAnalysis(
        solver="lsqr", covariance_estimator=TotalCovariance(Sigma), priors=prior / prior.sum()
    )
    analysis.fit(V - mean - (offsets / (counts + 1)[:, None])[labels], labels)
    out = propagate("discriminant", logits, feats, shrinkage=shrinkage, weights=(1.0,))
    assert_close(out[0], analysis.predict_log_proba(V - mean).T, "classifier")


@pytest.mark.parametrize("scheme", ["forward", "central", "sum", "laplacian"])
def test_tends_to_the_metric_as_shrinkage_grows(scheme):
    """`Sigma_s^{-1}` becomes a multiple of K, and what is left of the scores lies along `m_c^T K (v_j - mu)`."""
    (logits, feats), weights, shrinkage = draw(0, 30), (1.0, 0.5), 1e6
    K = derivative_metric(4, 1, weights, scheme)
    out = propagate("discriminant", logits, feats, shrinkage=shrinkage, weights=weights, scheme=scheme)[0].numpy()
    P, V = logits[0].softmax(0).numpy(), feats[0].numpy()
    mean, counts = V.mean(axis=1, keepdims=True), P.sum(axis=1)
    m = (P @ (V - mean).T) / (counts + 1)[:, None]
    scores = m @ K @ (V - mean) - np.diag(m @ K @ m.T)[:, None] / 2
    left = out - np.log(counts / 30 + 1e-4)[:, None]
    x, y = (a - a[:1] for a in (left, scores))  # the classes against the first: the normalisation drops out
    cosine = (x * y).sum() / np.sqrt((x**2).sum() * (y**2).sum())
    assert cosine > 1 - 1e-9
    scale = np.linalg.inv(K).trace() / np.trace(np.cov(V, bias=True)) / shrinkage
    np.testing.assert_allclose(x, scale * y, rtol=1e-4, atol=1e-9)
