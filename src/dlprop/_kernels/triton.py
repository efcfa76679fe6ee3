"""The pairwise ops as Triton kernels: a tile of the M x M matrices exists in registers only.

Pixels are rows, (N, M, D) and contiguous, in float32 or float64. The device code, which says how a program works, is in
`triton_jit.py`; how numbers are cut into pieces and pixels into blocks is in `triton_blocks.py`.

Import this module only where Triton is installed. Its kernels run on CUDA tensors, or, if TRITON_INTERPRET=1 was set
before Triton was first imported, on CPU tensors in Triton's interpreter.
"""

import torch
from torch import Tensor

from .compared import Compared, Needed
from .triton_blocks import (
    Blocks,
    Channels,
    check_device,
    filled_up,
    grid_of,
    laid_out,
    launch,
    operands_of,
    padded,
    sum_of_splits,
    with_fitting_blocks,
)
from .triton_jit import log_sum_exp_kernel, pairwise_kernel, softmax_kernel

__all__ = ["check_device", "pairwise_l1", "pairwise_l1_cross", "softmax_affinity", "softmax_affinity_backward"]

# ---------------------------------------------------------------------------------------------------------------------
# The pairwise loss


def pairwise_l1(rows: Tensor, target: Tensor, tile: int | None, need_grad: bool) -> tuple[Tensor, Tensor | None]:
    """`sum_ij |R_ij|` of every image with `R_ij = a_i . a_j - G_ij`, and its gradient, in one pass over all tiles.

    Against features 6 M^2 D operations for value and gradient, against labels 4 M^2 D, times the products of pieces;
    memory O(M D). Both halves of the symmetric R are visited, because a program that adds to the gradient of the other
    half's pixels as well would need atomics.
    """
    loss, grad = _pairwise(rows, target, rows, target, tile, need_grad)
    return loss, None if grad is None else grad.mul_(2)


