"""The Triton kernels against the dense ones in float64, in Triton's interpreter or on a GPU.

`test_triton.py` runs this module in a process of its own, because the interpreter must be chosen before Triton is
imported: TRITON_INTERPRET=1 for the tests on the CPU, nothing for those marked `gpu`.
"""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch.autograd import gradcheck
from torch.library import opcheck

from dlprop import DerivativeLabelPropagation, DerivativeLoss
from dlprop._kernels import dense
from tests.loss_cases import FORMS, assert_matches, draw, draw_away_from_kinks, draw_mask, evaluate
from tests.tolerances import assert_close

OPS = torch.ops.dlprop
F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
DTYPES = [F64, F32, BF16]

# Sums of products of half precision numbers are as exact as those of float32, but the softmax multiplies probabilities
# that it rounds to the dtype first.
SOFTMAX = {F64: "gradient", F32: "gradient", F16: "autocast", BF16: "autocast"}


@pytest.fixture
def kernels():
    from dlprop._kernels import triton

    return triton


def _normal(*shape, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=F64).to(dtype)


def _at_least_float32(dtype):
    return torch.promote_types(dtype, F32)


def _double(*tensors):
    return [x.cpu().double() if x.is_floating_point() else x.cpu() for x in tensors]


def _cross(form, dtype, N=2, D=5, M=7, K=3, E=None):
    """(a, c, g, h) on the CPU with no residual so near to 0 that rounding could change its sign."""
    for seed in range(100):
        a, c = (_normal(N, D, size, seed=2 * seed + i, dtype=dtype) / D**0.5 for i, size in enumerate((M, K)))
        if form == "features":
            g, h = (_normal(N, E or D - 1, size, seed=90 + i, dtype=dtype) / D**0.5 for i, size in enumerate((M, K)))
        else:
            generator = torch.Generator().manual_seed(seed)
            # No small numbers: labels are compared in all of their 64 bits.
            names = torch.tensor([-1, 0, 1, 2**40, 2**40 + 2**32])
            g, h = (names[torch.randint(0, 5, (N, size), generator=generator)] for size in (M, K))
        exact = _double(a, c, g, h)
        R = exact[0].mT @ exact[1] - dense.target_similarity(exact[2], exact[3], F64)
        if R.abs().min() > 1e-5:
            return a, c, g, h
    raise AssertionError("every draw has a residual near 0")


def _pairs(form, dtype, N=2, D=5, M=7, E=None):
    """(a, g), likewise."""
    for size in range(M, M + 100):  # a draw of another size is another draw
        a, _, g, _ = _cross(form, dtype, N, D, size, 1, E)
        a, g = a[..., size - M :].contiguous(), g[..., size - M :].contiguous()
        exact, target = _double(a, g)
        if (exact.mT @ exact - dense.target_similarity(target, target, F64)).abs().min() > 1e-5:
            return a, g
    raise AssertionError("every draw has a residual near 0")


def _arguments(a, g, tile, need_grad=True, anchors=None):
    """The arguments of the loss's op that leave the pairs of order 0: those of the kernel itself."""
    return a, g, None, anchors, a.new_ones(len(a)), None, False, 0, "forward", None, tile, "triton", False, need_grad


def _pair_op(*inputs):
    return OPS.derivative_l1(*_arguments(*inputs))


