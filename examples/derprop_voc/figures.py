"""What the pictures share: colours, and how a figure becomes a file."""

import io
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .files import write_bytes

INK, PAPER, FRAME = "#22262b", "#ffffff", "#c9ced6"


def new_figure(width: float, height: float, **options: Any) -> Figure:
    """An empty figure, in inches, without a window system."""
    figure = Figure(figsize=(width, height), facecolor=PAPER, **options)
    FigureCanvasAgg(figure)
    return figure


def write_figure(path: Path, figure: Figure, **options: Any) -> None:
    """Writes a PNG, whole or not at all."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=130, facecolor=PAPER, **options)
    write_bytes(path, buffer.getvalue())
