"""Labels carried through a clip: the memory, the order of frames, the commands."""

import argparse
import json
import shutil
from unittest.mock import MagicMock

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from examples.derprop_voc import clips as clips_file
from examples.derprop_voc.choice import load_finished
from examples.derprop_voc.clips import Pieces, add_clips_arguments, clips_command, make_clip
from examples.derprop_voc.config import make_config
from examples.derprop_voc.errors import ConfigError, DataError
from examples.derprop_voc.scenes import CLASS_NAMES, make_scene, write_scenes
from examples.derprop_voc.train import run
from examples.derprop_voc.video import Carrying, Memory, add_video_arguments, carry, find_frames, video_command
from tests.example.frozen_runs import FROZEN

GRID, SIZE, D, C = (3, 4), (6, 8), 5, 3


def feats():
    return torch.randn(1, D, *GRID)


def probabilities():
    return torch.randn(1, C, *SIZE).softmax(1)


def command(add_arguments, function, *flags):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    function(parser.parse_args([str(flag) for flag in flags]))


def cells(x):
    """(K, 6, 8) averaged over cells of 2 x 2, (K, 12)."""
    return x.reshape(len(x), 3, 2, 4, 2).mean((2, 4)).reshape(len(x), 12)


def literal(frames, target, carrying):
    """The definition, source by source; frames: features (D, 12), labels (C, 12), is_source (12,), doubt."""
    points = np.stack(np.divmod(np.arange(12), 4), 1) / 3  # rows and columns, in heights

    def unit(x):
        return x / np.linalg.norm(x, axis=0)

    out = np.zeros((C, 12))
    for j in range(12):
        total = 0.0
        for V, labels, is_source, doubt in frames:
            for i in np.flatnonzero(is_source):
                distance = ((unit(V)[:, i] - unit(target)[:, j]) ** 2).sum()
                distance += carrying.position**2 * ((points[i] - points[j]) ** 2).sum()
                weight = np.exp(-carrying.sharpness * distance / 2 - doubt)
                out[:, j] += weight * labels[:, i]
                total += weight
        out[:, j] /= total
    return out


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", ["soft", "hard", "confident"])
def test_a_memory_is_its_definition(labels):
    torch.manual_seed(0)
    carrying = Carrying(sharpness=3.0, position=0.7, last=1, labels=labels, threshold=0.45, doubt=0.8)
    truth = torch.randint(C, SIZE)
    truth[:2, :2] = 255  # a point without a label
    truth[0, 2:4] = 255  # half a point
    truth[0, 4:6], truth[1, 4] = 255, 255  # three quarters
    given, predicted, target, P = feats(), feats(), feats(), probabilities()
    memory = Memory(carrying)
    memory.give(given, truth, C)
    memory.remember(predicted, P)
    flat = truth.numpy()
    known = cells((flat != 255)[None].astype(float))[0]
    shares = cells(np.stack([flat == c for c in range(C)]).astype(float)) / np.maximum(known, 1e-9)
    mean = cells(P[0].numpy())
    one_hot = (mean == mean.max(0)).astype(float)
    confident = mean.max(0) >= 0.45
    assert 0 < confident.sum() < 12
    frames = [
        (given[0].flatten(1).numpy(), shares, known >= 0.5, 0.0),
        (
            predicted[0].flatten(1).numpy(),
            mean if labels == "soft" else one_hot,
            confident if labels == "confident" else np.ones(12),
            0.8,
        ),
    ]
    assert list(np.flatnonzero(~frames[0][2])) == [0, 2]
    expected = literal(frames, target[0].flatten(1).numpy(), carrying)
    np.testing.assert_allclose(memory.recall(target)[0].flatten(1), expected, atol=5e-6)


