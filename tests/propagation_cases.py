"""Inputs for the tests of propagation, and the library and the oracle behind one signature."""

import contextlib

import pytest
import torch

from dlprop.affinity import Linear, Pixels, Softmax
from dlprop.propagation import derivative_label_propagation

from .oracles import propagation as oracle

# What an affinity is made of besides the options of all: the oracle's names.
FORMS = {
    "sum": {"affinity": "linear", "scale": "sum"},
    "mean": {"affinity": "linear", "scale": "mean"},
    "degree": {"affinity": "linear", "scale": "degree"},
    "softmax": {"affinity": "softmax"},
    "attention": {"affinity": "softmax", "over": "sources"},
}
SIMILARITIES = ("dot", "cosine")
# Every form with every similarity that it takes.
KINDS = [
    (form, similarity)
    for form, own in FORMS.items()
    for similarity in (*SIMILARITIES, *(("gaussian",) if own["affinity"] == "softmax" else ()))
]

forms = pytest.mark.parametrize("form", FORMS)
similarities = pytest.mark.parametrize("similarity", SIMILARITIES)
kinds = pytest.mark.parametrize(("form", "similarity"), KINDS)
resolutions = pytest.mark.parametrize("resolution", ["feats", "logits"])


def make(form, **options):
    """The affinity of a form."""
    own = FORMS[form].copy()
    affinity = {"linear": Linear, "softmax": Softmax}[own.pop("affinity")]
    return affinity(**own, **options)


def propagate(form, logits, feats, target_feats=None, *, mask=None, resolution="feats", align_corners=True, **options):
    """The library."""
    grids = {"resolution": resolution, "align_corners": align_corners}
    return derivative_label_propagation(logits, feats, target_feats, mask=mask, affinity=make(form, **options), **grids)


def expected(form, logits, feats, target_feats=None, **options):
    """The oracle, image by image."""
    options.pop("chunk_size", None)
    return oracle.batched(oracle.propagate, logits, feats, target_feats, **FORMS[form], **options)


def inputs(form, grid=(3, 4), feats_grid=None, target_grid=None, *, N=2, C=3, D=5, dtype=torch.float64):
    """Logits, features and target features (or None) whose values float32 holds exactly.

    Features are positive for "degree", so that no degree is near zero, and of either sign otherwise.
    """
    draw = (lambda *shape: torch.rand(*shape) + 0.3) if form == "degree" else torch.randn
    logits = torch.randn(N, C, *grid)
    feats = draw(N, D, *(feats_grid or grid))
    target_feats = None if target_grid is None else draw(N, D, *target_grid)
    return tuple(None if x is None else x.to(dtype) for x in (logits, feats, target_feats))


def random_mask(N, *grid):
    """Two thirds of the pixels, at least one an image; the last image has only one."""
    mask = torch.rand(N, *grid) < 0.67
    mask.flatten(1)[:, 0] = True
    mask.flatten(1)[-1:, 1:] = False
    return mask


def dense(
    logits,
    feats,
    targets=None,
    counts=None,
    inside=None,
    *,
    over="targets",
    weights=(1.0, 1.0),
    normalize="l1",
    similarity="dot",
):
    """The softmax forms of flat inputs (N, _, M) with all pairs of pixels at once: plain formulas for autograd.

    Sources count as often as `counts` (N, M) says, and only where `inside` (M, M') is true; forward differences.
    """

    def orders(x):
        norms = {None: 1, "l1": x.abs().sum(1, keepdim=True), "l2": x.norm(dim=1, keepdim=True)}
        x = x.softmax(1) if normalize == "softmax" else x / norms[normalize]
        differences = [x.diff(n=q, dim=1) for q in range(len(weights))]
        return [d / d.norm(dim=1, keepdim=True) for d in differences] if similarity == "cosine" else differences

    def pairs(a, b):
        return -(a[:, :, :, None] - b[:, :, None]).square().sum(1) / 2 if similarity == "gaussian" else a.mT @ b

    sides = zip(weights, orders(feats), orders(feats if targets is None else targets), strict=True)
    S = sum(w * pairs(a, b) for w, a, b in sides)
    if over == "targets":
        return logits @ S.softmax(2)
    if counts is not None:
        S = S + counts.log()[:, :, None]
    if inside is not None:
        S = S.masked_fill(~torch.as_tensor(inside), -torch.inf)
    nothing = S.isneginf().all(1, keepdim=True)
    return logits @ S.masked_fill(nothing, 0).softmax(1).masked_fill(nothing, 0)


class NearestMean:
    """Of every target, minus the distance to the mean features of each class: fifteen lines, as a user writes them."""

    def propagate(self, sources: Pixels, targets: Pixels) -> torch.Tensor:
        """The logits are the shares of the classes; a masked source's are 0."""
        shares = sources.gather(sources.counted(sources.logits))
        sums = shares @ sources.feats.mT
        means = sums / shares.sum(dim=2, keepdim=True).clamp_min(1e-6)
        distances = torch.cdist(means, targets.feats.mT)
        return targets.upsample(-distances)


@contextlib.contextmanager
def case(**facts):
    """Name the case in a loop that failed."""
    try:
        yield
    except (AssertionError, ValueError, TypeError, RuntimeError) as error:
        error.add_note(f"case: {facts}")
        raise
