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

# The kind of tolerance of each result. In half precision the loss too is rounded to the dtype of the features, and the
# softmax multiplies rounded probabilities.
PAIRS = {F64: ("loss", "gradient"), F32: ("loss", "gradient"), F16: ("gradient",) * 2, BF16: ("gradient",) * 2}
SOFTMAX = {F64: "gradient", F32: "gradient", F16: "autocast", BF16: "autocast"}


@pytest.fixture
def kernels():
    from dlprop._kernels import triton

    return triton


def _normal(*shape, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=F64).to(dtype)


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
    return a, g, None, anchors, a.new_ones(len(a)), None, False, 0, "forward", None, tile, "triton", need_grad


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
    assert value.dtype == dtype
    assert_close(value, expected[0], PAIRS[dtype][0])
    if need_grad:
        assert gradient.dtype == dtype
        assert_close(gradient, expected[1], PAIRS[dtype][1])
    else:
        assert gradient is None


def _check_cross(kernels, device, form, dtype, tile, **shape):
    inputs = _cross(form, dtype, **shape)
    expected = dense.pairwise_l1_cross(*_double(*inputs), None, True)
    outputs = kernels.pairwise_l1_cross(*(x.to(device) for x in inputs), tile, True)
    kinds = PAIRS[dtype] + PAIRS[dtype][1:]
    for actual, wanted, kind in zip(outputs, expected, kinds, strict=True):
        assert actual.dtype == dtype
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
        assert x.dtype == dtype
        assert_close(x, wanted, SOFTMAX[dtype])


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
def test_gradients_deeper_than_a_block(kernels, device, dtype):
    _check_pairs(kernels, device, "labels", dtype, 16, N=1, D=270, M=19)
    _check_cross(kernels, device, "features", dtype, 16, N=1, D=270, M=19, K=18)


def test_many_channels_of_the_target(kernels, device):
    _check_pairs(kernels, device, "features", F32, 16, D=3, M=20, E=40)


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
@pytest.mark.parametrize(("C", "D", "M", "K"), [(1, 5, 1, 1), (3, 40, 37, 20), (19, 5, 20, 50), (1, 2, 40, 1)])
def test_softmax_affinity(kernels, device, dtype, C, D, M, K):
    _check_softmax(kernels, device, dtype, 16, C=C, D=D, M=M, K=K)


def test_softmax_affinity_deeper_than_a_block(kernels, device):
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


@pytest.fixture
def _tf32():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


def _rounded(x):
    """``x`` to the nearest number of 10 bits after the point, away from zero in ties."""
    mantissa, exponent = torch.frexp(x.double())
    scaled = mantissa * 2.0**11
    return torch.ldexp(scaled.sign() * (scaled.abs() + 0.5).floor() * 2.0**-11, exponent)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.usefixtures("_tf32")
def test_tf32_rounds_the_features_and_nothing_else(kernels, device, form):
    a, g = _pairs(form, F32, D=9, M=37)
    a = _rounded(a).float()  # away from kinks no more, perhaps: the signs are those of the rounded features
    exact = [_rounded(x) if x.is_floating_point() else x for x in (a, g)]
    R = exact[0].mT @ exact[0] - dense.target_similarity(exact[1], exact[1], F64)
    assert R.abs().min() > 1e-6
    noise = 1 + 2.0**-13 * torch.rand(a.shape, generator=torch.Generator().manual_seed(0)).sub(0.5)
    expected = dense.pairwise_l1(*exact, None, True)
    value, gradient = kernels.pairwise_l1((a * noise).to(device), g.to(device), 16, True)
    assert_close(value, expected[0], "loss")
    assert_close(gradient, expected[1], "gradient")


