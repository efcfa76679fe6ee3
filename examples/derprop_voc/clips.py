"""`clips`: what carrying a frame's labels through a clip is worth, beside copying them and beside trained networks.

Settings are chosen on a clip of the training images, in pieces whose first frame is given. Then the validation images,
one clip, are read once: the truth of its first frame is carried to all others. Nothing is drawn at random, so there are
no repetitions but over the networks.
"""

import argparse
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from scipy.ndimage import distance_transform_edt
from torch import Tensor, nn

from dlprop import DerivativeLabelPropagation
from dlprop.affinity import Discriminant

from .choice import Finished
from .click_methods import BOTH, LARGER, trained_layer
from .complete import CERTAIN
from .data import VOID, Item, check_mask, find_places, load_data, read_list, read_mask
from .errors import ConfigError
from .evaluate import labels_at, make_metric
from .files import write_bytes, write_json
from .image_features import ENLARGED, mean_logits, standardised
from .measuring import add_measuring_arguments, begin, frozen_network, images_of, run_name
from .progress import make_bar
from .sources import find_source
from .video import FRAMES, Carrying, Described, Memory, carry, score_clip

PIECE, EVERY = 10, 20  # frames of a piece of the clip that settings are chosen on, and from one piece to the next
SHARPNESS, POSITION, RADIUS, STEPS = (60.0, 100.0), (0.0, 0.15, 0.3), (6, 12), (3, 10)
MEMORIES, LAST, DOUBT = ("soft", "hard", "confident"), 3, (0.0, 2.0)
SHRINKAGE, SHARE, TRAINED, LR = (0.1, 1.0, 10.0), (0.25, 0.5, 1.0), (10, 50), (0.1, 0.3)
# Paired: the same network.
CORRECTED = "network corrected by attention, backbone"
GAINS = tuple(
    (CORRECTED, control)
    for control in ("network alone", "last layer trained on the first frame", "network plus discriminant")
) + tuple(
    (f"{CORRECTED}{BOTH}", control)
    for control in (f"network alone{BOTH}", f"last layer trained on the first frame{BOTH}", CORRECTED)
)

Kind = Literal["backbone", "decoder"]


@dataclass(frozen=True)
class Frame:
    """What the methods see of a frame.

    Attributes:
        item: where its image and its truth are.
        backbone: (1, K, h, w), the frozen backbone's features, standardised over the frame.
        decoders: of each size of the frame (1, D, h', w'), the network's features V; the last has the grid (h, w).
        logits: (1, C, h, w) of the network, the mean over the sizes.
    """

    item: Item
    backbone: Tensor
    decoders: tuple[Tensor, ...]
    logits: Tensor

    @property
    def truth(self) -> Tensor:
        """Labels (H, W)."""
        return torch.from_numpy(read_mask(self.item))

    def features(self, kind: Kind) -> Tensor:
        """Those of the backbone or of the decoder."""
        return self.backbone if kind == "backbone" else self.decoders[-1]


@dataclass(frozen=True)
class Clip:
    """Frames in order, described by one network."""

    finished: Finished
    classifier: nn.Sequential
    frames: list[Frame]

    @property
    def num_classes(self) -> int:
        """C."""
        return len(self.finished.class_names)


# The labels (H, W) of all frames but the first, by their number, from the truth of the first.
Method = Callable[[Clip], Iterator[tuple[int, Tensor]]]


def make_clip(finished: Finished, prefix: str | None) -> Clip:
    """The training images whose names start with `prefix`, or with None the validation images."""
    config = finished.config
    source = find_source(config)
    place = find_places(config, source).val if prefix is None else source.train
    items = [item for item in read_list(place, source.root, source.item) if item.name.startswith(prefix or "")]
    if len(items) < 2:
        raise ConfigError(f"choose_on: expected the start of names in {place}, got {prefix!r}")
    for item in items:
        check_mask(item, len(finished.class_names))
    return Clip(finished, frozen_network(finished).classifier, list(_frames(finished, items)))


