"""Argument checks whose errors name the argument, what was expected and what came."""

import inspect
import math
import numbers
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ._precision import autocast_enabled

# Grids of one image differ in aspect ratio by what rounding their sides does to it, less than this from so many rows
# and columns on.
ASPECT, LARGE = 1.5, 8


def integer(name: str, value: Any, minimum: int | None = None, maximum: int | None = None) -> int:
    """Return ``value`` as an int within its bounds; bools and floats are not integers here."""
    if isinstance(value, (bool, float)) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an int, got {type(value).__name__} {value!r}")
    number = int(value)
    if minimum is not None and number < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")
    if maximum is not None and number > maximum:
        raise ValueError(f"{name} must be at most {maximum}, got {value}")
    return number


def optional_integer(name: str, value: Any, minimum: int) -> int | None:
    """Like `integer`, with None allowed."""
    return None if value is None else integer(name, value, minimum)


def integer_or_integers(name: str, value: Any, minimum: int) -> int | tuple[int, ...]:
    """Return ``value`` as an int, or as a tuple of at least one, each not below ``minimum``."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        return integer(name, value, minimum)
    if not value:
        raise ValueError(f"{name} must be an int or hold at least one, got none")
    return tuple(integer(f"{name}[{i}]", x, minimum) for i, x in enumerate(value))


def boolean(name: str, value: Any) -> bool:
    """Return ``value`` if it is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__} {value!r}")
    return value