def _affinity(dtype, N=2, C=3, D=5, M=7, K=4, scale=1.0):
    shapes = ((N, C, M), (N, D, M), (N, D, K))
    logits, queries, keys = (_normal(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate(shapes))
    return logits, queries * scale, keys * scale


def _check_pairs(kernels, device, form, dtype, tile, need_grad=True, **shape):
    a, g = _pairs(form, dtype, **shape)
    expected = dense.pairwise_l1(*_double(a, g), None, True)
    value, gradient = kernels.pairwise_l1(a.to(device), g.to(device), tile, need_grad)
    assert value.dtype == _at_least_float32(dtype)
    assert_close(value, expected[0], "loss")
    if need_grad:
        assert gradient.dtype == value.dtype
        assert_close(gradient, expected[1], "gradient")
    else:
        assert gradient is None


def _check_cross(kernels, device, form, dtype, tile, **shape):
    inputs = _cross(form, dtype, **shape)
    expected = dense.pairwise_l1_cross(*_double(*inputs), None, True)
    outputs = kernels.pairwise_l1_cross(*(x.to(device) for x in inputs), tile, True)
    for actual, wanted, kind in zip(outputs, expected, ("loss", "gradient", "gradient"), strict=True):
        assert actual.dtype == _at_least_float32(dtype)
        assert_close(actual, wanted, kind)
    assert kernels.pairwise_l1_cross(*(x.to(device) for x in inputs), tile, False)[1:] == (None, None)


def _check_softmax(kernels, device, dtype, chunk, **shape):
    inputs = _affinity(dtype, **shape)
    out, lse = dense.softmax_affinity(*_double(*inputs), None)
    probe = _normal(*out.shape, seed=9, dtype=dtype)
    gradients = dense.softmax_affinity_backward(*_double(probe, *inputs), lse, None)
    on_device = [x.to(device) for x in inputs]
    actual_out, actual_lse = kernels.softmax_affinity(*on_device, chunk)
    actual = kernels.softmax_affinity_backward(probe.to(device), *on_device, actual_lse, chunk)
    for x, wanted in zip((actual_out, actual_lse, *actual), (out, lse, *gradients), strict=True):
        assert x.dtype == _at_least_float32(dtype)
        assert_close(x, wanted, SOFTMAX[dtype], dtype=dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Against the dense kernels


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("D", "M"), [(5, 1), (33, 37), (7, 64)])
def test_pairwise_l1(kernels, device, form, dtype, D, M):
    _check_pairs(kernels, device, form, dtype, 16, D=D, M=M)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [*DTYPES, F16])
def test_pairwise_l1_with_the_default_blocks(kernels, device, form, dtype):
    _check_pairs(kernels, device, form, dtype, None, N=1, D=9, M=150)


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_channels(kernels, device, dtype):
    deep = 100 if dtype == F64 else 500  # float64 in both products does not fit in shared memory
    _check_pairs(kernels, device, "labels", dtype, 16, N=1, D=500, M=19)
    _check_cross(kernels, device, "features", dtype, 16, N=1, D=deep, M=19, K=18)
    _check_pairs(kernels, device, "features", dtype, 16, D=3, M=20, E=40)


def test_more_channels_than_fit(kernels, device):
    a = torch.zeros(1, 5000, 3, device=device)
    with pytest.raises(ValueError, match=r"backend='triton' .* of 8192 channels .* KiB .*backend='auto'"):
        kernels.pairwise_l1(a, torch.zeros(1, 3, dtype=torch.long, device=device), None, True)
    with pytest.raises(ValueError, match=r"backend='triton' .* of 8192 channels .* KiB .*backend='auto'"):
        kernels.softmax_affinity(a, a, a, None)


def test_float64_needs_a_newer_triton(kernels, device, monkeypatch):
    monkeypatch.setattr(kernels, "VERSION", (3, 4))
    inputs = [x.to(device) for x in _affinity(F64)]
    with pytest.raises(ValueError, match=r"backend='triton' .*float64 from Triton 3\.5 .*backend='auto'"):
        kernels.softmax_affinity(*inputs, None)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_pairwise_l1_without_gradient(kernels, device, form, dtype):
    _check_pairs(kernels, device, form, dtype, None, need_grad=False, D=17, M=37)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("D", "M", "K"), [(5, 1, 1), (18, 37, 5), (6, 4, 60)])
def test_pairwise_l1_cross(kernels, device, form, dtype, D, M, K):
    _check_cross(kernels, device, form, dtype, 16, D=D, M=M, K=K)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("C", "D", "M", "K"), [(1, 5, 1, 2), (3, 40, 37, 20), (19, 5, 20, 50), (1, 2, 40, 2)])
def test_softmax_affinity(kernels, device, dtype, C, D, M, K):
    _check_softmax(kernels, device, dtype, 16, C=C, D=D, M=M, K=K)


@pytest.mark.parametrize("M", [1, 40])
def test_softmax_affinity_with_one_target(kernels, device, M):
    _check_softmax(kernels, device, F64, 16, M=M, K=1)  # its similarities have no gradient, and float32 leaves rounding


def test_softmax_affinity_with_many_channels(kernels, device):
    _check_softmax(kernels, device, F32, 16, N=1, C=140, D=140, M=19, K=18, scale=0.3)


@pytest.mark.parametrize("dtype", [*DTYPES, F16])
def test_softmax_affinity_with_the_default_blocks(kernels, device, dtype):
    _check_softmax(kernels, device, dtype, None, N=1, M=140, K=70)


