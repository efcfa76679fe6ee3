"""`choose`: what propagation, if any, suits a trained network, by labelled images that it was not trained on.

Each image goes through the network once; all settings share its logits and features. A setting is compared with P and
with the best control, logit adjustment by the class shares of P, on the same images: it takes a gain of two standard
errors over the control to be chosen. Of many settings the best looks better than it is, which this does not correct.
"""

import argparse
import io
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dlprop.statistics import ClassStatistics

from .choice import (
    Finished,
    add_machine_arguments,
    add_network_argument,
    add_source_arguments,
    check_not_trained_on,
    checkpoint_files,
    load_finished,
    make_device,
    with_propagation,
)
from .config import make_config
from .data import SegmentationDataset, check_mask, check_unseen, read_list, read_mask, training_lists
from .errors import ConfigError
from .evaluate import confusion, gain, labels_at, mean_iou, outputs
from .files import versions, write_bytes, write_json, write_yaml
from .model import Output
from .pooled import Pooled, pooled_propagation, shares, tau_of
from .progress import make_bar
from .rectification import adjusted
from .scoring import add_data_arguments, check_class_names, data_overrides
from .sources import Item, find_source

P, CONTROL = "P", "logit adjustment"
ERRORS = 2  # standard errors that a gain over the control takes
FEW = 20  # images


@dataclass(frozen=True)
class Setting:
    """A row of the table.

    Attributes:
        family: what it is a setting of.
        options: of a config, for `with_propagation` and for the file; of P, none.
        is_blend: the mean of P, or of adjusted P, and of P~ is scored in the place of P~.
    """

    family: str
    options: Mapping[str, Any]
    is_blend: bool = False

    @property
    def propagates(self) -> bool:
        """Whether the row takes P~."""
        return "affinity" in self.options

    @property
    def tau(self) -> float:
        """Of the logit adjustment, 0 where there is none."""
        return float(self.options.get("tau", 0.0))

    @property
    def output(self) -> str:
        """What `predict` and `evaluate` call it."""
        return "blend" if self.is_blend else "propagated" if self.propagates else "prediction"

    @property
    def name(self) -> str:
        """The family and the options."""
        named = {k: v for k, v in self.options.items() if k != "pseudo_counts" and isinstance(v, float)}
        shown = ", ".join(f"{k} {v:g}" for k, v in named.items())
        return f"{self.family}, {shown}" if shown else self.family


def make_settings() -> list[Setting]:
    """What is tried: P first, then the controls, then what propagates."""
    of: dict[str, dict[str, Any]] = {"the image": {"across": "image"}, "all images": {"across": "data"}}
    leaning = {f"the image leaning on all by {k:g}": {"across": "data", "pseudo_counts": k} for k in (3.0, 10.0, 30.0)}
    found = [Setting(P, {}), *(Setting(CONTROL, {"tau": tau}) for tau in (0.25, 0.5, 0.75, 1.0))]
    for balance in (0.0, 0.5, 1.0):
        found.append(Setting("ridge", {"affinity": "ridge", "shrinkage": 0.3, "balance": balance}))
    for tau in (0.0, 0.25, 0.5):
        prediction, adjust = ("adjusted P", {"tau": tau}) if tau else ("P", {})
        for (across, options), is_blend in product({**of, **leaning}.items(), (False, True)):
            family = f"discriminant of {across}"
            if is_blend:
                family = f"mean of {prediction} and {family}"
            elif tau:
                family = f"{family} on {prediction}"
            for shrinkage in (0.1, 1.0):
                values = {"affinity": "discriminant", **options, "shrinkage": shrinkage, **adjust}
                found.append(Setting(family, values, is_blend))
    return found


# --- images ----------------------------------------------------------------------------------------------------------


def held_out(finished: Finished, images: Path, overrides: Mapping[str, Any]) -> list[Item]:
    """The labelled images of a list.

    Raises:
        DataError: for an image that the network was trained on, or one without a mask.
    """
    config = make_config(finished.config.to_dict() | dict(overrides))
    source = find_source(config)
    if source.class_names:
        check_class_names(finished, source.class_names)
    items = read_list(images, source.root, source.item)
    way_out = "hold labelled images out of the training (command split, --val)"
    check_unseen(items, training_lists(config, source), str(images), way_out)
    check_not_trained_on(finished, items, config, str(images), way_out)
    for item in items:
        check_mask(item, len(finished.class_names), source.missing_mask)
    return items


