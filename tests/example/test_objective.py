"""The example's objective, Eq. 7: the threshold, the terms of each variant, propagation inside the training."""

import pytest
import torch

from dlprop.affinity import Discriminant, Linear, Ridge, Softmax
from examples.derprop_voc.config import CLASSIFIERS, make_config
from examples.derprop_voc.losses import AFFINITIES, AdaptiveThreshold, Objective, make_propagation
from examples.derprop_voc.model import Output
from examples.derprop_voc.rectification import Rectification


def test_adaptive_threshold_follows_the_most_confident_pixel_of_each_class():
    probabilities = torch.zeros(1, 4, 2, 2)
    probabilities[0, :, 0, 0] = torch.tensor([0.7, 0.1, 0.1, 0.1])
    probabilities[0, :, 0, 1] = torch.tensor([0.9, 0.1, 0.0, 0.0])
    probabilities[0, :, 1, 0] = torch.tensor([0.1, 0.5, 0.2, 0.2])
    probabilities[0, :, 1, 1] = torch.tensor([0.0, 0.0, 1.0, 0.0])
    valid = torch.tensor([[[True, True], [True, False]]])
    threshold = AdaptiveThreshold(0.85, 0.9)
    threshold.update(probabilities, valid)
    torch.testing.assert_close(threshold.value, torch.tensor(0.9 * 0.85 + 0.1 * (0.9 + 0.5) / 2))
    before = threshold.value.clone()
    threshold.update(probabilities, torch.zeros_like(valid))
    assert torch.equal(threshold.value, before)
    fixed = AdaptiveThreshold(0.85, 1.0)
    fixed.update(probabilities, valid)
    torch.testing.assert_close(fixed.value, torch.tensor(0.85))


def make_halves(config):
    torch.manual_seed(0)
    shape = (2, 4, 32, 32)
    labeled, strong, weak = (Output(torch.randn(shape), torch.rand(2, 8, 4, 4)) for _ in range(3))
    for output in (labeled, strong):
        output.logits.requires_grad_()
        output.feats.requires_grad_()
    target = torch.randint(0, 4, (2, 32, 32))
    valid = torch.ones(2, 32, 32, dtype=torch.bool)
    valid[:, :8] = False
    return Objective(config), labeled, strong, weak, target, valid


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"variant": "supervised"}, {"ce_l", "ce_u", "kl"}),  # its unlabelled half is never asked for
        ({"variant": "no_propagation"}, {"ce_l", "ce_u", "kl"}),
        ({"variant": "no_derivative_loss"}, {"ce_l", "ce_l_propagated", "ce_u", "ce_u_propagated", "kl"}),
        ({"variant": "full"}, {"ce_l", "ce_l_propagated", "ce_u", "ce_u_propagated", "kl", "der_l", "der_u"}),
        ({"variant": "full", "weight_propagated": 0}, {"ce_l", "ce_u", "kl", "der_l", "der_u"}),
    ],
)
def test_terms_of_each_variant_and_their_weights(options, names):
    config = make_config(options)
    objective, labeled, strong, weak, target, valid = make_halves(config)
    pseudo = Rectification(config, 4).pseudo_labels(weak, valid, ramp=0.5)
    torch.testing.assert_close(pseudo.sum(1), torch.ones(2, 32, 32))
    confident = pseudo.amax(1) > 0.5
    terms = objective.labeled(labeled, target, valid)
    terms |= objective.unlabeled(strong, pseudo, confident, weak.feats, valid)
    assert set(terms) == names
    weights = {"ce_l": 0.5, "ce_l_propagated": 0.5, "kl": 0.25, "der_l": 0.5, "der_u": 0.5}
    share = 0.25 if "ce_u_propagated" in names else 0.5
    expected = sum(weights.get(name, share) * term for name, term in terms.items())
    torch.testing.assert_close(objective.total(terms), expected)


def test_options_make_the_affinity_and_the_loss():
    shared = {"scheme": "central", "order_weights": [3, 2, 1], "similarity": "cosine", "max_order": 3}
    objective = Objective(make_config(shared | {"normalize": "none", "scale": "mean", "resolution": "logits"}))
    orders = {"weights": (3.0, 2.0, 1.0), "scheme": "central", "similarity": "cosine"}
    assert objective.propagate.affinity == Linear(**orders, normalize=None, scale="mean")
    assert objective.propagate.resolution == "logits"
    softmax = Objective(make_config(shared | {"affinity": "softmax", "normalize": "l2"}))
    assert softmax.propagate.affinity == Softmax(**orders, normalize="l2")
    estimated = {
        "scheme": "central",
        "order_weights": [3, 2, 1],
        "normalize": "l2",
        "shrinkage": 0.5,
        "across": "batch",
    }
    orders = {"weights": (3.0, 2.0, 1.0), "scheme": "central", "normalize": "l2", "shrinkage": 0.5, "across": "batch"}
    ridge = make_propagation(make_config(estimated | {"affinity": "ridge", "balance": 1}))
    assert ridge.affinity == Ridge(**orders, balance=1.0)
    assert make_propagation(make_config(estimated | {"affinity": "discriminant"})).affinity == Discriminant(**orders)
    loss = Objective(make_config(shared | {"loss_normalize": "none", "num_anchors": 7, "eta": 2})).derivative_loss
    assert (loss.max_order, loss.scheme, loss.normalize, loss.num_anchors, loss.eta) == (3, "central", None, 7, 2.0)
    assert (loss.ignore_index, objective.derivative_loss.num_anchors) == (255, None)


