"""The cases: each builds its inputs and returns the variants that compute the same thing, ours first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dlprop import DerivativeLabelPropagation, DerivativeLoss

Variants = dict[str, Callable[[], Any]]

C, D = 21, 256


@dataclass(frozen=True)
class Case:
    """A row of the table: what is computed, at which size, and beside what."""

    title: str
    build: Callable[[], Variants]
    repeats: int = 5
    operations: float | None = None  # of ours, for the share of the matrix-product rate


def features(height: int, width: int, n: int = 1) -> Tensor:
    """Random non-negative features, as after a ReLU."""
    return torch.rand(n, D, height, width)


def propagation_dense() -> Variants:
    logits, feats = torch.randn(1, C, 129, 129), features(129, 129)
    ours, dense = DerivativeLabelPropagation(), DerivativeLabelPropagation(backend="dense")
    return {"dlprop": lambda: ours(logits, feats), "dense M x M": lambda: dense(logits, feats)}


def propagation_city(normalize: Any) -> Callable[[], Variants]:
    def build() -> Variants:
        logits, feats = torch.randn(1, C, 1024, 2048), features(1024, 2048)
        ours = DerivativeLabelPropagation(normalize=normalize)
        L, V = logits.flatten(2)[0], feats.flatten(2)[0]
        return {"dlprop": lambda: ours(logits, feats), "its two matrix products": lambda: (L @ V.T) @ V}

    return build


def propagation_full_resolution() -> Variants:
    logits, feats = torch.randn(1, C, 321, 321), features(41, 41)
    full = DerivativeLabelPropagation(resolution="logits")
    small = DerivativeLabelPropagation(resolution="feats")
    upsampled = DerivativeLabelPropagation(normalize=None)

    def upsample() -> Tensor:
        V = feats / feats.abs().sum(dim=1, keepdim=True)
        return upsampled(logits, F.interpolate(V, size=(321, 321), mode="bilinear", align_corners=True))

    return {
        "dlprop": lambda: full(logits, feats),
        "features upsampled": upsample,
        "feature grid only": lambda: small(logits, feats),
    }


def softmax_affinity() -> Variants:
    logits, feats = torch.randn(1, C, 81, 81), features(81, 81).requires_grad_()
    ours = DerivativeLabelPropagation(affinity="softmax")
    grad = torch.randn(1, C, 81, 81)

    def autograd() -> Tensor:
        V = (feats / feats.abs().sum(dim=1, keepdim=True)).flatten(2)
        S = V.mT @ V + V.diff(dim=1).mT @ V.diff(dim=1)
        return (logits.flatten(2) @ S.softmax(dim=-1)).view_as(logits)

    def run(forward: Callable[[], Tensor]) -> Callable[[], None]:
        def step() -> None:
            feats.grad = None
            forward().backward(grad)

        return step

    return {"dlprop": run(lambda: ours(logits, feats)), "dense autograd": run(autograd)}


def loss_step(loss: Callable[[Tensor], Tensor], feats: Tensor) -> Callable[[], None]:
    def step() -> None:
        feats.grad = None
        loss(feats).backward()

    return step


def dense_loss(feats: Tensor, targets: list[Tensor]) -> Tensor:
    """Eq. 8 as one would write it: two M x M residuals and the sparsity term."""
    V = (feats / feats.abs().sum(dim=1, keepdim=True)).flatten(2)
    total = 0.5 * V.diff(n=2, dim=1).abs().mean()
    for q, G in enumerate(targets):
        A = V.diff(n=q, dim=1)
        total = total + (A.mT @ A - G).abs().mean()
    return total


def loss_consistency(size: int, n: int = 1) -> Callable[[], Variants]:
    def build() -> Variants:
        feats, view = features(size, size, n).requires_grad_(), features(size, size, n)
        ours = DerivativeLoss()

        def autograd(feats: Tensor) -> Tensor:
            W = (view / view.abs().sum(dim=1, keepdim=True)).flatten(2)
            return dense_loss(feats, [W.mT @ W, W.diff(dim=1).mT @ W.diff(dim=1)])

        return {
            "dlprop": loss_step(lambda f: ours(f, view), feats),
            "dense autograd": loss_step(autograd, feats),
        }

    return build


def loss_labelled() -> Variants:
    feats, labels = features(81, 81).requires_grad_(), torch.randint(0, C, (1, 81, 81))
    ours = DerivativeLoss()

    def autograd(feats: Tensor) -> Tensor:
        y = labels.flatten(1)
        Y = (y[:, :, None] == y[:, None, :]).to(feats.dtype)
        return dense_loss(feats, [Y, Y])

    return {"dlprop": loss_step(lambda f: ours(f, labels), feats), "dense autograd": loss_step(autograd, feats)}


def loss_sampled() -> Variants:
    feats, view = features(129, 129).requires_grad_(), features(129, 129)
    sampled, exact = DerivativeLoss(num_anchors=1024), DerivativeLoss()
    return {
        "dlprop": loss_step(lambda f: sampled(f, view), feats),
        "dlprop, exact": loss_step(lambda f: exact(f, view), feats),
    }


def loss_frobenius() -> Variants:
    feats, view = features(321, 321).requires_grad_(), features(321, 321)
    ours = DerivativeLoss(norm="frobenius")
    V, W = feats.detach().flatten(2)[0], view.flatten(2)[0]

    def products() -> None:
        for _ in range(2):  # one D x M by M x D product for each order
            _ = V @ W.T

    return {"dlprop": loss_step(lambda f: ours(f, view), feats), "one product per order": products}


def _pairs(size: int, n: int = 1) -> float:
    return n * 2 * 4 * (size * size) ** 2 * D  # two orders, 4 M^2 D each


CASES = {
    "propagation_129": Case("Eq. 4, 129 x 129", propagation_dense, repeats=2),
    "propagation_1024_none": Case("Eq. 4, 1024 x 2048, `normalize=None`", propagation_city(None), repeats=5),
    "propagation_1024_l1": Case("Eq. 4, 1024 x 2048, L1-normalised", propagation_city("l1"), repeats=5),
    "propagation_full": Case("Eq. 4 at 321 x 321 on 41 x 41 features", propagation_full_resolution, repeats=11),
    "softmax_81": Case("softmax affinity, 81 x 81, forward and backward", softmax_affinity, repeats=5),
    "loss_41": Case(
        "loss against a view, N=4, 41 x 41, forward and backward", loss_consistency(41, 4), 7, _pairs(41, 4)
    ),
    "loss_81": Case("loss against a view, 81 x 81, forward and backward", loss_consistency(81), 5, _pairs(81)),
    "loss_81_labels": Case("loss against labels, 81 x 81, forward and backward", loss_labelled, 5),
    "loss_129_sampled": Case("loss with 1024 anchors, 129 x 129, forward and backward", loss_sampled, 2),
    "loss_321_frobenius": Case("squared loss, 321 x 321, forward and backward", loss_frobenius, 3),
}
