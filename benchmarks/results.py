"""The JSON of a version and device: strict, checked against the schema, written whole or not at all."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import dlprop

from .machine import ROOT

FOLDER = Path(__file__).parent / "results" / dlprop.__version__
PARTIAL = ROOT / "runs" / "benchmarks"  # every run leaves its results here as it goes, finished or not
SCHEMA = json.loads((Path(__file__).parent / "schema.json").read_text())


def load(device: str, folder: Path | None = None) -> dict[str, Any] | None:
    """The committed results of ``device``, or None where there are none."""
    path = (folder or FOLDER) / f"{device}.json"
    return json.loads(path.read_text()) if path.exists() else None


def check(results: dict[str, Any]) -> None:
    """Raise `jsonschema.ValidationError` unless ``results`` follow the schema."""
    import jsonschema  # not needed to read results, which the documentation does

    jsonschema.Draft202012Validator(SCHEMA).validate(results)


def write(results: dict[str, Any], folder: Path) -> Path:
    """Write the results of a device into ``folder`` through a temporary file, so that no half of them ever stands."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{results['device']}.json"
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(finite(results), indent=1, allow_nan=False) + "\n")
        os.replace(temporary, path)  # noqa: PTH105 - says what it is
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


def merged(old: dict[str, Any] | None, new: dict[str, Any]) -> dict[str, Any]:
    """``new`` with the entries of ``old`` that it did not measure; ValueError if they come from another machine."""
    if old is None:
        return new
    for fact in ("processor", "threads", "gpu", "versions"):
        if old["machine"][fact] != new["machine"][fact]:
            raise ValueError(
                f"the saved results have {fact} {old['machine'][fact]!r}, this run {new['machine'][fact]!r}: "
                "measure all cases again (--full --save)"
            )
    # The best of both, which is nearer to what the machine can do, whatever kept it busy.
    rates = {name: max(rate, new["rates"][name]) for name, rate in old["rates"].items()}
    return {**new, "rates": rates, "entries": {**old["entries"], **new["entries"]}}
