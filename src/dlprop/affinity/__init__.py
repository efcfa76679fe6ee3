"""How sources are weighted at a target: one frozen dataclass an affinity, with its options and its mathematics.

`DerivativeLabelPropagation` takes any of them, or any other object with their method `propagate`.
"""

from ..features import Pixels
from ._orders import Affinity
from .discriminant import Discriminant
from .linear import Linear
from .ridge import Ridge
from .softmax import Softmax

__all__ = ["Affinity", "Discriminant", "Linear", "Pixels", "Ridge", "Softmax"]
