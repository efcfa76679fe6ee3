"""The custom ops: schema, shapes for the compiler, autograd, vmap, and the choice of the kernel.

`dlprop::pairwise_l1` and `dlprop::softmax_affinity` are opaque to the compiler, so that their loops over tiles neither
unroll nor specialise on sizes. They take pixels as rows, in float32 or float64, and return the dtype they are given,
also under autocast. None can be differentiated twice.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.forward_ad import unpack_dual
from torch.library import define, impl, register_autograd, register_fake, register_vmap

from ._checks import transforms_active
from ._precision import exact

Backend = Literal["auto", "tiled", "triton"]

# The module of `_kernels` behind each backend, imported when it is first asked for. "auto" takes only kernels whose
# speed has been measured on such hardware.
KERNELS = {"auto": "tiled", "tiled": "tiled", "triton": "triton"}


def _kernels(backend: str, x: Tensor) -> Any:
    if backend == "triton" and find_spec("triton") is None:
        raise ValueError(
            "backend='triton' cannot run here: Triton is not installed (builds of torch for CUDA bring it); use "
            "backend='auto'"
        )
    kernels = import_module(f"._kernels.{KERNELS[backend]}", __package__)
    if backend == "triton":
        kernels.check_device(x.device)
    return kernels


def _refuse_second_derivative(*_: Any) -> None:
    raise RuntimeError(
        "dlprop: the pairwise loss and the softmax affinity cannot be differentiated twice, because their gradient is "
        "computed in one pass and keeps no graph; drop create_graph=True, or use norm='frobenius' or "
        "dlprop.affinity.Linear, which can"
    )


def _refuse_forward_mode(*_: Any) -> None:
    raise RuntimeError(
        "dlprop: the pairwise loss and the softmax affinity have no forward-mode derivative; use reverse mode, or "
        "norm='frobenius' or dlprop.affinity.Linear, which have one"
    )


def _refuse_tangents(*tensors: Tensor) -> None:
    # A custom op drops the tangent of a dual tensor without a word.
    if not torch.compiler.is_compiling() and any(unpack_dual(t).tangent is not None for t in tensors):
        _refuse_forward_mode()


def _function(op: str, setup: Any, backward: Any) -> Any:
    """The op as an autograd function for `torch.func`, which cannot differentiate a custom op."""
    members = {"setup_context": setup, "backward": backward, "jvp": _refuse_forward_mode}
    methods = {name: staticmethod(f) for name, f in (members | {"forward": getattr(torch.ops.dlprop, op)}).items()}
    return type(op, (Function,), {"generate_vmap_rule": True, **methods})


def _fold_into_batch(op: str) -> Any:
    """The vmap rule of an op whose tensors all have the batch N first: one call with the vmapped axis folded into N."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        def fold(x: Any, at: int | None) -> Any:
            if not isinstance(x, Tensor):
                return x
            return (x.expand(info.batch_size, *x.shape) if at is None else x.movedim(at, 0)).flatten(0, 1)

        outputs = getattr(torch.ops.dlprop, op)(*map(fold, args, in_dims))
        # An output that nobody asked for is empty, without a batch.
        dims = tuple(None if x.ndim == 1 and x.numel() == 0 else 0 for x in outputs)
        size = info.batch_size, -1
        return tuple(x if at is None else x.unflatten(0, size) for x, at in zip(outputs, dims, strict=True)), dims

    return rule


# ---------------------------------------------------------------------------------------------------------------------
# pairwise_l1: `sum_ij |a_i . c_j - G_ij|` of every image, (N,), and its gradients in a and c.
# rows a (N, M, D); target g (N, M, E) with `G_ij = g_i . h_j`, or class numbers (N, M), int32, with
# `G_ij = [g_i = h_j]` and -1 equal to nothing; columns c (N, K, D) and column_target h likewise, both None for the rows
# themselves, whose gradient is then that of both roles. Without need_grad, or without columns, an output is empty.

