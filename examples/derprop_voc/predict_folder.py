"""`predict`: colour masks and overlays for a folder of images, and a legend of the classes."""

import argparse
import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.patches import Patch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as TF

from .choice import (
    PROPAGATION,
    Finished,
    add_machine_arguments,
    add_network_argument,
    add_propagation_arguments,
    add_source_arguments,
    checked_window,
    checkpoint_files,
    load_finished,
    make_device,
    propagation_options,
    with_propagation,
)
from .config import Config
from .data import VOID, check_image, read_image, read_list
from .errors import ConfigError, DataError
from .evaluate import OUTPUTS, predict
from .figures import FRAME, INK, new_figure, write_figure
from .files import write_bytes
from .panels import class_colours
from .pooled import Images, key_of, pool_for, pooled_propagation, tau_of, write_statistics
from .progress import make_bar
from .sources import IMAGE_SUFFIXES, find_source

# A centre crop covers a part of the image only, so it is no way to make a mask.
MODES = ("original", "sliding_window")
FIGURE_SPACE = "\N{FIGURE SPACE}"  # as wide as a digit


def add_predict_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `predict`."""
    add_source_arguments(parser, several=False)
    add_network_argument(parser)
    parser.add_argument(
        "--images", type=Path, required=True, metavar="PATH",
        help="folder of jpg, jpeg and png files, or a list of the run's data set, such as unlabeled.txt",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="another folder, for the pictures")
    parser.add_argument(
        "--output", choices=OUTPUTS, default="prediction",
        help="P, P~ or the mean of their probabilities, all of them by --tau (%(default)s)",
    )  # fmt: skip
    add_propagation_arguments(parser)
    parser.add_argument("--mode", choices=MODES, help="default: sliding_window if the run is evaluated so")
    parser.add_argument("--window", type=int, help="edge of the windows (default: the run's crop_size)")
    add_alpha_argument(parser)
    add_machine_arguments(parser)


def add_alpha_argument(parser: argparse.ArgumentParser) -> None:
    """The flag for the opacity of an overlay's colours."""
    parser.add_argument("--alpha", type=float, default=0.5, help="opacity of an overlay's colours (%(default)s)")


def checked_alpha(alpha: float) -> float:
    """`alpha`, or `ConfigError` where it is outside [0, 1]."""
    if not 0 <= alpha <= 1:
        raise ConfigError(f"alpha: expected 0 to 1, got {alpha}")
    return alpha


def predict_command(arguments: argparse.Namespace) -> None:
    """Predicts a folder and says what was written."""
    alpha = checked_alpha(arguments.alpha)
    device = make_device(arguments.accelerator, arguments.threads)
    (finished,) = load_finished(checkpoint_files(arguments, best=False), device)
    images = list_images(arguments.images, finished.config)
    places = {place for path in images for place in (path.parent.resolve(), path.resolve().parent)}
    if arguments.out.resolve() in places:
        raise ConfigError(f"out: expected another folder than the images' own, got {arguments.out}")
    options = propagation_options(arguments)
    unused = next((name for name in PROPAGATION if name != "tau" and hasattr(arguments, name)), None)
    passes = arguments.read_statistics or arguments.write_statistics
    if unused and arguments.output == "prediction" and "tau" not in options and not passes:
        raise ConfigError(
            f"output: prediction is not propagated, so {unused} would do nothing; choose propagated or blend"
        )
    label = make_labels(finished, images, arguments, with_propagation(finished.config, options))
    predict_folder(images, arguments.out, label, finished.class_names, alpha=alpha)
    print(f"{len(images)} images: masks, overlays and legend.png are in {arguments.out}")


def make_labels(
    finished: Finished, images: Sequence[Path], arguments: argparse.Namespace, settings: Config
) -> Callable[[Tensor], Tensor]:
    """What gives class ids (H, W) for a uint8 image (3, H, W), as the flags of `predict` have it.

    Passes over the images that this takes are made here, and the file of statistics is written.

    Args:
        finished: the checkpoint; its image_size is the size that the network works at.
        images: files of the folder.
        arguments: of the command.
        settings: options of propagation.
    """
    config, name, size = finished.config, finished.name_of(arguments.network), finished.config.image_size
    mode = arguments.mode or (config.evaluation if config.evaluation in MODES else "original")
    windows: dict[str, Any] = {"mode": mode, "window": checked_window(arguments.window, mode) or config.crop_size}
    read, write = arguments.read_statistics, arguments.write_statistics
    pooled = None
    if arguments.output != "prediction" or tau_of(settings) or read or write:  # P itself needs no pass before
        every = Images(lambda index: read_image(images[index], size), len(images))
        pooled = pool_for(finished, name, settings, every, read=read, write=write is not None, **windows)
    if write and pooled is not None:
        write_statistics(write, {key_of(finished, name): pooled}, finished.class_names, len(images))
    propagate = pooled_propagation(settings, pooled, add_own=read is not None)
    adjust = pooled.adjust if pooled else None
    shown = "adjusted" if adjust and arguments.output == "prediction" else arguments.output

    def label(image: Tensor) -> Tensor:
        worked = TF.resize(image, list(size), antialias=True) if size else image
        return predict(finished.networks[name], propagate, worked, image.shape[-2:], adjust=adjust, **windows)[shown]

    return label


