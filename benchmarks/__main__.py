"""`python -m benchmarks`: run the cases, write the JSON of this version, print the table, refresh the README's."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

import dlprop

from . import measure
from .cases import CASES
from .table import markdown, replace_in_readme

RESULTS = Path(__file__).parent / "results"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"cases to run (default: all): {', '.join(CASES)}")
    parser.add_argument(
        "--save", action="store_true", help="write benchmarks/results/VERSION.json and the README table"
    )
    parser.add_argument("--table", action="store_true", help="measure nothing: refresh the README from the JSON")
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    parser.add_argument("--peak-of", nargs=2, metavar=("CASE", "VARIANT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    unknown = [case for case in options.cases if case not in CASES]
    if unknown:
        parser.error(f"unknown case {unknown[0]!r}; choose from {', '.join(CASES)}")
    if options.save and options.cases:
        parser.error("--save writes the whole table: give no case with it")

    torch.manual_seed(0)
    if options.peak_of:
        case, variant = options.peak_of
        run = CASES[case].build()[variant]
        warm_up()
        print(json.dumps(measure.peak_mib_of(run)))
        return 0
    path = RESULTS / f"{dlprop.__version__}.json"
    if options.table:
        replace_in_readme(json.loads(path.read_text()))
        return 0

    results: dict[str, Any] = {"machine": measure.machine(), "matrix_rate": measure.matrix_rate(), "cases": {}}
    for name in options.cases or CASES:
        print(f"{name} ...", end=" ", file=sys.stderr, flush=True)
        results["cases"][name] = run_case(name, results["matrix_rate"], with_memory=not options.no_memory)
        print(f"{results['cases'][name]['ratio']:.2f} times", file=sys.stderr)
    print(markdown(results))
    if options.save:
        RESULTS.mkdir(exist_ok=True)
        path.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
        replace_in_readme(results)
    return 0


def run_case(name: str, matrix_rate: float, with_memory: bool) -> dict[str, Any]:
    """Seconds and peak memory of every variant of a case, and how often ours goes into the first of the others."""
    case = CASES[name]
    seconds = measure.interleaved_seconds(case.build(), case.repeats)
    variants: dict[str, dict[str, Any]] = {
        variant: {"seconds": measure.summary(samples)} for variant, samples in seconds.items()
    }
    if with_memory:
        for variant, facts in variants.items():
            facts["peak_mib"] = measure.peak_mib_in_fresh_process(name, variant)
    ours, other = list(seconds.values())[:2]
    # The median over rounds of the ratio within a round: a slow spell of the machine cancels.
    ratio = measure.summary([b / a for a, b in zip(ours, other, strict=True)])["median"]
    share = None if case.operations is None else case.operations / min(ours) / matrix_rate
    return {"title": case.title, "variants": variants, "ratio": ratio, "share_of_matrix_rate": share}


def warm_up() -> None:
    """Load what torch loads at first use, so that a peak counts the case alone."""
    feats = torch.rand(1, 8, 4, 4, requires_grad=True)
    dlprop.DerivativeLoss()(feats, torch.rand(1, 8, 4, 4)).backward()
    dlprop.DerivativeLabelPropagation()(torch.rand(1, 3, 4, 4), feats.detach())


if __name__ == "__main__":
    sys.exit(main())
