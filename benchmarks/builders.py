"""The variants of every problem: ours first, then what else solves it. Building makes inputs, running does the work."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dlprop import DerivativeLabelPropagation, DerivativeLoss, MomentumAverager
from dlprop.affinity import Affinity, Linear, Softmax
from dlprop.statistics import ClassStatistics

from .plain import attention, plain_loss, plain_propagation, plain_softmax, unit
from .problem import OURS, PLAIN, Kind, Problem, Variant, Variants, compared, step

PLAIN_HIGHEST = "plain PyTorch at `highest`"
PRODUCTS, THREE_PRODUCTS = "its two matrix products", "its three matrix products"
MATRIX = "Eq. 4 as an M x M matrix"
BARE_PRODUCT = "the bare product `V V^T`"
ATTENTION, UNFOLD, COPIES = "`scaled_dot_product_attention`", "`unfold`", "copies of as many bytes"
CLICKS = 55
SAME_OPERATIONS = "one matrix product of as many operations"
ONE_PRODUCT_PER_ORDER = "one matrix product per order"
ANCHORS = 1024  # of the sampled loss
EDGE = 2048  # of the matrices of a product that does nothing but multiply


# ---------------------------------------------------------------------------------------------------------------------
# Propagation.


def affinity(
    p: Problem,
    ours: Affinity | str,
    plain: Callable[[Tensor, Tensor], Tensor],
    *,
    needs: float,
    is_trained: bool = False,
) -> Variants:
    """Any affinity beside its formula, which needs so many bytes: forward, or a step that trains V."""
    logits, feats = p.logits(), p.features().requires_grad_(is_trained)
    trained, grad = ((feats,), p.logits(4)) if is_trained else ((), None)
    propagate = DerivativeLabelPropagation(ours)
    return compared(propagate, plain, (logits, feats), *trained, grad=grad, needs=needs)


def propagation(p: Problem) -> Variants:
    """Eq. 4, forward."""
    L, V = p.logits().flatten(2), p.features().flatten(2)
    bound = {PRODUCTS: step(lambda: (L @ V.mT) @ V, kind="bound")}
    return affinity(p, "linear", plain_propagation, needs=3 * p.matrix_bytes) | bound


def softmax(p: Problem) -> Variants:
    """The softmax affinity, forward and backward."""
    logits, grad, queries = p.logits(), p.logits(4), unit(p.features())
    A = queries.diff(dim=1)
    keys = queries + F.pad(A, (0, 0, 1, 0)) - F.pad(A, (0, 0, 0, 1))  # K V: both orders in one product
    trained = queries.requires_grad_(), keys.requires_grad_()
    beside = step(lambda: attention(logits, queries, keys), *trained, grad=grad, kind="related")
    return affinity(p, "softmax", plain_softmax, is_trained=True, needs=5 * p.matrix_bytes) | {"attention": beside}


def sources_of_each_target(p: Problem) -> Variants:
    """Attention of all pixels over all, forward."""
    logits, feats = p.logits(), unit(p.features()) * 10
    propagate = DerivativeLabelPropagation(Softmax(over="sources", weights=(1.0,), normalize=None))
    return {
        OURS: step(lambda: propagate(logits.flatten(2), feats).view_as(logits), kind="ours"),
        ATTENTION: step(lambda: attention(logits, feats, feats)),
        PLAIN: step(
            lambda: (logits.flatten(2) @ (feats.mT @ feats).softmax(dim=1)).view_as(logits), needs=2 * p.matrix_bytes
        ),
    }


def clicked(p: Problem) -> Variants:
    """Attention over a few labelled pixels, given by a mask, beside the same of these alone."""
    logits, feats = p.logits(), p.features() / p.D**0.5
    mask = torch.zeros(1, p.pixels, dtype=torch.bool, device=p.device)
    mask[0, torch.randperm(p.pixels, generator=torch.Generator().manual_seed(6))[:CLICKS]] = True
    propagate = DerivativeLabelPropagation(Softmax(over="sources", weights=(1.0,), normalize=None))
    values, keys, queries = (x.flatten(2) for x in (logits[:, :, :1], feats, feats))
    values, keys = logits.flatten(2)[:, :, mask[0]], keys[:, :, mask[0]].contiguous()
    mask = mask.view(1, p.height, p.width)

    def by_hand() -> Tensor:
        return F.scaled_dot_product_attention(queries.mT, keys.mT, values.mT, scale=1.0).mT.reshape(logits.shape)

    return {
        OURS: step(lambda: propagate(logits, feats, mask=mask), kind="ours"),
        ATTENTION: step(by_hand),
        "the product of its similarities": step(lambda: keys.mT @ queries, kind="bound"),
    }


def colour_window(p: Problem) -> Variants:
    """Five steps of a window of colours, whose offsets lie at three dilations."""
    probabilities, image = p.logits().softmax(dim=1), 8 * p.features()
    dilations, steps = (1, 2, 4), 5
    affinity = Softmax(
        over="sources", similarity="gaussian", weights=(1.0,), normalize=None, radius=1, dilation=dilations
    )
    propagate = DerivativeLabelPropagation(affinity)
    offsets = 1 + 8 * len(dilations)

    def ours() -> Tensor:
        out = probabilities
        for _ in range(steps):
            out = propagate(out, image)
        return out

    def neighbours(x: Tensor) -> Tensor:
        """(N, K, offsets, M): the centre, then the others of each dilation; beyond the border inf."""
        parts = [x.flatten(2)[:, :, None]]
        for d in dilations:
            padded = F.pad(x, (d,) * 4, value=torch.inf)
            found = F.unfold(padded, 3, dilation=d).unflatten(1, (x.shape[1], 9))
            parts.append(torch.cat((found[:, :, :4], found[:, :, 5:]), dim=2))
        return torch.cat(parts, dim=2)

    def unfolded() -> Tensor:
        squares = (neighbours(image) - image.flatten(2)[:, :, None]).square().sum(dim=1)
        shares = (-squares / 2).softmax(dim=1)
        out = probabilities
        for _ in range(steps):
            out = (neighbours(out).nan_to_num(posinf=0) * shares[:, None]).sum(dim=2).view_as(out)
        return out

    channels = 3 * p.C + 2 * p.D  # of every offset: read, add and write the result, and compare the colours
    source = torch.rand(channels * offsets * p.pixels // 64, device=p.device)
    target = torch.empty_like(source)

    def copies() -> Tensor:
        for _ in range(steps * 32):  # a copy reads and writes
            target.copy_(source)
        return target

    return {
        OURS: step(ours, kind="ours"),
        UNFOLD: step(unfolded, needs=2 * offsets * p.C * p.pixels * p.dtype.itemsize),
        COPIES: step(copies, kind="bound"),
    }


def masked(p: Problem) -> Variants:
    """Eq. 4 of half of the sources, forward and backward, beside that of all."""
    logits, feats, grad = p.logits().requires_grad_(), p.features().requires_grad_(), p.logits(4)
    mask = p.labels() % 2 == 0
    propagate = DerivativeLabelPropagation()

    def by_hand() -> Tensor:
        return propagate(torch.where(mask[:, None], logits, 0), feats)

    trained = logits, feats
    return {
        OURS: step(lambda: propagate(logits, feats, mask=mask), *trained, grad=grad, kind="ours"),
        "dlprop, logits set to 0 by hand": step(by_hand, *trained, grad=grad),
        "dlprop without a mask": step(lambda: propagate(logits, feats), *trained, grad=grad, kind="related"),
    }


def street(p: Problem) -> Variants:
    """Eq. 4 on a whole street image: without and with normalisation, and with its backward."""
    logits, feats, grad = p.logits(), p.features(), p.logits(4)
    trained = tuple(x.detach().requires_grad_() for x in (logits, feats))
    bare, normalized = DerivativeLabelPropagation(Linear(normalize=None)), DerivativeLabelPropagation()
    L, V = logits.flatten(2)[0], feats.flatten(2)[0]
    return {
        OURS: step(lambda: bare(logits, feats), kind="ours"),
        "dlprop, L1-normalised": step(lambda: normalized(logits, feats), kind="related"),
        "dlprop, forward and backward": step(lambda: bare(*trained), *trained, grad=grad, kind="related"),
        PLAIN: step(lambda: plain_propagation(logits, feats), kind="related", needs=3 * p.matrix_bytes),
        PRODUCTS: step(lambda: (L @ V.T) @ V, kind="bound"),
    }


def full_resolution(p: Problem) -> Variants:
    """Eq. 4 at the resolution of the logits with features on a coarse grid."""
    logits, feats, size = p.logits(), p.features(), (p.height, p.width)
    full, coarse = (DerivativeLabelPropagation(resolution=name) for name in ("logits", "feats"))
    bare = DerivativeLabelPropagation(Linear(normalize=None))

    def upsampled() -> Tensor:
        V = feats / feats.abs().sum(dim=1, keepdim=True)
        return bare(logits, F.interpolate(V, size=size, mode="bilinear", align_corners=True))

    return {
        OURS: step(lambda: full(logits, feats), kind="ours"),
        "features upsampled": step(upsampled),
        "feature grid with two resizes": step(lambda: coarse(logits, feats), kind="related"),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Closed forms.


def closed_form(
    p: Problem, *, ours: str, plain: Callable[[Tensor, Tensor], Tensor], is_trained: bool = False
) -> Variants:
    """Ridge or discriminant beside its formula, its products, and the one of Eq. 4 with its matrix."""
    logits, feats = p.logits(), p.features().requires_grad_(is_trained)
    trained, grad = ((feats,), p.logits(4)) if is_trained else ((), None)
    L, V = logits.flatten(2), feats.detach().flatten(2)
    found = affinity(p, ours, plain, needs=(5 if is_trained else 3) * V.nbytes, is_trained=is_trained)
    matrix = step(
        lambda: plain_propagation(logits, feats), *trained, grad=grad, kind="related", needs=3 * p.matrix_bytes
    )
    found[MATRIX] = matrix
    if not is_trained:  # C x D by D x D in the middle is what is not counted
        found[THREE_PRODUCTS] = step(lambda: ((L @ V.mT) @ (V @ V.mT)) @ V, kind="bound")
    return found


def class_statistics(p: Problem) -> Variants:
    """Counts, sums and scatter of a street image, from the prediction."""
    logits, feats = p.logits(), p.features()
    V = feats.flatten(2)

    def updated() -> tuple[Tensor, ...]:
        found = ClassStatistics(p.C, p.D).to(p.device)
        found.update(logits, feats)
        return found.counts, found.sums, found.second

    def plain() -> tuple[Tensor, ...]:
        P, E = logits.flatten(2).softmax(dim=1), V - V.mean(dim=2, keepdim=True)
        return P.sum(dim=(0, 2)), (P @ V.mT).sum(dim=0), (E @ E.mT).sum(dim=0)

    return {
        OURS: Variant(updated, "ours"),
        PLAIN: Variant(plain, needs=2 * V.nbytes),
        BARE_PRODUCT: step(lambda: V @ V.mT, kind="bound"),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Losses, forward and backward.


def loss_view(p: Problem) -> Variants:
    """Eq. 8 against another view. By count ours multiplies 4 M^2 D an order."""
    feats, view = p.features().requires_grad_(), p.features(5)
    depth = max(1, round(8 * p.n * p.pixels**2 * p.D / (2 * EDGE**2)))
    a, b = (torch.rand(shape, device=p.device, dtype=p.dtype) for shape in ((EDGE, depth), (depth, EDGE)))
    loss, plain = DerivativeLoss(eta=p.eta), partial(plain_loss, eta=p.eta)
    bound = {SAME_OPERATIONS: step(lambda: a @ b, kind="bound")}
    return compared(loss, plain, (feats, view), feats, needs=6 * p.matrix_bytes) | bound


def loss_view_medium(p: Problem) -> Variants:
    """The same with products of float32 in bfloat16, for ours and the plain formula, beside both without."""
    found = loss_view(p)

    def at_medium(variant: Variant, kind: Kind) -> Variant:
        def run() -> tuple[Tensor, ...]:
            before = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("medium")
            try:
                return variant.run()
            finally:
                torch.set_float32_matmul_precision(before)

        return replace(variant, run=run, kind=kind)

    return {
        OURS: at_medium(found[OURS], "ours"),
        PLAIN: at_medium(found[PLAIN], "related"),
        "dlprop at `highest`": replace(found[OURS], kind="related"),
        PLAIN_HIGHEST: replace(found[PLAIN], kind="related"),
    }


def loss_labels(p: Problem) -> Variants:
    """Eq. 8 against labels."""
    feats, loss, plain = p.features().requires_grad_(), DerivativeLoss(eta=p.eta), partial(plain_loss, eta=p.eta)
    return compared(loss, plain, (feats, p.labels()), feats, needs=6 * p.matrix_bytes)


def loss_squared(p: Problem) -> Variants:
    """The squared loss, beside one D x M by M x D product an order."""
    feats, view = p.features().requires_grad_(), p.features(5)
    loss, plain = DerivativeLoss(eta=p.eta, norm="frobenius"), partial(plain_loss, eta=p.eta, norm=torch.square)
    V, W = feats.detach().flatten(2), view.flatten(2)
    bound = {ONE_PRODUCT_PER_ORDER: step(lambda: torch.stack([V @ W.mT for _ in range(2)]), kind="bound")}
    return compared(loss, plain, (feats, view), feats, needs=8 * p.matrix_bytes) | bound


def loss_sampled(p: Problem) -> Variants:
    """Eq. 8 with few target pixels a draw, beside all pairs."""
    feats, view = p.features().requires_grad_(), p.features(5)
    sampled, exact = DerivativeLoss(eta=p.eta, num_anchors=ANCHORS), DerivativeLoss(eta=p.eta)
    return {
        OURS: step(lambda: sampled(feats, view), feats, kind="ours"),
        "dlprop, all pairs": step(lambda: exact(feats, view), feats, kind="related"),
    }


def standard_error(p: Problem, draws: int = 12) -> float:
    """Of the sampled loss, relative: root mean square of its distance from the exact one."""
    feats, view = p.features(), p.features(5)
    sampled = DerivativeLoss(eta=0.0, num_anchors=ANCHORS)
    with torch.no_grad():
        exact = DerivativeLoss(eta=0.0)(feats, view)
        errors = torch.stack([sampled(feats, view) / exact - 1 for _ in range(draws)])
    return float(errors.square().mean().sqrt())


# ---------------------------------------------------------------------------------------------------------------------
# The rest.


def averager(p: Problem) -> Variants:
    """One update of the momentum network of a ResNet-50."""
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
    from torchvision.models import resnet50

    model = resnet50().to(p.device)
    ours = MomentumAverager(model, 0.996)
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.996), use_buffers=True)

    def update(average: Any, kind: Kind) -> Variant:
        def run() -> tuple[Tensor, ...]:
            average.update_parameters(model)
            return (next(average.module.parameters()).detach(),)

        return Variant(run, kind)

    return {OURS: update(ours, "ours"), "torch's AveragedModel": update(theirs, "equivalent")}


def imports(_: Problem) -> Variants:
    """Seconds that `import dlprop` takes after `import torch`, in a fresh process."""
    code = "import time, torch; a = time.perf_counter(); import dlprop; print(time.perf_counter() - a)"

    def seconds() -> float:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        return float(done.stdout)

    return {OURS: Variant(kind="ours", sample=seconds)}
