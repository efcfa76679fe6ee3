"""The custom ops: what the compiler is told about them, their gradients, transforms of them, and who answers."""

import itertools
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad, gradcheck
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from dlprop import DerivativeLabelPropagation, DerivativeLoss, _ops
from dlprop._kernels import tiled
from dlprop.affinity import Softmax
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

OPS = torch.ops.dlprop
F64, F32 = torch.float64, torch.float32
FORMS = pytest.mark.parametrize("form", ["labels", "features"])
ANCHORS = pytest.mark.parametrize("anchors", [False, True])
BACKENDS = pytest.mark.parametrize("backend", ["tiled", "auto"])
OFFSETS = ((-1, 0), (0, 0), (0, 2), (1, -1))


def _inputs(form, anchors, **shape):
    """(rows, target, columns, column_target) of the op."""
    return cross_inputs(form, **shape) if anchors else (*pair_inputs(form, **shape), None, None)


def _pairs(*inputs, tile=3, backend="auto", need_grad=True):
    return OPS.pairwise_l1(*inputs, tile, backend, need_grad)


def _affinity(logits, queries, keys, bias=None, over_sources=False, chunk=3, backend="auto"):
    return OPS.softmax_affinity(logits, queries, keys, bias, over_sources, chunk, backend)


def _attention(*inputs, **options):
    return _affinity(*inputs, over_sources=True, **options)


def _window(logits, queries, keys, bias=None):
    return OPS.window_affinity(logits, queries, keys, bias, [step for offset in OFFSETS for step in offset])


def _attention_inputs(biased=True, N=2, C=3, E=5, M=7, K=4, dtype=F64, device="cpu"):
    """(logits, queries, keys, bias): the logits are the keys', one of which has a bias of -inf."""
    shapes = (N, K, C), (N, M, E), (N, K, E), (N, K)
    *pixels, bias = (normal(*shape, seed=seed, dtype=dtype, device=device) for seed, shape in enumerate(shapes))
    bias[:, 1:2] = -torch.inf
    return *pixels, bias if biased else None


def _window_inputs(biased=True, N=2, C=3, E=5, H=3, W=4, dtype=F64, device="cpu"):
    """The same as images."""
    shapes = (N, C, H, W), (N, E, H, W), (N, E, H, W), (N, 1, H, W)
    *pixels, bias = (normal(*shape, seed=seed, dtype=dtype, device=device) for seed, shape in enumerate(shapes))
    bias[..., 1, 2] = -torch.inf
    return *pixels, bias if biased else None


# Every affinity with the inputs that it takes.
AFFINITIES = {
    "over targets": (_affinity, affinity_inputs),
    "over targets, biased": (_affinity, lambda **k: (*affinity_inputs(**k), _attention_inputs(**k)[3])),
    "over sources": (_attention, partial(_attention_inputs, biased=False)),
    "over sources, biased": (_attention, _attention_inputs),
    "window": (_window, partial(_window_inputs, biased=False)),
    "window, biased": (_window, _window_inputs),
}
every_affinity = pytest.mark.parametrize("affinity", AFFINITIES)


# ---------------------------------------------------------------------------------------------------------------------
# Against the formula


@FORMS
@ANCHORS
@BACKENDS
def test_pairwise_l1(form, anchors, backend, device):
    inputs = _inputs(form, anchors, device=device)
    expected = expected_cross(*inputs) if anchors else expected_pairs(*inputs[:2])
    outputs = _pairs(*inputs, backend=backend)
    for x, y, kind in zip(outputs, expected, ("loss", "gradient", "gradient"), strict=False):
        assert_close(x, y, kind)
    assert (outputs[2].numel() > 0) == anchors
    value, *gradients = _pairs(*inputs, backend=backend, need_grad=False)
    assert torch.equal(value, outputs[0])
    assert [x.numel() for x in gradients] == [0, 0]


