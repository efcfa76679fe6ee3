"""The training example's evaluation: window modes, scores over a data set, and the commands that score and predict."""

import argparse
import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from torch.nn import functional as F

from dlprop import DerivativeLabelPropagation
from dlprop.affinity import Discriminant, Ridge, Softmax
from dlprop.statistics import ClassStatistics
from examples.derprop_voc.__main__ import main
from examples.derprop_voc.augment import to_input
from examples.derprop_voc.choice import add_source_arguments, checkpoint_files, load_finished, with_propagation
from examples.derprop_voc.config import ConfigError, make_config
from examples.derprop_voc.data import Data, read_image
from examples.derprop_voc.evaluate import _middle, _windows, evaluate, predict, probabilities
from examples.derprop_voc.files import CheckpointError, write_checkpoint
from examples.derprop_voc.losses import make_propagation
from examples.derprop_voc.model import Output
from examples.derprop_voc.panels import class_colours
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
from examples.derprop_voc.predict_folder import list_images
from examples.derprop_voc.scenes import CLASS_NAMES, write_scenes
from examples.derprop_voc.state import make_state
from examples.derprop_voc.sweep import make_settings
from examples.derprop_voc.train import run
from tests.example.options import TINY

KEYS = ("prediction", "propagated", "blend")


class FakeNetwork(nn.Module):
    """Three classes whose logits depend on the pixel, on its place in the window and on the window's content."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[3.0, -1, 0], [-2, 2, 1], [0, 1, -3]]))

    def forward(self, x):
        height, width = x.shape[-2:]
        logits = torch.einsum("ck,nkhw->nchw", self.weight, x)
        logits[:, 0] += torch.linspace(-1, 1, height)[:, None]
        logits[:, 1] += torch.linspace(0, 2, width)
        logits[:, 2] += x.mean()
        return Output(logits, F.avg_pool2d(torch.cat([x, 1 - x], 1), 2))


class RedNetwork(nn.Module):
    """Class 1 where the image is red, with certainty."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(40.0))

    def forward(self, x):
        red = self.weight * (x[:, :1] - 0.5)
        return Output(torch.cat([-red, red], 1), x)


def confusion_iou(predicted, truth, count):
    """IoU of every class over all images, NaN for absent ones, by counting pixels."""
    matrix = np.zeros((count, count), int)
    for labels, target in zip(predicted, truth, strict=True):
        known = target != 255
        np.add.at(matrix, (target[known], labels[known]), 1)
    union = matrix.sum(0) + matrix.sum(1) - matrix.diagonal()
    return np.where(union > 0, matrix.diagonal() / np.maximum(union, 1), np.nan)


# --- windows ---------------------------------------------------------------------------------------------------------


@given(size=st.integers(1, 3000), window=st.integers(2, 900))
def test_windows_cover_every_pixel_and_overlap_by_a_third(size, window):
    windows = _windows(size, window)
    assert windows[0].start == 0
    assert windows[-1].stop == size
    assert {part.stop - part.start for part in windows} == {min(size, window)}
    overlaps = [left.stop - right.start for left, right in pairwise(windows)]
    assert all(window > overlap >= window / 3 for overlap in overlaps)
    # One window fewer would leave a step above two thirds.
    assert len(windows) < 3 or (size - window) / (len(windows) - 2) > 2 * window // 3


@given(size=st.integers(1, 3000), window=st.integers(1, 900))
def test_middle_has_equal_margins(size, window):
    middle = _middle(size, window)
    assert middle.stop - middle.start == min(size, window)
    assert 0 <= (size - middle.stop) - middle.start <= 1


