"""How good pseudo-labels are while training, against masks that training itself never sees."""

import torch
from torch import Tensor, nn

from dlprop import DerivativeLabelPropagation

from .data import VOID
from .distributed import total
from .evaluate import make_metric
from .losses import without_padding
from .model import Output

# P, P~ and P_bar on the weak view of unlabelled images.
KINDS = ("prediction", "propagated", "pseudo")


class PseudoLabelQuality:
    """What P, P~ and P_bar are worth on training crops, gathered between two calls of `compute`.

    mIoU has the names "labeled" and "unlabeled" (the latter on the weak view), each with "prediction" P and
    "propagated" P~, and of unlabelled images "pseudo" P_bar and "confident", P_bar on the pixels that the threshold
    lets through. For each of P, P~ and P_bar also: the share of pixels whose confidence reaches that threshold, and how
    many of those are right. P and P~ are the network's own, also where pseudo-labels are made from adjusted logits.
    """

    def __init__(self, propagate: DerivativeLabelPropagation, num_classes: int, device: torch.device) -> None:
        self.propagate = propagate
        names = ["labeled_prediction", "labeled_propagated", "unlabeled_prediction", "unlabeled_propagated"]
        self.metrics = nn.ModuleDict(
            {name: make_metric(num_classes) for name in [*names, "unlabeled_pseudo", "unlabeled_confident"]}
        ).to(device)
        # A row each of KINDS: pixels, those above the threshold, and those of them that are right.
        self.counts = torch.zeros(len(KINDS), 3, dtype=torch.int64, device=device)

    @torch.no_grad()
    def labeled(self, output: Output, target: Tensor, valid: Tensor) -> None:
        """Takes one labelled batch."""
        target = target.masked_fill(~valid, VOID)
        self._update("labeled_prediction", output.logits, target)
        self._update("labeled_propagated", self._propagated(output, valid), target)

    @torch.no_grad()
    def unlabeled(self, weak: Output, pseudo: Tensor, threshold: Tensor, target: Tensor, valid: Tensor) -> None:
        """Takes one unlabelled batch, before CutMix, and the threshold on its confidence."""
        target = target.masked_fill(~valid, VOID)
        known = target != VOID
        scores = (weak.logits.softmax(1), self._propagated(weak, valid).softmax(1), pseudo)
        for kind, counts, probabilities in zip(KINDS, self.counts, scores, strict=True):
            self._update(f"unlabeled_{kind}", probabilities, target)
            confidence, label = probabilities.max(1)
            above = known & (confidence >= threshold)
            counts += torch.stack([known.sum(), above.sum(), (above & (label == target)).sum()])
        self._update("unlabeled_confident", pseudo, target.masked_fill(pseudo.amax(1) < threshold, VOID))

    def _propagated(self, output: Output, valid: Tensor) -> Tensor:
        logits, mask = without_padding(self.propagate, output.logits, valid)
        return self.propagate(logits, output.feats, mask=mask)

    def _update(self, name: str, scores: Tensor, target: Tensor) -> None:
        self.metrics[name].update(scores.max(1).indices, target)

    def compute(self) -> dict[str, dict[str, float]]:
        """Entries for the log since the last call: "pseudo" with name -> mIoU, "confident" with shares and accuracies.

        Names that saw no pixel are left out. All processes must call this.
        """
        values = {}
        for name, metric in self.metrics.items():
            if not metric["miou"].update_called:
                continue
            result = metric.compute()
            if result["confusion"].sum() > 0:
                values[name] = result["miou"].item()
            metric.reset()
        confident: dict[str, float] = {}
        for kind, (pixels, above, right) in zip(KINDS, total(self.counts).tolist(), strict=True):
            confident |= {f"{kind}_share": above / pixels} if pixels else {}
            confident |= {f"{kind}_accuracy": right / above} if above else {}
        self.counts.zero_()
        return {"pseudo": values} | ({"confident": confident} if confident else {})
