"""The Markdown tables of the README and the docs, made from the JSON of one run and nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from .cases import ACCURACY_EDGE, CASES
from .machine import ROOT
from .problem import OURS, PLAIN

Results = dict[str, Any]

NBSP = "\u00a0"  # a figure and its unit stay on one line
README, PAGE, EVERY_CASE = ROOT / "README.md", ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "benchmarks_cases.md"
BEGIN, END = "<!-- {}: begin (python -m benchmarks --table) -->", "<!-- {}: end -->"

BOUNDS = {
    "speedup": "at least {:.3g} times faster than {}",
    "share": "at least {:.0%} of the speed of {}",
    "cost": "at most {:.3g} times the time of {}",
    "seconds": "at most {:.3g} s",
    "peak": "at most {:.4g} MiB",
    "time slope": "time grows with power at most {:.3g}",
    "memory slope": "memory grows with power at most {:.3g}",
}
WRITTEN = {"peak": "{:.0f} MiB", "seconds": "{:.3g} s", "share": "{:.0%}"}
NOTES = {"bound": " (a bound)", "related": " (another result)"}


def check_marks() -> None:
    """Raise ValueError unless all pages have the marks of their tables, before a run takes its time."""
    for page, names in MARKS.items():
        for mark in (form.format(name) for name in names for form in (BEGIN, END)):
            if page.read_text(encoding="utf-8").count(mark) != 1:
                raise ValueError(f"{page.name} must have the mark {mark!r} once")


def pages(results: Results) -> dict[Path, str]:
    """The README and the pages on benchmarks with the tables between their marks."""
    check_marks()
    found = {page: page.read_text(encoding="utf-8") for page in MARKS}
    for page, names in MARKS.items():
        for name, make in names.items():
            before, rest = found[page].split(BEGIN.format(name))
            after = rest.split(END.format(name))[1]
            found[page] = f"{before}{BEGIN.format(name)}\n\n{make(results)}\n\n{END.format(name)}{after}"
    return found


def short(results: Results) -> str:
    """At most six rows for someone who has read nothing else."""
    rows = []
    for name, case in CASES.items():
        entry = results["cases"].get(name)
        if case.readme is None or entry is None or not entry["targets"]:
            continue
        found, at = entry["targets"][0], entry["points"][0]["variants"]
        ours, name = at.get(OURS), other(found, at)
        plain = at.get(name)
        joint = " instead of " if name == found["against"] else f"; {name} "
        times = beside(time(ours), time(plain) if plain and "seconds" in plain else "", joint)
        rows.append((case.readme, in_words(found), times, beside(mib(ours), mib(plain), joint)))
    return table(("task", "speed", "time", "memory added"), rows)


def other(found: Results, variants: Results) -> str:
    """What ours stands beside: what its target is held against, or the plain formula if that is but a bound."""
    against = found["against"]
    return PLAIN if against is None or variants[against]["kind"] == "bound" else against


def in_words(found: Results) -> str:
    """A ratio as one says it."""
    against, value = found["against"], found["median"]
    if 0.95 <= value <= 1.05:
        return f"as fast as {against}"
    cost = value if found["measure"] == "cost" else 1 / value
    if cost < 1 and found["measure"] == "cost":
        return f"{cost:.0%} of the time of {against}"
    if cost > 1:
        return f"{ratio(cost)} times the time of {against}"
    return f"{ratio(value)} times faster than {against}"


def beside(ours: str, plain: str, joint: str) -> str:
    return f"{ours}{joint}{plain}" if ours and plain else ours


def targets(results: Results) -> str:
    """One row a target: what was asked, what was measured and whether it is met."""
    rows = []
    for entry in results["cases"].values():
        for found in entry["targets"]:
            title = entry["title"] + ("" if found["of"] == OURS else f": {found['of'].removeprefix(f'{OURS}, ')}")
            asked = "" if found["bound"] is None else BOUNDS[found["measure"]].format(found["bound"], found["against"])
            times = rounds(entry) if found["low"] != found["high"] else ""
            rows.append((title, asked, figure(found, entry), verdict(found), times))
    return table(("case", "target", "measured", "", "rounds"), rows)


def figure(found: Results, entry: Results) -> str:
    """The median and, where it was measured more than once, its interval."""
    write = WRITTEN.get(found["measure"], "{:.3f}").format
    write = ratio if found["measure"] in ("speedup", "cost") else write
    text = write(found["median"])
    if found["low"] != found["high"]:
        text += f" ({write(found['low'])} to {write(found['high'])})"
    error = entry.get("relative_standard_error")
    return text if error is None else f"{text}, standard error {error:.2%}"


def verdict(found: Results) -> str:
    says = found["verdict"]
    return "" if says is None else says if says == "met" else f"**{says}**"


def rounds(entry: Results) -> str:
    """How many, and whether the figures stood still in the end."""
    if not entry["is_noisy"]:
        return str(entry["rounds"])
    return f"{entry['rounds']}, machine too noisy: spread {entry['spread'] or math.inf:.0%}"


def variants(results: Results) -> str:
    """Every variant of every case: its time, how often ours goes into it, and the memory it adds."""
    rows = []
    for entry in results["cases"].values():
        title = entry["title"]
        for name, found in entry["points"][0]["variants"].items() if len(entry["points"]) == 1 else ():
            times = found.get("ratio")
            times = f"{ratio(times['median'])} ({ratio(times['low'])} to {ratio(times['high'])})" if times else ""
            rows.append((title, name + NOTES.get(found["kind"], ""), time(found), times, mib(found)))
            title = ""
    return table(("case", "variant", "time", "times ours", "memory added"), rows)


def growth(results: Results) -> str:
    """The power of every variant's time and memory, over the sizes at which it ran."""
    rows = []
    for entry in results["cases"].values():
        title = entry["title"]
        for name, slopes in entry.get("slopes", {}).items():
            at = {p["pixels"]: p["variants"][name] for p in entry["points"] if name in p["variants"]}
            ran = [pixels for pixels, found in at.items() if "seconds" in found]
            stop = next((f"{m:,}: needs {gib(x['needs_gib'])}" for m, x in at.items() if "needs_gib" in x), "")
            cells = (
                f"{slopes[kind]['median']:.2f}" if kind in slopes else "" for kind in ("time slope", "memory slope")
            )
            rows.append((title, name, f"{min(ran):,} to {max(ran):,}", *cells, stop))
            title = ""
    return table(("case", "variant", "pixels", "power of time", "power of memory", "stops at"), rows)


