"""The training example's data sets and the checks on them."""

import io
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torchvision
from PIL import Image
from torch.utils.data import DataLoader

from examples.derprop_voc.config import make_config
from examples.derprop_voc.data import SegmentationDataset, check_image, load_data, read_image, read_list, read_mask
from examples.derprop_voc.errors import ConfigError, DataError
from examples.derprop_voc.sources import VOC_CLASSES, find_source
from tests.example.data_sets import (
    CITY_CLASSES,
    CITY_IDS,
    SIZE,
    command,
    lists_of,
    load,
    make_cityscapes,
    make_sbd,
    make_voc,
    mask,
    names,
    options,
    picture,
    sbd_mask,
    write_list,
)

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
    write_list(lists / "half" / "labeled.txt", "a")
    (folder / "classes.txt").write_bytes("sky\r\nroad\r\ntree\r\n".encode("utf-8-sig"))
    assert load(folder, partition="half").class_names == ("sky", "road", "tree")
    (folder / "classes.txt").write_bytes("säule".encode("latin-1"))
    with pytest.raises(DataError, match=r"classes\.txt: expected class names, found a file that is not UTF-8"):
        load(folder, partition="half")
    write_list(folder / "classes.txt", "sky", "road", "sky")
    with pytest.raises(DataError, match=r"classes\.txt: expected a name of its own for every class, found 'sky' twice"):
        load(folder, partition="half")


@pytest.mark.parametrize("place", ["labeled.txt", "val.txt"])
def test_void_alone_is_nothing_to_train_on_or_to_score(folder, place):
    for name in {"labeled.txt": "abc", "val.txt": "yz"}[place]:
        mask(folder / "SegmentationClass" / f"{name}.png", 255)
    with pytest.raises(DataError, match=rf"{place}: expected labelled pixels, found only void"):
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


# --- what cameras and other programs write ---------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_is_read_as_it_is_shown(folder, orientation):
    shown = np.zeros((16, 32, 3), np.uint8)  # JPEG is exact enough on blocks of one colour
    shown[:8, 8:16] = 255
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # what Pillow calls the inverse of each
    stored = Image.fromarray(shown)
    if orientation > 1:
        stored = stored.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = folder / "JPEGImages" / "a.jpg"
    stored.save(path, exif=exif, quality=100)
    read = read_image(path).permute(1, 2, 0).numpy()
    assert read.shape == shown.shape
    assert (np.abs(read.astype(int) - shown) < 32).all()
    assert check_image(path) == (32, 16)


def test_images_of_more_than_8_bits_are_refused(folder):
    path = folder / "JPEGImages" / "a.png"
    (folder / "JPEGImages" / "a.jpg").unlink()
    Image.fromarray(np.arange(48, dtype=np.uint16).reshape(SIZE) * 1000).save(path)
    with pytest.raises(DataError, match=r"a.png: expected an image of 8 bits a channel, found mode I;16"):
        load(folder, partition="half")


def test_one_class_alone_is_refused(folder):
    (folder / "classes.txt").unlink()
    for path in (folder / "SegmentationClass").iterdir():
        mask(path, [0, 0, 0, 0, 255, 255, 255, 255])
    with pytest.raises(DataError, match=r"expected two classes or more, found 0 alone; 255 is void"):
        load(folder, partition="half")


def test_gray_masks_of_fewer_bits_are_refused(folder):
    """Some programs that shrink PNGs write them; their values are spread up to 255 when they are read."""
    ids = np.broadcast_to(np.uint8([0, 1, 2, 0, 1, 0, 0, 3]), SIZE)
    path = folder / "SegmentationClass" / "a.png"
    path.write_bytes(gray_png(ids, bits=2))
    with pytest.raises(DataError, match=r"a.png: expected a PNG of ids, with a palette or 8-bit gray, found mode L;2"):
        load(folder, partition="half")


def gray_png(ids, bits):
    """A gray PNG, which Pillow writes with 8 bits only."""
    rows = (np.uint8(ids)[:, :, None] >> np.arange(bits - 1, -1, -1)) & 1
    packed = np.packbits(rows.reshape(len(ids), -1), axis=1)
    height, width = ids.shape

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row.tobytes() for row in packed))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