def test_sliding_windows_against_a_loop_over_pixels():
    image = torch.randint(256, (3, 13, 10), dtype=torch.uint8)
    network, propagate = FakeNetwork(), DerivativeLabelPropagation()
    found = probabilities(network, propagate, image, mode="sliding_window", window=6)
    rows, columns = [0, 4, 7], [0, 4]  # the starts of windows of 6, written out
    with torch.no_grad():
        outputs = {}
        for top in rows:
            for left in columns:
                output = network(image[None, :, top : top + 6, left : left + 6] / 255)
                p, propagated = output.logits.softmax(1), propagate(output.logits, output.feats).softmax(1)
                outputs[top, left] = dict(zip(KEYS, (p[0], propagated[0], (p + propagated)[0] / 2), strict=True))
    for key in KEYS:
        expected = torch.zeros(3, 13, 10)
        for y in range(13):
            for x in range(10):
                over = [
                    values[key][:, y - top, x - left]
                    for (top, left), values in outputs.items()
                    if 0 <= y - top < 6 and 0 <= x - left < 6
                ]
                expected[:, y, x] = sum(over) / len(over)
        torch.testing.assert_close(found[key], expected)
    assert not torch.allclose(found["prediction"], found["propagated"], atol=1e-2)
    whole = probabilities(network, propagate, image)
    assert not torch.allclose(found["prediction"], whole["prediction"], atol=1e-2)


def test_one_sliding_window_is_the_original_and_a_wide_crop_too():
    image = torch.randint(256, (3, 12, 10), dtype=torch.uint8)
    network, propagate = FakeNetwork(), DerivativeLabelPropagation()
    whole = probabilities(network, propagate, image)
    for mode in ("sliding_window", "center_crop"):
        same = probabilities(network, propagate, image, mode=mode, window=12)
        for key in KEYS:
            assert torch.equal(same[key], whole[key])


def test_blend_is_the_mean_and_its_own_labels():
    image = torch.randint(256, (3, 8, 8), dtype=torch.uint8)
    network, propagate = FakeNetwork(), DerivativeLabelPropagation(Softmax(normalize=None))
    values = probabilities(network, propagate, image)
    output = network(image[None] / 255)
    torch.testing.assert_close(values["prediction"], output.logits.softmax(1)[0].detach())
    torch.testing.assert_close(values["propagated"], propagate(output.logits, output.feats).softmax(1)[0].detach())
    torch.testing.assert_close(values["blend"], (values["prediction"] + values["propagated"]) / 2)
    labels = predict(network, propagate, image, (8, 8))
    for key in KEYS:
        assert torch.equal(labels[key], values[key].argmax(0))
    assert not torch.equal(labels["blend"], labels["prediction"])
    assert not torch.equal(labels["blend"], labels["propagated"])


@pytest.mark.parametrize("stored", [1, 2])
def test_center_crop_scores_the_crop_alone(stored):
    """The prediction is right inside the middle 8 x 8 pixels and wrong outside; masks are stored at 1 or 2 times."""
    truth = (torch.arange(16)[:, None] < 6).expand(16, 20).long()
    red = ~truth.bool()
    red[4:12, 6:14] = truth[4:12, 6:14].bool()
    image = torch.zeros(3, 16, 20, dtype=torch.uint8)
    image[0] = 255 * red
    mask = truth.repeat_interleave(stored, 0).repeat_interleave(stored, 1)
    data = [{"image": image, "mask": mask}]

    def miou(**options):
        scores = evaluate({"it": RedNetwork()}, DerivativeLabelPropagation(), data, ["no", "yes"], **options)
        return scores["it"]["prediction"]

    crop = miou(mode="center_crop", window=8)
    if stored == 1:
        assert crop["miou"] == 1
        assert miou(mode="center_crop", window=10)["miou"] < 1
    assert crop["accuracy"] > 0.9  # the line between the classes moves by less than a working pixel
    assert miou(mode="original")["accuracy"] < 0.4


def test_scores_are_over_the_data_set_and_ignore_void():
    first, second = torch.zeros(8, 8, dtype=torch.long), torch.ones(8, 8, dtype=torch.long)
    first[0], second[:4] = 1, 255
    images = [torch.zeros(3, 8, 8, dtype=torch.uint8), torch.zeros(3, 8, 8, dtype=torch.uint8)]
    images[1][0, :6] = 255
    data = [{"image": image, "mask": mask} for image, mask in zip(images, (first, second), strict=True)]
    names = ["no", "yes", "never"]

    class Wide(RedNetwork):
        def forward(self, x):
            output = super().forward(x)
            return Output(F.pad(output.logits, (0, 0, 0, 0, 0, 1), value=-99.0), output.feats)

    network = Wide().train()
    scores = evaluate({"it": network}, DerivativeLabelPropagation(), data, names)["it"]["prediction"]
    assert not network.training
    # Of 56 zeros, all found, with 8 + 16 false ones; of 8 + 32 ones, 16 found.
    assert scores["iou"] == {"no": pytest.approx(56 / 80), "yes": pytest.approx(16 / 40), "never": None}
    assert scores["miou"] == pytest.approx((56 / 80 + 16 / 40) / 2)
    assert scores["accuracy"] == pytest.approx(72 / 96)


