"""`clicks`: what completing sparse labels is worth; the truth of validation images stands in for the person who clicks.

Settings are chosen on unlabelled training images of the first run's data set, whose masks are read for this only. Then
every run's validation images are read once: a few pixels of each class, or one stroke, are shown to every method.
"""

import argparse
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.ndimage import distance_transform_edt
from torch import Tensor, nn
from torch.nn import functional as F

from dlprop import DerivativeLabelPropagation
from dlprop.affinity import Ridge

from .choice import Finished
from .complete import CERTAIN, Clicks, Completion, classify, only_labelled
from .data import VOID, Item, read_mask
from .evaluate import labels_at, make_metric
from .files import write_bytes, write_json
from .image_features import ENLARGED, mean_logits, standardised
from .measuring import Images, add_measuring_arguments, begin, images_of, make_images
from .progress import make_bar

AMOUNTS = ("1", "5", "20", "stroke")
DRAWS = 3
SLOW = ("label spreading, backbone",)  # one draw
LARGER, BOTH = ", images twice as large", ", both sizes"
WITHOUT_NETWORK = (
    *("nearest labelled pixel", "label spreading, backbone", "attention, backbone"),
    *("ridge, backbone", "discriminant, backbone", f"discriminant, backbone{LARGER}"),
)
CLOSED = "no other classes: "  # ... than those labelled in an image
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


@dataclass(frozen=True)
class Sample:
    """What the methods see of an image with sparse labels.

    Attributes:
        labels: (H, W) uint8, `VOID` where there is none.
        decoder: (1, D, h, w), the network's features V.
        backbone: (1, K, h, w), the frozen backbone's, standardised over the image.
        logits: (1, C, h, w) of the network.
        classifier: the network's last layer, with the dropout before it.
    """

    labels: Tensor
    decoder: Tensor
    backbone: Tensor
    logits: Tensor
    classifier: nn.Sequential

    @property
    def clicks(self) -> Clicks:
        """The labelled pixels."""
        return Clicks(self.labels)

    @property
    def closed(self) -> "Sample":
        """The same with a network that knows which classes are labelled, and that there are no others."""
        return replace(self, logits=only_labelled(self.logits, self.clicks))


# An image and the same `ENLARGED` times larger, whose logits are the mean of both sizes -> scores (1, C, h, w), or
# (1, C, H, W).
Method = Callable[[Sample, Sample], Tensor]


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


# ---------------------------------------------------------------------------------------------------------------------
# Methods


def nearest(sample: Sample, num_classes: int) -> Tensor:
    """The class of the nearest labelled pixel."""
    rows, columns = distance_transform_edt((sample.labels == VOID).numpy(), return_distances=False, return_indices=True)
    return F.one_hot(sample.labels[rows, columns].long(), num_classes).permute(2, 0, 1)[None].float()


def label_spreading(sample: Sample, num_classes: int, *, neighbors: int, alpha: float) -> Tensor:
    """scikit-learn's label spreading over the graph of nearest neighbours of grid points and labelled pixels."""
    from sklearn.semi_supervised import LabelSpreading  # a second that the other commands need not wait

    feats, clicks = sample.backbone, sample.clicks
    V = F.normalize(torch.cat((clicks.sample(feats), feats.flatten(2)), 2)[0], dim=0).T.numpy()
    labels = np.full(len(V), -1)
    labels[: len(clicks.classes)] = clicks.classes.numpy()
    model = LabelSpreading(kernel="knn", n_neighbors=neighbors, alpha=alpha, max_iter=100, tol=1e-2).fit(V, labels)
    scores = torch.zeros(num_classes, len(V))
    scores[torch.from_numpy(model.classes_)] = torch.from_numpy(model.label_distributions_).float().T
    return scores[None, :, len(clicks.classes) :].unflatten(2, feats.shape[-2:])


def ridge(sample: Sample, num_classes: int, *, shrinkage: float, balance: float) -> Tensor:
    """Ridge from the labelled pixels alone."""
    propagate = DerivativeLabelPropagation(Ridge(shrinkage=shrinkage, balance=balance))
    feats, clicks = sample.backbone, sample.clicks
    out = propagate(CERTAIN * clicks.one_hot(num_classes), clicks.sample(feats), feats.flatten(2))
    return out.unflatten(2, feats.shape[-2:])


def trained_layer(
    classifier: nn.Sequential, V: Tensor, truth: Tensor, *, steps: int, lr: float
) -> Callable[[Tensor], Tensor]:
    """A network's last layer after gradient descent from where it was: features (1, D, h, w) -> logits (1, C, h, w).

    Args:
        classifier: the layer, a 1 x 1 convolution behind a dropout, which is left out.
        V: (n, D) features.
        truth: (n,) classes, or (n, C) their shares.
        steps: of gradient descent, over all of these at once.
        lr: its learning rate.
    """
    weight, bias = (x.detach().clone() for x in classifier[-1].parameters())
    weight = weight[:, :, 0, 0]
    optimizer = torch.optim.SGD((weight.requires_grad_(), bias.requires_grad_()), lr=lr)
    with torch.enable_grad():
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(F.linear(V, weight, bias), truth).backward()
            optimizer.step()
    return partial(F.conv2d, weight=weight.detach()[:, :, None, None], bias=bias.detach())


