"""`clicks`: what completing sparse labels is worth; the truth of validation images stands in for the person who clicks.

Settings are chosen on unlabelled training images of the first run's data set, whose masks are read for this only. Then
every run's validation images are read once: a few pixels of each class, or one stroke, are shown to every method.
"""

import argparse
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .choice import Finished
from .click_methods import BOTH, CLOSED, LARGER, Method, Sample, grids, methods
from .data import VOID, Item, read_mask
from .evaluate import labels_at, make_metric
from .files import write_bytes, write_json
from .image_features import ENLARGED, mean_logits, standardised
from .measuring import Images, add_measuring_arguments, begin, images_of, make_images
from .progress import make_bar

AMOUNTS = ("1", "5", "20", "stroke")
DRAWS = 3
SLOW = ("label spreading, backbone",)  # one draw
WITHOUT_NETWORK = (
    *("nearest labelled pixel", "label spreading, backbone", "attention, backbone"),
    *("ridge, backbone", "discriminant, backbone", f"discriminant, backbone{LARGER}"),
)
# Paired: the same clicks, the same network.
GAINS = (
    ("discriminant, backbone", "nearest labelled pixel"),
    ("discriminant, backbone", "attention, backbone"),
    ("network corrected by attention", "network alone"),
    ("network corrected by attention", "last layer trained on the clicks"),
    ("network corrected by attention", "network times attention"),
    (f"{CLOSED}network corrected by attention", f"{CLOSED}network alone"),
    (f"{CLOSED}network corrected by attention", f"{CLOSED}last layer trained on the clicks"),
    (f"{CLOSED}network corrected by attention", f"{CLOSED}network times attention"),
    (f"discriminant, backbone{LARGER}", "discriminant, backbone"),
    *(
        (f"{start}network corrected by attention{BOTH}", f"{start}{control}")
        for start in ("", CLOSED)
        for control in (
            f"network alone{BOTH}",
            f"last layer trained on the clicks{BOTH}",
            "network corrected by attention",
        )
    ),
)


def draw_labels(truth: Tensor, amount: str, generator: np.random.Generator) -> Tensor:
    """(H, W): of every class of the truth the number of random pixels that `amount` says, or one straight stroke."""
    sparse = torch.full_like(truth, VOID)
    for label in truth.unique().tolist():
        if label == VOID:
            continue
        inside = (truth == label).numpy()
        places = np.argwhere(inside)
        if amount == "stroke":
            chosen = _stroke(inside, places[generator.integers(len(places))])
        else:
            chosen = places[generator.choice(len(places), min(int(amount), len(places)), replace=False)]
        sparse[chosen[:, 0], chosen[:, 1]] = label
    return sparse


def _stroke(inside: np.ndarray, start: np.ndarray) -> np.ndarray:
    """The longest of eight straight lines through `start` that stay inside, one pixel wide."""
    lines = []
    for angle in np.arange(8) * np.pi / 8:
        step = np.array((np.sin(angle), np.cos(angle)))
        halves = []
        for sign in (1, -1):
            line = np.round(start + sign * step * np.arange(max(inside.shape))[:, None]).astype(int)
            fits = ((line >= 0) & (line < inside.shape)).all(1)
            line = line[: len(fits) if fits.all() else int(fits.argmin())]
            fits = inside[line[:, 0], line[:, 1]]
            halves.append(line[: len(fits) if fits.all() else int(fits.argmin())])
        lines.append(np.unique(np.concatenate(halves), axis=0))
    return max(lines, key=len)


@dataclass(frozen=True)
class Sizes:
    """The same images at their own size and `ENLARGED` times larger."""

    own: Images
    larger: Images


def make_sizes(run: Finished, **options: Any) -> Sizes:
    """Images as `make_images`, at both sizes."""
    own = make_images(run, **options)
    return Sizes(own, images_of(run, own.items, enlarge=ENLARGED))


def samples(sizes: Sizes, amount: str, draw: int) -> Iterator[tuple[Sample, Sample, Tensor]]:
    """Every image with labels of one draw, at both sizes, and its truth (H, W)."""
    images = sizes.own
    with make_bar(len(images.items), f"{images.name}: {amount}, draw {draw}") as bar:
        for index, item in enumerate(images.items):
            truth = torch.from_numpy(read_mask(item))
            labels = draw_labels(truth, amount, np.random.default_rng((draw, index)))
            own, larger = (_sample(of_size, item, labels) for of_size in (sizes.own, sizes.larger))
            both = mean_logits([own.logits, larger.logits], larger.logits.shape[-2:])
            yield own, replace(larger, logits=both), truth
            bar.update()


def _sample(images: Images, item: Item, labels: Tensor) -> Sample:
    features, decoder, logits = images.describe(item)
    return Sample(labels, decoder, standardised(features), logits, images.network.classifier)


def score(sizes: Sizes, rows: dict[Any, Method], amount: str, draw: int) -> dict[Any, float]:
    """The mIoU of every method over the images, in percent."""
    metrics = {name: make_metric(sizes.own.num_classes) for name in rows}
    for own, larger, truth in samples(sizes, amount, draw):
        for name, method in rows.items():
            metrics[name].update(labels_at(method(own, larger), truth.shape)[None], truth[None].long())
    return {name: 100 * metric.compute()["miou"].item() for name, metric in metrics.items()}


