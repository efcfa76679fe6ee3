"""How good pseudo-labels are while training, against masks that training itself never sees."""

from typing import Any

import torch
from torch import Tensor, nn

from dlprop import DerivativeLabelPropagation

from .data import VOID
from .evaluate import make_metric
from .losses import without_padding
from .model import Output


class PseudoLabelQuality:
    """mIoU of P, P~ and P_bar on training crops, gathered between two calls of `compute`.

    Names: "labeled" and "unlabeled" halves (the latter on the weak view), each with "prediction" P and "propagated"
    P~; "pseudo" is P_bar and "confident" is P_bar on the pixels that the threshold lets through.
    """

    def __init__(self, propagate: DerivativeLabelPropagation, num_classes: int, device: torch.device) -> None:
        self.propagate = propagate
        names = ["labeled_prediction", "labeled_propagated", "unlabeled_prediction", "unlabeled_propagated"]
        self.metrics = nn.ModuleDict(
            {name: make_metric(num_classes) for name in [*names, "unlabeled_pseudo", "unlabeled_confident"]}
        ).to(device)

    @torch.no_grad()
    def labeled(self, output: Output, target: Tensor, valid: Tensor) -> None:
        """Takes one labelled batch."""
        target = target.masked_fill(~valid, VOID)
        self._update("labeled_prediction", output.logits, target)
        self._update("labeled_propagated", self._propagated(output, valid), target)

    @torch.no_grad()
    def unlabeled(self, weak: Output, pseudo: Tensor, confident: Tensor, target: Tensor, valid: Tensor) -> None:
        """Takes one unlabelled batch, before CutMix."""
        target = target.masked_fill(~valid, VOID)
        self._update("unlabeled_prediction", weak.logits, target)
        self._update("unlabeled_propagated", self._propagated(weak, valid), target)
        self._update("unlabeled_pseudo", pseudo, target)
        self._update("unlabeled_confident", pseudo, target.masked_fill(~confident, VOID))

    def _propagated(self, output: Output, valid: Tensor) -> Tensor:
        logits, mask = without_padding(self.propagate, output.logits, valid)
        return self.propagate(logits, output.feats, mask=mask)

    def _update(self, name: str, scores: Tensor, target: Tensor) -> None:
        self.metrics[name].update(scores.argmax(1), target)

    def compute(self) -> dict[str, float]:
        """Name -> mIoU since the last call; names that saw no pixel are left out. All processes must call this."""
        values: dict[str, Any] = {}
        for name, metric in self.metrics.items():
            if not metric["miou"].update_called:
                continue
            result = metric.compute()
            if result["confusion"].sum() > 0:
                values[name] = result["miou"].item()
            metric.reset()
        return values
