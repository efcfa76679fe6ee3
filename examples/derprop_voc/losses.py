"""The training objective, Eq. 7, and what it needs: propagation, the confidence threshold, the terms of each half."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dlprop import DerivativeLabelPropagation, DerivativeLoss
from dlprop.affinity import Affinity, Discriminant, Linear, Ridge, Softmax
from dlprop.statistics import ClassStatistics

from .config import ONLY_FOR, Config
from .data import VOID
from .distributed import global_mean, highest
from .model import Output

AFFINITIES: dict[str, Callable[..., Affinity]] = {
    "linear": Linear,
    "softmax": Softmax,
    "ridge": Ridge,
    "discriminant": Discriminant,
}


def make_propagation(config: Config, statistics: ClassStatistics | None = None) -> DerivativeLabelPropagation:
    """Propagation with the affinity of `config` and those of its options that this affinity has.

    Args:
        config: the options of the group "propagation".
        statistics: of other images than those propagated, which the discriminant adds to its own (`across: data`).
    """
    options: dict[str, Any] = {"weights": config.order_weights, "scheme": config.scheme}
    options |= {name: getattr(config, name) for name, affinities in ONLY_FOR.items() if config.affinity in affinities}
    if not config.shrinkage:
        options.pop("shrinkage", None)
    if config.across == "data":
        options["across"] = "image"
    if statistics is not None:
        options["statistics"] = statistics
    if config.normalize != "auto":
        options["normalize"] = _optional(config.normalize)
    return DerivativeLabelPropagation(AFFINITIES[config.affinity](**options), resolution=config.resolution)


def make_derivative_loss(config: Config) -> DerivativeLoss:
    """Eq. 8 and 9 with the options of `config`, as a mean over pairs."""
    return DerivativeLoss(
        max_order=config.max_order,
        eta=config.eta,
        norm=config.loss_norm,
        scheme=config.scheme,
        normalize=_optional(config.loss_normalize),
        ignore_index=VOID,
        num_anchors=config.num_anchors or None,
    )


def _optional(name: str) -> Any:
    return None if name == "none" else name


class AdaptiveThreshold(nn.Module):
    """A global confidence threshold that follows the network.

    Each update moves it towards the mean, over the classes predicted in the global batch, of the highest confidence of
    each. A fixed threshold is the same with momentum 1. No value leaves the device.
    """

    value: Tensor

    def __init__(self, start: float, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("value", torch.tensor(float(start)))

    @torch.no_grad()
    def update(self, probabilities: Tensor, valid: Tensor) -> None:
        """Follows one batch of pseudo-label probabilities (N, C, H, W); only `valid` (N, H, W) pixels count."""
        confidence, label = probabilities.max(1)
        # Absent classes and padding keep the start value 0, which no confidence of a present class can have.
        of_class = confidence.new_zeros(probabilities.shape[1]).scatter_reduce(
            0, label.flatten(), (confidence * valid).flatten(), "amax"
        )
        of_class = highest(of_class)
        present = of_class > 0
        mean = of_class.sum() / present.sum().clamp(min=1)
        followed = self.momentum * self.value + (1 - self.momentum) * mean
        self.value.copy_(torch.where(present.any(), followed, self.value))


class Objective(nn.Module):
    """Eq. 7 for one variant: `labeled` and `unlabeled` give named terms, `total` adds them up.

    L_CE averages over the predictions that take part, so that P alone (no propagation) and P with P~ weigh the same
    on the unlabelled half, as the bracket of Eq. 7 has it; on the labelled half they are added, as written.
    """

    def __init__(self, config: Config, propagate: DerivativeLabelPropagation | None = None) -> None:
        super().__init__()
        self.config = config
        self.propagate = propagate or make_propagation(config)
        self.derivative_loss = make_derivative_loss(config)

    def labeled(self, output: Output, target: Tensor, valid: Tensor) -> dict[str, Tensor]:
        """CE(P_l, Y), CE(P~_l, Y) and the labelled half of L_Der.

        Args:
            output: of the labelled images.
            target: (N, H, W) int64 ids, 255 void.
            valid: (N, H, W) bool, False on padding.
        """
        target = target.masked_fill(~valid, VOID)
        terms = {"ce_l": _cross_entropy(output.logits, target)}
        if self.config.trains_propagated:
            terms["ce_l_propagated"] = _cross_entropy(self._propagated(output, valid), target)
        if self.config.has_derivative_loss:
            terms["der_l"] = self.derivative_loss(output.feats, target, mask=valid)
        return terms

    def unlabeled(
        self, strong: Output, pseudo: Tensor, confident: Tensor, weak_feats: Tensor, valid: Tensor
    ) -> dict[str, Tensor]:
        """CE and KL against the pseudo-labels, and the consistency half of L_Der.

        CE takes the most probable class of P_bar and KL its distribution; both are summed over confident pixels and
        divided by the valid ones, so a batch counts as much as it is trusted.

        Args:
            strong: output on the strong view.
            pseudo: P_bar (N, C, H, W).
            confident: (N, H, W) bool, the binary map.
            weak_feats: features of the weak view, cut and mixed like the strong one.
            valid: (N, H, W) bool, False on padding.
        """
        trusted = (confident & valid).to(pseudo.dtype)

        def masked_mean(values: Tensor) -> Tensor:
            return global_mean((values * trusted).sum(), valid.sum())

        label = pseudo.max(1).indices  # four times faster than argmax over this dimension
        log_p = strong.logits.log_softmax(1)
        terms = {"ce_u": masked_mean(F.nll_loss(log_p, label, reduction="none"))}
        if self.config.trains_propagated:
            propagated = self._propagated(strong, valid)
            terms["ce_u_propagated"] = masked_mean(F.cross_entropy(propagated, label, reduction="none"))
        terms["kl"] = masked_mean(F.kl_div(log_p, pseudo, reduction="none").sum(1))
        if self.config.has_derivative_loss:
            grid = F.adaptive_avg_pool2d(valid[:, None].float(), tuple(weak_feats.shape[-2:]))[:, 0] > 0.5
            terms["der_u"] = self.derivative_loss(strong.feats, weak_feats, mask=grid)
        return terms

    def total(self, terms: Mapping[str, Tensor], progress: float = 1.0) -> Tensor:
        """Eq. 7; with a warm-up, the unlabelled terms weigh less while `progress` (0 to 1) is small."""
        config = self.config
        warm = min(1.0, progress / config.unlabeled_warmup) if config.unlabeled_warmup else 1.0
        propagated = config.weight_propagated
        share = warm * (0.5 if config.trains_propagated else 1.0)
        weights = {
            "ce_l": config.weight_ce,
            "ce_l_propagated": config.weight_ce * propagated,
            "ce_u": config.weight_ce * share,
            "ce_u_propagated": config.weight_ce * share * propagated,
            "kl": config.weight_kl * warm,
            "der_l": config.weight_der,
            "der_u": config.weight_der * warm,
        }
        return torch.stack([weights[name] * term for name, term in terms.items()]).sum()

    def _propagated(self, output: Output, valid: Tensor) -> Tensor:
        logits = output.logits.detach() if self.config.detach_logits else output.logits
        logits, mask = without_padding(self.propagate, logits, valid)
        return self.propagate(logits, output.feats, mask=mask)


def without_padding(
    propagate: DerivativeLabelPropagation, logits: Tensor, valid: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Logits (N, C, H, W) and mask with which padding carries nothing in a propagation.

    In a sum, logits of 0 do it. A mask would too, but with one a point of the features takes the mean of the pixels
    around it and not what is predicted there, which blurs P~. Ridge and discriminant count pixels, so they need it.
    """
    if isinstance(propagate.affinity, Ridge | Discriminant):
        return logits, valid
    return torch.where(valid[:, None], logits, 0), None


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Mean over the labelled pixels of the global batch."""
    total = F.cross_entropy(logits, target, ignore_index=VOID, reduction="sum")
    return global_mean(total, (target != VOID).sum())
