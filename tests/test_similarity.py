"""`derivative_similarity` against the oracle, entry by entry, and its promises about zeros, rows and strides."""

import inspect

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dlprop import derivative_similarity

from .oracles import features
from .oracles.propagation import batched
from .strategies import adversarial_features, operators, seeds
from .tolerances import assert_close

SCHEMES = features.SCHEMES
NORMALIZATIONS = features.NORMALIZATIONS
SIMILARITIES = ("dot", "cosine", "gaussian")
PRODUCTS = ("dot", "cosine")
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def oracle(feats, target_feats=None, *, order=1, scheme="forward", normalize="l1", similarity="dot"):
    """The (N, M, M') array of one order."""

    def one(V, W):
        V, W = (features.normalize(x.reshape(len(x), -1), normalize) for x in (V, W))
        return features.similarity(V, W, order, scheme, similarity)

    return batched(one, feats, feats if target_feats is None else target_feats)


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_against_the_oracle(normalize, similarity, scheme, order):
    options = {"order": order, "scheme": scheme, "normalize": normalize, "similarity": similarity}
    feats = torch.randn(2, 6, 2, 3, dtype=torch.float64)
    other_grid, other_image = torch.randn(2, 6, 4, 1, dtype=torch.float64), torch.randn(2, 6, 2, 3, dtype=torch.float64)
    for dtype in (torch.float64, torch.float32):
        x = feats.to(dtype)
        S = derivative_similarity(x, **options)
        assert S.dtype == dtype
        assert_close(S, oracle(x, **options), "similarity")
        for target_feats in (other_grid.to(dtype), other_image.to(dtype)):
            S = derivative_similarity(x, target_feats, **options)
            assert_close(S, oracle(x, target_feats, **options), "similarity")


@given(
    operators(max_order=3, max_channels=8), st.sampled_from(NORMALIZATIONS), st.sampled_from(SIMILARITIES), st.data()
)
def test_adversarial_features(operator, normalize, similarity, data):
    """One-hot, constant, zero and alternating columns, side by side.

    Not cosine of a scheme that cancels only up to rounding: the direction of rounding noise is nobody's promise.
    """
    D, order, scheme = operator
    V = data.draw(adversarial_features(D, 5))
    feats = torch.from_numpy(V)[None]
    options = {"order": order, "scheme": scheme, "normalize": normalize, "similarity": similarity}
    expected = oracle(feats, **options)
    S = derivative_similarity(feats, **options)
    if similarity == "cosine":
        lengths = np.abs(features.difference(features.normalize(V, normalize), order, scheme)).max(0)
        clear = lengths > 1e-10
        S, expected = S[:, clear][:, :, clear], expected[:, clear][:, :, clear]
        if not clear.any():
            return
    # The squares in the exponent may be hundreds of times the distance that they leave.
    assert_close(S, expected, "sharp" if similarity == "gaussian" else "similarity")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_dtypes(normalize, similarity, dtype, device):
    """Half-precision features are compared in float32: the result carries one rounding."""
    feats = torch.randn(2, 16, 3, 4, device=device).to(dtype)
    for order in (0, 1):
        S = derivative_similarity(feats, order=order, normalize=normalize, similarity=similarity)
        assert S.dtype == dtype
        expected = oracle(feats, order=order, normalize=normalize, similarity=similarity)
        assert_close(S, expected, "similarity")


def test_large_half_precision_features_do_not_overflow():
    """The norm of a float16 vector, and its square, may be beyond float16."""
    feats = torch.full((1, 64, 2), 30_000.0, dtype=torch.float16)
    feats[:, ::2] = -30_000.0
    for normalize in ("l1", "l2"):
        S = derivative_similarity(feats, order=0, normalize=normalize)
        assert_close(S, oracle(feats, order=0, normalize=normalize), "similarity")
    cosine = derivative_similarity(feats, order=1, normalize=None, similarity="cosine")
    assert_close(cosine, np.ones((1, 2, 2)), "similarity")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("similarity", PRODUCTS)
