"""The custom ops: what the compiler is told about them, their gradients, and every tile size against the formula."""

import itertools

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from dlprop import DerivativeLoss
from dlprop._kernels import dense, orders, tiled
from tests.tolerances import assert_close

OPS = torch.ops.dlprop
BACKENDS = ("dense", "tiled", "auto")
KERNELS = pytest.mark.parametrize("kernels", [dense, tiled], ids=["dense", "tiled"])
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


def _inputs(form, anchors, N=2, dtype=F64, device="cpu"):
    """(feats, target, anchors) of the loss's op."""
    feats, target = _pairs(form, N=N, dtype=dtype, device=device)
    if form == "features":
        target = _normal(N, 5, 7, seed=1, dtype=dtype, device=device)
    chosen = None if anchors is None else torch.tensor([[6, 0, 3], [1, 2, 5]], device=device)[:N, :anchors]
    return feats, target, chosen


def _arguments(feats, target, anchors=None, tile=3, backend="auto", sum_sparsity=False, need_grad=True):
    """All the arguments of the op, for two orders of features that are normalised already."""
    valid = None if target.is_floating_point() else target >= 0
    weight = 0.5 + torch.arange(len(feats), dtype=feats.dtype, device=feats.device)
    return (
        feats,
        target,
        valid,
        anchors,
        weight,
        weight.new_tensor(0.7),
        sum_sparsity,
        1,
        "forward",
        None,
        tile,
        backend,
        False,
        need_grad,
    )


def _loss(*inputs, **options):
    return OPS.derivative_l1(*_arguments(*inputs, **options))


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
@KERNELS
def test_pairwise_l1_at_every_tile_size(form, M, dtype, kernels, device):
    a, g = _pairs(form, M=M, dtype=dtype, device=device)
    expected = _expected_pairs(a, g)
    for tile in (None, 1, 2, 15, 36, 37, 38, 149, 3199):
        if tile == 1 and M > 40:  # thousands of tiles of one pair
            continue
        value, gradient = kernels.pairwise_l1(a, g, tile, True)
        assert_close(value, expected[0], "loss")
        assert_close(gradient, expected[1], "gradient")


@pytest.mark.parametrize("form", ["labels", "features"])
@pytest.mark.parametrize(("M", "K"), [(1, 1), (15, 4), (37, 37), (149, 16), (4, 60)])
@pytest.mark.parametrize("dtype", [F64, F32])
@KERNELS
def test_pairwise_l1_cross_at_every_tile_size(form, M, K, dtype, kernels, device):
    inputs = _cross(form, M=M, K=K, dtype=dtype, device=device)
    expected = _expected_cross(*inputs)
    for tile in (None, 3, 4, 15, 16, 37, 149, 3199):
        outputs = kernels.pairwise_l1_cross(*inputs, tile, True)
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
    value, gradient = tiled.pairwise_l1(a, g, None, True)
    expected = _expected_pairs(a, g)
    assert_close(value, expected[0], "loss")
    # A residual that rounds to the other side of 0 moves its two pixels by up to two features; there may be a few.
    wrong = np.abs(gradient.numpy() - expected[1]) > 1e-4 * np.abs(expected[1]).max()
    assert wrong.any(1).mean() < 0.01


def test_default_softmax_chunks_meet_at_their_edges():
    inputs = _affinity(N=1, M=2300, K=2500, dtype=F32)
    assert_close(OPS.softmax_affinity(*inputs, None, "auto")[0], _expected_affinity(*inputs), "propagation")


def test_softmax_over_many_tiles_of_targets(monkeypatch):
    # The tiles of targets have no option of their own: shrink the default to a few pixels.
    monkeypatch.setattr(tiled, "CPU_TILE_BYTES", 128)
    assert len(tiled._blocks(37, None, torch.empty(0, dtype=F64))) > 4
    logits, queries, keys = _affinity(M=15, K=37)
    inputs = (logits, 3 * queries, keys)
    expected, lse = dense.softmax_affinity(*inputs, None)
    for chunk in (None, 4):
        out, found = tiled.softmax_affinity(*inputs, chunk)
        assert_close(out, expected, "propagation")
        assert_close(found, lse, "propagation")
        probe = _normal(*out.shape, seed=9)
        gradients = tiled.softmax_affinity_backward(probe, *inputs, found, chunk)
        for x, y in zip(gradients, dense.softmax_affinity_backward(probe, *inputs, lse, None), strict=True):
            assert_close(x, y, "gradient")


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
    for anchors in (None, 3):
        value, gradient = _loss(*_inputs(form, anchors, N=0, device=device), backend=backend)
        assert value.shape == (0,)
        assert gradient.shape == (0, 5, 7)
    assert OPS.softmax_affinity(*_affinity(N=0, device=device), None, backend)[0].shape == (0, 3, 4)


