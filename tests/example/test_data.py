"""The training example's data sets, the checks on them, and the commands `split` and `inspect`."""

import hashlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torchvision
from PIL import Image
from torch.utils.data import DataLoader

from examples.derprop_voc.__main__ import PIPE_CLOSED, main
from examples.derprop_voc.config import ConfigError, make_config
from examples.derprop_voc.data import DataError, SegmentationDataset, load_data, read_image, read_list, read_mask
from examples.derprop_voc.sources import VOC_CLASSES, find_source
from examples.derprop_voc.split import checksum

SIZE = (6, 8)
CITY_CLASSES = (
    *("road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation"),
    *("terrain", "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle"),
)
# Label id -> train id of the 19 classes, from the data set's documentation.
CITY_IDS = dict(zip((7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33), range(19), strict=True))


def picture(path, seed=0, size=SIZE):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)).save(path)


def mask(path, labels, palette=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    png = Image.fromarray(np.broadcast_to(np.uint8(labels), SIZE))
    if palette:
        png.putpalette([(7 * value + 3) % 256 for value in range(768)])  # colours that say nothing about the ids
    png.save(path)


def write_list(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def make_voc(root):
    """VOC 2012 as torchvision unpacks it: t* are in train, v* in val, s* have no mask of VOC's own."""
    voc = root / "VOCdevkit" / "VOC2012"
    for seed, name in enumerate(("t1", "t2", "t3", "v1", "v2", "s1", "s2", "s3")):
        picture(voc / "JPEGImages" / f"{name}.jpg", seed)
        if name[0] != "s":
            mask(voc / "SegmentationClass" / f"{name}.png", seed + 1, palette=True)
    lists = voc / "ImageSets" / "Segmentation"
    write_list(lists / "train.txt", "t1", "t2", "t3")
    write_list(lists / "val.txt", "v1", "v2")
    write_list(lists / "trainval.txt", "t1", "t2", "t3", "v1", "v2")
    write_list(lists / "one" / "labeled.txt", "t1")
    write_list(lists / "one" / "unlabeled.txt", "t2", "t3")
    return voc


def sbd_mask(path, label):
    path.parent.mkdir(parents=True, exist_ok=True)
    scipy.io.savemat(path, {"GTcls": {"Segmentation": np.full(SIZE, label, np.uint8)}})


def make_sbd(root):
    """SBD as torchvision unpacks it; its own train and val cut across VOC's."""
    sbd = root / "sbd"
    splits = {"train": {"t1": 11, "s1": 12, "v1": 13}, "val": {"s2": 14, "s3": 15}}
    for split, labels in splits.items():
        write_list(sbd / f"{split}.txt", *labels)
        for name, label in labels.items():
            picture(sbd / "img" / f"{name}.jpg")
            sbd_mask(sbd / "cls" / f"{name}.mat", label)
    return sbd


def make_cityscapes(root):
    """Two training images and two for validation, with label ids as in the published archive."""
    for split, city, number in (("train", "ulm", 1), ("train", "bonn", 2), ("val", "jena", 3), ("val", "jena", 4)):
        name = f"{city}_00000{number}_000019"
        picture(root / "leftImg8bit" / split / city / f"{name}_leftImg8bit.png", number)
        mask(root / "gtFine" / split / city / f"{name}_gtFine_labelIds.png", [7, 8, 11, 33, 0, 255, 26, 4])
    write_list(root / "ImageSets" / "Segmentation" / "one" / "labeled.txt", "ulm_000001_000019")
    write_list(root / "ImageSets" / "Segmentation" / "one" / "unlabeled.txt", "bonn_000002_000019")
    return root


@pytest.fixture
def voc(tmp_path):
    return make_voc(tmp_path)


@pytest.fixture
def folder(tmp_path):
    """Three labelled, three unlabelled and two validation images in VOC layout."""
    for seed, name in enumerate(("a", "b", "c", "d", "e", "f", "y", "z")):
        picture(tmp_path / "JPEGImages" / f"{name}.jpg", seed)
        mask(tmp_path / "SegmentationClass" / f"{name}.png", [0, 1, 2, 0, 1, 0, 0, 255])
    write_list(tmp_path / "classes.txt", "sky", "road", "tree", "car")
    lists = tmp_path / "ImageSets" / "Segmentation"
    write_list(lists / "train.txt", "a", "b", "c", "d", "e", "f")
    write_list(lists / "val.txt", "y", "z")
    write_list(lists / "half" / "labeled.txt", "a", "b", "c")
    write_list(lists / "half" / "unlabeled.txt", "d", "e", "f")
    return tmp_path


def options(data, dataset="folder", partition="one", **others):
    return make_config({"data": str(data), "dataset": dataset, "partition": partition} | others)


def load(*arguments, **others):
    return load_data(options(*arguments, **others))


def names(items):
    return [item.name for item in items]


def lists_of(data):
    return names(data.labeled), names(data.unlabeled), names(data.val)


def command(capsys, *arguments):
    """Exit code, stdout and stderr of one command line."""
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


# --- VOC 2012 --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["", "VOCdevkit/VOC2012"])
def test_voc_is_read_from_either_folder(voc, tmp_path, place):
    data = load(tmp_path / place, "voc")
    assert lists_of(data) == (["t1"], ["t2", "t3"], ["v1", "v2"])
    assert data.class_names == VOC_CLASSES
    assert (len(VOC_CLASSES), VOC_CLASSES[8], VOC_CLASSES[15], VOC_CLASSES[20]) == (21, "cat", "person", "tvmonitor")
    assert (read_mask(data.val[0]) == 4).all()


def test_voc_that_is_not_there(tmp_path, capsys):
    code, _, stderr = command(capsys, "inspect", "--dataset", "voc", "--data", tmp_path)
    root = tmp_path / "VOCdevkit" / "VOC2012"
    assert (code, stderr) == (
        2,
        f"error: {root}: expected VOC 2012 (JPEGImages, SegmentationClass, ImageSets), found none; correct --data, "
        "or fetch it with --download\n",
    )


class Download:
    """Stands for a torchvision data set: notes its calls, and makes the files that a download makes."""

    def __init__(self, make):
        self.make, self.calls = make, []

    def __call__(self, root, image_set, **others):
        self.calls.append((root, image_set, others))
        return self.make(Path(root))


def test_voc_is_fetched_once_and_again_after_an_interruption(tmp_path, monkeypatch):
    download = Download(make_voc)
    monkeypatch.setattr(torchvision.datasets, "VOCSegmentation", download)
    data = load(tmp_path / "new", "voc", download=True)
    assert download.calls == [(str(tmp_path / "new"), "trainval", {"year": "2012", "download": True})]
    assert names(data.val) == ["v1", "v2"]
    load(tmp_path / "new", "voc", download=True)
    assert len(download.calls) == 1
    lost = ("SegmentationClass/t3.png", "JPEGImages/v2.jpg", "ImageSets/Segmentation/trainval.txt")
    for calls, name in enumerate(lost):
        (tmp_path / "new" / "VOCdevkit" / "VOC2012" / name).unlink()
        load(tmp_path / "new", "voc", download=True)
        assert len(download.calls) == calls + 2


def test_failed_and_parallel_downloads_end_with_one_line(tmp_path, monkeypatch, capsys):
    def fail(root):
        raise OSError("no route\nto host")

    download = Download(fail)
    monkeypatch.setattr(torchvision.datasets, "VOCSegmentation", download)
    arguments = ("inspect", "--dataset", "voc", "--data", tmp_path, "--download")
    assert command(capsys, *arguments)[::2] == (
        2,
        f"error: {tmp_path}: expected to fetch VOC 2012, found: no route to host; "
        "try again, or unpack it there by hand\n",
    )
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, stderr = command(capsys, *arguments)
    assert code == 2
    assert "expected VOC 2012 to be complete before several processes start" in stderr
    assert len(download.calls) == 1


@pytest.mark.parametrize(
    ("dataset", "others", "message"),
    [
        ("folder", {"sbd": True}, r"sbd: belongs to dataset voc, got dataset folder"),
        ("cityscapes", {"sbd": True}, r"sbd: belongs to dataset voc, got dataset cityscapes"),
        ("folder", {"download": True}, r"download: belongs to dataset voc, got dataset folder"),
        ("voc", {"num_classes": 20}, r"num_classes: expected 0 or 21 for dataset voc, got 20"),
        ("voc", {"data": ""}, r"data: expected the folder of the data set, got none"),
    ],
)
def test_options_that_do_not_fit_the_data_set(voc, tmp_path, dataset, others, message):
    with pytest.raises(ConfigError, match=message):
        load_data(make_config({"data": str(tmp_path), "dataset": dataset} | others))


def test_own_names_for_the_classes_of_voc(voc, tmp_path):
    own = [f"class {index}" for index in range(21)]
    assert load(tmp_path, "voc", class_names=own).class_names == tuple(own)


# --- SBD -------------------------------------------------------------------------------------------------------------


def test_sbd_adds_the_masks_that_voc_lacks(voc, tmp_path):
    make_sbd(tmp_path)
    source = find_source(options(tmp_path, "voc", sbd=True))
    added = voc / "SegmentationClassAug"
    assert sorted(path.name for path in added.iterdir()) == ["s1.png", "s2.png", "s3.png"]
    assert source.train.read_text() == "s1\ns2\ns3\nt1\nt2\nt3\n"
    assert source.train == voc / "ImageSets" / "Segmentation" / "train_aug.txt"
    items = read_list(source.train, source.root, source.item)
    assert [int(read_mask(item)[0, 0]) for item in items] == [12, 14, 15, 1, 2, 3]
    with Image.open(added / "s1.png") as png:
        assert (png.mode, png.getpalette()[3:6]) == ("P", [128, 0, 0])  # VOC's colour of class 1


@pytest.mark.parametrize(
    "line",
    [
        "{0}",
        "JPEGImages/{0}.jpg",
        "JPEGImages/{0}.jpg SegmentationClass/{0}.png",
        "/JPEGImages/{0}.jpg /SegmentationClassAug/{0}.png",
    ],
)
def test_every_form_of_a_list_finds_the_mask_of_voc_or_sbd(voc, tmp_path, line):
    make_sbd(tmp_path)
    write_list(voc / "ImageSets" / "Segmentation" / "one" / "labeled.txt", line.format("s2"), line.format("t2"))
    data = load(tmp_path, "voc", sbd=True)
    assert [item.mask.relative_to(voc).as_posix() for item in data.labeled] == [
        "SegmentationClassAug/s2.png",
        "SegmentationClass/t2.png",
    ]


def test_a_mask_that_a_list_names_and_that_is_there_is_used(voc, tmp_path):
    mask(voc / "SegmentationClassAug" / "t1.png", 9)
    line = "JPEGImages/t1.jpg SegmentationClassAug/t1.png"
    write_list(voc / "ImageSets" / "Segmentation" / "one" / "labeled.txt", line)
    assert (read_mask(load(tmp_path, "voc").labeled[0]) == 9).all()


def test_sbd_is_converted_once(voc, tmp_path, monkeypatch):
    sbd, added = make_sbd(tmp_path), voc / "SegmentationClassAug"
    find_source(options(tmp_path, "voc", sbd=True))
    (added / "s1.png").unlink()
    sbd_mask(sbd / "cls" / "s1.mat", 5)
    sbd_mask(sbd / "cls" / "s2.mat", 5)
    write_list(voc / "ImageSets" / "Segmentation" / "train_aug.txt", "s1", "t1")
    find_source(options(tmp_path, "voc", sbd=True))
    # Only what was missing is made anew, and a list that is there stays.
    assert [Image.open(added / f"{name}.png").getpixel((0, 0)) for name in ("s1", "s2")] == [5, 14]
    source = find_source(options(tmp_path, "voc", sbd=True))
    assert source.train.read_text() == "s1\nt1\n"
    # Complete: neither SBD nor scipy is needed any more.
    monkeypatch.setattr(torchvision.datasets, "SBDataset", None)
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    find_source(options(tmp_path, "voc", sbd=True))


def test_an_interrupted_conversion_leaves_no_list_and_goes_on(voc, tmp_path):
    sbd = make_sbd(tmp_path)
    (sbd / "cls" / "s2.mat").write_bytes(b"no matrix")
    with pytest.raises(DataError, match=r"s2\.mat: expected a mask of SBD and its image, found: \w+: .") as error:
        find_source(options(tmp_path, "voc", sbd=True))
    assert "\n" not in str(error.value)
    path = voc / "ImageSets" / "Segmentation" / "train_aug.txt"
    assert not path.exists()
    sbd_mask(sbd / "cls" / "s2.mat", 14)
    find_source(options(tmp_path, "voc", sbd=True))
    assert path.exists()


def test_what_sbd_needs(voc, tmp_path, monkeypatch, capsys):
    arguments = ("inspect", "--dataset", "voc", "--data", tmp_path, "--partition", "one", "--sbd")
    folder = tmp_path / "sbd"
    assert command(capsys, *arguments)[2] == (
        f"error: {folder}: expected SBD (img, cls, train.txt, val.txt), found no img; fetch it with --download\n"
    )
    download = Download(lambda root: make_sbd(root.parent))
    original = torchvision.datasets.SBDataset
    monkeypatch.setattr(
        torchvision.datasets,
        "SBDataset",
        lambda *places, **others: (download if others.get("download") else original)(*places, **others),
    )
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "scipy.io", None)
        assert command(capsys, *arguments, "--download")[2] == (
            f"error: {folder}: expected scipy, to read SBD's .mat files, found none; pip install scipy\n"
        )
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "4")
        assert "expected SBD to be complete before several processes start" in command(capsys, *arguments)[2]
    assert command(capsys, *arguments, "--download")[0] == 0
    assert download.calls == [(str(folder), "train", {"mode": "segmentation", "download": True})]


