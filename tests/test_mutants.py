"""Deliberately wrong kernels: the comparison that the real ones pass must fail each of them.

Every mutant is a small tiled kernel of this file with one mistake. Without a mistake it passes, so what fails it is
the mistake; in place of the library's kernel it runs under the same tests as that one.
"""

import itertools

import pytest
import torch

from dlprop._kernels import dense, tiled
from dlprop.propagation import derivative_label_propagation
from tests.loss_cases import FORMS, assert_matches, draw_away_from_kinks, draw_mask, evaluate
from tests.tolerances import assert_close

F64, F32 = torch.float64, torch.float32


def _blocks(M, tile):
    return [slice(i, min(i + tile, M)) for i in range(0, M, tile)]


def _similarity(g, h, mistake):
    if g.is_floating_point():
        return g.mT @ h
    equal = g[:, :, None] == h[:, None, :]
    return (equal if mistake == "ignored pixels equal each other" else equal & (g[:, :, None] >= 0)).double()


def _pairwise_l1(a, g, tile, need_grad, mistake=None):
    loss, grad = a.new_zeros(a.shape[0]), torch.zeros_like(a)
    blocks = _blocks(a.shape[2], tile)
    if mistake == "ragged last tile dropped":
        blocks = blocks[:-1]
    for p, i in enumerate(blocks):
        for q, j in enumerate(blocks[p:], start=p):
            if mistake == "one tile missing" and (p, q) == (0, len(blocks) - 1):
                continue
            R = a[..., i].mT @ a[..., j]
            if mistake != "target forgotten":
                R = R - _similarity(g[..., i], g[..., j], mistake).to(R.dtype)
            twice = 1 if p == q or mistake == "off-diagonal tile counted once" else 2
            if mistake == "diagonal tile counted twice":
                twice = 2
            loss += twice * R.abs().sum((1, 2))
            sign = R.abs() if mistake == "residual for its sign" else R.sign()
            role = 1 if mistake == "gradient of only one role" else 2
            if mistake == "gradient overwritten":
                grad[..., i] = 0
            grad[..., i] += role * (a[..., j] @ sign.mT)
            if p != q and mistake != "gradient of only one row block":
                grad[..., j] += role * (a[..., i] @ (sign.flip(1) if mistake == "columns reversed" else sign))
    scale = {"wrong scale": 1.001, "wrong sign": -1.0}.get(mistake, 1.0)
    if mistake == "wrong scale of the value":
        loss = 1.001 * loss
    return loss, scale * grad if need_grad else None


PAIR_MISTAKES = [
    "wrong sign",
    "wrong scale",
    "wrong scale of the value",
    "one tile missing",
    "ragged last tile dropped",
    "off-diagonal tile counted once",
    "diagonal tile counted twice",
    "gradient of only one role",
    "gradient of only one row block",
    "gradient overwritten",
    "columns reversed",
    "residual for its sign",
    "target forgotten",
]


@pytest.fixture
def pairs_pass(monkeypatch):
    """The comparison of test_loss, with a kernel of this file in place of the tiled one."""

    def check(form, dtype, mistake):
        monkeypatch.setattr(tiled, "pairwise_l1", lambda *inputs: _pairwise_l1(*inputs, mistake=mistake))
        options = {"reduction": "none", "mask": draw_mask(), "max_order": 1}
        feats, target, expected = draw_away_from_kinks(form, dtype=dtype, options=options)
        assert_matches(evaluate(feats, target, backend="tiled", chunk_size=4, **options), expected)

    return check


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [F64, F32])
def test_the_kernel_without_a_mistake_passes(pairs_pass, form, dtype):
    pairs_pass(form, dtype, None)


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize(
    ("form", "mistake"),
    [*itertools.product(FORMS, PAIR_MISTAKES), ("labels", "ignored pixels equal each other")],
)
def test_a_wrong_pair_kernel_fails(pairs_pass, form, dtype, mistake):
    with pytest.raises(AssertionError, match=r"loss|gradient"):
        pairs_pass(form, dtype, mistake)


def _pairwise_l1_cross(a, c, g, h, tile, need_grad, mistake=None):
    R = a.mT @ c - _similarity(g, h, mistake).to(a.dtype)
    if mistake == "one tile missing":
        R[:, :tile, -1:] = 0
    grad_a, grad_c = c @ R.sign().mT, a @ R.sign()
    if mistake == "wrong sign":
        grad_c = -grad_c
    if mistake == "gradient of only one role":
        grad_c = torch.zeros_like(grad_c)
    if mistake == "wrong scale":
        grad_a = 1.001 * grad_a
    return R.abs().sum((1, 2)), grad_a, grad_c


