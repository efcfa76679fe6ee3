"""torch.compile with a full graph and without a recompile per size, and torch.export, of everything public."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim, export

from dlprop import DerivativeLabelPropagation, DerivativeLoss, derivative_similarity, finite_difference
from dlprop.affinity import Linear, Softmax
from dlprop.propagation import derivative_label_propagation
from tests.propagation_cases import NearestMean
from tests.tolerances import assert_close

D = 11
C = 3
WINDOW = Softmax(over="sources", radius=1)
# (N, H, W) of the features, no two axes alike: equal ones may share a symbol, and then part again at a later size.
SIZES = [(2, 5, 6), (3, 7, 8), (4, 6, 9), (5, 9, 7), (2, 10, 13), (6, 8, 5), (3, 12, 4), (4, 5, 11), (7, 6, 8)]
SIZES += [(2, 11, 9), (5, 4, 10), (3, 13, 14)]
SQUARES = [(2, edge, edge) for edge in range(5, 17)]


def _feats(size, seed=0, D=D):
    N, H, W = size
    return torch.randn(N, D, H, W, generator=torch.Generator().manual_seed(seed))


def _target_feats(size):
    N, H, W = size
    return _feats((N, H + 3, W + 2), seed=1)


def _logits(size, scale=1):
    N, H, W = size
    return _feats((N, scale * H + scale - 1, scale * W + scale - 1), seed=2, D=C)


def _mask(size, scale=1):
    return _logits(size, scale)[:, 0] > -1


def _labels(size, scale=1):
    labels = (3 * _logits(size, scale)[:, 0].abs()).long()
    return torch.where(_mask(size, scale), labels, 255)


def _query(size):
    return torch.arange(0, size[1] * size[2], 4)


CASES = {
    "finite_difference": (finite_difference, lambda s: [_feats(s)]),
    "finite_difference laplacian": (
        lambda x: finite_difference(x, 2, dim=-3, scheme="laplacian"),
        lambda s: [_feats(s)],
    ),
    "derivative_similarity": (derivative_similarity, lambda s: [_feats(s)]),
    "derivative_similarity cosine": (
        lambda x, y: derivative_similarity(x, y, similarity="cosine", normalize="softmax", scheme="sum"),
        lambda s: [_feats(s), _target_feats(s)],
    ),
    "derivative_similarity query": (
        lambda x, query: derivative_similarity(x, order=2, scheme="central", query=query),
        lambda s: [_feats(s), _query(s)],
    ),
    "propagation": (DerivativeLabelPropagation(), lambda s: [_logits(s), _feats(s)]),
    # Non-negative features: their degrees stay away from 0, where two orders of summation may differ by anything.
    "propagation degree": (
        DerivativeLabelPropagation(Linear(scale="degree")),
        lambda s: [_logits(s, 3), _feats(s).abs()],
    ),
    "propagation cosine": (
        DerivativeLabelPropagation(Linear(similarity="cosine", normalize="l2", scheme="laplacian")),
        lambda s: [_logits(s), _feats(s)],
    ),
    "propagation full resolution": (
        lambda logits, feats, mask: derivative_label_propagation(
            logits, feats, mask=mask, affinity=Linear(scale="mean"), resolution="logits"
        ),
        lambda s: [_logits(s, 3), _feats(s), _mask(s, 3)],
    ),
    "propagation full resolution cosine": (
        DerivativeLabelPropagation(Linear(similarity="cosine"), resolution="logits"),
        lambda s: [_logits(s, 2), _feats(s)],
    ),
    "propagation softmax": (DerivativeLabelPropagation("softmax"), lambda s: [_logits(s), _feats(s)]),
    "propagation softmax full resolution": (
        DerivativeLabelPropagation(Softmax(chunk_size=50), resolution="logits"),
        lambda s: [_logits(s, 2), _feats(s)],
    ),
    "propagation to targets": (
        DerivativeLabelPropagation(Linear(scale="degree")),
        lambda s: [_logits(s), _feats(s).abs(), _target_feats(s).abs()],
    ),
    "propagation softmax to targets": (
        lambda logits, feats, target_feats, mask: derivative_label_propagation(
            logits, feats, target_feats, mask=mask, affinity=Softmax(similarity="cosine")
        ),
        lambda s: [_logits(s, 2), _feats(s), _target_feats(s), _mask(s, 2)],
    ),
    "propagation attention": (DerivativeLabelPropagation("attention"), lambda s: [_logits(s), _feats(s)]),
    "propagation attention to targets": (
        lambda logits, feats, target_feats, mask: derivative_label_propagation(
            logits, feats, target_feats, mask=mask, affinity=Softmax(over="sources", similarity="gaussian")
        ),
        lambda s: [_logits(s, 2), _feats(s), _target_feats(s), _mask(s, 2)],
    ),
    "propagation softmax gaussian": (
        DerivativeLabelPropagation(Softmax(similarity="gaussian", normalize=None)),
        lambda s: [_logits(s), _feats(s)],
    ),
    "propagation window": (
        DerivativeLabelPropagation(Softmax(over="sources", radius=1, dilation=(1, 3), similarity="gaussian")),
        lambda s: [_logits(s), _feats(s)],
    ),
    "propagation window full resolution": (
        lambda logits, feats, target_feats, mask: derivative_label_propagation(
            logits,
            feats,
            target_feats,
            mask=mask,
            affinity=Softmax(over="sources", radius=2, similarity="cosine"),
            resolution="logits",
        ),
        lambda s: [_logits(s, 2), _feats(s), _feats(s, 1), _mask(s, 2)],
    ),
    "propagation mask": (
        lambda logits, feats, mask: derivative_label_propagation(
            logits, feats, mask=mask, affinity=Linear(scale="mean", weights=[1, 0.5, 0.25]), align_corners=False
        ),
        lambda s: [_logits(s, 2), _feats(s), _mask(s, 2)],
    ),
    "propagation of a user": (
        lambda logits, feats, mask: derivative_label_propagation(
            logits.softmax(1), feats, mask=mask, affinity=NearestMean()
        ),
        lambda s: [_logits(s, 2), _feats(s), _mask(s, 2)],
    ),
    "propagation of a user full resolution": (
        lambda logits, feats, mask: derivative_label_propagation(
            logits.softmax(1), feats, mask=mask, affinity=NearestMean(), resolution="logits"
        ),
        lambda s: [_logits(s, 2), _feats(s), _mask(s, 2)],
    ),
    "loss labels": (DerivativeLoss(), lambda s: [_feats(s), _labels(s)]),
    "loss features": (DerivativeLoss(reduction="none"), lambda s: [_feats(s), _feats(s, 1)]),
    "loss label grid": (DerivativeLoss(scheme="central"), lambda s: [_feats(s), _labels(s, 3)]),
    "loss label grid without corners": (
        DerivativeLoss(align_corners=False, normalize="softmax"),
        lambda s: [_feats(s), _labels(s, 2).to(torch.uint8)],
    ),
    "loss mask": (
        lambda feats, target, mask: DerivativeLoss(max_order=2, reduction="sum")(feats, target, mask=mask),
        lambda s: [_feats(s), _feats(s, 1), _mask(s)],
    ),
    "loss frobenius labels": (DerivativeLoss(norm="frobenius"), lambda s: [_feats(s), _labels(s, 2)]),
    "loss frobenius features": (DerivativeLoss(norm="frobenius"), lambda s: [_feats(s), _feats(s, 1)]),
    "loss anchors": (DerivativeLoss(num_anchors=7), lambda s: [_feats(s), _labels(s)]),
    "loss anchors features": (DerivativeLoss(num_anchors=7), lambda s: [_feats(s), _feats(s, 1)]),
}


def _leaves(arguments):
    """The tensors that may need a gradient do; the target of a consistency loss may not get one."""
    return [x.clone().requires_grad_() if x.is_floating_point() else x for x in arguments]


def _run(function, arguments):
    """Output and gradients, with the random draws that a seed of 0 gives."""
    leaves = _leaves(arguments)
    torch.manual_seed(0)
    out = function(*leaves)
    (out * torch.linspace(0.5, 1.5, out.numel()).reshape(out.shape)).sum().backward()
    return out.detach(), [x.grad for x in leaves if x.is_floating_point()]


def _assert_same(actual, expected):
    assert_close(actual[0], expected[0].double(), "propagation")
    for x, y in zip(actual[1], expected[1], strict=True):
        assert (x is None) == (y is None)
        if y is not None:
            assert_close(x, y.double(), "gradient")


def quick(names, *chosen, exhaustive=()):
    """Some of the names in the quick suite, more in the whole one: compiling everything takes minutes."""

    def marks(name):
        slow = [] if name in chosen else [pytest.mark.slow]
        return [*slow, pytest.mark.exhaustive] if name in exhaustive else slow

    return pytest.mark.parametrize("name", [pytest.param(name, marks=marks(name)) for name in names])


# The kernels and gradients of these are those of other cases: their graphs are captured and run, but not traced through
# autograd once more, which takes two thirds of the time.
CAPTURED = {
    *("derivative_similarity cosine", "derivative_similarity query"),
    *("propagation degree", "propagation cosine", "propagation full resolution cosine", "propagation to targets"),
    *("propagation softmax full resolution", "propagation of a user", "propagation of a user full resolution"),
    *("loss label grid", "loss label grid without corners", "loss mask", "loss frobenius features"),
    "loss anchors features",
}


# Likewise, with masks and grids of two sizes.
GRAPHS = {"propagation mask", "propagation full resolution"}


@quick(
    CASES,
    *("derivative_similarity", "propagation", "propagation softmax", "loss labels", "loss features"),
    *("propagation attention", "propagation window"),
    exhaustive=CAPTURED
    | {"propagation softmax to targets", "propagation softmax gaussian", "loss frobenius labels"}
    | {"propagation attention to targets", "propagation window full resolution"}
    | GRAPHS
    | {"finite_difference laplacian", "loss anchors"},
)
def test_compiles_into_one_graph_without_a_recompile_per_size(name):
    function, arguments = CASES[name]
    compilations = CompileCounterWithBackend("eager" if name in CAPTURED | GRAPHS else "aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=compilations)
    for seen, size in enumerate(SIZES):
        _assert_same(_run(compiled, arguments(size)), _run(function, arguments(size)))
        # The first size is compiled as it is, the second one for all sizes.
        assert compilations.frame_count <= min(seen + 1, 2), f"recompiled at {size}"


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "propagation softmax",
        *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("propagation window", "loss labels")),
    ],
)
def test_square_images_do_not_recompile_either(name):
    function, arguments = CASES[name]
    compilations = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=compilations)
    for size in SQUARES:
        _assert_same(_run(compiled, arguments(size)), _run(function, arguments(size)))
    assert compilations.frame_count <= 2


@quick(
    ["propagation", "propagation softmax full resolution", "loss label grid"],
    "loss label grid",
    exhaustive={"propagation", "propagation softmax full resolution"},
)
def test_compiles_once_where_everything_is_dynamic(name):
    # Then the numbers among the options (weights, eta, chunk_size) are symbols too.
    function, arguments = CASES[name]
    compilations = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=compilations, dynamic=True)
    for size in SIZES[2:6]:  # the first has no two axes alike, channels and classes included
        _assert_same(_run(compiled, arguments(size)), _run(function, arguments(size)))
    assert compilations.frame_count == 1


@pytest.mark.parametrize("name", ["propagation softmax", "loss labels"])
def test_compiled_without_gradients(name):
    function, arguments = CASES[name]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for size in SIZES[:1]:
        with torch.no_grad():
            torch.manual_seed(0)
            expected = function(*arguments(size))
            torch.manual_seed(0)
            actual = compiled(*arguments(size))
        assert not actual.requires_grad
        assert_close(actual, expected.double(), "propagation")


@pytest.mark.slow
def test_rectify_compiles():
    module = DerivativeLabelPropagation()
    compiled = torch.compile(
        lambda logits, feats: module.rectify(logits, feats, 0.25), fullgraph=True, backend="aot_eager"
    )
    for size in SIZES[:2]:
        arguments = [_logits(size), _feats(size)]
        assert_close(compiled(*arguments), module.rectify(*arguments, 0.25).double(), "propagation")


@pytest.mark.parametrize(
    "affinity",
    [
        *("linear", "softmax", "attention"),
        pytest.param(WINDOW, id="window"),
        *(pytest.param(Linear(scale=s), marks=pytest.mark.exhaustive) for s in ("mean", "degree")),
    ],
)
def test_a_mask_without_a_true_is_defined(affinity):
    """Nobody can look at its values there: zeros, or the targets' own logits for the degree; finite gradients."""

    def function(logits, feats, mask):
        return derivative_label_propagation(logits, feats, mask=mask, affinity=affinity)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    logits, feats = _leaves([_logits(SIZES[0], 2), _feats(SIZES[0])])
    out = compiled(logits, feats, torch.zeros_like(_mask(SIZES[0], 2)))
    if affinity == Linear(scale="degree"):
        assert out.abs().max() > 0
    else:
        assert (out == 0).all()
    out.sum().backward()
    assert logits.grad.isfinite().all()
    assert feats.grad.isfinite().all()