def test_a_window_takes_each_frame_for_itself():
    torch.manual_seed(0)
    carrying = Carrying(sharpness=3.0, radius=1, position=9.0, last=1, labels="soft", doubt=2.0)
    truth, given, predicted, target, P = torch.randint(C, SIZE), feats(), feats(), feats(), probabilities()
    memory = Memory(carrying)
    memory.give(given, truth, C)
    memory.remember(predicted, P)
    labels = [torch.nn.functional.one_hot(truth, C).permute(2, 0, 1)[None].float(), P]
    expected = torch.zeros(C, *GRID)
    unit = torch.nn.functional.normalize(target)[0]
    for V, L in zip((given, predicted), labels, strict=True):
        V, L = torch.nn.functional.normalize(V)[0], torch.nn.functional.adaptive_avg_pool2d(L, GRID)[0]
        for y in range(3):
            for x in range(4):
                near = (slice(max(0, y - 1), y + 2), slice(max(0, x - 1), x + 2))
                share = (3.0 * (V[:, *near] * unit[:, y, x, None, None]).sum(0)).flatten().softmax(0)
                expected[:, y, x] += L[:, *near].flatten(1) @ share / 2
    torch.testing.assert_close(memory.recall(target)[0], expected, atol=5e-6, rtol=0)


def test_a_predicted_frame_without_a_confident_pixel_gives_nothing():
    memory = Memory(Carrying(threshold=1.0, position=0.0, last=1, labels="confident"))
    given, target = feats(), feats()
    memory.give(given, torch.randint(C, SIZE), C)
    before = memory.recall(target)
    memory.remember(feats(), probabilities())
    torch.testing.assert_close(memory.recall(target), before)


def test_a_given_frame_needs_more_than_clicks():
    truth = torch.full(SIZE, 255)
    truth[0, 0] = 1
    with pytest.raises(DataError, match="given: expected a frame with labels on half of some cell of 2 x 2 pixels"):
        Memory(Carrying()).give(feats(), truth, C)


def test_options_are_checked():
    for options, text in (
        ({"last": -1}, "last: expected a number of at least 0, got -1"),
        ({"sharpness": 0.0}, "sharpness: expected a number above 0, got 0.0"),
        ({"radius": 1, "doubt": 1.0}, "doubt: in a window every frame is averaged by itself"),
        ({"every": 0}, "every: expected at least 1, got 0"),
        ({"steps": 0}, "steps: expected at least 1, got 0"),
    ):
        with pytest.raises(ConfigError, match=text):
            Carrying(**options)


# --- order -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def recorded(monkeypatch):
    """What a memory is asked for: at each recall the remembered frames, by the first number of their features."""
    seen = []

    def recall(self, feats):
        seen.append((feats[0, 0, 0, 0].item(), [frame[0].item() for frame in self.last]))
        return torch.full((1, C, *GRID), 1 / C)

    def remember(self, feats, probabilities):
        self.last.append((feats[0, 0, 0, 0],))

    monkeypatch.setattr(Memory, "recall", recall)
    monkeypatch.setattr(Memory, "remember", remember)
    return seen


@pytest.mark.parametrize(
    ("last", "every", "expected"),
    [
        (2, 1, [(3, []), (5, [3]), (6, [3, 5]), (1, []), (0, [1])]),
        (1, 2, [(3, []), (5, []), (6, [5]), (1, []), (0, [])]),
        (0, 1, [(3, []), (5, []), (6, []), (1, []), (0, [])]),
    ],
)
def test_forward_from_the_first_given_frame_then_backward(recorded, last, every, expected):
    described = []

    def describe(number):
        described.append(number)
        return torch.full((1, D, *GRID), float(number)), None

    truth = torch.zeros(SIZE, dtype=torch.uint8)
    carried = list(carry(describe, 7, {2: truth, 4: truth}, C, Carrying(last=last, every=every)))
    assert [number for number, _ in carried] == [3, 5, 6, 1, 0]
    assert recorded == expected
    assert sorted(described) == list(range(7))


def test_a_network_is_corrected_by_its_errors_in_all_given_frames():
    """Step by step: of two given frames each hears the errors of both, and the third frame the sum of all errors."""
    torch.manual_seed(0)
    carrying = Carrying(sharpness=3.0, position=0.7, steps=3)
    truths = [torch.randint(C, SIZE) for _ in range(2)]
    described = [(feats(), 2 * torch.randn(1, C, *GRID)) for _ in range(3)]
    V = [x[0].flatten(1).double().numpy() for x, _ in described]
    L = [x[0].flatten(1).double().numpy() for _, x in described]
    labels = [cells(np.stack([truth.numpy() == c for c in range(C)]).astype(float)) for truth in truths]
    for _ in range(3):
        errors = [truth - np.exp(x) / np.exp(x).sum(0) for truth, x in zip(labels, L[:2], strict=True)]
        frames = [(V[k], errors[k], np.ones(12), 0.0) for k in range(2)]
        L = [x + literal(frames, target, carrying) for x, target in zip(L, V, strict=True)]
    memory = Memory(carrying)
    for (x, _), truth in zip(described, truths, strict=False):
        memory.give(x, truth, C)
    memory.correct([logits for _, logits in described[:2]])
    expected = L[2] - described[2][1][0].flatten(1).numpy()
    np.testing.assert_allclose(memory.recall(described[2][0])[0].flatten(1), expected, atol=5e-6)
    ((number, ids),) = carry(described.__getitem__, 3, dict(enumerate(truths)), C, carrying)
    assert number == 2
    out = torch.nn.functional.interpolate(memory.recall(described[2][0]), SIZE, mode="bilinear")
    out = out + torch.nn.functional.interpolate(described[2][1], SIZE, mode="bilinear", align_corners=True)
    assert torch.equal(ids, out[0].argmax(0))


