"""The example's `shift`: the map of classes by hand, groups, and the command against `evaluate` and the library."""

import json

import numpy as np
import pytest
import torch

from dlprop import DerivativeLabelPropagation
from dlprop.affinity import Discriminant
from examples.derprop_voc import shift as command
from examples.derprop_voc.__main__ import main
from examples.derprop_voc.choice import load_finished
from examples.derprop_voc.config import make_config, read_yaml
from examples.derprop_voc.errors import ConfigError
from examples.derprop_voc.scenes import CLASS_NAMES, write_scenes
from examples.derprop_voc.shift import ClassMap, find_images, forward, groups_of, make_map, markdown, measure
from examples.derprop_voc.train import run
from tests.example.frozen_runs import UNCACHED

SOURCE, TARGET = ("road", "pole", "fence", "sky"), ("drivable", "object", "sky", "animal")
VALUES = {
    "source": {"road": "drivable", "pole": "object", "fence": "object"},
    "target": {"drivable": "drivable", "object": "object"},
}


def test_probabilities_and_masks_are_mapped_as_by_hand():
    classes = make_map(VALUES, SOURCE, TARGET)
    assert classes.names == ("drivable", "object")
    P = torch.tensor([0.3, 0.25, 0.25, 0.2])
    found = classes.probabilities(P.log()[None, :, None, None])
    torch.testing.assert_close(found[0, :, 0, 0], torch.tensor([0.3, 0.5]))  # pole or fence beats road; sky is left out
    assert classes.ids[torch.tensor([0, 1, 2, 3, 255])].tolist() == [0, 1, 255, 255, 255]
    same = make_map({}, SOURCE, SOURCE)
    assert torch.equal(same.merge, torch.eye(4))
    assert same.ids[:5].tolist() == [0, 1, 2, 3, 255]
    # Without `target` the masks' classes keep their names.
    whole = make_map({"source": dict(zip(SOURCE, ("a", "b", "b", "c"), strict=True))}, SOURCE, ("c", "a", "b"))
    assert whole.names == ("c", "a", "b")
    assert whole.merge.tolist() == [[0, 0, 0, 1], [1, 0, 0, 0], [0, 1, 1, 0]]


def test_the_map_of_camvid_to_idd_names_every_class():
    values = read_yaml(command.Path(command.__file__).parent / "configs" / "maps" / "camvid_to_idd.yaml")
    camvid = read_yaml(command.Path(command.__file__).parent / "configs" / "camvid_frozen.yaml")["class_names"]
    target = ("drivable", "non-drivable", "living thing", "vehicle", "roadside object", "far object", "sky")
    classes = make_map(values, camvid, target)
    assert classes.names == target
    assert classes.merge.sum(0).tolist() == [1] * 11
    assert classes.merge.sum(1).tolist() == [1, 1, 2, 1, 3, 2, 1]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "map: the network has the classes road, pole, fence, sky, the data drivable, .*; map them with --map"),
        ({"from": {}}, "map: expected the keys source and target, got from"),
        ({"source": {"tree": "object"}}, "map: source: expected classes among road, pole, fence, sky, got tree"),
        ({"source": ["road"]}, "map: source: expected 'class: common class' lines, got"),
        ({"source": {"road": "street"}}, "map: source: expected common classes of the masks, drivable, .*, got street"),
        ({"source": {"road": "drivable"}}, "map: no class of the network counts as object, sky, animal; leave"),
    ],
)
def test_maps_that_do_not_fit(values, message):
    with pytest.raises(ConfigError, match=message):
        make_map(values, SOURCE, TARGET)