def test_a_mask_of_sbd_without_sbd_names_the_way_out(voc, tmp_path):
    write_list(voc / "ImageSets" / "Segmentation" / "one" / "labeled.txt", "s1")
    with pytest.raises(DataError, match=r"s1\.png: expected the mask of s1\.jpg, found no such file; .* with --sbd$"):
        load(tmp_path, "voc")


# --- Cityscapes ------------------------------------------------------------------------------------------------------


def test_cityscapes_label_ids_become_train_ids(tmp_path):
    data = load(make_cityscapes(tmp_path), "cityscapes")
    assert data.class_names == CITY_CLASSES
    assert lists_of(data) == (
        ["ulm_000001_000019"],
        ["bonn_000002_000019"],
        ["jena_000003_000019", "jena_000004_000019"],
    )
    path = data.labeled[0].mask
    for first in range(0, 34, 8):
        mask(path, [min(label, 33) for label in range(first, first + 8)])
        expected = [CITY_IDS.get(min(label, 33), 255) for label in range(first, first + 8)]
        assert read_mask(data.labeled[0])[0].tolist() == expected
    sample = SegmentationDataset(data.val, labeled=True)[0]["mask"]
    assert sample[0].tolist() == [0, 1, 2, 18, 255, 255, 13, 255]


@pytest.mark.parametrize("image", ["", "leftImg8bit/train/ulm/ulm_000001_000019_leftImg8bit.png"])
@pytest.mark.parametrize("named", ["", "labelTrainIds", "labelIds"])
@pytest.mark.parametrize("stored", [False, True])
def test_cityscapes_lists_in_every_form(tmp_path, image, named, stored):
    stem = make_cityscapes(tmp_path) / "gtFine" / "train" / "ulm" / "ulm_000001_000019_gtFine"
    if stored:
        mask(Path(f"{stem}_labelTrainIds.png"), 7)
    line = image or "ulm_000001_000019"
    line += f" {Path(stem).relative_to(tmp_path).as_posix()}_{named}.png" if named else ""
    write_list(tmp_path / "ImageSets" / "Segmentation" / "one" / "labeled.txt", line)
    (item,) = load(tmp_path, "cityscapes").labeled
    assert (item.name, item.image.name) == ("ulm_000001_000019", "ulm_000001_000019_leftImg8bit.png")
    train_ids = stored and named != "labelIds"
    assert item.mask.name.endswith("_labelTrainIds.png" if train_ids else "_labelIds.png")
    assert read_mask(item)[0, :3].tolist() == ([7, 7, 7] if train_ids else [0, 1, 2])


