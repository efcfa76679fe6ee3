"""`edges`: P of the feature grid sharpened on the full-size image, and what that is worth beside other ways.

Settings are tried on unlabelled training images of the first run's data set, whose masks are read for this only; each
family's best by mIoU then reads every run's validation images once.
"""

import argparse
import importlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from scipy.ndimage import median_filter
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as TF

from benchmarks.measure import peak_mib

from .augment import to_input
from .boundaries import SCORES, compared, count, scores_of
from .data import read_image, read_mask
from .files import write_bytes, write_json
from .measuring import Images, add_measuring_arguments, begin, make_images, run_name
from .progress import make_bar
from .refinement import Refinement

START = "bilinear P"  # what every method is compared with


@dataclass(frozen=True)
class Sample:
    """What the methods see: logits (1, C, h, w) of the feature grid, the image (1, 3, H, W) and its working size."""

    logits: Tensor
    image: Tensor
    worked: Sequence[int]

    def full(self, x: Tensor) -> Tensor:
        """Brought to the image's full size."""
        return bilinear(x, self.image.shape[2:])

    @property
    def start(self) -> Tensor:
        """P of the feature grid at full size."""
        return self.full(self.logits.softmax(1))


Method = Callable[[Sample], Tensor]  # scores (1, C, H, W)


def bilinear(x: Tensor, size: Sequence[int]) -> Tensor:
    """(N, K, h, w) at another size, corners on corners."""
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=True)


def network_output(sample: Sample) -> Tensor:
    """What the network gives: logits, not probabilities, brought to its working size."""
    return sample.full(bilinear(sample.logits, sample.worked).softmax(1))


def refined(sample: Sample, *, averaged: str = "P", **options: Any) -> Tensor:
    """The window at full size, over P, its logarithm or the logits."""
    start = {"P": sample.start, "log P": sample.start.clamp_min(1e-6).log(), "logits": sample.full(sample.logits)}
    return Refinement(**options)(start[averaged], sample.image)