def test_softmax_affinity_does_not_overflow(kernels, device):
    inputs = _affinity(F32, scale=100.0)
    out = kernels.softmax_affinity(*(x.to(device) for x in inputs), 16)[0]
    expected = dense.softmax_affinity(*_double(*inputs), None)[0]
    # Similarities of 10^4 carry a rounding error of 10^-3, and softmax is nearly one-hot.
    assert (out.cpu().double() - expected).abs().max() < 1e-2


def test_similarities_far_below_zero(kernels, device):
    # A padded pixel has similarity 0, whose probability would overflow beside these.
    logits, queries, keys = _affinity(F32, M=5, K=3, scale=0.3)
    queries[:, 0], keys[:, 0] = 10, -10
    out, lse = dense.softmax_affinity(*_double(logits, queries, keys), None)
    assert lse.max() < -90
    probe = _normal(*out.shape, seed=9, dtype=F32)
    expected = dense.softmax_affinity_backward(*_double(probe, logits, queries, keys), lse, None)
    on_device = [x.to(device) for x in (logits, queries, keys)]
    actual_out, actual_lse = kernels.softmax_affinity(*on_device, 16)
    assert_close(actual_out, out, "propagation")
    gradients = kernels.softmax_affinity_backward(probe.to(device), *on_device, actual_lse, 16)
    for actual, wanted in zip(gradients, expected, strict=True):
        assert_close(actual, wanted, "gradient")


# ---------------------------------------------------------------------------------------------------------------------
# Float32 in pieces


@pytest.fixture
def _tf32():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


def _rounded(x, bits):
    mantissa, exponent = torch.frexp(x.double())
    return torch.ldexp((mantissa * 2.0**bits).round() * 2.0**-bits, exponent)


@pytest.mark.parametrize("scale", [1.0, 2.0**-50, 2.0**40])
@pytest.mark.parametrize("form", FORMS)
def test_reduced_products_have_eleven_bits_in_any_scale(kernels, device, form, scale):
    a, g = (_rounded(x, 11).float() * scale if x.is_floating_point() else x for x in _pairs(form, F32, D=9, M=37))
    expected = dense.pairwise_l1(*_double(a, g), None, True)
    noise = 1 + 2.0**-14 * torch.rand(a.shape, generator=torch.Generator().manual_seed(0)).sub(0.5)
    value, gradient = kernels.pairwise_l1((a * noise).to(device), g.to(device), 16, True, reduced=True)
    largest = expected[0].max().item()
    assert_close(value / largest, expected[0] / largest, "loss")
    assert_close(gradient / scale, expected[1] / scale, "gradient")


def _one_pair(x, device):
    """Features of one pixel and one anchor with the similarity x^2, and labels that differ."""
    a = torch.tensor([[[x]]], dtype=F32, device=device)
    return a, a.clone(), *(torch.tensor([[label]], device=device) for label in (0, 1))


def test_two_pieces_have_twenty_two_bits(kernels, device):
    x = 1 + 2.0**-13  # in float16: 1 and 2^-13
    value, gradient, _ = kernels.pairwise_l1_cross(*_one_pair(x, device), None, True)
    assert abs(value.item() - x * x) < 2.0**-22
    assert gradient.item() == x
    reduced = kernels.pairwise_l1_cross(*_one_pair(x, device), None, True, reduced=True)
    assert [y.item() for y in reduced] == [1, 1, 1]


@pytest.mark.usefixtures("_tf32")
def test_where_torch_allows_tf32_products_are_reduced(kernels, device):
    assert kernels.pairwise_l1_cross(*_one_pair(1 + 2.0**-13, device), None, False)[0].item() == 1
    inputs = [x.to(device) for x in _affinity(F32, M=37, K=20)]
    actual = kernels.softmax_affinity(*inputs, 16)
    for x, y in zip(actual, kernels.softmax_affinity(*inputs, 16, reduced=True), strict=True):
        assert torch.equal(x, y)


def _softmax_of_two(kernels, device, similarity, logit, **options):
    """What a source of one ``logit`` gives to two targets whose similarities with it differ by ``similarity``^2."""
    logits, queries, keys = (
        torch.tensor(x, dtype=F32, device=device) for x in ([[[logit]]], [[[similarity]]], [[[similarity, 0.0]]])
    )
    out, lse = kernels.softmax_affinity(logits, queries, keys, None, **options)
    grads = kernels.softmax_affinity_backward(torch.ones_like(out) * logit, logits, queries, keys, lse, None, **options)
    return out.flatten().tolist(), grads


