"""The methods that `clicks` compares, and the settings that it tries: from sparse labels to scores of all pixels."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy.ndimage import distance_transform_edt
from torch import Tensor, nn
from torch.nn import functional as F

from dlprop import DerivativeLabelPropagation
from dlprop.affinity import Ridge

from .complete import CERTAIN, Clicks, Completion, classify, only_labelled
from .data import VOID
from .image_features import mean_logits

LARGER, BOTH = ", images twice as large", ", both sizes"
CLOSED = "no other classes: "  # ... than those labelled in an image


@dataclass(frozen=True)
class Sample:
    """What the methods see of an image with sparse labels.

    Attributes:
        labels: (H, W) uint8, `VOID` where there is none.
        decoder: (1, D, h, w), the network's features V.
        backbone: (1, K, h, w), the frozen backbone's, standardised over the image.
        logits: (1, C, h, w) of the network.
        classifier: the network's last layer, with the dropout before it.
    """

    labels: Tensor
    decoder: Tensor
    backbone: Tensor
    logits: Tensor
    classifier: nn.Sequential

    @property
    def clicks(self) -> Clicks:
        """The labelled pixels."""
        return Clicks(self.labels)

    @property
    def closed(self) -> "Sample":
        """The same with a network that knows which classes are labelled, and that there are no others."""
        return replace(self, logits=only_labelled(self.logits, self.clicks))


# An image and the same `ENLARGED` times larger, whose logits are the mean of both sizes -> scores (1, C, h, w), or
# (1, C, H, W).
Method = Callable[[Sample, Sample], Tensor]


def nearest(sample: Sample, num_classes: int) -> Tensor:
    """The class of the nearest labelled pixel."""
    rows, columns = distance_transform_edt((sample.labels == VOID).numpy(), return_distances=False, return_indices=True)
    return F.one_hot(sample.labels[rows, columns].long(), num_classes).permute(2, 0, 1)[None].float()


def label_spreading(sample: Sample, num_classes: int, *, neighbors: int, alpha: float) -> Tensor:
    """scikit-learn's label spreading over the graph of nearest neighbours of grid points and labelled pixels."""
    from sklearn.semi_supervised import LabelSpreading  # a second that the other commands need not wait

    feats, clicks = sample.backbone, sample.clicks
    V = F.normalize(torch.cat((clicks.sample(feats), feats.flatten(2)), 2)[0], dim=0).T.numpy()
    labels = np.full(len(V), -1)
    labels[: len(clicks.classes)] = clicks.classes.numpy()
    model = LabelSpreading(kernel="knn", n_neighbors=neighbors, alpha=alpha, max_iter=100, tol=1e-2).fit(V, labels)
    scores = torch.zeros(num_classes, len(V))
    scores[torch.from_numpy(model.classes_)] = torch.from_numpy(model.label_distributions_).float().T
    return scores[None, :, len(clicks.classes) :].unflatten(2, feats.shape[-2:])


def ridge(sample: Sample, num_classes: int, *, shrinkage: float, balance: float) -> Tensor:
    """Ridge from the labelled pixels alone."""
    propagate = DerivativeLabelPropagation(Ridge(shrinkage=shrinkage, balance=balance))
    feats, clicks = sample.backbone, sample.clicks
    out = propagate(CERTAIN * clicks.one_hot(num_classes), clicks.sample(feats), feats.flatten(2))
    return out.unflatten(2, feats.shape[-2:])


def trained_layer(
    classifier: nn.Sequential, V: Tensor, truth: Tensor, *, steps: int, lr: float
) -> Callable[[Tensor], Tensor]:
    """A network's last layer after gradient descent from where it was: features (1, D, h, w) -> logits (1, C, h, w).

    Args:
        classifier: the layer, a 1 x 1 convolution behind a dropout, which is left out.
        V: (n, D) features.
        truth: (n,) classes, or (n, C) their shares.
        steps: of gradient descent, over all of these at once.
        lr: its learning rate.
    """
    weight, bias = (x.detach().clone() for x in classifier[-1].parameters())
    weight = weight[:, :, 0, 0]
    optimizer = torch.optim.SGD((weight.requires_grad_(), bias.requires_grad_()), lr=lr)
    with torch.enable_grad():
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(F.linear(V, weight, bias), truth).backward()
            optimizer.step()
    return partial(F.conv2d, weight=weight.detach()[:, :, None, None], bias=bias.detach())


def tuned_classifier(sample: Sample, *, steps: int, lr: float) -> Tensor:
    """The network with its last layer trained on the labelled pixels."""
    V, clicks = sample.clicks.sample(sample.decoder)[0].T, sample.clicks
    return trained_layer(sample.classifier, V, clicks.classes, steps=steps, lr=lr)(sample.decoder)


