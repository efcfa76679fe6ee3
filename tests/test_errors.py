"""Every mistake a user can make: the error's kind, and that it names the argument, what was expected and what came."""

import re
from collections import OrderedDict
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from dlprop import (
    DerivativeLabelPropagation,
    DerivativeLoss,
    MomentumAverager,
    derivative_similarity,
    finite_difference,
    theory,
)
from dlprop.affinity import Linear, Softmax
from dlprop.propagation import derivative_label_propagation

NAN = float("nan")
SCHEMES = ("forward", "central", "sum", "laplacian")
OPTIONS = {  # name: all its values
    "scheme": SCHEMES,
    "normalize": ("l1", "l2", "softmax", "None"),
    "similarity": ("dot", "cosine"),
    "over": ("targets", "sources"),
    "affinity": ("linear", "softmax", "attention", "ridge", "discriminant"),
    "scale": ("sum", "mean", "degree"),
    "resolution": ("feats", "logits"),
    "backend": ("auto", "tiled", "triton"),
    "buffers": ("average", "copy", "none"),
}


def says(*parts):
    """A pattern for a message that holds all parts, in any order, names and numbers as whole words."""
    return "(?s)" + "".join(rf"(?=.*(?<!\w){re.escape(str(part))}(?!\w))" for part in parts)


def raises(error, *parts):
    return pytest.raises(error, match=says(*parts))


def bad_integers(minimum):
    """(value, error, what the message says came)."""
    return [
        (True, TypeError, "True"),
        (1.0, TypeError, "1.0"),
        ("1", TypeError, "1"),
        (minimum - 1, ValueError, minimum - 1),
    ]


def table(rows):
    """Parametrise by rows of (id, call, error, *parts of the message)."""
    return pytest.mark.parametrize(
        ("call", "error", "parts"), [pytest.param(call, error, parts, id=name) for name, call, error, *parts in rows]
    )


def test_says_wants_every_part_as_a_word():
    assert re.search(says("feats", 3), "feats must be 4, got 3")
    assert not re.search(says("feats", 3), "feats must be 4")
    assert not re.search(says("feats"), "target_feats must be 4")
    assert not re.search(says("order"), "max_order must be 4")
    assert re.search(says("(2, 3)", -1), "got (2, 3) and -1")


# finite_difference


def difference_rows():
    x = torch.zeros(2, 5, 3)
    yield "list", partial(finite_difference, [1.0, 2.0]), TypeError, "x", "torch.Tensor", "list"
    yield "array", partial(finite_difference, np.zeros((2, 5))), TypeError, "x", "torch.Tensor", "ndarray"
    yield "integer", partial(finite_difference, x.long()), TypeError, "x", "torch.int64", "x.float()"
    yield "bool", partial(finite_difference, x.bool()), TypeError, "x", "torch.bool"
    yield "complex", partial(finite_difference, x.to(torch.complex64)), TypeError, "x", "torch.complex64"
    for value, error, came in bad_integers(0):
        yield f"order={value!r}", partial(finite_difference, x, value), error, "order", came
    for dim in (3, -4):
        yield f"dim={dim}", partial(finite_difference, x, dim=dim), ValueError, "dim", -3, 2, dim
    for dim in (True, 1.0, "1", None):
        yield f"dim={dim!r}", partial(finite_difference, x, dim=dim), TypeError, "dim", "int", type(dim).__name__
    yield "no dimensions", partial(finite_difference, torch.tensor(1.0)), ValueError, "dim", 1
    for scheme, order in {"forward": 5, "sum": 6, "central": 3, "laplacian": 3}.items():
        call = partial(finite_difference, x, order, scheme=scheme)
        yield f"{scheme} too high", call, ValueError, "x", "order", scheme, order, 5
    for dim, D in ((0, 2), (2, 3), (-1, 3)):
        yield f"too high along {dim}", partial(finite_difference, x, D, dim=dim), ValueError, "x", "order", D
    yield "scheme", partial(finite_difference, x, scheme="bogus"), ValueError, "scheme", "bogus", *SCHEMES
    yield "scheme type", partial(finite_difference, x, scheme=2), TypeError, "scheme", 2, *SCHEMES
    yield "scheme None", partial(finite_difference, x, scheme=None), ValueError, "scheme", None, *SCHEMES


