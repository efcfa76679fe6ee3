"""Counts, sums and scatter of weighted pixels, a block of pixels at a time, and how two of them are merged."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from .._precision import statistics_dtype
from .products import wants_plain_formula

# Pixels that exist less a mean at a time: few enough for the cache, many enough to be a matrix product.
PIXELS = 4096
# Shares of 1 are centred on the mean of at least this part of the pixels: what that is off by, `n gap^2`, is at most
# seven times their scatter, and taking it away costs at most three bits.
PART = 8
# Rows of the scatter at a time. It is symmetric: what is right of its diagonal blocks mirrors what is left of them.
ROWS = 128


class Statistics(NamedTuple):
    """What a linear classifier needs to know of weighted pixels with soft labels, for one image or several.

    Attributes:
        counts: `n_c = sum_i w_ci`, (..., C).
        sums: `s_c = sum_i w_ci v_i`, (..., C, D).
        second: `sum_i w_i (v_i - mu) (v_i - mu)^T` with `w_i = sum_c w_ci` and the mean `mu = sum_c s_c / n`,
            (..., D, D): centred before squaring, so that a large mean does not cancel.
    """

    counts: Tensor
    sums: Tensor
    second: Tensor

    # Methods: torch.compile of torch 2.6 to 2.8 does not see into properties of a NamedTuple.
    def total(self) -> Tensor:
        """`n`, (...)."""
        return self.counts.sum(dim=-1)

    def mean(self) -> Tensor:
        """`mu`, (..., D); 0 without a pixel."""
        return self.sums.sum(dim=-2) / or_one(self.total())[..., None]

    def offsets(self, mean: Tensor) -> Tensor:
        """`s_c - n_c mean`, (..., C, D), for a mean (..., 1, D)."""
        return self.sums - self.counts[..., None] * mean

    def merged(self, other: "Statistics") -> "Statistics":
        """The statistics of the pixels of both: the pairwise update of Chan, Golub and LeVeque."""
        n, m = self.total(), other.total()
        gap = other.mean() - self.mean()
        shift = (n * m / or_one(n + m))[..., None, None] * gap[..., :, None] * gap[..., None, :]
        return Statistics(self.counts + other.counts, self.sums + other.sums, self.second + other.second + shift)

    def over_batch(self) -> "Statistics":
        """The statistics of all images together, with a batch of one."""
        gap = self.mean() - self.sums.sum(dim=(0, 1)) / or_one(self.total().sum())
        between = torch.einsum("n,nd,ne->de", self.total(), gap, gap)
        counts, sums = (x.sum(dim=0, keepdim=True) for x in (self.counts, self.sums))
        return Statistics(counts, sums, (self.second.sum(dim=0) + between)[None])


def or_one(n: Tensor) -> Tensor:
    """``n`` as a divisor: 1 where there is nothing to divide."""
    return torch.where(n == 0, 1, n)


def moments(weights: Tensor, V: Tensor, *, are_shares: bool = False) -> Statistics:
    """The statistics of every image, for class weights (N, C, M) and features (N, D, M).

    Their entries are float64 where the device has it, and blocks of pixels are added up in it. The features are centred
    before they are squared, so that a large mean does not cancel and of equal features next to nothing is left.
    ``are_shares`` promises weights that add up to 1 at every pixel, as a softmax gives: pixels are then not multiplied
    by 1, and the weights' gradient is up to a number that is the same for all classes, which a softmax takes away.
    """
    if wants_plain_formula(weights, V):
        return _plain(weights, V)
    return Statistics(*_Moments.apply(weights, V, are_shares))


def centred(weights: Tensor, V: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The counts, the sums, and the features less their mean."""
    dtype = statistics_dtype(V)
    w = weights.sum(dim=1, keepdim=True)
    mean = _mean(w, V)
    E = V - mean
    counts = weights.sum(dim=2, dtype=dtype)
    return counts, (weights @ E.mT).to(dtype) + counts[:, :, None] * mean.mT.to(dtype), E


def _mean(w: Tensor, V: Tensor) -> Tensor:
    """(N, D, 1); a sum, which halves its terms, and no product, whose rounding grows with the number of pixels."""
    return (w * V).sum(dim=2, keepdim=True) / or_one(w.sum(dim=2, keepdim=True))


