"""The statements of docs/theory.md that no other file tests: each name here is quoted on that page."""

from fractions import Fraction
from itertools import product
from math import comb

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dlprop
from dlprop import theory

from .oracles import features, loss
from .strategies import adversarial_features, integer_features, seeds
from .tolerances import assert_close

A = features.toeplitz


def gram_operators(D):
    """`B_q = A_q^T A_q` of the orders 0..D-1, integers in float64."""
    return [A(D, q).T @ A(D, q) for q in range(D)]


def gram_basis(D):
    """Orthonormal polynomials of degree 0..D-1 on the channels, as columns."""
    return np.linalg.qr(np.vander(np.linspace(-1, 1, D), D, increasing=True))[0]


def constraint_matrix(r):
    """Row q holds the coefficients of the unknown features in `S_q(r, x)`, orders 0..D-1."""
    return np.stack([B @ r for B in gram_operators(len(r))])


def exact_rank(matrix):
    """The rank of a matrix of integers, without rounding."""
    rows = [[Fraction(int(x)) for x in row] for row in matrix]
    rank = 0
    for column in range(len(rows[0])):
        pivot = next((i for i in range(rank, len(rows)) if rows[i][column]), None)
        if pivot is None:
            continue
        rows[rank], rows[pivot] = rows[pivot], rows[rank]
        for i in range(rank + 1, len(rows)):
            factor = rows[i][column] / rows[rank][column]
            rows[i] = [x - factor * y for x, y in zip(rows[i], rows[rank], strict=True)]
        rank += 1
    return rank


def similarities(V):
    """`S_q` of every order 0..D-1 of features (D, M) as they are."""
    return np.stack([V.T @ B @ V for B in gram_operators(len(V))])


# The metric


@pytest.mark.parametrize("D", [2, 3, 8, 17])
def test_spectrum_of_the_metric(D):
    """I + A_1^T A_1 weighs the constant by 1 and faster changes by up to 5: the DCT-II diagonalises it."""
    K = theory.derivative_metric(D, 1)
    k, d = np.arange(D), np.arange(D)
    eigenvalues = 1 + 4 * np.sin(np.pi * k / (2 * D)) ** 2
    waves = np.cos(np.pi * np.outer(d + 0.5, k) / D)
    assert_close(K @ waves, waves * eigenvalues, "similarity")
    assert eigenvalues.max() < 5


# Full resolution through the adjoint


@pytest.mark.parametrize("align_corners", [True, False])
def test_adjoint_of_the_upsampling(align_corners):
    """`L (V U)^T K (V U) = ((L U^T) V^T K V) U`, and upsampling keeps the L1 norm of non-negative features."""
    rng = np.random.default_rng(0)
    grid, fine, D, C = (3, 4), (7, 9), 5, 2
    V = features.normalize(rng.random((D, 12)), "l1")
    L = rng.standard_normal((C, 63))
    U = features.resize(np.eye(12).reshape(12, *grid), fine, align_corners).reshape(12, 63)
    K = theory.derivative_metric(D, 1)
    upsampled = V @ U
    assert_close(L @ U.T @ V.T @ K @ V @ U, L @ upsampled.T @ K @ upsampled, "propagation")
    assert_close(np.abs(upsampled).sum(0), np.ones(63), "similarity")
    propagate = dlprop.DerivativeLabelPropagation(resolution="logits", align_corners=align_corners)
    logits, feats = torch.tensor(L).view(1, C, *fine), torch.tensor(V).view(1, D, *grid)
    assert_close(propagate(logits, feats)[0].flatten(1), L @ upsampled.T @ K @ upsampled, "propagation")


# The labelled loss of order 0


def closed_form(V, labels, valid):
    """`sum_c n_c^2 - 2 sum_c ||V 1_c||^2 + ||V 1||^2` over valid pixels."""
    total = np.square(V[:, valid].sum(1)).sum()
    for label in np.unique(labels[valid]):
        member = valid & (labels == label)
        total += member.sum() ** 2 - 2 * np.square(V[:, member].sum(1)).sum()
    return total


