"""The Markdown tables of the README and the docs, made from the JSON of a run and nothing else."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import rounding
from .cases import CASES

Results = dict[str, Any]

NBSP = "\u00a0"  # a figure and its unit stay on one line
ROOT = Path(__file__).parents[1]
README, PAGE = ROOT / "README.md", ROOT / "docs" / "benchmarks.md"
BEGIN, END = "<!-- {}: begin (python -m benchmarks --table) -->", "<!-- {}: end -->"

BOUNDS = {
    "speedup": "at least {:.3g} times faster",
    "cost": "at most {:.3g} times",
    "share": "at least {:.0%} of the matrix rate",
    "copy": "at most {:.3g} times copying its bytes",
    "peak": "at most {:.4g} MiB added",
    "seconds": "at most {:.3g} s",
    "time slope": "time grows with power at most {:.3g}",
    "memory slope": "memory grows with power at most {:.3g}",
}
VALUES = {
    "share": "{:.0%}",
    "peak": "{:.0f} MiB",
    "seconds": "{:.3g} s",
    "time slope": "{:.2f}",
    "memory slope": "{:.2f}",
}
MISSING = {"bfloat16_matrix_units": "this processor has no bfloat16 matrix units"}


def sections(results: Results, gpu: Results | None) -> dict[Path, dict[str, str]]:
    """What stands between the marks of each page, by the name of the marks."""
    measured = f"{targets(results)}\n\n{machine(results)}"
    return {
        README: {"benchmarks": f"{measured}\n\nOn a GPU:\n\n{cuda(gpu)}"},
        PAGE: {
            "targets": measured,
            "growth": growth(results),
            "ragged": ragged(results),
            "competitors": competitors(results),
            "accuracy": accuracy(results),
            "rounding": rounding.table(),
            "gpu": cuda(gpu),
        },
    }


def targets(results: Results) -> str:
    """One row a target: the bound, the measured figure, ours and what stands beside it."""
    rows = []
    for entry in results["entries"].values():
        for target in entry.get("targets", ()):
            if entry["group"] == "growth":
                ours, beside = "", ""
            else:
                ours = _time(entry["variants"].get(target["of"]))
                other = target["against"]
                beside = "" if other is None else f"{other}: {_time(entry['variants'].get(other))}"
            rows.append((target["title"], bound(target), figure(target, entry) + _error(target, results), ours, beside))
    return _table(("case", "target", "measured", "time", "beside"), rows)


def bound(target: Results) -> str:
    """The target in words."""
    if target["measure"] == "cost" and target["bound"] < 1:
        return f"at least {1 / target['bound']:.3g} times faster"
    return BOUNDS[target["measure"]].format(target["bound"])


def figure(target: Results, entry: Results) -> str:
    """The measured figure, and whether the target is met."""
    value = target["value"]
    if value is None:
        return "not measured"
    is_inverse = target["measure"] == "cost" and target["bound"] < 1
    value = 1 / value if is_inverse else value
    is_ratio = target["measure"] in ("speedup", "cost", "copy")
    text = _ratio(value) if is_ratio else VALUES[target["measure"]].format(value)
    error = entry.get("extra", {}).get("relative_standard_error")
    if error is not None:
        text += f" (relative standard error {error:.2%})"
    if not target["applies"]:
        return f"{text}, does not apply: {MISSING[target['needs']]}"
    return f"{text}, {'met' if target['met'] else '**missed**'}"


def _error(target: Results, results: Results) -> str:
    """For a variant that trades accuracy for time: its gradient's error against float64 at the largest size."""
    rows = results["entries"].get("accuracy", {}).get("rows", ())
    errors = {r["pixels"]: r["relative_error"] for r in rows if r["variant"] == target["of"] and _is_reduced(r)}
    return f" (gradient off by {errors[max(errors)]:.1e})" if errors and target["needs"] else ""


def _is_reduced(row: Results) -> bool:
    return not row["variant"].startswith("dlprop") and row["result"] == "gradient" and row["status"] == "ok"


def cuda(results: Results | None) -> str:
    """The targets on a GPU; their rows without figures where none has been measured."""
    if results is not None:
        return f"{targets(results)}\n\n{machine(results)}"
    blank = "not measured"
    rows = [
        (
            target.title or case.title,
            bound(asdict(target)),
            blank,
            blank,
            f"{target.against}: {blank}" if target.against else "",
        )
        for case in CASES.values()
        for target in case.targets
        if target.device == "cuda"
    ]
    return _table(("case", "target", "measured", "time", "beside"), rows)


