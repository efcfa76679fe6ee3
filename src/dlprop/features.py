"""What happens to features before they are compared, and pixels as affinities see them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ._precision import at_least_float32

__all__: list[str] = []

Normalize = Literal["l1", "l2", "softmax", None]

# Below this a norm is rounding noise; in float32 or better it is a normal number.
EPS = 1e-12
# A share of a source below this is rounding: the source lies on another point.
SMALLEST_COUNT = 1e-5
# Numbers that one step of a norm takes at a time on the CPU, so that its temporary stays in cache.
NORM_STEP = 1 << 20


def flatten(x: Tensor) -> Tensor:
    """(N, D, H, W) or (N, D, M) as (N, D, M), pixels row-major."""
    return rearrange(x, "n d h w -> n d (h w)") if x.ndim == 4 else x


def inverse_norm(x: Tensor, p: int, dim: int = 1) -> Tensor:
    """`1 / ||x_i||_p` for p = 1 or 2 along ``dim``, which is kept with size 1; 0 with zero gradient for a zero vector.

    A plain `1 / max(norm, eps)` would give a zero vector the gradient `1 / eps`. A norm that overflows is NaN, since
    its inverse would make the vector 0.
    """
    total = _sum_of_powers(x, p, dim)
    is_zero = total == 0  # false for NaN, which therefore stays NaN
    norm = torch.where(is_zero, 1, total)
    inverse = 1 / (norm if p == 1 else norm.sqrt()).clamp_min(EPS)
    return torch.where(is_zero, 0, inverse).masked_fill(total.isinf(), torch.nan)


def _sum_of_powers(x: Tensor, p: int, dim: int) -> Tensor:
    def total(part: Tensor) -> Tensor:
        return (part.abs() if p == 1 else part.square()).sum(dim=dim, keepdim=True)

    if x.device.type != "cpu" or torch.compiler.is_compiling() or x.numel() <= NORM_STEP:
        return total(x)
    # torch's norm over strided channels takes five times as long as adding up a few of them at a time.
    parts = x.split(max(2, NORM_STEP * x.shape[dim] // x.numel()), dim=dim)
    return sum((total(part) for part in parts[1:]), total(parts[0]))


def normalize_features(x: Tensor, normalize: Normalize, dim: int = 1) -> Tensor:
    """Features normalised over their channels along ``dim``, in at least float32."""
    x = at_least_float32(x)
    if normalize == "softmax":
        return x.softmax(dim=dim)
    if normalize is None:
        return x
    return x * inverse_norm(x, 1 if normalize == "l1" else 2, dim)


@dataclass  # not frozen: torch.compile of torch 2.6 to 2.8 cannot call those
class Upsampling:
    """The bilinear resize `U` from the grid of the features to that of the logits, without antialias, and its adjoint.

    Attributes:
        grid: height and width of the features.
        size: height and width of the logits, larger as a rule but not always.
        align_corners: as in `torch.nn.functional.interpolate`.
    """

    grid: Sequence[int]
    size: Sequence[int]
    align_corners: bool

    def __call__(self, x: Tensor) -> Tensor:
        """`x U` of flat (N, C, m), (N, C, M)."""
        return resize(x.unflatten(2, self.grid), self.size, self.align_corners).flatten(2)

    def weighted(self, x: Tensor, weights: Tensor) -> Tensor:
        """`x U diag(w) U^T` of flat (N, D, m) for weights (N, 1, M) of the pixels: a 3 x 3 stencil at every point.

        A pixel lies between neighbouring points, so `U diag(w) U^T` couples neighbours only; its entries are sums of
        weights times two factors along the rows and two along the columns.
        """
        h, w = self.grid
        padded = F.pad(x.unflatten(2, self.grid), (1, 1, 1, 1))
        rows, columns = (F.pad(factor, (1, 1)) for factor in self._factors(x))
        out: Tensor = torch.zeros_like(padded[:, :, 1:-1, 1:-1])
        for i in range(3):
            along_rows = (rows[:, 1 : h + 1] * rows[:, i : h + i]).mT @ weights.unflatten(2, self.size)
            for j in range(3):
                entry = along_rows @ (columns[:, 1 : w + 1] * columns[:, j : w + j])
                out = out + entry * padded[:, :, i : h + i, j : w + j]
        return out.flatten(2)

    def resample(self, x: Tensor) -> Tensor:
        """(N, C, M) resized to the points of the features, (N, C, m): an interpolation, which skips pixels."""
        return resize(x.unflatten(2, self.size), self.grid, self.align_corners).flatten(2)

    def adjoint(self, x: Tensor) -> Tensor:
        """`x U^T` of flat (N, C, M), (N, C, m); a column of U sums to 1, so the sum over the pixels stays.

        Bilinear resizing is separable, so both its factors are small matrices and their products, unlike a scatter, are
        deterministic on every device.
        """
        rows, columns = self._factors(x)
        adjoint: Tensor = (rows.mT @ x.unflatten(2, self.size)) @ columns
        return adjoint.flatten(2)

    def _factors(self, like: Tensor) -> list[Tensor]:
        """The matrices of linear resizing along rows and columns, (H, h) and (W, w): the identity's columns resized."""
        identities = (torch.eye(n, dtype=like.dtype, device=like.device)[None] for n in self.grid)
        resized = zip(identities, self.size, strict=True)
        return [F.interpolate(x, size=n, mode="linear", align_corners=self.align_corners)[0].T for x, n in resized]


