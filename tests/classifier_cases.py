"""Inputs for the tests of ridge and discriminant, and the library and the oracle behind one signature."""

import numpy as np
import pytest
import torch

from dlprop.affinity import Discriminant, Ridge
from dlprop.propagation import derivative_label_propagation
from dlprop.statistics import ClassStatistics

from .oracles import classifier as oracle
from .tolerances import assert_close

FORMS = {"discriminant": Discriminant, "ridge": Ridge}
forms = pytest.mark.parametrize("form", FORMS)


def propagate(form, logits, feats, target_feats=None, *, mask=None, resolution="feats", align_corners=True, **options):
    """The library."""
    grids = {"resolution": resolution, "align_corners": align_corners}
    return derivative_label_propagation(
        logits, feats, target_feats, mask=mask, affinity=FORMS[form](**options), **grids
    )


def expected(form, logits, feats, target_feats=None, *, statistics=None, **options):
    """The oracle."""
    stored = None
    if statistics is not None:
        stored = oracle.Statistics(*(x.double().numpy() for x in statistics.statistics))
    return oracle.propagate(form, logits, feats, target_feats, stored=stored, **options)


def inputs(grid=(4, 5), feats_grid=None, target_grid=None, *, N=2, C=3, D=4, dtype=torch.float64):
    """Logits, features and target features (or None) whose values float32 holds exactly; channels are correlated."""
    mixing = torch.eye(D) + 0.3 * torch.randn(D, D)
    mean = torch.randn(D)

    logits, feats = 2 * torch.randn(N, C, *grid), _features(N, mixing, mean, feats_grid or grid)
    target_feats = None if target_grid is None else _features(N, mixing, mean, target_grid)
    return tuple(None if x is None else x.to(dtype) for x in (logits, feats, target_feats))


def _features(N, mixing, mean, grid):
    flat = mixing @ torch.randn(N, len(mean), torch.Size(grid).numel()) + mean[:, None]
    return flat.unflatten(2, grid)


def assert_matches(form, actual, wanted, kind="classifier"):
    """Compare log-probabilities; near its clip the logarithm of the ridge magnifies, so of it the probabilities."""
    dtype = actual.dtype
    if form == "ridge":
        actual, wanted = actual.double().exp(), np.exp(np.asarray(wanted))
    assert_close(actual, np.asarray(wanted), kind, dtype)


def compare(form, *tensors, kind="classifier", **options):
    """The library and the oracle must agree."""
    actual = propagate(form, *tensors, **options)
    assert actual.dtype == tensors[0].dtype
    assert_matches(form, actual, expected(form, *tensors, **options), kind)


def draw(seed, M, *, C=3, D=4, spread=2.0):
    """Flat logits and features of one image; more pixels than channels."""
    rng = np.random.default_rng(seed)
    mixing = np.eye(D) + 0.3 * rng.standard_normal((D, D))
    logits = spread * rng.standard_normal((1, C, M))
    return torch.from_numpy(logits), torch.from_numpy(mixing @ rng.standard_normal((1, D, M)) + rng.standard_normal())


def stored(C=3, D=4, seed=3):
    """Statistics of other images."""
    generator = torch.Generator().manual_seed(seed)
    result = ClassStatistics(C, D)
    logits, feats = (torch.randn(2, size, 9, generator=generator, dtype=torch.float64) for size in (C, D))
    result.update(2 * logits, feats + 0.5)
    return result
