"""The custom ops: schema, shapes for the compiler, autograd, vmap, and the choice of the kernel.

`dlprop::pairwise_l1`, `dlprop::softmax_affinity` and `dlprop::window_affinity` are opaque to the compiler, so that
their loops over tiles neither unroll nor specialise on sizes. They take float32 or float64 and return what they are
given, also under autocast. None can be differentiated twice.
"""

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad
from torch.library import define, impl, register_autograd, register_fake, register_vmap

from ._checks import transforms_active
from ._kernels import window as _window
from ._kernels.compared import Compared, Needed
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
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
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
    # A tensor inside vmap does not say whether what it was made of requires a gradient.
    need_grad = torch.is_grad_enabled() and (rows.requires_grad or transforms_active())
    op = _PairwiseL1.apply if transforms_active() else torch.ops.dlprop.pairwise_l1
    loss: Tensor = op(rows, target, columns, column_target, tile, backend, need_grad)[0]
    return loss


# ---------------------------------------------------------------------------------------------------------------------
# The softmax affinities: `P_ij = softmax_j(q_i . k_j + b_j)` of queries q (N, M, E) over keys k (N, K, E) with a bias b
# (N, K) or None, which may be -inf; and the log-sum-exp of every query, kept for backward. Two ops of one form.
#
# softmax_affinity: over the targets, logits l (N, M, C) of the queries, `sum_i P_ij l_i` (N, K, C); or, over the
# sources, logits (N, K, C) of the keys, `sum_j P_ij l_j` (N, M, C).
# window_affinity: all (N, _, H, W); the keys of a query are those at its pixel moved by each of the offsets, pairs
# (rows, columns) one after the other, as far as they lie in the image; logits of the keys.


def _softmax_affinity(
    logits: Tensor, compared: Compared, over_sources: bool, chunk: int | None, backend: str
) -> tuple[Tensor, Tensor]:
    queries, keys, bias = compared
    kernels = _kernels(backend, queries)
    logits, keys = logits.contiguous(), keys.contiguous()
    if over_sources:  # keys are rows for all queries; these are read once, in whatever order they lie
        out, lse = kernels.attention(logits, Compared(queries, keys, bias), chunk)
    else:
        out, lse = kernels.softmax_affinity(logits, Compared(queries.contiguous(), keys, bias), chunk)
    return out.mT.contiguous().mT, lse  # pixels along memory, as the tiled kernels make it and affinities return it


def _softmax_affinity_backward(
    grad: Tensor, logits: Tensor, compared: Compared, out: Tensor, lse: Tensor, *options: Any
) -> tuple[Tensor | None, ...]:
    over_sources, chunk, backend, needed = options
    kernels = _kernels(backend, grad)
    grad, logits, queries, keys = (x.contiguous() for x in (grad, logits, *compared[:2]))
    compared = Compared(queries, keys, compared.bias)
    grads: tuple[Tensor | None, ...]
    if over_sources:
        grads = kernels.attention_backward(grad, logits, compared, out, lse, chunk, needed)
    else:
        grads = kernels.softmax_affinity_backward(grad, logits, compared, lse, chunk, needed)
    return grads


def _softmax_affinity_fake(
    logits: Tensor, queries: Tensor, keys: Tensor, bias: Tensor | None, over_sources: bool, *_: Any
) -> tuple[Tensor, Tensor]:
    own, other = (keys, queries) if over_sources else (queries, keys)
    torch._check(logits.shape[:2] == own.shape[:2], lambda: f"logits {logits.shape} and {own.shape} must agree")
    torch._check(keys.shape[::2] == queries.shape[::2], lambda: f"{keys.shape} and {queries.shape} must agree")
    torch._check(bias is None or bias.shape == keys.shape[:2], lambda: f"bias must be of the keys {keys.shape}")
    return logits.new_empty(other.shape[0], logits.shape[2], other.shape[1]).mT, queries.new_empty(queries.shape[:2])


def _window_affinity(logits: Tensor, compared: Compared, *args: Any) -> tuple[Tensor, Tensor]:
    return _window.window_affinity(logits.contiguous(), compared.contiguous(), *args)


def _window_affinity_backward(
    grad: Tensor, logits: Tensor, compared: Compared, *args: Any
) -> tuple[Tensor | None, ...]:
    return _window.window_affinity_backward(grad.contiguous(), logits.contiguous(), compared.contiguous(), *args)


def _window_affinity_fake(
    logits: Tensor, queries: Tensor, keys: Tensor, bias: Tensor | None, offsets: list[int]
) -> tuple[Tensor, Tensor]:
    (N, _, *grid), images = queries.shape, (logits.shape[0], 1, *logits.shape[2:])
    torch._check(images == (N, 1, *grid), lambda: f"logits {logits.shape} and {queries.shape} must agree")
    torch._check(keys.shape == queries.shape, lambda: f"keys {keys.shape} and queries {queries.shape} must agree")
    torch._check(bias is None or bias.shape == (N, 1, *grid), lambda: f"bias must be of the keys {keys.shape}")
    return logits.new_empty(logits.shape), queries.new_empty(queries.shape[0], 1, *queries.shape[2:])


