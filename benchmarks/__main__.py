"""`python -m benchmarks`: measure the cases, print a table, write JSON; or redraw tables and plots from the JSON."""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import torch

from . import accuracy, growth, machine, results, suite, table
from .cases import CASES
from .growth import GROWTH

EVERYTHING = (*CASES, *GROWTH, "ragged", "accuracy")


def main(arguments: list[str] | None = None) -> int:
    options = parsed(arguments)
    if options.table or options.plot:
        return redraw(options.table, options.plot)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.device == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, for ours and all others
    torch.manual_seed(0)
    found = run(options)
    print(table.targets(found))
    print(f"\n{table.machine(found)}")
    troubles = list(failures(found))
    if options.save:
        if not options.cases:  # a whole run stands alone, once it is whole
            save(found)
        redraw(tables=True, plots=True)
    for trouble in troubles:
        print(f"FAILED {trouble}", file=sys.stderr)
    return 1 if troubles else 0


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    described = {name: case.title for name, case in CASES.items()}
    described |= {name: f"growth with the pixels: {one.title}" for name, one in GROWTH.items()}
    described |= {"ragged": "the loss at neighbouring numbers of pixels", "accuracy": "errors against float64"}
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Speed, memory and accuracy of dlprop beside what one would write or install instead.",
        epilog="cases:\n" + "\n".join(f"  {name:24}{described[name]}" for name in EVERYTHING),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("cases", nargs="*", metavar="CASE", help="cases to run (default: all that belong to the mode)")
    parser.add_argument("--full", action="store_true", help="all variants, sizes and competitors, more rounds (long)")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/VERSION, README table and plots")
    parser.add_argument("--table", action="store_true", help="measure nothing: write the README table from the JSON")
    parser.add_argument("--plot", action="store_true", help="measure nothing: draw the plots from the JSON")
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to run (default: cpu)")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of torch (default: torch's own choice)")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.cases if name not in EVERYTHING]
    if unknown:
        parser.error(f"unknown case {unknown[0]!r}; choose from {', '.join(EVERYTHING)}")
    if options.threads is not None and options.threads < 1:
        parser.error(f"--threads must be at least 1, got {options.threads}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a CUDA device, and torch sees none")
    return options


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Run the chosen cases one by one; what is done so far is on disk whatever comes."""
    mode = "full" if options.full else "quick"
    facts, rates = machine.facts(options.device), machine.rates(options.device)
    settings = suite.Settings(options.device, mode, not options.no_memory, rates, facts)
    found: dict[str, Any] = {"format": 2, "device": options.device, "machine": facts, "rates": rates, "entries": {}}
    begin = time.perf_counter()
    for name in options.cases or names(options.device, mode):
        print(f"{name} ...", end=" ", file=sys.stderr, flush=True)
        start = time.perf_counter()
        found["entries"][name] = entry(name, settings)
        results.write(found, results.PARTIAL)
        if options.save and options.cases:  # a single case goes into what is there, as soon as it is measured
            save(results.merged(results.load(options.device), found))
        print(f"{time.perf_counter() - start:.1f} s", file=sys.stderr)
    print(f"{time.perf_counter() - begin:.0f} s in all", file=sys.stderr)
    return found


def names(device: str, mode: str) -> list[str]:
    """What a run of ``mode`` measures on ``device``."""
    is_full = mode == "full"
    cases = [name for name, case in CASES.items() if device in case.devices and (is_full or case.is_quick)]
    growth = [name for name, growth in GROWTH.items() if device in growth.devices]
    return [*cases, *growth, *(["ragged"] if is_full else []), "accuracy"]


def save(found: dict[str, Any]) -> None:
    """Check and write the results of this version, in the order of the cases."""
    found = found | {"entries": {name: found["entries"][name] for name in EVERYTHING if name in found["entries"]}}
    results.check(results.finite(found))
    results.write(found, results.FOLDER)


def entry(name: str, settings: suite.Settings) -> dict[str, Any]:
    """The results of one case; an exception becomes a note, so that it costs no other case's results."""
    try:
        if name in CASES:
            return suite.run_case(name, settings)
        if name in GROWTH:
            return growth.run(name, settings)
        if name == "ragged":
            return growth.run_ragged(settings)
        return accuracy.run(settings.device, settings.mode)
    except Exception as error:
        note = f"{type(error).__name__}: {error}"[:500]
        return {"title": name, "group": "failed", "run": machine.provenance(settings.mode), "note": note}


def failures(found: dict[str, Any]) -> list[str]:
    """What went wrong, one line each: a case or variant that raised, or that disagrees with ours."""
    lines = []
    for name, entry in found["entries"].items():
        if entry["group"] == "failed":
            lines.append(f"{name}: {entry['note']}")
        for variants in (entry.get("variants", {}), *(point["variants"] for point in entry.get("points", ()))):
            for variant, facts in variants.items():
                if facts["status"] in ("failed", "disagrees"):
                    lines.append(f"{name}, {variant}: {facts['note']}")
    return lines


def redraw(tables: bool, plots: bool) -> int:
    """Write the tables of the README and the docs, and the plots, from the committed JSON."""
    found = results.load("cpu")
    if found is None:
        print(f"there are no results in {results.FOLDER}: run with --save first", file=sys.stderr)
        return 1
    if tables:
        table.replace_in_pages(found, results.load("cuda"))
    if plots:
        from . import plots as drawing

        for one in (found, results.load("cuda")):
            if one is not None:
                drawing.draw_all(one, results.FOLDER)
    return 0


if __name__ == "__main__":
    sys.exit(main())
