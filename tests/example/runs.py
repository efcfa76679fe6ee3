"""Runs of the example that are stopped and resumed, and what makes two of them the same."""

import json
from pathlib import Path

import torch

from examples.derprop_voc.config import make_config
from examples.derprop_voc.trainer import Trainer
from tests.example.options import TINY as PLAIN

# Dropout, CutMix, the momentum network and the adaptive threshold are on; pseudo-labels pass the threshold. Epochs have
# three steps, and the last one of the run is cut to two.
TINY = PLAIN | {
    "threshold": 0.2,
    "threshold_momentum": 0.9,
    "steps": 8,
    "lr": 0.01,
    "evaluate_every": 1,
    "threads": 1,
}
DATA = {"affinity": "discriminant", "across": "data"}
SETTINGS = {
    "eval": {"weak_mode": "eval"},
    # Anchors are drawn from torch's default generator, as dropout is.
    "train": {"weak_mode": "train", "num_anchors": 8, "average_every": "step", "evaluate_every": 2},
    # Everything that rectification remembers.
    "running": DATA | {"adjust": "prior", "threshold": 0.1, "threshold_momentum": 0.99, "evaluate_every": 2},
}
EPOCH, STEPS = 3, 8
SCENES = {"labeled": 5, "unlabeled": 6, "val": 2}


class Stopped(Exception):  # noqa: N818, an interruption rather than an error
    pass


def tiny(scenes, out, **options):
    return make_config(TINY | {"data": str(scenes), "out": str(out)} | options)


def stop_at(monkeypatch, step):
    """Raises `Stopped` in that step, counted from 1 in this process, before it reaches the weights."""
    check, calls = Trainer._check_finite, [0]

    def stopping(self, *arguments):
        calls[0] += 1
        if calls[0] == step:
            raise Stopped
        check(self, *arguments)

    monkeypatch.setattr(Trainer, "_check_finite", stopping)


def read(folder, name="latest.pt"):
    return torch.load(Path(folder) / name, weights_only=True)


def assert_same(found, expected, place=""):
    """Equality of nested values, bit for bit."""
    assert type(found) is type(expected), place
    if isinstance(expected, dict):
        assert list(found) == list(expected), place
        for key in expected:
            assert_same(found[key], expected[key], f"{place}.{key}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), place
        for index, pair in enumerate(zip(found, expected, strict=True)):
            assert_same(*pair, f"{place}.{index}")
    elif isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype, place
        assert torch.equal(found, expected), place
    else:
        assert found == expected, place


def assert_same_run(found, expected):
    """Checkpoints, log and history of two run folders are the same; their options may differ where that is free."""
    for name in ("latest.pt", "best.pt"):
        assert_same(*({**read(folder, name), "config": None} for folder in (found, expected)), name)
    logs = [(Path(folder) / "log.jsonl").read_text() for folder in (found, expected)]
    assert logs[0] == logs[1]
    steps = [(entry["step"], entry["kind"]) for entry in map(json.loads, logs[0].splitlines())]
    assert len(set(steps)) == len(steps)
    assert not list(Path(found).glob(".*"))
