"""`python -m benchmarks`: measure the cases in one run; print the tables or, with --full --save, write them."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from . import machine, results, runner, table
from .cases import ACCURACY_EDGE, CASES

ACCURACY = "accuracy"
EVERYTHING = (*CASES, ACCURACY)


def main(arguments: list[str] | None = None) -> int:
    options = parsed(arguments)
    if options.table:
        found = results.load("cpu")
        if found is None:
            print(f"there are no results in {results.FOLDER}: run with --full --save first", file=sys.stderr)
            return 1
        publish(found)
        return 0
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.device == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, for ours and all others
    if options.save:
        table.check_marks()
    torch.manual_seed(0)
    try:
        found = run(options)
    except runner.DisagreementError as error:
        print(f"\nFAILED {error}\nNothing is saved.", file=sys.stderr)
        return 1
    print("\n\n".join(tables(found)))
    if options.save:
        publish(found)
    return 0


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    described = {name: case.title + (", growth with the pixels" if case.edges else "") for name, case in CASES.items()}
    described[ACCURACY] = f"errors against float64 at {ACCURACY_EDGE} x {ACCURACY_EDGE}"
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Speed, memory and accuracy of dlprop beside what one would write instead.",
        epilog="cases:\n" + "\n".join(f"  {name:24}{described[name]}" for name in EVERYTHING),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("cases", nargs="*", metavar="CASE", help="cases to run (default: all that belong to the mode)")
    parser.add_argument("--full", action="store_true", help="all variants and sizes, more rounds (takes long)")
    parser.add_argument("--save", action="store_true", help="with --full: write benchmarks/results, tables and plots")
    parser.add_argument("--table", action="store_true", help="measure nothing: write tables and plots from the JSON")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to run (default: cpu)")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of torch (default: torch's own choice)")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.cases if name not in EVERYTHING]
    if unknown:
        parser.error(f"unknown case {unknown[0]!r}; choose from {', '.join(EVERYTHING)}")
    if options.save and (options.cases or not options.full):
        parser.error("--save takes a whole run: give it with --full and without cases")
    if options.threads is not None and options.threads < 1:
        parser.error(f"--threads must be at least 1, got {options.threads}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a CUDA device, and torch sees none")
    return options


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Run the chosen cases one by one; one that fails its check ends the run."""
    settings = runner.Settings(options.device, "full" if options.full else "quick")
    found: dict[str, Any] = {"format": results.FORMAT, "device": options.device, "mode": settings.mode}
    found |= machine.provenance() | {"machine": machine.facts(options.device), "rates": machine.rates(options.device)}
    found |= {"cases": {}, ACCURACY: []}
    begin = time.perf_counter()
    for name in EVERYTHING:
        if name not in (options.cases or names(settings.mode)):
            continue
        print(f"{name} ...", end=" ", file=sys.stderr, flush=True)
        start, noise = time.perf_counter(), ""
        if name == ACCURACY:
            found[ACCURACY] = runner.accuracy(settings)
        else:
            entry = found["cases"][name] = runner.run(name, settings)
            noise = f" (rounds: {table.rounds(entry)})" if entry["is_noisy"] else ""
        print(f"{time.perf_counter() - start:.1f} s{noise}", file=sys.stderr)
    print(f"{time.perf_counter() - begin:.0f} s in all", file=sys.stderr)
    return found


def names(mode: str) -> tuple[str, ...]:
    """What a run of ``mode`` measures."""
    return EVERYTHING if mode == "full" else tuple(name for name, case in CASES.items() if case.is_quick)


def tables(found: dict[str, Any]) -> list[str]:
    """What a run prints: the targets, and in a full run the rest."""
    parts = [table.targets(found), table.machine(found)]
    if found["mode"] == "full":
        parts += [table.variants(found), table.growth(found), table.accuracy(found)]
    return [part for part in parts if part.count("\n") != 1]  # without rows


def publish(found: dict[str, Any]) -> None:
    """Write JSON, plots and, of a CPU, the tables of the pages: all of it is made before any of it is written."""
    from . import plots

    found = results.finite(found)
    results.check(found)
    pages = table.pages(found) if found["device"] == "cpu" else {}
    with tempfile.TemporaryDirectory() as folder:
        drawn = {results.FOLDER / path.name: path.read_bytes() for path in plots.draw_all(found, Path(folder))}
    results.write(found, results.FOLDER)
    for path, content in drawn.items():
        path.write_bytes(content)
    for page, text in pages.items():
        page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
