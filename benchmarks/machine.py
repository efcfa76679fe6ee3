"""The facts that a figure belongs to: the machine, the versions, the commit, and the rates it is held against."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import dlprop

ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "numpy", "triton", "pykeops", "torchvision")
MATRIX = {"cpu": 2048, "cuda": 8192}  # edge of the square matrices whose product gives the matrix rate
COPY_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}


def facts(device: str) -> dict[str, Any]:
    """What a figure depends on besides the code."""
    flags = _cpuinfo("flags").split()
    machine: dict[str, Any] = {
        "dlprop": dlprop.__version__,
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "system": platform.system(),
        "processor": _cpuinfo("model name") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "bfloat16_vectors": "avx512_bf16" in flags,
        "bfloat16_matrix_units": "amx_bf16" in flags,
        "gpu": None,
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        capability = f"{properties.major}.{properties.minor}"
        machine["gpu"] = {
            "name": properties.name,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "compute_capability": capability,
            "cuda": torch.version.cuda,
        }
        machine["bfloat16_matrix_units"] = properties.major >= 8
    return machine


def provenance(mode: str) -> dict[str, Any]:
    """When a result was measured, and of which code."""
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "commit": _git("rev-parse", "--short", "HEAD"),
        "dirty": _git("status", "--porcelain", "--", "src", "benchmarks/*.py") not in ("", None),
        "mode": mode,
    }


def rates(device: str) -> dict[str, float]:
    """Operations per second of a square matrix product, and bytes per second of a copy (read plus written)."""
    size = MATRIX[device]
    a, b = (torch.rand(size, size, device=device) for _ in range(2))
    operations = 2 * size**3
    found = {}
    before = torch.get_float32_matmul_precision()
    for name, setting in {"float32": "highest", "tf32": "high"}.items():
        if name == "tf32" and device != "cuda":
            continue
        torch.set_float32_matmul_precision(setting)
        found[name] = operations / _best_seconds(lambda: a @ b, device)
    torch.set_float32_matmul_precision(before)
    a16, b16 = a.bfloat16(), b.bfloat16()
    found["bfloat16"] = operations / _best_seconds(lambda: a16 @ b16, device)
    source = torch.ones(COPY_BYTES[device] // 4, device=device)
    target = torch.empty_like(source)
    found["copy"] = 2 * COPY_BYTES[device] / _best_seconds(lambda: target.copy_(source), device)
    return found


def float32_rate(found: dict[str, float]) -> float:
    """The rate that float32 products reach under the setting of the run (TF32 on GPUs)."""
    return (
        found["float32"] if torch.get_float32_matmul_precision() == "highest" else found.get("tf32", found["float32"])
    )


def available_bytes(device: str) -> float:
    """Memory that a variant may take."""
    if device == "cuda":
        return float(torch.cuda.mem_get_info()[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * next(float(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) / 2


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


def _cpuinfo(field: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(field)), "")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
