"""The example's augmentation: what a sample depends on, padding, geometry, CutMix."""

import torch
from torchvision import tv_tensors

from examples.derprop_voc.augment import Augment, AugmentFeatures, RandomRescale, cutmix, cutmix_boxes
from examples.derprop_voc.config import make_config
from examples.derprop_voc.data import (
    SegmentationDataset,
    collate,
    load_data,
)
from tests.example.frozen_runs import FROZEN
from tests.example.options import TINY


def test_a_sample_depends_on_its_seed_and_leaves_the_random_state(scenes):
    config = make_config(TINY | {"data": str(scenes)})
    items = load_data(config).labeled
    data = SegmentationDataset(items, labeled=True, transform=Augment(config, strong=False), cache=True)
    state = torch.get_rng_state()
    first, again, other = data[1, 5], data[1, 5], data[1, 6]
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first["image"], again["image"])
    assert torch.equal(first["mask"], again["mask"])
    assert not torch.equal(first["image"], other["image"])


def test_padding_is_tracked_apart_from_labels(scenes):
    config = make_config(TINY | {"data": str(scenes), "rescale": [0.5, 0.5], "crop_size": 64})
    data = SegmentationDataset(load_data(config).labeled, labeled=True, transform=Augment(config, strong=False))
    batch = collate([data[0, 1], data[1, 1]])
    assert batch["image"].shape == (2, 3, 64, 64)
    assert batch["valid"].dtype == torch.bool
    assert batch["valid"].sum((1, 2)).tolist() == [20 * 24] * 2
    assert batch["mask"][~batch["valid"]].eq(0).all()
    assert set(batch["mask"].unique().tolist()) <= {*range(6), 255}


def test_weak_and_strong_views_share_their_geometry(scenes):
    options = {"jitter_probability": 0, "gray_probability": 0, "blur_probability": 0}
    config = make_config(TINY | {"data": str(scenes)} | options)
    items = load_data(config).unlabeled
    plain = SegmentationDataset(items, labeled=False, transform=Augment(config, strong=True))[0, 3]
    assert torch.equal(plain["weak"], plain["strong"])
    config = make_config(TINY | {"data": str(scenes), "jitter_probability": 1.0})
    strong = SegmentationDataset(items, labeled=False, transform=Augment(config, strong=True))[0, 3]
    assert torch.equal(plain["weak"], strong["weak"])
    assert not torch.equal(strong["weak"], strong["strong"])


def test_rescale_keeps_labels_whole():
    mask = tv_tensors.Mask(torch.tensor([[0, 255], [255, 3]], dtype=torch.uint8).repeat(8, 8))
    scaled = RandomRescale((1.7, 1.7))({"mask": mask})["mask"]
    assert scaled.shape == (27, 27)
    assert set(scaled.unique().tolist()) == {0, 3, 255}


def test_cutmix_cuts_every_grid_along_the_same_lines():
    generator = torch.Generator().manual_seed(0)
    boxes = cutmix_boxes(6, (5, 7), probability=0.8, generator=generator)
    assert boxes.shape == (6, 1, 5, 7)
    assert 0 < boxes.flatten(1).any(1).sum() < 7
    for box in boxes[:, 0]:
        rows, columns = box.any(1), box.any(0)
        assert torch.equal(box, rows[:, None] & columns)  # one rectangle
    source = torch.arange(6.0)[:, None, None, None]
    feats = cutmix(source.expand(6, 2, 5, 7), boxes)
    images = cutmix(source.expand(6, 3, 40, 56), boxes)
    valid = cutmix((source > 2).expand(6, 1, 40, 56), boxes)
    assert torch.equal(images[:, :1], feats[:, :1].repeat_interleave(8, -1).repeat_interleave(8, -2))
    assert torch.equal(valid, images[:, :1] > 2)
    assert set(torch.unique(feats[2]).tolist()) <= {2.0, 3.0}
    assert not cutmix_boxes(6, (5, 7), probability=0.0, generator=generator).any()


