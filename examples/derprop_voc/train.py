"""One DerProp run, Eq. 1-8: data in, a checkpoint, a panel and a JSON of results out."""

import math
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torchmetrics
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

import dlprop
from dlprop import MomentumAverager

from .augment import Augment, cutmix, cutmix_boxes
from .config import Config, ConfigError, make_config
from .data import Data, SeededBatches, SegmentationDataset, collate, load_data
from .evaluate import EVAL_MODE, evaluate, predict
from .files import write_checkpoint, write_json, write_yaml
from .losses import AdaptiveThreshold, Objective
from .model import Output, SegmentationNetwork
from .panels import draw_panel

LOG_EVERY = 10
Batch = dict[str, Any]


class DivergedError(RuntimeError):
    """The loss became NaN or infinite; the message names the step and the batch's images."""


@dataclass
class State:
    """All that changes while training: what a checkpoint holds."""

    network: SegmentationNetwork
    averager: MomentumAverager | None
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    threshold: AdaptiveThreshold
    step: int = 0
    history: list[dict[str, float]] = field(default_factory=list)

    def to_dict(self, config: Config, class_names: tuple[str, ...]) -> dict[str, Any]:
        """Tensors and plain values only, for `torch.load(weights_only=True)`."""
        return {
            "step": self.step,
            "network": self.network.state_dict(),
            "averager": self.averager.state_dict() if self.averager else None,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "threshold": self.threshold.state_dict(),
            "random": torch.get_rng_state(),
            "history": self.history,
            "config": config.to_dict(),
            "class_names": list(class_names),
        }


def run(config: Config, *, progress: bool = True) -> dict[str, Any]:
    """Trains, evaluates and writes `config.yaml`, `last.pt`, `panel.png` and `results.json` into `config.out`.

    torch's random state is put back afterwards; its number of threads is not. Progress bars show on terminals only.

    Returns:
        The content of `results.json`.
    """
    device = _device(config.device)
    if config.threads:
        torch.set_num_threads(config.threads)
    data = load_data(config)
    out = Path(config.out)
    write_yaml(out / "config.yaml", config.to_dict())
    objective = Objective(config).to(device)

    start = time.perf_counter()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(config.seed)
        state = make_state(config, len(data.class_names), device)
        fit(state, objective, data, config, progress=progress)
    trained_seconds = time.perf_counter() - start

    start = time.perf_counter()
    networks: dict[str, nn.Module] = {"trained": state.network}
    if state.averager:
        networks["averaged"] = state.averager.module
    val = SegmentationDataset(data.val, labeled=True, size=config.image_size, stored_mask=True)
    last = evaluate(networks, objective.propagate, val, data.class_names, progress=progress)
    seconds = {"train": round(trained_seconds, 2), "evaluate": round(time.perf_counter() - start, 2)}

    tested = list(networks)[-1]
    _write_panel(out / "panel.png", config, networks[tested], objective, val, data, last[tested])
    results = {
        "variant": config.variant,
        "seed": config.seed,
        "evaluation": {"mode": EVAL_MODE, "images": len(val)},
        "images": {"labeled": len(data.labeled), "unlabeled": len(data.unlabeled)},
        "classes": list(data.class_names),
        "last": {"trained": last["trained"], "averaged": last.get("averaged")},
        "history": state.history,
        "seconds": seconds,
        "parameters": sum(parameter.numel() for parameter in state.network.parameters()),
        "device": str(device),
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "torchmetrics": torchmetrics.__version__,
            "dlprop": dlprop.__version__,
        },
        "config": config.to_dict(),
    }
    write_json(out / "results.json", results)
    return results


def make_state(config: Config, num_classes: int, device: torch.device) -> State:
    """Network, momentum network, optimiser, schedule and threshold, at step 0."""
    network = SegmentationNetwork(config, num_classes).to(device)
    optimizer = torch.optim.SGD(
        network.parameter_groups(config.lr, config.head_lr_multiplier),
        lr=config.lr,
        momentum=config.sgd_momentum,
        weight_decay=config.weight_decay,
    )
    return State(
        network=network,
        averager=MomentumAverager(network, config.average_momentum) if config.averages else None,
        optimizer=optimizer,
        schedule=torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=config.steps, power=config.lr_power),
        threshold=AdaptiveThreshold(
            config.threshold, config.threshold_momentum if config.confidence == "adaptive" else 1.0
        ).to(device),
    )


def load_network(path: Path) -> tuple[nn.Module, list[str]]:
    """The network that a checkpoint's run is tested with, on the CPU in evaluation mode, and the class names.

    That is the momentum network where the run kept one.
    """
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    config = make_config(checkpoint["config"])
    network = SegmentationNetwork(config, len(checkpoint["class_names"]))
    network.load_state_dict(checkpoint["network"])
    if checkpoint["averager"] is None:
        return network.eval(), checkpoint["class_names"]
    averager = MomentumAverager(network, config.average_momentum)
    averager.load_state_dict(checkpoint["averager"])
    return averager.module.eval(), checkpoint["class_names"]