def _define_affinity(name: str, options: str, forward: Any, backward: Any, fake: Any) -> Any:
    """Define an affinity's op and that of its gradient; returns the op as an autograd function for `torch.func`."""
    pixels = "Tensor logits, Tensor queries, Tensor keys, Tensor? bias"
    needs = "bool need_queries, bool need_keys, bool need_bias"
    op, gradient = f"dlprop::{name}", f"dlprop::{name}_backward"
    tag = torch.Tag.pt2_compliant_tag
    define(op, f"({pixels}, {options}) -> (Tensor, Tensor)", tags=tag)
    define(
        gradient,
        f"(Tensor grad, {pixels}, Tensor out, Tensor lse, {options}, {needs}) -> (Tensor, Tensor, Tensor, Tensor)",
        tags=tag,
    )

    def run(logits: Tensor, queries: Tensor, keys: Tensor, bias: Tensor | None, *options: Any) -> Any:
        with exact(logits):
            return forward(logits, Compared(queries, keys, bias), *options)

    def run_backward(grad: Tensor, logits: Tensor, *args: Any) -> tuple[Tensor, ...]:
        compared, rest, needed = Compared(*args[:3]), args[3:-3], Needed(*args[-3:])
        with exact(grad):
            grads = backward(grad, logits, compared, *rest, needed)
        return tuple(grad.new_empty(0) if g is None else g.contiguous() for g in grads)

    def fake_backward(grad: Tensor, logits: Tensor, queries: Tensor, keys: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        bias, out, *_, need_queries, need_keys, need_bias = rest
        torch._check(grad.shape == out.shape, lambda: f"grad {grad.shape} and the output {out.shape} must agree")
        needed = (logits, True), (queries, need_queries), (keys, need_keys), (bias, need_bias)
        return tuple(grad.new_empty(x.shape if need else 0) for x, need in needed)

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.set_materialize_grads(False)
        *tensors, ctx.options = *inputs[:4], inputs[4:]
        ctx.save_for_backward(*tensors, *output)

    def grad_of(ctx: Any, grad: Tensor | None, lse_grad: Tensor | None) -> tuple[Any, ...]:
        unused = (None,) * len(ctx.options)
        if grad is None:
            return (None,) * 4 + unused
        *tensors, out, lse = ctx.saved_tensors
        needs = ctx.needs_input_grad[1:4]
        run = backward_function.apply if transforms_active() else getattr(torch.ops.dlprop, f"{name}_backward")
        grad_logits, *grads = run(grad, *tensors, out.detach(), lse.detach(), *ctx.options, *needs)
        return grad_logits, *(g if needed else None for g, needed in zip(grads, needs, strict=True)), *unused

    impl(op, "default", run)
    impl(gradient, "default", run_backward)
    register_fake(op, fake)
    register_fake(gradient, fake_backward)
    register_autograd(op, grad_of, setup_context=setup)
    register_autograd(gradient, _refuse_second_derivative)
    for each in (name, f"{name}_backward"):
        register_vmap(f"dlprop::{each}", _fold_into_batch(each))
    backward_function = _function(f"{name}_backward", lambda *_: None, _refuse_second_derivative)
    return _function(name, setup, grad_of)


_SoftmaxAffinity = _define_affinity(
    "softmax_affinity",
    "bool over_sources, int? chunk, str backend",
    _softmax_affinity,
    _softmax_affinity_backward,
    _softmax_affinity_fake,
)
_WindowAffinity = _define_affinity(
    "window_affinity", "int[] offsets", _window_affinity, _window_affinity_backward, _window_affinity_fake
)


def softmax_affinity(
    logits: Tensor,
    queries: Tensor,
    keys: Tensor,
    bias: Tensor | None = None,
    *,
    over_sources: bool = False,
    chunk: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """The propagated logits of `dlprop::softmax_affinity`."""
    _refuse_tangents(logits, queries, keys)
    op = _SoftmaxAffinity.apply if transforms_active() else torch.ops.dlprop.softmax_affinity
    out: Tensor = op(logits, queries, keys, bias, over_sources, chunk, backend)[0]
    return _handed_out(out)


def window_affinity(
    logits: Tensor, queries: Tensor, keys: Tensor, bias: Tensor | None, offsets: Sequence[tuple[int, int]]
) -> Tensor:
    """The propagated logits of `dlprop::window_affinity`."""
    _refuse_tangents(logits, queries, keys)
    op = _WindowAffinity.apply if transforms_active() else torch.ops.dlprop.window_affinity
    out: Tensor = op(logits, queries, keys, bias, [step for offset in offsets for step in offset])[0]
    return _handed_out(out)


def _handed_out(out: Tensor) -> Tensor:
    """The result as the caller's own, to be changed in place: backward needs the op's."""
    return out.clone() if out.requires_grad else out
