"""The cache of a frozen backbone's features: what is computed again, what is lost, what is refused."""

import fcntl
import os
import shutil
import threading

import pytest
import torch
from PIL import Image

from examples.derprop_voc import cache
from examples.derprop_voc.augment import to_input
from examples.derprop_voc.cache import cache_place, fill_cache, read_cache
from examples.derprop_voc.config import make_config
from examples.derprop_voc.data import load_data, read_image
from examples.derprop_voc.errors import ConfigError
from examples.derprop_voc.frozen import FrozenNetwork, make_network
from tests.example.frozen_runs import CHANNELS, FROZEN, counted

HALF = 2**-11  # the relative error of float16


@pytest.fixture
def files(scenes, tmp_path, network):
    """Config, items and place of a cache in a folder of the test's own."""
    config = make_config(FROZEN | {"data": str(scenes), "cache_dir": str(tmp_path / "cache")})
    data = load_data(config)
    items = [*data.labeled, *data.unlabeled, *data.val]
    return config, items, cache_place(config, items, network)


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


def test_a_cache_lies_in_the_data_unless_it_is_put_elsewhere(scenes, network):
    config = make_config(FROZEN | {"data": str(scenes)})
    assert cache_place(config, load_data(config).val, network).path.parent == scenes / "cache"
