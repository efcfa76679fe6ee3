"""One call of the L1 loss: the pair terms of every order and the sparsity term, with their gradient.

Pixels are rows here, (N, M, D), so that a block of pixels is a contiguous piece of memory. Each order's differences
and its gradient live only while that order is at work: four arrays of the size of the features at the most.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..difference import STEP, Scheme, difference, difference_adjoint
from ..features import Normalize, normalize_features
from . import tiled

# What an elementwise pass takes at a time. On CPUs rows of one image, so that temporaries stay in cache and out of the
# peak; on accelerators as many bytes as make its launch worth while.
CPU_ROWS, DEVICE_BYTES = 2048, 64 << 20


def derivative_l1(
    feats: Tensor,
    target: Tensor,
    valid: Tensor | None,
    anchors: Tensor | None,
    pair_weight: Tensor,
    eta: Tensor | None,
    sum_sparsity: bool,
    max_order: int,
    scheme: Scheme,
    normalize: Normalize,
    tile: int | None,
    kernels: Any,
    need_grad: bool,
) -> tuple[Tensor, Tensor | None]:
    """`w sum_q sum_ij |a_i . a_j - G_ij| + eta |A_{Q+1} V|` of every image, and its gradient in V, (N, D, M).

    Args:
        feats: V, normalised, (N, D, M).
        target: features (N, D, M), not normalised yet, or labels (N, M) with -1 for ignored pixels.
        valid: (N, M), False where a pixel takes part in no pair; None for all True.
        anchors: (N, K) pixels, to compare all pixels with these only and count each for M / K; None for all.
        pair_weight: w of every image, (N,).
        eta: weight of the sparsity term, a tensor of one number; None leaves it out.
        sum_sparsity: whether that is a sum, else a mean over elements.
        max_order: Q.
        scheme: of the differences.
        normalize: how the target is normalised, and how the features were.
        tile: edge of a tile in pixels, None for the default.
        kernels: what has the `pairwise_l1` and `pairwise_l1_cross` that do the pairs, a module perhaps.
        need_grad: whether to compute the gradient.
    """
    rows = feats.mT.contiguous()
    if valid is not None and valid.device.type == "cpu" and bool(valid.all()):
        valid = None
    N = len(rows)
    is_labels = not target.is_floating_point()
    total = rows.new_zeros(N)
    grad: Tensor | None = None
    for q in range(max_order, -1, -1):  # order 0, whose differences are V itself, when most memory is taken
        a = _differences(feats, q, scheme, None, valid, feats.dtype)
        g = target if is_labels else _differences(target, q, scheme, normalize, valid, feats.dtype)
        if anchors is not None:
            value, grad_a = _sampled(kernels, a, g, anchors, tile, need_grad)
        elif q == 0 and is_labels and kernels is tiled and _similarities_are_fractions(feats, normalize):
            value, grad_a = label_l1_of_fractions(a, g, need_grad)
        else:
            value, grad_a = kernels.pairwise_l1(a, g, tile, need_grad)
        total += value
        del a, g
        if grad_a is not None:
            order_grad = grad_a.mT if valid is None else grad_a.mT.masked_fill_(~valid[:, :, None], 0)
            if grad is None:
                grad = order_grad if q == 0 else torch.zeros_like(rows)
            if grad is not order_grad:
                _add_adjoint(grad, order_grad, q, scheme)
            del order_grad, grad_a
    total *= pair_weight
    if grad is not None:
        grad *= pair_weight[:, None, None]
    if eta is not None:
        total += _add_sparsity(rows, grad, max_order + 1, scheme, eta, is_mean=not sum_sparsity)
    return total, None if grad is None else grad.mT


def label_l1_of_fractions(a: Tensor, labels: Tensor, need_grad: bool) -> tuple[Tensor, Tensor | None]:
    """`sum_ij |a_i . a_j - [y_i = y_j]|` where every similarity is in [0, 1], in time O(M D).

    The residual of a pair of equal labels is then `1 - s_ij` and that of another pair `s_ij`, so the sum is
    `sum_c n_c^2 - 2 sum_c |a 1_c|^2 + |a 1|^2`. Ignored pixels have label -1 and `a = 0`.
    """
    rows = a.mT
    loss, grad = rows.new_zeros(len(rows)), torch.empty_like(rows) if need_grad else None
    for n in range(len(rows)):
        classes, of_pixel = labels[n].unique(return_inverse=True)
        sums = rows.new_zeros(len(classes), rows.shape[2]).index_add_(0, of_pixel, rows[n])
        counts = torch.bincount(of_pixel, minlength=len(classes)) * (classes >= 0)
        whole = sums.sum(dim=0)
        squares = counts.double().square().sum() - 2 * sums.double().square().sum() + whole.double().square().sum()
        loss[n] = squares.clamp_min(0)  # NaN stays NaN
        if grad is not None:
            torch.index_select(2 * whole - 4 * sums, 0, of_pixel, out=grad[n])
    return loss, None if grad is None else grad.mT


def _similarities_are_fractions(feats: Tensor, normalize: Normalize) -> bool:
    """Whether the features are known to be non-negative with sum 1, so that every similarity is in [0, 1].

    Looking at them costs a pass on the CPU. Elsewhere it would make the host wait for the device, as numbering the
    classes would, so there every pair is computed.
    """
    if feats.device.type != "cpu" or feats.numel() == 0:
        return False
    return normalize == "softmax" or (normalize == "l1" and bool(feats.amin() >= 0))


def _sampled(
    kernels: Any, a: Tensor, g: Tensor, anchors: Tensor, tile: int | None, need_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """The pairs of all pixels with the anchors, each pair for M / K, and the gradient of both roles."""
    scale = a.shape[2] / anchors.shape[1]
    c = _rows_at(a, anchors).mT
    h = _rows_at(g, anchors).mT if g.is_floating_point() else g.gather(1, anchors)
    value, grad, grad_c = kernels.pairwise_l1_cross(a, c, g, h, tile, need_grad)
    if grad is not None:
        images = torch.arange(len(anchors), device=a.device)[:, None]
        grad.mT[images, anchors] += grad_c.mT  # anchors are distinct
        grad *= scale
    return value * scale, grad


def _rows_at(x: Tensor, pixels: Tensor) -> Tensor:
    """(N, K, D) of x (N, D, M) at the pixels (N, K)."""
    return x.mT.gather(1, pixels[:, :, None].expand(-1, -1, x.shape[1]))


def _differences(
    x: Tensor, q: int, scheme: Scheme, normalize: Normalize, valid: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Differences of order ``q`` of the normalised features, (N, D', M), made block by block with pixels as rows.

    They are 0 at pixels that take part in no pair, NaN or not, so that their residuals vanish.
    """
    if q == 0 and normalize is None and valid is None and x.dtype == dtype:
        return x.mT.contiguous().mT
    N, D, M = x.shape
    kept = D - q * STEP[scheme]
    # Memory for all D channels: of one size for every order, so that the next order fits where this one was.
    out = x.new_empty(N * M * D, dtype=dtype)[: N * M * kept].view(N, M, kept)
    for images, pixels in _blocks(x.mT):
        rows = normalize_features(x[images, :, pixels], normalize).mT
        out[images, pixels] = difference(rows, q, 2, scheme)
    if valid is not None:
        out.masked_fill_(~valid[:, :, None], 0)
    return out.mT


