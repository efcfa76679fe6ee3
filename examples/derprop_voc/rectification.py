"""Pseudo-labels: the weak view's prediction adjusted, then rectified by propagation (Eq. 5), and what both remember."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dlprop.statistics import ClassStatistics

from .config import CLASSIFIERS, Config
from .data import VOID
from .distributed import total, world_size
from .losses import make_propagation, without_padding
from .model import Output

# Added to the share of a class before its logarithm is taken.
SMALLEST_PRIOR = 1e-4

AFFINITY_NOTES = {
    "linear": "Eq. 4, the paper's; on real images it costs points, so try ridge or discriminant",
    "softmax": "as in the paper's released code; sharp, so P~ is near P",
    "ridge": "a linear fit of P to the features; its cross entropy is steep, so take --detach-logits",
    "discriminant": "balances the classes; for dense scenes whose small classes die out",
}
ACROSS_NOTES = {
    "image": "each image's own pixels",
    "batch": "all pixels of a batch",
    "data": "the unlabelled images of the last steps and each image's own pixels",
}


def adjusted(logits: Tensor, prior: Tensor, tau: float) -> Tensor:
    """`L_c - tau log(prior_c + 1e-4)` of logits (N, C, H, W) for a prior (C,) that sums to 1.

    Classes that are predicted often lose, those that are predicted seldom gain; with a negative `tau` the reverse.

    Reference:
        Menon et al., Long-tail learning via logit adjustment, 2021.
    """
    return logits - (tau * torch.log(prior + SMALLEST_PRIOR)).to(logits.dtype)[:, None, None]


class Rectification(nn.Module):
    """Makes P_bar, the pseudo-labels' distribution, and keeps what that takes from step to step.

    In each step `follow` comes first, then `pseudo_labels`, which changes nothing.

    Args:
        config: the options of the group "propagation".
        num_classes: C.

    Attributes:
        predicted: (C,), decayed sum of the mean predictions on unlabelled images; its shares are the running prior,
            their mean without the bias of one that starts at 0.
        labeled: (C,), labelled pixels of each class so far.
        statistics: with `across: data`, decayed sums over the unlabelled images; else None.
        propagate: makes P~, with these statistics.
    """

    predicted: Tensor
    labeled: Tensor

    def __init__(self, config: Config, num_classes: int) -> None:
        super().__init__()
        self.config = config
        for name in ("predicted", "labeled"):
            self.register_buffer(name, torch.zeros(num_classes, dtype=torch.float64))
        # The propagation adds each image's own pixels to the statistics, which hold the current batch already. So an
        # image counts twice among the 1 / (1 - decay) batches that are remembered, and once more than the rest of its
        # batch, as in a second pass over a folder. The other way, to add the batch later, would treat the first batch
        # as images alone, and images alike only if the propagation saw the batches of all processes.
        statistics = ClassStatistics(num_classes, config.propagation_channels) if config.across == "data" else None
        self.statistics = statistics
        self.propagate = make_propagation(config, statistics)

    @torch.no_grad()
    def follow(self, weak: Output, valid: Tensor, labels: Tensor, ramp: float) -> None:
        """Takes the global batch of a step into account.

        Args:
            weak: output on the weak view of the unlabelled images.
            valid: (N, H, W) bool, False on their padding.
            labels: ids of the labelled images, `VOID` where there is none.
            ramp: as in `pseudo_labels`.
        """
        config = self.config
        if config.adjust in ("prior", "alignment"):
            P = weak.logits.softmax(1) * valid[:, None]
            sums = total(torch.cat([P.sum((0, 2, 3), dtype=torch.float64), valid.sum()[None]]))
            self.predicted.mul_(config.prior_momentum).add_(sums[:-1] / sums[-1].clamp(min=1))
        if config.adjust == "alignment":
            C = len(self.labeled)
            ids = torch.where(labels == VOID, C, labels).flatten()
            self.labeled += total(self.labeled.new_zeros(C + 1).index_add(0, ids, torch.ones_like(ids).double())[:C])
        if self.statistics is not None:
            step = ClassStatistics(*self.statistics.sums.shape).to(valid.device)
            # Of the adjusted logits, as are the image's own pixels that the propagation adds.
            step.update(self.adjust(weak.logits, ramp), weak.feats, mask=valid)
            if world_size() > 1:
                step.all_reduce()
            self.statistics.decay(config.statistics_decay)
            self.statistics.merge(step)

    def adjust(self, logits: Tensor, ramp: float) -> Tensor:
        """The logits that pseudo-labels are made from: (N, C, H, W), as `adjust` asks for."""
        config = self.config
        if config.adjust == "prior":
            return adjusted(logits, _shares(self.predicted), config.tau * ramp * config.ramp_end)
        if config.adjust == "alignment":
            return adjusted(adjusted(logits, _shares(self.predicted), 1.0), _shares(self.labeled), -1.0)
        return logits / config.temperature if config.adjust == "temperature" else logits

    @torch.no_grad()
    def pseudo_labels(self, weak: Output, valid: Tensor, ramp: float) -> Tensor:
        """P_bar of Eq. 5 from the adjusted logits, or their P where nothing is rectified: (N, C, H, W).

        Args:
            weak: output on the weak view.
            valid: (N, H, W) bool, False on padding.
            ramp: how far the run is, from 0 to 1.
        """
        logits = self.adjust(weak.logits, ramp)
        if self.config.propagates and self.config.rectify:
            logits, mask = without_padding(self.propagate, logits, valid)
            return self.propagate.rectify(logits, weak.feats, ramp * self.config.ramp_end, mask=mask)
        return logits.softmax(1)


def _shares(sums: Tensor) -> Tensor:
    """`sums` (C,) divided by their sum; equal shares where it is 0."""
    return F.normalize(torch.where(sums.sum() > 0, sums, 1), p=1, dim=0)


def method(config: Config) -> str:
    """One line on what makes the pseudo-labels and by which affinity, and why that one."""
    if config.variant == "supervised":
        return "labelled images only; no pseudo-labels, and P~ is only scored"
    prediction = {
        "none": "P",
        "prior": f"P less {config.tau:g} times the log of its running class shares (ramped)",
        "alignment": "P aligned from its running class shares to those of the labels",
        "temperature": f"P at temperature {config.temperature:g}",
    }[config.adjust]
    alone = "P itself" if config.adjust == "none" else prediction
    if not config.propagates:
        return f"pseudo-labels: {alone} (variant no_propagation), and P~ is only scored"
    labels = f"{prediction} and P~ blended by Eq. 5" if config.rectify else f"{alone} (no_rectify)"
    chosen = "the default" if config.affinity == Config.affinity else "chosen by --affinity"
    note = AFFINITY_NOTES[config.affinity]
    across = f"; estimated from {ACROSS_NOTES[config.across]}" if config.affinity in CLASSIFIERS else ""
    return f"pseudo-labels: {labels}; P~ by affinity {config.affinity}, {chosen}: {note}{across}"
