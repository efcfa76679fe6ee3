"""The algebra: Toeplitz matrices, the metric K, both bounds, and what of the paper's theorems does not hold."""

from itertools import product
from math import comb

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dlprop
from dlprop import theory

from .oracles import features
from .strategies import adversarial_features, operators
from .tolerances import assert_close

SCHEMES = features.SCHEMES


def similarity(V, order, **options):
    """S_q of (D, M) features by the library, not normalised unless asked."""
    options = {"normalize": None, **options}
    return dlprop.derivative_similarity(torch.as_tensor(V)[None], order=order, **options)[0].numpy()


# Toeplitz matrices, Eq. 13-14


@given(operators())
def test_toeplitz_matrix_is_the_one_of_eq_14(operator):
    D, order, scheme = operator
    A = theory.toeplitz_matrix(D, order, scheme)
    assert A.dtype == np.float64
    np.testing.assert_array_equal(A, features.toeplitz(D, order, scheme))


def test_toeplitz_matrix_entries_are_signed_binomials():
    A = theory.toeplitz_matrix(9, 4)
    assert A.shape == (5, 9)
    np.testing.assert_array_equal(A[2], [0, 0, 1, -4, 6, -4, 1, 0, 0])
    np.testing.assert_array_equal(theory.toeplitz_matrix(4, 1), [[-1, 1, 0, 0], [0, -1, 1, 0], [0, 0, -1, 1]])
    np.testing.assert_array_equal(theory.toeplitz_matrix(5, 1, "central")[1], [0, -0.5, 0, 0.5, 0])
    np.testing.assert_array_equal(theory.toeplitz_matrix(3, 2, "sum"), [[1, 2, 1]])
    np.testing.assert_array_equal(theory.toeplitz_matrix(4, 1, "laplacian"), [[1, -2, 1, 0], [0, 1, -2, 1]])
    np.testing.assert_array_equal(theory.toeplitz_matrix(3, 0), np.eye(3))


@given(operators(min_order=1))
def test_row_sums(operator):
    """Differences annihilate constants, sums multiply them by 2^q."""
    D, order, scheme = operator
    A = theory.toeplitz_matrix(D, order, scheme)
    np.testing.assert_array_equal(A.sum(1), 2.0**order if scheme == "sum" else 0.0)


@given(operators())
def test_rank_is_full(operator):
    """Eq. 19: rank A_q = D - q, and D - 2q for the schemes of step 2."""
    D, order, scheme = operator
    rank = np.linalg.matrix_rank(theory.toeplitz_matrix(D, order, scheme))
    assert rank == D - order * features.STEP[scheme]


@pytest.mark.parametrize("D", [2, 5, 8])
def test_stacked_matrix_has_rank_D(D):  # noqa: N802
    """Eq. 17-18 and 21."""
    stack = np.concatenate([theory.toeplitz_matrix(D, q) for q in range(D)])
    assert np.linalg.matrix_rank(stack) == D


@given(st.integers(1, 4), st.integers(0, 6))
def test_interior_of_the_metric_is_binomial(order, extra):
    """(A_q^T A_q)(p, p + k) = (-1)^k binom(2q, q + k) for columns that hold a whole stencil."""
    D = 2 * order + 1 + extra
    A = theory.toeplitz_matrix(D, order)
    K = A.T @ A
    for p in range(order, D - order):
        for k in range(-order, order + 1):
            assert K[p, p + k] == (-1) ** k * comb(2 * order, order + k)
    border = K[0, 0], K[-1, -1]  # one row each: not the interior's value
    assert border == (1, 1)


# The metric K