def test_where_the_network_is_right_nothing_is_carried():
    truth = torch.randint(C, GRID)
    logits = 40 * torch.nn.functional.one_hot(truth, C).permute(2, 0, 1)[None].float()
    memory = Memory(Carrying())
    memory.give(feats(), truth, C)
    memory.correct([logits])
    assert memory.recall(feats()).abs().max() < 1e-6


# --- commands --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Five equal frames of a scene, and the masks of all."""
    root = tmp_path_factory.mktemp("clip")
    image, truth = make_scene(np.random.default_rng(0), (48, 64))
    for folder in ("frames", "masks"):
        (root / folder).mkdir()
    for number in range(5):
        Image.fromarray(image).save(root / "frames" / f"{number}.png")
        Image.fromarray(truth).save(root / "masks" / f"{number}.png")
    torch.manual_seed(0)
    torch.save(timm.create_model("test_efficientnet").state_dict(), root / "weights.pt")
    return root


def backbone(clip):
    return ("--backbone", "timm/test_efficientnet", "--weights", clip / "weights.pt", "--accelerator", "cpu")


def test_the_command_carries_labels_through_a_folder(clip, tmp_path, capsys):
    flags = (
        "--frames",
        clip / "frames",
        "--masks",
        clip / "masks",
        "--given",
        "2",
        "--sharpness",
        "1e4",
        "--last",
        "1",
    )
    command(add_video_arguments, video_command, *flags, "--out", tmp_path, *backbone(clip))
    names = {path.name for path in tmp_path.iterdir()}
    pictures = {f"{number}_{kind}.png" for number in range(5) for kind in ("mask", "overlay")}
    assert names == pictures | {"legend.png", "scores.json"}
    truth = np.array(Image.open(clip / "masks" / "2.png"))
    assert np.array_equal(np.array(Image.open(tmp_path / "2_mask.png")), truth)  # the given frame stays as it is
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert sorted(scores["frames"]) == ["0", "1", "3", "4"]
    predicted = np.array(Image.open(tmp_path / "4_mask.png"))
    assert (predicted == truth)[truth != 255].mean() > 0.85  # what is lost are edges, on a grid of 4
    said = capsys.readouterr().out
    assert "5 frames" in said
    assert f"mIoU {100 * scores['miou']:.1f} over 4 frames; " in said
    assert f"{100 * scores['frames']['3']:.1f} at frame 1" in said
    assert "note" not in said
    coarse = tmp_path / "coarse"
    command(add_video_arguments, video_command, *flags, "--out", coarse, "--enlarge", "1", *backbone(clip))
    coarser = json.loads((coarse / "scores.json").read_text())  # features on a grid of 8 pixels in place of 4
    assert scores["miou"] > coarser["miou"] + 0.02


def test_masks_for_scores_may_hold_classes_that_no_given_frame_has(clip, tmp_path):
    shutil.copytree(clip / "masks", tmp_path / "masks")
    truth = np.array(Image.open(clip / "masks" / "3.png"))
    truth[:4, :4] = truth[truth != 255].max() + 2
    Image.fromarray(truth).save(tmp_path / "masks" / "3.png")
    flags = ("--frames", clip / "frames", "--masks", tmp_path / "masks", "--out", tmp_path / "out", *backbone(clip))
    command(add_video_arguments, video_command, *flags)
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert scores["iou"][str(truth[0, 0])] == 0


