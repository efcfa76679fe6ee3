"""The softmax affinity over the sources in a window around each target, offset by offset, on any device.

A band of rows is worked on at a time: its similarities to every offset exist together, those of the image never do.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .compared import Compared, Needed
from .exponentials import exp_

# Bytes that the similarities of a band, its logits or its features may take: on CPUs a second-level cache a thread.
CPU_BAND_BYTES, MOST_CPU_BAND_BYTES, DEVICE_BAND_BYTES = 2 << 20, 32 << 20, 256 << 20

# So many channels are multiplied one by one on CPUs, which saves a copy of all; of more a plane of a band is too small.
FEW_CHANNELS = 32


class Neighbours(NamedTuple):
    """The pixels of a band whose source at one offset lies in the image, and these sources."""

    inside: tuple[slice, slice]  # of the band
    queries: tuple[slice, slice, slice]  # of the image
    keys: tuple[slice, slice, slice]


def window_affinity(logits: Tensor, compared: Compared, offsets: Sequence[int]) -> tuple[Tensor, Tensor]:
    """`sum_o P_jo l_{j+o}` with `P_jo = softmax_o(q_j . k_{j+o} + b_{j+o})`, and the log-sum-exp of every pixel j.

    A pixel whose sources all have a bias of -inf receives 0.
    """
    queries, _, bias = compared
    out = torch.zeros_like(logits, memory_format=torch.contiguous_format)
    lse = queries.new_empty(queries.shape[0], 1, *queries.shape[2:])
    for n, rows, neighbours in _bands(logits, queries, offsets):
        S = _similarities(compared, n, rows, neighbours)
        top = S.amax(dim=0)
        top = torch.where(top == -torch.inf, 0, top)
        P = exp_(S.sub_(top))
        total = P.sum(dim=0)
        if total.device.type != "cpu" or (total == 0).any():
            # Nothing but -inf is an infinity of the features and shows, unless there is no source to hear.
            is_empty = total == 0
            total = total.masked_fill(is_empty, torch.nan)
            if bias is not None:
                total = total.masked_fill(is_empty & (_highest(bias[n], rows, neighbours) == -torch.inf), 1)
        lse[n, 0, rows] = top + total.log()
        P /= total
        for share, (inside, at, source) in zip(P, neighbours, strict=True):
            out[n][at].addcmul_(logits[n][source], share[inside])
    return out, lse


def window_affinity_backward(
    grad: Tensor,
    logits: Tensor,
    compared: Compared,
    out: Tensor,
    lse: Tensor,
    offsets: Sequence[int],
    needed: Needed,
) -> tuple[Tensor | None, ...]:
    """Gradients of `window_affinity`, each band recomputed; the row sum `sum_o P_jo dP_jo` is `grad_j . out_j`."""
    queries, keys, _ = compared
    grad_logits, gradients = torch.zeros_like(logits, memory_format=torch.contiguous_format), compared.zeros(needed)
    for n, rows, neighbours in _bands(logits, queries, offsets):
        S = _similarities(compared, n, rows, neighbours)
        P = exp_(S.sub_(lse[n, :, rows]))
        for share, (inside, at, source) in zip(P, neighbours, strict=True):
            grad_logits[n][source].addcmul_(grad[n][at], share[inside])
        if not any(needed):
            continue
        dP = torch.zeros_like(P)
        for product, (inside, at, source) in zip(dP, neighbours, strict=True):
            _channel_product(grad[n][at], logits[n][source], product[inside])
        grad_S = P.mul_(dP - (grad[n, :, rows] * out[n, :, rows]).sum(dim=0))
        for slope, (inside, at, source) in zip(grad_S, neighbours, strict=True):
            if gradients.queries is not None:
                gradients.queries[n][at].addcmul_(keys[n][source], slope[inside])
            if gradients.keys is not None:
                gradients.keys[n][source].addcmul_(queries[n][at], slope[inside])
            if gradients.bias is not None:
                gradients.bias[n][source] += slope[inside]
    return grad_logits, *gradients


def _similarities(compared: Compared, n: int, rows: slice, neighbours: list[Neighbours]) -> Tensor:
    """`q_j . k_{j+o} + b_{j+o}` of one image's band, (offsets, rows, W); -inf beyond the border."""
    queries, keys = compared.queries[n], compared.keys[n]
    S = queries.new_full((len(neighbours), rows.stop - rows.start, queries.shape[2]), -torch.inf)
    for s, (inside, at, source) in zip(S, neighbours, strict=True):
        part = s[inside]
        _channel_product(queries[at], keys[source], part)
        if compared.bias is not None:
            part += compared.bias[n][source][0]
    return S


def _channel_product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """`sum_c a_c b_c` of (C, H, W)."""
    if out.device.type != "cpu" or not 0 < len(a) <= FEW_CHANNELS:
        torch.sum(a * b, dim=0, out=out)
        return
    torch.mul(a[0], b[0], out=out)
    for x, y in zip(a[1:], b[1:], strict=True):
        out.addcmul_(x, y)


def _highest(bias: Tensor, rows: slice, neighbours: list[Neighbours]) -> Tensor:
    """The largest bias that every pixel of a band sees, (rows, W)."""
    highest = bias.new_full((rows.stop - rows.start, bias.shape[2]), -torch.inf)
    for inside, _, source in neighbours:
        highest[inside] = torch.maximum(highest[inside], bias[source][0])
    return highest


def _bands(logits: Tensor, queries: Tensor, offsets: Sequence[int]) -> Iterator[tuple[int, slice, list[Neighbours]]]:
    """Image n, a band of its rows, and the neighbours of the band at every offset."""
    N, C, H, W = logits.shape
    channels = max(C, queries.shape[1], len(offsets) // 2)
    of_cpu = min(CPU_BAND_BYTES * torch.get_num_threads(), MOST_CPU_BAND_BYTES)
    budget = of_cpu if logits.device.type == "cpu" else DEVICE_BAND_BYTES
    height = max(1, budget // (channels * W * logits.element_size()))
    everything = slice(None)
    for n in range(N):
        for top in range(0, H, height):
            bottom = min(top + height, H)
            neighbours = []
            for dy, dx in zip(offsets[::2], offsets[1::2], strict=True):
                # An offset beyond the image leaves empty slices.
                first, last = max(top, -dy), max(top, -dy, min(bottom, H - dy))
                left, right = max(0, -dx), max(0, -dx, min(W, W - dx))
                neighbours.append(
                    Neighbours(
                        (slice(first - top, last - top), slice(left, right)),
                        (everything, slice(first, last), slice(left, right)),
                        (everything, slice(first + dy, last + dy), slice(left + dx, right + dx)),
                    )
                )
            yield n, slice(top, bottom), neighbours