@BACKENDS
@pytest.mark.parametrize("chunk", [None, 3])
def test_softmax_affinity(backend, chunk, device):
    inputs = affinity_inputs(device=device)
    out, lse = _affinity(*inputs, chunk=chunk, backend=backend)
    assert_close(out, expected_affinity(*inputs), "propagation")
    assert_close(lse, (inputs[1] @ inputs[2].mT).logsumexp(2).cpu(), "propagation")


@BACKENDS
@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("over_sources", [False, True])
def test_softmax_affinity_with_a_bias(over_sources, backend, chunk, device):
    logits, queries, keys, bias = _attention_inputs(device=device)
    S = queries @ keys.mT + bias[:, None]
    logits = logits if over_sources else normal(2, 7, 3, device=device)
    out, lse = _affinity(logits, queries, keys, bias, over_sources, chunk, backend)
    assert_close(out, ((S.softmax(2) if over_sources else S.softmax(2).mT) @ logits).cpu(), "propagation")
    assert_close(lse, S.logsumexp(2).cpu(), "propagation")
    if over_sources:  # without a source nothing is received
        out, _ = _attention(logits, queries, keys, torch.full_like(bias, -torch.inf), chunk=chunk, backend=backend)
        assert (out == 0).all()


@pytest.mark.parametrize("biased", [False, True])
def test_window_affinity(biased, device):
    logits, queries, keys, bias = _window_inputs(biased, device=device)
    N, C, H, W = logits.shape
    S = torch.full((N, H, W, len(OFFSETS)), -torch.inf, dtype=F64)
    neighbours = torch.zeros(N, H, W, len(OFFSETS), C, dtype=F64)
    for n, y, x, (o, (dy, dx)) in itertools.product(range(N), range(H), range(W), enumerate(OFFSETS)):
        if 0 <= y + dy < H and 0 <= x + dx < W:
            S[n, y, x, o] = queries[n, :, y, x] @ keys[n, :, y + dy, x + dx]
            S[n, y, x, o] += bias[n, 0, y + dy, x + dx] if biased else 0
            neighbours[n, y, x, o] = logits[n, :, y + dy, x + dx]
    out, lse = _window(logits, queries, keys, bias)
    assert_close(out, torch.einsum("nhwo,nhwoc->nchw", S.softmax(3), neighbours), "propagation")
    assert_close(lse, S.logsumexp(3)[:, None], "propagation")


@FORMS
@ANCHORS
def test_an_empty_batch(form, anchors):
    value, gradient, column_gradient = _pairs(*_inputs(form, anchors, N=0))
    assert value.shape == (0,)
    assert gradient.shape == (0, 7, 5)
    assert column_gradient.shape == ((0, 3, 5) if anchors else (0,))


@every_affinity
def test_an_empty_batch_of_an_affinity(affinity):
    op, inputs = AFFINITIES[affinity]
    leaves = _leaves(inputs(N=0))
    whole, lse = op(*inputs())
    out, none = op(*leaves)
    assert out.shape == (0, *whole.shape[1:])
    assert none.shape == (0, *lse.shape[1:])
    out.sum().backward()
    assert all(x.grad.shape == x.shape for x in leaves if x is not None)


def _strided(x):
    return None if x is None else torch.stack((x, x), dim=-1)[..., 0]


@FORMS
@ANCHORS
def test_strides_do_not_matter(form, anchors):
    inputs = _inputs(form, anchors)
    for x, y in zip(_pairs(*inputs), _pairs(*map(_strided, inputs)), strict=True):
        assert torch.equal(x, y)


@every_affinity
def test_strides_do_not_matter_to_an_affinity(affinity):
    op, inputs = AFFINITIES[affinity]
    for x, y in zip(op(*inputs()), op(*map(_strided, inputs())), strict=True):
        assert_close(x, y, "propagation")


