"""`clips`: what carrying a frame's labels through a clip is worth, beside copying them and beside trained networks.

Settings are chosen on a clip of the training images, in pieces whose first frame is given. Then the validation images,
one clip, are read once: the truth of its first frame is carried to all others. Nothing is drawn at random, so there are
no repetitions but over the networks.
"""

import argparse
import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy.ndimage import distance_transform_edt
from torch import Tensor
from torch.nn import functional as F

from .choice import Finished
from .config import ConfigError
from .data import VOID, Item, check_mask, find_places, load_data, read_list, read_mask
from .evaluate import make_metric
from .files import write_bytes, write_json
from .image_features import standardised
from .measuring import Images, add_measuring_arguments, begin, images_of
from .progress import make_bar
from .sources import find_source
from .video import FRAMES, Carrying, Described, carry, score_clip

PIECE, EVERY = 10, 20  # frames of a piece of the clip that settings are chosen on, and from one piece to the next
ALONE = {"last": 0, "doubt": 0.0, "trust": 0.0}  # the given frame alone, without the network
SHARPNESS, POSITION, RADIUS = (60.0, 100.0), (0.0, 0.15, 0.3), (6, 12)
MEMORIES = ("soft", "hard", "confident")
LAST, DOUBT, PLACED, TRUST = 3, (0.0, 2.0), (0.0, 0.3), (0.5, 1.0, 2.0)


@dataclass(frozen=True)
class Clip:
    """Frames in order with a network and the cached features of its backbone."""

    finished: Finished
    images: Images

    @property
    def items(self) -> list[Item]:
        """The frames."""
        return self.images.items

    def described(self, kind: str) -> list[Described]:
        """Features of the "backbone", standardised over each frame, or of the "decoder", and probabilities."""
        network, described = self.images.network, []
        for item in self.items:
            features = self.images.cached[item.image][None].float()
            output = network(features)
            described.append((standardised(features) if kind == "backbone" else output.feats, output.logits.softmax(1)))
        return described

    def truth(self, number: int) -> Tensor:
        """Labels (H, W)."""
        return torch.from_numpy(read_mask(self.items[number]))


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
    return Clip(finished, images_of(finished, items))