@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0x7FC00000, -1])
@pytest.mark.usefixtures("_tf32")
def test_tf32_does_not_hide_nan(kernels, device, bits):
    a, g = _pairs("labels", F32, N=1)
    a[0, 1, 2] = torch.tensor(bits, dtype=torch.int32).view(F32)
    assert kernels.pairwise_l1(a.to(device), g.to(device), 16, False)[0].isnan().all()
    inputs = _affinity(F32, N=1)
    inputs[0][0, 1, 2] = inputs[2][0, 1, 2] = a[0, 1, 2]
    assert kernels.softmax_affinity(*(x.to(device) for x in inputs), 16)[0].isnan().all()


@pytest.mark.usefixtures("_tf32")
def test_tf32_of_the_softmax(kernels, device):
    inputs = _affinity(F32, M=37, K=20)
    out = kernels.softmax_affinity(*(x.to(device) for x in inputs), 16)[0]
    assert_close(out.half(), dense.softmax_affinity(*_double(*inputs), None)[0], "autocast")  # 10 bits, as float16


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
    arguments = (torch.ones_like(out), *inputs, lse, 16, "triton", True, True)
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


# ---------------------------------------------------------------------------------------------------------------------
# Deliberately wrong kernels

MUTANTS = {
    "ignored pixels equal each other": ("(own_labels == labels) & (own_labels >= 0)", "own_labels == labels", "labels"),
    "target forgotten": ("tile = -_add_products(", "tile = 0 * _add_products(", "features"),
    "target added": ("tile = -_add_products(", "tile = _add_products(", "features"),
    "last step of each walk dropped": ("min(start + walk, visits)", "min(start + walk, visits) - VISITED", "labels"),
    "walks overlap": ("start = split * walk", "start = split * (walk - VISITED)", "labels"),
    "residual for its sign": ("tl.where(tile > 0, 1.0, tl.where(tile < 0, -1.0, 0.0))", "tile", "labels"),
    "gradient of one role": ("grad.mul_(2)", "grad", "features"),
    "one block of channels": ("first_channel = depth_block * DEPTH", "first_channel = 0", "deep"),
    "padded targets count": ('S = tl.where(is_pixel, S, float("-inf"))', "", "low"),
    "padded targets in the sum": ("(visited + tl.arange(0, VISITED) < visits)[None, :], S", "S == S, S", "softmax"),
    "row sum forgotten": ("W *= carried - (row_shift", "W *= carried - (0 * row_shift", "softmax"),
    "sums not rescaled": ("total * tl.exp(largest - new_largest)", "total", "softmax"),
}


def _check_case(kernels, device, case, monkeypatch):
    # Walks of two steps, however many programs the device would have.
    steps_of_two = lambda pixels, visited, *_: (2 * visited, -(-pixels // (2 * visited)))  # noqa: E731
    monkeypatch.setattr(kernels, "_walk", steps_of_two)
    if case == "deep":
        _check_pairs(kernels, device, "labels", F64, 16, N=1, D=70, M=19)
    elif case == "low":
        test_similarities_far_below_zero(kernels, device)
    elif case == "softmax":
        _check_softmax(kernels, device, F64, 16, N=1, M=40, K=90)
    else:
        _check_pairs(kernels, device, case, F64, 16, N=1, M=90)


@pytest.mark.parametrize("case", ["labels", "features", "deep", "low", "softmax"])
def test_the_right_kernel_passes_where_mutants_fail(kernels, device, case, monkeypatch):
    _check_case(kernels, device, case, monkeypatch)


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("mistake", MUTANTS)
def test_a_wrong_kernel_fails(kernels, device, mistake, tmp_path, monkeypatch):
    right, wrong, case = MUTANTS[mistake]
    source = Path(kernels.__file__).read_text()
    assert right in source
    path = tmp_path / "mutant.py"
    path.write_text(source.replace(right, wrong))
    spec = importlib.util.spec_from_file_location("mutant", path)
    mutant = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mutant)
    with pytest.raises(AssertionError, match=r"error|non-finite"):
        _check_case(mutant, device, case, monkeypatch)