@table(difference_rows())
def test_finite_difference(call, error, parts):
    with raises(error, *parts):
        call()


def test_dim_and_scheme_are_keyword_only():
    with pytest.raises(TypeError, match="positional"):
        finite_difference(torch.zeros(2, 5), 1, 1)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_highest_order_that_fits_is_no_error(scheme):
    step = 1 if scheme in ("forward", "sum") else 2
    assert finite_difference(torch.zeros(1, 2 * step + 1), 2, scheme=scheme).shape == (1, 1)
    with pytest.raises(ValueError, match="order"):
        finite_difference(torch.zeros(1, 2 * step), 2, scheme=scheme)


# derivative_similarity


def similarity_rows():
    f = derivative_similarity
    x, flat = torch.zeros(2, 5, 3, 4), torch.zeros(2, 5, 12)
    pixel = torch.zeros(3, dtype=torch.long)
    yield "feats type", partial(f, [[1.0]]), TypeError, "feats", "torch.Tensor", "list"
    yield "feats integer", partial(f, x.int()), TypeError, "feats", "torch.int32"
    yield "feats 2-d", partial(f, torch.zeros(2, 5)), ValueError, "feats", "(2, 5)", "(N, D, H, W)", "(N, D, M)"
    yield "feats 5-d", partial(f, x[None]), ValueError, "feats", "(1, 2, 5, 3, 4)", "(N, D, H, W)"
    yield "no pixels", partial(f, x[:, :, :0]), ValueError, "feats", "(2, 5, 0, 4)"
    yield "no channels", partial(f, x[:, :0], order=0), ValueError, "feats", "(2, 0, 3, 4)"
    yield "target type", partial(f, x, "x"), TypeError, "target_feats", "torch.Tensor", "str"
    yield "target integer", partial(f, x, x.long()), TypeError, "target_feats", "torch.int64"
    yield "target 2-d", partial(f, flat, flat[0]), ValueError, "target_feats", "(5, 12)"
    yield "target rank", partial(f, x, flat), ValueError, "feats", "target_feats", "(2, 5, 3, 4)", "(2, 5, 12)"
    yield "target batch", partial(f, x, x[:1]), ValueError, "feats", "target_feats", "N", 2, 1
    yield "target channels", partial(f, x, x[:, :4]), ValueError, "feats", "target_feats", "D", 5, 4
    parts = ("feats", "target_feats", "torch.float32", "torch.float64")
    yield "target dtype", partial(f, x, x.double()), (TypeError, ValueError), *parts
    yield "target device", partial(f, x, x.to("meta")), ValueError, "feats", "target_feats", "cpu", "meta"
    for value, error, came in bad_integers(0):
        yield f"order={value!r}", partial(f, x, order=value), error, "order", came
    for scheme, order in {"forward": 5, "sum": 6, "central": 3, "laplacian": 4}.items():
        yield f"{scheme} too high", partial(f, x, order=order, scheme=scheme), ValueError, "feats", "order", order, 5
    for name in ("scheme", "normalize", "similarity"):
        others = ("gaussian",) if name == "similarity" else ()
        yield name, partial(f, x, **{name: "bogus"}), ValueError, name, "bogus", *OPTIONS[name], *others
        yield f"{name} type", partial(f, x, **{name: 7}), TypeError, name, 7, *OPTIONS[name], *others
    for name in ("scheme", "similarity"):
        yield f"{name} None", partial(f, x, **{name: None}), ValueError, name, None, *OPTIONS[name]
    yield "query list", partial(f, x, query=[0, 1]), TypeError, "query", "list"
    yield "query int32", partial(f, x, query=pixel.int()), TypeError, "query", "int64", "torch.int32"
    yield "query float", partial(f, x, query=pixel.float()), TypeError, "query", "int64", "torch.float32"
    yield "query bool", partial(f, x, query=pixel.bool()), TypeError, "query", "int64", "torch.bool"
    yield "query 0-d", partial(f, x, query=pixel[0]), ValueError, "query", "(K,)", "(N, K)", "()"
    yield "query 3-d", partial(f, x, query=pixel[None, None]), ValueError, "query", "(N, K)", "(1, 1, 3)"
    yield "query batch", partial(f, x, query=pixel.expand(3, 3)), ValueError, "query", "(N, K)", 2, "(3, 3)"
    yield "query device", partial(f, x, query=pixel.to("meta")), ValueError, "query", "feats", "cpu", "meta"
    yield "query high", partial(f, x, query=torch.tensor([0, 12])), ValueError, "query", 11, 12
    yield "query negative", partial(f, x, query=torch.tensor([-1, 3])), ValueError, "query", 11, -1
    yield "query rows", partial(f, x, query=torch.tensor([[0], [99]])), ValueError, "query", 99
    yield "query of targets", partial(f, x, x.repeat(1, 1, 2, 1), query=torch.tensor([12])), ValueError, "query", 12