def fit(state: State, objective: Objective, data: Data, config: Config, *, progress: bool = True) -> None:
    """Trains from `state.step` to `config.steps`; an epoch is one pass over the longer list.

    Raises:
        DivergedError: when the loss is not finite; the last epoch's checkpoint stays.
    """
    device = state.threshold.value.device
    steps_per_epoch = max(
        math.ceil(len(data.labeled) / config.labeled_batch), math.ceil(len(data.unlabeled) / config.unlabeled_batch)
    )
    labeled = _batches(data.labeled, config, state.step, labeled=True)
    unlabeled = _batches(data.unlabeled, config, state.step, labeled=False) if data.unlabeled else None
    state.network.train()
    with tqdm(total=config.steps, initial=state.step, desc=config.variant, disable=None if progress else True) as bar:
        while state.step < config.steps:
            batch_l = _to(next(labeled), device)
            batch_u = _to(next(unlabeled), device) if unlabeled else None
            terms, facts = _terms(state, objective, batch_l, batch_u, config)
            loss = objective.total(terms, progress=state.step / config.steps)
            value = loss.item()
            if not math.isfinite(value):
                names = ", ".join(batch_l["name"] + (batch_u["name"] if batch_u else []))
                raise DivergedError(f"loss is {value} at step {state.step}, on images {names}; try a lower lr")
            state.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            state.optimizer.step()
            state.schedule.step()
            state.step += 1

            epoch_ends = state.step % steps_per_epoch == 0 or state.step == config.steps
            if state.averager and (epoch_ends or config.average_every == "step"):
                state.averager.update(state.network)
            if state.step % LOG_EVERY == 0 or state.step == config.steps:
                numbers = {"loss": value} | {name: term.item() for name, term in (terms | facts).items()}
                state.history.append({"step": state.step} | numbers)
                bar.set_postfix({"loss": f"{value:.3f}"} | {k: f"{v.item():.2f}" for k, v in facts.items()})
            bar.update()
            if epoch_ends:
                write_checkpoint(Path(config.out) / "last.pt", state.to_dict(config, data.class_names))


def _terms(
    state: State, objective: Objective, batch_l: Batch, batch_u: Batch | None, config: Config
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Terms of Eq. 7 for one step, and facts for the log."""
    network = state.network
    if batch_u is None:
        return objective.labeled(network(batch_l["image"]), batch_l["mask"], batch_l["valid"]), {}

    # Pseudo-labels come from the back-propagated network, with the batch's own statistics: from scratch the running
    # ones lag behind.
    with torch.no_grad():
        weak: Output = network(batch_u["weak"])
    valid = batch_u["valid"]
    pseudo = objective.pseudo_labels(weak, valid, ramp=state.step / max(1, config.steps - 1))
    state.threshold.update(pseudo, valid)
    confident = pseudo.amax(1) >= state.threshold.value

    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + state.step)
    grid = [edge // 8 for edge in valid.shape[-2:]]
    boxes = cutmix_boxes(len(valid), grid, probability=config.cutmix_probability, generator=generator).to(valid.device)
    strong, pseudo, weak_feats = (cutmix(x, boxes) for x in (batch_u["strong"], pseudo, weak.feats))
    confident, valid = (cutmix(x[:, None], boxes)[:, 0] for x in (confident, valid))

    # One pass, so that batch statistics see both halves.
    both: Output = network(torch.cat([batch_l["image"], strong]))
    count = len(batch_l["image"])
    half_l, half_u = (Output(both.logits[part], both.feats[part]) for part in (slice(count), slice(count, None)))
    terms = objective.labeled(half_l, batch_l["mask"], batch_l["valid"])
    terms |= objective.unlabeled(half_u, pseudo, confident, weak_feats, valid)
    kept = (confident & valid).sum() / valid.sum().clamp(min=1)
    return terms, {"threshold": state.threshold.value.clone(), "kept": kept}


def _batches(items: list[Any], config: Config, start: int, *, labeled: bool) -> Iterator[Batch]:
    """Augmented batches from step `start` on; each depends on the seed and its step only."""
    dataset = SegmentationDataset(
        items,
        labeled=labeled,
        size=config.image_size,
        transform=Augment(config, strong=not labeled),
        cache=config.cache_images,
    )
    batches = SeededBatches(
        len(items),
        batch_size=config.labeled_batch if labeled else config.unlabeled_batch,
        steps=config.steps,
        seed=2 * config.seed + labeled,
        start=start,
    )
    loader = DataLoader(dataset, batch_sampler=batches, num_workers=config.workers, collate_fn=collate)
    return iter(loader)


def _to(batch: Batch, device: torch.device) -> Batch:
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device: {name!r} cannot be used here: {str(error).splitlines()[0]}") from None
    return device


def _write_panel(
    path: Path,
    config: Config,
    network: nn.Module,
    objective: Objective,
    val: SegmentationDataset,
    data: Data,
    scores: dict[str, Any],
) -> None:
    rows = panel_rows(network, objective, val, config.panel_images)
    notes = {
        "without propagation": f"P, mIoU {100 * scores['prediction']['miou']:.1f}",
        "with propagation": f"P~, mIoU {100 * scores['propagated']['miou']:.1f}",
    }
    form = config.affinity if config.affinity == "softmax" else f"linear, {config.scale}"
    detached = ", logits detached" if config.detach_logits and config.propagates else ""
    title = f"{config.variant} (affinity: {form}{detached}), seed {config.seed}"
    draw_panel(path, rows, data.class_names, title=title, notes=notes)


def panel_rows(network: nn.Module, objective: Objective, val: SegmentationDataset, count: int) -> list[dict[str, Any]]:
    """Image, both predictions and truth for `count` validation images, spread evenly over the list."""
    count = min(count, len(val))
    rows = []
    for index in (round((place + 0.5) * len(val) / count - 0.5) for place in range(count)):
        sample = val[index]
        size = sample["mask"].shape[-2:]
        labels = predict(network, objective.propagate, sample["image"], size)
        shown = F.interpolate(sample["image"][None].float(), size, mode="bilinear", align_corners=True)[0]
        rows.append(
            {
                "image": shown.round().byte().permute(1, 2, 0).numpy(),
                "without propagation": labels["prediction"].byte().cpu().numpy(),
                "with propagation": labels["propagated"].byte().cpu().numpy(),
                "truth": sample["mask"].numpy(),
            }
        )
    return rows
