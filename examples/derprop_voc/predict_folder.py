"""`predict`: colour masks and overlays for a folder of images, and a legend of the classes."""

import argparse
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.patches import Patch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from .choice import (
    Finished,
    add_machine_arguments,
    add_network_argument,
    add_source_arguments,
    checked_window,
    checkpoint_files,
    load_finished,
    make_device,
)
from .config import ConfigError
from .data import check_image, read_image
from .evaluate import predict
from .figures import FRAME, INK, new_figure, write_figure
from .files import write_bytes
from .losses import make_propagation
from .panels import class_colours
from .progress import make_bar
from .sources import IMAGE_SUFFIXES, DataError

# A centre crop covers a part of the image only, so it is no way to make a mask.
MODES = ("original", "sliding_window")
FIGURE_SPACE = "\N{FIGURE SPACE}"  # as wide as a digit


def add_predict_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `predict`."""
    add_source_arguments(parser, several=False)
    add_network_argument(parser)
    parser.add_argument("--images", type=Path, required=True, metavar="FOLDER", help="its jpg, jpeg and png files")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="another folder, for the pictures")
    parser.add_argument("--propagated", action="store_true", help="take P~ instead of P")
    parser.add_argument("--mode", choices=MODES, help="default: sliding_window if the run is evaluated so")
    parser.add_argument("--window", type=int, help="edge of the windows (default: the run's crop_size)")
    parser.add_argument("--alpha", type=float, default=0.5, help="opacity of an overlay's colours (%(default)s)")
    add_machine_arguments(parser)


def predict_command(arguments: argparse.Namespace) -> None:
    """Predicts a folder and says what was written."""
    if not 0 <= arguments.alpha <= 1:
        raise ConfigError(f"alpha: expected 0 to 1, got {arguments.alpha}")
    if arguments.window is not None:
        checked_window(arguments.window)
    images = list_images(arguments.images)
    if arguments.out.resolve() == arguments.images.resolve():
        raise ConfigError(f"out: expected another folder than the images' own, got {arguments.out}")
    device = make_device(arguments.accelerator, arguments.threads)
    (finished,) = load_finished(checkpoint_files(arguments, best=False), device)
    predict_folder(
        finished,
        images,
        arguments.out,
        network=arguments.network,
        propagated=arguments.propagated,
        mode=arguments.mode,
        window=arguments.window,
        alpha=arguments.alpha,
    )
    print(f"{len(images)} images: masks, overlays and legend.png are in {arguments.out}")


def list_images(folder: Path) -> list[Path]:
    """The images of a folder, in the order of their names.

    Raises:
        DataError: for a folder without images, a file that does not open as one, and two images with one stem.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: expected a folder of images, found none")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise DataError(f"{folder}: expected {', '.join(IMAGE_SUFFIXES)} files, found none")
    stems: dict[str, Path] = {}
    for path in paths:
        check_image(path)
        other = stems.setdefault(path.stem, path)
        if other != path:
            raise DataError(f"{path}: expected one image a name, found {other.name} beside it")
    return paths


def predict_folder(
    finished: Finished,
    images: Sequence[Path],
    out: Path,
    *,
    network: str = "tested",
    propagated: bool = False,
    mode: str | None = None,
    window: int | None = None,
    alpha: float = 0.5,
    progress: bool = True,
) -> None:
    """Writes `<stem>_mask.png` and `<stem>_overlay.png` at each image's own size, and `legend.png`.

    Args:
        finished: the checkpoint; its image_size is the size that the network works at.
        images: files with different stems.
        out: folder to write into.
        network: "tested", "trained" or "averaged".
        propagated: take P~ instead of P.
        mode: "original" or "sliding_window"; None: the run's own, "original" where that is a centre crop.
        window: edge of the windows; None: the run's crop_size.
        alpha: opacity of an overlay's colours.
        progress: show progress.
    """
    config, chosen = finished.config, finished.network(network)
    propagate = make_propagation(config)
    mode = mode or (config.evaluation if config.evaluation in MODES else "original")
    colours = np.round(255 * class_colours(len(finished.class_names))).astype(np.uint8)
    with make_bar(len(images), "predict", progress=progress) as bar:
        for path in images:
            image = read_image(path).as_subclass(Tensor)
            worked = TF.resize(image, list(config.image_size), antialias=True) if config.image_size else image
            labels = predict(chosen, propagate, worked, image.shape[-2:], mode=mode, window=window or config.crop_size)[
                "propagated" if propagated else "prediction"
            ]
            ids = labels.to("cpu", torch.uint8).numpy()
            write_png(out / f"{path.stem}_mask.png", palette_image(ids, colours))
            write_png(out / f"{path.stem}_overlay.png", overlay(image.permute(1, 2, 0).numpy(), colours[ids], alpha))
            bar.update()
    draw_legend(out / "legend.png", finished.class_names)


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
    """Writes a PNG with the colour, id and name of every class."""
    columns = -(-len(class_names) // 16)
    lines = -(-len(class_names) // columns)
    figure = new_figure(3 * columns, 0.25 * lines)  # cut to the legend below
    figure.legend(
        handles=[
            Patch(
                facecolor=colour,
                edgecolor=FRAME,
                linewidth=0.6,
                label=f"{str(index).rjust(3, FIGURE_SPACE)}  {name}",
            )
            for index, (name, colour) in enumerate(zip(class_names, class_colours(len(class_names)), strict=True))
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
