"""Losses that are not finite, and training in lower precision."""

import pytest
import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins import MixedPrecision

from examples.derprop_voc import train, trainer
from examples.derprop_voc.data import SeededBatches, load_data
from examples.derprop_voc.errors import ConfigError, DivergedError
from examples.derprop_voc.losses import Objective
from examples.derprop_voc.scenes import CLASS_NAMES
from examples.derprop_voc.state import make_state
from examples.derprop_voc.train import run
from examples.derprop_voc.trainer import Trainer
from tests.example.runs import EPOCH, Stopped, assert_same, assert_same_run, read, stop_at, tiny
from tests.example.runs import SCENES as SCENES


@pytest.fixture(autouse=True)
def _log_every(monkeypatch):
    monkeypatch.setattr(trainer, "LOG_EVERY", 2)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_the_weights(value, scenes, tmp_path, monkeypatch):
    labeled, check, seen = Objective.labeled, Trainer._check_finite, []

    def diverging(self, *arguments):
        terms = labeled(self, *arguments)
        return terms | {"ce_l": terms["ce_l"] * value} if len(seen) == 4 else terms

    def weights(trainer):
        return {name: values.clone() for name, values in trainer.state.network.named_parameters()}

    def checking(self, *arguments):
        seen.append((self, weights(self), (tmp_path / "latest.pt").is_file()))
        check(self, *arguments)

    monkeypatch.setattr(Objective, "labeled", diverging)
    monkeypatch.setattr(Trainer, "_check_finite", checking)
    config = tiny(scenes, tmp_path)
    with pytest.raises(DivergedError) as caught:
        run(config, progress=False)
    data = load_data(config)
    batches = [
        list(SeededBatches(len(items), batch_size=2, steps=5, seed=2 * config.seed + kind))[4]
        for items, kind in ((data.labeled, True), (data.unlabeled, False))
    ]
    names = [data.labeled[index].name for index, _ in batches[0]] + [
        data.unlabeled[index].name for index, _ in batches[1]
    ]
    assert f"loss is {value} at step 4, on images {', '.join(names)}; " in str(caught.value)
    assert len(seen) == 5
    trainer, before, _ = seen[-1]
    assert_same(weights(trainer), before)
    assert read(tmp_path)["step"] == EPOCH


@pytest.mark.slow
def test_bf16_trains_and_keeps_float32_weights(scenes, tmp_path):
    results = run(tiny(scenes, tmp_path, steps=2, precision="bf16-mixed"), progress=False)
    [entry] = [entry for entry in results["history"] if entry["kind"] == "train"]
    assert entry["loss"] == pytest.approx(entry["loss"], abs=100)
    for part in ("network", "averager"):
        floats = [values for values in read(tmp_path)[part].values() if values.is_floating_point()]
        assert {values.dtype for values in floats} == {torch.float32}
        assert all(values.isfinite().all() for values in floats)
    plain = run(tiny(scenes, tmp_path / "plain", steps=2), progress=False)["history"][0]
    assert entry["loss"] != plain["loss"]
    assert entry["loss"] == pytest.approx(plain["loss"], rel=0.05)


def test_fp16_needs_a_gpu(scenes, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="precision: 16-mixed needs a CUDA device; use bf16-mixed"):
        run(tiny(scenes, tmp_path, precision="16-mixed"), progress=False)


def test_bf16_on_a_cpu_refuses_channels_last(scenes, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        ConfigError, match=r"^precision: bf16-mixed gives NaN .*; use --no-channels-last or --precision"
    ):
        run(tiny(scenes, tmp_path, precision="bf16-mixed", channels_last=True), progress=False)
    assert not any(tmp_path.iterdir())


def scaled(monkeypatch, **options):
    """Lets the CPU train in fp16 with a gradient scaler, as a GPU does."""

    def make_fabric(_):
        precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", **options))
        fabric = Fabric(accelerator="cpu", plugins=[precision])
        fabric.launch()
        return fabric

    monkeypatch.setattr(train, "make_fabric", make_fabric)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_gradient_scaler_is_saved_and_restored(scenes, tmp_path, monkeypatch):
    scaled(monkeypatch, init_scale=64.0, growth_interval=4)
    whole, halves = (tiny(scenes, tmp_path / name, steps=4) for name in ("whole", "halves"))
    run(whole, progress=False)
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 4)
        with pytest.raises(Stopped):
            run(halves, progress=False)
    scaler = read(halves.out)["precision"]
    assert (scaler["scale"], scaler["_growth_tracker"]) == (64.0, 3)  # three of the four steps before it grows
    run(halves, resume=True, progress=False)
    assert read(halves.out)["precision"]["scale"] == 128.0
    assert_same_run(halves.out, whole.out)


@pytest.mark.slow
def test_a_step_that_the_gradient_scaler_skips_changes_no_weight(scenes, tmp_path, monkeypatch):
    scaled(monkeypatch, init_scale=2.0**60)
    config = tiny(scenes, tmp_path, steps=1)
    run(config, progress=False)
    checkpoint = read(tmp_path)
    assert checkpoint["precision"]["scale"] == 2.0**59
    assert checkpoint["schedule"]["last_epoch"] == 1
    assert checkpoint["optimizer"]["state"] == {}
    torch.manual_seed(config.seed)
    start = make_state(config, len(CLASS_NAMES), torch.device("cpu"), 1).network
    for name, values in start.named_parameters():
        assert torch.equal(checkpoint["network"][name], values)
    run(config, resume=True, progress=False)  # a checkpoint without momentum buffers is whole