def test_a_changing_ramp_does_not_recompile():
    module = DerivativeLabelPropagation()
    compilations = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module.rectify, fullgraph=True, backend=compilations)
    arguments = [_logits(SIZES[0]), _feats(SIZES[0])]
    for epoch in range(1, 12):
        ramp = torch.tensor(epoch / 12).item()
        assert_close(compiled(*arguments, ramp), module.rectify(*arguments, ramp).double(), "propagation")
    assert compilations.frame_count <= 2


def test_a_compiled_loss_cannot_be_differentiated_twice():
    feats = _feats(SIZES[0]).requires_grad_()
    value = torch.compile(DerivativeLoss(), fullgraph=True, backend="aot_eager")(feats, _labels(SIZES[0]))
    with pytest.raises(RuntimeError, match=r"twice|double backward|not have been used|does not require grad"):
        torch.autograd.grad(torch.autograd.grad(value, feats, create_graph=True)[0].sum(), feats)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_compiled_under_autocast(dtype):
    size = SIZES[0]
    propagation, loss = DerivativeLabelPropagation(), DerivativeLoss()

    def step(logits, feats, labels):
        with torch.autocast("cpu", dtype=dtype):
            return propagation(logits, feats).square().mean() + loss(feats, labels)

    arguments = [_logits(size), _feats(size), _labels(size)]
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    expected = step(*(x.double() if x.is_floating_point() else x for x in arguments))
    assert_close(compiled(*arguments), expected.double(), "autocast", dtype=dtype)


