"""Where VOC 2012, SBD, Cityscapes and folders in VOC layout keep lists, images and masks, and how they get there.

A list holds one image a line: a bare id, or an image and its mask relative to the data set's folder.
"""

import io
import os
import tarfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision import datasets
from tqdm import tqdm

from .config import Config
from .errors import ConfigError, DataError
from .files import write_bytes
from .scenes import voc_palette

VOID = 255
IMAGE_SUFFIXES = (".jpg", ".png", ".jpeg")
VOC_CLASSES = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
VOC_MASKS, SBD_MASKS = "SegmentationClass", "SegmentationClassAug"

TRAIN_CLASSES = sorted(
    (entry for entry in datasets.Cityscapes.classes if entry.train_id not in (-1, VOID)), key=lambda c: c.train_id
)
TRAIN_IDS = np.full(256, VOID, np.uint8)  # Cityscapes' label id -> train id
TRAIN_IDS[[entry.id for entry in TRAIN_CLASSES]] = [entry.train_id for entry in TRAIN_CLASSES]
HIGHEST_LABEL_ID = max(entry.id for entry in datasets.Cityscapes.classes)
CITY_IMAGE, CITY_LABELS, CITY_TRAIN_LABELS = "_leftImg8bit", "_gtFine_labelIds.png", "_gtFine_labelTrainIds.png"


@dataclass(frozen=True)
class Item:
    """One line of a list.

    Attributes:
        name: the image's id.
        image: its file.
        mask: the file of its mask, which unlabelled images need not have.
        label_ids: whether the mask holds Cityscapes' label ids, which become train ids on reading.
    """

    name: str
    image: Path
    mask: Path
    label_ids: bool = False


@dataclass(frozen=True)
class Source:
    """Where a data set keeps its files.

    Attributes:
        root: folder that the paths in lists are relative to.
        item: makes an item from `root` and the words of a line.
        train: all training images: a list, or a folder of Cityscapes' images.
        val: the validation images of partitions that have no val.txt of their own; a list or a folder, too.
        class_names: in id order; empty where nothing names them.
        missing_mask: the way out for a labelled image that has no mask.
    """

    root: Path
    item: Callable[[Path, Sequence[str]], Item]
    train: Path
    val: Path
    class_names: tuple[str, ...]
    missing_mask: str = ""

    @property
    def lists(self) -> Path:
        """Folder of the partitions that have a name."""
        return lists_folder(self.root)

    def has_partition(self, name: str) -> bool:
        """Whether `partition` finds it."""
        return any(path.is_dir() for path in (self.lists / name, Path(name)))

    def partition(self, name: str) -> Path:
        """The folder of a partition: one of `lists`, or any path."""
        place = next((path for path in (self.lists / name, Path(name)) if path.is_dir()), None)
        if place is None:
            raise DataError(
                f"{self.lists / name}: expected the folder of a partition, found none, nor one at {name}; "
                "choose one (option partition) or make one (command split)"
            )
        return place


def find_source(config: Config) -> Source:
    """The files of a config's data set, after fetching and converting what is missing, as far as the config allows.

    Raises:
        DataError: when the data set is not there or cannot be fetched.
        ConfigError: for options that do not belong to the data set.
    """
    if not config.data:
        raise ConfigError("data: expected the folder of the data set, got none")
    if config.sbd and config.dataset != "voc":
        raise ConfigError(f"sbd: belongs to dataset voc, got dataset {config.dataset}")
    source = {"folder": _folder, "voc": _voc, "cityscapes": _cityscapes}[config.dataset](config)
    if config.class_names:
        return replace(source, class_names=config.class_names)
    named = len(source.class_names)
    if config.num_classes and named and named != config.num_classes:
        if config.dataset == "folder":
            place = source.root / "classes.txt"
            raise DataError(f"{place}: expected num_classes = {config.num_classes} lines, found {named}")
        raise ConfigError(f"num_classes: expected 0 or {named} for dataset {config.dataset}, got {config.num_classes}")
    return source


def lists_folder(root: Path) -> Path:
    """VOC's place for lists, used by every data set here."""
    return root / "ImageSets" / "Segmentation"


# --- lists -----------------------------------------------------------------------------------------------------------


def read_lines(place: Path) -> list[list[str]]:
    """The words of each line of a list; of a folder of Cityscapes, one line for each image."""
    if place.is_dir():
        return _city_lines(place)
    if not place.is_file():
        raise DataError(f"{place}: expected a list of images, found no such file")
    lines = []
    for number, line in enumerate(_text(place, "a list of images").splitlines(), 1):
        words = line.split()
        if len(words) > 2:
            raise DataError(f"{place}, line {number}: expected an id, or an image and a mask, found {len(words)} words")
        if words:
            lines.append(words)
    if not lines:
        raise DataError(f"{place}: expected one image a line, found an empty list")
    return lines


