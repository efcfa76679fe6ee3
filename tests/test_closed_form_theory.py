"""The statements of docs/theory.md about ridge and discriminant: each name here is quoted on that page."""

from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn import linear_model
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from dlprop import theory
from dlprop.affinity import Linear
from dlprop.propagation import derivative_label_propagation
from dlprop.statistics import ClassStatistics

from .classifier_cases import propagate
from .oracles import classifier as oracle
from .oracles.features import SCHEMES, toeplitz
from .oracles.propagation import softmax
from .strategies import seeds
from .tolerances import assert_close

GOLDEN = (3 - np.sqrt(5)) / 2


def draw(seed, M=20, *, C=3, D=4):
    """Logits (C, M) and correlated features (D, M) of one image."""
    rng = np.random.default_rng(seed)
    mixing = np.eye(D) + 0.3 * rng.standard_normal((D, D))
    return 2 * rng.standard_normal((C, M)), mixing @ rng.standard_normal((D, M)) + rng.standard_normal((D, 1))


def library(form, L, V, **options):
    """`L'` of one image, as an array."""
    return propagate(form, torch.from_numpy(L)[None], torch.from_numpy(V)[None], **options)[0].numpy()


def hard(labels, C):
    """Logits whose softmax is one-hot."""
    return 80.0 * (labels == np.arange(C)[:, None])


# Eq. 4 as a step of a chain


@pytest.mark.parametrize("scheme", SCHEMES)
def test_eq_4_scores_pixels_by_class_sums(scheme):
    """Without the normalisation of the means, the bias and the prior, and with K for the inverse covariance."""
    L, V = draw(0)
    P, weights = softmax(L, axis=0), (1.0, 0.5)
    K = theory.derivative_metric(4, 1, weights, scheme)
    scores = oracle.statistics(P, V).sums @ K @ V
    affinity = Linear(weights=weights, scheme=scheme, normalize=None)
    P, V = (torch.from_numpy(x)[None] for x in (P, V))
    assert_close(derivative_label_propagation(P, V, affinity=affinity)[0], scores, "propagation")


def test_class_sums_let_the_large_class_win():
    """Two classes that no feature confuses: by their sums all are of the larger, by their means none is wrong."""
    labels = np.r_[np.zeros(90, int), np.ones(10, int)]
    rng = np.random.default_rng(0)
    V = np.array([[1.0, 0.8], [0.8, 1.0]])[labels].T + 0.01 * rng.standard_normal((2, 100))
    sums = oracle.statistics(np.eye(2)[labels].T, V).sums
    assert (np.argmax(sums @ V, axis=0) == 0).all()
    assert (np.argmax(library("discriminant", hard(labels, 2), V), axis=0) == labels).all()


# K as the precision of an AR(1) process


@pytest.mark.parametrize("rho", [-0.7, 0.0, 0.1, GOLDEN, 0.5, 0.95])
@pytest.mark.parametrize("D", [1, 2, 3, 8, 33])
def test_precision_of_an_ar1_process(D, rho):
    covariance = rho ** np.abs(np.subtract.outer(np.arange(D), np.arange(D)))
    assert_close(theory.ar1_precision(D, rho), np.linalg.inv(covariance), "classifier")


@given(st.integers(2, 12), st.floats(-0.9, 0.9))
def test_it_is_the_metric_up_to_two_corners(D, rho):
    """`(1 - rho^2) Sigma^{-1} = (1 - rho)^2 I + rho A_1^T A_1`, but for `rho (1 - rho)` more in both corners."""
    metric = (1 - rho) ** 2 * np.eye(D) + rho * toeplitz(D, 1).T @ toeplitz(D, 1)
    assert_close(metric, theory.derivative_metric(D, 1, ((1 - rho) ** 2, rho)), "classifier")
    corners = np.zeros((D, D))
    corners[0, 0] = corners[-1, -1] = rho * (1 - rho)
    assert_close((1 - rho**2) * theory.ar1_precision(D, rho), metric + corners, "classifier")


def test_equal_weights_are_one_correlation():
    """`(1 - rho)^2 = rho` at 0.382."""
    assert pytest.approx(GOLDEN) == (1 - GOLDEN) ** 2
    K = theory.derivative_metric(6, 1)
    precision = (1 - GOLDEN**2) / GOLDEN * theory.ar1_precision(6, GOLDEN)
    assert_close(precision[1:-1], K[1:-1], "classifier")
    assert pytest.approx(0.382, abs=1e-4) == GOLDEN


@pytest.mark.parametrize(
    ("D", "rho", "error"),
    [
        (0, 0.5, ValueError),
        (3.0, 0.5, TypeError),
        (3, 1.0, ValueError),
        (3, -1, ValueError),
        (3, float("nan"), ValueError),
    ],
)
def test_an_ar1_process_is_stationary(D, rho, error):
    with pytest.raises(error, match=r"D must|rho must"):
        theory.ar1_precision(D, rho)


# Maps of the features