@pytest.mark.parametrize("form", ["labels", "features"])
@KERNELS
def test_strides_do_not_matter(form, kernels):
    a, g = _pairs(form, M=20)
    strided = a.mT.contiguous().mT
    wide = g.repeat_interleave(2, dim=-1)[..., ::2]
    assert not strided.is_contiguous()
    assert not wide.is_contiguous()
    expected = _expected_pairs(a, g)
    value, gradient = kernels.pairwise_l1(strided, wide, 6, True)
    assert_close(value, expected[0], "loss")
    assert_close(gradient, expected[1], "gradient")
    inputs = _affinity()
    out = kernels.softmax_affinity(*(x.mT.contiguous().mT for x in inputs), 3)[0]
    assert_close(out, _expected_affinity(*inputs), "propagation")


@pytest.mark.parametrize("form", ["labels", "features"])
@pytest.mark.parametrize("anchors", [None, 3])
def test_strides_do_not_matter_to_the_op(form, anchors):
    feats, target, chosen = _inputs(form, anchors)
    for x, y in zip(
        _loss(feats, target, chosen),
        _loss(feats.mT.contiguous().mT, target.repeat_interleave(2, dim=-1)[..., ::2], chosen),
        strict=True,
    ):
        assert_close(y, x, "gradient")


@pytest.mark.parametrize("size", [1, 3, 7, 14, 100])
def test_passes_over_images_visit_every_pixel_once(size, monkeypatch):
    shape = (5, 7, 3)
    monkeypatch.setattr(orders, "CPU_ROWS", size)
    monkeypatch.setattr(orders, "DEVICE_BYTES", 4 * 3 * size)
    for device in ("cpu", "meta"):
        blocks = orders._blocks(torch.empty(shape, device=device))
        visits = torch.zeros(shape[:2])
        for block in blocks:
            visits[block] += 1
        assert (visits == 1).all()
    assert len(blocks) == {1: 35, 3: 15, 7: 5, 14: 3, 100: 1}[size]


@pytest.mark.parametrize("form", ["labels", "features"])
def test_passes_over_several_images_at_once_change_nothing(form, monkeypatch):
    inputs = _inputs(form, None)
    expected = _loss(*inputs)
    monkeypatch.setattr(orders, "_blocks", lambda rows: [(slice(0, 9), slice(0, 4)), (slice(0, 9), slice(4, 99))])
    for actual, wanted in zip(_loss(*inputs), expected, strict=True):
        assert_close(actual, wanted, "gradient")


