"""The segmentation network G of Fig. 2 and its projection J, on the parts of torchvision and timm."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import timm
import torch
from timm.layers import freeze_batch_norm_2d
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import models
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.segmentation.deeplabv3 import ASPP
from torchvision.ops import Conv2dNormActivation

from .config import Config
from .errors import ConfigError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TORCHVISION = ("resnet50", "resnet101")
UNTRAINED = ("none", "random")  # --weights; a frozen backbone takes random alone, to be sure that it is meant


class Output(NamedTuple):
    """Logits L (N, C, H, W) at the input's size and features V (N, D, h, w) at the output stride."""

    logits: Tensor
    feats: Tensor


@dataclass(frozen=True)
class Backbone:
    """A body that maps images to {"low", "high"} (blocks 1 and 4 of Fig. 2), and what goes in and comes out."""

    body: nn.Module
    low_channels: int
    high_channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


# Small models that can be dilated, for messages.
DILATED = "timm/resnet18, timm/tf_efficientnet_lite0, timm/mobilenetv2_100, timm/regnety_002, timm/convnext_atto"


class StrideError(ConfigError):
    """A backbone that cannot be dilated to the stride that was asked for."""


class TimmStages(nn.Module):
    """Two stages of a timm model, under the names that `Backbone` promises."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Low-level and high-level features."""
        low, high = self.model(x)
        return {"low": low, "high": high}


def make_backbone(config: Config, *, initialise: bool = True) -> Backbone:
    """The backbone that `config` names, with the weights it names unless `initialise` is false.

    Raises:
        ConfigError: for an unknown backbone or unknown weights, and for a file that does not fit.
    """
    family, _, name = config.backbone.rpartition("/")
    weights = config.weights if initialise else "none"
    if not family and name in TORCHVISION:
        return _torchvision_backbone(name, weights, config.output_stride)
    if family == "timm" and timm.is_model(name):
        return _timm_backbone(name, weights, config)
    known = f"{', '.join(TORCHVISION)}, or timm/<one of timm.list_models()>"
    raise ConfigError(f"backbone: expected one of {known}, got {config.backbone!r}")


def _torchvision_backbone(name: str, weights: str, output_stride: int) -> Backbone:
    model = models.get_model(name, replace_stride_with_dilation=[False, output_stride == 8, True])
    members = models.get_model_weights(name).__members__
    if weights in members:
        try:
            values = models.get_model_weights(name)[weights].get_state_dict(progress=True, check_hash=True)
        except OSError as error:  # no connection, for one
            raise ConfigError(f"weights: {weights} could not be downloaded ({error}); give a file") from None
        model.load_state_dict(values)
    elif weights not in UNTRAINED:
        if not Path(weights).is_file():
            raise ConfigError(f"weights: expected none, {', '.join(members)} or a file, found no file {weights!r}")
        read_weights(Path(weights), model, needed=[key for key in model.state_dict() if not key.startswith("fc.")])
    body = create_feature_extractor(model, {"layer1": "low", "layer4": "high"})
    return Backbone(body, 256, 2048, IMAGENET_MEAN, IMAGENET_STD)


def _timm_backbone(name: str, weights: str, config: Config) -> Backbone:
    if config.timm_stages:
        stages = config.timm_stages
    else:
        strides = stage_strides(name)
        stages = (next((stage for stage, stride in enumerate(strides) if stride >= 4), 0), len(strides) - 1)
    body = timm_body(name, weights, stages, config.output_stride)
    low, high = body.feature_info.channels()
    return Backbone(TimmStages(body), low, high, *image_moments(name))


def stage_strides(name: str) -> list[int]:
    """The stride of every stage of a timm model, without dilation."""
    with torch.device("meta"):
        strides: list[int] = timm.create_model(name, features_only=True).feature_info.reduction()
    return strides


def timm_body(name: str, weights: str, stages: Sequence[int], output_stride: int | None) -> nn.Module:
    """A timm model that maps images to a list of stages, with the weights of a file, timm's own ("timm") or none.

    Args:
        name: of a timm model.
        weights: a file, timm, or one of UNTRAINED.
        stages: indices of its stages.
        output_stride: the highest stride of a stage, by dilation; None: the model's own.

    Raises:
        ConfigError: for stages or strides that the model does not have, for a file that does not fit, and where timm
            cannot download.
    """
    options = {} if output_stride is None else {"output_stride": output_stride}
    try:
        body = timm.create_model(
            name,
            features_only=True,
            feature_cls="getter",
            out_indices=tuple(stages),
            pretrained=weights == "timm",
            **options,
        )
    # What timm raises for stages, strides and names that a model does not have; it has no type of its own for these.
    except (RuntimeError, TypeError, ValueError, AssertionError, NotImplementedError) as error:
        strides = stage_strides(name)
        stride = f" at output stride {output_stride}" if output_stride else ""
        refused = f"backbone: timm/{name} does not give stages {list(stages)}{stride}"
        if max(stages) >= len(strides):
            numbered = ", ".join(f"{stage} of stride {of_stage}" for stage, of_stage in enumerate(strides))
            raise ConfigError(f"{refused}: its stages are {numbered} (timm_stages)") from None
        if output_stride and isinstance(error, TypeError | AssertionError | NotImplementedError):
            raise StrideError(
                f"{refused}: timm cannot dilate it; models that it can: {DILATED}; or freeze it (--freeze-backbone)"
            ) from None
        raise ConfigError(f"{refused}: {str(error).splitlines()[0]}") from None
    except OSError as error:
        raise ConfigError(
            f"weights: timm could not download those of {name} ({type(error).__name__}); give a file instead"
        ) from error
    if weights not in (*UNTRAINED, "timm"):
        if not Path(weights).is_file():
            raise ConfigError(f"weights: expected none, timm or a file, found no file {weights!r}")
        classifier = timm.create_model(name)
        read_weights(Path(weights), classifier, needed=list(body.model.state_dict()))
        body.model.load_state_dict({key: classifier.state_dict()[key] for key in body.model.state_dict()})
    return body


