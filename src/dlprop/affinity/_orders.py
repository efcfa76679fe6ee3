"""What the affinities share: the weighted orders of the difference, and the normalisation before them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from .. import _checks
from ..difference import STEP, Scheme, difference
from ..features import Normalize, Pixels, normalize_features


class Affinity(Protocol):
    """What `DerivativeLabelPropagation` asks of an affinity: any object with this method is one."""

    def propagate(self, sources: Pixels, targets: Pixels) -> Tensor:
        """The propagated logits of the targets from the logits and features of the sources.

        Args:
            sources: M pixels with logits `(N, C, M)` and features `(N, D, m)`, checked, in at least float32.
            targets: M' pixels with features `(N, D, m')`.

        Returns:
            `(N, C, M')`, in the dtype of `sources.logits`. A page of the documentation, "Your own affinity", has an
            example.
        """


@dataclass(frozen=True, kw_only=True)
class Orders:
    """The options behind `S = sum_q w_q (A_q V)^T (A_q V')`, checked when they are given."""

    weights: Sequence[float] = (1.0, 1.0)
    scheme: Scheme = "forward"
    normalize: Normalize = "l1"

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", _checks.weights_of_orders(self.weights))
        _checks.choice("scheme", self.scheme, Scheme)
        _checks.choice("normalize", self.normalize, Normalize)

    def check_channels(self, feats: Tensor) -> None:
        """Raise ValueError unless the highest order leaves a channel of ``feats`` (N, D, m)."""
        _checks.enough_channels("feats", feats.shape[1], len(self.weights) - 1, STEP[self.scheme], self.scheme)

    def normalized(self, sources: Pixels, targets: Pixels) -> tuple[Tensor, Tensor]:
        """The features of both, normalised and then brought to their pixels: one tensor if they are the same."""
        V, W = self.normalized_at_points(sources, targets)
        upsampled = sources.upsample(V)
        return upsampled, upsampled if W is V else targets.upsample(W)

    def normalized_at_points(self, sources: Pixels, targets: Pixels) -> tuple[Tensor, Tensor]:
        """The normalised features of both on their own grids: one tensor if they are the same."""
        V = normalize_features(sources.feats, self.normalize)
        return V, V if targets.feats is sources.feats else normalize_features(targets.feats, self.normalize)

    def unit_differences(self, V: Tensor) -> list[Tensor]:
        """The differences of every order with unit length, whose products are the cosine, Eq. 15-16."""
        return [normalize_features(difference(V, q, 1, self.scheme), "l2") for q in range(len(self.weights))]
