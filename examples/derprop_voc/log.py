"""The numbers of a run while it trains: JSON lines, TensorBoard and learning curves."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .figures import INK, new_figure, write_figure
from .files import write_bytes

LOSSES = ("loss", "ce_l", "ce_l_propagated", "ce_u", "ce_u_propagated", "kl", "der_l", "der_u")


class Log:
    """Appends entries to the run's history, to `log.jsonl` and to TensorBoard.

    Args:
        out: run folder.
        history: entries of the run so far; a resumed run's files go on from there, whatever was written after it.
        tensorboard: write event files under `out`/tensorboard.
        enabled: false in all processes but one: then only `history` grows.
    """

    def __init__(self, out: Path, history: list[dict[str, Any]], *, tensorboard: bool, enabled: bool) -> None:
        self.path, self.history, self.enabled = out / "log.jsonl", history, enabled
        self.writer: Any = None
        if not enabled:
            return
        write_bytes(self.path, "".join(map(_line, history)).encode())
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # takes a second to import

            purge = history[-1]["step"] + 1 if history else 0
            self.writer = SummaryWriter(str(out / "tensorboard"), purge_step=purge)

    def add(self, step: int, epoch: int, kind: str, numbers: Mapping[str, float]) -> None:
        """Adds one entry: kind is "train", "pseudo", "confident" or "val"."""
        entry = {"step": step, "epoch": epoch, "kind": kind} | dict(numbers)
        self.history.append(entry)
        if not self.enabled:
            return
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(_line(entry))
        if self.writer:
            for name, value in numbers.items():
                self.writer.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        """Flushes what TensorBoard holds back."""
        if self.writer:
            self.writer.close()


def _line(entry: Mapping[str, Any]) -> str:
    return json.dumps(entry, allow_nan=False) + "\n"


def _running_mean(values: Sequence[float]) -> np.ndarray:
    """The mean over a window around each value, of a fortieth of all; at the ends, over the part that there is."""
    kernel = np.ones(2 * (len(values) // 80) + 1)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


def draw_curves(path: Path, history: Sequence[Mapping[str, Any]]) -> None:
    """Writes one PNG with what a history holds: losses; threshold and kept pixels; mIoU while training; validation.

    Curves of many points are running means, with the values themselves faint behind them.
    """
    groups = [
        ("losses", "train", [name for name in LOSSES if any(name in entry for entry in history)], "log"),
        ("pseudo-label threshold and kept pixels", "train", ["threshold", "kept"], "linear"),
        ("mIoU on training crops", "pseudo", None, "linear"),
        ("pixels above the threshold and their accuracy", "confident", None, "linear"),
        ("validation mIoU", "val", None, "linear"),
    ]
    shown = []
    for title, kind, names, scale in groups:
        entries = [entry for entry in history if entry["kind"] == kind]
        found = list(dict.fromkeys(name for entry in entries for name in entry)) if names is None else names
        curves = {
            name: [(entry["step"], entry[name]) for entry in entries if name in entry]
            for name in found
            if name not in ("step", "epoch", "kind")
        }
        curves = {name: points for name, points in curves.items() if points}
        if curves:
            shown.append((title, curves, scale))
    figure = new_figure(8, 2.9 * max(1, len(shown)), layout="constrained")
    axes = figure.subplots(len(shown) or 1, 1, sharex=True, squeeze=False)[:, 0]
    for axis, (title, curves, scale) in zip(axes, shown, strict=False):
        for name, points in curves.items():
            steps, values = zip(*points, strict=True)
            marker = "o" if len(steps) < 30 else ""
            (line,) = axis.plot(steps, _running_mean(values), marker=marker, markersize=3, linewidth=1.4, label=name)
            axis.plot(steps, values, color=line.get_color(), linewidth=0.6, alpha=0.35)
        if scale == "log" and any(value > 0 for points in curves.values() for _, value in points):
            axis.set_yscale("log", nonpositive="mask")  # a term is 0 while nothing is confident
        axis.set_title(title, loc="left", fontsize=11, color=INK, fontweight="bold")
        axis.tick_params(labelbottom=True)
        axis.grid(color="#e4e7ec", linewidth=0.6)
        axis.tick_params(labelsize=8, colors=INK)
        axis.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    if shown:
        axis.set_xlabel("optimiser step", fontsize=9, color=INK)
    write_figure(path, figure)