@FORMS
@ANCHORS
def test_autocast_does_not_reach_inside(form, anchors):
    inputs = _inputs(form, anchors, dtype=F32)
    expected = _pairs(*inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = _pairs(*inputs)
    for x, y in zip(actual, expected, strict=True):
        assert x.dtype == F32
        assert torch.equal(x, y)


@every_affinity
def test_autocast_does_not_reach_inside_an_affinity(affinity):
    op, inputs = AFFINITIES[affinity]
    found = []
    for enabled in (False, True):
        leaves = _leaves(inputs(dtype=F32))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            out, lse = op(*leaves)
            (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        found.append((out, lse, *(x.grad for x in leaves if x is not None)))
    for x, y in zip(*found, strict=True):
        assert x.dtype == F32
        assert torch.equal(x, y)


# ---------------------------------------------------------------------------------------------------------------------
# Autograd


def _calls():
    """Every op as a function of the tensors that may need a gradient, and those."""
    for form, anchors in itertools.product(("labels", "features"), (False, True)):
        rows, target, _, column_target = _inputs(form, anchors)

        def call(x, target=target, columns=column_target, anchors=anchors):
            # With anchors the columns are picked from the rows, as the loss does.
            return _pairs(x, target, x[:, :3] if anchors else None, columns if anchors else None)[0]

        yield f"pairwise_l1 {form} {anchors=}", call, (rows,)
    for name, (op, inputs) in AFFINITIES.items():
        yield name, lambda *x, op=op: op(*x)[0], tuple(x for x in inputs() if x is not None)


CALLS = {name: (call, inputs) for name, call, inputs in _calls()}
every_call = pytest.mark.parametrize("name", CALLS)


def _leaves(inputs):
    return [None if x is None else x.clone().requires_grad_() for x in inputs]


@every_call
def test_gradcheck(name):
    # Seeds chosen so that no residual is near 0: gradcheck steps by 1e-6. A bias of -inf it can't step from.
    call, inputs = CALLS[name]
    inputs = [x.nan_to_num(neginf=-3.0) for x in inputs]
    assert gradcheck(call, _leaves(inputs))


@pytest.mark.parametrize("affinity", [name for name in AFFINITIES if "biased" in name])
def test_keys_with_a_bias_of_minus_infinity_receive_no_gradient(affinity):
    op, inputs = AFFINITIES[affinity]
    for everywhere in (False, True) if op is not _affinity else (False,):
        values = inputs()
        if everywhere:
            values[3].fill_(-torch.inf)
        logits, _, keys, bias = leaves = _leaves(values)
        out, _ = op(*leaves)
        out.backward(torch.linspace(-1, 2, out.numel(), dtype=F64).view_as(out))
        assert all(x.grad.isfinite().all() for x in leaves)
        left_out = bias.isneginf()
        assert (bias.grad[left_out] == 0).all()
        of_keys = keys.grad.movedim(1, -1)[left_out[:, 0]] if op is _window else keys.grad[left_out]
        assert (of_keys == 0).all()
        assert logits.grad.any() != everywhere


@every_call
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


@every_call
def test_differentiating_twice_raises_for_each_input_alone(name):
    # The quantity whose second derivative is asked for may depend on one input only, and on it linearly.
    call, inputs = CALLS[name]
    for position in range(len(inputs)):
        values = [x.clone() for x in inputs]
        values[position].requires_grad_()
        (gradient,) = torch.autograd.grad(call(*values).sum(), values[position], create_graph=True)
        assert gradient.requires_grad
        with pytest.raises(RuntimeError, match=r"dlprop.*differentiated twice"):
            torch.autograd.grad(gradient.sum(), values[position])


@every_call
def test_a_gradient_for_one_input_only(name):
    call, inputs = CALLS[name]
    leaves = _leaves(inputs)
    together = torch.autograd.grad(call(*leaves).sum(), leaves)
    for position, expected in enumerate(together):
        values = [x.clone() for x in inputs]
        values[position].requires_grad_()
        (alone,) = torch.autograd.grad(call(*values).sum(), values[position])
        assert torch.equal(alone, expected)


@every_call
def test_inputs_are_never_modified(name):
    call, inputs = CALLS[name]
    leaves = _leaves(inputs)
    call(*leaves).sum().backward()
    for leaf, values in zip(leaves, inputs, strict=True):
        assert torch.equal(leaf, values)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")  # torch calls it itself
def test_forward_mode_is_refused():
    # A custom op would drop the tangent without a word.
    rows, target = pair_inputs("features")
    calls = {
        _ops.softmax_affinity: (*affinity_inputs(), torch.zeros(2, 4, dtype=F64)),
        partial(_ops.softmax_affinity, over_sources=True): _attention_inputs(),
        partial(_ops.window_affinity, offsets=OFFSETS): _window_inputs(),
    }
    with forward_ad.dual_level():
        with pytest.raises(RuntimeError, match=r"dlprop.*forward-mode"):
            _ops.pairwise_l1(forward_ad.make_dual(rows, rows), target)
        for call, inputs in calls.items():
            for position, x in enumerate(inputs[:3]):
                dual = [*inputs[:position], forward_ad.make_dual(x, x), *inputs[position + 1 :]]
                with pytest.raises(RuntimeError, match=r"dlprop.*forward-mode"):
                    call(*dual)


@pytest.mark.xfail(torch.__version__ < "2.7", reason="the compiler of torch 2.6 drops the tangent before it calls")
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
def test_forward_mode_is_refused_when_compiled():
    """The compiler leaves a function with a tangent to Python, and compiles what it calls."""
    rows, target = pair_inputs("features")
    compiled = torch.compile(_ops.pairwise_l1, backend="eager")
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=r"dlprop.*forward-mode"):
        compiled(forward_ad.make_dual(rows, rows), target)


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
    feats, labels = normal(2, 5, 7), torch.arange(14).reshape(2, 7) % 3
    loss = DerivativeLoss(num_anchors=num_anchors)
    for wanted, leaf, mode in (
        (True, feats.clone().requires_grad_(), torch.enable_grad()),
        (False, feats, torch.enable_grad()),
        (False, feats.clone().requires_grad_(), torch.no_grad()),
    ):
        with mode, _Recorder() as recorder:
            loss(leaf, labels)
        assert [name for name, _ in recorder.calls] == ["dlprop::pairwise_l1"] * 2  # once an order
        for _, args in recorder.calls:
            rows, _, columns, _, tile, backend, need_grad = args
            assert rows.shape[:2] == (2, 7)  # pixels are rows
            assert (columns is None) == (num_anchors is None)
            assert (tile, backend, need_grad) == (None, "auto", wanted)
    with torch.no_grad(), _Recorder() as recorder:
        _ops.pairwise_l1(feats.mT.clone().requires_grad_(), labels.int())
    assert recorder.calls[0][1][-1] is False


@every_affinity
def test_an_affinity_computes_only_the_gradients_that_are_asked_for(affinity):
    op, inputs = AFFINITIES[affinity]
    given = [x for x in inputs() if x is not None]
    for wanted in itertools.product((True, False), repeat=len(given)):
        if not any(wanted):
            continue
        leaves = [x.clone().requires_grad_(need) for x, need in zip(given, wanted, strict=True)]
        out = op(*leaves, *[None] * (4 - len(leaves)))[0]
        with _Recorder() as recorder:
            out.sum().backward()
        ((name, args),) = recorder.calls
        assert name == f"dlprop::{'window' if op is _window else 'softmax'}_affinity_backward"
        assert args[-3:] == (*wanted[1:], *[False] * (4 - len(wanted)))
        assert [x.grad is not None for x in leaves] == list(wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, F32, F64])