def real(name: str, value: Any, minimum: float = -math.inf, maximum: float = math.inf) -> float:
    """Return ``value`` as a finite float in ``[minimum, maximum]``."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a real number, got {type(value).__name__} {value!r}")
    number = float(value)
    if not (abs(number) < math.inf and minimum <= number <= maximum):
        allowed = f"in [{minimum:g}, {maximum:g}]" if maximum < math.inf else "finite"
        allowed += f" and at least {minimum:g}" if -math.inf < minimum and maximum == math.inf else ""
        raise ValueError(f"{name} must be {allowed}, got {value}")
    return number


def choice(name: str, value: Any, kind: Any) -> Any:
    """Return ``value`` if it is one of those that the `Literal` type ``kind`` lists."""
    options = kind.__args__  # not get_args, into which torch.compile of torch 2.6 does not look
    if not (value is None or isinstance(value, str)):
        raise TypeError(f"{name} must be one of {options}, got {type(value).__name__} {value!r}")
    if value not in options:
        raise ValueError(f"{name} must be one of {options}, got {value!r}")
    return value


def weights_of_orders(weights: Any) -> tuple[float, ...]:
    """Return the weights of the orders 0..Q as a tuple of at least one float."""
    if isinstance(weights, (str, bytes, Tensor)) or not isinstance(weights, Sequence):
        is_number = isinstance(weights, (int, float)) and not isinstance(weights, bool)
        way_out = f"; for order 0 alone write ({weights!r},)" if is_number else ""
        raise TypeError(
            f"weights must be a sequence of floats, one for each order 0..Q, got {type(weights).__name__}{way_out}"
        )
    if not weights:
        raise ValueError("weights must hold at least one float, the weight of order 0, got none")
    return tuple(real(f"weights[{q}]", w) for q, w in enumerate(weights))


def floating(name: str, x: Any) -> None:
    """Raise unless ``x`` is a floating-point tensor."""
    if not isinstance(x, Tensor):
        came, way_out = type(x).__name__, ""
        if isinstance(x, Mapping):
            way_out = ', if from a torchvision model take its ["out"]'
        elif came == "ndarray":
            way_out = "; use torch.from_numpy"
        raise TypeError(f"{name} must be a torch.Tensor, got {came}{way_out}")
    if not x.is_floating_point() or x.dtype.itemsize < 2:
        way_out = f"convert it with {name}.float()"
        if name == "target_feats" and x.dtype == torch.bool:
            way_out = "a mask of sources is given by name, mask=..."
        elif name == "logits" and not x.is_floating_point() and x.dtype != torch.bool:
            way_out = "make class ids one-hot, F.one_hot(ids, C).movedim(-1, 1).float()"
        raise TypeError(f"{name} must have a floating-point dtype of 16 bits or more, got {x.dtype}; {way_out}")


def pixels(name: str, x: Any, axes: str = "N, D, H, W") -> None:
    """Raise unless ``x`` is a floating tensor (N, D, H, W) or (N, D, M) with no empty axis but the batch."""
    floating(name, x)
    if x.ndim not in (3, 4):
        flat = axes.replace("H, W", "M")
        raise ValueError(f"{name} must have shape ({axes}) or ({flat}), got {tuple(x.shape)}")
    if any(size < 1 for size in x.shape[1:]):
        raise ValueError(f"{name} must have sizes of at least 1 in every axis but the batch, got {tuple(x.shape)}")


def same_device(name: str, x: Tensor, other: str, y: Tensor) -> None:
    """Raise unless both tensors are on one device."""
    if x.device != y.device:
        raise ValueError(f"{name} and {other} must be on one device, got {x.device} and {y.device}")


def same_kind(name: str, x: Tensor, other: str, y: Tensor) -> None:
    """Raise unless both tensors share device, batch, rank and, outside autocast, dtype."""
    same_device(name, x, other, y)
    if x.dtype != y.dtype and not autocast_enabled(x):
        raise TypeError(
            f"{name} and {other} must have one dtype outside autocast, got {x.dtype} and {y.dtype}; "
            f"for instance {other}.to({name}.dtype)"
        )
    if x.ndim != y.ndim:
        raise ValueError(
            f"{name} and {other} must both be (N, _, H, W) or both be flat (N, _, M), "
            f"got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    same_batch(name, x, other, y)


def same_batch(name: str, x: Tensor, other: str, y: Tensor) -> None:
    """Raise unless both tensors have one batch size N: batches never broadcast."""
    if x.shape[0] != y.shape[0]:
        raise ValueError(
            f"{name} and {other} must have the same batch size N, got {x.shape[0]} and {y.shape[0]}; batches do not "
            "broadcast, and three axes are read as (N, channels, M): give a single image a batch axis with [None]"
        )


def same_view(name: str, grid: Sequence[int], other: str, other_grid: Sequence[int]) -> None:
    """Warn where two grids cannot be of one image, as with axes in another order; not in a graph, nor for flat ones."""
    if len(grid) < 2 or len(other_grid) < 2 or torch.compiler.is_compiling():
        return
    (H, W), (h, w) = grid, other_grid
    if min(H, W, h, w) >= LARGE and not W * h < ASPECT * H * w < ASPECT**2 * W * h:
        warnings.warn(
            f"{name} and {other} are on grids of {H} x {W} and {h} x {w}, whose aspect ratios are not those of one "
            "image: axes are read as (N, channels, H, W)",
            stacklevel=_level_of_the_caller(),
        )


def _level_of_the_caller() -> int:
    """How many frames above the one that warns the first is that is neither of this library nor of torch."""
    frame, level = inspect.currentframe(), 0
    while frame and frame.f_globals.get("__name__", "").partition(".")[0] in ("dlprop", "torch"):
        frame, level = frame.f_back, level + 1
    return level


def target_features(feats: Tensor, target_feats: Any) -> None:
    """Raise unless ``target_feats``, if there are any, are features of the kind of ``feats``, on any grid."""
    if target_feats is None:
        return
    pixels("target_feats", target_feats)
    same_kind("feats", feats, "target_feats", target_feats)
    D, other = feats.shape[1], target_feats.shape[1]
    if other != D:
        raise ValueError(f"feats and target_feats must have the same channels D, got {D} and {other}")


def sources(logits: Any, feats: Any, mask: Any, *, may_be_none: bool = False) -> None:
    """Raise unless logits and features are of one kind, of as many pixels where flat, and ``mask`` leaves a source.

    With `may_be_none` it may leave none.
    """
    pixels("logits", logits, "N, C, H, W")
    pixels("feats", feats)
    same_kind("logits", logits, "feats", feats)
    if logits.ndim == 3 and logits.shape[2] != feats.shape[2]:
        raise ValueError(
            f"flat logits and feats must have the same number of pixels M, got {logits.shape[2]} and {feats.shape[2]}; "
            "pass (N, C, H, W) and (N, D, h, w) to have one resized to the other"
        )
    same_view("logits", logits.shape[2:], "feats", feats.shape[2:])
    if mask is not None:
        pixel_mask(mask, "logits", (logits.shape[0], *logits.shape[2:]), logits)
        if not may_be_none and mask.numel() and values_are_known(mask) and not mask.any():
            raise ValueError(
                f"mask must leave at least one source, got {tuple(mask.shape)} without a single True; skip the call "
                "where there is nothing to propagate"
            )


def labels(feats: Tensor, target: Any, ignore_index: int, name: str = "target", below: int = 2**63 - 1) -> None:
    """Raise unless ``target`` holds integer labels (N, H, W) or (N, M) in [0, below) for ``feats``, on any grid."""
    came = target.dtype if isinstance(target, Tensor) else type(target).__name__
    if not isinstance(came, torch.dtype) or came == torch.bool or came.is_floating_point or came.is_complex:
        raise TypeError(f"{name} must be a tensor of labels with an integer dtype, got {came}")
    same_device("feats", feats, name, target)
    if target.ndim != feats.ndim - 1:
        raise ValueError(
            f"{name} must be labels {'(N, H, W)' if feats.ndim == 4 else '(N, M)'} for feats {tuple(feats.shape)}, got "
            f"{tuple(target.shape)}; drop a channel axis with {name}.squeeze(1); one-hot labels become indices with "
            f"{name}.argmax(1) for (N, C, H, W) and {name}.argmax(-1) for (N, H, W, C)"
        )
    same_batch("feats", feats, name, target)
    if feats.ndim == 3 and target.shape[1] != feats.shape[2]:
        raise ValueError(
            f"{name} must have one label for each of the M = {feats.shape[2]} pixels of feats, "
            f"got {target.shape[1]}; pass (N, D, H, W) feats and (N, H, W) labels to have the labels sampled"
        )
    if any(size < 1 for size in target.shape[1:]):
        raise ValueError(f"{name} must have sizes of at least 1 in every axis but the batch, got {tuple(target.shape)}")
    same_view(name, target.shape[1:], "feats", feats.shape[2:])
    if values_are_known(target):
        whole = target.long()
        wrong = whole[((whole < 0) | (whole >= below)) & (whole != ignore_index)]
        if wrong.numel():
            allowed = ">= 0" if below == 2**63 - 1 else f"in [0, {below - 1}]"
            raise ValueError(
                f"{name} must hold labels {allowed} or equal to ignore_index = {ignore_index}, got {int(wrong[0])}; "
                "set ignore_index to the label that marks ignored pixels"
            )


def pixel_mask(mask: Any, name: str, shape: Sequence[int], x: Tensor) -> None:
    """Raise unless ``mask`` is a bool tensor of the given shape, the grid of ``x``, on its device."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a bool tensor, got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must have dtype torch.bool, got {mask.dtype}; use for instance mask != 0")
    if tuple(mask.shape) != tuple(shape):
        raise ValueError(f"mask must have the grid of {name}, shape {tuple(shape)}, got {tuple(mask.shape)}")
    same_device("mask", mask, name, x)


def enough_channels(name: str, D: int, order: int, step: int, scheme: str) -> None:
    """Raise unless a difference of ``order`` leaves at least one of ``D`` channels."""
    if order * step >= D:
        raise ValueError(
            f"{name} must have more than order * step = {order} * {step} = {order * step} channels "
            f"for order {order} of scheme {scheme!r}, got D = {D}; lower the order or widen the features"
        )


def values_are_known(x: Tensor) -> bool:
    """Whether looking at the values of ``x`` costs no host sync and breaks no graph: eager tensors on the CPU.

    Subclasses that only override functions (torchvision's `Mask`) hold values, those that override the dispatch (fake
    tensors) may not.
    """
    has_values = type(x).__torch_dispatch__ is Tensor.__torch_dispatch__
    return x.device.type == "cpu" and has_values and not (torch.compiler.is_compiling() or transforms_active())


def transforms_active() -> bool:
    """Whether `torch.func` transforms the call: vmap hides values, and every operation must be one it knows."""
    return bool(torch._C._are_functorch_transforms_active())