def _text(path: Path, expected: str) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"{path}: expected {expected}, found a file that is not UTF-8 text") from None


def folder_item(root: Path, words: Sequence[str]) -> Item:
    """An item of a folder in VOC layout."""
    name, image = _name_and_image(words)
    mask = root / words[1].lstrip("/") if len(words) == 2 else root / VOC_MASKS / f"{name}.png"
    if image:
        return Item(name, root / image, mask)
    candidates = [root / "JPEGImages" / f"{name}{suffix}" for suffix in IMAGE_SUFFIXES]
    return Item(name, next((path for path in candidates if path.is_file()), candidates[0]), mask)


def voc_item(root: Path, words: Sequence[str]) -> Item:
    """An item of VOC 2012: a mask that is not in one of its two folders is looked for in the other."""
    item = folder_item(root, words)
    other = {VOC_MASKS: SBD_MASKS, SBD_MASKS: VOC_MASKS}.get(item.mask.parent.name)
    if other is None or item.mask.is_file():
        return item
    sibling = item.mask.parent.parent / other / item.mask.name
    return replace(item, mask=sibling) if sibling.is_file() else item


def city_item(root: Path, words: Sequence[str]) -> Item:
    """An item of Cityscapes: train ids where they are stored or named and missing, label ids otherwise."""
    name, image = _name_and_image(words)
    name = name.removesuffix(CITY_IMAGE)
    if not image:
        places = [f"leftImg8bit/{split}/{name.split('_')[0]}/{name}{CITY_IMAGE}.png" for split in ("train", "val")]
        image = next((place for place in places if (root / place).is_file()), places[0])
    if len(words) == 2:
        mask = root / words[1].lstrip("/")
    else:
        mask = root / "gtFine" / Path(*Path(image).parts[1:-1]) / f"{name}{CITY_TRAIN_LABELS}"
    stored = mask.with_name(mask.name.removesuffix(CITY_TRAIN_LABELS) + CITY_LABELS)
    if mask.name.endswith(CITY_TRAIN_LABELS) and not mask.is_file() and (len(words) == 1 or stored.is_file()):
        mask = stored
    return Item(name, root / image, mask, label_ids=mask.name.endswith(CITY_LABELS))


def _name_and_image(words: Sequence[str]) -> tuple[str, str]:
    """The id of a line and the image's path, empty if the line names none."""
    first = words[0].lstrip("/")  # some published lists start their paths with a slash
    path = Path(first)
    return (path.stem, first) if path.suffix in IMAGE_SUFFIXES else (first, "")


def _names(place: Path) -> set[str]:
    return {_name_and_image(words)[0] for words in read_lines(place)}


def _city_lines(folder: Path) -> list[list[str]]:
    """Lines, in the form of the published lists, for the images of `leftImg8bit/<split>`."""
    root = folder.parent.parent
    lines = []
    for path in sorted(folder.glob(f"*/*{CITY_IMAGE}.png")):
        place = path.relative_to(root / "leftImg8bit")
        mask = place.with_name(path.name.removesuffix(f"{CITY_IMAGE}.png") + CITY_TRAIN_LABELS)
        lines.append([f"leftImg8bit/{place.as_posix()}", f"gtFine/{mask.as_posix()}"])
    if not lines:
        raise DataError(f"{folder}: expected images named <city>/*{CITY_IMAGE}.png, found none")
    return lines


# --- data sets -------------------------------------------------------------------------------------------------------


def _folder(config: Config) -> Source:
    root = Path(config.data)
    if config.download:
        raise ConfigError("download: belongs to dataset voc, got dataset folder, which has no source to fetch from")
    if not root.is_dir():
        raise DataError(f"{root}: expected a folder in VOC layout (option data), found none")
    if not (root / "JPEGImages").is_dir() and not lists_folder(root).is_dir():
        raise DataError(
            f"{root}: expected VOC layout, images in JPEGImages and masks in SegmentationClass, found neither"
        )
    lists, names = lists_folder(root), _class_names(root / "classes.txt")
    return Source(root, folder_item, lists / "train.txt", lists / "val.txt", names)


def _class_names(path: Path) -> tuple[str, ...]:
    if not path.is_file():
        return ()
    names = tuple(_text(path, "class names").rstrip().splitlines())
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"{path}: expected a name of its own for every class, found {twice!r} twice")
    return names