@given(st.integers(2, 6), st.integers(1, 7), seeds)
def test_closed_form_of_labelled_order_zero(D, M, seed):
    rng = np.random.default_rng(seed)
    V = rng.random((D, M)) * rng.integers(0, 2, (D, M))  # zeros, and now and then a zero vector
    labels, valid = rng.integers(0, 3, M), rng.random(M) < 0.8
    expected = loss.image_loss(V, labels, valid=valid, max_order=0, eta=0.0, sums=True).value
    assert_close(closed_form(features.normalize(V, "l1"), labels, valid), expected, "loss")


def test_closed_form_needs_non_negative_features_and_order_zero():
    valid, labels = np.array([True, True]), np.array([0, 1])
    opposite = np.array([[1.0, -1.0], [0.0, 0.0]])
    assert loss.image_loss(opposite, labels, max_order=0, eta=0.0, sums=True).value == 2
    assert closed_form(opposite, labels, valid) == -2
    inside = A(3, 1) @ np.array([[0.0, 0.0], [1.0, 1.0], [0.0, 0.0]])  # S_1 = 2 everywhere: above the target
    residual = np.abs(inside.T @ inside - np.eye(2)).sum()
    assert residual == 6
    assert closed_form(inside, labels, valid) == 2


# Theorem 2


@given(st.integers(2, 5), st.integers(0, 4), st.integers(1, 4), st.data())
def test_theorem2_with_the_norm_of_the_remaining_difference(order, extra, M, data):
    """`A_q = A_{q-2} A_2`, so the induced norm of the first factor, on D - 2 channels, may replace 2^{q-2}."""
    D = order + 1 + extra
    np.testing.assert_array_equal(A(D - 2, order - 2) @ A(D, 2), A(D, order))
    factor = theory.lemma1_bound(D - 2, order - 2)
    assert (factor == 2.0 ** (order - 2)) == (2 * order - 1 <= D)
    V = data.draw(adversarial_features(D, M))
    sparsity = np.abs(features.difference(V, 2)).sum()
    sharper = (factor * sparsity) ** 2
    assert np.abs(features.difference(V, order)).sum() ** 2 <= sharper * (1 + 1e-12)
    assert sharper <= theory.theorem2_bound(V, order) * (1 + 1e-12)


@given(st.integers(1, 4), st.integers(1, 4), st.data())
def test_equality_in_the_first_step_of_theorem2(D, M, data):
    """`sum |d_i . d_j| = (sum ||d_i||_1)^2` just where all the vectors live on one and the same channel."""
    d = data.draw(integer_features(D, M))
    used = np.flatnonzero(np.abs(d).sum(1))
    assert (np.abs(d.T @ d).sum() == np.abs(d).sum() ** 2) == (len(used) <= 1)


@given(st.integers(3, 8), st.integers(2, 6), st.data())
def test_vanishing_sparsity_means_affine_channels_and_no_higher_similarity(D, order, data):
    """`||A_2 V||_1 = 0` for columns affine in the channel, whose S_q = 0 for q >= 2; not the other way round."""
    order = min(order, D - 1)
    start, slope = data.draw(integer_features(2, 3))
    V = start + np.arange(D)[:, None] * slope
    assert not features.difference(V, 2).any()
    assert not features.difference(V, order).any()
    parabola = np.arange(D)[:, None] ** 2.0
    assert features.difference(parabola, 2).any()
    if D > 3:
        assert not features.difference(parabola, 3).any()


# What similarities of every order determine


@pytest.mark.parametrize("D", [2, 3, 4, 5, 8])
def test_differences_act_triangularly_on_polynomials(D):
    """`A_q` annihilates polynomials of degree below q and turns degree q into a constant that is not 0."""
    P = gram_basis(D)
    for q in range(D):
        image = A(D, q) @ P
        assert np.abs(image[:, :q]).max(initial=0) < 1e-15 * 4.0 ** (q + 1)  # the coefficients add up to 2^q
        constant = image[:, q]
        assert abs(constant[0]) > 0.1
        assert_close(constant, np.full(D - q, constant[0]), "similarity")


@pytest.mark.parametrize("D", [4, 5, 6, 8])
def test_the_first_difference_ties_polynomials_of_equal_parity(D):
    """`p_l . B_1 p_k = 2 p_l(0) (p_k(-1) - p_k(0))`, not 0, for 1 <= k < l of equal parity; 0 for unequal parity."""
    P, B = gram_basis(D), A(D, 1).T @ A(D, 1)
    x = np.linspace(-1, 1, D)
    for k in range(1, D):
        before = np.polynomial.polynomial.Polynomial.fit(x, P[:, k], k)(x[0] - (x[1] - x[0]))
        for m in range(k + 1, D):
            entry = P[:, m] @ B @ P[:, k]
            if (m - k) % 2:
                assert abs(entry) < 1e-12
            else:
                assert abs(entry) > 1e-3
                assert abs(entry - 2 * P[0, m] * (before - P[0, k])) < 1e-9 * max(1, abs(before))