@pytest.mark.parametrize("form", ["labels", "features"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_does_not_reach_inside(form, backend):
    feats, target, _ = _inputs(form, None, dtype=F32)
    inputs = _affinity(dtype=F32)
    expected = _loss(feats.double(), target.double() if form == "features" else target, backend="dense")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, gradient = _loss(feats, target, backend=backend)
        out = OPS.softmax_affinity(*inputs, 3, backend)[0]
    assert_close(value, expected[0], "loss", dtype=F32)
    assert_close(gradient, expected[1], "gradient", dtype=F32)
    assert_close(out, _expected_affinity(*inputs), "propagation", dtype=F32)
    assert value.dtype == gradient.dtype == out.dtype == F32


# ---------------------------------------------------------------------------------------------------------------------
# Autograd


@pytest.mark.parametrize("form", ["labels", "features"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(form, backend):
    # Seeds chosen so that no residual is near 0: gradcheck steps by 1e-6.
    for anchors in (None, 3):
        feats, target, chosen = _inputs(form, anchors)
        for sum_sparsity in (False, True):
            assert gradcheck(
                lambda x, target=target, chosen=chosen, sums=sum_sparsity: _loss(
                    x, target, chosen, backend=backend, sum_sparsity=sums
                )[0],
                feats.clone().requires_grad_(),
            )
    inputs = tuple(x.requires_grad_() for x in _affinity())
    assert gradcheck(lambda *x: OPS.softmax_affinity(*x, 3, backend)[0], inputs)


def _calls():
    """Every op as a function of the tensors that may need a gradient."""
    for form in ("labels", "features"):
        for anchors in (None, 3):
            feats, target, chosen = _inputs(form, anchors)
            call = lambda x, target=target, chosen=chosen: _loss(x, target, chosen)[0]  # noqa: E731
            yield f"derivative_l1 {form} anchors={anchors}", call, (feats,)
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
        ((name, args),) = recorder.calls
        assert name == "dlprop::derivative_l1"
        assert args[-1] is wanted


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("anchors", [None, 3])
def test_without_gradient_the_value_is_the_same(backend, anchors):
    inputs = _inputs("features", anchors)
    with_gradient = _loss(*inputs, backend=backend)
    without = _loss(*inputs, backend=backend, need_grad=False)
    assert torch.equal(with_gradient[0], without[0])
    assert without[1].numel() == 0


def test_the_affinity_computes_only_the_gradients_that_are_asked_for():
    for wanted in itertools.product((True, False), repeat=3):
        if not any(wanted):
            continue
        inputs = [x.requires_grad_(need) for x, need in zip(_affinity(), wanted, strict=True)]
        out = OPS.softmax_affinity(*inputs, 3, "auto")[0]
        with _Recorder() as recorder:
            out.sum().backward()
        ((name, args),) = recorder.calls
        assert name == "dlprop::softmax_affinity_backward"
        assert args[-2:] == wanted[1:]
        assert [x.grad is not None for x in inputs] == list(wanted)


def test_labels_of_fractions_in_closed_form():
    # Ignored pixels, a class of one pixel, labels far apart.
    a, labels = _pairs("labels", M=40)
    labels = torch.where(labels == 2, 2**40, labels)
    labels[:, 3] = 7
    a = a.abs() / a.abs().sum(dim=1, keepdim=True) * (labels >= 0)[:, None]
    expected = tiled.pairwise_l1(a, labels, None, True)
    value, gradient = orders.label_l1_of_fractions(a, labels, True)
    assert_close(value, expected[0], "loss")
    # Where nothing is compared both may have any gradient: pixels that take part in no pair.
    counted = (labels >= 0)[:, None]
    assert_close(gradient * counted, expected[1] * counted, "gradient")
    assert orders.label_l1_of_fractions(a, labels, False)[1] is None


@pytest.mark.parametrize(("normalize", "sign"), [("l1", 1), ("softmax", 1), ("l1", -1), ("l2", 1), (None, 1)])
def test_the_closed_form_is_taken_only_where_it_holds(normalize, sign, monkeypatch):
    taken = []
    closed_form = orders.label_l1_of_fractions
    monkeypatch.setattr(orders, "label_l1_of_fractions", lambda *x: (taken.append(1), closed_form(*x))[1])
    feats, labels = _normal(2, 5, 7, seed=3).abs(), torch.arange(14).reshape(2, 7) % 3
    feats[0, 2, 1] *= sign
    leaf = feats.requires_grad_()
    value = DerivativeLoss(normalize=normalize)(leaf, labels)
    (gradient,) = torch.autograd.grad(value, leaf)
    assert bool(taken) == (normalize in ("l1", "softmax") and sign == 1)
    dense_value = DerivativeLoss(normalize=normalize, backend="dense")(leaf, labels)
    assert_close(value, dense_value.detach(), "loss")
    assert_close(gradient, torch.autograd.grad(dense_value, leaf)[0], "gradient")


# ---------------------------------------------------------------------------------------------------------------------
# What the compiler is told

_ALL_CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
# With need_grad the gradient is an output too, and differentiating that one raises on purpose.
_CHECKS_OF_PAIRS = _ALL_CHECKS[:3]


@pytest.mark.parametrize("form", ["labels", "features"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tile", [None, 3])
@pytest.mark.parametrize("anchors", [None, 3])
def test_opcheck_of_the_pairs(form, backend, tile, anchors, device):
    inputs = _inputs(form, anchors, device=device)
    op = OPS.derivative_l1.default
    leaf = inputs[0].clone().requires_grad_()
    opcheck(op, _arguments(leaf, *inputs[1:], tile=tile, backend=backend), test_utils=_CHECKS_OF_PAIRS)
    opcheck(op, _arguments(*inputs, tile=tile, backend=backend), test_utils=_ALL_CHECKS)
    opcheck(op, _arguments(*inputs, tile=tile, backend=backend, need_grad=False), test_utils=_ALL_CHECKS)


# opcheck itself looks at the .grad of tensors that are no leaves, and torch warns about it.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chunk", [None, 3])
def test_opcheck_of_the_affinity(backend, chunk, device):
    inputs = _affinity(device=device)
    leaves = tuple(x.clone().requires_grad_() for x in inputs)
    opcheck(OPS.softmax_affinity.default, (*leaves, chunk, backend), test_utils=_ALL_CHECKS)
    out, lse = OPS.softmax_affinity(*inputs, chunk, backend)
    arguments = (torch.ones_like(out), *inputs, lse, chunk, backend, False, True, True)
    opcheck(OPS.softmax_affinity_backward.default, arguments, test_utils=_ALL_CHECKS)


def test_every_op_is_checked_here():
    registered = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("dlprop::")}
    assert registered == {"derivative_l1", "softmax_affinity", "softmax_affinity_backward"}