def test_only_single_and_double_precision_reach_the_ops(dtype):
    feats, logits = normal(2, 5, 7).to(dtype).requires_grad_(), normal(2, 3, 7).to(dtype)
    with _Recorder() as recorder:
        DerivativeLoss()(feats, feats.detach().flip(1)).backward()
        DerivativeLoss(num_anchors=3)(feats, torch.zeros(2, 7, dtype=torch.int64)).backward()
        DerivativeLabelPropagation("softmax")(logits, feats).sum().backward()
        DerivativeLabelPropagation("attention")(logits, feats).sum().backward()
        window = DerivativeLabelPropagation(Softmax(over="sources", radius=1, similarity="gaussian"))
        window(logits[..., None], feats[..., None], mask=torch.arange(14).view(2, 7, 1) % 3 > 0).sum().backward()
    assert len(recorder.calls) == 2 + 2 + 2 + 2 + 2
    for _, args in recorder.calls:
        seen = {x.dtype for x in args if isinstance(x, torch.Tensor)}
        assert seen <= {F64 if dtype == F64 else F32, torch.int32}


# ---------------------------------------------------------------------------------------------------------------------
# vmap


@FORMS
@ANCHORS
@pytest.mark.parametrize("need_grad", [True, False])
def test_vmap_of_the_pairs_is_a_loop(form, anchors, need_grad):
    inputs = [x for x in _inputs(form, anchors, N=6) if x is not None]
    stacked = [x.unflatten(0, (3, 2)) for x in inputs]
    call = partial(_pairs, need_grad=need_grad)

    def op(*tensors):
        return call(*tensors, *[None] * (4 - len(tensors)))

    each = [op(*x) for x in zip(*stacked, strict=True)]
    for x, y in zip(torch.func.vmap(op)(*stacked), zip(*each, strict=True), strict=True):
        assert torch.equal(x, torch.stack(y))
    # Another axis, and a target that is the same for all.
    rows, target, *others = stacked
    given, in_dims = (rows.movedim(0, 2), target[0], *others), (2, None, *[0] * len(others))
    each = [op(x, target[0], *y) for x, *y in zip(rows, *others, strict=True)]
    for x, y in zip(torch.func.vmap(op, in_dims)(*given), zip(*each, strict=True), strict=True):
        assert torch.equal(x, torch.stack(y))


