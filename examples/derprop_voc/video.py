"""`video`: the labels of one frame of a clip, or of a few, carried to all others by attention over a memory of frames.

Without a network every pixel of a new frame averages the labels of the memory's pixels most like it, in features and
place. The memory holds the given frames, which stay, and on request some that were predicted. With a network what it
gets wrong in the given frames is carried instead, and added to what it says. `clips` measures what that is worth.
"""

import argparse
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dlprop import DerivativeLabelPropagation
from dlprop.affinity import Softmax

from .choice import add_machine_arguments
from .data import VOID, check_image, check_mask, read_image, read_list, read_mask
from .errors import ConfigError, DataError
from .evaluate import make_metric, summarise
from .files import write_json
from .image_features import add_features_arguments, make_describe, mask_of
from .panels import class_colours
from .predict_folder import (
    add_alpha_argument,
    check_stems,
    checked_alpha,
    draw_legend,
    list_images,
    root_of,
    write_pictures,
)
from .progress import make_bar
from .sources import Item

Labels = Literal["confident", "hard", "soft"]
# Features (1, D, h, w) of a frame, and logits (1, C, h', w') of a network or None.
Described = tuple[Tensor, Tensor | None]
FRAMES = (1, 10, 25, 50, 100)  # after the given one, at which scores over time are printed


