"""The Module: its options, `rectify`, short names, and an affinity of the user's own."""

import copy
import inspect
import itertools
import pickle

import numpy as np
import pytest
import torch

from dlprop import DerivativeLabelPropagation
from dlprop.affinity import Linear, Softmax
from dlprop.propagation import derivative_label_propagation

from .oracles import features
from .oracles import propagation as oracle
from .propagation_cases import (
    FORMS,
    NearestMean,
    expected,
    forms,
    inputs,
    make,
    random_mask,
    resolutions,
)
from .tolerances import assert_close

# Rectify, Eq. 5


def rectified(form, logits, feats, ramp, target_feats=None, **options):
    """The oracle's Eq. 5, image by image."""
    return oracle.batched(
        lambda L, V, W=None, **keywords: oracle.rectify(L, V, ramp, W, **keywords),
        *(logits, feats, target_feats),
        **FORMS[form],
        **options,
    )


@pytest.mark.parametrize("ramp", [0, 0.25, 1.0])
@forms
def test_rectify_is_eq_5(form, ramp):
    module = DerivativeLabelPropagation(make(form))
    for grid, target_grid in (((3, 2), None), ((5, 4), None), ((5, 4), (3, 2)), ((5, 4), (5, 4))):
        logits, feats, target_feats = inputs(form, grid, (3, 2), target_grid)
        for mask in (None, random_mask(2, *grid)):
            out = module.rectify(logits, feats, ramp, target_feats, mask=mask)
            masked = {} if mask is None else {"mask": mask}
            assert_close(out, rectified(form, logits, feats, ramp, target_feats, **masked), "propagation")
            assert_close(out.sum(1), np.ones((2, *grid)), "propagation")


@forms
def test_rectify_has_no_gradient(form):
    logits, feats, _ = inputs(form)
    leaves = [x.requires_grad_() for x in (logits, feats)]
    assert not DerivativeLabelPropagation(make(form)).rectify(*leaves, 0.5).requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_rectify_dtype_and_flat_inputs(dtype):
    logits, feats, _ = inputs("sum", dtype=dtype)
    out = DerivativeLabelPropagation().rectify(logits, feats, 0.5)
    assert out.dtype == dtype
    assert_close(out, rectified("sum", logits, feats, 0.5), "propagation")
    flat = DerivativeLabelPropagation().rectify(logits.flatten(2), feats.flatten(2), 0.5)
    assert_close(flat, rectified("sum", logits.flatten(2), feats.flatten(2), 0.5), "propagation")


def test_rectify_is_rounded_once_in_half_precision():
    # L' exceeds the range of float16 here; its softmax does not.
    logits, feats = (40 + torch.randn(1, 4, 60, 60)).half(), torch.rand(1, 32, 60, 60).half()
    module = DerivativeLabelPropagation(Linear(normalize="l2"))
    assert module(logits, feats).isinf().any()
    probabilities = module.rectify(logits, feats, 1.0)
    exact = module.rectify(logits.double(), feats.double(), 1.0)
    assert probabilities.dtype == torch.float16
    # float32 resolves L' near 1e5 to 0.01, and the softmax passes at most half of an error on.
    assert (probabilities.double() - exact).abs().max() < 0.02


# The Module, short names and a user's own affinity

WIDE = {"weights": [1.0, 0.5, 2.0], "scheme": "sum", "normalize": "l2", "similarity": "cosine"}


@pytest.mark.parametrize("affinity", [Linear(scale="mean", **WIDE), Softmax(chunk_size=3, backend="tiled", **WIDE)])
def test_module_is_the_function(affinity):
    logits, feats, target_feats = inputs("sum", (5, 4), (3, 2), (2, 2))
    mask = random_mask(2, 5, 4)
    form = "mean" if isinstance(affinity, Linear) else "softmax"
    for resolution in ("feats", "logits"):
        grids = {"resolution": resolution, "align_corners": False}
        out = DerivativeLabelPropagation(affinity, **grids)(logits, feats, target_feats, mask=mask)
        function = derivative_label_propagation(logits, feats, target_feats, mask=mask, affinity=affinity, **grids)
        assert torch.equal(out, function)
        assert_close(out, expected(form, logits, feats, target_feats, mask=mask, **grids, **WIDE), "propagation")


def test_names_are_affinities_with_their_defaults():
    logits, feats, _ = inputs("sum", (5, 4), (3, 2))
    sharp = {"normalize": None, "similarity": "cosine", "weights": (10.0, 10.0)}
    for name, affinity, form, options in (
        ("linear", Linear(), "sum", {}),
        ("softmax", Softmax(), "softmax", {}),
        ("attention", Softmax(over="sources", **sharp), "attention", sharp),
    ):
        module = DerivativeLabelPropagation(name)
        assert module.affinity == affinity
        assert_close(module(logits, feats), expected(form, logits, feats, **options), "propagation")
        assert torch.equal(derivative_label_propagation(logits, feats, affinity=name), module(logits, feats))
    assert DerivativeLabelPropagation().affinity == Linear()
    assert torch.equal(derivative_label_propagation(logits, feats), DerivativeLabelPropagation()(logits, feats))