define(
    "dlprop::pairwise_l1",
    "(Tensor rows, Tensor target, Tensor? columns, Tensor? column_target, int? tile, str backend, bool need_grad)"
    " -> (Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)


@impl("dlprop::pairwise_l1", "default")
def _pairwise_l1(
    rows: Tensor, target: Tensor, columns: Tensor | None, column_target: Tensor | None, *options: Any
) -> tuple[Tensor, ...]:
    tile, backend, need_grad = options
    kernels = _kernels(backend, rows)
    outputs: tuple[Tensor | None, ...]
    with exact(rows):
        if columns is None or column_target is None:
            outputs = (*kernels.pairwise_l1(rows.contiguous(), target.contiguous(), tile, need_grad), None)
        else:
            pixels = (x.contiguous() for x in (rows, target, columns, column_target))
            outputs = kernels.pairwise_l1_cross(*pixels, tile, need_grad)
    return tuple(rows.new_empty(0) if x is None else x.contiguous() for x in outputs)


def _pairwise_l1_fake(
    rows: Tensor, target: Tensor, columns: Tensor | None, column_target: Tensor | None, *options: Any
) -> tuple[Tensor, ...]:
    torch._check(target.shape[:2] == rows.shape[:2], lambda: f"rows {rows.shape} and target {target.shape} must agree")
    torch._check(rows.dtype in (torch.float32, torch.float64), lambda: f"rows must be float32 or 64, got {rows.dtype}")
    torch._check((columns is None) == (column_target is None), lambda: "columns and column_target go together")
    if columns is not None and column_target is not None:
        torch._check(columns.shape[::2] == rows.shape[::2], lambda: f"{columns.shape} and {rows.shape} must agree")
        own, other = target.shape[2:], column_target.shape[2:]
        torch._check(column_target.shape[:2] == columns.shape[:2] and own == other, lambda: "targets must agree")
    need_grad = options[-1]
    return (
        rows.new_empty(rows.shape[0]),
        rows.new_empty(rows.shape if need_grad else 0),
        rows.new_empty(0 if columns is None or not need_grad else columns.shape),
    )


def _pairwise_l1_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    # The gradients are saved as outputs, so a second derivative arrives here as a gradient of those outputs.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])


def _pairwise_l1_backward(ctx: Any, grad_loss: Tensor | None, *seconds: Tensor | None) -> tuple[Any, ...]:
    if any(second is not None for second in seconds):
        _refuse_second_derivative()
    grad, column_grad = ctx.saved_tensors
    if grad_loss is None:
        return (None,) * 7
    if grad.numel() == 0 and grad_loss.numel() > 0:
        # Only an exported graph can get here: it fixes at export whether the gradient is computed along.
        raise RuntimeError(
            "dlprop: this graph of the pairwise loss was exported for inference; export it with feats that require grad"
        )
    scale = grad_loss[:, None, None]
    return scale * grad, None, scale * column_grad if ctx.needs_input_grad[2] else None, None, None, None, None


register_fake("dlprop::pairwise_l1", _pairwise_l1_fake)
register_autograd("dlprop::pairwise_l1", _pairwise_l1_backward, setup_context=_pairwise_l1_setup)
register_vmap("dlprop::pairwise_l1", _fold_into_batch("pairwise_l1"))
_PairwiseL1 = _function("pairwise_l1", _pairwise_l1_setup, _pairwise_l1_backward)


def pairwise_l1(
    rows: Tensor,
    target: Tensor,
    columns: Tensor | None = None,
    column_target: Tensor | None = None,
    *,
    tile: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """The losses of `dlprop::pairwise_l1`; the gradient is computed along if one will be asked for."""
    _refuse_tangents(rows)
    need_grad = torch.is_grad_enabled() and rows.requires_grad
    op = _PairwiseL1.apply if transforms_active() else torch.ops.dlprop.pairwise_l1
    loss: Tensor = op(rows, target, columns, column_target, tile, backend, need_grad)[0]
    return loss


# ---------------------------------------------------------------------------------------------------------------------
# softmax_affinity: `sum_i softmax(q_i . K)_j l_i` of every target j, (N, M', C), and the log-sum-exp of every source,
# (N, M), kept for backward. logits l (N, M, C), queries q (N, M, E) of the sources, keys (N, M', E) of the targets.

define(
    "dlprop::softmax_affinity",
    "(Tensor logits, Tensor queries, Tensor keys, int? chunk, str backend) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
define(
    "dlprop::softmax_affinity_backward",
    "(Tensor grad, Tensor logits, Tensor queries, Tensor keys, Tensor lse, int? chunk, str backend,"
    " bool need_queries, bool need_keys) -> (Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)


@impl("dlprop::softmax_affinity", "default")
def _softmax_affinity(logits: Tensor, queries: Tensor, keys: Tensor, chunk: int | None, backend: str) -> Any:
    with exact(logits):
        pixels = (x.contiguous() for x in (logits, queries, keys))
        out, lse = _kernels(backend, queries).softmax_affinity(*pixels, chunk)
    return out.contiguous(), lse


def _softmax_affinity_fake(logits: Tensor, queries: Tensor, keys: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    torch._check(logits.shape[:2] == queries.shape[:2], lambda: f"{logits.shape} and {queries.shape} must agree")
    torch._check(keys.shape[::2] == queries.shape[::2], lambda: f"{keys.shape} and {queries.shape} must agree")
    N, M, C = logits.shape
    return logits.new_empty(N, keys.shape[1], C), queries.new_empty(N, M)


@impl("dlprop::softmax_affinity_backward", "default")
def _softmax_affinity_backward(*args: Any) -> tuple[Tensor, ...]:
    pixels, (chunk, backend, *need) = args[:5], args[5:]
    with exact(pixels[0]):
        kernels = _kernels(backend, pixels[0])
        grads = kernels.softmax_affinity_backward(*(x.contiguous() for x in pixels), chunk, *need)
    return tuple(pixels[0].new_empty(0) if g is None else g.contiguous() for g in grads)


def _softmax_affinity_backward_fake(grad: Tensor, logits: Tensor, queries: Tensor, keys: Tensor, *rest: Any) -> Any:
    torch._check(grad.shape[1] == keys.shape[1], lambda: f"{grad.shape} and {keys.shape} must agree")
    need_queries, need_keys = rest[-2:]
    shapes = logits.shape, queries.shape if need_queries else (0,), keys.shape if need_keys else (0,)
    return tuple(logits.new_empty(shape) for shape in shapes)


def _softmax_affinity_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    logits, queries, keys, ctx.chunk, ctx.backend = inputs
    ctx.save_for_backward(logits, queries, keys, output[1])


def _softmax_affinity_grad(ctx: Any, grad: Tensor | None, lse_grad: Tensor | None) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 5
    logits, queries, keys, lse = ctx.saved_tensors
    _, *need, _, _ = ctx.needs_input_grad
    op = _SoftmaxAffinityBackward.apply if transforms_active() else torch.ops.dlprop.softmax_affinity_backward
    grad_logits, *grads = op(grad, logits, queries, keys, lse.detach(), ctx.chunk, ctx.backend, *need)
    return grad_logits, *(g if needed else None for g, needed in zip(grads, need, strict=True)), None, None


register_fake("dlprop::softmax_affinity", _softmax_affinity_fake)
register_fake("dlprop::softmax_affinity_backward", _softmax_affinity_backward_fake)
register_autograd("dlprop::softmax_affinity", _softmax_affinity_grad, setup_context=_softmax_affinity_setup)
register_autograd("dlprop::softmax_affinity_backward", _refuse_second_derivative)
register_vmap("dlprop::softmax_affinity", _fold_into_batch("softmax_affinity"))
register_vmap("dlprop::softmax_affinity_backward", _fold_into_batch("softmax_affinity_backward"))
_SoftmaxAffinity = _function("softmax_affinity", _softmax_affinity_setup, _softmax_affinity_grad)
_SoftmaxAffinityBackward = _function("softmax_affinity_backward", lambda *_: None, _refuse_second_derivative)


def softmax_affinity(logits: Tensor, queries: Tensor, keys: Tensor, chunk: int | None, backend: str) -> Tensor:
    """The propagated logits of `dlprop::softmax_affinity`."""
    _refuse_tangents(logits, queries, keys)
    op = _SoftmaxAffinity.apply if transforms_active() else torch.ops.dlprop.softmax_affinity
    out: Tensor = op(logits, queries, keys, chunk, backend)[0]
    return out
