"""The Triton kernels against the formulas in float64, in Triton's interpreter or on a GPU.

`test_triton.py` runs this module in a process of its own, because the interpreter must be chosen before Triton is
imported: TRITON_INTERPRET=1 for the tests on the CPU, nothing for those marked `gpu`.
"""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck
from torch.library import opcheck

from dlprop import DerivativeLabelPropagation, DerivativeLoss
from dlprop._kernels.compared import Compared, Needed
from dlprop.affinity import Softmax
from tests.kernel_cases import affinity_inputs, expected_cross, expected_pairs, normal
from tests.tolerances import assert_close

OPS = torch.ops.dlprop
F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
DTYPES = pytest.mark.parametrize("dtype", [F64, F32])
FORMS = pytest.mark.parametrize("form", ["labels", "features"])


@pytest.fixture
def kernels():
    from dlprop._kernels import triton

    return triton


def _cross(form, dtype, N=2, M=7, K=3, D=5, E=None):
    """(rows, target, columns, column_target) with no residual so near to 0 that rounding could change its sign."""
    for seed in range(100):
        a, c = (normal(N, size, D, seed=2 * seed + i, dtype=dtype) / D**0.5 for i, size in enumerate((M, K)))
        if form == "features":
            g, h = (normal(N, size, E or D - 1, seed=90 + i, dtype=dtype) / D**0.5 for i, size in enumerate((M, K)))
            G = g.double() @ h.double().mT
        else:
            generator = torch.Generator().manual_seed(seed)
            g, h = (torch.randint(-1, 3, (N, size), generator=generator, dtype=torch.int32) for size in (M, K))
            G = (g[:, :, None] == h[:, None]) & (g[:, :, None] >= 0)
        if (a.double() @ c.double().mT - G.double()).abs().min() > 1e-5:
            return a, g, c, h
    raise AssertionError("every draw has a residual near 0")


def _pairs(form, dtype, N=2, M=7, D=5, E=None):
    """(rows, target), likewise."""
    for size in range(M, M + 100):  # a draw of another size is another draw
        a, g, _, _ = _cross(form, dtype, N, size, 1, D, E)
        a, g = a[:, size - M :].contiguous(), g[:, size - M :].contiguous()
        target = g.double() @ g.double().mT if form == "features" else (g[:, :, None] == g[:, None]) & (g[:, None] >= 0)
        if (a.double() @ a.double().mT - target.double()).abs().min() > 1e-5:
            return a, g
    raise AssertionError("every draw has a residual near 0")


def _affinity(dtype, scale=1.0, **shape):
    logits, queries, keys = affinity_inputs(dtype=dtype, **shape)
    return logits, queries * scale, keys * scale


def _expected_softmax(logits, queries, keys, probe):
    """Output, log-sum-exp and the three gradients for the gradient ``probe`` of the output."""
    leaves = [x.double().requires_grad_() for x in (logits, queries, keys)]
    S = leaves[1] @ leaves[2].mT
    out = S.softmax(2).mT @ leaves[0]
    return [x.detach() for x in (out, S.logsumexp(2), *torch.autograd.grad(out, leaves, probe.double()))]


def _softmax(kernels, device, inputs, probe, chunk):
    """The same of the kernels."""
    logits, *compared = (x.to(device) for x in inputs)
    compared = Compared(*compared)
    out, lse = kernels.softmax_affinity(logits, compared, chunk)
    needed = Needed(queries=True, keys=True, bias=False)
    *gradients, _ = kernels.softmax_affinity_backward(probe.to(device), logits, compared, lse, chunk, needed)
    return out, lse, *gradients


def _probe(logits, keys):
    return normal(len(logits), keys.shape[1], logits.shape[2], seed=9, dtype=logits.dtype)


def _check(actual, expected, kinds, dtype):
    for x, wanted, kind in zip(actual, expected, kinds, strict=True):
        assert x.dtype == dtype
        assert_close(x, wanted, kind)


