"""Products of the pairwise loss in bfloat16, which torch's setting for float32 products asks for on CPUs."""

import pytest
import torch

from dlprop import DerivativeLoss, _precision
from dlprop._kernels import residuals, tiled
from tests.kernel_cases import cross_inputs, expected_cross, expected_pairs, normal, pair_inputs
from tests.tolerances import assert_close

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
BITS = {1: 8, 2: 16}  # of one piece and of two
PIECES = pytest.mark.parametrize("pieces", BITS)
KINDS = {1: "bfloat16", 2: "two bfloat16"}


@pytest.fixture
def precision():
    """Torch's setting, put back afterwards."""
    before = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def in_pieces(monkeypatch, pieces):
    """What a setting and a processor that allow them lead to."""
    monkeypatch.setattr(residuals, "bfloat16_pieces", lambda x: pieces if x.dtype == F32 else 0)


def _views(M, D, apart, seed=0, dtype=F32):
    """Two views (N, M, D) of positive features, which have most in common, so far apart."""
    a = normal(2, M, D, seed=seed).abs() + 3
    return tuple((x / D).to(dtype) for x in (a, a + apart * normal(2, M, D, seed=seed + 1)))


def _away_from_kinks(draw, least):
    """Inputs whose smallest residual, relative to the mean one, rounding to so few bits leaves on its side of 0."""
    for seed in range(200):
        inputs = draw(seed)
        a, g, c, h = (x.double() for x in (inputs * 2 if len(inputs) == 2 else inputs))
        R = (a @ c.mT - g @ h.mT).abs()
        if R.min() > least * R.mean():
            return inputs
    raise AssertionError("every draw has a residual near 0")


def _error(x, y):
    return float((x.double() - y).norm() / y.norm())


@PIECES
@pytest.mark.parametrize("apart", [1.0, 1e-3])
def test_the_residual_is_rounded_relative_to_itself(pieces, apart):
    """However close the views: the similarities themselves, rounded so, would differ by their rounding alone."""
    (a, g), (c, h) = _views(60, 64, apart), _views(40, 64, apart, seed=2)
    left, right = residuals.bfloat16_factors((a, g), (c, h), pieces)
    assert left.dtype == right.dtype == BF16
    wanted = a.double() @ c.double().mT - g.double() @ h.double().mT
    assert _error(left.double() @ right.double().mT, wanted) < 2.0 ** (1 - BITS[pieces])
    if apart < 1:
        rounded = [x.to(BF16).double() for x in (a, g, c, h)]
        assert _error(rounded[0] @ rounded[2].mT - rounded[1] @ rounded[3].mT, wanted) > 0.5


@PIECES
def test_ignored_pixels_have_no_residual(pieces):
    a, g = _views(60, 64, 1.0)
    ignored = torch.arange(60) % 3 == 0
    left, right = residuals.bfloat16_factors(*2 * [tuple(x.masked_fill(ignored[:, None], 0) for x in (a, g))], pieces)
    R = left.double() @ right.double().mT
    assert not R[:, ignored].any()
    assert not R[:, :, ignored].any()
    wanted = a.double() @ a.double().mT - g.double() @ g.double().mT
    kept = ~ignored[:, None] & ~ignored
    assert _error(R[:, kept], wanted[:, kept]) < 2.0 ** (1 - BITS[pieces])


@PIECES
@pytest.mark.usefixtures("in_pieces")
@pytest.mark.parametrize("tile", [None, 1, 2, 5, 100])
def test_value_and_gradient(pieces, tile):
    least = 2.0 ** (3 - BITS[pieces])

    def check(actual, expected):
        for x, y, kind in zip(actual, expected, ("", " gradient", " gradient"), strict=False):
            assert x.dtype == F32
            assert_close(x, y, KINDS[pieces] + kind)

    inputs = _away_from_kinks(lambda seed: _views(7, 6, 0.5, seed=seed), least)
    check(tiled.pairwise_l1(*inputs, tile, True), expected_pairs(*inputs))

    def draw(seed):
        return (*_views(6, 5, 0.1, seed=seed), *_views(4, 5, 0.1, seed=seed + 500))

    inputs = _away_from_kinks(draw, least)
    check(tiled.pairwise_l1_cross(*inputs, tile, True), expected_cross(*inputs))


