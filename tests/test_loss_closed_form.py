"""The closed form of labels at order 0: taken only where it holds."""

import pytest
import torch

from dlprop import DerivativeLoss, _ops
from dlprop import loss as loss_module
from dlprop._kernels import tiled
from tests.loss_cases import assert_matches, draw, draw_away_from_kinks, evaluate, expect, loss_of
from tests.tolerances import assert_close

F64 = torch.float64


@pytest.fixture
def closed_forms(monkeypatch):
    """A list that grows by one at every use of the closed form."""
    taken = []
    formula = loss_module._label_l1_of_fractions

    def spy(*arguments):
        taken.append(1)
        return formula(*arguments)

    monkeypatch.setattr(loss_module, "_label_l1_of_fractions", spy)
    return taken


@pytest.mark.parametrize(
    ("holds", "options", "sign"),
    [
        (True, {}, 1),
        (True, {"normalize": "softmax"}, 1),
        (True, {"normalize": "softmax"}, -1),
        (True, {"backend": "tiled", "max_order": 0, "reduction": "none"}, 1),
        (False, {}, -1),
        (False, {"normalize": "l2"}, 1),
        (False, {"normalize": None}, 1),
        (False, {"num_anchors": 4}, 1),
        (False, {"norm": "frobenius"}, 1),
    ],
)
def test_the_closed_form_is_taken_only_where_it_holds(closed_forms, holds, options, sign):
    formula = {name: value for name, value in options.items() if name not in ("backend", "num_anchors")}
    feats, labels, expected = draw_away_from_kinks("labels", nonnegative=True, options=formula)
    if sign < 0:
        feats[0, 2, 1, 1] *= -1
        expected = expect(feats, labels, **formula)
    actual = evaluate(feats, labels, **options)
    assert len(closed_forms) == holds
    if "num_anchors" not in options:
        assert_matches(actual, expected)


def test_the_closed_form_is_not_for_features(closed_forms):
    feats, target = draw("features", nonnegative=True)
    loss_of(feats, target)
    assert not closed_forms


def test_the_closed_form_is_never_the_answer_of_triton(closed_forms, monkeypatch):
    # The tiles answer in Triton's place, so that it runs anywhere.
    monkeypatch.setattr(_ops, "find_spec", lambda _: True)
    monkeypatch.setattr(tiled, "check_device", lambda _: None, raising=False)
    monkeypatch.setitem(_ops.KERNELS, "triton", "tiled")
    feats, labels, expected = draw_away_from_kinks("labels", nonnegative=True)
    assert_matches(evaluate(feats, labels, backend="triton"), expected)
    assert not closed_forms


def test_the_closed_form_looks_at_no_value_under_a_transform_or_a_compiler(closed_forms):
    feats, labels, expected = draw_away_from_kinks("labels", nonnegative=True)
    loss = DerivativeLoss()
    assert_matches((loss(feats, labels), torch.func.grad(loss)(feats, labels)), expected)
    assert len(closed_forms) == 1  # of the value alone
    del closed_forms[:]
    assert_close(torch.func.vmap(loss, (0, None))(feats[None], labels)[0], expected.value, "loss")
    assert_close(torch.compile(loss, backend="eager", fullgraph=True)(feats, labels), expected.value, "loss")
    assert not closed_forms


def test_a_zero_vector_or_nan_among_fractions(closed_forms):
    feats, labels = draw("labels", nonnegative=True, ignored=None)
    feats[0, :, 1, 1] = 0
    assert_close(loss_of(feats, labels), expect(feats, labels).value, "loss")
    assert len(closed_forms) == 1
    feats[0, 2, 0, 0] = torch.nan
    assert loss_of(feats, labels).isnan()
