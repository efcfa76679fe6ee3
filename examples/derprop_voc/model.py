"""The segmentation network G of Fig. 2 and its projection J, on torchvision's parts."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.models.segmentation.deeplabv3 import ASPP
from torchvision.ops import Conv2dNormActivation

from .config import Config, ConfigError


class Output(NamedTuple):
    """Logits L (N, C, H, W) at the input's size and features V (N, D, H/8, W/8)."""

    logits: Tensor
    feats: Tensor


@dataclass(frozen=True)
class Backbone:
    """A body that maps an image to {"low", "high"} (Fig. 2's blocks 1 and 4), and their channels."""

    body: nn.Module
    low_channels: int
    high_channels: int


class Stages(nn.Module):
    """A torchvision ResNet's stem and stages; `low` is the first stage's output, `high` the last one's."""

    def __init__(self, resnet: ResNet, last: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(resnet.conv1, resnet.bn1, resnet.relu, resnet.maxpool)
        self.stages = nn.ModuleList(getattr(resnet, f"layer{index}") for index in range(1, last + 1))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Features of output strides 4 and 8."""
        low = high = self.stages[0](self.stem(x))
        for stage in self.stages[1:]:
            high = stage(high)
        return {"low": low, "high": high}


def _compact_resnet(blocks: int) -> Backbone:
    """The first three stages of a basic-block ResNet, the third without its stride: output stride 8, 256 channels.

    torchvision's basic blocks take no dilation, so the field of view is left to ASPP. The fourth stage, three quarters
    of the parameters, is left out for speed.
    """
    resnet = ResNet(BasicBlock, [blocks] * 4)
    resnet.layer3[0].conv1.stride = resnet.layer3[0].downsample[0].stride = (1, 1)
    return Backbone(Stages(resnet, last=3), low_channels=64, high_channels=256)


BACKBONES: dict[str, Callable[[], Backbone]] = {
    "resnet10": lambda: _compact_resnet(1),
    "resnet18": lambda: _compact_resnet(2),
}


class SegmentationNetwork(nn.Module):
    """Low-level features and ASPP fused into a classifier, with J beside them.

    J reads block 4 and is used by similarities only, so the logits do not depend on it.
    """

    def __init__(self, config: Config, num_classes: int) -> None:
        super().__init__()
        if config.backbone not in BACKBONES:
            raise ConfigError(f"backbone: expected one of {', '.join(BACKBONES)}, got {config.backbone!r}")
        backbone = BACKBONES[config.backbone]()
        channels = config.decoder_channels
        self.backbone = backbone.body
        self.low = Conv2dNormActivation(backbone.low_channels, config.low_channels, kernel_size=1)
        self.aspp = ASPP(backbone.high_channels, list(config.atrous_rates), channels)
        self.fuse = Conv2dNormActivation(config.low_channels + channels, channels, kernel_size=3)
        self.classifier = nn.Conv2d(channels, num_classes, 1)
        self.projection = nn.Sequential(
            Conv2dNormActivation(backbone.high_channels, channels, kernel_size=1),
            nn.Conv2d(channels, config.feature_channels, 1),
            nn.ReLU() if config.nonnegative else nn.Identity(),
        )

    def forward(self, images: Tensor) -> Output:
        """Logits and features of a batch (N, 3, H, W)."""
        maps = self.backbone(images)
        low = self.low(maps["low"])
        context = F.interpolate(self.aspp(maps["high"]), low.shape[-2:], mode="bilinear", align_corners=True)
        logits = self.classifier(self.fuse(torch.cat([low, context], 1)))
        logits = F.interpolate(logits, images.shape[-2:], mode="bilinear", align_corners=True)
        return Output(logits, self.projection(maps["high"]))

    def parameter_groups(self, lr: float, head_multiplier: float) -> list[dict[str, object]]:
        """Optimiser groups: the backbone, and everything that never has pretrained weights."""
        backbone = list(self.backbone.parameters())
        head = [parameter for name, parameter in self.named_parameters() if not name.startswith("backbone.")]
        return [{"params": backbone, "lr": lr}, {"params": head, "lr": lr * head_multiplier}]