@table(similarity_rows())
def test_derivative_similarity(call, error, parts):
    with raises(error, *parts):
        call()


def test_similarity_options_are_keyword_only():
    x = torch.zeros(1, 3, 2)
    with pytest.raises(TypeError, match="positional"):
        derivative_similarity(x, x, 1)


# Affinities: their options, at construction


def affinity_rows():
    """(id, affinity, options, error, parts)."""
    for cls in (Linear, Softmax):
        names = ("scheme", "normalize", "similarity") + (("scale",) if cls is Linear else ("over", "backend"))
        for name in names:
            yield name, cls, {name: "bogus"}, ValueError, name, "bogus", *OPTIONS[name]
            yield f"{name} type", cls, {name: 7}, TypeError, name, 7, *OPTIONS[name]
            if name != "normalize":
                yield f"{name} None", cls, {name: None}, ValueError, name, None, *OPTIONS[name]
        for weights in ([], ()):
            yield f"weights={weights}", cls, {"weights": weights}, ValueError, "weights", "at least one"
        yield "weights number", cls, {"weights": 1.5}, TypeError, "weights", "sequence", "float", "(1.5,)"
        yield "weights None", cls, {"weights": None}, TypeError, "weights", "sequence", "NoneType"
        yield "weights string", cls, {"weights": "11"}, TypeError, "weights", "sequence", "str"
        yield "weights tensor", cls, {"weights": torch.ones(2)}, TypeError, "weights", "sequence", "Tensor"
        yield "weights of strings", cls, {"weights": [1.0, "1"]}, TypeError, "weights[1]", "str"
        yield "weights of bools", cls, {"weights": [True, False]}, TypeError, "weights[0]", "bool"
        yield "weights of nan", cls, {"weights": [1.0, NAN]}, ValueError, "weights[1]", "nan"
        yield "weights of inf", cls, {"weights": [float("inf")]}, ValueError, "weights[0]", "inf"
        yield "unknown", cls, {"bogus": 1}, TypeError, "bogus"
        yield "max_order", cls, {"max_order": 1}, TypeError, "max_order"
    for value, error, came in bad_integers(1):
        yield f"chunk_size={value!r}", Softmax, {"chunk_size": value}, error, "chunk_size", came
    yield "chunk_size=-3", Softmax, {"chunk_size": -3}, ValueError, "chunk_size", -3
    yield "gaussian", Linear, {"similarity": "gaussian"}, ValueError, "similarity", "dot", "cosine", "gaussian"
    for value, error, came in bad_integers(1):
        yield f"radius={value!r}", Softmax, {"over": "sources", "radius": value}, error, "radius", came
        for dilation, name in ((value, "dilation"), ([1, value], "dilation[1]")):
            options = {"over": "sources", "radius": 1, "dilation": dilation}
            if dilation != "1":
                yield f"dilation={dilation!r}", Softmax, options, error, name, came
    for value, came in (("12", "str"), (None, "NoneType"), (torch.ones(2), "Tensor"), ({1, 2}, "set")):
        options = {"over": "sources", "radius": 1, "dilation": value}
        yield f"dilation {came}", Softmax, options, TypeError, "dilation", "int", came
    for value in ([], ()):
        options = {"over": "sources", "radius": 1, "dilation": value}
        yield f"dilation={value!r}", Softmax, options, ValueError, "dilation", "at least one"
    for value in (2, (1, 2)):
        options = {"over": "sources", "dilation": value}
        yield f"no radius, dilation={value}", Softmax, options, ValueError, "dilation", "radius", value
    yield "radius over targets", Softmax, {"radius": 2}, ValueError, "radius", 2, "over", "sources", "targets"
    window = {"over": "sources", "radius": 1}
    yield "chunks of a window", Softmax, {**window, "chunk_size": 5}, ValueError, "chunk_size", "radius", 5
    yield "triton of a window", Softmax, {**window, "backend": "triton"}, ValueError, "backend", "triton", "auto"
    options = {"over": "sources", "backend": "triton"}
    yield "triton over sources", Softmax, options, ValueError, "backend", "triton", "sources", "auto"
    options = {"similarity": "gaussian", "backend": "triton"}
    yield "triton of the gaussian", Softmax, options, ValueError, "backend", "triton", "gaussian", "auto"
    yield "dense", Softmax, {"backend": "dense"}, ValueError, "backend", "dense", *OPTIONS["backend"]
    for name, value in (("chunk_size", 3), ("backend", "tiled")):
        yield f"{name} of the other", Linear, {name: value}, TypeError, name
    yield "scale of the other", Softmax, {"scale": "mean"}, TypeError, "scale"


