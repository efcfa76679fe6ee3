"""The custom ops: schema, shapes for the compiler, autograd, and the choice of the kernel.

`dlprop::pairwise_l1`, `dlprop::pairwise_l1_cross` and `dlprop::softmax_affinity` are opaque to the compiler, so that
their loops over tiles neither unroll nor specialise on sizes. All compute in the dtype they are given, also under
autocast, and none can be differentiated twice.
"""

from __future__ import annotations

from importlib.util import find_spec
from types import ModuleType
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual
from torch.library import define, impl, register_autograd, register_fake

from ._kernels import dense, tiled
from .features import full_precision

__all__: list[str] = []

Backend = Literal["auto", "dense", "tiled", "triton"]
BACKENDS = get_args(Backend)

# "auto" stays with the tiled kernels on CUDA too until the Triton kernels have been measured there.
_KERNELS: dict[str, ModuleType] = {"dense": dense, "tiled": tiled, "auto": tiled}


def check_backend(backend: str, x: Tensor, without_kernel: str | None = None) -> None:
    """Raise ValueError if an explicit backend cannot run on the device of ``x``; "auto" always can.

    ``without_kernel`` names the option, if any, that makes this call plain matrix products.
    """
    if backend != "triton":
        return
    reason = ""
    if without_kernel is not None:
        reason = f"{without_kernel} has no Triton kernel, because it is a few plain matrix products"
    elif not torch.compiler.is_compiling():  # a compiled graph asks when it runs, in the op
        reason = _missing_for_triton(x.device)
    if reason:
        raise ValueError(f"backend='triton' cannot run here: {reason}; use backend='auto'")


def _missing_for_triton(device: torch.device) -> str:
    """What the Triton kernels lack to run on ``device``, or an empty string."""
    if find_spec("triton") is None:
        return f"Triton is not installed (it comes with builds of torch for CUDA; tensors are on {device})"
    if device.type == "cuda":
        return ""
    if device.type != "cpu":
        return f"it needs CUDA tensors, and these are on {device}"
    from ._kernels import triton

    if triton.INTERPRETED:
        return ""
    return "it needs CUDA tensors, and these are on cpu (Triton's interpreter is off: TRITON_INTERPRET=1 was not set)"


def _kernels(backend: str, x: Tensor) -> ModuleType:
    if backend != "triton":
        return _KERNELS[backend]
    check_backend(backend, x)
    from ._kernels import triton

    return triton


def _refuse_second_derivative(*_: Any) -> None:
    raise RuntimeError(
        "dlprop: the pairwise loss and the softmax affinity cannot be differentiated twice, because their gradient is "
        "computed in one pass and keeps no graph; drop create_graph=True, or use norm='frobenius' or "
        "affinity='linear', which can"
    )


def _refuse_forward_mode(*tensors: Tensor) -> None:
    # A custom op drops the tangent of a dual tensor without a word.
    if not torch.compiler.is_compiling() and any(unpack_dual(t).tangent is not None for t in tensors):
        raise RuntimeError(
            "dlprop: the pairwise loss and the softmax affinity have no forward-mode derivative; use reverse mode, or "
            "norm='frobenius' or affinity='linear', which have one"
        )


def _check_gradient_was_kept(grad: Tensor, grad_loss: Tensor) -> None:
    # Only an exported graph can get here: it fixes at export whether the gradient is computed along.
    if grad.numel() == 0 and grad_loss.numel() > 0:
        raise RuntimeError(
            "dlprop: this graph of the pairwise loss was exported for inference; export it with feats that require grad"
        )


# ---------------------------------------------------------------------------------------------------------------------
# pairwise_l1: sum_ij |a_i . a_j - G_ij| of every image, (N,), and its gradient in a, (N, D, M).
# a (N, D, M); g features (N, E, M) with G = g^T g, or int64 labels (N, M) with G their equality, where -1 equals
# nothing. Without need_grad the second output is empty.

