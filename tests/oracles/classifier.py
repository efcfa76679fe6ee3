"""Ridge and discriminant by the book: sums pixel by pixel, dense interpolation matrices, an explicit inverse.

Arrays have a batch axis, because images may share their statistics: logits (N, C, H, W) or (N, C, M), features
(N, D, h, w) or (N, D, m). The options have the names the library gives them.
"""

from typing import NamedTuple

import numpy as np

from . import features
from .propagation import gather, softmax


class Statistics(NamedTuple):
    counts: np.ndarray  # (C,)
    sums: np.ndarray  # (C, D)
    second: np.ndarray  # (D, D), around the mean


def statistics(weights, V):
    """Of the pixels V (D, M) of one image with class weights (C, M), in two passes: the mean comes first."""
    counts, sums = np.zeros(len(weights)), np.zeros((len(weights), len(V)))
    for c in range(len(weights)):
        for i in range(V.shape[1]):
            counts[c] += weights[c, i]
            sums[c] += weights[c, i] * V[:, i]
    total = counts.sum()
    mean = sums.sum(axis=0) / total if total else np.zeros(len(V))
    second = np.zeros((len(V), len(V)))
    for i in range(V.shape[1]):
        second += weights[:, i].sum() * np.outer(V[:, i] - mean, V[:, i] - mean)
    return Statistics(counts, sums, second)


def together(parts):
    """The statistics of several, through the moments around zero."""
    counts, sums = sum(x.counts for x in parts), sum(x.sums for x in parts)
    raw = np.zeros_like(parts[0].second)
    for x in parts:
        if x.counts.sum():
            raw += x.second + np.outer(x.sums.sum(axis=0), x.sums.sum(axis=0)) / x.counts.sum()
    total = counts.sum()
    return Statistics(counts, sums, raw - np.outer(sums.sum(axis=0), sums.sum(axis=0)) / (total or 1.0))


def prior(D, weights=(1.0, 1.0), scheme="forward"):
    """`T`: the inverse of the derivative metric, with a mean diagonal of 1."""
    K = sum(w * features.toeplitz(D, q, scheme).T @ features.toeplitz(D, q, scheme) for q, w in enumerate(weights))
    T = np.linalg.inv(K)
    return T / np.mean(np.diag(T))


def inverse_covariance(own, shrinkage, T):
    """`Sigma_s^{-1}`, and that of T for features that do not vary."""
    total = own.counts.sum() or 1.0
    Sigma, mean = own.second / total, own.sums.sum(axis=0) / total
    trace = np.trace(Sigma)
    if trace <= 1e-24 * mean @ mean:
        return np.linalg.inv(T)
    return np.linalg.inv(Sigma + shrinkage * trace / len(T) * T)


def discriminant(own, V, inverse, others=None, k=0.0):
    """`L'` of the targets V (D, M'), before the normalisation over the classes; `k` pixels a class are of `others`."""
    total = own.counts.sum()
    mu = own.sums.sum(axis=0) / (total or 1.0)
    out = np.zeros((len(own.counts), V.shape[1]))
    for c, n_c in enumerate(own.counts):
        pixels = own.sums[c] - n_c * mu
        if k and total:
            pixels = pixels + k * (others.sums[c] - others.counts[c] * mu) / (others.counts[c] + 1)
        m = pixels / (n_c + 1 + k)
        for j in range(V.shape[1]):
            out[c, j] = m @ inverse @ (V[:, j] - mu) - m @ inverse @ m / 2 + np.log(n_c / (total or 1.0) + 1e-4)
    return out


def ridge(own, V, inverse):
    """`log` of the fitted probabilities of the targets V (D, M'), clipped, before they are normalised."""
    total = own.counts.sum() or 1.0
    mu, pi = own.sums.sum(axis=0) / total, own.counts / total
    covariance = (own.sums - np.outer(own.counts, mu)) / total
    out = np.zeros((len(pi), V.shape[1]))
    for j in range(V.shape[1]):
        out[:, j] = np.log(np.maximum(pi + covariance @ inverse @ (V[:, j] - mu), 1e-6))
    return out


