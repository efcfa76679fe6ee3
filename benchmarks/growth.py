"""How time and memory grow with the pixels, and how they change between neighbouring numbers of pixels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from . import builders, machine, measure
from .cases import AUTOGRAD, CASES, DENSE, KINKS, Device, Target
from .problem import Problem, Variants
from .suite import Entry, Settings, add_memory, measured, verdict


@dataclass(frozen=True)
class Growth:
    """A problem at several sizes: how time and memory of some variants grow with the pixels."""

    title: str
    build: Callable[[Problem], Variants]
    edges: tuple[int, ...]
    quick_edges: tuple[int, ...]
    cuda_edges: tuple[int, ...]
    variants: tuple[str, ...]
    targets: tuple[Target, ...] = ()
    problem: Problem = field(default_factory=lambda: Problem(1, 1))
    devices: tuple[Device, ...] = ("cpu", "cuda")


GROWTH: dict[str, Growth] = {
    "growth_propagation": Growth(
        "Eq. 4",
        builders.propagation,
        (64, 91, 128, 256, 362, 512, 724, 1024),
        (128, 256, 512),
        (64, 128, 256, 512, 1024, 1448),
        ("dlprop", DENSE),
        (Target("time slope", 1.05), Target("memory slope", 1.05)),
    ),
    "growth_loss": Growth(
        "loss against a view, forward and backward",
        builders.loss_consistency,
        (21, 33, 49, 81, 129, 181),
        (33, 57, 81),
        (41, 81, 129, 161, 228, 321),
        ("dlprop", AUTOGRAD, "KeOps"),
        (Target("memory slope", 1.05),),
    ),
    "growth_softmax": Growth(
        "softmax affinity, forward and backward",
        builders.softmax,
        (21, 33, 49, 81, 129, 181),
        (33, 57, 81),
        (41, 81, 129, 161, 228, 321),
        ("dlprop", AUTOGRAD),
        (Target("memory slope", 1.05),),
    ),
    "growth_sampled": Growth(
        "loss with 1024 anchors, forward and backward",
        builders.loss_sampled,
        (65, 91, 129, 181, 257),
        (65, 129),
        (65, 129, 257, 513),
        ("dlprop",),
        (Target("memory slope", 1.05),),
    ),
    "growth_frobenius": Growth(
        "squared loss, forward and backward",
        builders.loss_frobenius,
        (41, 65, 91, 129, 257, 513),
        (65, 129),
        (65, 129, 257, 513),
        ("dlprop", AUTOGRAD),
        (Target("memory slope", 1.05),),
    ),
}

# Pixels of one image around 41 x 41, 81 x 81 and a multiple of common tile sizes, in steps that divide none of them.
RAGGED_PIXELS = {
    "41 x 41": tuple(range(41 * 41 - 40, 41 * 41 + 41, 5)),
    "81 x 81": (*range(81 * 81 - 40, 81 * 81 + 41, 16), 81 * 81 - 1, 81 * 81, 81 * 81 + 1),
    "13 tiles of 512": (6640, 6655, 6656, 6657, 6672),
}


def run(name: str, settings: Settings) -> Entry:
    """Seconds and memory at every size, and the slopes in log-log."""
    growth = GROWTH[name]
    points: list[Entry] = []
    known: dict[str, tuple[float, float]] = {}
    for edge in edges(growth, settings):
        problem = replace(growth.problem, height=edge, width=edge, device=settings.device)
        wanted = growth.variants if settings.mode == "full" else ("dlprop",)
        variants = {k: v for k, v in growth.build(problem).items() if k in wanted}
        if settings.device == "cuda":
            variants.pop("KeOps", None)
        entries, _ = measured(variants, settings, KINKS, known=known)
        add_memory(entries, growth.build, problem, settings)
        for variant, entry in entries.items():
            if "seconds" in entry and variants[variant].work.operations:
                known[variant] = (entry["seconds"]["median"], variants[variant].work.operations)
        points.append({"pixels": problem.M, "variants": entries})
    entry = {"title": growth.title, "group": "growth", "run": machine.provenance(settings.mode), "points": points}
    slopes = entry["slopes"] = {variant: slopes_of(points, variant) for variant in growth.variants}
    entry["targets"] = [
        {"title": t.title or growth.title}
        | verdict(t, slopes[t.of]["time" if t.measure == "time slope" else "memory"], settings)
        for t in growth.targets
    ]
    return entry


def edges(growth: Growth, settings: Settings) -> tuple[int, ...]:
    if settings.device == "cuda":
        return growth.cuda_edges
    return growth.edges if settings.mode == "full" else growth.quick_edges


def slopes_of(points: list[Entry], variant: str) -> dict[str, float | None]:
    """Slopes of time and memory against pixels, over the sizes at which ``variant`` ran."""
    ran = [(p["pixels"], p["variants"][variant]) for p in points if variant in p["variants"]]
    timed = [(m, v["seconds"]["median"]) for m, v in ran if v["status"] == "ok"]
    weighed = [(m, v["peak_mib"]) for m, v in ran if v.get("peak_mib", 0) > 0]
    return {
        kind: measure.slope([m for m, _ in pairs], [value for _, value in pairs])
        for kind, pairs in (("time", timed), ("memory", weighed))
    }


def run_ragged(settings: Settings) -> Entry:
    """Seconds a pair of the loss at neighbouring numbers of pixels, and the worst over its neighbours' median."""
    series = []
    for title, pixels in RAGGED_PIXELS.items():
        problems = [Problem(1, m, device=settings.device) for m in sorted(pixels)]
        built = {str(p.M): CASES["loss_81"].build(p)["dlprop"].run for p in problems}
        taken = {m: measure.seconds_of(run, settings.device) for m, run in built.items()}
        effort = replace(settings.effort, least=3, most=15)
        samples = measure.interleaved(built, taken, settings.device, effort)
        found = [{"pixels": int(m), "seconds": measure.summary(s)} for m, s in samples.items()]
        series.append({"title": title, "points": found} | cliff(found))
    title = "loss against a view at neighbouring numbers of pixels"
    return {"title": title, "group": "ragged", "run": machine.provenance(settings.mode), "series": series}


def cliff(points: list[Entry]) -> dict[str, float]:
    """The worst time a pair over the median of the other sizes, and the pixels where it is."""
    each = {point["pixels"]: point["seconds"]["median"] / point["pixels"] ** 2 for point in points}
    others = {m: measure.summary([t for k, t in each.items() if k != m])["median"] for m in each}
    worst = max(each, key=lambda m: each[m] / others[m])
    return {"cliff": each[worst] / others[worst], "cliff_pixels": worst}