def test_cityscapes_validation_is_a_list_or_the_whole_folder(tmp_path):
    lists = make_cityscapes(tmp_path) / "ImageSets" / "Segmentation"
    for path, city in ((lists / "val.txt", "jena_000004_000019"), (lists / "one" / "val.txt", "jena_000003_000019")):
        write_list(path, city)
        assert names(load(tmp_path, "cityscapes").val) == [city]


def test_cityscapes_errors(tmp_path):
    with pytest.raises(DataError, match=r"leftImg8bit: expected this folder of Cityscapes, .*www\.cityscapes-dataset"):
        load(tmp_path, "cityscapes")
    make_cityscapes(tmp_path)
    with pytest.raises(ConfigError, match=r"download: Cityscapes needs a login; unpack .*cityscapes-dataset\.com"):
        load(tmp_path, "cityscapes", download=True)
    path = tmp_path / "gtFine" / "train" / "ulm" / "ulm_000001_000019_gtFine_labelIds.png"
    mask(path, 34)
    with pytest.raises(DataError, match=r"labelIds\.png: expected Cityscapes' label ids 0 to 33 or 255, found 34"):
        load(tmp_path, "cityscapes")
    path.unlink()
    with pytest.raises(DataError, match=r"labelIds\.png: expected the mask of ulm_.*_leftImg8bit\.png, found no such"):
        load(tmp_path, "cityscapes")
    mask(path, 7)
    for image in (tmp_path / "leftImg8bit" / "val").rglob("*.png"):
        image.unlink()
    with pytest.raises(DataError, match=r"val: expected images named <city>/\*_leftImg8bit\.png, found none"):
        load(tmp_path, "cityscapes")


