"""A frozen backbone as small as timm has one."""

from examples.derprop_voc.frozen import FrozenNetwork
from tests.example.options import TINY

# Its features computed at every look; and kept, with pseudo-labels that pass the threshold.
UNCACHED = TINY | {
    "backbone": "timm/test_efficientnet",
    "timm_stages": [],
    "freeze_backbone": True,
    "weights": "random",
    "threads": 1,
}
FROZEN = UNCACHED | {
    "cache_features": True,
    "feature_crop": [4, 5],
    "threshold": 0.2,
    "confidence": "fixed",
    "variant": "no_derivative_loss",
    "affinity": "discriminant",
    "steps": 5,
    "lr": 0.05,
}
CHANNELS = 24 + 32 + 48 + 64  # of stages 1 to 4


def counted(monkeypatch, stop=None):
    """The number of images that a backbone has seen, in a list; the call after `stop` images is interrupted."""
    original, calls = FrozenNetwork.backbone_features, [0]

    def counting(self, images):
        if calls[0] == stop:
            raise KeyboardInterrupt
        calls[0] += len(images)
        return original(self, images)

    monkeypatch.setattr(FrozenNetwork, "backbone_features", counting)
    return calls