# --- commands --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes")
    write_scenes(root, labeled=2, unlabeled=2, val=3, size=(40, 48), seed=1)
    return root


def write_state(path, config, scenes, *, step, seed):
    """A checkpoint of networks whose predictions name several classes, and whose average is another network."""
    torch.manual_seed(seed)
    state = make_state(config, len(CLASS_NAMES), torch.device("cpu"), 10, initialise=False)
    # An untrained network has nearly the same features everywhere: whiten them, so that several classes win.
    names = (scenes / "ImageSets" / "Segmentation" / "val.txt").read_text().split()
    images = torch.stack([read_image(scenes / "JPEGImages" / f"{name}.png", (32, 40)) for name in names])
    classifier, seen = state.network.classifier, []
    handle = classifier.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].double()))
    with torch.no_grad():
        state.network.eval()(to_input(images))
        handle.remove()
        fused = seen[0].movedim(1, 0).flatten(1)
        values, vectors = torch.linalg.eigh(torch.cov(fused))
    for _ in range(2):
        weight = 2 * torch.randn(len(CLASS_NAMES), len(fused)).double() @ (vectors / (values + 1e-12).sqrt()).T
        with torch.no_grad():
            classifier.weight.copy_(weight[:, :, None, None])
            classifier.bias.copy_(-weight @ fused.mean(1))
        if state.averager and not state.averager.n_averaged:
            state.averager.update(state.network)
    state.step = step
    write_checkpoint(path, state.to_dict(config, Data([], [], [], CLASS_NAMES), epoch=step // 2, precision={}))


@pytest.fixture(scope="module")
def finished(scenes, tmp_path_factory):
    """A run folder with latest.pt and best.pt, whose data has moved since; it works at another size than is stored."""
    out = tmp_path_factory.mktemp("run")
    options = {"data": "moved/away", "out": str(out), "image_size": [32, 40]}
    # Propagation that does not make all pixels alike.
    options |= {"affinity": "softmax", "similarity": "cosine", "normalize": "none", "order_weights": [20, 20]}
    config = make_config(TINY | options)
    with torch.random.fork_rng():
        write_state(out / "latest.pt", config, scenes, step=10, seed=1)
        write_state(out / "best.pt", config, scenes, step=6, seed=2)
    return out


def validation(scenes, tmp_path):
    """The validation images in a folder of their own, and their masks."""
    names = (scenes / "ImageSets" / "Segmentation" / "val.txt").read_text().split()
    folder = tmp_path / "images"
    folder.mkdir()
    for name in names:
        (folder / f"{name}.png").write_bytes((scenes / "JPEGImages" / f"{name}.png").read_bytes())
    (folder / "notes.txt").write_text("no image")
    return folder, {name: np.array(Image.open(scenes / "SegmentationClass" / f"{name}.png")) for name in names}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "network", "mode"),
    [("latest", "trained", "original"), ("best", "averaged", "original"), ("latest", "tested", "sliding_window")],
)
def test_evaluate_and_predict_agree_through_a_confusion_matrix(finished, scenes, tmp_path, capsys, file, network, mode):
    out = tmp_path / "scores.json"
    options = ["--mode", mode, "--window", "24"]
    assert main(["evaluate", "--run", str(finished), "--data", str(scenes), "--out", str(out), *options]) == 0
    text, results = capsys.readouterr().out, json.loads(out.read_text())
    assert "P~: the same logits propagated by softmax. " in text
    assert (results["mode"], results["images"], results["classes"]) == (mode, 3, list(CLASS_NAMES))
    assert results["window"] == (None if mode == "original" else 24)
    assert results["data"]["data"] == str(scenes)
    facts = [(entry["name"], entry["step"], entry["epoch"], entry["tested"]) for entry in results["checkpoints"]]
    assert facts == [("latest", 10, 5, "averaged"), ("best", 6, 3, "averaged")]
    (checkpoint,) = (entry for entry in results["checkpoints"] if entry["name"] == file)
    assert len({json.dumps(scores) for entry in results["checkpoints"] for scores in entry["networks"].values()}) == 4

    images, truth = validation(scenes, tmp_path)
    for index, output in enumerate(KEYS):
        folder = tmp_path / output
        flags = ["--network", network, *options, *(["--output", output] if index else [])]
        source = ["--checkpoint", str(finished / f"{file}.pt"), "--images", str(images), "--out", str(folder)]
        assert main(["predict", *source, *flags]) == 0
        assert {path.name for path in folder.iterdir()} == {
            "legend.png",
            *(f"{name}_{kind}.png" for name in truth for kind in ("mask", "overlay")),
        }
        masks = [np.array(Image.open(folder / f"{name}_mask.png")) for name in truth]
        assert [mask.shape for mask in masks] == [(40, 48)] * 3  # their own size, not the working size
        assert len(np.unique(masks)) > 2
        expected = confusion_iou(masks, list(truth.values()), len(CLASS_NAMES))
        name = "averaged" if network == "tested" else network
        scores = checkpoint["networks"][name][output]
        found = [np.nan if value is None else value for value in scores["iou"].values()]
        np.testing.assert_allclose(found, expected, atol=1e-6)
        assert scores["miou"] == pytest.approx(np.nanmean(expected), abs=1e-6)
        # The table's column of this checkpoint, network and output.
        column = 1 + 6 * (file == "best") + 3 * (name == "averaged") + index
        rows = {line.split()[0]: line.split() for line in text.splitlines() if line.split()}
        cells = [rows[label][column] for label in (*CLASS_NAMES, "mean")]
        assert cells == ["-" if np.isnan(value) else f"{100 * value:.1f}" for value in (*found, scores["miou"])]