@pytest.mark.parametrize(("name", "affinity"), AFFINITIES.items())
def test_an_affinity_alone_has_the_defaults_of_the_library(name, affinity):
    assert make_propagation(make_config({"affinity": name})).affinity == affinity()


@pytest.mark.parametrize("affinity", AFFINITIES)
def test_ramp_blends_from_the_prediction_to_the_propagation(affinity):
    config = make_config({"affinity": affinity})
    objective, _, _, weak, _, valid = make_halves(config)
    if affinity in CLASSIFIERS:
        prediction = weak.logits.softmax(1)
        propagated = objective.propagate(weak.logits, weak.feats, mask=valid).softmax(1)
    else:
        prediction = torch.where(valid[:, None], weak.logits.softmax(1), 0.25)  # padding says nothing
        propagated = objective.propagate(weak.logits * valid[:, None], weak.feats).softmax(1)
    rectification = Rectification(config, 4)
    torch.testing.assert_close(rectification.pseudo_labels(weak, valid, ramp=0.0), prediction)
    torch.testing.assert_close(rectification.pseudo_labels(weak, valid, ramp=1.0), propagated)
    half = Rectification(make_config({"affinity": affinity, "ramp_end": 0.5}), 4)
    torch.testing.assert_close(half.pseudo_labels(weak, valid, ramp=1.0), (prediction + propagated) / 2)
    plain = Rectification(make_config({"affinity": affinity, "rectify": False}), 4)
    torch.testing.assert_close(plain.pseudo_labels(weak, valid, ramp=1.0), weak.logits.softmax(1))


@pytest.mark.parametrize("affinity", AFFINITIES)
def test_padding_carries_nothing(affinity):
    config = make_config({"affinity": affinity})
    objective, labeled, _, weak, target, valid = make_halves(config)
    loud, loud_labeled = (
        output._replace(logits=torch.where(valid[:, None], output.logits, 1e3)) for output in (weak, labeled)
    )
    rectification = Rectification(config, 4)
    expected, found = (rectification.pseudo_labels(output, valid, ramp=1.0) for output in (weak, loud))
    assert torch.equal(found, expected)
    expected, found = (
        objective.labeled(output, target, valid)["ce_l_propagated"] for output in (labeled, loud_labeled)
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize("affinity", AFFINITIES)
def test_a_whole_image_is_propagated_as_in_evaluation(affinity):
    objective, labeled, _, _, target, valid = make_halves(make_config({"affinity": affinity}))
    logits, feats = labeled.logits, labeled.feats
    if affinity in CLASSIFIERS:  # the mask takes the mean around a point: the same where all pixels are alike
        logits, feats = logits[:, :, :1, :1].expand(-1, -1, 32, 32), feats[:, :, :1, :1].expand(-1, -1, 4, 4)
    whole = torch.ones_like(valid)
    term = objective.labeled(Output(logits, feats), target, whole)["ce_l_propagated"]
    torch.testing.assert_close(term, torch.nn.functional.cross_entropy(objective.propagate(logits, feats), target))


@pytest.mark.parametrize("detach", [False, True])
def test_detached_logits_train_the_features_only(detach):
    objective, labeled, _, _, target, valid = make_halves(make_config({"detach_logits": detach}))
    objective.labeled(labeled, target, valid)["ce_l_propagated"].backward()
    assert labeled.feats.grad.abs().sum() > 0
    assert (labeled.logits.grad is None) == detach


def test_padding_and_void_do_not_count():
    objective, labeled, strong, weak, target, valid = make_halves(make_config({}))
    pseudo = weak.logits.softmax(1)
    confident = torch.ones_like(valid)
    terms = objective.labeled(labeled, target, valid) | objective.unlabeled(
        strong, pseudo, confident, weak.feats, valid
    )
    noise = torch.where(valid, 0, torch.randint(0, 4, target.shape))
    terms_noisy = objective.labeled(labeled, (target + noise).clamp(max=3), valid)
    assert all(torch.equal(terms[name], value) for name, value in terms_noisy.items())
    nothing = objective.labeled(labeled, torch.full_like(target, 255), valid)
    assert nothing["ce_l"] == nothing["ce_l_propagated"] == 0
    all_padded = objective.unlabeled(strong, pseudo, confident, weak.feats, torch.zeros_like(valid))
    assert all_padded["ce_u"] == all_padded["kl"] == 0
