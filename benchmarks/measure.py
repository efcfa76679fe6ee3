"""Timing side by side until the figures stand still, and peak memory in a fresh process."""

from __future__ import annotations

import ctypes
import math
import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .machine import synchronize
from .problem import Variant

Key = tuple[str, int]  # a variant and its pixels
Round = Mapping[Key, float]  # seconds of each
Figure = Callable[[Round], float]

# A figure stands still when the interquartile range over the rounds is at most this share of its median.
STEADY = 0.05
CONFIDENCE = 0.95
# What is quicker runs several times a turn, and once before without being timed: the variant before it may have emptied
# the caches, which a few milliseconds would pay for and seconds would not.
QUICK = 0.1
TURN = 0.05

RESET_PEAK = Path("/proc/self/clear_refs")  # Linux resets the peak of a process when 5 is written here
M_MMAP_THRESHOLD = -3  # the name of the setting in glibc's malloc.h


@dataclass(frozen=True)
class Effort:
    """Rounds of a case at least and at most, and the seconds after which it gets no more than the least."""

    least: int
    most: int
    seconds: float


# Six rounds are the fewest whose extremes hold the median with the confidence above.
EFFORTS = {"quick": Effort(3, 15, 8.0), "full": Effort(6, 60, 60.0)}


def rounds(
    variants: Mapping[Key, Variant],
    taken: Mapping[Key, float],
    figures: Sequence[Figure],
    device: str,
    effort: Effort,
) -> tuple[list[Round], float]:
    """Rounds in which every variant has its turn, until all figures stand still; and their largest spread.

    A spread above `STEADY` says that the effort ran out first: the machine is too noisy for these figures. Variants
    that have run before have ``taken`` so many seconds. The order turns round every time, so that what comes first is
    not always the same.
    """
    turns = {name: turn_of(variant, taken.get(name), device) for name, variant in variants.items()}
    found: list[Round] = []
    begin = time.perf_counter()
    while True:
        order = list(turns) if len(found) % 2 == 0 else list(turns)[::-1]
        seconds = {name: turns[name]() for name in order}
        found.append({name: seconds[name] for name in turns})
        widest = max((spread([figure(one) for one in found]) for figure in figures), default=0.0)
        is_over = len(found) >= effort.most or time.perf_counter() - begin > effort.seconds
        if len(found) >= effort.least and (widest <= STEADY or is_over):
            return found, widest


def turn_of(variant: Variant, taken: float | None, device: str) -> Callable[[], float]:
    """What measures one sample of a variant: the mean seconds of as many runs as fill `TURN`."""
    if variant.sample is not None:
        return variant.sample
    if variant.compiles:
        variant.run()
    if variant.compiles or taken is None or taken < 0.3:  # a first run loads what is loaded at first use
        taken = min(seconds_of(variant, device) for _ in range(2))
    times = math.ceil(TURN / max(taken, TURN / 20)) if taken < QUICK else 1

    def turn() -> float:
        if taken < QUICK:
            variant.run()
        return seconds_of(variant, device, times)

    return turn


def seconds_of(variant: Variant, device: str, times: int = 1) -> float:
    synchronize(device)
    begin = time.perf_counter()
    for _ in range(times):
        variant.run()
    synchronize(device)
    return (time.perf_counter() - begin) / times


def spread(values: Sequence[float]) -> float:
    """The interquartile range over the median."""
    if len(values) < 2:
        return math.inf
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / abs(median) if median else math.inf


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The order statistics that hold the median with `CONFIDENCE`, whatever the distribution.

    Leaving out k values at each end misses the median with probability `2 P(Binomial(n, 1/2) <= k)`. Fewer than six
    values reach the confidence not even with their extremes, which are then the interval.
    """
    ordered, n, k = sorted(values), len(values), 0
    while 2 * sum(math.comb(n, i) for i in range(k + 2)) <= (1 - CONFIDENCE) * 2**n:
        k += 1
    return ordered[k], ordered[n - 1 - k]


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median and its interval."""
    low, high = interval(values)
    return {"median": statistics.median(values), "low": low, "high": high}


def verdict(low: float, high: float, bound: float, *, at_least: bool) -> str:
    """ "met" or "missed" if the whole interval is on that side of the bound, else "unclear"."""
    is_met = [x >= bound if at_least else x <= bound for x in (low, high)]
    return "met" if all(is_met) else "unclear" if any(is_met) else "missed"


def slope(pixels: Sequence[int], values: Sequence[float]) -> float:
    """The slope of the line through log value against log pixels: the power of a power law."""
    x, y = ([math.log(v) for v in series] for series in (pixels, values))
    return statistics.linear_regression(x, y).slope


# ---------------------------------------------------------------------------------------------------------------------
# Peak memory.


def can_measure_memory(device: str) -> bool:
    return device == "cuda" or RESET_PEAK.exists()


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """``function(*arguments)`` in a process of its own, with this one's threads and precision of products.

    It is forked from a server that has imported the package and run nothing: fresh, without paying for the imports.
    """
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    context.set_forkserver_preload(["benchmarks.runner"])
    settings = torch.get_num_threads(), torch.get_float32_matmul_precision()
    with ProcessPoolExecutor(1, context) as pool:
        return pool.submit(_with_settings, settings, function, arguments).result()


def _with_settings(settings: tuple[int, str], function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    torch.set_num_threads(settings[0])
    torch.set_float32_matmul_precision(settings[1])
    return function(*arguments)


def peak_mib(run: Callable[[], tuple[Tensor, ...]], device: str) -> dict[str, float]:
    """MiB by which ``run`` raises the peak above what is resident before it, and MiB of its results among them."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results = run()
        peak = torch.cuda.max_memory_allocated() - before
    else:
        libc = ctypes.CDLL(None)
        # Large blocks go back when they are freed. By default glibc keeps some, differently in every process, and the
        # figure would be that of its guesses instead of the memory in use.
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 20)
        libc.malloc_trim(0)
        RESET_PEAK.write_text("5")
        before = _status_kib("VmRSS")
        results = run()
        peak = 1024 * (_status_kib("VmHWM") - before)
    kept = sum(x.numel() * x.element_size() for x in results)
    return {"peak_mib": peak / 2**20, "result_mib": kept / 2**20}


def _status_kib(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