def _has_cpp_compiler():
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return False
    return True


@pytest.mark.slow
@pytest.mark.exhaustive  # a minute of a C++ compiler; the others stop at the graphs that inductor is given
@pytest.mark.skipif(not _has_cpp_compiler(), reason="inductor needs a C++ compiler")
def test_inductor():
    """Both kinds of ops between code that inductor writes, with gradients; every file it writes takes seconds."""
    softmax, loss = DerivativeLabelPropagation(Softmax(weights=(1.0,))), DerivativeLoss(max_order=0, eta=0.0)

    def step(logits, feats, labels):
        return softmax(logits, feats).square().mean() + loss(feats, labels)

    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for size in SIZES[2:4]:  # the first has no two axes alike, so that it is compiled once
        arguments = [_logits(size), _feats(size), _labels(size)]
        _assert_same(_run(compiled, arguments), _run(step, arguments))


# ---------------------------------------------------------------------------------------------------------------------
# torch.export

# With a largest size: without one torch 2.6 finds that it must not be the largest integer.
N_, H_, W_, HEIGHT, WIDTH = (Dim(name, min=2, max=4096) for name in ("N", "H", "W", "height", "width"))
FEATS = {0: N_, 2: H_, 3: W_}
LABELS = {0: N_, 1: H_, 2: W_}
ANY_GRID = {0: N_, 2: HEIGHT, 3: WIDTH}
ANY_LABEL_GRID = {0: N_, 1: HEIGHT, 2: WIDTH}

