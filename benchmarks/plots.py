"""Plots from the JSON: growth of time and memory, targets, and the roofline.

Drawn for a phone and for print: one panel a file or panels below each other, large type, labels at the lines instead of
legends, two colours that differ in lightness and the line style besides.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from .table import figure as in_words

Results = dict[str, Any]

OURS, OTHER, GREY = "#0b3c6f", "#e07b00", "#777777"
STYLE = {
    "font.size": 15,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 16,
    "axes.titlelocation": "left",
    "lines.linewidth": 2.5,
    "lines.markersize": 7,
    "svg.hashsalt": "dlprop",  # the same results give the same file
    "figure.constrained_layout.use": True,
}
SUBJECTS = {"growth_propagation": "propagation", "growth_loss": "loss", "growth_softmax": "softmax"}
MARKERS = {"propagation": "o", "loss": "s", "softmax": "^"}
STOPPED = {"out of memory": "X", "too slow": "v"}


def draw_all(results: Results, folder: Path) -> list[Path]:
    """Draw what the results have data for; the files' names."""
    device = results["device"]
    drawn = []
    with mpl.rc_context(STYLE):
        for name, draw in {
            "time": lambda r: growth(r, "time"),
            "memory": lambda r: growth(r, "memory"),
            "targets": targets,
            "roofline": roofline,
        }.items():
            figure = draw(results)
            if figure is None:
                continue
            path = folder / f"{device}_{name}.svg"
            figure.savefig(path, metadata={"Date": None})
            plt.close(figure)
            drawn.append(path)
    return drawn


def growth(results: Results, kind: str) -> Figure | None:
    """Log-log time or memory against pixels, with what ran out of memory or time marked at the top."""
    entries = {k: v for k, v in results["entries"].items() if k in SUBJECTS and v["group"] == "growth"}
    if not entries:
        return None
    figure, ax = plt.subplots(figsize=(7.2, 6.4))
    ends, stops = [], []
    for key, entry in entries.items():
        subject = SUBJECTS[key]
        for variant in entry["slopes"]:
            points = [(p["pixels"], p["variants"][variant]) for p in entry["points"] if variant in p["variants"]]
            at = [(m, _value(v, kind)) for m, v in points if v["status"] == "ok" and _value(v, kind)]
            is_ours = variant == "dlprop"
            colour = OURS if is_ours else GREY if variant == "KeOps" else OTHER
            name = subject if is_ours else f"{subject}, {'KeOps' if variant == 'KeOps' else 'dense'}"
            if at:
                ax.loglog(*zip(*at, strict=True), "-" if is_ours else "--", marker=MARKERS[subject], color=colour)
            stop = next(((m, v["status"]) for m, v in points if v["status"] in STOPPED), None)
            if stop and at and not (kind == "memory" and stop[1] == "too slow"):  # slow, not large
                stops.append((*at[-1], *stop, name, colour))
            elif at:
                ends.append((*at[-1], name, colour))
    ax.set(xlabel="pixels of one image", title=f"{'seconds' if kind == 'time' else 'MiB beyond the inputs'}, log-log")
    bottom, top = ax.get_ylim()
    ax.set_ylim(bottom, top * 10)
    left, right = ax.get_xlim()
    ax.set_xlim(left, right * (right / left) ** 0.35)
    for m, value, pixels, status, name, colour in stops:
        ax.plot([m, pixels], [value, top * 3], ":", color=colour, linewidth=1.5)
        ax.plot(pixels, top * 3, STOPPED[status], color=colour, markersize=12)
        ends.append((pixels, top * 3, name, colour))  # named at the mark, away from the crowd
    _label(ax, ends, (1,))
    handles = [
        plt.Line2D([], [], color="black", linestyle="", marker=marker, markersize=10, label=status)
        for status, marker in STOPPED.items()
        if status in {stop[3] for stop in stops}
    ]
    if handles:
        ax.legend(handles=handles, loc="lower right", frameon=False, fontsize=13, handletextpad=0.2, borderaxespad=0)
    return figure


def _value(variant: Results, kind: str) -> float | None:
    return variant["seconds"]["median"] if kind == "time" else variant.get("peak_mib")


def _label(ax: Axes, labels: list[tuple[float, float, str, str]], sides: tuple[int, ...]) -> None:
    """Write names beside their points, on the side and at the height where they cover no line and no other name."""
    ax.figure.canvas.draw()
    unit = ax.figure.dpi / 72
    taken = []
    for line in ax.lines:
        if line.get_linestyle() == ":":
            continue  # thin enough to be written over
        corners = ax.transData.transform(np.column_stack(line.get_data()))
        is_line = line.get_linestyle() != "None" and len(corners) < 50
        steps = np.linspace(0, len(corners) - 1, (15 if is_line else 1) * (len(corners) - 1) + 1)
        for x, y in zip(*(np.interp(steps, np.arange(len(corners)), c) for c in corners.T), strict=True):
            taken.append(Bbox.from_bounds(x - 4 * unit, y - 4 * unit, 8 * unit, 8 * unit))
    for x, y, name, colour in sorted(labels, key=lambda label: label[1]):
        for dy, side in itertools.product((0, 9, -9, 17, -17, 26, -26, 34, -34, 51, -51), sides):
            text = ax.annotate(
                name, (x, y), (10 * side, dy), textcoords="offset points", color=colour, fontsize=14,
                va="center", ha="left" if side == 1 else "right", annotation_clip=False,
            )  # fmt: skip
            text.set_in_layout(False)
            box = text.get_window_extent()
            if not any(box.overlaps(other) for other in taken) and ax.bbox.x0 < box.x0 and box.x1 < ax.figure.bbox.x1:
                break
            text.remove()
        else:
            text = ax.annotate(name, (x, y), (10, 0), textcoords="offset points", color=colour, fontsize=14)
            box = text.get_window_extent()
        taken.append(box)


