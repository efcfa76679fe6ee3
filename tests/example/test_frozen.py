"""The training example on a frozen backbone: its network, its cache of features, and runs on them."""

import fcntl
import json
import os
import shutil
import threading

import pytest
import torch
import yaml
from PIL import Image
from torchvision import tv_tensors

from examples.derprop_voc import cache, progress, train
from examples.derprop_voc.__main__ import DONE, main
from examples.derprop_voc.augment import AugmentFeatures, to_input
from examples.derprop_voc.cache import cache_place, fill_cache, read_cache
from examples.derprop_voc.config import ConfigError, make_config, read_yaml
from examples.derprop_voc.data import load_data, read_image
from examples.derprop_voc.demo import CONFIGS
from examples.derprop_voc.frozen import FrozenNetwork, make_network
from examples.derprop_voc.model import SegmentationNetwork
from examples.derprop_voc.scenes import CLASS_NAMES, write_scenes
from examples.derprop_voc.train import Trainer, run
from tests.example.options import TINY

FROZEN = TINY | {
    "backbone": "timm/test_efficientnet",
    "timm_stages": [],
    "freeze_backbone": True,
    "weights": "random",
    "cache_features": True,
    "feature_crop": [4, 5],
    "threshold": 0.2,
    "confidence": "fixed",
    "variant": "no_derivative_loss",
    "affinity": "discriminant",
    "steps": 5,
    "lr": 0.05,
    "threads": 1,
}
CHANNELS = 24 + 32 + 48 + 64  # of stages 1 to 4
HALF = 2**-11  # the relative error of float16


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes")
    write_scenes(root, labeled=4, unlabeled=6, val=3, size=(40, 48), seed=1)
    return root


@pytest.fixture
def network():
    torch.manual_seed(0)
    return make_network(make_config(FROZEN), len(CLASS_NAMES)).eval()


@pytest.fixture
def files(scenes, tmp_path, network):
    """Config, items and place of a cache in a folder of the test's own."""
    config = make_config(FROZEN | {"data": str(scenes), "cache_dir": str(tmp_path / "cache")})
    data = load_data(config)
    items = [*data.labeled, *data.unlabeled, *data.val]
    return config, items, cache_place(config, items, network)


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


def counted(monkeypatch, stop=None):
    """The number of images that a backbone has seen, in a list; the call after `stop` images is interrupted."""
    original, calls = FrozenNetwork.backbone_features, [0]

    def counting(self, images):
        if calls[0] == stop:
            raise KeyboardInterrupt
        calls[0] += len(images)
        return original(self, images)

    monkeypatch.setattr(FrozenNetwork, "backbone_features", counting)
    return calls


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
    network = make_network(make_config(FROZEN), 3).train()
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"freeze_backbone": False, "timm_stages": [1, 3]}, "cache_features: .* add --freeze-backbone"),
        ({"backbone": "resnet50"}, "backbone: expected timm/<name> with freeze_backbone"),
        ({"cache_features": False}, "feature_crop: applies to cached features only; add --cache-features"),
        ({"feature_crop": [3]}, r"feature_crop: expected a height and a width, got \[3\]"),
        ({"timm_stages": [1, 3, 2]}, r"timm_stages: expected stages in rising order, got \[1, 3, 2\]"),
        (
            {"freeze_backbone": False, "cache_features": False, "timm_stages": [1, 2, 3]},
            "expected two stages in rising",
        ),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(ConfigError, match=message):
        make_config(FROZEN | options)


# --- cache -----------------------------------------------------------------------------------------------------------


def test_cached_features_are_those_of_the_images_in_half_precision(files, network, capsys):
    config, items, place = files
    fill_cache(place, config, items, network, progress=False)
    assert f"{place.path}: features of 13 images" in capsys.readouterr().out
    cached = read_cache(place)
    assert len(cached) == 13
    assert place.path.stat().st_size == 13 * 2 * CHANNELS * 5 * 6
    for item in items:
        expected = network.backbone_features(to_input(read_image(item.image))[None])[0]
        assert cached[item.image].dtype == torch.float16
        torch.testing.assert_close(cached[item.image].float(), expected, rtol=HALF, atol=1e-7)


