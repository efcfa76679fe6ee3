"""Segmentation data in VOC layout: lists, checks that run before training, and the datasets.

A list holds one image a line: a bare id, or `JPEGImages/x.jpg SegmentationClass/x.png` relative to the folder.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as TF

from .config import Config

VOID = 255
IMAGE_SUFFIXES = (".jpg", ".png", ".jpeg")
Sample = dict[str, Any]


class DataError(ValueError):
    """Data that cannot be trained on; the message names the file, what was found and what was expected."""


@dataclass(frozen=True)
class Item:
    """One line of a list. `mask` is a path that unlabelled images need not have."""

    name: str
    image: Path
    mask: Path


@dataclass(frozen=True)
class Data:
    """Checked lists of one partition and the class names."""

    labeled: list[Item]
    unlabeled: list[Item]
    val: list[Item]
    class_names: tuple[str, ...]


def load_data(config: Config) -> Data:
    """Reads the lists and checks every file they name.

    Raises:
        DataError: at the first missing file, empty list, mask of another mode or size, or label out of range.
    """
    root = Path(config.data)
    if not config.data or not root.is_dir():
        raise DataError(f"{root}: expected a folder in VOC layout (option data), found none")
    lists = root / "ImageSets" / "Segmentation"
    labeled = read_list(lists / config.partition / "labeled.txt", root)
    unlabeled = [] if config.variant == "supervised" else read_list(lists / config.partition / "unlabeled.txt", root)
    val = read_list(lists / "val.txt", root)

    names = config.class_names or _names_file(root / "classes.txt")
    if config.num_classes and names and len(names) != config.num_classes:
        raise DataError(
            f"{root / 'classes.txt'}: expected num_classes = {config.num_classes} lines, found {len(names)}"
        )
    known = config.num_classes or len(names)
    for item in unlabeled:
        check_image(item.image)
    highest = max(check_mask(item, known or VOID) for item in labeled)
    if highest < 0:
        raise DataError(f"{lists / config.partition / 'labeled.txt'}: expected labelled pixels, found only void (255)")
    names = names or tuple(str(index) for index in range(known or highest + 1))
    for item in val:
        check_mask(item, len(names))
    return Data(labeled, unlabeled, val, names)


def read_list(path: Path, root: Path) -> list[Item]:
    """The items of one list file."""
    if not path.is_file():
        raise DataError(f"{path}: expected a list of images, found no such file")
    lines = path.read_text(encoding="utf-8").splitlines()
    items = [
        _item(line.split(), root, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()
    ]
    if not items:
        raise DataError(f"{path}: expected one image a line, found an empty list")
    return items


def _item(words: Sequence[str], root: Path, place: str) -> Item:
    if len(words) > 2:
        raise DataError(f"{place}: expected an id, or an image and a mask, found {len(words)} words")
    first = words[0].lstrip("/")  # some published lists start their paths with a slash
    name = Path(first).stem if Path(first).suffix in IMAGE_SUFFIXES else first
    mask = root / words[1].lstrip("/") if len(words) == 2 else root / "SegmentationClass" / f"{name}.png"
    if name != first:
        return Item(name, root / first, mask)
    candidates = [root / "JPEGImages" / f"{name}{suffix}" for suffix in IMAGE_SUFFIXES]
    return Item(name, next((path for path in candidates if path.is_file()), candidates[0]), mask)


def _names_file(path: Path) -> tuple[str, ...]:
    return tuple(path.read_text(encoding="utf-8").split("\n")[:-1]) if path.is_file() else ()


def check_image(path: Path) -> tuple[int, int]:
    """Width and height of an image that exists and opens."""
    if not path.is_file():
        raise DataError(f"{path}: expected an image, found no such file")
    try:
        with Image.open(path) as image:
            return image.size
    except OSError:
        raise DataError(f"{path}: expected an image, found a file that does not open as one") from None


def check_mask(item: Item, num_classes: int) -> int:
    """The highest label of an item's mask, -1 when all of it is void; checks mode, size and range."""
    size = check_image(item.image)
    if not item.mask.is_file():
        raise DataError(f"{item.mask}: expected the mask of {item.image.name}, found no such file")
    labels = read_mask(item.mask)
    if labels.shape[::-1] != size:
        found, expected = "x".join(map(str, labels.shape[::-1])), "x".join(map(str, size))
        raise DataError(f"{item.mask}: expected the image's size {expected}, found {found} (width x height)")
    ids = labels[labels != VOID]
    highest = int(ids.max(initial=0)) if ids.size else -1
    if highest >= num_classes:
        raise DataError(
            f"{item.mask}: expected labels 0 to {num_classes - 1} or {VOID} (option num_classes), found {highest}"
        )
    return highest


