"""Running the cases: every variant once and checked, then timed in turn, then its memory in a process of its own."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import machine, measure
from .cases import AT_LEAST, CASES, Case, Target
from .problem import Problem, UnavailableError, Variant, Variants, Work

Entry = dict[str, Any]
PROBE = "square matrix product"


@dataclass(frozen=True)
class Settings:
    """How to run: `mode` is "quick" or "full"."""

    device: str
    mode: str
    with_memory: bool
    rates: dict[str, float]
    facts: dict[str, Any]

    @property
    def effort(self) -> measure.Effort:
        return measure.EFFORTS[self.mode]

    @property
    def rate(self) -> float:
        return machine.float32_rate(self.rates)

    def rate_of(self, work: Work) -> float:
        """The matrix rate that limits such work."""
        return self.rates["bfloat16"] if work.in_half else self.rate

    @property
    def slack(self) -> float:
        """How much further apart equivalent variants may be than in float32: TF32 rounds to 11 bits instead of 24."""
        return 30.0 if self.facts["float32_matmul_precision"] != "highest" else 1.0


def chosen(case: Case, variants: Variants, settings: Settings) -> Variants:
    """The variants of ``case`` that this run measures."""
    targets = [target for target in case.targets if target.device == settings.device]
    wanted = {"dlprop", *(t.of for t in targets), *(t.against for t in targets)}
    left_out = {*case.without, *(case.quick_without if settings.mode == "quick" else ())}
    if settings.device == "cuda":
        left_out.add("KeOps")
    if case.only:
        return {name: variant for name, variant in variants.items() if name in case.only}
    return {
        name: variant
        for name, variant in variants.items()
        if name not in left_out and (settings.mode == "full" or name in wanted)
    }


def run_case(name: str, settings: Settings) -> Entry:
    """All about one case: its variants' seconds, ratios, memory and roofline, and whether it meets its targets."""
    case = CASES[name]
    problem = replace(case.problem, device=settings.device)
    entry: Entry = {"title": case.title, "group": case.group, "run": machine.provenance(settings.mode)}
    if case.sample is not None:
        samples = case.sample(3 if settings.mode == "quick" else 15)
        entry["variants"] = {
            variant: {"kind": "ours", "status": "ok", "seconds": measure.summary(s)} for variant, s in samples.items()
        }
    else:
        entry["problem"] = {"n": problem.n, "pixels": problem.M, "D": problem.D, "C": problem.C}
        try:
            variants = chosen(case, case.build(problem), settings)
        except UnavailableError as error:
            return entry | {"variants": {"dlprop": {"kind": "ours", "status": "unavailable", "note": str(error)}}}
        with_probe = any(t.measure == "share" and t.device == settings.device for t in case.targets)
        entry["variants"], samples = measured(variants, settings, case.tolerance, with_probe=with_probe)
        del variants
        if case.extra is not None:
            entry["extra"] = case.extra(problem)
        if case.with_memory:
            add_memory(entry["variants"], case.build, problem, settings)
    entry["targets"] = [
        {"title": target.title or case.title} | judged(target, entry["variants"], samples, settings)
        for target in case.targets
        if target.device == settings.device
    ]
    return entry


def measured(
    variants: Variants,
    settings: Settings,
    tolerance: tuple[float, float],
    *,
    with_probe: bool = False,
    known: dict[str, tuple[float, float]] | None = None,
) -> tuple[dict[str, Entry], dict[str, list[float]]]:
    """Entries of every variant, and the seconds of each round of those that ran.

    ``known`` maps a variant to seconds and operations of a smaller problem, to tell what will take too long.
    """
    entries: dict[str, Entry] = {}
    taken: dict[str, float] = {}
    runs: dict[str, Callable[[], Any]] = {}
    reference: tuple[Tensor, ...] | None = None
    for name, variant in variants.items():
        entry, results, taken[name] = first_run(name, variant, settings, known or {})
        entries[name] = entry
        if results is None:
            continue
        if variant.kind in ("ours", "equivalent"):
            reference = results if reference is None else reference
            apart = [x / settings.slack for x in differences(results, reference)]
            entry["difference"] = max(apart) * settings.slack
            if not (apart[0] <= tolerance[0] and max(apart[1:], default=0.0) <= tolerance[1]):
                entry |= {"status": "disagrees", "note": f"differs from ours by {entry['difference']:.1e}"}
                continue
        if entry["status"] == "ok":
            runs[name] = variant.run
    del reference
    if with_probe:
        dtype = torch.bfloat16 if variants["dlprop"].work.in_half else torch.float32
        shape = (machine.MATRIX[settings.device],) * 2
        a, b = (torch.rand(shape, device=settings.device, dtype=dtype) for _ in range(2))
        runs[PROBE], taken[PROBE] = lambda: a @ b, 0.0
    samples = measure.interleaved(runs, taken, settings.device, settings.effort) if runs else {}
    for name, seconds in samples.items():
        if name == PROBE:
            continue
        entry, work = entries[name], variants[name].work
        entry["seconds"] = measure.summary(seconds)
        if "dlprop" in samples and name != "dlprop":
            entry["ratio"] = measure.ratio(seconds, samples["dlprop"])
        if work.traffic:
            entry["roofline"] = roofline(work, entry["seconds"]["median"], settings)
    return entries, samples