# --- checks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "place"), [("y", "labeled"), ("JPEGImages/y.jpg", "unlabeled")])
def test_no_image_is_trained_on_and_validated(folder, first, place):
    write_list(folder / "ImageSets" / "Segmentation" / "half" / f"{place}.txt", "a", first)
    message = rf"half/{place}\.txt: expected no image of the validation list .*Segmentation/val\.txt, found y in both"
    with pytest.raises(DataError, match=message):
        load(folder, partition="half")


def test_an_image_may_be_labelled_and_unlabelled(folder, capsys):
    write_list(folder / "ImageSets" / "Segmentation" / "half" / "unlabeled.txt", "a", "d")
    assert lists_of(load(folder, partition="half"))[:2] == (["a", "b", "c"], ["a", "d"])
    _, stdout, _ = command(capsys, "inspect", "--data", folder, "--partition", "half")
    assert stdout.endswith("note: 1 labelled images are in the unlabelled list, too\n")


@pytest.mark.parametrize("name", ["a", "d", "y"])
@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_truncated_images_stop_before_training(folder, name, suffix):
    path = folder / "JPEGImages" / f"{name}.jpg"
    path.unlink()
    path = path.with_suffix(suffix)
    picture(path, size=(60, 80))
    mask_path = folder / "SegmentationClass" / f"{name}.png"
    Image.fromarray(np.zeros((60, 80), np.uint8)).save(mask_path)
    whole = path.read_bytes()
    path.write_bytes(whole + b"\0\0")  # bytes after the end are no damage
    load(folder, partition="half")
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=rf"{name}{suffix}: expected an image that is whole, found: .*truncated"):
        load(folder, partition="half")


