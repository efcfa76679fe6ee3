"""The sampled loss: target pixels are drawn among those that count, each standing for n_valid / K of them."""

import itertools
from functools import partial

import numpy as np
import pytest
import torch

from dlprop import DerivativeLoss
from tests.loss_cases import (
    FORMS,
    assert_matches,
    draw,
    draw_away_from_kinks,
    draw_direction,
    draw_mask,
    evaluate,
    every_pair_term,
    expect,
    loss_of,
)
from tests.tolerances import assert_close

F64 = torch.float64


def _many_draws(feats, target, valid, draws, **options):
    """The values, or values and gradients, of so many draws for one image: a batch of copies draws for each."""
    copies = [x.expand(draws, *x.shape[1:]) for x in (feats, target, valid)]
    return evaluate(*copies[:2], mask=copies[2], reduction="none", **options)


def _sparse(edge, labelled, *, D=6, classes=3, seed=0):
    """Signed features and labels of an image of which `labelled` pixels count, (1, D, H, W), (1, H, W) and the mask."""
    generator = torch.Generator().manual_seed(seed)
    feats = torch.randn(1, D, edge, edge, generator=generator, dtype=F64)
    labels = torch.randint(classes, (1, edge, edge), generator=generator)
    valid = torch.zeros(edge * edge, dtype=torch.bool)
    valid[torch.randperm(edge * edge, generator=generator)[:labelled]] = True
    return feats, labels, valid.view(1, edge, edge)


def _dense(feats, labels, valid):
    """The pixels that count as an image of their own."""
    return feats[:, :, valid[0]], labels[valid][None]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("max_order", [0, 1])
def test_a_sampled_loss_is_the_loss_of_one_subset_and_all_subsets_are_equally_likely(form, max_order):
    # Five of M = 7 pixels count, K = 2: ten subsets. Each draw must be one of them, in value and gradient (through both
    # roles).
    feats, target = draw(form, N=1, D=7, grid=(1, 7), ignored=None)
    mask = torch.tensor([[[True, True, False, True, True, False, True]]])
    options = {"max_order": max_order, "eta": 0.1}
    subsets = list(itertools.combinations([0, 1, 3, 4, 6], 2))
    expected = [expect(feats, target, mask=mask, anchors=x, reduction="none", **options) for x in subsets]
    values = np.array([subset.value[0] for subset in expected])
    assert np.diff(np.sort(values)).min() > 1e-9
    exact = expect(feats, target, mask=mask, reduction="none", **options)
    assert_close(values.mean(), exact.value[0], "loss")  # unbiased, once the draws are uniform
    draws = 400
    value, gradient = _many_draws(feats, target, mask, draws, num_anchors=2, **options)
    drawn = np.abs(values[:, None] - value.numpy()).argmin(0)
    assert_close(value, values[drawn], "loss")
    assert_close(gradient, np.concatenate([expected[n].gradient for n in drawn]), "gradient")
    # Pearson's statistic, chi-squared with 9 degrees of freedom: above 33.7 once in ten thousand.
    counts = np.bincount(drawn, minlength=10)
    assert ((counts - draws / 10) ** 2 / (draws / 10)).sum() < 33.7
    # The sum of Eq. 8 is scaled the same way.
    options |= {"mask": mask, "reduction": "sum"}
    sums = [expect(feats, target, anchors=subset, **options) for subset in subsets]
    value, gradient = evaluate(feats, target, num_anchors=2, **options)
    drawn = np.abs(np.array([subset.value for subset in sums]) - value.item()).argmin()
    assert_matches((value, gradient), sums[drawn])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("labelled", [40, 100])
def test_a_sampled_loss_is_unbiased_and_as_steady_as_that_of_a_dense_image(form, labelled):
    feats, target, valid = _sparse(10, labelled)
    if form == "features":
        target = draw_direction(feats)
    dense = feats[:, :, valid[0]], target[:, :, valid[0]] if form == "features" else target[valid][None]
    exact, slope = evaluate(feats, target, mask=valid, reduction="none")
    K, draws = 8, 400
    value, gradient = _many_draws(feats, target, valid, draws, num_anchors=K)
    samples = torch.stack((value, (gradient * slope).sum((1, 2, 3))))  # the gradient is seen along itself
    exact = torch.stack((exact[0], slope.square().sum()))
    error = samples.std(1) / draws**0.5
    # Four standard errors: a right estimator leaves this interval once in 15,000 choices of the seed; a wrong factor
    # of 0.9 or 1.1 would be far outside.
    assert (error > 0).all()
    assert (4 * error < 0.1 * exact.abs()).all()
    assert ((samples.mean(1) - exact).abs() < 4 * error).all()
    everywhere = torch.ones(1, labelled, dtype=torch.bool)
    of_dense = _many_draws(*dense, everywhere, draws, num_anchors=K, eta=0.0)[0]
    pairs = _many_draws(feats, target, valid, draws, num_anchors=K, eta=0.0)[0]
    spread, wanted = (x.std() / x.mean() for x in (pairs, of_dense))
    assert wanted / 1.5 < spread < 1.5 * wanted