NOT_DEFAULT = DerivativeLabelPropagation(
    Softmax(
        weights=(1.0, 0.5, 0.25),
        scheme="central",
        normalize="softmax",
        similarity="cosine",
        chunk_size=77,
        backend="tiled",
    ),
    resolution="logits",
    align_corners=False,
)


def test_repr_shows_the_options():
    assert repr(NOT_DEFAULT) == (
        "DerivativeLabelPropagation(Softmax(weights=(1.0, 0.5, 0.25), scheme='central', normalize='softmax', "
        "similarity='cosine', over='targets', radius=None, dilation=1, chunk_size=77, backend='tiled'), "
        "resolution='logits', align_corners=False)"
    )
    assert "scale='degree'" in repr(DerivativeLabelPropagation(Linear(scale="degree")))


def test_pickle_and_deepcopy():
    logits, feats, _ = inputs("sum", (5, 4), (3, 2), D=7)
    for clone in (pickle.loads(pickle.dumps(NOT_DEFAULT)), copy.deepcopy(NOT_DEFAULT)):
        assert repr(clone) == repr(NOT_DEFAULT)
        assert torch.equal(clone(logits, feats), NOT_DEFAULT(logits, feats))


def test_module_has_no_state():
    module = DerivativeLabelPropagation(Linear(weights=(1.0, 0.5)))
    assert module.state_dict() == {}
    assert not list(module.parameters())
    module.load_state_dict({}, strict=True)
    logits, feats, _ = inputs("sum")
    want = module(logits, feats)
    for moved in (module.half(), module.double(), module.eval(), module.train(), module.to("meta")):
        assert torch.equal(moved(logits, feats), want)


def nearest_mean(P, V, target_V=None, *, mask=None, resolution="feats", align_corners=True):
    """`NearestMean` by the book, one image at a time."""
    P, V = P.numpy(), V.numpy()
    W = V if target_V is None else target_V.numpy()
    out = []
    for n in range(len(P)):
        m = np.ones(P.shape[2:], dtype=bool) if mask is None else mask[n].numpy()
        grid = V.shape[2:]
        if resolution == "feats" and mask is None:
            shares = features.resize(P[n], grid, align_corners).reshape(P.shape[1], -1)
        else:
            U = features.resizing_matrix(grid, P.shape[2:], align_corners)
            shares = np.where(m, P[n], 0).reshape(P.shape[1], -1) @ U.T
        means = shares @ V[n].reshape(V.shape[1], -1).T / shares.sum(1, keepdims=True)
        points = W[n].reshape(W.shape[1], -1)
        distances = np.sqrt(((means[:, :, None] - points[None]) ** 2).sum(1))
        distances = -distances.reshape(P.shape[1], *W.shape[2:])
        out.append(features.resize(distances, P.shape[2:], align_corners) if W.shape == V.shape else distances)
    return np.stack(out)


@resolutions
def test_a_users_own_affinity(resolution):
    """At both resolutions, with masks, to other targets, and rectified; under torch.compile in its own file."""
    for align_corners in (True, False):
        module = DerivativeLabelPropagation(NearestMean(), resolution=resolution, align_corners=align_corners)
        for grid, target_grid, masked in itertools.product(((3, 4), (7, 6)), (None, (2, 5)), (False, True)):
            logits, feats, targets = inputs("sum", grid, (3, 4), target_grid)
            P = logits.softmax(1)
            mask = random_mask(2, *grid) if masked else None
            out = module(P, feats, targets, mask=mask)
            options = {"mask": mask, "resolution": resolution, "align_corners": align_corners}
            assert_close(out, nearest_mean(P, feats, targets, **options), "propagation")
            if targets is None:
                rectified = module.rectify(P, feats, 0.5, mask=mask)
                assert_close(rectified, ((P.softmax(1) + out.softmax(1)) / 2).numpy(), "propagation")


def test_a_users_own_affinity_is_short_and_learns():
    assert len(inspect.getsource(NearestMean).splitlines()) <= 15
    logits, feats, _ = inputs("sum", (5, 4), (3, 2), N=1)
    leaves = [x.requires_grad_() for x in (logits.softmax(1).detach(), feats)]
    mask = random_mask(2, 5, 4)[:1]
    module = DerivativeLabelPropagation(NearestMean())
    assert torch.autograd.gradcheck(lambda *x: module(*x, mask=mask), leaves)
    assert "NearestMean object" in repr(module)


@pytest.mark.parametrize("affinity", ["linear", "softmax", "attention", "ridge", "discriminant"])
def test_the_default_device_does_not_matter(affinity):
    logits, feats, mask = torch.randn(2, 3, 8, 8), torch.rand(2, 4, 4, 4), torch.zeros(2, 8, 8, dtype=torch.bool)
    mask[0, 0, 0] = mask[0, 5, 5] = mask[1, 3, 3] = True  # more sources in one image than in the other
    propagate = DerivativeLabelPropagation(affinity)
    expected = propagate(logits, feats, mask=mask)
    with torch.device("meta"):
        assert torch.equal(propagate(logits, feats, mask=mask), expected)