def test_truncated_masks_stop_before_training(folder):
    path = folder / "SegmentationClass" / "b.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 3, SIZE, np.uint8)).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.index(b"IDAT") + 12])
    with pytest.raises(DataError, match=r"b\.png: expected a PNG mask that is whole, found: .*truncated"):
        load(folder, partition="half")


@pytest.mark.parametrize(("workers", "place"), [(0, 8), (1, 8), (0, -1)])  # the pixels; their chunk's length
def test_damage_found_while_reading_is_one_line(folder, workers, place):
    path = folder / "JPEGImages" / "d.png"
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (*SIZE, 3), np.uint8)).save(stream, "PNG")
    damaged = bytearray(stream.getvalue())
    damaged[damaged.index(b"IDAT") + place] = 0x28
    path.with_suffix(".jpg").unlink()
    path.write_bytes(damaged)
    data = load(folder, partition="half")
    loader = DataLoader(SegmentationDataset(data.unlabeled, labeled=False), batch_size=None, num_workers=workers)
    batches = iter(loader)
    with pytest.raises(DataError) as error:
        list(batches)
    if workers:
        batches._shutdown_workers()  # left to the garbage collector, it waits for five seconds
    assert str(error.value).startswith(f"{path}: expected an image that is whole, found: ")
    assert "\n" not in str(error.value)


def test_an_image_that_vanished_is_one_line(tmp_path):
    with pytest.raises(DataError, match=r"^\S+gone\.png: expected an image that is whole, found: .*No such file"):
        read_image(tmp_path / "gone.png")


def test_unlabelled_masks_are_checked_only_if_they_are_read(folder):
    path = folder / "SegmentationClass" / "e.png"
    mask(path, 4)
    load(folder, partition="half")
    with pytest.raises(DataError, match=r"e\.png: expected labels 0 to 3 or 255 \(option num_classes\), found 4"):
        load(folder, partition="half", measure_pseudo_labels=True)
    (folder / "SegmentationClass" / "d.png").unlink()  # not all there: nothing is measured
    load(folder, partition="half", measure_pseudo_labels=True)


def test_lists_of_other_editors(folder):
    lists = folder / "ImageSets" / "Segmentation"
    (lists / "half" / "labeled.txt").write_bytes("a\r\nb\r\n".encode("utf-8-sig"))
    (folder / "classes.txt").write_text("sky\nroad\ntree")
    data = load(folder, partition="half")
    assert names(data.labeled) == ["a", "b"]
    assert data.class_names == ("sky", "road", "tree")
    (lists / "half" / "labeled.txt").write_bytes("ä".encode("latin-1"))
    with pytest.raises(DataError, match=r"labeled\.txt: expected a list of images, found a file that is not UTF-8"):
        load(folder, partition="half")


def test_a_partition_is_a_name_or_a_path(folder, tmp_path):
    elsewhere = tmp_path / "elsewhere" / "mine"
    write_list(elsewhere / "labeled.txt", "b")
    write_list(elsewhere / "unlabeled.txt", "c")
    assert lists_of(load(folder, partition=str(elsewhere))) == (["b"], ["c"], ["y", "z"])
    write_list(elsewhere.parent / "val.txt", "z")
    assert names(load(folder, partition=str(elsewhere)).val) == ["z"]
    write_list(elsewhere / "val.txt", "y")
    assert names(load(folder, partition=str(elsewhere)).val) == ["y"]
    place = folder / "ImageSets" / "Segmentation" / "1_8"
    with pytest.raises(DataError, match=rf"^{place}: expected the folder of a partition, found none, nor one at 1_8; "):
        load(folder, partition="1_8")


