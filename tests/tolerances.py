"""One table of tolerances. Every comparison with a float64 oracle goes through `assert_close`.

The largest error allowed is `rtol * max|expected| + atol`: sums over channels and pixels err relative to their
largest term, not to each result, so an entry that cancels to nearly nothing is held to the scale of its neighbours.
"""

from typing import NamedTuple

import numpy as np
import torch


class Tolerance(NamedTuple):
    rtol: float  # of the largest magnitude in the expected array
    atol: float  # floor, for expected arrays that are zero or nearly so
    reason: str


F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16

# Unit roundoff: float64 1.1e-16, float32 6.0e-8, float16 4.9e-4, bfloat16 3.9e-3.
TABLE: dict[tuple[torch.dtype, str], Tolerance] = {
    # A few additions and one division per entry.
    (F64, "difference"): Tolerance(1e-14, 1e-300, "up to four roundings"),
    (F32, "difference"): Tolerance(1e-6, 1e-37, "up to four roundings, intermediate orders may be larger"),
    (F16, "difference"): Tolerance(1e-3, 1e-6, "computed in float32, rounded once"),
    (BF16, "difference"): Tolerance(4e-3, 1e-7, "computed in float32, rounded once"),
    # One normalisation, one difference, one inner product over tens of channels.
    (F64, "similarity"): Tolerance(1e-12, 1e-15, "tens of terms; cosine divides by norms that may cancel"),
    (F32, "similarity"): Tolerance(1e-5, 1e-7, "tens of terms; cosine divides by norms that may cancel"),
    (F16, "similarity"): Tolerance(1e-3, 1e-6, "computed in float32, rounded once; the floor is the subnormal step"),
    (BF16, "similarity"): Tolerance(4e-3, 1e-7, "computed in float32, rounded once"),
    # A similarity, then a sum over hundreds of pixels, interpolation weights on the way.
    (F64, "propagation"): Tolerance(1e-11, 1e-14, "hundreds of terms; the degree divides by a sum that may cancel"),
    (F32, "propagation"): Tolerance(2e-4, 1e-6, "cosine divides by differences that interpolation nearly cancels"),
    (F16, "propagation"): Tolerance(1e-3, 1e-6, "computed in float32, rounded once"),
    (BF16, "propagation"): Tolerance(4e-3, 1e-7, "computed in float32, rounded once"),
    # A softmax of similarities of thousands: their rounding, relative to their own size, goes into the exponent.
    (F64, "sharp"): Tolerance(1e-9, 1e-14, "similarities up to 1e6 or so, each with its rounding"),
    (F32, "sharp"): Tolerance(5e-3, 1e-6, "similarities up to 1e3 or so, each with its rounding"),
    # Sums over all pairs of pixels of residuals that are each rounded.
    (F64, "loss"): Tolerance(1e-12, 1e-15, "positive terms, so no cancellation; many of them"),
    (F32, "loss"): Tolerance(1e-5, 1e-8, "positive terms, so no cancellation; each residual carries its own rounding"),
    (F16, "loss"): Tolerance(1e-5, 1e-8, "a loss is float32 and its half inputs are exact in the oracle"),
    (BF16, "loss"): Tolerance(1e-5, 1e-8, "a loss is float32 and its half inputs are exact in the oracle"),
    # The same where torch's setting allows bfloat16 products: residuals and features rounded to 8 bits, or to 16.
    (F32, "bfloat16"): Tolerance(4e-3, 1e-7, "each residual carries the rounding of its factors and its own"),
    (F32, "two bfloat16"): Tolerance(2e-3, 1e-7, "residuals of 16 bits, each rounded to 8 before they are added up"),
    (F32, "bfloat16 gradient"): Tolerance(8e-3, 1e-7, "features and the product of a tile are rounded to 8 bits"),
    (F32, "two bfloat16 gradient"): Tolerance(8e-3, 1e-7, "the same, only the signs have 16 bits behind them"),
    # First derivatives of any of these, compared with a float64 derivative of the same function.
    (F64, "gradient"): Tolerance(1e-10, 1e-13, "one more pass over the same sums, divided by a norm"),
    (F32, "gradient"): Tolerance(1e-4, 1e-7, "one more pass over the same sums, divided by a norm"),
    (F16, "gradient"): Tolerance(2e-3, 1e-6, "float32 inside, then rounded to the dtype, twice where resized"),
    (BF16, "gradient"): Tolerance(1e-2, 1e-6, "float32 inside, then rounded to the dtype, twice where resized"),
    # Under autocast the operands of the pair products are rounded to the autocast dtype: a few roundings in a row.
    (F16, "autocast"): Tolerance(5e-3, 1e-5, "a chain of products with float16 operands, float32 sums"),
    (BF16, "autocast"): Tolerance(4e-2, 1e-5, "a chain of products with bfloat16 operands, float32 sums"),
    # momentum * a + (1 - momentum) * b, a few times over.
    (F64, "average"): Tolerance(1e-14, 1e-300, "two products and a sum per update"),
    (F32, "average"): Tolerance(1e-6, 1e-37, "two products and a sum per update"),
    (BF16, "average"): Tolerance(2e-2, 1e-6, "each update rounds to bfloat16"),
    # Sums over pixels, a Cholesky solve with the covariance, and a logarithm of probabilities.
    (F64, "classifier"): Tolerance(
        1e-10, 1e-13, "a solve magnifies by the condition of the covariance, a thousand or so"
    ),
    (F32, "classifier"): Tolerance(2e-5, 1e-6, "sums over pixels rounded to float32, then solved with in float64"),
    (F16, "classifier"): Tolerance(1e-3, 1e-6, "computed in float32, rounded once"),
    (BF16, "classifier"): Tolerance(8e-3, 1e-7, "computed in float32, rounded once, where resized twice"),
    (F64, "invariance"): Tolerance(1e-8, 1e-12, "without shrinkage a solve magnifies by the square of what a map does"),
    # Features whose mean is a thousand times their spread.
    (F32, "large mean"): Tolerance(5e-4, 1e-6, "the statistics are centred; the product with the targets rounds 1e3"),
}


def assert_close(actual, expected, kind, dtype=None, *, slack=0.0):
    """Compare a tensor (or array) with a float64 oracle under `TABLE[dtype, kind]`, shape and non-finite places too.

    `slack` is added to the error allowed: what the inputs' own rounding is worth, where a caller knows.
    """
    if isinstance(actual, torch.Tensor):
        dtype = dtype or actual.dtype
        actual = actual.detach().cpu().double().numpy()
    actual = np.asarray(actual, dtype=np.float64)
    expected = np.asarray(expected, dtype=np.float64)
    assert actual.shape == expected.shape, f"shape {actual.shape}, expected {expected.shape}"
    tolerance = TABLE[dtype or F64, kind]
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(actual[~finite], expected[~finite], err_msg="non-finite entries differ")
    if not finite.any():
        return
    error = np.abs(actual[finite] - expected[finite]).max()
    bound = tolerance.rtol * np.abs(expected[finite]).max() + tolerance.atol + slack
    assert error <= bound, f"error {error:.3e} > {bound:.3e} ({kind}, {dtype or F64}: {tolerance.reason})"
