"""The variants of every problem: ours first, then what stands beside it. Building makes inputs, running does work.

The counts are of matrix products in multiply-and-add pairs (two operations each); `pairs` is M^2 N, the entries of the
similarity matrices of one order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dlprop import DerivativeLabelPropagation, DerivativeLoss, MomentumAverager
from dlprop._ops import Backend

from . import beside
from .problem import Problem, UnavailableError, Variant, Variants, Work, compiled, forward, forward_backward


def backends(p: Problem, make: Callable[[Backend], Variant]) -> Variants:
    """Ours as a user gets it ("auto"), and each backend by its name. On CPUs "auto" is the tiled one."""
    names: tuple[Backend, ...] = ("dense", "tiled", "triton") if p.device == "cuda" else ("dense",)
    return {"dlprop": make("auto"), **{f"dlprop {name}": make(name) for name in names}}


def in_tensor_cores(p: Problem, backend: str) -> bool:
    """Whether the Triton kernels do the work: on a GPU the suite allows TF32, and "auto" takes them."""
    return backend == "triton" or (backend == "auto" and p.device == "cuda")


def propagation(p: Problem) -> Variants:
    """Eq. 4, forward."""
    logits, feats = p.logits(), p.features()
    pairs, e = p.n * p.M**2, p.element
    written = Work(pairs * (4 * p.D + 2 * p.C), 0, 3 * e * pairs)
    low_rank = Work(4 * p.n * p.M * p.D * p.C, e * p.n * p.M * (2 * p.D + 2 * p.C), 4 * e * p.n * p.M * p.C)
    dense = Work(pairs * (4 * p.D + 2 * p.C), 0, 4 * e * pairs)
    L, V = logits.flatten(2), feats.flatten(2)

    def ours(backend: Backend) -> Variant:
        propagate = DerivativeLabelPropagation(backend=backend)
        return Variant(forward(lambda: propagate(logits, feats)), "ours", dense if backend == "dense" else low_rank)

    compiled_propagation = compiled(beside.dense_propagation)
    variants = backends(p, ours)
    variants.pop("dlprop triton", None)  # the linear affinity is matrix products
    return variants | {
        "dense PyTorch": Variant(forward(lambda: beside.dense_propagation(logits, feats)), work=written),
        "dense, compiled": Variant(forward(lambda: compiled_propagation(logits, feats)), work=written, compiles=True),
        "KeOps": Variant(
            forward(lambda: beside.keops_propagation(logits, feats)), work=Work(written.operations), compiles=True
        ),
        "its two matrix products": Variant(forward(lambda: (L @ V.mT) @ V), "bound", low_rank),
    }


def propagation_large(p: Problem) -> Variants:
    """Eq. 4 on whole street images: without and with normalisation, and with its backward."""
    logits, feats = p.logits(), p.features()
    grad, trained = p.logits(4), feats.detach().requires_grad_()
    source = logits.detach().requires_grad_()
    plain, normalized = DerivativeLabelPropagation(normalize=None), DerivativeLabelPropagation()
    L, V = logits.flatten(2)[0], feats.flatten(2)[0]
    e, product = p.element, 4 * p.n * p.M * p.D * p.C
    work = Work(product, e * p.M * (2 * p.D + 2 * p.C), 2 * e * p.M * p.C)
    # Backward multiplies four times: into the gradients of logits and prototypes, and twice into that of the features.
    both = Work(3 * product, e * p.M * (5 * p.D + 6 * p.C), e * p.M * (3 * p.D + 4 * p.C))
    return {
        "dlprop": Variant(forward(lambda: plain(logits, feats)), "ours", work),
        "dlprop, L1-normalised": Variant(forward(lambda: normalized(logits, feats)), "related", work),
        "dlprop, forward and backward": Variant(
            forward_backward(lambda: plain(source, trained), source, trained, grad=grad), "related", both
        ),
        "its two matrix products": Variant(forward(lambda: (L @ V.T) @ V), "bound", work),
    }


def full_resolution(p: Problem) -> Variants:
    """Eq. 4 at the logits' resolution with features on a coarse grid."""
    logits, feats = p.logits(), p.features()
    size = (p.height, p.width)
    full = DerivativeLabelPropagation(resolution="logits")
    coarse = DerivativeLabelPropagation(resolution="feats")
    upsampled = DerivativeLabelPropagation(normalize=None)
    small = feats.shape[2] * feats.shape[3]

    def upsample() -> Tensor:
        V = feats / feats.abs().sum(dim=1, keepdim=True)
        return upsampled(logits, F.interpolate(V, size=size, mode="bilinear", align_corners=True))

    work = Work(4 * small * p.D * p.C, p.element * (2 * small * p.D + 4 * p.M * p.C), 4 * p.element * p.M * p.C)
    large = Work(4 * p.M * p.D * p.C, 0, p.element * p.M * (p.D + 4 * p.C))
    return {
        "dlprop": Variant(forward(lambda: full(logits, feats)), "ours", work),
        "features upsampled": Variant(forward(upsample), work=large),
        "feature grid with two resizes": Variant(forward(lambda: coarse(logits, feats)), "related", work),
    }