# --- split -----------------------------------------------------------------------------------------------------------


def split(capsys, *arguments):
    code, stdout, stderr = command(capsys, "split", *arguments)
    assert code == 0, stderr
    return stdout


def read_split(folder):
    """The three lists of a partition; a list that is not there is None."""
    paths = [folder / f"{name}.txt" for name in ("labeled", "unlabeled", "val")]
    return tuple(path.read_text().splitlines() if path.is_file() else None for path in paths)


def drawing_order(names, seed):
    return sorted(names, key=lambda name: hashlib.sha256(f"{seed} {name}".encode()).digest())


def test_a_split_is_the_same_everywhere(folder, capsys):
    """The literals stand for every split that somebody has made: a change of them changes all."""
    stdout = split(capsys, "--data", folder, "--labeled", 2, "--val", 1, "--seed", 3, "--out", "new")
    out = folder / "ImageSets" / "Segmentation" / "new"
    assert read_split(out) == (["a", "d"], ["c", "e", "f"], ["b"])
    assert stdout == (
        f"     2 images in {out}/labeled.txt\n     3 images in {out}/unlabeled.txt\n     1 images in {out}/val.txt\n"
        f"sha256 {checksum(out)}\n"
    )
    assert lists_of(load(folder, partition="new")) == read_split(out)


def test_the_checksum_is_that_of_sha256sum(tmp_path):
    write_list(tmp_path / "labeled.txt", "a", "d")
    write_list(tmp_path / "unlabeled.txt", "c")
    text = "".join(
        f"{hashlib.sha256(content).hexdigest()}  {name}\n"
        for content, name in ((b"a\nd\n", "labeled.txt"), (b"c\n", "unlabeled.txt"))
    )
    before = checksum(tmp_path)
    assert before == hashlib.sha256(text.encode()).hexdigest()
    write_list(tmp_path / "val.txt", "b")
    assert checksum(tmp_path) != before


def test_splits_are_parts_of_the_list_and_nested(folder, capsys):
    lists = folder / "ImageSets" / "Segmentation"
    for seed in range(2):
        smaller = set()
        for count in (1, 3, 6):
            split(capsys, "--data", folder, "--labeled", count, "--seed", seed, "--out", f"{seed}_{count}")
            labeled, unlabeled, val = read_split(lists / f"{seed}_{count}")
            assert (len(labeled), val) == (count, None)
            assert sorted(labeled + unlabeled) == [*"abcdef"]
            assert smaller < set(labeled)
            smaller = set(labeled)
    assert checksum(lists / "0_3") != checksum(lists / "1_3")


def test_a_split_does_not_depend_on_the_order_and_form_of_the_list(folder, capsys, tmp_path):
    lines = [f"JPEGImages/{name}.jpg SegmentationClass/{name}.png" for name in "fbdace"]
    write_list(tmp_path / "long.txt", *lines, lines[0])  # one twice
    for out, others in (("short", ()), ("long", ("--list", tmp_path / "long.txt"))):
        split(capsys, "--data", folder, "--labeled", 2, "--val", 2, "--out", tmp_path / "made" / out, *others)
    short, long = (read_split(tmp_path / "made" / out) for out in ("short", "long"))
    assert {line for part in long for line in part} == set(lines)
    assert tuple([Path(line.split()[0]).stem for line in part] for part in long) == short


