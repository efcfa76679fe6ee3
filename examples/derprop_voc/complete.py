"""`complete`: sparse labels of an image, such as clicks or strokes, made dense.

With a network each step asks what it gets wrong at the labelled pixels and gives every pixel the average of these
errors over the labelled pixels most like it, in features and place. Where the network is right nothing changes, so one
click cannot spoil what it knows, and many are heard. Without one a discriminant is fitted to the labelled pixels.
"""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dlprop import DerivativeLabelPropagation
from dlprop.affinity import Discriminant, Softmax

from .choice import add_machine_arguments
from .data import VOID, check_mask, read_image, read_mask
from .errors import ConfigError, DataError
from .evaluate import labels_at
from .image_features import add_features_arguments, make_describe, mask_of
from .panels import class_colours
from .predict_folder import add_alpha_argument, checked_alpha, draw_legend, list_images, write_pictures
from .progress import make_bar
from .sources import Item

# Softmaxes of one-hot labels times this, or less this, are 1 and 0.
CERTAIN = 30.0


class Clicks:
    """The labelled pixels of labels (H, W) of integers, `VOID` where there is none.

    Attributes:
        size: H and W.
        places: (k, 2), x and y of the labelled pixels, in [0, 1] from the first pixel to the last.
        classes: (k,) int64.
    """

    def __init__(self, labels: Tensor) -> None:
        rows, columns = (labels != VOID).nonzero(as_tuple=True)
        H, W = self.size = labels.shape
        self.places = torch.stack((columns / max(1, W - 1), rows / max(1, H - 1)), 1)
        self.classes = labels[rows, columns].long()

    def one_hot(self, num_classes: int) -> Tensor:
        """The classes as (1, C, k)."""
        return F.one_hot(self.classes, num_classes).T[None].float()

    def sample(self, x: Tensor) -> Tensor:
        """What a map (1, K, h, w) whose corners are the image's holds at the labelled pixels, (1, K, k)."""
        return F.grid_sample(x, 2 * self.places[None, None].to(x) - 1, align_corners=True)[:, :, 0]


def only_labelled(logits: Tensor, clicks: Clicks) -> Tensor:
    """Logits (1, C, h, w) that rule out the classes that no pixel is labelled with."""
    absent = torch.ones(logits.shape[1], dtype=torch.bool, device=logits.device)
    absent[clicks.classes] = False
    return logits.masked_fill(absent[:, None, None], -1e4)  # finite, as it will be interpolated


def classify(feats: Tensor, labels: Tensor, num_classes: int, shrinkage: float = 1.0) -> Tensor:
    """Logits (1, C, h, w) of features (1, D, h, w) by a discriminant of the labelled pixels of (H, W) alone.

    The shrinkage was chosen on CamVid's training images, see `clicks`. Cost: as `Discriminant`.
    """
    clicks = Clicks(labels)
    propagate = DerivativeLabelPropagation(Discriminant(shrinkage=shrinkage))
    logits = propagate(CERTAIN * clicks.one_hot(num_classes), clicks.sample(feats), feats.flatten(2))
    return logits.unflatten(2, feats.shape[-2:])


@dataclass(frozen=True, kw_only=True)
class Completion:
    """Attention over labelled pixels; the defaults were chosen on CamVid's training images, see `clicks`.

    Args:
        sharpness: `1 / sigma^2` of the Gaussian on features of unit length.
        position: how much the place counts: two pixels the image's height apart are as different as features whose
            difference has this length.
        steps: how often the errors are carried.
    """

    sharpness: float = 20.0
    position: float = 0.5
    steps: int = 3

    def __call__(self, feats: Tensor, labels: Tensor, logits: Tensor) -> Tensor:
        """Logits (1, C, h, w) of the completed map on the grid of the features.

        Args:
            feats: (1, D, h, w), on a grid whose corners are the image's.
            labels: (H, W) integers, `VOID` where there is none; at least one label.
            logits: (1, C, h', w') of a network, resized to the features; zeros for none.

        Cost: (h w + steps * labelled pixels) * labelled pixels * (D + C).
        """
        grid, clicks = feats.shape[-2:], Clicks(labels)
        truth = clicks.one_hot(logits.shape[1]).to(feats)
        H, W = clicks.size
        scale = self.position * torch.tensor([[W / H], [1.0]]).to(feats)
        y, x = torch.meshgrid(*(torch.linspace(0, 1, edge) for edge in grid), indexing="ij")
        targets = torch.cat(
            (F.normalize(feats).flatten(2), (scale * torch.stack((x, y)).flatten(1).to(feats))[None]), 1
        )
        sources = torch.cat((F.normalize(clicks.sample(feats)), (scale * clicks.places.T.to(feats))[None]), 1)

        affinity = Softmax(over="sources", similarity="gaussian", normalize=None, weights=(self.sharpness,))
        propagate = DerivativeLabelPropagation(affinity)
        start = F.interpolate(logits, grid, mode="bilinear", align_corners=True)
        at_clicks, total = clicks.sample(start), torch.zeros_like(truth)
        for _ in range(self.steps):  # among the clicks; attention is linear in what it carries
            errors = truth - at_clicks.softmax(1)
            total = total + errors
            at_clicks = at_clicks + propagate(errors, sources)
        return start + propagate(total, sources, targets).unflatten(2, grid)


