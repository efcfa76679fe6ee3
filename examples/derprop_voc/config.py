"""Every option of a run: one frozen dataclass, read from YAML files and the command line."""

import argparse
import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from .errors import ConfigError

Variant = Literal["supervised", "no_propagation", "no_derivative_loss", "no_momentum", "full"]

# The first option of each group of `--help`.
GROUPS = {
    "dataset": "data",
    "crop_size": "augmentation",
    "backbone": "network",
    "variant": "method: propagation",
    "weight_ce": "method: losses, pseudo-labels and averaging",
    "epochs": "schedule",
    "accelerator": "machine",
    "evaluation": "evaluation and output",
}

CLASSIFIERS = ("ridge", "discriminant")
# Options that only some affinities have.
ONLY_FOR = {
    "scale": ("linear",),
    "similarity": ("linear", "softmax"),
    "shrinkage": CLASSIFIERS,
    "balance": ("ridge",),
    "across": CLASSIFIERS,
    "pseudo_counts": ("discriminant",),
}
# Options that only some values of another option have; elsewhere they stay at their defaults.
ONLY_WITH: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    *((name, "affinity", affinities) for name, affinities in ONLY_FOR.items()),
    ("statistics_decay", "across", ("data",)),
    ("pseudo_counts", "across", ("image", "data")),
    ("tau", "adjust", ("prior",)),
    ("temperature", "adjust", ("temperature",)),
    ("prior_momentum", "adjust", ("prior", "alignment")),
)


