"""How sources are weighted at a target: one frozen dataclass an affinity, with its options and its mathematics.

`DerivativeLabelPropagation` takes any of them, or any other object with their method `propagate`.
"""

from ..features import Pixels
from ._orders import Affinity
from .linear import Linear
from .softmax import Softmax

__all__ = ["Affinity", "Linear", "Pixels", "Softmax"]
