"""The variants of every problem: ours first, then what stands beside it. Building makes inputs, running does the work.

The plain formulas are what one would write from the paper's equations; they share no code with the library.
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dlprop import DerivativeLabelPropagation, DerivativeLoss, MomentumAverager
from dlprop.affinity import Affinity, Linear, Softmax
from dlprop.statistics import ClassStatistics

OURS, PLAIN, COMPILED = "dlprop", "plain PyTorch", "plain PyTorch, compiled"
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
REPEATED = (1 << 23) - 15  # odd, so that no two channels of an image are alike

# "ours" and "equivalent" compute the same thing and must agree; "related" does the same work for another result;
# "bound" is less than the task takes, such as its bare matrix products.
Kind = Literal["ours", "equivalent", "related", "bound"]


@dataclass(frozen=True)
class Problem:
    """Sizes in the letters of the paper, and inputs, the same at every call.

    ``grid`` is the features' grid where it is not that of the logits, ``eta`` the weight of the sparsity term, which a
    comparison of results sets to 0: the sign of a second difference that is nearly 0 is rounding.
    """

    height: int
    width: int
    n: int = 1
    D: int = 256
    C: int = 21
    grid: tuple[int, int] | None = None
    eta: float = 0.5
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    @property
    def pixels(self) -> int:
        return self.height * self.width

    @property
    def matrix_bytes(self) -> int:
        """Bytes of the similarities of all pairs of pixels."""
        return self.n * self.pixels**2 * self.dtype.itemsize

    def features(self, seed: int = 1) -> Tensor:
        """Features (N, D, h, w) between 0 and 1, as after a ReLU."""
        return self._drawn(torch.rand, (self.n, self.D, *(self.grid or (self.height, self.width))), seed)

    def logits(self, seed: int = 2) -> Tensor:
        """Normal numbers (N, C, H, W)."""
        return self._drawn(torch.randn, (self.n, self.C, self.height, self.width), seed)

    def labels(self, seed: int = 3) -> Tensor:
        """Labels (N, H, W)."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(self.C, (self.n, self.height, self.width), generator=generator).to(self.device)

    def _drawn(self, sampler: Callable[..., Tensor], shape: tuple[int, ...], seed: int) -> Tensor:
        """Random numbers, which large tensors repeat: drawing those of a whole street image takes ten seconds."""
        total = math.prod(shape)
        block = sampler(min(total, REPEATED), generator=torch.Generator().manual_seed(seed))
        if total > REPEATED:
            block = block.repeat(-(-total // REPEATED))[:total]
        return block.view(shape).to(self.device, self.dtype)


@dataclass(frozen=True)
class Variant:
    """One way to solve a problem. ``run`` does the whole step and returns the output, or the value and gradients."""

    run: Callable[[], tuple[Tensor, ...]] = tuple
    kind: Kind = "equivalent"
    needs: float = 0.0  # bytes beyond its inputs, where they may be more than there are
    compiles: bool = False  # at the first run, which therefore says nothing about the time
    sample: Callable[[], float] | None = None  # returns the seconds itself, where timing ``run`` is not the way


Variants = dict[str, Variant]


def step(
    function: Callable[[], Tensor],
    *trained: Tensor,
    grad: Tensor | None = None,
    kind: Kind = "equivalent",
    **facts: Any,
) -> Variant:
    """A step that computes the value and its gradients in the ``trained`` tensors, or without any the value alone."""

    def run() -> tuple[Tensor, ...]:
        with torch.set_grad_enabled(bool(trained)):
            out = function()
        return (out.detach(), *(torch.autograd.grad(out, trained, grad) if trained else ()))

    return Variant(run, kind, **facts)


def compared(
    ours: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    tensors: tuple[Tensor, Tensor],
    *trained: Tensor,
    grad: Tensor | None = None,
    needs: float,
) -> Variants:
    """Ours, the plain formula and what torch.compile makes of it; the formula needs so many bytes."""
    compiled = torch.compile(plain, dynamic=False, fullgraph=True)
    return {
        OURS: step(lambda: ours(*tensors), *trained, grad=grad, kind="ours"),
        PLAIN: step(lambda: plain(*tensors), *trained, grad=grad, needs=needs),
        COMPILED: step(lambda: compiled(*tensors), *trained, grad=grad, needs=needs, compiles=True),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Plain formulas.


def unit(feats: Tensor) -> Tensor:
    """Flat features whose channels sum to one in absolute value."""
    return (feats / feats.abs().sum(dim=1, keepdim=True).clamp_min(1e-12)).flatten(2)


def similarity(V: Tensor) -> Tensor:
    """`S + D1S`, Eq. 1 and 9, as an M x M matrix."""
    A = V.diff(dim=1)
    return V.mT @ V + A.mT @ A


def plain_propagation(logits: Tensor, feats: Tensor) -> Tensor:
    """Eq. 4 as it reads."""
    return (logits.flatten(2) @ similarity(unit(feats))).view_as(logits)


def plain_softmax(logits: Tensor, feats: Tensor) -> Tensor:
    """`L softmax(S, -1)`: every source spreads its logits over all targets."""
    return (logits.flatten(2) @ similarity(unit(feats)).softmax(dim=-1)).view_as(logits)


def plain_loss(feats: Tensor, target: Tensor, eta: float = 0.5, norm: Callable[[Tensor], Tensor] = torch.abs) -> Tensor:
    """Eq. 8: a matrix of residuals for each order, and the sparsity. Against labels or, Eq. 9, another view."""
    V = unit(feats)
    A = V.diff(dim=1)
    if target.is_floating_point():
        W = unit(target)
        B = W.diff(dim=1)
        G = W.mT @ W, B.mT @ B
    else:
        y = target.flatten(1)
        G = ((y[:, :, None] == y[:, None, :]).to(V.dtype),) * 2
    return norm(V.mT @ V - G[0]).mean() + norm(A.mT @ A - G[1]).mean() + eta * A.diff(dim=1).abs().mean()


def over_covariance(x: Tensor, covariance: Tensor, shrinkage: float) -> Tensor:
    """`x (Sigma + shrinkage tr(Sigma) / D T)^{-1}`, `T = (I + A_1^T A_1)^{-1}` scaled to a mean diagonal of 1."""
    identity = torch.eye(x.shape[2], dtype=x.dtype, device=x.device)
    A = identity.diff(dim=0)
    T = torch.linalg.inv(identity + A.T @ A)
    variance = covariance.diagonal(dim1=1, dim2=2).mean(dim=1)[:, None, None]
    return torch.linalg.solve(covariance + shrinkage * variance * T / T.diagonal().mean(), x.mT).mT


def plain_discriminant(logits: Tensor, feats: Tensor) -> Tensor:
    """Linear discriminant analysis of the image, with its prediction for soft labels."""
    P, V = logits.flatten(2).softmax(dim=1), feats.flatten(2)
    n, E = P.sum(dim=2, keepdim=True), V - V.mean(dim=2, keepdim=True)
    means = P @ E.mT / (n + 1)
    A = over_covariance(means, E @ E.mT / E.shape[2], 0.1)
    bias = torch.log(n / E.shape[2] + 1e-4) - (A * means).sum(dim=2, keepdim=True) / 2
    return (A @ E + bias).log_softmax(dim=1).view_as(logits)


def plain_ridge(logits: Tensor, feats: Tensor) -> Tensor:
    """The prediction fitted linearly by the features, with weighted pixels."""
    P, V = logits.flatten(2).softmax(dim=1), feats.flatten(2)
    w = (P * ((P.sum(dim=2, keepdim=True) + 1) / P.shape[2]) ** -0.5).sum(dim=1, keepdim=True)
    w = w / w.sum(dim=2, keepdim=True)
    shares, E = (P * w).sum(dim=2, keepdim=True), V - (V * w).sum(dim=2, keepdim=True)
    B = over_covariance(((P - shares) * w) @ E.mT, (w * E) @ E.mT, 0.03)
    fitted = (shares + B @ E).clamp_min(1e-6)
    return torch.log(fitted / fitted.sum(dim=1, keepdim=True)).view_as(logits)


def attention(logits: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    """The same products under a softmax over the SOURCES of each target, `scaled_dot_product_attention`.

    The values are padded to the channels of the keys: torch's streaming kernel wants them equal, and without it the
    M x M matrix is formed and takes three times as long.
    """
    queries, keys = (x.mT.contiguous()[:, None] for x in (queries, keys))
    values = F.pad(logits.flatten(2).mT, (0, keys.shape[3] - logits.shape[1]))[:, None]
    out = F.scaled_dot_product_attention(queries, keys, values.contiguous(), scale=1.0)
    return out[:, 0, :, : logits.shape[1]].mT.reshape(logits.shape)


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
