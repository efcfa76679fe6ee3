"""Products over pixels whose gradients are as cheap as themselves: Gram matrices, low-rank propagation, pixel norms.

torch's own formulas are right and, on CPUs, many times slower where pixels are many: the gradient of a transposed
factor comes out with its pixels strided, two gradients of the same features are two arrays and their sum, and a norm
over channels does not run along memory. Each function here is one autograd node that avoids that. The nodes can be
differentiated any number of times and in forward mode; a compiler gets the plain formula, and works on that itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .difference import Scheme, difference, difference_adjoint, metric

__all__: list[str] = []

# Numbers that one step of a norm takes at a time: its temporary stays in cache.
NORM_STEP = 1 << 20
# Rows and pixels of a product over few channels that are written at a time. Measured at 2 million pixels: 0.8 times the
# time of one product; 32 to 128 rows are alike, and so are 32 to 512 thousand pixels.
OUTER_ROWS, OUTER_PIXELS = 64, 1 << 17
# Pixels that a pass over features takes at a time, likewise.
PIXELS = 2048


def gram(x: Tensor) -> Tensor:
    """`x x^T` of (N, D, M), (N, D, D); its gradient `(G + G^T) x` is one product."""
    if torch.compiler.is_compiling():
        return x @ x.mT
    out: Tensor = _Gram.apply(x)
    return out


class _Gram(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x @ x.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return _product_in_blocks(grad + grad.mT, x)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        half: Tensor = tangent @ x.mT
        return half + half.mT


def grams_of_difference(V: Tensor, W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`E E^T`, `E W^T` and `W W^T` with `E = V - W` of (N, D, M), differentiable in V; W is a constant."""
    if torch.compiler.is_compiling():
        E = V - W
        return E @ E.mT, E @ W.mT, W @ W.mT
    products: tuple[Tensor, Tensor, Tensor] = _GramsOfDifference.apply(V, W.detach())
    return products


class _GramsOfDifference(Function):
    """E exists a block of pixels at a time, in forward and in backward, where its products with both are one."""

    generate_vmap_rule = True

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
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad_EE: Tensor, grad_EW: Tensor, _: Tensor) -> tuple[Tensor, None]:
        V, W = ctx.saved_tensors
        return _product_in_blocks(torch.cat((grad_EE + grad_EE.mT, grad_EW), dim=2), V, W), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: Tensor | None) -> tuple[Tensor, Tensor, None]:
        V, W = ctx.saved_tensors
        half: Tensor = tangent @ (V - W).mT
        return half + half.mT, tangent @ W.mT, None