def _check_pairs(kernels, device, form, dtype, tile, **shape):
    rows, target = _pairs(form, dtype, **shape)
    outputs = kernels.pairwise_l1(rows.to(device), target.to(device), tile, True)
    _check(outputs, expected_pairs(rows, target), ("loss", "gradient"), dtype)
    value, none = kernels.pairwise_l1(rows.to(device), target.to(device), tile, False)
    assert_close(value, outputs[0].cpu(), "loss")
    assert none is None


def _check_cross(kernels, device, form, dtype, tile, **shape):
    inputs = _cross(form, dtype, **shape)
    on_device = [x.to(device) for x in inputs]
    outputs = kernels.pairwise_l1_cross(*on_device, tile, True)
    _check(outputs, expected_cross(*inputs), ("loss", "gradient", "gradient"), dtype)
    assert kernels.pairwise_l1_cross(*on_device, tile, False)[1:] == (None, None)


def _check_softmax(kernels, device, dtype, chunk, **shape):
    inputs = _affinity(dtype, **shape)
    probe = _probe(inputs[0], inputs[2])
    actual = _softmax(kernels, device, inputs, probe, chunk)
    _check(actual, _expected_softmax(*inputs, probe), ["gradient"] * 5, dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Against the formulas


@FORMS
@pytest.mark.parametrize(("dtype", "M", "D"), [(F64, 1, 5), (F32, 37, 33), (F64, 64, 7)])
def test_pairwise_l1(kernels, device, form, dtype, M, D):
    _check_pairs(kernels, device, form, dtype, 16, M=M, D=D)


@FORMS
@DTYPES
def test_pairwise_l1_with_the_default_blocks(kernels, device, form, dtype):
    _check_pairs(kernels, device, form, dtype, None, N=1, M=150, D=9)


@FORMS
@pytest.mark.parametrize(("dtype", "M", "K", "D"), [(F64, 1, 1, 5), (F64, 37, 5, 18), (F32, 4, 60, 6)])
def test_pairwise_l1_cross(kernels, device, form, dtype, M, K, D):
    _check_cross(kernels, device, form, dtype, 16, M=M, K=K, D=D)


@pytest.mark.parametrize("dtype", [F64, pytest.param(F32, marks=pytest.mark.exhaustive)])
def test_many_channels(kernels, device, dtype):
    deep = 100 if dtype == F64 else 500  # float64 in both products does not fit in shared memory
    _check_pairs(kernels, device, "labels", dtype, 16, N=1, M=19, D=500)
    _check_cross(kernels, device, "features", dtype, 16, N=1, M=19, K=18, D=deep)
    _check_pairs(kernels, device, "features", dtype, 16, M=20, D=3, E=40)
    _check_softmax(kernels, device, dtype, 16, N=1, M=19, K=18, C=140, E=140, scale=0.3)


@pytest.mark.parametrize(
    ("dtype", "C", "E", "M", "K"),
    [
        (F64, 1, 5, 1, 2),
        (F32, 3, 40, 17, 20),
        pytest.param(F64, 19, 5, 20, 50, marks=pytest.mark.exhaustive),
        (F32, 1, 2, 20, 2),
    ],
)
def test_softmax_affinity(kernels, device, dtype, C, E, M, K):
    _check_softmax(kernels, device, dtype, 16, C=C, E=E, M=M, K=K)


@pytest.mark.parametrize("M", [1, 40])
def test_softmax_affinity_with_one_target(kernels, device, M):
    _check_softmax(kernels, device, F64, 16, M=M, K=1)  # its similarities have no gradient, and float32 leaves rounding


@pytest.mark.parametrize("dtype", [F64, pytest.param(F32, marks=pytest.mark.exhaustive)])
def test_softmax_affinity_with_the_default_blocks(kernels, device, dtype):
    _check_softmax(kernels, device, dtype, None, N=1, M=140, K=70)


def test_gradients_that_nobody_asked_for(kernels, device):
    logits, *compared = (x.to(device) for x in _affinity(F64))
    compared = Compared(*compared)
    out, lse = kernels.softmax_affinity(logits, compared, 16)
    inputs = torch.ones_like(out), logits, compared, lse, 16
    *every, _ = kernels.softmax_affinity_backward(*inputs, Needed(True, True, False))
    for needed in ((False, False), (True, False), (False, True)):
        *some, _ = kernels.softmax_affinity_backward(*inputs, Needed(*needed, False))
        for x, wanted, is_needed in zip(some, every, (True, *needed), strict=True):
            assert torch.equal(x, wanted) if is_needed else x is None


def test_softmax_affinity_does_not_overflow(kernels, device):
    inputs = _affinity(F32, scale=100.0)
    probe = _probe(inputs[0], inputs[2])
    out, expected = _softmax(kernels, device, inputs, probe, 16)[0], _expected_softmax(*inputs, probe)[0]
    # Similarities of 10^4 carry a rounding error of 10^-3, and softmax is nearly one-hot.
    assert (out.cpu().double() - expected).abs().max() < 1e-2


def test_similarities_far_below_zero(kernels, device):
    # A padded pixel has similarity 0, whose probability would overflow beside these.
    logits, queries, keys = _affinity(F32, M=5, K=3, scale=0.3)
    queries[:, :, 0], keys[:, :, 0] = 10, -10
    probe = _probe(logits, keys)
    expected = _expected_softmax(logits, queries, keys, probe)
    assert expected[1].max() < -90
    actual = _softmax(kernels, device, (logits, queries, keys), probe, 16)
    _check(actual, expected, ["propagation", "propagation", *["gradient"] * 3], F32)


# ---------------------------------------------------------------------------------------------------------------------
# Float32 in pieces


@pytest.fixture
def tf32():
    """Products of float32 may have fewer bits."""
    before = torch.get_float32_matmul_precision()
    yield lambda allowed=True: torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.set_float32_matmul_precision(before)


def _rounded(x, bits):
    mantissa, exponent = torch.frexp(x.double())
    return torch.ldexp((mantissa * 2.0**bits).round() * 2.0**-bits, exponent)


@FORMS
@pytest.mark.parametrize("scale", [1.0, 2.0**-50, 2.0**40])
def test_products_of_one_piece_have_eleven_bits_in_any_scale(kernels, device, form, scale, tf32):
    tf32()
    a, g = (_rounded(x, 11).float() * scale if x.is_floating_point() else x for x in _pairs(form, F32, M=37, D=9))
    expected = expected_pairs(a, g)
    noise = 1 + 2.0**-14 * torch.rand(a.shape, generator=torch.Generator().manual_seed(0)).sub(0.5)
    value, gradient = kernels.pairwise_l1((a * noise).to(device), g.to(device), 16, True)
    largest = expected[0].max()
    assert_close(value / largest, expected[0] / largest, "loss")
    assert_close(gradient / scale, expected[1] / scale, "gradient")


def _one_pair(kernels, device, x):
    """What comes of one pixel and one anchor with the similarity x^2, whose labels differ."""
    a = torch.tensor([[[x]]], dtype=F32, device=device)
    g, h = (torch.tensor([[label]], dtype=torch.int32, device=device) for label in (0, 1))
    return [y.item() for y in kernels.pairwise_l1_cross(a, g, a.clone(), h, None, True)]


def test_two_pieces_have_twenty_two_bits(kernels, device, tf32):
    x = 1 + 2.0**-13  # in float16: 1 and 2^-13
    value, *gradients = _one_pair(kernels, device, x)
    assert abs(value - x * x) < 2.0**-22
    assert gradients == [x, x]
    tf32()
    assert _one_pair(kernels, device, x) == [1, 1, 1]


def _softmax_of_two(kernels, device, similarity, logit):
    """What a source of one ``logit`` gives to two targets whose similarities with it differ by ``similarity``^2."""
    tensors = [[[logit]]], [[[similarity]]], [[[similarity], [0.0]]]
    inputs = [torch.tensor(x, dtype=F32) for x in tensors]
    out, _, gradient, *_ = _softmax(kernels, device, inputs, torch.full((1, 2, 1), logit), None)
    return out[0, 0].item(), gradient.item()


def test_the_pieces_of_the_softmax(kernels, device, tf32):
    x = 1 + 2.0**-9 + 2.0**-18  # in bfloat16: 1, 2^-9 and 2^-18
    wanted = x * torch.sigmoid(torch.tensor(x * x, dtype=F64)).item()
    out, gradient = _softmax_of_two(kernels, device, x, x)
    assert abs(out / wanted - 1) < 3e-7
    assert abs(gradient / x - 1) < 3e-7
    tf32()
    reduced, _ = _softmax_of_two(kernels, device, x, x)
    assert 2.0**-22 < abs(reduced / wanted - 1) < 2.0**-15


@pytest.mark.exhaustive
def test_two_pieces_of_the_softmax_have_sixteen_bits(kernels, device, tf32):
    tf32()
    inputs = _affinity(F32, M=37, K=20)
    probe = _probe(inputs[0], inputs[2])
    for x, y in zip(_softmax(kernels, device, inputs, probe, 16), _expected_softmax(*inputs, probe), strict=True):
        assert (x.cpu() - y).abs().max() < 2.0**-14 * y.abs().max()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("allowed", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_image_alone_is_not_finite(kernels, device, value, allowed, tf32):
    tf32(allowed)
    a, g = (x.to(device) for x in _pairs("features", F32, M=20))
    expected = kernels.pairwise_l1(a, g, 16, True)
    a[0, 2, 1] = value
    loss, gradient = kernels.pairwise_l1(a, g, 16, True)
    assert not loss[0].isfinite()
    assert torch.equal(loss[1], expected[0][1])
    assert torch.equal(gradient[1], expected[1][1])
    logits, queries, keys = (x.to(device) for x in _affinity(F32))
    logits[0, 2, 1] = value
    assert not kernels.softmax_affinity(logits, Compared(queries, keys), 16)[0][0, :, 1].isfinite().any()


# ---------------------------------------------------------------------------------------------------------------------
# Blocks and what does not fit


def test_more_channels_than_fit(kernels, device):
    x = torch.zeros(1, 3, 5000, device=device)
    with pytest.raises(ValueError, match=r"backend='triton' .* of 8192 channels .* KiB .*backend='auto'"):
        kernels.pairwise_l1(x, torch.zeros(1, 3, dtype=torch.int32, device=device), None, True)
    with pytest.raises(ValueError, match=r"backend='triton' .* of 8192 channels .* KiB .*backend='auto'"):
        kernels.softmax_affinity(x, Compared(x, x), None)


def test_float64_needs_a_newer_triton(kernels, device, monkeypatch):
    from dlprop._kernels import triton_blocks

    monkeypatch.setattr(triton_blocks, "VERSION", (3, 4))
    logits, *compared = (x.to(device) for x in _affinity(F64))
    with pytest.raises(ValueError, match=r"backend='triton' .*float64 from Triton 3\.5 .*backend='auto'"):
        kernels.softmax_affinity(logits, Compared(*compared), None)


def test_blocks_too_large_for_the_compiler_give_way_to_smaller_ones(kernels, monkeypatch):
    from triton.runtime.errors import OutOfResources

    tried = []
    launch = kernels.launch

    def with_little_memory(kernel, grid, operands, blocks, *args, **constants):
        tried.append(blocks.owned)
        if blocks.owned > limit:
            raise OutOfResources(2, 1, "shared memory")
        launch(kernel, grid, operands, blocks, *args, **constants)

    monkeypatch.setattr(kernels, "launch", with_little_memory)
    limit = 32
    _check_pairs(kernels, torch.device("cpu"), "labels", F32, None, M=37)
    assert tried[0] == 128
    assert tried[-1] == 32
    limit = 0
    with pytest.raises(ValueError, match=r"backend='triton' cannot run here: .*backend='auto'"):
        _check_softmax(kernels, torch.device("cpu"), F32, None)


@pytest.mark.parametrize("pixels", [1, 15, 16, 17, 64, 1000, 100_003])
@pytest.mark.parametrize("images", [1, 3])
def test_every_program_has_a_step_to_walk(kernels, pixels, images):
    from dlprop._kernels.triton_blocks import BLOCKS, grid_of

    owners, visits = torch.empty(images, 40, 0), torch.empty(images, pixels, 0)
    for blocks in BLOCKS:
        owned, splits, count = grid_of(owners, visits, blocks)
        steps = -(-pixels // blocks.visited)
        steps_of_one = -(-steps // splits)  # as the device code has it
        assert (splits - 1) * steps_of_one < steps <= splits * steps_of_one
        assert (owned, count) == (-(-40 // blocks.owned), images)
        assert blocks.owned % blocks.visited == 0


# ---------------------------------------------------------------------------------------------------------------------
# As ops


@pytest.mark.exhaustive
@FORMS
def test_strides_and_empty_batches(device, form):
    rows, target = (x.to(device) for x in _pairs(form, F64, M=20))
    value, gradient, _ = OPS.pairwise_l1(
        rows.mT.contiguous().mT, target.repeat_interleave(2, dim=1)[:, ::2], None, None, 16, "triton", True
    )
    _check((value, gradient), expected_pairs(rows, target), ("loss", "gradient"), F64)
    outputs = OPS.pairwise_l1(rows[:0], target[:0], None, None, None, "triton", True)
    assert [tuple(x.shape) for x in outputs] == [(0,), (0, 20, 5), (0,)]
    logits, queries, keys = (x[:0].to(device).requires_grad_() for x in _affinity(F64))
    out = OPS.softmax_affinity(logits, queries, keys, None, False, None, "triton")[0]
    out.sum().backward()
    assert out.shape == (0, 4, 3)
    assert keys.grad.shape == keys.shape


@FORMS
def test_autocast_does_not_reach_inside(device, form):
    rows, target = (x.to(device) for x in _pairs(form, F32))
    inputs = _affinity(F32)
    with torch.autocast(device.type, dtype=BF16):
        outputs = OPS.pairwise_l1(rows, target, None, None, 16, "triton", True)[:2]
        out = OPS.softmax_affinity(*(x.to(device) for x in inputs), None, False, 16, "triton")[0]
    _check(outputs, expected_pairs(rows, target), ("loss", "gradient"), F32)
    _check([out], _expected_softmax(*inputs, _probe(inputs[0], inputs[2]))[:1], ["propagation"], F32)


@pytest.mark.exhaustive
def test_a_result_is_the_same_every_time(device):
    rows, target = (x.to(device) for x in _pairs("features", F32, N=1, M=50))
    inputs = [x.to(device).requires_grad_() for x in _affinity(F32, N=1, M=20, K=40)]
    runs = []
    for _ in range(2):
        out = OPS.softmax_affinity(*inputs, None, False, 16, "triton")[0]
        pairs = OPS.pairwise_l1(rows, target, None, None, 16, "triton", True)
        runs.append((*pairs, out, *torch.autograd.grad(out.square().sum(), inputs)))
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


_ALL_CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.exhaustive
@FORMS
def test_opcheck_of_the_pairs(device, form):
    inputs = [x.to(device) for x in _cross(form, F64)]
    leaf = inputs[0].clone().requires_grad_()
    # The last of the checks would differentiate the gradients, which are outputs.
    opcheck(OPS.pairwise_l1.default, (leaf, inputs[1], None, None, 16, "triton", True), test_utils=_ALL_CHECKS[:3])
    opcheck(OPS.pairwise_l1.default, (*inputs, None, "triton", True), test_utils=_ALL_CHECKS)


# opcheck itself looks at the .grad of tensors that are no leaves, and torch warns about it.
@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_opcheck_of_the_affinity(device):
    inputs = [x.to(device) for x in _affinity(F64)]
    leaves = [x.clone().requires_grad_() for x in inputs]
    opcheck(OPS.softmax_affinity.default, (*leaves, None, False, None, "triton"), test_utils=_ALL_CHECKS)
    out, lse = OPS.softmax_affinity(*inputs, None, False, 16, "triton")
    arguments = (torch.ones_like(out), *inputs, None, out, lse, False, 16, "triton", False, True, False)
    opcheck(OPS.softmax_affinity_backward.default, arguments, test_utils=_ALL_CHECKS)


@pytest.mark.exhaustive
def test_gradcheck(device):
    rows, target = (x.to(device) for x in _pairs("labels", F64, N=1, M=4, D=3))
    loss = OPS.pairwise_l1
    assert gradcheck(lambda x: loss(x, target, None, None, 16, "triton", True)[0], rows.requires_grad_())
    inputs = tuple(x.to(device).requires_grad_() for x in _affinity(F64, N=1, C=2, E=3, M=4, K=3))
    assert gradcheck(lambda *x: OPS.softmax_affinity(*x, None, False, 16, "triton")[0], inputs)


# ---------------------------------------------------------------------------------------------------------------------
# Through the public interface, against the tiled kernels


def _assert_alike(module_of, tensors, kind="gradient"):
    """Values and gradients of two modules, whose random numbers are the same."""
    results = []
    for backend in ("triton", "tiled"):
        leaves = [x.clone().requires_grad_(x.is_floating_point()) for x in tensors]
        torch.manual_seed(3)
        out = module_of(backend)(*leaves)
        wanted = [x for x in leaves if x.requires_grad]
        weights = torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype, device=out.device).view(out.shape)
        results.append((out, *torch.autograd.grad(out, wanted, weights, materialize_grads=True)))
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected.detach().cpu(), kind)


@FORMS
@pytest.mark.parametrize(
    ("dtype", "options"),
    [(F32, {}), (F64, {}), (F64, {"num_anchors": 4}), (F64, {"chunk_size": 16, "reduction": "sum"})],
)
def test_the_loss(device, form, dtype, options):
    feats = normal(2, 9, 3, 5, dtype=dtype, device=device)
    target = normal(2, 9, 3, 5, seed=1, dtype=dtype, device=device)
    if form == "labels":
        target = torch.randint(3, (2, 6, 10), device=device)
        target[:, :2, :3] = 255
    mask = torch.rand(2, *target.shape[-2:], device=device) < 0.75
    options = {"reduction": "none"} | options
    for m in (None, mask):
        _assert_alike(lambda b, m=m: lambda x: DerivativeLoss(backend=b, **options)(x, target, mask=m), [feats])


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (F32, {}),
        pytest.param(F64, {}, marks=pytest.mark.exhaustive),
        (F64, {"similarity": "cosine", "weights": (5.0, 3.0)}),
        pytest.param(F64, {"normalize": None}, marks=pytest.mark.exhaustive),
    ],
)
def test_the_propagation(device, dtype, options):
    logits, coarse = (normal(2, 3, *grid, dtype=dtype, device=device) for grid in ((8, 9), (4, 5)))
    feats, other = (normal(2, 7, *grid, dtype=dtype, device=device, seed=1) for grid in ((4, 5), (3, 3)))
    mask = torch.rand(2, 8, 9, device=device) < 0.5

    def propagation(backend, resolution="feats"):
        return DerivativeLabelPropagation(Softmax(backend=backend, **options), resolution=resolution)

    # float32 features keep the rounding of a sum that nearly cancels: a gradient of the softmax sums to 0.
    kind = "gradient" if dtype == F64 else "propagation"
    _assert_alike(propagation, [coarse, feats], kind)
    _assert_alike(propagation, [coarse, feats, other], kind)
    _assert_alike(lambda b: lambda *x: propagation(b)(*x, mask=mask), [logits, feats], kind)
    _assert_alike(lambda b: lambda *x: propagation(b, "logits")(*x, mask=mask), [logits, feats], kind)


@pytest.mark.exhaustive
def test_compiled(device):
    feats, labels = normal(2, 11, 3, 5, device=device), torch.randint(3, (2, 3, 5), device=device)
    logits = normal(2, 3, 3, 5, device=device)
    for module, inputs in (
        (DerivativeLoss(backend="triton"), (feats, labels)),
        (DerivativeLabelPropagation(Softmax(backend="triton")), (logits, feats)),
    ):
        expected = module(*inputs)
        assert_close(torch.compile(module, fullgraph=True, backend="aot_eager")(*inputs), expected.cpu(), "propagation")


@pytest.mark.exhaustive
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
            out = DerivativeLabelPropagation(Softmax(backend="triton"))(feats, feats)
            (DerivativeLoss(backend="triton")(feats, labels) + out.square().mean()).backward()
            grads.append(layer.weight.grad)
        assert grads[0].count_nonzero() > 0
        assert torch.equal(*grads)
    finally:
        torch.distributed.destroy_process_group()


# ---------------------------------------------------------------------------------------------------------------------
# Deliberately wrong kernels: the source with one mistake, and the case that must notice

DEVICE_MUTANTS = {
    "target forgotten": ("R -= _similarities(", "R -= 0 * _similarities(", "features"),
    "target added": ("R -= _similarities(", "R += _similarities(", "features"),
    "last step of each walk dropped": ("min(start + walk, visits)", "min(start + walk, visits) - VISITED", "labels"),
    "walks overlap": ("start = tl.program_id(1) * walk", "start = tl.program_id(1) * (walk - VISITED)", "labels"),
    "residual for its sign": ("tl.where(R > 0, 1.0, tl.where(R < 0, -1.0, 0.0))", "R", "labels"),
    "other image's pixels": ("+ first * CHANNELS", "+ first * CHANNELS * 0", "labels"),
    "pads of owners for those of the visited": ("tl.cdiv(visits, OWNED) * OWNED", "row_pad", "cross"),
    "another part of the result": ("part = tl.program_id(1) * images + n", "part = n", "labels"),
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
    "ignored pixels equal each other": ("column_target < 0, -2", "column_target < 0, -1", "labels"),
    "padded pixels equal each other": ("column_target), blocks, -2)", "column_target), blocks, -1)", "labels"),
    "gradient of one role": ("grad.mul_(2)", "grad", "features"),
    "loss in another scale": ("sums.sum(dim=(0, 2)) / (scale * scale)", "sums.sum(dim=(0, 2))", "scale"),
    "gradient in another scale": (".div_(scale[:, None, None])", "", "scale"),
    "values of the other side": ("own = logits, row_sum", "own = queries, row_sum", "softmax"),
    "row sum over the pixels": ("(logits * grad_logits).sum(dim=2)", "(logits * grad_logits)[..., 0]", "softmax"),
}
BLOCK_MUTANTS = {
    "one split": ("parts.sum(dim=0)", "parts[0]", "labels"),
    "pieces of what is not finite": (".nan_to_num_(0, 0, 0)", "", "not finite"),
    "scale of one image for all": ("scale[:, None, None]", "scale[:1, None, None]", "scale"),
}
CASES = ["labels", "features", "cross", "low", "softmax", "pieces", "softmax pieces", "scale", "not finite"]


def _check_case(kernels, device, case, tf32):
    if case == "low":
        test_similarities_far_below_zero(kernels, device)
    elif case == "cross":
        _check_cross(kernels, device, "labels", F64, 16, M=7, K=40)
    elif case == "softmax":
        _check_softmax(kernels, device, F64, 16, N=1, M=20, K=50, C=5)
    elif case == "pieces":
        test_two_pieces_have_twenty_two_bits(kernels, device, tf32)
    elif case == "softmax pieces":
        test_the_pieces_of_the_softmax(kernels, device, tf32)
    elif case == "scale":
        _check_in_scales(kernels, device)
    elif case == "not finite":
        _check_infinite_features(kernels, device)
    else:
        _check_pairs(kernels, device, case, F64, 16, M=50)


def _check_in_scales(kernels, device):
    rows, target = _pairs("labels", F32, M=20)
    rows = rows * torch.tensor([2.0**-8, 8.0])[:, None, None]
    outputs = kernels.pairwise_l1(rows.to(device), target.to(device), 16, True)
    for x, wanted, kind in zip(outputs, expected_pairs(rows, target), ("loss", "gradient"), strict=True):
        for n in range(2):
            assert_close(x[n], np.asarray(wanted)[n], kind)


def _check_infinite_features(kernels, device):
    from dlprop._kernels.triton_blocks import BLOCKS

    x = torch.tensor([[[float("inf")]]], device=device)
    # Its product with a second piece would be NaN.
    assert kernels.laid_out(x, kernels.operands_of(F32, BF16), BLOCKS[-1])[1:].count_nonzero() == 0
    assert not kernels.pairwise_l1(x, torch.zeros(1, 1, dtype=torch.int32, device=device), None, False)[0].isfinite()


@pytest.fixture
def two_steps(kernels, monkeypatch):
    """Walks of two steps, however many programs the device would have."""

    def grid_of(owners, visits, blocks):
        steps = -(-visits.shape[1] // blocks.visited)
        return -(-owners.shape[1] // blocks.owned), -(-steps // 2), len(owners)

    monkeypatch.setattr(kernels, "grid_of", grid_of)
    return grid_of


@pytest.mark.usefixtures("two_steps")
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("case", CASES)
def test_the_right_kernel_passes_where_mutants_fail(kernels, device, case, tf32):
    _check_case(kernels, device, case, tf32)


def _load(module, right, wrong, tmp_path):
    """The module with a mistake."""
    source = Path(module.__file__).read_text()
    assert source.count(right) == 1
    path = tmp_path / "mutant.py"
    path.write_text(source.replace(right, wrong))
    spec = importlib.util.spec_from_file_location("dlprop._kernels.mutant", path)
    mutant = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mutant)
    return mutant


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("mistake", [*DEVICE_MUTANTS, *HOST_MUTANTS, *BLOCK_MUTANTS])
def test_a_wrong_kernel_fails(kernels, device, mistake, tmp_path, monkeypatch, two_steps, tf32):
    from dlprop._kernels import triton_blocks, triton_jit

    if mistake in DEVICE_MUTANTS:
        right, wrong, case = DEVICE_MUTANTS[mistake]
        mutant = _load(triton_jit, right, wrong, tmp_path)
        for name in ("pairwise_kernel", "log_sum_exp_kernel", "softmax_kernel"):
            monkeypatch.setattr(kernels, name, getattr(mutant, name))
    elif mistake in HOST_MUTANTS:
        right, wrong, case = HOST_MUTANTS[mistake]
        kernels = _load(kernels, right, wrong, tmp_path)
        monkeypatch.setattr(kernels, "grid_of", two_steps)
    else:
        right, wrong, case = BLOCK_MUTANTS[mistake]
        mutant = _load(triton_blocks, right, wrong, tmp_path)
        for name in ("laid_out", "sum_of_splits"):
            monkeypatch.setattr(kernels, name, getattr(mutant, name))
    with pytest.raises(AssertionError):
        _check_case(kernels, device, case, tf32)
