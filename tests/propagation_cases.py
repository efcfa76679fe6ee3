"""Inputs for the tests of propagation, and the library and the oracle behind one signature."""

import contextlib

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
}
SIMILARITIES = ("dot", "cosine")


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
