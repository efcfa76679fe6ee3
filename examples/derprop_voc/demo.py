"""`demo`: generated scenes, four trainings, a few clicks, one table and one picture. Nothing is downloaded."""

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .augment import to_input
from .choice import Finished, add_threads_argument, load_finished
from .clicks import draw_labels
from .complete import Completion, dense_labels
from .config import Config, make_config, read_yaml
from .data import VOID, SegmentationDataset, load_data
from .errors import ConfigError
from .evaluate import make_metric
from .files import versions, write_bytes, write_json
from .panels import class_colours, draw_panel
from .scenes import write_scenes
from .train import run

CONFIGS = Path(__file__).parent / "configs"
SCENES = {"labeled": 16, "unlabeled": 96, "val": 40}
CLICKS = 5  # a class, on every validation scene
DRAWN, PICTURES = "no_propagation", 4  # the run and how many scenes clicks.png shows
RIDGE = {"affinity": "ridge", "propagation_features": "decoder"}
# Name -> (line of the table, options beyond configs/demo.yaml).
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "supervised": ("labelled scenes only", {"variant": "supervised"} | RIDGE),
    "no_propagation": ("pseudo-labels from P", {"variant": "no_propagation"} | RIDGE),
    "rectified": (
        "pseudo-labels from P and P~, ridge", {"variant": "no_derivative_loss", "weight_propagated": 0.0} | RIDGE
    ),
    "full_paper": ("the paper's, Eq. 4", {"variant": "full"}),
}  # fmt: skip

Scores = dict[str, dict[str, float]]


