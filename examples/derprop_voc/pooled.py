"""What a network predicts over a whole folder: class shares and statistics, their file, and propagation by them."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from dlprop import DerivativeLabelPropagation
from dlprop.statistics import ClassStatistics

from .choice import Finished
from .config import Config
from .data import read_image
from .errors import CheckpointError, ConfigError
from .evaluate import Adjust, outputs
from .files import read_tensors, write_checkpoint
from .losses import make_propagation
from .progress import make_bar
from .rectification import adjusted
from .sources import Item

FORMAT = "derprop_voc statistics 1"
BUFFERS = ("counts", "sums", "second")


@dataclass(frozen=True)
class Pooled:
    """Over all images of a folder.

    Attributes:
        prior: (C,), the class shares of P; they sum to 1.
        tau: of the logit adjustment by this prior; 0: none.
        statistics: of the adjusted prediction, which is what is propagated.
    """

    prior: Tensor
    tau: float
    statistics: ClassStatistics

    @property
    def adjust(self) -> Adjust | None:
        """What logits undergo before they are propagated."""
        return partial(adjusted, prior=self.prior, tau=self.tau) if self.tau else None


@dataclass(frozen=True)
class Images:
    """Images that can be gone through again and again, with a bar each time.

    Attributes:
        read: the uint8 image (3, H, W) of an index, at the working size.
        count: how many there are.
        progress: show the bar.
    """

    read: Callable[[int], Tensor]
    count: int
    progress: bool = True

    @classmethod
    def of_items(cls, items: Sequence[Item], size: Sequence[int], *, progress: bool = True) -> Self:
        """The images of a list."""
        return cls(lambda index: read_image(items[index].image, size), len(items), progress)

    def __iter__(self) -> Iterator[Tensor]:
        with make_bar(self.count, "statistics", progress=self.progress) as bar:
            for index in range(self.count):
                yield self.read(index)
                bar.update()


def tau_of(config: Config) -> float:
    """The factor of the logit adjustment that `config` asks for."""
    return config.tau if config.adjust == "prior" else 0.0


@torch.no_grad()
def gather(
    network: nn.Module,
    images: Iterable[Tensor],
    num_classes: int,
    *,
    adjust: Adjust | None = None,
    mode: str = "original",
    window: int = 0,
) -> ClassStatistics:
    """Class statistics of a network's logits and features over uint8 images (3, H, W); see `probabilities`.

    Pixels in several windows count once for each.
    """
    statistics = None
    for image in images:
        for _, _, output in outputs(network, image, mode=mode, window=window):
            logits = output.logits if adjust is None else adjust(output.logits)
            if statistics is None:
                statistics = ClassStatistics(num_classes, output.feats.shape[1]).to(logits.device)
            statistics.update(logits, output.feats)
    if statistics is None:
        raise ConfigError("across: expected images to take statistics from, got none")
    return statistics


def shares(statistics: ClassStatistics) -> Tensor:
    """(C,), what part of all pixels each class has."""
    return statistics.counts / statistics.counts.sum()


def pool(
    network: nn.Module, images: Iterable[Tensor], num_classes: int, *, tau: float, mode: str, window: int
) -> Pooled:
    """One pass over the images, which must allow two; another one with `tau`, whose logits need the first one's prior.

    Args:
        network: in evaluation mode.
        images: uint8 (3, H, W), at the working size.
        num_classes: C.
        tau: of `Pooled`.
        mode: see `probabilities`.
        window: see `probabilities`.
    """
    statistics = gather(network, images, num_classes, mode=mode, window=window)
    found = Pooled(shares(statistics), tau, statistics)
    if not tau:
        return found
    return replace(
        found, statistics=gather(network, images, num_classes, adjust=found.adjust, mode=mode, window=window)
    )


def pooled_propagation(config: Config, pooled: Pooled | None, *, add_own: bool = False) -> DerivativeLabelPropagation:
    """Propagation as `config` has it, for one image at a time.

    With `across: data` images are judged by the pooled statistics alone, or by their own whose class means lean on
    these, with `pseudo_counts`. Otherwise these are only used with `add_own`,
    which adds an image's own: for a folder that the image does not belong to.
    """
    if pooled is None or config.affinity != "discriminant" or not (config.across == "data" or add_own):
        return make_propagation(config)
    if config.normalize not in ("auto", "none"):
        raise ConfigError(
            f"normalize: statistics are of features as they are, got {config.normalize}; leave it at auto"
        )
    made = make_propagation(config, pooled.statistics)
    if config.across != "data" or config.pseudo_counts:
        return made
    alone = replace(made.affinity, across="stored")  # they contain the image already
    return DerivativeLabelPropagation(alone, resolution=made.resolution)


def pool_for(
    finished: Finished,
    network: str,
    config: Config,
    images: Images,
    *,
    read: Path | None = None,
    write: bool = False,
    mode: str = "original",
    window: int = 0,
) -> Pooled | None:
    """What inference with `config` needs to know of all images: from the file `read`, else from the images.

    Returns:
        None where it needs nothing, and nothing is to be written.
    """
    tau = tau_of(config)
    if read is not None:
        if config.affinity != "discriminant" and not tau:
            raise ConfigError("read_statistics: only --affinity discriminant and --tau use statistics; add one of them")
        return read_statistics(read, finished, network, tau)
    if not write and config.across != "data" and not tau:
        return None
    return pool(finished.networks[network], images, len(finished.class_names), tau=tau, mode=mode, window=window)


# --- files -----------------------------------------------------------------------------------------------------------


def key_of(finished: Finished, network: str) -> str:
    """By which a file knows a network of a checkpoint: features of another one mean something else."""
    return f"{finished.digest}/{network}"


def write_statistics(path: Path, pooled: Mapping[str, Pooled], class_names: Sequence[str], images: int) -> None:
    """Keeps what was pooled for each `key_of`, for `read_statistics`."""
    entries = {
        key: {"prior": found.prior, "tau": found.tau}
        | {name: getattr(found.statistics, name) for name in BUFFERS}
        for key, found in pooled.items()
    }  # fmt: skip
    write_checkpoint(path, {"format": FORMAT, "classes": list(class_names), "images": images, "networks": entries})


def read_statistics(path: Path, finished: Finished, network: str, tau: float) -> Pooled:
    """What `write_statistics` has kept for a network.

    Raises:
        CheckpointError: for a file that is missing, damaged, or of other classes, channels, networks or another tau.
    """
    content = read_tensors(path, "a file of --write-statistics")
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path}: expected a file of --write-statistics, found another one")
    if content["classes"] != list(finished.class_names):
        raise CheckpointError(
            f"{path}: expected statistics of the classes {', '.join(finished.class_names)}, found "
            f"{', '.join(map(str, content['classes']))}"
        )
    C, D = len(finished.class_names), finished.config.propagation_channels
    expected = {"prior": (C,), "counts": (C,), "sums": (C, D), "second": (D, D)}
    for entry in content["networks"].values():
        for name, shape in expected.items():
            value = entry.get(name)
            if not isinstance(value, Tensor) or tuple(value.shape) != shape or not value.isfinite().all():
                came = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise CheckpointError(
                    f"{path}: {name}: expected finite numbers of shape {shape} for {C} classes and {D} channels, "
                    f"found {came}"
                )
    entry = content["networks"].get(key_of(finished, network))
    if entry is None:
        raise CheckpointError(
            f"{path}: expected statistics of the {network} network of {finished.path}, found those of other networks; "
            "make them anew with --write-statistics"
        )
    if entry["tau"] != tau:
        raise CheckpointError(f"{path}: expected statistics made with tau {tau:g}, found {entry['tau']:g}")
    device = next(finished.networks[network].parameters()).device
    statistics = ClassStatistics(C, D)
    statistics.load_state_dict({name: entry[name] for name in BUFFERS})
    return Pooled(entry["prior"].to(device), tau, statistics.to(device))
