"""torch.func and vectorised Jacobians of propagation and loss: what a loop gives, or a refusal in our words."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.autograd.functional import hessian as hessian_by_loop
from torch.autograd.functional import jacobian
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from dlprop import DerivativeLabelPropagation, DerivativeLoss
from dlprop.affinity import Linear, Softmax

from .tolerances import assert_close

# torch scripts a decomposition of its own when forward mode is first used.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")

TWICE = r"dlprop: .*cannot be differentiated twice.*norm='frobenius' or .*[lL]inear"
FORWARD = r"dlprop: .*no forward-mode derivative.*norm='frobenius' or .*[lL]inear"
GENERATOR = torch.Generator().manual_seed(0)


def draw(*shape):
    """Features away from zero, where the norms have a kink."""
    return torch.rand(*shape, generator=GENERATOR, dtype=torch.float64) + 0.1


LOGITS, FEATS, OTHER = draw(2, 2, 2, 3), draw(2, 5, 2, 3), draw(2, 5, 2, 3)
FINE_LOGITS = draw(2, 2, 4, 4)
LABELS = torch.tensor([[[0, 1, 1], [255, 0, 2]], [[0, 0, 0], [1, 255, 1]]])
MASK = torch.tensor([[[True, False, True], [True, True, False]], [[False, True, True], [True, True, True]]])
FINE_MASK = torch.rand(2, 4, 4, generator=GENERATOR) < 0.6

MODULES = {
    "linear": DerivativeLabelPropagation(),
    "linear degree": DerivativeLabelPropagation(Linear(scale="degree")),
    "linear cosine": DerivativeLabelPropagation(Linear(similarity="cosine", normalize="l2", scale="mean")),
    "softmax": DerivativeLabelPropagation("softmax"),
    "softmax cosine": DerivativeLabelPropagation(Softmax(similarity="cosine", weights=(3.0, 3.0), chunk_size=4)),
    "softmax over sources": DerivativeLabelPropagation("attention"),
    "softmax gaussian": DerivativeLabelPropagation(Softmax(similarity="gaussian", weights=(30.0, 30.0))),
    "softmax window": DerivativeLabelPropagation(
        Softmax(over="sources", radius=1, similarity="gaussian", weights=(30.0, 30.0))
    ),
}
FULL = DerivativeLabelPropagation(resolution="logits")
LOSSES = {
    "l1": DerivativeLoss(reduction="none"),
    "frobenius": DerivativeLoss(norm="frobenius", reduction="none"),
}
# As functions of the features: defaults first, and then what takes another way inside.
FUNCTIONS = {
    **{name: lambda V, m=m: m(LOGITS.expand(len(V), -1, -1, -1), V) for name, m in MODULES.items()},
    "linear masked": lambda V: MODULES["linear"](LOGITS, V, mask=MASK),
    "softmax masked": lambda V: MODULES["softmax"](FINE_LOGITS, V, mask=FINE_MASK),
    "softmax over sources masked": lambda V: MODULES["softmax over sources"](FINE_LOGITS, V, mask=FINE_MASK),
    "softmax over sources to targets": lambda V: MODULES["softmax over sources"](LOGITS, V, OTHER, mask=MASK),
    "softmax window masked": lambda V: MODULES["softmax window"](FINE_LOGITS, V, OTHER, mask=FINE_MASK),
    "linear to targets": lambda V: MODULES["linear"](LOGITS, V, OTHER),
    "softmax to targets": lambda V: MODULES["softmax"](LOGITS, V, OTHER),
    "linear full resolution": lambda V: FULL(FINE_LOGITS, V, mask=FINE_MASK),
    "l1 labels": lambda V: LOSSES["l1"](V, LABELS),
    "l1 views": lambda V: LOSSES["l1"](V, OTHER),
    "l1 masked": lambda V: LOSSES["l1"](V, OTHER, mask=MASK),
    "frobenius labels": lambda V: LOSSES["frobenius"](V, LABELS),
    "frobenius views": lambda V: LOSSES["frobenius"](V, OTHER),
    "frobenius masked": lambda V: LOSSES["frobenius"](V, LABELS, mask=MASK),
}
ONCE = [name for name in FUNCTIONS if name.startswith(("softmax", "l1"))]
TWICE_DIFFERENTIABLE = [name for name in FUNCTIONS if name not in ONCE]

functions = pytest.mark.parametrize("name", FUNCTIONS)
only_once = pytest.mark.parametrize("name", ONCE)
twice_differentiable = pytest.mark.parametrize("name", TWICE_DIFFERENTIABLE)


def scalar(name):
    """A function of the features whose every output matters."""
    return lambda V: (FUNCTIONS[name](V).square() * 0.5).sum()


def batch(k, like):
    """k inputs like one."""
    return torch.stack([like.roll(i, 1) * (1 + 0.1 * i) for i in range(k)])


def by_loop(function, *inputs):
    return torch.stack([function(*one) for one in zip(*inputs, strict=True)])


def gradient(function, x):
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(function(leaf), leaf)[0]


@functions
def test_grad(name):
    assert_close(grad(scalar(name))(FEATS), gradient(scalar(name), FEATS), "gradient")


@functions
def test_vmap_over_features(name):
    several = batch(3, FEATS)
    assert_close(vmap(FUNCTIONS[name])(several), by_loop(FUNCTIONS[name], several), "propagation")


@functions
def test_gradients_of_several_at_once(name):
    several = batch(3, FEATS)
    want = by_loop(lambda V: gradient(scalar(name), V), several)
    assert_close(vmap(grad(scalar(name)))(several), want, "gradient")


# Nodes of autograd with an input that may be None; the others pass.
needs_newer_torch = pytest.mark.xfail(
    torch.__version__ < "2.7", raises=TypeError, strict=True, reason="torch 2.6 cannot map an input that is None"
)


@pytest.mark.parametrize(
    "name",
    [
        name if name.startswith(("linear", "frobenius")) else pytest.param(name, marks=needs_newer_torch)
        for name in FUNCTIONS
    ],
)
def test_gradient_of_several_together(name):
    """The gradient is taken outside vmap, where a tensor does not say that it will be."""
    several = batch(3, FEATS)
    want = by_loop(lambda V: gradient(scalar(name), V), several)
    for of in (gradient, lambda function, x: grad(function)(x)):
        assert_close(of(lambda x: vmap(scalar(name))(x).sum(), several), want, "gradient")


@pytest.mark.parametrize("name", MODULES)
def test_vmap_over_logits_feats_masks_and_all_of_them(name):
    """On one grid and on two; also where the batch axis is not the first."""
    module = MODULES[name]
    for logits, mask in ((LOGITS, MASK), (FINE_LOGITS, FINE_MASK)):
        L, V, m = batch(3, logits), batch(3, FEATS), torch.stack((mask, ~mask, mask.flip(0)))

        def masked(L, V, m):
            return module(L, V, mask=m)

        same = [x[0].expand(3, *x.shape[1:]) for x in (L, V, m)]
        both = by_loop(module, L, V)
        assert_close(vmap(module)(L, V), both, "propagation")
        assert_close(vmap(module, (0, None))(L, V[0]), by_loop(module, L, same[1]), "propagation")
        assert_close(vmap(module, (None, 0))(L[0], V), by_loop(module, same[0], V), "propagation")
        assert_close(vmap(module, (-1, 2), 1)(L.movedim(0, -1), V.movedim(0, 2)).movedim(1, 0), both, "propagation")
        assert_close(vmap(masked)(L, V, m), by_loop(masked, L, V, m), "propagation")
        assert_close(vmap(masked, (None, None, 0))(L[0], V[0], m), by_loop(masked, *same[:2], m), "propagation")
        inner = vmap(vmap(module, (0, None)), (None, 0))(L, V)
        assert_close(inner, torch.stack([by_loop(module, L, v.expand_as(V)) for v in V]), "propagation")


@pytest.mark.parametrize("norm", LOSSES)
def test_vmap_over_targets(norm):
    loss = LOSSES[norm]
    for several in (batch(3, OTHER), torch.stack([LABELS.roll(i, 2) for i in range(3)])):
        assert_close(vmap(loss, (None, 0))(FEATS, several), by_loop(lambda t: loss(FEATS, t), several), "loss")
        V = batch(3, FEATS)
        assert_close(vmap(loss)(V, several), by_loop(loss, V, several), "loss")


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_anchors_that_are_all_valid_pixels_under_vmap(randomness):
    """Four anchors, and no image has more than four valid pixels: whatever is drawn, the loss is exact."""
    loss, every = (DerivativeLoss(num_anchors=k, reduction="none") for k in (4, None))
    V, labels = batch(3, FEATS), torch.where(MASK, LABELS, 255)
    labels[1, 0, 1] = 255
    assert ((labels != 255).sum((1, 2)) <= 4).all()
    out = vmap(lambda v: loss(v, labels), randomness=randomness)(V)
    assert_close(out, by_loop(lambda v: every(v, labels), V), "loss")
    grads = vmap(grad(lambda v: loss(v, labels).sum()), randomness=randomness)(V)
    assert_close(grads, by_loop(lambda v: gradient(lambda x: every(x, labels).sum(), v), V), "gradient")


@pytest.mark.parametrize("name", ["linear", "softmax", "softmax over sources", "softmax window"])
def test_vmap_hides_values_so_an_empty_mask_gives_zeros(name):
    out = vmap(lambda m: MODULES[name](LOGITS, FEATS, mask=m))(torch.zeros(2, *MASK.shape, dtype=torch.bool))
    assert (out == 0).all()


@functions
def test_vjp_and_jacrev(name):
    _, pullback = vjp(FUNCTIONS[name], FEATS)
    out = FUNCTIONS[name](FEATS)
    weight = draw(*out.shape)
    want = gradient(lambda V: (FUNCTIONS[name](V) * weight).sum(), FEATS)
    assert_close(pullback(weight)[0], want, "gradient")
    assert_close(jacrev(FUNCTIONS[name])(FEATS), jacobian(FUNCTIONS[name], FEATS), "gradient")


@functions
def test_vectorized_jacobian(name):
    want = jacobian(FUNCTIONS[name], FEATS)
    assert_close(jacobian(FUNCTIONS[name], FEATS, vectorize=True), want, "gradient")


@twice_differentiable
def test_forward_mode(name):
    """jvp, dual tensors and both forward Jacobians."""
    function = FUNCTIONS[name]
    want = jacobian(function, FEATS)
    tangent = draw(*FEATS.shape) - 0.5
    out, pushed = jvp(function, (FEATS,), (tangent,))
    assert_close(out, function(FEATS), "propagation")
    assert_close(pushed, torch.tensordot(want, tangent, 4), "gradient")
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(function(forward_ad.make_dual(FEATS, tangent))).tangent
    assert_close(dual, pushed, "gradient")
    assert_close(jacfwd(function)(FEATS), want, "gradient")
    forward = jacobian(function, FEATS, strategy="forward-mode", vectorize=True)
    assert_close(forward, want, "gradient")


@twice_differentiable
def test_hessian(name):
    """Forward over reverse, reverse over reverse, and vectorised, of one image: against the loop over rows."""
    function = scalar(name)
    want = hessian_by_loop(function, FEATS)
    assert want.abs().max() > 0
    assert_close(hessian(function)(FEATS), want, "gradient")
    assert_close(jacrev(grad(function))(FEATS), want, "gradient")
    assert_close(hessian_by_loop(function, FEATS, vectorize=True), want, "gradient")
    assert torch.autograd.gradgradcheck(function, FEATS.clone().requires_grad_())


@only_once
def test_forward_mode_is_refused(name):
    """A custom op drops tangents: the derivative would come out as 0."""
    function = FUNCTIONS[name]
    calls = {
        "jvp": lambda: jvp(function, (FEATS,), (OTHER,)),
        "jacfwd": lambda: jacfwd(function)(FEATS),
        "jacobian": lambda: jacobian(function, FEATS, strategy="forward-mode", vectorize=True),
        "hessian": lambda: hessian(scalar(name))(FEATS),
    }
    for call in calls.values():
        with pytest.raises(RuntimeError, match=FORWARD):
            call()
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=FORWARD):
        function(forward_ad.make_dual(FEATS, OTHER))


@only_once
def test_second_derivatives_are_refused(name):
    """An error, never a silent zero."""
    function = scalar(name)
    calls = {
        "reverse over reverse": lambda: jacrev(grad(function))(FEATS),
        "grad of grad": lambda: grad(lambda V: grad(function)(V).sum())(FEATS),
        "loop": lambda: hessian_by_loop(function, FEATS),
        "vectorised": lambda: hessian_by_loop(function, FEATS, vectorize=True),
    }
    for call in calls.values():
        with pytest.raises(RuntimeError, match=TWICE):
            call()


@pytest.mark.parametrize("name", ["linear", "softmax", "softmax over sources", "softmax window"])
def test_transforms_of_logits(name):
    """The propagation is linear in them: its Jacobian is the affinity, its Hessian 0 or refused."""

    def function(L):
        return MODULES[name](L, FEATS)

    want = jacobian(function, LOGITS)
    assert_close(jacrev(function)(LOGITS), want, "gradient")
    assert_close(jacobian(function, LOGITS, vectorize=True), want, "gradient")
    assert_close(torch.tensordot(want, LOGITS, 4), function(LOGITS), "gradient")
    if name == "linear":
        assert_close(jacfwd(function)(LOGITS), want, "gradient")
        assert_close(hessian(lambda L: function(L).sum())(LOGITS), torch.zeros(*2 * LOGITS.shape), "gradient")
    else:
        with pytest.raises(RuntimeError, match=FORWARD):
            jacfwd(function)(LOGITS)


def test_gradients_of_every_image_of_a_network():
    """What such transforms are for: one gradient of the parameters an image, in one call."""
    torch.manual_seed(0)
    network = torch.nn.Conv2d(3, 5, 1).double()
    parameters = {name: p.detach() for name, p in network.named_parameters()}
    images = draw(3, 3, 2, 3)
    labels = torch.stack([LABELS[0], LABELS[1], LABELS[0].flip(0)])

    def loss(parameters, image, target):
        return DerivativeLoss()(functional_call(network, parameters, (image[None],)), target[None])

    grads = vmap(grad(loss), (None, 0, 0))(parameters, images, labels)
    for n in range(3):
        network.zero_grad()
        DerivativeLoss()(network(images[n : n + 1]), labels[n : n + 1]).backward()
        for name, p in network.named_parameters():
            assert_close(grads[name][n], p.grad, "gradient")