@pytest.mark.parametrize(("edge", "labelled", "num_anchors"), [(129, 166, 1024), (41, 40, 64), (41, 40, 40)])
def test_as_many_anchors_as_labels_is_exact(edge, labelled, num_anchors):
    # 1 % of the pixels, and fewer labels than anchors: every draw takes them all.
    feats, labels, valid = _sparse(edge, labelled)
    labels = torch.where(valid, labels, 255)
    value, gradient = evaluate(*_dense(feats, labels, valid), eta=0.0)
    for _ in range(3):
        sampled = evaluate(feats, labels, num_anchors=num_anchors, eta=0.0)
        assert_close(sampled[0], value, "loss")
        assert_close(sampled[1][:, :, valid[0]], gradient, "gradient")
        assert not sampled[1][:, :, ~valid[0]].any()


def test_every_image_counts_its_own_valid_pixels():
    # 4 and 6 valid pixels, all 15, and none; K = 6.
    feats, target = draw("features", N=4)
    mask = torch.zeros(4, 15, dtype=torch.bool)
    for n, labelled in enumerate((4, 6, 15)):
        mask[n, torch.randperm(15)[:labelled]] = True
    mask = mask.view(4, 3, 5)
    exact = expect(feats, target, mask=mask, reduction="none", eta=0.0)
    copies = [x.repeat(200, *(1,) * (x.ndim - 1)) for x in (feats, target, mask)]
    values = loss_of(*copies[:2], mask=copies[2], num_anchors=6, reduction="none", eta=0.0).view(200, 4)
    for n in (0, 1, 3):
        assert_close(values[:, n], np.broadcast_to(exact.value[n], 200), "loss")
    error = values[:, 2].std() / 200**0.5
    assert 0 < (values[:, 2].mean() - exact.value[2]).abs() < 4 * error


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("num_anchors", [15, 16, 10**9])
def test_as_many_anchors_as_pixels_is_exact(form, num_anchors):
    options = {"mask": draw_mask(), "reduction": "none"}
    feats, target, expected = draw_away_from_kinks(form, options=options)
    assert_matches(evaluate(feats, target, num_anchors=num_anchors, **options), expected)


@pytest.mark.parametrize("form", FORMS)
def test_anchors_come_from_the_default_generator(form):
    feats, target = draw(form)
    values = []
    for chunk_size in (None, None, 1, 4, 7, 15, 100):
        torch.manual_seed(1)
        values.append(evaluate(feats, target, num_anchors=4, reduction="none", chunk_size=chunk_size))
    assert torch.equal(values[0][0], values[1][0])
    for value, gradient in values:
        assert_close(value, values[0][0], "loss")
        assert_close(gradient, values[0][1], "gradient")
    calls = [loss_of(feats, target, num_anchors=4).item() for _ in range(4)]
    assert len(set(calls)) == 4  # anew each call


def test_each_image_draws_its_own_anchors():
    feats, target = draw("labels", N=1)
    values = loss_of(feats.expand(8, -1, -1, -1), target.expand(8, -1, -1), num_anchors=4, reduction="none")
    assert len(set(values.tolist())) == 8


def test_compiled_anchors_are_drawn_among_the_valid_pixels():
    feats, labels, valid = _sparse(9, 20)
    labels = torch.where(valid, labels, 255)
    compiled = torch.compile(DerivativeLoss(num_anchors=32, eta=0.0), backend="eager", fullgraph=True)
    assert_close(compiled(feats, labels), loss_of(*_dense(feats, labels, valid), eta=0.0), "loss")


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")  # torch calls it itself
@pytest.mark.parametrize("form", FORMS)
def test_transforms_of_a_sampled_loss(form):
    loss = DerivativeLoss(num_anchors=4)
    feats, target = draw(form, N=3)

    def one(x):
        torch.manual_seed(0)  # the anchors of every call
        return loss(x, target)

    batch = torch.stack((feats, feats.flip(1), feats.square()))
    vmapped = partial(torch.func.vmap, randomness="same")
    assert_close(vmapped(one)(batch), torch.stack([one(x) for x in batch]), "loss")
    gradients = torch.stack([torch.autograd.grad(one(x.requires_grad_()), x)[0] for x in batch.clone()])
    assert_close(vmapped(torch.func.grad(one))(batch), gradients, "gradient")
    with pytest.raises(RuntimeError, match=r"dlprop.*forward-mode"):
        torch.func.jvp(one, (feats,), (feats,))
    with pytest.raises(RuntimeError, match=r"dlprop.*twice"):
        torch.func.grad(lambda x: torch.func.grad(one)(x).square().sum())(feats)


@every_pair_term
@pytest.mark.parametrize("form", FORMS)
def test_the_host_waits_for_nothing(form, norm, num_anchors):
    # A meta tensor has no value that could be read.
    feats, target = (x.to("meta") for x in draw(form))
    mask = draw_mask().to("meta")
    feats.requires_grad_()
    loss_of(feats, target, mask=mask, norm=norm, num_anchors=num_anchors).backward()
    assert feats.grad.shape == feats.shape


def test_anchors_are_drawn_alike_whatever_the_default_dtype():
    """In bfloat16 most lots would tie, and the first pixels would win."""
    feats, labels = torch.rand(1, 4, 64, 64), torch.randint(0, 3, (1, 64, 64))
    loss = DerivativeLoss(num_anchors=8)
    values = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            torch.default_generator.manual_seed(0)
            values.append(loss(feats, labels))
        finally:
            torch.set_default_dtype(torch.float32)
    assert torch.equal(*values)
