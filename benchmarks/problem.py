"""A problem, and one way to solve it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

OURS, PLAIN, COMPILED = "dlprop", "plain PyTorch", "plain PyTorch, compiled"
REPEATED = (1 << 23) - 15  # odd, so that no two channels of an image are alike

# "ours" and "equivalent" compute the same thing and must agree; "related" does the same work for another result;
# "bound" is less than the task takes, such as its bare matrix products.
Kind = Literal["ours", "equivalent", "related", "bound"]


@dataclass(frozen=True)
class Problem:
    """Sizes in the letters of the paper, and inputs, the same at every call.

    ``grid`` is the features' grid where it is not that of the logits, ``eta`` the weight of the sparsity term, which a
    comparison of results sets to 0: the sign of a second difference that is nearly 0 is rounding.
    """

    height: int
    width: int
    n: int = 1
    D: int = 256
    C: int = 21
    grid: tuple[int, int] | None = None
    eta: float = 0.5
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    @property
    def pixels(self) -> int:
        return self.height * self.width

    @property
    def matrix_bytes(self) -> int:
        """Bytes of the similarities of all pairs of pixels."""
        return self.n * self.pixels**2 * self.dtype.itemsize

    def features(self, seed: int = 1) -> Tensor:
        """Features (N, D, h, w) between 0 and 1, as after a ReLU."""
        return self._drawn(torch.rand, (self.n, self.D, *(self.grid or (self.height, self.width))), seed)

    def logits(self, seed: int = 2) -> Tensor:
        """Normal numbers (N, C, H, W)."""
        return self._drawn(torch.randn, (self.n, self.C, self.height, self.width), seed)

    def labels(self, seed: int = 3) -> Tensor:
        """Labels (N, H, W)."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(self.C, (self.n, self.height, self.width), generator=generator).to(self.device)

    def _drawn(self, sampler: Callable[..., Tensor], shape: tuple[int, ...], seed: int) -> Tensor:
        """Random numbers, which large tensors repeat: drawing those of a whole street image takes ten seconds."""
        total = math.prod(shape)
        block = sampler(min(total, REPEATED), generator=torch.Generator().manual_seed(seed))
        if total > REPEATED:
            block = block.repeat(-(-total // REPEATED))[:total]
        return block.view(shape).to(self.device, self.dtype)


@dataclass(frozen=True)
class Variant:
    """One way to solve a problem. ``run`` does the whole step and returns the output, or the value and gradients."""

    run: Callable[[], tuple[Tensor, ...]] = tuple
    kind: Kind = "equivalent"
    needs: float = 0.0  # bytes beyond its inputs, where they may be more than there are
    compiles: bool = False  # at the first run, which therefore says nothing about the time
    sample: Callable[[], float] | None = None  # returns the seconds itself, where timing ``run`` is not the way


Variants = dict[str, Variant]


def step(
    function: Callable[[], Tensor],
    *trained: Tensor,
    grad: Tensor | None = None,
    kind: Kind = "equivalent",
    **facts: Any,
) -> Variant:
    """A step that computes the value and its gradients in the ``trained`` tensors, or without any the value alone."""

    def run() -> tuple[Tensor, ...]:
        with torch.set_grad_enabled(bool(trained)):
            out = function()
        return (out.detach(), *(torch.autograd.grad(out, trained, grad) if trained else ()))

    return Variant(run, kind, **facts)


def compared(
    ours: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    tensors: tuple[Tensor, Tensor],
    *trained: Tensor,
    grad: Tensor | None = None,
    needs: float,
) -> Variants:
    """Ours, the plain formula and what torch.compile makes of it; the formula needs so many bytes."""
    compiled = torch.compile(plain, dynamic=False, fullgraph=True)
    return {
        OURS: step(lambda: ours(*tensors), *trained, grad=grad, kind="ours"),
        PLAIN: step(lambda: plain(*tensors), *trained, grad=grad, needs=needs),
        COMPILED: step(lambda: compiled(*tensors), *trained, grad=grad, needs=needs, compiles=True),
    }