def test_frames_whose_truth_is_void_have_no_score(clip, tmp_path):
    shutil.copytree(clip / "masks", tmp_path / "masks")
    path = tmp_path / "masks" / "3.png"
    Image.fromarray(np.full_like(np.array(Image.open(path)), 255)).save(path)
    flags = ("--frames", clip / "frames", "--masks", tmp_path / "masks", "--out", tmp_path / "out", *backbone(clip))
    command(add_video_arguments, video_command, *flags)
    assert "3" not in json.loads((tmp_path / "out" / "scores.json").read_text())["frames"]
    for number in (1, 2, 3, 4):
        (tmp_path / "masks" / f"{number}.png").unlink()
    command(add_video_arguments, video_command, *flags)
    assert not (tmp_path / "out" / "scores.json").exists()  # of an earlier call


def test_without_truth_there_are_no_scores(clip, tmp_path, capsys):
    (tmp_path / "masks").mkdir()
    blank = np.zeros_like(np.array(Image.open(clip / "masks" / "0.png")))
    Image.fromarray(blank).save(tmp_path / "masks" / "0.png")
    flags = ("--frames", clip / "frames", "--masks", tmp_path / "masks", "--out", tmp_path / "out")
    command(add_video_arguments, video_command, *flags, *backbone(clip))
    assert not (tmp_path / "out" / "scores.json").exists()
    said = capsys.readouterr().out
    assert "mIoU" not in said
    assert "note: the given masks hold class 0 alone" in said


@pytest.mark.parametrize(
    ("flags", "error", "text"),
    [
        (["--given", "7"], ConfigError, "given: expected names of frames, such as 0, got 7"),
        (["--alpha", "2"], ConfigError, "alpha: expected 0 to 1"),
        (["--sharpness", "inf"], ConfigError, "sharpness: expected a number above 0, got inf"),
        (["--doubt", "nan"], ConfigError, "doubt: expected a number of at least 0, got nan"),
        (["--weights", "none"], ConfigError, "weights: expected a file or timm for a frozen backbone"),
        (
            ["--class-names", "sky", "road"],
            DataError,
            "expected labels 0 to 1 or 255, the classes of --class-names, found",
        ),
        (["--enlarge", "0"], ConfigError, "enlarge: expected above 0, got 0.0"),
        (["--frames", "clpi"], ConfigError, "frames: expected a folder of images, or a list of them, found no clpi"),
    ],
)
def test_the_command_says_what_is_wrong(clip, tmp_path, flags, error, text):
    given = ("--frames", clip / "frames", "--masks", clip / "masks", "--out", tmp_path / "out", *backbone(clip))
    with pytest.raises(error, match=text):
        command(add_video_arguments, video_command, *given, *flags)
    assert not (tmp_path / "out").exists()


def test_frames_are_a_folder_or_a_list_and_of_one_size(clip, tmp_path):
    write_scenes(tmp_path, labeled=2, unlabeled=2, val=3, size=(40, 48), seed=1)
    place = tmp_path / "ImageSets" / "Segmentation" / "val.txt"
    items = find_frames(place, None)
    assert [item.name for item in items] == place.read_text().split()
    assert all(item.mask.is_file() for item in items)
    assert find_frames(place, clip)[0].mask == clip / f"{items[0].name}.png"
    written = tmp_path / f"{items[1].name}_mask.png"  # as the command names them
    Image.new("L", (48, 40)).save(written)
    assert [item.mask for item in find_frames(place, tmp_path)[:2]] == [tmp_path / f"{items[0].name}.png", written]
    with pytest.raises(ConfigError, match="masks: expected the folder"):
        find_frames(clip / "frames", None)
    twice = tmp_path / "twice.txt"
    shutil.copy(items[0].image, items[0].image.with_name("0.png"))
    twice.write_text(f"{clip / 'frames' / '0.png'}\n{items[0].image.with_name('0.png')}\n")
    with pytest.raises(DataError, match="expected one image a name, found"):
        find_frames(twice, None)
    Image.new("RGB", (9, 9)).save(items[1].image)
    with pytest.raises(DataError, match="frames of one size, 48x40, found 9x9"):
        find_frames(place, None)


