"""The example's `edges`: the refinement against its definition, scores against loops, and the command end to end."""

import argparse
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from examples.derprop_voc import edges as command
from examples.derprop_voc.boundaries import BANDS, compared, count, inner_distance, scores_of
from examples.derprop_voc.config import make_config
from examples.derprop_voc.data import VOID
from examples.derprop_voc.edges import ALSO, FAMILIES, START, Sample, add_edges_arguments, edges_command
from examples.derprop_voc.refinement import Refinement, local_deviation
from examples.derprop_voc.scenes import write_scenes
from examples.derprop_voc.train import run
from tests.example.frozen_runs import UNCACHED

CACHED = UNCACHED | {"cache_features": True, "feature_crop": [4, 5], "variant": "supervised"}


def literal_step(scores, image, offsets, sigma, position):
    """One average of (C, H, W) by loops; sigma (H, W) of every target."""
    C, H, W = scores.shape
    out = np.zeros((C, H, W))
    for y in range(H):
        for x in range(W):
            total = 0
            for dy, dx in offsets:
                if 0 <= y + dy < H and 0 <= x + dx < W:
                    distance = ((image[:, y, x] - image[:, y + dy, x + dx]) ** 2).sum()
                    share = np.exp(-distance / (2 * sigma[y, x] ** 2))
                    if position:
                        share *= np.exp(-(dy * dy + dx * dx) / (2 * position**2))
                    out[:, y, x] += share * scores[:, y + dy, x + dx]
                    total += share
            out[:, y, x] /= total
    return out


@pytest.mark.parametrize(("deviation", "position"), [("one", 0.0), ("one", 1.5), ("image", 0.0), ("pixel", 0.0)])
def test_the_refinement_is_its_definition(deviation, position):
    torch.manual_seed(0)
    scores, image = torch.rand(1, 3, 7, 9).softmax(1).double(), torch.rand(1, 3, 7, 9).double()
    sigma = {"one": torch.ones(1, 1, 7, 9).double(), "pixel": local_deviation(image)}.get(deviation)
    if sigma is None:
        sigma = local_deviation(image).mean().expand(1, 1, 7, 9)
    offsets = sorted({(d * a, d * b) for d in (1, 3) for a in (-1, 0, 1) for b in (-1, 0, 1)})
    wanted = scores[0].numpy()
    for _ in range(2):
        wanted = literal_step(wanted, image[0].numpy(), offsets, 0.4 * sigma[0, 0].numpy(), position)
    refine = Refinement(sigma=0.4, deviation=deviation, position=position, dilation=(1, 3), steps=2)
    torch.testing.assert_close(refine(scores, image)[0], torch.from_numpy(wanted), rtol=0, atol=1e-9)


def test_the_local_deviation_is_that_of_nine_by_nine_pixels():
    image = torch.rand(1, 3, 20, 21)
    around = image[0, :, 3:12, 5:14].flatten(1)
    wanted = around.var(1, correction=0).sum().sqrt()
    torch.testing.assert_close(local_deviation(image)[0, 0, 7, 9], wanted, rtol=1e-4, atol=0)
    assert (local_deviation(torch.full((1, 3, 20, 21), 0.5)) == 0.01).all()


def test_an_edge_between_two_colours_stops_the_average():
    image = torch.zeros(1, 3, 24, 24)
    image[..., 12:] = 1
    logits = F.interpolate(8 * image[:, :1] - 4, (4, 4), mode="bilinear", antialias=True)
    sample = Sample(torch.cat((-logits, logits), 1), image, (24, 24))
    before, after = sample.start[0, 1], Refinement()(sample.start, image)[0, 1]
    # From each side's own colour only: what P was across the edge becomes a step.
    assert (before[:, 12] - before[:, 11]).max() < 0.3
    assert (after[:, 12] - after[:, 11]).min() > 0.7


def literal_band(labels, label, width):
    """Pixels of a class that leave it, or the image, within a square of `width` pixels to each side."""
    H, W = labels.shape
    inside = np.zeros((H + 2 * width, W + 2 * width), bool)
    inside[width : width + H, width : width + W] = labels == label
    band = np.zeros((H, W), bool)
    for y in range(H):
        for x in range(W):
            window = inside[y : y + 2 * width + 1, x : x + 2 * width + 1]
            band[y, x] = labels[y, x] == label and not window.all()
    return band


def test_counts_are_those_of_loops():
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 3, (2, 6, 8))
    truth, labels = (torch.from_numpy(np.kron(x, np.ones((9, 9), int))) for x in blocks)
    truth[:10, :12] = VOID
    row = count(labels, truth, 4)
    valid = truth != VOID
    confusion = row[:16].reshape(4, 4)
    for i in range(4):
        for j in range(4):
            assert confusion[i, j] == ((truth == i) & (labels == j) & valid).sum()
    shown = labels.where(valid, VOID).numpy()
    for number, share in enumerate(BANDS):
        width = max(1, round(share * np.hypot(*truth.shape)))
        inside, union = row[16 + 8 * number :][:8].reshape(2, 4)
        for label in range(4):
            one, other = literal_band(truth.numpy(), label, width), literal_band(shown, label, width)
            assert (inside[label], union[label]) == ((one & other).sum(), (one | other).sum())


