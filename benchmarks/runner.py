"""Running a case: every variant once and checked, then timed in turn, then its memory in a process of its own."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import machine, measure
from .cases import ACCURACY, ACCURACY_EDGE, AT_LEAST, CASES, Case, Target
from .problem import OURS, PLAIN, Problem, Variant

Entry = dict[str, Any]
TF32 = 30  # times the tolerance where products have 11 bits instead of 24


class DisagreementError(RuntimeError):
    """A variant whose result is not ours: its time would say nothing, so there are no figures at all."""


@dataclass(frozen=True)
class Settings:
    device: str = "cpu"
    mode: str = "quick"  # or "full"


def run(name: str, settings: Settings) -> Entry:
    """Seconds, ratios, memory and verdicts of one case. All its sizes are in every round, which gives one slope."""
    gc.collect()
    case = CASES[name]
    points: list[Entry] = []
    runs: dict[measure.Key, Variant] = {}
    taken: dict[measure.Key, float] = {}
    sizes = sorted({*case.edges, *case.plain_edges})
    problems = [replace(case.problem, height=edge, width=edge) for edge in sizes] or [case.problem]
    problems = [replace(problem, device=settings.device) for problem in problems]
    for problem in problems:
        entries, seconds = checked(case, problem, settings)
        points.append({"pixels": problem.pixels, "variants": entries})
        built = case.build(problem)
        runs |= {(variant, problem.pixels): built[variant] for variant in seconds}
        taken |= {(variant, problem.pixels): value for variant, value in seconds.items()}

    names = {variant for variant, _ in runs}
    targets = [t for t in case.targets if {t.of, t.against or t.of} <= names]
    watched = [t for t in targets if t.measure not in ("peak", "memory slope")]
    if case.edges:
        several = (v for v in (OURS, PLAIN) if sum(variant == v for variant, _ in runs) > 1)
        watched = [Target("time slope", 0, of=variant) for variant in several]
    elif not watched and PLAIN in names:
        watched = [Target("speedup", 0, PLAIN)]
    effort = measure.EFFORTS[settings.mode]
    rounds, widest = measure.rounds(runs, taken, [partial(figure, t) for t in watched], settings.device, effort)
    del runs, built

    for problem, point in zip(problems, points, strict=True):
        for variant, found in point["variants"].items():
            if (variant, problem.pixels) in taken:
                found |= timed_and_weighed(name, problem, variant, found["kind"], rounds, settings)
    entry = {"title": case.title, "rounds": len(rounds), "spread": widest, "is_noisy": widest > measure.STEADY}
    if case.error is not None:
        entry["relative_standard_error"] = case.error(problems[0])
    if case.edges:
        entry["slopes"] = {variant: slopes(variant, points, rounds) for variant in (OURS, PLAIN) if variant in names}
    judgements = []
    for target in targets:
        if target.measure in ("peak", "memory slope"):
            found = weight(target, entry, points)
        else:
            found = measure.summary([figure(target, one) for one in rounds])
        if found is not None:
            judgements.append(judged(target, found, settings))
    return entry | {"targets": judgements, "points": points}


def checked(case: Case, problem: Problem, settings: Settings) -> tuple[dict[str, Entry], dict[str, float]]:
    """Run every chosen variant once, without the sparsity term: what is known of each, and seconds of those that ran.

    Raises:
        DisagreementError: a variant that is to compute the same differs from ours.
    """
    variants = case.build(replace(problem, eta=0.0))
    entries: dict[str, Entry] = {}
    taken: dict[str, float] = {}
    ours: tuple[Tensor, ...] = ()
    slack = TF32 if torch.get_float32_matmul_precision() != "highest" else 1
    for name in chosen(case, problem, list(variants), settings):
        variant = variants[name]
        entries[name] = {"kind": variant.kind}
        if variant.needs > 0.9 * machine.available_bytes(problem.device):
            entries[name]["needs_gib"] = variant.needs / 2**30
            continue
        start = time.perf_counter()
        results = variant.run()
        machine.synchronize(problem.device)
        taken[name] = time.perf_counter() - start
        ours = results if variant.kind == "ours" else ours
        if variant.kind != "equivalent" or not ours:
            continue
        apart = differences(results, ours)
        entries[name]["difference"] = max(apart)
        for i, found in enumerate(apart):
            allowed = slack * case.tolerance[min(i, 1)]
            if not found <= allowed:
                raise DisagreementError(
                    f"{case.title}, {problem.height} x {problem.width}: the {'gradient' if i else 'value'} of {name} "
                    f"differs from ours by {found:.1e} of the largest magnitude, where {allowed:.0e} is allowed"
                )
    return entries, taken


def chosen(case: Case, problem: Problem, variants: list[str], settings: Settings) -> list[str]:
    """The variants that this run measures at this size."""
    if case.edges:
        sizes = {OURS: case.edges, PLAIN: case.plain_edges}
        return [variant for variant, edges in sizes.items() if problem.height in edges]
    named = {OURS, *(t.of for t in case.targets), *(t.against for t in case.targets)} - set(case.slow)
    return [v for v in variants if v not in case.without and (settings.mode == "full" or v in named)]


def differences(results: Iterable[Tensor], reference: Iterable[Tensor]) -> list[float]:
    """The largest difference of each result, over the largest magnitude of its reference."""
    found = []
    for x, y in zip(results, reference, strict=True):
        error = float((x.to(y) - y).abs().max()) / (float(y.abs().max()) or 1.0)
        found.append(math.inf if math.isnan(error) else error)
    return found


def timed_and_weighed(
    case: str, problem: Problem, variant: str, kind: str, rounds: list[measure.Round], settings: Settings
) -> Entry:
    """Seconds, ratio to ours and peak. A bound has no memory, and a short run no time for that of slow competitors."""
    seconds = [one[variant, problem.pixels] for one in rounds]
    found: Entry = {"seconds": measure.summary(seconds)}
    if variant != OURS and (OURS, problem.pixels) in rounds[0]:
        found["ratio"] = measure.summary([one[variant, problem.pixels] / one[OURS, problem.pixels] for one in rounds])
    is_quick = settings.mode == "full" or kind == "ours" or min(seconds) < 3
    if CASES[case].with_memory and kind != "bound" and is_quick and measure.can_measure_memory(problem.device):
        found |= measure.in_fresh_process(peak_of, case, problem, variant)
    return found


def peak_of(case: str, problem: Problem, variant: str) -> dict[str, float]:
    """The peak memory of one variant in this process; run in a fresh one."""
    small = replace(problem, height=8, width=8, grid=None if problem.grid is None else (5, 5))
    CASES[case].build(small)[variant].run()  # loads what is loaded at first use
    found = CASES[case].build(problem)[variant]
    if found.compiles:
        found.run()
    gc.collect()
    return measure.peak_mib(found.run, problem.device)


def figure(target: Target, one: measure.Round) -> float:
    """The measured side of a target on time, in one round."""
    pixels = [m for name, m in one if name == target.of]
    seconds = [one[target.of, m] for m in pixels]
    if target.measure == "time slope":
        return measure.slope(pixels, seconds)
    if target.against is None:
        return seconds[0]
    against = one[target.against, pixels[0]]
    return seconds[0] / against if target.measure == "cost" else against / seconds[0]


def weight(target: Target, entry: Entry, points: list[Entry]) -> dict[str, float] | None:
    """The measured side of a target on memory, results left out of a peak; None where it was not measured."""
    if target.measure == "memory slope":
        slope: dict[str, float] | None = entry["slopes"][target.of].get("memory slope")
        return slope
    found = points[0]["variants"][target.of]
    return exactly(found["peak_mib"] - found["result_mib"]) if "peak_mib" in found else None


def slopes(variant: str, points: list[Entry], rounds: list[measure.Round]) -> Entry:
    """The powers with which time and memory of a variant grow with the pixels, over the sizes at which it ran."""
    ran = {p["pixels"]: p["variants"][variant] for p in points if (variant, p["pixels"]) in rounds[0]}
    if len(ran) < 2:
        return {}
    found: Entry = {"time slope": measure.summary([figure(Target("time slope", 0, of=variant), r) for r in rounds])}
    peaks = [one.get("peak_mib", 0) for one in ran.values()]
    return found | ({"memory slope": exactly(measure.slope(list(ran), peaks))} if all(peaks) else {})


def exactly(value: float) -> dict[str, float]:
    """What is the same every time, as a summary."""
    return {"median": value, "low": value, "high": value}


def judged(target: Target, found: dict[str, float], settings: Settings) -> Entry:
    """The target as data, with the measured figure and what it says; the bounds are those of a CPU."""
    bound = target.bound if settings.device == "cpu" else None
    says = None
    if bound is not None:
        says = measure.verdict(found["low"], found["high"], bound, at_least=target.measure in AT_LEAST)
    facts = {"measure": target.measure, "of": target.of, "against": target.against, "bound": bound}
    return facts | found | {"verdict": says}


def accuracy(settings: Settings) -> list[Entry]:
    """Errors of ours and of the plain formula in float32 against the plain formula in float64, on the same inputs."""
    rows = []
    for name in ACCURACY:
        edge, build = ACCURACY_EDGE, CASES[name].build
        problem = replace(CASES[name].problem, height=edge, width=edge, eta=0.0, device=settings.device)
        exact = build(replace(problem, dtype=torch.float64))[PLAIN].run()
        built = build(problem)
        found = {variant: differences(built[variant].run(), exact) for variant in (OURS, PLAIN)}
        for i, result in enumerate(("value", "gradient")[: len(exact)]):
            row = {"title": CASES[name].title.split(",")[0], "result": result}
            rows.append(row | {variant: apart[i] for variant, apart in found.items()})
    return rows