def _plain(weights: Tensor, V: Tensor) -> Statistics:
    counts, sums, E = centred(weights, V)
    second = (weights.sum(dim=1, keepdim=True) * E) @ E.mT
    return Statistics(counts, sums, second.to(counts.dtype))


class _Moments(Function):
    """The features less their mean exist a block at a time, in forward and in backward."""

    @staticmethod
    def forward(weights: Tensor, V: Tensor, are_shares: bool) -> Statistics:
        (N, C, M), D = weights.shape, V.shape[1]
        size = PIXELS if are_shares else max(1, PIXELS // 2)  # which take twice the memory
        blocks = list(zip(weights.split(size, dim=2), V.split(size, dim=2), strict=True))
        counts = weights.sum(dim=2, dtype=statistics_dtype(V))
        n = or_one(counts.sum(dim=1))[:, None, None]
        if are_shares:
            center = V[:, :, : size * -(-len(blocks) // PART)].mean(dim=2, keepdim=True)
        else:
            center = (sum(v @ w.sum(dim=1)[:, :, None].to(v.dtype) for w, v in blocks) / n).to(V.dtype)
        sums, second = counts.new_zeros(N, C, D), counts.new_zeros(N, D, D)
        rows = [slice(i, min(i + ROWS, D)) for i in range(0, D, ROWS)]
        # Fresh memory would cost as much as filling it.
        memory = V.new_empty(N, (0 if are_shares else D) + D + C, min(size, M))
        for w, v in blocks:
            E, weighted = memory[:, :D, : v.shape[2]], memory[:, -D - C :, : v.shape[2]]
            torch.sub(v, center, out=E)
            if not are_shares:
                torch.mul(E, w.sum(dim=1, keepdim=True), out=weighted[:, :D])
            weighted[:, D:] = w
            for at in rows[:-1]:
                second[:, at, : at.stop] += weighted[:, at] @ E[:, : at.stop].mT
            last = weighted[:, rows[-1].start :] @ E.mT  # the weights' rows too, which alone are few for a product
            second[:, rows[-1]] += last[:, :-C]
            sums += last[:, -C:]
        for at in rows:
            second[:, : at.start, at] = second[:, at, : at.start].mT
        gap = sums.sum(dim=1, keepdim=True) / n
        second -= n * gap.mT * gap
        return Statistics(counts, sums + counts[:, :, None] * center.mT, second)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, bool], output: Statistics) -> None:
        *tensors, ctx.are_shares = inputs
        ctx.save_for_backward(*tensors, Statistics(*output).mean())

    @staticmethod
    def backward(ctx: Any, grad_counts: Tensor, grad_sums: Tensor, grad_second: Tensor) -> tuple[Tensor, Tensor, None]:
        weights, V, mean = ctx.saved_tensors
        mean = mean[:, :, None]
        if torch.is_grad_enabled():  # to be differentiated again, through the mean too
            mean = _mean(weights.sum(dim=1, keepdim=True), V)
        # The scatter does not change with the mean it is taken around.
        of_counts = (grad_counts[:, :, None] + grad_sums @ mean.to(grad_sums.dtype)).to(V.dtype)
        factors, mean = torch.cat((grad_sums, grad_second + grad_second.mT), dim=1).to(V.dtype), mean.to(V.dtype)
        C, are_shares = weights.shape[1], ctx.are_shares

        def of_block(weights: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
            E = V - mean
            products = factors @ E
            grad_weights, grad_V = of_counts + products[:, :C], factors[:, :C].mT @ weights
            if are_shares:
                return grad_weights, grad_V + products[:, C:]
            grad_weights = grad_weights + (E * products[:, C:]).sum(dim=1, keepdim=True) / 2
            return grad_weights, grad_V + weights.sum(dim=1, keepdim=True) * products[:, C:]

        if torch.is_grad_enabled():
            return *of_block(weights, V), None
        grads = factors.new_empty(weights.shape), factors.new_empty(V.shape)
        for *inputs, grad_weights, grad_V in zip(*(x.split(PIXELS, dim=2) for x in (weights, V, *grads)), strict=True):
            for grad, value in zip((grad_weights, grad_V), of_block(*inputs), strict=True):
                grad.copy_(value)
        return *grads, None