def tuned_classifier(sample: Sample, *, steps: int, lr: float) -> Tensor:
    """The network with its last layer trained on the labelled pixels."""
    V, clicks = sample.clicks.sample(sample.decoder)[0].T, sample.clicks
    return trained_layer(sample.classifier, V, clicks.classes, steps=steps, lr=lr)(sample.decoder)


def product(sample: Sample, *, sharpness: float, position: float, power: float) -> Tensor:
    """The network's P times a power of what attention over the labelled pixels says."""
    one_step = Completion(sharpness=sharpness, position=position, steps=1)
    share = 1 / sample.logits.shape[1]
    attention = one_step(sample.decoder, sample.labels, torch.zeros_like(sample.logits)) + share  # the errors' start
    return sample.logits.softmax(1) * attention.clamp_min(1e-4) ** power


def methods(num_classes: int, settings: dict[str, Any]) -> dict[str, Method]:
    """Every row of the table with its settings: first those that need no network."""
    C, chosen = num_classes, settings

    def attention(s: Sample) -> Tensor:
        zeros = s.backbone.new_zeros(1, C, *s.backbone.shape[-2:])
        return Completion(**chosen["attention"])(s.backbone, s.labels, zeros)

    def discriminant(s: Sample) -> Tensor:
        return classify(s.backbone, s.labels, C, **chosen["discriminant"])

    def trained(*sizes: Sample) -> Tensor:
        logits = [tuned_classifier(s, **chosen["last layer"]) for s in sizes]
        return mean_logits(logits, sizes[-1].logits.shape[-2:])

    def corrected(s: Sample) -> Tensor:
        return Completion(**chosen["corrected"])(s.decoder, s.labels, s.logits)

    return {
        "nearest labelled pixel": lambda s, _: nearest(s, C),
        "label spreading, backbone": lambda s, _: label_spreading(s, C, **chosen["label spreading"]),
        "attention, backbone": lambda s, _: attention(s),
        "ridge, backbone": lambda s, _: ridge(s, C, **chosen["ridge"]),
        "discriminant, backbone": lambda s, _: discriminant(s),
        f"discriminant, backbone{LARGER}": lambda _, larger: discriminant(larger),
        "discriminant, network": lambda s, _: classify(s.decoder, s.labels, C, **chosen["discriminant, network"]),
        "network alone": lambda s, _: s.logits,
        f"network alone{BOTH}": lambda _, larger: larger.logits,
        "last layer trained on the clicks": lambda s, _: trained(s),
        f"last layer trained on the clicks{BOTH}": trained,
        "network times attention": lambda s, _: product(s, **chosen["product"]),
        "network corrected by attention": lambda s, _: corrected(s),
        f"network corrected by attention{BOTH}": lambda _, larger: corrected(larger),
        f"{CLOSED}network alone": lambda s, _: s.closed.logits,
        f"{CLOSED}network alone{BOTH}": lambda _, larger: larger.closed.logits,
        f"{CLOSED}last layer trained on the clicks": lambda s, _: only_labelled(trained(s), s.clicks),
        f"{CLOSED}last layer trained on the clicks{BOTH}": lambda s, larger: only_labelled(
            trained(s, larger), s.clicks
        ),
        f"{CLOSED}network times attention": lambda s, _: product(s.closed, **chosen["product"]),
        f"{CLOSED}network corrected by attention": lambda s, _: corrected(s.closed),
        f"{CLOSED}network corrected by attention{BOTH}": lambda _, larger: corrected(larger.closed),
    }


def grids() -> dict[str, tuple[str, list[dict[str, Any]]]]:
    """For each name in the settings the row that it is chosen by, and what is tried."""

    def every(**options: Sequence[Any]) -> list[dict[str, Any]]:
        return [dict(zip(options, values, strict=True)) for values in itertools.product(*options.values())]

    shrinkage = [0.1, 1.0, 10.0, 100.0]
    return {
        "label spreading": ("label spreading, backbone", every(neighbors=[10, 30, 100], alpha=[0.2, 0.8])),
        "attention": ("attention, backbone", every(sharpness=[20.0, 40.0], position=[0.0, 0.5, 1.0], steps=[1])),
        "ridge": ("ridge, backbone", every(shrinkage=shrinkage, balance=[0.5])),
        "discriminant": ("discriminant, backbone", every(shrinkage=shrinkage)),
        "discriminant, network": ("discriminant, network", every(shrinkage=shrinkage)),
        "last layer": ("last layer trained on the clicks", every(steps=[3, 10, 30], lr=[0.03, 0.1, 0.3])),
        "product": (
            "network times attention", every(sharpness=[20.0, 40.0], position=[0.5], power=[0.25, 0.5, 1.0])
        ),
        "corrected": (
            "network corrected by attention", every(sharpness=[20.0, 40.0], position=[0.5, 1.0], steps=[2, 3, 5])
        ),
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


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
            cells = (_with_spread(gain, "+", of_mean=True) for gain in gains)
            lines.append(f"| *{method}* over *{control}* | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def _with_spread(values: np.ndarray, sign: str = "", *, of_mean: bool = False) -> str:
    """Mean and standard deviation, or the standard error of the mean; of one value that alone."""
    values = values[np.isfinite(values)]
    mean = f"{values.mean():{sign}.1f}"
    return mean if len(values) < 2 else f"{mean} ± {values.std(ddof=1) / (len(values) if of_mean else 1) ** 0.5:.1f}"