def loss_consistency(p: Problem, *, eta: float = 0.5, scale: float | None = None) -> Variants:
    """Eq. 8 against another view, forward and backward."""
    feats, view = p.features().requires_grad_(), p.features(5)
    pairs, e = p.n * p.M**2, p.element
    once = Work(8 * pairs * p.D, e * p.n * p.M * p.D * 8, 4 * e * p.n * p.M * p.D)
    # Without the symmetry of the similarities, which the Triton kernels do not use.
    both_halves = Work(12 * pairs * p.D, once.traffic, 2 * once.peak, in_half=True)
    autograd = Work(16 * pairs * p.D, 0, 6 * e * pairs)

    def ours(backend: Backend) -> Variant:
        loss = DerivativeLoss(eta=eta, backend=backend)
        work = Work(12 * pairs * p.D, 0, 4 * e * pairs) if backend == "dense" else once
        work = both_halves if in_tensor_cores(p, backend) else work
        return Variant(forward_backward(lambda: loss(feats, view), feats, scale=scale), "ours", work)

    compiled_loss = compiled(beside.dense_loss)
    return backends(p, ours) | {
        "dense autograd": Variant(
            forward_backward(lambda: beside.dense_loss(feats, view, eta), feats, scale=scale), work=autograd
        ),
        "dense, compiled": Variant(
            forward_backward(lambda: compiled_loss(feats, view, eta), feats, scale=scale), work=autograd, compiles=True
        ),
        "KeOps": Variant(
            forward_backward(lambda: beside.keops_loss(feats, view), feats, scale=scale),
            work=Work(autograd.operations),
            compiles=True,
        ),
    }


def loss_labelled(p: Problem, *, signed: bool = False, eta: float = 0.5, scale: float | None = None) -> Variants:
    """Eq. 8 against labels, forward and backward."""
    feats, labels = p.features(signed=signed).requires_grad_(), p.labels()
    pairs, e = p.n * p.M**2, p.element
    # Non-negative features have order 0 in closed form; every other order takes 3 M^2 D.
    once = Work(3 * (2 if signed else 1) * pairs * p.D, e * p.n * p.M * p.D * 6, 4 * e * p.n * p.M * p.D)
    both_halves = Work(8 * pairs * p.D, once.traffic, 2 * once.peak, in_half=True)
    autograd = Work(12 * pairs * p.D, 0, 6 * e * pairs)

    def ours(backend: Backend) -> Variant:
        loss = DerivativeLoss(eta=eta, backend=backend)
        work = autograd if backend == "dense" else once
        work = both_halves if in_tensor_cores(p, backend) else work
        return Variant(forward_backward(lambda: loss(feats, labels), feats, scale=scale), "ours", work)

    compiled_loss = compiled(beside.dense_labelled_loss)
    return backends(p, ours) | {
        "dense autograd": Variant(
            forward_backward(lambda: beside.dense_labelled_loss(feats, labels, eta), feats, scale=scale), work=autograd
        ),
        "dense, compiled": Variant(
            forward_backward(lambda: compiled_loss(feats, labels, eta), feats, scale=scale),
            work=autograd,
            compiles=True,
        ),
    }


