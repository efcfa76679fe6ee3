"""The tiled kernels against the formula: every size of a tile or a chunk, and what is left over at its edges."""

import numpy as np
import pytest
import torch

from dlprop._kernels import tiled
from dlprop._kernels.compared import Compared, Needed
from tests.kernel_cases import (
    affinity_inputs,
    cross_inputs,
    expected_affinity,
    expected_cross,
    expected_pairs,
    normal,
    pair_inputs,
)
from tests.tolerances import assert_close

F64, F32 = torch.float64, torch.float32
FORMS = pytest.mark.parametrize("form", ["labels", "features"])
DTYPES = pytest.mark.parametrize("dtype", [F64, F32])


def _compare(actual, expected):
    for x, y, kind in zip(actual, expected, ("loss", "gradient", "gradient"), strict=False):
        assert_close(x, y, kind)


@FORMS
@DTYPES
@pytest.mark.parametrize("M", [1, 2, 37])
def test_pairwise_l1_at_every_tile_size(form, M, dtype, device):
    rows, target = pair_inputs(form, M=M, dtype=dtype, device=device)
    expected = expected_pairs(rows, target)
    for tile in (None, 1, 2, 15, 36, 37, 38, 3199):
        _compare(tiled.pairwise_l1(rows, target, tile, True), expected)
    value, gradient = tiled.pairwise_l1(rows, target, 15, False)
    assert_close(value, expected[0], "loss")
    assert gradient is None


@FORMS
@DTYPES
@pytest.mark.parametrize(("M", "K"), [(1, 1), (15, 4), (37, 37), (4, 60)])
def test_pairwise_l1_cross_at_every_tile_size(form, M, K, dtype, device):
    inputs = cross_inputs(form, M=M, K=K, dtype=dtype, device=device)
    expected = expected_cross(*inputs)
    for tile in (None, 1, 3, 4, 15, 16, 37, 3199):
        _compare(tiled.pairwise_l1_cross(*inputs, tile, True), expected)
    value, *gradients = tiled.pairwise_l1_cross(*inputs, 15, False)
    assert_close(value, expected[0], "loss")
    assert gradients == [None, None]


def _gradients_of_affinity(inputs, probe):
    logits, queries, keys = (x.detach().cpu().double().requires_grad_() for x in inputs)
    out = (queries @ keys.mT).softmax(2).mT @ logits
    return torch.autograd.grad(out, (logits, queries, keys), probe.cpu().double())


@DTYPES
@pytest.mark.parametrize(("M", "K"), [(1, 1), (1, 5), (15, 1), (37, 37), (16, 149)])
@pytest.mark.parametrize("targets", ["in one tile", "in many tiles"])
def test_softmax_affinity_at_every_chunk_size(M, K, targets, dtype, device, monkeypatch):
    if targets == "in many tiles":  # they have no option of their own: shrink the default to a few pixels
        monkeypatch.setattr(tiled, "CPU_TILE_BYTES", 128)
        monkeypatch.setattr(tiled, "DEVICE_TILE", 5)
    inputs = logits, *compared = affinity_inputs(M=M, K=K, dtype=dtype, device=device)
    expected, compared = expected_affinity(*inputs), Compared(*compared)
    probe = normal(2, K, 3, seed=9, dtype=dtype, device=device)
    wanted = _gradients_of_affinity(inputs, probe)
    for chunk in (None, 1, 15, 36, 37, 38, 3199):
        out, lse = tiled.softmax_affinity(logits, compared, chunk)
        assert_close(out, expected, "propagation")
        S = compared.queries.double() @ compared.keys.double().mT
        assert_close(lse, S.logsumexp(2), "propagation", dtype=dtype)
        *gradients, _ = tiled.softmax_affinity_backward(probe, logits, compared, lse, chunk, Needed(True, True, False))
        for x, y in zip(gradients, wanted, strict=True):
            # Similarities with one key have no gradient, and what they get is rounding.
            assert_close(x, y, "gradient", slack=8 * torch.finfo(dtype).eps if K == 1 else 0.0)


def test_only_the_gradients_that_are_needed():
    inputs = logits, *compared = affinity_inputs()
    compared, probe = Compared(*compared), normal(2, 4, 3, seed=9)
    wanted = _gradients_of_affinity(inputs, probe)
    lse = tiled.softmax_affinity(logits, compared, None)[1]
    for need in ((False, False), (True, False), (False, True)):
        *found, _ = tiled.softmax_affinity_backward(probe, logits, compared, lse, 3, Needed(*need, False))
        for x, y, needed in zip(found, wanted, (True, *need), strict=True):
            assert (x is not None) == needed
            if needed:
                assert_close(x, y, "gradient")


@FORMS
def test_default_tiles_meet_at_their_edges(form):
    # More pixels than the default tile holds, and no multiple of it.
    rows, target = pair_inputs(form, N=1, M=1100, dtype=F32)
    assert len(tiled._blocks(1100, None, rows)) > 1
    value, gradient = tiled.pairwise_l1(rows, target, None, True)
    expected = expected_pairs(rows, target)
    assert_close(value, expected[0], "loss")
    # A residual that rounds to the other side of 0 moves its two pixels by up to two features; there may be a few.
    wrong = np.abs(gradient.numpy() - expected[1]) > 1e-4 * np.abs(expected[1]).max()
    assert wrong.any(2).mean() < 0.01


def test_default_softmax_chunks_meet_at_their_edges():
    inputs = affinity_inputs(N=1, M=1100, K=1200, dtype=F32)
    out = tiled.softmax_affinity(inputs[0], Compared(*inputs[1:]), None)[0]
    assert_close(out, expected_affinity(*inputs), "propagation")


@pytest.mark.parametrize("M", [0, 1, 7, 362, 363, 1000, 16641])
@pytest.mark.parametrize("tile", [None, 1, 5, 100, 10**6])
def test_blocks_cover_every_pixel_once_and_none_is_thin(M, tile):
    blocks = tiled._blocks(M, tile, torch.empty(0))
    assert [i for block in blocks for i in range(block.start, block.stop)] == list(range(M))
    sizes = [block.stop - block.start for block in blocks]
    assert all(size == (tile if tile else sizes[0]) for size in sizes[:-1])
    if tile is None and M:
        assert max(sizes) <= tiled._tile_limit(torch.empty(0))
        assert min(sizes) > max(sizes) - len(sizes)


def test_softmax_affinity_does_not_overflow(device):
    logits, queries, keys = affinity_inputs(dtype=F32, device=device)
    inputs = (logits, 100 * queries, 100 * keys)
    out = tiled.softmax_affinity(logits, Compared(*inputs[1:]), 2)[0]
    # Similarities of 10^4 carry a rounding error of 10^-3, and softmax is nearly one-hot.
    assert out.isfinite().all()
    np.testing.assert_allclose(out.cpu().double(), expected_affinity(*inputs), rtol=0, atol=1e-2)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_shows(bad):
    rows, target = pair_inputs("features")
    rows[0, 3, 1] = bad
    value, gradient = tiled.pairwise_l1(rows, target, 3, True)
    assert value.isfinite().tolist() == [False, True]
    assert not gradient[0].isfinite().all()
    logits, queries, keys = affinity_inputs()
    queries[0, 3, 1] = bad
    out = tiled.softmax_affinity(logits, Compared(queries, keys), 3)[0]
    assert not out[0].isfinite().any()  # every target had a share of that source
    assert out[1].isfinite().all()