def accuracy(results: Results) -> str:
    """The largest errors against float64, over the largest magnitude of the result."""
    rows = [
        (row["title"], row["result"], *(f"{row[name]:.1e}" for name in (OURS, PLAIN))) for row in results["accuracy"]
    ]
    return table((f"{ACCURACY_EDGE} x {ACCURACY_EDGE}", "result", OURS, PLAIN), rows)


def machine(results: Results, *, is_short: bool = False) -> str:
    """The line below a table: what the figures belong to."""
    facts, rates = results["machine"], results["rates"]
    where = facts["device"] + (f", {facts['threads']} threads" if results["device"] == "cpu" else "")
    sizes = f"One image, 256 feature channels, 21 classes, float32; {where}, torch {facts['torch']}"
    if is_short:
        return (
            f"{sizes}. Speeds are medians of ratios taken side by side. Memory is what a call needs beyond its inputs; "
            "an M x M matrix has a number for each pair of the M pixels."
        )
    return (
        f"{sizes}, commit {results['commit']}, {results['date']}, one run. Figures are medians over rounds in which "
        "the variants take turns, ratios are taken within a round; in brackets the interval that holds the median with "
        "95 % confidence (below six rounds: the extremes). A target is met or missed if the whole interval is on one "
        "side of it; the spread is the interquartile range over the median. A square matrix product reaches "
        f"{rates['matrix'] / 1e9:.0f} GFLOP/s and a copy {rates['copy'] / 1e9:.0f} GB/s."
    )


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ("---",) * len(head), *rows])


def time(found: Results | None) -> str:
    if found is None or "seconds" not in found:
        return "" if found is None else f"needs {gib(found['needs_gib'])}"
    seconds = found["seconds"]["median"]
    return f"{seconds:.2f}{NBSP}s" if seconds >= 1 else f"{seconds * 1e3:.3g}{NBSP}ms"


def mib(found: Results | None) -> str:
    if found is None or "peak_mib" not in found:
        return "" if found is None or "needs_gib" not in found else gib(found["needs_gib"])
    return f"{found['peak_mib']:,.0f}{NBSP}MiB"


def gib(value: float) -> str:
    return f"{value:,.0f}{NBSP}GiB"


def ratio(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


# What stands between the marks of each page, by the name of the marks.
MARKS: dict[Path, dict[str, Callable[[Results], str]]] = {
    README: {"benchmarks": lambda results: f"{short(results)}\n\n{machine(results, is_short=True)}"},
    PAGE: {
        "targets": lambda results: f"{targets(results)}\n\n{machine(results)}",
        "growth": growth,
        "accuracy": accuracy,
    },
    EVERY_CASE: {"variants": variants},
}
