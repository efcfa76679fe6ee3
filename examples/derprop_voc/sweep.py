"""`sweep`: what other propagation settings make of a finished network, without training it for them."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .ablate import read_grid
from .choice import (
    PROPAGATION,
    add_machine_arguments,
    add_network_argument,
    add_source_arguments,
    check_propagation,
    checkpoint_files,
    load_finished,
    make_device,
    with_propagation,
)
from .config import Config, make_config
from .data import SegmentationDataset
from .evaluate import evaluate
from .files import versions, write_json
from .pooled import Images, Pooled, pool_for, pooled_propagation, tau_of
from .scoring import add_data_arguments, check_scored, data_overrides, validation_data


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


def sweep_command(arguments: argparse.Namespace) -> None:
    """Scores one network with every setting of a grid, prints the table and writes the JSON."""
    device = make_device(arguments.accelerator, arguments.threads)
    paths = checkpoint_files(arguments, best=False)
    (finished,) = load_finished(paths, device)
    base = make_config(finished.config.to_dict() | data_overrides(arguments))
    settings = make_settings(base, read_grid(arguments.grid))
    data = validation_data(base)
    check_scored(finished, data, base)
    val = SegmentationDataset(data.val, labeled=True, size=base.image_size, stored_mask=True)
    network = finished.name_of(arguments.network)
    images = Images.of_items(data.val, base.image_size)
    windows: dict[str, Any] = {"mode": base.evaluation, "window": base.crop_size}
    rows = []
    pools: dict[float, Pooled] = {}
    for name, config in settings.items():
        tau = tau_of(config)
        pooled = pools.get(tau) or pool_for(finished, network, config, images, **windows)
        if pooled is not None:
            pools[tau] = pooled
        scores = evaluate(
            {network: finished.networks[network]},
            pooled_propagation(config, pooled),
            val,
            data.class_names,
            adjust=pooled.adjust if pooled else None,
            **windows,
        )[network]
        rows.append(
            {"setting": name}
            | {key: values["miou"] for key, values in scores.items()}
            | {option: config.to_dict()[option] for option in PROPAGATION}
            | {"tau": tau}
        )
    out = arguments.out or paths[0].parent / "sweep.json"
    facts = {"checkpoint": finished.name, "step": finished.step, "network": arguments.network, "images": len(val)}
    write_json(out, facts | {"mode": base.evaluation, "rows": rows, "versions": versions()})
    print(f"{markdown(rows)}\n\nWrote {out}")


def make_settings(base: Config, grid: Mapping[str, Mapping[str, Any]]) -> dict[str, Config]:
    """The grid's settings on top of the run's options, without the weights that the run was trained with.

    A setting that names an affinity starts from that affinity's defaults, see `with_propagation`.

    Raises:
        ConfigError: for an option that is not one of propagation.
    """
    for name, options in grid.items():
        check_propagation(f"grid: {name}", options)
    return {
        name: with_propagation(base, {"order_weights": Config.order_weights} | dict(options))
        for name, options in grid.items()
    }


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """MIoU in percent as a Markdown table; P does not depend on the setting, and is adjusted where there is a tau."""
    names = ["propagated", "blend"]
    heads = ["P~", "(P + P~) / 2"]
    if any("adjusted" in row for row in rows):
        names, heads = ["adjusted", *names], ["P adjusted", *heads]
    lines = [
        f"P: {100 * rows[0]['prediction']:.1f}",
        "",
        f"| setting | {' | '.join(heads)} |",
        f"|---|{'---|' * len(heads)}",
        *(
            f"| {row['setting']} | {' | '.join(f'{100 * row[name]:.1f}' if name in row else '-' for name in names)} |"
            for row in rows
        ),
    ]
    return "\n".join(lines)
