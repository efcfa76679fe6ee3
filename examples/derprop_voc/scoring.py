"""`evaluate`: the networks of finished checkpoints on the validation images, as a table and as JSON."""

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from .choice import (
    PROPAGATION,
    Finished,
    add_machine_arguments,
    add_propagation_arguments,
    add_source_arguments,
    check_not_trained_on,
    checked_window,
    checkpoint_files,
    load_finished,
    make_device,
    propagation_options,
    with_propagation,
)
from .config import CLASSIFIERS, Config, hints, make_config
from .data import Data, SegmentationDataset, load_data
from .errors import ConfigError
from .evaluate import evaluate
from .files import versions, write_json
from .pooled import Images, key_of, pool_for, pooled_propagation, tau_of, write_statistics

DATA_OPTIONS = ("dataset", "data", "partition")
OF_LISTS = (*DATA_OPTIONS, "download", "sbd", "num_classes", "class_names")
SHOWN = {"prediction": "P", "adjusted": "P adj.", "propagated": "P~", "blend": "mean"}
Value = TypeVar("Value")


def add_evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `evaluate`."""
    add_source_arguments(parser, several=True)
    modes = get_args(hints()["evaluation"])
    parser.add_argument("--mode", choices=modes, help="how images are scored (default: the run's `evaluation`)")
    parser.add_argument("--window", type=int, help="edge of the windows and of the crop (default: the run's crop_size)")
    add_data_arguments(parser)
    add_propagation_arguments(parser)
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


def evaluate_command(arguments: argparse.Namespace) -> None:
    """Scores the chosen checkpoints, prints the table and writes the JSON."""
    device = make_device(arguments.accelerator, arguments.threads)
    paths = checkpoint_files(arguments, best=True)
    results = score_checkpoints(
        load_finished(paths, device),
        mode=arguments.mode,
        window=arguments.window,
        overrides=data_overrides(arguments),
        options=propagation_options(arguments),
        read=arguments.read_statistics,
        write=arguments.write_statistics,
    )
    out = arguments.out or paths[0].parent / f"evaluation_{results['mode']}.json"
    write_json(out, results | {"device": str(device)})
    print(f"{table(results)}\nAll of it is in {out}")


def score_checkpoints(
    finished: Sequence[Finished],
    *,
    mode: str | None = None,
    window: int | None = None,
    overrides: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
    read: Path | None = None,
    write: Path | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Scores every network of every checkpoint on the same images: those of the first checkpoint's run.

    Args:
        finished: the checkpoints, all with the same class names.
        mode: see `probabilities`; None: as the runs have it.
        window: edge of the windows; None: the runs' crop_size.
        overrides: options that say where the data lies now.
        options: of propagation, in the place of the runs'; see `with_propagation`.
        read: file of statistics to use, see `pool_for`.
        write: file to keep the statistics of these images in.
        progress: show progress bars, on terminals.

    Raises:
        ConfigError: where the checkpoints disagree on what is not given, and where the data has other class names.
    """
    mode = _settled("mode", mode, [item.config.evaluation for item in finished])
    if mode != "original":
        window = _settled("window", window, [item.config.crop_size for item in finished])
    window = checked_window(window, mode)
    config = make_config(finished[0].config.to_dict() | dict(overrides or {}))
    data = validation_data(config)
    for item in finished:
        check_scored(item, data, config)
    start = time.perf_counter()
    checkpoints, kept = [], {}
    windows: dict[str, Any] = {"mode": mode, "window": window or 0}
    for item in finished:
        settings = with_propagation(item.config, options or {})
        val = SegmentationDataset(data.val, labeled=True, size=item.config.image_size, stored_mask=True)
        networks = {}
        for name, network in item.networks.items():
            images = Images.of_items(data.val, item.config.image_size, progress=progress)
            pooled = pool_for(item, name, settings, images, read=read, write=write is not None, **windows)
            if pooled is not None:
                kept[key_of(item, name)] = pooled
            propagate = pooled_propagation(settings, pooled, add_own=read is not None)
            adjust = pooled.adjust if pooled else None
            networks |= evaluate(
                {name: network}, propagate, val, data.class_names, adjust=adjust, progress=progress, **windows
            )
        facts = {"name": item.name, "step": item.step, "epoch": item.epoch, "variant": item.config.variant}
        propagation = {name: settings.to_dict()[name] for name in PROPAGATION} | {"tau": tau_of(settings)}
        checkpoints.append(facts | {"propagation": propagation, "tested": list(networks)[-1], "networks": networks})
    if write is not None:
        write_statistics(write, kept, data.class_names, len(data.val))
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


