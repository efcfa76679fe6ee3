"""Segmentation data: checks that run before training, and the datasets.

Headers and ends of all images are checked, and the masks of labelled and validation images as a whole: seconds for
thousands of images. Damage in the middle of an image shows when it is read, as the same one-line error.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as TF

from .config import Config
from .errors import DataError
from .sources import HIGHEST_LABEL_ID, TRAIN_IDS, VOID, Item, Source, find_source, folder_item, read_lines

# How a whole file ends. One that ends in another way is decoded to find out: bytes after the end are allowed.
ENDINGS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}
Sample = dict[str, Any]


@dataclass(frozen=True)
class Data:
    """Checked lists of one partition and the class names."""

    labeled: list[Item]
    unlabeled: list[Item]
    val: list[Item]
    class_names: tuple[str, ...]

    @property
    def digest(self) -> str:
        """Of both training lists."""
        return digest((self.labeled, self.unlabeled))


def digest(lists: Iterable[Sequence[Item]]) -> str:
    """SHA-256 of the ids of both training lists, in order: what the order of batches stands on."""
    names = [[item.name for item in items] for items in lists]
    return hashlib.sha256(json.dumps(names).encode()).hexdigest()


@dataclass(frozen=True)
class Places:
    """The lists of one partition; `val` may be a folder of images."""

    labeled: Path
    unlabeled: Path
    val: Path


def load_data(config: Config) -> Data:
    """Reads the lists and checks every file they name.

    An image may be in both training lists, as in some published ones, but not in a training list and in validation.

    Raises:
        DataError: at the first missing or truncated file, empty list, validation image that is trained on, mask of
            another mode or size, or label out of range.
    """
    source = find_source(config)
    places = find_places(config, source)
    if not places.val.exists():
        raise DataError(
            f"{places.val}: expected a list of validation images, found none, nor a val.txt in {places.labeled.parent}"
            "; hold labelled images out (command split, --val)"
        )
    lists, val = training_lists(config, source), read_list(places.val, source.root, source.item)
    labeled, unlabeled = lists.values()
    validated = {item.image for item in val}
    for place, items in lists.items():
        leaked = next((item.name for item in items if item.image in validated), None)
        if leaked is not None:
            raise DataError(f"{place}: expected no image of the validation list {places.val}, found {leaked} in both")

    known = config.num_classes or len(source.class_names)
    highest = max(check_mask(item, known or VOID, source.missing_mask) for item in labeled)
    if highest < 0:
        raise DataError(f"{places.labeled}: expected labelled pixels, found only void ({VOID})")
    names = source.class_names or tuple(str(index) for index in range(known or highest + 1))
    if len(names) < 2:
        raise DataError(
            f"{places.labeled}: expected two classes or more, found {', '.join(names)} alone; {VOID} is void and no "
            "class, so masks of 0 and 255 hold one"
        )
    if max(check_mask(item, len(names), source.missing_mask) for item in val) < 0:
        raise DataError(f"{places.val}: expected labelled pixels, found only void ({VOID})")
    measured = config.measure_pseudo_labels and all(item.mask.is_file() for item in unlabeled)
    for item in unlabeled:
        if measured:
            check_mask(item, len(names))
        else:
            check_image(item.image)
    return Data(labeled, unlabeled, val, names)


def find_places(config: Config, source: Source) -> Places:
    """The lists of a config's partition; its own val.txt wins over one beside it, and that over the data set's."""
    folder = source.partition(config.partition)
    own = [path for path in (folder / "val.txt", folder.parent / "val.txt") if path.is_file()]
    return Places(folder / "labeled.txt", folder / "unlabeled.txt", [*own, source.val][0])


def training_lists(config: Config, source: Source) -> dict[Path, list[Item]]:
    """What a run trains on, with and without labels; of a supervised one the second list is empty."""
    places = find_places(config, source)
    unlabeled = [] if config.variant == "supervised" else read_list(places.unlabeled, source.root, source.item)
    return {places.labeled: read_list(places.labeled, source.root, source.item), places.unlabeled: unlabeled}


def check_unseen(items: Sequence[Item], lists: Mapping[Path, Sequence[Item]], where: str, way_out: str) -> None:
    """Raises `DataError` for an image to be scored that is in one of the lists of `training_lists`."""
    for place, trained in lists.items():
        known = {item.image.resolve() for item in trained}
        seen = [item.name for item in items if item.image.resolve() in known]
        if seen:
            raise DataError(
                f"{where}: expected images that the network was not trained on, found {len(seen)} of {place}, "
                f"{seen[0]} the first; {way_out}"
            )


def read_list(place: Path, root: Path, item: Callable[[Path, Sequence[str]], Item] = folder_item) -> list[Item]:
    """The items of one list; their paths are relative to `root`."""
    return [item(root, words) for words in read_lines(place)]


def check_image(path: Path) -> tuple[int, int]:
    """Width and height of an image that exists, opens, is not cut off and has 8 bits a channel; as it is shown."""
    if not path.is_file():
        raise DataError(f"{path}: expected an image, found no such file")
    with _opened(path, "an image") as image:
        if not _is_whole(path, image.format):
            image.load()
        if image.mode.startswith(("I", "F")):  # whose range says nothing of the picture's
            raise DataError(
                f"{path}: expected an image of 8 bits a channel, found mode {image.mode}; scale it to these"
            )
        return image.size[::-1] if _orientation(image) >= 5 else image.size


def shape_warning(sizes: Iterable[tuple[int, int]], image_size: Sequence[int]) -> str:
    """A line, if resizing to (height, width) changes the shape of most images, (width, height), by over a quarter."""
    height, width = image_size
    wanted, stored = width / height, median(w / h for w, h in sizes)
    if max(wanted / stored, stored / wanted) <= 1.25:
        return ""
    swapped = 1 / wanted
    way_out = f"; is {width} {height} meant?" if max(swapped / stored, stored / swapped) <= 1.25 else ""
    return (
        f"warning: image_size {height} {width} (height, width) makes images {wanted:.2f} times as wide as high, "
        f"and they are {stored:.2f} times{way_out}\n"
    )


def _orientation(image: Image.Image) -> int:
    """What a camera noted, 1 to 8, from 5 on with the sides exchanged; a PNG would have to be decoded for it."""
    return 1 if image.format == "PNG" else int(image.getexif().get(ExifTags.Base.Orientation, 1))


def _is_whole(path: Path, format_name: str | None) -> bool:
    ending = ENDINGS.get(format_name or "", b"")
    with path.open("rb") as stream:
        stream.seek(-len(ending), os.SEEK_END)
        return bool(ending) and stream.read() == ending


def check_mask(item: Item, num_classes: int, way_out: str = "") -> int:
    """The highest label of an item's mask, -1 when all of it is void; checks mode, size and range."""
    size = check_image(item.image)
    if not item.mask.is_file():
        raise DataError(f"{item.mask}: expected the mask of {item.image.name}, found no such file{way_out}")
    labels = read_mask(item)
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