def test_the_pieces_of_the_softmax(kernels, device):
    x = 1 + 2.0**-9 + 2.0**-18  # in bfloat16: 1, 2^-9 and 2^-18
    wanted = x * torch.sigmoid(torch.tensor(x * x, dtype=F64)).item()
    out, grads = _softmax_of_two(kernels, device, x, x)
    assert abs(out[0] / wanted - 1) < 3e-7
    assert abs(grads[0].item() / x - 1) < 3e-7
    reduced, _ = _softmax_of_two(kernels, device, x, x, reduced=True)
    assert 2.0**-22 < abs(reduced[0] / wanted - 1) < 2.0**-15


def test_reduced_products_of_the_softmax_have_sixteen_bits(kernels, device):
    inputs = _affinity(F32, M=37, K=20)
    out, lse = dense.softmax_affinity(*_double(*inputs), None)
    probe = _normal(*out.shape, seed=9, dtype=F32)
    wanted = (out, *dense.softmax_affinity_backward(*_double(probe, *inputs), lse, None))
    on_device = [x.to(device) for x in inputs]
    actual, actual_lse = kernels.softmax_affinity(*on_device, 16, reduced=True)
    grads = kernels.softmax_affinity_backward(probe.to(device), *on_device, actual_lse, 16, reduced=True)
    for x, y in zip((actual, *grads), wanted, strict=True):
        assert (x.cpu() - y).abs().max() < 2.0**-14 * y.abs().max()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_image_alone_is_not_finite(kernels, device, value, reduced):
    a, g = (x.to(device) for x in _pairs("features", F32, M=20))
    expected = kernels.pairwise_l1(a, g, 16, True, reduced=reduced)
    a[0, 1, 2] = value
    loss, gradient = kernels.pairwise_l1(a, g, 16, True, reduced=reduced)
    assert not loss[0].isfinite()
    assert torch.equal(loss[1], expected[0][1])
    assert torch.equal(gradient[1], expected[1][1])
    logits, queries, keys = (x.to(device) for x in _affinity(F32))
    logits[0, 1, 2] = value
    assert not kernels.softmax_affinity(logits, queries, keys, 16, reduced=reduced)[0][0, 1].isfinite().any()


def test_autocast_reduces_the_products(kernels, device):
    feats = torch.zeros(1, 2, 2, device=device)
    feats[0, 0] = 1 + 2.0**-13  # two pixels of one feature; the labels differ, so the loss is 4 squares or 2
    labels = torch.tensor([[0, 1]], device=device)
    loss = DerivativeLoss(max_order=0, eta=0.0, normalize=None, reduction="sum", backend="triton")
    exact = loss(feats, labels).item()
    with torch.autocast(device.type, dtype=BF16):
        reduced = loss(feats, labels)
    assert reduced.dtype == F32
    assert reduced.item() == 2  # R is 0 where labels agree
    assert exact > 2
    logits = torch.ones(1, 1, 2, device=device)
    propagate = DerivativeLabelPropagation(affinity="softmax", normalize=None, backend="triton")
    feats[0, 0, 1] = 0
    exact = propagate(logits, 2 * feats)
    with torch.autocast(device.type, dtype=BF16):
        reduced = propagate(logits, 2 * feats)
    assert 0 < (reduced - exact).abs().max() < 2.0**-13


# ---------------------------------------------------------------------------------------------------------------------
# When "auto" takes them


def test_a_small_problem_says_whether_they_work(kernels, device, monkeypatch):
    assert (device.type == "cpu") == kernels.INTERPRETED
    kernels.works.cache_clear()
    assert kernels.works(0)
    kernels.works.cache_clear()
    monkeypatch.setattr(kernels, "pairwise_l1", lambda *_, **__: (torch.ones(1), torch.ones(1, 20, 40)))
    with pytest.warns(RuntimeWarning, match=r"'auto' takes the slower tiled ones: .*came out wrong, by"):
        assert not kernels.works(0)
    assert not kernels.works(0)  # and warns once
    kernels.works.cache_clear()
    monkeypatch.setattr(kernels, "pairwise_l1", None)
    with pytest.warns(RuntimeWarning, match=r"do not work on .*TypeError"):
        assert not kernels.works(0)
    kernels.works.cache_clear()


