"""Sparse labels made dense: the method, the folder command, and the measurement of what it is worth."""

import argparse
import json
import shutil

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch.nn import functional as F

from examples.derprop_voc import clicks, image_features, measuring
from examples.derprop_voc import complete as completing
from examples.derprop_voc.__main__ import BAD_INPUT, DONE, main
from examples.derprop_voc.augment import to_input
from examples.derprop_voc.choice import add_machine_arguments, load_finished
from examples.derprop_voc.complete import Clicks, Completion, classify, dense_labels, only_labelled
from examples.derprop_voc.config import make_config
from examples.derprop_voc.data import VOID, load_data, read_image
from examples.derprop_voc.image_features import add_features_arguments, make_describe, standardised
from examples.derprop_voc.panels import class_colours
from examples.derprop_voc.scenes import CLASS_NAMES, make_scene
from examples.derprop_voc.train import run
from tests.example.frozen_runs import FROZEN
from tests.tolerances import assert_close


def sparse_labels(size, *pixels):
    labels = torch.full(size, VOID, dtype=torch.uint8)
    for row, column, label in pixels:
        labels[row, column] = label
    return labels


# ---------------------------------------------------------------------------------------------------------------------
# The method


def test_completion_by_the_book():
    """Every step in NumPy, on a grid whose points are the pixels."""
    torch.manual_seed(0)
    feats, logits = torch.randn(1, 3, 4, 5, dtype=torch.float64), torch.randn(1, 2, 4, 5, dtype=torch.float64)
    labels = sparse_labels((4, 5), (0, 1, 0), (2, 3, 1), (3, 0, 1))
    actual = Completion(sharpness=7.0, position=0.3, steps=2)(feats.float(), labels, logits.float())

    V = feats[0].reshape(3, -1).numpy()
    V = V / np.linalg.norm(V, axis=0)
    rows, columns = (x.ravel() for x in np.mgrid[0:4, 0:5])
    places = np.stack([columns / 4 * 5 / 4, rows / 3])
    clicked = [1, 13, 15]
    squares = ((V[:, clicked, None] - V[:, None]) ** 2).sum(0)
    squares += 0.09 * ((places[:, clicked, None] - places[:, None]) ** 2).sum(0)
    shares = np.exp(-3.5 * squares)
    shares /= shares.sum(0)
    L = logits[0].reshape(2, -1).numpy()
    for _ in range(2):
        P = np.exp(L) / np.exp(L).sum(0)
        L = L + (np.array([[1.0, 0, 0], [0, 1, 1]]) - P[:, clicked]) @ shares
    assert_close(actual, L.reshape(1, 2, 4, 5), "propagation")


def test_a_click_where_the_network_is_right_changes_nothing():
    logits = torch.full((1, 3, 6, 6), -20.0)
    logits[:, 0, :3] = logits[:, 1, 3:] = 20.0
    right = sparse_labels((48, 48), (2, 3, 0), (45, 40, 1))
    feats = torch.randn(1, 4, 6, 6)
    assert_close(Completion()(feats, right, logits), logits.double().numpy(), "propagation")
    wrong = sparse_labels((48, 48), (2, 3, 2), (45, 40, 1))
    assert (Completion()(feats, wrong, logits) - logits)[0, 2].max() > 1


def test_pixels_take_the_label_of_the_click_they_look_like():
    """Two kinds of pixels and no network; where a label was given it stays."""
    kind = torch.rand(9, 7) > 0.5
    kind[0, 0], kind[8, 6] = True, False
    feats = F.one_hot(kind.long(), 2).permute(2, 0, 1)[None].float()
    labels, zeros = sparse_labels((9, 7), (0, 0, 4), (8, 6, 2)), torch.zeros(1, 5, 9, 7)
    dense = dense_labels(Completion(position=0.0)(feats, labels, zeros), labels)
    assert torch.equal(dense, torch.where(kind, 4, 2))
    assert torch.equal(dense_labels(classify(feats, labels, 5), labels), dense)
    labels[4, 4] = 3
    assert dense_labels(Completion()(feats, labels, zeros), labels)[4, 4] == 3


def test_classes_without_a_label_are_ruled_out():
    """In the start and in what becomes of it, whatever the network thinks of them."""
    logits = torch.randn(1, 4, 6, 6)
    logits[:, 1] += 50
    labels = sparse_labels((48, 48), (2, 3, 2), (45, 40, 0), (7, 8, 2))
    start = only_labelled(logits, Clicks(labels))
    assert torch.equal(start[:, [0, 2]], logits[:, [0, 2]])
    assert (start.softmax(1)[:, [1, 3]] == 0).all()
    dense = dense_labels(Completion()(torch.randn(1, 4, 6, 6), labels, start), labels)
    assert set(dense.unique().tolist()) == {0, 2}


