"""Backbone features of a data set, computed once and kept in one float16 file with a JSON index beside it.

The index says which row of the file belongs to which image, and of what size and time the image's file was. Rows are
only appended, and are on the disk before the index names them: a process that is killed loses the rows since its last
index, and what is half-written is never taken for whole. The file's name holds a key of the data set, the backbone, the
content of its weights, its stages, their stride and the images' working size, so no other network reads it.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from .augment import to_input
from .config import Config
from .data import SegmentationDataset, check_image
from .errors import ConfigError
from .files import write_json
from .frozen import FrozenNetwork
from .progress import make_bar
from .sources import Item

FORMAT = "derprop_voc features 2"
INDEX_EVERY = 16  # images between two indices
Rows = dict[str, tuple[int, int, int]]  # an image's path -> size and time (ns) of its file, row


class CachedFeatures(Mapping[Path, Tensor]):
    """An image's file -> its features (K, h, w), float16, mapped from the disk.

    Args:
        path: of the file.
        rows: of the index.
        shape: (K, h, w).
        size: working height and width of the images.
    """

    def __init__(self, path: Path, rows: Rows, shape: Sequence[int], size: Sequence[int]) -> None:
        self.path, self.rows, self.size = path, rows, tuple(size)
        count = _next_row(rows)
        flat = torch.from_file(str(path), shared=False, size=count * torch.Size(shape).numel(), dtype=torch.float16)
        self.maps = flat.view(count, *shape)

    def __getitem__(self, image: Path) -> Tensor:
        return self.maps[self.rows[_name(image)][2]]

    def __iter__(self) -> Iterator[Path]:
        return map(Path, self.rows)

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class Place:
    """Where the features of one data set and network are.

    Attributes:
        path: of the file.
        shape: (K, h, w).
        size: working height and width of the images.
    """

    path: Path
    shape: tuple[int, ...]
    size: tuple[int, ...]


def grid_of_features(config: Config, items: Sequence[Item]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The working size of the images, and the size of the grid of their features.

    Raises:
        ConfigError: where the images have no common working size, or one that is no multiple of the stride, or one that
            is smaller than `feature_crop`.
    """
    size, stride = _working_size(config, items), config.output_stride
    if any(edge % stride for edge in size):
        near = " ".join(str(max(1, round(edge / stride)) * stride) for edge in size)
        raise ConfigError(
            f"image_size: expected multiples of output_stride = {stride} with cache_features, as crops lie on the grid "
            f"of features, got height and width {size[0]} {size[1]}; try --image-size {near}"
        )
    grid = tuple(edge // stride for edge in size)
    if any(crop > edge for crop, edge in zip(config.feature_crop, grid, strict=False)):
        raise ConfigError(
            f"feature_crop: expected at most the grid of features, {list(grid)}, got {list(config.feature_crop)}"
        )
    return size, grid


def cache_place(config: Config, items: Sequence[Item], network: FrozenNetwork) -> Place:
    """The place for the features of `items`; errors as `grid_of_features`."""
    size, grid = grid_of_features(config, items)
    name = config.backbone.removeprefix("timm/")
    key = [
        FORMAT,
        str(Path(config.data).resolve()),
        name,
        _content(network.backbone),
        network.stages,
        network.stride,
        size,
    ]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12]
    folder = Path(config.cache_dir) if config.cache_dir else Path(config.data) / "cache"
    path = folder / f"{name}_{size[0]}x{size[1]}_{digest}.f16"
    return Place(path, (len(network.channel_mean), *grid), size)


def read_cache(place: Place) -> CachedFeatures:
    """The features of a cache that has been filled."""
    return CachedFeatures(place.path, _read_rows(place), place.shape, place.size)


