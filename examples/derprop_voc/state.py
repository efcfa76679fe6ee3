"""All that changes while training, and its way into checkpoints and back."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor

from dlprop import MomentumAverager

from .config import Config
from .data import Data
from .distributed import gathered, rank, world_size
from .errors import CheckpointError, ConfigError
from .files import read_tensors
from .frozen import Network, make_network
from .losses import AdaptiveThreshold
from .rectification import Rectification

# Options that do not change what is computed, and so may differ between a checkpoint and the run that resumes it.
FREE_OPTIONS = (
    "data", "download", "cache_images", "cache_dir", "workers", "weights", "accelerator", "threads", "evaluate_every",
    "panel_every", "panel_images", "measure_pseudo_labels", "tensorboard", "out",
)  # fmt: skip


@dataclass
class State:
    """Network, optimiser and everything else that a run needs to go on from a step."""

    network: Network
    averager: MomentumAverager | None
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    threshold: AdaptiveThreshold
    running: Rectification
    step: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] | None = None

    def to_dict(self, config: Config, data: Data, *, epoch: int, precision: Mapping[str, Any]) -> dict[str, Any]:
        """Tensors and plain values only, for `torch.load(weights_only=True)`. All processes must call this."""
        cuda = torch.cuda.get_rng_state() if self.threshold.value.is_cuda else None
        return {
            "format": FORMAT,
            "step": self.step,
            "epoch": epoch,
            "network": self.network.state_dict(),
            "averager": self.averager.state_dict() if self.averager else None,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "threshold": self.threshold.state_dict(),
            "running": self.running.state_dict(),
            "precision": dict(precision),  # the gradient scaler's state with 16-mixed, else empty
            "random": gathered({"cpu": torch.get_rng_state(), "cuda": cuda}),  # one entry a process
            "history": self.history,
            "best": self.best,
            "config": config.to_dict(),
            "class_names": list(data.class_names),
            "lists": data.digest,
        }

    def restore(self, path: Path, checkpoint: Mapping[str, Any]) -> None:
        """Takes over everything but the random states and the gradient scaler.

        Raises:
            CheckpointError: at the first value that does not fit; the message names the part and the key.
        """
        for name in ("network", "averager", "optimizer", "schedule", "threshold", "running"):
            part, values = getattr(self, name), checkpoint[name]
            if part is None:
                continue
            check_state(path, name, values, part.state_dict())
            try:
                part.load_state_dict(values)
            except (AttributeError, KeyError, ValueError, TypeError, RuntimeError) as error:
                raise CheckpointError(f"{path}: {name}: does not fit: {' '.join(str(error).split())}") from None
        # The optimiser itself compares numbers of parameters only.
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        buffers = {index: values["momentum_buffer"] for index, values in checkpoint["optimizer"]["state"].items()}
        if buffers:
            check_state(path, "optimizer: momentum_buffer", buffers, dict(enumerate(parameters)))
        self.step, self.history, self.best = checkpoint["step"], list(checkpoint["history"]), checkpoint["best"]


# Counts up when a key, an option or its meaning changes, so that no file is read as what it is not.
FORMAT = "derprop_voc 3"
KEYS: dict[str, type | UnionType] = {
    "step": int,
    "epoch": int,
    "network": dict,
    "averager": dict | None,
    "optimizer": dict,
    "schedule": dict,
    "threshold": dict,
    "running": dict,
    "precision": dict,
    "random": list,
    "history": list,
    "best": dict | None,
    "config": dict,
    "class_names": list,
    "lists": str,
}


def make_state(config: Config, num_classes: int, device: torch.device, steps: int, *, initialise: bool = True) -> State:
    """Network, momentum network, optimiser, schedule, threshold and pseudo-labels, at step 0 of `steps`."""
    network = make_network(config, num_classes, initialise=initialise).to(device)
    if config.channels_last:
        network = network.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        network.parameter_groups(config.lr, config.head_lr_multiplier),
        lr=config.lr,
        momentum=config.sgd_momentum,
        weight_decay=config.weight_decay,
    )
    return State(
        network=network,
        averager=MomentumAverager(network, config.average_momentum) if config.averages else None,
        optimizer=optimizer,
        schedule=torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=steps, power=config.lr_power),
        threshold=AdaptiveThreshold(
            config.threshold, config.threshold_momentum if config.confidence == "adaptive" else 1.0
        ).to(device),
        running=Rectification(config, num_classes).to(device),
    )


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint of this program, on the CPU.

    Raises:
        CheckpointError: for a file that is missing, damaged or another program's; the message names the key.
    """
    checkpoint = read_tensors(path, "a checkpoint")
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f"{path}: expected a checkpoint of this program, found a {type(checkpoint).__name__}")
    for key in ("format", *KEYS):
        if key not in checkpoint:
            found = ", ".join(map(str, list(checkpoint)[:6]))
            raise CheckpointError(f"{path}: expected a checkpoint of this program, found no key {key!r} (but {found})")
    if checkpoint["format"] != FORMAT:
        raise CheckpointError(f"{path}: key 'format': expected {FORMAT!r}, found {checkpoint['format']!r}")
    for key, kind in KEYS.items():
        if not isinstance(checkpoint[key], kind):
            found = type(checkpoint[key]).__name__
            raise CheckpointError(f"{path}: key {key!r}: expected {getattr(kind, '__name__', kind)}, found {found}")
    return checkpoint