def loss_sampled(p: Problem, *, anchors: int = 1024) -> Variants:
    """Eq. 8 with ``anchors`` target pixels a draw, beside all pairs."""
    feats, view = p.features().requires_grad_(), p.features(5)
    sampled, exact = DerivativeLoss(num_anchors=anchors), DerivativeLoss()
    K, e = min(anchors, p.M), p.element
    work = Work(16 * p.n * p.M * K * p.D, e * p.n * p.M * p.D * 8, 6 * e * p.n * p.M * p.D)
    return {
        "dlprop": Variant(forward_backward(lambda: sampled(feats, view), feats), "ours", work),
        "dlprop, exact": Variant(
            forward_backward(lambda: exact(feats, view), feats), "related", Work(8 * p.n * p.M**2 * p.D)
        ),
    }


def loss_frobenius(p: Problem, *, eta: float = 0.5, scale: float | None = None) -> Variants:
    """The squared loss, forward and backward, beside one D x M by M x D product an order."""
    feats, view = p.features().requires_grad_(), p.features(5)
    ours = DerivativeLoss(eta=eta, norm="frobenius")
    V, W, e = feats.detach().flatten(2), view.flatten(2), p.element
    product = 2 * p.n * p.M * p.D**2
    # For both orders: three products in forward, two in backward; each pass reads both features, backward writes one.
    work = Work(5 * product, e * p.n * p.M * p.D * 10, 8 * e * p.n * p.M * p.D)

    def products() -> Tensor:
        return torch.stack([V @ W.mT for _ in range(2)])

    dense = Work(16 * p.n * p.M**2 * p.D, 0, 8 * e * p.n * p.M**2)
    return {
        "dlprop": Variant(forward_backward(lambda: ours(feats, view), feats, scale=scale), "ours", work),
        "dense autograd": Variant(
            forward_backward(lambda: beside.dense_squared_loss(feats, view, eta), feats, scale=scale), work=dense
        ),
        "one product per order": Variant(forward(products), "bound", Work(2 * product)),
    }


def softmax(p: Problem) -> Variants:
    """The softmax affinity, forward and backward."""
    logits, feats, grad = p.logits(), p.features().requires_grad_(), p.logits(4)
    pairs, e = p.n * p.M**2, p.element
    streamed = Work(8 * pairs * (p.D + p.C), e * p.n * p.M * p.D * 8, (64 << 20) + 6 * e * p.n * p.M * p.D)
    # Two pieces a number make three products of each; the probabilities are formed four times, and once more their sum.
    in_pieces = Work(6 * pairs * (7 * p.D + 4 * p.C), streamed.traffic, streamed.peak, in_half=True)
    autograd = Work(pairs * (12 * p.D + 6 * p.C), 0, 5 * e * pairs)

    def step(function: Callable[[Tensor, Tensor], Tensor]) -> Any:
        return forward_backward(lambda: function(logits, feats), feats, grad=grad)

    def ours(backend: Backend) -> Variant:
        propagate = DerivativeLabelPropagation(affinity="softmax", backend=backend)
        work = autograd if backend == "dense" else streamed
        return Variant(step(propagate), "ours", in_pieces if in_tensor_cores(p, backend) else work)

    V = beside.unit(feats.detach())
    queries = V.requires_grad_()
    keys = (V + _metric(V)).detach().requires_grad_()
    return backends(p, ours) | {
        "dense autograd": Variant(step(beside.dense_softmax), work=autograd),
        "dense, compiled": Variant(step(compiled(beside.dense_softmax)), work=autograd, compiles=True),
        "KeOps": Variant(step(beside.keops_softmax), work=Work(autograd.operations), compiles=True),
        "attention (normalised over the sources)": Variant(
            forward_backward(lambda: beside.attention(logits, queries, keys), queries, keys, grad=grad),
            "related",
            streamed,
        ),
    }


