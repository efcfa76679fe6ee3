"""What one would write from the paper's equations; shares no code with the library."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def unit(feats: Tensor) -> Tensor:
    """Flat features whose channels sum to one in absolute value."""
    return (feats / feats.abs().sum(dim=1, keepdim=True).clamp_min(1e-12)).flatten(2)


def similarity(V: Tensor) -> Tensor:
    """`S + D1S`, Eq. 1 and 9, as an M x M matrix."""
    A = V.diff(dim=1)
    return V.mT @ V + A.mT @ A


def plain_propagation(logits: Tensor, feats: Tensor) -> Tensor:
    """Eq. 4 as it reads."""
    return (logits.flatten(2) @ similarity(unit(feats))).view_as(logits)


def plain_softmax(logits: Tensor, feats: Tensor) -> Tensor:
    """`L softmax(S, -1)`: every source spreads its logits over all targets."""
    return (logits.flatten(2) @ similarity(unit(feats)).softmax(dim=-1)).view_as(logits)


def plain_loss(feats: Tensor, target: Tensor, eta: float = 0.5, norm: Callable[[Tensor], Tensor] = torch.abs) -> Tensor:
    """Eq. 8: a matrix of residuals for each order, and the sparsity. Against labels or, Eq. 9, another view."""
    V = unit(feats)
    A = V.diff(dim=1)
    if target.is_floating_point():
        W = unit(target)
        B = W.diff(dim=1)
        G = W.mT @ W, B.mT @ B
    else:
        y = target.flatten(1)
        G = ((y[:, :, None] == y[:, None, :]).to(V.dtype),) * 2
    return norm(V.mT @ V - G[0]).mean() + norm(A.mT @ A - G[1]).mean() + eta * A.diff(dim=1).abs().mean()


def over_covariance(x: Tensor, covariance: Tensor, shrinkage: float) -> Tensor:
    """`x (Sigma + shrinkage tr(Sigma) / D T)^{-1}`, `T = (I + A_1^T A_1)^{-1}` scaled to a mean diagonal of 1."""
    identity = torch.eye(x.shape[2], dtype=x.dtype, device=x.device)
    A = identity.diff(dim=0)
    T = torch.linalg.inv(identity + A.T @ A)
    variance = covariance.diagonal(dim1=1, dim2=2).mean(dim=1)[:, None, None]
    return torch.linalg.solve(covariance + shrinkage * variance * T / T.diagonal().mean(), x.mT).mT


def plain_discriminant(logits: Tensor, feats: Tensor) -> Tensor:
    """Linear discriminant analysis of the image, with its prediction for soft labels."""
    P, V = logits.flatten(2).softmax(dim=1), feats.flatten(2)
    n, E = P.sum(dim=2, keepdim=True), V - V.mean(dim=2, keepdim=True)
    means = P @ E.mT / (n + 1)
    A = over_covariance(means, E @ E.mT / E.shape[2], 0.1)
    bias = torch.log(n / E.shape[2] + 1e-4) - (A * means).sum(dim=2, keepdim=True) / 2
    return (A @ E + bias).log_softmax(dim=1).view_as(logits)


def plain_ridge(logits: Tensor, feats: Tensor) -> Tensor:
    """The prediction fitted linearly by the features, with weighted pixels."""
    P, V = logits.flatten(2).softmax(dim=1), feats.flatten(2)
    w = (P * ((P.sum(dim=2, keepdim=True) + 1) / P.shape[2]) ** -0.5).sum(dim=1, keepdim=True)
    w = w / w.sum(dim=2, keepdim=True)
    shares, E = (P * w).sum(dim=2, keepdim=True), V - (V * w).sum(dim=2, keepdim=True)
    B = over_covariance(((P - shares) * w) @ E.mT, (w * E) @ E.mT, 0.03)
    fitted = (shares + B @ E).clamp_min(1e-6)
    return torch.log(fitted / fitted.sum(dim=1, keepdim=True)).view_as(logits)


def attention(logits: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    """The same products under a softmax over the SOURCES of each target, `scaled_dot_product_attention`.

    The values are padded to the channels of the keys: torch's streaming kernel wants them equal, and without it the
    M x M matrix is formed and takes three times as long.
    """
    queries, keys = (x.mT.contiguous()[:, None] for x in (queries, keys))
    values = F.pad(logits.flatten(2).mT, (0, keys.shape[3] - logits.shape[1]))[:, None]
    out = F.scaled_dot_product_attention(queries, keys, values.contiguous(), scale=1.0)
    return out[:, 0, :, : logits.shape[1]].mT.reshape(logits.shape)
