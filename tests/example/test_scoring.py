"""How images are scored: whole, by windows, cropped, and over a data set."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from dlprop import DerivativeLabelPropagation
from dlprop.affinity import Softmax
from examples.derprop_voc.evaluate import _middle, _windows, evaluate, predict, probabilities
from examples.derprop_voc.model import Output
from tests.example.finished import KEYS, FakeNetwork


class RedNetwork(nn.Module):
    """Class 1 where the image is red, with certainty."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(40.0))

    def forward(self, x):
        red = self.weight * (x[:, :1] - 0.5)
        return Output(torch.cat([-red, red], 1), x)


@given(size=st.integers(1, 3000), window=st.integers(2, 900))
def test_windows_cover_every_pixel_and_overlap_by_a_third(size, window):
    windows = _windows(size, window)
    assert windows[0].start == 0
    assert windows[-1].stop == size
    assert {part.stop - part.start for part in windows} == {min(size, window)}
    overlaps = [left.stop - right.start for left, right in pairwise(windows)]
    assert all(window > overlap >= window / 3 for overlap in overlaps)
    # One window fewer would leave a step above two thirds.
    assert len(windows) < 3 or (size - window) / (len(windows) - 2) > 2 * window // 3


@given(size=st.integers(1, 3000), window=st.integers(1, 900))
def test_middle_has_equal_margins(size, window):
    middle = _middle(size, window)
    assert middle.stop - middle.start == min(size, window)
    assert 0 <= (size - middle.stop) - middle.start <= 1


def test_sliding_windows_against_a_loop_over_pixels():
    image = torch.randint(256, (3, 13, 10), dtype=torch.uint8)
    network, propagate = FakeNetwork(), DerivativeLabelPropagation()
    found = probabilities(network, propagate, image, mode="sliding_window", window=6)
    rows, columns = [0, 4, 7], [0, 4]  # the starts of windows of 6, written out
    with torch.no_grad():
        outputs = {}
        for top in rows:
            for left in columns:
                output = network(image[None, :, top : top + 6, left : left + 6] / 255)
                p, propagated = output.logits.softmax(1), propagate(output.logits, output.feats).softmax(1)
                outputs[top, left] = dict(zip(KEYS, (p[0], propagated[0], (p + propagated)[0] / 2), strict=True))
    for key in KEYS:
        expected = torch.zeros(3, 13, 10)
        for y in range(13):
            for x in range(10):
                over = [
                    values[key][:, y - top, x - left]
                    for (top, left), values in outputs.items()
                    if 0 <= y - top < 6 and 0 <= x - left < 6
                ]
                expected[:, y, x] = sum(over) / len(over)
        torch.testing.assert_close(found[key], expected)
    assert not torch.allclose(found["prediction"], found["propagated"], atol=1e-2)
    whole = probabilities(network, propagate, image)
    assert not torch.allclose(found["prediction"], whole["prediction"], atol=1e-2)


def test_one_sliding_window_is_the_original_and_a_wide_crop_too():
    image = torch.randint(256, (3, 12, 10), dtype=torch.uint8)
    network, propagate = FakeNetwork(), DerivativeLabelPropagation()
    whole = probabilities(network, propagate, image)
    for mode in ("sliding_window", "center_crop"):
        same = probabilities(network, propagate, image, mode=mode, window=12)
        for key in KEYS:
            assert torch.equal(same[key], whole[key])


def test_blend_is_the_mean_and_its_own_labels():
    image = torch.randint(256, (3, 8, 8), dtype=torch.uint8)
    network, propagate = FakeNetwork(), DerivativeLabelPropagation(Softmax(normalize=None))
    values = probabilities(network, propagate, image)
    output = network(image[None] / 255)
    torch.testing.assert_close(values["prediction"], output.logits.softmax(1)[0].detach())
    torch.testing.assert_close(values["propagated"], propagate(output.logits, output.feats).softmax(1)[0].detach())
    torch.testing.assert_close(values["blend"], (values["prediction"] + values["propagated"]) / 2)
    labels = predict(network, propagate, image, (8, 8))
    for key in KEYS:
        assert torch.equal(labels[key], values[key].argmax(0))
    assert not torch.equal(labels["blend"], labels["prediction"])
    assert not torch.equal(labels["blend"], labels["propagated"])


@pytest.mark.parametrize("stored", [1, 2])
def test_center_crop_scores_the_crop_alone(stored):
    """The prediction is right inside the middle 8 x 8 pixels and wrong outside; masks are stored at 1 or 2 times."""
    truth = (torch.arange(16)[:, None] < 6).expand(16, 20).long()
    red = ~truth.bool()
    red[4:12, 6:14] = truth[4:12, 6:14].bool()
    image = torch.zeros(3, 16, 20, dtype=torch.uint8)
    image[0] = 255 * red
    mask = truth.repeat_interleave(stored, 0).repeat_interleave(stored, 1)
    data = [{"image": image, "mask": mask}]

    def miou(**options):
        scores = evaluate({"it": RedNetwork()}, DerivativeLabelPropagation(), data, ["no", "yes"], **options)
        return scores["it"]["prediction"]

    crop = miou(mode="center_crop", window=8)
    if stored == 1:
        assert crop["miou"] == 1
        assert miou(mode="center_crop", window=10)["miou"] < 1
    assert crop["accuracy"] > 0.9  # the line between the classes moves by less than a working pixel
    assert miou(mode="original")["accuracy"] < 0.4


def test_scores_are_over_the_data_set_and_ignore_void():
    first, second = torch.zeros(8, 8, dtype=torch.long), torch.ones(8, 8, dtype=torch.long)
    first[0], second[:4] = 1, 255
    images = [torch.zeros(3, 8, 8, dtype=torch.uint8), torch.zeros(3, 8, 8, dtype=torch.uint8)]
    images[1][0, :6] = 255
    data = [{"image": image, "mask": mask} for image, mask in zip(images, (first, second), strict=True)]
    names = ["no", "yes", "never"]

    class Wide(RedNetwork):
        def forward(self, x):
            output = super().forward(x)
            return Output(F.pad(output.logits, (0, 0, 0, 0, 0, 1), value=-99.0), output.feats)

    network = Wide().train()
    scores = evaluate({"it": network}, DerivativeLabelPropagation(), data, names)["it"]["prediction"]
    assert not network.training
    # Of 56 zeros, all found, with 8 + 16 false ones; of 8 + 32 ones, 16 found.
    assert scores["iou"] == {"no": pytest.approx(56 / 80), "yes": pytest.approx(16 / 40), "never": None}
    assert scores["miou"] == pytest.approx((56 / 80 + 16 / 40) / 2)
    assert scores["accuracy"] == pytest.approx(72 / 96)