def test_the_small_problem_is_of_float32_on_its_device(kernels, device):
    before = torch.get_default_dtype()
    kernels.works.cache_clear()
    try:
        torch.set_default_dtype(F64)
        with torch.device("meta"):
            assert kernels.works(0)
    finally:
        torch.set_default_dtype(before)
    kernels.works.cache_clear()


def test_nothing_is_tried_out_while_a_graph_is_captured(kernels, monkeypatch):
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    monkeypatch.setattr(kernels, "_device", lambda _: kernels.INTERPRETER)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(kernels, "works", None)
    assert kernels.pays("derivative_l1", F32, torch.device("cuda", 0), (64, 0), True)


def test_blocks_too_large_for_the_compiler_give_way_to_smaller_ones(kernels, monkeypatch):
    from triton.runtime.errors import OutOfResources

    tried = []
    launch = kernels._launch

    def with_little_memory(kernel, grid, operands, blocks, *args, **constants):
        tried.append(blocks.owned)
        if blocks.owned > limit:
            raise OutOfResources(2, 1, "shared memory")
        launch(kernel, grid, operands, blocks, *args, **constants)

    monkeypatch.setattr(kernels, "_launch", with_little_memory)
    limit = 32
    _check_pairs(kernels, torch.device("cpu"), "labels", F32, None, M=37)
    assert tried[0] == 128
    assert tried[-1] == 32
    limit = 0
    with pytest.raises(ValueError, match=r"backend='triton' cannot run here: .*backend='auto'"):
        _check_softmax(kernels, torch.device("cpu"), F32, None)


@pytest.mark.parametrize(
    ("op", "dtype", "reduced", "channels", "capability", "wanted"),
    [
        ("derivative_l1", F32, False, (256, 0), 90, False),  # in full precision
        ("derivative_l1", F32, True, (256, 0), 90, True),
        ("derivative_l1", F32, True, (256, 256), 80, True),
        ("derivative_l1", BF16, False, (256, 0), 80, True),
        ("derivative_l1", F64, True, (8, 0), 90, False),
        ("derivative_l1", F32, True, (512, 0), 90, True),
        ("derivative_l1", F32, True, (513, 0), 90, False),  # blocks too small for its tensor cores
        ("derivative_l1", F32, True, (256, 256), 90, True),
        ("derivative_l1", F32, True, (257, 257), 90, False),  # a single stage
        ("derivative_l1", F32, True, (512, 512), 80, False),
        ("derivative_l1", F32, True, (5000, 0), 90, False),
        ("softmax_affinity", F32, True, (256, 21), 90, True),
        ("softmax_affinity", F32, True, (257, 21), 90, False),
        ("softmax_affinity", F32, True, (256, 21), 80, False),  # two pieces
        ("softmax_affinity", F32, True, (256, 21), 120, False),
        ("softmax_affinity", F16, False, (256, 21), 80, True),
    ],
)
def test_where_they_pay(kernels, op, dtype, reduced, channels, capability, wanted, monkeypatch):
    memory = 163 if capability == 80 else 227
    monkeypatch.setattr(kernels, "_device", lambda _: kernels.Device(capability, memory << 10, 100))
    monkeypatch.setattr(kernels, "works", lambda _: True)
    assert kernels.pays(op, dtype, torch.device("cpu"), channels, reduced) is wanted
    if wanted:
        monkeypatch.setattr(kernels, "works", lambda _: False)
        assert not kernels.pays(op, dtype, torch.device("cpu"), channels, reduced)


# ---------------------------------------------------------------------------------------------------------------------
# As ops


@pytest.mark.parametrize("form", FORMS)
def test_strides_and_empty_batches(device, form):
    a, g = (x.to(device) for x in _pairs(form, F64, M=20))
    value, gradient = _pair_op(a.mT.contiguous().mT, g.repeat_interleave(2, dim=-1)[..., ::2], 16)
    expected = dense.pairwise_l1(*_double(a, g), None, True)
    assert_close(value, expected[0], "loss")
    assert_close(gradient, expected[1], "gradient")
    outputs = _pair_op(a[:0], g[:0], None)
    assert [tuple(x.shape) for x in outputs] == [(0,), (0, 5, 20)]
    logits, queries, keys = (x[:0].to(device).requires_grad_() for x in _affinity(F64))
    out = OPS.softmax_affinity(logits, queries, keys, None, "triton")[0]
    out.sum().backward()
    assert out.shape == (0, 3, 4)
    assert keys.grad.shape == keys.shape


