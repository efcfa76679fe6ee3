"""Ridge propagation: the prediction as far as the features explain it."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .. import _checks
from .._kernels.moments import or_one
from ..features import Pixels
from ._classifier import Classifier

__all__ = ["Ridge"]

SMALLEST_PROBABILITY = 1e-6


@dataclass(frozen=True, kw_only=True)
class Ridge(Classifier):
    r"""The prediction fitted linearly by the features it goes with: noise that no feature explains is removed.

    The smallest repair of Eq. 4, `L' = L V^T K V` with the metric estimated and a mean. The sources `P = softmax(L)`
    count `w_i = \sum_c P_ci ((n_c + 1) / n)^{-balance}`, so that small classes are heard. With the weighted means `\mu`
    of the features and `\pi` of P, and the weighted covariance `\Sigma_w`,

    - `B = (\sum_i w_i (P_i - \pi) (v_i - \mu)^T / \sum_i w_i) (\Sigma_w + shrinkage tr(\Sigma_w) / D T)^{-1}`, with
      `T = K^{-1}`, `K` the derivative metric of `weights` and `scheme`, scaled to a mean diagonal of 1,
    - `P'_j = \pi + B (v_j - \mu)`, at least 10^{-6} and normalised over the classes; the output is its logarithm.

    Args:
        weights: the weights of the orders in `K`, above 0 for order 0 and at least 0 for the others.
        scheme: "forward", "central", "sum" or "laplacian", see `finite_difference`.
        normalize: "l1", "l2", "softmax" (all over channels) or None.
        shrinkage: how far the covariance is moved towards `T`, `>= 0`. With 0 this is ordinary least squares, and
            fewer pixels than channels are an error.
        balance: 0 counts every pixel alike, 1 every class, in [0, 1].
        across: whose pixels an image is fitted by: its own ("image") or those of the whole "batch".

    Raises:
        TypeError, ValueError: options of the wrong type or out of range; in use, `Q * step >= D`, or a singular
            covariance (seen on CPUs in eager mode; elsewhere the result is NaN).

    Cost:
        As `Discriminant`.

    Example:
        >>> from dlprop import DerivativeLabelPropagation
        >>> feats = torch.tensor([[[-1.0, -1.0, 1.0, 1.0]]])  # N=1, D=1, M=4: two pairs of pixels
        >>> P = torch.tensor([[[0.8, 0.4, 0.2, 0.2], [0.2, 0.6, 0.8, 0.8]]])  # the first pair does not agree
        >>> propagate = DerivativeLabelPropagation(Ridge(shrinkage=0.0, balance=0.0, weights=(1.0,)))
        >>> propagate(P.log(), feats).softmax(dim=1)
        tensor([[[0.6000, 0.6000, 0.2000, 0.2000],
                 [0.4000, 0.4000, 0.8000, 0.8000]]])

    Reference:
        Hoerl and Kennard, Ridge regression: biased estimation for nonorthogonal problems, 1970; DerProp, Eq. 4.
    """

    shrinkage: float = 0.03
    across: Literal["image", "batch"] = "image"
    balance: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        _checks.choice("across", self.across, Literal["image", "batch"])
        object.__setattr__(self, "balance", _checks.real("balance", self.balance, 0.0, 1.0))

    def propagate(self, sources: Pixels, targets: Pixels) -> Tensor:
        """Log-probabilities of the targets; see `dlprop.affinity.Affinity`."""
        sources, targets = self.prepared(sources, targets)
        P = sources.logits.softmax(dim=1)
        sizes = sources.counted(P).sum(dim=2)
        if self.across == "batch":
            sizes = sizes.sum(dim=0, keepdim=True)
        n = sizes.sum(dim=1, keepdim=True)
        # Without a source nothing counts, and every share will do.
        importance = ((sizes + 1) / or_one(n)) ** -self.balance
        weights = sources.counted(P * (P * importance[:, :, None]).sum(dim=1, keepdim=True))

        statistics = self.statistics_of(sources, weights)
        counts, sums, _ = statistics
        total, mean = statistics.total(), statistics.mean()[:, None]
        shares = counts / or_one(total)[:, None]
        covariance = (sums - counts[:, :, None] * mean) / or_one(total)[:, None, None]
        B = self.over_covariance(statistics, covariance, P.dtype)
        bias = shares - (B * mean).sum(dim=2)
        fitted = self.scores_of(targets, B, bias)
        return torch.log(fitted.clamp_min(SMALLEST_PROBABILITY)).log_softmax(dim=1)
