"""Finite differences along channels and their adjoint."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _checks
from ._precision import at_least_float32

__all__ = ["finite_difference"]

Scheme = Literal["forward", "central", "sum", "laplacian"]

# Channels that one order takes away.
STEP = {"forward": 1, "central": 2, "sum": 1, "laplacian": 2}


def finite_difference(x: Tensor, order: int = 1, *, dim: int = 1, scheme: Scheme = "forward") -> Tensor:
    r"""Finite difference of order `q` along one dimension, by default the channels.

    One order is, with `D^0 v = v`,

    - "forward", Eq. 2: `D^q v(i) = D^{q-1} v(i+1) - D^{q-1} v(i)`
    - "central", Eq. 10: `D^q v(i) = (D^{q-1} v(i+2) - D^{q-1} v(i)) / 2`
    - "sum", Eq. 11: `D^q v(i) = D^{q-1} v(i+1) + D^{q-1} v(i)`
    - "laplacian", Eq. 12: `D^q v(i) = D^{q-1} v(i+1) + D^{q-1} v(i-1) - 2 D^{q-1} v(i)`

    and of order `q` the product with the Toeplitz matrix `dlprop.theory.toeplitz_matrix(D, q, scheme)`. The laplacian
    of order `q` is the forward difference of order `2q`; the central one is forward after sum, over `2^q`.

    Args:
        x: floating tensor of any shape, for instance features `(N, D, H, W)`.
        order: order `q >= 0`; order 0 returns `x` itself.
        dim: dimension along which the difference is taken.
        scheme: "forward", "central", "sum" or "laplacian".

    Returns:
        A tensor of the dtype of `x` whose `dim` is shorter by `order * step`; step is 1 for forward and sum, 2 for
        central and laplacian. Half precision is computed in float32 and rounded once.

    Raises:
        TypeError: `x` is no floating tensor; `order` or `dim` is no int (bools and floats are none).
        ValueError: `order < 0`, `dim` out of range, an unknown scheme, or `order * step >= x.shape[dim]`.

    Cost:
        Time O(order * numel), memory O(numel).

    Example:
        >>> x = torch.tensor([[1.0, 2.0, 4.0, 8.0]])
        >>> finite_difference(x)
        tensor([[1., 2., 4.]])
        >>> finite_difference(x, order=2)
        tensor([[1., 2.]])
        >>> finite_difference(x, scheme="central")
        tensor([[1.5000, 3.0000]])

    Reference:
        DerProp, Eq. 2 and 10-14.
    """
    _checks.floating("x", x)
    order = _checks.integer("order", order, 0)
    _checks.choice("scheme", scheme, Scheme)
    dim = _dimension(dim, x.ndim)
    _checks.enough_channels("x", x.shape[dim], order, STEP[scheme], scheme)
    return difference(x, order, dim, scheme)


def difference(x: Tensor, order: int, dim: int, scheme: Scheme) -> Tensor:
    """`finite_difference` without the checks."""
    if order == 0:
        return x
    y = at_least_float32(x)
    if scheme in ("forward", "laplacian"):
        y = torch.diff(y, n=order * STEP[scheme], dim=dim)
    else:
        for _ in range(order):
            length = y.shape[dim] - STEP[scheme]
            low, high = y.narrow(dim, 0, length), y.narrow(dim, STEP[scheme], length)
            y = high + low if scheme == "sum" else (high - low) / 2
    return y.to(x.dtype)


def difference_adjoint(y: Tensor, order: int, dim: int, scheme: Scheme) -> Tensor:
    """The product with the transposed Toeplitz matrix: `<A_q x, y> = <x, A_q^T y>`.

    The transposed stencil is the mirrored one, and mirroring changes the sign of an odd order of the antisymmetric
    schemes only; the border is met by padding with zeros.
    """
    pad = order * STEP[scheme]
    dim = dim % y.ndim
    padded = F.pad(y, (0, 0) * (y.ndim - 1 - dim) + (pad, pad))
    mirrored = difference(padded, order, dim, scheme)
    return -mirrored if scheme in ("forward", "central") and order % 2 else mirrored


def metric(x: Tensor, weights: Sequence[float], dim: int, scheme: Scheme) -> Tensor:
    """`K x` along ``dim`` with the banded `K = sum_q w_q A_q^T A_q` of `dlprop.theory.derivative_metric`.

    Order by order as stencils: O(Q) passes over ``x``, and no matrix whose size the compiler would have to fix.
    """
    terms = [
        w * difference_adjoint(difference(x, q, dim, scheme), q, dim, scheme) for q, w in enumerate(weights) if w != 0
    ]
    return sum(terms[1:], terms[0]) if terms else torch.zeros_like(x)


def _dimension(dim: int, ndim: int) -> int:
    dim = _checks.integer("dim", dim)
    if not -ndim <= dim < ndim:
        raise ValueError(f"dim must be in [{-ndim}, {ndim - 1}] for a tensor of {ndim} dimensions, got {dim}")
    return dim % ndim
