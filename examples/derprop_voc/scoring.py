"""`evaluate`: the networks of finished checkpoints on the validation images, as a table and as JSON."""

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from .choice import (
    Finished,
    add_machine_arguments,
    add_source_arguments,
    checked_window,
    checkpoint_files,
    load_finished,
    make_device,
)
from .config import Config, ConfigError, hints, make_config
from .data import Data, SegmentationDataset, load_data
from .evaluate import evaluate
from .files import versions, write_json
from .losses import make_propagation

DATA_OPTIONS = ("dataset", "data", "partition")
Value = TypeVar("Value")


def add_evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `evaluate`."""
    add_source_arguments(parser, several=True)
    modes = get_args(hints()["evaluation"])
    parser.add_argument("--mode", choices=modes, help="how images are scored (default: the run's `evaluation`)")
    parser.add_argument("--window", type=int, help="edge of the windows and of the crop (default: the run's crop_size)")
    add_data_arguments(parser)
    parser.add_argument(
        "--out", type=Path, help="JSON file (default: evaluation_<mode>.json beside the first checkpoint)"
    )
    add_machine_arguments(parser)


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags that say where a run's data lies now."""
    for item in fields(Config):
        if item.name in DATA_OPTIONS:
            kind = hints()[item.name]
            parser.add_argument(
                f"--{item.name}",
                choices=get_args(kind) if get_origin(kind) else None,
                help=f"{item.metadata['help']} (default: the run's)",
            )


def data_overrides(arguments: argparse.Namespace) -> dict[str, Any]:
    """The flags of `add_data_arguments` that were given."""
    return {name: getattr(arguments, name) for name in DATA_OPTIONS if getattr(arguments, name) is not None}


def score(arguments: argparse.Namespace) -> None:
    """Scores the chosen checkpoints, prints the table and writes the JSON."""
    device = make_device(arguments.accelerator, arguments.threads)
    paths = checkpoint_files(arguments, best=True)
    results = score_checkpoints(
        load_finished(paths, device), mode=arguments.mode, window=arguments.window, overrides=data_overrides(arguments)
    )
    out = arguments.out or paths[0].parent / f"evaluation_{results['mode']}.json"
    write_json(out, results | {"device": str(device)})
    print(f"{table(results)}\nWrote {out}")


def score_checkpoints(
    finished: Sequence[Finished],
    *,
    mode: str | None = None,
    window: int | None = None,
    overrides: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Scores every network of every checkpoint on the same images: those of the first checkpoint's run.

    Args:
        finished: the checkpoints, all with the same class names.
        mode: see `probabilities`; None: as the runs have it.
        window: edge of the windows; None: the runs' crop_size.
        overrides: options that say where the data lies now.
        progress: show progress bars, on terminals.

    Raises:
        ConfigError: where the checkpoints disagree on what is not given, and where the data has other class names.
    """
    mode = _settled("mode", mode, [item.config.evaluation for item in finished])
    if mode == "original":
        window = None
    else:
        window = checked_window(_settled("window", window, [item.config.crop_size for item in finished]))
    config = make_config(finished[0].config.to_dict() | dict(overrides or {}))
    data = validation_data(config)
    for item in finished:
        if item.class_names != data.class_names:
            raise ConfigError(
                f"class_names: {item.path} was made with {list(item.class_names)}, found {list(data.class_names)}"
            )
    start = time.perf_counter()
    checkpoints = []
    for item in finished:
        val = SegmentationDataset(data.val, labeled=True, size=item.config.image_size, stored_mask=True)
        propagate = make_propagation(item.config)
        networks = evaluate(
            item.networks, propagate, val, data.class_names, mode=mode, window=window or 0, progress=progress
        )
        facts = {"name": item.name, "step": item.step, "epoch": item.epoch, "variant": item.config.variant}
        checkpoints.append(facts | {"tested": list(networks)[-1], "networks": networks})
    return {
        "mode": mode,
        "window": window,
        "images": len(data.val),
        "data": {name: getattr(config, name) for name in DATA_OPTIONS},
        "classes": list(data.class_names),
        "checkpoints": checkpoints,
        "seconds": round(time.perf_counter() - start, 2),
        "versions": versions(),
    }


def _settled(name: str, given: Value | None, own: Sequence[Value]) -> Value:
    """`given`, else what the checkpoints agree on."""
    if given is None and len(set(own)) > 1:
        found = ", ".join(map(str, dict.fromkeys(own)))
        raise ConfigError(f"{name}: the checkpoints were made with {found}; choose one with --{name}")
    return own[0] if given is None else given


def validation_data(config: Config) -> Data:
    """The data of a run without its unlabelled list, which scoring does not need."""
    return load_data(make_config(config.to_dict() | {"variant": "supervised"}))


def table(results: Mapping[str, Any]) -> str:
    """IoU of every class and its mean as fixed-width text: a column for each checkpoint, network, and P and P~."""
    columns = [
        (checkpoint, network, scores[key])
        for checkpoint in results["checkpoints"]
        for network, scores in checkpoint["networks"].items()
        for key in ("prediction", "propagated")
    ]
    labels = [f"{checkpoint['name']}, step {checkpoint['step']}" for checkpoint in results["checkpoints"]]
    first = max(map(len, ["class", *results["classes"]])) + 2
    # A label is as wide as its checkpoint's columns, of which there are two at least.
    width = max(10, *(-(-(len(label) + 2) // 2) for label in labels))
    rows = [(name, [_percent(scores["iou"][name]) for _, _, scores in columns]) for name in results["classes"]] + [
        ("mean", [_percent(scores["miou"]) for _, _, scores in columns])
    ]
    heads = [
        "".join(
            f"{label:^{2 * width * len(checkpoint['networks'])}}"
            for label, checkpoint in zip(labels, results["checkpoints"], strict=True)
        ),
        "".join(f"{network:^{2 * width}}" for _, network, _ in columns[::2]),
        f"{'P':>{width}}{'P~':>{width}}" * (len(columns) // 2),
    ]
    window = f", window {results['window']}" if results["window"] else ""
    lines = [
        f"IoU on {results['images']} validation images, in percent; evaluation: {results['mode']}{window}",
        "",
        *((" " * first + head).rstrip() for head in heads),
        *(f"{name:<{first}}" + "".join(f"{cell:>{width}}" for cell in cells) for name, cells in rows),
        "",
        "P: prediction. P~: the same logits propagated. -: a class in neither truth nor prediction, not in the mean.",
    ]
    return "\n".join(lines) + "\n"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"
