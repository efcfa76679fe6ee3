"""`split`: a seeded partition of images into labelled, unlabelled and, for validation or tuning, held-out ones.

Images without a mask are unlabelled.
"""

import argparse
import hashlib
from pathlib import Path
from typing import get_args

from .config import hints, make_config
from .data import check_mask
from .errors import ConfigError, DataError
from .files import write_bytes
from .sources import IMAGE_SUFFIXES, VOID, Item, Source, find_source, read_lines

LISTS = ("labeled.txt", "unlabeled.txt", "val.txt")
Lines = dict[Path, tuple[Item, str]]  # image -> its item and the text of its line


def add_split_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `split`."""
    boolean = argparse.BooleanOptionalAction
    parser.add_argument("--dataset", choices=get_args(hints()["dataset"]), default="folder", help="as in train")
    parser.add_argument("--data", default="", help="folder of the data set, as in train")
    parser.add_argument("--download", action=boolean, default=False, help="fetch what is missing, as in train")
    parser.add_argument("--sbd", action=boolean, default=False, help="split the 10,582 images of VOC and SBD")
    start = parser.add_mutually_exclusive_group(required=True)
    start.add_argument("--labeled", type=int, metavar="N", help="number of labelled images to draw")
    start.add_argument(
        "--from", dest="start", metavar="FOLDER", help="keep this partition's labels; hold out of its unlabelled images"
    )
    parser.add_argument("--val", type=int, default=0, metavar="K", help="images to hold out in val.txt; 0: no val.txt")
    parser.add_argument("--seed", type=int, default=0, help="another seed, another partition (default: %(default)s)")
    parser.add_argument(
        "--list",
        default="",
        help="list to draw from (default: train.txt, without it all of JPEGImages; train_aug.txt with --sbd; "
        "Cityscapes' train)",
    )
    parser.add_argument(
        "--out", required=True, metavar="FOLDER", help="a name: under ImageSets/Segmentation, as --partition; or a path"
    )


def split_command(arguments: argparse.Namespace) -> None:
    """Writes the lists of a new partition and prints their lengths and checksum."""
    for name, low in (("labeled", 1), ("val", 1 if arguments.start else 0)):
        value = getattr(arguments, name)
        if value is not None and value < low:
            raise ConfigError(f"{name}: expected at least {low}, got {value}")
    options = {name: getattr(arguments, name) for name in ("dataset", "data", "download", "sbd")}
    source = find_source(make_config(options))
    if arguments.start:
        folder = source.partition(arguments.start)
        lists = hold_out(folder, source, val=arguments.val, seed=arguments.seed)
    else:
        named = (source.lists / arguments.list, Path(arguments.list))
        pool = next((path for path in named if path.is_file()), named[0]) if arguments.list else source.train
        images = source.root / "JPEGImages"
        if arguments.dataset == "folder" and not arguments.list and not pool.exists() and images.is_dir():
            pool, lines = images, _listed(images, source)
            of_val = _read(source.val, source) if source.val.is_file() else {}  # what the data set scores on
            lines = {image: line for image, line in lines.items() if image not in of_val}
        elif pool.exists():
            lines = _read(pool, source)
        else:
            raise DataError(f"{pool}: expected a list of images, found no such file; name another list with --list")
        lists = draw(pool, lines, labeled=arguments.labeled, val=arguments.val, seed=arguments.seed)
    for name in ("labeled.txt", "val.txt"):
        for item, _ in lists.get(name, {}).values():
            check_mask(item, len(source.class_names) or VOID, source.missing_mask)

    out = Path(arguments.out)
    out = source.lists / out if len(out.parts) == 1 else out
    texts = {name: "".join(f"{line}\n" for line in sorted(line for _, line in lists[name].values())) for name in lists}
    _check_unused(out, texts)
    for name, text in texts.items():
        write_bytes(out / name, text.encode())
        print(f"{len(lists[name]):6} images in {out / name}")
    print(f"sha256 {checksum(out)}")


def draw(pool: Path, lines: Lines, *, labeled: int, val: int, seed: int) -> dict[str, Lines]:
    """Random labelled and held-out images, of those of `pool` that have a mask; the rest is unlabelled."""
    drawn = _draw(pool, lines, labeled + val, seed, "--labeled and --val together")
    chosen = dict(drawn)
    rest = {image: line for image, line in lines.items() if image not in chosen}
    lists = {"labeled.txt": dict(drawn[:labeled]), "unlabeled.txt": rest}
    return lists | ({"val.txt": dict(drawn[labeled:])} if val else {})


def hold_out(folder: Path, source: Source, *, val: int, seed: int) -> dict[str, Lines]:
    """A partition with some of its unlabelled images held out; those that are labelled, too, are not among them."""
    labeled, unlabeled = (_read(folder / name, source) for name in ("labeled.txt", "unlabeled.txt"))
    others = {image: line for image, line in unlabeled.items() if image not in labeled}
    held = dict(_draw(folder / "unlabeled.txt", others, val, seed, "--val"))
    rest = {image: line for image, line in unlabeled.items() if image not in held}
    return {"labeled.txt": labeled, "unlabeled.txt": rest, "val.txt": held}


def checksum(folder: Path) -> str:
    """SHA-256 of a partition's lists: what `sha256sum labeled.txt unlabeled.txt val.txt | sha256sum` prints there.

    A list that is not there is left out.
    """
    paths = [folder / name for name in LISTS if (folder / name).is_file()]
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in paths]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _read(place: Path, source: Source) -> Lines:
    """An image that is listed twice counts once."""
    lines = ((source.item(source.root, words), " ".join(words)) for words in read_lines(place))
    return {item.image: (item, line) for item, line in lines}


def _listed(folder: Path, source: Source) -> Lines:
    """All images of a folder; one that a list could not name is an error, as it would be left out."""
    for path in folder.iterdir():
        if path.suffix not in IMAGE_SUFFIXES and path.suffix.lower() in IMAGE_SUFFIXES:
            raise DataError(
                f"{path}: expected {', '.join(IMAGE_SUFFIXES)} in lower case, found {path.suffix}; rename it"
            )
    by_name = [(path.stem, path) for path in folder.iterdir() if path.suffix in IMAGE_SUFFIXES]
    names = [name for name, _ in sorted(by_name)]
    items = [source.item(source.root, [name]) for name in names]
    for path, item in zip((path for _, path in sorted(by_name)), items, strict=True):
        if len(item.name.split()) != 1:
            raise DataError(f"{path}: expected a name without spaces, which end a name in lists; rename it")
        if item.image != path:
            raise DataError(f"{path}: expected one image of this name, found {item.image.name}, too; rename one")
    return {item.image: (item, item.name) for item in items}


def _ordered(lines: Lines, seed: int) -> list[tuple[Path, tuple[Item, str]]]:
    """The lines in a random order: by the hash of seed and id.

    It is the same on every machine and for every version of Python and NumPy (NumPy does not promise that of its
    permutations), and whatever the order of the list. And the labelled images of a smaller split of the same seed are
    among those of a larger one.
    """

    def key(entry: tuple[Path, tuple[Item, str]]) -> tuple[bytes, str]:
        item, line = entry[1]
        return hashlib.sha256(f"{seed} {item.name}".encode()).digest(), line

    return sorted(lines.items(), key=key)


def _draw(place: Path, lines: Lines, count: int, seed: int, flags: str) -> list[tuple[Path, tuple[Item, str]]]:
    """The first images with masks in the order of the seed; `flags` asked for so many."""
    masked = {image: line for image, line in lines.items() if line[0].mask.is_file()}
    if len(masked) < count:
        such = "".join(f" (such as {item.mask})" for item, _ in [*lines.values()][:1])
        raise DataError(
            f"{place}: expected at least {count} images with masks{such} to draw from, "
            f"found {len(masked)} among {len(lines)}; {flags} can be {len(masked)} at most"
        )
    return _ordered(masked, seed)[:count]


def _check_unused(out: Path, texts: dict[str, str]) -> None:
    """A list that is there and differs may be what somebody's results stand on; a stale val.txt would be used."""
    for path in (out / name for name in LISTS):
        if path.is_file() and path.read_bytes() != texts.get(path.name, "").encode():
            way_out = "remove it or choose another --out"
            raise DataError(f"{path}: expected no list, or the same one, found another; {way_out}")
