"""Timing side by side, peak memory in a fresh process, and the facts of the machine that a figure belongs to."""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

import dlprop

# Linux resets the peak of a process when 5 is written here.
RESET_PEAK = Path("/proc/self/clear_refs")


def interleaved_seconds(variants: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Wall-clock seconds of every variant, run in turn so that a slow spell of the machine meets all of them alike."""
    for run in variants.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repeats):
        for name, run in variants.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def summary(samples: list[float]) -> dict[str, float]:
    """Median and interquartile range."""
    quartiles = statistics.quantiles(samples, n=4) if len(samples) > 1 else [samples[0]] * 3
    return {"median": statistics.median(samples), "iqr": quartiles[2] - quartiles[0], "runs": len(samples)}


def peak_mib_of(run: Callable[[], Any]) -> float:
    """MiB by which ``run`` raises the peak memory of this process above what is resident before it."""
    RESET_PEAK.write_text("5")
    before = _status_kib("VmRSS")
    run()
    return (_status_kib("VmHWM") - before) / 1024


def peak_mib_in_fresh_process(case: str, variant: str) -> float | None:
    """`peak_mib_of` one variant of a case in a new Python process; None where the system does not tell."""
    if not RESET_PEAK.exists():
        return None
    command = [sys.executable, "-m", "benchmarks", "--peak-of", case, variant]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1]))


def matrix_rate(size: int = 2048, repeats: int = 5) -> float:
    """Float32 matrix-product rate in operations per second, the best of several runs."""
    a, b = torch.rand(size, size), torch.rand(size, size)
    return 2 * size**3 / min(interleaved_seconds({"product": lambda: a @ b}, repeats)["product"])


def machine() -> dict[str, Any]:
    """What a figure depends on besides the code."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return {
        "dlprop": dlprop.__version__,
        "commit": commit.stdout.strip() or None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "max_rss_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "system": platform.system(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _status_kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
