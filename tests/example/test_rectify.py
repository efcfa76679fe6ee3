"""What makes pseudo-labels: adjusted predictions, statistics that run over the data, and what of them is measured."""

import itertools

import pytest
import torch

from dlprop import DerivativeLabelPropagation
from dlprop.affinity import Discriminant
from dlprop.statistics import ClassStatistics
from examples.derprop_voc.config import make_config
from examples.derprop_voc.data import VOID
from examples.derprop_voc.errors import ConfigError
from examples.derprop_voc.losses import make_propagation
from examples.derprop_voc.model import Output
from examples.derprop_voc.quality import PseudoLabelQuality
from examples.derprop_voc.rectification import Rectification, adjusted, method
from tests.example.frozen_runs import FROZEN
from tests.example.test_distributed import Processes

C, D = 4, 8
DATA = {"affinity": "discriminant", "across": "data", "feature_channels": D, "variant": "no_derivative_loss"}


def batch(seed):
    """Output on two images, pixels that count, and labels with void."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, C, 16, 16, generator=generator) + torch.arange(float(C))[:, None, None]
    weak = Output(logits, torch.rand(2, D, 4, 4, generator=generator))
    valid = torch.rand(2, 16, 16, generator=generator) > 0.2
    labels = torch.randint(0, C - 1, (2, 16, 16), generator=generator)  # one class has no label
    return weak, valid, torch.where(valid, labels, VOID)


def make(**options):
    return Rectification(make_config({"variant": "no_propagation", "feature_channels": D} | options), C)


def mean_prediction(weak, valid):
    """As a loop over pixels."""
    P = weak.logits.double().softmax(1)
    pixels = [P[n, :, y, x] for n, y, x in itertools.product(range(2), range(16), range(16)) if valid[n, y, x]]
    return sum(pixels) / len(pixels)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau": 0.3}, r"tau: 0\.3 applies to adjust prior only, not to none; leave it at 0\.5"),
        ({"adjust": "prior", "temperature": 2}, r"temperature: 2\.0 applies to adjust temperature only, not to prior"),
        ({"adjust": "temperature", "temperature": 0}, r"temperature: expected at least 0\.01, got 0"),
        (
            {"adjust": "temperature", "prior_momentum": 0.5},
            r"prior_momentum: 0\.5 applies to adjust prior and alignment only, not to temperature",
        ),
        ({"adjust": "prior", "prior_momentum": 2}, r"prior_momentum: expected at most 1, got 2"),
        ({"adjust": "priors"}, r"adjust: expected one of none, prior, alignment, temperature, got 'priors'"),
        (
            {"affinity": "discriminant", "across": "batch", "statistics_decay": 0.5},
            r"statistics_decay: 0\.5 applies to across data only, not to batch; leave it at 0\.95",
        ),
        ({"affinity": "ridge", "across": "data"}, r"across: 'data' applies to discriminant only, not to ridge"),
        ({"across": "data"}, r"across: 'data' applies to ridge and discriminant only, not to linear"),
        (DATA | {"normalize": "l2"}, r"normalize: expected auto or none with across data, .*, got l2"),
    ],
)
def test_options_that_do_not_apply_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        make_config(options)


def test_logits_are_adjusted_by_the_log_of_a_prior():
    prior = torch.tensor([0.7, 0.3, 0.0, 0.0])
    logits = torch.randn(2, C, 3, 3)
    expected = torch.stack([logits[:, c] - 0.5 * torch.log(prior[c] + 1e-4) for c in range(C)], 1)
    torch.testing.assert_close(adjusted(logits, prior, 0.5), expected)
    assert adjusted(logits, prior.double(), 0.5).dtype == logits.dtype


def test_the_prior_is_a_running_mean_of_predictions_and_acts_with_the_ramp():
    rectification = make(adjust="prior", tau=0.8, ramp_end=0.5, prior_momentum=0.9)
    weak, valid, labels = batch(0)
    torch.testing.assert_close(
        rectification.pseudo_labels(weak, valid, ramp=1.0), weak.logits.softmax(1)
    )  # nothing seen
    rectification.follow(weak, valid, labels, 0.0)
    second = batch(1)
    rectification.follow(*second, 0.1)
    means = [mean_prediction(*seen[:2]) for seen in ((weak, valid), second)]
    prior = (0.09 * means[0] + 0.1 * means[1]) / (1 - 0.9**2)
    torch.testing.assert_close(prior.sum(), torch.ones((), dtype=torch.float64))
    for ramp in (0.0, 0.25, 1.0):
        expected = (weak.logits.double() - (0.8 * 0.5 * ramp * torch.log(prior + 1e-4))[:, None, None]).softmax(1)
        torch.testing.assert_close(rectification.pseudo_labels(weak, valid, ramp), expected.float())


def test_alignment_brings_the_mean_prediction_to_the_labels_shares():
    rectification = make(adjust="alignment", prior_momentum=0.0)
    weak, valid, labels = batch(0)
    rectification.follow(*batch(1)[:2], batch(1)[2], 0.0)
    rectification.follow(weak, valid, labels, 0.0)
    both = torch.cat([labels, batch(1)[2]])
    counts = torch.tensor([(both == c).sum().item() for c in range(C)], dtype=torch.float64)
    assert torch.equal(rectification.labeled, counts)
    ratio = (counts / counts.sum() + 1e-4) / (mean_prediction(weak, valid) + 1e-4)
    expected = weak.logits.double().softmax(1) * ratio[:, None, None]
    expected = expected / expected.sum(1, keepdim=True)
    for ramp in (0.0, 1.0):
        torch.testing.assert_close(rectification.pseudo_labels(weak, valid, ramp), expected.float())


def test_a_temperature_divides():
    weak, valid, labels = batch(0)
    rectification = make(adjust="temperature", temperature=0.5)
    rectification.follow(weak, valid, labels, 0.5)
    squared = weak.logits.softmax(1).square()
    expected = squared / squared.sum(1, keepdim=True)
    torch.testing.assert_close(rectification.pseudo_labels(weak, valid, 0.5), expected)
    assert not rectification.predicted.any()


def test_what_is_rectified_is_the_adjusted_prediction():
    weak, valid, _ = batch(0)
    options = {"affinity": "discriminant", "variant": "no_derivative_loss"}
    rectification = make(adjust="temperature", **options)
    sharp = weak._replace(logits=weak.logits / 0.5)
    expected = make(**options).pseudo_labels(sharp, valid, 0.3)
    torch.testing.assert_close(rectification.pseudo_labels(weak, valid, 0.3), expected)
    # The prediction that a network is tested with stays as it is.
    assert rectification.propagate.affinity == Discriminant()


def test_running_statistics_are_a_decayed_sum_of_the_batches():
    rectification = make(adjust="prior", tau=0.7, statistics_decay=0.5, **DATA)
    sums = dict.fromkeys(("counts", "sums", "square"), 0.0)
    for step, ramp in enumerate((0.0, 0.4, 0.8)):
        weak, valid, labels = batch(step)
        valid[:] = True
        # On the grid of the features every pixel is itself.
        weak = weak._replace(logits=weak.logits[..., ::4, ::4])
        valid = valid[:, ::4, ::4]
        valid[0, 0, step] = False
        rectification.follow(weak, valid, labels, ramp)
        logits = rectification.adjust(weak.logits, ramp)
        assert step == 0 or not torch.equal(logits, weak.logits)
        P = (logits.double().softmax(1) * valid[:, None]).transpose(0, 1).flatten(1)
        V = weak.feats.double().transpose(0, 1).flatten(1)
        new = {"counts": P.sum(1), "sums": P @ V.T, "square": V * valid.flatten() @ V.T}
        sums = {name: 0.5 * sums[name] + value for name, value in new.items()}
    found = rectification.statistics
    torch.testing.assert_close(found.counts, sums["counts"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.sums, sums["sums"], rtol=1e-5, atol=1e-5)
    mean = sums["sums"].sum(0) / sums["counts"].sum()
    second = sums["square"] - sums["counts"].sum() * mean[:, None] * mean
    torch.testing.assert_close(found.second, second, rtol=1e-4, atol=1e-4)
    # Used in the same step, beside the image's own.
    stored = ClassStatistics(C, D)
    stored.load_state_dict(found.state_dict())
    propagate = DerivativeLabelPropagation(Discriminant(statistics=stored))
    expected = propagate.rectify(logits, weak.feats, 0.8, mask=valid)
    torch.testing.assert_close(rectification.pseudo_labels(weak, valid, 0.8), expected)
    alone = DerivativeLabelPropagation(Discriminant()).rectify(logits, weak.feats, 0.8, mask=valid)
    assert (expected - alone).abs().max() > 0.01
    # P~ of validation images takes them too; the labelled terms of the loss use the same object.
    assert rectification.propagate.affinity.statistics is found


def test_statistics_may_be_given_from_elsewhere():
    config = make_config(DATA)
    assert make_propagation(config).affinity == Discriminant()
    statistics = ClassStatistics(C, D)
    assert make_propagation(config, statistics).affinity.statistics is statistics


def test_nothing_is_kept_that_is_not_asked_for():
    weak, valid, labels = batch(0)
    rectification = make()
    rectification.follow(weak, valid, labels, 1.0)
    assert set(rectification.state_dict()) == {"predicted", "labeled"}
    assert not any(values.any() for values in rectification.state_dict().values())
    with_data = make(**DATA)
    assert {"statistics.counts", "statistics.sums", "statistics.second"} < set(with_data.state_dict())


def test_class_shares_are_those_of_all_processes(monkeypatch):
    weak, valid, labels = batch(0)

    def followed(part):
        rectification = make(adjust="alignment")
        rectification.follow(Output(*(x[part] for x in weak)), valid[part], labels[part], 0.0)
        return rectification.state_dict()

    expected = followed(slice(None))
    for found in Processes(monkeypatch, 2).each(lambda rank: followed(slice(rank, rank + 1))):
        torch.testing.assert_close(found, expected)


def test_shares_and_accuracies_above_the_threshold():
    logits = torch.zeros(1, 2, 1, 4)
    logits[0, 0, 0] = torch.tensor([3.0, 3.0, 0.1, 3.0])
    pseudo = torch.tensor([[[[0.2, 0.4, 0.1, 0.9]], [[0.8, 0.6, 0.9, 0.1]]]])
    target = torch.tensor([[[0, 1, 1, VOID]]])
    propagate = make_propagation(make_config({"affinity": "softmax", "order_weights": [1]}))
    quality = PseudoLabelQuality(propagate, 2, torch.device("cpu"))
    output = Output(logits, torch.eye(4)[None, :, None])
    for _ in range(2):
        quality.unlabeled(output, pseudo, torch.tensor(0.7), target, torch.ones(1, 1, 4, dtype=torch.bool))
    found = quality.compute()["confident"]
    assert found["prediction_share"] == pytest.approx(2 / 3)  # void is none of the pixels
    assert found["prediction_accuracy"] == pytest.approx(1 / 2)
    assert found["pseudo_share"] == pytest.approx(2 / 3)
    assert found["pseudo_accuracy"] == pytest.approx(1 / 2)
    P = propagate(logits, output.feats).softmax(1)[0, :, 0, :3]
    assert found["propagated_share"] == pytest.approx((P.amax(0) >= 0.7).float().mean().item())
    assert quality.compute() == {"pseudo": {}}


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (
            {"variant": "no_propagation", "adjust": "prior"},
            "pseudo-labels: P less 0.5 times the log of its running class shares (ramped) (variant no_propagation)",
        ),
        (
            DATA | {"adjust": "temperature"},
            "pseudo-labels: P at temperature 0.5 and P~ blended by Eq. 5; P~ by affinity discriminant, ",
        ),
        (DATA, "; estimated from the unlabelled images of the last steps and each image's own pixels"),
        (
            DATA | {"across": "image", "adjust": "alignment", "rectify": False},
            "P aligned from its running class shares",
        ),
    ],
)
def test_a_run_says_what_adjusts_and_across_what(options, line):
    assert line in method(make_config(options))


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({}, "pseudo-labels: P and P~ blended by Eq. 5; P~ by affinity discriminant, chosen by --affinity: balances"),
        (
            {"affinity": "linear"},
            "P~ by affinity linear, the default: Eq. 4, the paper's; on real images it costs points",
        ),
        ({"rectify": False}, "pseudo-labels: P itself (no_rectify); P~ by affinity discriminant"),
        ({"variant": "no_propagation"}, "pseudo-labels: P itself (variant no_propagation)"),
        ({"variant": "supervised"}, "labelled images only; no pseudo-labels"),
    ],
)
def test_a_run_says_what_makes_its_pseudo_labels(options, line):
    assert line in method(make_config(FROZEN | options))
