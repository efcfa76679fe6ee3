"""Dataset-level IoU at the stored size, of the prediction P and of the propagated P~."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassConfusionMatrix, MulticlassJaccardIndex
from tqdm import tqdm

from dlprop import DerivativeLabelPropagation

from .augment import to_input
from .data import VOID, SegmentationDataset

EVAL_MODE = "original"  # whole images; scores at the masks' stored size


@torch.no_grad()
def predict(
    network: nn.Module, propagate: DerivativeLabelPropagation, image: Tensor, size: Sequence[int]
) -> dict[str, Tensor]:
    """Class ids of P ("prediction") and P~ ("propagated") for one uint8 image, each (H, W) of `size`.

    `network` is used in the mode that it is in.
    """
    device = next(network.parameters()).device
    output = network(to_input(image)[None].to(device))
    both = {"prediction": output.logits, "propagated": propagate(output.logits, output.feats)}
    return {
        name: F.interpolate(logits, tuple(size), mode="bilinear", align_corners=True)[0].argmax(0)
        for name, logits in both.items()
    }


def evaluate(
    networks: Mapping[str, nn.Module],
    propagate: DerivativeLabelPropagation,
    data: SegmentationDataset,
    class_names: Sequence[str],
    *,
    progress: bool = True,
) -> dict[str, dict[str, Any]]:
    """Scores every network on every image.

    Args:
        networks: name -> network; left in evaluation mode.
        propagate: makes P~ from a network's logits and features.
        data: labelled samples with masks at their stored size.
        class_names: in id order.
        progress: show a progress bar, on terminals.

    Returns:
        For each network, for "prediction" and "propagated": {"miou", "iou": {class name: IoU or None}}.
    """
    scores: dict[str, dict[str, MetricCollection]] = {}
    for name, network in networks.items():
        network.eval()
        device = next(network.parameters()).device
        scores[name] = {key: make_metric(len(class_names)).to(device) for key in ("prediction", "propagated")}
    for index in tqdm(range(len(data)), desc="evaluate", disable=None if progress else True, leave=False):
        sample = data[index]
        target = sample["mask"].as_subclass(Tensor).long()[None]
        for name, network in networks.items():
            for key, labels in predict(network, propagate, sample["image"], target.shape[-2:]).items():
                scores[name][key].update(labels[None], target.to(labels.device))
    return {
        name: {key: summarise(metric, class_names) for key, metric in both.items()} for name, both in scores.items()
    }


def make_metric(num_classes: int) -> MetricCollection:
    """One confusion matrix over the data set, read as mean IoU and as IoU of each class.

    torchmetrics' "macro" leaves out classes that neither truth nor prediction contains, and counts a class that is
    predicted but nowhere true as 0.
    """
    options: dict[str, Any] = {"num_classes": num_classes, "ignore_index": VOID, "validate_args": False}
    return MetricCollection(
        {
            "miou": MulticlassJaccardIndex(average="macro", **options),
            "iou": MulticlassJaccardIndex(average="none", **options),
            "confusion": MulticlassConfusionMatrix(**options),
        },
        compute_groups=[["miou", "iou", "confusion"]],
    )


def summarise(metric: MetricCollection, class_names: Sequence[str]) -> dict[str, Any]:
    """Plain values of `make_metric`'s result; IoU is None for a class in neither truth nor prediction."""
    values = metric.compute()
    seen = (values["confusion"].sum(0) + values["confusion"].sum(1)) > 0
    iou = {
        name: value if present else None
        for name, value, present in zip(class_names, values["iou"].tolist(), seen.tolist(), strict=True)
    }
    return {"miou": values["miou"].item(), "iou": iou}
