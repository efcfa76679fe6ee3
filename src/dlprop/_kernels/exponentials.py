"""Exponentials of similarities that lie below their largest.

On CPUs an exponential that underflows, and a product with what little is left of it, may cost a hundred times what
others do; sharp kernels have many. What would be less than the smallest normal number becomes 0.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .compared import Compared

LOWEST = {torch.float32: -87.0, torch.float64: -708.0}  # logarithms of normal numbers


def exp_(x: Tensor) -> Tensor:
    """`e^x` in place, of x up to 0 but for rounding; what is no normal number is 0 on CPUs."""
    lowest = LOWEST.get(x.dtype)
    if x.device.type != "cpu" or lowest is None:
        return x.exp_()
    return torch.threshold_(x.clamp_(min=lowest).exp_(), math.exp(lowest + 1e-3), 0.0)


def exponential(compared: Compared) -> Callable[[Tensor], Tensor]:
    """`exp_`, or the plain one where all similarities are known to lie near each other, which saves two passes.

    `|q . k| <= |q| |k|` says so for one look at queries and keys, which is too dear where keys are fewer than channels.
    A third is left for the sum over the keys, by which backward passes divide.
    """
    queries, keys, bias = compared
    lowest = LOWEST.get(queries.dtype)
    if queries.device.type != "cpu" or lowest is None or keys.shape[1] < queries.shape[2] or not queries.numel():
        return exp_
    span = 2 * torch.linalg.vector_norm(queries, dim=2).amax() * torch.linalg.vector_norm(keys, dim=2).amax()
    if bias is not None:
        span += bias.amax() - bias.amin()
    return Tensor.exp_ if span <= -lowest * 2 / 3 else exp_
