"""The facts that a figure belongs to: the machine, the versions, the commit, and the rates it is held against."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import dlprop

ROOT = Path(__file__).parents[1]
MATRIX = {"cpu": 2048, "cuda": 8192}  # edge of the square matrices whose product gives the matrix rate
COPY_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}


def facts(device: str) -> dict[str, Any]:
    """What a figure depends on besides the code."""
    processor = _proc("cpuinfo", "model name") or platform.processor() or platform.machine()
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else processor,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": version("numpy"),
        "dlprop": dlprop.__version__,
    }


def provenance() -> dict[str, Any]:
    """When a run began, and of which code; a commit ends in "+" where the code had changed since."""
    commit = _git("rev-parse", "--short", "HEAD")
    if commit and _git("status", "--porcelain", "--", "src", "benchmarks/*.py"):
        commit += "+"
    return {"date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"), "commit": commit or "unknown"}


def rates(device: str) -> dict[str, float]:
    """Operations a second of a square matrix product, and bytes a second of a copy, read plus written."""
    size = MATRIX[device]
    a, b = (torch.rand(size, size, device=device) for _ in range(2))
    source = torch.ones(COPY_BYTES[device] // 4, device=device)
    target = torch.empty_like(source)
    return {
        "matrix": 2 * size**3 / _best_seconds(lambda: a @ b, device),
        "copy": 2 * COPY_BYTES[device] / _best_seconds(lambda: target.copy_(source), device),
    }


def available_bytes(device: str) -> float:
    """Memory that a variant may take."""
    if device == "cuda":
        return float(torch.cuda.mem_get_info()[0])
    free = _proc("meminfo", "MemAvailable")
    return 1024 * float(free.split()[0]) if free else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _best_seconds(run: Callable[[], Any], device: str, repeats: int = 6) -> float:
    best = float("inf")
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best


def _proc(file: str, field: str) -> str:
    try:
        lines = Path("/proc", file).read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(field)), "")


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
