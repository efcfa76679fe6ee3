"""The command `inspect`: what a training would read."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from examples.derprop_voc.__main__ import PIPE_CLOSED
from examples.derprop_voc.split import checksum
from tests.example.data_sets import command, make_cityscapes, mask, picture


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


@pytest.mark.parametrize(("size", "swapped"), [((6, 8), False), ((12, 17), False), ((8, 6), True)])
def test_height_and_width_that_may_be_swapped(folder, capsys, size, swapped):
    arguments = ("inspect", "--data", folder, "--partition", "half", "--image-size", *size)
    code, stdout, _ = command(capsys, *arguments)
    assert code == 0
    expected = (
        "warning: image_size 8 6 (height, width) makes images 0.75 times as wide as high, and they are 1.33 times; "
    )
    assert (expected + "is 6 8 meant?\n" in stdout) == swapped
    assert ("warning: image_size" in stdout) == swapped


def test_another_shape_is_no_swap(folder, capsys):
    _, stdout, _ = command(capsys, "inspect", "--data", folder, "--partition", "half", "--image-size", 4, 8)
    assert "makes images 2.00 times as wide as high, and they are 1.33 times\n" in stdout


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
