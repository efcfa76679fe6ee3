"""Dataset-level IoU at the stored size, of the prediction P, the propagated P~ and their blend."""

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassConfusionMatrix, MulticlassJaccardIndex

from dlprop import DerivativeLabelPropagation

from .augment import to_input
from .data import VOID, SegmentationDataset
from .distributed import rank, world_size
from .progress import make_bar

# P, P~, and P_bar of Eq. 5 half-way, (P + P~) / 2.
OUTPUTS = ("prediction", "propagated", "blend")


@torch.no_grad()
def probabilities(
    network: nn.Module,
    propagate: DerivativeLabelPropagation,
    image: Tensor,
    *,
    mode: str = "original",
    window: int = 0,
) -> dict[str, Tensor]:
    """Class probabilities (C, H, W) of every entry of `OUTPUTS` for one uint8 image (3, H, W).

    Args:
        network: gives `Output`; used in the mode that it is in.
        propagate: makes P~ from logits and features.
        image: at the working size.
        mode: "original": the whole image at once. "sliding_window": square windows that overlap by a third at least,
            averaged. "center_crop": the middle window only, (C, h, w).
        window: edge of the windows, in pixels of `image`.
    """
    device = next(network.parameters()).device
    x = to_input(image)[None].to(device)
    height, width = x.shape[-2:]
    if mode == "center_crop":
        x = x[..., _middle(height, window), _middle(width, window)]
    if mode != "sliding_window":
        return _outputs(network, propagate, x)
    sums: dict[str, Tensor] = {}
    count = x.new_zeros(height, width)
    for rows, columns in product(_windows(height, window), _windows(width, window)):
        for name, values in _outputs(network, propagate, x[..., rows, columns]).items():
            if name not in sums:
                sums[name] = values.new_zeros(len(values), height, width)
            sums[name][:, rows, columns] += values
        count[rows, columns] += 1
    return {name: values / count for name, values in sums.items()}


def _outputs(network: nn.Module, propagate: DerivativeLabelPropagation, x: Tensor) -> dict[str, Tensor]:
    output = network(x)
    prediction = output.logits.softmax(1)[0]
    propagated = propagate(output.logits, output.feats).softmax(1)[0]
    return {"prediction": prediction, "propagated": propagated, "blend": (prediction + propagated) / 2}


def _middle(size: int, window: int) -> slice:
    start = max(0, (size - window) // 2)
    return slice(start, min(size, start + window))


def _windows(size: int, window: int) -> list[slice]:
    """Evenly spaced windows that cover `size` with steps of at most two thirds of a window."""
    if size <= window:
        return [slice(0, size)]
    count = 1 + -(-(size - window) // max(1, 2 * window // 3))
    starts = [round(index * (size - window) / (count - 1)) for index in range(count)]
    return [slice(start, start + window) for start in starts]


def predict(
    network: nn.Module,
    propagate: DerivativeLabelPropagation,
    image: Tensor,
    size: Sequence[int],
    *,
    mode: str = "original",
    window: int = 0,
) -> dict[str, Tensor]:
    """Class ids (H, W) of every entry of `OUTPUTS`, resized from `probabilities` to `size`."""
    # `max` is four times faster than `argmax` over a dimension that is not the last.
    return {
        name: F.interpolate(values[None], tuple(size), mode="bilinear", align_corners=True)[0].max(0).indices
        for name, values in probabilities(network, propagate, image, mode=mode, window=window).items()
    }


def evaluate(
    networks: Mapping[str, nn.Module],
    propagate: DerivativeLabelPropagation,
    data: SegmentationDataset,
    class_names: Sequence[str],
    *,
    mode: str = "original",
    window: int = 0,
    progress: bool = True,
) -> dict[str, dict[str, Any]]:
    """Scores every network on every image; processes share the images, and all get the scores of all.

    Args:
        networks: name -> network; left in evaluation mode.
        propagate: makes P~ from a network's logits and features.
        data: labelled samples with masks at their stored size.
        class_names: in id order.
        mode: see `probabilities`.
        window: see `probabilities`.
        progress: show progress.

    Returns:
        For each network, for each of `OUTPUTS`: {"miou", "accuracy", "iou": {class name: IoU or None}}.
    """
    scores: dict[str, dict[str, MetricCollection]] = {}
    for name, network in networks.items():
        network.eval()
        device = next(network.parameters()).device
        scores[name] = {key: make_metric(len(class_names)).to(device) for key in OUTPUTS}
    indices = range(rank(), len(data), world_size())
    with make_bar(len(indices), "evaluate", progress=progress) as bar:
        for index in indices:
            sample = data[index]
            target = sample["mask"].as_subclass(Tensor).long()
            if mode == "center_crop":
                # The crop's share of the image, cut from the mask at its stored size.
                edges = [
                    round(min(1, window / worked) * stored)
                    for worked, stored in zip(sample["image"].shape[-2:], target.shape, strict=True)
                ]
                target = target[_middle(target.shape[0], edges[0]), _middle(target.shape[1], edges[1])]
            for name, network in networks.items():
                for key, labels in predict(
                    network, propagate, sample["image"], target.shape, mode=mode, window=window
                ).items():
                    scores[name][key].update(labels[None], target[None].to(labels.device))
            bar.update()
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
    confusion = values["confusion"]
    seen = (confusion.sum(0) + confusion.sum(1)) > 0
    iou = {
        name: value if present else None
        for name, value, present in zip(class_names, values["iou"].tolist(), seen.tolist(), strict=True)
    }
    accuracy = confusion.diagonal().sum() / confusion.sum().clamp(min=1)
    return {"miou": values["miou"].item(), "accuracy": accuracy.item(), "iou": iou}