@pytest.mark.parametrize(
    ("affinity", "options", "error", "parts"),
    [
        pytest.param(cls, options, error, parts, id=f"{cls.__name__} {name}")
        for name, cls, options, error, *parts in affinity_rows()
    ],
)
def test_affinity_options(affinity, options, error, parts):
    with raises(error, *parts):
        affinity(**options)


@pytest.mark.parametrize("affinity", [Linear, Softmax])
def test_affinity_options_are_keyword_only(affinity):
    with pytest.raises(TypeError, match="positional"):
        affinity((1.0, 1.0))


# Propagation: options, at construction and in the function


def option_rows():
    yield "affinity", {"affinity": "bogus"}, ValueError, "affinity", "bogus", *OPTIONS["affinity"]
    for cls in (Linear, Softmax):
        yield cls.__name__, {"affinity": cls}, TypeError, "affinity", "the class", cls.__name__, "object"
    for value in (7, None, object(), torch.nn.Identity(), ("linear",)):
        parts = ("affinity", "propagate", "dlprop.affinity.Linear()", *OPTIONS["affinity"], type(value).__name__)
        yield f"affinity {type(value).__name__}", {"affinity": value}, TypeError, *parts
    yield "resolution", {"resolution": "bogus"}, ValueError, "resolution", "bogus", *OPTIONS["resolution"]
    yield "resolution type", {"resolution": 7}, TypeError, "resolution", 7, *OPTIONS["resolution"]
    yield "resolution None", {"resolution": None}, ValueError, "resolution", None, *OPTIONS["resolution"]
    for value in (1, 0.0, None, "yes"):
        yield f"align_corners={value!r}", {"align_corners": value}, TypeError, "align_corners", "bool", value
    for name in ("max_order", "weights", "scale", "backend"):
        yield f"{name} is the affinity's", {name: 1}, TypeError, name


