"""The training example: options, data checks, augmentation, and tiny runs of every variant."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from examples.derprop_voc import demo, train
from examples.derprop_voc.__main__ import main
from examples.derprop_voc.choice import load_finished
from examples.derprop_voc.config import make_config
from examples.derprop_voc.data import SeededBatches, load_data, read_list
from examples.derprop_voc.demo import RUNS, demo_configs
from examples.derprop_voc.errors import ConfigError, DataError, DivergedError
from examples.derprop_voc.evaluate import make_metric, summarise
from examples.derprop_voc.files import held, write_bytes, write_json
from examples.derprop_voc.model import SegmentationNetwork
from examples.derprop_voc.quality import PseudoLabelQuality
from examples.derprop_voc.scenes import CLASS_NAMES, make_scene, write_scenes
from examples.derprop_voc.train import run
from tests.example.options import TINY, flags

VARIANTS = ("supervised", "no_propagation", "no_derivative_loss", "no_momentum", "full")
SCENES = {"labeled": 3, "unlabeled": 4, "val": 2}
FILES = {"config.yaml", "curves.png", "latest.pt", "log.jsonl", "panel.png", "results.json", "similarity.png"}


@pytest.fixture
def broken(tmp_path):
    write_scenes(tmp_path, labeled=2, unlabeled=2, val=1, size=(32, 40), seed=1)
    return tmp_path


def tiny(scenes, out, **options):
    return make_config(TINY | {"data": str(scenes), "out": str(out)} | options)


# --- data ------------------------------------------------------------------------------------------------------------


def test_scenes_are_a_valid_folder_and_repeatable(scenes, tmp_path):
    data = load_data(make_config({"data": str(scenes), "partition": "demo"}))
    assert [len(items) for items in (data.labeled, data.unlabeled, data.val)] == [3, 4, 2]
    assert data.class_names == CLASS_NAMES
    assert not any(item.mask.exists() for item in data.unlabeled)
    with Image.open(data.labeled[0].mask) as mask:
        assert mask.mode == "P"
    write_scenes(tmp_path, labeled=1, unlabeled=1, val=1, size=(40, 48), seed=1)
    for item in load_data(make_config({"data": str(tmp_path), "partition": "demo"})).labeled:
        assert item.image.read_bytes() == (scenes / "JPEGImages" / item.image.name).read_bytes()
    ids = np.unique(np.stack([make_scene(np.random.default_rng(seed), (48, 64))[1] for seed in range(20)]))
    assert set(ids) == {*range(len(CLASS_NAMES)), 255}


def test_lists_in_both_forms(scenes, tmp_path):
    path = tmp_path / "list.txt"
    path.write_text("labeled_0000\n\n/JPEGImages/val_0000.png /SegmentationClass/val_0000.png\nJPEGImages/val_0001.png")
    items = read_list(path, scenes)
    assert [item.name for item in items] == ["labeled_0000", "val_0000", "val_0001"]
    assert all(item.image.is_file() and item.mask.is_file() for item in items)


def _remove(name):
    return lambda root: (root / name).unlink()


def _mask(name, array, mode=None):
    return lambda root: Image.fromarray(array, mode).save(root / "SegmentationClass" / name)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (_remove("JPEGImages/labeled_0001.png"), r"labeled_0001\.jpg: expected an image, found no such file"),
        (_remove("JPEGImages/unlabeled_0001.png"), r"unlabeled_0001\.jpg: expected an image, found no such file"),
        (
            _remove("SegmentationClass/val_0000.png"),
            r"val_0000\.png: expected the mask of val_0000\.png, found no",
        ),
        (_remove("ImageSets/Segmentation/demo/labeled.txt"), r"labeled\.txt: expected a list of images, found no"),
        (
            lambda root: (root / "ImageSets/Segmentation/val.txt").write_text("\n"),
            r"val\.txt: expected one image a line, found an empty list",
        ),
        (
            lambda root: (root / "ImageSets/Segmentation/val.txt").write_text("a b c\n"),
            r"val\.txt, line 1: expected an id, or an image and a mask, found 3 words",
        ),
        (
            lambda root: (root / "JPEGImages/labeled_0000.png").write_text("no image"),
            r"labeled_0000\.png: expected an image, found a file that does not open as one",
        ),
        (
            _mask("labeled_0000.png", np.zeros((32, 40, 3), np.uint8)),
            r"labeled_0000\.png: expected a PNG of ids, with a palette or 8-bit gray, found mode RGB",
        ),
        (
            _mask("labeled_0000.png", np.full((32, 40), 6, np.uint8)),
            r"labeled_0000\.png: expected labels 0 to 5 or 255 \(option num_classes\), found 6",
        ),
        (
            _mask("val_0000.png", np.zeros((30, 40), np.uint8)),
            r"val_0000\.png: expected the image's size 40x32, found 40x30 \(width x height\)",
        ),
        (
            lambda root: (root / "classes.txt").unlink() or _mask("val_0000.png", np.full((32, 40), 9, np.uint8))(root),
            r"val_0000\.png: expected labels 0 to \d or 255 \(option num_classes\), found 9",
        ),
    ],
)
def test_data_errors_stop_before_training_with_one_line(broken, break_it, message, capsys):
    break_it(broken)
    with pytest.raises(DataError, match=message):
        load_data(make_config({"data": str(broken), "partition": "demo"}))
    out = broken / "run"
    assert main(["train", "--data", str(broken), "--partition", "demo", "--out", str(out)]) == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1
    assert not out.exists()


def test_data_folder_and_class_count_errors(scenes, tmp_path, capsys):
    with pytest.raises(DataError, match=r"nowhere: expected a folder in VOC layout \(option data\), found none"):
        load_data(make_config({"data": str(tmp_path / "nowhere")}))
    with pytest.raises(DataError, match=r"classes\.txt: expected num_classes = 4 lines, found 6"):
        load_data(make_config({"data": str(scenes), "partition": "demo", "num_classes": 4}))
    assert main(["train", "--epochs", "0"]) == 2
    assert capsys.readouterr().err == "error: epochs: expected at least 1, got 0\n"
    with pytest.raises(SystemExit) as usage:
        main(["train", "--no-such-option"])
    assert usage.value.code == 2


def test_supervised_needs_no_unlabeled_list(broken):
    (broken / "ImageSets/Segmentation/demo/unlabeled.txt").unlink()
    data = load_data(make_config({"data": str(broken), "partition": "demo", "variant": "supervised"}))
    assert data.unlabeled == []


def test_batches_depend_on_seed_and_step_only():
    def batches(**options):
        return list(SeededBatches(5, batch_size=2, **({"steps": 6, "seed": 3} | options)))

    assert batches() == batches()
    assert batches(start=4) == batches()[4:]
    assert batches(seed=4) != batches()
    indices = [index for batch in batches() for index, _ in batch]
    assert sorted(indices[:5]) == sorted(indices[5:10]) == list(range(5))
    assert len({seed for batch in batches() for _, seed in batch}) == 12
    parts = [batches(part=slice(0, 1)), batches(part=slice(1, 2))]
    assert [first + second for first, second in zip(*parts, strict=True)] == batches()


# --- evaluation ------------------------------------------------------------------------------------------------------


def test_iou_is_of_the_data_set_and_ignores_void():
    metric = make_metric(4)
    metric.update(torch.tensor([[0, 0, 1, 1]]), torch.tensor([[0, 1, 1, 255]]))
    metric.update(torch.tensor([[0, 2, 1, 1]]), torch.tensor([[0, 0, 1, 1]]))
    result = summarise(metric, ("a", "b", "c", "d"))
    iou = {"a": 2 / 4, "b": 3 / 4, "c": 0.0}  # c is predicted and nowhere true; d is neither
    assert {name: result["iou"][name] for name in iou} == pytest.approx(iou)
    assert result["iou"]["d"] is None
    assert result["miou"] == pytest.approx(sum(iou.values()) / 3)


# --- runs ------------------------------------------------------------------------------------------------------------


def test_network_shapes_and_unknown_backbone():
    config = make_config(TINY)
    output = SegmentationNetwork(config, 6).eval()(torch.zeros(1, 3, 45, 60))
    assert output.logits.shape == (1, 6, 45, 60)
    assert output.feats.shape == (1, 8, 6, 8)
    assert output.feats.min() >= 0
    for name in ("vgg", "timm/no_such_model", "torchvision/resnet50"):
        with pytest.raises(ConfigError, match=rf"backbone: expected one of resnet50, .*timm/.*, got '{name}'"):
            SegmentationNetwork(make_config({"backbone": name}), 6)
    with pytest.raises(ConfigError, match=r"timm/resnet10t does not give stages \[1, 9\] at output stride 8"):
        SegmentationNetwork(make_config(TINY | {"timm_stages": [1, 9]}), 6)


@pytest.fixture(scope="module")
def full(scenes, tmp_path_factory):
    """Config and results of a run of every part of the method."""
    config = tiny(scenes, tmp_path_factory.mktemp("full"))
    return config, run(config, progress=False)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.usefixtures("pictures")
def test_two_steps_of_every_variant(variant, scenes, tmp_path):
    config = tiny(scenes, tmp_path, variant=variant)
    state = torch.get_rng_state()
    results = run(config, progress=False)
    assert torch.equal(state, torch.get_rng_state())
    assert results == json.loads((tmp_path / "results.json").read_text())
    assert {path.name for path in tmp_path.iterdir()} == FILES
    assert results["config"] == config.to_dict()
    assert results["classes"] == list(CLASS_NAMES)
    assert results["evaluation"] == {"mode": "original", "images": 2}
    assert results["steps"] == {"run": 2, "epoch": 2}
    assert set(results["seconds"]) == {"train", "evaluate"}
    assert set(results["versions"]) == {"python", "torch", "torchvision", "torchmetrics", "timm", "dlprop"}
    assert (results["last"]["averaged"] is not None) == (variant == "full")
    for scores in filter(None, results["last"].values()):
        for key in ("prediction", "propagated", "blend"):
            assert 0 <= scores[key]["miou"] <= 1
            assert set(scores[key]["iou"]) == set(CLASS_NAMES)
    checkpoint = torch.load(tmp_path / "latest.pt", weights_only=True)
    assert checkpoint["step"] == 2
    assert checkpoint["config"] == config.to_dict()
    assert (checkpoint["averager"] is not None) == (variant == "full")


def test_softmax_setting_and_options_run(scenes, tmp_path):
    options = {
        "affinity": "softmax",
        "similarity": "cosine",
        "normalize": "none",
        "order_weights": [20.0, 20.0],
        "detach_logits": True,
        "loss_norm": "frobenius",
        "confidence": "fixed",
        "average_every": "step",
        "image_size": [32, 40],
        "cache_images": True,
    }
    results = run(tiny(scenes, tmp_path, **options), progress=False)
    assert results["history"][-1]["threshold"] == pytest.approx(0.85)


@pytest.mark.parametrize(
    "options", [{"affinity": "ridge", "balance": 1}, {"affinity": "discriminant", "across": "batch"}]
)
def test_affinities_that_estimate_their_metric_run(options, scenes, tmp_path):
    results = run(tiny(scenes, tmp_path, measure_pseudo_labels=True, **options), progress=False)
    trained, measured = results["history"][-2:]
    assert all(np.isfinite(trained[name]) for name in ("ce_l_propagated", "ce_u_propagated", "loss"))
    assert set(measured) >= {"labeled_prediction", "labeled_propagated"}
    assert set(results["last"]["averaged"]) == {"prediction", "propagated", "blend"}


def test_pseudo_labels_are_scored_at_every_fifth_step(scenes, tmp_path, monkeypatch):
    scored = []
    monkeypatch.setattr(PseudoLabelQuality, "labeled", lambda *_: scored.append(1))
    run(tiny(scenes, tmp_path, measure_pseudo_labels=True, steps=6), progress=False)
    assert len(scored) == 2  # steps 0 and 5


def test_same_seed_same_weights(full, scenes, tmp_path):
    def weights(config):
        return torch.load(Path(config.out) / "latest.pt", weights_only=True)

    configs = [tiny(scenes, tmp_path / str(seed), seed=seed) for seed in (0, 1)]
    for config in configs:
        run(config, progress=False)
    first, again, other = map(weights, (full[0], *configs))
    for key in ("network", "averager"):
        assert all(torch.equal(value, again[key][name]) for name, value in first[key].items())
    assert first["history"] == again["history"]
    assert any(not torch.equal(value, other["network"][name]) for name, value in first["network"].items())


@pytest.mark.parametrize(("momentum_network", "variant"), [("on", "supervised"), ("off", "full")])
def test_a_checkpoint_gives_its_networks(momentum_network, variant, scenes, tmp_path):
    config = tiny(scenes, tmp_path, variant=variant, momentum_network=momentum_network)
    run(config, progress=False)
    (finished,) = load_finished([tmp_path / "latest.pt"], torch.device("cpu"))
    networks = finished.networks
    assert (finished.config, finished.class_names, finished.step) == (config, CLASS_NAMES, 2)
    assert finished.network("tested") is list(networks.values())[-1]
    assert list(networks) == (["trained"] if momentum_network == "off" else ["trained", "averaged"])
    assert not any(network.training for network in networks.values())
    saved = torch.load(tmp_path / "latest.pt", weights_only=True)
    assert all(torch.equal(value, saved["network"][name]) for name, value in networks["trained"].state_dict().items())
    if "averaged" in networks:
        weights = networks["averaged"].state_dict()
        assert all(torch.equal(value, saved["averager"][f"module.{name}"]) for name, value in weights.items())


@pytest.mark.parametrize("size", [(40, 48), (48, 40)])
def test_a_run_warns_of_height_and_width_that_may_be_swapped(scenes, tmp_path, capsys, size):
    run(tiny(scenes, tmp_path, image_size=size, steps=1, variant="supervised"), progress=False)
    assert ("is 40 48 meant?" in capsys.readouterr().out) == (size == (48, 40))


def test_divergence_names_the_images(scenes, tmp_path, capsys):
    options = {"lr": 1e30, "steps": 8, "variant": "supervised"}
    with pytest.raises(DivergedError, match=r"loss is \S+ at step \d, on images labeled_\d+, labeled_\d+; try a lower"):
        run(tiny(scenes, tmp_path, **options), progress=False)
    assert not (tmp_path / "results.json").exists()
    out = tmp_path / "from_the_command_line"
    assert main(["train", f"--data={scenes}", f"--out={out}", *flags(TINY | options)]) == 3
    assert "diverged: loss is" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_the_accelerator_is_checked(scenes, tmp_path):
    with pytest.raises(ConfigError, match="accelerator: cuda cannot be used here"):
        run(tiny(scenes, tmp_path, accelerator="cuda"), progress=False)


def test_a_run_that_starts_anew_keeps_no_best_network_of_another(scenes, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "_run", lambda *_, **__: {})
    config = make_config(TINY | {"data": str(scenes), "out": str(tmp_path)})
    for latest in (True, False):
        (tmp_path / "best.pt").touch()
        if latest:
            (tmp_path / "latest.pt").touch()
        run(config, resume=True)
        assert (tmp_path / "best.pt").exists() == latest
        (tmp_path / "latest.pt").unlink(missing_ok=True)


def test_one_process_trains_in_a_folder(scenes, tmp_path):
    config = make_config(TINY | {"data": str(scenes), "out": str(tmp_path)})
    with held(tmp_path), pytest.raises(ConfigError, match="out: another process trains in "):
        run(config)
    assert not (tmp_path / "latest.pt").exists()
    with pytest.raises(BlockingIOError), held(tmp_path):  # it is free again, and this is no other process
        raise BlockingIOError


def test_writes_are_whole_or_absent(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"x": 1})
    with pytest.raises(ValueError, match="Out of range float"):
        write_json(path, {"x": float("nan")})
    with pytest.raises(TypeError):
        write_bytes(path, "text")
    assert json.loads(path.read_text()) == {"x": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_demo_plans_every_run(tmp_path):
    configs = demo_configs(tmp_path, seed=3, threads=0, steps=5)
    assert list(configs) == list(RUNS)
    assert {config.seed for config in configs.values()} == {3}
    assert len({config.out for config in configs.values()}) == len(configs)
    (literal,) = (config for config in configs.values() if config.variant == "full")
    assert (literal.affinity, literal.scale, literal.detach_logits) == ("linear", "sum", False)
    assert (configs["rectified"].affinity, configs["rectified"].trains_propagated) == ("ridge", False)


@pytest.mark.slow
@pytest.mark.usefixtures("pictures")
def test_demo_from_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "SCENES", {"labeled": 4, "unlabeled": 4, "val": 2})
    assert main(["demo", "--steps", "2", "--threads", "1", "--out", str(tmp_path)]) == 0
    stdout = capsys.readouterr().out
    for label, _ in RUNS.values():
        assert label in stdout
    scores = json.loads((tmp_path / "results.json").read_text())["scores"]["0"]
    assert set(scores) == set(RUNS)
    assert all(
        of_run["corrected"] > of_run["P"] for of_run in scores.values()
    )  # hardly trained, but the clicks are right
    assert (tmp_path / "clicks.png").is_file()
    path = tmp_path / "supervised" / "config.yaml"
    path.write_text(path.read_text().replace(f"data: {tmp_path}", "data: mine"))
    assert main(["demo", "--steps", "2", "--threads", "1", "--out", str(tmp_path)]) == 2
    assert "supervised holds a run of something else; choose another folder" in capsys.readouterr().err
