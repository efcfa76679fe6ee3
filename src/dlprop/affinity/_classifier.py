"""What ridge and discriminant share: a classifier of features in closed form, regularised by the derivative metric."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from .. import _checks
from .._checks import transforms_active
from .._kernels.moments import Statistics, or_one
from ..difference import Scheme, metric
from ..features import Normalize, Pixels
from ..statistics import image_statistics
from ..theory import Matrix, derivative_metric
from ._orders import Orders

Across = Literal["image", "batch", "stored"]

# The roundings that a mean may be off by: features that vary by less are constant.
OF_MEAN = 16
# The roundings that may be left, without shrinkage, of the variance of a channel that the others explain.
OF_VARIANCE = 256


@dataclass(frozen=True, kw_only=True)
class Classifier(Orders):
    """The options of an affinity whose metric is estimated: the derivative metric `K` is only its prior."""

    shrinkage: float
    normalize: Normalize = None
    across: Across = "image"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "shrinkage", _checks.real("shrinkage", self.shrinkage, 0.0))
        if self.weights[0] <= 0 or min(self.weights) < 0:
            raise ValueError(
                "weights must be above 0 for order 0 and at least 0 for the others, so that the derivative metric can "
                f"be inverted, got {self.weights}"
            )

    def prepared(self, sources: Pixels, targets: Pixels) -> tuple[Pixels, Pixels]:
        """Both with normalised features, checked."""
        self.check_channels(sources.feats)
        V, W = self.normalized_at_points(sources, targets)
        return sources.with_feats(V), targets.with_feats(W)

    def statistics_of(self, sources: Pixels, weights: Tensor, *, are_shares: bool = False) -> Statistics:
        """The statistics of each image, or of all together, for class weights (N, C, M), perhaps shares of 1."""
        statistics = image_statistics(sources, weights, are_shares=are_shares)
        return statistics.over_batch() if self.across == "batch" else statistics

    @staticmethod
    def scores_of(targets: Pixels, A: Tensor, bias: Tensor) -> Tensor:
        """`A v_j + bias` on the grid of the targets, for one classifier (1, C, D) of all images or one of each."""
        V = targets.feats
        A, bias = A.to(V.dtype).expand(V.shape[0], -1, -1), bias[:, :, None].to(V.dtype)
        return targets.upsample(torch.baddbmm(bias, A, V))

    def over_covariance(self, statistics: Statistics, x: Tensor, dtype: torch.dtype) -> Tensor:
        """`x Sigma_s^{-1}` for rows x (..., C, D) with `Sigma_s = Sigma + shrinkage tr(Sigma) / D T`.

        `Sigma = second / n`, and `T = K^{-1}`, scaled to a mean diagonal of 1. Features that vary by no more than the
        rounding of their ``dtype`` have `T`.
        """
        D, eps = x.shape[-1], torch.finfo(dtype).eps
        Sigma = statistics.second / or_one(statistics.total())[..., None, None]
        trace = Sigma.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
        is_constant = (trace <= (OF_MEAN * eps) ** 2 * statistics.mean().square().sum(dim=-1))[..., None, None]
        share = torch.where(is_constant, 1, self.shrinkage / D * trace[..., None, None])
        Sigma_s = Sigma + share * self._prior(D, x)
        factor, info = torch.linalg.cholesky_ex(Sigma_s)
        is_singular = info > 0
        if self.shrinkage == 0:  # what is left of a channel that others explain is rounding, of either sign
            left, variance = factor.diagonal(dim1=-2, dim2=-1).square(), Sigma_s.diagonal(dim1=-2, dim2=-1)
            is_singular = is_singular | (left <= OF_VARIANCE * eps * variance).any(dim=-1)
        if _checks.values_are_known(is_singular) and bool(is_singular.any()):
            is_finite = Sigma.isfinite().all(dim=-1).all(dim=-1)
            if bool((is_singular & is_finite).any()):
                raise ValueError(
                    f"the covariance of the features is singular, and shrinkage = {self.shrinkage:g} does not mend it: "
                    "raise shrinkage, or give more pixels than channels"
                )
        solved: Tensor = torch.cholesky_solve(x.mT, torch.where(is_singular[..., None, None], torch.nan, factor))
        return solved.mT

    def _prior(self, D: int, like: Tensor) -> Tensor:
        """`T`, (D, D)."""
        if torch.compiler.is_compiling() or transforms_active():
            identity = torch.eye(D, dtype=like.dtype, device=like.device)
            T: Tensor = torch.linalg.inv(metric(identity, self.weights, 1, self.scheme))
            return T * (D / T.diagonal().sum())
        return torch.from_numpy(_inverse_metric(D, tuple(self.weights), self.scheme)).to(like)


@lru_cache(maxsize=16)
def _inverse_metric(D: int, weights: tuple[float, ...], scheme: Scheme) -> Matrix:
    """In NumPy: a tensor would remember the mode it was first made in, inference for one."""
    T = np.linalg.inv(derivative_metric(D, len(weights) - 1, weights, scheme))
    scaled: Matrix = T * (D / T.trace())
    return scaled