@table(option_rows())
def test_propagation_options(call, error, parts):
    options = call
    with raises(error, *parts):
        DerivativeLabelPropagation(**options)
    with raises(error, *parts):
        derivative_label_propagation(torch.zeros(1, 2, 3), torch.zeros(1, 5, 3), **options)


def test_propagation_options_are_keyword_only():
    with pytest.raises(TypeError, match="positional"):
        DerivativeLabelPropagation("linear", "feats")
    x = torch.zeros(1, 3, 2)
    with pytest.raises(TypeError, match="positional"):
        DerivativeLabelPropagation()(x, x, x, None)


def test_conflicts_known_at_construction_are_refused_there():
    with raises(ValueError, "backend", "triton", "frobenius"):
        DerivativeLoss(norm="frobenius", backend="triton")
    with raises(ValueError, "num_anchors", "frobenius", 4):
        DerivativeLoss(norm="frobenius", num_anchors=4)


# Propagation: tensors


def tensor_rows():
    L, V = torch.zeros(2, 3, 6, 8), torch.zeros(2, 5, 3, 4)
    flat_L, flat_V = torch.zeros(2, 3, 12), torch.zeros(2, 5, 12)
    mask = torch.ones(2, 6, 8, dtype=torch.bool)
    either = (TypeError, ValueError)
    yield "logits type", (None, V), {}, TypeError, "logits", "torch.Tensor", "NoneType"
    yield "feats type", (L, [V]), {}, TypeError, "feats", "torch.Tensor", "list"
    yield "target type", (L, V, 3), {}, TypeError, "target_feats", "torch.Tensor", "int"
    yield "logits integer", (L.long(), V), {}, TypeError, "logits", "torch.int64", "F.one_hot"
    yield "logits of torchvision", (OrderedDict(out=L), V), {}, TypeError, "logits", "OrderedDict", '["out"]'
    yield "feats integer", (L, V.int()), {}, TypeError, "feats", "torch.int32"
    yield "target bool", (L, V, V.bool()), {}, TypeError, "target_feats", "torch.bool", "mask="
    yield "logits 2-d", (L[0, 0], V), {}, ValueError, "logits", "(6, 8)", "(N, C, H, W)", "(N, C, M)"
    yield "feats 5-d", (L, V[None]), {}, ValueError, "feats", "(1, 2, 5, 3, 4)", "(N, D, H, W)", "(N, D, M)"
    yield "target 2-d", (L, V, V[0, 0]), {}, ValueError, "target_feats", "(3, 4)"
    yield "logits empty", (L[:, :, :0], V), {}, ValueError, "logits", "(2, 3, 0, 8)"
    yield "no classes", (L[:, :0], V), {}, ValueError, "logits", "(2, 0, 6, 8)"
    yield "feats empty", (L, V[..., :0]), {}, ValueError, "feats", "(2, 5, 3, 0)"
    yield "target empty", (L, V, V[..., :0]), {}, ValueError, "target_feats", "(2, 5, 3, 0)"
    yield "flat logits", (flat_L, V), {}, ValueError, "logits", "feats", "(2, 3, 12)", "(2, 5, 3, 4)"
    yield "flat feats", (L, flat_V), {}, ValueError, "logits", "feats", "(2, 3, 6, 8)", "(2, 5, 12)"
    yield "flat target", (L, V, flat_V), {}, ValueError, "feats", "target_feats", "(2, 5, 3, 4)", "(2, 5, 12)"
    yield "grid target", (flat_L, flat_V, V), {}, ValueError, "feats", "target_feats", "(2, 5, 12)", "(2, 5, 3, 4)"
    yield "flat sizes", (flat_L, flat_V[..., :7]), {}, ValueError, "logits", "feats", "M", 12, 7
    yield "feats batch", (L, V[:1]), {}, ValueError, "logits", "feats", "N", 2, 1
    yield "logits batch", (L[:1], V), {}, ValueError, "logits", "feats", "N", 1, 2
    yield "target batch", (L, V, V[:1]), {}, ValueError, "target_feats", "N", 2, 1
    yield "target channels", (L, V, V[:, :4]), {}, ValueError, "feats", "target_feats", "D", 5, 4
    yield "feats dtype", (L, V.double()), {}, either, "logits", "feats", "torch.float32", "torch.float64"
    yield "half feats", (L, V.half()), {}, either, "logits", "feats", "torch.float32", "torch.float16"
    yield "target dtype", (L, V, V.bfloat16()), {}, either, "target_feats", "torch.float32", "torch.bfloat16"
    yield "feats device", (L, V.to("meta")), {}, ValueError, "logits", "feats", "cpu", "meta"
    yield "target device", (L, V, V.to("meta")), {}, ValueError, "target_feats", "cpu", "meta"
    yield "mask type", (L, V), {"mask": [True]}, TypeError, "mask", "bool", "list"
    yield "mask integer", (L, V), {"mask": mask.int()}, TypeError, "mask", "torch.bool", "torch.int32"
    yield "mask float", (L, V), {"mask": mask.float()}, TypeError, "mask", "torch.bool", "torch.float32"
    shapes = {
        "batch": mask[:1],
        "grid": mask[:, :3, :4],
        "rank": mask[:, None],
        "flat": mask.flatten(1),
        "0-d": mask[0],
    }
    for name, m in shapes.items():
        yield f"mask {name}", (L, V), {"mask": m}, ValueError, "mask", "logits", "(2, 6, 8)", tuple(m.shape)
    yield "mask of flat", (flat_L, flat_V), {"mask": mask[:, :3, :4]}, ValueError, "mask", "(2, 12)", "(2, 3, 4)"
    yield "mask device", (L, V), {"mask": mask.to("meta")}, ValueError, "mask", "logits", "cpu", "meta"
    yield "mask of nothing", (L, V), {"mask": ~mask}, ValueError, "mask", "at least one source", "(2, 6, 8)", "skip"