def product(sample: Sample, *, sharpness: float, position: float, power: float) -> Tensor:
    """The network's P times a power of what attention over the labelled pixels says."""
    one_step = Completion(sharpness=sharpness, position=position, steps=1)
    share = 1 / sample.logits.shape[1]
    attention = one_step(sample.decoder, sample.labels, torch.zeros_like(sample.logits)) + share  # the errors' start
    return sample.logits.softmax(1) * attention.clamp_min(1e-4) ** power


def methods(num_classes: int, settings: dict[str, Any]) -> dict[str, Method]:
    """Every row of the table with its settings: first those that need no network."""
    C, chosen = num_classes, settings

    def attention(s: Sample) -> Tensor:
        zeros = s.backbone.new_zeros(1, C, *s.backbone.shape[-2:])
        return Completion(**chosen["attention"])(s.backbone, s.labels, zeros)

    def discriminant(s: Sample) -> Tensor:
        return classify(s.backbone, s.labels, C, **chosen["discriminant"])

    def trained(*sizes: Sample) -> Tensor:
        logits = [tuned_classifier(s, **chosen["last layer"]) for s in sizes]
        return mean_logits(logits, sizes[-1].logits.shape[-2:])

    def corrected(s: Sample) -> Tensor:
        return Completion(**chosen["corrected"])(s.decoder, s.labels, s.logits)

    return {
        "nearest labelled pixel": lambda s, _: nearest(s, C),
        "label spreading, backbone": lambda s, _: label_spreading(s, C, **chosen["label spreading"]),
        "attention, backbone": lambda s, _: attention(s),
        "ridge, backbone": lambda s, _: ridge(s, C, **chosen["ridge"]),
        "discriminant, backbone": lambda s, _: discriminant(s),
        f"discriminant, backbone{LARGER}": lambda _, larger: discriminant(larger),
        "discriminant, network": lambda s, _: classify(s.decoder, s.labels, C, **chosen["discriminant, network"]),
        "network alone": lambda s, _: s.logits,
        f"network alone{BOTH}": lambda _, larger: larger.logits,
        "last layer trained on the clicks": lambda s, _: trained(s),
        f"last layer trained on the clicks{BOTH}": trained,
        "network times attention": lambda s, _: product(s, **chosen["product"]),
        "network corrected by attention": lambda s, _: corrected(s),
        f"network corrected by attention{BOTH}": lambda _, larger: corrected(larger),
        f"{CLOSED}network alone": lambda s, _: s.closed.logits,
        f"{CLOSED}network alone{BOTH}": lambda _, larger: larger.closed.logits,
        f"{CLOSED}last layer trained on the clicks": lambda s, _: only_labelled(trained(s), s.clicks),
        f"{CLOSED}last layer trained on the clicks{BOTH}": lambda s, larger: only_labelled(
            trained(s, larger), s.clicks
        ),
        f"{CLOSED}network times attention": lambda s, _: product(s.closed, **chosen["product"]),
        f"{CLOSED}network corrected by attention": lambda s, _: corrected(s.closed),
        f"{CLOSED}network corrected by attention{BOTH}": lambda _, larger: corrected(larger.closed),
    }


def grids() -> dict[str, tuple[str, list[dict[str, Any]]]]:
    """For each name in the settings the row that it is chosen by, and what is tried."""

    def every(**options: Sequence[Any]) -> list[dict[str, Any]]:
        return [dict(zip(options, values, strict=True)) for values in itertools.product(*options.values())]

    shrinkage = [0.1, 1.0, 10.0, 100.0]
    return {
        "label spreading": ("label spreading, backbone", every(neighbors=[10, 30, 100], alpha=[0.2, 0.8])),
        "attention": ("attention, backbone", every(sharpness=[20.0, 40.0], position=[0.0, 0.5, 1.0], steps=[1])),
        "ridge": ("ridge, backbone", every(shrinkage=shrinkage, balance=[0.5])),
        "discriminant": ("discriminant, backbone", every(shrinkage=shrinkage)),
        "discriminant, network": ("discriminant, network", every(shrinkage=shrinkage)),
        "last layer": ("last layer trained on the clicks", every(steps=[3, 10, 30], lr=[0.03, 0.1, 0.3])),
        "product": (
            "network times attention", every(sharpness=[20.0, 40.0], position=[0.5], power=[0.25, 0.5, 1.0])
        ),
        "corrected": (
            "network corrected by attention", every(sharpness=[20.0, 40.0], position=[0.5, 1.0], steps=[2, 3, 5])
        ),
    }  # fmt: skip