class Kept:
    """Outputs of a network in a folder of files, to be gone through again and again."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0

    def add(self, output: Output) -> None:
        """Keeps one more."""
        buffer = io.BytesIO()  # a full disk is an OSError then
        torch.save(tuple(output), buffer)
        (self.folder / f"{self.count}.pt").write_bytes(buffer.getbuffer())
        self.count += 1

    def __iter__(self) -> Iterator[Output]:
        for index in range(self.count):
            yield Output(*torch.load(self.folder / f"{index}.pt", weights_only=True))


@contextmanager
def kept_outputs(finished: Finished, network: str, items: Sequence[Item]) -> Iterator[Kept]:
    """The outputs for whole images, one forward each; as large as the logits, on the disk while the context lasts."""
    dataset = SegmentationDataset(items, labeled=False, size=finished.config.image_size)
    with tempfile.TemporaryDirectory() as folder, make_bar(len(items), "network") as bar:
        kept = Kept(Path(folder))
        for index in range(len(items)):
            for _, _, output in outputs(finished.networks[network], dataset[index]["image"]):
                kept.add(output)
            bar.update()
        yield kept


def pools(kept: Kept, num_classes: int, taus: Sequence[float]) -> dict[float, Pooled]:
    """For every tau, 0 among them, what `pooled.pool` would find, in two passes for all."""
    of_tau: dict[float, Pooled] = {}
    for several in ([0.0], [tau for tau in taus if tau]):
        for output in kept:
            for tau in several:
                if tau not in of_tau:
                    prior = of_tau[0.0].prior if tau else output.logits.new_zeros(num_classes)
                    statistics = ClassStatistics(num_classes, output.feats.shape[1]).to(output.feats.device)
                    of_tau[tau] = Pooled(prior, tau, statistics)
                adjust = of_tau[tau].adjust
                of_tau[tau].statistics.update(adjust(output.logits) if adjust else output.logits, output.feats)
        of_tau[0.0] = replace(of_tau[0.0], prior=shares(of_tau[0.0].statistics))
    return of_tau


def measure(
    finished: Finished, kept: Kept, items: Sequence[Item], settings: Sequence[Setting]
) -> dict[str, np.ndarray]:
    """The confusion matrices (images, C, C) of every setting, by its name."""
    C = len(finished.class_names)
    of_tau = pools(kept, C, sorted({0.0, *(setting.tau for setting in settings if setting.propagates)}))
    methods = {}
    for setting in settings:
        config = with_propagation(finished.config, setting.options)
        adjust = partial(adjusted, prior=of_tau[0.0].prior, tau=tau_of(config))
        propagate = pooled_propagation(config, of_tau[setting.tau]) if setting.propagates else None
        methods[setting.name] = (adjust, propagate, setting.is_blend)
    found: dict[str, list[np.ndarray]] = {setting.name: [] for setting in settings}
    with make_bar(len(items), "settings") as bar:
        for item, output in zip(items, kept, strict=True):
            truth = torch.from_numpy(read_mask(item))
            for name, (adjust, propagate, is_blend) in methods.items():
                logits = adjust(output.logits)
                if propagate is None:
                    scores = logits.softmax(1)
                else:
                    scores = propagate.rectify(logits, output.feats, ramp=0.5 if is_blend else 1.0)
                found[name].append(confusion(labels_at(scores, truth.shape).cpu(), truth, C))
            bar.update()
    return {name: np.stack(rows) for name, rows in found.items()}


# --- the choice ------------------------------------------------------------------------------------------------------


def choose_setting(settings: Sequence[Setting], found: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The rows of the table, the best control, and the setting to take with the reason.

    The control is the best of P and its logit adjustments; an adjustment that is not `ERRORS` above P is not taken.
    """
    rows: dict[str, dict[str, Any]] = {}
    best = {
        kind: max(
            (setting.name for setting in settings if setting.propagates == kind),
            key=lambda name: mean_iou(found[name].sum(0)),
        )
        for kind in (False, True)
    }
    control, candidate = best[False], best[True]
    for setting in settings:
        confusions = found[setting.name]
        to_p, error = gain(confusions, found[P])
        to_control, control_error = gain(confusions, found[control])
        rows[setting.name] = {
            "family": setting.family,
            "options": dict(setting.options),
            "output": setting.output,
            "miou": float(mean_iou(confusions.sum(0))),
            "gain": to_p,
            "error": error,
            "gain_over_control": to_control,
            "control_error": control_error,
        }
    row = rows[candidate]
    if row["gain_over_control"] > ERRORS * row["control_error"]:
        chosen = candidate
        text = f"{candidate} is {_gain(row, over_control=True)} above the best control, {control}"
    else:
        chosen = control if rows[control]["gain"] > ERRORS * rows[control]["error"] else P
        text = (
            f"Nothing that propagates beats the best control ({control}) by {ERRORS} standard errors: "
            f"{candidate}, the best, is at {_gain(row, over_control=True)}"
        )
        if chosen == P != control:
            text += f"; {control} itself is at {_gain(rows[control])} from P, so P stays as it is"
    return {"control": control, "best": candidate, "chosen": chosen, "reason": text, "rows": rows}


