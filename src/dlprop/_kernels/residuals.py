"""The residuals of the pairwise loss, tile by tile: in their own dtype or, where torch's setting allows, bfloat16."""

from typing import NamedTuple

import torch
from torch import Tensor

from .._precision import bfloat16_pieces


class Residuals(NamedTuple):
    """`R_ik = a_i . c_k - G_ik` of rows i and columns k: one product of factors, less a target unless that is in them.

    In bfloat16 the tiles are rounded as well, which changes no sign.
    """

    rows: Tensor  # (N, M, w)
    columns: Tensor  # (N, K, w)
    target: Tensor | None = None
    column_target: Tensor | None = None

    def tile(self, n: int, i: slice, k: slice) -> Tensor:
        """The residuals of one block of rows and one of columns of image n."""
        R = self.rows[n, i] @ self.columns[n, k].T
        if self.target is not None and self.column_target is not None:
            g, h = self.target[n, i], self.column_target[n, k]
            if g.is_floating_point():
                R.addmm_(g, h.T, alpha=-1)
            else:
                R -= (g[:, None] == h).to(R.dtype)
        return R


def residuals_of(rows: Tensor, target: Tensor, columns: Tensor, column_target: Tensor) -> Residuals:
    """The residuals of features (N, M, D) and (N, K, D) and targets of either form."""
    if not target.is_floating_point():
        # An ignored pixel of the columns has another number: it equals nothing, not even itself.
        return Residuals(rows, columns, target, torch.where(column_target < 0, -2, column_target))
    pieces = bfloat16_pieces(rows)
    if pieces == 0 or target.shape != rows.shape:
        return Residuals(rows, columns, target, column_target)
    return Residuals(*bfloat16_factors((rows, target), (columns, column_target), pieces))


def bfloat16_factors(rows: tuple[Tensor, Tensor], columns: tuple[Tensor, Tensor], pieces: int) -> tuple[Tensor, Tensor]:
    """Factors (N, M, w) and (N, K, w) of the residuals of features and target (N, M, D), (N, K, D), in 8 or 16 bits.

    With the differences e, f of features and target and their means s, r the residual is `e_i . r_k + s_i . f_k`. It is
    rounded relative to itself, where a difference of two rounded similarities would be rounding alone if the views are
    close. The means have a large part m in common, most of all after a ReLU, so that `e_i . m + m . f_k` is computed
    before anything is rounded, and r and s are less m.
    """
    m = (rows[0] + rows[1]).sum(dim=1, keepdim=True) / (2 * _used(*rows).sum(dim=1, keepdim=True)).clamp_min(1)
    left = _both_sides(*rows, m, pieces)
    right = left if columns[0] is rows[0] else _both_sides(*columns, m, pieces)
    width = left.shape[2] // 3
    return left[:, :, : 2 * width], right[:, :, width:]


def _used(features: Tensor, target: Tensor) -> Tensor:
    """1 for compared pixels, 0 for ignored ones, (N, M, 1), whose residuals are to be 0 whatever is rounded."""
    return ((features != 0) | (target != 0)).any(dim=2, keepdim=True).to(features.dtype)


def _both_sides(features: Tensor, target: Tensor, m: Tensor, pieces: int) -> Tensor:
    """Differences, means, and differences again: two of these in a row are a factor on the left or on the right."""
    used = _used(features, target)
    e, s = features - target, ((features + target) / 2 - m) * used
    of_m = (e * m).sum(dim=2, keepdim=True)
    leading = of_m.bfloat16()
    e, s = torch.cat((e, leading, of_m - leading), dim=2), torch.cat((s, used, used), dim=2)
    e_piece, s_piece = e.bfloat16(), s.bfloat16()
    if pieces == 1:
        return torch.cat((e_piece, s_piece, e_piece), dim=2)
    # The product of two sums, but for that of both rests.
    e_rest, s_rest = e - e_piece, s - s_piece
    differences, means = (e_piece, e_piece, e_rest.bfloat16()), (s_piece, s_rest.bfloat16(), s_piece)
    return torch.cat((*differences, *means, *differences), dim=2)
