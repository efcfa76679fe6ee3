"""Statistics of a whole folder: made, used, written and read."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from dlprop import DerivativeLabelPropagation
from dlprop.affinity import Discriminant, Ridge
from dlprop.statistics import ClassStatistics
from examples.derprop_voc.__main__ import main
from examples.derprop_voc.choice import load_finished, with_propagation
from examples.derprop_voc.config import make_config
from examples.derprop_voc.errors import CheckpointError, ConfigError
from examples.derprop_voc.evaluate import probabilities
from examples.derprop_voc.pooled import (
    Images,
    Pooled,
    key_of,
    pool,
    pool_for,
    pooled_propagation,
    read_statistics,
    tau_of,
    write_statistics,
)
from examples.derprop_voc.scenes import CLASS_NAMES
from tests.example.finished import KEYS, FakeNetwork, confusion_iou, validation


def folder_of(count):
    """So many uint8 images of 8 x 10 pixels."""
    return [torch.randint(256, (3, 8, 10), dtype=torch.uint8) for _ in range(count)]


def outputs_by_hand(images, network):
    """Logits and features (N, K, M) on the features' grid, of all images."""
    with torch.no_grad():
        found = [network(image[None] / 255) for image in images]
    grids = [output.feats.shape[-2:] for output in found]
    logits = [
        F.interpolate(o.logits, g, mode="bilinear", align_corners=True) for o, g in zip(found, grids, strict=True)
    ]
    return [x.flatten(2) for x in logits], [output.feats.flatten(2) for output in found]


@pytest.mark.parametrize("tau", [0.0, 0.7])
def test_pooled_statistics_are_those_of_all_pixels_of_all_images(tau):
    images, network = folder_of(3), FakeNetwork()
    pooled = pool(network, images, 3, tau=tau, mode="original", window=0)
    logits, feats = (torch.cat(x, 2)[0].double() for x in outputs_by_hand(images, network))
    prior = logits.softmax(0).mean(1)
    torch.testing.assert_close(pooled.prior, prior, rtol=1e-5, atol=1e-7)
    if (
        tau
    ):  # adjusted on the images' own grid and only then brought to the features': linear, so the order is no matter
        logits = logits - tau * torch.log(prior + 1e-4)[:, None]
    P = logits.softmax(0)
    centred = feats - feats.mean(1, keepdim=True)
    wanted = {"counts": P.sum(1), "sums": P @ feats.T, "second": centred @ centred.T}
    for name, value in wanted.items():
        torch.testing.assert_close(getattr(pooled.statistics, name), value, rtol=1e-4, atol=1e-5)


