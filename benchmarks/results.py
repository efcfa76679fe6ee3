"""The JSON of a version and device: one whole run, written whole or not at all."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import dlprop

from .cases import CASES

FORMAT = 3  # of the layout below; files of another one are no results
FOLDER = Path(__file__).parent / "results" / dlprop.__version__
Results = dict[str, Any]


def load(device: str, folder: Path | None = None) -> Results | None:
    """The results of this version on ``device``, or None where there are none."""
    path = (folder or FOLDER) / f"{device}.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    return found if found.get("format") == FORMAT else None


def check(results: Results) -> None:
    """Raise ValueError unless ``results`` are those of a whole run: every case, and the errors against float64."""
    if list(results["cases"]) != list(CASES):
        raise ValueError(f"cases must be {', '.join(CASES)}, got {', '.join(results['cases'])}")
    for name, entry in results["cases"].items():
        missing = {"title", "rounds", "spread", "is_noisy", "targets", "points"} - entry.keys()
        if missing:
            raise ValueError(f"case {name} must have {', '.join(sorted(missing))}")
    if results["mode"] != "full" or not results["accuracy"]:
        raise ValueError("results must be those of a full run with its errors against float64")


def write(results: Results, folder: Path) -> Path:
    """Write through a temporary file, so that no half of a run ever stands."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{results['device']}.json"
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(finite(results), indent=1, allow_nan=False) + "\n")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def finite(value: Any) -> Any:
    """``value`` with numbers rounded to what a measurement can tell, and null for what JSON has no number for."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value
