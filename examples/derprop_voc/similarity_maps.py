"""`similarity`: what one pixel of an image is similar to, order by order, as a picture."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as TF

from dlprop import derivative_similarity
from dlprop.affinity import Discriminant, Linear, Ridge, Softmax

from .augment import to_input
from .choice import (
    add_machine_arguments,
    add_network_argument,
    add_source_arguments,
    checkpoint_files,
    load_finished,
    make_device,
)
from .data import read_image
from .errors import ConfigError
from .figures import FRAME, INK, new_figure, write_figure
from .losses import Objective
from .panels import class_colours


def add_similarity_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `similarity`."""
    add_source_arguments(parser, several=False)
    add_network_argument(parser)
    parser.add_argument("--image", type=Path, required=True, metavar="FILE", help="an image")
    parser.add_argument(
        "--pixel", type=int, nargs=2, metavar=("ROW", "COLUMN"), help="in the image's own pixels (default: its centre)"
    )
    parser.add_argument("--out", type=Path, help="PNG (default: similarity_<image>.png beside the checkpoint)")
    add_machine_arguments(parser)


def similarity_command(arguments: argparse.Namespace) -> None:
    """Draws the maps of one pixel and says where they are."""
    device = make_device(arguments.accelerator, arguments.threads)
    paths = checkpoint_files(arguments, best=False)
    image = read_image(arguments.image).as_subclass(Tensor)
    (finished,) = load_finished(paths, device)
    network = finished.network(arguments.network)
    out = arguments.out or paths[0].parent / f"similarity_{arguments.image.stem}.png"
    title = f"{arguments.image.name}, {finished.config.variant}, step {finished.step}"
    objective = Objective(finished.config)
    draw_similarity_maps(out, network, objective, image, arguments.pixel, class_names=finished.class_names, title=title)
    print(f"Wrote {out}")


def similarity_maps(
    feats: Tensor, affinity: Linear | Softmax | Ridge | Discriminant, query: int, *, held_down: int | None = None
) -> dict[str, Tensor]:
    """Row `query` of the similarities of features (1, D, h, w), as named maps (h, w).

    "S_q" for the orders q = 0..Q that `affinity` weighs and, beside them, the order `held_down` by L_Der; "S", the
    weighted sum of the orders up to Q; with the softmax affinity "softmax", what the pixel gives to each other one.
    Ridge and discriminant compare no pairs of pixels: their maps are dot products, of orders that their prior weighs.
    """
    orders = [*range(len(affinity.weights))]
    if held_down is not None and held_down not in orders:
        orders.append(held_down)
    maps = {
        f"S_{order}": derivative_similarity(
            feats,
            order=order,
            scheme=affinity.scheme,
            normalize=affinity.normalize,
            similarity=affinity.similarity if isinstance(affinity, Linear | Softmax) else "dot",
            query=torch.tensor([query], device=feats.device),
        )[0, 0]
        for order in orders
    }
    maps["S"] = torch.stack([weight * maps[f"S_{order}"] for order, weight in enumerate(affinity.weights)]).sum(0)
    if isinstance(affinity, Softmax):
        maps["softmax"] = maps["S"].softmax(0)
    return {name: values.unflatten(0, feats.shape[-2:]) for name, values in maps.items()}