def option(default: Any, text: str, *, low: float | None = None, high: float | None = None) -> Any:
    """A dataclass field with its help text and, for numbers, its inclusive range."""
    return field(default=default, metadata={"help": text, "low": low, "high": high})


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of one training run; `--help` prints each with its default.

    Tuples are YAML lists; an empty one means "not set". Strings that YAML would read as numbers need quotes there
    (`partition: "1_8"`), not on the command line.
    """

    dataset: Literal["folder", "voc", "cityscapes"] = option("folder", "layout of `data`; see the README")
    data: str = option("", "folder of the data set; `folder`: JPEGImages, SegmentationClass, ImageSets/Segmentation")
    download: bool = option(False, "fetch what is missing of VOC 2012 (and SBD) into `data`, through torchvision")
    sbd: bool = option(False, "VOC with the masks of SBD: 10,582 training images instead of 1,464")
    partition: str = option("1_8", "folder with labeled.txt and unlabeled.txt: under ImageSets/Segmentation, or a path")
    num_classes: int = option(0, "classes; 0: as many as names, else the largest labelled id plus one", low=0, high=255)
    class_names: tuple[str, ...] = option((), "names in id order; empty: the lines of classes.txt, else the ids")
    image_size: tuple[int, ...] = option((), "working height and width; empty: as stored. Evaluation is as stored")
    cache_images: bool = option(False, "keep decoded images in memory (small data sets; per worker)")
    cache_features: bool = option(
        False, "with freeze_backbone: compute the backbone's features once and keep them in float16 files of cache_dir"
    )
    cache_dir: str = option("", "folder of cached features, shared by runs; empty: the folder cache of `data`")
    workers: int = option(0, "data loading processes; results do not depend on it", low=0)

    crop_size: int = option(321, "edge of the square training crop, a multiple of output_stride or one more", low=32)
    rescale: tuple[float, ...] = option((0.5, 2.0), "range of the random resize")
    jitter: float = option(0.5, "strength of the strong view's colour jitter", low=0, high=1)
    jitter_probability: float = option(0.8, "probability of the colour jitter", low=0, high=1)
    gray_probability: float = option(0.2, "probability of the grayscale conversion", low=0, high=1)
    blur_probability: float = option(0.5, "probability of the blur", low=0, high=1)
    cutmix_probability: float = option(1.0, "probability that an image receives a CutMix box", low=0, high=1)
    feature_crop: tuple[int, ...] = option(
        (), "height and width of a training crop of cached features, in features; empty: the whole grid"
    )
    channel_dropout: float = option(
        0.5, "share of the channels that the strong view of cached features lacks", low=0, high=0.95
    )

    backbone: str = option(
        "resnet101", "resnet50 or resnet101 of torchvision, or timm/<name>, of timm's those that give output_stride"
    )
    freeze_backbone: bool = option(
        False, "train a compact head on several stages of a frozen timm backbone, whatever the backbone's own stride"
    )
    weights: str = option(
        "none",
        "of the backbone: a file, a torchvision enum member (IMAGENET1K_V2), timm, or none; of a frozen one, which "
        "stays as it is, none is refused and random says that it is meant",
    )
    output_stride: Literal[8, 16] = option(8, "pixels of the input a point of the features stands for")
    timm_stages: tuple[int, ...] = option(
        (), "out_indices of a timm backbone: low-level and high-level stage, or with freeze_backbone all that are "
        "concatenated; empty: the first of stride 4 and the last, or one of each stride from 4 on"
    )  # fmt: skip
    batch_norm: Literal["train", "frozen"] = option("train", "frozen: keep the backbone's and heads' statistics fixed")
    atrous_rates: tuple[int, ...] = option((12, 24, 36), "dilations of ASPP, or of the compact head's 3 x 3 filters")
    decoder_channels: int = option(256, "channels of ASPP and of the fused map, or of the compact head", low=1)
    low_channels: int = option(48, "channels of the low-level branch", low=1)
    fuse_layers: int = option(2, "3 x 3 convolutions between fusion and classifier", low=1)
    dropout: float = option(0.5, "dropout behind ASPP, or before the compact head's classifier", low=0, high=1)
    feature_channels: int = option(256, "D, channels of the projection J, or of the compact head's last map", low=4)
    propagation_features: Literal["projection", "decoder"] = option(
        "projection", "V: the projection J beside the decoder, as in the paper, or the map that the classifier reads; "
        "with freeze_backbone they are one"
    )  # fmt: skip
    nonnegative: bool = option(True, "end J with a ReLU, so that similarities of order 0 are at least 0")

    variant: Variant = option(  # noqa: RUF009, an alias hides from ruff that this is a field
        "full", "which of the method's parts are used; see the README"
    )
    affinity: Literal["linear", "softmax", "ridge", "discriminant"] = option(
        "linear", "linear: Eq. 4; softmax: as released; ridge and discriminant: with a metric of the image's own"
    )
    scale: Literal["sum", "mean", "degree"] = option("sum", "scale of the linear affinity")
    resolution: Literal["feats", "logits"] = option("feats", "grid that propagation runs on")
    similarity: Literal["dot", "cosine"] = option("dot", "similarity of the linear and the softmax affinity")
    shrinkage: float = option(
        0.0, "of the covariance, for ridge and discriminant; 0: the affinity's own, 0.03 and 0.1", low=0
    )
    balance: float = option(0.5, "of ridge; 0 counts every pixel alike, 1 every class", low=0, high=1)
    across: Literal["image", "batch", "data"] = option(
        "image", "whose pixels ridge and discriminant are estimated from; data: running statistics, of discriminant"
    )
    pseudo_counts: float = option(
        0.0, "of discriminant: pixels of a class that its mean over the others stands for, in each image; the others "
        "are the batch with across image, the data with across data, which then adds nothing else", low=0
    )  # fmt: skip
    statistics_decay: float = option(0.95, "what the running statistics of across data keep in a step", low=0, high=1)
    normalize: Literal["auto", "l1", "l2", "softmax", "none"] = option(
        "auto", "features before propagation; auto: the affinity's own, none for ridge and discriminant, else l1"
    )
    scheme: Literal["forward", "central", "sum", "laplacian"] = option(
        "forward", "operator of propagation and L_Der: Eq. 2, 10, 11 or 12"
    )
    order_weights: tuple[float, ...] = option((1.0, 1.0), "weights of the orders 0..Q of the propagation's similarity")
    detach_logits: bool = option(False, "let the cross entropy of P~ train the features only")
    rectify: bool = option(True, "take pseudo-labels from Eq. 5; with --no-rectify, from P alone")
    ramp_end: float = option(
        1.0, "value that eta_ep of Eq. 5 reaches at the end; it rises linearly from 0", low=0, high=1
    )
    adjust: Literal["none", "prior", "alignment", "temperature"] = option(
        "none", "what the pseudo-labels' logits undergo before propagation: less the log of the running class shares "
        "of P, these brought to the labels' shares, or divided by a temperature"
    )  # fmt: skip
    tau: float = option(0.5, "factor on that log for adjust prior, with the ramp of Eq. 5", low=0)
    temperature: float = option(0.5, "of adjust temperature; below 1 sharpens", low=0.01)
    prior_momentum: float = option(0.99, "momentum of the running class shares of P", low=0, high=1)

    weight_ce: float = option(0.5, "weight of L_CE, Eq. 7", low=0)
    weight_kl: float = option(0.25, "weight of L_KL, Eq. 7", low=0)
    weight_der: float = option(0.5, "weight of L_Der, Eq. 7", low=0)
    weight_propagated: float = option(1.0, "factor on the cross entropies of P~ inside L_CE; 0 leaves them out", low=0)
    max_order: int = option(1, "Q of L_Der, its highest order; its sparsity term has the next one", low=0)
    loss_norm: Literal["l1", "frobenius"] = option("l1", "norm of L_Der's residuals")
    loss_normalize: Literal["l1", "l2", "softmax", "none"] = option("l1", "features before differencing, in L_Der")
    eta: float = option(0.5, "weight of L_Der's sparsity term", low=0)
    num_anchors: int = option(0, "target pixels an image sampled by L_Der; 0: all pairs", low=0)
    unlabeled_warmup: float = option(
        0.0, "share of the steps over which the unlabelled terms' weights rise from 0 (from scratch)", low=0, high=1
    )
    weak_mode: Literal["eval", "train"] = option(
        "eval", "mode of the network that makes pseudo-labels; train: batch statistics and dropout (from scratch)"
    )
    confidence: Literal["adaptive", "fixed"] = option("adaptive", "global threshold on the pseudo-labels' confidence")
    threshold: float = option(0.85, "the fixed threshold, or where the adaptive one starts", low=0, high=1)
    threshold_momentum: float = option(0.999, "momentum of the adaptive threshold", low=0, high=1)
    momentum_network: Literal["variant", "on", "off"] = option(
        "variant", "keep the network of Eq. 6: only in the variant that has it, always, or never"
    )
    average_every: Literal["epoch", "step"] = option("epoch", "when the momentum network is updated (Eq. 6: epoch)")
    average_momentum: float = option(
        0.5, "momentum of the momentum network; after each step 0.996 or so", low=0, high=1
    )

    epochs: int = option(80, "EP, passes over the longer of the two lists", low=1)
    steps: int = option(0, "length in optimiser steps instead; 0: from `epochs`", low=0)
    labeled_batch: int = option(4, "labelled images a step, over all processes", low=1)
    unlabeled_batch: int = option(4, "unlabelled images a step, over all processes", low=1)
    lr: float = option(0.001, "learning rate of SGD, decayed polynomially to 0", low=0)
    head_lr_multiplier: float = option(1.0, "learning rate of all but the backbone, as a multiple of lr", low=0)
    lr_power: float = option(0.9, "power of the decay", low=0)
    sgd_momentum: float = option(0.9, "momentum of SGD", low=0, high=1)
    weight_decay: float = option(1e-4, "weight decay", low=0)

    accelerator: Literal["auto", "cpu", "cuda"] = option("auto", "what to train on")
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = option("32-true", "arithmetic of the network")
    channels_last: bool = option(False, "memory format of the network; faster on most machines")
    threads: int = option(0, "CPU threads; 0: torch's choice. Results are repeatable for one number of threads", low=0)
    seed: int = option(0, "seed of everything random", low=0, high=2**32 - 1)

    evaluation: Literal["original", "sliding_window", "center_crop"] = option("original", "how images are scored")
    evaluate_every: int = option(0, "epochs between validations, which choose best.pt; 0: at the end only", low=0)
    panel_every: int = option(0, "epochs between panels of validation images; 0: at the end only", low=0)
    panel_images: int = option(4, "validation images in a panel", low=1)
    measure_pseudo_labels: bool = option(
        False, "log how good P, P~ and P_bar are at every fifth step; reads unlabelled masks, for the log only"
    )
    tensorboard: bool = option(True, "write TensorBoard event files")
    out: str = option("runs/train", "run folder")

    def __post_init__(self) -> None:
        for name, kind in hints().items():
            object.__setattr__(self, name, _checked(name, getattr(self, name), kind))
        for item in fields(self):
            _check_range(item.name, getattr(self, item.name), item.metadata["low"], item.metadata["high"])
        if self.crop_size % self.output_stride > 1:
            raise ConfigError(
                f"crop_size: expected a multiple of output_stride = {self.output_stride}, or one more "
                f"(CutMix boxes lie on the feature grid), got {self.crop_size}"
            )
        if len(self.image_size) not in (0, 2) or any(edge < 1 for edge in self.image_size):
            raise ConfigError(f"image_size: expected a height and a width, got {list(self.image_size)}")
        if len(self.rescale) != 2 or not 0 < self.rescale[0] <= self.rescale[1]:
            raise ConfigError(f"rescale: expected two positive numbers in rising order, got {list(self.rescale)}")
        if not self.order_weights:
            raise ConfigError("order_weights: expected a number for each order, got none")
        if not all(rate >= 1 for rate in self.atrous_rates):
            raise ConfigError(f"atrous_rates: expected at least 1, got {list(self.atrous_rates)}")
        if not self.out:
            raise ConfigError("out: expected a folder, got an empty name")
        if len(set(self.class_names)) != len(self.class_names):
            raise ConfigError(f"class_names: expected different names, got {', '.join(self.class_names)}")
        step = 2 if self.scheme in ("central", "laplacian") else 1
        highest = max(len(self.order_weights) - 1, self.max_order + 1 if self.has_derivative_loss else 0)
        if highest * step >= self.propagation_channels:
            name = "decoder_channels" if self.reads_decoder else "feature_channels"
            raise ConfigError(
                f"{name}: expected more than {highest * step} for differences of order {highest} with scheme "
                f"{self.scheme}, got {self.propagation_channels}"
            )
        stages, rising = list(self.timm_stages), sorted({stage for stage in self.timm_stages if stage >= 0})
        if stages != rising or (stages and len(stages) != 2 and not self.freeze_backbone):
            count = "stages" if self.freeze_backbone else "two stages"
            raise ConfigError(f"timm_stages: expected {count} in rising order, got {stages}")
        if self.cache_features and not self.freeze_backbone:
            raise ConfigError("cache_features: features change while a backbone is trained; add --freeze-backbone")
        if self.freeze_backbone and not self.backbone.startswith("timm/"):
            raise ConfigError(
                f"backbone: expected timm/<name> with freeze_backbone, got {self.backbone}; timm has it, too"
            )
        if self.feature_crop and not self.cache_features:
            raise ConfigError("feature_crop: applies to cached features only; add --cache-features, or take crop_size")
        if len(self.feature_crop) not in (0, 2) or any(edge < 1 for edge in self.feature_crop):
            raise ConfigError(f"feature_crop: expected a height and a width, got {list(self.feature_crop)}")
        if self.num_classes and self.class_names and self.num_classes != len(self.class_names):
            raise ConfigError(f"class_names: expected num_classes = {self.num_classes}, got {len(self.class_names)}")
        for name, other, among in ONLY_WITH:
            value, default, found = getattr(self, name), getattr(Config, name), getattr(self, other)
            if found not in among and value != default:
                of = "" if other == "affinity" else f"{other} "
                raise ConfigError(
                    f"{name}: {value!r} applies to {of}{' and '.join(among)} only, not to {found}; "
                    f"leave it at {default!r}"
                )
        if self.across == "data" and self.affinity != "discriminant":
            raise ConfigError(
                f"across: 'data' applies to discriminant only, not to {self.affinity}; take image or batch"
            )
        if self.across == "data" and self.normalize not in ("auto", "none"):
            raise ConfigError(
                f"normalize: expected auto or none with across data, whose statistics are of features as they are, "
                f"got {self.normalize}"
            )
        if self.affinity in CLASSIFIERS and (self.order_weights[0] <= 0 or min(self.order_weights) < 0):
            raise ConfigError(
                f"order_weights: expected the first above 0 and none below for {self.affinity}, "
                f"got {list(self.order_weights)}"
            )

    def to_dict(self) -> dict[str, Any]:
        """The options as plain YAML and JSON values."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @property
    def reads_decoder(self) -> bool:
        """Whether V is the fused map of a network that has a projection beside it."""
        return self.propagation_features == "decoder" and not self.freeze_backbone

    @property
    def propagation_channels(self) -> int:
        """D of V."""
        return self.decoder_channels if self.reads_decoder else self.feature_channels

    @property
    def propagates(self) -> bool:
        """Whether training uses Eq. 4 and 5."""
        return self.variant in ("no_derivative_loss", "no_momentum", "full")

    @property
    def trains_propagated(self) -> bool:
        """Whether the cross entropies of P~ take part."""
        return self.propagates and self.weight_propagated > 0

    @property
    def has_derivative_loss(self) -> bool:
        """Whether training uses L_Der."""
        return self.variant in ("no_momentum", "full")

    @property
    def trains_projection(self) -> bool:
        """Whether any term has a gradient for J."""
        return self.trains_propagated or self.has_derivative_loss

    @property
    def averages(self) -> bool:
        """Whether Eq. 6 keeps a momentum network."""
        return self.variant == "full" if self.momentum_network == "variant" else self.momentum_network == "on"

    @property
    def crop_grid(self) -> int:
        """Edge of a training crop on the feature grid."""
        return -(-self.crop_size // self.output_stride)


def hints() -> dict[str, Any]:
    """Option names with their types, in the order of the dataclass."""
    return {name: kind for name, kind in get_type_hints(Config).items() if name in Config.__dataclass_fields__}


def _checked(name: str, value: Any, kind: Any) -> Any:
    """`value` as `kind`, or an error that names the option, what was expected and what came."""
    if get_origin(kind) is Literal:
        if value not in get_args(kind) or type(value) not in map(type, get_args(kind)):  # 8.0 is in (8, 16)
            raise ConfigError(f"{name}: expected one of {', '.join(map(str, get_args(kind)))}, got {value!r}")
        return value
    if get_origin(kind) is tuple:
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise ConfigError(f"{name}: expected a list, got {value!r}")
        return tuple(_checked(name, item, get_args(kind)[0]) for item in value)
    if kind is float and not isinstance(value, bool):
        # YAML 1.1 reads 1e-3 as a string.
        try:
            return float(value)
        except (TypeError, ValueError):
            raise ConfigError(f"{name}: expected a number, got {value!r}") from None
    if type(value) is not kind:
        quotes = " (in YAML, quote it)" if kind is str else ""
        raise ConfigError(f"{name}: expected {kind.__name__}{quotes}, got {value!r}")
    return value


def _check_range(name: str, value: Any, low: float | None, high: float | None) -> None:
    numbers = value if isinstance(value, tuple) else (value,)
    if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
        raise ConfigError(f"{name}: expected finite numbers, got {value}")
    if low is not None and not low <= value:
        raise ConfigError(f"{name}: expected at least {low}, got {value}")
    if high is not None and not value <= high:
        raise ConfigError(f"{name}: expected at most {high}, got {value}")


def make_config(values: Mapping[str, Any]) -> Config:
    """A `Config` from plain values; unknown names are errors."""
    for name in values:
        if name not in hints():
            close = difflib.get_close_matches(str(name), hints(), n=1)
            guess = f"did you mean {close[0]}?" if close else "`train --help` lists them all"
            raise ConfigError(f"unknown option {name}; {guess}")
    return Config(**values)


def read_yaml(path: Path) -> dict[str, Any]:
    """The options of one YAML file, on top of those of the file beside it that its line `extends: NAME` names."""
    values = _read_yaml(path)
    base = values.pop("extends", None)
    return values if base is None else _read_yaml(path.parent / str(base)) | values


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected 'option: value' lines, found {type(values).__name__}")
    return values


def add_config_arguments(parser: argparse.ArgumentParser, names: Sequence[str] = ()) -> None:
    """Adds `--config` and one flag for every option of `Config`, or for those of a finished run that `names` lists."""
    parser.add_argument("--config", nargs="+", default=[], metavar="YAML", type=Path, help="option files; later win")
    if not names:
        parser.usage = "%(prog)s [options]"  # all of them would fill a screen before an error
    group: argparse._ArgumentGroup | argparse.ArgumentParser = parser
    for item in fields(Config):
        if item.name in GROUPS:
            group = parser.add_argument_group(GROUPS[item.name])
        if names and item.name not in names:
            continue
        kind = hints()[item.name]
        shown = "the run's" if names else list(item.default) if isinstance(item.default, tuple) else item.default
        arguments: dict[str, Any] = {
            "dest": item.name,
            "default": argparse.SUPPRESS,
            "help": f"{item.metadata['help']} (default: {shown})".replace("%", "%%"),
        }
        if kind is bool:
            arguments["action"] = argparse.BooleanOptionalAction
        elif get_origin(kind) is Literal:
            arguments |= {"choices": get_args(kind), "type": type(get_args(kind)[0])}
        elif get_origin(kind) is tuple:
            arguments |= {"nargs": "*", "type": get_args(kind)[0], "metavar": item.name.upper()}
        else:
            arguments |= {"type": kind, "metavar": item.name.upper()}
        group.add_argument(f"--{item.name.replace('_', '-')}", **arguments)


def values_from_arguments(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of every `--config` file, then of the flags that were given; defaults are left out."""
    values: dict[str, Any] = {}
    for path in arguments.config:
        values |= read_yaml(path)
    return values | {name: value for name, value in vars(arguments).items() if name in hints()}


def config_from_arguments(arguments: argparse.Namespace) -> Config:
    """Defaults, then every `--config` file, then the flags that were given."""
    return make_config(values_from_arguments(arguments))
