"""Propagation by the book, one image at a time: the dense M x M matrix S, then Eq. 4 or a softmax of S.

Logits are (C, H, W) or (C, M), features (D, h, w) or (D, m); the options have the names the library gives them, and
those of an affinity stand beside those of the grids.
"""

import itertools

import numpy as np

from . import features


def affinity_matrix(V, W, weights=(1.0, 1.0), scheme="forward", similarity="dot"):
    """S_ij = sum_q w_q S_q(i, j) for normalised features V (D, M) of the sources and W (D, M') of the targets."""
    S = np.zeros((V.shape[1], W.shape[1]))
    for q, weight in enumerate(weights):
        A, B = features.difference(V, q, scheme), features.difference(W, q, scheme)
        S_q = -0.5 * ((A[:, :, None] - B[:, None, :]) ** 2).sum(0) if similarity == "gaussian" else A.T @ B
        if similarity == "cosine":
            a, b = np.sqrt((A * A).sum(0)), np.sqrt((B * B).sum(0))
            norm = a[:, None] * b[None, :]
            S_q = np.where(norm == 0, 0.0, S_q / np.where(norm == 0, 1.0, norm))
        S = S + weight * S_q
    return S


def softmax(x, axis):
    """Softmax along one axis."""
    e = np.exp(x - x.max(axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)


def window(grid, radius, dilation=1):
    """Which source (row) lies in the window of which target (column), pixel by pixel of a grid of both."""
    dilations = [dilation] if isinstance(dilation, int) else dilation
    steps = range(-radius, radius + 1)
    inside = np.zeros((*grid, *grid), dtype=bool)
    for y, x, d, dy, dx in itertools.product(*map(range, grid), dilations, steps, steps):
        if 0 <= y + d * dy < grid[0] and 0 <= x + d * dx < grid[1]:
            inside[y + d * dy, x + d * dx, y, x] = True
    return inside.reshape(grid[0] * grid[1], -1)


def attention(S, counts, inside=None):
    """The share of every source (row) at every target: softmax_i(S_ij + log count_i) over those inside, 0 if none."""
    weights = np.where(True if inside is None else inside, counts[:, None], 0.0)
    top = np.where(weights > 0, S, -np.inf).max(axis=0)
    powers = np.exp(np.where(weights > 0, S - np.where(np.isfinite(top), top, 0.0), -np.inf))
    total = (weights * powers).sum(axis=0)
    return weights * powers / np.where(total > 0, total, 1.0)


def gather(L, mask, grid, align_corners):
    """Sources at the points of a grid: the mean of the unmasked ones that fall on each, and how many these are.

    A source falls on the points it is interpolated from, in the shares of the interpolation, so that it counts once.
    """
    U = features.resizing_matrix(grid, L.shape[1:], align_corners)
    counts = mask.reshape(-1).astype(np.float64) @ U.T
    total = np.where(mask, L, 0.0).reshape(len(L), -1) @ U.T
    return np.where(counts > 0, total / np.where(counts > 0, counts, 1.0), 0.0), counts


def propagate(
    logits,
    feats,
    target_feats=None,
    *,
    affinity="linear",
    weights=(1.0, 1.0),
    scheme="forward",
    normalize="l1",
    similarity="dot",
    scale="sum",
    over="targets",
    radius=None,
    dilation=1,
    resolution="feats",
    align_corners=True,
    mask=None,
):
    """L' of one image, every step as DESIGN section 3 says it, nothing saved."""
    logits, feats = np.asarray(logits, dtype=np.float64), np.asarray(feats, dtype=np.float64)
    cross = target_feats is not None
    targets = np.asarray(target_feats, dtype=np.float64) if cross else feats
    V = features.normalize(feats.reshape(len(feats), -1), normalize).reshape(feats.shape)
    W = features.normalize(targets.reshape(len(targets), -1), normalize).reshape(targets.shape)

    C, grid = logits.shape[0], logits.shape[1:]
    is_flat = logits.ndim == 2
    back_to_logits = is_flat or targets.shape[1:] == feats.shape[1:]
    on_other_grid = not is_flat and grid != feats.shape[1:]
    own = logits
    L = logits if mask is None else np.where(mask, logits, 0.0)
    counts = np.ones(grid) if mask is None else np.asarray(mask).astype(np.float64)
    if on_other_grid and resolution == "feats":  # the logits come to the features
        own = features.resize(logits, feats.shape[1:], align_corners)
        if mask is None:
            L, counts = own, np.ones(feats.shape[1:])
        else:
            L, counts = gather(logits, np.asarray(mask), feats.shape[1:], align_corners)
            if over == "targets":
                counts = counts * counts.size / logits[0].size  # all sources together weigh as much as the points
    elif on_other_grid:  # the features come to the logits
        V = features.resize(V, grid, align_corners)
        if back_to_logits:
            W = features.resize(W, grid, align_corners)

    out_grid, source_grid = W.shape[1:], V.shape[1:]
    L, own, counts = L.reshape(C, -1), own.reshape(C, -1), counts.reshape(-1)
    S = affinity_matrix(V.reshape(len(V), -1), W.reshape(len(W), -1), weights, scheme, similarity)  # (sources, targets)

    if affinity == "softmax" and over == "sources":
        out = L @ attention(S, counts, None if radius is None else window(source_grid, radius, dilation))
    elif affinity == "softmax":
        out = (L * counts) @ softmax(S, axis=1)
    else:
        out = (L * counts) @ S
        if scale == "mean":
            total = counts.sum()
            out = out / total if total > 0 else np.zeros_like(out)
        elif scale == "degree":
            degree = counts @ S
            rounding = 8 * np.finfo(S.dtype).eps * counts.sum() * np.abs(S).max()
            smallest = max(np.abs(degree).mean() / 1000, rounding)
            for j in range(out.shape[1]):
                if degree[j] <= smallest:
                    out[:, j] = 0.0 if cross else own[:, j]
                else:
                    out[:, j] = out[:, j] / degree[j]
    out = out.reshape(C, *out_grid)
    if not is_flat and back_to_logits and out_grid != grid:
        out = features.resize(out, grid, align_corners)
    return out


def rectify(logits, feats, ramp, target_feats=None, **options):
    """Eq. 5: (1 - ramp) P + ramp P~."""
    P = softmax(np.asarray(logits, dtype=np.float64), axis=0)
    return (1 - ramp) * P + ramp * softmax(propagate(logits, feats, target_feats, **options), axis=0)


def batched(function, *tensors, **options):
    """Apply an oracle image by image to tensors with a batch axis; `mask` in the options has one too."""
    arrays = [None if t is None else t.detach().cpu().double().numpy() for t in tensors]
    mask = options.pop("mask", None)
    images = []
    for n in range(len(arrays[0])):
        masked = {} if mask is None else {"mask": mask[n].cpu().numpy()}
        images.append(function(*(None if a is None else a[n] for a in arrays), **options, **masked))
    return np.stack(images)
