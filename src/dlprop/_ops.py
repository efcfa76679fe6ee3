"""The custom ops: schema, shapes for the compiler, autograd, and the choice of the kernel.

`dlprop::derivative_l1` and `dlprop::softmax_affinity` are opaque to the compiler, so that
their loops over tiles neither unroll nor specialise on sizes. All return the dtype they are given, also under autocast,
and none can be differentiated twice. With ``reduced``, which autocast turns on, the Triton kernels may multiply float32
in fewer bits, as where torch's setting allows TF32; the others never do.
"""

from __future__ import annotations

import warnings
from functools import lru_cache, partial
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual
from torch.library import define, impl, register_autograd, register_fake

from ._kernels import dense, orders, tiled
from .features import at_least_float32, full_precision

__all__: list[str] = []

Backend = Literal["auto", "dense", "tiled", "triton"]
BACKENDS = get_args(Backend)

_KERNELS = {"dense": dense, "tiled": tiled}


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
    _refuse_triton(reason)


def _refuse_triton(reason: str) -> None:
    if reason:
        raise ValueError(f"backend='triton' cannot run here: {reason}; use backend='auto'")


def _missing_for_triton(device: torch.device) -> str:
    """What the Triton kernels lack to run on ``device``, or an empty string."""
    if find_spec("triton") is None:
        return "Triton is not installed; it comes with the builds of torch for CUDA"
    if device.type == "cuda":
        if torch.version.hip is not None or torch.cuda.get_device_capability(device) < (8, 0):
            return f"it needs an NVIDIA GPU of compute capability 8.0 or newer, and {device} is none"
        return ""
    if device.type != "cpu":
        return f"it needs CUDA tensors, and these are on {device}"
    from ._kernels import triton

    if triton.INTERPRETED:
        return ""
    return (
        "it needs CUDA tensors, and these are on cpu (to try it there, set TRITON_INTERPRET=1 before Triton is first "
        "imported)"
    )


def _kernels(
    backend: str, x: Tensor, op: str, channels: tuple[int, int], reduced: bool
) -> ModuleType | SimpleNamespace:
    """The kernels of ``backend`` for features ``x`` and their targets or logits, of so many ``channels``."""
    if backend in ("dense", "tiled"):
        return _KERNELS[backend]
    if backend == "auto":
        if not _auto_takes_triton(x, op, channels, reduced):
            return tiled
    else:
        _refuse_triton(_missing_for_triton(x.device))
    from ._kernels import triton

    return SimpleNamespace(**{name: partial(getattr(triton, name), reduced=reduced) for name in triton.KERNELS})


def _auto_takes_triton(x: Tensor, op: str, channels: tuple[int, int], reduced: bool) -> bool:
    """Whether Triton is there and pays: where tensor cores may do the products, so not for exact float32."""
    if x.device.type != "cuda" or _missing_for_triton(x.device):
        return False
    triton = _import_triton()
    return triton is not None and bool(triton.pays(op, x.dtype, x.device, channels, reduced))