@pytest.mark.parametrize("normalize", ["l1", "l2", None])
def test_zero_vectors_stay_zero_with_zero_gradient(normalize, similarity, order, dtype):
    feats = torch.randn(1, 4, 5).to(dtype)
    feats[:, :, 2] = 0
    feats.requires_grad_()
    S = derivative_similarity(feats, order=order, normalize=normalize, similarity=similarity)
    assert (S[:, 2] == 0).all()
    assert (S[:, :, 2] == 0).all()
    S.backward(torch.randn_like(S))
    assert feats.grad.isfinite().all()
    if normalize is not None or similarity == "cosine":
        assert (feats.grad[:, :, 2] == 0).all()
    others = [0, 1, 3, 4]
    assert (feats.grad[:, :, others] != 0).any(dim=1).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_constant_vectors_have_zero_cosine_with_zero_gradient(normalize, dtype):
    """Their first difference is exactly zero, whatever their norm."""
    feats = torch.randn(1, 4, 3).to(dtype)
    feats[:, :, 1] = 0.25
    feats.requires_grad_()
    S = derivative_similarity(feats, order=1, normalize=normalize, similarity="cosine")
    assert (S[:, 1] == 0).all()
    S.backward(torch.randn_like(S))
    assert feats.grad.isfinite().all()
    assert (feats.grad[:, :, 1] == 0).all()


def test_tiny_vectors_are_still_normalised():
    """eps is 1e-12: features of length 1e-6 are not small, and no half-precision feature is."""
    feats = torch.tensor([[[1e-6], [-3e-6]]])
    assert_close(derivative_similarity(feats, order=0, normalize="l1"), [[[0.625]]], "similarity")
    half = torch.tensor([[[2.0**-24], [0.0]]], dtype=torch.float16)  # the smallest positive float16
    assert derivative_similarity(half, order=0, normalize="l2").item() == 1


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("shape", [(2, 5, 3, 4), (2, 5, 12)])
def test_query_selects_rows(shape, similarity):
    feats, target_feats = torch.randn(shape), torch.randn(2, 5, *(7 for _ in shape[2:]))
    one_for_all = torch.tensor([3, 11, 0, 3])
    one_each = torch.tensor([[3, 11, 0], [0, 5, 5]])
    for targets in (None, target_feats):
        S = derivative_similarity(feats, targets, similarity=similarity)
        rows = derivative_similarity(feats, targets, similarity=similarity, query=one_for_all)
        assert_close(rows, S[:, one_for_all].double().numpy(), "similarity")
        rows = derivative_similarity(feats, targets, similarity=similarity, query=one_each)
        expected = torch.stack([S[n, one_each[n]] for n in range(2)])
        assert_close(rows, expected.double().numpy(), "similarity")
        none = derivative_similarity(feats, targets, query=torch.zeros(0, dtype=torch.long))
        assert none.shape == (2, 0, S.shape[2])


def test_query_gradient_reaches_rows_and_columns():
    feats = torch.randn(2, 4, 6, dtype=torch.float64, requires_grad=True)
    query = torch.tensor([[1, 1], [5, 0]])
    grad = torch.randn(2, 2, 6, dtype=torch.float64)
    (rows,) = torch.autograd.grad(derivative_similarity(feats, query=query), feats, grad)
    whole = derivative_similarity(feats)
    picked = torch.stack([whole[n, query[n]] for n in range(2)])
    (expected,) = torch.autograd.grad(picked, feats, grad)
    assert_close(rows, expected.numpy(), "gradient")


def test_query_never_forms_the_whole_matrix():
    """100,000 pixels squared would be 40 GB."""
    feats = torch.rand(1, 3, 100_000)
    S = derivative_similarity(feats, query=torch.tensor([17]))
    assert S.shape == (1, 1, 100_000)


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_cross_image_is_a_transpose_the_other_way(similarity):
    x, y = torch.randn(2, 5, 3, 2), torch.randn(2, 5, 7, 1)
    there = derivative_similarity(x, y, similarity=similarity)
    back = derivative_similarity(y, x, similarity=similarity)
    assert there.shape == (2, 6, 7)
    assert_close(there, back.transpose(1, 2).double().numpy(), "similarity")


