"""Inputs of the pairwise kernels, pixels as rows, and what they should give, as literal formulas in float64."""

import numpy as np
import torch

F64 = torch.float64


def normal(*shape, seed=0, dtype=F64, device="cpu"):
    """Normal numbers, the same in every dtype."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=F64).to(device, dtype)


def pair_inputs(form, N=2, M=7, D=5, dtype=F64, device="cpu"):
    """(rows, target) of `pairwise_l1`; -1 marks ignored pixels."""
    rows = normal(N, M, D, dtype=dtype, device=device)
    if form == "features":
        return rows, normal(N, M, D - 1, seed=1, dtype=dtype, device=device)
    classes = torch.randint(-1, 3, (N, M), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    return rows, classes.to(device)


def cross_inputs(form, N=2, M=7, K=3, D=5, dtype=F64, device="cpu"):
    """(rows, target, columns, column_target) of `pairwise_l1` against other pixels."""
    rows, target = pair_inputs(form, N, M + K, D, dtype, device)
    return rows[:, :M], target[:, :M], rows[:, M:], target[:, M:]


def affinity_inputs(N=2, C=3, E=5, M=7, K=4, dtype=F64, device="cpu"):
    """(logits, queries, keys) of `softmax_affinity`."""
    shapes = ((N, M, C), (N, M, E), (N, K, E))
    return tuple(normal(*shape, seed=seed, dtype=dtype, device=device) for seed, shape in enumerate(shapes))


def _array(x):
    x = x.detach().cpu()
    return x.double().numpy() if x.is_floating_point() else x.numpy()


def expected_cross(rows, target, columns, column_target):
    """Value and both gradients of `sum_ik |a_i . c_k - G_ik|`."""
    a, g, c, h = (_array(x) for x in (rows, target, columns, column_target))
    if target.is_floating_point():
        G = g @ np.swapaxes(h, 1, 2)
    else:
        G = (g[:, :, None] == h[:, None, :]) & (g[:, :, None] != -1)
    R = a @ np.swapaxes(c, 1, 2) - G
    return np.abs(R).sum((1, 2)), np.sign(R) @ c, np.swapaxes(np.sign(R), 1, 2) @ a


def expected_pairs(rows, target):
    """Value and gradient of `sum_ij |a_i . a_j - G_ij|`; the rows have both roles."""
    value, of_rows, of_columns = expected_cross(rows, target, rows, target)
    return value, of_rows + of_columns


def expected_affinity(logits, queries, keys):
    """`sum_i softmax(q_i . K)_j l_i` of every target j."""
    L, Q, K = (_array(x) for x in (logits, queries, keys))
    S = Q @ np.swapaxes(K, 1, 2)
    P = np.exp(S - S.max(2, keepdims=True))
    return np.swapaxes(P / P.sum(2, keepdims=True), 1, 2) @ L
