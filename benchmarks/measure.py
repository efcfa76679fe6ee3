"""Timing side by side, and peak memory in a fresh process."""

from __future__ import annotations

import ctypes
import math
import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .machine import synchronize

Run = Callable[[], Any]

# Linux resets the peak of a process when 5 is written here.
RESET_PEAK = Path("/proc/self/clear_refs")

M_MMAP_THRESHOLD = -3  # the name of the setting in glibc's malloc.h

# What is quicker runs several times a turn, and once before without being timed: the variant before it may have emptied
# the caches, which a few milliseconds would pay for and seconds would not.
QUICK = 0.1
TURN = 0.05


@dataclass(frozen=True)
class Effort:
    """How long to measure: seconds for all rounds of a case, and the rounds at least and at most."""

    seconds: float
    least: int
    most: int
    longest: float  # seconds that one run may be expected to take; longer ones are "too slow"


EFFORTS = {"quick": Effort(3.0, 2, 9, 30.0), "full": Effort(20.0, 3, 21, 40.0)}


def seconds_of(run: Run, device: str, times: int = 1) -> float:
    """Mean wall-clock seconds of ``times`` runs, by the device's own events on a GPU."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(times):
            run()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / times
    begin = time.perf_counter()
    for _ in range(times):
        run()
    return (time.perf_counter() - begin) / times


def interleaved(
    runs: Mapping[str, Run], taken: Mapping[str, float], device: str, effort: Effort
) -> dict[str, list[float]]:
    """Seconds of every variant, round by round in turn, so that a slow spell of the machine meets all of them alike.

    The variants have run once and have ``taken`` so many seconds. A round gives each one sample, the mean of as many
    runs as fill `TURN` seconds.
    """
    expected = {}
    for name, run in runs.items():
        # A first run says little about a quick one: it loads what is loaded at first use.
        expected[name] = taken[name] if taken[name] > 0.3 else min(seconds_of(run, device) for _ in range(2))
    times = {name: math.ceil(TURN / max(s, TURN / 20)) if s < QUICK else 1 for name, s in expected.items()}
    a_round = sum(s * (times[name] + (s < QUICK)) for name, s in expected.items())
    rounds = min(effort.most, max(effort.least, int(effort.seconds / a_round)))
    samples: dict[str, list[float]] = {name: [] for name in runs}
    if a_round > effort.seconds:  # too long to throw a run away: the first ones were in turn, too
        samples = {name: [s] for name, s in expected.items()}
        rounds -= 1
    for _ in range(rounds):
        for name, run in runs.items():
            if expected[name] < QUICK:
                run()
            synchronize(device)
            samples[name].append(seconds_of(run, device, times[name]))
    return samples


def summary(samples: list[float]) -> dict[str, float]:
    """Median and interquartile range."""
    quartiles = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else [0.0] * 3
    return {"median": statistics.median(samples), "iqr": quartiles[2] - quartiles[0], "rounds": len(samples)}


def ratio(samples: list[float], over: list[float]) -> dict[str, float]:
    """The ratio of two variants within a round: what slows both for a moment cancels."""
    return summary([a / b for a, b in zip(samples, over, strict=True)])


def slope(pixels: list[int], values: list[float]) -> float | None:
    """The slope of the line through log value against log pixels; None for fewer than two points."""
    if len(pixels) < 2:
        return None
    x, y = ([math.log(v) for v in series] for series in (pixels, values))
    return statistics.linear_regression(x, y).slope


# ---------------------------------------------------------------------------------------------------------------------
# Peak memory.


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


def can_measure_memory(device: str) -> bool:
    return device == "cuda" or RESET_PEAK.exists()


def in_fresh_process(function: Callable[..., Any], *arguments: Any, timeout: float) -> Any:
    """``function(*arguments)`` in a process of its own, or RuntimeError with what became of it.

    The process is forked from a server that has imported torch and this package and run nothing: fresh, without paying
    for the imports again.
    """
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    context.set_forkserver_preload(["benchmarks.suite"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, function, arguments))
    process.start()
    sender.close()
    try:
        if not receiver.poll(timeout):
            raise RuntimeError(f"took longer than {timeout:.0f} s")
        result, problem = receiver.recv()
    except EOFError:
        process.join(10)
        raise RuntimeError(f"the process ended with {process.exitcode}, as one does that runs out of memory") from None
    finally:
        if process.is_alive():
            process.join(1)
            process.kill()
    if problem:
        raise RuntimeError(problem)
    return result


def _send(sender: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        sender.send((function(*arguments), None))
    except Exception as error:
        sender.send((None, f"{type(error).__name__}: {error}"))


def _status_kib(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