def test_a_filled_cache_is_not_computed_again(files, network, monkeypatch):
    config, items, place = files
    fill_cache(place, config, items[:5], network, progress=False)
    calls = counted(monkeypatch)
    fill_cache(place, config, items[2:], network, progress=False)
    assert calls == [8]
    fill_cache(place, config, items, network, progress=False)
    assert calls == [8]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_killed_process_loses_only_what_the_index_does_not_name(files, network, monkeypatch, workers):
    config, items, place = files
    whole = place.path.with_name("whole.f16")
    fill_cache(place, config, items, network, progress=False)
    place.path.rename(whole)
    place.path.with_suffix(".json").unlink()
    config = make_config(config.to_dict() | {"workers": workers})
    monkeypatch.setattr(cache, "INDEX_EVERY", 4)
    with monkeypatch.context() as patch:
        counted(patch, stop=10)
        with pytest.raises(KeyboardInterrupt):
            fill_cache(place, config, items, network, progress=False)
    with place.path.open("ab") as stream:
        stream.write(b"\x00" * 777)  # the beginning of a row
    assert len(read_cache(place)) == 8
    calls = counted(monkeypatch)
    fill_cache(place, config, items, network, progress=False)
    assert calls == [5]
    assert place.path.read_bytes() == whole.read_bytes()


