"""The custom ops: what the compiler is told about them, their gradients, and every tile size against the formula."""

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from dlprop import DerivativeLoss
from tests.tolerances import assert_close

OPS = torch.ops.dlprop
BACKENDS = ("dense", "tiled", "auto")
F64, F32 = torch.float64, torch.float32


def _normal(*shape, seed=0, dtype=F64, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=F64).to(device, dtype)


def _pairs(form, N=2, D=5, M=7, dtype=F64, device="cpu"):
    """(a, g) of the pairwise op; -1 marks ignored pixels."""
    a = _normal(N, D, M, dtype=dtype, device=device)
    if form == "features":
        return a, _normal(N, D - 1, M, seed=1, dtype=dtype, device=device)
    return a, torch.randint(-1, 3, (N, M), generator=torch.Generator().manual_seed(1)).to(device)


def _cross(form, N=2, D=5, M=7, K=3, dtype=F64, device="cpu"):
    """(a, c, g, h) of the sampled op."""
    a, g = _pairs(form, N, D, M, dtype, device)
    c, h = _pairs(form, N, D, M + K, dtype, device)
    return a, c[..., M:].contiguous(), g, h[..., M:].contiguous()


def _affinity(N=2, C=3, E=5, M=7, K=4, dtype=F64, device="cpu"):
    """(logits, queries, keys) of the softmax op."""
    shapes = ((N, C, M), (N, E, M), (N, E, K))
    return tuple(_normal(*shape, seed=seed, dtype=dtype, device=device) for seed, shape in enumerate(shapes))


def _target_similarity(g, h):
    if g.dtype.kind == "f":
        return np.swapaxes(g, 1, 2) @ h
    return ((g[:, :, None] == h[:, None, :]) & (g[:, :, None] != -1)).astype(np.float64)


def _expected_cross(a, c, g, h):
    """Sums and gradients of `sum_ik |a_i . c_k - G_ik|`, literally."""
    a, c, g, h = (x.detach().cpu().double().numpy() if x.is_floating_point() else x.cpu().numpy() for x in (a, c, g, h))
    R = np.swapaxes(a, 1, 2) @ c - _target_similarity(g, h)
    return np.abs(R).sum((1, 2)), c @ np.swapaxes(np.sign(R), 1, 2), a @ np.sign(R)


def _expected_pairs(a, g):
    value, rows, columns = _expected_cross(a, a, g, g)
    return value, rows + columns


def _expected_affinity(logits, queries, keys):
    L, Q, K = (x.detach().cpu().double().numpy() for x in (logits, queries, keys))
    S = np.swapaxes(Q, 1, 2) @ K
    P = np.exp(S - S.max(2, keepdims=True))
    return L @ (P / P.sum(2, keepdims=True))


# ---------------------------------------------------------------------------------------------------------------------
# Against the formula, at every tile size


@pytest.mark.parametrize("form", ["labels", "features"])
@pytest.mark.parametrize("M", [1, 2, 15, 37, 149])
@pytest.mark.parametrize("dtype", [F64, F32])
def test_pairwise_l1_at_every_tile_size(form, M, dtype, device):
    a, g = _pairs(form, M=M, dtype=dtype, device=device)
    expected = _expected_pairs(a, g)
    for backend in BACKENDS:
        for tile in (None, 1, 2, 15, 36, 37, 38, 149, 3199):
            if tile == 1 and M > 40:  # thousands of tiles of one pair
                continue
            value, gradient = OPS.pairwise_l1(a, g, tile, backend, True)
            assert_close(value, expected[0], "loss")
            assert_close(gradient, expected[1], "gradient")


@pytest.mark.parametrize("form", ["labels", "features"])
@pytest.mark.parametrize(("M", "K"), [(1, 1), (15, 4), (37, 37), (149, 16), (4, 60)])
@pytest.mark.parametrize("dtype", [F64, F32])
def test_pairwise_l1_cross_at_every_tile_size(form, M, K, dtype, device):
    inputs = _cross(form, M=M, K=K, dtype=dtype, device=device)
    expected = _expected_cross(*inputs)
    for backend in BACKENDS:
        for tile in (None, 3, 4, 15, 16, 37, 149, 3199):
            outputs = OPS.pairwise_l1_cross(*inputs, tile, backend, True)
            for actual, wanted, kind in zip(outputs, expected, ("loss", "gradient", "gradient"), strict=True):
                assert_close(actual, wanted, kind)