class Pieces:
    """Pieces of a clip, each with its first frame given; frames that the network was trained on are not scored."""

    def __init__(self, clip: Clip, kind: str) -> None:
        self.clip, self.kind, self.described = clip, kind, clip.described(kind)
        self.num_classes = len(clip.finished.class_names)
        trained = {item.name for item in load_data(clip.finished.config).labeled}
        self.starts = range(0, len(clip.items) - PIECE + 1, EVERY)
        self.scored = [item.name not in trained for item in clip.items]
        if not any(self.scored[start + number] for start in self.starts for number in range(1, PIECE)):
            raise ConfigError(
                f"choose_on: expected pieces of {PIECE} frames with some that the network was not trained on, "
                f"found none in {len(clip.items)} frames"
            )
        self.tried: list[dict[str, Any]] = []

    def best(self, settings: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The setting with the highest score; all go to `tried`."""
        with make_bar(len(settings), f"choose, {self.kind}") as bar:
            for setting in settings:
                self.tried.append(setting | {"miou": self.score(setting)})
                bar.update()
        top = max(range(-len(settings), 0), key=lambda index: self.tried[index]["miou"])
        return settings[top]

    def score(self, setting: dict[str, Any]) -> float:
        """The mIoU over all pieces, in percent."""
        metric, carrying = make_metric(self.num_classes), Carrying(**setting)
        for start in self.starts:
            given = {0: self.clip.truth(start)}
            describe = self.described[start : start + PIECE].__getitem__
            for number, labels in carry(describe, PIECE, given, self.num_classes, carrying):
                if self.scored[start + number]:
                    metric.update(labels[None], self.clip.truth(start + number)[None].long())
        return 100 * metric.compute()["miou"].item()


def choose(clip: Clip) -> dict[str, dict[str, Any]]:
    """For both kinds of features the settings with the highest mIoU, one option after the other, and all tried ones.

    First sharpness and place with the given frame alone, then the memory, then the network's share in both.
    """
    chosen: dict[str, dict[str, Any]] = {}
    for kind in ("backbone", "decoder"):
        pieces = Pieces(clip, kind)
        best = pieces.best
        sharp = best([ALONE | {"sharpness": w, "position": x} for w, x in itertools.product(SHARPNESS, POSITION)])
        window = best([sharp | {"position": 0.0, "radius": radius} for radius in RADIUS])
        memories = itertools.product(MEMORIES, DOUBT, PLACED)
        memory = best([sharp | {"last": LAST, "labels": m, "doubt": d, "position": x} for m, d, x in memories])
        chosen[kind] = {
            "first": sharp,
            "window": window,
            "memory": memory,
            "first, network": best([sharp | {"trust": trust} for trust in TRUST]),
            "memory, network": best([memory | {"trust": trust} for trust in TRUST]),
            "tried": pieces.tried,
        }
    return chosen


def rows(settings: dict[str, dict[str, dict[str, Any]]], second: int) -> dict[str, tuple[str, Carrying]]:
    """A row's name -> the features and the settings that it takes; `second` is the number of frames in a second."""
    table: dict[str, tuple[str, Carrying]] = {}
    for kind in ("backbone", "decoder"):
        chosen = {name: Carrying(**setting) for name, setting in settings[kind].items() if name != "tried"}
        memory, blended = chosen["memory"], chosen["memory, network"]
        both = f"{kind}: first and last {LAST}"
        table[f"{kind}: first frame"] = (kind, chosen["first"])
        if kind == "backbone":
            table[f"{kind}: first frame, in a window"] = (kind, chosen["window"])
            for labels in MEMORIES:
                table[f"{both}, {labels}"] = (kind, replace(memory, labels=labels, doubt=0.0))
        table[f"{both}, as chosen"] = (kind, memory)
        table[f"{both}, as chosen, one a second"] = (kind, replace(memory, every=second))
        table[f"{kind}: first frame, times the network"] = (kind, chosen["first, network"])
        if kind == "decoder":
            table[f"{both}, times the network"] = (kind, blended)
            table[f"{both}, one a second, times the network"] = (kind, replace(blended, every=second))
    return table


def measure(clip: Clip, kind: str, carrying: Carrying) -> dict[str, Any]:
    """Scores of a whole clip from its first frame, and seconds a frame, without the network's."""
    names, described = clip.finished.class_names, clip.described(kind)
    start = time.perf_counter()
    predicted = dict(carry(described.__getitem__, len(described), {0: clip.truth(0)}, len(names), carrying))
    seconds = (time.perf_counter() - start) / len(predicted)
    return score_clip(predicted, clip.items, names) | {"seconds": round(seconds, 3)}


def baselines(clip: Clip) -> Iterator[tuple[str, dict[str, Any]]]:
    """Copying the first frame, and the network alone."""
    numbers, names = range(1, len(clip.items)), clip.finished.class_names
    yield "the first frame copied", score_clip(dict.fromkeys(numbers, _filled(clip.truth(0))), clip.items, names)
    network, predicted = clip.finished.network("tested"), {}
    for number in numbers:
        logits = network(clip.images.cached[clip.items[number].image][None].float()).logits
        resized = F.interpolate(logits, clip.truth(number).shape, mode="bilinear", align_corners=True)
        predicted[number] = resized[0].argmax(0)
    yield "the network alone", score_clip(predicted, clip.items, names)


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
def clips(arguments: argparse.Namespace) -> None:
    """Chooses, measures, and writes JSON and a table; goes on where an interrupted call has stopped."""
    runs, path, result = begin(arguments, "clips", choose_on=arguments.choose_on, second=arguments.second)
    if "chosen" not in result:
        result |= {"chosen": choose(make_clip(runs[0], arguments.choose_on)), "figures": {}}
        write_json(path, result)
    for run in runs:
        clip = make_clip(run, None)
        figures = result["figures"].setdefault(clip.images.name, {})
        if not figures:
            figures |= dict(baselines(clip))
        for name, (kind, carrying) in rows(result["chosen"], arguments.second).items():
            # What no network takes part in is the same for all.
            if name in figures or (kind == "backbone" and not carrying.trust and run is not runs[0]):
                continue
            figures[name] = measure(clip, kind, carrying) | {"setting": asdict(carrying)}
            write_json(path, result)
            print(f"{clip.images.name}, {name}: {100 * figures[name]['miou']:.1f}", flush=True)
    table = make_table(result)
    write_bytes(arguments.out / "clips.md", table.encode())
    print(table)


def make_table(result: dict[str, Any]) -> str:
    """The mIoU over the clip and at single frames, and its range over the networks."""
    first, *others = result["figures"].values()
    head = [f"at frame {number}" for number in FRAMES]
    lines = [f"| mIoU | all frames | {' | '.join(head)} | seconds a frame |", "|---" * (len(FRAMES) + 3) + "|"]
    for name in first:
        entries = [first[name], *(figures[name] for figures in others if name in figures)]
        if name == "the first frame copied":
            entries = entries[:1]
        values = [100 * entry["miou"] for entry in entries]
        spread = f" ({', '.join(f'{value:.1f}' for value in values)})" if len(values) > 1 else ""
        frames = [[100 * entry["frames"].get(str(number), np.nan) for number in FRAMES] for entry in entries]
        times = [f"{value:.1f}" for value in np.mean(frames, 0)]
        seconds = f"{np.mean([entry['seconds'] for entry in entries]):.2f}" if "seconds" in entries[0] else ""
        lines.append(f"| {name} | {np.mean(values):.1f}{spread} | {' | '.join(times)} | {seconds} |")
    return "\n".join(lines) + "\n"


def _filled(labels: Tensor) -> Tensor:
    """Labels with those of the nearest labelled pixel where there is none: a copy has to say something everywhere."""
    nearest = distance_transform_edt((labels == VOID).numpy(), return_distances=False, return_indices=True)
    return labels[tuple(torch.from_numpy(nearest).long())]
