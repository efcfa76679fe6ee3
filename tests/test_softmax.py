"""The softmax affinity in both directions: in chunks or at once, its three similarities, once differentiable."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dlprop.affinity import Softmax

from .oracles import features
from .propagation_cases import case, dense, expected, inputs, propagate, random_mask
from .strategies import adversarial_features, operators, seeds
from .tolerances import assert_close

FORMS = {"softmax": "targets", "attention": "sources"}
forms = pytest.mark.parametrize("form", FORMS)
similarities = pytest.mark.parametrize("similarity", ["dot", "cosine", "gaussian"])


@similarities
@forms
def test_chunk_size_does_not_matter(form, similarity):
    """30 sources in ragged chunks: values and gradients, against all pairs at once."""
    logits, feats, target_feats = inputs("softmax", (5, 6), None, (7, 3))
    options = {"similarity": similarity, "weights": (3.0, 2.0), "normalize": "l2"}
    for targets, chunk_size in itertools.product((None, target_feats), (1, 2, 5, 20, 21, 29, 30, 31, 1000)):
        with case(targets=targets is not None, chunk_size=chunk_size):
            leaves = [x.clone().requires_grad_() for x in (logits, feats, targets) if x is not None]
            out = propagate(form, *leaves, chunk_size=chunk_size, **options)
            assert_close(out, expected(form, logits, feats, targets, **options), "propagation")
            grad = torch.randn_like(out)
            grads = torch.autograd.grad(out, leaves, grad)
            whole = dense(*(x.flatten(2) for x in leaves), over=FORMS[form], **options)
            for a, b in zip(grads, torch.autograd.grad(whole, leaves, grad.flatten(2)), strict=True):
                assert_close(a, b.numpy(), "gradient")


@pytest.mark.parametrize("normalize", features.NORMALIZATIONS)
@similarities
@forms
def test_gradients_of_every_normalisation(form, similarity, normalize):
    """Against autograd on plain formulas, in float64 and float32; with a mask, which counts some sources 0 times."""
    options = {"similarity": similarity, "normalize": normalize, "weights": (2.0, 0.5, 1.5)}
    tensors = inputs("softmax", (3, 4), None, (2, 5))
    mask = random_mask(2, 3, 4)
    leaves = [x.clone().requires_grad_() for x in tensors]
    grad = torch.randn(2, 3, 2, 5)
    flat = [x.flatten(2) for x in leaves]
    if form == "softmax":
        whole = dense(flat[0] * mask.flatten(1)[:, None], *flat[1:], **options)
    else:
        whole = dense(*flat, mask.flatten(1).double(), over="sources", **options)
    wanted = torch.autograd.grad(whole, leaves, grad.double().flatten(2))
    for dtype in (torch.float64, torch.float32):
        leaves = [x.to(dtype).requires_grad_() for x in tensors]
        out = propagate(form, *leaves, mask=mask, **options)
        for a, b in zip(torch.autograd.grad(out, leaves, grad.to(dtype)), wanted, strict=True):
            assert_close(a, b.numpy(), "gradient")


@given(
    st.sampled_from(list(FORMS)),
    operators(max_order=3, max_channels=8),
    st.sampled_from(features.NORMALIZATIONS),
    st.sampled_from(("dot", "gaussian")),
    st.data(),
)
def test_adversarial_features(form, operator, normalize, similarity, data):
    """One-hot, constant, zero and alternating columns, side by side."""
    D, max_order, scheme = operator
    options = {"scheme": scheme, "normalize": normalize, "similarity": similarity, "weights": (0.5,) * (max_order + 1)}
    feats, targets = (torch.from_numpy(data.draw(adversarial_features(D, M)))[None] for M in (5, 3))
    leaves = [torch.randn(1, 2, 5, dtype=torch.float64), feats, targets]
    leaves = [x.requires_grad_() for x in leaves]
    out = propagate(form, *leaves, **options)
    # S itself may be large, and carries a rounding of its size into the exponent.
    assert_close(out, expected(form, *leaves, **options), "sharp")
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), leaves))


@similarities
def test_over_the_sources_is_over_the_targets_the_other_way(similarity):
    """Both matrices of shares, from logits that are one class a source: one is the other's transpose."""
    V, W = torch.randn(1, 4, 6, dtype=torch.float64), torch.randn(1, 4, 9, dtype=torch.float64)
    options = {"similarity": similarity, "normalize": None, "weights": (1.0, 0.5)}
    there = propagate("attention", torch.eye(6, dtype=torch.float64)[None], V, W, **options)
    back = propagate("softmax", torch.eye(9, dtype=torch.float64)[None], W, V, **options)
    assert_close(there, back.mT.numpy(), "propagation")


