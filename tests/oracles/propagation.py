"""Propagation by the book, one image at a time: the dense M x M matrix S, then Eq. 4 or the released softmax form.

Logits are (C, H, W) or (C, M), features (D, h, w) or (D, m); the options have the names the library gives them.
"""

import numpy as np

from . import features


def affinity_matrix(V, W, max_order=1, weights=None, scheme="forward", similarity="dot"):
    """S_ij = sum_q w_q S_q(i, j) for normalised features V (D, M) of the sources and W (D, M') of the targets."""
    weights = [1.0] * (max_order + 1) if weights is None else weights
    S = np.zeros((V.shape[1], W.shape[1]))
    for q in range(max_order + 1):
        A, B = features.difference(V, q, scheme), features.difference(W, q, scheme)
        S_q = A.T @ B
        if similarity == "cosine":
            a, b = np.sqrt((A * A).sum(0)), np.sqrt((B * B).sum(0))
            norm = a[:, None] * b[None, :]
            S_q = np.where(norm == 0, 0.0, S_q / np.where(norm == 0, 1.0, norm))
        S = S + weights[q] * S_q
    return S


def softmax(x, axis):
    """Softmax along one axis."""
    e = np.exp(x - x.max(axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)


def propagate(
    logits,
    feats,
    target_feats=None,
    *,
    max_order=1,
    weights=None,
    scheme="forward",
    normalize="l1",
    similarity="dot",
    affinity="linear",
    scale="sum",
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

    is_flat = logits.ndim == 2
    grid = logits.shape[1:]
    back_to_logits = is_flat or targets.shape[1:] == feats.shape[1:]
    carried = np.ones(grid) if mask is None else np.asarray(mask).astype(np.float64)
    L = logits if mask is None else np.where(mask, logits, 0.0)
    own = logits
    if not is_flat and grid != feats.shape[1:]:
        if resolution == "feats":  # the logits and the mask come down (or up) to the features
            L, own = (features.resize(x, feats.shape[1:], align_corners) for x in (L, own))
            carried = features.resize(carried[None], feats.shape[1:], align_corners)[0]
        else:  # the features come up (or down) to the logits
            if back_to_logits:
                W = features.resize(W, grid, align_corners)
            V = features.resize(V, grid, align_corners)

    out_grid = W.shape[1:]
    C = logits.shape[0]
    L, own, carried = L.reshape(C, -1), own.reshape(C, -1), carried.reshape(-1)
    S = affinity_matrix(
        V.reshape(len(V), -1), W.reshape(len(W), -1), max_order, weights, scheme, similarity
    )  # (sources, targets)

    if affinity == "softmax":
        out = L @ softmax(S, axis=1)
    else:
        out = L @ S
        if scale == "mean":
            total = carried.sum()
            out = out / total if total > 0 else np.zeros_like(out)
        elif scale == "degree":
            degree = carried @ S
            for j in range(out.shape[1]):
                if degree[j] > 0:
                    out[:, j] = out[:, j] / degree[j]
                else:
                    out[:, j] = 0.0 if cross else own[:, j]
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