@dataclass(frozen=True)
class Pixels:
    """The source or the target pixels of one propagation as an affinity sees them: flat, in at least float32.

    M pixels have logits, m points have features. They are the same, unless propagation runs at the resolution of the
    logits: then `upsample` and its adjoint `gather` lead from one to the other.

    Attributes:
        feats: `(N, D, m)`, never modified nor masked; `targets.feats is sources.feats` where they are the same.
        logits: `(N, C, M)`. Of a source what it gives, 0 where a mask leaves it out; of a target its own, masked or
            not, and (N, C, 1) zeros where the targets are other pixels than the sources.
        counts: `(N, 1, M)`, how many sources a source pixel stands for, a share of one perhaps; None is one for each.
        grid: height and width of the M pixels, None where they are flat.
        points_per_source: below 1 where sources of a finer grid were brought to the points of the features.
        upsampling: between the two grids, None where they are one.
    """

    feats: Tensor
    logits: Tensor
    counts: Tensor | None = None
    grid: Sequence[int] | None = None
    points_per_source: float = 1.0
    upsampling: Upsampling | None = None

    def with_feats(self, feats: Tensor) -> "Pixels":
        """The same pixels with other features; torch 2.6 cannot compile `dataclasses.replace`."""
        return Pixels(feats, self.logits, self.counts, self.grid, self.points_per_source, self.upsampling)

    def upsample(self, x: Tensor) -> Tensor:
        """`x U`: (N, K, m) at the points of the features as (N, K, M) at the pixels."""
        return x if self.upsampling is None else self.upsampling(x)

    def gather(self, x: Tensor) -> Tensor:
        """`x U^T`: (N, K, M) at the pixels, added up at the points of the features, (N, K, m)."""
        return x if self.upsampling is None else self.upsampling.adjoint(x)

    def counted(self, x: Tensor) -> Tensor:
        """``x`` (N, K, M), every pixel times the sources it stands for: for statistics, where a source is one of n."""
        return x if self.counts is None else x * self.counts

    def weighted(self, x: Tensor) -> Tensor:
        """The same, and all sources of an image together weigh as much as its points: for sums, as without a mask."""
        return x if self.counts is None else x * (self.counts * self.points_per_source)


def upsampling_between(feats: Tensor, logits: Tensor, align_corners: bool) -> Upsampling | None:
    """From the grid of ``feats`` to that of ``logits``; None where they are one, or flat."""
    if logits.ndim < 4 or logits.shape[2:] == feats.shape[2:]:
        return None
    return Upsampling(feats.shape[2:], logits.shape[2:], align_corners)


def at_points(
    logits: Tensor, mask: Tensor | None, upsampling: Upsampling | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What sources give at the points of the features: logits (N, C, m), the same without the mask, and counts.

    On another grid logits are resized without a mask; with one they are averaged over the sources that fall on a point,
    so that every source counts once and none is lost.
    """
    if mask is None:
        own = logits if upsampling is None else upsampling.resample(logits)
        return own, own, None
    is_source = mask.flatten(1)[:, None]
    L, counts = torch.where(is_source, logits, 0), is_source.to(logits.dtype)
    if upsampling is None:
        return L, logits, counts
    counts = upsampling.adjoint(counts)
    counts = torch.where(counts < SMALLEST_COUNT, 0, counts)
    return upsampling.adjoint(L) / torch.where(counts == 0, 1, counts), upsampling.resample(logits), counts


def resize(x: Tensor, size: Sequence[int], align_corners: bool) -> Tensor:
    """Bilinear resize of (N, C, H, W) without antialias, in at least float32."""
    if tuple(x.shape[2:]) == tuple(size):
        return x
    return F.interpolate(at_least_float32(x), size=tuple(size), mode="bilinear", align_corners=align_corners)


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
    if x.dtype in (torch.uint16, torch.uint32, torch.uint64):  # torch 2.6 to 2.8 cannot index them
        x = x.long()
    rows = nearest_rows(x.shape[1], size[0], align_corners, x.device)
    columns = nearest_rows(x.shape[2], size[1], align_corners, x.device)
    return x[:, rows[:, None], columns]