@pytest.mark.parametrize(("M", "K"), [(1, 1), (1, 5), (15, 1), (37, 37), (149, 16), (16, 149)])
@pytest.mark.parametrize("dtype", [F64, F32])
def test_softmax_affinity_at_every_chunk_size(M, K, dtype, device):
    inputs = _affinity(M=M, K=K, dtype=dtype, device=device)
    expected = _expected_affinity(*inputs)
    probe = _normal(2, 3, K, seed=9, dtype=dtype, device=device)
    reference = [x.cpu().double().clone().requires_grad_() for x in inputs]
    (reference[0] @ (reference[1].mT @ reference[2]).softmax(-1)).backward(probe.cpu().double())
    for backend in BACKENDS:
        for chunk in (None, 1, 2, 15, 36, 37, 38, 149, 3199):
            leaves = [x.clone().requires_grad_() for x in inputs]
            out = OPS.softmax_affinity(*leaves, chunk, backend)[0]
            assert_close(out, expected, "propagation")
            out.backward(probe)
            for leaf, wanted in zip(leaves, reference, strict=True):
                assert_close(leaf.grad, wanted.grad, "gradient")


@pytest.mark.parametrize("form", ["labels", "features"])
def test_default_tiles_meet_at_their_edges(form):
    # More pixels than the default tile holds, and no multiple of it.
    a, g = _pairs(form, N=1, M=1100, dtype=F32)
    value, gradient = OPS.pairwise_l1(a, g, None, "auto", True)
    expected = _expected_pairs(a, g)
    assert_close(value, expected[0], "loss")
    # A residual that rounds to the other side of 0 moves its two pixels by up to two features; there may be a few.
    wrong = np.abs(gradient.numpy() - expected[1]) > 1e-4 * np.abs(expected[1]).max()
    assert wrong.any(1).mean() < 0.01


def test_default_softmax_chunks_meet_at_their_edges():
    inputs = _affinity(N=1, M=2300, K=2500, dtype=F32)
    assert_close(OPS.softmax_affinity(*inputs, None, "auto")[0], _expected_affinity(*inputs), "propagation")


@pytest.mark.parametrize("backend", BACKENDS)
def test_softmax_affinity_does_not_overflow(backend, device):
    logits, queries, keys = _affinity(dtype=F32, device=device)
    inputs = (logits, 100 * queries, 100 * keys)
    out = OPS.softmax_affinity(*inputs, 2, backend)[0]
    # Similarities of 10^4 carry a rounding error of 10^-3, and softmax is nearly one-hot.
    assert out.isfinite().all()
    np.testing.assert_allclose(out.cpu().double(), _expected_affinity(*inputs), rtol=0, atol=1e-2)