def refined_small(sample: Sample, *, size: int, **options: Any) -> Tensor:
    """The window on an image `size` times smaller, then upsampled; 0: on the feature grid."""
    H, W = sample.image.shape[2:]
    small = (H // size, W // size) if size else tuple(sample.logits.shape[2:])
    image = F.interpolate(sample.image, small, mode="bilinear", antialias=True)
    return sample.full(Refinement(**options)(bilinear(sample.logits.softmax(1), small), image))


def blurred(sample: Sample, *, sigma: float) -> Tensor:
    """P at full size under a Gaussian of so many pixels."""
    return TF.gaussian_blur(sample.start, [2 * round(3 * sigma) + 1] * 2, [sigma] * 2)


def majority(sample: Sample, *, radius: int) -> Tensor:
    """The most frequent class of a square: what a median is of two classes."""
    labels = one_hot(sample.start.max(1).indices, sample.logits.shape[1])
    return F.avg_pool2d(labels, 2 * radius + 1, 1, radius)


def median(sample: Sample, *, radius: int) -> Tensor:
    """The median of the class ids in a square, though ids have no order."""
    ids = median_filter(sample.start[0].max(0).indices.numpy(), 2 * radius + 1)
    return one_hot(torch.from_numpy(ids)[None], sample.logits.shape[1])


def one_hot(labels: Tensor, num_classes: int) -> Tensor:
    """(N, H, W) -> (N, C, H, W)."""
    return rearrange(F.one_hot(labels, num_classes), "n h w c -> n c h w").float()


def dense_crf(sample: Sample, *, sxy: float, srgb: float, compat: float, smooth: float) -> Tensor:
    """Five steps of pydensecrf2: every pixel with every other, by colour and place, and a short Gaussian."""
    densecrf, utils = (importlib.import_module(f"pydensecrf.{name}") for name in ("densecrf", "utils"))
    C, H, W = sample.start.shape[1:]
    crf = densecrf.DenseCRF2D(W, H, C)
    crf.setUnaryEnergy(utils.unary_from_softmax(sample.start[0].numpy()))
    if smooth:
        crf.addPairwiseGaussian(sxy=3, compat=smooth)
    image = rearrange((255 * sample.image[0]).round().byte(), "k h w -> h w k").contiguous().numpy()
    crf.addPairwiseBilateral(sxy=sxy, srgb=srgb, rgbim=image, compat=compat)
    return torch.from_numpy(np.array(crf.inference(5))).view(1, C, H, W)


# The method of each row of the table and the settings it is chosen from, the simplest first.
FAMILIES: dict[str, tuple[Callable[..., Tensor], list[dict[str, Any]]]] = {
    START: (lambda sample: sample.start, [{}]),
    "network's own output": (network_output, [{}]),
    "window of colours": (
        refined, [{"sigma": sigma, "steps": steps} for sigma, steps in ((0.25, 5), (0.25, 10), (0.25, 20), (0.15, 10),
                                                                        (0.4, 10))],
    ),
    "window of colours on half the size": (refined_small, [{"size": 2, "steps": 5}, {"size": 2, "steps": 10}]),
    "Gaussian blur of P": (blurred, [{"sigma": sigma} for sigma in (2.0, 4.0, 8.0)]),
    "majority of labels": (majority, [{"radius": radius} for radius in (2, 4, 8)]),
    "median of labels": (median, [{"radius": 2}]),
    "dense CRF": (
        dense_crf,
        [
            {"sxy": sxy, "srgb": srgb, "compat": compat, "smooth": smooth}
            for sxy, srgb, compat, smooth in ((80, 13, 10, 3), (40, 5, 3, 3), (20, 5, 3, 1), (20, 10, 1, 1))
        ],
    ),
}  # fmt: skip
# What else was tried of the window, at 10 steps unless said: what did not help stands beside what did.
ALSO: dict[str, Method] = {
    "absolute sigma 0.03": partial(refined, sigma=0.03, deviation="one"),
    "sigma by the deviation around each pixel": partial(refined, sigma=0.3, deviation="pixel"),
    "with position, 2 pixels": partial(refined, position=2.0),
    "with position, 4 pixels": partial(refined, position=4.0),
    "dilation 1": partial(refined, dilation=(1,)),
    "dilations 1, 2": partial(refined, dilation=(1, 2)),
    "dilations 1, 2, 4, 8": partial(refined, dilation=(1, 2, 4, 8)),
    "dilations 1, 2, 4, 8, 12, 24": partial(refined, dilation=(1, 2, 4, 8, 12, 24)),
    "sigma 1": partial(refined, sigma=1.0),
    "sigma 2": partial(refined, sigma=2.0),
    "log P averaged": partial(refined, averaged="log P"),
    "logits averaged": partial(refined, averaged="logits"),
    "on the feature grid, then upsampled": partial(refined_small, size=0, sigma=0.5, dilation=(1,), steps=1),
    "on the feature grid, 3 steps": partial(refined_small, size=0, sigma=0.5, dilation=(1,), steps=3),
}


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def samples(images: Images) -> Iterator[tuple[Sample, Tensor]]:
    """Every image with its truth (H, W)."""
    with make_bar(len(images.items), images.name) as bar:
        for item in images.items:
            _, _, logits = images.describe(item)
            image = to_input(read_image(item.image))[None]
            yield Sample(logits, image, images.cached.size), torch.from_numpy(read_mask(item)).long()
            bar.update()


def measure(images: Images, methods: Mapping[str, Method]) -> dict[str, np.ndarray]:
    """The counts (images, K) of every method."""
    found: dict[str, list[np.ndarray]] = {name: [] for name in methods}
    for sample, truth in samples(images):
        for name, method in methods.items():
            found[name].append(count(method(sample)[0].max(0).indices, truth, images.num_classes))
    return {name: np.stack(rows) for name, rows in found.items()}


def figures(counts: Mapping[str, np.ndarray], num_classes: int) -> dict[str, Any]:
    """Of counts (networks, images, K): `SCORES`, and differences to `START` with their standard errors, as lists."""
    table = {}
    for name, of_method in counts.items():
        difference, error = compared(of_method, counts[START], num_classes)
        values = {"scores": scores_of(of_method.sum(1), num_classes).mean(0), "gain": difference, "error": error}
        table[name] = {key: [round(float(x), 3) for x in row] for key, row in values.items()}
    return table


def methods_to_try() -> dict[str, tuple[str, dict[str, Any], Method]]:
    """Key -> the family, the setting and the method; without the dense CRF where pydensecrf2 is missing."""
    found: dict[str, tuple[str, dict[str, Any], Method]] = {}
    for family, (method, settings) in FAMILIES.items():
        if family == "dense CRF" and not find_spec("pydensecrf"):
            continue
        for setting in settings:
            values = ", ".join(f"{name} {value:g}" for name, value in setting.items())
            found[f"{family}: {values}" if values else family] = family, setting, partial(method, **setting)
    return found


def choose(images: Images) -> dict[str, Any]:
    """Every setting's figures on images kept apart, and of each family the setting with the highest mIoU."""
    tried = methods_to_try()
    counts = measure(images, {key: method for key, (_, _, method) in tried.items()} | ALSO)
    table = figures({key: rows[None] for key, rows in counts.items()}, images.num_classes)
    chosen: dict[str, dict[str, Any]] = {}
    for family in dict.fromkeys(family for family, _, _ in tried.values()):
        best = max((key for key in tried if tried[key][0] == family), key=lambda key: table[key]["scores"][0])
        chosen[family] = tried[best][1]
    return {"images": len(images.items), "chosen": chosen, "tried": table}


def cost(methods: Mapping[str, Method], sample: Sample, repeats: int = 5) -> dict[str, dict[str, float]]:
    """Median seconds of every method on one image, turn by turn, and MiB that it adds to the peak.

    Seconds are those that the thread was running, which others on the machine hardly lengthen.
    """
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(repeats):
        for name, method in methods.items():
            begin = time.thread_time()
            method(sample)
            seconds[name].append(time.thread_time() - begin)
    found = {}
    for name, method in methods.items():
        peak = peak_mib(partial(_alone, method, sample), "cpu")["peak_mib"]
        found[name] = {"seconds": round(statistics.median(seconds[name]), 4), "mib": round(peak, 1)}
    return found


def _alone(method: Method, sample: Sample) -> tuple[Tensor]:
    return (method(sample),)


def add_edges_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `edges`."""
    add_measuring_arguments(parser)


@torch.no_grad()
def edges_command(arguments: argparse.Namespace) -> None:
    """Chooses, measures, and writes JSON and tables; goes on after the last data set of an interrupted call."""
    runs, path, result = begin(arguments, "edges")
    if "choice" not in result:
        choice = {"data": Path(runs[0].config.data).name, **choose(make_images(runs[0], chosen=True))}
        result |= {"choice": choice, "data": {}}
        write_json(path, result)
    methods = {
        family: partial(FAMILIES[family][0], **setting) for family, setting in result["choice"]["chosen"].items()
    }
    for name in dict.fromkeys(Path(run.config.data).name for run in runs):
        of_data = [run for run in runs if Path(run.config.data).name == name]
        if name in result["data"]:
            continue
        num_classes = len(of_data[0].class_names)
        each = [measure(make_images(run, chosen=False, count=0), methods) for run in of_data]
        counts = {family: np.stack([found[family] for found in each]) for family in methods}
        result["data"][name] = {
            "networks": [run_name(run) for run in of_data],
            "images": counts[START].shape[1],
            "rows": figures(counts, num_classes),
        }
        write_json(path, result)
    if "cost" not in result:
        images = make_images(runs[0], chosen=False, count=1)
        sample = next(samples(images))[0]
        result["cost"] = {
            "size": tuple(sample.image.shape[2:]),
            "classes": images.num_classes,
            "threads": torch.get_num_threads(),
            "rows": cost(methods, sample),
        }
        write_json(path, result)
    table = make_tables(result)
    write_bytes(arguments.out / "edges.md", table.encode())
    print(table)


def make_tables(result: Mapping[str, Any]) -> str:
    """A table for every data set, then time and memory, then what was tried."""
    blocks = [
        _table(f"{name}: {found['images']} validation images, networks: {len(found['networks'])}", found["rows"])
        for name, found in result["data"].items()
    ]
    timed = result["cost"]
    rows = [f"| {name} | {1e3 * row['seconds']:.0f} | {row['mib']:.0f} |" for name, row in timed["rows"].items()]
    size = f"{timed['size'][1]} x {timed['size'][0]}, {timed['classes']} classes, threads: {timed['threads']}"
    blocks.append("\n".join([f"### Cost: {size}", "", "| method | ms | MiB at most |", "|---|---|---|", *rows]))
    choice = result["choice"]
    title = f"Tried on {choice['images']} unlabelled training images of {choice['data']}, one network"
    return "\n\n".join([*blocks, _table(title, choice["tried"])]) + "\n"


def _table(title: str, rows: Mapping[str, Any]) -> str:
    start = " | ".join(f"{value:.2f}" for value in rows[START]["scores"])
    lines = [
        f"### {title}",
        "",
        f"| | {' | '.join(SCORES)} |",
        f"|---|{'---|' * len(SCORES)}",
        f"| {START} | {start} |",
    ]
    for name, row in rows.items():
        if name != START:
            cells = (f"{gain:+.2f} ± {error:.2f}" for gain, error in zip(row["gain"], row["error"], strict=True))
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)
