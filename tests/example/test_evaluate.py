"""The commands that score and predict with finished networks."""

import argparse
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from dlprop.affinity import Ridge
from examples.derprop_voc.__main__ import main
from examples.derprop_voc.choice import add_source_arguments, checkpoint_files
from examples.derprop_voc.config import make_config
from examples.derprop_voc.errors import CheckpointError
from examples.derprop_voc.losses import make_propagation
from examples.derprop_voc.panels import class_colours
from examples.derprop_voc.predict_folder import list_images
from examples.derprop_voc.scenes import CLASS_NAMES, write_scenes
from examples.derprop_voc.sweep import make_settings
from examples.derprop_voc.train import run
from tests.example.finished import KEYS, confusion_iou, validation, write_state
from tests.example.options import TINY


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "network", "mode"),
    [("latest", "trained", "original"), ("best", "averaged", "original"), ("latest", "tested", "sliding_window")],
)
def test_evaluate_and_predict_agree_through_a_confusion_matrix(finished, scenes, tmp_path, capsys, file, network, mode):
    out = tmp_path / "scores.json"
    options = ["--mode", mode] if mode == "original" else ["--mode", mode, "--window", "24"]
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
    colours = np.round(255 * class_colours(CLASS_NAMES)).astype(int)
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
        (["--run", "RUN", "--window", "1", "--mode", "sliding_window"], "window: expected at least 2 pixels, got 1"),
        (["--run", "RUN", "--window", "32"], "window: 32 applies to sliding_window and center_crop only"),
        (["--run", "RUN", "--threads", "-1"], "threads: expected at least 0, got -1"),
        (["--run", "IMAGES"], "expected a run folder with latest.pt, found none"),
        (["--run", "RUN", "--affinity", "ridge"], "output: prediction is not propagated, so affinity would do nothing"),
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
    assert "val_0001.png: expected one image a name, found " in capsys.readouterr().err


def test_averaged_network_of_a_run_without_one(scenes, tmp_path, capsys):
    config = make_config(TINY | {"data": str(scenes), "variant": "supervised"})
    write_state(tmp_path / "latest.pt", config, scenes, step=2, seed=0)
    images, _ = validation(scenes, tmp_path)
    command = ["predict", "--run", str(tmp_path), "--images", str(images), "--out", str(tmp_path / "out")]
    assert main([*command, "--network", "averaged"]) == 2
    assert "latest.pt holds no averaged network, only trained" in capsys.readouterr().err


def test_every_run_that_is_missing_is_named(finished, capsys):
    assert main(["evaluate", "--run", "runs/first", str(finished), "runs/second"]) == 2
    expected = "error: runs/first, runs/second: expected a run folder with latest.pt, found none\n"
    assert capsys.readouterr().err == expected


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


def test_evaluate_refuses_images_that_the_network_was_trained_on(scenes, tmp_path, capsys):
    lists = tmp_path / "other"
    shutil.copytree(scenes / "ImageSets" / "Segmentation" / "demo", lists)
    trained, val = (lists / "labeled.txt").read_text(), (scenes / "ImageSets" / "Segmentation" / "val.txt").read_text()
    (lists / "labeled.txt").write_text(val)
    (lists / "val.txt").write_text(trained)
    write_state(tmp_path / "latest.pt", make_config(TINY | {"data": str(scenes)}), scenes, step=2, seed=0)
    assert main(["evaluate", "--run", str(tmp_path), "--partition", str(lists)]) == 2
    stderr = capsys.readouterr().err
    assert "validation images of" in stderr
    assert "expected images that the network was not trained on, found" in stderr
    assert "score it on the partition it was trained with" in stderr


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