@dataclass(frozen=True, kw_only=True)
class Carrying:
    """How labels are carried; the defaults follow what `clips` finds on a training clip of CamVid.

    Args:
        sharpness: `1 / sigma^2` of the Gaussian on features of unit length.
        position: how much the place counts: two pixels the image's height apart are as different as features whose
            difference has this length.
        radius: of a window on the grid of the features in place of `position`, each frame of the memory for itself
            and then averaged; 0: no window.
        last: predicted frames in the memory; without a network.
        every: of how many predicted frames one is remembered.
        labels: what a predicted frame gives: "soft" its probabilities; "hard" their largest as one-hot; "confident"
            the same, where the probability is at least `threshold`.
        threshold: see `labels`.
        doubt: a pixel of a predicted frame counts `exp(-doubt)` times as much as one of a given frame.
        steps: with a network, how often what it still gets wrong in the given frames is carried.
    """

    sharpness: float = 100.0
    position: float = 0.3
    radius: int = 0
    last: int = 0
    every: int = 1
    labels: Labels = "hard"
    threshold: float = 0.8
    doubt: float = 2.0
    steps: int = 10

    def __post_init__(self) -> None:
        for name in ("position", "radius", "last", "threshold", "doubt"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name}: expected a number of at least 0, got {getattr(self, name)}")
        for name in ("every", "steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not 0 < self.sharpness < math.inf:
            raise ConfigError(f"sharpness: expected a number above 0, got {self.sharpness}")
        if self.radius and self.doubt != type(self).doubt:
            raise ConfigError("doubt: in a window every frame is averaged by itself; leave out doubt or radius")

    @property
    def affinity(self) -> Softmax:
        """Attention over the memory."""
        return Softmax(
            over="sources",
            similarity="gaussian",
            normalize=None,
            weights=(self.sharpness,),
            radius=self.radius or None,
        )


class Memory:
    """Labelled frames: the given ones, which stay, and the last that were predicted.

    Cost: a frame with k frames in the memory takes O(k M^2 (D + C)) time for M grid points of D features, and
    O(k M (D + C)) memory.
    """

    def __init__(self, carrying: Carrying) -> None:
        self.carrying, self.propagate = carrying, DerivativeLabelPropagation(carrying.affinity)
        self.given: list[tuple[Tensor, Tensor, Tensor]] = []
        self.last: deque[tuple[Tensor, Tensor, Tensor]] = deque(maxlen=carrying.last)

    def give(self, feats: Tensor, truth: Tensor, num_classes: int) -> None:
        """A frame's labels (H, W), `VOID` where there is none; a grid point that is half void is no source."""
        one_hot = F.one_hot(torch.where(truth == VOID, num_classes, truth).long(), num_classes + 1)
        shares = F.adaptive_avg_pool2d(one_hot.permute(2, 0, 1)[None, :-1].float(), feats.shape[-2:])
        known = shares.sum(1)
        if not (known >= 0.5).any():
            raise DataError(
                f"given: expected a frame with labels on half of some cell of {truth.shape[0] // known.shape[1]} x "
                f"{truth.shape[1] // known.shape[2]} pixels, found none; clicks are for the command complete"
            )
        self.given.append((self._placed(feats, doubt=0.0), shares / known.clamp(min=1e-6)[:, None], known >= 0.5))

    def remember(self, feats: Tensor, probabilities: Tensor) -> None:
        """A predicted frame (1, C, H, W)."""
        labels = F.adaptive_avg_pool2d(probabilities, feats.shape[-2:])
        is_source = torch.ones_like(labels[:, 0], dtype=torch.bool)
        if self.carrying.labels != "soft":
            confidence, ids = labels.max(1)
            labels = F.one_hot(ids, labels.shape[1]).permute(0, 3, 1, 2).to(labels)
            if self.carrying.labels == "confident":
                is_source = confidence >= self.carrying.threshold
        self.last.append((self._placed(feats, doubt=self.carrying.doubt), labels, is_source))

    def correct(self, logits: Sequence[Tensor]) -> None:
        """What a network's logits (1, C, h', w') on the given frames lack of the labels takes the labels' place.

        In each step the logits are corrected by the errors that are left; the sum of the errors is what is carried to
        other frames, since attention is linear in it.
        """
        placed, labels, known = zip(*self.given, strict=True)
        current = [F.adaptive_avg_pool2d(L, truth.shape[-2:]) for L, truth in zip(logits, labels, strict=True)]
        total = [torch.zeros_like(truth) for truth in labels]
        for _ in range(self.carrying.steps):
            errors = [truth - L.softmax(1) for truth, L in zip(labels, current, strict=True)]
            total = [x + error for x, error in zip(total, errors, strict=True)]
            step = list(zip(placed, errors, known, strict=True))
            current = [L + self._average(step, targets) for L, targets in zip(current, placed, strict=True)]
        self.given = list(zip(placed, total, known, strict=True))

    def recall(self, feats: Tensor) -> Tensor:
        """The averages (1, C, h, w) for a new frame: of labels or, after `correct`, of what is to be added."""
        return self._average([*self.given, *self.last], self._placed(feats, doubt=0.0))

    def _average(self, frames: Sequence[tuple[Tensor, Tensor, Tensor]], targets: Tensor) -> Tensor:
        sources, values, is_source = (torch.cat(parts) for parts in zip(*frames, strict=True))
        if self.carrying.radius:
            return self.propagate(values, sources, targets.expand_as(sources), mask=is_source).mean(0, keepdim=True)
        # All pixels of all frames are the sources of one softmax.
        flat = (x.transpose(0, 1).flatten(1)[None] for x in (values, sources))
        return self.propagate(*flat, targets.flatten(2), mask=is_source.flatten()[None]).unflatten(
            2, targets.shape[-2:]
        )

    def _placed(self, feats: Tensor, *, doubt: float) -> Tensor:
        """Unit features with the place as two more channels, and the doubt as a distance to all targets as a third."""
        h, w = feats.shape[-2:]
        y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        distance = torch.full((h, w), (2 * doubt / self.carrying.sharpness) ** 0.5)
        scale = 0.0 if self.carrying.radius else self.carrying.position / h
        more = torch.stack((scale * y, scale * x, distance))[None].to(feats.device)
        return torch.cat((F.normalize(feats.float()), more), 1)


def carry(
    describe: Callable[[int], Described],
    count: int,
    given: Mapping[int, Tensor],
    num_classes: int,
    carrying: Carrying,
) -> Iterator[tuple[int, Tensor]]:
    """Carries labels forward from the first given frame, then backward from it; yields a frame's number and ids (H, W).

    Args:
        describe: a frame's number -> its features and, with a network, logits. Called once for each frame.
        count: of frames.
        given: a frame's number -> its labels (H, W), `VOID` where there is none.
        num_classes: C.
        carrying: the settings.
    """
    memory, of_given = Memory(carrying), []
    for number, truth in given.items():
        feats, logits = describe(number)
        memory.give(feats, truth, num_classes)
        of_given += [] if logits is None else [logits]
    if of_given:
        memory.correct(of_given)
    start, size = min(given), tuple(next(iter(given.values())).shape)
    for numbers in (range(start, count), reversed(range(start))):
        memory.last.clear()
        unknown = (number for number in numbers if number not in given)
        for step, number in enumerate(unknown):
            feats, logits = describe(number)
            out = F.interpolate(memory.recall(feats), size, mode="bilinear")
            if logits is not None:
                out = out + F.interpolate(logits, size, mode="bilinear", align_corners=True)
            elif step % carrying.every == carrying.every - 1:
                memory.remember(feats, out / out.sum(1, keepdim=True).clamp(min=1e-6))
            yield number, out[0].max(0).indices


# ---------------------------------------------------------------------------------------------------------------------
# The command


def add_video_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `video`."""
    parser.add_argument(
        "--frames", type=Path, required=True, metavar="PATH",
        help="folder of images in the order of their names, or a list file of a data set in VOC layout",
    )  # fmt: skip
    parser.add_argument(
        "--masks", type=Path, metavar="FOLDER",
        help=f"<stem>.png or <stem>_mask.png with class ids ({VOID}: none) of the given frames; of others they are "
        "used for scores only (default: the list's own)",
    )  # fmt: skip
    parser.add_argument("--given", nargs="+", metavar="NAME", help="frames whose mask is used (default: the first)")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="for masks, overlays and scores")
    add_features_arguments(parser)
    add_carrying_arguments(parser)
    add_alpha_argument(parser)
    add_machine_arguments(parser)


def add_carrying_arguments(parser: argparse.ArgumentParser) -> None:
    """A flag for each option of `Carrying`."""
    helps = {
        "sharpness": "of the attention",
        "position": "weight of the place",
        "radius": "of a window in place of it",
        "last": "predicted frames in the memory, without --run",
        "every": "of how many predicted frames one is remembered",
        "labels": "what these give",
        "threshold": "of confident labels",
        "doubt": "a predicted frame counts exp(-doubt) times as much as a given one",
        "steps": "with --run, of its errors",
    }
    for item in fields(Carrying):
        choices = get_args(Labels) if item.name == "labels" else None
        parser.add_argument(
            f"--{item.name}",
            type=type(item.default),
            default=item.default,
            choices=choices,
            help=f"{helps[item.name]} (%(default)s)",
        )


@torch.no_grad()
def video_command(arguments: argparse.Namespace) -> None:
    """Carries the labels through a clip, and says what was written and, where there is truth, how good it is."""
    alpha = checked_alpha(arguments.alpha)
    carrying = Carrying(**{item.name: getattr(arguments, item.name) for item in fields(Carrying)})
    if arguments.run is not None and carrying.last:
        raise ConfigError("last: predicted frames are remembered without a network only; leave out last or run")
    items = find_frames(arguments.frames, arguments.masks)
    if arguments.out.resolve() in {path.resolve() for item in items for path in (item.image.parent, item.mask.parent)}:
        raise ConfigError(f"out: expected another folder than those of images and masks, got {arguments.out}")
    numbers = {item.name: number for number, item in enumerate(items)}
    chosen = arguments.given or [items[0].name]
    unknown = [name for name in chosen if name not in numbers]
    if unknown:
        raise ConfigError(f"given: expected names of frames, such as {items[0].name}, got {unknown[0]}")
    way_out = "" if arguments.given else "; frames go by their names, --given says which are labelled"
    highest = max(check_mask(items[numbers[name]], VOID, way_out) for name in chosen)
    if highest < 0:
        raise DataError(f"{items[numbers[chosen[0]]].mask}: expected labelled pixels, found only void ({VOID})")
    if highest == 0:
        print(
            f"note: the given masks hold class 0 alone, so that is all there is to carry; {VOID} is no class but void"
        )
    # Masks that are for scores alone are looked at now, not after all frames.
    with_truth = {number: check_mask(item, VOID) for number, item in enumerate(items) if item.mask.is_file()}
    with_truth = {number: label for number, label in with_truth.items() if label >= 0}  # not void alone
    highest = max(with_truth.values())
    names, device, describe = make_describe(arguments, highest, arguments.masks or arguments.frames, of_backbone=True)
    given = {numbers[name]: torch.from_numpy(read_mask(items[numbers[name]])).to(device) for name in chosen}
    colours = np.full((VOID + 1, 3), 255, np.uint8)  # void is white; a shorter palette would make PNG cut its id
    colours[: len(names)] = np.round(255 * class_colours(names))
    predicted: dict[int, Tensor] = {}
    draw_legend(arguments.out / "legend.png", names)
    start = time.perf_counter()

    def write(number: int, labels: Tensor) -> None:
        item = items[number]
        write_pictures(arguments.out, item.name, read_image(item.image), labels, colours, alpha)

    for number, labels in given.items():
        write(number, labels)
    with make_bar(len(items) - len(given), "video", progress=True) as bar:
        for number, labels in carry(
            lambda number: describe(items[number].image), len(items), given, len(names), carrying
        ):
            write(number, labels)
            if number in with_truth:
                predicted[number] = labels.to("cpu", torch.uint8)
            bar.update()
    seconds = (time.perf_counter() - start) / max(1, len(items) - len(given))
    print(f"{len(items)} frames, {seconds:.2f} s each: masks, overlays and legend.png are in {arguments.out}")
    if not predicted:
        (arguments.out / "scores.json").unlink(missing_ok=True)  # of an earlier call
    else:
        scores = score_clip(predicted, items, names)
        named = {items[int(number)].name: miou for number, miou in scores["frames"].items()}
        write_json(arguments.out / "scores.json", scores | {"frames": named})
        start_at = min(given)
        at = ", ".join(f"{100 * scores['frames'][str(start_at + n)]:.1f} at frame {n}" for n in FRAMES
                       if str(start_at + n) in scores["frames"])  # fmt: skip
        print(f"mIoU {100 * scores['miou']:.1f} over {len(predicted)} frames{'; ' if at else ''}{at}")


def find_frames(place: Path, masks: Path | None) -> list[Item]:
    """The frames of a folder or a list, all of one size.

    Raises:
        DataError: for what is missing, and for frames of several sizes.
    """
    if place.is_dir():
        if masks is None:
            raise ConfigError("masks: expected the folder of the given frames' masks, got none")
        items = [Item(path.stem, path, mask_of(masks, path.stem)) for path in list_images(place)]
    else:
        if not place.is_file():
            raise ConfigError(f"frames: expected a folder of images, or a list of them, found no {place}")
        items = read_list(place, root_of(place) or place.parent)
        if masks is not None:
            items = [Item(item.name, item.image, mask_of(masks, item.name)) for item in items]
    check_stems(item.image for item in items)
    size = check_image(items[0].image)
    for item in items:
        found = check_image(item.image)
        if found != size:
            raise DataError(
                f"{item.image}: expected frames of one size, {'x'.join(map(str, size))}, found "
                f"{'x'.join(map(str, found))} (width x height)"
            )
    return items


def score_clip(predicted: Mapping[int, Tensor], items: Sequence[Item], names: Sequence[str]) -> dict[str, Any]:
    """MIoU over all predicted frames, IoU of each class, and by its number the mIoU of each frame with some truth."""
    whole, frames = make_metric(len(names)), {}
    for number, labels in sorted(predicted.items()):
        check_mask(items[number], len(names))
        truth = torch.from_numpy(read_mask(items[number])).long()[None]
        one = make_metric(len(names))
        for metric in (whole, one):
            metric.update(labels[None].long().cpu(), truth)
        if (truth != VOID).any():
            frames[str(number)] = one.compute()["miou"].item()
    return summarise(whole, names) | {"frames": frames}