def restore(fabric: Fabric, state: State, checkpoint: dict[str, Any], path: Path) -> None:
    """Brings a run to where a checkpoint was written, its random numbers and gradient scaler too.

    Raises:
        CheckpointError: at the first value that does not fit.
    """
    state.restore(path, checkpoint)
    try:
        fabric.strategy.precision.load_state_dict(checkpoint["precision"])
    except (KeyError, RuntimeError) as error:
        raise CheckpointError(f"{path}: precision: does not fit: {' '.join(str(error).split())}") from None
    if len(checkpoint["random"]) != world_size():
        if fabric.is_global_zero:
            print(
                f"note: {path} was made by {len(checkpoint['random'])} processes and goes on with {world_size()}: "
                "the run stays valid but is not the one an uninterrupted training would have been",
                flush=True,
            )
        torch.manual_seed(state.step + 1_000_003 * rank())
        return
    random = checkpoint["random"][rank()]
    try:
        torch.set_rng_state(random["cpu"])
        if random["cuda"] is not None and fabric.device.type == "cuda":
            torch.cuda.set_rng_state(random["cuda"])
    except (KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{path}: random: does not fit: {' '.join(str(error).split())}") from None


def changed_options(found: Mapping[str, Any], config: Config) -> list[tuple[str, Any, Any]]:
    """Name, value in `found` and in `config` of every option that matters and differs; None where it is missing."""
    expected = config.to_dict()
    names = (name for name in {**expected, **found} if name not in FREE_OPTIONS)
    pairs = ((name, found.get(name), expected.get(name)) for name in names)
    return [(name, theirs, ours) for name, theirs, ours in pairs if theirs != ours]


def check_resumable(path: Path, checkpoint: Mapping[str, Any], config: Config, data: Data) -> None:
    """Raises `ConfigError` at the first option, class list or training list that differs from the checkpoint's run."""
    for name, theirs, ours in changed_options(checkpoint["config"], config):
        raise ConfigError(f"{name}: {path} was made with {theirs!r}, this run has {ours!r}")
    if list(data.class_names) != checkpoint["class_names"]:
        raise ConfigError(
            f"class_names: {path} was made with {checkpoint['class_names']}, found {list(data.class_names)}"
        )
    if data.digest != checkpoint["lists"]:
        raise ConfigError(f"partition: {path} was made with other lists of images than {config.partition} holds now")


def check_state(path: Path, name: str, found: Mapping[str, Any] | None, expected: Mapping[str, Any]) -> None:
    """Raises `CheckpointError` at the first key of a state dict that is missing, left over or of another shape."""
    found = found or {}
    for key in [*expected, *found]:
        if key not in found:
            raise CheckpointError(f"{path}: {name}: key {key!r} is missing")
        if key not in expected:
            raise CheckpointError(f"{path}: {name}: key {key!r} is unknown")
        ours, theirs = expected[key], found[key]
        if isinstance(ours, Tensor) and (not isinstance(theirs, Tensor) or theirs.shape != ours.shape):
            shape = list(theirs.shape) if isinstance(theirs, Tensor) else type(theirs).__name__
            raise CheckpointError(f"{path}: {name}: key {key!r}: expected shape {list(ours.shape)}, found {shape}")
