"""What all tests of the example share."""

import pytest
import torch
from matplotlib.figure import Figure

from examples.derprop_voc.config import make_config
from examples.derprop_voc.frozen import make_network
from examples.derprop_voc.scenes import CLASS_NAMES, write_scenes
from tests.example.data_sets import make_voc, mask, picture, write_list
from tests.example.finished import make_finished
from tests.example.frozen_runs import FROZEN

SAVE_FIGURE = Figure.savefig
SCENES = {"labeled": 4, "unlabeled": 6, "val": 3}


@pytest.fixture(scope="package", autouse=True)
def _no_pictures():
    """Rendering takes two thirds of a tiny run, so none is written here unless a test asks for `pictures`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda self, file, **options: None)
        yield


@pytest.fixture
def pictures(monkeypatch):
    """Render pictures as a run does."""
    monkeypatch.setattr(Figure, "savefig", SAVE_FIGURE)


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


@pytest.fixture(scope="module")
def scenes(request, tmp_path_factory):
    """Generated scenes; `SCENES` of a module says how many of each list."""
    root = tmp_path_factory.mktemp("scenes")
    write_scenes(root, **getattr(request.module, "SCENES", SCENES), size=(40, 48), seed=1)
    return root


@pytest.fixture
def network():
    """A head on a frozen backbone."""
    torch.manual_seed(0)
    return make_network(make_config(FROZEN), len(CLASS_NAMES)).eval()


@pytest.fixture(scope="module")
def finished(scenes, tmp_path_factory):
    """A run folder that no training made."""
    out = tmp_path_factory.mktemp("run")
    make_finished(scenes, out)
    return out