@torch.no_grad()
def fill_cache(
    place: Place, config: Config, items: Sequence[Item], network: FrozenNetwork, *, progress: bool = True
) -> None:
    """Computes the features that are missing; says what of the files that are there cannot be used.

    A second process that needs the same cache waits for the first.

    Cost: one pass of the backbone for each missing image; 2 K h w bytes each on the disk.
    """
    place.path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(place.path) as stream:
        rows = _read_rows(place)
        files = {_name(item.image): item for item in items}
        now = {name: (stat.st_size, stat.st_mtime_ns) for name in files for stat in [Path(name).stat()]}
        missing = [name for name in now if name not in rows or rows[name][:2] != now[name]]
        if not missing:
            return
        changed = [name for name in missing if name in rows]
        if changed:
            _say(place, f"stale: {len(changed)} images have changed, {changed[0]} the first; they are computed again")
        row_bytes = 2 * torch.Size(place.shape).numel()
        # In place of a changed image's row comes a new one at the end: another run may be reading the old.
        first = _next_row(rows)
        stream.truncate(first * row_bytes)
        stream.seek(0, os.SEEK_END)
        _say(place, f"features of {len(missing)} images, {len(missing) * row_bytes / 2**20:.0f} MiB")
        dataset = SegmentationDataset([files[name] for name in missing], labeled=False, size=config.image_size)
        loader = DataLoader(dataset, batch_size=None, num_workers=config.workers, generator=torch.Generator())
        device = network.channel_mean.device
        with make_bar(len(missing), "features", progress=progress) as bar:
            for count, (name, sample) in enumerate(zip(missing, loader, strict=True), 1):
                # One at a time, so that they do not depend on what else is missing.
                features = network.backbone_features(to_input(sample["image"])[None].to(device))[0]
                half = features.to("cpu", torch.float16).contiguous()
                if not half.isfinite().all():
                    raise ConfigError(
                        f"cache_features: features of {name} do not fit float16, or are no numbers; check the weights, "
                        "choose other timm_stages, or train without the cache"
                    )
                stream.write(half.numpy().tobytes())
                rows[name] = (*now[name], first + count - 1)
                if count % INDEX_EVERY == 0 or count == len(missing):
                    stream.flush()
                    os.fsync(stream.fileno())
                    write_json(place.path.with_suffix(".json"), {"format": FORMAT, "rows": rows})
                bar.update()


def feature_maps(
    config: Config, items: Iterable[Item], network: FrozenNetwork, *, progress: bool = True
) -> Iterator[Tensor]:
    """The backbone's features of one image after the other, without a cache."""
    dataset = SegmentationDataset(list(items), labeled=False, size=config.image_size)
    device = network.channel_mean.device
    with make_bar(len(dataset), "features", progress=progress) as bar:
        for index in range(len(dataset)):
            yield network.backbone_features(to_input(dataset[index]["image"])[None].to(device))[0]
            bar.update()


def _working_size(config: Config, items: Sequence[Item]) -> tuple[int, ...]:
    if config.image_size:
        return config.image_size
    sizes = {check_image(item.image)[::-1]: item.image for item in items}
    if len(sizes) > 1:
        (size, path), (other, other_path) = list(sizes.items())[:2]
        raise ConfigError(
            "image_size: expected a height and a width with cache_features, as images have several sizes: "
            f"{path} {size[0]} {size[1]}, {other_path} {other[0]} {other[1]}"
        )
    return next(iter(sizes))


def _read_rows(place: Place) -> Rows:
    """The rows that the index names and the file holds; what is wrong with either is said."""
    index = place.path.with_suffix(".json")
    if not index.is_file():
        return {}
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        rows: Rows = {name: (size, time, row) for name, (size, time, row) in content["rows"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        _say(place, f"torn: {index} is no index; all features are computed again")
        return {}
    held = (place.path.stat().st_size if place.path.is_file() else 0) // (2 * torch.Size(place.shape).numel())
    whole = {name: entry for name, entry in rows.items() if entry[2] < held}
    if len(whole) < len(rows):
        _say(place, f"torn: {len(rows) - len(whole)} of {len(rows)} images are cut off; they are computed again")
    return whole


def _next_row(rows: Rows) -> int:
    return 1 + max((row for _, _, row in rows.values()), default=-1)


def _name(image: Path) -> str:
    return str(image.resolve())


def _content(module: nn.Module) -> str:
    """SHA-256 of a module's parameters and buffers."""
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        digest.update(name.encode())
        digest.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


@contextmanager
def _locked(path: Path) -> Iterator[BinaryIO]:
    """The file at `path`, open for appending by this process only."""
    with path.open("ab") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{path}: waiting for another process that computes features", flush=True)
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield stream


def _say(place: Place, text: str) -> None:
    print(f"{place.path}: {text}", flush=True)
