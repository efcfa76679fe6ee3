"""`sweep`: what other propagation settings make of a finished network, without training it for them."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .ablate import read_grid
from .choice import (
    add_machine_arguments,
    add_network_argument,
    add_source_arguments,
    checkpoint_files,
    load_finished,
    make_device,
)
from .config import ONLY_FOR, Config, ConfigError, make_config
from .data import SegmentationDataset
from .evaluate import evaluate
from .files import versions, write_json
from .losses import make_propagation
from .scoring import add_data_arguments, data_overrides, validation_data

PROPAGATION = (
    "affinity", "scale", "resolution", "similarity", "normalize", "scheme", "order_weights", "shrinkage", "balance",
    "across",
)  # fmt: skip


def add_sweep_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `sweep`."""
    add_source_arguments(parser, several=False)
    add_network_argument(parser)
    parser.add_argument(
        "--grid", type=Path, required=True, metavar="YAML", help="lines `name: {option: value, ...}` of propagation"
    )
    add_data_arguments(parser)
    parser.add_argument("--out", type=Path, help="JSON file (default: sweep.json beside the checkpoint)")
    add_machine_arguments(parser)


def sweep(arguments: argparse.Namespace) -> None:
    """Scores one network with every setting of a grid, prints the table and writes the JSON."""
    device = make_device(arguments.accelerator, arguments.threads)
    paths = checkpoint_files(arguments, best=False)
    (finished,) = load_finished(paths, device)
    base = make_config(finished.config.to_dict() | data_overrides(arguments))
    settings = make_settings(base, read_grid(arguments.grid))
    data = validation_data(base)
    val = SegmentationDataset(data.val, labeled=True, size=base.image_size, stored_mask=True)
    rows = []
    for name, config in settings.items():
        scores = evaluate(
            {"network": finished.network(arguments.network)},
            make_propagation(config),
            val,
            data.class_names,
            mode=base.evaluation,
            window=base.crop_size,
        )["network"]
        rows.append(
            {"setting": name}
            | {key: values["miou"] for key, values in scores.items()}
            | {option: config.to_dict()[option] for option in PROPAGATION}
        )
    out = arguments.out or paths[0].parent / "sweep.json"
    facts = {"checkpoint": finished.name, "step": finished.step, "network": arguments.network, "images": len(val)}
    write_json(out, facts | {"mode": base.evaluation, "rows": rows, "versions": versions()})
    print(f"{markdown(rows)}\n\nWrote {out}")


def make_settings(base: Config, grid: Mapping[str, Mapping[str, Any]]) -> dict[str, Config]:
    """The grid's settings on top of the run's options, without the weights that the run was trained with.

    A setting that names an affinity starts from that affinity's defaults, and the run's `scheme` and `resolution`.

    Raises:
        ConfigError: for an option that is not one of propagation.
    """
    for name, options in grid.items():
        for option in options:
            if option not in PROPAGATION:
                raise ConfigError(f"grid: {name}: expected options of {', '.join(PROPAGATION)}, got {option}")
    weights: dict[str, Any] = {"order_weights": Config.order_weights}
    of_affinity = weights | {name: getattr(Config, name) for name in ("normalize", *ONLY_FOR)}
    return {
        name: make_config(base.to_dict() | (of_affinity if "affinity" in options else weights) | dict(options))
        for name, options in grid.items()
    }


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """MIoU in percent as a Markdown table; P does not depend on the setting."""
    lines = [
        f"P: {100 * rows[0]['prediction']:.1f}",
        "",
        "| setting | P~ | (P + P~) / 2 |",
        "|---|---|---|",
        *(f"| {row['setting']} | {100 * row['propagated']:.1f} | {100 * row['blend']:.1f} |" for row in rows),
    ]
    return "\n".join(lines)
