"""Small data sets in the layouts that the example reads, and what its tests ask of them."""

import numpy as np
import scipy.io
from PIL import Image

from examples.derprop_voc.__main__ import main
from examples.derprop_voc.config import make_config
from examples.derprop_voc.data import load_data

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