@given(operators(max_order=3), st.data())
def test_derivative_metric_is_the_weighted_sum(operator, data):
    D, max_order, scheme = operator
    weights = data.draw(
        st.none() | st.lists(st.sampled_from([0.0, 0.5, 1.0, 3.0]), min_size=max_order + 1, max_size=max_order + 1)
    )
    K = theory.derivative_metric(D, max_order, weights, scheme)
    expected = np.zeros((D, D))
    for q in range(max_order + 1):
        A = features.toeplitz(D, q, scheme)
        expected += (1.0 if weights is None else weights[q]) * A.T @ A
    assert_close(K, expected, "difference")
    np.testing.assert_array_equal(K, K.T)
    assert np.linalg.eigvalsh(K).min() >= -1e-12 * max(1.0, np.abs(K).max()), "positive semi-definite"
    band = np.abs(np.subtract.outer(np.arange(D), np.arange(D))) > max_order * features.STEP[scheme]
    assert not K[band].any(), "banded"


@given(operators(min_order=1, max_order=3, max_channels=9), st.data())
def test_metric_turns_features_into_summed_similarities(operator, data):
    """V^T K V = S + D1S + ... (DESIGN 2.1), which is positive semi-definite."""
    D, max_order, scheme = operator
    V = data.draw(adversarial_features(D, 4))
    S = sum(similarity(V, q, scheme=scheme) for q in range(max_order + 1))
    assert_close(S, V.T @ theory.derivative_metric(D, max_order, scheme=scheme) @ V, "similarity")
    assert np.linalg.eigvalsh((S + S.T) / 2).min() >= -1e-11 * max(1.0, np.abs(S).max())


def test_metric_of_order_one_is_tridiagonal():
    expected = [[2, -1, 0, 0], [-1, 3, -1, 0], [0, -1, 3, -1], [0, 0, -1, 2]]
    np.testing.assert_array_equal(theory.derivative_metric(4, 1), expected)


# Lemma 1


@given(operators())
def test_lemma1_bound_is_the_induced_one_norm(operator):
    D, order, scheme = operator
    assert theory.lemma1_bound(D, order, scheme) == np.abs(features.toeplitz(D, order, scheme)).sum(0).max()


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize(
    ("scheme", "full", "whole_from"),
    [("forward", 2, 2), ("sum", 2, 2), ("laplacian", 4, 4), ("central", 1, 4)],
)
def test_lemma1_equality_needs_a_column_with_the_whole_stencil(scheme, full, whole_from, order):
    """||A_q||_{1->1} is the paper's constant from D = 2q + 1 (4q + 1 for the wide schemes) on, and less below."""
    threshold = whole_from * order + 1
    for D in range(order * features.STEP[scheme] + 1, threshold + 4):
        bound = theory.lemma1_bound(D, order, scheme)
        if threshold <= D:
            assert bound == full**order, (D, scheme)
        else:
            assert bound < full**order, (D, scheme)


@given(operators(max_order=3), st.data())
def test_lemma1_holds_and_is_attained(operator, data):
    D, order, scheme = operator
    bound = theory.lemma1_bound(D, order, scheme)
    V = data.draw(adversarial_features(D, 3))
    difference = dlprop.finite_difference(torch.as_tensor(V), order, dim=0, scheme=scheme)
    assert (difference.abs().sum(0).numpy() <= bound * np.abs(V).sum(0) * (1 + 1e-12)).all()
    units = dlprop.finite_difference(torch.eye(D, dtype=torch.float64), order, dim=0, scheme=scheme)
    assert units.abs().sum(0).max().item() == bound


# Theorem 2


@given(st.integers(2, 5), st.integers(0, 5), st.integers(1, 5), st.data())
def test_theorem2_bound_holds(order, extra, M, data):
    D = order + 1 + extra
    V = data.draw(adversarial_features(D, M))
    middle = np.abs(features.difference(V, order)).sum() ** 2
    bound = theory.theorem2_bound(V, order)
    assert isinstance(bound, float)
    assert np.abs(similarity(V, order)).sum() <= middle * (1 + 1e-12)
    assert middle <= bound * (1 + 1e-12)
    assert_close(bound, (2.0 ** (order - 2) * np.abs(features.difference(V, 2)).sum()) ** 2, "similarity")


