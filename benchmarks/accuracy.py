"""Error against float64 of the variants of the cases, by backend, dtype and size."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from . import builders, machine
from .problem import Problem, UnavailableError, Variants

# What is compared, its builder, and the names of its results in order.
SUBJECTS = {
    "Eq. 4": (builders.propagation, ("output",)),
    "softmax affinity": (builders.softmax, ("output", "gradient")),
    "loss against a view": (builders.loss_consistency, ("value", "gradient")),
    "loss against labels": (builders.loss_labelled, ("value", "gradient")),
    "squared loss": (builders.loss_frobenius, ("value", "gradient")),
}
EDGES = {"quick": (17, 33), "full": (17, 41, 81)}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def run(device: str, mode: str) -> dict[str, Any]:
    """Rows of errors: each result of each variant against the dense formula in float64 on the same inputs."""
    rows = []
    for subject, (build, results) in SUBJECTS.items():
        for edge in EDGES[mode]:
            for dtype in DTYPES:
                rows += _rows(subject, build, results, Problem(edge, edge, dtype=dtype, device=device))
    for edge in EDGES[mode]:  # float32 with products in reduced precision
        rows += _rows(
            "loss against a view", builders.precision, ("value", "gradient"), Problem(edge, edge, device=device)
        )
    return {"title": "error against float64", "group": "accuracy", "run": machine.provenance(mode), "rows": rows}


def _rows(subject: str, build: Any, names: tuple[str, ...], problem: Problem) -> list[dict[str, Any]]:
    exact = replace(problem, dtype=torch.float64, drawn=problem.dtype)
    reference_build = builders.loss_consistency if build is builders.precision else build
    reference = _reference(reference_build(exact))
    rows = []
    for variant, built in build(problem).items():
        is_reduced = build is builders.precision and variant != "dlprop"
        if not is_reduced and (build is builders.precision or not _is_compared(variant, built.kind, problem)):
            continue
        facts = {"subject": subject, "pixels": problem.M, "variant": variant, "dtype": str(problem.dtype)[6:]}
        try:
            found = built.run()
        except UnavailableError:
            continue
        except RuntimeError as error:  # a dtype that a formula does not have on this device
            rows.append(facts | {"result": names[0], "status": "failed", "note": str(error).splitlines()[0][:200]})
            continue
        for name, x, y in zip(names, found, reference, strict=True):
            rows.append(facts | {"result": name} | errors(x, y))
    return rows


def _reference(variants: Variants) -> tuple[Tensor, ...]:
    """The dense formula as written, which shares no code with ours."""
    name = next(n for n in ("dense PyTorch", "dense autograd") if n in variants)
    return variants[name].run()


def _is_compared(variant: str, kind: str, problem: Problem) -> bool:
    if "compiled" in variant or variant == "KeOps":
        return False
    return kind == "ours" or (kind == "equivalent" and problem.dtype == torch.float32)


def errors(x: Tensor, y: Tensor) -> dict[str, Any]:
    """The largest error, and the same over the largest magnitude of the reference."""
    worst, scale = float((x.to(y) - y).abs().max()), float(y.abs().max())
    if not math.isfinite(worst):
        return {"status": "not finite", "max_error": None, "relative_error": None}
    return {"status": "ok", "max_error": worst, "relative_error": worst / (scale or 1.0)}