def test_lists_and_partitions_go_by_name_or_path(folder, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for out, place in (("new", folder / "ImageSets" / "Segmentation" / "new"), ("lists/new", Path("lists/new"))):
        split(capsys, "--data", folder, "--labeled", 1, "--list", "val.txt", "--out", out)
        labeled, unlabeled, _ = read_split(place)
        assert sorted(labeled + unlabeled) == ["y", "z"]


def test_holding_out_keeps_the_labelled_list(folder, capsys):
    lists = folder / "ImageSets" / "Segmentation"
    write_list(lists / "half" / "unlabeled.txt", "a", "d", "e", "f")  # a is labelled, too
    split(capsys, "--data", folder, "--from", "half", "--val", 3, "--out", "tuned")
    assert read_split(lists / "tuned") == (["a", "b", "c"], ["a"], ["d", "e", "f"])
    split(capsys, "--data", folder, "--from", lists / "half", "--val", 1, "--out", "other")
    labeled, unlabeled, (held,) = read_split(lists / "other")
    assert (labeled, sorted([*unlabeled, held])) == (["a", "b", "c"], ["a", "d", "e", "f"])
    assert names(load(folder, partition="other").val) == [held]


def test_split_of_voc_and_sbd(voc, tmp_path, capsys):
    make_sbd(tmp_path)
    for sbd, pool in (("--no-sbd", ["t1", "t2", "t3"]), ("--sbd", ["s1", "s2", "s3", "t1", "t2", "t3"])):
        split(capsys, "--dataset", "voc", "--data", tmp_path, sbd, "--labeled", 2, "--out", f"with{sbd}")
        labeled, unlabeled, _ = read_split(voc / "ImageSets" / "Segmentation" / f"with{sbd}")
        assert sorted(labeled + unlabeled) == pool


def test_split_of_cityscapes_writes_lines_as_they_are_published(tmp_path, capsys):
    make_cityscapes(tmp_path)
    split(capsys, "--dataset", "cityscapes", "--data", tmp_path, "--labeled", 1, "--out", "new")
    labeled, unlabeled, _ = read_split(tmp_path / "ImageSets" / "Segmentation" / "new")
    assert sorted(labeled + unlabeled) == [
        f"leftImg8bit/train/{name}_leftImg8bit.png gtFine/train/{name}_gtFine_labelTrainIds.png"
        for name in ("bonn/bonn_000002_000019", "ulm/ulm_000001_000019")
    ]
    data = load(tmp_path, "cityscapes", partition="new")
    assert sorted(names(data.labeled + data.unlabeled)) == ["bonn_000002_000019", "ulm_000001_000019"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--labeled", 0), r"labeled: expected at least 1, got 0"),
        (("--labeled", 1, "--val", -1), r"val: expected at least 0, got -1"),
        (("--from", "half"), r"val: expected at least 1, got 0"),
        (
            ("--labeled", 5, "--val", 2),
            r"\S+train\.txt: expected at least 7 images with masks to draw from, found 6 among 6",
        ),
        (
            ("--from", "half", "--val", 4),
            r"\S+half/unlabeled\.txt: expected at least 4 images with masks to draw from, found 3 among 3",
        ),
        (
            ("--labeled", 1, "--list", "none.txt"),
            r"\S+Segmentation/none\.txt: expected .* found no such file; .*--list$",
        ),
        (("--from", "quarter", "--val", 1), r"\S+quarter: expected the folder of a partition, found none"),
    ],
)
def test_split_errors(folder, capsys, arguments, message):
    code, _, stderr = command(capsys, "split", "--data", folder, "--out", "new", *arguments)
    assert code == 2
    assert re.match(f"error: {message}", stderr)
    assert stderr.count("\n") == 1
    assert not (folder / "ImageSets" / "Segmentation" / "new").exists()


def test_images_without_a_mask_are_unlabelled(folder, capsys):
    """A few of one's own images are labelled: they are drawn from, whatever the order of the hashes says."""
    for name in drawing_order("abcdef", 0)[:3]:
        (folder / "SegmentationClass" / f"{name}.png").unlink()
    masked = drawing_order("abcdef", 0)[3:]
    split(capsys, "--data", folder, "--labeled", 1, "--val", 1, "--out", "new")
    lists = folder / "ImageSets" / "Segmentation"
    assert read_split(lists / "new") == (masked[:1], sorted({*"abcdef"} - {*masked[:2]}), masked[1:2])
    split(capsys, "--data", folder, "--from", "new", "--val", 1, "--out", "held")
    assert read_split(lists / "held")[2] == masked[2:]
    (folder / "SegmentationClass" / f"{masked[2]}.png").unlink()
    code, _, stderr = command(capsys, "split", "--data", folder, "--labeled", 2, "--val", 1, "--out", "other")
    assert (code, "expected at least 3 images with masks to draw from, found 2 among 6" in stderr) == (2, True)


def test_a_folder_without_a_list_is_drawn_from_as_a_whole(folder, capsys):
    (folder / "ImageSets" / "Segmentation" / "train.txt").unlink()
    there = sorted(path.stem for path in (folder / "JPEGImages").iterdir())
    split(capsys, "--data", folder, "--labeled", 2, "--val", 1, "--out", "new")
    lists = read_split(folder / "ImageSets" / "Segmentation" / "new")
    assert sorted(name for names in lists for name in names) == there
    assert {*"abcdef"} < {*there}
    (folder / "JPEGImages" / "a.jpg").rename(folder / "JPEGImages" / "a.JPG")
    code, _, stderr = command(capsys, "split", "--data", folder, "--labeled", 2, "--out", "other")
    assert (code, "a.JPG: expected .jpg, .png, .jpeg in lower case" in stderr) == (2, True)