def list_images(place: Path, config: Config | None = None) -> list[Path]:
    """The images of a folder, in the order of their names; with a `config`, of a list of its data set, too.

    Raises:
        DataError: for a folder without images, a file that does not open as one, and two images with one stem.
    """
    if config is not None and place.is_file():
        root = root_of(place)
        if root is None:
            source = find_source(config)
            items = read_list(place, source.root, source.item)
        else:
            items = read_list(place, root)
        paths = [item.image for item in items]
    elif not place.is_dir():
        raise DataError(f"{place}: expected a folder of images{' or a list of them' if config else ''}, found none")
    else:
        paths = sorted(path for path in place.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise DataError(f"{place}: expected {', '.join(IMAGE_SUFFIXES)} files, found none")
    check_stems(paths)
    for path in paths:
        check_image(path)
    return paths


def check_stems(paths: Iterable[Path]) -> None:
    """Raises `DataError` for two images with one stem, whose pictures would be one file."""
    stems: dict[str, Path] = {}
    for path in paths:
        other = stems.setdefault(path.stem, path)
        if other != path:
            raise DataError(f"{path}: expected one image a name, found {other} as well")


def root_of(place: Path) -> Path | None:
    """The folder in VOC layout that a list lies in, if any."""
    return next((path for path in place.resolve().parents if (path / "JPEGImages").is_dir()), None)


def predict_folder(
    images: Sequence[Path],
    out: Path,
    label: Callable[[Tensor], Tensor],
    class_names: Sequence[str],
    *,
    alpha: float = 0.5,
    progress: bool = True,
) -> None:
    """Writes `<stem>_mask.png` and `<stem>_overlay.png` at each image's own size, and `legend.png`.

    Args:
        images: files with different stems.
        out: folder to write into.
        label: gives class ids (H, W) for a uint8 image (3, H, W).
        class_names: in id order.
        alpha: opacity of an overlay's colours.
        progress: show progress.
    """
    colours = np.round(255 * class_colours(class_names)).astype(np.uint8)
    with make_bar(len(images), "predict", progress=progress) as bar:
        for path in images:
            image = read_image(path).as_subclass(Tensor)
            write_pictures(out, path.stem, image, label(image), colours, alpha)
            bar.update()
    draw_legend(out / "legend.png", class_names)


def write_pictures(
    out: Path, name: str, image: Tensor, labels: Tensor, colours: np.ndarray, alpha: float, given: Tensor | None = None
) -> None:
    """Writes `<name>_mask.png` of class ids (H, W), and `<name>_overlay.png` on a uint8 image (3, H, W).

    On the overlay labels that were `given`, (H, W) and `VOID` elsewhere, are opaque, grown and edged with white.
    """
    ids = labels.to("cpu", torch.uint8).numpy()
    write_png(out / f"{name}_mask.png", palette_image(ids, colours))
    picture = overlay(image.permute(1, 2, 0).numpy(), colours[ids], alpha)
    if given is not None:
        known = torch.where(given == VOID, 0, given.long() + 1)[None].float()
        grown, edged = (F.max_pool2d(known, 2 * r + 1, stride=1, padding=r)[0].long().cpu().numpy() for r in (2, 3))
        marked = np.array(picture)
        marked[edged > 0] = 255
        marked[grown > 0] = colours[grown[grown > 0] - 1]
        picture = Image.fromarray(marked)
    write_png(out / f"{name}_overlay.png", picture)


def palette_image(ids: np.ndarray, colours: np.ndarray) -> Image.Image:
    """A picture whose pixel values are the ids (H, W) and whose palette holds the colours (C, 3), both uint8."""
    picture = Image.fromarray(ids)
    picture.putpalette(colours.tobytes())
    return picture


def overlay(image: np.ndarray, colours: np.ndarray, alpha: float) -> Image.Image:
    """`(1 - alpha) image + alpha colours`, both (H, W, 3) uint8."""
    blended = (1 - alpha) * image.astype(np.float64) + alpha * colours
    return Image.fromarray(np.round(blended).astype(np.uint8))


def write_png(path: Path, picture: Image.Image) -> None:
    """Writes a PNG, whole or not at all."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    write_bytes(path, buffer.getvalue())


def draw_legend(path: Path, class_names: Sequence[str]) -> None:
    """Writes a PNG with the colour, id and name of every class; a name that is the id is written once."""
    columns = -(-len(class_names) // 16)
    lines = -(-len(class_names) // columns)
    figure = new_figure(3 * columns, 0.25 * lines)  # cut to the legend below
    figure.legend(
        handles=[
            Patch(
                facecolor=colour,
                edgecolor=FRAME,
                linewidth=0.6,
                label=str(index).rjust(3, FIGURE_SPACE) + (f"  {name}" if name != str(index) else ""),
            )
            for index, (name, colour) in enumerate(zip(class_names, class_colours(class_names), strict=True))
        ],
        loc="center",
        ncols=columns,
        frameon=False,
        fontsize=10,
        handlelength=1.6,
        handleheight=1.1,
        labelcolor=INK,
    )
    write_figure(path, figure, bbox_inches="tight")
