"""The public API as it was released: a name, an argument or a default changes here first, or not at all."""

import inspect
import re
from collections.abc import Callable
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest

import dlprop
import dlprop.affinity
import dlprop.loss
import dlprop.propagation
from dlprop import (
    DerivativeLabelPropagation,
    DerivativeLoss,
    MomentumAverager,
    derivative_similarity,
    finite_difference,
    theory,
)
from dlprop.affinity import Affinity, Linear, Softmax
from dlprop.propagation import derivative_label_propagation

NAMES = {
    dlprop: [
        "DerivativeLabelPropagation",
        "DerivativeLoss",
        "MomentumAverager",
        "derivative_similarity",
        "finite_difference",
    ],
    dlprop.affinity: ["Affinity", "Discriminant", "Linear", "Pixels", "Ridge", "Softmax"],
    dlprop.propagation: ["DerivativeLabelPropagation", "derivative_label_propagation"],
    dlprop.loss: ["DerivativeLoss"],
    theory: ["ar1_precision", "derivative_metric", "lemma1_bound", "theorem2_bound", "toeplitz_matrix"],
}

ORDERS = "weights=(1.0, 1.0), scheme='forward', normalize='l1', similarity='dot'"
GRIDS = "resolution='feats', align_corners=True"

SIGNATURES: dict[Callable[..., Any], str] = {
    finite_difference: "(x, order=1, *, dim=1, scheme='forward')",
    derivative_similarity: (
        "(feats, target_feats=None, *, order=1, scheme='forward', normalize='l1', similarity='dot', query=None)"
    ),
    Affinity.propagate: "(self, sources, targets)",
    Linear: f"(*, {ORDERS}, scale='sum')",
    Softmax: f"(*, {ORDERS}, over='targets', radius=None, dilation=1, chunk_size=None, backend='auto')",
    derivative_label_propagation: f"(logits, feats, target_feats=None, *, mask=None, affinity='linear', {GRIDS})",
    DerivativeLabelPropagation: f"(affinity='linear', *, {GRIDS})",
    DerivativeLabelPropagation.forward: "(self, logits, feats, target_feats=None, *, mask=None)",
    DerivativeLabelPropagation.rectify: "(self, logits, feats, ramp, target_feats=None, *, mask=None)",
    DerivativeLoss: (
        "(*, max_order=1, eta=0.5, norm='l1', scheme='forward', normalize='l1', ignore_index=255, reduction='mean', "
        "align_corners=True, num_anchors=None, chunk_size=None, backend='auto')"
    ),
    DerivativeLoss.forward: "(self, feats, target, *, mask=None)",
    MomentumAverager: "(model, momentum=0.5, *, buffers='average')",
    MomentumAverager.update: "(self, model)",
    MomentumAverager.update_parameters: "(self, model)",
    MomentumAverager.train: "(self, mode=True)",
    MomentumAverager.forward: "(self, *args, **kwargs)",  # whatever the averaged model takes
    theory.toeplitz_matrix: "(D, order, scheme='forward')",
    theory.derivative_metric: "(D, max_order, weights=None, scheme='forward')",
    theory.lemma1_bound: "(D, order, scheme='forward')",
    theory.theorem2_bound: "(V, order)",
}

# What the classes define themselves; all else is torch's.
METHODS = {
    DerivativeLabelPropagation: {"forward", "rectify", "extra_repr"},
    DerivativeLoss: {"forward", "extra_repr"},
    Linear: {"propagate"},
    Softmax: {"propagate"},
    MomentumAverager: {"update", "update_parameters", "train", "forward", "extra_repr"},
}


def signature(function: Callable[..., Any]) -> str:
    """Names, kinds and defaults, without annotations."""
    bare = inspect.signature(function)
    parameters = [p.replace(annotation=inspect.Parameter.empty) for p in bare.parameters.values()]
    return str(bare.replace(parameters=parameters, return_annotation=inspect.Signature.empty))


@pytest.mark.parametrize("module", NAMES, ids=lambda module: module.__name__)
def test_public_names(module):
    assert sorted(module.__all__) == NAMES[module]
    assert [name for name in NAMES[module] if not hasattr(module, name)] == []


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda function: function.__qualname__)
def test_signatures(function):
    assert signature(function) == SIGNATURES[function]


@pytest.mark.parametrize("cls", METHODS, ids=lambda cls: cls.__name__)
def test_methods(cls):
    public = {name for name, value in vars(cls).items() if callable(value) and not name.startswith("_")}
    assert public == METHODS[cls]


# ---------------------------------------------------------------------------------------------------------------------
# Docstrings say what the code does.

DOCUMENTED = [
    finite_difference,
    derivative_similarity,
    Linear,
    Softmax,
    derivative_label_propagation,
    DerivativeLabelPropagation.rectify,
    DerivativeLoss,
    DerivativeLoss.forward,
    MomentumAverager,
    theory.toeplitz_matrix,
    theory.derivative_metric,
    theory.theorem2_bound,
]
IDS = [function.__qualname__ for function in DOCUMENTED]


def arguments(function: Callable[..., Any]) -> dict[str, str]:
    """The entries of the section Args, by name."""
    section = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", inspect.getdoc(function) or "", flags=re.DOTALL | re.MULTILINE)
    assert section, f"{function.__qualname__} has no section Args"
    entries = re.split(r"^ {4}(?=\w+: )", section[1], flags=re.MULTILINE)[1:]
    return {name: " ".join(text.split()) for name, text in (entry.split(": ", 1) for entry in entries)}


def stated_default(text: str) -> str | None:
    """The default that an entry states, as it is written there."""
    if "None means" in text or "None chooses" in text:
        return "None"
    found = re.search(r"defaults? (?:to|is|are|of) `?([\w.\"'-]+\w[\"']?)", text)
    return found[1] if found else None


@pytest.mark.parametrize("function", DOCUMENTED, ids=IDS)
def test_docstrings_list_the_arguments_in_order(function):
    parameters = [name for name in inspect.signature(function).parameters if name != "self"]
    assert list(arguments(function)) == parameters


@pytest.mark.parametrize("function", DOCUMENTED, ids=IDS)
def test_defaults_that_docstrings_state_are_those_of_the_code(function):
    parameters = inspect.signature(function).parameters
    stated = {name: default for name, text in arguments(function).items() if (default := stated_default(text))}
    assert {name: default.replace('"', "'") for name, default in stated.items()} == {
        name: repr(parameters[name].default) for name in stated
    }


def test_stated_defaults_are_found():
    assert stated_default("weights; None means ones.") == "None"
    assert stated_default('scheme of the difference, defaults to "forward".') == '"forward"'
    assert stated_default("weight of the term; the default is 0.5.") == "0.5"
    assert stated_default("drawn from torch's default generator.") is None
    for function, names in ((derivative_label_propagation, {"target_feats"}), (Softmax, {"chunk_size"})):
        assert {name for name, text in arguments(function).items() if stated_default(text)} == names


@pytest.mark.parametrize("function", DOCUMENTED, ids=IDS)
def test_docstrings_name_every_choice(function):
    hints = get_type_hints(function.__init__ if isinstance(function, type) else function)
    for name, text in arguments(function).items():
        choices = [value for value in get_args(hints[name]) if value is not None]
        if get_origin(hints[name]) is Literal and "as in" not in text:
            assert [choice for choice in choices if f'"{choice}"' not in text] == [], name
