"""One DerProp run: data in; checkpoints, a log, pictures and a JSON of results out."""

import argparse
import math
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric

from .cache import CachedFeatures, cache_place, feature_maps, fill_cache, read_cache
from .config import Config, add_config_arguments, config_from_arguments
from .data import Data, check_image, load_data, shape_warning
from .distributed import make_fabric, rank, world_size
from .errors import ConfigError
from .files import held, versions, write_json, write_yaml
from .frozen import FrozenNetwork
from .log import draw_curves
from .model import UNTRAINED
from .rectification import method
from .state import check_resumable, make_state, read_checkpoint, restore
from .trainer import Length, Trainer


def run(config: Config, *, resume: bool = False, overwrite: bool = False, progress: bool = True) -> dict[str, Any]:
    """Trains, evaluates and writes the run folder `config.out`.

    torch's random state is put back afterwards; its number of threads is not. Progress bars show on terminals only.

    Args:
        config: the options.
        resume: go on from `latest.pt` of the run folder; start at step 0 if there is none.
        overwrite: start at step 0 in a folder that holds a run.
        progress: show progress bars.

    Returns:
        The content of `results.json`.
    """
    out = Path(config.out)
    if (out / "latest.pt").exists() and not resume and not overwrite:
        raise ConfigError(f"out: {out} holds a run already; go on with it (--resume) or choose another folder")
    data = load_data(config)
    fabric = make_fabric(config)
    devices = [fabric.device] if fabric.device.type == "cuda" else []
    with held(out) if fabric.is_global_zero else nullcontext(), torch.random.fork_rng(devices=devices):
        if overwrite or not (out / "latest.pt").exists():  # what chose best.pt is gone with it
            for name in ("latest.pt", "best.pt"):
                (out / name).unlink(missing_ok=True)
        return _run(fabric, config, data, resume=resume, progress=progress and fabric.is_global_zero)


def _run(fabric: Fabric, config: Config, data: Data, *, resume: bool, progress: bool) -> dict[str, Any]:
    out = Path(config.out)
    steps_per_epoch = max(
        math.ceil(len(data.labeled) / config.labeled_batch), math.ceil(len(data.unlabeled) / config.unlabeled_batch)
    )
    length = Length(steps_per_epoch, config.steps or config.epochs * steps_per_epoch)
    latest = out / "latest.pt"
    checkpoint = read_checkpoint(latest) if resume and latest.exists() else None
    if resume and not checkpoint and not rank():
        print(f"note: no {latest} to go on from, so the run begins")
    if checkpoint:
        check_resumable(latest, checkpoint, config, data)

    torch.manual_seed(config.seed)
    state = make_state(config, len(data.class_names), fabric.device, length.run, initialise=checkpoint is None)
    if checkpoint:
        restore(fabric, state, checkpoint, latest)
    elif rank():
        torch.manual_seed(config.seed + 1_000_003 * rank())  # dropout differs between processes
    if fabric.is_global_zero:
        write_yaml(out / "config.yaml", config.to_dict())
        images = {"labeled": config.labeled_batch, "unlabeled": config.unlabeled_batch if data.unlabeled else 0}
        each = ", ".join(f"{count} {name} ({count // world_size()} a process)" for name, count in images.items())
        print(
            f"{config.variant}: step {state.step} of {length.run}, {length.epoch} an epoch; "
            f"global batch {each}; {world_size()} process(es) on {fabric.device.type}\n{method(config)}",
            flush=True,
        )
        if config.image_size:
            print(shape_warning([check_image(x.image) for x in data.labeled], config.image_size), end="", flush=True)
        if config.weights in UNTRAINED and not checkpoint:
            kept = "and stays so: only the head is trained" if config.freeze_backbone else "and is trained from scratch"
            print(f"note: weights: {config.weights}, so the backbone starts from random numbers, {kept}", flush=True)

    features = None
    if isinstance(state.network, FrozenNetwork):
        features = _frozen_features(fabric, config, data, state.network, estimate=not checkpoint, progress=progress)
    trainer = Trainer(fabric, config, data, state, length, features=features, progress=progress)
    start = time.perf_counter()
    trainer.fit()
    trained = time.perf_counter() - start
    start = time.perf_counter()
    last = trainer.evaluate()
    seconds = {"train": round(trained, 2), "evaluate": round(time.perf_counter() - start, 2)}
    results = {
        "variant": config.variant,
        "seed": config.seed,
        "evaluation": {"mode": config.evaluation, "images": len(data.val)},
        "images": {"labeled": len(data.labeled), "unlabeled": len(data.unlabeled)},
        "classes": list(data.class_names),
        "steps": {"run": state.step, "epoch": length.epoch},
        "last": {"trained": last["trained"], "averaged": last.get("averaged")},
        "best": state.best,
        "history": state.history,
        "seconds": seconds,
        "parameters": sum(parameter.numel() for parameter in state.network.parameters()),
        "device": str(fabric.device),
        "processes": world_size(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "lists": data.digest,
        "config": config.to_dict(),
    }
    if fabric.is_global_zero:
        draw_curves(out / "curves.png", state.history)
        trainer.draw_panel(out / "panel.png", last)
        trainer.draw_similarity(out / "similarity.png")
        write_json(out / "results.json", results)
    fabric.barrier()
    return results


def _frozen_features(
    fabric: Fabric, config: Config, data: Data, network: FrozenNetwork, *, estimate: bool, progress: bool
) -> CachedFeatures | None:
    """The cache, filled, of all images of the run; `estimate` takes the channels' moments from the training images."""
    training, cached = [*data.labeled, *data.unlabeled], None
    if config.cache_features:
        items = [*training, *data.val]
        place = cache_place(config, items, network)
        if fabric.is_global_zero:
            fill_cache(place, config, items, network, progress=progress)
        fabric.barrier()
        cached = read_cache(place)
    if estimate:
        if cached is None:
            network.standardise_to(feature_maps(config, training, network, progress=progress))
        else:
            network.standardise_to(cached[item.image] for item in training)
    return cached


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `train`."""
    add_config_arguments(parser)
    parser.add_argument("--resume", action="store_true", help="go on from latest.pt of the run folder, if there is one")


def train_command(arguments: argparse.Namespace) -> None:
    """Trains one variant and prints its scores."""
    results = run(config_from_arguments(arguments), resume=arguments.resume)
    if rank():
        return
    for network, scores in results["last"].items():
        if scores:
            p, propagated = (100 * scores[key]["miou"] for key in ("prediction", "propagated"))
            print(f"{network:9} network: mIoU of P {p:.2f}, of P~ {propagated:.2f}")
    config, steps = results["config"], results["steps"]
    if results["last"]["averaged"] and config["average_every"] == "epoch" and steps["run"] <= steps["epoch"]:
        print("The averaged network is the trained one: Eq. 6 acts once an epoch, and this run has one (average_every)")
    out = config["out"]
    print(f"{results['seconds']['train']:.0f} s of training; results, pictures and checkpoints are in {out}")