def test_groups_are_consecutive_and_the_last_may_be_smaller():
    assert groups_of(6, 4) == [slice(0, 4), slice(4, 6)]
    assert groups_of(6, 0) == [slice(0, 6)]
    assert groups_of(6, 1) == [slice(i, i + 1) for i in range(6)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The data and a run."""
    data, out = tmp_path_factory.mktemp("scenes"), tmp_path_factory.mktemp("run")
    write_scenes(data, labeled=2, unlabeled=2, val=6, size=(32, 40), seed=1)
    run(
        make_config(UNCACHED | {"data": str(data), "out": str(out), "variant": "supervised", "steps": 1}),
        progress=False,
    )
    return data, out


def test_each_group_is_judged_by_its_own_statistics(trained):
    _, out = trained
    (finished,) = load_finished([out / "latest.pt"], torch.device("cpu"))
    images, classes = find_images(finished, "", (), 0, {})
    with torch.no_grad():
        found = measure(images, classes, tau=0.5, shrinkage=0.2)
        together = DerivativeLabelPropagation(Discriminant(shrinkage=0.2, across="batch"))
        outputs = [forward(images, index) for index in range(6)]
        for size, name in ((1, "each image"), (4, "4 images"), (6, "all images")):
            counts, of_mean = np.zeros_like(found["P"]), np.zeros_like(found["P"])
            for part in groups_of(6, size):
                logits, feats = (torch.cat(x) for x in zip(*outputs[part], strict=True))
                for own, logit, item in zip(logits, together(logits, feats), images.items[part], strict=True):
                    truth = torch.from_numpy(command.read_mask(item))
                    counts += command.confusion(logit.max(0).indices, truth, len(classes.names))
                    mean = (own.softmax(0) + logit.softmax(0)) / 2
                    of_mean += command.confusion(mean.max(0).indices, truth, len(classes.names))
            if size != 1:  # the same by the library's own way of leaning on a batch
                alone = DerivativeLabelPropagation(Discriminant(shrinkage=0.2, pseudo_counts=command.PSEUDO_COUNTS))
                leaning = np.zeros_like(found["P"])
                for part in groups_of(6, size):
                    out = alone(*(torch.cat(x) for x in zip(*outputs[part], strict=True)))
                    for logit, item in zip(out, images.items[part], strict=True):
                        truth = torch.from_numpy(command.read_mask(item))
                        leaning += command.confusion(logit.max(0).indices, truth, len(classes.names))
                row = f"discriminant, each image leaning on {'all' if size == 6 else size}"
                assert np.abs(found[row] - leaning).sum() <= 4
            # A pixel or two may be a tie that rounding decides.
            assert np.abs(found[f"discriminant, {name}"] - counts).sum() <= 4
            assert np.abs(found[f"mean of P and discriminant, {name}"] - of_mean).sum() <= 4
            assert np.abs(counts - of_mean).sum() > 8


def test_shift_agrees_with_evaluate_and_goes_on(trained, tmp_path, capsys, monkeypatch):
    data, out = trained
    call = ["shift", "--runs", str(out), "--out", str(tmp_path), "--threads", "1"]
    assert main(call) == 0
    printed = capsys.readouterr().out
    assert printed.strip() == (tmp_path / "shift.md").read_text().strip()
    figures = json.loads((tmp_path / "shift.json").read_text())["figures"][out.name]
    scores = tmp_path / "scores.json"
    options = ["--affinity", "discriminant", "--across", "data", "--out", str(scores)]
    assert main(["evaluate", "--run", str(out), *options]) == 0
    expected = json.loads(scores.read_text())["checkpoints"][0]["networks"]["trained"]
    # The cached features are float16.
    assert figures["miou"]["P"] == pytest.approx(100 * expected["prediction"]["miou"], abs=0.3)
    assert figures["miou"]["discriminant, all images"] == pytest.approx(100 * expected["propagated"]["miou"], abs=0.3)

    # The same data from elsewhere, under merged names; classes.txt comes first.
    command_line = [*call[:3], "--out", str(tmp_path / "mapped"), "--data", str(data), "--threads", "1"]
    merged = tmp_path / "map.yaml"
    merged.write_text(f"source: {dict.fromkeys(CLASS_NAMES, 'all')}\ntarget: {dict.fromkeys(CLASS_NAMES, 'all')}\n")
    capsys.readouterr()
    if (data / "classes.txt").is_file():
        (data / "classes.txt").unlink()
    assert main([*command_line, "--map", str(merged)]) == 2
    assert "classes.txt: expected the classes that --map names, found none" in capsys.readouterr().err
    (data / "classes.txt").write_text("".join(f"{name}\n" for name in CLASS_NAMES))
    assert main([*command_line, "--map", str(merged)]) == 0
    assert set(json.loads((tmp_path / "mapped" / "shift.json").read_text())["figures"][out.name]["miou"].values()) == {
        100.0
    }

    monkeypatch.setattr(command, "measure", lambda *_, **__: pytest.fail("measured again"))
    capsys.readouterr()
    assert main(call) == 0
    assert capsys.readouterr().out == printed
    assert main([*call, "--tau", "0.7"]) == 2
    assert "holds results of other runs or options" in capsys.readouterr().err
    assert main([*call, "--shrinkage", "-1"]) == 2
    assert "shrinkage: expected a number of at least 0, got -1" in capsys.readouterr().err


def test_the_table_has_paired_differences_over_networks():
    def of_run(p, adapted):
        return {"trained": "a", "tested": "b", "images": 4, "classes": ["x"], "miou": {"P": p, "adapted": adapted}}

    result = {"call": {"tau": 0.5, "shrinkage": 0.1}, "figures": {"one": of_run(10, 11), "two": of_run(20, 24)}}
    text = markdown(result)
    assert "### a to b: 4 images, 1 classes, networks: 2" in text
    assert "| P | 15.00 |  |" in text
    assert "| adapted | 17.50 | +2.50 ± 1.50 |" in text
    assert ClassMap(("x",), torch.ones(1, 1), torch.zeros(256)).names == ("x",)
