"""The training example's pictures: similarity maps of a pixel, the legend and learning curves."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from dlprop.affinity import Linear, Ridge, Softmax
from examples.derprop_voc import figures as figure_files
from examples.derprop_voc import log
from examples.derprop_voc.__main__ import main
from examples.derprop_voc.config import make_config
from examples.derprop_voc.data import Data
from examples.derprop_voc.files import write_checkpoint
from examples.derprop_voc.losses import Objective, make_propagation
from examples.derprop_voc.model import Output
from examples.derprop_voc.panels import class_colours
from examples.derprop_voc.predict_folder import draw_legend
from examples.derprop_voc.scenes import CLASS_NAMES, make_scene
from examples.derprop_voc.similarity_maps import draw_similarity_maps
from examples.derprop_voc.similarity_maps import similarity_maps as maps_of
from examples.derprop_voc.state import make_state
from tests.example.options import TINY_NETWORK as TINY

pytestmark = pytest.mark.usefixtures("pictures")

NORMS = {
    "l1": lambda v: v / np.abs(v).sum(),
    "l2": lambda v: v / np.sqrt((v**2).sum()),
    "softmax": lambda v: np.exp(v) / np.exp(v).sum(),
    "none": lambda v: v,
}
STEPS = {
    "forward": lambda v: v[1:] - v[:-1],
    "sum": lambda v: v[1:] + v[:-1],
    "central": lambda v: (v[2:] - v[:-2]) / 2,
    "laplacian": lambda v: v[2:] - 2 * v[1:-1] + v[:-2],
}


def drawn(monkeypatch):
    """The figures that are drawn, in order."""
    figures = []
    original = figure_files.FigureCanvasAgg

    def canvas(figure):
        figures.append(figure)
        return original(figure)

    monkeypatch.setattr(figure_files, "FigureCanvasAgg", canvas)
    return figures


# --- similarity maps -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "normalize", "similarity"),
    [
        ("forward", "l1", "dot"),
        ("sum", "l2", "dot"),
        ("central", "softmax", "dot"),
        ("laplacian", "none", "cosine"),
        ("forward", "none", "dot"),
    ],
)
def test_maps_are_rows_of_the_formula(scheme, normalize, similarity):
    feats = torch.rand(1, 9, 3, 4, dtype=torch.float64)
    name = None if normalize == "none" else normalize
    affinity = Softmax(scheme=scheme, normalize=name, similarity=similarity, weights=(0.5, 2.0))
    maps = maps_of(feats, affinity, 6, held_down=2)
    pixels = [NORMS[normalize](feats[0, :, y, x].numpy()) for y in range(3) for x in range(4)]
    rows = []
    for order in range(3):
        rows.append(
            [
                np.vdot(pixels[6], v) / (1 if similarity == "dot" else np.sqrt(pixels[6] @ pixels[6] * (v @ v)))
                for v in pixels
            ]
        )
        np.testing.assert_allclose(maps[f"S_{order}"], np.reshape(rows[-1], (3, 4)), rtol=1e-9)
        pixels = [STEPS[scheme](v) for v in pixels]
    total = 0.5 * np.array(rows[0]) + 2 * np.array(rows[1])
    np.testing.assert_allclose(maps["S"].flatten(), total, rtol=1e-9)
    np.testing.assert_allclose(maps["softmax"].flatten(), np.exp(total) / np.exp(total).sum(), rtol=1e-9)
    assert list(maps) == ["S_0", "S_1", "S_2", "S", "softmax"]


@pytest.mark.parametrize("affinity", ["linear", "softmax"])
def test_the_pixels_row_is_what_propagation_takes_from_it(affinity):
    """Logits that are 1 at one pixel spread along its row."""
    propagate = make_propagation(
        make_config({"affinity": affinity, "similarity": "cosine", "order_weights": [1, 1, 1]})
    )
    feats = torch.randn(1, 9, 3, 4, dtype=torch.float64)
    logits = torch.zeros(1, 1, 3, 4, dtype=torch.float64)
    logits[0, 0, 2, 1] = 1
    expected = propagate(logits, feats)[0, 0]
    maps = maps_of(feats, propagate.affinity, 2 * 4 + 1)
    torch.testing.assert_close(maps["S" if affinity == "linear" else "softmax"], expected)
    assert ("softmax" in maps) == (affinity == "softmax")


def test_maps_show_the_orders_that_are_used():
    feats = torch.rand(1, 9, 3, 4)
    assert list(maps_of(feats, Linear(weights=(1.0,)), 0)) == ["S_0", "S"]
    assert list(maps_of(feats, Linear(weights=(1.0,)), 0, held_down=3)) == ["S_0", "S_3", "S"]
    assert list(maps_of(feats, Linear(), 0, held_down=1)) == ["S_0", "S_1", "S"]
    plain, ridge = (maps_of(feats, affinity, 0) for affinity in (Linear(normalize=None), Ridge()))
    assert all(torch.equal(plain[name], ridge[name]) for name in ("S_0", "S_1", "S"))


class Blocks(nn.Module):
    """Class of a pixel by its brightness; features on a grid of 8."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(30.0))
        self.sizes = []

    def forward(self, x):
        self.sizes.append(tuple(x.shape[-2:]))
        bright = self.weight * (x.mean(1, keepdim=True) - 0.5)
        pooled = F.avg_pool2d(x, 8)
        return Output(torch.cat([-bright, bright], 1), torch.cat([pooled, 1 - pooled], 1))