@given(seeds, st.sampled_from(["discriminant", "ridge"]))
def test_differences_are_an_invertible_map_and_change_nothing(seed, form):
    """Without shrinkage, `D^1 V` with one channel beside it is as good as V."""
    L, V = draw(seed)
    B = np.vstack([toeplitz(4, 1), np.eye(4)[:1]])
    assert abs(np.linalg.det(B)) > 0.5
    plain, mapped = (np.exp(library(form, L, x, shrinkage=0.0)) for x in (V, B @ V))
    assert_close(mapped, plain, "invariance")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_derivative_features_add_nothing_without_shrinkage(scheme):
    """Stacked on the features, in the pseudo-inverse of their covariance."""
    L, V = draw(1)
    G = np.vstack([np.eye(4), toeplitz(4, 1, scheme)])
    own = oracle.statistics(softmax(L, axis=0), G @ V)
    scores = oracle.discriminant(own, G @ V, np.linalg.pinv(own.second / own.counts.sum()))
    assert_close(library("discriminant", L, V, shrinkage=0.0), np.log(softmax(scores, axis=0)), "invariance")


@given(seeds, st.sampled_from(SCHEMES), st.sampled_from([0.01, 1.0, 10.0]))
def test_derivative_features_are_the_prior_otherwise(seed, scheme, shrinkage):
    """`K = G^T G` with `G` the stacked `sqrt(w_q) A_q`: plain ridge regression on `G V` is that on V with prior
    `K^{-1}`, because the shortest b' with `G^T b' = b` has length `b^T K^{-1} b`."""
    L, V = draw(seed)
    weights = (1.0, 0.5)
    G = np.vstack([np.sqrt(w) * toeplitz(4, q, scheme) for q, w in enumerate(weights)])
    P, variances = softmax(L, axis=0), V.var(axis=1)
    alpha = 20 * shrinkage * variances.sum() / np.trace(np.linalg.inv(G.T @ G))
    fit = linear_model.Ridge(alpha=alpha, solver="cholesky").fit((G @ V).T, P.T)
    fitted = np.maximum(fit.predict((G @ V).T).T, 1e-6)
    options = {"shrinkage": shrinkage, "balance": 0.0, "weights": weights, "scheme": scheme}
    assert_close(np.exp(library("ridge", L, V, **options)), fitted / fitted.sum(axis=0), "classifier")


# The step as EM


@given(seeds, st.sampled_from([0.0, 0.1]))
def test_the_step_is_an_e_step_after_an_m_step(seed, shrinkage):
    """The posterior of a mixture of Gaussians: the means of the M-step, pulled towards the mean of all by one pixel,
    its shares, and the covariance of all pixels for the one within classes."""
    L, V = draw(seed)
    P = softmax(L, axis=0)
    counts, mu = P.sum(axis=1), V.mean(axis=1)
    means = (P @ V.T) / counts[:, None]  # M-step
    shares = counts / 20
    pulled = (counts[:, None] * means + mu) / (counts[:, None] + 1)
    Sigma = np.cov(V, bias=True)
    Sigma = Sigma + shrinkage * np.trace(Sigma) / 4 * np.eye(4)
    gaps = V[None] - pulled[:, :, None]
    density = np.exp(-np.einsum("cdi,de,cei->ci", gaps, np.linalg.inv(Sigma), gaps) / 2)
    joint = (shares + 1e-4)[:, None] * density  # E-step
    out = library("discriminant", L, V, shrinkage=shrinkage, weights=(1.0,))
    assert_close(np.exp(out), joint / joint.sum(axis=0), "classifier")


@given(seeds, st.floats(0.1, 50))
def test_leaning_means_are_most_probable(seed, k):
    """Where the slope of the log-posterior of the mean is 0: of the pixels, of one at `mu` and of k at the others'."""
    (L, V), (others, W) = draw(seed), draw(seed + 1)
    P, Q, mu = softmax(L, axis=0), softmax(others, axis=0), V.mean(axis=1)
    statistics = ClassStatistics(3, 4)
    statistics.update(torch.from_numpy(others)[None], torch.from_numpy(W)[None])
    counts, far = P.sum(axis=1)[:, None], Q.sum(axis=1)[:, None]
    theirs = (Q @ W.T + mu) / (far + 1)
    means = (P @ V.T + mu + k * theirs) / (counts + 1 + k)
    slope = P @ V.T - counts * means + (mu - means) + k * (theirs - means)
    assert np.abs(slope).max() < 1e-9 * (1 + k) * np.abs(V).max()
    Sigma = np.cov(V, bias=True)
    gaps = V[None] - means[:, :, None]
    inverse = np.linalg.inv(Sigma + 0.1 * np.trace(Sigma) / 4 * np.eye(4))
    joint = (counts / 20 + 1e-4) * np.exp(-np.einsum("cdi,de,cei->ci", gaps, inverse, gaps) / 2)
    out = library("discriminant", L, V, weights=(1.0,), statistics=statistics, pseudo_counts=k)
    assert_close(np.exp(out), joint / joint.sum(axis=0), "classifier")