define(
    "dlprop::pairwise_l1",
    "(Tensor a, Tensor g, int? tile, str backend, bool need_grad) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)


@impl("dlprop::pairwise_l1", "default")
def _pairwise_l1(a: Tensor, g: Tensor, tile: int | None, backend: str, need_grad: bool) -> tuple[Tensor, Tensor]:
    with full_precision(a):
        loss, grad = _kernels(backend, a).pairwise_l1(a, g, tile, need_grad)
    return loss, a.new_empty(0) if grad is None else grad.contiguous()


def _pairwise_l1_fake(a: Tensor, g: Tensor, tile: int | None, backend: str, need_grad: bool) -> tuple[Tensor, Tensor]:
    return a.new_empty(a.shape[0]), a.new_empty(a.shape if need_grad else 0)


def _pairwise_l1_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    # The gradient is saved as an output, so a second derivative arrives here as a gradient of that output.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1])


def _pairwise_l1_backward(ctx: Any, grad_loss: Tensor | None, second: Tensor | None) -> tuple[Any, ...]:
    if second is not None:
        _refuse_second_derivative()
    if grad_loss is None:
        return (None,) * 5
    (grad,) = ctx.saved_tensors
    _check_gradient_was_kept(grad, grad_loss)
    return grad_loss[:, None, None] * grad, None, None, None, None


register_fake("dlprop::pairwise_l1", _pairwise_l1_fake)
register_autograd("dlprop::pairwise_l1", _pairwise_l1_backward, setup_context=_pairwise_l1_setup)


# ---------------------------------------------------------------------------------------------------------------------
# pairwise_l1_cross: sum_ik |a_i . c_k - G_ik| of every image, (N,), and its gradients in a (N, D, M) and c (N, D, K).
# g features (N, E, M) and h (N, E, K) with G = g^T h, or labels (N, M) and (N, K).

define(
    "dlprop::pairwise_l1_cross",
    "(Tensor a, Tensor c, Tensor g, Tensor h, int? tile, str backend, bool need_grad) -> (Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)


@impl("dlprop::pairwise_l1_cross", "default")
def _pairwise_l1_cross(
    a: Tensor, c: Tensor, g: Tensor, h: Tensor, tile: int | None, backend: str, need_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    with full_precision(a):
        loss, grad_a, grad_c = _kernels(backend, a).pairwise_l1_cross(a, c, g, h, tile, need_grad)
    if grad_a is None:
        return loss, a.new_empty(0), c.new_empty(0)
    return loss, grad_a.contiguous(), grad_c.contiguous()


def _pairwise_l1_cross_fake(
    a: Tensor, c: Tensor, g: Tensor, h: Tensor, tile: int | None, backend: str, need_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        a.new_empty(a.shape[0]),
        a.new_empty(a.shape if need_grad else 0),
        c.new_empty(c.shape if need_grad else 0),
    )


def _pairwise_l1_cross_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])


def _pairwise_l1_cross_backward(ctx: Any, grad_loss: Tensor | None, *second: Tensor | None) -> tuple[Any, ...]:
    if any(s is not None for s in second):
        _refuse_second_derivative()
    if grad_loss is None:
        return (None,) * 7
    _check_gradient_was_kept(ctx.saved_tensors[0], grad_loss)
    grad_a, grad_c = (grad_loss[:, None, None] * grad for grad in ctx.saved_tensors)
    return grad_a, grad_c, None, None, None, None, None


register_fake("dlprop::pairwise_l1_cross", _pairwise_l1_cross_fake)
register_autograd("dlprop::pairwise_l1_cross", _pairwise_l1_cross_backward, setup_context=_pairwise_l1_cross_setup)


# ---------------------------------------------------------------------------------------------------------------------
# softmax_affinity: L softmax(Q^T K, -1), (N, C, M'), and the log-sum-exp of every row, (N, M), kept for backward.
# logits L (N, C, M), queries Q (N, E, M) of the sources, keys K (N, E, M') of the targets.

define(
    "dlprop::softmax_affinity",
    "(Tensor logits, Tensor queries, Tensor keys, int? chunk, str backend) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
define(
    "dlprop::softmax_affinity_backward",
    "(Tensor grad, Tensor logits, Tensor queries, Tensor keys, Tensor lse, int? chunk, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)


@impl("dlprop::softmax_affinity", "default")
def _softmax_affinity(
    logits: Tensor, queries: Tensor, keys: Tensor, chunk: int | None, backend: str
) -> tuple[Tensor, Tensor]:
    with full_precision(logits):
        out, lse = _kernels(backend, logits).softmax_affinity(logits, queries, keys, chunk)
    return out, lse


def _softmax_affinity_fake(
    logits: Tensor, queries: Tensor, keys: Tensor, chunk: int | None, backend: str
) -> tuple[Tensor, Tensor]:
    N, C, M = logits.shape
    return logits.new_empty(N, C, keys.shape[2]), logits.new_empty(N, M)


@impl("dlprop::softmax_affinity_backward", "default")
def _softmax_affinity_backward(
    grad: Tensor, logits: Tensor, queries: Tensor, keys: Tensor, lse: Tensor, chunk: int | None, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    with full_precision(logits):
        grads = _kernels(backend, logits).softmax_affinity_backward(grad, logits, queries, keys, lse, chunk)
    grad_logits, grad_queries, grad_keys = (g.contiguous() for g in grads)
    return grad_logits, grad_queries, grad_keys


def _softmax_affinity_backward_fake(
    grad: Tensor, logits: Tensor, queries: Tensor, keys: Tensor, lse: Tensor, chunk: int | None, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return logits.new_empty(logits.shape), queries.new_empty(queries.shape), keys.new_empty(keys.shape)


def _softmax_affinity_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    logits, queries, keys, ctx.chunk, ctx.backend = inputs
    ctx.save_for_backward(logits, queries, keys, output[1])


def _softmax_affinity_grad(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 5
    logits, queries, keys, lse = ctx.saved_tensors
    backward = torch.ops.dlprop.softmax_affinity_backward
    return (*backward(grad, logits, queries, keys, lse.detach(), ctx.chunk, ctx.backend), None, None)


register_fake("dlprop::softmax_affinity", _softmax_affinity_fake)
register_fake("dlprop::softmax_affinity_backward", _softmax_affinity_backward_fake)
register_autograd("dlprop::softmax_affinity", _softmax_affinity_grad, setup_context=_softmax_affinity_setup)
register_autograd("dlprop::softmax_affinity_backward", _refuse_second_derivative)


# ---------------------------------------------------------------------------------------------------------------------
# Typed calls of the ops.


def pairwise_l1(a: Tensor, g: Tensor, tile: int | None, backend: str) -> Tensor:
    """The sums of `dlprop::pairwise_l1`; the gradient is computed along if one will be asked for."""
    _refuse_forward_mode(a)
    loss: Tensor = torch.ops.dlprop.pairwise_l1(a, g, tile, backend, torch.is_grad_enabled() and a.requires_grad)[0]
    return loss


def pairwise_l1_cross(a: Tensor, c: Tensor, g: Tensor, h: Tensor, tile: int | None, backend: str) -> Tensor:
    """The sums of `dlprop::pairwise_l1_cross`; the gradients are computed along if they will be asked for."""
    _refuse_forward_mode(a, c)
    need_grad = torch.is_grad_enabled() and (a.requires_grad or c.requires_grad)
    loss: Tensor = torch.ops.dlprop.pairwise_l1_cross(a, c, g, h, tile, backend, need_grad)[0]
    return loss


def softmax_affinity(logits: Tensor, queries: Tensor, keys: Tensor, chunk: int | None, backend: str) -> Tensor:
    """The propagated logits of `dlprop::softmax_affinity`."""
    _refuse_forward_mode(logits, queries, keys)
    out: Tensor = torch.ops.dlprop.softmax_affinity(logits, queries, keys, chunk, backend)[0]
    return out