@pytest.mark.parametrize("form", FORMS)
def test_autocast_does_not_reach_inside(device, form):
    a, g = (x.to(device) for x in _pairs(form, F32))
    inputs = _affinity(F32)
    with torch.autocast(device.type, dtype=BF16):
        value, gradient = _pair_op(a, g, 16)
        out = OPS.softmax_affinity(*(x.to(device) for x in inputs), 16, "triton")[0]
    expected = dense.pairwise_l1(*_double(a, g), None, True)
    assert_close(value, expected[0], "loss", dtype=F32)
    assert_close(gradient, expected[1], "gradient", dtype=F32)
    assert_close(out, dense.softmax_affinity(*_double(*inputs), None)[0], "propagation", dtype=F32)
    assert value.dtype == gradient.dtype == out.dtype == F32


@pytest.mark.parametrize("form", FORMS)
def test_a_result_is_the_same_every_time(device, form):
    a, g = (x.to(device) for x in _pairs(form, F32, N=1, M=50))
    inputs = [x.to(device).requires_grad_() for x in _affinity(F32, N=1, M=20, K=40)]
    runs = []
    for _ in range(2):
        out = OPS.softmax_affinity(*inputs, 16, "triton")[0]
        runs.append((*_pair_op(a, g, 16), out, *torch.autograd.grad(out.square().sum(), inputs)))
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


_ALL_CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("form", FORMS)
def test_opcheck_of_the_pairs(device, form):
    a, g = (x.to(device) for x in _pairs(form, F64))
    leaf = a.clone().requires_grad_()
    anchors = torch.tensor([[0, 3], [2, 1]], device=device)
    opcheck(OPS.derivative_l1.default, _arguments(leaf, g, None), test_utils=_ALL_CHECKS[:3])
    opcheck(OPS.derivative_l1.default, _arguments(leaf, g, None, True, anchors), test_utils=_ALL_CHECKS[:3])
    opcheck(OPS.derivative_l1.default, _arguments(a, g, 16, False), test_utils=_ALL_CHECKS)
    opcheck(OPS.derivative_l1.default, _arguments(a, g, 16, True, anchors), test_utils=_ALL_CHECKS)


# opcheck itself looks at the .grad of tensors that are no leaves, and torch warns about it.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_opcheck_of_the_affinity(device):
    inputs = [x.to(device) for x in _affinity(F64)]
    leaves = [x.clone().requires_grad_() for x in inputs]
    opcheck(OPS.softmax_affinity.default, (*leaves, None, "triton"), test_utils=_ALL_CHECKS)
    out, lse = OPS.softmax_affinity(*inputs, 16, "triton")
    arguments = (torch.ones_like(out), *inputs, lse, 16, "triton", False, True, True)
    opcheck(OPS.softmax_affinity_backward.default, arguments, test_utils=_ALL_CHECKS)


def test_gradcheck(device):
    a, g = (x.to(device) for x in _pairs("labels", F64, N=1, D=3, M=4))
    assert gradcheck(lambda a: _pair_op(a, g, 16)[0], a.requires_grad_())
    inputs = tuple(x.to(device).requires_grad_() for x in _affinity(F64, N=1, C=2, D=3, M=4, K=3))
    assert gradcheck(lambda *x: OPS.softmax_affinity(*x, 16, "triton")[0], inputs)


# ---------------------------------------------------------------------------------------------------------------------
# Through the public interface


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [F64, F32, BF16])
def test_the_loss(device, form, dtype):
    options = {"max_order": 1, "reduction": "none"}
    feats, target, expected = draw_away_from_kinks(form, dtype=dtype, options=options)
    actual = evaluate(feats.to(device), target.to(device), backend="triton", **options)
    assert_matches(actual, expected)