@pytest.mark.parametrize("affinity", ["linear", "softmax", "attention"])
@pytest.mark.parametrize(
    ("tensors", "keywords", "error", "parts"),
    [pytest.param(args, kwargs, error, parts, id=name) for name, args, kwargs, error, *parts in tensor_rows()],
)
def test_propagation_tensors(tensors, keywords, error, parts, affinity):
    module = DerivativeLabelPropagation(affinity)
    with raises(error, *parts):
        module(*tensors, **keywords)
    with raises(error, *parts):
        module.rectify(*tensors[:2], 0.5, *tensors[2:], **keywords)


@pytest.mark.parametrize("order", [(0, 1, 3, 2), (0, 2, 3, 1)], ids=["transposed", "channels last"])
def test_features_in_another_order_of_axes_are_warned_of(order):
    """There is a result, of the wrong pixels."""
    logits, labels, feats = torch.rand(1, 3, 48, 64), torch.ones(1, 48, 64).long(), torch.rand(1, 8, 12, 16)
    parts = "48 x 64", "N, channels, H, W"
    with pytest.warns(UserWarning, match=says("logits", *parts)) as caught:
        DerivativeLabelPropagation()(logits, feats.permute(order))
    assert [warning.filename for warning in caught] == [__file__]  # whose line is to be mended
    with pytest.warns(UserWarning, match=says("target", *parts)):
        DerivativeLoss()(feats.permute(order), labels)
    torch.compile(DerivativeLoss(), backend="eager", fullgraph=True)(feats.permute(order), labels)


@pytest.mark.parametrize("affinity", [Linear, Softmax, partial(Softmax, over="sources", similarity="gaussian")])
@pytest.mark.parametrize(("scheme", "order"), [("forward", 5), ("sum", 7), ("central", 3), ("laplacian", 3)])
def test_propagation_needs_more_channels_than_the_highest_order_takes(scheme, order, affinity):
    module = DerivativeLabelPropagation(affinity(weights=(1.0,) * (order + 1), scheme=scheme))
    with raises(ValueError, "feats", "order", order, scheme, 5):
        module(torch.zeros(1, 2, 3), torch.zeros(1, 5, 3))