def read_mask(item: Item) -> np.ndarray:
    """(H, W) uint8 ids; a palette's indices are the ids, its colours are not looked at."""
    with _opened(item.mask, "a PNG mask") as mask:
        # Gray of 2 or 4 bits would be read as shades up to 255, and no ids.
        stored = str(mask.tile[0][3]) if mask.format == "PNG" and mask.mode == "L" and mask.tile else mask.mode
        if stored not in ("P", "L"):
            first = "of colours make ids first, with a comparison for each class, and " if "RGB" in mask.mode else ""
            raise DataError(
                f"{item.mask}: expected a PNG of ids, with a palette or 8-bit gray, found mode {stored}; {first}"
                "save them by PIL.Image.fromarray(ids.astype('uint8')).save"
            )
        labels = np.array(mask)
    if not item.label_ids:
        return labels
    highest = labels[labels != VOID].max(initial=0)
    if highest > HIGHEST_LABEL_ID:
        raise DataError(
            f"{item.mask}: expected Cityscapes' label ids 0 to {HIGHEST_LABEL_ID} or {VOID}, found {highest}"
        )
    return TRAIN_IDS[labels]


def read_image(path: Path, size: Sequence[int] = ()) -> tv_tensors.Image:
    """(3, H, W) uint8 image as its EXIF orientation shows it, resized to `size` (height, width) if given."""
    with _opened(path, "an image") as stored:
        shown = stored if _orientation(stored) == 1 else ImageOps.exif_transpose(stored)
        image = tv_tensors.Image(TF.pil_to_tensor(shown.convert("RGB")))
    return TF.resize(image, list(size), antialias=True) if size else image


@contextmanager
def _opened(path: Path, expected: str) -> Iterator[Image.Image]:
    """An open image; what goes wrong inside the block is an error of its file."""
    try:
        with Image.open(path) as image:
            yield image
    except UnidentifiedImageError:
        raise DataError(f"{path}: expected {expected}, found a file that does not open as one") from None
    except DataError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # Pillow, of a PNG's chunks
        raise DataError(f"{path}: expected {expected} that is whole, found: {error}") from None


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
        features: an image's file -> the features that stand in its place as "image"; then `size` must be given.
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
        features: Mapping[Path, Tensor] | None = None,
    ) -> None:
        self.features = features
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
                    torch.default_generator.manual_seed(seed)  # torch.manual_seed would reach CUDA's generators, too
                sample = self.transform(sample)
        return sample | {"name": self.items[index].name}

    def _decode(self, index: int) -> Sample:
        if self.decoded is not None and index in self.decoded:
            return self.decoded[index]
        item = self.items[index]
        image = read_image(item.image, self.size) if self.features is None else self.features[item.image]
        worked = image.shape[-2:] if self.features is None else self.size
        sample: Sample = {"image": image, "valid": tv_tensors.Mask(torch.ones(worked, dtype=torch.uint8))}
        if self.labeled:
            mask = tv_tensors.Mask(torch.from_numpy(read_mask(item)))
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
        part: the places of each batch that this process takes.
    """

    def __init__(
        self, length: int, *, batch_size: int, steps: int, seed: int, start: int = 0, part: slice = slice(None)
    ) -> None:
        self.length, self.batch_size, self.steps, self.seed, self.start = length, batch_size, steps, seed, start
        self.part = part

    def __len__(self) -> int:
        return max(0, self.steps - self.start)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.start, self.steps):
            places = range(step * self.batch_size, (step + 1) * self.batch_size)[self.part]
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