def image_moments(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the images that a timm model was trained on, in [0, 1]."""
    settings = timm.get_pretrained_cfg(name)
    return (settings.mean, settings.std) if settings else (IMAGENET_MEAN, IMAGENET_STD)


def read_weights(path: Path, model: nn.Module, needed: list[str]) -> None:
    """Loads a file of classifier weights into `model`.

    Files whose tensors have other names but the same shapes in the same order are taken too: some published weights
    of one architecture differ in nothing else.

    Args:
        path: a state dict of `torch.save`, bare or under "state_dict" or "model", or a safetensors file.
        model: the classifier that the backbone is cut from.
        needed: keys that the file must have; the others, such as the classifier's last layer, may be missing.

    Raises:
        ConfigError: for a file that cannot be read, and for the first needed key that is missing or of another shape.
    """
    try:
        if path.suffix == ".safetensors":
            state: Mapping[str, Any] = safetensors.torch.load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # every reader has its own exceptions
        raise ConfigError(f"weights: {path} cannot be read as weights: {str(error).splitlines()[0]}") from None
    for key in ("state_dict", "model"):
        state = state.get(key, state) if isinstance(state, Mapping) else {}
    found = {name.removeprefix("module."): value for name, value in state.items() if isinstance(value, Tensor)}
    expected = model.state_dict()
    if not found.keys() & expected.keys() and [x.shape for x in found.values()] == [x.shape for x in expected.values()]:
        found = dict(zip(expected, found.values(), strict=True))
    for key in needed:
        # Files older than torch 0.4.1 lack the counters of batch normalisation; nothing here reads them.
        if key not in found and not key.endswith("num_batches_tracked"):
            raise ConfigError(
                f"weights: {path} lacks {key}, which the backbone needs; is it of another one (--backbone)?"
            )
        if key in found and found[key].shape != expected[key].shape:
            shapes = f"{list(expected[key].shape)}, found {list(found[key].shape)}"
            raise ConfigError(f"weights: {path}: {key}: expected shape {shapes}")
    model.load_state_dict({key: value for key, value in found.items() if key in needed}, strict=False)


class SegmentationNetwork(nn.Module):
    """Low-level features and ASPP fused into a classifier, with J beside them.

    J reads the high-level features and is used by similarities only, so the logits do not depend on it. Without J
    (`propagation_features: decoder`) similarities are of the fused map.

    Args:
        config: the options of the group "network".
        num_classes: C.
        initialise: read the backbone's weights that `config` names; false where a checkpoint follows.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: Config, num_classes: int, *, initialise: bool = True) -> None:
        super().__init__()
        backbone = make_backbone(config, initialise=initialise)
        channels = config.decoder_channels
        self.register_buffer("mean", torch.tensor(backbone.mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(backbone.std)[:, None, None], persistent=False)
        self.backbone = backbone.body
        self.low = Conv2dNormActivation(backbone.low_channels, config.low_channels, kernel_size=1)
        self.aspp = ASPP(backbone.high_channels, list(config.atrous_rates), channels)
        self.aspp.project[-1].p = config.dropout
        self.fuse = nn.Sequential(
            Conv2dNormActivation(config.low_channels + channels, channels, kernel_size=3),
            *(Conv2dNormActivation(channels, channels, kernel_size=3) for _ in range(config.fuse_layers - 1)),
        )
        self.classifier = nn.Conv2d(channels, num_classes, 1)
        self.projection = None
        if not config.reads_decoder:
            self.projection = nn.Sequential(
                Conv2dNormActivation(backbone.high_channels, channels, kernel_size=1),
                nn.Conv2d(channels, config.feature_channels, 1),
                nn.ReLU() if config.nonnegative else nn.Identity(),
            )
        if config.batch_norm == "frozen":
            freeze_batch_norm_2d(self)
        if self.projection is not None and not config.trains_projection:
            # DDP would wait for its gradient.
            self.projection.requires_grad_(requires_grad=False)

    def forward(self, images: Tensor) -> Output:
        """Logits and features of a batch (N, 3, H, W) with values in [0, 1]."""
        maps = self.backbone((images - self.mean) / self.std)
        low = self.low(maps["low"])
        context = F.interpolate(self.aspp(maps["high"]), low.shape[-2:], mode="bilinear", align_corners=True)
        fused = self.fuse(torch.cat([low, context], 1))
        logits = F.interpolate(self.classifier(fused), images.shape[-2:], mode="bilinear", align_corners=True)
        return Output(logits, fused if self.projection is None else self.projection(maps["high"]))

    def parameter_groups(self, lr: float, head_multiplier: float) -> list[dict[str, object]]:
        """Optimiser groups: the backbone, and everything that never has pretrained weights."""
        trained = [(name, parameter) for name, parameter in self.named_parameters() if parameter.requires_grad]
        backbone = [parameter for name, parameter in trained if name.startswith("backbone.")]
        head = [parameter for name, parameter in trained if not name.startswith("backbone.")]
        return [{"params": backbone, "lr": lr}, {"params": head, "lr": lr * head_multiplier}]