def enlarged(clip: Clip) -> Clip:
    """The same with frames `ENLARGED` times larger."""
    frames = _frames(clip.finished, [frame.item for frame in clip.frames], enlarge=ENLARGED)

    def both(own: Frame, larger: Frame) -> Frame:
        logits = mean_logits([own.logits, larger.logits], larger.logits.shape[-2:])
        return replace(larger, decoders=own.decoders + larger.decoders, logits=logits)

    return replace(clip, frames=[both(*sizes) for sizes in zip(clip.frames, frames, strict=True)])


def _frames(finished: Finished, items: Sequence[Item], enlarge: int = 1) -> Iterator[Frame]:
    images = images_of(finished, items, enlarge=enlarge)
    for item in items:
        features, decoder, logits = images.describe(item)
        yield Frame(item, standardised(features), (decoder,), logits)


# ---------------------------------------------------------------------------------------------------------------------
# Methods


def copied(clip: Clip) -> Iterator[tuple[int, Tensor]]:
    """The first frame's labels; a pixel without one has that of the nearest with one, as a copy must say something."""
    truth = clip.frames[0].truth
    nearest = distance_transform_edt((truth == VOID).numpy(), return_distances=False, return_indices=True)
    labels = truth[tuple(torch.from_numpy(nearest).long())]
    return ((number, labels) for number in range(1, len(clip.frames)))


def carried(clip: Clip, *, kind: Kind, corrects: bool = False, **setting: Any) -> Iterator[tuple[int, Tensor]]:
    """By attention, or a network's prediction corrected by it."""

    def describe(number: int) -> Described:
        frame = clip.frames[number]
        return frame.features(kind), frame.logits if corrects else None

    return carry(describe, len(clip.frames), {0: clip.frames[0].truth}, clip.num_classes, Carrying(**setting))


def classified(
    clip: Clip, *, kind: Kind, shrinkage: float = 0.0, share: float = 0.0, trust: float = 0.0
) -> Iterator[tuple[int, Tensor]]:
    """A share of the discriminant of the first frame's truth, and as much of the network as it is trusted."""
    propagate = DerivativeLabelPropagation(Discriminant(shrinkage=shrinkage))
    first = clip.frames[0].features(kind)
    _, shares, known = first_labels(clip, first)

    def logits(frame: Frame) -> Tensor:
        if not share:
            return trust * frame.logits
        of_first = propagate(CERTAIN * shares, first, frame.features(kind), mask=known)
        return share * of_first + trust * frame.logits

    return resized(clip, logits)


def tuned(clip: Clip, *, steps: int, lr: float) -> Iterator[tuple[int, Tensor]]:
    """The network with its last layer trained on the first frame; of several sizes each, and their mean."""

    def layer(decoder: Tensor) -> Callable[[Tensor], Tensor]:
        _, shares, known = first_labels(clip, decoder)
        V, truth = (x[0, :, known[0]].T for x in (decoder, shares))
        return trained_layer(clip.classifier, V, truth, steps=steps, lr=lr)

    layers = [layer(decoder) for decoder in clip.frames[0].decoders]

    def logits(frame: Frame) -> Tensor:
        each = [layer(decoder) for layer, decoder in zip(layers, frame.decoders, strict=True)]
        return mean_logits(each, frame.logits.shape[-2:])

    return resized(clip, logits)


