"""Random calls of the library against the oracles: `make fuzz`, which is no part of `make test`.

Affinities, options, grids, masks, precisions and strides are drawn together. Where a result hangs on the last digits of
its inputs (a degree or the norm of a difference that cancels, a sharp softmax), no tolerance fits all calls: the error
allowed is that of the table plus what the oracle itself moves by when its inputs, or the features once normalised, are
moved by a rounding or so.
"""

import os
import random

import numpy as np
import pytest
import torch
from hypothesis import Phase, assume, given, seed, settings
from hypothesis import strategies as st

from dlprop import DerivativeLoss, derivative_similarity
from dlprop._kernels import tiled, window
from dlprop.statistics import ClassStatistics

from . import classifier_cases, propagation_cases
from .loss_cases import ROUNDING
from .oracles import features as oracle
from .oracles import loss as loss_oracle
from .strategies import seeds
from .tolerances import assert_close

EXAMPLES = int(os.environ.get("FUZZ", 10_000))
SEED = int(os.environ.get("SEED", random.randrange(2**31)))  # in the name of every test: SEED=... makes the same calls
SHARES = {"propagation": 0.5, "classifier": 0.2, "loss": 0.2, "similarity": 0.1}

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
DTYPES = (F64, F32, F16, BF16)
ROUNDINGS = 16  # how far the oracle's inputs are moved, and how often what it moves by is allowed
LARGEST = 6e4  # of float16

pytestmark = [pytest.mark.fuzz, pytest.mark.parametrize("number", [SEED], ids="seed={}".format)]


def fuzz(share):
    """So many of the examples, drawn from the seed."""
    effort = settings(
        max_examples=max(1, round(EXAMPLES * SHARES[share])),
        derandomize=False,
        database=None,
        phases=(Phase.generate, Phase.shrink),
    )
    return lambda test: seed(SEED)(effort(test))


