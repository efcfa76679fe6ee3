"""What a case is made of: a problem (sizes, dtype, device, inputs) and the variants that solve it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

# "ours" and "equivalent" compute the same thing and must agree; "related" does the same work for another result;
# "bound" is a lower bound, such as the bare matrix products.
Kind = Literal["ours", "equivalent", "related", "bound"]


REPEATED = (1 << 23) - 15  # odd, so that no two channels of an image are alike


class UnavailableError(RuntimeError):
    """A variant that cannot run here, with the reason."""


@dataclass(frozen=True)
class Problem:
    """Sizes of one problem in the letters of DESIGN, and its inputs, the same at every call.

    ``grid`` is the features' grid where it is not that of the logits. Inputs are rounded to ``drawn`` before they take
    ``dtype``, so that a float64 reference sees exactly the numbers that a bfloat16 variant sees.
    """

    height: int
    width: int
    n: int = 1
    D: int = 256
    C: int = 21
    grid: tuple[int, int] | None = None
    dtype: torch.dtype = torch.float32
    drawn: torch.dtype | None = None
    device: str = "cpu"

    @property
    def M(self) -> int:  # noqa: N802 - the paper's letter
        return self.height * self.width

    @property
    def element(self) -> int:
        """Bytes of a number."""
        return self.dtype.itemsize

    def features(self, seed: int = 1, *, signed: bool = False) -> Tensor:
        """Features (N, D, h, w), non-negative as after a ReLU unless ``signed``."""
        height, width = self.grid or (self.height, self.width)
        x = _draw(torch.rand, (self.n, self.D, height, width), seed)
        return self._typed(x.sub_(0.5) if signed else x)

    def logits(self, seed: int = 2, channels: int | None = None) -> Tensor:
        """Normal numbers (N, C, H, W)."""
        shape = (self.n, channels or self.C, self.height, self.width)
        return self._typed(_draw(torch.randn, shape, seed))

    def labels(self, seed: int = 3) -> Tensor:
        """Labels (N, H, W)."""
        shape = (self.n, self.height, self.width)
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, self.C, shape, generator=generator).to(self.device)

    def _typed(self, x: Tensor) -> Tensor:
        return x.to(self.drawn or self.dtype).to(self.device, self.dtype)


@dataclass(frozen=True)
class Work:
    """What a variant does by count: operations, bytes it must move at least, bytes it holds beyond its inputs.

    ``in_half`` says that its matrix units multiply half precision numbers, so that the rate for these is its limit.
    """

    operations: float = 0.0
    traffic: float = 0.0
    peak: float = 0.0
    in_half: bool = False


@dataclass(frozen=True)
class Variant:
    """One way to solve a problem. ``run`` does the whole step and returns its results: output, or loss and gradient."""

    run: Callable[[], tuple[Tensor, ...]]
    kind: Kind = "equivalent"
    work: Work = field(default_factory=Work)
    compiles: bool = False  # at the first run, which therefore says nothing about the time


Variants = dict[str, Variant]


def forward(function: Callable[[], Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    """A step that only computes, without gradient."""

    def step() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (function(),)

    return step


def forward_backward(
    function: Callable[[], Tensor], *inputs: Tensor, grad: Tensor | None = None, scale: float | None = None
) -> Callable[[], tuple[Tensor, ...]]:
    """A step of a training loop: the value and its gradient in ``inputs``, times ``scale`` as in loss scaling."""

    def step() -> tuple[Tensor, ...]:
        out = function()
        return (out.detach(), *torch.autograd.grad(out if scale is None else out * scale, inputs, grad))

    return step


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``function`` under torch.compile, which compiles it at the first call."""
    return torch.compile(function, dynamic=False, fullgraph=True)


def _draw(sampler: Callable[..., Tensor], shape: tuple[int, ...], seed: int) -> Tensor:
    """Random numbers, which large tensors repeat: drawing the features of a whole street image takes ten seconds."""
    total = math.prod(shape)
    block = sampler(min(total, REPEATED), generator=torch.Generator().manual_seed(seed))
    if total <= REPEATED:
        return block.view(shape)
    x = torch.empty(total)
    for start in range(0, total, REPEATED):
        part = x[start : start + REPEATED]
        part.copy_(block[: len(part)])
    return x.view(shape)