@lru_cache
def _import_triton() -> ModuleType | None:
    """The module of the Triton kernels; a broken Triton must not stop those who did not ask for it, only warn them."""
    try:
        from ._kernels import triton
    except Exception as error:
        warnings.warn(
            f"dlprop: Triton is installed but cannot be imported, so backend='auto' takes the slower tiled kernels: "
            f"{type(error).__name__}: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
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
# derivative_l1: the L1 loss of every image, (N,), and its gradient in feats, (N, D, M).
# feats (N, D, M), normalised; target features (N, D, M), not yet normalised, or int64 labels (N, M), compared for
# equality, where -1 equals nothing. `_kernels.orders` explains the rest. Without need_grad the second output is empty.

define(
    "dlprop::derivative_l1",
    "(Tensor feats, Tensor target, Tensor? valid, Tensor? anchors, Tensor pair_weight, Tensor? eta, bool sum_sparsity,"
    " int max_order, str scheme, str? normalize, int? tile, str backend, bool reduced, bool need_grad)"
    " -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)


@impl("dlprop::derivative_l1", "default")
def _derivative_l1(feats: Tensor, target: Tensor, *inputs: Any) -> tuple[Tensor, Tensor]:
    *options, backend, reduced, need_grad = inputs
    channels = feats.shape[1], target.shape[1] if target.is_floating_point() else 0
    kernels = _kernels(backend, feats, "derivative_l1", channels, reduced)
    arguments: tuple[Any, ...] = (*options, kernels, need_grad)
    with full_precision(feats):
        loss, grad = orders.derivative_l1(feats, target, *arguments)
    return loss, feats.new_empty(0) if grad is None else grad.to(feats.dtype).contiguous()


def _derivative_l1_fake(feats: Tensor, *inputs: Any) -> tuple[Tensor, Tensor]:
    return feats.new_empty(feats.shape[0]), feats.new_empty(feats.shape if inputs[-1] else 0)


def _derivative_l1_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    # The gradient is saved as an output, so a second derivative arrives here as a gradient of that output.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1])


def _derivative_l1_backward(ctx: Any, grad_loss: Tensor | None, second: Tensor | None) -> tuple[Any, ...]:
    if second is not None:
        _refuse_second_derivative()
    if grad_loss is None:
        return (None,) * 14
    (grad,) = ctx.saved_tensors
    _check_gradient_was_kept(grad, grad_loss)
    return grad_loss[:, None, None] * grad, *(None,) * 13


register_fake("dlprop::derivative_l1", _derivative_l1_fake)
register_autograd("dlprop::derivative_l1", _derivative_l1_backward, setup_context=_derivative_l1_setup)


# ---------------------------------------------------------------------------------------------------------------------
# softmax_affinity: L softmax(Q^T K, -1), (N, C, M'), and the log-sum-exp of every row, (N, M), kept for backward.
# logits L (N, C, M), queries Q (N, E, M) of the sources, keys K (N, E, M') of the targets.

define(
    "dlprop::softmax_affinity",
    "(Tensor logits, Tensor queries, Tensor keys, int? chunk, str backend, bool reduced=False) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
define(
    "dlprop::softmax_affinity_backward",
    "(Tensor grad, Tensor logits, Tensor queries, Tensor keys, Tensor lse, int? chunk, str backend,"
    " bool reduced, bool need_queries, bool need_keys) -> (Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)


@impl("dlprop::softmax_affinity", "default")
def _softmax_affinity(
    logits: Tensor, queries: Tensor, keys: Tensor, chunk: int | None, backend: str, reduced: bool = False
) -> tuple[Tensor, Tensor]:
    channels = queries.shape[1], logits.shape[1]
    with full_precision(logits):
        kernels = _kernels(backend, queries, "softmax_affinity", channels, reduced)
        out, lse = kernels.softmax_affinity(logits, queries, keys, chunk)
    return out.to(logits.dtype).contiguous(), at_least_float32(lse)


def _softmax_affinity_fake(
    logits: Tensor, queries: Tensor, keys: Tensor, chunk: int | None, backend: str, reduced: bool = False
) -> tuple[Tensor, Tensor]:
    N, C, M = logits.shape
    return logits.new_empty(N, C, keys.shape[2]), at_least_float32(queries.new_empty(N, M))


@impl("dlprop::softmax_affinity_backward", "default")
def _softmax_affinity_backward(
    grad: Tensor,
    logits: Tensor,
    queries: Tensor,
    keys: Tensor,
    lse: Tensor,
    chunk: int | None,
    backend: str,
    reduced: bool,
    need_queries: bool,
    need_keys: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = logits, queries, keys
    channels = queries.shape[1], logits.shape[1]
    with full_precision(logits):
        kernels = _kernels(backend, queries, "softmax_affinity", channels, reduced)
        grads = kernels.softmax_affinity_backward(grad, *inputs, lse, chunk, need_queries, need_keys)
    grad_logits, grad_queries, grad_keys = (
        x.new_empty(0) if g is None else g.to(x.dtype).contiguous() for g, x in zip(grads, inputs, strict=True)
    )
    return grad_logits, grad_queries, grad_keys


def _softmax_affinity_backward_fake(
    grad: Tensor,
    logits: Tensor,
    queries: Tensor,
    keys: Tensor,
    lse: Tensor,
    chunk: int | None,
    backend: str,
    reduced: bool,
    need_queries: bool,
    need_keys: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        logits.new_empty(logits.shape),
        queries.new_empty(queries.shape if need_queries else 0),
        keys.new_empty(keys.shape if need_keys else 0),
    )


def _softmax_affinity_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    logits, queries, keys, *ctx.options = inputs
    ctx.save_for_backward(logits, queries, keys, output[1])


def _softmax_affinity_grad(ctx: Any, grad: Tensor | None, lse_grad: Tensor | None) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 6
    logits, queries, keys, lse = ctx.saved_tensors
    _, need_queries, need_keys, *_ = ctx.needs_input_grad
    grad_logits, grad_queries, grad_keys = torch.ops.dlprop.softmax_affinity_backward(
        grad, logits, queries, keys, lse.detach(), *ctx.options, need_queries, need_keys
    )
    return grad_logits, grad_queries if need_queries else None, grad_keys if need_keys else None, None, None, None


register_fake("dlprop::softmax_affinity", _softmax_affinity_fake)
register_fake("dlprop::softmax_affinity_backward", _softmax_affinity_backward_fake)
register_autograd("dlprop::softmax_affinity", _softmax_affinity_grad, setup_context=_softmax_affinity_setup)
register_autograd("dlprop::softmax_affinity_backward", _refuse_second_derivative)


# ---------------------------------------------------------------------------------------------------------------------
# Typed calls of the ops.


def derivative_l1(feats: Tensor, *inputs: Any) -> Tensor:
    """The losses of `dlprop::derivative_l1`; the gradient is computed along if one will be asked for."""
    _refuse_forward_mode(feats)
    loss: Tensor = torch.ops.dlprop.derivative_l1(feats, *inputs, torch.is_grad_enabled() and feats.requires_grad)[0]
    return loss


def softmax_affinity(
    logits: Tensor, queries: Tensor, keys: Tensor, chunk: int | None, backend: str, reduced: bool
) -> Tensor:
    """The propagated logits of `dlprop::softmax_affinity`."""
    _refuse_forward_mode(logits, queries, keys)
    out: Tensor = torch.ops.dlprop.softmax_affinity(logits, queries, keys, chunk, backend, reduced)[0]
    return out
