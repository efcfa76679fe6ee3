"""Dataset-level IoU at the stored size, of the prediction P, the propagated P~ and their blend."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassConfusionMatrix, MulticlassJaccardIndex

from dlprop import DerivativeLabelPropagation

from .augment import to_input
from .data import VOID, SegmentationDataset
from .distributed import rank, world_size
from .model import Output
from .progress import make_bar

# P, P~, and P_bar of Eq. 5 half-way, (P + P~) / 2.
OUTPUTS = ("prediction", "propagated", "blend")
Adjust = Callable[[Tensor], Tensor]


@torch.no_grad()
def outputs(
    network: nn.Module, image: Tensor, *, mode: str = "original", window: int = 0
) -> Iterator[tuple[slice, slice, Output]]:
    """Rows, columns and the network's output of each window of a uint8 image (3, H, W); see `probabilities`.

    Rows and columns of a centre crop are its own, as nothing lies around it.
    """
    x = to_input(image)[None].to(next(network.parameters()).device)
    if mode == "center_crop":
        x = x[..., _middle(x.shape[2], window), _middle(x.shape[3], window)]
    height, width = x.shape[-2:]
    edge = window if mode == "sliding_window" else max(height, width)
    for rows, columns in product(_windows(height, edge), _windows(width, edge)):
        yield rows, columns, network(x[..., rows, columns])


@torch.no_grad()
def probabilities(
    network: nn.Module,
    propagate: DerivativeLabelPropagation,
    image: Tensor,
    *,
    adjust: Adjust | None = None,
    mode: str = "original",
    window: int = 0,
) -> dict[str, Tensor]:
    """Class probabilities (C, H, W) of every entry of `OUTPUTS` for one uint8 image (3, H, W).

    Args:
        network: gives `Output`; used in the mode that it is in.
        propagate: makes P~ from logits and features.
        image: at the working size.
        adjust: what the logits (1, C, h, w) undergo before propagation, if anything; their softmax is then given as
            "adjusted", and stands for P in the blend.
        mode: "original": the whole image at once. "sliding_window": square windows that overlap by a third at least,
            averaged. "center_crop": the middle window only, (C, h, w).
        window: edge of the windows, in pixels of `image`.
    """
    sums: dict[str, Tensor] = {}
    count = torch.zeros(image.shape[1:])
    for rows, columns, output in outputs(network, image, mode=mode, window=window):
        found = _probabilities(propagate, output, adjust)
        if mode != "sliding_window":
            return found
        for name, values in found.items():
            if name not in sums:
                sums[name] = values.new_zeros(len(values), *image.shape[1:])
            sums[name][:, rows, columns] += values
        count[rows, columns] += 1
    return {name: values / count.to(values) for name, values in sums.items()}


def _probabilities(propagate: DerivativeLabelPropagation, output: Output, adjust: Adjust | None) -> dict[str, Tensor]:
    found = {"prediction": output.logits.softmax(1)[0]}
    logits, start = output.logits, found["prediction"]
    if adjust is not None:
        logits = adjust(logits)
        start = found["adjusted"] = logits.softmax(1)[0]
    found["propagated"] = propagate(logits, output.feats).softmax(1)[0]
    return found | {"blend": (start + found["propagated"]) / 2}


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


def labels_at(scores: Tensor, size: Sequence[int]) -> Tensor:
    """Class ids (H, W) of scores (1, C, h, w) resized to `size`."""
    resized = F.interpolate(scores, tuple(size), mode="bilinear", align_corners=True)[0]
    return resized.max(0).indices  # four times faster than `argmax` over a dimension that is not the last


def predict(
    network: nn.Module,
    propagate: DerivativeLabelPropagation,
    image: Tensor,
    size: Sequence[int],
    *,
    adjust: Adjust | None = None,
    mode: str = "original",
    window: int = 0,
) -> dict[str, Tensor]:
    """Class ids (H, W) of every entry of `OUTPUTS`, resized from `probabilities` to `size`."""
    return {
        name: labels_at(values[None], size)
        for name, values in probabilities(network, propagate, image, adjust=adjust, mode=mode, window=window).items()
    }


def evaluate(
    networks: Mapping[str, nn.Module],
    propagate: DerivativeLabelPropagation,
    data: SegmentationDataset,
    class_names: Sequence[str],
    *,
    adjust: Adjust | None = None,
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
        adjust: see `probabilities`.
        mode: see `probabilities`.
        window: see `probabilities`.
        progress: show progress.

    Returns:
        For each network, for each of `OUTPUTS` and, with `adjust`, for "adjusted": {"miou", "accuracy", "iou": {class
        name: IoU or None}}.
    """
    scores: dict[str, dict[str, MetricCollection]] = {}
    for name, network in networks.items():
        network.eval()
        device = next(network.parameters()).device
        keys = OUTPUTS if adjust is None else (*OUTPUTS, "adjusted")
        scores[name] = {key: make_metric(len(class_names)).to(device) for key in keys}
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
                    network, propagate, sample["image"], target.shape, adjust=adjust, mode=mode, window=window
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
    confusion = values["confusion"].view(len(class_names), -1)  # a number for one class
    seen = (confusion.sum(0) + confusion.sum(1)) > 0
    iou = {
        name: value if present else None
        for name, value, present in zip(class_names, values["iou"].tolist(), seen.tolist(), strict=True)
    }
    accuracy = confusion.diagonal().sum() / confusion.sum().clamp(min=1)
    return {"miou": values["miou"].item(), "accuracy": accuracy.item(), "iou": iou}


# --- for comparisons image by image ----------------------------------------------------------------------------------


def confusion(labels: Tensor, truth: Tensor, num_classes: int) -> np.ndarray:
    """(C, C) pixel counts, rows the truth, of two (H, W) of ids; void of the truth is left out."""
    known = truth != VOID
    pairs = num_classes * truth[known].long() + labels[known]
    return torch.bincount(pairs.cpu(), minlength=num_classes**2).view(num_classes, num_classes).numpy()


def mean_iou(confusions: np.ndarray) -> np.ndarray:
    """(...) mIoU in percent of (..., C, C); as `make_metric` has it."""
    inside = np.diagonal(confusions, axis1=-2, axis2=-1)
    union = confusions.sum(-1) + confusions.sum(-2) - inside
    iou = np.where(union > 0, inside / np.maximum(union, 1), 0.0)
    return 100 * iou.sum(-1) / np.maximum((union > 0).sum(-1), 1)


def gain(confusions: np.ndarray, control: np.ndarray) -> tuple[float, float]:
    """The difference in mIoU to a control on the same images, and its standard error over images by the jackknife.

    Args:
        confusions: (images, C, C).
        control: likewise.
    """

    def without(x: np.ndarray) -> np.ndarray:
        return mean_iou(x.sum(0) - x)

    error = jackknife_error(without(confusions) - without(control))
    return float(mean_iou(confusions.sum(0)) - mean_iou(control.sum(0))), float(error)


def jackknife_error(left: np.ndarray) -> np.ndarray:
    """Standard error of a figure, of its values (n, ...) with one of n images left out each."""
    return np.sqrt((len(left) - 1) / len(left) * np.square(left - left.mean(0)).sum(0))
