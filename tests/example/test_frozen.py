"""The training example on a frozen backbone: its network, its cache of features, and runs on them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from examples.derprop_voc import trainer
from examples.derprop_voc.__main__ import DONE, main
from examples.derprop_voc.config import make_config
from examples.derprop_voc.errors import ConfigError
from examples.derprop_voc.frozen import make_network
from examples.derprop_voc.model import SegmentationNetwork
from examples.derprop_voc.scenes import CLASS_NAMES
from examples.derprop_voc.train import run
from examples.derprop_voc.trainer import Trainer
from tests.example.frozen_runs import CHANNELS, FROZEN, counted


def tiny(scenes, out, **options):
    return make_config(
        FROZEN | {"data": str(scenes), "cache_dir": str(out.parent / "cache"), "out": str(out)} | options
    )


def read(folder, name="latest.pt"):
    return torch.load(folder / name, weights_only=True)


def tensors(values, place=""):
    """Every tensor of nested dicts and lists, by its place."""
    if isinstance(values, torch.Tensor):
        return {place: values}
    pairs = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    return {key: tensor for name, value in pairs for key, tensor in tensors(value, f"{place}.{name}").items()}


# --- network ---------------------------------------------------------------------------------------------------------


def test_stages_come_to_one_grid_and_logits_to_the_size_of_the_images(network):
    features = network.backbone_features(torch.rand(2, 3, 45, 60))
    assert features.shape == (2, CHANNELS, 6, 8)
    output = network(torch.rand(2, 3, 45, 60))
    assert output.logits.shape == (2, len(CLASS_NAMES), 45, 60)
    assert output.feats.shape == (2, FROZEN["feature_channels"], 6, 8)
    images = torch.rand(2, 3, 40, 48)
    for from_images, from_features in zip(network(images), network(network.backbone_features(images)), strict=True):
        assert torch.equal(from_images, from_features)
    coarse = make_network(make_config(FROZEN | {"output_stride": 16}), 3).backbone_features(images)
    stages = network.backbone((images - network.mean) / network.std)
    assert coarse.shape == (2, CHANNELS, 3, 3)
    # A stage of stride 4 is averaged over 2 x 2, one of stride 8 stays.
    features = network.backbone_features(images)
    torch.testing.assert_close(features[:, :24], stages[0].unflatten(2, (5, 2)).unflatten(4, (6, 2)).mean((3, 5)))
    assert torch.equal(features[:, 24:56], stages[1])


def test_only_the_head_is_trained():
    network = make_network(make_config(FROZEN), 3).eval()
    assert not any(module.training for module in network.modules())
    network.train()
    assert network.training
    assert network.reduce.training
    assert not any(module.training for module in network.backbone.modules())
    before = {name: value.clone() for name, value in network.state_dict().items()}
    groups = network.parameter_groups(0.5, 2.0)
    assert [group["lr"] for group in groups] == [1.0]
    optimizer = torch.optim.SGD(groups)
    network(torch.rand(2, 3, 40, 48)).logits.square().sum().backward()
    optimizer.step()
    changed = {
        name.split(".")[0] for name, value in network.state_dict().items() if not torch.equal(value, before[name])
    }
    assert changed == {"reduce", "context", "projection", "classifier"}


def test_features_are_standardised_over_all_pixels_of_all_maps(network):
    torch.manual_seed(0)
    maps = [3 + 2 * torch.randn(CHANNELS, 4, 5), torch.randn(CHANNELS, 7, 3)]
    for features in maps:
        features[1] = 0.5
    network.standardise_to(iter(maps))
    pixels = torch.cat([features.flatten(1) for features in maps], 1).double()
    expected = pixels.std(1, correction=0)
    expected[1] = 1  # a channel that never changes
    torch.testing.assert_close(network.channel_mean.flatten().double(), pixels.mean(1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(network.channel_std.flatten().double(), expected, rtol=1e-6, atol=1e-6)
    seen = []
    network.reduce.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    network(maps[0][None])
    torch.testing.assert_close(seen[0], (maps[0] - network.channel_mean)[None] / network.channel_std)


def test_stages_and_strides_that_a_backbone_lacks_are_named():
    mobile = {"backbone": "timm/mobilenetv3_small_050"}
    message = (
        "timm/mobilenetv3_small_050 does not give stages .* at output stride 8: timm cannot dilate it; models that"
    )
    with pytest.raises(ConfigError, match=message):
        SegmentationNetwork(make_config(mobile), 3)
    frozen = make_network(make_config(FROZEN | mobile), 3)  # takes it as it is
    assert frozen.backbone_features(torch.rand(1, 3, 40, 48)).shape == (1, 8 + 16 + 24 + 288, 5, 6)
    with pytest.raises(ConfigError, match=r"stages \[1, 7\] .*: its stages are 0 of stride 2, .*, 4 of stride 32"):
        make_network(make_config(FROZEN | {"timm_stages": [1, 7]}), 3)
    with pytest.raises(ConfigError, match="takes images of 224 224 only: --image-size 224 224"):
        make_network(make_config(FROZEN | {"backbone": "timm/vit_tiny_patch16_224"}), 3)
    with pytest.raises(ConfigError, match="backbone: expected timm/<one of"):
        make_network(make_config(FROZEN | {"backbone": "timm/nothing"}), 3)
    unsaid = make_config(FROZEN | {"weights": "none"})
    with pytest.raises(ConfigError, match=r"weights: expected a file or timm for a frozen backbone: .* \(random, if"):
        make_network(unsaid, 3)
    make_network(unsaid, 3, initialise=False)  # its weights come from a checkpoint


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(scenes, tmp_path_factory):
    """Config and results of an uninterrupted run."""
    config = tiny(scenes, tmp_path_factory.mktemp("whole") / "run", momentum_network="on", evaluate_every=1)
    return config, run(config, progress=False)


def test_a_stopped_and_resumed_run_is_the_uninterrupted_one(whole, scenes, tmp_path, monkeypatch):
    config, results = whole
    check = Trainer._check_finite

    def stopping(self, *arguments):
        if self.state.step == 4:
            raise KeyboardInterrupt
        check(self, *arguments)

    # Both parts of the run fill a cache of their own.
    stopped = make_config(config.to_dict() | {"out": str(tmp_path / "run"), "cache_dir": str(tmp_path / "first")})
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_check_finite", stopping)
        with pytest.raises(KeyboardInterrupt):
            run(stopped, progress=False)
    assert read(tmp_path / "run")["step"] == 3
    moved = make_config(stopped.to_dict() | {"cache_dir": str(tmp_path / "second")})
    resumed = run(moved, resume=True, progress=False)
    found, expected = (read(out) for out in (tmp_path / "run", Path(config.out)))
    assert tensors(found).keys() == tensors(expected).keys()
    for name, value in tensors(expected).items():
        assert torch.equal(tensors(found)[name], value), name
    assert resumed["history"] == results["history"]
    assert resumed["last"] == results["last"]
    changed = {
        name
        for name, value in tensors(expected["network"]).items()
        if not torch.equal(value, tensors(expected["averager"])[f".module{name}"])
    }
    assert {name.split(".")[1] for name in changed} == {"reduce", "context", "projection", "classifier"}


def test_a_checkpoint_is_complete(whole, tmp_path, scenes, capsys):
    """`evaluate` and `predict` work on images, without cache and without the file of weights."""
    config, results = whole
    network = read(Path(config.out))["network"]
    assert network["channel_std"].min() > 0
    assert not torch.equal(network["channel_std"], torch.ones(CHANNELS, 1, 1))
    assert main(["evaluate", "--run", config.out, "--out", str(tmp_path / "scores.json")]) == DONE
    [latest, _] = json.loads((tmp_path / "scores.json").read_text())["checkpoints"]
    for name in ("trained", "averaged"):
        found, expected = (scores[name]["prediction"] for scores in (latest["networks"], results["last"]))
        assert found["accuracy"] == pytest.approx(expected["accuracy"], abs=0.01)  # half precision
    folder = ["--images", str(scenes / "JPEGImages"), "--out", str(tmp_path / "masks")]
    assert main(["predict", "--run", config.out, *folder]) == DONE
    with Image.open(tmp_path / "masks" / "val_0000_mask.png") as mask:
        assert mask.size == (48, 40)
    capsys.readouterr()


def test_scores_while_training_come_from_the_cache(whole, tmp_path, monkeypatch):
    config, results = whole
    shutil.copytree(config.out, tmp_path / "run")
    calls = counted(monkeypatch)
    again = run(make_config(config.to_dict() | {"out": str(tmp_path / "run")}), resume=True, progress=False)
    assert again["last"] == results["last"]
    assert calls == [2]  # of the panel and the similarity maps, which show images


def test_pseudo_labels_and_their_masks_follow_the_features(scenes, tmp_path, monkeypatch):
    labeled = scenes / "ImageSets" / "Segmentation" / "demo" / "labeled.txt"
    for name in ("labeled.txt", "unlabeled.txt"):
        shutil.copy(labeled, tmp_path / name)
    options = {"partition": str(tmp_path), "measure_pseudo_labels": True, "steps": 2}
    draw, grids = trainer.cutmix_boxes, set()

    def drawn(count, grid, **more):
        grids.add(tuple(grid))
        return draw(count, grid, **more)

    monkeypatch.setattr(trainer, "cutmix_boxes", drawn)
    results = run(tiny(scenes, tmp_path / "run", **options), progress=False)
    assert grids == {(4, 5)}
    [quality] = [entry for entry in results["history"] if entry["kind"] == "pseudo"]
    assert quality["labeled_prediction"] > 0
    assert quality["unlabeled_pseudo"] > 0


def test_without_a_cache_the_frozen_backbone_sees_augmented_images(scenes, tmp_path, monkeypatch):
    calls = counted(monkeypatch)
    run(tiny(scenes, tmp_path / "run", cache_features=False, feature_crop=[], steps=2), progress=False)
    # Moments of 10 training images; 2 labelled, 2 weak, 2 strong in each step; scores of 3, panel and similarity of 2.
    assert calls == [10 + 2 * 6 + 3 + 2]
    assert not list(tmp_path.rglob("*.f16"))
    assert read(tmp_path / "run")["network"]["channel_std"].max() != 1


def test_a_run_says_that_its_backbone_is_random(whole, scenes, tmp_path, capsys):
    said = "note: weights: {}, so the backbone starts from random numbers".format
    run(tiny(scenes, tmp_path / "frozen", steps=1, variant="supervised"), progress=False)
    assert f"{said('random')}, and stays so: only the head is trained" in capsys.readouterr().out
    tuned = {"weights": "none", "freeze_backbone": False, "cache_features": False, "feature_crop": []}
    run(tiny(scenes, tmp_path / "tuned", steps=1, variant="supervised", **tuned), progress=False)
    assert f"{said('none')}, and is trained from scratch" in capsys.readouterr().out
    run(tiny(scenes, tmp_path / "tuned", steps=1, variant="supervised", **tuned), resume=True, progress=False)
    assert "note: weights" not in capsys.readouterr().out


def test_a_run_says_that_its_averaged_network_is_the_trained_one(scenes, tmp_path, capsys):
    said = "The averaged network is the trained one: Eq. 6 acts once an epoch, and this run has one"
    for steps, expected in ((3, True), (4, False)):
        config = tiny(scenes, tmp_path / f"run{steps}", momentum_network="on", steps=steps)
        (tmp_path / "options.yaml").write_text(yaml.safe_dump(config.to_dict()))
        assert main(["train", "--config", str(tmp_path / "options.yaml")]) == DONE
        assert (said in capsys.readouterr().out) == expected