def dense_labels(completed: Tensor, labels: Tensor) -> Tensor:
    """Ids (H, W) of completed logits (1, C, h, w), with the given labels where there are some."""
    return torch.where(labels == VOID, labels_at(completed, labels.shape), labels.long())


def add_complete_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `complete`."""
    parser.add_argument("--images", type=Path, required=True, metavar="FOLDER", help="its jpg, jpeg and png files")
    parser.add_argument(
        "--labels", type=Path, required=True, metavar="FOLDER",
        help=f"<stem>.png or <stem>_mask.png for each image: class ids on the labelled pixels, {VOID} elsewhere",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="for masks and overlays")
    add_features_arguments(parser)
    parser.add_argument(
        "--only-labelled", action="store_true",
        help="with --run: an image holds no other classes than those labelled in it",
    )  # fmt: skip
    for name, text in (("sharpness", "of the attention"), ("position", "weight of the place"), ("steps", "of errors")):
        default = getattr(Completion, name)
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"with --run, {text} (%(default)s)")
    add_alpha_argument(parser)
    add_machine_arguments(parser)


@torch.no_grad()
def complete_command(arguments: argparse.Namespace) -> None:
    """Completes a folder and says what was written."""
    alpha = checked_alpha(arguments.alpha)
    if not (0 < arguments.sharpness < math.inf and 0 <= arguments.position < math.inf and arguments.steps >= 1):
        raise ConfigError("sharpness, position, steps: expected numbers above 0, at least 0 and at least 1")
    if arguments.only_labelled and arguments.run is None:
        raise ConfigError("only_labelled: without a run there are no other classes than those labelled; leave it out")
    images = list_images(arguments.images)
    if arguments.out.resolve() in (arguments.images.resolve(), arguments.labels.resolve()):
        raise ConfigError(f"out: expected another folder than those of images and labels, got {arguments.out}")
    items, labelled = zip(*(check_sparse(path, mask_of(arguments.labels, path.stem)) for path in images), strict=True)
    names, device, describe = make_describe(arguments, max(labelled), arguments.labels)
    completion = Completion(sharpness=arguments.sharpness, position=arguments.position, steps=arguments.steps)
    colours = np.round(255 * class_colours(names)).astype(np.uint8)
    with make_bar(len(items), "complete", progress=True) as bar:
        for item in items:
            labels = torch.from_numpy(read_mask(item)).to(device)
            feats, logits = describe(item.image)
            if logits is None:
                completed = classify(feats, labels, len(names))
            else:
                start = only_labelled(logits, Clicks(labels)) if arguments.only_labelled else logits
                completed = completion(feats, labels, start)
            dense = dense_labels(completed, labels)
            write_pictures(arguments.out, item.name, read_image(item.image), dense, colours, alpha, given=labels)
            bar.update()
    draw_legend(arguments.out / "legend.png", names)
    print(f"{len(images)} images: masks, overlays and legend.png are in {arguments.out}")


def check_sparse(image: Path, mask: Path) -> tuple[Item, int]:
    """An image with its sparse labels, and the highest of these.

    Raises:
        DataError: for a missing or unreadable mask, one of another size than the image, and one without a label.
    """
    item = Item(image.stem, image, mask)
    highest = check_mask(item, VOID)
    if highest < 0:
        raise DataError(f"{mask}: expected at least one labelled pixel, found only {VOID}")
    if not (read_mask(item) == VOID).any():
        print(f"note: {mask} labels every pixel, so nothing is left to complete; unlabelled pixels are {VOID}")
    return item, highest
