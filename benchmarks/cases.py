"""The cases: one definition of each is timed, weighed, checked and drawn, and carries the targets it is held to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from . import builders
from .builders import (
    ATTENTION,
    BARE_PRODUCT,
    COPIES,
    MATRIX,
    ONE_PRODUCT_PER_ORDER,
    PLAIN_HIGHEST,
    PRODUCTS,
    SAME_OPERATIONS,
    THREE_PRODUCTS,
    UNFOLD,
)
from .plain import plain_discriminant, plain_ridge
from .problem import COMPILED, OURS, PLAIN, Problem, Variants

# speedup: the other's time over ours, and share the same in per cent; cost: ours over the other's; peak: MiB beyond
# inputs and results; slopes: the powers with which time and memory grow with the pixels.
Measure = Literal["speedup", "share", "cost", "seconds", "peak", "time slope", "memory slope"]
AT_LEAST = ("speedup", "share")


@dataclass(frozen=True)
class Target:
    """What a case is held to: the bound on one measure of variant ``of``, against another variant if it is a ratio.

    The bounds are those of a CPU; elsewhere the figure is told without one.
    """

    measure: Measure
    bound: float
    against: str | None = None
    of: str = OURS


@dataclass(frozen=True)
class Case:
    """A problem, the variants that solve it, and the targets. A short run takes the variants of the targets only.

    With ``edges`` the problem is solved on square images of all these sizes, by ours and at ``plain_edges`` by PLAIN.
    """

    title: str
    build: Callable[[Problem], Variants]
    problem: Problem
    targets: tuple[Target, ...] = ()
    readme: str | None = None  # the title in the README's table, for at most six; its figure is the first target's
    is_quick: bool = True  # whether a short run has the case
    slow: tuple[str, ...] = ()  # variants too slow for a short run
    without: tuple[str, ...] = ()  # variants that say nothing here
    tolerance: tuple[float, float] = (1e-4, 1e-4)  # relative, between equivalent variants: of values, of gradients
    with_memory: bool = True
    error: Callable[[Problem], float] | None = None  # the relative standard error of a sampled result
    edges: tuple[int, ...] = ()
    plain_edges: tuple[int, ...] = ()


# A residual near 0 may round to either side, and its whole sign goes into the gradient of an L1 loss.
KINKS = (1e-4, 2e-2)
# The plain formula adds up two million numbers in float32.
LONG_SUMS = (1e-3, 1e-3)
# The logarithm of a fitted probability near 0 magnifies its rounding.
NEAR_ZERO = (1e-2, 1e-1)
EDGES = (33, 57, 81, 129)
DISCRIMINANT = partial(builders.closed_form, ours="discriminant", plain=plain_discriminant)
RIDGE = partial(builders.closed_form, ours="ridge", plain=plain_ridge)


def square(edge: int, n: int = 1) -> Problem:
    return Problem(edge, edge, n)


def growth(title: str, build: Callable[[Problem], Variants], *targets: Target, **sizes: tuple[int, ...]) -> Case:
    """A case at several sizes, for the power with which its time and memory grow with the pixels."""
    targets = (*targets, Target("memory slope", 1.05))
    return Case(title, build, square(1), targets, is_quick=False, tolerance=KINKS, **sizes)


CASES: dict[str, Case] = {
    # Propagation. A further affinity is a plain formula in `builders`, and a case of it with `builders.affinity`.
    "propagation_41": Case("Eq. 4, 41 x 41", builders.propagation, square(41), is_quick=False),
    "propagation_129": Case(
        "Eq. 4, 129 x 129",
        builders.propagation,
        square(129),
        (Target("speedup", 500, PLAIN),),
        "propagation, 129 x 129",
    ),
    "propagation_129_masked": Case(
        "Eq. 4 with a mask, 129 x 129, training",
        builders.masked,
        square(129),
        (Target("cost", 1.15, "dlprop without a mask"),),
    ),
    "propagation_1024": Case(
        "Eq. 4, 1024 x 2048, `normalize=None`",
        builders.street,
        Problem(1024, 2048),
        (
            Target("cost", 1.2, PRODUCTS),
            Target("cost", 3.5, OURS, of="dlprop, forward and backward"),
            Target("cost", 2.2, PRODUCTS, of="dlprop, L1-normalised"),
        ),
        "propagation, 1024 x 2048",
    ),
    "propagation_full": Case(
        "Eq. 4 at 321 x 321 on 41 x 41 features",
        builders.full_resolution,
        Problem(321, 321, grid=(41, 41)),
        (Target("cost", 1.5, "feature grid with two resizes"),),
    ),
    "softmax_81": Case(
        "softmax affinity, 81 x 81, training",
        builders.softmax,
        square(81),
        (Target("speedup", 1.5, PLAIN),),
        "softmax propagation and its gradient, 81 x 81",
    ),
    # Over the sources.
    "attention_81": Case(
        "attention, 81 x 81", builders.sources_of_each_target, square(81), (Target("speedup", 1, ATTENTION),)
    ),
    "clicks_360": Case(
        f"attention over {builders.CLICKS} labelled pixels, 360 x 480",
        builders.clicked,
        Problem(360, 480, C=11),
        (Target("seconds", 0.05), Target("speedup", 1, ATTENTION)),
    ),
    "window_512": Case(
        "five steps of a window of colours, 512 x 1024, C = 19",
        builders.colour_window,
        Problem(512, 1024, C=19, D=3),
        (Target("speedup", 4, UNFOLD), Target("cost", 1.5, COPIES)),
    ),
    # Closed forms, which cost one product `V V^T` and two with C rows.
    "discriminant_41": Case(
        "discriminant, 41 x 41", DISCRIMINANT, square(41), (Target("cost", 1.3, THREE_PRODUCTS),), is_quick=False
    ),
    "discriminant_129": Case(
        "discriminant, 129 x 129",
        DISCRIMINANT,
        square(129),
        (Target("speedup", 100, MATRIX), Target("cost", 1.3, THREE_PRODUCTS)),
        "discriminant propagation, 129 x 129",
    ),
    "discriminant_training": Case(
        "discriminant, 129 x 129, training", partial(DISCRIMINANT, is_trained=True), square(129), is_quick=False
    ),
    "discriminant_1024": Case(
        "discriminant, 1024 x 2048",
        DISCRIMINANT,
        Problem(1024, 2048),
        (Target("cost", 1.3, THREE_PRODUCTS),),
        "discriminant propagation, 1024 x 2048",
        without=(COMPILED,),
        tolerance=LONG_SUMS,
    ),
    "ridge_41": Case(
        "ridge, 41 x 41",
        RIDGE,
        square(41),
        (Target("cost", 1.3, THREE_PRODUCTS),),
        is_quick=False,
        tolerance=NEAR_ZERO,
    ),
    "ridge_129": Case(
        "ridge, 129 x 129",
        RIDGE,
        square(129),
        (Target("speedup", 100, MATRIX), Target("cost", 1.3, THREE_PRODUCTS)),
        slow=(MATRIX,),
        tolerance=NEAR_ZERO,
    ),
    "ridge_training": Case(
        "ridge, 129 x 129, training",
        partial(RIDGE, is_trained=True),
        square(129),
        is_quick=False,
        tolerance=NEAR_ZERO,
    ),
    "ridge_1024": Case(
        "ridge, 1024 x 2048",
        RIDGE,
        Problem(1024, 2048),
        (Target("cost", 1.3, THREE_PRODUCTS),),
        is_quick=False,
        without=(COMPILED,),
        tolerance=NEAR_ZERO,
    ),
    "statistics_1024": Case(
        "class statistics, 1024 x 2048",
        builders.class_statistics,
        Problem(1024, 2048),
        (Target("share", 0.75, BARE_PRODUCT), Target("peak", 32)),
        tolerance=LONG_SUMS,
    ),
    # Losses, with their gradient.
    "loss_view_41": Case(
        "loss against a view, N = 4, 41 x 41",
        builders.loss_view,
        square(41, 4),
        (Target("speedup", 3, PLAIN),),
        without=(SAME_OPERATIONS,),
        tolerance=KINKS,
    ),
    "loss_view_81": Case(
        "loss against a view, 81 x 81",
        builders.loss_view,
        square(81),
        (Target("speedup", 3.3, PLAIN), Target("share", 0.75, SAME_OPERATIONS)),
        "loss against another view and its gradient, 81 x 81",
        tolerance=KINKS,
    ),
    "loss_view_129": Case(
        "loss against a view, 129 x 129",
        builders.loss_view,
        square(129),
        (Target("speedup", 8, PLAIN), Target("peak", 128)),
        slow=(PLAIN,),
        without=(SAME_OPERATIONS,),
        tolerance=KINKS,
    ),
    "loss_view_129_medium": Case(
        "loss against a view at `medium`, 129 x 129",
        builders.loss_view_medium,
        square(129),
        (Target("speedup", 8, PLAIN_HIGHEST),),
        is_quick=False,
    ),
    "loss_labels_81": Case(
        "loss against labels, 81 x 81",
        builders.loss_labels,
        square(81),
        (Target("speedup", 5, PLAIN),),
        tolerance=KINKS,
    ),
    "squared_321": Case(
        "squared loss, 321 x 321", builders.loss_squared, square(321), (Target("cost", 6, ONE_PRODUCT_PER_ORDER),)
    ),
    "sampled_129": Case(
        "loss with 1024 anchors, 129 x 129",
        builders.loss_sampled,
        square(129),
        (Target("speedup", 10, "dlprop, all pairs"),),
        error=builders.standard_error,
    ),
    # The rest.
    "averager": Case(
        "update of the momentum network, ResNet-50",
        builders.averager,
        square(1),
        (Target("cost", 1.5, "torch's AveragedModel"),),
        with_memory=False,
    ),
    "import": Case(
        "`import dlprop` after `import torch`",
        builders.imports,
        square(1),
        (Target("seconds", 0.1),),
        with_memory=False,
    ),
    # Growth with the pixels.
    "growth_propagation": growth(
        "propagation",
        builders.propagation,
        Target("time slope", 1.05),
        edges=(64, 128, 256, 512, 1024),
        plain_edges=(64, 91, 128, 256),
    ),
    "growth_discriminant": growth(
        "discriminant",
        DISCRIMINANT,
        Target("time slope", 1.05),
        edges=(41, 65, 91, 129, 257),
        plain_edges=(41, 65, 91, 129, 257),
    ),
    "growth_loss": growth("loss against a view", builders.loss_view, edges=EDGES, plain_edges=(*EDGES, 181)),
    "growth_softmax": growth("softmax", builders.softmax, edges=EDGES, plain_edges=(*EDGES, 181)),
    "growth_sampled": growth("loss with 1024 anchors", builders.loss_sampled, edges=(65, 91, 129, 181)),
    "growth_squared": growth(
        "squared loss", builders.loss_squared, edges=(41, 65, 91, 129, 257), plain_edges=(41, 65, 91, 129)
    ),
}

# Results at 41 x 41 are compared with those in float64.
ACCURACY = (
    "propagation_129",
    "softmax_81",
    "discriminant_129",
    "loss_view_81",
    "loss_view_129_medium",
    "loss_labels_81",
    "squared_321",
)
ACCURACY_EDGE = 41
