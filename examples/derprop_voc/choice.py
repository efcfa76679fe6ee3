"""What the commands on finished runs share: which checkpoints and networks, what propagation, on what machine."""

import argparse
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from dlprop import MomentumAverager

from .config import ONLY_FOR, Config, add_config_arguments, hints, make_config, values_from_arguments
from .data import check_unseen, find_places, training_lists
from .data import digest as digest_of
from .errors import CheckpointError, ConfigError, DataError
from .frozen import make_network
from .sources import Item, find_source
from .state import check_state, read_checkpoint

NETWORKS = ("tested", "trained", "averaged")
# Options of propagation, which a finished network need not have been trained with; tau stands for adjust: prior.
PROPAGATION = (
    "affinity", "scale", "resolution", "similarity", "normalize", "scheme", "order_weights", "shrinkage", "balance",
    "across", "pseudo_counts", "tau",
)  # fmt: skip
# What a file of `choose` may say besides; the variant is for a training only.
ALSO_READ = ("adjust", "variant")
# Options of pseudo-labels: those that a run was trained with say nothing about its network's own prediction.
OF_PSEUDO_LABELS = ("adjust", "tau", "temperature", "prior_momentum", "statistics_decay")


@dataclass(frozen=True)
class Finished:
    """A checkpoint with its networks, in evaluation mode; the last one is the network that the run is tested with."""

    name: str
    path: Path
    step: int
    epoch: int
    networks: dict[str, nn.Module]
    config: Config
    class_names: tuple[str, ...]
    lists: str  # of what it was trained on, see `data.digest`
    digest: str  # of the file as it was read, by which statistics know their network

    def name_of(self, name: str) -> str:
        """One of `NETWORKS` as "trained" or "averaged".

        Raises:
            ConfigError: for "averaged" where the run keeps no momentum network.
        """
        if name == "tested":
            return list(self.networks)[-1]
        if name not in self.networks:
            raise ConfigError(f"network: {self.path} holds no {name} network, only {', '.join(self.networks)}")
        return name

    def network(self, name: str) -> nn.Module:
        """One of `NETWORKS`; see `name_of`."""
        return self.networks[self.name_of(name)]


def add_source_arguments(parser: argparse.ArgumentParser, *, several: bool) -> None:
    """Flags that choose checkpoints: a run folder or files."""
    source = parser.add_mutually_exclusive_group(required=True)
    taken = "latest.pt and, if there is one, best.pt" if several else "latest.pt"
    source.add_argument(
        "--run",
        type=Path,
        metavar="FOLDER",
        nargs="+" if several else None,
        help=f"run folder{'s' if several else ''}; takes {taken}",
    )
    source.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        nargs="+" if several else 1,
        help="checkpoints" if several else "a checkpoint",
    )


def add_network_argument(parser: argparse.ArgumentParser) -> None:
    """The flag that chooses one network of a checkpoint."""
    parser.add_argument(
        "--network", choices=NETWORKS, default="tested", help="tested: averaged where there is one (%(default)s)"
    )


def add_propagation_arguments(parser: argparse.ArgumentParser) -> None:
    """`--config`, a flag for each of `PROPAGATION`, and the files of statistics."""
    add_config_arguments(parser, [name for name in PROPAGATION if name != "tau"])
    parser.add_argument(
        "--tau", type=float, default=argparse.SUPPRESS, help="take so many times the log of the class shares of P over "
        "all images off the logits (default: 0, whatever the run did to its pseudo-labels)"
    )  # fmt: skip
    parser.add_argument(
        "--read-statistics", type=Path, metavar="FILE", help="take class statistics and shares from there, not from a "
        "pass over the images; `across` says whether an image's own are added (image) or not (data)"
    )  # fmt: skip
    parser.add_argument("--write-statistics", type=Path, metavar="FILE", help="keep those of these images there")


def propagation_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the files and flags of `add_propagation_arguments` say.

    Raises:
        ConfigError: for a file with other options.
    """
    if arguments.read_statistics and arguments.write_statistics:
        raise ConfigError("write_statistics: with read_statistics no pass is made over these images; leave one out")
    read = values_from_arguments(argparse.Namespace(config=arguments.config))
    check_propagation("config", read)
    return read | {name: getattr(arguments, name) for name in PROPAGATION if hasattr(arguments, name)}


def check_propagation(where: str, options: Mapping[str, Any]) -> None:
    """Raises `ConfigError` for an option that is not one of propagation."""
    for name in options:
        if name not in PROPAGATION + ALSO_READ:
            raise ConfigError(f"{where}: expected options of {', '.join(PROPAGATION)}, got {name}")


def with_propagation(config: Config, options: Mapping[str, Any]) -> Config:
    """A run's config for inference, with other options of propagation.

    Options that name an affinity start from that affinity's defaults, and the run's `scheme` and `resolution`. Logits
    are adjusted if `options` say so, whatever the run did to its pseudo-labels.
    """
    values = config.to_dict() | {name: getattr(Config, name) for name in OF_PSEUDO_LABELS}
    if config.variant == "supervised":
        values["variant"] = "no_derivative_loss"  # a supervised training has no use for some of these options
    if "affinity" in options:
        names = ("normalize", "order_weights", *ONLY_FOR)
        values |= {name: getattr(Config, name) for name in names}
    values |= {name: value for name, value in options.items() if name != "variant"}
    if "tau" in options:
        values["adjust"] = "prior" if options["tau"] else "none"
        values["tau"] = options["tau"] or Config.tau
    if values["adjust"] not in ("none", "prior"):
        raise ConfigError(f"adjust: expected none or prior for a finished network, got {values['adjust']}")
    return make_config(values)


def add_machine_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags for device and threads, as in training."""
    choices = get_args(hints()["accelerator"])
    parser.add_argument("--accelerator", choices=choices, default="auto", help="what to compute on (%(default)s)")
    add_threads_argument(parser)


