"""Tables and curves of a grid's runs: means, standard deviations, paired differences, classes and pseudo-labels."""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .figures import INK, new_figure, write_figure

# A variant's name and the results of one of its runs.
Run = tuple[str, Mapping[str, Any]]

# What the table shows of every run: network, output, title.
COLUMNS = (
    ("trained", "prediction", "P"),
    ("trained", "propagated", "P~"),
    ("averaged", "prediction", "P, momentum"),
    ("averaged", "propagated", "P~, momentum"),
)
# What it shows of pseudo-labels: the name in the log and its title.
PSEUDO_LABELS = (
    ("unlabeled_prediction", "mIoU of P"),
    ("unlabeled_propagated", "of P~"),
    ("unlabeled_pseudo", "of P_bar"),
    ("unlabeled_confident", "of P_bar above the threshold"),
    ("pseudo_share", "share above it"),
    ("pseudo_accuracy", "accuracy above it"),
)


def summarise(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One row a variant: seeds, the values of every column, their mean and sample standard deviation.

    "classes" holds the mean IoU of each class by column, and "pseudo_labels" what was last logged of them while
    training, on unlabelled crops and if it was measured (`measure_pseudo_labels`): mIoU, shares and accuracies.
    """
    rows: dict[str, dict[str, Any]] = {}
    for variant, results in runs:
        row = rows.setdefault(variant, {"variant": variant, "mode": results["evaluation"]["mode"], "seeds": []})
        row["seeds"].append(results["seed"])
        row.setdefault("seconds", []).append(results["seconds"]["train"])
        columns, classes, pseudo_labels = (row.setdefault(key, {}) for key in ("columns", "classes", "pseudo_labels"))
        for network, output, title in COLUMNS:
            scores = results["last"][network]
            if scores:
                columns.setdefault(title, []).append(scores[output]["miou"])
                for name, iou in scores[output]["iou"].items():
                    classes.setdefault(title, {}).setdefault(name, []).append(iou)
        last = {entry["kind"]: entry for entry in results["history"]}
        for name, value in (last.get("pseudo", {}) | last.get("confident", {})).items():
            if name not in ("step", "epoch", "kind"):
                pseudo_labels.setdefault(name, []).append(value)
    for row in rows.values():
        for group in (row["columns"], row["pseudo_labels"]):
            group.update({name: _summary(values) for name, values in group.items()})
        for of_column in row["classes"].values():
            of_column.update({name: _mean_of_seen(values) for name, values in of_column.items()})
    return list(rows.values())


def add_differences(rows: Sequence[dict[str, Any]], against: str) -> None:
    """Adds to each row its differences from the row `against`, over the seeds that both have.

    A column's difference has the mean of its values and that mean's standard error, their sample standard deviation
    divided by the square root of their number. Pairs share lists, batches and initial weights, so what seeds have in
    common falls out.
    """
    reference = next(row for row in rows if row["variant"] == against)
    for row in rows:
        columns = {}
        for title in filter(reference["columns"].get, row["columns"]):
            values = [dict(zip(of["seeds"], of["columns"][title]["values"], strict=True)) for of in (row, reference)]
            pairs = {seed: value - values[1][seed] for seed, value in values[0].items() if seed in values[1]}
            if pairs:
                spread = statistics.stdev(pairs.values()) if len(pairs) > 1 else None
                columns[title] = {
                    "seeds": list(pairs),
                    "values": list(pairs.values()),
                    "mean": statistics.mean(pairs.values()),
                    "error": None if spread is None else spread / math.sqrt(len(pairs)),
                }
        row["differences"] = {"against": against, "columns": columns}


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a Markdown table, mIoU in percent, and a second one of their differences if they have any."""
    titles = [title for _, _, title in COLUMNS]
    lines = [_header(["seeds", *titles])]
    for row in rows:
        lines.append(_line(row, [str(len(row["seeds"])), *(_cell(row["columns"].get(title)) for title in titles)]))
    compared = [row for row in rows if row.get("differences", {}).get("against", row["variant"]) != row["variant"]]
    if compared:
        against = compared[0]["differences"]["against"]
        lines += ["", f"Less {against}, the mean over pairs of one seed ± its standard error:", "", _header(titles)]
        for row in compared:
            of_row = row["differences"]["columns"]
            lines.append(_line(row, [_difference(of_row.get(title)) for title in titles]))
    return "\n".join(lines)


def details(rows: Sequence[Mapping[str, Any]]) -> str:
    """What the means hide, as Markdown, in percent: IoU of each class, and what pseudo-labels were worth at the end."""
    lines = []
    for title in (title for _, _, title in COLUMNS if any(title in row["classes"] for row in rows)):
        shown = [row for row in rows if title in row["classes"]]
        names = list(dict.fromkeys(name for row in shown for name in row["classes"][title]))
        lines += [f"IoU of each class, {title}, mean over seeds:", "", _header(names)]
        lines += [_line(row, [_percent(row["classes"][title].get(name)) for name in names]) for row in shown] + [""]
    shown = [row for row in rows if any(name in row["pseudo_labels"] for name, _ in PSEUDO_LABELS)]
    if shown:
        lines += ["Unlabelled crops, the last measurement of training:", ""]
        lines.append(_header([title for _, title in PSEUDO_LABELS]))
        lines += [_line(row, [_cell(row["pseudo_labels"].get(name)) for name, _ in PSEUDO_LABELS]) for row in shown]
    return "\n".join(lines).rstrip("\n")


def draw_quality(path: Path, runs: Sequence[Run]) -> None:
    """Writes learning curves, a plot a variant: mIoU on training crops, the mean over seeds.

    What was not measured (`measure_pseudo_labels`) is left out; without any of it there is no picture.
    """
    curves: dict[str, dict[str, dict[int, list[float]]]] = {}
    for variant, results in runs:
        for entry in results["history"]:
            if entry["kind"] == "pseudo":
                for name, value in entry.items():
                    if name not in ("step", "epoch", "kind"):
                        of_variant = curves.setdefault(variant, {})
                        of_variant.setdefault(name, {}).setdefault(entry["step"], []).append(value)
    if not curves:
        return
    names = list(dict.fromkeys(name for of_variant in curves.values() for name in of_variant))
    columns = min(3, len(curves))
    rows = -(-len(curves) // columns)
    figure = new_figure(3.6 * columns, 2.9 * rows + 0.6, layout="constrained")
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat
    for axis in axes[len(curves) :]:
        axis.set_axis_off()
    for axis, (variant, of_variant) in zip(axes, curves.items(), strict=False):
        for index, name in enumerate(names):
            points = sorted((step, 100 * statistics.mean(values)) for step, values in of_variant.get(name, {}).items())
            style = "--" if name.startswith("labeled") else "-"
            axis.plot(
                *zip(*points, strict=True) if points else ([], []), style, color=f"C{index}", linewidth=1.4, label=name
            )
        axis.set_title(variant, loc="left", fontsize=11, color=INK, fontweight="bold")
        axis.grid(color="#e4e7ec", linewidth=0.6)
        axis.tick_params(labelsize=8, colors=INK)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    axes[columns * (rows - 1)].set_xlabel("optimiser step", fontsize=9, color=INK)
    figure.supylabel("mIoU on training crops, percent", fontsize=9, color=INK)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9, labelcolor=INK)
    write_figure(path, figure)


def _summary(values: Sequence[float]) -> dict[str, Any]:
    return {
        "values": list(values),
        "mean": statistics.mean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
    }


def _mean_of_seen(values: Sequence[float | None]) -> float | None:
    seen = [value for value in values if value is not None]
    return statistics.mean(seen) if seen else None


def _header(titles: Sequence[str]) -> str:
    return f"| variant | {' | '.join(titles)} |\n|---|{'---|' * len(titles)}"


def _line(row: Mapping[str, Any], cells: Sequence[str]) -> str:
    return f"| {row['variant']} | {' | '.join(cells)} |"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _cell(column: Mapping[str, Any] | None) -> str:
    if column is None:
        return "-"
    spread = "" if column["std"] is None else f" ± {100 * column['std']:.1f}"
    return f"{100 * column['mean']:.1f}{spread}"


def _difference(column: Mapping[str, Any] | None) -> str:
    if column is None:
        return "-"
    error = "" if column["error"] is None else f" ± {100 * column['error']:.1f}"
    return f"{100 * column['mean']:+.1f}{error}"
