"""The squared norm of the pairwise loss, in time linear in the pixels: D x D products instead of all pairs."""

import torch
from torch import Tensor

from . import _checks
from ._kernels.products import gram, grams_of_difference
from ._precision import statistics_dtype
from .difference import Scheme, difference

__all__: list[str] = []

# Pixels of an image that exist in float64 at a time, in cache.
PIXELS = 1 << 11


def squared_pairs(V: Tensor, G: Tensor, max_order: int, scheme: Scheme) -> Tensor:
    """`sum_q ||a^T a - G_q||_F^2` of every image, (N,), with `a = A_q V` of V (N, D, M).

    It needs D x D products only, and those of every order are the differences, along both axes, of those of order 0: a
    product over the pixels is made once, whatever the order.

    Args:
        V: features (N, D, M), 0 at ignored pixels.
        G: features (N, D, M) likewise, or class numbers (N, M), -1 at ignored pixels.
        max_order: Q.
        scheme: of the differences.
    """
    squares = _feature_squares if G.is_floating_point() else _label_squares
    return clamped(torch.stack(squares(V, G, max_order, scheme))).sum(dim=0).to(V.dtype)


def _feature_squares(V: Tensor, G: Tensor, max_order: int, scheme: Scheme) -> list[Tensor]:
    """The squared norm of every order against features, written in `E = V - G`.

    `V^T V - G^T G = E^T E + E^T G + G^T E`. For features that are close, as those of two views are, each term below is
    of the size of the result, where `||V V^T||^2 - 2 ||V G^T||^2 + ||G G^T||^2` would cancel.
    """
    products = grams_of_difference(V, G)
    terms = []
    for q in range(max_order + 1):
        EE, EG, GG = (difference(difference(x, q, 1, scheme), q, 2, scheme) for x in products)
        terms.append((EE * (EE + 2 * GG + 4 * EG) + 2 * EG * EG.mT).sum(dim=(1, 2)))
    return terms


def _label_squares(V: Tensor, classes: Tensor, max_order: int, scheme: Scheme) -> list[Tensor]:
    """The squared norm of every order against labels: `||a a^T||^2 - 2 sum_c |a 1_c|^2 + sum_c n_c^2`."""
    VV = gram(V)
    sums, counts = class_sums(V.mT, classes)
    terms = []
    for q in range(max_order + 1):
        aa = difference(difference(VV, q, 1, scheme), q, 2, scheme)
        own = difference(sums, q, 2, scheme).square().sum(dim=(1, 2))
        terms.append(aa.square().sum(dim=(1, 2)) - 2 * own + counts.square().sum(dim=1))
    return terms


def clamped(squares: Tensor) -> Tensor:
    """``squares`` without the negative values that rounding makes, and with the gradient of the unclamped sum."""
    return squares + (squares.clamp_min(0) - squares).detach()


def class_sums(rows: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of the rows and the number of pixels of every class, (N, K, D) and (N, K), for rows (N, M, D).

    Both in float64 where the device has it: adding up pixel after pixel, as `index_add` does, rounds with each of them.
    ``classes`` (N, M) are class numbers from 0 on; those of -1, whose rows must be 0, count nowhere. K is the number of
    classes where the host can see it, and M elsewhere.
    """
    N, M, D = rows.shape
    is_known = _checks.values_are_known(classes) and classes.numel() > 0
    K, dtype = max(1, int(classes.amax()) + 1) if is_known else M, statistics_dtype(rows)
    of_pixel = classes.clamp_min(0) + K * torch.arange(N, device=rows.device)[:, None]
    sums, counts = (rows.new_zeros(N * K, *size, dtype=dtype) for size in ((D,), ()))
    blocks = zip(*(x.split(PIXELS, dim=1) for x in (rows, of_pixel)), strict=True) if is_known else [(rows, of_pixel)]
    for part, index in blocks:
        sums = sums.index_add(0, index.flatten(), part.flatten(0, 1).to(dtype))
    counts = counts.index_add(0, of_pixel.flatten(), (classes >= 0).to(dtype).flatten())
    return sums.view(N, K, D), counts.view(N, K)
