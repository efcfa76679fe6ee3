"""The cases: one definition of each feeds speed, memory, accuracy and growth, and carries the targets it is held to."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from dlprop import DerivativeLoss

from . import builders
from .problem import Problem, Variants

Device = Literal["cpu", "cuda"]
# speedup: the other's time over ours; cost: ours over the other's; share: of the matrix rate; copy: times the copying
# of its bytes; peak: MiB beyond inputs and results; seconds; slopes in log-log.
Measure = Literal["speedup", "cost", "share", "copy", "peak", "seconds", "time slope", "memory slope"]
AT_LEAST = ("speedup", "share")


@dataclass(frozen=True)
class Target:
    """What a case is held to: the bound on one measure of variant ``of``, against another variant if it is a ratio."""

    measure: Measure
    bound: float
    against: str | None = None
    of: str = "dlprop"
    device: Device = "cpu"
    title: str | None = None  # where it is not that of the case
    needs: str | None = None  # a fact of the machine without which the target does not apply


@dataclass(frozen=True)
class Case:
    """A problem, the variants that solve it, and the targets. A short run takes only the variants of the targets."""

    title: str
    group: str
    build: Callable[[Problem], Variants]
    problem: Problem
    targets: tuple[Target, ...] = ()
    devices: tuple[Device, ...] = ("cpu",)
    is_quick: bool = True
    without: tuple[str, ...] = ()  # variants that say nothing at this size
    only: tuple[str, ...] = ()
    quick_without: tuple[str, ...] = ()  # variants too slow for a short run
    tolerance: tuple[float, float] = (1e-4, 1e-4)  # relative, between equivalent variants: values, gradients
    with_memory: bool = True
    extra: Callable[[Problem], dict[str, float]] | None = None
    sample: Callable[[int], dict[str, list[float]]] | None = None  # instead of `build`: seconds by variant


def square(edge: int, n: int = 1, **sizes: int) -> Problem:
    return Problem(edge, edge, n, **sizes)


def standard_error(p: Problem, draws: int = 12) -> dict[str, float]:
    """Relative standard error of the sampled loss: root mean square of its distance from the exact one."""
    feats, view = p.features(), p.features(5)
    with torch.no_grad():
        exact = DerivativeLoss(eta=0.0)(feats, view)
        sampled = DerivativeLoss(eta=0.0, num_anchors=1024)
        errors = torch.stack([sampled(feats, view) / exact - 1 for _ in range(draws)])
    return {"relative_standard_error": float(errors.square().mean().sqrt()), "draws": draws}


def import_seconds(rounds: int) -> dict[str, list[float]]:
    """Seconds that `import torch` takes in a fresh process, and `import dlprop` after it in the same one."""
    code = (
        "import time; a = time.perf_counter(); import torch; b = time.perf_counter(); import dlprop; "
        "print(time.perf_counter() - b, b - a)"
    )
    samples: dict[str, list[float]] = {"dlprop": [], "torch": []}
    for _ in range(rounds):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        for name, seconds in zip(samples, done.stdout.split(), strict=True):
            samples[name].append(float(seconds))
    return samples


# A residual near 0 may round to either side, and its whole sign goes into the gradient of an L1 loss.
KINKS = (1e-4, 2e-2)
DENSE, AUTOGRAD = "dense PyTorch", "dense autograd"
SLOW = ("KeOps",)
CITY = "Eq. 4, 1024 x 2048, `normalize=None`"

CASES: dict[str, Case] = {
    "propagation_41": Case(
        "Eq. 4, 41 x 41", "propagation", builders.propagation, square(41), is_quick=False, devices=("cpu", "cuda")
    ),
    "propagation_129": Case(
        "Eq. 4, 129 x 129",
        "propagation",
        builders.propagation,
        square(129),
        (Target("speedup", 500, DENSE),),
        ("cpu", "cuda"),
        without=SLOW,
    ),
    "propagation_1024": Case(
        CITY,
        "propagation",
        builders.propagation_large,
        Problem(1024, 2048),
        (
            Target("cost", 1.2, "its two matrix products"),
            Target("cost", 3.5, "dlprop", of="dlprop, forward and backward", title=f"{CITY}, forward and backward"),
            Target(
                "cost",
                2.2,
                "its two matrix products",
                of="dlprop, L1-normalised",
                title="Eq. 4, 1024 x 2048, L1-normalised",
            ),
            Target("copy", 1.3, device="cuda"),
        ),
        ("cpu", "cuda"),
    ),
    "propagation_full": Case(
        "Eq. 4 at 321 x 321 on 41 x 41 features",
        "propagation",
        builders.full_resolution,
        Problem(321, 321, grid=(41, 41)),
        (Target("cost", 1.5, "feature grid with two resizes"),),
        ("cpu", "cuda"),
    ),
    "loss_21": Case(
        "loss against a view, 21 x 21, forward and backward",
        "loss",
        builders.loss_consistency,
        square(21),
        is_quick=False,
        devices=("cpu", "cuda"),
        tolerance=KINKS,
    ),
    "loss_81": Case(
        "loss against a view, 81 x 81, forward and backward",
        "loss",
        builders.loss_consistency,
        square(81),
        (Target("speedup", 3.3, AUTOGRAD), Target("share", 0.75)),
        ("cpu", "cuda"),
        without=SLOW,
        tolerance=KINKS,
    ),
    "loss_41": Case(
        "loss against a view, N=4, 41 x 41, forward and backward",
        "loss",
        builders.loss_consistency,
        square(41, 4),
        (Target("speedup", 3, AUTOGRAD),),
        ("cpu", "cuda"),
        without=SLOW,
        tolerance=KINKS,
    ),
    "loss_129": Case(
        "loss against a view, 129 x 129, forward and backward",
        "loss",
        builders.loss_consistency,
        square(129),
        (
            Target("speedup", 8, AUTOGRAD),
            Target("peak", 64),
            Target("speedup", 4, AUTOGRAD, device="cuda"),
            Target("speedup", 2, "dlprop tiled", device="cuda"),
            Target("share", 0.5, device="cuda"),
        ),
        ("cpu", "cuda"),
        without=(*SLOW, "dlprop dense"),
        quick_without=(AUTOGRAD,),
        tolerance=KINKS,
    ),
    "loss_321": Case(
        "loss against a view, 321 x 321, forward and backward",
        "loss",
        builders.loss_consistency,
        square(321),
        (Target("seconds", 0.5, device="cuda"), Target("peak", 2000, device="cuda")),
        ("cuda",),
        tolerance=KINKS,
    ),
    "loss_81_labels": Case(
        "loss against labels, 81 x 81, forward and backward",
        "loss",
        builders.loss_labelled,
        square(81),
        (Target("speedup", 5, AUTOGRAD),),
        ("cpu", "cuda"),
        tolerance=KINKS,
    ),
    "loss_81_labels_signed": Case(
        "loss against labels, 81 x 81, signed features, forward and backward",
        "loss",
        partial(builders.loss_labelled, signed=True),
        square(81),
        is_quick=False,
        only=("dlprop", AUTOGRAD),
        tolerance=KINKS,
    ),
    "softmax_21": Case(
        "softmax affinity, 21 x 21, forward and backward",
        "softmax",
        builders.softmax,
        square(21),
        is_quick=False,
    ),
    "softmax_41": Case(
        "softmax affinity, 41 x 41, forward and backward",
        "softmax",
        builders.softmax,
        square(41),
        devices=("cpu", "cuda"),
        is_quick=False,
        without=SLOW,
    ),
    "softmax_81": Case(
        "softmax affinity, 81 x 81, forward and backward",
        "softmax",
        builders.softmax,
        square(81),
        (Target("speedup", 1.5, AUTOGRAD),),
        ("cpu", "cuda"),
        without=SLOW,
    ),
    "released_81": Case(
        "released affinity, 21 + 21 channels, 81 x 81, forward and backward",
        "softmax",
        builders.released,
        square(81),
        devices=("cpu", "cuda"),
        is_quick=False,
    ),
    "loss_321_frobenius": Case(
        "squared loss, 321 x 321, forward and backward",
        "loss",
        builders.loss_frobenius,
        square(321),
        (Target("cost", 6, "one product per order"),),
        ("cpu", "cuda"),
        quick_without=(AUTOGRAD,),
    ),
    "loss_129_sampled": Case(
        "loss with 1024 anchors, 129 x 129, forward and backward",
        "loss",
        builders.loss_sampled,
        square(129),
        (Target("speedup", 10, "dlprop, exact"),),
        ("cpu", "cuda"),
        extra=standard_error,
    ),
    "precision_81": Case(
        "loss against a view, 81 x 81, reduced precision",
        "other",
        builders.precision,
        square(81),
        (
            Target(
                "cost",
                1 / 2.5,
                "dlprop",
                of="matmul precision medium",
                title="loss against a view, 81 x 81, matmul precision medium",
                needs="bfloat16_matrix_units",
            ),
            Target(
                "cost",
                1 / 2.5,
                "dlprop",
                of="autocast bfloat16",
                title="loss against a view, 81 x 81, autocast bfloat16",
                needs="bfloat16_matrix_units",
            ),
        ),
    ),
    "precision_129": Case(
        "loss against a view, 129 x 129, other precisions",
        "other",
        builders.precision,
        square(129),
        devices=("cuda",),
    ),
    "averager": Case(
        "update of the momentum network, ResNet-50",
        "other",
        builders.averager,
        square(1),
        (Target("cost", 1.5, "AveragedModel"),),
        with_memory=False,
    ),
    "import": Case(
        "`import dlprop` after `import torch`",
        "other",
        builders.averager,
        square(1),
        (Target("seconds", 0.1),),
        sample=import_seconds,
    ),
}