@pytest.fixture(autouse=True, scope="module")
def _several_tiles():
    """Small images have several tiles and bands, the last of them smaller."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiled, "CPU_TILE_BYTES", 4 * 4 * 8)
        patch.setattr(window, "CPU_BAND_BYTES", 2 * 5 * 9 * 8)
        yield


# ---------------------------------------------------------------------------------------------------------------------
# What is drawn

edges = st.integers(1, 6)
grids = st.tuples(edges, edges)
LAYOUTS = {
    "contiguous": lambda x: x.clone(),
    "channels last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "transposed": lambda x: x.mT.contiguous().mT,
    "batch last": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "every second": lambda x: torch.stack([x, torch.full_like(x, torch.nan)], dim=-1).flatten(-2)[..., ::2],
    "offset": lambda x: torch.cat([torch.full_like(x, torch.nan), x], dim=1)[:, x.shape[1] :],
}
layouts = st.sampled_from([*LAYOUTS])


@st.composite
def channels(draw, orders, at_most=9):
    """(D, scheme) with room for so many orders."""
    scheme = draw(st.sampled_from(oracle.SCHEMES))
    return draw(st.integers(orders * oracle.STEP[scheme] + 1, orders * oracle.STEP[scheme] + at_most)), scheme


@st.composite
def tensor(draw, dtype, *shape):
    """Normal numbers, some with a pixel of zeros, pixels alike, or a scale of their own, in any layout."""
    generator = torch.Generator().manual_seed(draw(seeds))
    x = torch.randn(*shape, generator=generator, dtype=F64)
    kind = draw(
        st.sampled_from(
            ["normal", "normal", "positive", "positive", "zero pixel", "pixels alike", "constant pixel", "small"]
        )
    )
    pixels = x.flatten(2)
    if kind == "positive":
        x.abs_().add_(0.1)
    elif kind == "zero pixel":
        pixels[:, :, 0] = 0
    elif kind == "pixels alike":
        pixels[:, :, 1:] = pixels[:, :, :1].clone()
    elif kind == "constant pixel":
        pixels[:, :, -1] = 1
    elif kind == "small":
        x *= 2**-6
    return LAYOUTS[draw(layouts)](x.to(dtype))


@st.composite
def masks(draw, shape):
    """None, or at least one source in every image."""
    share = draw(st.sampled_from([None, 0.0, 0.3, 0.9]))
    if share is None:
        return None
    generator = torch.Generator().manual_seed(draw(seeds))
    mask = torch.rand(shape, generator=generator) < share
    flat = mask.flatten(1)
    flat[torch.arange(len(mask)), torch.randint(flat.shape[1], (len(mask),), generator=generator)] = True
    return mask


@st.composite
def scenes(draw, dtype, D, *, one_grid=False):
    """Logits, features, target features or None, and the options of the grids; flat or not."""
    N, C, is_flat = draw(st.integers(1, 3)), draw(st.integers(1, 4)), not one_grid and draw(st.booleans())
    grid, targets = (
        draw(grids),
        draw(st.sampled_from(["own", "another image", *(() if one_grid else ("another grid",))])),
    )
    if is_flat:
        grid = feats_grid = (grid[0] * grid[1],)
    else:
        feats_grid = draw(st.one_of(st.just(grid), grids))
    other_grid = feats_grid if targets == "another image" else (draw(st.integers(1, 20)),) if is_flat else draw(grids)
    logits, feats = draw(tensor(dtype, N, C, *grid)), draw(tensor(dtype, N, D, *feats_grid))
    other = None if targets == "own" else draw(tensor(dtype, N, D, *other_grid))
    options = {
        "mask": draw(masks((N, *grid))),
        "resolution": draw(st.sampled_from(["feats", "logits"])),
        "align_corners": draw(st.booleans()),
    }
    return (logits, feats, other), options


# ---------------------------------------------------------------------------------------------------------------------
# What is compared


def moved(tensors, step, way, *, zeros=False):
    """The tensors as float64 with every entry moved by at most a step of its pixel's largest.

    Where a difference is a rounding itself, one `way` of 1 and -1 turns its sign. Pixels of zeros stay, unless `zeros`.
    """
    generator = torch.Generator().manual_seed(0)
    out = []
    for x in tensors:
        if x is not None and x.is_floating_point():
            x = x.double()
            size = x.abs().amax(1, keepdim=True)
            size = size.clamp_min(float(size.max())) if zeros else size
            x = x + way * step * size * (2 * torch.rand(x.shape, generator=generator, dtype=F64) - 1)
        out.append(x)
    return out


def normalized(feats, normalize):
    """Features (N, D, ...) as the oracle normalises them."""
    images = [oracle.normalize(v.double().numpy(), normalize) for v in feats.flatten(2)]
    return torch.from_numpy(np.stack(images)).view(feats.shape)


def compare(library, reference, tensors, kind, *, features=None, zeros=False, least=lambda wanted, step: 0.0):
    """The library against the oracle, which both return a list of arrays; the inputs stay as they are.

    With `features`, which are some of the tensors, and how they are normalised, the oracle is also asked about the
    normalised ones, moved: of one channel these are signs, however the inputs are moved. `zeros` among them move where
    they are interpolated. `least` is a slack for all that is wanted.
    """
    dtype = next(x.dtype for x in tensors if x is not None and x.is_floating_point())
    step = ROUNDINGS * torch.finfo(F64 if dtype == F64 else F32).eps
    before = [None if x is None else x.clone() for x in tensors]
    wanted = reference(*tensors)
    assume(dtype != F16 or all(np.abs(y).max(initial=0) < LARGEST for y in wanted))
    outputs, *others = library(*tensors), *(reference(*moved(tensors, step, way)) for way in (1, -1))
    if features is not None:
        which, normalize = features
        unit = list(tensors)
        unit[which] = [None if x is None else normalized(x, normalize) for x in unit[which]]
        others.append(reference(*moved(unit, step, 1, zeros=zeros), normalize=None))
    for actual, expected, *beside, name in zip(outputs, wanted, *others, kind, strict=True):
        slack = ROUNDINGS * max(np.abs(np.asarray(expected) - other).max(initial=0) for other in beside)
        slack += least(wanted, step)
        assert_close(actual, expected, name, dtype, slack=slack)
    for x, y in zip(tensors, before, strict=True):
        assert x is None or torch.equal(x, y)


@fuzz("propagation")
@given(data=st.data(), dtype=st.sampled_from(DTYPES), form=st.sampled_from([*propagation_cases.FORMS, "window"]))
def test_propagation(data, dtype, form, number):
    weights = data.draw(st.lists(st.sampled_from([0.0, 0.5, 1.0, 9.0]), min_size=1, max_size=3), label="weights")
    D, scheme = data.draw(channels(len(weights) - 1), label="channels")
    tensors, options = data.draw(scenes(dtype, D, one_grid=form == "window"), label="scene")
    is_softmax = form in ("softmax", "attention", "window")
    options |= {
        "weights": weights,
        "scheme": scheme,
        "normalize": data.draw(st.sampled_from(oracle.NORMALIZATIONS)),
        "similarity": data.draw(st.sampled_from(["dot", "cosine", *(["gaussian"] if is_softmax else [])])),
    }
    if form == "window":
        form = "attention"
        dilations = st.integers(1, 3) | st.lists(st.integers(1, 3), min_size=1, max_size=2).map(tuple)
        options |= {"radius": data.draw(st.integers(1, 3)), "dilation": data.draw(dilations)}
    elif is_softmax:
        options["chunk_size"] = data.draw(st.none() | st.integers(1, 40))
    compare(
        lambda *x: [propagation_cases.propagate(form, *x, **options)],
        lambda *x, **changed: [propagation_cases.expected(form, *x, **options | changed)],
        tensors,
        ["propagation"],
        features=(slice(1, 3), options["normalize"]),
        zeros=options["resolution"] == "logits",
    )


@fuzz("classifier")
@given(data=st.data(), dtype=st.sampled_from(DTYPES), form=st.sampled_from([*classifier_cases.FORMS]))
def test_classifiers(data, dtype, form, number):
    weights = (1.0, *data.draw(st.lists(st.sampled_from([0.0, 0.5, 1.0]), max_size=2)))
    D, scheme = data.draw(channels(len(weights) - 1, at_most=5))
    tensors, options = data.draw(scenes(dtype, D))
    options |= {
        "weights": weights,
        "scheme": scheme,
        "normalize": data.draw(st.sampled_from(oracle.NORMALIZATIONS)),
        "across": data.draw(st.sampled_from(["image", "batch"])),
        "shrinkage": data.draw(st.sampled_from([0.01, 0.1, 1.0])),
    }
    if form == "ridge":
        options["balance"] = data.draw(st.sampled_from([0.0, 0.5, 1.0]))
    else:
        if data.draw(st.booleans()):
            C = tensors[0].shape[1]
            options["statistics"] = ClassStatistics(C, D)
            options["statistics"].update(data.draw(tensor(F64, 2, C, 4, 3)), data.draw(tensor(F64, 2, D, 4, 3)))
            options["across"] = data.draw(st.sampled_from(["image", "batch", "stored"]))
            options["normalize"] = None
        if options["across"] == "image":
            options["pseudo_counts"] = data.draw(st.sampled_from([0.0, 1.0, 10.0]))
    # Near its clip the logarithm of the ridge magnifies, so of it the probabilities.
    shown, book = (torch.exp, np.exp) if form == "ridge" else (torch.clone, np.asarray)
    compare(
        lambda *x: [shown(classifier_cases.propagate(form, *x, **options).double())],
        lambda *x: [book(classifier_cases.expected(form, *x, **options))],
        tensors,
        ["classifier"],
    )


@fuzz("loss")
@given(data=st.data(), dtype=st.sampled_from(DTYPES), norm=st.sampled_from(["l1", "frobenius"]))
def test_the_loss_and_its_gradient(data, dtype, norm, number):
    max_order = data.draw(st.integers(0, 2))
    D, scheme = data.draw(channels(max_order + 1))
    N, grid, is_flat = data.draw(st.integers(1, 3)), data.draw(grids), data.draw(st.booleans())
    grid = (grid[0] * grid[1],) if is_flat else grid
    feats = data.draw(tensor(dtype, N, D, *grid))
    if data.draw(st.booleans()):
        target = data.draw(tensor(dtype, N, D, *grid))
        target_grid = grid
    else:
        target_grid = grid if is_flat else data.draw(st.just(grid) | grids)
        labels = torch.randint(-1, 3, (N, *target_grid), generator=torch.Generator().manual_seed(data.draw(seeds)))
        target = torch.where(labels < 0, 255, labels).to(data.draw(st.sampled_from([torch.uint8, torch.int64])))
    mask = data.draw(masks((N, *target_grid)))
    options = {
        "max_order": max_order,
        "scheme": scheme,
        "norm": norm,
        "eta": data.draw(st.sampled_from([0.0, 0.5])),
        "normalize": data.draw(st.sampled_from(oracle.NORMALIZATIONS)),
        "reduction": data.draw(st.sampled_from(["none", "mean", "sum"])),
        "align_corners": data.draw(st.booleans()),
    }
    more = {"chunk_size": data.draw(st.none() | st.integers(1, 40))}
    if norm == "l1" and data.draw(st.booleans()):
        more["num_anchors"] = 36  # no image has more pixels

    def reference(feats, target):
        found = loss_oracle.derivative_loss(
            *(x.double() if x.is_floating_point() else x for x in (feats, target)), mask=mask, **options
        )
        # Where a residual is next to nothing every subgradient is right, and where all are the value is rounding.
        assume(not found.kink <= ROUNDING[dtype])
        assume(not np.any(found.value < 1e-3))
        return [found.value, found.gradient]

    def library(feats, target):
        leaf = feats.detach().requires_grad_()
        value = DerivativeLoss(**options, **more)(leaf, target, mask=mask)
        return [value.detach(), torch.autograd.grad(value.sum(), leaf)[0]]

    def of_the_gradient(wanted, step):
        """That of the terms that cancel in it: features of zeros have none themselves."""
        largest = max(float(x.abs().max()) for x in (feats, target) if x.is_floating_point())
        return step * float(np.max(wanted[0])) / largest if largest > 0 else 0.0

    compare(library, reference, (feats, target), ["loss", "gradient"], least=of_the_gradient)


@fuzz("similarity")
@given(data=st.data(), dtype=st.sampled_from(DTYPES), similarity=st.sampled_from(["dot", "cosine", "gaussian"]))
def test_similarity(data, dtype, similarity, number):
    order = data.draw(st.integers(0, 3))
    D, scheme = data.draw(channels(order))
    normalize = data.draw(st.sampled_from(oracle.NORMALIZATIONS))
    N, M, K = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 8)), data.draw(st.integers(1, 8))
    tensors = (data.draw(tensor(dtype, N, D, M)), data.draw(st.none() | tensor(dtype, N, D, K)))
    query = data.draw(st.none() | st.lists(st.integers(0, M - 1), min_size=1, max_size=4))

    def reference(feats, target_feats, normalize=normalize):
        out = []
        for n in range(N):
            V, W = (
                oracle.normalize(x[n].double().numpy(), normalize)
                for x in (feats, feats if target_feats is None else target_feats)
            )
            S = oracle.similarity(V, W, order, scheme, similarity)
            out.append(S if query is None else S[query])
        return [np.stack(out)]

    def library(feats, target_feats):
        rows = None if query is None else torch.tensor(query)
        options = {"order": order, "scheme": scheme, "normalize": normalize, "similarity": similarity}
        return [derivative_similarity(feats, target_feats, query=rows, **options)]

    def of_the_distance(wanted, step):
        """That of the squares of length that cancel in it, in float64."""
        if similarity != "gaussian":
            return 0.0
        longest = max(
            np.square(oracle.difference(oracle.normalize(v.double().numpy(), normalize), order, scheme)).sum(0).max()
            for x in tensors
            if x is not None
            for v in x
        )
        return ROUNDINGS * np.finfo(np.float64).eps * longest

    compare(library, reference, tensors, ["similarity"], features=(slice(0, 2), normalize), least=of_the_distance)
