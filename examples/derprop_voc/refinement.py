"""A window of like colours, again and again: what sharpens scores on their image."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from dlprop import DerivativeLabelPropagation
from dlprop.affinity import Softmax


@dataclass(frozen=True, kw_only=True)
class Refinement:
    """Scores averaged over a window of like colours, again and again; the defaults are near the best on CamVid.

    Args:
        sigma: of the Gaussian over colours, as a multiple of `deviation`.
        deviation: "image": the image's mean local standard deviation; "pixel": that around the target, as in
            pixel-adaptive refinement; "one": colours are in [0, 1] and sigma is absolute.
        dilation: of the window's pixels.
        position: sigma in pixels of a Gaussian over the offsets; 0: none.
        steps: how often.
    """

    sigma: float = 0.25
    deviation: Literal["image", "pixel", "one"] = "image"
    dilation: tuple[int, ...] = (1, 2, 4)
    position: float = 0.0
    steps: int = 10

    def __call__(self, scores: Tensor, image: Tensor) -> Tensor:
        """Refined scores (1, C, H, W), probabilities if they were, by the image (1, 3, H, W) in [0, 1].

        Cost: 25 steps H W C multiplications for three dilations; memory O(H W C).
        """
        scale = torch.ones_like(image[:, :1])
        if self.deviation != "one":
            scale = local_deviation(image)
            if self.deviation == "image":
                scale = scale.mean((2, 3), keepdim=True).expand_as(scale)
        scale = self.sigma * scale
        feats = image - image.mean((2, 3), keepdim=True)
        target_feats = None
        affinity = Softmax(
            over="sources",
            similarity="dot" if self.deviation == "pixel" else "gaussian",
            normalize=None,
            weights=(1.0,),
            radius=1,
            dilation=self.dilation,
        )
        if self.deviation == "pixel":  # -|v_i - v_j|^2 / (2 s_j^2) is a product of sources and targets, up to v_j^2
            target_feats = torch.cat((feats, torch.ones_like(scale)), 1) / scale.square()
            feats = torch.cat((feats, -feats.square().sum(1, keepdim=True) / 2), 1)
        else:
            feats = feats / scale
        if self.position:
            axes = (torch.arange(edge).to(image) / self.position for edge in image.shape[2:])
            feats = torch.cat((feats, torch.stack(torch.meshgrid(*axes, indexing="ij"))[None]), 1)
        propagate = DerivativeLabelPropagation(affinity)
        for _ in range(self.steps):
            scores = propagate(scores, feats, target_feats)
        return scores


def local_deviation(image: Tensor) -> Tensor:
    """Standard deviation of the colours in 9 x 9 pixels around each, (1, 1, H, W), at least 0.01."""
    mean, square = (F.avg_pool2d(x, 9, 1, 4, count_include_pad=False) for x in (image, image.square()))
    return (square - mean.square()).sum(1, keepdim=True).clamp_min(1e-4).sqrt()
