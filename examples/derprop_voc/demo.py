"""`demo`: generated scenes, four trainings, one table and one picture. Nothing is downloaded."""

import argparse
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .choice import load_finished
from .config import Config, make_config, read_yaml
from .data import SegmentationDataset, load_data
from .files import write_bytes, write_json
from .losses import make_propagation
from .panels import draw_panel, prediction_rows
from .scenes import write_scenes
from .train import run

CONFIGS = Path(__file__).parent / "configs"
SCENES = {"labeled": 16, "unlabeled": 96, "val": 40}
# Name -> (line of the table, options beyond configs/demo.yaml).
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "supervised": ("supervised only", {"variant": "supervised"}),
    "no_propagation": ("without propagation", {"variant": "no_propagation"}),
    "full_paper": ("full, Eq. 4 as written", {"variant": "full"}),
    "full_softmax": ("full, softmax, detached", {"variant": "full"} | read_yaml(CONFIGS / "softmax.yaml")),
}


def add_demo_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `demo`."""
    steps = read_yaml(CONFIGS / "demo.yaml")["steps"]
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for data, runs and table")
    parser.add_argument("--seed", type=int, default=0, help="seed of the scenes and of every training")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's choice")
    parser.add_argument("--steps", type=int, default=steps, help="optimiser steps of each run (%(default)s)")


def demo_configs(out: Path, *, seed: int, threads: int, steps: int) -> dict[str, Config]:
    """One config for each run of the demo."""
    shared = read_yaml(CONFIGS / "demo.yaml") | {"data": str(out / "data"), "seed": seed, "threads": threads}
    shared["steps"] = steps
    return {name: make_config(shared | options | {"out": str(out / name)}) for name, (_, options) in RUNS.items()}


def demo(arguments: argparse.Namespace) -> None:
    """Writes scenes, trains every run on them, prints the table and draws the comparison."""
    start = time.perf_counter()
    out: Path = arguments.out
    configs = demo_configs(out, seed=arguments.seed, threads=arguments.threads, steps=arguments.steps)
    write_scenes(
        out / "data", labeled=SCENES["labeled"], unlabeled=SCENES["unlabeled"], val=SCENES["val"], seed=arguments.seed
    )
    print(f"Scenes in {out}/data: {', '.join(f'{count} {split}' for split, count in SCENES.items())}.", flush=True)
    results = {}
    for name, config in configs.items():
        results[name] = run(config, overwrite=True)
        print(f"{len(results)} of {len(configs)} done: {RUNS[name][0]}", flush=True)
    text = table(results)
    draw_comparison(out / "comparison.png", configs, results)
    write_bytes(out / "table.txt", text.encode())
    seconds = round(time.perf_counter() - start, 1)
    summary = {"seed": arguments.seed, "scenes": SCENES, "seconds": seconds, "runs": results}
    write_json(out / "results.json", summary)
    print(f"\n{text}\n{seconds:.0f} s in all. Wrote {out}/comparison.png, {out}/table.txt, {out}/results.json, and")
    print("panel.png, curves.png, log.jsonl, results.json, config.yaml and latest.pt of each run in")
    print("".join(f"  {config.out}\n" for config in configs.values()), end="")


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The scores of every run as fixed-width text."""
    lines = [
        "mIoU on the validation scenes, in percent    trained network    momentum network    training",
        "                                                P       P~         P       P~        seconds",
    ]
    for name, (label, _) in RUNS.items():
        last = results[name]["last"]
        cells = [
            f"{100 * last[network][key]['miou']:.1f}" if last[network] else "-"
            for network in ("trained", "averaged")
            for key in ("prediction", "propagated")
        ]
        seconds = results[name]["seconds"]["train"]
        lines.append(f"{label:<42}{cells[0]:>9}{cells[1]:>9}{cells[2]:>10}{cells[3]:>9}{seconds:>15.0f}")
    lines += [
        "",
        "P: prediction without propagation. P~: the same logits propagated, Eq. 4 or its softmax form.",
        "In the first two rows nothing trains the features, so their P~ only shows what propagation does unprepared.",
        "One seed, small scenes, short training from scratch: differences of a few points are noise.",
    ]
    return "\n".join(lines) + "\n"


def draw_comparison(path: Path, configs: Mapping[str, Config], results: Mapping[str, Mapping[str, Any]]) -> None:
    """One picture: a few validation scenes, what the tested network of each run predicts, and the truth."""
    rows: list[dict[str, Any]] = []
    notes: dict[str, str] = {}
    for name, config in configs.items():
        label = RUNS[name][0]
        (finished,) = load_finished([Path(config.out) / "latest.pt"], torch.device("cpu"))
        val = SegmentationDataset(load_data(config).val, labeled=True, stored_mask=True)
        predicted = prediction_rows(finished.network("tested"), make_propagation(config), val, config.panel_images)
        rows = rows or [{"image": row["image"], "truth": row["truth"]} for row in predicted]
        for target, row in zip(rows, predicted, strict=True):
            target[label] = row["without propagation"]
        scores = results[name]["last"]["averaged"] or results[name]["last"]["trained"]
        notes[label] = f"P, mIoU {100 * scores['prediction']['miou']:.1f}"
    for row in rows:
        row["truth"] = row.pop("truth")  # the last column
    title = f"Generated scenes, {SCENES['labeled']} labelled and {SCENES['unlabeled']} unlabelled"
    draw_panel(path, rows, finished.class_names, title=title, notes=notes)
