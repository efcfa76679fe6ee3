"""`DerivativeLoss` as the dataclass that is a Module: options, printing, copies, compilation."""

import copy
import dataclasses
import pickle

import numpy as np
import pytest
import torch

from dlprop import DerivativeLoss
from tests.loss_cases import draw
from tests.tolerances import assert_close

F64, F32 = torch.float64, torch.float32


OTHERS = {
    "max_order": 2,
    "eta": 0.25,
    "norm": "l1",
    "scheme": "central",
    "normalize": "softmax",
    "ignore_index": -1,
    "reduction": "none",
    "align_corners": False,
    "num_anchors": 3,
    "chunk_size": 5,
    "backend": "tiled",
}
every_module = pytest.mark.parametrize("options", [{}, OTHERS, {"norm": "frobenius"}], ids=["plain", "all", "squared"])


def test_options_are_attributes_and_fields():
    loss = DerivativeLoss(**OTHERS)
    assert {name: getattr(loss, name) for name in OTHERS} == OTHERS
    assert [field.name for field in dataclasses.fields(loss)] == list(OTHERS)
    assert all(field.kw_only for field in dataclasses.fields(loss))
    assert dataclasses.replace(loss, eta=0.5).eta == 0.5
    numbers = DerivativeLoss(max_order=np.int64(2), eta=np.float32(0.25), num_anchors=np.int32(3))
    assert [type(x) for x in (numbers.max_order, numbers.eta, numbers.num_anchors)] == [int, float, int]


@every_module
def test_module_prints_pickles_and_copies(options):
    loss = DerivativeLoss(**options)
    for field in dataclasses.fields(loss):
        assert f"{field.name}={getattr(loss, field.name)!r}" in repr(loss)
    assert repr(loss).startswith("DerivativeLoss(")
    feats, labels = draw("labels", ignored=loss.ignore_index)
    torch.manual_seed(0)
    expected = loss(feats, labels)
    for twin in (pickle.loads(pickle.dumps(loss)), copy.deepcopy(loss), copy.copy(loss).double().to("cpu")):
        assert repr(twin) == repr(loss)
        torch.manual_seed(0)
        assert torch.equal(twin(feats, labels), expected)


def test_module_has_no_state():
    loss = DerivativeLoss()
    assert not loss.state_dict()
    assert not list(loss.parameters())
    assert not list(loss.buffers())
    loss.load_state_dict({})
    assert loss.eval().training is False
    assert loss.train().training is True


@pytest.mark.parametrize(("name", "value"), [("reduction", "avg"), ("eta", -1.0), ("norm", "l2"), ("num_anchors", 0)])
def test_options_are_checked_where_they_were_set_later(name, value):
    loss = DerivativeLoss()
    setattr(loss, name, value)
    with pytest.raises(ValueError, match=f"^{name} must be"):
        loss(*draw("features", dtype=F32))


def test_module_is_a_key_and_a_part_of_others():
    loss, twin = DerivativeLoss(), DerivativeLoss()
    assert loss != twin  # as every Module: equal options do not make two parts of a network one
    assert len({loss: 1, twin: 2}) == 2

    class Matched(torch.nn.Sequential):
        def forward(self, feats):
            return self[1](self[0](feats), feats)

    network = Matched(torch.nn.Conv2d(11, 7, 1), DerivativeLoss(eta=0.0, max_order=0))
    assert list(network.state_dict()) == ["0.weight", "0.bias"]
    network[0] = torch.nn.Identity()
    feats, _ = draw("features", dtype=F32)
    assert network(feats) < 1e-12
    losses = torch.nn.ModuleList([loss, twin, loss])
    assert list(losses.modules()) == [losses, loss, twin]
    assert "DerivativeLoss(max_order=1" in repr(losses)


@every_module
def test_compiled_module(options):
    loss = DerivativeLoss(**options)
    feats, labels = draw("labels", ignored=loss.ignore_index)
    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    values = []
    for module in (loss, compiled):
        torch.manual_seed(0)
        leaf = feats.clone().requires_grad_()
        value = module(leaf, labels)
        value.sum().backward()
        values.append((value, leaf.grad))
    assert_close(values[1][0], values[0][0].detach(), "loss")
    assert_close(values[1][1], values[0][1], "gradient")
