"""The smallest run of the example: options that its tests share."""

from typing import Any

TINY_NETWORK: dict[str, Any] = {
    "backbone": "timm/resnet10t",
    "timm_stages": [1, 3],
    "crop_size": 32,
    "atrous_rates": [1, 2, 3],
    "decoder_channels": 8,
    "low_channels": 4,
    "fuse_layers": 1,
    "feature_channels": 8,
}
TINY: dict[str, Any] = TINY_NETWORK | {
    "partition": "demo",
    "labeled_batch": 2,
    "unlabeled_batch": 2,
    "steps": 2,
    "panel_images": 1,
    "accelerator": "cpu",
    "tensorboard": False,
}


def flags(options):
    """Options as command-line flags."""
    given = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            given.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, list):
            given += [f"--{flag}", *map(str, value)]
        else:
            given.append(f"--{flag}={value}")
    return given