def config_of(setting: Setting) -> dict[str, Any]:
    """The setting as lines of a file for `--config`: of training, too."""
    values = dict(setting.options)
    if setting.tau:
        values = {"adjust": "prior"} | values
    return values if setting.propagates else values | {"variant": "no_propagation"}


def _gain(row: Mapping[str, Any], *, over_control: bool = False) -> str:
    value, error = (row["gain_over_control"], row["control_error"]) if over_control else (row["gain"], row["error"])
    return f"{value:+.2f} ± {error:.2f}"


def markdown(result: Mapping[str, Any]) -> str:
    """The table, and what to take."""
    rows, control = result["rows"], result["control"]
    versus = control != P  # else the third column says it already
    lines = [
        f"{result['images']} labelled images that the network was not trained on. mIoU in percent; differences on the "
        "same images ± their standard error over images (jackknife).",
        "",
        "| setting | mIoU | over P |" + (f" over {control} |" if versus else ""),
        "|---|---|---|" + ("---|" if versus else ""),
    ]
    for name, row in rows.items():
        cells = ["" if name == P else _gain(row)]
        if versus:
            cells.append("" if name == control else _gain(row, over_control=True))
        lines.append(f"| {name} | {row['miou']:.2f} | {' | '.join(cells)} |")
    lines += ["", f"{result['reason']}."]
    if result["images"] < FEW:
        lines.append(f"So few images tell little, and their standard errors are rough; hold out {FEW} or more.")
    return "\n".join([*lines, "", f"Chosen: {result['chosen']}."]) + "\n"


def add_choose_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `choose`."""
    add_source_arguments(parser, several=False)
    add_network_argument(parser)
    parser.add_argument(
        "--images", type=Path, required=True, metavar="LIST", help="labelled images that the run was not trained on"
    )
    add_data_arguments(parser)
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="for choose.json, choose.md and chosen.yaml (default: the checkpoint's)",
    )
    add_machine_arguments(parser)


@torch.no_grad()
def choose_command(arguments: argparse.Namespace) -> None:
    """Scores all settings, prints and writes the table, and writes the chosen one as a file for `--config`."""
    device = make_device(arguments.accelerator, arguments.threads)
    paths = checkpoint_files(arguments, best=False)
    (finished,) = load_finished(paths, device)
    if finished.config.evaluation != "original":
        print(f"note: images are taken whole here; this run is scored by {finished.config.evaluation}")
    items = held_out(finished, arguments.images, data_overrides(arguments))
    if len(items) < 2:
        raise ConfigError(f"images: expected two images at least, to tell a gain from chance, got {len(items)}")
    network, settings = finished.name_of(arguments.network), make_settings()
    with kept_outputs(finished, network, items) as kept:
        found = measure(finished, kept, items, settings)
    facts = {
        "checkpoint": "/".join(finished.path.resolve().parts[-2:]),
        "step": finished.step,
        "network": network,
        "images": len(items),
    }
    result = facts | choose_setting(settings, found) | {"list": str(arguments.images), "versions": versions()}
    out = arguments.out or paths[0].parent
    (chosen,) = (setting for setting in settings if setting.name == result["chosen"])
    write_json(out / "choose.json", result)
    write_yaml(out / "chosen.yaml", config_of(chosen))
    table = markdown(result)
    write_bytes(out / "choose.md", table.encode())
    print(
        f"{table}\nWrote {out / 'chosen.yaml'}, which train, evaluate and predict take with --config; "
        f"predict with --output {chosen.output}, too"
    )
