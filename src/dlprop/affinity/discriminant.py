"""Discriminant propagation: classes told apart by their means in this very image."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _checks
from .._kernels.moments import Statistics, or_one
from .._precision import statistics_dtype
from ..features import Pixels
from ..statistics import ClassStatistics
from ._classifier import Across, Classifier

__all__ = ["Discriminant"]

# Added to the share of a class before its logarithm is taken.
SMALLEST_PRIOR = 1e-4


@dataclass(frozen=True, kw_only=True)
class Discriminant(Classifier):
    r"""Linear discriminant analysis with the prediction as soft labels: one step of EM, in time linear in the pixels.

    The prediction `P = softmax(L)` says how much of every pixel belongs to a class. With `n_c = \sum_i P_ci`,
    `n = \sum_c n_c`, the mean `\mu` and the covariance `\Sigma` of all pixels,

    - class means `m_c = \sum_i P_ci (v_i - \mu) / (n_c + 1)`, so a class of few pixels stays near the mean,
    - `\Sigma_s = \Sigma + shrinkage tr(\Sigma) / D T`, with `T = K^{-1}`, `K` the derivative metric of `weights` and
      `scheme`, scaled to a mean diagonal of 1,
    - `L'_cj = m_c^T \Sigma_s^{-1} (v_j - \mu) - m_c^T \Sigma_s^{-1} m_c / 2 + log(n_c / n + 10^{-4})`, log-softmax.

    With `pseudo_counts = k` the class means of an image lean on those of others, `b_c = (s_c - n'_c \mu) / (n'_c + 1)`
    from their sums `s_c` and counts `n'_c`: `m_c = (\sum_i P_ci (v_i - \mu) + k b_c) / (n_c + k + 1)`. Covariance, mean
    and shares stay the image's own.

    It helps in dense scenes whose small classes collapse, and under a shift of light or place. By its own pixels alone
    it harms images that are mostly background; leaning on others (k = 10 in our measurements) takes most of that away.

    Args:
        weights: the weights of the orders in `K`, above 0 for order 0 and at least 0 for the others.
        scheme: "forward", "central", "sum" or "laplacian", see `finite_difference`.
        normalize: "l1", "l2", "softmax" (all over channels) or None.
        shrinkage: how far the covariance is moved towards `T`, `>= 0`. With 0 invertible linear maps of the features
            change nothing, but fewer pixels than channels are an error.
        across: whose statistics an image is judged by: its own ("image"), those of the whole "batch", or the "stored"
            ones alone, which are right for an image that they contain already.
        statistics: a `dlprop.statistics.ClassStatistics` whose sums are added to the image's or the batch's; None adds
            nothing. They are of features as they are, so `normalize` must be None.
        pseudo_counts: how many pixels of each class the others' mean stands for, with across "image"; of those pixels
            that count, which with a mask or at full resolution are the logits'. The others are the `statistics`, which
            are then added in no other way, or without these the images of the call: a single one leans on itself, and
            nothing changes. A class that the others lack leans on the image's mean. 0 leans on nothing.

    Raises:
        TypeError, ValueError: options of the wrong type or out of range, "stored" without statistics, statistics with
            `normalize`, and `pseudo_counts` with another across than "image"; in use,
            `Q * step >= D`, statistics of other classes or channels, "stored" ones of no pixel (seen on CPUs in eager
            mode), or a singular covariance (likewise; elsewhere the result is NaN).

    Cost:
        Time O(N M D (C + D) + N D^3), by stored statistics alone O(N M D C + D^3); memory O(N (C M + D^2)) and a copy
        of the features if they are normalised. At full resolution the same, on the grid of the
        features, with up to six copies of them.

    Example:
        >>> from dlprop import DerivativeLabelPropagation
        >>> feats = torch.tensor([[[-1.0, -1.0, 1.0, 1.0]]])  # N=1, D=1, M=4: two pairs of pixels
        >>> logits = torch.tensor([[[9.0, 9.0, -9.0, 9.0], [-9.0, -9.0, 9.0, -9.0]]])  # one pixel strays
        >>> propagate = DerivativeLabelPropagation(Discriminant(shrinkage=0.0, weights=(1.0,)))
        >>> propagate(logits, feats).softmax(dim=1)  # n = 3, 1; m = -1/4, 1/2
        tensor([[[0.8746, 0.8746, 0.6088, 0.6088],
                 [0.1254, 0.1254, 0.3912, 0.3912]]])

    Reference:
        Fisher, The use of multiple measurements in taxonomic problems, 1936; DerProp, Eq. 4, is the product with `K` in
        the place of `\Sigma_s^{-1}`, class sums for means, and neither bias nor prior.
    """

    shrinkage: float = 0.1
    statistics: ClassStatistics | None = None
    pseudo_counts: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.statistics is not None and not isinstance(self.statistics, ClassStatistics):
            raise TypeError(f"statistics must be a ClassStatistics or None, got {type(self.statistics).__name__}")
        _checks.choice("across", self.across, Across)
        if self.across == "stored" and self.statistics is None:
            raise ValueError("across='stored' needs statistics, a ClassStatistics, got None")
        if self.statistics is not None and self.normalize is not None:
            raise ValueError(
                f"normalize must be None with statistics, which are of features as they are, got {self.normalize!r}; "
                "normalise the features before both"
            )
        object.__setattr__(self, "pseudo_counts", _checks.real("pseudo_counts", self.pseudo_counts, 0.0))
        if self.pseudo_counts and self.across != "image":
            raise ValueError(f"pseudo_counts are for across='image', got {self.pseudo_counts:g} with {self.across!r}")

    def propagate(self, sources: Pixels, targets: Pixels) -> Tensor:
        """Log-probabilities of the targets; see `dlprop.affinity.Affinity`."""
        sources, targets = self.prepared(sources, targets)
        statistics, others = self._statistics(sources)
        counts, n, mean = statistics.counts, statistics.total(), statistics.mean()[:, None]
        k, offsets = self.pseudo_counts, statistics.offsets(mean)
        if others is not None:
            lean = k * others.offsets(mean) / (others.counts[:, :, None] + 1)
            offsets = torch.where(n[:, None, None] == 0, 0, offsets + lean)  # without a pixel nothing is known
        means = offsets / (counts[:, :, None] + k + 1)
        A = self.over_covariance(statistics, means, targets.feats.dtype)
        prior = torch.log(counts / or_one(n)[:, None] + SMALLEST_PRIOR)
        bias = prior - (A * (mean + means / 2)).sum(dim=2)
        return self.scores_of(targets, A, bias).log_softmax(dim=1)

    def _statistics(self, sources: Pixels) -> tuple[Statistics, Statistics | None]:
        """Of every image, or of one that stands for all; and those that the class means lean on."""
        stored = None if self.statistics is None else _stored(self.statistics, sources)
        if stored is not None and self.across == "stored":
            if _checks.values_are_known(stored.counts) and not stored.counts.any():
                raise ValueError(
                    "statistics hold no pixel yet, so nothing can be told apart by them: update them first"
                )
            return stored, None
        P = sources.counted(sources.logits.softmax(dim=1))
        own = self.statistics_of(sources, P, are_shares=sources.counts is None)
        if self.pseudo_counts:
            return own, own.over_batch() if stored is None else stored
        return own if stored is None else own.merged(stored), None


def _stored(statistics: ClassStatistics, sources: Pixels) -> Statistics:
    """The sums, if they fit, as of one image, where and in the precision that those of the sources would be in."""
    stored = statistics.statistics
    wanted = (sources.logits.shape[1], sources.feats.shape[1])
    if stored.sums.shape != wanted:
        raise ValueError(
            f"statistics must have the classes and channels of logits and feats, {wanted}, got "
            f"{tuple(stored.sums.shape)}"
        )
    place = sources.feats.device, statistics_dtype(sources.feats)
    return Statistics(*(x.to(*place, copy=True)[None] for x in stored))  # a buffer may change before backward