@every_affinity
def test_vmap_of_an_affinity_is_a_loop(affinity):
    op, inputs = AFFINITIES[affinity]
    stacked = [x.unflatten(0, (3, 2)) for x in inputs(N=6) if x is not None]

    def call(*x):
        return op(*x, *[None] * (4 - len(x)))

    for in_dims in itertools.product((0, None), repeat=len(stacked)):
        if not any(at == 0 for at in in_dims):
            continue
        given = [x if at == 0 else x[0] for x, at in zip(stacked, in_dims, strict=True)]
        each = zip(*(x if at == 0 else [x] * 3 for x, at in zip(given, in_dims, strict=True)), strict=True)
        expected = [torch.stack(x) for x in zip(*(call(*x) for x in each), strict=True)]
        for x, y in zip(torch.func.vmap(call, in_dims)(*given), expected, strict=True):
            assert torch.equal(x, y)


@every_affinity
def test_vmap_of_vmap_and_of_gradients(affinity):
    op, inputs = AFFINITIES[affinity]
    stacked = [x.unflatten(0, (3, 2, 2)) for x in inputs(N=12) if x is not None]
    call = partial(_ops.window_affinity, offsets=OFFSETS)
    if op is not _window:
        call = partial(_ops.softmax_affinity, over_sources=op is _attention, chunk=3, backend="auto")

    def weighed(*x):
        out = call(*x, *[None] * (4 - len(x)))
        return (out * torch.arange(out.numel(), dtype=F64).view(out.shape)).sum()

    gradients = torch.func.grad(weighed, argnums=tuple(range(len(stacked))))
    twice = torch.func.vmap(torch.func.vmap(gradients))(*stacked)
    for i, j in itertools.product(range(3), range(2)):
        leaves = _leaves([x[i, j] for x in stacked])
        for x, y in zip(twice, torch.autograd.grad(weighed(*leaves), leaves), strict=True):
            assert_close(x[i, j], y, "gradient")


# ---------------------------------------------------------------------------------------------------------------------
# Who answers


