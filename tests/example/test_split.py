"""The command `split`: seeded partitions of every kind of data set."""

import hashlib
import re
from pathlib import Path

import pytest

from examples.derprop_voc.split import checksum
from tests.example.data_sets import command, lists_of, load, make_cityscapes, make_sbd, mask, names, picture, write_list


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
            r"\S+train\.txt: expected at least 7 images with masks \(such as \S+SegmentationClass/a\.png\) to draw "
            r"from, found 6 among 6; --labeled and --val together can be 6 at most$",
        ),
        (
            ("--from", "half", "--val", 4),
            r"\S+half/unlabeled\.txt: expected at least 4 images with masks \(such as \S+\) to draw from, "
            r"found 3 among 3; --val can be 3 at most$",
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
    assert (code, "to draw from, found 2 among 6" in stderr) == (2, True)


def test_nothing_is_left_to_hold_out(folder, capsys):
    lists = folder / "ImageSets" / "Segmentation" / "half"
    (lists / "unlabeled.txt").write_text((lists / "labeled.txt").read_text())
    code, _, stderr = command(capsys, "split", "--data", folder, "--from", "half", "--val", 1, "--out", "new")
    assert (code, "at least 1 images with masks to draw from, found 0 among 0" in stderr) == (2, True)


def test_a_folder_of_another_layout(tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    code, _, stderr = command(capsys, "split", "--data", tmp_path, "--labeled", 1, "--out", "new")
    assert code == 2
    assert "expected VOC layout, images in JPEGImages and masks in SegmentationClass, found neither" in stderr


def test_a_folder_without_a_list_is_drawn_from_as_a_whole(folder, capsys):
    (folder / "ImageSets" / "Segmentation" / "train.txt").unlink()
    for name, there in (("new", "abcdef"), ("all", "abcdefyz")):  # but for the images that the data set scores on
        split(capsys, "--data", folder, "--labeled", 2, "--val", 1, "--out", name)
        lists = read_split(folder / "ImageSets" / "Segmentation" / name)
        assert "".join(sorted(name for names in lists for name in names)) == there
        (folder / "ImageSets" / "Segmentation" / "val.txt").unlink(missing_ok=True)
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


def test_a_file_where_a_folder_is_wanted_is_one_line(folder, capsys):
    place = folder / "notes.txt"
    place.touch()
    code, _, stderr = command(capsys, "split", "--data", folder, "--labeled", 2, "--out", place / "new")
    assert (code, stderr) == (2, f"error: {place / 'new'}: Not a directory\n")


def test_names_that_a_list_cannot_hold_are_refused(folder, capsys):
    (folder / "ImageSets" / "Segmentation" / "train.txt").unlink()
    arguments = ("split", "--data", folder, "--labeled", 2, "--out", folder / "new")
    for name, message in (("a.png", "expected one image of this name, found a.jpg, too"),
                          ("my a.jpg", "my a.jpg: expected a name without spaces")):  # fmt: skip
        picture(folder / "JPEGImages" / name)
        code, _, stderr = command(capsys, *arguments)
        assert (code, message in stderr) == (2, True), stderr
        (folder / "JPEGImages" / name).unlink()
    assert not (folder / "new").exists()