def pairwise_l1_cross(
    rows: Tensor, target: Tensor, columns: Tensor, column_target: Tensor, tile: int | None, need_grad: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`sum_ik |R_ik|` of every image with `R_ik = a_i . c_k - G_ik`, and its gradients in both, a pass for each."""
    loss, grad_rows = _pairwise(rows, target, columns, column_target, tile, need_grad)
    if not need_grad:
        return loss, None, None
    return loss, grad_rows, _pairwise(columns, column_target, rows, target, tile, need_grad)[1]


def _pairwise(
    rows: Tensor, target: Tensor, columns: Tensor, column_target: Tensor, tile: int | None, need_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """The sums of `|a_i . c_k - G_ik|` and their gradient in the rows a alone."""
    N, M, D = rows.shape
    if rows.numel() == 0 or columns.numel() == 0:
        return rows.new_zeros(N), torch.zeros_like(rows) if need_grad else None
    is_labels = not target.is_floating_point()
    own, other = padded(D), 0 if is_labels else padded(target.shape[2])
    operands = operands_of(rows.dtype, torch.float16)
    features = (rows, columns) if is_labels else (rows, columns, target, column_target)
    scale = _headroom(*features) if operands.dtype == torch.float16 else rows.new_ones(N)

    def run(blocks: Blocks) -> tuple[Tensor, Tensor | None]:
        a = laid_out(rows, operands, blocks, scale)
        c = a if columns is rows else laid_out(columns, operands, blocks, scale)
        if is_labels:  # an ignored pixel equals nothing, not even itself, and neither does padding
            g = filled_up(target, blocks, -1)
            h = filled_up(torch.where(column_target < 0, -2, column_target), blocks, -2)
        else:
            g = laid_out(target, operands, blocks, scale)
            h = g if column_target is target else laid_out(column_target, operands, blocks, scale)
        grid = blocks_of_owners, splits, _ = grid_of(rows, columns, blocks)
        sums = rows.new_empty(splits, N, blocks_of_owners)
        grad = rows.new_empty((splits, N, M, own) if need_grad else 1)
        constants = {"NEED_GRADIENT": need_grad, "CHANNELS": own, "TARGET_CHANNELS": other}
        inputs = a, c, g, h, scale * scale
        launch(pairwise_kernel, grid, operands, blocks, *inputs, grad, sums, M, columns.shape[1], **constants)
        loss = sums.sum(dim=(0, 2)) / (scale * scale)
        return loss, sum_of_splits(grad)[..., :D].div_(scale[:, None, None]) if need_grad else None

    channels = Channels(held=own + other, passing=own + other, summed=own if need_grad else 0)
    return with_fitting_blocks(run, operands, channels, tile, rows.device)


def _headroom(*features: Tensor) -> Tensor:
    """The power of two of every image, (N,), that lifts its largest feature to [2^14, 2^15).

    It is at most 2^40, because equal labels are compared with its square, and as many of these as there are pairs must
    not overflow; and 1 for an image that is not finite, whose results are not in any scale.
    """
    norms = [torch.linalg.vector_norm(x, torch.inf, dim=(1, 2)) for x in features]
    largest = torch.stack(norms).amax(dim=0)
    exponent = (largest.view(torch.int32) >> 23) - 127
    bits = ((14 - exponent).clamp(-126, 40) + 127) << 23  # exact on every device, which pow need not be
    return torch.where(largest.isfinite(), bits.view(torch.float32), 1.0)


# ---------------------------------------------------------------------------------------------------------------------
# The softmax affinity


def softmax_affinity(logits: Tensor, compared: Compared, chunk: int | None) -> tuple[Tensor, Tensor]:
    """`sum_i softmax(q_i . K)_j l_i` of every target j, and the log-sum-exp of every source i.

    One pass is owned by the sources, one by the targets.
    """
    queries, keys, _ = compared
    if queries.numel() == 0 or keys.numel() == 0:
        return keys.new_zeros(*keys.shape[:2], logits.shape[2]), queries.new_full(queries.shape[:2], -torch.inf)
    lse = _log_sum_exp(queries, keys, chunk)
    return _weighted_sum(keys, queries, logits, lse, chunk, sources_own=False), lse


def softmax_affinity_backward(
    grad: Tensor, logits: Tensor, compared: Compared, lse: Tensor, chunk: int | None, needed: Needed
) -> tuple[Tensor | None, ...]:
    """Gradients of `softmax_affinity`: the probabilities are formed again from the log-sum-exp, for each gradient.

    The row sum `sum_j P_ij dP_ij` of the softmax's gradient is `l_i . (P grad)_i`, already at hand.
    """
    queries, keys, _ = compared
    if queries.numel() == 0 or keys.numel() == 0:
        return torch.zeros_like(logits), torch.zeros_like(queries), torch.zeros_like(keys), None
    grad_logits = _weighted_sum(queries, keys, grad, lse, chunk, sources_own=True)
    row_sum = (logits * grad_logits).sum(dim=2)
    grad_queries = grad_keys = None
    if needed.queries:
        own = logits, row_sum
        grad_queries = _weighted_sum(queries, keys, grad, lse, chunk, sources_own=True, gradient=own)
    if needed.keys:
        own = grad, row_sum
        grad_keys = _weighted_sum(keys, queries, logits, lse, chunk, sources_own=False, gradient=own)
    return grad_logits, grad_queries, grad_keys, None


def _log_sum_exp(queries: Tensor, keys: Tensor, chunk: int | None) -> Tensor:
    """`log sum_j exp(q_i . k_j)` of every source, (N, M)."""
    N, M, E = queries.shape
    operands = operands_of(queries.dtype, torch.bfloat16)

    def run(blocks: Blocks) -> Tensor:
        rows, columns = (laid_out(x, operands, blocks) for x in (queries, keys))
        grid = grid_of(queries, keys, blocks)
        out = queries.new_empty(grid[1], N, M)
        sizes = M, keys.shape[1]
        launch(log_sum_exp_kernel, grid, operands, blocks, rows, columns, out, *sizes, CHANNELS=padded(E))
        return out[0] if len(out) == 1 else out.logsumexp(dim=0)

    channels = Channels(held=padded(E), passing=padded(E), summed=0)
    return with_fitting_blocks(run, operands, channels, chunk, queries.device)


def _weighted_sum(
    owners: Tensor,
    visits: Tensor,
    values: Tensor,
    lse: Tensor,
    chunk: int | None,
    *,
    sources_own: bool,
    gradient: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """`sum_j P_ij v_j` of every owned pixel i over the visited pixels j with their values v.

    With ``gradient``, the values u of the owned pixels and the row sum of every source, it is the gradient of the
    similarities times what was compared with, `sum_j P_ij (u_i . v_j - row_sum) y_j`.
    """
    N, M, E = owners.shape
    own, other = padded(E), padded(values.shape[2])
    operands = operands_of(owners.dtype, torch.bfloat16)

    def run(blocks: Blocks) -> Tensor:
        x, y, v = (laid_out(tensor, operands, blocks) for tensor in (owners, visits, values))
        padded_lse = filled_up(lse, blocks, torch.inf)
        u, row_sum = v, padded_lse  # which are not read
        if gradient is not None:
            u, row_sum = laid_out(gradient[0], operands, blocks), filled_up(gradient[1], blocks, 0)
        grid = grid_of(owners, visits, blocks)
        out = owners.new_empty(grid[1], N, M, summed)
        forms = {"SOURCES_OWN": sources_own, "GRADIENT": gradient is not None}
        sizes = {"CHANNELS": own, "VALUE_CHANNELS": other}
        inputs = x, y, u, v, padded_lse, row_sum
        launch(softmax_kernel, grid, operands, blocks, *inputs, out, M, visits.shape[1], **forms, **sizes)
        return sum_of_splits(out)[..., : values.shape[2] if gradient is None else E]

    summed = other if gradient is None else own
    channels = Channels(held=own if gradient is None else own + other, passing=own + other, summed=summed)
    return with_fitting_blocks(run, operands, channels, chunk, owners.device)