EXPORTS = {
    "linear": (DerivativeLabelPropagation(), lambda s: [_logits(s), _feats(s)], (FEATS, FEATS)),
    "linear resized": (
        DerivativeLabelPropagation(Linear(scale="degree")),
        lambda s: [_logits(s, 2), _feats(s).abs()],
        (ANY_GRID, FEATS),
    ),
    "linear full resolution": (
        DerivativeLabelPropagation(resolution="logits"),
        lambda s: [_logits(s, 2), _feats(s)],
        (ANY_GRID, FEATS),
    ),
    "softmax": (DerivativeLabelPropagation("softmax"), lambda s: [_logits(s), _feats(s)], (FEATS, FEATS)),
    "softmax resized": (
        DerivativeLabelPropagation(Softmax(similarity="cosine")),
        lambda s: [_logits(s, 2), _feats(s)],
        (ANY_GRID, FEATS),
    ),
    "softmax full resolution": (
        DerivativeLabelPropagation("softmax", resolution="logits"),
        lambda s: [_logits(s, 2), _feats(s)],
        (ANY_GRID, FEATS),
    ),
    "attention": (DerivativeLabelPropagation("attention"), lambda s: [_logits(s), _feats(s)], (FEATS, FEATS)),
    "attention resized": (
        DerivativeLabelPropagation(Softmax(over="sources", similarity="gaussian")),
        lambda s: [_logits(s, 2), _feats(s)],
        (ANY_GRID, FEATS),
    ),
    "window": (
        DerivativeLabelPropagation(Softmax(over="sources", radius=1, dilation=(1, 2), similarity="gaussian")),
        lambda s: [_logits(s), _feats(s)],
        (FEATS, FEATS),
    ),
    "window full resolution": (
        DerivativeLabelPropagation(WINDOW, resolution="logits"),
        lambda s: [_logits(s, 2), _feats(s)],
        (ANY_GRID, FEATS),
    ),
    "loss labels": (DerivativeLoss(), lambda s: [_feats(s), _labels(s)], (FEATS, LABELS)),
    "loss label grid": (DerivativeLoss(), lambda s: [_feats(s), _labels(s, 2)], (FEATS, ANY_LABEL_GRID)),
    "loss features": (DerivativeLoss(reduction="none"), lambda s: [_feats(s), _feats(s, 1)], (FEATS, FEATS)),
    "loss frobenius": (DerivativeLoss(norm="frobenius"), lambda s: [_feats(s), _labels(s)], (FEATS, LABELS)),
    "loss anchors": (DerivativeLoss(num_anchors=5), lambda s: [_feats(s), _labels(s)], (FEATS, LABELS)),
}


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("name", ["linear full resolution", "softmax", "window", "loss label grid", "loss anchors"])
def test_exports(name, strict):
    module, arguments, _ = EXPORTS[name]
    given = tuple(arguments(SIZES[0]))
    program = export(module, given, strict=strict)
    torch.manual_seed(0)
    actual = program.module()(*given)
    torch.manual_seed(0)
    assert_close(actual, module(*given).double(), "propagation")


@quick(
    EXPORTS,
    *("linear resized", "softmax full resolution", "window", "loss label grid", "loss features"),
    exhaustive={
        *("linear", "linear full resolution", "softmax resized", "attention resized", "window full resolution"),
        *("loss labels", "loss frobenius", "loss anchors"),
    },
)
def test_exports_with_dynamic_sizes(name):
    module, arguments, shapes = EXPORTS[name]
    keywords = ("logits", "feats") if isinstance(module, DerivativeLabelPropagation) else ("feats", "target")
    program = export(module, tuple(arguments(SIZES[0])), dynamic_shapes=dict(zip(keywords, shapes, strict=True)))
    exported = program.module()
    for size in SIZES:
        given = arguments(size)
        torch.manual_seed(0)
        actual = exported(*given)
        torch.manual_seed(0)
        assert_close(actual, module(*given).double(), "propagation")


@pytest.mark.parametrize("name", ["linear", "softmax", "attention", "window", "loss labels", "loss features"])
def test_an_exported_module_trains(name):
    module, arguments, _ = EXPORTS[name]
    given = arguments(SIZES[0])
    exported = export(module, tuple(_leaves(given))).module()
    _assert_same(_run(exported, given), _run(module, given))