@PIECES
@pytest.mark.usefixtures("in_pieces")
def test_what_is_not_finite_shows(pieces):
    a, g = _views(6, 5, 0.1)
    a[0, 3, 1] = torch.inf
    value, gradient = tiled.pairwise_l1(a, g, 3, True)
    assert value.isfinite().tolist() == [False, True]
    assert not gradient[0].isfinite().all()
    assert gradient[1].isfinite().all()


@PIECES
@pytest.mark.usefixtures("in_pieces")
def test_equal_views_and_ignored_pixels_have_no_residual(pieces):
    a, _ = _views(6, 5, 0.1)
    a[:, 2] = 0
    value, gradient = tiled.pairwise_l1(a, a.clone(), 3, True)
    assert not value.any()
    assert not gradient.any()


@PIECES
@pytest.mark.usefixtures("in_pieces")
@pytest.mark.parametrize("dtype", [F64, F32])
def test_other_targets_stay_as_they_are(pieces, dtype):
    """Labels, whose residuals torch's own products round, and at the op itself targets of other channels."""
    for form in ("labels", "features"):
        inputs = pair_inputs(form, dtype=dtype)
        for x, y, kind in zip(
            tiled.pairwise_l1(*inputs, 3, True), expected_pairs(*inputs), ("loss", "gradient"), strict=True
        ):
            assert_close(x, y, kind)
    found = residuals.residuals_of(*cross_inputs("features", D=5, dtype=F64))
    assert found.rows.dtype == F64


# ---------------------------------------------------------------------------------------------------------------------
# Through the loss, where this processor has it

needs_bfloat16 = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="needs a CPU on which torch multiplies in bfloat16"
)


@needs_bfloat16
@pytest.mark.parametrize("num_anchors", [None, 20])
def test_medium_of_the_loss(precision, num_anchors):
    feats = torch.rand(2, 64, 13, 11)
    view = feats + 0.02 * torch.rand(2, 64, 13, 11)
    loss = DerivativeLoss(eta=0.0, num_anchors=num_anchors)

    def step(dtype, function=loss):
        torch.manual_seed(0)
        leaf = feats.to(dtype).requires_grad_()
        value = function(leaf, view.to(dtype))
        return value.detach(), torch.autograd.grad(value, leaf)[0]

    torch.manual_seed(0)
    exact, before = step(F64), step(F32)
    precision("medium")
    actual = step(F32)
    assert torch.get_float32_matmul_precision() == "medium"
    if num_anchors is None:  # numbers drawn for float64 are others
        assert_close(actual[0], exact[0], "bfloat16")
        assert _error(actual[1], exact[1]) < 0.03
    assert _error(actual[0], before[0].double()) < 1e-2
    assert not torch.equal(actual[1], before[1])
    function = torch.compile(loss, fullgraph=True, backend="aot_eager")
    step(F32, function)
    precision("medium")  # once more: torch 2.6 turns it to "high" while it compiles
    compiled = step(F32, function)
    assert_close(compiled[0], actual[0], "bfloat16")  # the compiler rounds what comes before in another order
    assert _error(compiled[1], actual[1].double()) < 0.03
    assert not torch.equal(compiled[1], before[1])
    precision("highest")
    for x, y in zip(step(F32), before, strict=True):
        assert torch.equal(x, y)


def test_pieces_follow_torchs_setting(precision, monkeypatch):
    x = torch.ones(2)

    def found(bfloat16, tiles):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: bfloat16)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: tiles)
        counts = []
        for setting in ("highest", "high", "medium"):
            precision(setting)
            counts.append(_precision.bfloat16_pieces(x))
            assert _precision.bfloat16_pieces(x.double()) == _precision.bfloat16_pieces(x.to("meta")) == 0
        return counts

    assert found(True, True) == [0, 2, 1]
    assert found(True, False) == [0, 0, 1]
    assert found(False, False) == [0, 0, 0]


def test_torchs_newer_setting_is_read_first(monkeypatch):
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: pytest.fail("once used, the older one raises"))
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    for setting, expected in (("bf16", 1), ("ieee", 0), ("none", 0)):
        backend = type("Backend", (), {"matmul": type("Products", (), {"fp32_precision": setting})})
        monkeypatch.setattr(torch.backends.mkldnn, "matmul", backend.matmul, raising=False)
        assert _precision.bfloat16_pieces(torch.ones(2)) == expected
