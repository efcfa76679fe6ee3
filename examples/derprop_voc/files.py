"""Files that are either written whole or not at all."""

import io
import json
import os
import platform
import sys
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml

import dlprop

if sys.platform != "win32":
    import fcntl

from .errors import CheckpointError, ConfigError


def versions() -> dict[str, str]:
    """What every result says it was made with."""
    installed = {name: metadata.version(name) for name in ("torchvision", "torchmetrics", "timm")}  # slow to import
    return {"python": platform.python_version(), "torch": torch.__version__, "dlprop": dlprop.__version__} | installed


def write_bytes(path: Path, content: bytes | memoryview) -> None:
    """Writes through a temporary file in the same folder, so that a reader or a crash never sees half a file.

    Its name is always the same, so what a killed process left of it is written over by the next one. A device or a pipe
    is written to, not replaced.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        path.write_bytes(content)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    try:
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keeps other processes from training in a folder; however this one ends, the folder is free again.

    Raises:
        ConfigError: when another one does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if sys.platform == "win32":
        yield
        return
    place = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            message = f"out: another process trains in {folder}; wait for it, or choose another folder"
            raise ConfigError(message) from None
        yield
    finally:
        os.close(place)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Strict JSON: NaN is an error, not a file that other readers refuse."""
    write_bytes(path, (json.dumps(values, indent=2, allow_nan=False) + "\n").encode())


def write_yaml(path: Path, values: Mapping[str, Any]) -> None:
    """YAML in the order of `values`."""
    write_bytes(path, yaml.safe_dump(dict(values), sort_keys=False, width=120).encode())


def write_checkpoint(path: Path, values: Mapping[str, Any]) -> None:
    """A file for `torch.load(path, weights_only=True)`: tensors and plain values only.

    Raises:
        CheckpointError: when it cannot be written, as on a full disk; what was at `path` before is untouched.
    """
    buffer = io.BytesIO()  # torch.save into a file that fails reports its own position, not the file's error
    torch.save(dict(values), buffer)
    try:
        write_bytes(path, buffer.getbuffer())
    except OSError as error:
        kept = "the previous one is untouched" if path.exists() else "there is none before it"
        raise CheckpointError(f"{path}: the checkpoint could not be written ({error.strerror}); {kept}") from None


def read_tensors(path: Path, kind: str) -> Any:
    """What torch.save has written, on the CPU, without running code from it.

    Args:
        path: of the file.
        kind: what is expected, for the errors.

    Raises:
        CheckpointError: for a file that is missing or damaged.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: expected {kind}, found no such file")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load looks at no checksum
        if damaged:
            raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and tensor readers each have their own exceptions
        reason = str(error).split("\n")[0].split(". ")[0]
        raise CheckpointError(f"{path}: damaged, or not a file of torch.save: {reason}") from None