def _product_in_blocks(matrix: Tensor, V: Tensor, W: Tensor | None = None) -> Tensor:
    """``matrix`` times V (N, D, M), or times `V - W` on top of W, where the difference may be small: it comes first."""

    def factor(v: Tensor, w: Tensor | None) -> Tensor:
        return v if w is None else torch.cat((v - w, w), dim=1)

    if torch.is_grad_enabled():
        product: Tensor = matrix @ factor(V, W)
        return product
    out = torch.empty_like(V, memory_format=torch.contiguous_format)
    others = [None] * -(-V.shape[2] // PIXELS) if W is None else W.split(PIXELS, dim=2)
    for block, v, w in zip(out.split(PIXELS, dim=2), V.split(PIXELS, dim=2), others, strict=True):
        block.copy_(matrix @ factor(v, w))
    return out


def low_rank(L: Tensor, V: Tensor, targets: Tensor | None, weights: tuple[float, ...], scheme: Scheme) -> Tensor:
    """`((L V^T) K) V'` for logits (N, C, M), features (N, D, M) and targets V' (N, D, M'), or V itself for None."""
    if torch.compiler.is_compiling():
        return metric(L @ V.mT, weights, 2, scheme) @ (V if targets is None else targets)
    if targets is None:
        out: Tensor = _LowRank.apply(L, V, weights, scheme)[0]
        return out
    prototypes = (V @ L.mT).mT  # in this order the gradient of V comes out along memory
    return metric(prototypes, weights, 2, scheme) @ targets


class _LowRank(Function):
    """`((L V^T) K) V`: the two gradients of V are one product of stacked factors."""

    generate_vmap_rule = True

    @staticmethod
    def forward(L: Tensor, V: Tensor, weights: tuple[float, ...], scheme: Scheme) -> tuple[Tensor, Tensor]:
        carrier = metric(L @ V.mT, weights, 2, scheme)
        return carrier @ V, carrier

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        L, V, ctx.weights, ctx.scheme = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(L, V, output[1])
        ctx.save_for_forward(L, V, output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        L, V, carrier = ctx.saved_tensors
        carried = metric(grad @ V.mT, ctx.weights, 2, ctx.scheme)
        grad_L = carried @ V if ctx.needs_input_grad[0] else None
        grad_V = None
        if ctx.needs_input_grad[1]:
            if torch.is_grad_enabled():  # to be differentiated again
                carrier = metric(L @ V.mT, ctx.weights, 2, ctx.scheme)
            grad_V = _sum_of_outer((carrier, carried), (grad, L))
        return grad_L, grad_V, None, None

    @staticmethod
    def jvp(ctx: Any, tangent_L: Tensor | None, tangent_V: Tensor | None, *_: Any) -> tuple[Tensor, None]:
        L, V, carrier = ctx.saved_tensors
        out: Tensor = torch.zeros_like(L)
        if tangent_L is not None:
            out = metric(tangent_L @ V.mT, ctx.weights, 2, ctx.scheme) @ V
        if tangent_V is not None:
            out = out + metric(L @ tangent_V.mT, ctx.weights, 2, ctx.scheme) @ V + carrier @ tangent_V
        return out, None


def _sum_of_outer(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> Tensor:
    """`a_1^T b_1 + a_2^T b_2` of (N, C, D) and (N, C, M) as one product of stacked factors."""
    stacked = torch.cat(a, dim=1)
    if torch.is_grad_enabled() or stacked.device.type != "cpu":
        product: Tensor = stacked.mT @ torch.cat(b, dim=1)
        return product
    N, _, D = stacked.shape
    M = b[0].shape[2]
    out = stacked.new_empty(N, D, M)
    for n in range(N):
        for j in range(0, M, OUTER_PIXELS):
            block = torch.cat([x[n, :, j : j + OUTER_PIXELS] for x in b])
            for i in range(0, D, OUTER_ROWS):
                torch.mm(
                    stacked[n, :, i : i + OUTER_ROWS].T, block, out=out[n, i : i + OUTER_ROWS, j : j + OUTER_PIXELS]
                )
    return out


def pixel_norm(x: Tensor, p: int) -> Tensor:
    """`||x_i||_p` over the channels of every pixel for p = 1 or 2, (N, D, ...) -> (N, 1, ...), gradient 0 at 0."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        plain: Tensor = torch.linalg.vector_norm(x, p, dim=1, keepdim=True)
        return plain
    norm: Tensor = _PixelNorm.apply(x, p)
    return norm


class _PixelNorm(Function):
    """Channels are added to the sum a few at a time, along memory."""

    @staticmethod
    def forward(x: Tensor, p: int) -> Tensor:
        total = torch.zeros_like(x[:, :1], memory_format=torch.contiguous_format)
        step = NORM_STEP // max(1, total.numel())
        if step >= 8:
            for part in x.split(step, dim=1):
                total += (part.abs() if p == 1 else part.square()).sum(dim=1, keepdim=True)
        else:  # a sum over so few channels is slower than adding each
            for part in x.split(1, dim=1):
                total.add_(part.abs()) if p == 1 else total.addcmul_(part, part)
        return total if p == 1 else total.sqrt_()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
        x, ctx.p = inputs
        ctx.save_for_backward(x, output)
        ctx.save_for_forward(x, output)

    @staticmethod
    def _slope(ctx: Any) -> Tensor:
        x, norm = ctx.saved_tensors
        slope: Tensor = x.sgn() if ctx.p == 1 else x / torch.where(norm == 0, 1, norm)
        return slope

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _PixelNorm._slope(ctx) * grad, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return (_PixelNorm._slope(ctx) * tangent).sum(dim=1, keepdim=True)


def sum_abs_difference(x: Tensor, order: int, scheme: Scheme) -> Tensor:
    """`sum |A_order x|` of every image of (N, D, M), (N,)."""
    if torch.compiler.is_compiling():
        return difference(x, order, 1, scheme).abs().sum(dim=(1, 2))
    total: Tensor = _SumAbsDifference.apply(x, order, scheme)
    return total


class _SumAbsDifference(Function):
    """The slope is made in the backward pass, a block of pixels at a time; it is constant between the kinks."""

    @staticmethod
    def forward(x: Tensor, order: int, scheme: Scheme) -> Tensor:
        parts = [difference(part, order, 1, scheme).abs().sum(dim=(1, 2)) for part in x.split(PIXELS, dim=2)]
        return torch.stack(parts).sum(dim=0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.order, ctx.scheme = inputs
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)

    @staticmethod
    def _slope(ctx: Any) -> Tensor:
        (x,) = ctx.saved_tensors
        slope = torch.empty_like(x)
        with torch.no_grad():
            for part, out in zip(x.split(PIXELS, dim=2), slope.split(PIXELS, dim=2), strict=True):
                sign = difference(part, ctx.order, 1, ctx.scheme).sgn()
                out.copy_(difference_adjoint(sign, ctx.order, 1, ctx.scheme))
        return slope

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _SumAbsDifference._slope(ctx) * grad[:, None, None], None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return (_SumAbsDifference._slope(ctx) * tangent).sum(dim=(1, 2))