def _metric(V: Tensor) -> Tensor:
    """`A_1^T A_1 V` along the channels, the derivative part of `K V`."""
    A = V.detach().diff(dim=1)
    return F.pad(A, (0, 0, 1, 0)) - F.pad(A, (0, 0, 0, 1))


def released(p: Problem) -> Variants:
    """The released affinity of two projections down to C channels, forward and backward."""
    logits, grad = p.logits(), p.logits(4)
    f1, f2 = p.logits(6).requires_grad_(), p.logits(7).requires_grad_()
    weights = (p.C**-0.5, (p.C - 1) ** -0.5)
    pairs, e = p.n * p.M**2, p.element
    streamed = Work(16 * pairs * p.C, e * p.n * p.M * p.C * 12, 64 << 20)
    in_pieces = Work(108 * pairs * p.C, streamed.traffic, streamed.peak, in_half=True)  # as above, with D = 2 C
    autograd = Work(18 * pairs * p.C, 0, 6 * e * pairs)

    def step(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Any:
        return forward_backward(lambda: function(logits, f1, f2), f1, f2, grad=grad)

    def ours(backend: Backend) -> Variant:
        propagate = DerivativeLabelPropagation(
            affinity="softmax",
            normalize=None,
            weights=weights,
            backend=backend,
        )
        work = autograd if backend == "dense" else streamed
        return Variant(step(propagate), "ours", in_pieces if in_tensor_cores(p, backend) else work)

    return backends(p, ours) | {
        "released formula": Variant(step(beside.released_affinity), work=autograd),
        "released formula, compiled": Variant(step(compiled(beside.released_affinity)), work=autograd, compiles=True),
    }


def precision(p: Problem, *, eta: float = 0.5, scale: float | None = None) -> Variants:
    """The loss against another view with products in another precision than that of the run."""
    feats, view = p.features().requires_grad_(), p.features(5)
    loss = DerivativeLoss(eta=eta)
    work = Work(8 * p.n * p.M**2 * p.D, p.element * p.n * p.M * p.D * 8, 4 * p.element * p.n * p.M * p.D)
    step = forward_backward(lambda: loss(feats, view), feats, scale=scale)

    def under(setting: str, run: Callable[[], tuple[Tensor, ...]] = step) -> Callable[[], tuple[Tensor, ...]]:
        def with_setting() -> tuple[Tensor, ...]:
            before = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision(setting)
            try:
                return run()
            finally:
                torch.set_float32_matmul_precision(before)

        return with_setting

    def autocast() -> tuple[Tensor, ...]:
        with torch.autocast(p.device, torch.bfloat16):
            return step()

    variants = {"dlprop": Variant(step, "ours", work), "autocast bfloat16": Variant(autocast, "related", work)}
    if p.device == "cpu":
        return variants | {"matmul precision medium": Variant(under("medium"), "related", work)}
    fused = DerivativeLoss(eta=eta, backend="triton")
    triton = forward_backward(lambda: fused(feats, view), feats, scale=scale)
    # Two pieces a number: three products for each similarity, two for the gradient.
    in_pieces = Work(4 * p.n * p.M**2 * p.D * (3 + 3 + 2), work.traffic, 2 * work.peak, in_half=True)
    return variants | {
        "matmul precision highest": Variant(under("highest"), "related", work),
        "matmul precision highest, triton": Variant(under("highest", triton), "related", in_pieces),
    }


def averager(p: Problem) -> Variants:
    """One update of the momentum network of a ResNet-50."""
    try:
        from torchvision.models import resnet50
    except ImportError as error:
        raise UnavailableError("torchvision is not installed (pip install torchvision)") from error
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    model = resnet50().to(p.device)
    ours = MomentumAverager(model, 0.996)
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.996), use_buffers=True)
    parameters = sum(x.numel() for x in model.parameters())

    def step(average: Any) -> Callable[[], tuple[Tensor, ...]]:
        def update() -> tuple[Tensor, ...]:
            average.update_parameters(model)
            return (next(average.module.parameters()).detach(),)

        return update

    work = Work(2 * parameters, 12 * parameters)
    return {
        "dlprop": Variant(step(ours), "ours", work),
        "AveragedModel": Variant(step(theirs), work=work),
    }
