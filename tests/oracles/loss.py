"""Eq. 8 and 9 in float64, as literal matrix formulas, with the gradient written out by hand.

Everything here is dense and slow on purpose, and imports nothing from the library.
"""

from typing import NamedTuple

import numpy as np

from tests.oracles.features import normalize as normalised_features
from tests.oracles.features import toeplitz


class Loss(NamedTuple):
    value: np.ndarray
    gradient: np.ndarray  # with respect to the raw features
    # Distance to the nearest kink: the smallest residual or difference, relative to the largest term of its order.
    # Where it is not well above the rounding error, every subgradient is right and a comparison means nothing.
    kink: float


def sample_positions(length: int, points: int, align_corners: bool) -> list[int]:
    """Rows (or columns) of a label map of `length` that belong to `points` features."""
    if not align_corners:
        return [((2 * i + 1) * length) // (2 * points) for i in range(points)]
    if points == 1:
        return [length // 2]  # the middle
    return [round(i * (length - 1) / (points - 1)) for i in range(points)]


def sample_grid(values, grid: tuple[int, int], align_corners: bool) -> np.ndarray:
    """A label map or mask (N, H, W) read at the points of a feature grid (h, w)."""
    values = np.asarray(values)
    rows = sample_positions(values.shape[1], grid[0], align_corners)
    columns = sample_positions(values.shape[2], grid[1], align_corners)
    return np.stack([[[image[r, c] for c in columns] for r in rows] for image in values])


def _normalization_gradient(V: np.ndarray, upstream: np.ndarray, mode: str | None) -> np.ndarray:
    """Pull a gradient of the normalised features (D, M) back to the raw ones; zero vectors receive zero."""
    if mode is None:
        return upstream
    Y = normalised_features(V, mode)
    along = (upstream * Y).sum(0, keepdims=True)
    if mode == "softmax":
        return Y * (upstream - along)
    length = np.abs(V).sum(0, keepdims=True) if mode == "l1" else np.sqrt((V**2).sum(0, keepdims=True))
    direction = np.sign(V) if mode == "l1" else Y
    return np.where(length > 0, (upstream - direction * along) / np.where(length > 0, length, 1.0), 0.0)


def _nearness_to_zero(residual: np.ndarray, terms: np.ndarray) -> float:
    """The smallest residual, relative to the largest of the terms it was computed from."""
    scale = np.abs(terms).max()
    return np.abs(residual).min() / scale if scale > 0 else 0.0


def image_loss(
    V,
    target,
    *,
    valid=None,
    max_order=1,
    eta=0.5,
    norm="l1",
    scheme="forward",
    normalize="l1",
    sums=False,
    anchors=None,
):
    """Loss of one image and its gradient with respect to the raw features V (D, M).

    `target` is a vector of M labels, or features shaped like V. `sums` gives Eq. 8 as written, otherwise every order
    is averaged over its valid pairs and the sparsity over its elements. `anchors` lists the K valid target pixels j
    that are visited; sums over them are scaled by the number of valid pixels over K.
    """
    V = np.asarray(V, dtype=np.float64)
    D, M = V.shape
    labelled = np.asarray(target).ndim == 1
    valid = np.ones(M, dtype=bool) if valid is None else np.asarray(valid, dtype=bool)
    visited = np.ones(M)
    if anchors is not None:
        visited = np.bincount(list(anchors), minlength=M) * (valid.sum() / len(anchors))
    both_valid = np.outer(valid, valid)
    weight = both_valid * visited  # of every pair (i, j), j the target pixel
    if not sums:
        weight = weight / max(valid.sum(), 1) ** 2
    normalised = normalised_features(V, normalize)
    value, gradient, kink = 0.0, np.zeros_like(normalised), np.inf
    for order in range(max_order + 1):
        A = toeplitz(D, order, scheme)
        features = A @ normalised
        similarity = features.T @ features
        if labelled:
            wanted = np.equal.outer(np.asarray(target), np.asarray(target)).astype(np.float64)
        else:
            goal = A @ normalised_features(target, normalize)
            wanted = goal.T @ goal
        # Ignored pixels are out of every pair, whatever they hold.
        residual = np.where(both_valid, similarity - wanted, 0.0)
        value += (weight * (np.abs(residual) if norm == "l1" else residual**2)).sum()
        slope = weight * (np.sign(residual) if norm == "l1" else 2 * residual)
        gradient += A.T @ (np.where(valid, features, 0.0) @ (slope + slope.T))
        counted = both_valid.copy()
        if order == 0 and normalize == "l2":
            np.fill_diagonal(counted, False)  # 1 - 1, always a kink, but normalising takes its gradient out
        if norm == "l1" and counted.any():
            kink = min(kink, _nearness_to_zero(residual[counted], similarity[counted]))
    A = toeplitz(D, max_order + 1, scheme)
    sparse = A @ normalised
    share = eta if sums else eta / sparse.size
    if eta:
        value += share * np.abs(sparse).sum()
        gradient += share * (A.T @ np.sign(sparse))
        kink = min(kink, _nearness_to_zero(sparse, sparse))
    return Loss(value, _normalization_gradient(V, gradient, normalize), kink)


def derivative_loss(
    feats,
    target,
    *,
    mask=None,
    ignore_index=255,
    reduction="mean",
    align_corners=True,
    anchors=None,
    **options,
):
    """Loss and gradient of a batch, (N, D, h, w) or (N, D, M).

    For "none" the gradient is the one of `loss.sum()`: image n's slice is the gradient of image n's own value.
    """
    feats = np.asarray(feats, dtype=np.float64)
    target = np.asarray(target)
    N, D = feats.shape[:2]
    flat = feats.reshape(N, D, -1)
    labelled = target.dtype.kind in "iu"
    valid = np.ones(target.shape if labelled else (N, *feats.shape[2:]), dtype=bool)
    if mask is not None:
        valid &= np.asarray(mask, dtype=bool)
    if labelled:
        # Python integers: neither the labels nor ignore_index can wrap.
        valid &= np.array([int(label) != ignore_index for label in target.ravel()], dtype=bool).reshape(target.shape)
        if feats.ndim == 4:
            target = sample_grid(target, feats.shape[2:], align_corners)
            valid = sample_grid(valid, feats.shape[2:], align_corners)
        goals = target.reshape(N, -1)
    else:
        goals = target.astype(np.float64).reshape(N, D, -1)
    valid = valid.reshape(N, -1)
    images = [
        image_loss(flat[n], goals[n], valid=valid[n], sums=reduction == "sum", anchors=anchors, **options)
        for n in range(N)
    ]
    values = np.array([image.value for image in images])
    gradient = np.array([image.gradient for image in images]).reshape(feats.shape)
    kink = min((image.kink for image in images), default=np.inf)
    if reduction == "mean":
        return Loss(values.mean() if N else np.float64(0.0), gradient / max(N, 1), kink)
    return Loss(values if reduction == "none" else values.sum(), gradient, kink)