@torch.no_grad()
def draw_similarity_maps(
    path: Path,
    network: nn.Module,
    objective: Objective,
    image: Tensor,
    pixel: Sequence[int] | None = None,
    *,
    class_names: Sequence[str],
    title: str = "",
) -> None:
    """Writes a PNG: the image with the pixel marked, the prediction, and `similarity_maps` on the features' grid.

    Args:
        path: file to write.
        network: gives `Output`; used in the mode that it is in.
        objective: the run's; gives the working size, the affinity and the order that L_Der holds down.
        image: uint8 (3, H, W), at its own size.
        pixel: row and column in `image`; None: its centre.
        class_names: in id order.
        title: printed above.

    Raises:
        ConfigError: for a pixel outside the image.
    """
    height, width = image.shape[-2:]
    row, column = pixel if pixel is not None else (height // 2, width // 2)
    if not (0 <= row < height and 0 <= column < width):
        raise ConfigError(
            f"pixel: expected row 0 to {height - 1} and column 0 to {width - 1} of the image, got {row} {column}"
        )
    config, affinity = objective.config, objective.propagate.affinity
    held_down = config.max_order + 1 if config.has_derivative_loss else None
    worked = TF.resize(image, list(config.image_size), antialias=True) if config.image_size else image
    output = network(to_input(worked)[None].to(next(network.parameters()).device))
    scores = F.interpolate(output.logits.softmax(1), (height, width), mode="bilinear", align_corners=True)
    labels = scores[0].argmax(0).cpu().numpy()
    h, w = output.feats.shape[-2:]
    cell = (row * h // height, column * w // width)  # the feature whose share of the image holds the pixel
    maps = similarity_maps(output.feats.float(), affinity, cell[0] * w + cell[1], held_down=held_down)

    orders = [name[2:] for name in maps if name.startswith("S_")]
    titles = {f"S_{order}": f"$S_{order}$, similarity of order {order}" for order in orders}
    titles |= {"S": _sum_title(affinity.weights), "softmax": "softmax of the sum"}
    if held_down is not None:
        titles[f"S_{held_down}"] += ", held down by $L_{Der}$"
    colours = class_colours(class_names)
    figure, axes = _grid(2 + len(maps), width / height)
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    axes[0].imshow(image.permute(1, 2, 0).cpu().numpy(), extent=extent)
    axes[0].set_title(f"row {row}, column {column}", fontsize=10, color=INK)
    axes[1].imshow(colours[labels], extent=extent, interpolation="nearest")
    axes[1].set_title(f"prediction: {class_names[labels[row, column]]}", fontsize=10, color=INK, parse_math=False)
    for axis, (name, values) in zip(axes[2:], maps.items(), strict=True):
        shown = axis.imshow(values.cpu().numpy(), extent=extent, interpolation="nearest", cmap="viridis")
        axis.set_title(titles[name], fontsize=10, color=INK)
        bar = figure.colorbar(shown, cax=axis.inset_axes((1.02, 0, 0.035, 1)))
        bar.formatter.set_powerlimits((-2, 3))
        bar.ax.tick_params(labelsize=7, colors=INK, length=2)
        bar.ax.yaxis.get_offset_text().set(size=7, color=INK)
        bar.outline.set(edgecolor=FRAME, linewidth=0.6)
    for axis in axes:
        _mark(axis, row, column)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, color=INK, fontweight="bold", parse_math=False)
    present = np.unique(labels)
    figure.legend(
        handles=[
            Patch(facecolor=colours[label], edgecolor=FRAME, linewidth=0.6, label=class_names[label])
            for label in present
        ],
        loc="outside lower center",
        ncols=min(8, len(present)),
        frameon=False,
        fontsize=9,
        handlelength=1.1,
        labelcolor=INK,
    )
    write_figure(path, figure)


def _sum_title(weights: Sequence[float]) -> str:
    return "sum: " + " + ".join(
        f"{'' if weight == 1 else f'{weight:g} '}$S_{order}$" for order, weight in enumerate(weights)
    )


def _grid(count: int, ratio: float) -> tuple[Figure, list[Axes]]:
    """A figure with `count` axes for images whose width is `ratio` times their height."""
    columns = 3 if count in (5, 6, 9) else 4
    rows = -(-count // columns)
    cell = 3.6  # inches, colour bar included
    size = (cell * columns, (0.83 * cell / ratio + 0.4) * rows + 0.75)
    figure = new_figure(*size, layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[count:]:
        axis.set_axis_off()
    for axis in axes[:count]:
        axis.set_xticks([])
        axis.set_yticks([])
        for spine in axis.spines.values():
            spine.set(color=FRAME, linewidth=0.6)
    return figure, axes[:count]


def _mark(axis: Axes, row: int, column: int) -> None:
    """A cross that shows on light and on dark."""
    for colour, size, width in (("#000000", 11, 3.0), ("#ffffff", 10, 1.4)):
        axis.plot(column, row, marker="+", color=colour, markersize=size, markeredgewidth=width)