def first_run(
    name: str, variant: Variant, settings: Settings, known: dict[str, tuple[float, float]]
) -> tuple[Entry, tuple[Tensor, ...] | None, float]:
    """Run ``variant`` once, to warm up and for its results and seconds; or say why it cannot run here."""
    entry: Entry = {"kind": variant.kind, "status": "ok"}
    gc.collect()
    if settings.device == "cuda":
        torch.cuda.empty_cache()
    seconds, operations = known.get(name, (1.0, settings.rate))
    expected = seconds * variant.work.operations / operations
    available = machine.available_bytes(settings.device)
    if variant.work.peak > 0.9 * available:
        note = f"needs about {variant.work.peak / 2**30:.0f} GiB, {available / 2**30:.0f} GiB are free"
        return entry | {"status": "out of memory", "note": note, "expected_mib": variant.work.peak / 2**20}, None, 0.0
    if expected > settings.effort.longest:
        note = f"expected to take {expected:.0f} s a run"
        return entry | {"status": "too slow", "note": note, "expected_seconds": expected}, None, 0.0
    start = time.perf_counter()
    try:
        results = variant.run()
        machine.synchronize(settings.device)
        if variant.compiles:
            start = time.perf_counter()
            results = variant.run()
            machine.synchronize(settings.device)
    except UnavailableError as error:
        return entry | {"status": "unavailable", "note": str(error)}, None, 0.0
    except Exception as error:
        note = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:300]
        return entry | {"status": "out of memory" if is_out_of_memory(error) else "failed", "note": note}, None, 0.0
    taken = time.perf_counter() - start
    if taken > settings.effort.longest:
        entry |= {"status": "too slow", "note": f"one run took {taken:.0f} s", "seconds": measure.summary([taken])}
    return entry, results, taken


def is_out_of_memory(error: Exception) -> bool:
    text = str(error).lower()
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in text


def differences(results: Iterable[Tensor], reference: Iterable[Tensor]) -> list[float]:
    """The largest difference of each result, over the largest magnitude of its reference."""
    found = []
    for x, y in zip(results, reference, strict=True):
        error = float((x.to(y) - y).abs().max()) / (float(y.abs().max()) or 1.0)
        found.append(math.inf if math.isnan(error) else error)
    return found


def roofline(work: Work, seconds: float, settings: Settings) -> Entry:
    """Where a variant stands under the limits: its products at the matrix rate, its bytes at copying speed."""
    by_operations, by_bytes = work.operations / settings.rate_of(work), work.traffic / settings.rates["copy"]
    return {
        "operations": work.operations,
        "bytes": work.traffic,
        "rate": work.operations / seconds,
        "limit": "matrix rate" if by_operations >= by_bytes else "copy bandwidth",
        "share": max(by_operations, by_bytes) / seconds,
    }


def add_memory(
    entries: dict[str, Entry], build: Callable[[Problem], Variants], problem: Problem, settings: Settings
) -> None:
    """Measure the peak of every variant that ran and is no bound."""
    if not settings.with_memory or not measure.can_measure_memory(settings.device):
        return
    if settings.device == "cuda":
        torch.cuda.empty_cache()  # the other process needs the room
    for name, entry in entries.items():
        if entry["status"] != "ok" or entry["kind"] == "bound":
            continue
        if settings.mode == "quick" and entry["seconds"]["median"] > 3 and entry["kind"] != "ours":
            continue
        arguments = (build, problem, name, torch.get_num_threads(), torch.get_float32_matmul_precision())
        timeout = 120 + 20 * entry["seconds"]["median"]
        try:
            entry |= measure.in_fresh_process(peak_of, *arguments, timeout=timeout)
        except RuntimeError as error:
            entry["memory_note"] = str(error)[:300]


def peak_of(build: Any, problem: Problem, name: str, threads: int, precision: str) -> dict[str, float]:
    """The peak memory of one variant in this process; run in a fresh one."""
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)
    grid = None if problem.grid is None else (5, 5)
    build(replace(problem, height=8, width=8, grid=grid))[name].run()  # loads what is loaded at first use
    run = build(problem)[name].run
    if "compiled" in name:
        run()
    gc.collect()
    return measure.peak_mib(run, problem.device)


def judged(target: Target, entries: dict[str, Entry], samples: dict[str, list[float]], settings: Settings) -> Entry:
    """The target as data, with the measured value and whether it is met; both null where it was not measured."""
    value = None
    ours = samples.get(target.of)
    if ours is not None:
        entry = entries[target.of]
        if target.measure in ("speedup", "cost"):
            other = samples.get(target.against or "")
            if other is not None:
                pair = (other, ours) if target.measure == "speedup" else (ours, other)
                value = measure.ratio(*pair)["median"]
        elif target.measure == "share" and PROBE in samples:
            rate = 2 * machine.MATRIX[settings.device] ** 3
            value = entry["roofline"]["operations"] / rate * measure.ratio(samples[PROBE], ours)["median"]
        elif target.measure == "copy":
            value = entry["seconds"]["median"] * settings.rates["copy"] / entry["roofline"]["bytes"]
        elif target.measure == "peak" and "peak_mib" in entry:
            value = entry["peak_mib"] - entry["result_mib"]
        elif target.measure == "seconds":
            value = entry["seconds"]["median"]
    return verdict(target, value, settings)


def verdict(target: Target, value: float | None, settings: Settings) -> Entry:
    applies = target.needs is None or bool(settings.facts[target.needs])
    met = None
    if value is not None and applies:
        met = value >= target.bound if target.measure in AT_LEAST else value <= target.bound
    found = {"measure": target.measure, "bound": target.bound, "of": target.of, "against": target.against}
    return found | {"value": value, "met": met, "needs": target.needs, "applies": applies}