def test_a_right_prediction_has_full_scores_and_absent_classes_do_not_count():
    truth = torch.zeros(30, 40, dtype=torch.long)
    truth[10:20, 5:25] = 2
    np.testing.assert_allclose(scores_of(count(truth, truth, 5), 5), 100)


def test_the_inner_distance_counts_steps_to_another_class_or_out_of_the_image():
    labels = np.zeros((7, 9), int)
    labels[:, 6:] = 3
    wanted = [1, 2, 3, 3, 2, 1, 1, 2, 1]  # of the middle row
    assert inner_distance(labels)[3].tolist() == wanted
    assert inner_distance(labels)[0].tolist() == [1] * 9


def test_the_error_of_a_difference_is_that_of_the_mean_for_the_accuracy():
    """Images of equal size: accuracy is a mean over images, whose standard error the jackknife gives exactly."""
    rng = np.random.default_rng(0)
    truth = torch.from_numpy(rng.integers(0, 2, (6, 20, 20)))
    flips = torch.from_numpy(rng.random((2, 6, 20, 20)) < 0.3 * rng.random((2, 6, 1, 1)))
    one, other = (np.stack([count(truth[i] ^ flip[i], truth[i], 2) for i in range(6)])[None] for flip in flips)
    difference, error = compared(one, other, 2)
    each = 100 * (flips[1].double().mean((1, 2)) - flips[0].double().mean((1, 2))).numpy()
    np.testing.assert_allclose(difference[1], each.mean())
    np.testing.assert_allclose(error[1], each.std(ddof=1) / 6**0.5)
    assert compared(one, one, 2)[1].max() == 0


def test_methods_that_need_no_image_leave_a_flat_prediction_alone():
    image = torch.rand(1, 3, 40, 48)
    sample = Sample(torch.tensor([2.0, 0, -1])[None, :, None, None].expand(1, 3, 5, 6), image, (40, 48))
    for family, (method, settings) in FAMILIES.items():
        if family != "dense CRF":
            scores = method(sample, **settings[0])
            assert scores.shape == (1, 3, 40, 48)
            assert (scores.argmax(1) == 0).all(), family
    for name, method in ALSO.items():
        assert (method(sample).argmax(1) == 0).all(), name


@pytest.mark.slow
def test_the_command_writes_tables_and_goes_on(tmp_path, monkeypatch):
    scenes = tmp_path / "scenes"
    write_scenes(scenes, labeled=4, unlabeled=4, val=3, size=(40, 48), seed=1)
    for path in (scenes / "JPEGImages").glob("unlabeled*"):  # truth for scoring only
        Image.new("L", (48, 40), 1).save(scenes / "SegmentationClass" / f"{path.stem}.png")
    folders = []
    for seed in range(2):
        out = tmp_path / f"run_{seed}"
        run(make_config(CACHED | {"data": str(scenes), "out": str(out), "seed": seed}))
        folders.append(str(out))
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    monkeypatch.setattr(command, "ALSO", {})
    parser = argparse.ArgumentParser()
    add_edges_arguments(parser)
    arguments = parser.parse_args(["--runs", *folders, "--out", str(tmp_path / "out"), "--threads", "1"])
    edges_command(arguments)
    found = json.loads((tmp_path / "out" / "edges.json").read_text())
    assert found["choice"]["images"] == 4
    assert list(found["choice"]["chosen"]) == [name for name in FAMILIES if name != "dense CRF"]
    rows = found["data"]["scenes"]["rows"]
    assert found["data"]["scenes"]["images"] == 3
    assert len(found["data"]["scenes"]["networks"]) == 2
    assert rows[START]["gain"] == rows[START]["error"] == [0, 0, 0, 0]
    assert set(rows) == set(found["choice"]["chosen"]) == set(found["cost"]["rows"])
    for family, setting in found["choice"]["chosen"].items():
        tried = {key: row for key, row in found["choice"]["tried"].items() if key.partition(":")[0] == family}
        values = ", ".join(f"{name} {value:g}" for name, value in setting.items())
        best = max(row["scores"][0] for row in tried.values())
        assert found["choice"]["tried"][f"{family}: {values}" if values else family]["scores"][0] == best

    # Again: nothing is measured, the table is the same.
    table = (tmp_path / "out" / "edges.md").read_text()
    monkeypatch.setattr(command, "measure", None)
    edges_command(arguments)
    assert (tmp_path / "out" / "edges.md").read_text() == table
    assert table.count("\n| window of colours | ") == 2  # of the data set and of the cost