@pytest.mark.slow
def test_evaluate_repeats_a_run_and_defaults_to_its_mode(scenes, tmp_path):
    out = tmp_path / "run"
    config = make_config(
        TINY | {"data": str(scenes), "out": str(out), "evaluation": "center_crop", "evaluate_every": 1, "steps": 1}
    )
    results = run(config)
    assert results["evaluation"]["mode"] == "center_crop"
    assert main(["evaluate", "--run", str(out), "--accelerator", "cpu"]) == 0
    again = json.loads((out / "evaluation_center_crop.json").read_text())
    assert (again["mode"], again["window"]) == ("center_crop", 32)
    assert [entry["networks"] for entry in again["checkpoints"]] == [results["last"], results["best"]["scores"]]
    assert main(["evaluate", "--checkpoint", str(out / "best.pt"), "--mode", "original"]) == 0
    original = json.loads((out / "evaluation_original.json").read_text())
    assert [entry["name"] for entry in original["checkpoints"]] == ["best"]
    assert original["checkpoints"][0]["networks"] != results["last"]


def test_run_folders_stand_for_their_checkpoints(finished, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "latest.pt").touch()
    parser = argparse.ArgumentParser()
    add_source_arguments(parser, several=True)
    chosen = parser.parse_args(["--run", str(finished), str(other)])
    assert checkpoint_files(chosen, best=True) == [finished / "latest.pt", finished / "best.pt", other / "latest.pt"]
    (other / "latest.pt").unlink()
    with pytest.raises(CheckpointError, match=f"{other}: expected a run folder with latest.pt"):
        checkpoint_files(chosen, best=True)


def test_a_list_names_images_as_a_folder_does(finished, scenes, tmp_path):
    """Of the data set that it lies in, else of the run's."""
    images, truth = validation(scenes, tmp_path)
    place = scenes / "ImageSets" / "Segmentation" / "val.txt"
    elsewhere = tmp_path / "lists" / "val.txt"
    elsewhere.parent.mkdir()
    elsewhere.write_text(place.read_text())
    assert list_images(place, make_config({"data": "moved/away"})) == [
        scenes / "JPEGImages" / f"{name}.png" for name in truth
    ]
    assert list_images(elsewhere, make_config({"data": str(scenes)})) == list_images(place, make_config({}))
    written = []
    for each in (images, place):
        out = tmp_path / f"of_{each.name}"
        assert main(["predict", "--run", str(finished), "--images", str(each), "--out", str(out)]) == 0
        written.append({path.name: path.read_bytes() for path in out.iterdir()})
    assert written[0] == written[1]


