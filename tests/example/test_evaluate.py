"""The training example's evaluation: window modes, scores over a data set, and the commands that score and predict."""

import json
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
from dlprop.affinity import Ridge, Softmax
from examples.derprop_voc.__main__ import main
from examples.derprop_voc.augment import to_input
from examples.derprop_voc.config import make_config
from examples.derprop_voc.data import Data, read_image
from examples.derprop_voc.evaluate import _middle, _windows, evaluate, predict, probabilities
from examples.derprop_voc.files import write_checkpoint
from examples.derprop_voc.losses import make_propagation
from examples.derprop_voc.model import Output
from examples.derprop_voc.panels import class_colours
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
    assert (results["mode"], results["images"], results["classes"]) == (mode, 3, list(CLASS_NAMES))
    assert results["window"] == (None if mode == "original" else 24)
    assert results["data"]["data"] == str(scenes)
    facts = [(entry["name"], entry["step"], entry["epoch"], entry["tested"]) for entry in results["checkpoints"]]
    assert facts == [("latest", 10, 5, "averaged"), ("best", 6, 3, "averaged")]
    (checkpoint,) = (entry for entry in results["checkpoints"] if entry["name"] == file)
    assert len({json.dumps(scores) for entry in results["checkpoints"] for scores in entry["networks"].values()}) == 4

    images, truth = validation(scenes, tmp_path)
    for propagated in (False, True):
        folder = tmp_path / f"predicted_{propagated}"
        flags = ["--network", network, *options, *(["--propagated"] if propagated else [])]
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
        scores = checkpoint["networks"][name]["propagated" if propagated else "prediction"]
        found = [np.nan if value is None else value for value in scores["iou"].values()]
        np.testing.assert_allclose(found, expected, atol=1e-6)
        assert scores["miou"] == pytest.approx(np.nanmean(expected), abs=1e-6)
        # The table's column of this checkpoint, network and output.
        column = 1 + 4 * (file == "best") + 2 * (name == "averaged") + propagated
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
        (["--run", "RUN", "--images", "OUT"], "expected a folder of images, found none"),
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
