"""What happens to features before they are compared: flattening, normalisation and resizing."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ._checks import autocast_enabled
from ._products import pixel_norm

__all__: list[str] = []

Normalize = Literal["l1", "l2", "softmax", None]
NORMALIZATIONS = get_args(Normalize)

# Below this a norm is rounding noise; in float32 or better it is a normal number.
EPS = 1e-12


def full_precision(x: Tensor) -> AbstractContextManager[object]:
    """A context in which autocast does not lower the precision of products on the device of ``x``."""
    if autocast_enabled(x):
        return torch.autocast(x.device.type, enabled=False)
    return nullcontext()


def at_least_float32(x: Tensor) -> Tensor:
    """``x`` in float32 if it is in half precision, otherwise ``x`` itself."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def flatten(x: Tensor) -> Tensor:
    """(N, D, H, W) or (N, D, M) as (N, D, M), pixels row-major."""
    return rearrange(x, "n d h w -> n d (h w)") if x.ndim == 4 else x


def inverse_norm(x: Tensor, p: int) -> Tensor:
    """`1 / ||x_i||_p` of every pixel, (N, D, ...) -> (N, 1, ...); 0 with zero gradient for a zero vector.

    A plain `1 / max(norm, eps)` would give a zero vector the gradient `1 / eps`.
    """
    norm = pixel_norm(x, p)
    is_zero = norm == 0  # false for NaN, which therefore stays NaN
    return torch.where(is_zero, 0, 1 / torch.where(is_zero, 1, norm.clamp_min(EPS)))


def normalize_features(x: Tensor, normalize: Normalize) -> Tensor:
    """Features (N, D, ...) normalised over their channels, in at least float32."""
    x = at_least_float32(x)
    if normalize == "softmax":
        return x.softmax(dim=1)
    if normalize is None:
        return x
    return x * inverse_norm(x, 1 if normalize == "l1" else 2)


def resize(x: Tensor, size: Sequence[int], align_corners: bool) -> Tensor:
    """Bilinear resize of (N, C, H, W) without antialias, in at least float32."""
    if tuple(x.shape[2:]) == tuple(size):
        return x
    return F.interpolate(at_least_float32(x), size=tuple(size), mode="bilinear", align_corners=align_corners)


def interpolation_matrix(source: int, target: int, align_corners: bool, like: Tensor) -> Tensor:
    """The (target, source) matrix of one-dimensional linear resizing: the resized columns of the identity."""
    identity = torch.eye(source, dtype=like.dtype, device=like.device)
    return F.interpolate(identity[None], size=target, mode="linear", align_corners=align_corners)[0].T


def resize_adjoint(x: Tensor, size: Sequence[int], align_corners: bool) -> Tensor:
    """The adjoint `x U^T` of the bilinear upsampling `U` from the grid ``size`` to the grid of ``x``.

    Bilinear resizing is separable, so both its factors are small matrices and their products, unlike a scatter, are
    deterministic on every device.
    """
    x = at_least_float32(x)
    rows = interpolation_matrix(size[0], x.shape[2], align_corners, like=x)
    columns = interpolation_matrix(size[1], x.shape[3], align_corners, like=x)
    return (rows.mT @ x) @ columns


def nearest_rows(source: int, target: int, align_corners: bool, device: torch.device) -> Tensor:
    """The row of a grid of ``source`` rows that each of ``target`` feature rows falls on, in exact integers.

    With align_corners row `i` is `round(i (source - 1) / (target - 1))`, ties to even; otherwise
    `floor((i + 1/2) source / target)`, which is also the middle that a grid of one point takes.
    """
    i = torch.arange(target, device=device)
    if not align_corners or target == 1:
        return (2 * i + 1) * source // (2 * target)
    doubled = 2 * i * (source - 1) + (target - 1)
    rounded = doubled // (2 * (target - 1))
    is_tie = doubled % (2 * (target - 1)) == 0
    return rounded - (is_tie & (rounded % 2 == 1)).long()


def sample_nearest(x: Tensor, size: Sequence[int], align_corners: bool) -> Tensor:
    """Labels or a mask (N, H, W) at the points of the feature grid ``size``."""
    if tuple(x.shape[1:]) == tuple(size):
        return x
    rows = nearest_rows(x.shape[1], size[0], align_corners, x.device)
    columns = nearest_rows(x.shape[2], size[1], align_corners, x.device)
    return x[:, rows[:, None], columns]