@pytest.mark.parametrize("D", [1, 2, 3, 4, 5, 6])
def test_features_that_span_are_determined_up_to_eight_reflections(D):
    """Of all sign changes of the polynomial basis, just those of mean, even and odd part keep every similarity."""
    rng = np.random.default_rng(D)
    V = rng.standard_normal((D, D + 2))
    P, S = gram_basis(D), similarities(V)
    kept = []
    for signs in product([1, -1], repeat=D):
        O = P @ np.diag(signs) @ P.T  # noqa: E741 - an orthogonal matrix
        if np.allclose(similarities(O @ V), S, rtol=0, atol=1e-9 * np.abs(S).max()):
            kept.append(signs)
    expected = [s for s in product([1, -1], repeat=D) if len(set(s[1::2])) <= 1 and len(set(s[2::2])) <= 1]
    assert kept == expected
    assert len(kept) == 2 ** min(D, 3)


@pytest.mark.parametrize("D", [1, 2, 3, 4, 5])
def test_matrices_that_commute_with_every_order(D):
    """They are the combinations of three projections: on constants, on the rest that is even, on what is odd."""
    identity = np.eye(D)
    commutators = np.concatenate([np.kron(identity, B) - np.kron(B, identity) for B in gram_operators(D)])
    assert D * D - exact_rank(commutators) == min(D, 3)
    J, mean = identity[::-1], np.full((D, D), 1 / D)
    for projection in (mean, (identity + J) / 2 - mean, (identity - J) / 2):
        assert_close(projection @ projection, projection, "similarity")
        for B in gram_operators(D):
            assert np.abs(projection @ B - B @ projection).max() < 1e-12 * max(1, np.abs(B).max())


@given(st.integers(3, 8), seeds)
def test_flipping_the_mean_changes_no_similarity(D, seed):
    """`v - 2 mean(v)` has the similarities of `v` of every order, dot and before any normalisation."""
    V = np.random.default_rng(seed).standard_normal((D, 4))
    for q in range(D):
        S, flipped = (
            dlprop.derivative_similarity(torch.as_tensor(X)[None], order=q, normalize=None)[0]
            for X in (V, V - 2 * V.mean(0))
        )
        assert_close(flipped, S.numpy(), "similarity")


@given(st.integers(3, 7), seeds)
def test_non_negative_features_are_determined_up_to_channel_reversal(D, seed):
    """Norm 1 without negative entries leaves V, its reversal, and two that an entry above 2/D rules out."""
    rng = np.random.default_rng(seed)
    V = features.normalize(rng.random((D, D)) + np.eye(D), "l1")
    mean = V.mean(0)
    even, odd = (V + V[::-1]) / 2 - mean, (V - V[::-1]) / 2
    allowed = [
        (a, b, c)
        for a, b, c in product([1, -1], repeat=3)
        if (X := a * mean + b * even + c * odd).min() > -1e-12 and np.allclose(X.sum(0), 1)
    ]
    expected = [(1, 1, 1), (1, 1, -1)]
    if V.max() <= 2 / D:
        expected += [(1, -1, 1), (1, -1, -1)]
    assert sorted(allowed) == sorted(expected)


# One known pixel


@given(st.integers(1, 6), st.data())
def test_one_known_pixel_determines_another_just_where_all_difference_sums_are_nonzero(D, data):
    """The matrix of the constraints `S_q(r, .)` has rank D if and only if `1^T A_q r != 0` for every q."""
    r = data.draw(integer_features(D, 1))[:, 0]
    sums = [features.difference(r, q).sum() for q in range(D)]
    assert (exact_rank(constraint_matrix(r)) == D) == all(sums)