def test_theorem2_is_an_upper_bound_only():
    """Both sides can be 0, and minimising the bound is not minimising what it bounds."""
    ramp = np.arange(6.0)[:, None]
    assert theory.theorem2_bound(ramp, 2) == 0
    assert np.abs(similarity(ramp, 2)).sum() == 0  # not greater: equal
    parabola, kink = np.arange(6.0)[:, None] ** 2, np.array([[0, 0, 0, 1, 2, 3.0]]).T
    assert theory.theorem2_bound(kink, 3) < theory.theorem2_bound(parabola, 3)
    assert np.abs(similarity(kink, 3)).sum() > np.abs(similarity(parabola, 3)).sum()


# Theorem 1: uniqueness fails


@given(operators(schemes=("forward",), min_order=1, max_channels=8), st.sampled_from(["dot", "cosine"]), st.data())
def test_sign_and_channel_reversal_have_the_same_similarity_of_every_order(operator, kind, data):
    D, _, _ = operator
    V = data.draw(adversarial_features(D, 4))
    for q in range(D):
        S = similarity(V, q, similarity=kind, normalize="l1")
        assert_close(similarity(-V, q, similarity=kind, normalize="l1"), S, "similarity")
        assert_close(similarity(V[::-1].copy(), q, similarity=kind, normalize="l1"), S, "similarity")


def test_constant_vector_is_not_constrained_by_any_derivative():
    """The paper's own example has one: its derivatives vanish whatever its value."""
    for value in (1.0, -3.0):
        V = np.stack([np.full(5, value), np.arange(5.0) ** 2], axis=1)
        for q in range(1, 5):
            S = similarity(V, q)
            assert (S[0] == 0).all()
            assert (S[:, 0] == 0).all()


# Eq. 8: what its targets can be met by


def residuals(V, labels):
    """Largest |S_q - Y^T Y| of the orders 0 and 1."""
    target = np.equal.outer(labels, labels).astype(float)
    return [np.abs(similarity(V, q, normalize="l1") - target).max() for q in (0, 1)]


@pytest.mark.parametrize("D", [3, 4, 7])
def test_two_classes_on_the_first_and_last_channel_meet_both_targets(D):
    labels = np.array([0, 1, 1, 0])
    V = np.eye(D)[:, [0, D - 1, D - 1, 0]]
    assert residuals(V, labels) == [0, 0]


def test_order_zero_alone_is_met_by_signed_one_hot_features_of_any_number_of_classes():
    labels = np.array([0, 1, 2, 3, 0, 2])
    V = np.eye(4)[:, labels] * np.array([1, -1, 1, -1])[labels]
    order0, order1 = residuals(V, labels)
    assert order0 == 0
    assert order1 > 0


@pytest.mark.parametrize("D", [2, 3, 4, 5])
def test_order_zero_forces_one_hot(D):
    """||v||_2 = 1 with ||v||_1 = 1 needs a single channel: any spread leaves a residual on the diagonal."""
    V = np.full((D, 1), 0.2 / (D - 1))
    V[0] = 0.8
    assert residuals(V, np.array([0]))[0] > 0.3


@pytest.mark.parametrize("D", [3, 4, 5])
def test_three_classes_never_meet_both_targets(D):
    """Order 0 allows signed one-hot features only; none of them meets order 1 for three classes."""
    labels = np.array([0, 1, 2])
    met = 0
    for channels in product(range(D), repeat=3):
        for signs in product([1, -1], repeat=3):
            order0, order1 = residuals(np.eye(D)[:, channels] * np.array(signs), labels)
            met += order0 == 0
            assert max(order0, order1) >= 1, (channels, signs)
    assert met == 8 * D * (D - 1) * (D - 2)  # order 0 alone: any three different channels, any signs


def test_two_classes_need_three_channels():
    """With D = 2 the differences of the first and the last channel are the same channel."""
    order0, order1 = residuals(np.eye(2), np.array([0, 1]))
    assert order0 == 0
    assert order1 == 1


@pytest.mark.parametrize("weights", [(1.0,), (1.0, float("nan")), ("1.0", "x"), 2.0])
def test_weights_of_the_metric_are_checked(weights):
    with pytest.raises(ValueError, match=r"weights must hold|could not convert"):
        theory.derivative_metric(4, 1, weights)
