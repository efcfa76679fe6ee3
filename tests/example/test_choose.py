"""The example's `choose`: its scores against loops and against `evaluate`, its decision, and what it refuses."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from examples.derprop_voc import choose as command
from examples.derprop_voc.__main__ import main
from examples.derprop_voc.choice import load_finished
from examples.derprop_voc.choose import CONTROL, P, Setting, choose_setting, config_of, make_settings, markdown
from examples.derprop_voc.config import make_config, read_yaml
from examples.derprop_voc.data import load_data
from examples.derprop_voc.errors import DataError
from examples.derprop_voc.evaluate import confusion, gain, mean_iou
from examples.derprop_voc.scenes import write_scenes
from examples.derprop_voc.train import run
from tests.example.frozen_runs import UNCACHED

SETTINGS = [
    Setting(P, {}),
    Setting(CONTROL, {"tau": 0.5}),
    Setting("discriminant", {"affinity": "discriminant", "across": "data", "shrinkage": 0.1}),
    Setting("both", {"affinity": "discriminant", "across": "data", "shrinkage": 0.3, "tau": 0.5}),
    Setting("mean", {"affinity": "discriminant", "across": "data", "shrinkage": 0.3, "tau": 0.5}, is_blend=True),
]


def literal_miou(matrix):
    """In percent, over classes in truth or prediction."""
    found = []
    for c in range(len(matrix)):
        union = matrix[c].sum() + matrix[:, c].sum() - matrix[c, c]
        if union:
            found.append(matrix[c, c] / union)
    return 100 * sum(found) / len(found)


def test_confusions_and_gains_are_counts_and_a_jackknife():
    rng = np.random.default_rng(0)
    truth, labels = rng.integers(0, 4, (2, 5, 6)), rng.integers(0, 3, (2, 5, 6))
    truth[0, 0] = 255
    matrices = np.zeros((2, 4, 4), int)
    for image in range(2):
        for true, label in zip(truth[image].ravel(), labels[image].ravel(), strict=True):
            if true != 255:
                matrices[image, true, label] += 1
        found = confusion(torch.from_numpy(labels[image]), torch.from_numpy(truth[image].astype(np.uint8)), 4)
        np.testing.assert_array_equal(found, matrices[image])
    assert mean_iou(matrices[0]) == pytest.approx(literal_miou(matrices[0]))

    one, other = rng.integers(0, 20, (2, 7, 3, 3))
    left = [literal_miou(np.delete(one, i, 0).sum(0)) - literal_miou(np.delete(other, i, 0).sum(0)) for i in range(7)]
    difference = literal_miou(one.sum(0)) - literal_miou(other.sum(0))
    error = np.sqrt(6 / 7 * sum((x - np.mean(left)) ** 2 for x in left))
    assert gain(one, other) == (pytest.approx(difference), pytest.approx(error))


def images_with(share, count=24, spread=0.0):
    """Confusion matrices of images of which so much is right, up to a spread that alternates."""
    right = [1000 * share + (spread if i % 2 else -spread) for i in range(count)]
    return np.array([[[r, 1000 - r], [1000 - r, r]] for r in right])


@pytest.mark.parametrize(
    ("shares", "chosen", "reason"),
    [
        (
            (0.5, 0.6, 0.7, 0.65, 0.6),
            "discriminant, shrinkage 0.1",
            "above the best control, logit adjustment, tau 0.5",
        ),
        (
            (0.5, 0.6, 0.7, 0.65, 0.8),
            "mean, shrinkage 0.3, tau 0.5",
            "above the best control, logit adjustment, tau 0.5",
        ),
        ((0.5, 0.6, 0.6, 0.55, 0.5), "logit adjustment, tau 0.5", "Nothing that propagates beats the best control"),
        ((0.6, 0.5, 0.55, 0.55, 0.5), "P", "Nothing that propagates beats the best control (P) by 2 standard errors"),
        ((0.6, 0.601, 0.55, 0.55, 0.5), "P", "so P stays as it is"),
    ],
)
def test_what_propagates_has_to_beat_the_control_by_two_standard_errors(shares, chosen, reason):
    # The last setting of all is far from the others on every second image, so that nothing is certain of it.
    spreads = (0, 40, 0, 0, 0)
    found = {
        setting.name: images_with(share, spread=spread)
        for setting, share, spread in zip(SETTINGS, shares, spreads, strict=True)
    }
    result = choose_setting(SETTINGS, found)
    assert result["chosen"] == chosen
    assert reason in result["reason"]
    text = markdown(result | {"images": 24})
    assert f"Chosen: {chosen}." in text
    assert ("So few images" in text) is False


def test_every_setting_is_a_file_for_training():
    settings = make_settings()
    assert len({setting.name for setting in settings}) == len(settings)
    for setting in settings:
        config = make_config(config_of(setting))
        assert config.propagates == setting.propagates
        assert (config.adjust == "prior") == (setting.tau > 0)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The data and a supervised run."""
    data, out = tmp_path_factory.mktemp("scenes"), tmp_path_factory.mktemp("run")
    write_scenes(data, labeled=2, unlabeled=2, val=3, size=(32, 40), seed=1)
    run(
        make_config(UNCACHED | {"data": str(data), "out": str(out), "variant": "supervised", "steps": 1}),
        progress=False,
    )
    return data, out