def machine(results: Results) -> str:
    """The line below a table: what the figures belong to."""
    facts, rates = results["machine"], results["rates"]
    where = facts["gpu"]["name"] if facts["gpu"] else f"{facts['processor']}, {facts['threads']} threads"
    matrix = rates.get("tf32", rates["float32"])
    commits = sorted(
        {str(e["run"]["commit"]) + ("+" if e["run"]["dirty"] else "") for e in results["entries"].values()}
    )
    return (
        f"float32{' (TF32 products)' if 'tf32' in rates else ''}, D = 256, C = 21, {where}, "
        f"torch {facts['versions']['torch']}, commit {', '.join(commits)}. Medians of interleaved runs; ratios are "
        f"medians over rounds of the ratio within a round. In the same run square matrix products reach "
        f"{matrix / 1e9:.0f} GFLOP/s ({rates['bfloat16'] / 1e9:.0f} in bfloat16, {_units(facts)}) and a copy "
        f"{rates['copy'] / 1e9:.0f} GB/s."
    )


def _units(facts: Results) -> str:
    if facts["bfloat16_matrix_units"]:
        return "with matrix units"
    return f"without matrix units, {'with' if facts['bfloat16_vectors'] else 'without'} vector instructions"


def competitors(results: Results) -> str:
    """Every variant of every case: its time, how often ours goes into it, and the memory it adds."""
    rows = []
    for entry in results["entries"].values():
        if entry["group"] in ("growth", "ragged", "accuracy", "failed"):
            continue
        title = entry["title"]
        for name, variant in entry["variants"].items():
            times = "" if "ratio" not in variant else _ratio(variant["ratio"]["median"])
            rows.append((title, _kind(name, variant), _time(variant), times, _mib(variant)))
            title = ""
    return _table(("case", "variant", "time", "times ours", "memory added"), rows)


def growth(results: Results) -> str:
    """The slopes of every variant, over the sizes at which it ran."""
    rows = []
    for entry in results["entries"].values():
        if entry["group"] != "growth":
            continue
        title = entry["title"]
        for name, slopes in entry["slopes"].items():
            ran = [
                point["pixels"] for point in entry["points"] if point["variants"].get(name, {}).get("status") == "ok"
            ]
            if not ran:
                continue
            span = f"{min(ran):,} to {max(ran):,}"
            stopped = next(
                (f"{p['pixels']:,}: {p['variants'][name]['status']}" for p in entry["points"]
                 if p["variants"].get(name, {}).get("status", "ok") != "ok"), "",
            )  # fmt: skip
            rows.append((title, name, span, *(_number(slopes[kind], ".2f") for kind in ("time", "memory")), stopped))
            title = ""
    return _table(("case", "variant", "pixels", "power of time", "power of memory", "stops at"), rows)


def ragged(results: Results) -> str:
    """The worst neighbour of each series of ragged sizes."""
    entry = results["entries"].get("ragged")
    if entry is None or entry["group"] != "ragged":
        return "Not measured."
    rows = [(s["title"], str(len(s["points"])), f"{s['cliff']:.3g}", f"{s['cliff_pixels']:,}") for s in entry["series"]]
    return _table(("pixels around", "sizes", "worst time a pair, over the others' median", "at pixels"), rows)


def accuracy(results: Results) -> str:
    """Relative errors at the largest size, a row for each subject and variant, a column for each dtype."""
    entry = results["entries"].get("accuracy")
    if entry is None or not entry.get("rows"):
        return "Not measured."
    pixels = max(row["pixels"] for row in entry["rows"])
    cells: dict[tuple[str, str, str], dict[str, str]] = {}
    for row in entry["rows"]:
        if row["pixels"] == pixels:
            text = f"{row['relative_error']:.1e}" if row["status"] == "ok" else row["status"]
            cells.setdefault((row["subject"], row["result"], row["variant"]), {})[row["dtype"]] = text
    dtypes = ("float32", "bfloat16", "float16")
    rows = [(*key, *(found.get(dtype, "") for dtype in dtypes)) for key, found in cells.items()]
    rows.sort(key=lambda row: (row[0], row[1]))
    return _table(("case", "result", "variant", *dtypes), rows)


def replace_in_pages(results: Results, gpu: Results | None) -> None:
    """Write the tables between the marks of the README and of the page on benchmarks."""
    for page, tables in sections(results, gpu).items():
        text = page.read_text(encoding="utf-8")
        for name, written in tables.items():
            begin, end = BEGIN.format(name), END.format(name)
            before, rest = text.split(begin)
            text = f"{before}{begin}\n\n{written}\n\n{end}{rest.split(end)[1]}"
        page.write_text(text, encoding="utf-8")


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _kind(name: str, variant: Results) -> str:
    note = {"bound": " (a bound)", "related": " (another result)"}.get(variant["kind"], "")
    return name if name.startswith("dlprop") else name + note


def _time(variant: Results | None) -> str:
    if variant is None:
        return "not measured"
    if variant["status"] != "ok":
        return variant["status"]
    seconds = variant["seconds"]["median"]
    return f"{seconds:.2f}{NBSP}s" if seconds >= 1 else f"{seconds * 1e3:.3g}{NBSP}ms"


def _ratio(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _mib(variant: Results) -> str:
    mib = variant.get("peak_mib")
    return "" if mib is None else f"{mib:.0f} MiB"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