def _add_adjoint(grad: Tensor, order_grad: Tensor, q: int, scheme: Scheme) -> None:
    """Add the gradient of the differences of order ``q`` to that of the features, both as rows, in place."""
    for block in _blocks(grad):
        grad[block] += difference_adjoint(order_grad[block], q, 2, scheme)


def _add_sparsity(
    rows: Tensor, grad: Tensor | None, order: int, scheme: Scheme, eta: Tensor, *, is_mean: bool
) -> Tensor:
    """`eta |A_order V|` of every image, a sum or a mean; its gradient is added in place."""
    N, M, D = rows.shape
    weight = eta / (M * (D - order * STEP[scheme])) if is_mean else eta
    sums = rows.new_zeros(N)
    for images, pixels in _blocks(rows):
        change = difference(rows[images, pixels], order, 2, scheme)
        sums[images] += change.abs().sum(dim=(1, 2))
        if grad is not None:
            grad[images, pixels] += weight * difference_adjoint(change.sgn(), order, 2, scheme)
    return sums * weight


def _blocks(rows: Tensor) -> list[tuple[slice, slice]]:
    """The images and pixels of one pass after the other over rows (N, M, D)."""
    N, M, D = rows.shape
    images, pixels = 1, CPU_ROWS
    if rows.device.type != "cpu":
        pixels = max(1, DEVICE_BYTES // (D * rows.element_size()))
        images = max(1, pixels // M)
    return [(slice(n, n + images), slice(i, i + pixels)) for n in range(0, N, images) for i in range(0, M, pixels)]
