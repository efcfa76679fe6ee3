"""Weak and strong views on torchvision's v2 transforms, and CutMix on everything that belongs to a pixel."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from .config import Config

MEAN_COLOUR = (124, 116, 104)  # ImageNet's, for padding


class RandomRescale(v2.Transform):
    """Resizes by one random factor; v2's own resizes draw an edge length, which needs images of one size."""

    def __init__(self, scales: Sequence[float]) -> None:
        super().__init__()
        self.low, self.high = scales

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draws the factor and rounds the new size."""
        factor = self.low + (self.high - self.low) * torch.rand(()).item()
        return {"size": [max(1, round(edge * factor)) for edge in v2.query_size(flat_inputs)]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Resizes one input, bilinearly or, for masks, to the nearest."""
        return TF.resize(inpt, params["size"], antialias=True)


class Augment(nn.Module):
    """A sample's weak view and, if asked for, the strong view on the same crop.

    Gives {"image", "valid"}, or {"weak", "strong", "valid"}, and "mask" if there is one. Padding has label 0 and is
    told from the class 0 by `valid` only.
    """

    def __init__(self, config: Config, *, strong: bool) -> None:
        super().__init__()
        fill = {tv_tensors.Image: MEAN_COLOUR, tv_tensors.Mask: 0}
        self.weak = v2.Compose(
            [
                RandomRescale(config.rescale),
                v2.RandomCrop(config.crop_size, pad_if_needed=True, fill=fill),
                v2.RandomHorizontalFlip(),
            ]
        )
        jitter = v2.ColorJitter(config.jitter, config.jitter, config.jitter, config.jitter / 2)
        blur = v2.GaussianBlur(max(3, config.crop_size // 20 * 2 + 1), sigma=(0.1, 2.0))
        self.colours = v2.Compose(
            [
                v2.RandomApply([jitter], config.jitter_probability),
                v2.RandomGrayscale(config.gray_probability),
                v2.RandomApply([blur], config.blur_probability),
            ]
        )
        self.strong = strong

    def forward(self, sample: dict[str, Any]) -> dict[str, Any]:
        """One sample of `SegmentationDataset`."""
        sample = self.weak(sample)
        if not self.strong:
            return sample | {"image": to_input(sample["image"])}
        image = sample.pop("image")
        return sample | {"weak": to_input(image), "strong": to_input(self.colours(image))}


class AugmentFeatures(nn.Module):
    """The views of `Augment` for a sample whose image is a map of features: a random crop and a random flip.

    The strong view is channel dropout: some channels are replaced by their means, what is left is scaled to keep the
    sum's expectation.

    Args:
        config: gives `feature_crop`, `channel_dropout` and `output_stride`.
        mean: of each channel (K, 1, 1).
        strong: whether to give "weak" and "strong" in place of "image".
    """

    mean: Tensor

    def __init__(self, config: Config, mean: Tensor, *, strong: bool) -> None:
        super().__init__()
        self.crop, self.dropout, self.stride = config.feature_crop, config.channel_dropout, config.output_stride
        self.register_buffer("mean", mean.cpu())
        self.strong = strong

    def forward(self, sample: dict[str, Any]) -> dict[str, Any]:
        """One sample of `SegmentationDataset` with features."""
        grid = sample["image"].shape[-2:]
        crop = self.crop or grid
        tops = [int(torch.randint(size - edge + 1, ())) for size, edge in zip(grid, crop, strict=True)]
        flip = torch.rand(()) < 0.5
        for key in sample:
            step = 1 if key == "image" else self.stride
            rows, columns = (slice(top * step, (top + edge) * step) for top, edge in zip(tops, crop, strict=True))
            part = sample[key][..., rows, columns].as_subclass(Tensor)
            sample[key] = part.flip(-1) if flip else part.clone()
        if not self.strong:
            return sample
        weak = sample.pop("image")
        kept = torch.rand(len(weak), 1, 1) >= self.dropout
        strong = torch.where(kept, self.mean + (weak - self.mean) / (1 - self.dropout), self.mean)
        return sample | {"weak": weak, "strong": strong.to(weak.dtype)}


def to_input(image: Tensor) -> Tensor:
    """uint8 RGB to the network's input, float32 in [0, 1]; features only change their type."""
    return TF.to_dtype(image, torch.float32, scale=True).as_subclass(Tensor)


def cutmix_boxes(count: int, grid: Sequence[int], *, probability: float, generator: torch.Generator) -> Tensor:
    """(count, 1, h, w) bool on the feature grid: True where an image receives its neighbour's pixels.

    Boxes cover 2 to 40 % of the grid, sides in a ratio of 0.3 to 1/0.3. They lie on the coarsest grid that is mixed,
    so that images, masks and features are cut along exactly the same lines.
    """
    h, w = grid
    draw = torch.rand(5, count, generator=generator)
    area = (0.02 + 0.38 * draw[0]) * h * w
    ratio = 0.3 ** (2 * draw[1] - 1)
    height = (area * ratio).sqrt().round().clamp(1, h)
    width = (area / ratio).sqrt().round().clamp(1, w)
    top = (draw[2] * (h - height + 1)).floor()
    left = (draw[3] * (w - width + 1)).floor()
    y, x = torch.arange(h)[None, :, None], torch.arange(w)[None, None, :]
    bound = [value[:, None, None] for value in (top, top + height, left, left + width)]
    inside = (y >= bound[0]) & (y < bound[1]) & (x >= bound[2]) & (x < bound[3])
    return (inside & (draw[4] < probability)[:, None, None])[:, None]


def cutmix(x: Tensor, boxes: Tensor) -> Tensor:
    """Replaces each image's box by the same place of its partner: images 0 and 1 are partners, 2 and 3, and so on.

    Pairs, so that a batch split over processes mixes as the whole batch does. The last image of an odd batch takes from
    the first.

    Args:
        x: (N, K, H, W), of any dtype.
        boxes: (N, 1, h, w) bool of `cutmix_boxes`.
    """
    partner = torch.arange(len(x), device=x.device) ^ 1
    partner[partner == len(x)] = 0
    rows, columns = (_cells(size, grid).to(x.device) for size, grid in zip(x.shape[-2:], boxes.shape[-2:], strict=True))
    return torch.where(boxes[:, :, rows[:, None], columns], x[partner], x)


def _cells(size: int, grid: int) -> Tensor:
    """For each of `size` pixels the nearest of `grid` feature points.

    Features of 8 h pixels stand in the middle of cells; those of 8 (h - 1) + 1 pixels stand on every eighth pixel.
    """
    pixel = torch.arange(size)
    if size % grid or (size // grid).bit_count() > 1:  # a stride is a power of 2: 225 is 16 * 14 + 1, not 15 * 15
        return (2 * pixel * (grid - 1) + size - 1) // (2 * (size - 1))
    return pixel * grid // size