def _voc(config: Config) -> Source:
    data = Path(config.data)
    given = (data / "JPEGImages").is_dir()
    root = data if given else data / "VOCdevkit" / "VOC2012"
    if config.download and not given and not _voc_is_whole(root):
        _fetch(
            "VOC 2012",
            data,
            lambda: datasets.VOCSegmentation(str(data), year="2012", image_set="trainval", download=True),
        )
    if not (root / "JPEGImages").is_dir():
        raise DataError(
            f"{root}: expected VOC 2012 (JPEGImages, SegmentationClass, ImageSets), found none; "
            "correct --data, or fetch it with --download"
        )
    lists = lists_folder(root)
    if config.sbd:
        _add_sbd(config, root)
    return Source(
        root,
        voc_item,
        lists / ("train_aug.txt" if config.sbd else "train.txt"),
        lists / "val.txt",
        VOC_CLASSES,
        "" if config.sbd else "; the masks that VOC itself lacks come with --sbd",
    )


def _cityscapes(config: Config) -> Source:
    root = Path(config.data)
    files = "leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip of https://www.cityscapes-dataset.com"
    if config.download:
        raise ConfigError(f"download: Cityscapes needs a login; unpack {files} in {root} by hand")
    for name in ("leftImg8bit", "gtFine"):
        if not (root / name).is_dir():
            raise DataError(f"{root / name}: expected this folder of Cityscapes, found none; unpack {files} in {root}")
    images = root / "leftImg8bit"
    return Source(root, city_item, images / "train", images / "val", tuple(entry.name for entry in TRAIN_CLASSES))


def _voc_is_whole(root: Path) -> bool:
    """False after an interrupted download, too."""
    listed = lists_folder(root) / "trainval.txt"
    if not listed.is_file():
        return False
    return set(listed.read_text().split()) <= _stems(root / "JPEGImages") & _stems(root / VOC_MASKS)


def _stems(folder: Path) -> set[str]:
    return {path.stem for path in folder.iterdir()} if folder.is_dir() else set()


def _fetch(what: str, folder: Path, download: Callable[[], object]) -> None:
    _check_alone(what, folder)
    print(f"Fetching {what} into {folder}.", flush=True)
    try:
        download()
    except (OSError, RuntimeError, EOFError, tarfile.TarError, zlib.error) as error:
        reason = " ".join(str(error).split())
        way_out = "try again, or unpack it there by hand"
        raise DataError(f"{folder}: expected to fetch {what}, found: {reason}; {way_out}") from None


def _check_alone(what: str, folder: Path) -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise DataError(
            f"{folder}: expected {what} to be complete before several processes start, found it is not; "
            "run inspect with the same options once"
        )


def _add_sbd(config: Config, root: Path) -> None:
    """Makes the masks that SBD has and VOC lacks, and train_aug.txt: SBD and VOC train without VOC val.

    Each mask is converted once, and the list comes last: where it is and no mask of it lacks, SBD is not needed.
    """
    lists, target = lists_folder(root), root / SBD_MASKS
    present = _stems(root / VOC_MASKS) | _stems(target)
    path = lists / "train_aug.txt"
    if path.is_file() and _names(path) <= present:
        return
    voc = {split: _names(lists / f"{split}.txt") for split in ("train", "val")}

    folder = Path(config.data) / "sbd"
    _check_alone("SBD", folder)
    try:
        import scipy.io  # noqa: F401, torchvision reads SBD's masks with it
    except ImportError:
        raise DataError(f"{folder}: expected scipy, to read SBD's .mat files, found none; pip install scipy") from None
    missing = [name for name in ("img", "cls", "train.txt", "val.txt") if not (folder / name).exists()]
    if missing and config.download:
        _fetch("SBD", folder, lambda: datasets.SBDataset(str(folder), "train", mode="segmentation", download=True))
    elif missing:
        raise DataError(
            f"{folder}: expected SBD (img, cls, train.txt, val.txt), found no {missing[0]}; fetch it with --download"
        )
    sbd = set()
    for split in ("train", "val"):
        dataset = datasets.SBDataset(str(folder), split, mode="segmentation")
        names = [Path(mask).stem for mask in dataset.masks]
        sbd |= set(names)
        wanted = [index for index, name in enumerate(names) if name not in present]
        for index in tqdm(wanted, f"masks of SBD {split}", disable=None):
            write_bytes(target / f"{names[index]}.png", _palette_png(_sbd_mask(dataset, index)))
    if not path.is_file():
        write_bytes(path, "".join(f"{name}\n" for name in sorted((sbd | voc["train"]) - voc["val"])).encode())


def _sbd_mask(dataset: datasets.SBDataset, index: int) -> Image.Image:
    try:
        return dataset[index][1]
    except Exception as error:  # scipy has no one type for a .mat file that it cannot read
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise DataError(f"{dataset.masks[index]}: expected a mask of SBD and its image, found: {reason}") from None


def _palette_png(mask: Image.Image) -> bytes:
    mask.putpalette(voc_palette())
    stream = io.BytesIO()
    mask.save(stream, "PNG")
    return stream.getvalue()