def test_every_backend_has_its_kernels():
    assert set(_ops.KERNELS) == set(get_args(_ops.Backend))
    assert _ops.KERNELS["auto"] == "tiled"  # no other kernel's speed has been measured
    for module in set(_ops.KERNELS.values()):
        assert (Path(_ops.__file__).parent / "_kernels" / f"{module}.py").is_file()


def test_kernels_are_found_through_the_table(monkeypatch):
    asked = []

    def spy(name):
        def kernel(*args):
            asked.append(name)
            return getattr(tiled, name)(*args)

        return kernel

    names = ["pairwise_l1", "pairwise_l1_cross", "softmax_affinity", "softmax_affinity_backward"]
    names += ["attention", "attention_backward"]
    monkeypatch.setitem(sys.modules, "dlprop._kernels.spy", SimpleNamespace(**{name: spy(name) for name in names}))
    monkeypatch.setitem(_ops.KERNELS, "auto", "spy")
    feats, target = normal(2, 5, 7).requires_grad_(), normal(2, 5, 7, seed=1)
    for backend in ("tiled", "auto"):
        DerivativeLoss(max_order=0, backend=backend)(feats, target)
        DerivativeLoss(max_order=0, backend=backend, num_anchors=2)(feats, target)
        for over in ("targets", "sources"):
            DerivativeLabelPropagation(Softmax(over=over, backend=backend))(target, feats).sum().backward()
        assert asked == ([] if backend == "tiled" else names)


def test_an_explicit_backend_says_what_it_lacks(monkeypatch):
    rows, target = pair_inputs("features")
    monkeypatch.setattr(_ops, "find_spec", lambda _: None)
    for call in (
        lambda: _pairs(rows, target, None, None, backend="triton"),
        lambda: _affinity(*affinity_inputs(), backend="triton"),
    ):
        with pytest.raises(ValueError, match=r"backend='triton' cannot run here: Triton is not installed.*'auto'"):
            call()


# ---------------------------------------------------------------------------------------------------------------------
# What the compiler is told

_ALL_CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
# With need_grad the gradient is an output too, and differentiating that one raises on purpose.
_CHECKS_OF_LEAVES = _ALL_CHECKS[:3]


@FORMS
@ANCHORS
@BACKENDS
def test_opcheck_of_the_pairs(form, anchors, backend, device):
    rows, *others = _inputs(form, anchors, device=device)
    op = OPS.pairwise_l1.default
    leaf = rows.clone().requires_grad_()
    opcheck(op, (leaf, *others, 3, backend, True), test_utils=_CHECKS_OF_LEAVES)
    opcheck(op, (rows, *others, None, backend, True), test_utils=_ALL_CHECKS)
    opcheck(op, (rows, *others, 3, backend, False), test_utils=_ALL_CHECKS)


def _backward_call(op, inputs):
    """The op of the gradient with the arguments that autograd gives it."""
    out = op(*_leaves(inputs))[0]
    with _Recorder() as recorder:
        out.sum().backward()
    ((name, args),) = recorder.calls
    args = tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in args)
    return getattr(OPS, name.split("::")[1]).default, args


# opcheck itself looks at the .grad of tensors that are no leaves, and torch warns about it.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@every_affinity
def test_opcheck_of_an_affinity(affinity, device):
    op, inputs = AFFINITIES[affinity]
    tensors = inputs(device=device)
    with _Recorder() as recorder:
        op(*tensors)
    ((name, args),) = recorder.calls
    opcheck(getattr(OPS, name.split("::")[1]).default, (*_leaves(args[:4]), *args[4:]), test_utils=_ALL_CHECKS)
    backward, args = _backward_call(op, tensors)
    for need in ((False, True, False), (True, False, args[4] is not None)):
        opcheck(backward, (*args[:-3], *need), test_utils=_ALL_CHECKS)


def test_every_op_is_checked_here():
    registered = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("dlprop::")}
    affinities = {f"{name}_affinity{which}" for name in ("softmax", "window") for which in ("", "_backward")}
    assert registered == {"pairwise_l1"} | affinities