def test_choose_scores_what_evaluate_does_and_its_file_is_taken(finished, tmp_path, monkeypatch, capsys):
    data, out = finished
    monkeypatch.setattr(command, "make_settings", lambda: SETTINGS)
    val = data / "ImageSets" / "Segmentation" / "val.txt"
    assert main(["choose", "--run", str(out), "--images", str(val), "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "choose.json").read_text())
    assert (result["images"], list(result["rows"])) == (3, [setting.name for setting in SETTINGS])
    output = next(setting.output for setting in SETTINGS if setting.name == result["chosen"])
    assert f"predict with --output {output}, too" in capsys.readouterr().out
    assert "| P | " in (tmp_path / "choose.md").read_text()
    outputs = [setting.output for setting in SETTINGS]
    assert outputs == ["prediction", "prediction", "propagated", "propagated", "blend"]
    assert [row["output"] for row in result["rows"].values()] == outputs
    for setting, output in zip(SETTINGS, outputs, strict=True):
        key = "adjusted" if setting.tau and not setting.propagates else output
        flags = [part for name, value in setting.options.items() for part in (f"--{name}", str(value))]
        scores = tmp_path / "scores.json"
        assert main(["evaluate", "--run", str(out), *flags, "--out", str(scores)]) == 0
        expected = json.loads(scores.read_text())["checkpoints"][0]["networks"]["trained"][key]["miou"]
        assert result["rows"][setting.name]["miou"] == pytest.approx(100 * expected, abs=1e-4)
    assert result["rows"]["P"]["gain"] == 0
    chosen = tmp_path / "chosen.yaml"
    make_config(read_yaml(chosen))
    assert main(["evaluate", "--run", str(out), "--config", str(chosen), "--out", str(tmp_path / "chosen.json")]) == 0


def test_choose_refuses_images_the_network_was_trained_on(finished, tmp_path, capsys):
    data, out = finished
    partition = data / "ImageSets" / "Segmentation" / "demo"
    names = (data / "ImageSets" / "Segmentation" / "val.txt").read_text() + (partition / "labeled.txt").read_text()
    mixed, single = tmp_path / "mixed.txt", tmp_path / "single.txt"
    mixed.write_text(names)
    single.write_text(names.split()[0])

    def refused(*options):
        assert main(["choose", "--run", str(out), "--out", str(tmp_path / "out"), *options]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    first = (partition / "labeled.txt").read_text().split()[0]
    error = refused("--images", str(mixed))
    assert "expected images that the network was not trained on, found 2 of " in error
    assert f"labeled.txt, {first} the first" in error
    other = tmp_path / "other"  # a partition in which the run's own images are not labelled
    other.mkdir()
    (other / "labeled.txt").write_text(names.split()[0])
    error = refused("--images", str(partition / "labeled.txt"), "--partition", str(other))
    assert f"{partition / 'labeled.txt'}, {first} the first" in error
    classes = (data / "classes.txt").read_text().split()
    (data / "classes.txt").write_text("\n".join(classes[::-1]))
    error = refused("--images", str(data / "ImageSets" / "Segmentation" / "val.txt"))
    (data / "classes.txt").write_text("\n".join(classes))
    assert f"class_names: {out / 'latest.pt'} was made with {classes}, found {classes[::-1]}" in error
    assert "images: expected two images at least, to tell a gain from chance, got 1" in refused("--images", str(single))
    assert "none.txt: expected a list of images, found no such file" in refused("--images", str(tmp_path / "none.txt"))
    assert not (tmp_path / "out").exists()


def test_choose_refuses_a_run_whose_lists_have_changed(finished, tmp_path, capsys):
    data, out = finished
    lists = data / "ImageSets" / "Segmentation" / "demo"
    labeled = (lists / "labeled.txt").read_text()
    (lists / "labeled.txt").write_text(labeled.splitlines()[0] + "\n")
    try:
        code = main(
            ["choose", "--run", str(out), "--images", str(lists.parent / "val.txt"), "--out", str(tmp_path / "out")]
        )
    finally:
        (lists / "labeled.txt").write_text(labeled)
    stderr = capsys.readouterr().err
    assert (code, "the lists of demo have changed since" in stderr) == (2, True), stderr


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ("no_propagation", r"not trained on, found 2 of .*unlabeled.txt"),
        ("supervised", r"expected the mask of unlabeled_0000.png"),  # the demo's have none
    ],
)
def test_unlabelled_images_count_as_trained_on_where_they_were_read(finished, variant, message):
    data, out = finished
    (item,) = load_finished([out / "latest.pt"], torch.device("cpu"))
    config = replace(item.config, variant=variant)
    item = replace(item, config=config, lists=load_data(config).digest)
    with pytest.raises(DataError, match=message):
        command.held_out(item, data / "ImageSets" / "Segmentation" / "demo" / "unlabeled.txt", {})
