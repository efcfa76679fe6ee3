"""Features by the book, one image at a time: `V` is a float64 array (D, M), columns are pixels, as in the paper."""

from math import comb, exp, floor, sqrt

import numpy as np

SCHEMES = ("forward", "central", "sum", "laplacian")
NORMALIZATIONS = ("l1", "l2", "softmax", None)
STEP = {"forward": 1, "central": 2, "sum": 1, "laplacian": 2}


def difference(V, order, scheme="forward"):
    """D^q V along the first axis by the recursions of Eq. 2, 10, 11 and 12, one channel at a time."""
    previous = np.asarray(V, dtype=np.float64)
    for _ in range(order):
        length = previous.shape[0] - STEP[scheme]
        current = np.zeros((max(length, 0), *previous.shape[1:]))
        for i in range(length):
            if scheme == "forward":  # Eq. 2
                current[i] = previous[i + 1] - previous[i]
            elif scheme == "central":  # Eq. 10
                current[i] = (previous[i + 2] - previous[i]) / 2
            elif scheme == "sum":  # Eq. 11
                current[i] = previous[i + 1] + previous[i]
            elif scheme == "laplacian":  # Eq. 12, around channel i + 1
                current[i] = previous[i + 2] + previous[i] - 2 * previous[i + 1]
            else:
                raise AssertionError(scheme)
        previous = current
    return previous


def toeplitz(D, order, scheme="forward"):
    """A_q entry by entry: Eq. 14 for `forward`, and the binomial expansions of Eq. 10, 11 and 12."""
    A = np.zeros((D - order * STEP[scheme], D))
    for i in range(A.shape[0]):
        for p in range(order + 1):
            if scheme == "forward":
                A[i, i + p] = (-1) ** (order - p) * comb(order, p)
            elif scheme == "central":
                A[i, i + 2 * p] = (-1) ** (order - p) * comb(order, p) / 2**order
            elif scheme == "sum":
                A[i, i + p] = comb(order, p)
        if scheme == "laplacian":  # (E - 2 + 1/E)^q = (E^(1/2) - E^(-1/2))^(2q)
            for p in range(2 * order + 1):
                A[i, i + p] = (-1) ** p * comb(2 * order, p)
    return A


def normalize(V, kind):
    """Normalise each column: `l1`, `l2`, `softmax` over channels, or None. A zero column stays zero under a norm."""
    V = np.asarray(V, dtype=np.float64)
    if kind is None:
        return V.copy()
    out = np.zeros_like(V)
    for m in range(V.shape[1]):
        column = [float(x) for x in V[:, m]]
        if kind == "softmax":
            top = max(column)
            powers = [exp(x - top) for x in column]
            out[:, m] = [x / sum(powers) for x in powers]
            continue
        norm = sum(abs(x) for x in column) if kind == "l1" else sqrt(sum(x * x for x in column))
        if norm != 0:  # a NaN is a norm too, and stays
            out[:, m] = [x / norm for x in column]
    return out


def similarity(V, W, order, scheme="forward", kind="dot"):
    """S_q(i, j) = <D^q v_i, D^q w_j> for features that are normalised already; `cosine` is Eq. 15-16.

    `gaussian` is exp(-|D^q v_i - D^q w_j|^2 / 2).
    """
    A, B = difference(V, order, scheme), difference(W, order, scheme)
    S = np.zeros((A.shape[1], B.shape[1]))
    for i in range(A.shape[1]):
        for j in range(B.shape[1]):
            S[i, j] = sum(A[d, i] * B[d, j] for d in range(A.shape[0]))
            if kind == "cosine":
                norm = sqrt(sum(A[:, i] ** 2)) * sqrt(sum(B[:, j] ** 2))
                S[i, j] = S[i, j] / norm if norm != 0 else 0.0
            elif kind == "gaussian":
                S[i, j] = exp(-sum((A[d, i] - B[d, j]) ** 2 for d in range(A.shape[0])) / 2)
    return S


def interpolation_weights(size_in, size_out, align_corners):
    """For each output point the two input points it lies between and the weight of the second (one axis)."""
    rows = []
    for i in range(size_out):
        if align_corners:
            x = i * (size_in - 1) / (size_out - 1) if size_out > 1 else 0.0
        else:
            x = max((i + 0.5) * size_in / size_out - 0.5, 0.0)
        low = min(floor(x), size_in - 1)
        rows.append((low, min(low + 1, size_in - 1), x - low))
    return rows


def resize(x, size, align_corners):
    """Bilinear interpolation of (C, H, W) to (C, h, w) without antialias, four neighbours at a time."""
    x = np.asarray(x, dtype=np.float64)
    rows = interpolation_weights(x.shape[1], size[0], align_corners)
    columns = interpolation_weights(x.shape[2], size[1], align_corners)
    out = np.zeros((x.shape[0], *size))
    for i, (top, bottom, down) in enumerate(rows):
        for j, (left, right, across) in enumerate(columns):
            above = (1 - across) * x[:, top, left] + across * x[:, top, right]
            below = (1 - across) * x[:, bottom, left] + across * x[:, bottom, right]
            out[:, i, j] = (1 - down) * above + down * below
    return out


def resizing_matrix(grid, size, align_corners):
    """U (m, M) with `x U` the resize of flat x from `grid` to `size`, weight by weight; `y U^T` is its adjoint."""
    U = np.zeros((grid[0] * grid[1], size[0] * size[1]))
    rows = interpolation_weights(grid[0], size[0], align_corners)
    columns = interpolation_weights(grid[1], size[1], align_corners)
    for i, (top, bottom, down) in enumerate(rows):
        for j, (left, right, across) in enumerate(columns):
            pixel = i * size[1] + j
            for row, weight in ((top, 1 - down), (bottom, down)):
                U[row * grid[1] + left, pixel] += weight * (1 - across)
                U[row * grid[1] + right, pixel] += weight * across
    return U
