"""Error against float64 of the variants of the cases, by backend, dtype and size."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import builders, machine
from .problem import Problem, UnavailableError, Variants

# What is compared, its builder, and the names of its results in order. Losses go without their sparsity term: second
# differences of inputs that were rounded to 8 or 11 bits are often exactly 0, where any sign is a subgradient. Their
# gradients are scaled as GradScaler does, or float16 would lose them: a mean over pairs has gradients of 1e-8.
PLAIN = {"eta": 0.0, "scale": 2.0**16}
LOSS = partial(builders.loss_consistency, **PLAIN)
SUBJECTS = {
    "Eq. 4": (builders.propagation, ("output",)),
    "softmax affinity": (builders.softmax, ("output", "gradient")),
    "loss against a view": (LOSS, ("value", "gradient")),
    "loss against labels": (partial(builders.loss_labelled, **PLAIN), ("value", "gradient")),
    "squared loss": (partial(builders.loss_frobenius, **PLAIN), ("value", "gradient")),
}
# Float32 with products in another precision than that of the run; which of them there are depends on the device.
PRECISIONS = (
    "autocast bfloat16",
    "matmul precision medium",
    "matmul precision highest",
    "matmul precision highest, triton",
)
EDGES = {"quick": (17, 33), "full": (17, 41, 81)}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def run(device: str, mode: str) -> dict[str, Any]:
    """Rows of errors: each result of each variant against the dense formula in float64 on the same inputs."""
    rows = []
    for subject, (build, results) in SUBJECTS.items():
        for edge, dtype in itertools.product(EDGES[mode], DTYPES):
            problem = Problem(edge, edge, dtype=dtype, device=device)
            variants = build(problem)
            if build is LOSS and dtype == torch.float32:
                precisions = builders.precision(problem, **PLAIN)
                variants |= {name: variant for name, variant in precisions.items() if name in PRECISIONS}
            reference = _reference(build(replace(problem, dtype=torch.float64, drawn=dtype)))
            rows += _rows({"subject": subject, "pixels": problem.M}, variants, reference, results, dtype)
    return {"title": "error against float64", "group": "accuracy", "run": machine.provenance(mode), "rows": rows}


def _rows(
    subject: dict[str, Any],
    variants: Variants,
    reference: tuple[Tensor, ...],
    names: tuple[str, ...],
    dtype: torch.dtype,
) -> list[dict[str, Any]]:
    rows = []
    for variant, built in variants.items():
        if not _is_compared(variant, built.kind, dtype):
            continue
        facts = subject | {"variant": variant, "dtype": str(dtype).removeprefix("torch.")}
        try:
            found = built.run()
        except UnavailableError:
            continue
        except (RuntimeError, ValueError) as error:  # a dtype that a formula or backend does not have on this device
            rows.append(facts | {"result": names[0], "status": "failed", "note": str(error).splitlines()[0][:200]})
            continue
        for name, x, y in zip(names, found, reference, strict=True):
            rows.append(facts | {"result": name} | errors(x, y))
    return rows


def _reference(variants: Variants) -> tuple[Tensor, ...]:
    """The dense formula as written, which shares no code with ours."""
    name = next(n for n in ("dense PyTorch", "dense autograd") if n in variants)
    return variants[name].run()


def _is_compared(variant: str, kind: str, dtype: torch.dtype) -> bool:
    if "compiled" in variant or variant == "KeOps":
        return False
    return kind == "ours" or variant in PRECISIONS or (kind == "equivalent" and dtype == torch.float32)


def errors(x: Tensor, y: Tensor) -> dict[str, Any]:
    """The largest error, and the same over the largest magnitude of the reference."""
    worst, scale = float((x.to(y) - y).abs().max()), float(y.abs().max())
    if not math.isfinite(worst):
        return {"status": "not finite", "max_error": None, "relative_error": None}
    return {"status": "ok", "max_error": worst, "relative_error": worst / (scale or 1.0)}