@pytest.mark.slow
def test_masks_are_palette_pngs_and_overlays_blend(finished, scenes, tmp_path):
    images, truth = validation(scenes, tmp_path)
    colours = np.round(255 * class_colours(len(CLASS_NAMES))).astype(int)
    for alpha in (0, 0.25, 1):
        out = tmp_path / str(alpha)
        command = ["predict", "--run", str(finished), "--images", str(images), "--out", str(out), "--alpha", str(alpha)]
        assert main(command) == 0
        for name in truth:
            mask = Image.open(out / f"{name}_mask.png")
            assert mask.mode == "P"
            ids = np.array(mask)
            np.testing.assert_array_equal(np.array(mask.convert("RGB")), colours[ids])
            image = np.array(Image.open(images / f"{name}.png")).astype(int)
            blended = np.array(Image.open(out / f"{name}_overlay.png"))
            assert np.abs(blended - ((1 - alpha) * image + alpha * colours[ids])).max() <= 0.5
            if alpha == 0:
                np.testing.assert_array_equal(blended, image)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--run", "RUN", "--out", "IMAGES"], "out: expected another folder than the images' own"),
        (["--run", "RUN", "--alpha", "1.5"], "alpha: expected 0 to 1, got 1.5"),
        (["--run", "RUN", "--alpha", "nan"], "alpha: expected 0 to 1, got nan"),
        (["--run", "RUN", "--window", "1"], "window: expected at least 2 pixels, got 1"),
        (["--run", "RUN", "--threads", "-1"], "threads: expected at least 0, got -1"),
        (["--run", "IMAGES"], "expected a run folder with latest.pt, found none"),
        (["--checkpoint", "IMAGES/val_0000.png"], "val_0000.png: damaged, or not a file of torch.save"),
        (["--run", "RUN", "--images", "OUT"], "expected a folder of images or a list of them, found none"),
        (["--run", "RUN", "--images", "RUN"], "expected .jpg, .png, .jpeg files, found none"),
    ],
)
def test_predict_errors_are_one_line(finished, scenes, tmp_path, capsys, options, message):
    images, _ = validation(scenes, tmp_path)
    places = {"RUN": finished, "IMAGES": images, "OUT": tmp_path / "out"}
    command = ["--images", "IMAGES", "--out", "OUT", *options]
    for word, place in places.items():
        command = [part.replace(word, str(place)) for part in command]
    assert main(["predict", *command]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(images.glob("*mask*"))


@pytest.mark.parametrize("content", [b"no image", None])
def test_predict_names_an_image_it_cannot_read(finished, scenes, tmp_path, capsys, content):
    images, _ = validation(scenes, tmp_path)
    whole = (images / "val_0001.png").read_bytes()
    (images / "val_0001.png").write_bytes(content or whole[: len(whole) // 2])
    out = tmp_path / "out"
    assert main(["predict", "--run", str(finished), "--images", str(images), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert "val_0001.png: expected an image" in error
    assert error.count("\n") == 1


def test_predict_refuses_two_images_of_one_name(finished, scenes, tmp_path, capsys):
    images, _ = validation(scenes, tmp_path)
    Image.new("RGB", (9, 9)).save(images / "val_0001.JPG", format="JPEG")
    assert main(["predict", "--run", str(finished), "--images", str(images), "--out", str(tmp_path / "out")]) == 2
    assert "val_0001.png: expected one image a name, found val_0001.JPG beside it" in capsys.readouterr().err


def test_averaged_network_of_a_run_without_one(scenes, tmp_path, capsys):
    config = make_config(TINY | {"data": str(scenes), "variant": "supervised"})
    write_state(tmp_path / "latest.pt", config, scenes, step=2, seed=0)
    images, _ = validation(scenes, tmp_path)
    command = ["predict", "--run", str(tmp_path), "--images", str(images), "--out", str(tmp_path / "out")]
    assert main([*command, "--network", "averaged"]) == 2
    assert "latest.pt holds no averaged network, only trained" in capsys.readouterr().err


@pytest.mark.slow
def test_evaluate_needs_one_mode_one_window_and_the_same_classes(finished, scenes, tmp_path, capsys):
    other = make_config(TINY | {"data": str(scenes), "crop_size": 40, "evaluation": "sliding_window"})
    write_state(tmp_path / "latest.pt", other, scenes, step=2, seed=0)
    command = ["evaluate", "--checkpoint", str(finished / "latest.pt"), str(tmp_path / "latest.pt")]
    assert main(command) == 2
    expected = "mode: the checkpoints were made with original, sliding_window; choose one with --mode"
    assert expected in capsys.readouterr().err
    assert main([*command, "--mode", "center_crop"]) == 2
    assert "window: the checkpoints were made with 32, 40; choose one with --window" in capsys.readouterr().err
    assert main([*command, "--mode", "original"]) == 2
    assert "moved/away" in capsys.readouterr().err
    assert main([*command, "--mode", "original", "--data", str(scenes), "--out", str(tmp_path / "both.json")]) == 0
    # Two files of one name are told apart by their paths.
    names = [entry["name"] for entry in json.loads((tmp_path / "both.json").read_text())["checkpoints"]]
    assert names == command[2:]

    renamed = tmp_path / "renamed"
    write_scenes(renamed, labeled=1, unlabeled=0, val=1, size=(40, 48))
    (renamed / "classes.txt").write_text("a\nb\nc\nd\ne\nf\n")
    capsys.readouterr()
    assert main(["evaluate", "--run", str(finished), "--data", str(renamed)]) == 2
    assert "latest.pt was made with ['background', " in capsys.readouterr().err


def test_a_sweep_scores_other_propagations_of_the_same_network(finished, scenes, tmp_path, capsys):
    grid, out = tmp_path / "grid.yaml", tmp_path / "sweep.json"
    grid.write_text(
        "own: {order_weights: [20, 20]}\nplain: {}\nlinear: {affinity: linear}\n"
        "ridge: {affinity: ridge, shrinkage: 0.1}\ndiscriminant: {affinity: discriminant}\n"
    )
    where = ["--run", str(finished), "--accelerator", "cpu", "--data", str(scenes)]
    command = ["sweep", *where, "--grid", str(grid), "--out", str(out)]
    assert main(command) == 0
    assert "| linear |" in capsys.readouterr().out
    rows = {row["setting"]: row for row in json.loads(out.read_text())["rows"]}
    assert len({row["prediction"] for row in rows.values()}) == 1
    assert len({row["blend"] for row in rows.values()}) == 5
    assert (rows["plain"]["affinity"], rows["plain"]["order_weights"]) == ("softmax", [1.0, 1.0])
    assert main(["evaluate", *where, "--out", str(tmp_path / "scores.json")]) == 0
    scores = json.loads((tmp_path / "scores.json").read_text())["checkpoints"][0]
    expected = scores["networks"][scores["tested"]]
    assert all(rows["own"][key] == expected[key]["miou"] for key in ("prediction", "propagated", "blend"))
    assert main([*command, "--network", "trained"]) == 0
    assert json.loads(out.read_text())["rows"][0]["propagated"] == scores["networks"]["trained"]["propagated"]["miou"]

    capsys.readouterr()
    grid.write_text("own: {lr: 1}\n")
    assert main(command) == 2
    assert "grid: own: expected options of affinity, scale" in capsys.readouterr().err
    grid.write_text("own: {affinity: discriminant, balance: 1}\n")
    assert main(command) == 2
    assert "balance: 1.0 applies to ridge only" in capsys.readouterr().err


def test_a_setting_that_names_an_affinity_starts_from_its_defaults():
    base = make_config(
        {"affinity": "linear", "scale": "degree", "normalize": "l2", "order_weights": [3], "scheme": "sum"}
    )
    settings = make_settings(
        base, {"kept": {"similarity": "cosine"}, "named": {"affinity": "linear"}, "other": {"affinity": "ridge"}}
    )
    assert (settings["kept"].scale, settings["kept"].normalize) == ("degree", "l2")
    assert (settings["named"].scale, settings["named"].normalize) == ("sum", "auto")
    assert {config.order_weights for config in settings.values()} == {(1.0, 1.0)}
    assert make_propagation(settings["other"]).affinity == Ridge(scheme="sum")


# --- statistics of a folder ------------------------------------------------------------------------------------------


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