def test_features_are_standardised_over_the_image():
    x = standardised(5 + 3 * torch.randn(1, 4, 20, 30, dtype=torch.float16))
    assert_close(x.mean((2, 3)), np.zeros((1, 4)), "large mean")
    assert_close(x.std((2, 3), correction=0), np.ones((1, 4)), "large mean")


# ---------------------------------------------------------------------------------------------------------------------
# Draws of labels


def test_drawn_labels_are_true_and_as_many_as_asked_for():
    truth = torch.zeros(30, 40, dtype=torch.uint8)
    truth[10:20, 5:35], truth[0, :3], truth[25:] = 1, 2, VOID
    for amount in clicks.AMOUNTS:
        drawn = clicks.draw_labels(truth, amount, np.random.default_rng(0))
        known = drawn != VOID
        assert torch.equal(drawn[known], truth[known])
        counts = [int((drawn == label).sum()) for label in range(3)]
        if amount == "stroke":
            assert 10 <= counts[1] <= 32  # the rectangle is 10 by 30
            assert counts[2] == 3
        else:
            assert counts == [min(int(amount), n) for n in (10_000, 10_000, 3)]
        assert torch.equal(drawn, clicks.draw_labels(truth, amount, np.random.default_rng(0)))


# ---------------------------------------------------------------------------------------------------------------------
# The commands