def window_rows():
    L, V = torch.zeros(2, 3, 6, 8), torch.zeros(2, 5, 6, 8)
    other_grid = torch.zeros(2, 5, 6, 7)
    yield "flat", (L.flatten(2), V.flatten(2)), "feats", "flat", "(N, C, H, W)"
    yield "flat targets", (L.flatten(2), V.flatten(2), V.flatten(2)), "flat", "target_feats"
    yield "targets of another grid", (L, V, other_grid), "target_feats", "(6, 8)", "(6, 7)"
    yield "targets of another grid with as many", (L, V, V.mT), "target_feats", "(6, 8)", "(8, 6)"
    yield "sources of a coarser grid", (L, V[:, :, ::2, ::2], other_grid), "target_feats", "(6, 7)"


@pytest.mark.parametrize("resolution", ["feats", "logits"])
@pytest.mark.parametrize(
    ("tensors", "parts"), [pytest.param(tensors, parts, id=name) for name, tensors, *parts in window_rows()]
)
def test_a_window_needs_one_grid(tensors, parts, resolution):
    module = DerivativeLabelPropagation(Softmax(over="sources", radius=1), resolution=resolution)
    with raises(ValueError, "radius", "grid", *parts):
        module(*tensors)


@pytest.mark.parametrize("over", ["sources", "targets"])
def test_a_gaussian_has_no_negative_weight(over):
    with raises(ValueError, "weights", "Gaussian", "at least 0", -20.0):
        Softmax(over=over, similarity="gaussian", weights=(1.0, -20.0))
    Softmax(over=over, similarity="gaussian", weights=(0.0, 20.0))
    Softmax(over=over, similarity="cosine", weights=(1.0, -20.0))


@pytest.mark.skipif(torch.cuda.is_available(), reason="triton may run here")
def test_an_explicit_backend_never_falls_back():
    """Constructing it is fine: the tensors may yet come from a GPU."""
    module = DerivativeLabelPropagation(Softmax(backend="triton"))
    with raises(ValueError, "backend", "triton", "auto"):
        module(torch.zeros(1, 2, 3), torch.zeros(1, 5, 3))


@pytest.mark.parametrize("ramp", [-0.01, 1.01, 2, NAN, float("inf")])
def test_ramp_outside_its_range(ramp):
    with raises(ValueError, "ramp", 0, 1, ramp):
        DerivativeLabelPropagation().rectify(torch.zeros(1, 2, 3), torch.zeros(1, 5, 3), ramp)


@pytest.mark.parametrize("ramp", ["0.5", None, True])
def test_ramp_is_a_number(ramp):
    with raises(TypeError, "ramp", ramp):
        DerivativeLabelPropagation().rectify(torch.zeros(1, 2, 3), torch.zeros(1, 5, 3), ramp)


def test_rectify_needs_both_probabilities_on_one_grid():
    """Eq. 5 adds P, on the logits' grid, to P~, on the targets'."""
    module = DerivativeLabelPropagation()
    logits, feats, target_feats = torch.zeros(1, 2, 4, 4), torch.zeros(1, 5, 4, 4), torch.zeros(1, 5, 2, 2)
    with pytest.raises(ValueError, match=r"target_feats.*2, 2\)"):
        module.rectify(logits, feats, 0.5, target_feats)
    with pytest.raises(ValueError, match=r"target_feats.*3\)"):
        module.rectify(logits.flatten(2), feats.flatten(2), 0.5, target_feats.flatten(2)[..., :3])


# theory