def check_class_names(finished: Finished, names: Sequence[str]) -> None:
    """Raises `ConfigError` unless the data set has the network's classes, in their order."""
    if finished.class_names != tuple(names):
        raise ConfigError(
            f"class_names: {finished.path} was made with {list(finished.class_names)}, found {list(names)}"
        )


def check_scored(finished: Finished, data: Data, config: Config) -> None:
    """Raises `ConfigError` for other class names, `DataError` for a validation image that the run was trained on."""
    check_class_names(finished, data.class_names)
    where, way_out = f"validation images of {config.partition}", "score it on the partition it was trained with"
    check_not_trained_on(finished, data.val, config, f"{finished.path}, {where}", way_out, by_lists=False)


def validation_data(config: Config) -> Data:
    """The data of a run without its unlabelled list, which scoring does not need."""
    lists = {name: value for name, value in config.to_dict().items() if name in OF_LISTS}
    return load_data(make_config(lists | {"variant": "supervised"}))


def table(results: Mapping[str, Any]) -> str:
    """IoU of every class and its mean as fixed-width text: a column for each checkpoint, network, and P and P~."""
    shown = [key for key in SHOWN if all(key in scores for _, _, scores in _networks(results))]
    columns = [scores[key] for _, _, scores in _networks(results) for key in shown]
    labels = [f"{checkpoint['name']}, step {checkpoint['step']}" for checkpoint in results["checkpoints"]]
    first = max(map(len, ["class", *results["classes"]])) + 2
    # A label is as wide as its checkpoint's columns, of which there are two at least.
    width = max(10, *(-(-(len(label) + 2) // len(shown)) for label in labels))
    rows = [(name, [_percent(scores["iou"][name]) for scores in columns]) for name in results["classes"]] + [
        ("mean", [_percent(scores["miou"]) for scores in columns])
    ]
    heads = [
        "".join(
            f"{label:^{len(shown) * width * len(checkpoint['networks'])}}"
            for label, checkpoint in zip(labels, results["checkpoints"], strict=True)
        ),
        "".join(f"{network:^{len(shown) * width}}" for _, network, _ in _networks(results)),
        "".join(f"{SHOWN[key]:>{width}}" for key in shown) * (len(columns) // len(shown)),
    ]
    window = f", window {results['window']}" if results["window"] else ""
    lines = [
        f"IoU on {results['images']} validation images, in percent; evaluation: {results['mode']}{window}",
        "",
        *((" " * first + head).rstrip() for head in heads),
        *(f"{name:<{first}}" + "".join(f"{cell:>{width}}" for cell in cells) for name, cells in rows),
        "",
        f"P: prediction. P~: the same logits propagated by {' and '.join(_affinities(results))}. mean: of the "
        "probabilities of both; predict --output prediction, propagated or blend writes them. -: a class in neither "
        "truth nor prediction, not in the mean over classes.",
    ]
    if "adjusted" in shown:
        lines.append("P adj.: by the class shares of P over all images, with --tau; P~ and the mean are then of these.")
    return "\n".join(lines) + "\n"


def _affinities(results: Mapping[str, Any]) -> list[str]:
    """What makes P~, in the words of the options; the same for several checkpoints is named once."""
    used = [checkpoint["propagation"] for checkpoint in results["checkpoints"]]
    names = (
        options["affinity"] + (f" across {options['across']}" if options["affinity"] in CLASSIFIERS else "")
        for options in used
    )
    return list(dict.fromkeys(names))


def _networks(results: Mapping[str, Any]) -> list[tuple[str, str, Mapping[str, Any]]]:
    """Checkpoint, name and scores of every network."""
    return [
        (checkpoint["name"], network, scores)
        for checkpoint in results["checkpoints"]
        for network, scores in checkpoint["networks"].items()
    ]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"