def targets(results: Results) -> Figure | None:
    """How far the ratio targets are met: bars of the measured figure, a mark at the bound."""
    found = [
        target
        for entry in results["entries"].values()
        for target in entry.get("targets", ())
        if target["measure"] in ("speedup", "cost") and target["met"] is not None
    ]
    panels = [
        (
            "times faster than the other\n(black: the target; met from there on)",
            [f for f in found if f["measure"] == "speedup"],
        ),
        ("times the other's time\n(black: the target; met up to there)", [f for f in found if f["measure"] == "cost"]),
    ]
    panels = [panel for panel in panels if panel[1]]
    if not panels:
        return None
    rows = [len(rows) for _, rows in panels]
    figure, axes = plt.subplots(
        len(panels), figsize=(7.2, 1.6 * len(panels) + 0.95 * sum(rows)), height_ratios=rows, squeeze=False
    )
    for ax, (title, rows_) in zip(axes[:, 0], panels, strict=True):
        _bars(ax, rows_)
        ax.set_title(title)
    return figure


def _bars(ax: Axes, rows: list[Results]) -> None:
    values = [target["value"] for target in rows]
    bounds = [target["bound"] for target in rows]
    ax.set_xscale("log")
    ax.set_xlim(min(0.5, *values, *bounds) / 1.3, max(*values, *bounds) * 1.6)
    ax.axvline(1, color=GREY, linewidth=1, ymax=1)
    for y, target in enumerate(rows):
        colour = OURS if target["met"] else OTHER
        ax.barh(y, target["value"] - 1, left=1, height=0.34, color=colour)
        ax.plot([target["bound"]] * 2, [y - 0.26, y + 0.26], color="black", linewidth=3)
        name = target["title"].replace(", forward and backward", "").replace("`", "")
        text = f"{name}: {in_words(target, {}).replace('*', '')}"
        white = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        ax.text(ax.get_xlim()[0], y - 0.28, text, fontsize=13, va="bottom", bbox=white).set_in_layout(False)
    ax.set_ylim(len(rows) - 0.6, -0.9)
    ax.set_yticks([])
    ax.spines["left"].set_visible(False)
    ax.xaxis.set_major_formatter(lambda x, _: f"{x:g}")


def roofline(results: Results) -> Figure | None:
    """Operations a second against operations a byte: the machine's two limits, and a point for every case of ours."""
    points = []
    for key, entry in results["entries"].items():
        variant = entry.get("variants", {}).get("dlprop", {})
        if entry["group"] in ("propagation", "loss", "softmax") and "roofline" in variant:
            facts = variant["roofline"]
            points.append((facts["operations"] / facts["bytes"], facts["rate"] / 1e9, key.replace("_", " ")))
    if not points:
        return None
    rates = results["rates"]
    on_gpu = "tf32" in rates  # where matrix units multiply half precision for ours
    peak, copy = rates["bfloat16" if on_gpu else "float32"] / 1e9, rates["copy"] / 1e9
    figure, ax = plt.subplots(figsize=(7.2, 6.6))
    intensity = np.array([p[0] for p in points])
    x = np.geomspace(min(intensity.min(), peak / copy) / 8, intensity.max() * 3, 200)
    ax.loglog(x, np.minimum(peak, x * copy), color="black")
    ax.loglog(*zip(*[p[:2] for p in points], strict=True), "o", color=OURS, markersize=9)
    ax.set_ylim(min(p[1] for p in points) / 3, peak * 3)
    ax.set_xlim(x[0], x[-1] * 4)
    ax.text(
        x[-1],
        peak * 1.12,
        f"{'bfloat16 ' if on_gpu else ''}matrix product {peak:,.0f} GFLOP/s",
        ha="right",
        fontsize=13,
    )
    ax.set(xlabel="operations a byte (by count)", title="GFLOP/s of dlprop under the machine's limits")
    on_the_roof = (peak / copy / 20, peak / 20, f"copy {copy:,.0f} GB/s", "black")
    # Points lie close together, so they are numbered, and named where there is room.
    points.sort(key=lambda p: p[0])
    _label(ax, [*((x, y, str(i), OURS) for i, (x, y, _) in enumerate(points, 1)), on_the_roof], (1, -1))
    names = "\n".join(f"{i}  {name}" for i, (_, _, name) in enumerate(points, 1))
    style = {"fontsize": 13, "color": OURS, "ha": "right", "va": "bottom", "multialignment": "left"}
    ax.text(0.99, 0.02, names, transform=ax.transAxes, **style).set_in_layout(False)
    return figure
