"""The loop of a run around Eq. 1-8: steps, and what is logged, scored, drawn and saved at the end of an epoch."""

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch.utils.data import DataLoader

from .augment import Augment, AugmentFeatures, cutmix, cutmix_boxes
from .cache import CachedFeatures
from .config import Config
from .data import VOID, Data, SeededBatches, SegmentationDataset, collate, read_image
from .distributed import gathered, global_mean, highest, share, total, world_size
from .errors import DivergedError
from .evaluate import evaluate
from .files import write_checkpoint
from .log import Log
from .losses import Objective
from .model import Output
from .panels import draw_panel, prediction_rows
from .progress import make_bar
from .quality import PseudoLabelQuality
from .similarity_maps import draw_similarity_maps
from .state import State

LOG_EVERY = 10
QUALITY_EVERY = 5  # steps; to score every step would take a quarter of a run on frozen features
Batch = dict[str, Any]


@dataclass(frozen=True)
class Length:
    """Steps of an epoch, one pass over the longer list, and of the whole run."""

    epoch: int
    run: int


class Trainer:
    """The loop around Eq. 1-8: `fit` goes on from wherever the state stands."""

    def __init__(
        self,
        fabric: Fabric,
        config: Config,
        data: Data,
        state: State,
        length: Length,
        *,
        features: CachedFeatures | None = None,
        progress: bool,
    ) -> None:
        self.fabric, self.config, self.data, self.state, self.length = fabric, config, data, state, length
        self.features, self.progress = features, progress
        self.out = Path(config.out)
        self.objective = Objective(config, state.running.propagate).to(fabric.device)
        if world_size() > 1 and config.batch_norm == "train":
            # timm's, because torch's would drop the activations that timm's layers hold.
            state.network = convert_sync_batchnorm(state.network)
        self.network, self.optimizer = fabric.setup(state.network, state.optimizer)
        self.val = SegmentationDataset(data.val, labeled=True, size=config.image_size, stored_mask=True)
        self.log = Log(self.out, state.history, tensorboard=config.tensorboard, enabled=fabric.is_global_zero)
        self.quality = (
            PseudoLabelQuality(self.objective.propagate, len(data.class_names), fabric.device)
            if config.measure_pseudo_labels
            else None
        )

    def fit(self) -> None:
        """Trains to the end of the run.

        Raises:
            DivergedError: when the loss is not finite; the last epoch's checkpoint stays.
        """
        config, state, length = self.config, self.state, self.length
        labeled = self._batches(self.data.labeled, labeled=True)
        unlabeled = self._batches(self.data.unlabeled, labeled=False) if self.data.unlabeled else None
        state.network.train()
        with make_bar(length.run, config.variant, initial=state.step, progress=self.progress, leave=True) as bar:
            while state.step < length.run:
                batch_l, batch_u = self._to(next(labeled)), self._to(next(unlabeled)) if unlabeled else None
                terms, facts = self._terms(batch_l, batch_u)
                loss = self.objective.total(terms, progress=state.step / length.run)
                self._check_finite(loss, batch_l, batch_u)
                self.optimizer.zero_grad(set_to_none=True)
                self.fabric.backward(loss)
                self.optimizer.step()
                lr = state.schedule.get_last_lr()[0]
                with warnings.catch_warnings():
                    # The gradient scaler of 16-mixed skips steps that overflow; the schedule counts them all the same.
                    warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
                    state.schedule.step()
                state.step += 1
                epoch_ends = state.step % length.epoch == 0 or state.step == length.run
                if state.averager and (epoch_ends or config.average_every == "step"):
                    state.averager.update(state.network)
                if state.step % LOG_EVERY == 0 or epoch_ends:
                    numbers = {name: total(term).item() / world_size() for name, term in (terms | facts).items()}
                    numbers |= {"loss": total(loss).item() / world_size(), "lr": lr}
                    self.log.add(state.step, self._epoch(), "train", numbers)
                    bar.set_postfix(
                        {"loss": f"{numbers['loss']:.3f}"} | {k: f"{numbers[k]:.2f}" for k in facts}, refresh=False
                    )
                bar.update()
                if epoch_ends:
                    self._end_epoch()
        self.log.close()

    def evaluate(self) -> dict[str, dict[str, Any]]:
        """Scores of the networks as they stand."""
        networks: dict[str, nn.Module] = {"trained": self.state.network}
        if self.state.averager:
            networks["averaged"] = self.state.averager.module
        scores = evaluate(
            networks,
            self.objective.propagate,
            self._scored(),
            self.data.class_names,
            mode=self.config.evaluation,
            window=self.config.crop_size,
            progress=self.progress,
        )
        self.state.network.train()
        return scores

    def _scored(self) -> SegmentationDataset:
        """Validation samples: images, or their cached features where these are worked on as a whole."""
        if self.features is None or self.config.evaluation != "original":
            return self.val
        return SegmentationDataset(
            self.data.val, labeled=True, size=self.features.size, stored_mask=True, features=self.features
        )

    def draw_panel(self, path: Path, scores: dict[str, dict[str, Any]] | None = None) -> None:
        """Writes validation images with what the tested network makes of them, and its scores if given."""
        tested = list(scores.values())[-1] if scores else {}
        notes = {
            "without propagation": f"P, mIoU {100 * tested['prediction']['miou']:.1f}" if tested else "P",
            "with propagation": f"P~, mIoU {100 * tested['propagated']['miou']:.1f}" if tested else "P~",
        }
        config = self.config
        form = f"linear, {config.scale}" if config.affinity == "linear" else config.affinity
        detached = ", logits detached" if config.detach_logits and config.propagates else ""
        title = f"{config.variant} (affinity: {form}{detached}), seed {config.seed}, step {self.state.step}"
        rows = prediction_rows(self._tested(), self.objective.propagate, self.val, config.panel_images)
        draw_panel(path, rows, self.data.class_names, title=title, notes=notes)
        self.state.network.train()

    def draw_similarity(self, path: Path) -> None:
        """Writes the similarity maps of the middle pixel of the first validation image."""
        item = self.data.val[0]
        title = f"{item.name}, {self.config.variant}, step {self.state.step}"
        image = read_image(item.image).as_subclass(Tensor)
        draw_similarity_maps(
            path, self._tested(), self.objective, image, class_names=self.data.class_names, title=title
        )
        self.state.network.train()

    def _tested(self) -> nn.Module:
        return self.state.averager.module if self.state.averager else self.state.network.eval()

    def _end_epoch(self) -> None:
        """Log, validation and checkpoints; nothing here draws random numbers."""
        config, state, epoch = self.config, self.state, self._epoch()
        if self.quality:
            for kind, numbers in self.quality.compute().items():
                self.log.add(state.step, epoch, kind, numbers)
        is_best = False
        if config.evaluate_every and (epoch % config.evaluate_every == 0 or state.step == self.length.run):
            scores = self.evaluate()
            numbers = {
                f"{network}_{name}": values["miou"] for network, both in scores.items() for name, values in both.items()
            }
            self.log.add(state.step, epoch, "val", numbers)
            miou = list(scores.values())[-1]["prediction"]["miou"]
            is_best = state.best is None or miou > state.best["miou"]
            if is_best:
                state.best = {"step": state.step, "epoch": epoch, "miou": miou, "scores": scores}
        if config.panel_every and epoch % config.panel_every == 0 and self.fabric.is_global_zero:
            self.draw_panel(self.out / "panels" / f"epoch_{epoch:04d}.png")
        precision = self.fabric.strategy.precision.state_dict()
        values = state.to_dict(config, self.data, epoch=epoch, precision=precision)
        if self.fabric.is_global_zero:
            if is_best:
                write_checkpoint(self.out / "best.pt", values)
            write_checkpoint(self.out / "latest.pt", values)

    def _terms(self, batch_l: Batch, batch_u: Batch | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Terms of Eq. 7 for one step, and facts for the log."""
        config, state, objective = self.config, self.state, self.objective
        quality = self.quality if state.step % QUALITY_EVERY == 0 else None
        if batch_u is None:
            output = self.network(batch_l["image"])
            if quality:
                quality.labeled(output, batch_l["mask"], batch_l["valid"])
            return objective.labeled(output, batch_l["mask"], batch_l["valid"]), {}

        # Pseudo-labels come from the back-propagated network.
        state.network.train(config.weak_mode == "train")
        with torch.no_grad():
            weak: Output = self.network(batch_u["weak"])
        state.network.train()
        valid = batch_u["valid"]
        ramp = state.step / max(1, self.length.run - 1)
        state.running.follow(weak, valid, batch_l["mask"].masked_fill(~batch_l["valid"], VOID), ramp)
        pseudo = state.running.pseudo_labels(weak, valid, ramp)
        state.threshold.update(pseudo, valid)
        confident = pseudo.amax(1) >= state.threshold.value
        if quality and "mask" in batch_u:
            quality.unlabeled(weak, pseudo, state.threshold.value, batch_u["mask"], valid)

        boxes = self._boxes(batch_u["weak"]).to(valid.device)
        strong, pseudo, weak_feats = (cutmix(x, boxes) for x in (batch_u["strong"], pseudo, weak.feats))
        confident, valid = (cutmix(x[:, None], boxes)[:, 0] for x in (confident, valid))

        # One pass, so that batch statistics see both halves.
        both: Output = self.network(torch.cat([batch_l["image"], strong]))
        halves = (len(batch_l["image"]), len(strong))
        half_l, half_u = map(Output, both.logits.split(halves), both.feats.split(halves))
        if quality:
            quality.labeled(half_l, batch_l["mask"], batch_l["valid"])
        terms = objective.labeled(half_l, batch_l["mask"], batch_l["valid"])
        terms |= objective.unlabeled(half_u, pseudo, confident, weak_feats, valid)
        kept = global_mean((confident & valid).sum(), valid.sum())
        return terms, {"threshold": state.threshold.value.clone(), "kept": kept}

    def _boxes(self, weak: Tensor) -> Tensor:
        """This process's part of the global batch's CutMix boxes, which depend on seed and step only."""
        grid = (self.config.crop_grid, self.config.crop_grid) if self.features is None else weak.shape[-2:]
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + self.state.step)
        boxes = cutmix_boxes(
            self.config.unlabeled_batch,
            grid,
            probability=self.config.cutmix_probability,
            generator=generator,
        )
        return boxes[share(self.config.unlabeled_batch)]

    def _check_finite(self, loss: Tensor, batch_l: Batch, batch_u: Batch | None) -> None:
        """Stops every process when one process's loss is not finite, before it reaches the weights."""
        if highest((~loss.isfinite()).float()).item() == 0:
            return
        names = ", ".join(batch_l["name"] + (batch_u["name"] if batch_u else []))
        bad = [(value, of) for value, of in gathered((loss.item(), names)) if not math.isfinite(value)]
        raise DivergedError(
            f"loss is {bad[0][0]} at step {self.state.step}, on images {'; '.join(of for _, of in bad)}; "
            "try a lower lr, or --precision 32-true"
        )

    def _epoch(self) -> int:
        return math.ceil(self.state.step / self.length.epoch)

    def _batches(self, items: list[Any], *, labeled: bool) -> Iterator[Batch]:
        """Augmented batches from the state's step on; each depends on the seed and its step only."""
        config, features = self.config, self.features
        transform: nn.Module = Augment(config, strong=not labeled)
        if features is not None:
            transform = AugmentFeatures(config, self.state.network.channel_mean, strong=not labeled)
        dataset = SegmentationDataset(
            items,
            labeled=labeled or (config.measure_pseudo_labels and all(item.mask.is_file() for item in items)),
            size=config.image_size if features is None else features.size,
            transform=transform,
            cache=config.cache_images,
            features=features,
        )
        batch_size = config.labeled_batch if labeled else config.unlabeled_batch
        batches = SeededBatches(
            len(items),
            batch_size=batch_size,
            steps=self.length.run,
            seed=2 * config.seed + labeled,
            start=self.state.step,
            part=share(batch_size),
        )
        loader = DataLoader(
            dataset,
            batch_sampler=batches,
            num_workers=config.workers,
            collate_fn=collate,
            # Starting a loader draws a seed: from torch's own generator it would shift a resumed run's random numbers.
            generator=torch.Generator(),
        )
        return iter(loader)

    def _to(self, batch: Batch) -> Batch:
        return {key: self._place(value) if isinstance(value, Tensor) else value for key, value in batch.items()}

    def _place(self, value: Tensor) -> Tensor:
        channels_last = self.config.channels_last and value.ndim == 4
        return value.to(
            self.fabric.device, memory_format=torch.channels_last if channels_last else torch.preserve_format
        )
