"""The resize to the logits' grid with its adjoint, and the norms: what pixels are before an affinity sees them."""

import numpy as np
import pytest
import torch

from dlprop import features as library
from dlprop.features import Pixels, Upsampling, flatten, inverse_norm, normalize_features

from .oracles import features as oracle
from .tolerances import assert_close

# Equal, up, down, across, and grids of one point, one row or one column.
GRIDS = [
    ((3, 4), (3, 4)),
    ((3, 4), (7, 9)),
    ((3, 4), (6, 8)),
    ((5, 4), (2, 3)),
    ((2, 5), (6, 3)),
    ((1, 1), (4, 5)),
    ((1, 4), (3, 9)),
    ((4, 3), (1, 1)),
]
grids = pytest.mark.parametrize(("grid", "size"), GRIDS)
corners = pytest.mark.parametrize("align_corners", [True, False])


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@corners
@grids
def test_upsampling_is_the_matrix_of_interpolation(grid, size, align_corners):
    U = oracle.resizing_matrix(grid, size, align_corners)
    x = normal(2, 3, grid[0] * grid[1])
    assert_close(Upsampling(grid, size, align_corners)(x), x.numpy() @ U, "propagation")


@corners
@grids
def test_the_adjoint_is_the_transposed_matrix(grid, size, align_corners):
    """And a column of the matrix sums to 1, so it keeps the sum over the pixels."""
    U = oracle.resizing_matrix(grid, size, align_corners)
    assert_close(U.sum(0), np.ones(size[0] * size[1]), "propagation")
    y = normal(2, 3, size[0] * size[1])
    adjoint = Upsampling(grid, size, align_corners).adjoint(y)
    assert_close(adjoint, y.numpy() @ U.T, "propagation")
    assert_close(adjoint.sum(2), y.sum(2).numpy(), "propagation")


@corners
@grids
def test_resampling_is_the_interpolation_the_other_way(grid, size, align_corners):
    U = oracle.resizing_matrix(size, grid, align_corners)
    y = normal(2, 3, size[0] * size[1])
    assert_close(Upsampling(grid, size, align_corners).resample(y), y.numpy() @ U, "propagation")


def test_pixels_without_an_upsampling_or_counts_leave_all_as_it_is():
    x = normal(1, 2, 6)
    pixels = Pixels(normal(1, 4, 6), x)
    assert pixels.upsample(x) is pixels.gather(x) is pixels.counted(x) is x
    counted = Pixels(normal(1, 4, 6), x, torch.full((1, 1, 6), 2.0, dtype=torch.float64))
    assert torch.equal(counted.counted(x), 2 * x)


def test_flatten_is_row_major():
    x = torch.arange(12).view(1, 2, 2, 3)
    assert torch.equal(flatten(x), x.view(1, 2, 6))
    flat = x.view(1, 2, 6)
    assert flatten(flat) is flat


@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize("p", [1, 2])
def test_norms_in_parts_are_norms(p, dim, monkeypatch):
    """Large tensors on the CPU add up a few channels at a time: values and gradients as at once, ragged or not."""
    x = normal(2, 7, 9)
    x.select(3 - dim, 3).zero_()
    grad = normal(*(1 if d == dim else s for d, s in enumerate(x.shape)))
    results = {}
    for step in (1 << 20, 40, 1):
        monkeypatch.setattr(library, "NORM_STEP", step)
        leaf = x.clone().requires_grad_()
        out = inverse_norm(leaf, p, dim)
        results[step] = out.detach(), torch.autograd.grad(out, leaf, grad)[0]
    norm = (
        np.linalg.norm(x.numpy(), ord=p, axis=dim, keepdims=True)
        if p == 2
        else np.abs(x.numpy()).sum(dim, keepdims=True)
    )
    assert_close(results[1 << 20][0], np.divide(1, norm, out=np.zeros_like(norm), where=norm > 0), "similarity")
    for step in (40, 1):
        for a, b in zip(results[step], results[1 << 20], strict=True):
            assert_close(a, b.numpy(), "gradient")
    assert (results[1][1].select(3 - dim, 3) == 0).all()


@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize("kind", oracle.NORMALIZATIONS)
def test_normalising_along_either_axis(kind, dim):
    x = normal(2, 5, 4)
    want = np.stack([oracle.normalize(v, kind) if dim == 1 else oracle.normalize(v.T, kind).T for v in x.numpy()])
    assert_close(normalize_features(x, kind, dim), want, "similarity")


@pytest.mark.parametrize("kind", oracle.NORMALIZATIONS)
def test_half_precision_is_normalised_in_float32(kind):
    x = torch.randn(1, 300, 4).half()
    out = normalize_features(x, kind)
    assert out.dtype == torch.float32
    assert_close(out, oracle.normalize(x[0].double().numpy(), kind)[None], "similarity")


@pytest.mark.parametrize("normalize", ["l1", "l2"])
def test_a_norm_that_overflows_is_nan(normalize):
    """Not 0, as the inverse of infinity is."""
    x = torch.tensor([[[2e38, 1.0], [2e38, 1.0]]])
    out = normalize_features(x, normalize)
    assert out[:, :, 0].isnan().all()
    assert torch.equal(out[:, :, 1], normalize_features(x[:, :, 1:], normalize)[:, :, 0])