def test_cutmix_pairs_are_those_of_the_whole_batch():
    boxes = torch.ones(4, 1, 2, 2, dtype=torch.bool)
    source = torch.arange(4.0)[:, None, None, None].expand(4, 1, 16, 16)
    assert cutmix(source, boxes)[:, 0, 0, 0].tolist() == [1, 0, 3, 2]
    halves = [cutmix(source[part], boxes[part]) for part in (slice(0, 2), slice(2, 4))]
    assert torch.equal(torch.cat(halves), cutmix(source, boxes))
    assert cutmix(source[:3], boxes[:3])[:, 0, 0, 0].tolist() == [1, 0, 0]


def test_cutmix_of_aligned_grids_takes_the_nearest_feature_point():
    # 17 pixels on 3 points, 8 apart: pixel 4 is as near to point 1 as to point 0, 3 and 5 are not.
    boxes = torch.zeros(2, 1, 3, 3, dtype=torch.bool)
    boxes[:, :, 1] = True
    source = torch.arange(2.0)[:, None, None, None].expand(2, 1, 17, 17)
    mixed = cutmix(source, boxes)[0, 0, :, 0]
    assert mixed[5:12].eq(1).all()
    assert mixed[:4].eq(0).all()
    assert mixed[13:].eq(0).all()
    # 225 pixels on 15 points are 16 apart and not cells of 15: pixels around 112 belong to the middle point.
    boxes = torch.zeros(2, 1, 15, 15, dtype=torch.bool)
    boxes[:, :, 7] = True
    mixed = cutmix(torch.arange(2.0)[:, None, None, None].expand(2, 1, 225, 225), boxes)[0, 0, :, 0]
    assert mixed.nonzero().flatten().tolist() == list(range(104, 120))


# --- features --------------------------------------------------------------------------------------------------------


def grid_sample(h=5, w=6):
    """Features that say where they stand, and a mask that says in which feature's cell a pixel is."""
    place = torch.arange(h * w, dtype=torch.float16).view(1, h, w)
    mask = tv_tensors.Mask(place[0].to(torch.uint8).repeat_interleave(8, 0).repeat_interleave(8, 1))
    return {"image": place, "mask": mask, "valid": tv_tensors.Mask(torch.ones_like(mask))}


def test_crops_and_flips_keep_masks_on_their_features():
    augment = AugmentFeatures(make_config(FROZEN), torch.zeros(1, 1, 1), strong=False)
    corners, flips = set(), set()
    for seed in range(60):
        torch.manual_seed(seed)
        sample = augment(grid_sample())
        assert sample["image"].shape == (1, 4, 5)
        assert sample["mask"].shape == sample["valid"].shape == (32, 40)
        assert torch.equal(sample["mask"], sample["image"][0].repeat_interleave(8, 0).repeat_interleave(8, 1))
        corners.add(int(sample["image"].min()))
        flips.add(bool(sample["image"][0, 0, 0] > sample["image"][0, 0, 1]))
    assert corners == {0, 1, 6, 7}
    assert flips == {False, True}
    whole = AugmentFeatures(make_config(FROZEN | {"feature_crop": []}), torch.zeros(1, 1, 1), strong=False)
    assert whole(grid_sample())["image"].shape == (1, 5, 6)


def test_the_strong_view_lacks_channels_and_keeps_the_mean():
    mean = torch.arange(400.0).view(-1, 1, 1) / 100
    features = (mean + torch.randn(400, 5, 6, generator=torch.Generator().manual_seed(0))).half()
    config = make_config(FROZEN | {"channel_dropout": 0.25, "feature_crop": []})
    sample = AugmentFeatures(config, mean, strong=True)(grid_sample() | {"image": features})
    assert set(sample) == {"weak", "strong", "mask", "valid"}
    weak, strong = sample["weak"].float() - mean, sample["strong"].float() - mean
    dropped = strong.abs().amax((1, 2)) < 0.01
    assert 0.15 < dropped.float().mean() < 0.35
    torch.testing.assert_close(strong[~dropped], weak[~dropped] / 0.75, rtol=0, atol=0.01)
