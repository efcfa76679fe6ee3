"""What the softmax affinities compare, and the gradients of these: one object each for all kernels."""

from typing import NamedTuple

import torch
from torch import Tensor


class Needed(NamedTuple):
    """Which gradients are asked for."""

    queries: bool
    keys: bool
    bias: bool


class Gradients(NamedTuple):
    """Of what is compared, None where it is not asked for."""

    queries: Tensor | None
    keys: Tensor | None
    bias: Tensor | None


class Compared(NamedTuple):
    """Pixels as rows, queries (N, M, E) and keys (N, K, E), or images (N, E, H, W).

    The bias of the keys, (N, K) or (N, 1, H, W), is added to their similarities, or None.
    """

    queries: Tensor
    keys: Tensor
    bias: Tensor | None = None

    def contiguous(self) -> "Compared":
        """The same, each plane in one piece of memory."""
        return Compared(self.queries.contiguous(), self.keys.contiguous(), self.bias)

    def zeros(self, needed: Needed) -> Gradients:
        """The gradients that are asked for, to be added to."""
        layout = torch.contiguous_format
        pairs = zip(self, needed, strict=True)
        return Gradients(
            *(torch.zeros_like(x, memory_format=layout) if x is not None and n else None for x, n in pairs)
        )