def add_demo_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `demo`."""
    steps = read_yaml(CONFIGS / "demo.yaml")["steps"]
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for data, runs and table")
    parser.add_argument(
        "--seed",
        type=int,
        nargs="+",
        default=[0],
        help="of the scenes and of every training; several: one after the other",
    )
    add_threads_argument(parser)
    parser.add_argument("--steps", type=int, default=steps, help="optimiser steps of each run (%(default)s)")


def demo_configs(out: Path, *, seed: int, threads: int, steps: int) -> dict[str, Config]:
    """One config for each run of the demo."""
    shared = read_yaml(CONFIGS / "demo.yaml") | {"data": str(out / "data"), "seed": seed, "threads": threads}
    shared["steps"] = steps
    return {name: make_config(shared | options | {"out": str(out / name)}) for name, (_, options) in RUNS.items()}


def demo_command(arguments: argparse.Namespace) -> None:
    """Writes scenes, trains every run on them, clicks on the validation scenes, prints the table and draws."""
    if arguments.steps < 1:
        raise ConfigError(f"steps: expected at least 1, got {arguments.steps}")
    start = time.perf_counter()
    out: Path = arguments.out
    scores: dict[int, Scores] = {}
    for seed in dict.fromkeys(arguments.seed):
        folder = out if len(arguments.seed) == 1 else out / f"seed_{seed}"
        scores[seed] = measure(folder, seed=seed, threads=arguments.threads, steps=arguments.steps)
    text = table(list(scores.values()))
    write_bytes(out / "table.txt", text.encode())
    seconds = round(time.perf_counter() - start, 1)
    write_json(
        out / "results.json",
        {"scenes": SCENES, "clicks": CLICKS, "seconds": seconds, "scores": scores, "versions": versions()},
    )
    print(f"\n{text}\n{seconds:.0f} s in all. Wrote {folder}/clicks.png, {out}/table.txt, {out}/results.json, and")
    print("panel.png, curves.png, log.jsonl, results.json, config.yaml and latest.pt of each run in")
    print("".join(f"  {folder / name}\n" for name in RUNS), end="")


def measure(out: Path, *, seed: int, threads: int, steps: int) -> Scores:
    """Scenes, runs and the picture of one seed, and for every run P, P~ and P with clicks, and seconds of training."""
    configs = demo_configs(out, seed=seed, threads=threads, steps=steps)
    for config in configs.values():  # its own runs are made again, others are not
        own = Path(config.out) / "config.yaml"
        if own.exists() and read_yaml(own).get("data") != config.data:
            raise ConfigError(f"out: {config.out} holds a run of something else; choose another folder")
    write_scenes(out / "data", labeled=SCENES["labeled"], unlabeled=SCENES["unlabeled"], val=SCENES["val"], seed=seed)
    print(f"Scenes in {out}/data: {', '.join(f'{count} {split}' for split, count in SCENES.items())}.", flush=True)
    scores: Scores = {}
    for name, config in configs.items():
        results = run(config, overwrite=True)
        (finished,) = load_finished([Path(config.out) / "latest.pt"], torch.device("cpu"))
        mious, rows = with_clicks(finished, seed=seed)
        tested = results["last"]["averaged"] or results["last"]["trained"]
        scores[name] = {
            "P": mious["P"],
            "P~": tested["propagated"]["miou"],
            "corrected": mious["corrected"],
            "seconds": results["seconds"]["train"],
        }
        if name == DRAWN:
            notes = {title: f"mIoU {100 * mious[title]:.1f}" for title in mious}
            draw_panel(
                out / "clicks.png", rows, finished.class_names, title=f"Held-out scenes: {RUNS[name][0]}", notes=notes
            )
        print(f"{len(scores)} of {len(configs)} done: {RUNS[name][0]}", flush=True)
    return scores


@torch.no_grad()
def with_clicks(finished: Finished, *, seed: int) -> tuple[dict[str, float], list[dict[str, np.ndarray]]]:
    """The mIoU of the tested network's P and of P corrected at random clicks, and the panel's rows.

    The clicks themselves count as right answers, as they would in use: they are at most one pixel in 400.
    """
    network = finished.network("tested")
    val = SegmentationDataset(load_data(finished.config).val, labeled=True, stored_mask=True)
    metrics = {title: make_metric(len(finished.class_names)) for title in ("P", "corrected")}
    shown = {round((k + 0.5) * len(val) / PICTURES - 0.5) for k in range(PICTURES)}
    colours = np.round(255 * class_colours(finished.class_names)).astype(np.uint8)
    rows = []
    for index in range(len(val)):
        image, truth = val[index]["image"].as_subclass(Tensor), val[index]["mask"].as_subclass(Tensor)
        clicks = draw_labels(truth, str(CLICKS), np.random.default_rng((seed, index)))
        output = network(to_input(image)[None])
        completed = Completion()(output.feats, clicks, output.logits)
        maps = {"P": output.logits[0].max(0).indices, "corrected": dense_labels(completed, clicks)}
        for title, labels in maps.items():
            metrics[title].update(labels[None], truth[None].long())
        if index in shown:
            pictures = {title: labels.numpy().astype(np.uint8) for title, labels in maps.items()}
            image = image.permute(1, 2, 0).numpy()
            rows.append(
                {"image": image, "clicks": dots(image, clicks.numpy(), colours)} | pictures | {"truth": truth.numpy()}
            )
    return {title: metric.compute()["miou"].item() for title, metric in metrics.items()}, rows


def dots(image: np.ndarray, labels: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """The image (H, W, 3), pale, with a dot of its class's colour (C, 3) on every labelled pixel of (H, W)."""
    drawn = 255 - (255 - image) // 3
    for y, x in np.argwhere(labels != VOID):
        for radius, colour in ((2, (255, 255, 255)), (1, colours[labels[y, x]])):
            drawn[max(0, y - radius) : y + radius + 1, max(0, x - radius) : x + radius + 1] = colour
    return drawn


def table(scores: Sequence[Scores]) -> str:
    """The scores of every run as fixed-width text: of one seed, or mean and standard deviation of several."""
    lines = [
        "mIoU on the validation scenes, in percent                             with 5 clicks    seconds of",
        "                                                   P          P~          a class      training",
    ]
    for name, (label, _) in RUNS.items():
        cells = []
        for key in ("P", "P~", "corrected"):
            values = [100 * of_seed[name][key] for of_seed in scores]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}")
        seconds = statistics.mean(of_seed[name]["seconds"] for of_seed in scores)
        lines.append(f"{label:<40}{cells[0]:>12}{cells[1]:>12}{cells[2]:>17}{seconds:>14.0f}")
    seeds = "One seed" if len(scores) == 1 else f"{len(scores)} seeds, mean and standard deviation"
    lines += [
        "",
        f"P: the prediction. P~: P propagated. With {CLICKS} clicks a class on every validation scene: P corrected",
        "where pixels look like those that it gets wrong at the clicks (three steps of attention over the sources).",
        f"{seeds}; small scenes, short training from scratch: two points between rows of one seed are noise.",
    ]
    return "\n".join(lines) + "\n"
