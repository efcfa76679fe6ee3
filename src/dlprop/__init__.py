"""Label-propagation primitives for semantic segmentation, linear in the number of pixels.

`DerivativeLabelPropagation` averages class logits over pixels with similar features, `DerivativeLoss` shapes those
features, and `MomentumAverager` averages the network that makes them; the forms of propagation are in
`dlprop.affinity`. From the paper "Semi-Supervised Semantic Segmentation via Derivative Label Propagation" (DerProp).
"""

from .averaging import MomentumAverager
from .difference import finite_difference
from .loss import DerivativeLoss
from .propagation import DerivativeLabelPropagation
from .similarity import derivative_similarity

__all__ = [
    "DerivativeLabelPropagation",
    "DerivativeLoss",
    "MomentumAverager",
    "derivative_similarity",
    "finite_difference",
]

__version__ = "0.2.0"