@given(st.integers(1, 7), seeds)
def test_determinant_of_the_constraints_of_one_pixel(D, seed):
    """`|det R(r)| = prod_q |gamma_q 1^T A_q r|` with `gamma_q` the q-th difference of the polynomial of degree q."""
    r = np.random.default_rng(seed).standard_normal(D)
    P = gram_basis(D)
    expected = np.prod([features.difference(P[:, q], q)[0] * features.difference(r, q).sum() for q in range(D)])
    R = constraint_matrix(r)
    scale = np.prod(np.linalg.norm(R, axis=1))  # Hadamard's bound: what rounding is relative to
    assert abs(abs(np.linalg.det(R)) - abs(expected)) < 1e-9 * scale


@pytest.mark.parametrize("D", [2, 3, 4, 7, 8])
def test_reference_pixels_that_determine_nothing(D):
    """Constant, symmetric, antisymmetric and inner one-hot references leave the unknown free; the outer ones do not."""
    d = np.arange(D)
    for r in (np.ones(D), d * (D - 1.0 - d) + 1, d * 2.0 - D + 1):
        assert exact_rank(constraint_matrix(r)) < D
    for channel in range(D):
        rank = exact_rank(constraint_matrix(np.eye(D)[channel]))
        assert (rank == D) == (channel in (0, D - 1))


def test_recovery_of_features_from_one_known_pixel():
    """Solving the D equations gives the unknown features back, from similarities that the library computed."""
    rng = np.random.default_rng(3)
    D = 6
    V = rng.random((D, 5))
    S = [dlprop.derivative_similarity(torch.tensor(V)[None], order=q, normalize=None)[0, 0].numpy() for q in range(D)]
    recovered = np.linalg.solve(constraint_matrix(V[:, 0]), np.stack(S))
    assert_close(recovered, V, "similarity", torch.float32)  # float64, but the condition number is near 1e5


@pytest.mark.parametrize("D", [8, 16, 32])
def test_the_constraints_of_one_pixel_are_ill_conditioned(D):
    """Unique is not stable: with rows of unit length the condition number grows beyond use."""
    r = np.random.default_rng(0).random(D)
    R = constraint_matrix(r)
    condition = np.linalg.cond(R / np.linalg.norm(R, axis=1, keepdims=True))
    assert condition > 4.0 ** (D / 2)
    assert (condition > 1 / np.finfo(float).eps) == (D == 32)


@given(st.integers(2, 5), st.integers(1, 3), st.data())
def test_several_known_pixels(D, known, data):
    """It is enough that for every order one of the known pixels has a nonzero sum."""
    references = data.draw(integer_features(D, known))
    sums = np.stack([features.difference(references, q).sum(0) for q in range(D)])
    stacked = np.concatenate([constraint_matrix(r) for r in references.T])
    if (sums != 0).any(1).all():
        assert exact_rank(stacked) == D


# The targets of Eq. 8


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_one_hot_features_meet_targets_scaled_by_the_central_binomial(order):
    """Inner channels more than q apart: `S_q = binom(2q, q) Y^T Y`, for any number of classes that fits."""
    classes, step = 4, order + 1
    channels = order + step * np.arange(classes)
    D = channels[-1] + order + 1
    labels = np.array([0, 1, 2, 3, 1, 0])
    V = np.eye(D)[:, channels[labels]]
    target = np.equal.outer(labels, labels)
    np.testing.assert_array_equal(similarities(V)[order], comb(2 * order, order) * target)


def test_cosine_similarity_can_meet_both_targets_with_many_classes():
    """Every second channel: with Eq. 15-16 orders 0 and 1 both equal `Y^T Y`, for (D + 1) / 2 classes."""
    labels = np.array([0, 1, 2, 3, 2])
    V = torch.eye(7, dtype=torch.float64)[:, 2 * torch.as_tensor(labels)][None]
    for order in (0, 1):
        S = dlprop.derivative_similarity(V, order=order, similarity="cosine")[0]
        assert_close(S, np.equal.outer(labels, labels).astype(float), "similarity")


@pytest.mark.parametrize("D", [5, 6, 9])
def test_pair_terms_and_sparsity_pull_apart(D):
    """One-hot features, which order 0 asks for, have the largest sparsity term of all features of norm 1 (inside)."""
    largest = theory.lemma1_bound(D, 2)
    assert largest == 4
    sparsity = np.abs(features.difference(np.eye(D), 2)).sum(0)
    np.testing.assert_array_equal(sparsity, [1, 3, *[4] * (D - 4), 3, 1])