def choose(sizes: Sizes) -> dict[str, Any]:
    """Of every grid the setting with the highest mIoU, averaged over the amounts, and the figures of all.

    With these settings then, on the same images, the mIoU of every row that reads larger images and of its like.
    """

    def means(rows: dict[Any, Method]) -> dict[Any, float]:
        figures = [score(sizes, rows, amount, draw=100) for amount in AMOUNTS]
        return {row: float(np.mean([figure[row] for figure in figures])) for row in rows}

    C = sizes.own.num_classes
    of_grids = means(
        {
            (name, number): methods(C, {name: setting})[row]
            for name, (row, settings) in grids().items()
            for number, setting in enumerate(settings)
        }
    )
    chosen = {}
    for name, (_, settings) in grids().items():
        tried = [setting | {"miou": of_grids[name, number]} for number, setting in enumerate(settings)]
        best = max(range(len(settings)), key=lambda number: tried[number]["miou"])
        chosen[name] = {"setting": settings[best], "tried": tried}
    with_chosen = methods(C, {name: entry["setting"] for name, entry in chosen.items()})
    larger = [row for row in with_chosen if row.endswith((LARGER, BOTH))]
    like = [row.removesuffix(LARGER).removesuffix(BOTH) for row in larger]
    return {"chosen": chosen, "larger": means({row: with_chosen[row] for row in (*like, *larger)})}


def add_clicks_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `clicks`."""
    add_measuring_arguments(parser)
    parser.add_argument("--images", type=int, default=0, help="of each validation list, spread evenly; 0: all")


@torch.no_grad()
def clicks_command(arguments: argparse.Namespace) -> None:
    """Chooses, measures, and writes JSON and a table; goes on where an interrupted call has stopped."""
    runs, path, result = begin(arguments, "clicks", images=arguments.images)
    if "chosen" not in result:
        result |= {**choose(make_sizes(runs[0], chosen=True)), "figures": {}}
        write_json(path, result)
    settings = {name: chosen["setting"] for name, chosen in result["chosen"].items()}
    first_of_data = {Path(run.config.data).name: run for run in reversed(runs)}
    for run in runs:
        sizes, data = make_sizes(run, chosen=False, count=arguments.images), Path(run.config.data).name
        of_run = result["figures"].setdefault(sizes.own.name, {"data": data, "images": len(sizes.own.items)})
        for amount, draw in itertools.product(AMOUNTS, range(DRAWS)):
            if f"{amount}/{draw}" not in of_run:
                rows = methods(sizes.own.num_classes, settings)
                if draw:
                    rows = {row: method for row, method in rows.items() if row not in SLOW}
                if run is not first_of_data[data]:  # one backbone, the same clicks
                    rows = {row: method for row, method in rows.items() if row not in WITHOUT_NETWORK}
                of_run[f"{amount}/{draw}"] = score(sizes, rows, amount, draw)
                write_json(path, result)
    table = make_table(result)
    write_bytes(arguments.out / "clicks.md", table.encode())
    print(table)


def make_table(result: dict[str, Any]) -> str:
    """Mean mIoU over draws and networks with its standard deviation, and paired gains with their standard error."""
    lines = []
    for data in dict.fromkeys(of_run["data"] for of_run in result["figures"].values()):
        of_data = [of_run for of_run in result["figures"].values() if of_run["data"] == data]
        networks = f"{len(of_data)} network{'s' if len(of_data) > 1 else ''}"
        lines += [f"### {data}: {of_data[0]['images']} images, {networks}, {DRAWS} draws of clicks", ""]
        lines += ["| mIoU | 1 click a class | 5 | 20 | a stroke a class |", "|---|---|---|---|---|"]

        def values(method: str, amount: str, of_data: list[Any] = of_data) -> np.ndarray:
            drawn = (of_run[f"{amount}/{draw}"] for of_run in of_data for draw in range(DRAWS))
            return np.array([figures.get(method, np.nan) for figures in drawn])

        for method in of_data[0][f"{AMOUNTS[0]}/0"]:
            cells = (_with_spread(values(method, amount)) for amount in AMOUNTS)
            lines.append(f"| {method} | {' | '.join(cells)} |")
        for method, control in GAINS:
            gains = (values(method, amount) - values(control, amount) for amount in AMOUNTS)
            cells = (_with_error(gain.reshape(-1, DRAWS)) for gain in gains)
            lines.append(f"| *{method}* over *{control}* | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def _with_spread(values: np.ndarray) -> str:
    """Mean and standard deviation; of one value that alone."""
    values = values[np.isfinite(values)]
    return f"{values.mean():.1f}" + (f" ± {values.std(ddof=1):.1f}" if len(values) > 1 else "")


def _with_error(gains: np.ndarray) -> str:
    """Mean and its standard error, of (networks, draws) of which either may be others next time; of one that alone."""
    gains = gains[np.isfinite(gains).any(1)]
    gains = gains[:, np.isfinite(gains).all(0)]
    return f"{gains.mean():+.1f}" + (f" ± {error_of_crossed(gains):.1f}" if gains.size > 1 else "")


def error_of_crossed(x: np.ndarray) -> float:
    """Standard error of the mean of (rows, columns) with effects of the rows, of the columns, and of both."""
    if 1 in x.shape:
        return float(x.std(ddof=1) / x.size**0.5)
    rows, columns = x.mean(1), x.mean(0)
    rest = x - rows[:, None] - columns + x.mean()
    of_rest = np.square(rest).sum() / (len(rows) - 1) / (len(columns) - 1)
    of_both = x.shape[1] * rows.var(ddof=1) + x.shape[0] * columns.var(ddof=1) - of_rest
    return float((max(of_both, of_rest) / x.size) ** 0.5)
