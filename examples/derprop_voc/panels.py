"""Pictures: rows of images with their label maps side by side, and a legend of the classes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.patches import Patch
from torch import nn
from torch.nn import functional as F

from dlprop import DerivativeLabelPropagation

from .data import VOID, SegmentationDataset
from .evaluate import predict
from .figures import FRAME, INK, new_figure, write_figure

VOID_COLOUR = (1.0, 1.0, 1.0)


def class_colours(class_names: Sequence[str]) -> np.ndarray:
    """(C, 3) floats: tab20 with its strong colours first; before them a dark neutral for a first class "background"."""
    neutral = [(0.17, 0.19, 0.23)] if [*class_names[:1]] == ["background"] else []
    count = len(class_names) - len(neutral)
    strong_first = [*range(0, 20, 2), *range(1, 20, 2)]
    table = np.array([colormaps["tab20"](index)[:3] for index in strong_first])
    if count > len(table):
        table = colormaps["gist_ncar"](np.linspace(0.1, 0.97, count))[:, :3]
    return np.vstack([*neutral, table[:count]])


def prediction_rows(
    network: nn.Module, propagate: DerivativeLabelPropagation, val: SegmentationDataset, count: int
) -> list[dict[str, Any]]:
    """Image, both predictions and truth for `count` validation images, spread evenly over the list."""
    count = min(count, len(val))
    rows = []
    for index in (round((place + 0.5) * len(val) / count - 0.5) for place in range(count)):
        sample = val[index]
        size = sample["mask"].shape[-2:]
        labels = predict(network, propagate, sample["image"], size)
        shown = F.interpolate(sample["image"][None].float(), size, mode="bilinear", align_corners=True)[0]
        rows.append(
            {
                "image": shown.round().byte().permute(1, 2, 0).numpy(),
                "without propagation": labels["prediction"].to("cpu", torch.uint8).numpy(),
                "with propagation": labels["propagated"].to("cpu", torch.uint8).numpy(),
                "truth": sample["mask"].numpy(),
            }
        )
    return rows


def draw_panel(
    path: Path,
    rows: Sequence[Mapping[str, np.ndarray]],
    class_names: Sequence[str],
    *,
    title: str,
    notes: Mapping[str, str] | None = None,
) -> None:
    """Writes a PNG grid.

    Args:
        path: file to write.
        rows: each maps column titles to an image (H, W, 3) uint8 or a label map (H, W) of ids; void is white.
        class_names: in id order.
        title: printed above.
        notes: column title -> a second line under it.
    """
    columns = list(rows[0])
    colours = class_colours(class_names)
    lookup = np.ones((VOID + 1, 3))
    lookup[: len(colours)] = colours
    height, width = rows[0][columns[0]].shape[:2]
    cell = 2.6  # inches
    cell_height = cell * height / width
    per_line = max(1, min(len(class_names), int(1.0 * len(columns) * cell / 1.25)))
    legend_lines = -(-len(class_names) // per_line)
    top, bottom = 0.95, 0.2 + 0.24 * legend_lines
    size = (cell * len(columns) + 0.3, cell_height * len(rows) + 0.08 * (len(rows) - 1) + top + bottom)
    figure = new_figure(*size)
    grid = figure.subplots(len(rows), len(columns), squeeze=False)
    figure.subplots_adjust(
        left=0.15 / size[0],
        right=1 - 0.15 / size[0],
        top=1 - top / size[1],
        bottom=bottom / size[1],
        wspace=0.035,
        hspace=0.035 * width / height,
    )
    for line, row in zip(grid, rows, strict=True):
        for axis, name in zip(line, columns, strict=True):
            picture = row[name]
            axis.imshow(lookup[picture] if picture.ndim == 2 else picture, interpolation="nearest", aspect="auto")
            axis.set_xticks([])
            axis.set_yticks([])
            for spine in axis.spines.values():
                spine.set(color=FRAME, linewidth=0.6)
    for axis, name in zip(grid[0], columns, strict=True):
        note = (notes or {}).get(name, "")
        axis.annotate(name, (0.5, 1), xytext=(0, 17), textcoords="offset points", xycoords="axes fraction", ha="center",
                      fontsize=11, color=INK, fontweight="bold")  # fmt: skip
        axis.annotate(note, (0.5, 1), xytext=(0, 5), textcoords="offset points", xycoords="axes fraction", ha="center",
                      fontsize=9, color="#5b6470")  # fmt: skip
    figure.text(
        0.15 / size[0], 1 - 0.12 / size[1], title, fontsize=13, color=INK, fontweight="bold", va="top", parse_math=False
    )  # a name may hold dollars
    figure.legend(
        handles=[
            Patch(facecolor=colour, edgecolor=FRAME, linewidth=0.6, label=name)
            for name, colour in zip([*class_names, "void"], [*colours, VOID_COLOUR], strict=True)
        ],
        loc="lower center",
        bbox_to_anchor=(0.5, 0.0),
        ncols=per_line + 1,
        frameon=False,
        fontsize=9,
        handlelength=1.1,
        columnspacing=1.3,
        labelcolor=INK,
    )
    write_figure(path, figure)
