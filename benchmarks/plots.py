"""Growth of time and memory with the pixels, drawn from the JSON.

Drawn for a phone and for print: large type, names at the lines instead of a legend, two colours that differ in
lightness and the line style besides.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .problem import OURS

Results = dict[str, Any]

COLOURS = {True: "#0b3c6f", False: "#e07b00"}
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
MARKERS = {"growth_propagation": "o", "growth_discriminant": "D", "growth_loss": "s", "growth_softmax": "^"}
TITLES = {"time": "seconds", "memory": "MiB beyond the inputs"}


def draw_all(results: Results, folder: Path) -> list[Path]:
    """Draw what the results have data for; the files' names."""
    drawn = []
    with mpl.rc_context(STYLE):
        for kind in TITLES:
            figure = growth(results, kind)
            if figure is not None:
                drawn.append(folder / f"{results['device']}_{kind}.svg")
                figure.savefig(drawn[-1], metadata={"Date": None})
                plt.close(figure)
    return drawn


def growth(results: Results, kind: str) -> Figure | None:
    """Log-log time or memory against pixels; a cross at the top where a variant needs more memory than there is."""
    lines = []
    for name, marker in MARKERS.items():
        entry = results["cases"].get(name, {})
        for variant in entry.get("slopes", ()):
            at = {p["pixels"]: p["variants"][variant] for p in entry["points"] if variant in p["variants"]}
            ran = [(pixels, value(found, kind)) for pixels, found in at.items() if value(found, kind) is not None]
            stop = next((pixels for pixels, found in at.items() if "needs_gib" in found), None)
            if ran:
                title = entry["title"] if variant == OURS else f"{entry['title']}, plain"
                lines.append((title, variant == OURS, marker, ran, stop))
    if not lines:
        return None
    figure, ax = plt.subplots(figsize=(7.2, 6.4))
    top = 4 * max(y for *_, ran, _ in lines for _, y in ran)
    ends = []
    for title, is_ours, marker, ran, stop in lines:
        colour = COLOURS[is_ours]
        ax.loglog(*zip(*ran, strict=True), "-" if is_ours else "--", marker=marker, color=colour)
        end = ran[-1]
        if stop is not None:
            ax.plot([end[0], stop], [end[1], top], ":", color=colour, linewidth=1.5)
            ax.plot(stop, top, "X", color=colour, markersize=12)
            end = (stop, top)
        ends.append((end, title, colour))
    ax.set(xlabel="pixels of one image", title=f"{TITLES[kind]}, log-log (X: out of memory)")
    ax.set_ylim(top=8 * top)  # room for names above the crosses
    left, right = ax.get_xlim()
    ax.set_xlim(left, right * (right / left) ** 0.5)
    name_ends(ax, ends)
    return figure


def value(found: Results, kind: str) -> float | None:
    return found.get("seconds", {}).get("median") if kind == "time" else found.get("peak_mib")


def name_ends(ax: Axes, ends: list[tuple[tuple[float, float], str, str]]) -> None:
    """Write the names to the right of the lines' ends, from below, each above the one it would cover."""
    unit = plt.gcf().dpi / 72
    taken: list[tuple[float, float]] = []
    for end, title, colour in sorted(ends, key=lambda e: e[0][1]):
        x, y = ax.transData.transform(end)
        height = y
        while any(abs(height - other) < 17 * unit and abs(x - at) < 230 * unit for at, other in taken):
            height += 2 * unit
        taken.append((x, height))
        offset = (10, (height - y) / unit)
        text = ax.annotate(title, end, offset, textcoords="offset points", color=colour, fontsize=13, va="center")
        text.set_in_layout(False)