@pytest.mark.slow
def test_the_table_is_measured_and_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    """Two networks, on a clip that is no clip."""
    write_scenes(tmp_path / "data", labeled=4, unlabeled=6, val=4, size=(40, 48), seed=1)
    grid = {"PIECE": 3, "EVERY": 4, "SHARPNESS": (60.0,), "RADIUS": (1,), "STEPS": (1, 2), "FRAMES": (1, 50)}
    for name, value in grid.items():
        monkeypatch.setattr(clips_file, name, value)
    folders = []
    for seed in (0, 1):
        options = {"data": str(tmp_path / "data"), "cache_dir": str(tmp_path / "cache"), "seed": seed}
        folders.append(tmp_path / f"run_{seed}")
        run(make_config(FROZEN | options | {"variant": "supervised", "out": str(folders[-1]), "steps": 2}))
    lists = tmp_path / "data" / "ImageSets" / "Segmentation"
    names = [path.read_text() for path in (lists / "demo" / "labeled.txt", lists / "demo" / "unlabeled.txt")]
    (lists / "train.txt").write_text("".join(names))
    labeled, prefix = (lines[:3] for lines in names)
    masks = tmp_path / "data" / "SegmentationClass"
    flags = ("--runs", *folders, "--second", "2", "--out", tmp_path / "out", "--threads", "1")
    with pytest.raises(ConfigError, match="choose_on: expected the start of names"):
        command(add_clips_arguments, clips_command, *flags, "--choose-on", "nothing")
    other = tmp_path / "run_2"
    shutil.copytree(folders[0], other)
    checkpoint = torch.load(other / "latest.pt", weights_only=True)
    torch.save(checkpoint | {"config": checkpoint["config"] | {"data": str(tmp_path / "others")}}, other / "latest.pt")
    several = ("--runs", folders[0], other, "--out", tmp_path / "several", "--choose-on", prefix)
    with pytest.raises(ConfigError, match="runs: expected runs of one data set"):
        command(add_clips_arguments, clips_command, *several)
    with pytest.raises(ConfigError, match="choose_on: expected pieces of 3 frames with some that"):
        command(add_clips_arguments, clips_command, *flags, "--choose-on", labeled)
    with pytest.raises(DataError, match="expected the mask of unl"):
        command(add_clips_arguments, clips_command, *flags, "--choose-on", prefix)
    for name in names[1].split():
        shutil.copy(masks / f"{names[0].split()[0]}.png", masks / f"{name}.png")
    command(add_clips_arguments, clips_command, *flags, "--choose-on", prefix)
    result = json.loads((tmp_path / "out" / "clips.json").read_text())
    first, second = (result["figures"][f"run_{seed}"] for seed in (0, 1))
    # What needs no network is measured once.
    assert {name for name in first if "network" in name or "last layer" in name} == set(second)
    assert first["network alone, both sizes"]["miou"] != first["network alone"]["miou"]
    for chosen in result["chosen"].values():
        best = max(chosen["tried"], key=lambda entry: entry["miou"])
        assert {name: best[name] for name in chosen["setting"]} == chosen["setting"]
    table = (tmp_path / "out" / "clips.md").read_text()
    rows = dict.fromkeys(line.split(" | ")[0].removeprefix("| ") for line in table.splitlines()[2:])
    assert list(rows)[: len(first)] == list(first)
    alone = [100 * figures["network alone"]["miou"] for figures in (first, second)]
    assert f"| network alone | {np.mean(alone):.1f} ({alone[0]:.1f}, {alone[1]:.1f}) | " in table
    gains = [100 * figures[clips_file.CORRECTED]["miou"] for figures in (first, second)] - np.array(alone)
    error = abs(gains[0] - gains[1]) / 2
    assert f"over *network alone* | {gains.mean():+.1f} ± {error:.1f} |" in table
    # Of two pieces, one of images that the network was trained on, only the other is scored.
    finished = load_finished([folders[0] / "latest.pt"], torch.device("cpu"))[0]
    scored, metric = [], MagicMock()
    metric.update = lambda labels, truth: scored.append(len(truth))
    monkeypatch.setattr(clips_file, "make_metric", lambda _: metric)
    Pieces(make_clip(finished, "")).score(clips_file.copied)
    assert len(scored) == 2
    monkeypatch.setattr(clips_file, "measure", lambda *_: pytest.fail("measured again"))
    capsys.readouterr()
    command(add_clips_arguments, clips_command, *flags, "--choose-on", prefix)
    assert capsys.readouterr().out.strip() == table.strip()
    assert tuple(first["network alone"]["iou"]) == CLASS_NAMES