@pytest.mark.parametrize("form", FORMS)
def test_the_loss_with_a_mask_and_with_anchors(device, form):
    feats, target = (x.to(device) for x in draw(form))
    mask = draw_mask().to(device)
    for options in ({"mask": mask}, {"num_anchors": 4}, {"mask": mask, "num_anchors": 4, "chunk_size": 16}):
        torch.manual_seed(3)
        value, gradient = evaluate(feats, target, backend="triton", **options)
        torch.manual_seed(3)
        expected = evaluate(feats, target, backend="dense", **options)
        assert_close(value, expected[0].cpu(), "loss")
        assert_close(gradient, expected[1].cpu(), "gradient")


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_the_propagation(device, similarity):
    logits, feats = (_normal(2, c, 4, 5, seed=c, dtype=F64).to(device) for c in (3, 7))
    results = []
    for backend in ("triton", "dense"):
        leaves = [x.clone().requires_grad_() for x in (logits, feats)]
        module = DerivativeLabelPropagation(affinity="softmax", similarity=similarity, backend=backend)
        out = module(*leaves)
        results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected.detach().cpu(), "gradient")


def test_compiled(device):
    feats, target = (x.to(device) for x in draw("labels"))
    logits = _normal(2, 3, 3, 5, seed=0, dtype=F64).to(device)
    for module, inputs in (
        (DerivativeLoss(backend="triton"), (feats, target)),
        (DerivativeLabelPropagation(affinity="softmax", backend="triton"), (logits, feats)),
    ):
        expected = module(*inputs)
        assert_close(torch.compile(module, fullgraph=True, backend="aot_eager")(*inputs), expected.cpu(), "propagation")


def test_distributed(device, tmp_path):
    # One process is enough: what could go wrong is how the op's gradient meets the hooks.
    backend = "nccl" if device.type == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        x, labels = torch.rand(2, 5, 20, device=device), torch.randint(0, 3, (2, 20), device=device)
        grads = []
        for wrap in (lambda module: module, torch.nn.parallel.DistributedDataParallel):
            torch.manual_seed(0)
            layer = torch.nn.Conv1d(5, 6, 1).to(device)
            network = wrap(layer)
            feats = network(x).square()
            out = DerivativeLabelPropagation(affinity="softmax", backend="triton")(feats, feats)
            (DerivativeLoss(backend="triton")(feats, labels) + out.square().mean()).backward()
            grads.append(layer.weight.grad)
        assert grads[0].count_nonzero() > 0
        assert torch.equal(*grads)
    finally:
        torch.distributed.destroy_process_group()


# ---------------------------------------------------------------------------------------------------------------------
# Deliberately wrong kernels

DEVICE_MUTANTS = {
    "target forgotten": ("R -= _similarities(", "R -= 0 * _similarities(", "features"),
    "target added": ("R -= _similarities(", "R += _similarities(", "features"),
    "last step of each walk dropped": ("min(start + walk, visits)", "min(start + walk, visits) - VISITED", "labels"),
    "walks overlap": ("start = split * walk", "start = split * (walk - VISITED)", "labels"),
    "residual for its sign": ("tl.where(R > 0, 1.0, tl.where(R < 0, -1.0, 0.0))", "R", "labels"),
    "other image's pixels": ("+ first * CHANNELS", "+ first * CHANNELS * 0", "labels"),
    "padded targets count": ('S = tl.where(is_pixel, S, float("-inf"))', "", "low"),
    "padded targets in the sum": ("(visited + tl.arange(0, VISITED) < visits)[None, :], S", "S == S, S", "softmax"),
    "row sum forgotten": ("W *= carried - (row_shift", "W *= carried - (0 * row_shift", "softmax"),
    "sums not rescaled": ("total * tl.exp(largest - new_largest)", "total", "softmax"),
    "second piece of the rows": ("_dot(a1, tl.trans(c0), tile", "_dot(a1 * 0, tl.trans(c0), tile", "pieces"),
    "second piece of the columns": ("_dot(a0, tl.trans(c1), tile", "_dot(a0, tl.trans(c1 * 0), tile", "pieces"),
    "second piece of the values": ("_dot(signs, v1, total", "_dot(signs, v1 * 0, total", "pieces"),
    "third piece of the rows": ("_dot(a2, tl.trans(c0), tile", "_dot(a2 * 0, tl.trans(c0), tile", "softmax pieces"),
    "third piece of the columns": ("_dot(a0, tl.trans(c2), tile", "_dot(a0, tl.trans(c2 * 0), tile", "softmax pieces"),
    "product of the second pieces": (
        "_dot(a1, tl.trans(c1), tile",
        "_dot(a1, tl.trans(c1 * 0), tile",
        "softmax pieces",
    ),
    "second piece of the weights": ("_dot(w1, v0, total", "_dot(w1 * 0, v0, total", "softmax pieces"),
    "second piece of the weighted": ("_dot(w0, v1, total", "_dot(w0, v1 * 0, total", "softmax pieces"),
    "third piece of the weights": ("_dot(w2, v0, total", "_dot(w2 * 0, v0, total", "softmax pieces"),
    "third piece of the weighted": ("_dot(w0, v2, total", "_dot(w0, v2 * 0, total", "softmax pieces"),
    "both second pieces": ("_dot(w1, v1, total", "_dot(w1, v1 * 0, total", "softmax pieces"),
    "equal labels in another scale": ("same, 0.0)", "1.0, 0.0)", "scale"),
}
HOST_MUTANTS = {
    "ignored pixels equal each other": ("columns.masked_fill(h < 0, -2)", "columns.masked_fill(h < 0, -1)", "labels"),
    "padded pixels equal each other": ("_pad(h, columns.shape[2], -2)", "_pad(h, columns.shape[2], -1)", "labels"),
    "labels of the last 32 bits": ("every.sort(dim=1)", "every.int().sort(dim=1)", "labels"),
    "labels not numbered back": ("scatter_(1, order, F", "scatter_(1, order.sort(dim=1)[0], F", "labels"),
    "gradient of one role": ("grad.mul_(2)", "grad", "features"),
    "loss in another scale": ("sums.sum(dim=(0, 2)) / (scale * scale)", "sums.sum(dim=(0, 2))", "scale"),
    "gradient in another scale": (".div_(scale[:, None, None])", "", "scale"),
    "one split": ("parts.sum(dim=0)", "parts[0]", "labels"),
    "pieces of what is not finite": (".nan_to_num_(0, 0, 0)", "", "not finite"),
}