@given(seeds)
def test_total_is_within_and_between(seed):
    """With soft labels too: `Sigma = sum_c n_c / n (Sigma_c + (mean_c - mu) (mean_c - mu)^T)`."""
    L, V = draw(seed)
    P = softmax(L, axis=0)
    counts, mu = P.sum(axis=1), V.mean(axis=1)
    total = np.zeros((4, 4))
    for c in range(3):
        mean = P[c] @ V.T / counts[c]
        gaps = V - mean[:, None]
        total += (P[c] * gaps) @ gaps.T + counts[c] * np.outer(mean - mu, mean - mu)
    assert_close(oracle.statistics(P, V).second, total, "classifier")
    assert_close(np.cov(V, bias=True) * 20, total, "classifier")


# Linear discriminant analysis


def direction(V, labels):
    """The slope of the second class against the first in the features."""
    L, V = torch.from_numpy(hard(labels, 2))[None], torch.from_numpy(V)[None]
    target = torch.zeros(1, len(V[0]), 1, dtype=torch.float64).requires_grad_()
    out = propagate("discriminant", L, V, target, shrinkage=0.0)
    return torch.autograd.grad(out[0, 1, 0] - out[0, 0, 0], target)[0][0, :, 0].numpy()


@given(seeds)
def test_two_classes_have_the_direction_of_linear_discriminant_analysis(seed):
    """`Sigma^{-1} d = Sigma_w^{-1} d / (1 + p_0 p_1 d^T Sigma_w^{-1} d)`: total for within covariance changes how
    steep the scores are, not where they point."""
    _, V = draw(seed)
    labels = np.arange(20) % 3 // 2  # 14 and 6
    analysis = LinearDiscriminantAnalysis(solver="lsqr").fit(V.T, labels)
    steepest = analysis.coef_[0]
    d = analysis.means_[1] - analysis.means_[0]
    p = np.array([14, 6]) / 20
    total = np.linalg.solve(np.cov(V, bias=True), d)
    assert_close(total, steepest / (1 + p[0] * p[1] * d @ steepest), "invariance")
    # Means pulled by one pixel each: 14/15 of the way on one side, 6/7 on the other.
    share = 6 / 7 * p[0] + 14 / 15 * p[1]
    assert_close(direction(V, labels), share * total, "invariance")


@given(seeds)
def test_more_classes_span_the_same_directions(seed):
    L, V = draw(seed, 30)
    labels = np.argmax(L, axis=0)
    labels[:3] = np.arange(3)
    mean = V.mean(axis=1)
    offsets = np.stack([V[:, labels == c].mean(axis=1) - mean for c in range(3)])
    counts = np.bincount(labels, minlength=3)
    total = np.cov(V, bias=True)
    within = total - np.einsum("c,cd,ce->de", counts / 30, offsets, offsets)
    both = np.vstack([np.linalg.solve(x, offsets.T).T for x in (total, within)])
    both = both / np.linalg.norm(both, axis=1, keepdims=True)
    assert np.linalg.svd(both)[1][2] < 1e-8 * np.linalg.svd(both)[1][0]  # two directions, as of either


# Nearest means and prototypes


def whitened(V):
    """Features of mean 0 and covariance I."""
    E = V - V.mean(axis=1, keepdims=True)
    values, vectors = np.linalg.eigh(np.cov(V, bias=True))
    return vectors / np.sqrt(values) @ vectors.T @ E


def test_with_a_covariance_of_one_it_is_the_nearest_mean():
    """Up to the prior: minus half of the squared distance to the pulled mean of every class."""
    L, V = draw(2)
    V, P = whitened(V), softmax(L, axis=0)
    counts = P.sum(axis=1)
    means = P @ V.T / (counts + 1)[:, None]
    distances = ((V[None] - means[:, :, None]) ** 2).sum(axis=1)
    scores = np.log(counts / 20 + 1e-4)[:, None] - distances / 2
    out = library("discriminant", L, V, shrinkage=0.0)
    assert_close(out, np.log(softmax(scores, axis=0)), "classifier")
    no_prior = out - np.log(counts / 20 + 1e-4)[:, None]
    assert (no_prior.argmax(axis=0) == distances.argmin(axis=0)).all()


def test_prototypes_of_one_length_need_no_bias():
    """T3A's prediction, a softmax of products with the means of the pseudo-labelled features: where classes are as
    large and their means as long as each other, bias and prior say nothing."""
    rng = np.random.default_rng(0)
    V = whitened(np.array([p for b in rng.standard_normal((5, 3)) for p in permutations(b)]).T)
    labels = np.argmax(V, axis=0)
    prototypes = np.stack([V[:, labels == c].sum(axis=1) / 11 for c in range(3)])
    assert_close(np.linalg.norm(prototypes, axis=1), np.full(3, np.linalg.norm(prototypes[0])), "classifier")
    out = library("discriminant", hard(labels, 3), V, shrinkage=0.0)
    assert_close(np.exp(out), softmax(prototypes @ V, axis=0), "classifier")
