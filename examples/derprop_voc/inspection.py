"""`inspect`: what a data set and a partition hold, after the checks that training makes."""

import argparse
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from .cache import grid_of_features
from .config import add_config_arguments, config_from_arguments
from .data import Data, check_image, find_places, load_data, read_mask, shape_warning
from .sources import VOID, Item, find_source
from .split import checksum

Sizes = Mapping[str, Sequence[tuple[int, int]]]  # name of a list -> width and height of each image


@dataclass(frozen=True)
class Labels:
    """What the masks of one list hold; arrays have one entry for each of the 256 ids."""

    pixels: np.ndarray
    images: np.ndarray

    @property
    def shares(self) -> np.ndarray:
        """Percent of all pixels, void included."""
        return 100 * self.pixels / self.pixels.sum()


def add_inspect_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `inspect`: those of `train`."""
    add_config_arguments(parser)


def inspect_command(arguments: argparse.Namespace) -> None:
    """Prints the lists' lengths, image sizes and checksum, and the labels' histogram."""
    config = config_from_arguments(arguments)
    data = load_data(config)
    places = find_places(config, find_source(config))
    print(f"partition  {places.labeled.parent}\nvalidation {places.val}\nsha256     {checksum(places.labeled.parent)}")
    lists = {"labeled": data.labeled, "unlabeled": data.unlabeled, "val": data.val}
    sizes = {name: [check_image(item.image) for item in items] for name, items in lists.items()}
    print(f"\n{size_table(sizes)}\n\n{label_table(data)}")
    both = {item.image for item in data.labeled} & {item.image for item in data.unlabeled}
    if both:
        print(f"note: {len(both)} labelled images are in the unlabelled list, too")
    if config.image_size:
        print(shape_warning(itertools.chain(*sizes.values()), config.image_size), end="")
    if config.cache_features:
        grid_of_features(config, [*data.labeled, *data.unlabeled, *data.val])


def size_table(sizes: Sizes) -> str:
    """Number and sizes of the images of each list."""
    lines = [f"{'list':10}{'images':>8}   {'width min/median/max':>21}   {'height min/median/max':>21}"]
    for name, of_list in sizes.items():
        width, height = (_range(edges) for edges in zip(*of_list, strict=True)) if of_list else ("-", "-")
        lines.append(f"{name:10}{len(of_list):8}   {width:>21}   {height:>21}")
    return "\n".join(lines)


def label_table(data: Data) -> str:
    """Each class's share of pixels and number of images, and a warning for classes that nothing labels."""
    labeled, val = count_labels(data.labeled), count_labels(data.val)
    wide = max(5, *(len(name) for name in data.class_names))
    lines = [
        f"{'':3}  {'':{wide}}  {'labeled':>17}  {'val':>17}",
        f"{'id':>3}  {'class':{wide}}  {'pixels':>9}{'images':>8}  {'pixels':>9}{'images':>8}",
    ]
    for index, name in [*enumerate(data.class_names), (VOID, "void")]:
        cells = (f"{part.shares[index]:7.2f} %{part.images[index]:8}" for part in (labeled, val))
        lines.append(f"{index:3}  {name:{wide}}  {'  '.join(cells)}")
    absent = [name for index, name in enumerate(data.class_names) if not labeled.images[index]]
    if absent:
        lines.append(f"warning: no labelled image contains {', '.join(absent)}")
    return "\n".join(lines)


def count_labels(items: Sequence[Item]) -> Labels:
    """Pixels of each id over all masks, and the number of masks that hold it."""
    counts = [np.bincount(read_mask(item).ravel(), minlength=VOID + 1) for item in items]
    return Labels(np.sum(counts, axis=0), np.count_nonzero(counts, axis=0))


def _range(edges: Sequence[int]) -> str:
    low, high = min(edges), max(edges)
    return str(low) if low == high else f"{low} / {median(edges):g} / {high}"