@pytest.mark.parametrize(("size", "scale"), [([], 1), ([16, 32], 2)])
def test_drawn_maps_belong_to_the_pixels_cell(tmp_path, monkeypatch, size, scale):
    figures = drawn(monkeypatch)
    image = torch.randint(256, (3, 16 * scale, 32 * scale), dtype=torch.uint8)
    image[:, :, 16 * scale :] //= 4
    config, network = make_config({"image_size": size, "affinity": "softmax"}), Blocks()
    row, column = 8 * scale - 1, 25 * scale  # in cell (0, 3); grids that align corners would give another
    path = tmp_path / "maps.png"
    objective = Objective(config)
    draw_similarity_maps(path, network, objective, image, (row, column), class_names=("dark", "light"), title="a title")
    with Image.open(path) as picture:
        assert picture.format == "PNG"
    (figure,) = figures
    assert network.sizes == [(16, 32)]
    axes = [axis for axis in figure.axes if axis.images and axis.get_title()]
    titles = [axis.get_title() for axis in axes]
    assert titles[:2] == [f"row {row}, column {column}", "prediction: dark"]
    sums = ["sum: $S_0$ + $S_1$", "softmax of the sum"]
    assert [title.split(",")[0] for title in titles[2:]] == ["$S_0$", "$S_1$", "$S_2$", *sums]
    np.testing.assert_array_equal(axes[0].images[0].get_array(), image.permute(1, 2, 0))
    for axis in axes:  # every picture covers the image's own pixels, with the mark on the pixel
        assert tuple(axis.images[0].get_extent()) == (-0.5, 32 * scale - 0.5, 16 * scale - 0.5, -0.5)
        assert {tuple(np.ravel(line.get_xydata())) for line in axis.lines} == {(column, row)}
    assert all(axis.child_axes for axis in axes[2:])  # a colour bar each
    worked = F.interpolate(image[None].float(), (16, 32), mode="bilinear", antialias=True)[0].round() if size else image
    cells = worked.float().unflatten(2, (4, 8)).unflatten(1, (2, 8)).mean((2, 4)).flatten(1).T / 255
    features = torch.cat([cells, 1 - cells], 1)
    features = features / features.sum(1, keepdim=True)
    np.testing.assert_allclose(axes[2].images[0].get_array().ravel(), features @ features[3], rtol=2e-3)


def test_the_mark_of_the_centre_and_the_derivative_losss_order(tmp_path, monkeypatch):
    figures = drawn(monkeypatch)
    image = torch.zeros(3, 16, 24, dtype=torch.uint8)
    for variant in ("full", "supervised"):
        objective = Objective(make_config({"variant": variant}))
        draw_similarity_maps(tmp_path / "a.png", Blocks(), objective, image, class_names=("dark", "light"))
    held = [[axis.get_title() for axis in figure.axes if "held down" in axis.get_title()] for figure in figures]
    assert [len(titles) for titles in held] == [1, 0]
    assert held[0][0].startswith("$S_2$")
    assert figures[0].axes[0].get_title() == "row 8, column 12"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """latest.pt of an untrained network, and an image."""
    out = tmp_path_factory.mktemp("run")
    config = make_config(TINY | {"accelerator": "cpu", "out": str(out)})
    with torch.random.fork_rng():
        state = make_state(config, len(CLASS_NAMES), torch.device("cpu"), 10, initialise=False)
        write_checkpoint(out / "latest.pt", state.to_dict(config, Data([], [], [], CLASS_NAMES), epoch=0, precision={}))
    image, _ = make_scene(np.random.default_rng(0), (40, 48))
    Image.fromarray(image).save(out / "scene.png")
    return out / "latest.pt", out / "scene.png"


