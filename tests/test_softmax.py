"""The softmax affinity: what a source spreads, in chunks or at once, once differentiable and no more."""

import itertools

import pytest
import torch

from dlprop.affinity import Softmax

from .oracles import features
from .propagation_cases import expected, inputs, propagate, random_mask
from .tolerances import assert_close


def dense(logits, feats, targets, weights):
    """`L softmax(S)` of flat features, l1 and cosine, with all pairs of pixels: plain formulas for autograd."""

    def unit_differences(x):
        v = x / x.abs().sum(1, keepdim=True)
        return [d / d.norm(dim=1, keepdim=True) for d in (v.diff(n=q, dim=1) for q in range(len(weights)))]

    pairs = zip(weights, unit_differences(feats), unit_differences(targets), strict=True)
    return logits @ sum(w * (a.mT @ b) for w, a, b in pairs).softmax(2)


@pytest.mark.parametrize("chunk_size", [1, 2, 5, 29, 30, 31, 1000])
def test_chunk_size_does_not_matter(chunk_size):
    """30 sources in ragged chunks: values and gradients, against all pairs at once."""
    logits, feats, target_feats = inputs("softmax", (5, 6), None, (7, 3))
    for targets in (None, target_feats):
        leaves = [x.clone().requires_grad_() for x in (logits, feats, targets) if x is not None]
        options = {"similarity": "cosine", "weights": (3.0, 2.0)}
        out = propagate("softmax", *leaves, chunk_size=chunk_size, **options)
        assert_close(out, expected("softmax", logits, feats, targets, **options), "propagation")
        grad = torch.randn_like(out)
        grads = torch.autograd.grad(out, leaves, grad)
        flat = [x.flatten(2) for x in leaves]
        whole = dense(*flat[:2], flat[-1], options["weights"])
        for a, b in zip(grads, torch.autograd.grad(whole, leaves, grad.flatten(2)), strict=True):
            assert_close(a, b.numpy(), "gradient")


def test_each_source_spreads_over_all_targets():
    """Its rows sum to one, so the sum of the logits over the pixels is kept; the columns' sums are not one."""
    logits, feats, target_feats = inputs("softmax", (3, 4), None, (5, 1))
    out = propagate("softmax", logits, feats, target_feats, normalize=None)
    assert_close(out.sum((2, 3)), logits.sum((2, 3)).numpy(), "propagation")
    columns = propagate("softmax", torch.ones_like(logits), feats, normalize=None)
    assert (columns - 1).abs().max() > 0.1


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("resolution", ["feats", "logits"])
def test_masked_sources_spread_what_they_have(resolution, align_corners):
    """The sum of the unmasked logits arrives; on the features' grid a source weighs 6 points for 63 pixels."""
    logits, feats, target_feats = inputs("softmax", (9, 7), (3, 2), (4, 3))
    mask = random_mask(2, 9, 7)
    options = {"resolution": resolution, "align_corners": align_corners}
    out = propagate("softmax", logits, feats, target_feats, mask=mask, **options)
    weight = 6 / 63 if resolution == "feats" else 1
    assert_close(out.sum((2, 3)), weight * (logits * mask[:, None]).sum((2, 3)).numpy(), "propagation")


@pytest.mark.parametrize("scale", [1e-3, 30.0, 300.0, 3000.0])
def test_sharp_and_flat_similarities(scale):
    """Similarities far beyond what exp can hold."""
    logits, feats, _ = inputs("softmax", (4, 5), D=6)
    for similarity, normalize in itertools.product(("dot", "cosine"), features.NORMALIZATIONS):
        options = {"weights": (scale, scale), "similarity": similarity, "normalize": normalize, "chunk_size": 7}
        leaves = [x.clone().requires_grad_() for x in (logits, feats)]
        out = propagate("softmax", *leaves, **options)
        assert_close(out, expected("softmax", logits, feats, **options), "propagation")
        assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), leaves))


def test_it_cannot_be_differentiated_twice():
    """An error, never a silent zero."""
    logits, feats, _ = inputs("softmax")
    leaves = [x.requires_grad_() for x in (logits, feats)]

    def twice(first, second):
        out = propagate("softmax", *leaves)
        (grad,) = torch.autograd.grad((out**2).sum(), first, create_graph=True)
        torch.autograd.grad((grad**2).sum(), second)

    for first, second in itertools.product(leaves, repeat=2):
        with pytest.raises(RuntimeError, match=r"dlprop: .*cannot be differentiated twice"):
            twice(first, second)


def test_it_is_frozen_and_compares_by_its_options():
    assert Softmax(weights=[1, 1]) == Softmax() != Softmax(chunk_size=2)
    assert hash(Softmax(weights=[1, 1])) == hash(Softmax())
    with pytest.raises(AttributeError, match="chunk_size"):
        Softmax().chunk_size = 2
