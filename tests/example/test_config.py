"""The options: files, flags, defaults, and which do not fit together."""

import pytest
import yaml

from examples.derprop_voc.__main__ import main
from examples.derprop_voc.config import Config, make_config, read_yaml
from examples.derprop_voc.demo import CONFIGS
from examples.derprop_voc.errors import ConfigError
from tests.example.frozen_runs import FROZEN
from tests.example.options import TINY, flags


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lrr": 1}, r"unknown option lrr; did you mean lr\?"),
        ({"xyzzy": 1}, r"unknown option xyzzy; `train --help` lists them all"),
        ({"epochs": 0}, r"epochs: expected at least 1, got 0"),
        ({"steps": 1.5}, r"steps: expected int, got 1\.5"),
        ({"steps": True}, r"steps: expected int, got True"),
        ({"output_stride": 8.0}, r"output_stride: expected one of 8, 16, got 8\.0"),
        ({"lr": "fast"}, r"lr: expected a number, got 'fast'"),
        ({"lr": float("nan")}, r"lr: expected finite numbers, got nan"),
        ({"rectify": "yes"}, r"rectify: expected bool, got 'yes'"),
        ({"partition": 18}, r"partition: expected str \(in YAML, quote it\), got 18"),
        ({"variant": "best"}, r"variant: expected one of supervised, .*, full, got 'best'"),
        ({"variant": []}, r"variant: expected one of supervised"),
        ({"crop_size": 100}, r"crop_size: expected a multiple of output_stride = 8, or one more"),
        ({"crop_size": 328, "output_stride": 16}, r"crop_size: expected a multiple of output_stride = 16"),
        ({"output_stride": 4}, r"output_stride: expected one of 8, 16, got 4"),
        ({"timm_stages": [3, 1]}, r"timm_stages: expected two stages in rising order, got \[3, 1\]"),
        ({"image_size": [180]}, r"image_size: expected a height and a width, got \[180\]"),
        ({"image_size": 180}, r"image_size: expected a list, got 180"),
        ({"rescale": [0.5, float("inf")]}, r"rescale: expected finite numbers"),
        ({"atrous_rates": [1, 0]}, r"atrous_rates: expected at least 1, got \[1, 0\]"),
        ({"out": ""}, r"out: expected a folder, got an empty name"),
        ({"class_names": ["a", "b", "b"]}, r"class_names: expected different names, got a, b, b"),
        ({"rescale": [2, 1]}, r"rescale: expected two positive numbers in rising order"),
        ({"order_weights": []}, r"order_weights: expected a number for each order, got none"),
        (
            {"order_weights": [1, float("inf")]},
            r"order_weights: expected finite numbers, got \(1\.0, inf",
        ),
        (
            {"feature_channels": 4, "scheme": "sum", "max_order": 3},
            r"feature_channels: expected more than 4 .* order 4",
        ),
        (
            {"feature_channels": 4, "scheme": "laplacian", "variant": "supervised", "order_weights": [1, 1, 1]},
            r"feature_channels: expected more than 4 for differences of order 2 with scheme laplacian, got 4",
        ),
        ({"threshold": 1.1}, r"threshold: expected at most 1, got 1\.1"),
        ({"num_classes": 3, "class_names": ["a", "b"]}, r"class_names: expected num_classes = 3, got 2"),
        (
            {"affinity": "softmax", "scale": "mean"},
            r"scale: 'mean' applies to linear only, not to softmax; leave it at",
        ),
        ({"affinity": "ridge", "similarity": "cosine"}, r"similarity: 'cosine' applies to linear and softmax only"),
        ({"affinity": "discriminant", "balance": 1}, r"balance: 1\.0 applies to ridge only, not to discriminant"),
        (
            {"shrinkage": 0.1},
            r"shrinkage: 0\.1 applies to ridge and discriminant only, not to linear; leave it at 0\.0",
        ),
        ({"affinity": "softmax", "across": "batch"}, r"across: 'batch' applies to ridge and discriminant only"),
        ({"affinity": "ridge", "balance": 2}, r"balance: expected at most 1, got 2"),
        (
            {"affinity": "ridge", "order_weights": [0, 1]},
            r"order_weights: expected the first above 0 and none below for ridge, got \[0\.0, 1\.0\]",
        ),
    ],
)
def test_config_errors(options, message):
    with pytest.raises(ConfigError, match=message):
        make_config(options)


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


def test_config_reads_files_then_flags_and_round_trips(scenes, tmp_path):
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("lr: 1e-3\nsteps: 7\npartition: '1_8'\n")
    second.write_text("steps: 1\norder_weights: [1, 2]\n")
    out = tmp_path / "run"
    given = flags({name: value for name, value in TINY.items() if name != "steps"})
    arguments = ["train", "--config", str(first), str(second), f"--data={scenes}", f"--out={out}", *given]
    assert main([*arguments, "--variant", "supervised", "--no-nonnegative", "--rescale", "0.8", "1.25"]) == 0
    saved = yaml.safe_load((out / "config.yaml").read_text())
    assert (saved["lr"], saved["steps"], saved["order_weights"]) == (1e-3, 1, [1.0, 2.0])
    assert (saved["partition"], saved["nonnegative"], saved["rescale"]) == ("demo", False, [0.8, 1.25])
    assert make_config(saved).to_dict() == saved


def test_a_config_file_extends_one_beside_it(tmp_path):
    (tmp_path / "base.yaml").write_text("steps: 7\nlr: 0.5\n")
    (tmp_path / "mine.yaml").write_text("extends: base.yaml\nlr: 0.25\n")
    assert read_yaml(tmp_path / "mine.yaml") == {"steps": 7, "lr": 0.25}
    (tmp_path / "mine.yaml").write_text("extends: none.yaml\n")
    with pytest.raises(ConfigError, match=r"none.yaml: No such file"):
        read_yaml(tmp_path / "mine.yaml")
    for name in ("camvid", "voc_animals", "idd_lite"):
        config = make_config(read_yaml(CONFIGS / f"{name}_frozen.yaml"))
        assert config.cache_features
        assert config.affinity == "discriminant"  # one for all runs, so that the scores of their P~ compare


def test_shipped_configs_are_valid():
    paths = sorted(CONFIGS.glob("*.yaml"))
    assert paths
    for path in paths:
        make_config(read_yaml(path))


def test_defaults_are_the_papers():
    config = Config()
    assert (config.weight_ce, config.weight_kl, config.weight_der, config.eta) == (0.5, 0.25, 0.5, 0.5)
    assert (config.affinity, config.scale, config.average_every) == ("linear", "sum", "epoch")
    assert (config.order_weights, config.max_order) == ((1.0, 1.0), 1)
    assert (config.threshold, config.threshold_momentum, config.average_momentum) == (0.85, 0.999, 0.5)
