"""The Markdown table of the README, made from the JSON of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- benchmarks: begin (python -m benchmarks --table) -->", "<!-- benchmarks: end -->"


def markdown(results: dict[str, Any]) -> str:
    """One row a case: ours, the other one, the ratio of their times, and the memory each adds."""
    rows = ["| case | dlprop | beside | time ratio | memory added |", "|---|---|---|---|---|"]
    for case in results["cases"].values():
        (_, ours), (other_name, other) = list(case["variants"].items())[:2]
        share = case["share_of_matrix_rate"]
        note = "" if share is None else f" ({share:.0%} of the matrix-product rate)"
        rows.append(
            f"| {case['title']} | {_seconds(ours)}{note} | {other_name}: {_seconds(other)} | "
            f"{case['ratio']:.3g} | {_mib(ours)}, beside {_mib(other)} |"
        )
    facts = results["machine"]
    rows += [
        "",
        f"float32, D = 256, C = 21, {facts['processor']}, {facts['threads']} threads, torch {facts['torch']}, medians "
        f"of interleaved runs; matrix products run at {results['matrix_rate'] / 1e9:.0f} GFLOP/s in the same process. "
        "The ratio is the median over rounds of the other's time over ours in the same round.",
    ]
    return "\n".join(rows)


def replace_in_readme(results: dict[str, Any]) -> None:
    """Write the table between the two marks of the README."""
    text = README.read_text()
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    README.write_text(f"{before}{BEGIN}\n{markdown(results)}\n{END}{after}")


def _seconds(variant: dict[str, Any]) -> str:
    seconds = variant["seconds"]["median"]
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def _mib(variant: dict[str, Any]) -> str:
    mib = variant.get("peak_mib")
    return "not measured" if mib is None else f"{mib:.0f} MiB"