def importance(sizes, balance):
    """Of every class, `((n_c + 1) / n)^{-balance}`."""
    return ((sizes + 1) / (sizes.sum() or 1.0)) ** -balance


def sources(logits, feats, mask, resolution, align_corners):
    """Of one image: probabilities (C, M), how many sources each stands for (M,), features (D, M), and U or None."""
    grid, size = feats.shape[1:], logits.shape[1:]
    counts = np.ones(size) if mask is None else np.asarray(mask).astype(np.float64)
    L, V = logits if mask is None else np.where(mask, logits, 0.0), feats.reshape(len(feats), -1)
    U = None if logits.ndim == 2 or grid == size else features.resizing_matrix(grid, size, align_corners)
    if U is not None and resolution == "logits":
        V = V @ U
    elif U is not None and mask is None:
        L, counts = features.resize(logits, grid, align_corners), np.ones(grid)
    elif U is not None:
        L, counts = gather(logits, np.asarray(mask), grid, align_corners)
    return softmax(L.reshape(len(L), -1), axis=0), counts.reshape(-1), V, U


def propagate(
    form,
    logits,
    feats,
    target_feats=None,
    *,
    shrinkage=None,
    balance=0.5,
    weights=(1.0, 1.0),
    scheme="forward",
    normalize=None,
    across="image",
    pseudo_counts=0.0,
    stored=None,
    mask=None,
    resolution="feats",
    align_corners=True,
):
    """Log-probabilities (N, C, ...): "discriminant" or "ridge". `stored` are Statistics that are added or alone."""
    shrinkage = {"discriminant": 0.1, "ridge": 0.03}[form] if shrinkage is None else shrinkage
    targets = feats if target_feats is None else target_feats
    logits, feats, targets = (
        x.detach().cpu().double().numpy() if hasattr(x, "detach") else np.asarray(x, dtype=np.float64)
        for x in (logits, feats, targets)
    )
    N, C, D = len(logits), logits.shape[1], feats.shape[1]
    V, W = (
        np.stack([features.normalize(y.reshape(D, -1), normalize).reshape(y.shape) for y in x])
        for x in (feats, targets)
    )
    given = [
        sources(logits[n], V[n], None if mask is None else mask[n].cpu().numpy(), resolution, align_corners)
        for n in range(N)
    ]
    sizes = [(P * count).sum(axis=1) for P, count, _, _ in given]
    if across == "batch":
        sizes = [sum(sizes)] * N
    own = []
    for (P, count, v, _), size in zip(given, sizes, strict=True):
        w = count if form == "discriminant" else count * (importance(size, balance) @ P)
        own.append(statistics(P * w, v))
    others = stored or together(own)
    if across == "batch":
        own = [together(own)] * N
    if pseudo_counts:
        stored = None
    if across == "stored":
        own = [stored] * N
    elif stored is not None:
        own = [together([x, stored]) for x in own]

    out = []
    for n in range(N):
        U, w = given[n][3], W[n].reshape(D, -1)
        keeps_grid = targets.shape[2:] == feats.shape[2:]
        if U is not None and resolution == "logits" and keeps_grid:
            w = w @ U
        given_own = own[n], w, inverse_covariance(own[n], shrinkage, prior(D, weights, scheme))
        scores = ridge(*given_own) if form == "ridge" else discriminant(*given_own, others, pseudo_counts)
        scores = scores - np.logaddexp.reduce(scores, axis=0)  # the logarithm of a softmax that may be 0
        if U is not None and resolution == "feats" and keeps_grid:
            scores = scores @ U
        on_logits = logits.ndim == 3 or keeps_grid
        out.append(scores.reshape(C, *(logits.shape[2:] if on_logits and keeps_grid else targets.shape[2:])))
    return np.stack(out)
