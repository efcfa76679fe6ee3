"""The algebra behind the library in plain NumPy and float64: Toeplitz matrices, the metric K and the bounds.

Nothing here touches torch, so that it can serve as ground truth for what the torch path computes.
"""

from collections.abc import Sequence
from typing import Literal, cast

import numpy as np
import numpy.typing as npt

__all__ = ["ar1_precision", "derivative_metric", "lemma1_bound", "theorem2_bound", "toeplitz_matrix"]

Matrix = npt.NDArray[np.float64]
Scheme = Literal["forward", "central", "sum", "laplacian"]

# One difference step as the coefficients of v(i), v(i+1), ...
_STENCILS: dict[str, tuple[float, ...]] = {
    "forward": (-1.0, 1.0),  # Eq. 2
    "central": (-0.5, 0.0, 0.5),  # Eq. 10
    "sum": (1.0, 1.0),  # Eq. 11
    "laplacian": (1.0, -2.0, 1.0),  # Eq. 12
}


def toeplitz_matrix(D: int, order: int, scheme: Scheme = "forward") -> Matrix:
    r"""The matrix `A_q` of the finite difference of order `q` along `D` channels.

    For the forward scheme `A_q(i, i+p) = (-1)^{q-p} \binom{q}{p}` for `0 <= p <= q`, and 0 elsewhere.

    Args:
        D: channels.
        order: order `q` of the difference; 0 gives the identity.
        scheme: "forward" (Eq. 2), "central" (Eq. 10), "sum" (Eq. 11) or "laplacian" (Eq. 12).

    Returns:
        `A_q`, float64, `(D - q * step, D)`; step is 1 for forward and sum, 2 for central and laplacian.

    Raises:
        TypeError, ValueError: `D` or `order` is no int, `D < 1`, `order < 0`, an unknown scheme, `order * step >= D`.

    Cost:
        Time and memory O(D^2), as of all matrices here.

    Example:
        >>> toeplitz_matrix(4, 2)
        array([[ 1., -2.,  1.,  0.],
               [ 0.,  1., -2.,  1.]])

    Reference:
        Eq. 13-14 of the DerProp paper.
    """
    stencil, step = _stencil(D, order, scheme)
    rows = D - order * step
    A = np.zeros((rows, D))
    for p, coefficient in enumerate(stencil):
        A[np.arange(rows), np.arange(rows) + p] = coefficient
    return A


def derivative_metric(
    D: int, max_order: int, weights: Sequence[float] | None = None, scheme: Scheme = "forward"
) -> Matrix:
    r"""The banded metric `K = \sum_q w_q A_q^T A_q` of the discrete Sobolev inner product along channels.

    `V^T K V` is the weighted sum of the derivative similarities of orders 0..max_order, which makes propagation a
    low-rank product. With non-negative weights `K` is positive semi-definite.

    Args:
        D: channels.
        max_order: highest order `Q`.
        weights: the `Q + 1` weights `w_q`; None means ones.
        scheme: as in `toeplitz_matrix`.

    Returns:
        `K`, float64, `(D, D)`.

    Raises:
        TypeError, ValueError: as `toeplitz_matrix`, or not `max_order + 1` finite weights.

    Cost:
        Time O(Q D^3), memory O(D^2).

    Example:
        >>> derivative_metric(4, 1)
        array([[ 2., -1.,  0.,  0.],
               [-1.,  3., -1.,  0.],
               [ 0., -1.,  3., -1.],
               [ 0.,  0., -1.,  2.]])

    Reference:
        DerProp, Eq. 3 and 4: the sum over orders in matrix form.
    """
    _stencil(D, max_order, scheme, name="max_order")
    given = np.ones(max_order + 1) if weights is None else np.asarray(weights, dtype=np.float64)
    if given.shape != (max_order + 1,) or not np.isfinite(given).all():
        wanted = f"max_order + 1 = {max_order + 1} finite floats"
        raise ValueError(f"weights must hold {wanted}, got {given.size}: {weights}")
    K = np.zeros((D, D))
    for q, w in enumerate(given):
        A = toeplitz_matrix(D, q, scheme)
        K += w * (A.T @ A)
    return K