def test_rows_are_on_the_disk_before_the_index_names_them(files, network, monkeypatch):
    config, items, place = files
    events, sync, write = [], os.fsync, cache.write_json

    def synced(descriptor):
        events.append(os.fstat(descriptor).st_size // (2 * CHANNELS * 5 * 6))
        sync(descriptor)

    def written(path, values):
        assert events[-1] == len(values["rows"])
        write(path, values)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(cache, "write_json", written)
    monkeypatch.setattr(cache, "INDEX_EVERY", 4)
    fill_cache(place, config, items, network, progress=False)
    assert {4, 8, 12, 13} <= set(events)


def test_a_stale_image_is_named_and_computed_again(files, network, monkeypatch, tmp_path, capsys):
    config, items, _ = files
    shutil.copytree(config.data, tmp_path / "data")
    config = make_config(config.to_dict() | {"data": str(tmp_path / "data")})
    items = load_data(config).labeled
    place = cache_place(config, items, network)
    fill_cache(place, config, items, network, progress=False)
    before = read_cache(place)
    kept = before[items[0].image].clone(), before[items[1].image].clone()
    with Image.open(items[1].image) as image:
        image.transpose(Image.Transpose.FLIP_TOP_BOTTOM).save(items[1].image)
    capsys.readouterr()
    calls = counted(monkeypatch)
    fill_cache(place, config, items, network, progress=False)
    assert calls == [1]
    assert f"{place.path}: stale: 1 images have changed, {items[1].image} the first" in capsys.readouterr().out
    after = read_cache(place)
    expected = network.backbone_features(to_input(read_image(items[1].image))[None])[0]
    torch.testing.assert_close(after[items[1].image].float(), expected, rtol=HALF, atol=1e-7)
    assert torch.equal(after[items[0].image], kept[0])
    assert torch.equal(before[items[1].image], kept[1])  # a run that reads the old row goes on with it
    fill_cache(place, config, [*items, *load_data(config).unlabeled], network, progress=False)
    torch.testing.assert_close(read_cache(place)[items[1].image].float(), expected, rtol=HALF, atol=1e-7)


@pytest.mark.parametrize("damage", ["cut", "index", "gone"])
def test_a_torn_cache_is_named_and_computed_again(files, network, monkeypatch, capsys, damage):
    config, items, place = files
    fill_cache(place, config, items, network, progress=False)
    whole, index = place.path.read_bytes(), place.path.with_suffix(".json")
    if damage == "cut":
        place.path.write_bytes(whole[: len(whole) * 2 // 3])
    elif damage == "index":
        index.write_text(index.read_text()[:-40])
    else:
        place.path.unlink()
    capsys.readouterr()
    calls = counted(monkeypatch)
    fill_cache(place, config, items, network, progress=False)
    lines = capsys.readouterr().out.splitlines()
    named = {
        "cut": "torn: 5 of 13 images are cut off",
        "index": f"torn: {index} is no index",
        "gone": "torn: 13 of 13 images are cut off",
    }
    assert lines[0].startswith(f"{place.path}: {named[damage]}")
    assert calls == [5 if damage == "cut" else 13]
    assert place.path.read_bytes() == whole


def test_another_network_or_size_has_another_file(files, network):
    config, items, place = files
    assert cache_place(config, items[:1], network) == place  # not of the list: partitions share a file
    paths = {place.path}
    for options in (
        {"image_size": [32, 48]},
        {"image_size": [48, 48]},
        {"image_size": [48, 48], "output_stride": 16},
        {"timm_stages": [2, 4]},
        {"seed": 1},  # other random weights
    ):
        other = make_config(config.to_dict() | {"feature_crop": []} | options)
        torch.manual_seed(other.seed)
        paths.add(cache_place(other, items, make_network(other, 3)).path)
    assert len(paths) == 6


def test_a_second_process_waits_for_the_first(files, network, capsys):
    config, items, place = files
    place.path.parent.mkdir()
    second = threading.Thread(target=fill_cache, args=(place, config, items, network), kwargs={"progress": False})
    with place.path.open("ab") as first:
        fcntl.flock(first, fcntl.LOCK_EX)
        second.start()
        second.join(0.3)
        assert second.is_alive()
        assert place.path.stat().st_size == 0
    second.join(20)
    assert len(read_cache(place)) == 13
    assert f"{place.path}: waiting for another process" in capsys.readouterr().out


def test_features_beyond_half_precision_are_refused(files, network, monkeypatch):
    config, items, place = files
    original = FrozenNetwork.backbone_features
    monkeypatch.setattr(FrozenNetwork, "backbone_features", lambda self, images: original(self, images) * 1e9)
    with pytest.raises(ConfigError, match=f"features of {items[0].image.resolve()} do not fit float16"):
        fill_cache(place, config, items, network, progress=False)
    assert not place.path.with_suffix(".json").exists()


def test_sizes_that_cannot_be_cached_are_refused(files, network, tmp_path):
    config, items, _ = files

    def place(**options):
        return cache_place(make_config(config.to_dict() | options), items, network)

    with pytest.raises(
        ConfigError, match=r"image_size: expected multiples of output_stride = 8 .* try --image-size 32 48"
    ):
        place(image_size=[30, 50])
    with pytest.raises(
        ConfigError, match=r"feature_crop: expected at most the grid of features, \[5, 6\], got \[4, 7\]"
    ):
        place(feature_crop=[4, 7])
    Image.new("RGB", (64, 40)).save(tmp_path / "wide.png")
    items = [*items, type(items[0])("wide", tmp_path / "wide.png", tmp_path / "none.png")]
    with pytest.raises(ConfigError, match=r"image_size: .* images have several sizes: .* 40 48, .*wide.png 40 64"):
        place()
    assert place(image_size=[40, 48]).shape == (CHANNELS, 5, 6)


# --- augmentation ----------------------------------------------------------------------------------------------------


def grid_sample(h=5, w=6):
    """Features that say where they stand, and a mask that says in which feature's cell a pixel is."""
    place = torch.arange(h * w, dtype=torch.float16).view(1, h, w)
    mask = tv_tensors.Mask(place[0].to(torch.uint8).repeat_interleave(8, 0).repeat_interleave(8, 1))
    return {"image": place, "mask": mask, "valid": tv_tensors.Mask(torch.ones_like(mask))}


def test_crops_and_flips_keep_masks_on_their_features():
    augment = AugmentFeatures(make_config(FROZEN), torch.zeros(1, 1, 1), strong=False)
    corners, flips = set(), set()
    for seed in range(60):
        torch.manual_seed(seed)
        sample = augment(grid_sample())
        assert sample["image"].shape == (1, 4, 5)
        assert sample["mask"].shape == sample["valid"].shape == (32, 40)
        assert torch.equal(sample["mask"], sample["image"][0].repeat_interleave(8, 0).repeat_interleave(8, 1))
        corners.add(int(sample["image"].min()))
        flips.add(bool(sample["image"][0, 0, 0] > sample["image"][0, 0, 1]))
    assert corners == {0, 1, 6, 7}
    assert flips == {False, True}
    whole = AugmentFeatures(make_config(FROZEN | {"feature_crop": []}), torch.zeros(1, 1, 1), strong=False)
    assert whole(grid_sample())["image"].shape == (1, 5, 6)


def test_the_strong_view_lacks_channels_and_keeps_the_mean():
    mean = torch.arange(400.0).view(-1, 1, 1) / 100
    features = (mean + torch.randn(400, 5, 6, generator=torch.Generator().manual_seed(0))).half()
    config = make_config(FROZEN | {"channel_dropout": 0.25, "feature_crop": []})
    sample = AugmentFeatures(config, mean, strong=True)(grid_sample() | {"image": features})
    assert set(sample) == {"weak", "strong", "mask", "valid"}
    weak, strong = sample["weak"].float() - mean, sample["strong"].float() - mean
    dropped = strong.abs().amax((1, 2)) < 0.01
    assert 0.15 < dropped.float().mean() < 0.35
    torch.testing.assert_close(strong[~dropped], weak[~dropped] / 0.75, rtol=0, atol=0.01)


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
    found, expected = (read(out) for out in (tmp_path / "run", train.Path(config.out)))
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
    network = read(train.Path(config.out))["network"]
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
    draw, grids = train.cutmix_boxes, set()

    def drawn(count, grid, **more):
        grids.add(tuple(grid))
        return draw(count, grid, **more)

    monkeypatch.setattr(train, "cutmix_boxes", drawn)
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


def test_a_cache_lies_in_the_data_unless_it_is_put_elsewhere(scenes, network):
    config = make_config(FROZEN | {"data": str(scenes)})
    assert cache_place(config, load_data(config).val, network).path.parent == scenes / "cache"


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({}, "pseudo-labels: P and P~ blended by Eq. 5; P~ by affinity discriminant, chosen by --affinity: balances"),
        (
            {"affinity": "linear"},
            "P~ by affinity linear, the default: Eq. 4, the paper's; on real images it costs points",
        ),
        ({"rectify": False}, "pseudo-labels: P itself (no_rectify); P~ by affinity discriminant"),
        ({"variant": "no_propagation"}, "pseudo-labels: P itself (variant no_propagation)"),
        ({"variant": "supervised"}, "labelled images only; no pseudo-labels"),
    ],
)
def test_a_run_says_what_makes_its_pseudo_labels(options, line):
    assert line in train.method(make_config(FROZEN | options))


def test_a_run_says_that_its_backbone_is_random(whole, scenes, tmp_path, capsys):
    said = "note: weights: random, so the backbone starts from random numbers"
    run(tiny(scenes, tmp_path / "frozen", steps=1, variant="supervised"), progress=False)
    assert f"{said}, and stays so: only the head is trained" in capsys.readouterr().out
    said = said.replace("random,", "none,")
    tuned = {"weights": "none", "freeze_backbone": False, "cache_features": False, "feature_crop": []}
    run(tiny(scenes, tmp_path / "tuned", steps=1, variant="supervised", **tuned), progress=False)
    assert f"{said}, and is trained from scratch" in capsys.readouterr().out
    run(tiny(scenes, tmp_path / "tuned", steps=1, variant="supervised", **tuned), resume=True, progress=False)
    assert said not in capsys.readouterr().out


def test_a_run_says_that_its_averaged_network_is_the_trained_one(scenes, tmp_path, capsys):
    said = "The averaged network is the trained one: Eq. 6 acts once an epoch, and this run has one"
    for steps, expected in ((3, True), (4, False)):
        config = tiny(scenes, tmp_path / f"run{steps}", momentum_network="on", steps=steps)
        (tmp_path / "options.yaml").write_text(yaml.safe_dump(config.to_dict()))
        assert main(["train", "--config", str(tmp_path / "options.yaml")]) == DONE
        assert (said in capsys.readouterr().out) == expected


def test_a_config_file_extends_one_beside_it(tmp_path):
    (tmp_path / "base.yaml").write_text("steps: 7\nlr: 0.5\n")
    (tmp_path / "mine.yaml").write_text("extends: base.yaml\nlr: 0.25\n")
    assert read_yaml(tmp_path / "mine.yaml") == {"steps": 7, "lr": 0.25}
    (tmp_path / "mine.yaml").write_text("extends: none.yaml\n")
    with pytest.raises(ConfigError, match=r"none.yaml: No such file"):
        read_yaml(tmp_path / "mine.yaml")
    for name in ("camvid", "voc_animals", "idd_lite"):
        assert make_config(read_yaml(CONFIGS / f"{name}_frozen.yaml")).cache_features


def test_progress_in_a_file_is_a_line_at_a_time(monkeypatch, capsys):
    monkeypatch.setattr(progress, "EVERY", 0)
    with progress.make_bar(3, "steps", initial=1) as bar:
        bar.set_postfix({"loss": "0.5"}, refresh=False)
        bar.update()
        bar.update()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == ["steps: 1 of 3", "steps: 2 of 3", "steps: 3 of 3"]
    assert lines[1].endswith("loss=0.5")
    monkeypatch.setattr(progress, "EVERY", 10)
    with progress.make_bar(3, "steps", leave=True) as bar:
        bar.update(3)
    assert capsys.readouterr().err == ""  # done in less than ten seconds
    monkeypatch.setattr(progress, "EVERY", 0)
    progress.make_bar(3, "steps", progress=False).update()
    assert capsys.readouterr().err == ""
