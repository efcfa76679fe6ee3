"""The squared norm, linear in the pixels: its class sums, its cancellation and its second derivatives.

Its values and gradients are compared with the oracle in `test_loss.py`, beside those of the L1 norm.
"""

import numpy as np
import pytest
import torch

from dlprop.squared import clamped, class_sums
from tests.loss_cases import FORMS, draw, draw_away_from_kinks, evaluate, expect, loss_of
from tests.oracles.features import NORMALIZATIONS, SCHEMES
from tests.tolerances import assert_close

F64, F32 = torch.float64, torch.float32


def _rows_and_classes(N=3, M=40, D=5, classes=6):
    """Rows that are 0 where the class is -1; one class has one pixel, one number has none, one image no class."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(-1, classes, (N, M), generator=generator)
    numbers[numbers == 2] = 4
    numbers[0, 3] = 7
    numbers[2] = -1
    rows = torch.randn(N, M, D, generator=generator, dtype=F64) * (numbers >= 0)[..., None]
    return rows, numbers


def _by_loop(rows, numbers, K):
    N, M, D = rows.shape
    sums, counts = torch.zeros(N, K, D, dtype=rows.dtype), torch.zeros(N, K, dtype=rows.dtype)
    for n in range(N):
        for i in range(M):
            if numbers[n, i] >= 0:
                sums[n, numbers[n, i]] += rows[n, i]
                counts[n, numbers[n, i]] += 1
    return sums, counts


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_class_sums_are_a_loop_and_ignored_pixels_count_nowhere(dtype):
    rows, numbers = _rows_and_classes()
    for actual, expected in zip(class_sums(rows, numbers.to(dtype)), _by_loop(rows, numbers, 8), strict=True):
        assert_close(actual, expected, "loss")
    assert class_sums(rows, numbers)[1].sum() == (numbers >= 0).sum()


def test_class_sums_where_no_value_is_known():
    # As many classes as pixels: nobody waits for the largest number.
    rows, numbers = _rows_and_classes()
    expected = _by_loop(rows, numbers, 40)
    for found in (
        torch.func.vmap(class_sums)(rows[:, None], numbers[:, None]),
        torch.compile(class_sums, backend="eager", fullgraph=True)(rows, numbers),
    ):
        for actual, wanted in zip(found, expected, strict=True):
            assert_close(actual.reshape(wanted.shape), wanted, "loss")
    sums, counts = class_sums(rows.to("meta"), numbers.to("meta"))
    assert sums.shape == (3, 40, 5)
    assert counts.shape == (3, 40)


def test_class_sums_do_not_round_with_every_pixel():
    """Equal rows, whose sum in float32 would lose a part of each one as it grows."""
    M, row = 300_000, torch.tensor([0.1, 0.7, 0.2])
    sums, counts = class_sums(row.expand(1, M, 3), torch.zeros(1, M, dtype=torch.long))
    assert counts.item() == M
    assert counts.dtype == torch.float64  # float32 would stop at 2^24
    assert (sums[0, 0] / M - row.double()).abs().max() < 1e-12


def test_class_sums_of_nothing():
    rows, numbers = _rows_and_classes()
    sums, counts = class_sums(rows[2:], numbers[2:])
    assert sums.shape == (1, 1, 5)
    assert not sums.any()
    assert not counts.any()
    assert class_sums(rows[:0], numbers[:0])[1].sum() == 0


def test_gradient_of_class_sums():
    rows, numbers = _rows_and_classes(M=6)
    assert torch.autograd.gradcheck(lambda x: class_sums(x, numbers)[0], rows.requires_grad_())


def test_clamping_keeps_the_gradient():
    x = torch.tensor([-1e-9, 0.0, 2.0], requires_grad=True)
    y = clamped(x)
    assert y.tolist() == [0, 0, 2]
    y.sum().backward()
    assert x.grad.tolist() == [1, 1, 1]
    assert clamped(torch.tensor(torch.nan)).isnan()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_many_pixels_and_few_classes(form, scheme):
    # More pixels than a block of them: the products are added up.
    options = {"norm": "frobenius", "scheme": scheme, "max_order": 2, "reduction": "none"}
    feats, target = draw(form, grid=(1, 30), D=9)
    many, many_targets = feats.repeat(1, 1, 1, 100).flatten(2), target.repeat(*(1,) * (target.ndim - 1), 100)
    value, gradient = evaluate(many, many_targets.flatten(1 if form == "labels" else 2), **options)
    expected = expect(feats, target, **options)  # a mean over pairs: copies of all pixels change nothing
    assert_close(value, expected.value, "loss")
    summed = gradient.view(2, 9, 100, 30).sum(2)
    assert_close(summed, expected.gradient[:, :, 0], "gradient")


def test_the_squared_norm_near_its_minimum():
    # Both squared norms are differences of large sums; in float32 little may be left of them.
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(6, (1, 225), generator=generator)
    one_hot = torch.nn.functional.one_hot(labels, 8).mT.double()
    feats = (one_hot + 1e-3 * torch.rand(1, 8, 225, generator=generator, dtype=F64)).float()
    options = {"norm": "frobenius", "eta": 0.0, "max_order": 0}
    value, gradient = evaluate(feats, labels, **options)
    expected = expect(feats, labels, **options)
    assert 0 < expected.value < 1e-5
    assert abs(value - expected.value) < 1e-6  # the sums are of size 1
    assert_close(gradient, expected.gradient, "gradient")
    # Against features it is written so that it does not cancel at all.
    near = feats + 1e-3 * torch.randn(1, 8, 225, generator=generator)
    value, gradient = evaluate(feats, near, **options)
    expected = expect(feats, near, **options)
    assert 0 < expected.value < 1e-4
    assert abs(value - expected.value) < 1e-3 * expected.value
    assert np.abs(gradient.numpy() - expected.gradient).max() < 1e-2 * np.abs(expected.gradient).max()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_differentiating_the_squared_norm_twice_is_right(form, normalize):
    options = {"normalize": normalize, "norm": "frobenius", "eta": 0.1}
    feats, target, _ = draw_away_from_kinks(form, D=5, grid=(2, 2), options=options)
    feats.requires_grad_()
    value = loss_of(feats, target, **options)
    generator = torch.Generator().manual_seed(1234)
    probe, direction = torch.randn(2, *feats.shape, generator=generator, dtype=F64)
    (gradient,) = torch.autograd.grad(value, feats, create_graph=True)
    (second,) = torch.autograd.grad((gradient * probe).sum(), feats)
    step = 1e-6 * direction
    above, below = (expect(feats.detach() + s, target, **options).gradient for s in (step, -step))
    slope = ((above - below) * probe.numpy()).sum() / 2e-6
    assert abs((second * direction).sum().item() - slope) <= 1e-6 * abs(slope) + 1e-8


def test_the_squared_norm_keeps_its_gradient_where_rounding_makes_it_negative():
    # Nearly one-hot features, as the labels ask for: the value is below the rounding of its terms, the gradient is not.
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 64, (1, 2048), generator=generator)
    noise = 3e-4 / 64 * torch.rand(1, 64, 2048, generator=generator)
    exact = (torch.nn.functional.one_hot(labels, 64).mT + noise).to(F64)

    def gradient(dtype):
        feats = exact.to(dtype).requires_grad_()
        loss = loss_of(feats, labels, norm="frobenius", max_order=0, eta=0.0, reduction="sum")
        assert loss >= 0
        return torch.autograd.grad(loss, feats)[0]

    expected = gradient(F64)
    assert (gradient(F32) - expected).norm() < 0.2 * expected.norm()