def test_each_source_spreads_over_all_targets():
    """Its rows sum to one, so the sum of the logits over the pixels is kept; the columns' sums are not one."""
    logits, feats, target_feats = inputs("softmax", (3, 4), None, (5, 1))
    for similarity in ("dot", "gaussian"):
        options = {"normalize": None, "similarity": similarity}
        out = propagate("softmax", logits, feats, target_feats, **options)
        assert_close(out.sum((2, 3)), logits.sum((2, 3)).numpy(), "propagation")
        columns = propagate("softmax", torch.ones_like(logits), feats, target_feats, **options)
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
@forms
def test_sharp_and_flat_similarities(form, scale):
    """Similarities far beyond what exp can hold; and a mask that leaves out the nearest sources."""
    logits, feats, _ = inputs("softmax", (4, 5), D=6)
    for similarity, normalize in itertools.product(("dot", "cosine", "gaussian"), features.NORMALIZATIONS):
        options = {"weights": (scale, scale), "similarity": similarity, "normalize": normalize, "chunk_size": 7}
        for mask in (None, random_mask(2, 4, 5)):
            with case(masked=mask is not None, **options):
                leaves = [x.clone().requires_grad_() for x in (logits, feats)]
                out = propagate(form, *leaves, mask=mask, **options)
                assert_close(out, expected(form, logits, feats, mask=mask, **options), "sharp")
                assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), leaves))


# Gaussian


@pytest.mark.parametrize("shift", [1.0, 1000.0])
@forms
def test_gaussian_does_not_see_a_common_shift(form, shift):
    """Neither a small nor a large one: the float32 features of spread 1 around 1000 are taken for what they are."""
    logits, feats, targets = inputs("softmax", (4, 5), None, (3, 3), dtype=torch.float32)
    by_channel = shift * torch.randn(1, 5, 1, 1)
    options = {"similarity": "gaussian", "normalize": None, "weights": (1.0, 0.5)}
    mask = random_mask(2, 4, 5)
    for W, m in itertools.product((None, targets + by_channel), (None, mask)):
        with case(targets=W is not None, masked=m is not None):
            V = feats + by_channel
            out = propagate(form, logits, V, W, mask=m, **options)
            assert_close(out, expected(form, logits, V, W, mask=m, **options), "large mean")


@forms
def test_gradients_of_the_gaussian_add_up_to_nothing(form):
    """Over the pixels, sources and targets: the derivative along a common shift."""
    leaves = [x.requires_grad_() for x in inputs("softmax", (4, 5), None, (3, 3))]
    out = propagate(form, *leaves, similarity="gaussian", normalize=None)
    _, of_sources, of_targets = torch.autograd.grad(out, leaves, torch.randn_like(out))
    assert of_sources.abs().max() > 1e-2
    total = of_sources.sum((2, 3)) + of_targets.sum((2, 3))
    assert_close(total, torch.zeros_like(total), "gradient")


@given(st.sampled_from(list(FORMS)), operators(max_order=2, max_channels=6), seeds)
def test_gaussian_of_features_of_one_length_is_the_dot_product(form, operator, seed):
    """In the metric of the orders: -|a - b|^2 / 2 = a.b - |a|^2 / 2 - |b|^2 / 2, and the last two are alike for all."""
    D, max_order, scheme = operator
    generator = torch.Generator().manual_seed(seed)
    weights = tuple((torch.rand(max_order + 1, generator=generator) + 0.1).tolist())
    V, W = (torch.randn(1, D, M, generator=generator, dtype=torch.float64) for M in (5, 4))
    K = sum(w * torch.from_numpy(A.T @ A) for w, A in zip(weights, _matrices(D, max_order, scheme), strict=True))
    V, W = (x / ((K @ x) * x).sum(1, keepdim=True).sqrt() for x in (V, W))
    logits = torch.randn(1, 2, 5, generator=generator, dtype=torch.float64)
    options = {"weights": weights, "scheme": scheme, "normalize": None}
    gaussian, dot = (propagate(form, logits, V, W, similarity=s, **options) for s in ("gaussian", "dot"))
    assert_close(gaussian, dot.numpy(), "propagation")


def _matrices(D, max_order, scheme):
    return [features.toeplitz(D, q, scheme) for q in range(max_order + 1)]


# Derivatives and the object


@similarities
@forms
def test_it_cannot_be_differentiated_twice(form, similarity):
    """An error, never a silent zero."""
    logits, feats, _ = inputs("softmax")
    leaves = [x.requires_grad_() for x in (logits, feats)]

    def twice(first, second):
        out = propagate(form, *leaves, similarity=similarity)
        (grad,) = torch.autograd.grad((out**2).sum(), first, create_graph=True)
        torch.autograd.grad((grad**2).sum(), second)

    for first, second in itertools.product(leaves, repeat=2):
        with pytest.raises(RuntimeError, match=r"dlprop: .*cannot be differentiated twice"):
            twice(first, second)


def test_it_is_frozen_and_compares_by_its_options():
    assert Softmax(weights=[1, 1]) == Softmax() != Softmax(chunk_size=2)
    assert hash(Softmax(weights=[1, 1])) == hash(Softmax())
    windows = [Softmax(over="sources", radius=1, dilation=d) for d in ([1, 2], (1, 2))]
    assert windows[0] == windows[1] != Softmax(over="sources", radius=1)
    assert hash(windows[0]) == hash(windows[1])
    with pytest.raises(AttributeError, match="chunk_size"):
        Softmax().chunk_size = 2
