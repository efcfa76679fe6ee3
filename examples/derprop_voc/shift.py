"""`shift`: what statistics of new images are worth to a trained network, without a label and without training.

Networks are tested on the validation images of their own data set or of another one, whose classes are mapped. P is
compared with logit adjustment, with the discriminant and with its mean with P, by class shares and statistics of each
image alone, of groups of consecutive images, and of all. No option is chosen here.
"""

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dlprop import DerivativeLabelPropagation
from dlprop.affinity import Discriminant
from dlprop.statistics import ClassStatistics

from .choice import Finished
from .config import read_yaml
from .data import VOID, check_mask, find_places, read_list, read_mask
from .errors import ConfigError, DataError
from .evaluate import confusion, labels_at, mean_iou
from .files import write_bytes, write_json
from .measuring import Images, add_measuring_arguments, begin, images_of, run_name
from .model import Output
from .pooled import shares
from .progress import make_bar
from .rectification import adjusted
from .sources import find_source

GROUPS = (1, 4, 16, 0)  # images; 0: all
PSEUDO_COUNTS = 10.0  # what `choose` found on CamVid


@dataclass(frozen=True)
class ClassMap:
    """Classes of a network and of masks brought to common ones.

    Attributes:
        names: of the T common classes.
        merge: (T, C), 1 where a class of the network counts as a common one.
        ids: (256,), common class of an id in a mask, or void.
    """

    names: tuple[str, ...]
    merge: Tensor
    ids: Tensor

    def probabilities(self, logits: Tensor) -> Tensor:
        """(N, T, H, W): of each common class the sum over the network's classes, of logits (N, C, H, W)."""
        return torch.einsum("tc,nchw->nthw", self.merge, logits.softmax(1))


def make_map(values: Mapping[str, Any], source: Sequence[str], target: Sequence[str]) -> ClassMap:
    """The map that a file says; an empty one leaves all classes as they are.

    Args:
        values: `source` and perhaps `target`: class name -> common name.
        source: the network's classes, in id order.
        target: the masks' classes.

    Raises:
        ConfigError: for other keys, classes that are not there, and common classes that only one side has.
    """
    for name in values:
        if name not in ("source", "target"):
            raise ConfigError(f"map: expected the keys source and target, got {name}")
    if not values and tuple(source) != tuple(target):
        raise ConfigError(
            f"map: the network has the classes {', '.join(source)}, the data {', '.join(target)}; map them with --map"
        )
    sides: dict[str, dict[str, str]] = {}
    for side, known in (("source", source), ("target", target)):
        given = values.get(side, {name: name for name in known})
        if not isinstance(given, dict) or not given:
            raise ConfigError(f"map: {side}: expected 'class: common class' lines, got {given!r}")
        for name in given:
            if name not in known:
                raise ConfigError(f"map: {side}: expected classes among {', '.join(known)}, got {name}")
        sides[side] = {str(name): str(common) for name, common in given.items()}
    common = tuple(dict.fromkeys(sides["target"][name] for name in target if name in sides["target"]))
    for name in sides["source"].values():
        if name not in common:
            raise ConfigError(f"map: source: expected common classes of the masks, {', '.join(common)}, got {name}")
    missing = [name for name in common if name not in sides["source"].values()]
    if missing:
        raise ConfigError(
            f"map: no class of the network counts as {', '.join(missing)}; leave its classes out of target"
        )
    merge, ids = torch.zeros(len(common), len(source)), torch.full((256,), VOID)
    for name, to in sides["source"].items():
        merge[common.index(to), list(source).index(name)] = 1
    for name, to in sides["target"].items():
        ids[list(target).index(name)] = common.index(to)
    return ClassMap(common, merge, ids)


# --- images and groups -----------------------------------------------------------------------------------------------


def find_images(
    run: Finished, data: str, size: Sequence[int], count: int, values: Mapping[str, Any]
) -> tuple[Images, ClassMap]:
    """The first `count` validation images (0: all) of a run's data set or another one, and the map of classes."""
    config = replace(run.config, image_size=tuple(size) or run.config.image_size, feature_crop=())  # no crops here
    if data:
        config = replace(config, dataset="folder", data=data, num_classes=0, class_names=(), sbd=False, download=False)
    source = find_source(config)
    val = source.val if data else find_places(config, source).val
    items = read_list(val, source.root, source.item)
    items = items[:count] if count else items
    names = source.class_names or run.class_names
    if data and not source.class_names and values:
        raise DataError(f"{source.root / 'classes.txt'}: expected the classes that --map names, found none")
    for item in items:
        check_mask(item, len(names), source.missing_mask)
    return images_of(replace(run, config=config), items), make_map(values, run.class_names, names)


def groups_of(count: int, size: int) -> list[slice]:
    """Consecutive groups of so many images, the last one smaller perhaps; size 0: one of all."""
    size = size or count
    return [slice(start, min(count, start + size)) for start in range(0, count, size)]


def forward(images: Images, index: int) -> Output:
    """The network on an image's cached features."""
    output: Output = images.network(images.cached[images.items[index].image][None].float())
    return output