def read_mask(path: Path) -> np.ndarray:
    """(H, W) uint8 ids; a palette's indices are the ids, its colours are not looked at."""
    try:
        with Image.open(path) as mask:
            if mask.mode not in ("P", "L"):
                raise DataError(f"{path}: expected a PNG of ids, with a palette or 8-bit gray, found mode {mask.mode}")
            return np.array(mask)
    except OSError:
        raise DataError(f"{path}: expected a PNG mask, found a file that does not open as one") from None


def read_image(path: Path, size: Sequence[int] = ()) -> tv_tensors.Image:
    """(3, H, W) uint8 image, resized to `size` (height, width) if given."""
    try:
        with Image.open(path) as stored:
            image = tv_tensors.Image(TF.pil_to_tensor(stored.convert("RGB")))
    except OSError as error:  # the checks before training read headers only
        raise DataError(f"{path}: expected a whole image, found: {error}") from None
    return TF.resize(image, list(size), antialias=True) if size else image


class SegmentationDataset(Dataset[Sample]):
    """Samples of one list; `transform` runs under a random state of its own.

    An index is an integer, or a pair (integer, seed): then the sample is a function of the pair alone, whatever the
    number of worker processes and whatever was drawn before it.

    Args:
        items: lines of a list.
        labeled: whether samples carry `mask`.
        size: working (height, width) of images, and of masks unless `stored_mask`; empty: as stored.
        stored_mask: keep masks at their stored size, for evaluation.
        transform: called with {"image", "mask", "valid"}, where `valid` is 1 on image and becomes 0 on padding.
        cache: keep decoded samples.
    """

    def __init__(
        self,
        items: Sequence[Item],
        *,
        labeled: bool,
        size: Sequence[int] = (),
        stored_mask: bool = False,
        transform: Callable[[Sample], Sample] | None = None,
        cache: bool = False,
    ) -> None:
        self.items, self.labeled, self.size, self.stored_mask = list(items), labeled, tuple(size), stored_mask
        self.transform = transform
        self.decoded: dict[int, Sample] | None = {} if cache else None

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int | tuple[int, int]) -> Sample:
        index, seed = index if isinstance(index, tuple) else (index, None)
        sample = dict(self._decode(index))
        if self.transform is not None:
            with torch.random.fork_rng(devices=[]):
                if seed is not None:
                    torch.manual_seed(seed)
                sample = self.transform(sample)
        return sample | {"name": self.items[index].name}

    def _decode(self, index: int) -> Sample:
        if self.decoded is not None and index in self.decoded:
            return self.decoded[index]
        item = self.items[index]
        image = read_image(item.image, self.size)
        sample: Sample = {"image": image, "valid": tv_tensors.Mask(torch.ones(image.shape[-2:], dtype=torch.uint8))}
        if self.labeled:
            mask = tv_tensors.Mask(torch.from_numpy(read_mask(item.mask)))
            resize = self.size and not self.stored_mask
            sample["mask"] = TF.resize(mask, list(self.size)) if resize else mask
        if self.decoded is not None:
            self.decoded[index] = sample
        return sample


class SeededBatches(Sampler[list[tuple[int, int]]]):
    """Batches of (index, seed) for `SegmentationDataset`: endless shuffled passes, cut at `steps` batches.

    Batch k depends on `seed` and k only, so a run can start at any step.

    Args:
        length: number of samples.
        batch_size: samples a batch.
        steps: the batch to stop before.
        seed: seed of order and augmentation.
        start: the first batch to give.
    """

    def __init__(self, length: int, *, batch_size: int, steps: int, seed: int, start: int = 0) -> None:
        self.length, self.batch_size, self.steps, self.seed, self.start = length, batch_size, steps, seed, start

    def __len__(self) -> int:
        return max(0, self.steps - self.start)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.start, self.steps):
            places = range(step * self.batch_size, (step + 1) * self.batch_size)
            yield [(self._index(place), _mixed(self.seed, 1, place)) for place in places]

    def _index(self, place: int) -> int:
        epoch, position = divmod(place, self.length)
        return int(np.random.default_rng((self.seed, 0, epoch)).permutation(self.length)[position])


def _mixed(*numbers: int) -> int:
    """One 63-bit seed from several numbers, without the overlaps that a sum would have."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def collate(samples: Sequence[Sample]) -> dict[str, Tensor | list[str]]:
    """Stacks tensors; `name` becomes a list, `valid` bool and `mask` int64."""
    batch: dict[str, Tensor | list[str]] = {"name": [sample["name"] for sample in samples]}
    for key in samples[0].keys() - {"name"}:
        stacked = torch.stack([sample[key].as_subclass(Tensor) for sample in samples])
        batch[key] = stacked.bool() if key == "valid" else stacked.long() if key == "mask" else stacked
    return batch