def first_labels(clip: Clip, feats: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of the first frame as a `Memory` holds it: its features with their place, shares of classes, a mask."""
    memory = Memory(Carrying())
    memory.give(feats, clip.frames[0].truth, clip.num_classes)
    return memory.given[0]


def resized(clip: Clip, logits: Callable[[Frame], Tensor]) -> Iterator[tuple[int, Tensor]]:
    """The classes of logits (1, C, h, w) at the size of the labels."""
    size = tuple(clip.frames[0].truth.shape)
    for number, frame in enumerate(clip.frames[1:], 1):
        yield number, labels_at(logits(frame), size)


def methods(chosen: Mapping[str, dict[str, Any]], second: int) -> dict[str, Method]:
    """A row's name -> what gives it, first those that need no network; `second` is the number of frames in a second."""
    setting = {name: entry["setting"] for name, entry in chosen.items()}
    memory = setting["memory"]
    rows: dict[str, Method] = {
        "first frame copied": copied,
        "discriminant": partial(classified, **setting["discriminant"]),
        "attention": partial(carried, **setting["attention"]),
        "attention in a window": partial(carried, **setting["window"]),
    }
    for labels in MEMORIES:
        rows[f"attention, last {LAST} too, {labels}"] = partial(carried, **memory | {"labels": labels, "doubt": 0.0})
    rows[f"attention, last {LAST} too, as chosen"] = partial(carried, **memory)
    rows[f"attention, last {LAST} too, as chosen, one a second"] = partial(carried, **memory, every=second)
    rows |= {
        "network alone": partial(classified, kind="decoder", trust=1.0),
        "last layer trained on the first frame": partial(tuned, **setting["last layer"]),
        "network plus discriminant": partial(classified, **setting["plus discriminant"]),
        "network corrected by attention, decoder": partial(carried, **setting["corrected, decoder"]),
        CORRECTED: partial(carried, **setting["corrected, backbone"]),
    }
    again = ("network alone", "last layer trained on the first frame", CORRECTED)
    larger = {f"attention{LARGER}": rows["attention"]} | {f"{row}{BOTH}": rows[row] for row in again}
    return rows | larger  # the same on the clip that is `enlarged`


WITH_NETWORK = ("network", "last layer")  # how the rows start that differ between networks

# ---------------------------------------------------------------------------------------------------------------------
# Measuring


class Pieces:
    """Pieces of a clip, each with its first frame given; frames of the network's labels and of val are not scored."""

    def __init__(self, clip: Clip) -> None:
        data = load_data(clip.finished.config)
        not_counted = {item.name for item in (*data.labeled, *data.val)}
        starts = range(0, len(clip.frames) - PIECE + 1, EVERY)
        self.pieces = [Clip(clip.finished, clip.classifier, clip.frames[start : start + PIECE]) for start in starts]
        self.scored = {frame.item.name for piece in self.pieces for frame in piece.frames[1:]} - not_counted
        if not self.scored:
            raise ConfigError(
                f"choose_on: expected pieces of {PIECE} frames with some that the network was not trained on, "
                f"found none in {len(clip.frames)} frames"
            )

    def score(self, method: Method) -> float:
        """The mIoU over all pieces, in percent."""
        metric = make_metric(self.pieces[0].num_classes)
        for piece in self.pieces:
            for number, labels in method(piece):
                if piece.frames[number].item.name in self.scored:
                    metric.update(labels[None], piece.frames[number].truth[None].long())
        return 100 * metric.compute()["miou"].item()

    def best(self, method: Callable[..., Iterator[tuple[int, Tensor]]], **options: Sequence[Any]) -> dict[str, Any]:
        """Of all combinations of options the setting with the highest mIoU, the first of equals, and what was tried."""
        tried = []
        settings = [dict(zip(options, values, strict=True)) for values in itertools.product(*options.values())]
        with make_bar(len(settings), f"choose, {method.__name__}") as bar:
            for setting in settings:
                tried.append(setting | {"miou": self.score(partial(method, **setting))})
                bar.update()
        top = max(range(len(settings)), key=lambda index: (tried[index]["miou"], -index))
        return {"setting": settings[top], "tried": tried}


def choose(clip: Clip) -> dict[str, dict[str, Any]]:
    """The settings of every method; sharpness and place first, with the given frame alone."""
    best = Pieces(clip).best
    chosen = {
        "attention": best(carried, kind=["backbone"], sharpness=SHARPNESS, position=POSITION),
        "discriminant": best(classified, kind=["backbone"], shrinkage=SHRINKAGE, share=[1.0]),
        "last layer": best(tuned, steps=TRAINED, lr=LR),
        "plus discriminant": best(classified, kind=["decoder"], shrinkage=SHRINKAGE, share=SHARE, trust=[1.0]),
    }
    first = {name: [value] for name, value in chosen["attention"]["setting"].items()}
    chosen["window"] = best(carried, **first | {"position": [0.0], "radius": RADIUS})
    chosen["memory"] = best(carried, **first, last=[LAST], labels=MEMORIES, doubt=DOUBT)
    for kind in ("backbone", "decoder"):
        chosen[f"corrected, {kind}"] = best(
            carried, kind=[kind], corrects=[True], sharpness=SHARPNESS, position=POSITION, steps=STEPS
        )
    return chosen


def measure(clip: Clip, method: Method) -> dict[str, Any]:
    """Scores of a whole clip from its first frame."""
    return score_clip(dict(method(clip)), [frame.item for frame in clip.frames], clip.finished.class_names)


def add_clips_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `clips`."""
    add_measuring_arguments(parser)
    parser.add_argument(
        "--choose-on", required=True, metavar="START", help="of the names of the training images that are another clip"
    )
    parser.add_argument(
        "--second", type=int, default=15, help="frames in a second of the validation clip (%(default)s)"
    )


@torch.no_grad()
def clips_command(arguments: argparse.Namespace) -> None:
    """Chooses, measures, and writes JSON and a table; goes on where an interrupted call has stopped."""
    runs, path, result = begin(arguments, "clips", choose_on=arguments.choose_on, second=arguments.second)
    if len({Path(run.config.data).resolve() for run in runs}) > 1:
        raise ConfigError("runs: expected runs of one data set, whose networks are averaged")
    if "chosen" not in result:
        result |= {"chosen": choose(make_clip(runs[0], arguments.choose_on)), "figures": {}}
        write_json(path, result)
    for run in runs:
        rows, name = methods(result["chosen"], arguments.second), run_name(run)
        figures = result["figures"].setdefault(name, {})
        if run is not runs[0]:
            rows = {row: method for row, method in rows.items() if row.startswith(WITH_NETWORK)}
        missing = [row for row in rows if row not in figures]
        clip = make_clip(run, None) if missing else None
        larger = enlarged(clip) if clip else None
        for row in missing:
            figures[row] = measure(larger if row.endswith((LARGER, BOTH)) else clip, rows[row])
            write_json(path, result)
            print(f"{name}, {row}: {100 * figures[row]['miou']:.1f}", flush=True)
    table = make_table(result)
    write_bytes(arguments.out / "clips.md", table.encode())
    print(table)


def make_table(result: dict[str, Any]) -> str:
    """The mIoU over the clip and at single frames, each network's, and paired gains with their standard errors."""
    first, *others = result["figures"].values()
    head = [f"at frame {number}" for number in FRAMES]
    lines = [f"| mIoU | all frames | {' | '.join(head)} |", "|---" * (len(FRAMES) + 2) + "|"]
    for name in first:
        entries = [first[name], *(figures[name] for figures in others if name in figures)]
        values = [100 * entry["miou"] for entry in entries]
        spread = f" ({', '.join(f'{value:.1f}' for value in values)})" if len(values) > 1 else ""
        frames = [[100 * entry["frames"].get(str(number), np.nan) for number in FRAMES] for entry in entries]
        times = [f"{value:.1f}" for value in np.mean(frames, 0)]
        lines.append(f"| {name} | {np.mean(values):.1f}{spread} | {' | '.join(times)} |")
    for method, control in GAINS:
        gains = [100 * (of_run[method]["miou"] - of_run[control]["miou"]) for of_run in result["figures"].values()]
        error = f" ± {np.std(gains, ddof=1) / len(gains) ** 0.5:.1f}" if len(gains) > 1 else ""
        lines.append(f"| *{method}* over *{control}* | {np.mean(gains):+.1f}{error} |" + " |" * len(FRAMES))
    return "\n".join(lines) + "\n"
