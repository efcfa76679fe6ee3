"""What `clicks`, `clips` and `edges` share: finished runs, their images with features, and results to go on from."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from .cache import CachedFeatures, cache_place, fill_cache, grid_of_features, read_cache
from .choice import Finished, add_threads_argument, check_not_trained_on, load_finished, make_device
from .data import Item, load_data
from .errors import ConfigError
from .files import versions
from .frozen import FrozenNetwork

CHOSEN_ON = 40  # images


@dataclass(frozen=True)
class Images:
    """Images of one data set with their cached features and a network."""

    name: str
    network: FrozenNetwork
    num_classes: int
    items: list[Item]
    cached: CachedFeatures

    def describe(self, item: Item) -> tuple[Tensor, Tensor, Tensor]:
        """The backbone's features (1, K, h, w), the network's V (1, D, h, w), and its logits on their grid."""
        features = self.cached[item.image][None].float()
        decoder = self.network(features).feats
        return features, decoder, self.network.classifier(decoder)


def run_name(finished: Finished) -> str:
    """The name of a run's folder, by which results are kept."""
    return finished.path.resolve().parent.name


def frozen_network(finished: Finished) -> FrozenNetwork:
    """The network that a run is tested with.

    Raises:
        ConfigError: where its backbone was trained.
    """
    network = finished.network("tested")
    if not isinstance(network, FrozenNetwork):
        raise ConfigError(f"runs: expected runs with a frozen backbone, got {finished.path}")
    return network


def images_of(finished: Finished, items: Sequence[Item], *, enlarge: int = 1) -> Images:
    """These images, so many times larger, with what of their features is missing computed."""
    network, config = frozen_network(finished), finished.config
    if enlarge != 1:
        size, _ = grid_of_features(config, items)
        config = replace(config, image_size=tuple(enlarge * edge for edge in size))
    place = cache_place(config, items, network)
    fill_cache(place, config, items, network)
    return Images(run_name(finished), network, len(finished.class_names), list(items), read_cache(place))


def make_images(finished: Finished, *, chosen: bool, count: int = CHOSEN_ON) -> Images:
    """So many validation images of a run, or of its unlabelled training images with masks, spread evenly; 0: all."""
    config = finished.config
    data = load_data(replace(config, variant="no_propagation") if chosen else config)
    seen = {item.image for item in data.labeled}  # a published list may hold an image twice
    unseen = [item for item in data.unlabeled if item.mask.is_file() and item.image not in seen]
    items = unseen if chosen else data.val
    if not chosen:
        check_not_trained_on(finished, items, config, f"validation images of {config.partition}", "train again")
    if chosen and not items:
        raise ConfigError(f"runs: expected masks for some unlabelled images of {config.data}, to choose settings by")
    if 0 < count < len(items):
        items = [items[i] for i in np.linspace(0, len(items) - 1, count).round().astype(int)]
    return images_of(finished, items)


def add_measuring_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of all three commands."""
    parser.add_argument(
        "--runs", type=Path, nargs="+", required=True, metavar="FOLDER",
        help="finished runs with a frozen backbone; settings are chosen on the first one's data, several of one data "
        "set are averaged",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="for JSON and a table")
    add_threads_argument(parser)


def begin(arguments: argparse.Namespace, kind: str, **asked: Any) -> tuple[list[Finished], Path, dict[str, Any]]:
    """The runs, the JSON file of a command, and what an interrupted call with the same runs and options left there.

    Raises:
        ConfigError: for two runs or two data sets of one name, and for a file that another call has left or that is
            damaged.
    """
    runs = load_finished([folder / "latest.pt" for folder in arguments.runs], make_device("cpu", arguments.threads))
    names = [run_name(run) for run in runs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"runs: expected folders of different names, by which results are kept, got {twice} twice")
    places: dict[str, Path] = {}
    for run in runs:
        place = Path(run.config.data).resolve()
        if places.setdefault(place.name, place) != place:
            raise ConfigError(
                f"runs: expected data sets of different names, by which results are kept, got {places[place.name]} "
                f"and {place}"
            )
    call = {"runs": {name: run.digest[:12] for name, run in zip(names, runs, strict=True)}, **asked}
    path = arguments.out / f"{kind}.json"
    if not path.is_file():
        return runs, path, {"versions": versions(), "call": call}
    try:
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise ConfigError(f"out: {path} is no whole JSON file; take another folder, or remove it") from None
    if result.get("call") != call:
        raise ConfigError(f"out: {path} holds results of other runs or options; take another folder, or remove it")
    return runs, path, result
