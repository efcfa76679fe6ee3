"""Products over pixels whose gradients are as cheap as themselves: low-rank propagation and Gram matrices.

torch's own formulas are right and, on CPUs, slower where pixels are many: two gradients of the same features are two
arrays and their sum, and the gradient of a transposed factor comes out with its pixels strided. Each function here is
one autograd node that avoids that, and the plain formula where something else wants to see it: a compiler, a transform
of `torch.func`, or forward mode.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.forward_ad import unpack_dual

from .._checks import transforms_active
from ..difference import Scheme, metric

# Pixels that a pass over features takes at a time, so that its temporaries stay in cache.
PIXELS = 2048


def wants_plain_formula(*tensors: Tensor) -> bool:
    """Whether a compiler, a transform of `torch.func` or forward mode wants to see the formula."""
    is_transformed = torch.compiler.is_compiling() or transforms_active()
    return is_transformed or any(unpack_dual(x).tangent is not None for x in tensors)


def low_rank(L: Tensor, V: Tensor, targets: Tensor, weights: Sequence[float], scheme: Scheme) -> Tensor:
    """`((L V^T) K) V'` for logits (N, C, M), features (N, D, M) and targets V' (N, D, M'), which may be V itself."""
    if wants_plain_formula(L, V, targets):
        return metric(L @ V.mT, weights, 2, scheme) @ targets
    if targets is V:
        out: Tensor = _LowRank.apply(L, V, weights, scheme)[0]
        return out
    prototypes = (V @ L.mT).mT  # in this order the gradient of V comes out along memory
    return metric(prototypes, weights, 2, scheme) @ targets


class _LowRank(Function):
    """`((L V^T) K) V`: the two gradients of V are one product of stacked factors."""

    @staticmethod
    def forward(L: Tensor, V: Tensor, weights: Sequence[float], scheme: Scheme) -> tuple[Tensor, Tensor]:
        carrier = metric(L @ V.mT, weights, 2, scheme)
        return carrier @ V, carrier

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        L, V, ctx.weights, ctx.scheme = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(L, V, output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        L, V, carrier = ctx.saved_tensors
        carried = metric(grad @ V.mT, ctx.weights, 2, ctx.scheme)
        grad_L = carried @ V if ctx.needs_input_grad[0] else None
        grad_V = None
        if ctx.needs_input_grad[1]:
            if torch.is_grad_enabled():  # to be differentiated again
                carrier = metric(L @ V.mT, ctx.weights, 2, ctx.scheme)
            grad_V = torch.cat((carrier, carried), dim=1).mT @ torch.cat((grad, L), dim=1)
        return grad_L, grad_V, None, None


def gram(x: Tensor) -> Tensor:
    """`x x^T` of (N, D, M), (N, D, D); its gradient `(G + G^T) x` is one product."""
    if wants_plain_formula(x):
        return x @ x.mT
    out: Tensor = _Gram.apply(x)
    return out


class _Gram(Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x @ x.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.matmul(grad + grad.mT, x)


def grams_of_difference(V: Tensor, W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`E E^T`, `E W^T` and `W W^T` with `E = V - W` of (N, D, M), differentiable in V; W is a constant."""
    W = W.detach()
    if wants_plain_formula(V):
        E = V - W
        return E @ E.mT, E @ W.mT, W @ W.mT
    products: tuple[Tensor, Tensor, Tensor] = _GramsOfDifference.apply(V, W)
    return products


class _GramsOfDifference(Function):
    """E exists a block of pixels at a time, in forward and in backward."""

    @staticmethod
    def forward(V: Tensor, W: Tensor) -> tuple[Tensor, ...]:
        N, D, _ = V.shape
        products = tuple(V.new_zeros(N, D, D) for _ in range(3))
        for v, w in zip(V.split(PIXELS, dim=2), W.split(PIXELS, dim=2), strict=True):
            e = v - w
            for product, (a, b) in zip(products, ((e, e), (e, w), (w, w)), strict=True):
                product += a @ b.mT
        return products

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(output[2])
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad_EE: Tensor, grad_EW: Tensor, _: Tensor) -> tuple[Tensor, None]:
        V, W = ctx.saved_tensors
        # E times its own gradient on top of W times the other, where E may be small: the difference comes first.
        matrix = torch.cat((grad_EE + grad_EE.mT, grad_EW), dim=2)
        if torch.is_grad_enabled():  # to be differentiated again
            return matrix @ torch.cat((V - W, W), dim=1), None
        out = matrix.new_empty(V.shape)
        for block, v, w in zip(*(x.split(PIXELS, dim=2) for x in (out, V, W)), strict=True):
            block.copy_(matrix @ torch.cat((v - w, w), dim=1))
        return out, None