@pytest.mark.slow
def test_similarity_command(checkpoint, tmp_path, capsys):
    path, image = checkpoint
    command = ["similarity", "--image", str(image), "--accelerator", "cpu"]
    assert main([*command, "--run", str(path.parent)]) == 0
    assert (path.parent / "similarity_scene.png").stat().st_size > 10_000
    out = tmp_path / "other.png"
    assert main([*command, "--checkpoint", str(path), "--out", str(out), "--pixel", "39", "47"]) == 0
    assert out.read_bytes() != (path.parent / "similarity_scene.png").read_bytes()
    capsys.readouterr()
    for pixel in (("40", "0"), ("0", "48"), ("-1", "0")):
        assert main([*command, "--checkpoint", str(path), "--pixel", *pixel]) == 2
        expected = f"error: pixel: expected row 0 to 39 and column 0 to 47 of the image, got {' '.join(pixel)}\n"
        assert capsys.readouterr().err == expected
    assert main(["similarity", "--checkpoint", str(path), "--image", str(path)]) == 2
    assert "latest.pt: expected an image" in capsys.readouterr().err


# --- legend and curves -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["class 0", "background"])
@pytest.mark.parametrize("count", [1, 6, 40])
def test_legend_has_every_class_in_its_colour(tmp_path, count, first):
    names = [first, *(f"class {index}" for index in range(1, count))]
    brightness = class_colours(names).mean(1)
    assert len(brightness) == count
    assert (brightness[0] < 0.25) == (first == "background")  # a dark road in an overlay looks like no label
    path = tmp_path / "legend.png"
    draw_legend(path, names)
    pixels = np.array(Image.open(path).convert("RGB")).reshape(-1, 3)
    found = set(map(tuple, pixels.tolist()))
    for colour in np.round(255 * class_colours(names)).astype(int):
        assert tuple(colour.tolist()) in found
    edge = np.array(Image.open(path).convert("RGB"))
    assert all((line == 255).all() for line in (edge[0], edge[-1], edge[:, 0], edge[:, -1]))  # nothing is cut off


def test_legend_without_names_has_ids_alone(tmp_path):
    widths = []
    for names in (["0", "1"], ["", ""], ["00", "01"]):
        draw_legend(tmp_path / "legend.png", names)
        with Image.open(tmp_path / "legend.png") as legend:
            widths.append(legend.width)
    assert widths[0] < widths[1] < widths[2]  # the second has the gap before a name


def history(steps):
    entries = [
        {
            "step": step,
            "epoch": 1,
            "kind": "train",
            "loss": 2.0 + (step % 2),
            "kl": 0.0 if step < 3 else 0.5,
            "kept": 0.1,
        }
        for step in range(1, steps + 1)
    ]
    return [*entries, {"step": steps, "epoch": 1, "kind": "val", "trained_prediction": 0.25}]


def test_curves_show_what_the_history_holds(tmp_path, monkeypatch):
    figures = drawn(monkeypatch)
    log.draw_curves(tmp_path / "curves.png", history(20))
    axes = figures[0].axes
    assert [axis.get_title(loc="left") for axis in axes] == [
        "losses",
        "pseudo-label threshold and kept pixels",
        "validation mIoU",
    ]
    named = {line.get_label(): line for axis in axes for line in axis.lines if not line.get_label().startswith("_")}
    assert set(named) == {"loss", "kl", "kept", "trained_prediction"}
    np.testing.assert_allclose(named["loss"].get_ydata(), [2.0 + (step % 2) for step in range(1, 21)])
    assert axes[0].get_yscale() == "log"  # zeros of a term do not take that away
    assert axes[1].get_yscale() == "linear"
    assert len({axis.get_xlim() for axis in axes}) == 1  # one step, one place


def test_curves_of_many_points_are_means_over_their_neighbours(tmp_path, monkeypatch):
    figures = drawn(monkeypatch)
    log.draw_curves(tmp_path / "curves.png", history(400))
    lines = [line for line in figures[0].axes[0].lines if np.max(line.get_ydata()) > 1.5]
    smooth, raw = (np.asarray(line.get_ydata()) for line in lines)
    np.testing.assert_allclose(raw, [2.0 + (step % 2) for step in range(1, 401)])
    for index in (0, 3, 200, 399):  # windows of 11, cut at the ends
        np.testing.assert_allclose(smooth[index], raw[max(0, index - 5) : index + 6].mean())


@pytest.mark.parametrize("entries", [[], history(1), [{"step": 1, "epoch": 1, "kind": "train", "kl": 0.0}]])
def test_curves_of_next_to_nothing(tmp_path, entries):
    log.draw_curves(tmp_path / "curves.png", entries)
    assert (tmp_path / "curves.png").stat().st_size > 0
