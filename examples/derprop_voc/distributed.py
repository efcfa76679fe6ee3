"""The processes of a run, and what crosses them: counts, maxima and names. With one process nothing does."""

import os
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, distributed

from .config import Config
from .errors import ConfigError


def make_fabric(config: Config) -> Fabric:
    """One process, or DDP over the processes that torchrun started.

    Raises:
        ConfigError: where the accelerator is missing or cannot do the arithmetic asked for, or batches do not split
            evenly over the processes.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    processes, local = (int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    cuda = torch.cuda.is_available()
    if config.accelerator == "cuda" and not cuda:
        raise ConfigError("accelerator: cuda cannot be used here: torch finds no CUDA device")
    accelerator = "cuda" if cuda and config.accelerator != "cpu" else "cpu"
    if accelerator == "cpu" and config.precision == "16-mixed":
        raise ConfigError("precision: 16-mixed needs a CUDA device; use bf16-mixed")
    if accelerator == "cpu" and config.precision == "bf16-mixed" and config.channels_last:
        # Seen with torch 2.14 on a processor with AMX: values that nothing wrote, now and then.
        raise ConfigError(
            "precision: bf16-mixed gives NaN gradients of dilated depthwise convolutions on CPUs with channels_last; "
            "use --no-channels-last or --precision 32-true"
        )
    for name in ("labeled_batch",) if config.variant == "supervised" else ("labeled_batch", "unlabeled_batch"):
        images, rest = divmod(getattr(config, name), processes)
        if rest:
            raise ConfigError(
                f"{name}: expected a multiple of the {processes} processes (it is the global batch), "
                f"got {getattr(config, name)}"
            )
        if config.batch_norm == "train" and processes * images < 2:
            raise ConfigError(
                f"{name}: expected at least 2 images for batch statistics (or --batch-norm frozen), got 1"
            )
    mixes = config.variant != "supervised" and config.cutmix_probability > 0
    if processes > 1 and mixes and config.unlabeled_batch // processes % 2:
        raise ConfigError(
            f"unlabeled_batch: expected an even number for each of the {processes} processes (CutMix mixes pairs), "
            f"got {config.unlabeled_batch}"
        )
    if processes > 1 and accelerator == "cpu" and config.batch_norm == "train":
        raise ConfigError("batch_norm: SyncBatchNorm has no CPU form; use --batch-norm frozen, or one process")
    fabric = Fabric(
        accelerator=accelerator,
        devices=local,
        num_nodes=processes // local,
        strategy="ddp" if processes > 1 else "auto",
        precision=config.precision,
    )
    fabric.launch()
    return fabric


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