@pytest.fixture(scope="module")
def trained(scenes, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "supervised"
    config = make_config(FROZEN | {"data": str(scenes), "out": str(out), "variant": "supervised", "affinity": "linear"})
    run(config)
    return out


@pytest.fixture
def folders(scenes, tmp_path):
    """Two images and their labels at a few pixels."""
    images, labels = tmp_path / "images", tmp_path / "labels"
    images.mkdir(), labels.mkdir()
    for path in sorted((scenes / "JPEGImages").iterdir())[:2]:
        (images / path.name).write_bytes(path.read_bytes())
        sparse = sparse_labels((40, 48), (3, 4, 0), (30, 20, 1))
        Image.fromarray(sparse.numpy()).save(labels / f"{path.stem}.png")
    return images, labels, tmp_path / "out"


def complete(folders, *options):
    images, labels, out = folders
    places = ("--images", str(images), "--labels", str(labels), "--out", str(out))
    return main(["complete", *places, "--threads", "1", *options])


def test_a_folder_with_a_run(folders, trained, pictures, capsys):
    assert complete(folders, "--run", str(trained)) == DONE
    assert "2 images" in capsys.readouterr().out
    images, _, out = folders
    names = {f"{path.stem}_{kind}.png" for path in images.iterdir() for kind in ("mask", "overlay")}
    assert {path.name for path in out.iterdir()} == names | {"legend.png"}
    for path in out.glob("*_mask.png"):
        mask = np.array(Image.open(path))
        assert mask.shape == (40, 48)
        assert (mask[3, 4], mask[30, 20]) == (0, 1)
    colours = np.round(255 * class_colours(CLASS_NAMES)).astype(np.uint8)
    for path in out.glob("*_overlay.png"):  # clicks are opaque there, and have a white edge
        shown = np.array(Image.open(path))
        assert (shown[28:33, 18:23] == colours[1]).all()
        assert (shown[27, 17:24] == 255).all()
        assert (shown[1:6, 2:7] == colours[0]).all()


def test_only_labelled_changes_where_the_network_starts(folders, trained, pictures, monkeypatch):
    monkeypatch.setattr(
        completing, "only_labelled", lambda logits, clicks: 0 * logits + 50 * torch.eye(6)[5, :, None, None]
    )
    for options, is_there in (((), False), (("--only-labelled",), True)):
        assert complete(folders, "--run", str(trained), *options) == DONE
        found = [np.unique(Image.open(path)) for path in folders[2].glob("*_mask.png")]
        assert all((5 in ids) == is_there for ids in found)


def test_enlarged_images_add_to_what_the_network_says(folders, trained):
    """Features of the larger image; logits, on their grid, the mean of those of both sizes."""
    images, labels, _ = folders
    path = sorted(images.iterdir())[0]
    parser = argparse.ArgumentParser()
    add_features_arguments(parser)
    add_machine_arguments(parser)

    def described(*options):
        arguments = parser.parse_args(["--run", str(trained), "--accelerator", "cpu", *options])
        with torch.no_grad():
            return make_describe(arguments, 5, labels)[2](path)

    (feats, logits), (finer, both) = described("--enlarge", "1"), described("--enlarge", "2")
    assert torch.equal(described()[0], finer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(image_features, "SMALL", 40 * 48 - 1)
        assert torch.equal(described()[0], feats)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(image_features, "FrozenNetwork", str)  # as if the backbone had been trained
        assert torch.equal(described()[0], feats)
    assert (feats.shape[-2:], finer.shape[-2:]) == ((5, 6), (10, 12))
    finished = load_finished([trained / "latest.pt"], torch.device("cpu"))[0]
    with torch.no_grad():
        larger = finished.network("tested")(to_input(read_image(path, (80, 96)))[None])
    assert_close(finer, larger.feats.double().numpy(), "propagation")
    parts = [F.interpolate(x.double(), (10, 12), mode="bilinear", align_corners=True) for x in (logits, larger.logits)]
    assert_close(both, ((parts[0] + parts[1]) / 2).numpy(), "propagation")


def test_a_folder_with_a_backbone_alone(folders, tmp_path, pictures):
    weights = tmp_path / "weights.pt"
    torch.save(timm.create_model("test_efficientnet").state_dict(), weights)
    assert complete(folders, "--backbone", "timm/test_efficientnet", "--weights", str(weights)) == DONE
    masks = [np.array(Image.open(path)) for path in folders[2].glob("*_mask.png")]
    assert len(masks) == 2
    assert all(set(np.unique(mask)) <= {0, 1} for mask in masks)


def test_what_a_folder_may_lack(folders, trained, capsys):
    _, labels, out = folders
    first = sorted(labels.iterdir())[0]
    whole = first.read_bytes()

    def refused(*options, message):
        assert complete(folders, *options) == BAD_INPUT
        assert message in capsys.readouterr().err
        assert not out.exists()

    refused(message="weights: expected a file or timm for a frozen backbone")
    refused("--only-labelled", message="only_labelled: without a run there are no other classes")
    refused("--run", str(trained), "--backbone", "timm/resnet10t", message="backbone: a run has its own")
    refused("--run", str(trained), "--sharpness", "inf", message="sharpness, position, steps: expected numbers above 0")
    refused("--run", str(trained), "--steps", "0", message="steps: expected")
    Image.fromarray(np.full((40, 48), VOID, np.uint8)).save(first)
    refused("--run", str(trained), message=f"{first}: expected at least one labelled pixel")
    Image.fromarray(np.zeros((40, 48), np.uint8)).save(first)
    assert complete(folders, "--run", str(trained)) == 0
    assert f"note: {first} labels every pixel" in capsys.readouterr().out
    shutil.rmtree(out)
    Image.fromarray(np.zeros((40, 47), np.uint8)).save(first)
    refused("--run", str(trained), message=f"{first}: expected the image's size 48x40")
    Image.fromarray(np.full((40, 48), 77, np.uint8)).save(first)
    refused("--run", str(trained), message=f"{labels}: expected labels 0 to 5")
    first.unlink()
    refused("--run", str(trained), message=f"{first}: expected the mask")
    first.write_bytes(whole)


def test_the_measurement(scenes, trained, tmp_path, monkeypatch, capsys):
    """Settings are chosen, an interrupted call goes on without measuring twice, and the table names every method."""
    call = ["clicks", "--runs", str(trained), "--out", str(tmp_path), "--threads", "1"]
    assert main(call) == BAD_INPUT
    assert "masks for some unlabelled images" in capsys.readouterr().err
    for index in range(6):  # the scenes that were written as unlabelled, with their truth
        _, mask = make_scene(np.random.default_rng((1, 1, index)), (40, 48))
        Image.fromarray(mask).save(scenes / "SegmentationClass" / f"unlabeled_{index:04d}.png")
    monkeypatch.setattr(clicks, "AMOUNTS", ("1", "stroke"))
    monkeypatch.setattr(clicks, "DRAWS", 2)
    few = {name: (row, settings[:1]) for name, (row, settings) in clicks.grids().items()}
    few["corrected"] = ("network corrected by attention", clicks.grids()["corrected"][1][:2])
    few["label spreading"][1][0]["neighbors"] = 3
    monkeypatch.setattr(clicks, "grids", lambda: few)
    assert main(call) == DONE
    table = (tmp_path / "clicks.md").read_text()
    assert table in capsys.readouterr().out
    result = json.loads((tmp_path / "clicks.json").read_text())
    assert len(result["chosen"]["corrected"]["tried"]) == 2
    figures = result["figures"]["supervised"]
    assert all(f"| {method} |" in table for method in figures["1/0"])
    assert figures["1/0"]["network alone"] == figures["stroke/1"]["network alone"]
    assert figures["1/0"]["network alone, both sizes"] != figures["1/0"]["network alone"]
    assert len(result["larger"]) == 14

    def never(*_):
        raise AssertionError("measured twice")

    monkeypatch.setattr(clicks, "score", never)
    assert main(call) == DONE
    assert json.loads((tmp_path / "clicks.json").read_text()) == result


def test_the_error_of_a_mean_is_of_networks_and_draws():
    rng = np.random.default_rng(0)
    networks, draws = rng.normal(size=(4, 1)), rng.normal(size=(1, 3))
    error = {name: x.std(ddof=1) / x.size**0.5 for name, x in (("networks", networks), ("draws", draws))}
    assert clicks.error_of_crossed(networks + 0 * draws) == pytest.approx(error["networks"])
    assert clicks.error_of_crossed(0 * networks + draws) == pytest.approx(error["draws"])
    assert clicks.error_of_crossed(networks + draws) == pytest.approx(np.hypot(*error.values()))
    assert clicks.error_of_crossed(draws) == pytest.approx(error["draws"])
    # Of noise alone about that of as many independent values.
    noise = [clicks.error_of_crossed(rng.normal(size=(20, 20))) for _ in range(50)]
    assert np.mean(noise) == pytest.approx(1 / 20, rel=0.1)


def test_settings_are_chosen_on_images_that_were_not_labelled(scenes, trained):
    """A published list may hold an image twice, labelled and not."""
    lists = scenes / "ImageSets" / "Segmentation" / "demo"
    unlabeled = (lists / "unlabeled.txt").read_text()
    labeled = (lists / "labeled.txt").read_text()
    (lists / "unlabeled.txt").write_text(unlabeled + labeled)
    for name in unlabeled.split():
        Image.fromarray(np.zeros((40, 48), np.uint8)).save(scenes / "SegmentationClass" / f"{name}.png")
    (finished,) = load_finished([trained / "latest.pt"], torch.device("cpu"))
    chosen = measuring.make_images(finished, chosen=True)
    (lists / "unlabeled.txt").write_text(unlabeled)
    for name in unlabeled.split():
        (scenes / "SegmentationClass" / f"{name}.png").unlink()
    assert [item.name for item in chosen.items] == unlabeled.split()


def test_results_of_another_call_are_not_gone_on_from(scenes, trained, tmp_path, monkeypatch, capsys):
    """Neither two runs of one name, nor other options or weights than those that the file was begun with."""
    measured = []
    monkeypatch.setattr(
        clicks, "make_images", lambda run, **options: measuring.images_of(run, load_data(run.config).val)
    )
    monkeypatch.setattr(clicks, "choose", lambda sizes: {"chosen": {}})
    monkeypatch.setattr(clicks, "methods", lambda num_classes, settings: {})
    monkeypatch.setattr(clicks, "score", lambda sizes, *_: measured.append(sizes.own.name) or {"network alone": 1.0})
    monkeypatch.setattr(clicks, "GAINS", ())

    def call(*runs, images=0):
        return main(["clicks", "--runs", *map(str, runs), "--images", str(images), "--out", str(tmp_path / "out")])

    twin = tmp_path / "elsewhere" / trained.name
    shutil.copytree(trained, twin)
    assert call(trained, twin) == BAD_INPUT
    assert f"different names, by which results are kept, got {trained.name} twice" in capsys.readouterr().err
    assert not measured
    other = twin.rename(tmp_path / "other")
    checkpoint = torch.load(other / "latest.pt", weights_only=True)
    elsewhere = tmp_path / "elsewhere" / scenes.name
    torch.save(checkpoint | {"config": checkpoint["config"] | {"data": str(elsewhere)}}, other / "latest.pt")
    assert call(trained, other) == BAD_INPUT
    assert f"data sets of different names, by which results are kept, got {scenes} and {elsewhere}" in (
        capsys.readouterr().err
    )
    torch.save(checkpoint, other / "latest.pt")
    assert call(trained, other) == DONE
    assert set(measured) == {trained.name, "other"}
    for refused in (lambda: call(trained, other, images=2), lambda: call(trained)):
        assert refused() == BAD_INPUT
        assert "holds results of other runs or options" in capsys.readouterr().err
    torch.save(checkpoint | {"step": checkpoint["step"] + 1}, other / "latest.pt")
    assert call(trained, other) == BAD_INPUT
    (tmp_path / "out" / "clicks.json").write_text("{")
    assert call(trained, other) == BAD_INPUT
    assert "clicks.json is no whole JSON file" in capsys.readouterr().err