def test_across_data_judges_an_image_by_all_pixels_and_counts_none_twice():
    images, network = folder_of(3), FakeNetwork()
    pooled = pool(network, images, 3, tau=0, mode="original", window=0)
    config = make_config({"affinity": "discriminant", "across": "data", "shrinkage": 0.3, "feature_channels": 6})
    alone = pooled_propagation(config, pooled)
    logits, feats = outputs_by_hand(images, network)
    together = DerivativeLabelPropagation(Discriminant(shrinkage=0.3))  # all images as one
    wanted = together(torch.cat(logits, 2), torch.cat(feats, 2), feats[1])
    torch.testing.assert_close(alone(logits[1], feats[1]), wanted, rtol=1e-4, atol=1e-5)

    added = pooled_propagation(replace(config, across="image"), pooled, add_own=True)
    twice = together(torch.cat([*logits, logits[1]], 2), torch.cat([*feats, feats[1]], 2), feats[1])
    torch.testing.assert_close(added(logits[1], feats[1]), twice, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(wanted, twice, atol=1e-2)
    leaning = pooled_propagation(replace(config, pseudo_counts=10.0), pooled).affinity
    assert (leaning.across, leaning.pseudo_counts, leaning.statistics) == ("image", 10.0, pooled.statistics)
    own = pooled_propagation(replace(config, across="image"), pooled)
    torch.testing.assert_close(own(logits[1], feats[1]), together(logits[1], feats[1]))


def test_adjusted_probabilities_stand_for_p_before_propagation():
    (image,), network = folder_of(1), FakeNetwork()
    prior, propagate = torch.tensor([0.7, 0.1, 0.2]), DerivativeLabelPropagation(Ridge())
    found = probabilities(network, propagate, image, adjust=Pooled(prior, 0.5, ClassStatistics(3, 6)).adjust)
    with torch.no_grad():
        output = network(image[None] / 255)
        logits = output.logits - 0.5 * torch.log(prior + 1e-4)[:, None, None]
        propagated = propagate(logits, output.feats).softmax(1)[0]
    torch.testing.assert_close(found["prediction"], output.logits.softmax(1)[0])
    torch.testing.assert_close(found["adjusted"], logits.softmax(1)[0])
    torch.testing.assert_close(found["propagated"], propagated)
    torch.testing.assert_close(found["blend"], (found["adjusted"] + propagated) / 2)


def test_with_propagation_takes_what_is_given_and_not_how_pseudo_labels_were_made():
    trained = {"affinity": "discriminant", "across": "data", "shrinkage": 0.3, "adjust": "prior", "tau": 0.9}
    run_config = make_config(trained | {"statistics_decay": 0.5})
    kept = with_propagation(run_config, {})
    assert (kept.across, kept.shrinkage, tau_of(kept)) == ("data", 0.3, 0)
    assert tau_of(with_propagation(run_config, {"tau": 0.25})) == 0.25
    assert tau_of(with_propagation(run_config, {"adjust": "prior", "tau": 0.25, "variant": "no_propagation"})) == 0.25
    assert tau_of(with_propagation(run_config, {"tau": 0})) == 0
    other = with_propagation(run_config, {"affinity": "ridge"})
    assert (other.across, other.shrinkage) == ("image", 0)
    supervised = make_config({"variant": "supervised"})
    assert with_propagation(supervised, {"affinity": "discriminant", "across": "data"}).across == "data"
    with pytest.raises(ConfigError, match="adjust: expected none or prior for a finished network, got temperature"):
        with_propagation(run_config, {"adjust": "temperature"})


DISCRIMINANT = ["--affinity", "discriminant", "--across", "data"]


@pytest.mark.slow
def test_statistics_of_a_folder_are_kept_read_and_used_alike(finished, scenes, tmp_path, capsys):
    kept, out = tmp_path / "kept.pt", tmp_path / "scores.json"
    where = ["--run", str(finished), "--data", str(scenes), "--out", str(out)]
    options = [*DISCRIMINANT, "--tau", "0.5"]
    assert main(["evaluate", *where, *options, "--write-statistics", str(kept)]) == 0
    text = capsys.readouterr().out
    assert "P adj." in text
    assert "propagated by discriminant across data. " in text
    made = json.loads(out.read_text())["checkpoints"]
    assert made[0]["propagation"] | {"affinity": "discriminant", "across": "data", "tau": 0.5} == made[0]["propagation"]
    both = ["--read-statistics", str(kept), "--write-statistics", str(kept.with_name("copy.pt"))]
    assert main(["evaluate", *where, *options, *both]) == 2
    assert "write_statistics: with read_statistics no pass is made" in capsys.readouterr().err
    assert main(["evaluate", *where, *options, "--read-statistics", str(kept)]) == 0
    assert json.loads(out.read_text())["checkpoints"] == made
    scores = made[0]["networks"]["averaged"]
    assert len({scores[key]["miou"] for key in ("prediction", "adjusted", "propagated", "blend")}) == 4
    assert main(["evaluate", *where, "--affinity", "discriminant", "--across", "image"]) == 0
    alone = json.loads(out.read_text())["checkpoints"][0]["networks"]["averaged"]
    assert (alone["prediction"], "adjusted" in alone) == (scores["prediction"], False)
    assert alone["propagated"] != scores["propagated"]

    images, truth = validation(scenes, tmp_path)
    for name, flags in (
        ("propagated", [*options, "--output", "propagated"]),
        ("blend", [*options, "--read-statistics", str(kept), "--output", "blend"]),
        ("adjusted", [*options, "--read-statistics", str(kept)]),
    ):
        folder = tmp_path / f"{name}_{len(flags)}"
        assert main(["predict", "--run", str(finished), "--images", str(images), "--out", str(folder), *flags]) == 0
        masks = [np.array(Image.open(folder / f"{stem}_mask.png")) for stem in truth]
        expected = confusion_iou(masks, list(truth.values()), len(CLASS_NAMES))
        assert scores[name]["miou"] == pytest.approx(np.nanmean(expected), abs=1e-6)

    grid = tmp_path / "grid.yaml"
    grid.write_text("both: {affinity: discriminant, across: data, tau: 0.5}\nplain: {affinity: discriminant}\n")
    assert main(["sweep", *where, "--grid", str(grid)]) == 0
    both, plain = json.loads(out.read_text())["rows"]
    assert {key: both[key] for key in KEYS} == {key: scores[key]["miou"] for key in KEYS}
    assert both["adjusted"] == scores["adjusted"]["miou"]
    assert (plain["propagated"], plain["tau"]) == (alone["propagated"]["miou"], 0)


def changed(content, **values):
    (key, entry), *_ = content["networks"].items()
    return content | {"networks": {key: entry | values}}


@pytest.fixture(scope="module")
def latest(finished):
    (item,) = load_finished([finished / "latest.pt"], torch.device("cpu"))
    return item


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x | {"classes": ["sky"]}, r"kept.pt: expected statistics of the classes background, .*, found sky"),
        (lambda x: changed(x, second=torch.zeros(4, 4)), r"second: expected finite numbers of shape \(8, 8\) for 6 cl"),
        (lambda x: changed(x, prior=torch.full((6,), np.nan)), r"prior: expected finite numbers of shape \(6,\)"),
        (lambda x: x | {"networks": {}}, "kept.pt: expected statistics of the averaged network of .*latest.pt, found"),
        (lambda x: {"counts": torch.zeros(3)}, "kept.pt: expected a file of --write-statistics, found another one"),
        (lambda x: changed(x, tau=0.2), "kept.pt: expected statistics made with tau 0, found 0.2"),
        (None, "kept.pt: damaged, or not a file of torch.save"),
    ],
)
def test_files_of_statistics_that_do_not_fit(latest, tmp_path, change, message):
    kept, C, D = tmp_path / "kept.pt", len(CLASS_NAMES), latest.config.feature_channels
    statistics = ClassStatistics(C, D)
    statistics.update(torch.randn(1, C, 4, 5), torch.randn(1, D, 4, 5))
    write_statistics(
        kept, {key_of(latest, "averaged"): Pooled(torch.full((C,), 1 / C), 0.0, statistics)}, CLASS_NAMES, 1
    )
    read = read_statistics(kept, latest, "averaged", 0.0).statistics
    assert all(torch.equal(mine, other) for mine, other in zip(read.buffers(), statistics.buffers(), strict=True))
    if change is None:
        content = bytearray(kept.read_bytes())
        content[len(content) // 2] ^= 255  # torch.load would not see it
        kept.write_bytes(content)
    else:
        torch.save(change(torch.load(kept, weights_only=True)), kept)
    with pytest.raises(CheckpointError, match=message):
        read_statistics(kept, latest, "averaged", 0.0)


def test_statistics_of_the_decoders_features_are_read(latest, tmp_path):
    options = {"propagation_features": "decoder", "decoder_channels": 12}
    of_decoder = replace(latest, config=replace(latest.config, **options))
    statistics, C = ClassStatistics(len(CLASS_NAMES), 12), len(CLASS_NAMES)
    pooled = Pooled(torch.full((C,), 1 / C), 0.0, statistics)
    write_statistics(tmp_path / "kept.pt", {key_of(of_decoder, "averaged"): pooled}, CLASS_NAMES, 1)
    assert read_statistics(tmp_path / "kept.pt", of_decoder, "averaged", 0.0).statistics.sums.shape == (C, 12)


def test_statistics_that_nothing_would_use_or_that_are_of_other_features(latest, tmp_path):
    ridge = with_propagation(latest.config, {"affinity": "ridge"})
    with pytest.raises(ConfigError, match="read_statistics: only --affinity discriminant and --tau use statistics"):
        pool_for(latest, "averaged", ridge, Images(lambda index: None, 0), read=tmp_path / "kept.pt")
    normalised = with_propagation(latest.config, {"affinity": "discriminant", "normalize": "l1"})
    pooled = Pooled(torch.ones(1), 0.0, ClassStatistics(1, 1))
    with pytest.raises(ConfigError, match="normalize: statistics are of features as they are, got l1"):
        pooled_propagation(normalised, pooled, add_own=True)


def test_a_file_with_other_options_than_those_of_propagation(finished, tmp_path, capsys):
    path = tmp_path / "config.yaml"
    path.write_text("lr: 1\n")
    assert main(["evaluate", "--run", str(finished), "--config", str(path)]) == 2
    assert "config: expected options of affinity, scale, " in capsys.readouterr().err