@pytest.fixture
def anchors_pass(monkeypatch):
    """The comparison of the sampled loss with the dense backend at the same draws."""

    def check(form, mistake):
        feats, target, _ = draw_away_from_kinks(form)
        torch.manual_seed(0)
        expected = evaluate(feats, target, num_anchors=6, backend="dense")
        monkeypatch.setattr(tiled, "pairwise_l1_cross", lambda *inputs: _pairwise_l1_cross(*inputs, mistake=mistake))
        torch.manual_seed(0)
        actual = evaluate(feats, target, num_anchors=6, backend="tiled", chunk_size=4)
        assert_close(actual[0], expected[0], "loss")
        assert_close(actual[1], expected[1], "gradient")

    return check


@pytest.mark.parametrize("form", FORMS)
def test_a_wrong_sampled_kernel_fails(anchors_pass, form):
    anchors_pass(form, None)
    for mistake in ("wrong sign", "wrong scale", "one tile missing", "gradient of only one role"):
        with pytest.raises(AssertionError, match=r"loss|gradient"):
            anchors_pass(form, mistake)


def _softmax_affinity(logits, queries, keys, chunk, mistake=None):
    S = queries.mT @ keys
    P = S.softmax(1 if mistake == "softmax over the sources" else 2)
    if mistake == "one chunk missing":
        P[:, chunk : 2 * chunk] = 0
    if mistake == "chunks normalised alone":
        P = torch.cat([part.softmax(2) for part in S.split(chunk, dim=2)], dim=2)
    out = logits @ P
    return (1.0002 * out if mistake == "wrong scale" else out), S.logsumexp(2)


def _softmax_affinity_backward(grad, logits, queries, keys, lse, chunk, mistake=None):
    P = (queries.mT @ keys - lse[:, :, None]).exp()
    grad_P = logits.mT @ grad
    row_sum = 0 if mistake == "row sum forgotten" else (P * grad_P).sum(2, keepdim=True)
    grad_S = P * (grad_P - row_sum)
    if mistake == "wrong sign":
        grad_S = -grad_S
    grad_keys = queries @ grad_S
    if mistake == "keys of the last chunk only":
        grad_keys = queries[..., -chunk:] @ grad_S[:, -chunk:]
    return grad @ P.mT, keys @ grad_S.mT, grad_keys


@pytest.fixture
def softmax_passes(monkeypatch):
    """The softmax propagation against autograd on the formula."""

    def check(mistake):
        monkeypatch.setattr(tiled, "softmax_affinity", lambda *x: _softmax_affinity(*x, mistake=mistake))
        monkeypatch.setattr(
            tiled, "softmax_affinity_backward", lambda *x: _softmax_affinity_backward(*x[:6], mistake=mistake)
        )
        generator = torch.Generator().manual_seed(0)
        logits, V, W = (torch.randn(2, c, 15, generator=generator, dtype=F64) for c in (3, 5, 5))
        probe = torch.randn(2, 3, 15, generator=generator, dtype=F64)
        leaves = [x.clone().requires_grad_() for x in (logits, V, W)]
        options = {"affinity": "softmax", "normalize": None, "max_order": 0}
        out = derivative_label_propagation(*leaves, backend="tiled", chunk_size=4, **options)
        gradients = torch.autograd.grad(out, leaves, probe)
        expected = leaves[0] @ (leaves[1].mT @ leaves[2]).softmax(2)
        assert_close(out, expected.detach(), "propagation")
        for actual, wanted in zip(gradients, torch.autograd.grad(expected, leaves, probe), strict=True):
            assert_close(actual, wanted, "gradient")

    return check


def test_a_wrong_softmax_kernel_fails(softmax_passes):
    softmax_passes(None)
    for mistake in (
        "softmax over the sources",
        "one chunk missing",
        "chunks normalised alone",
        "wrong scale",
        "row sum forgotten",
        "wrong sign",
        "keys of the last chunk only",
    ):
        with pytest.raises(AssertionError, match=r"propagation|gradient"):
            softmax_passes(mistake)


def test_the_real_kernels_pass_the_same_comparisons():
    options = {"reduction": "none", "mask": draw_mask(), "max_order": 1}
    for form in FORMS:
        for dtype in (F64, F32):
            feats, target, expected = draw_away_from_kinks(form, dtype=dtype, options=options)
            assert_matches(evaluate(feats, target, backend="tiled", chunk_size=4, **options), expected)
            assert_matches(evaluate(feats, target, backend="dense", **options), expected)


def test_a_mutant_is_the_kernel_that_runs(monkeypatch):
    # Were a kernel bound earlier than at the call, no mutant here would ever run.
    feats, target, expected = draw_away_from_kinks("labels")
    for module, backend in ((dense, "dense"), (tiled, "tiled"), (tiled, "auto")):
        with monkeypatch.context() as patch:
            patch.setattr(module, "pairwise_l1", lambda a, g, *_: (a.new_zeros(a.shape[0]), torch.zeros_like(a)))
            with pytest.raises(AssertionError):
                assert_matches(evaluate(feats, target, backend=backend), expected)
        assert_matches(evaluate(feats, target, backend=backend), expected)