def theory_rows():
    A, K, lemma, theorem = (
        theory.toeplitz_matrix,
        theory.derivative_metric,
        theory.lemma1_bound,
        theory.theorem2_bound,
    )
    for name, f, order in (("toeplitz", A, "order"), ("metric", K, "max_order"), ("lemma1", lemma, "order")):
        for value, error, came in bad_integers(1):
            yield f"{name} D={value!r}", partial(f, value, 0), error, "D", came
        for value, error, came in bad_integers(0):
            yield f"{name} order={value!r}", partial(f, 5, value), error, order, came
        yield f"{name} too high", partial(f, 5, 5), ValueError, order, 5
        yield f"{name} laplacian too high", partial(f, 4, 2, scheme="laplacian"), ValueError, order, "laplacian", 4
        yield f"{name} scheme", partial(f, 5, 1, scheme="bogus"), ValueError, "scheme", "bogus", *SCHEMES
    yield "metric few weights", partial(K, 5, 1, [1.0]), ValueError, "weights", "max_order", 2, 1
    yield "metric many weights", partial(K, 5, 1, [1.0] * 3), ValueError, "weights", "max_order", 2, 3
    yield "theorem2 vector", partial(theorem, np.zeros(5), 2), ValueError, "V", "(D, M)", "(5,)"
    yield "theorem2 batch", partial(theorem, np.zeros((1, 5, 2)), 2), ValueError, "V", "(D, M)", "(1, 5, 2)"
    yield "theorem2 order=1", partial(theorem, np.zeros((5, 2)), 1), ValueError, "order", 2, 1
    yield "theorem2 order=2.0", partial(theorem, np.zeros((5, 2)), 2.0), TypeError, "order", "2.0"
    yield "theorem2 too high", partial(theorem, np.zeros((5, 2)), 5), ValueError, "order", 5


@table(theory_rows())
def test_theory(call, error, parts):
    with raises(error, *parts):
        call()


# MomentumAverager


def averager_rows():
    model = nn.Linear(2, 2)
    yield "model type", partial(MomentumAverager, "model"), TypeError, "model", "torch.nn.Module", "str"
    yield "model class", partial(MomentumAverager, nn.Linear), TypeError, "model", "torch.nn.Module"
    for momentum in (-0.1, 1.1, 2, NAN, float("inf")):
        yield f"momentum={momentum}", partial(MomentumAverager, model, momentum), ValueError, "momentum", 0, 1, momentum
    for momentum in ("0.5", None, True):
        yield f"momentum={momentum!r}", partial(MomentumAverager, model, momentum), TypeError, "momentum", momentum
    for buffers in ("bogus", None):
        call = partial(MomentumAverager, model, buffers=buffers)
        yield f"buffers={buffers!r}", call, ValueError, "buffers", buffers, *OPTIONS["buffers"]
    yield "buffers=True", partial(MomentumAverager, model, buffers=True), TypeError, "buffers", True
    yield "update type", partial(MomentumAverager(model).update, {}), TypeError, "model", "torch.nn.Module", "dict"


@table(averager_rows())
def test_momentum_averager(call, error, parts):
    with raises(error, *parts):
        call()


def test_buffers_is_keyword_only():
    with pytest.raises(TypeError, match="positional"):
        MomentumAverager(nn.Linear(2, 2), 0.5, "copy")


@pytest.mark.parametrize("bad", [1.5, -1, NAN])
def test_a_callable_momentum_is_checked_when_it_answers(bad):
    model = nn.Linear(2, 2)
    averager = MomentumAverager(model, lambda updates: 0.5 if updates < 2 else bad)
    averager.update(model)
    averager.update(model)
    before = averager.module.weight.clone()
    nn.init.zeros_(model.weight)
    with raises(ValueError, "momentum", 0, 1, bad):
        averager.update(model)
    assert torch.equal(averager.module.weight, before)
    assert int(averager.n_averaged) == 2


def test_a_mismatch_tells_both_shapes():
    averager = MomentumAverager(nn.Sequential(nn.Linear(2, 3)))
    with raises(ValueError, "0.weight", "(3, 2)", "(5, 2)"):
        averager.update(nn.Sequential(nn.Linear(2, 5)))
    with raises(ValueError, "0.bias"):
        averager.update(nn.Sequential(nn.Linear(2, 3, bias=False)))
