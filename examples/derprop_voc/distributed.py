"""What crosses processes: counts, maxima and names. With one process, each of these does nothing."""

from typing import Any

import torch
from torch import Tensor, distributed


def world_size() -> int:
    """Processes of this run."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """Number of this process, from 0."""
    return distributed.get_rank() if world_size() > 1 else 0


def total(x: Tensor) -> Tensor:
    """`x` summed over processes, without gradient."""
    return _reduced(x, distributed.ReduceOp.SUM) if world_size() > 1 else x.detach()


def highest(x: Tensor) -> Tensor:
    """The elementwise maximum of `x` over processes, without gradient."""
    return _reduced(x, distributed.ReduceOp.MAX) if world_size() > 1 else x.detach()


def gathered(value: Any) -> list[Any]:
    """One picklable value of each process, in their order."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    distributed.all_gather_object(values, value)
    return values


def share(count: int) -> slice:
    """This process's part of `count` items of a global batch; `count` is a multiple of the number of processes."""
    size = count // world_size()
    return slice(rank() * size, (rank() + 1) * size)


def global_mean(local_sum: Tensor, local_count: Tensor) -> Tensor:
    """A term whose gradient, averaged over processes as DDP does, is that of the mean over the global batch.

    0, not NaN, where nothing counts.
    """
    return local_sum * world_size() / total(local_count).clamp(min=1)


def _reduced(x: Tensor, operation: Any) -> Tensor:
    reduced = x.detach().clone()
    with torch.no_grad():
        distributed.all_reduce(reduced, operation)
    return reduced