def ar1_precision(D: int, rho: float) -> Matrix:
    r"""The inverse covariance of `D` channels that form a stationary AR(1) process of variance 1 and correlation `rho`.

    Their covariance is `rho^{|i - j|}`. Times `1 - rho^2` its inverse is the derivative metric of weights
    `((1 - rho)^2, rho)`, but for the two corner entries, which are larger by `rho (1 - rho)`. So Eq. 4 assumes such
    channels: its equal weights are those of `rho = (3 - \sqrt 5) / 2 = 0.382`.

    Args:
        D: channels.
        rho: correlation of neighbouring channels, in (-1, 1).

    Returns:
        The precision matrix, float64, `(D, D)`.

    Raises:
        TypeError, ValueError: `D` is no int or below 1, or `rho` is outside (-1, 1).

    Example:
        >>> ar1_precision(3, 0.5) * 0.75
        array([[ 1.  , -0.5 ,  0.  ],
               [-0.5 ,  1.25, -0.5 ],
               [ 0.  , -0.5 ,  1.  ]])

    Reference:
        Rue and Held, Gaussian Markov Random Fields, 2005, section 1.1.1.
    """
    _stencil(D, 0, "forward")
    if not -1 < rho < 1:
        raise ValueError(f"rho must be in (-1, 1), got {rho}")
    precision = np.diag(np.full(D, 1 + rho**2)) - rho * (np.eye(D, k=1) + np.eye(D, k=-1))
    precision[0, 0] -= rho**2
    precision[-1, -1] -= rho**2
    return precision / (1 - rho**2)


def lemma1_bound(D: int, order: int, scheme: Scheme = "forward") -> float:
    r"""The induced 1-norm of `A_q`, the least `c` with `||A_q v||_1 <= c ||v||_1` for every `v`.

    Equal to `2^q` for forward and sum once `D >= 2q + 1`, to `4^q` for laplacian and 1 for central once
    `D >= 4q + 1`; below these sizes no column holds the whole stencil and it is smaller.

    Args:
        D: channels.
        order: order `q` of the difference.
        scheme: as in `toeplitz_matrix`.

    Returns:
        The largest absolute column sum of `A_q`.

    Raises:
        TypeError, ValueError: as `toeplitz_matrix`.

    Example:
        >>> lemma1_bound(5, 2), lemma1_bound(4, 2)
        (4.0, 3.0)

    Reference:
        Lemma 1 of the DerProp paper, which states equality without the condition on D.
    """
    return float(np.abs(toeplitz_matrix(D, order, scheme)).sum(axis=0).max())


def theorem2_bound(V: npt.ArrayLike, order: int) -> float:
    r"""The right side of `||(A_q V)^T (A_q V)||_1 <= (2^{q-2} ||A_2 V||_1)^2`, entrywise norms, forward scheme.

    An upper bound, not an equivalence: both sides can be 0 and the gap can be of any size.

    Args:
        V: features, `(D, M)`.
        order: order `q >= 2`.

    Returns:
        The right side, at least 0.

    Raises:
        TypeError, ValueError: `order` is no int, `V` is not two-dimensional, `order < 2`, or `order >= D`.

    Example:
        >>> theorem2_bound([[1.0], [0.0], [1.0]], order=2)
        4.0

    Reference:
        Theorem 2 of the DerProp paper.
    """
    V = np.asarray(V, dtype=np.float64)
    if V.ndim != 2:
        raise ValueError(f"V must have shape (D, M), got {V.shape}")
    _stencil(V.shape[0], order, "forward")
    if order < 2:
        raise ValueError(f"order must be at least 2 for Theorem 2, got {order}")
    return float((2.0 ** (order - 2) * np.abs(np.diff(V, n=2, axis=0)).sum()) ** 2)


def _stencil(D: int, order: int, scheme: str, name: str = "order") -> tuple[tuple[float, ...], int]:
    """Check the arguments; return the coefficients of the difference of ``order`` and the step of the scheme."""
    for argument, value, minimum in (("D", D, 1), (name, order, 0)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            raise TypeError(f"{argument} must be an int, got {type(value).__name__} {value!r}")
        if value < minimum:
            raise ValueError(f"{argument} must be at least {minimum}, got {value}")
    if scheme not in _STENCILS:
        raise ValueError(f"scheme must be one of {tuple(_STENCILS)}, got {scheme!r}")
    step = len(_STENCILS[scheme]) - 1
    if order * step >= D:
        raise ValueError(
            f"{name} * step = {order} * {step} = {order * step} must be below D = {D} for scheme {scheme!r}; "
            "lower the order or widen the features"
        )
    coefficients: list[float] = [1.0]
    for _ in range(order):
        coefficients = cast("list[float]", np.convolve(coefficients, _STENCILS[scheme]).tolist())
    return tuple(coefficients), step