def add_threads_argument(parser: argparse.ArgumentParser) -> None:
    """The flag of commands that compute on the CPU."""
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's choice")


def checkpoint_files(arguments: argparse.Namespace, *, best: bool) -> list[Path]:
    """The files that the flags of `add_source_arguments` name; of a run folder, `best` adds best.pt."""
    if arguments.run is None:
        return list(arguments.checkpoint)
    runs: list[Path] = arguments.run if isinstance(arguments.run, list) else [arguments.run]
    missing = [str(run) for run in runs if not (run / "latest.pt").is_file()]
    if missing:
        raise CheckpointError(f"{', '.join(missing)}: expected a run folder with latest.pt, found none")
    files = [run / name for run in runs for name in (("latest.pt", "best.pt") if best else ("latest.pt",))]
    return [file for file in files if file.is_file()]


def load_finished(paths: Sequence[Path], device: torch.device) -> list[Finished]:
    """Checkpoints on `device`, named after their files, or by their paths where two files have one name."""
    stems = [path.stem for path in paths]
    named = stems if len(set(stems)) == len(stems) else [str(path) for path in paths]
    return [_finished(name, path, device) for name, path in zip(named, paths, strict=True)]


def _finished(name: str, path: Path, device: torch.device) -> Finished:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.is_file() else ""
    checkpoint = read_checkpoint(path)
    config, class_names = make_config(checkpoint["config"]), tuple(checkpoint["class_names"])
    network = make_network(config, len(class_names), initialise=False)
    parts: dict[str, nn.Module] = {"network": network}
    if checkpoint["averager"] is not None:
        parts["averager"] = MomentumAverager(network, config.average_momentum)
    for key, part in parts.items():
        check_state(path, key, checkpoint[key], part.state_dict())
        part.load_state_dict(checkpoint[key])
    networks: dict[str, nn.Module] = {"trained": network}
    if "averager" in parts:
        networks["averaged"] = parts["averager"].module
    # The same arithmetic as while training, to the last bit.
    layout = torch.channels_last if config.channels_last else torch.preserve_format
    for part in networks.values():
        part.to(device).to(memory_format=layout).eval()
    return Finished(
        name, path, checkpoint["step"], checkpoint["epoch"], networks, config, class_names, checkpoint["lists"], digest
    )


def check_not_trained_on(
    finished: Finished, items: Sequence[Item], config: Config, where: str, way_out: str, *, by_lists: bool = True
) -> None:
    """Looks for images to be scored in the lists that a run was trained with.

    Args:
        finished: the run.
        items: the images.
        config: says where the data lies now.
        where: these images come from, for the error.
        way_out: what to do, for the error.
        by_lists: lists that are not what they were when the run was trained are an error, not a note.

    Raises:
        DataError: for an image that is among them.
    """
    source = find_source(replace(config, download=False))
    own = replace(config, partition=finished.config.partition, variant=finished.config.variant)
    if not source.has_partition(own.partition):
        return
    places = find_places(own, source)
    lists = training_lists(own if places.unlabeled.is_file() else replace(own, variant="supervised"), source)
    check_unseen(items, lists, where, way_out)
    is_same_data = Path(own.data).resolve() == Path(finished.config.data).resolve()
    if is_same_data and digest_of(lists.values()) != finished.lists:
        changed = f"{places.labeled}: the lists of {own.partition} have changed since {finished.path} was trained"
        if by_lists:
            raise DataError(f"{changed}, so nobody can say which images it has seen; bring them back, or train again")
        print(f"note: {changed}; it may have seen some of these images")


def make_device(accelerator: str, threads: int) -> torch.device:
    """The device, with torch's number of threads set if `threads` is not 0.

    Raises:
        ConfigError: for CUDA where there is none, and for a negative number of threads.
    """
    if threads < 0:
        raise ConfigError(f"threads: expected at least 0, got {threads}")
    if accelerator == "cuda" and not torch.cuda.is_available():
        raise ConfigError("accelerator: cuda cannot be used here: torch finds no CUDA device")
    if threads:
        torch.set_num_threads(threads)
    return torch.device("cuda" if accelerator != "cpu" and torch.cuda.is_available() else "cpu")


def checked_window(window: int | None, mode: str) -> int | None:
    """`window`, at least 2, as smaller ones cannot overlap; an error where the whole image is the window."""
    if window is not None and mode == "original":
        raise ConfigError(f"window: {window} applies to sliding_window and center_crop only, not to mode original")
    if window is not None and window < 2:
        raise ConfigError(f"window: expected at least 2 pixels, got {window}")
    return window