def _wrong_pairs():
    rows, target, columns, column_target = cross_inputs("features")
    yield "another batch of targets", (rows, target[:1], None, None)
    yield "another number of targets", (rows, target[:, 1:], None, None)
    yield "half precision", (rows.half(), target.half(), None, None)
    yield "columns without a target", (rows, target, columns, None)
    yield "a target without columns", (rows, target, None, column_target)


def _wrong_affinities():
    logits, queries, keys = affinity_inputs()
    yield "another number of logits", (logits[:, 1:], queries, keys)
    yield "another batch of logits", (logits[:1], queries, keys)
    yield "keys of another width", (logits, queries, keys[..., 1:])
    yield "a bias of the queries", (logits, queries, keys, torch.zeros(2, 7))


def _wrong_attentions():
    logits, queries, keys, bias = _attention_inputs()
    yield "logits of the queries", (queries[..., :3], queries, keys, bias)
    yield "another batch of keys", (logits, queries, keys[:1], bias)
    yield "a bias without a batch", (logits, queries, keys, bias[0])


def _wrong_windows():
    logits, queries, keys, bias = _window_inputs()
    yield "logits of another grid", (logits[..., 1:], queries, keys, bias)
    yield "keys of another grid", (logits, queries, keys.mT, bias)
    yield "keys of another width", (logits, queries, keys[:, 1:], bias)
    yield "another batch of logits", (logits[:1], queries, keys, bias)
    yield "a bias of another grid", (logits, queries, keys, bias[..., 1:])


WRONG = {f"pairs: {name}": (_pairs, x) for name, x in _wrong_pairs()}
WRONG |= {f"affinity: {name}": (_affinity, x) for name, x in _wrong_affinities()}
WRONG |= {f"attention: {name}": (_attention, x) for name, x in _wrong_attentions()}
WRONG |= {f"window: {name}": (_window, x) for name, x in _wrong_windows()}


@pytest.mark.parametrize("name", WRONG)
def test_the_compiler_refuses_what_disagrees(name):
    op, inputs = WRONG[name]
    mode = FakeTensorMode()
    fakes = [None if x is None else mode.from_tensor(x) for x in inputs]
    with mode, pytest.raises(RuntimeError, match=r"must|together"):
        op(*fakes)


@every_affinity
def test_the_compiler_is_told_how_results_lie_in_memory(affinity):
    op, inputs = AFFINITIES[affinity]
    mode = FakeTensorMode()
    fakes = [None if x is None else mode.from_tensor(x) for x in inputs()]
    with mode:
        told = [x.stride() for x in op(*fakes)]
    assert told == [x.stride() for x in op(*inputs())]


@every_affinity
def test_what_is_handed_out_may_be_changed_in_place(affinity):
    inputs = [x if x is None else x.requires_grad_() for x in AFFINITIES[affinity][1]()]
    inputs = (*inputs, None)[:4]
    if affinity.startswith("window"):
        out = _ops.window_affinity(*inputs, OFFSETS)
    else:
        out = _ops.softmax_affinity(*inputs, over_sources=affinity.startswith("over sources"))
    queries = inputs[1]
    (wanted,) = torch.autograd.grad(2 * out.sum(), queries, retain_graph=True)
    (found,) = torch.autograd.grad(out.mul_(2).sum(), queries)
    assert torch.equal(found, wanted)


@every_affinity
def test_the_compiler_refuses_a_gradient_of_another_shape(affinity):
    backward, (grad, *args) = _backward_call(AFFINITIES[affinity][0], AFFINITIES[affinity][1]())
    mode = FakeTensorMode()
    args = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in args]
    grad = mode.from_tensor(grad)
    with mode:
        backward(grad, *args)
        for wrong in (grad[1:], grad[:, 1:], grad[..., 1:]):
            with pytest.raises(RuntimeError, match="must"):
                backward(wrong, *args)