@pytest.mark.parametrize("place", [0, 1])
def test_split_checks_the_masks_of_labelled_and_held_out_images(folder, capsys, place):
    name = drawing_order("abcdef", 0)[place]
    mask(folder / "SegmentationClass" / f"{name}.png", 4)
    arguments = ("--data", folder, "--labeled", 1, "--val", 1, "--out", folder / "lists" / "new")
    code, _, stderr = command(capsys, "split", *arguments)
    assert (code, f"{name}.png: expected labels 0 to 3" in stderr) == (2, True)
    assert not (folder / "lists").exists()


def test_split_refuses_to_replace_another_one(folder, capsys):
    arguments = ("split", "--data", folder, "--labeled", 2, "--out", "new")
    assert command(capsys, *arguments, "--val", 1)[0] == 0
    out = folder / "ImageSets" / "Segmentation" / "new"
    before = checksum(out)
    assert command(capsys, *arguments, "--val", 1)[0] == 0  # the same again does no harm
    for others in (("--val", 1, "--seed", 1), ("--val", 2), ()):
        code, _, stderr = command(capsys, *arguments, *others)
        assert code == 2
        assert re.fullmatch(rf"error: {out}/\w+\.txt: expected no list, or the same one, found another; .*\n", stderr)
        assert checksum(out) == before
    (out / "labeled.txt").unlink()
    (out / "unlabeled.txt").unlink()
    # Without --val, the val.txt that is there would be used.
    assert "val.txt: expected no list" in command(capsys, *arguments)[2]
    assert not (out / "labeled.txt").exists()


# --- inspect ---------------------------------------------------------------------------------------------------------


def test_inspect_counts_pixels_images_and_sizes(folder, capsys):
    picture(folder / "JPEGImages" / "d.jpg", size=(10, 20))
    picture(folder / "JPEGImages" / "e.jpg", size=(7, 9))
    mask(folder / "SegmentationClass" / "b.png", 2)
    mask(folder / "SegmentationClass" / "c.png", [2, 2, 2, 2, 2, 2, 2, 0])
    mask(folder / "SegmentationClass" / "z.png", 3)
    code, stdout, _ = command(capsys, "inspect", "--data", folder, "--partition", "half")
    lists = folder / "ImageSets" / "Segmentation"
    assert code == 0
    expected = f"""\
partition  {lists}/half
validation {lists}/val.txt
sha256     {checksum(lists / "half")}

list        images    width min/median/max   height min/median/max
labeled          3                       8                       6
unlabeled        3              8 / 9 / 20              6 / 7 / 10
val              2                       8                       6

                      labeled                val
 id  class     pixels  images     pixels  images
  0  sky      20.83 %       2    25.00 %       1
  1  road      8.33 %       1    12.50 %       1
  2  tree     66.67 %       3     6.25 %       1
  3  car       0.00 %       0    50.00 %       1
255  void      4.17 %       1     6.25 %       1
warning: no labelled image contains car
"""
    assert stdout == expected


def test_inspect_without_an_unlabelled_list(folder, capsys):
    (folder / "ImageSets" / "Segmentation" / "half" / "unlabeled.txt").unlink()
    arguments = ("inspect", "--data", folder, "--partition", "half", "--variant", "supervised")
    code, stdout, _ = command(capsys, *arguments)
    assert code == 0
    assert "unlabeled        0                       -                       -\n" in stdout


def test_a_partition_without_validation_images_says_how_to_get_some(folder, capsys):
    (folder / "ImageSets" / "Segmentation" / "val.txt").unlink()
    code, _, stderr = command(capsys, "inspect", "--data", folder, "--partition", "half")
    assert (code, "found none, nor a val.txt in" in stderr, "split, --val" in stderr) == (2, True, True)


def test_a_reader_who_has_seen_enough_is_no_error(folder):
    arguments = (sys.executable, "-m", "examples.derprop_voc", "inspect", "--data", folder, "--partition", "half")
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([*map(str, arguments)], stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (PIPE_CLOSED, "")


def test_inspect_refuses_sizes_that_a_training_would_refuse(folder, capsys):
    config = Path(__file__).parents[2] / "examples" / "derprop_voc" / "configs" / "frozen.yaml"
    arguments = ("inspect", "--config", config, "--data", folder, "--partition", "half")
    code, stdout, stderr = command(capsys, *arguments)
    assert (code, "image_size: expected multiples of output_stride = 8" in stderr) == (2, True)
    assert "labeled " in stdout
    assert command(capsys, *arguments, "--image-size", 16, 16)[0] == 0


def test_inspect_shows_train_ids_of_cityscapes(tmp_path, capsys):
    make_cityscapes(tmp_path)
    arguments = ("inspect", "--dataset", "cityscapes", "--data", tmp_path, "--partition", "one")
    _, stdout, _ = command(capsys, *arguments)
    assert " 13  car              12.50 %       1    12.50 %       2\n" in stdout
    assert "warning: no labelled image contains wall, fence, pole," in stdout