def _check_case(kernels, device, case, monkeypatch):
    # Walks of two steps, however many programs the device would have.
    monkeypatch.setattr(kernels, "_walk", lambda pixels, visited, *_: (2 * visited, -(-pixels // (2 * visited))))
    if case == "low":
        test_similarities_far_below_zero(kernels, device)
    elif case == "softmax":
        _check_softmax(kernels, device, F64, 16, N=1, M=40, K=90)
    elif case == "pieces":
        test_two_pieces_have_twenty_two_bits(kernels, device)
    elif case == "softmax pieces":
        test_the_pieces_of_the_softmax(kernels, device)
    elif case == "scale":
        _check_pairs(kernels, device, "labels", F32, 16, M=20)
    elif case == "not finite":
        _check_infinite_features(kernels, device)
    else:
        _check_pairs(kernels, device, case, F64, 16, M=90)


def _check_infinite_features(kernels, device):
    x = torch.tensor([[[float("inf")]]], device=device)
    label = torch.zeros(1, 1, dtype=torch.long, device=device)
    # Its product with a second piece would be NaN.
    assert kernels._as_rows(x, kernels.Operands(BF16, 3), kernels.BLOCKS[-1])[1:].count_nonzero() == 0, "error"
    assert not kernels.pairwise_l1(x, label, None, False)[0].isfinite()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("case", ["labels", "features", "low", "softmax", "pieces", "softmax pieces", "scale"])
def test_the_right_kernel_passes_where_mutants_fail(kernels, device, case, monkeypatch):
    _check_case(kernels, device, case, monkeypatch)


def _load(module, right, wrong, tmp_path):
    """The module with a mistake."""
    source = Path(module.__file__).read_text()
    assert right in source
    path = tmp_path / "mutant.py"
    path.write_text(source.replace(right, wrong))
    spec = importlib.util.spec_from_file_location("dlprop._kernels.mutant", path)
    mutant = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mutant)
    return mutant


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("mistake", [*DEVICE_MUTANTS, *HOST_MUTANTS])
def test_a_wrong_kernel_fails(kernels, device, mistake, tmp_path, monkeypatch):
    from dlprop._kernels import triton_jit

    if mistake in DEVICE_MUTANTS:
        right, wrong, case = DEVICE_MUTANTS[mistake]
        mutant = _load(triton_jit, right, wrong, tmp_path)
        for name in ("pairwise_kernel", "log_sum_exp_kernel", "softmax_kernel"):
            monkeypatch.setattr(kernels, name, getattr(mutant, name))
    else:
        right, wrong, case = HOST_MUTANTS[mistake]
        kernels = _load(kernels, right, wrong, tmp_path)
    with pytest.raises(AssertionError):
        _check_case(kernels, device, case, monkeypatch)
