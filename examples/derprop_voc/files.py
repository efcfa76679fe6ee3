"""Files that are either written whole or not at all."""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml


def write_bytes(path: Path, content: bytes) -> None:
    """Writes through a temporary file in the same folder, so that a reader or a crash never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.chmod(0o644)  # mkstemp gives 0o600
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Strict JSON: NaN is an error, not a file that other readers refuse."""
    write_bytes(path, (json.dumps(values, indent=2, allow_nan=False) + "\n").encode())


def write_yaml(path: Path, values: Mapping[str, Any]) -> None:
    """YAML in the order of `values`."""
    write_bytes(path, yaml.safe_dump(dict(values), sort_keys=False, width=120).encode())


def write_checkpoint(path: Path, values: Mapping[str, Any]) -> None:
    """A file for `torch.load(path, weights_only=True)`: tensors and plain values only."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        torch.save(dict(values), temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