@pytest.mark.parametrize("form", ["labels", "features"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_batch(form, backend, device):
    a, g = _pairs(form, N=0, device=device)
    value, gradient = OPS.pairwise_l1(a, g, None, backend, True)
    assert value.shape == (0,)
    assert gradient.shape == (0, 5, 7)
    outputs = OPS.pairwise_l1_cross(*_cross(form, N=0, device=device), None, backend, True)
    assert [tuple(x.shape) for x in outputs] == [(0,), (0, 5, 7), (0, 5, 3)]
    assert OPS.softmax_affinity(*_affinity(N=0, device=device), None, backend)[0].shape == (0, 3, 4)


@pytest.mark.parametrize("form", ["labels", "features"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_do_not_matter(form, backend):
    a, g = _pairs(form, M=20)
    strided = a.mT.contiguous().mT
    wide = g.repeat_interleave(2, dim=-1)[..., ::2]
    assert not strided.is_contiguous()
    assert not wide.is_contiguous()
    expected = _expected_pairs(a, g)
    value, gradient = OPS.pairwise_l1(strided, wide, 6, backend, True)
    assert_close(value, expected[0], "loss")
    assert_close(gradient, expected[1], "gradient")
    inputs = _affinity()
    out = OPS.softmax_affinity(*(x.mT.contiguous().mT for x in inputs), 3, backend)[0]
    assert_close(out, _expected_affinity(*inputs), "propagation")


@pytest.mark.parametrize("form", ["labels", "features"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_does_not_reach_inside(form, backend):
    a, g = _pairs(form, dtype=F32)
    inputs = _affinity(dtype=F32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, gradient = OPS.pairwise_l1(a, g, 3, backend, True)
        out = OPS.softmax_affinity(*inputs, 3, backend)[0]
    assert_close(value, _expected_pairs(a, g)[0], "loss", dtype=F32)
    assert_close(gradient, _expected_pairs(a, g)[1], "gradient", dtype=F32)
    assert_close(out, _expected_affinity(*inputs), "propagation", dtype=F32)
    assert value.dtype == gradient.dtype == out.dtype == F32


# ---------------------------------------------------------------------------------------------------------------------
# Autograd


@pytest.mark.parametrize("form", ["labels", "features"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(form, backend):
    # Seeds chosen so that no residual is near 0: gradcheck steps by 1e-6.
    a, g = _pairs(form)
    assert gradcheck(lambda a: OPS.pairwise_l1(a, g, 3, backend, True)[0], a.requires_grad_())
    a, c, g, h = _cross(form)
    inputs = (a.requires_grad_(), c.requires_grad_())
    assert gradcheck(lambda a, c: OPS.pairwise_l1_cross(a, c, g, h, 3, backend, True)[0], inputs)
    inputs = tuple(x.requires_grad_() for x in _affinity())
    assert gradcheck(lambda *x: OPS.softmax_affinity(*x, 3, backend)[0], inputs)


def _calls():
    """Every op as a function of the tensors that may need a gradient."""
    for form in ("labels", "features"):
        a, g = _pairs(form)
        yield f"pairwise_l1 {form}", lambda a, g=g: OPS.pairwise_l1(a, g, 3, "auto", True)[0], (a,)
        a, c, g, h = _cross(form)
        cross = lambda a, c, g=g, h=h: OPS.pairwise_l1_cross(a, c, g, h, 3, "auto", True)[0]  # noqa: E731
        yield f"pairwise_l1_cross {form}", cross, (a, c)
    yield "softmax_affinity", lambda *x: OPS.softmax_affinity(*x, 3, "auto")[0], _affinity()


CALLS = {name: (call, inputs) for name, call, inputs in _calls()}


def _leaves(inputs):
    return [x.clone().requires_grad_() for x in inputs]


@pytest.mark.parametrize("name", CALLS)
def test_repeated_backward_is_exact(name):
    call, inputs = CALLS[name]
    leaves = _leaves(inputs)
    out = call(*leaves)
    upstream = torch.linspace(-1, 2, out.numel(), dtype=F64).reshape(out.shape)
    first, second, halved = (
        torch.autograd.grad(out, leaves, scale * upstream, retain_graph=True) for scale in (1.0, 1.0, 0.5)
    )
    for x, y, z in zip(first, second, halved, strict=True):
        assert torch.equal(x, y)
        assert torch.equal(x, 2 * z)
        assert x.any()


@pytest.mark.parametrize("name", CALLS)
def test_differentiating_twice_raises(name):
    call, inputs = CALLS[name]
    leaves = _leaves(inputs)
    gradients = torch.autograd.grad(call(*leaves).square().sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        torch.autograd.grad(sum(x.sum() for x in gradients), leaves)


@pytest.mark.parametrize("name", CALLS)
def test_differentiating_twice_raises_for_each_input_alone(name):
    # The quantity whose second derivative is asked for may depend on one input only, and on it linearly.
    call, inputs = CALLS[name]
    for position in range(len(inputs)):
        values = [x.clone() for x in inputs]
        values[position].requires_grad_()
        (gradient,) = torch.autograd.grad(call(*values).sum(), values[position], create_graph=True)
        assert gradient.requires_grad
        with pytest.raises(RuntimeError, match="differentiated twice"):
            torch.autograd.grad(gradient.sum(), values[position])


@pytest.mark.parametrize("name", CALLS)
def test_a_gradient_for_one_input_only(name):
    call, inputs = CALLS[name]
    leaves = _leaves(inputs)
    together = torch.autograd.grad(call(*leaves).sum(), leaves)
    for position, expected in enumerate(together):
        values = [x.clone() for x in inputs]
        values[position].requires_grad_()
        (alone,) = torch.autograd.grad(call(*values).sum(), values[position])
        assert torch.equal(alone, expected)


@pytest.mark.parametrize("name", CALLS)
def test_inputs_are_never_modified(name):
    call, inputs = CALLS[name]
    leaves = _leaves(inputs)
    call(*leaves).sum().backward()
    for leaf, values in zip(leaves, inputs, strict=True):
        assert torch.equal(leaf, values)


class _Recorder(TorchDispatchMode):
    """Notes the arguments of every call of an op of this library."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "dlprop":
            self.calls.append((function.name(), args))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("num_anchors", [None, 3])
def test_the_loss_computes_a_gradient_only_for_those_who_will_ask(num_anchors):
    feats, labels = _normal(2, 5, 7), torch.arange(14).reshape(2, 7) % 3
    loss = DerivativeLoss(num_anchors=num_anchors)
    for wanted, leaf, mode in (
        (True, feats.clone().requires_grad_(), torch.enable_grad()),
        (False, feats, torch.enable_grad()),
        (False, feats.clone().requires_grad_(), torch.no_grad()),
    ):
        with mode, _Recorder() as recorder:
            loss(leaf, labels)
        assert len(recorder.calls) == 2  # one per order, in both cases
        for name, args in recorder.calls:
            assert name == ("dlprop::pairwise_l1" if num_anchors is None else "dlprop::pairwise_l1_cross")
            assert args[-1] is wanted


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_gradient_the_value_is_the_same(backend):
    a, g = _pairs("features")
    with_gradient = OPS.pairwise_l1(a, g, 3, backend, True)
    without = OPS.pairwise_l1(a, g, 3, backend, False)
    assert torch.equal(with_gradient[0], without[0])
    assert without[1].numel() == 0


# ---------------------------------------------------------------------------------------------------------------------
# What the compiler is told

_ALL_CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
# With need_grad the gradient is an output too, and differentiating that one raises on purpose.
_CHECKS_OF_PAIRS = _ALL_CHECKS[:3]


@pytest.mark.parametrize("form", ["labels", "features"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tile", [None, 3])
def test_opcheck_of_the_pairs(form, backend, tile, device):
    a, g = _pairs(form, device=device)
    op = OPS.pairwise_l1.default
    opcheck(op, (a.clone().requires_grad_(), g, tile, backend, True), test_utils=_CHECKS_OF_PAIRS)
    opcheck(op, (a, g, tile, backend, True), test_utils=_ALL_CHECKS)
    opcheck(op, (a, g, tile, backend, False), test_utils=_ALL_CHECKS)
    a, c, g, h = _cross(form, device=device)
    op = OPS.pairwise_l1_cross.default
    leaves = (a.clone().requires_grad_(), c.clone().requires_grad_())
    opcheck(op, (*leaves, g, h, tile, backend, True), test_utils=_CHECKS_OF_PAIRS)
    opcheck(op, (a, c, g, h, tile, backend, True), test_utils=_ALL_CHECKS)
    opcheck(op, (a, c, g, h, tile, backend, False), test_utils=_ALL_CHECKS)


# opcheck itself looks at the .grad of tensors that are no leaves, and torch warns about it.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chunk", [None, 3])
def test_opcheck_of_the_affinity(backend, chunk, device):
    inputs = _affinity(device=device)
    leaves = tuple(x.clone().requires_grad_() for x in inputs)
    opcheck(OPS.softmax_affinity.default, (*leaves, chunk, backend), test_utils=_ALL_CHECKS)
    out, lse = OPS.softmax_affinity(*inputs, chunk, backend)
    arguments = (torch.ones_like(out), *inputs, lse, chunk, backend)
    opcheck(OPS.softmax_affinity_backward.default, arguments, test_utils=_ALL_CHECKS)


def test_every_op_is_checked_here():
    registered = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("dlprop::")}
    assert registered == {"pairwise_l1", "pairwise_l1_cross", "softmax_affinity", "softmax_affinity_backward"}