def group_statistics(images: Images) -> dict[int, list[ClassStatistics]]:
    """For every size of `GROUPS` but 1 the statistics of each group, in one pass."""
    n = len(images.items)
    channels = images.network.classifier[-1].in_channels
    found = {
        size: [ClassStatistics(images.num_classes, channels) for _ in groups_of(n, size)]
        for size in GROUPS
        if size != 1
    }
    with make_bar(n, f"{images.name}: statistics") as bar:
        for index in range(n):
            own = ClassStatistics(images.num_classes, channels)
            own.update(*forward(images, index))
            for size, groups in found.items():
                groups[index // (size or n)].merge(own)
            bar.update()
    return found


def row_name(method: str, size: int) -> str:
    """Of the table."""
    return f"{method}, {'all images' if size == 0 else 'each image' if size == 1 else f'{size} images'}"


def measure(images: Images, classes: ClassMap, *, tau: float, shrinkage: float) -> dict[str, np.ndarray]:
    """The confusion matrix (T, T) of P and of the methods for every size of `GROUPS`, over all images."""
    statistics, n, T = group_statistics(images), len(images.items), len(classes.names)
    found: dict[str, np.ndarray] = {}
    with make_bar(n, f"{images.name}: scores") as bar:
        for index, item in enumerate(images.items):
            output = forward(images, index)
            truth = classes.ids[torch.from_numpy(read_mask(item)).long()]
            own = ClassStatistics(images.num_classes, output.feats.shape[1])
            own.update(*output)
            groups = {size: own if size == 1 else statistics[size][index // (size or n)] for size in GROUPS}
            rows = {"P": output.logits}
            for size, group in groups.items():
                rows[row_name("logit adjustment", size)] = adjusted(output.logits, shares(group), tau)
            affinities = {
                row_name("discriminant", size): Discriminant(shrinkage=shrinkage, statistics=group, across="stored")
                for size, group in groups.items()
            } | {
                f"discriminant, each image leaning on {size or 'all'}": Discriminant(
                    shrinkage=shrinkage, statistics=group, pseudo_counts=PSEUDO_COUNTS
                )
                for size, group in groups.items()
                if size != 1
            }
            for start, share in (("", 1.0), ("mean of P and ", 0.5)):
                for name, affinity in affinities.items():
                    blended = DerivativeLabelPropagation(affinity).rectify(*output, ramp=share)
                    rows[start + name] = blended.log()
            for name, logits in rows.items():
                counts = confusion(labels_at(classes.probabilities(logits), truth.shape), truth, T)
                found[name] = found[name] + counts if name in found else counts
            bar.update()
    return found


# --- the command -----------------------------------------------------------------------------------------------------


def add_shift_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `shift`."""
    add_measuring_arguments(parser)
    parser.add_argument(
        "--data", default="", metavar="FOLDER", help="a folder in VOC layout (default: each run's own data set)"
    )
    parser.add_argument("--map", type=Path, metavar="YAML", help="of classes, see configs/maps/camvid_to_idd.yaml")
    parser.add_argument(
        "--image-size", type=int, nargs=2, default=[], metavar=("H", "W"), help="working size (default: the run's)"
    )
    parser.add_argument("--images", type=int, default=0, help="the first so many of each list; 0: all")
    parser.add_argument("--tau", type=float, default=0.5, help="of logit adjustment (%(default)s)")
    parser.add_argument("--shrinkage", type=float, default=0.1, help="of the discriminant (%(default)s)")


@torch.no_grad()
def shift_command(arguments: argparse.Namespace) -> None:
    """Measures, and writes JSON and a table; goes on after the last run of an interrupted call."""
    for name, low in (("images", 0), ("tau", 0), ("shrinkage", 0)):
        if not low <= getattr(arguments, name) < math.inf:
            raise ConfigError(f"{name}: expected a number of at least {low}, got {getattr(arguments, name)}")
    values = read_yaml(arguments.map) if arguments.map else {}
    asked = {name: getattr(arguments, name) for name in ("data", "image_size", "images", "tau", "shrinkage")}
    runs, path, result = begin(arguments, "shift", map=values, **asked)
    figures = result.setdefault("figures", {})
    for run in runs:
        if run_name(run) in figures:
            continue
        images, classes = find_images(run, arguments.data, arguments.image_size, arguments.images, values)
        found = measure(images, classes, tau=arguments.tau, shrinkage=arguments.shrinkage)
        figures[run_name(run)] = {
            "trained": Path(run.config.data).name,
            "tested": Path(arguments.data or run.config.data).name,
            "images": len(images.items),
            "classes": list(classes.names),
            "miou": {name: round(float(mean_iou(counts)), 3) for name, counts in found.items()},
            "confusion": {name: counts.tolist() for name, counts in found.items()},
        }
        write_json(path, result)
    table = markdown(result)
    write_bytes(arguments.out / "shift.md", table.encode())
    print(table)


def markdown(result: Mapping[str, Any]) -> str:
    """For each pair of data sets mIoU averaged over runs, and the paired difference to P with its standard error."""
    call, blocks = result["call"], []
    of_pair: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for figures in result["figures"].values():
        of_pair.setdefault((figures["trained"], figures["tested"]), []).append(figures)
    for (trained, tested), several in of_pair.items():
        first = several[0]
        sizes = f"{first['images']} images, {len(first['classes'])} classes, networks: {len(several)}"
        lines = [
            f"### {trained} to {tested}: {sizes}",
            "",
            f"Tau {call['tau']:g}, shrinkage {call['shrinkage']:g}; mIoU in percent, mean over networks; difference to "
            "P ± its standard error over networks.",
            "",
            "| | mIoU | over P |",
            "|---|---|---|",
        ]
        for name in first["miou"]:
            values = np.array([figures["miou"][name] for figures in several])
            gains = values - [figures["miou"]["P"] for figures in several]
            cell = "" if name == "P" else f"{gains.mean():+.2f}"
            if name != "P" and len(gains) > 1:
                cell += f" ± {gains.std(ddof=1) / len(gains) ** 0.5:.2f}"
            lines.append(f"| {name} | {values.mean():.2f} | {cell} |")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"