@given(
    operators(("forward", "central", "laplacian"), min_order=1, max_order=2, max_channels=6),
    st.sampled_from(SIMILARITIES),
    seeds,
)
def test_orders_from_one_do_not_see_a_constant(operator, similarity, seed):
    """Added to all channels of features that are not normalised."""
    D, order, scheme = operator
    x = torch.randn(1, D, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    options = {"order": order, "scheme": scheme, "normalize": None, "similarity": similarity}
    S, shifted = (derivative_similarity(x + constant, **options) for constant in (0.0, 1.0))
    torch.testing.assert_close(shifted, S, rtol=0, atol=1e-9)


@pytest.mark.parametrize("options", [{"order": 0}, {"scheme": "sum"}, {"order": 0, "similarity": "cosine"}])
def test_order_zero_and_sums_see_a_constant(options):
    x = torch.randn(1, 5, 4, dtype=torch.float64)
    S, shifted = (derivative_similarity(x + c, normalize=None, **options) for c in (0.0, 1.0))
    assert (S - shifted).abs().max() > 0.1


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_gaussian_is_made_of_dot_products(normalize, order):
    """`-2 log k = a.a + b.b - 2 a.b`: 1 for a pixel with itself, less for any other, the same both ways."""
    x, y = torch.randn(2, 5, 6, dtype=torch.float64), torch.randn(2, 5, 4, dtype=torch.float64)
    options = {"normalize": normalize, "order": order}
    own, other = (derivative_similarity(z, **options).diagonal(dim1=1, dim2=2) for z in (x, y))
    products = derivative_similarity(x, y, **options)
    expected = products - (own[:, :, None] + other[:, None]) / 2
    assert_close(derivative_similarity(x, y, similarity="gaussian", **options).log(), expected.numpy(), "similarity")
    k = derivative_similarity(x, similarity="gaussian", **options)
    assert_close(k.diagonal(dim1=1, dim2=2), np.ones((2, 6)), "similarity")
    assert (k > 0).all()
    assert k.max() <= 1 + 1e-14
    assert_close(k, k.mT.numpy(), "similarity")


def test_gaussian_of_wide_features_does_not_cancel():
    """Squares of some 10^7 differ by the distance, and by much more if they are float32."""
    x = 1000 * torch.randn(1, 64, 20)
    x[:, :, 1] = x[:, :, 0] + 0.1
    k = derivative_similarity(x, normalize=None, similarity="gaussian", order=0)
    assert_close(k, oracle(x, normalize=None, similarity="gaussian", order=0), "similarity")
    assert k[0, 0, 1] < 0.8


@pytest.mark.parametrize("cross", [False, True])
def test_gaussian_does_not_see_a_common_shift(cross):
    """float32 features of spread 1 around 1000 are compared as they are; in float16 around 100; queried too."""
    for dtype, shift, kind in ((torch.float32, 1000.0, "large mean"), (torch.float16, 100.0, "similarity")):
        by_channel = shift * torch.randn(1, 8, 1)
        x, y = ((torch.randn(2, 8, M) + by_channel).to(dtype) for M in (6, 5))
        for order in (0, 1):
            options = {"normalize": None, "similarity": "gaussian", "order": order}
            tensors = (x, y) if cross else (x,)
            expected = oracle(*tensors, **options)
            assert_close(derivative_similarity(*tensors, **options), expected, kind)
            rows = derivative_similarity(*tensors, query=torch.tensor([4]), **options)
            assert_close(rows, expected[:, 4:5], kind)


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_pixel_permutation(normalize, similarity):
    feats = torch.randn(1, 5, 7, dtype=torch.float64)
    order = torch.randperm(7)
    options = {"normalize": normalize, "similarity": similarity}
    S = derivative_similarity(feats, **options)
    permuted = derivative_similarity(feats[:, :, order], **options)
    assert_close(permuted, S[:, order][:, :, order].numpy(), "similarity")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_non_finite_features_show(normalize, similarity, value):
    feats = torch.rand(1, 4, 5) + 0.5
    feats[0, 2, 3] = value
    for order in (0, 1):
        S = derivative_similarity(feats, order=order, normalize=normalize, similarity=similarity)
        others = torch.tensor([0, 1, 2, 4])
        assert S[0, others][:, others].isfinite().all()
        assert not S[0, 3, 3].isfinite()
        for pairs in (S[0, 3, others], S[0, others, 3]):
            # Finite features are infinitely far from an infinite one.
            is_far = (pairs == 0) if similarity == "gaussian" and value == float("inf") else False
            assert (~pairs.isfinite() | is_far).all()


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_smallest_shapes(similarity, normalize):
    options = {"normalize": normalize, "similarity": similarity}
    one = torch.rand(1, 2, 1, 1) + torch.tensor([0.0, 1.0]).reshape(1, 2, 1, 1)
    assert_close(derivative_similarity(one, **options), oracle(one, **options), "similarity")
    single = torch.rand(1, 1, 2) + 1
    assert_close(derivative_similarity(single, order=0, **options), oracle(single, order=0, **options), "similarity")
    empty = torch.zeros(0, 3, 2, 2, requires_grad=True)
    S = derivative_similarity(empty, **options)
    assert S.shape == (0, 4, 4)
    S.sum().backward()
    assert empty.grad.shape == empty.shape
    assert derivative_similarity(empty, query=torch.tensor([1]), **options).shape == (0, 1, 4)


def test_strides_do_not_matter_and_inputs_are_left_alone():
    feats = torch.randn(2, 6, 3, 4)
    expected = derivative_similarity(feats.clone(), similarity="cosine")
    doubled = torch.randn(2, 12, 3, 8)
    doubled[:, ::2, :, ::2] = feats
    views = [
        feats.to(memory_format=torch.channels_last),
        feats.transpose(1, 3).contiguous().transpose(1, 3),
        doubled[:, ::2, :, ::2],
    ]
    for view in views:
        before, query = view.clone(), torch.tensor([2, 0])
        S = derivative_similarity(view, similarity="cosine")
        assert_close(S, expected.double().numpy(), "similarity")
        rows = derivative_similarity(view, view, similarity="cosine", query=query)
        assert_close(rows, expected[:, query].double().numpy(), "similarity")
        assert torch.equal(view, before)
        assert query.tolist() == [2, 0]
    expanded = torch.randn(1, 6, 3, 4).expand(2, -1, -1, -1)
    assert_close(derivative_similarity(expanded), oracle(expanded), "similarity")


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_gradcheck(normalize, similarity):
    x = torch.randn(1, 4, 3, dtype=torch.float64, requires_grad=True)
    y = torch.randn(1, 4, 2, dtype=torch.float64, requires_grad=True)
    options = {"normalize": normalize, "similarity": similarity}
    assert torch.autograd.gradcheck(lambda x: derivative_similarity(x, **options), x)
    assert torch.autograd.gradcheck(lambda x, y: derivative_similarity(x, y, **options), (x, y))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    """Norms and products stay in float32; the result has the features' dtype."""
    feats = torch.randn(2, 16, 12)
    for similarity in SIMILARITIES:
        with torch.autocast("cpu", dtype=dtype):
            S = derivative_similarity(feats, similarity=similarity, normalize=None)
        assert S.dtype == torch.float32
        assert_close(S, oracle(feats, similarity=similarity, normalize=None), "similarity")
    with torch.autocast("cpu", dtype=dtype):
        mixed = derivative_similarity(feats.to(dtype), feats)
    assert mixed.dtype == dtype
    assert_close(mixed, oracle(feats.to(dtype), feats), "autocast")


def test_output_dtype_is_the_first_tensors():
    x = torch.randn(1, 3, 2, dtype=torch.float64)
    assert derivative_similarity(x, x).dtype == torch.float64
    assert derivative_similarity(x.half(), query=torch.tensor([0])).dtype == torch.float16


def test_defaults():
    parameters = inspect.signature(derivative_similarity).parameters
    options = {k: p.default for k, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
    assert options == {"order": 1, "scheme": "forward", "normalize": "l1", "similarity": "dot", "query": None}
    assert list(parameters)[:2] == ["feats", "target_feats"]
    feats = torch.randn(1, 5, 6)
    assert_close(derivative_similarity(feats), oracle(feats), "similarity")
