"""Peak memory of the loss and of the propagation at 256 channels, in a process of its own.

One M x M matrix of float32 would take 1056 MiB at 129 x 129 pixels. What takes M^2 in time is measured at fewer.
"""

import json
import os
import subprocess
import sys

import pytest

MIB = 2**20
LOGITS = 21 * 129**2 * 4

# A process for every script, forked from one that has imported torch.
FORKS = """
import json, os, sys
import torch, dlprop.affinity

for line in sys.stdin:
    read, write = os.pipe()
    if not os.fork():
        os.dup2(write, 1), os.dup2(write, 2)
        exec(json.loads(line), {})
        sys.stdout.flush()
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as stream:
        output = stream.read()
    print(json.dumps([os.waitstatus_to_exitcode(os.wait()[1]), output]), flush=True)
"""

# The whole process is measured, so everything that is allocated once is warmed up at a tiny size first.
MEASURE = """
import torch
from dlprop import DerivativeLabelPropagation, DerivativeLoss
from dlprop.affinity import Linear, Softmax

def inputs(N, edge, case):
    generator = torch.Generator().manual_seed(0)
    feats = torch.rand(N, 256, edge, edge, generator=generator)
    if case == "features":
        target = torch.rand(N, 256, edge, edge, generator=generator)
    elif case == "logits":
        target = torch.rand(N, 21, edge, edge, generator=generator)
    else:
        target = torch.randint(21, (N, edge, edge), generator=generator)
    return feats, target

def peak():
    # Not ru_maxrss: a new process inherits that from the one that started it.
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))

{setup}

def run(feats, target):
{run}

torch.set_num_threads(2)
for _ in range(2):
    run(*inputs(1, 24, {case!r}))
arguments = inputs(1, {edge}, {case!r})
before = peak()
kept = run(*arguments)
after = peak()
print(after - before, sum(x.numel() * x.element_size() for x in kept))
"""

LOSS = """
    value = loss(feats.requires_grad_(), target)
    value.backward()
    return []
"""
FORWARD = """
    with torch.no_grad():
        return [propagation(target, feats)]
"""
BACKWARD = """
    out = propagation(target.requires_grad_(), feats.requires_grad_())
    out.sum().backward()
    return [out, target.grad, feats.grad]
"""
# Half of the pixels at random: a mask that no rule shortens.
MASKED = """
    mask = torch.arange(target.shape[2] * target.shape[3]).view(1, *target.shape[2:]) * 7919 % 101 < 50
    out = propagation(target.requires_grad_(), feats.requires_grad_(), mask=mask)
    out.sum().backward()
    return [out, target.grad, feats.grad]
"""
# Few sources, as one clicks them.
CLICKS = """
    with torch.no_grad():
        mask = torch.arange(target.shape[2] * target.shape[3]).view(1, *target.shape[2:]) % 1021 == 0
        return [propagation(target, feats, mask=mask)]
"""
# Order 0 against labels as anybody would write it.
DENSE = """
def loss(feats, target):
    V = feats.flatten(2)
    V = V / V.abs().sum(1, keepdim=True)
    y = target.flatten(1)
    return (V.mT @ V - (y[:, :, None] == y[:, None]).float()).abs().mean()
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc"),
]


@pytest.fixture(scope="module")
def added_bytes():
    """A function: growth of the peak over the inputs and over what is returned."""
    # Left to itself, glibc keeps blocks that were given back and cannot always use them again: up to twice as much, and
    # never twice the same. With a fixed threshold it returns every large block, and the peak is what was asked for.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(MIB)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", FORKS], **pipes, text=True, env=environment) as parent:

        def run(setup, run, case, edge=129):
            script = MEASURE.format(setup=setup, run=run, case=case, edge=edge)
            print(json.dumps(script), file=parent.stdin, flush=True)
            code, output = json.loads(parent.stdout.readline())
            assert code == 0, output
            grown, kept = map(int, output.split())
            return 1024 * grown - kept

        yield run


@pytest.mark.parametrize("case", ["labels", "features"])
def test_loss_forward_and_backward(case, added_bytes):
    # One M x M matrix would take 338 MiB, and a copy of the features takes 9 MiB.
    assert added_bytes("loss = DerivativeLoss()", LOSS, case, edge=97) < 72 * MIB


@pytest.mark.parametrize("options", ["norm='frobenius'", "num_anchors=256"])
def test_linear_time_losses(options, added_bytes):
    # O(M D): a copy of the features takes 16 MiB, and autograd keeps several of every order.
    assert added_bytes(f"loss = DerivativeLoss({options})", LOSS, "features") < 160 * MIB


def test_linear_propagation(added_bytes):
    assert added_bytes("propagation = DerivativeLabelPropagation()", FORWARD, "logits") < 16 * MIB


@pytest.mark.parametrize("normalize", ["'l1'", "None"])
def test_a_mask_takes_no_more_than_the_logits(normalize, added_bytes):
    # And the counts, one channel more, and the mask; a copy of the features would take twelve times the logits.
    setup = f"propagation = DerivativeLabelPropagation(Linear(normalize={normalize}))"
    plain, masked = (added_bytes(setup, run, "logits") for run in (BACKWARD, MASKED))
    assert masked <= plain + 3 * LOGITS


def test_softmax_propagation(added_bytes):
    # One M x M matrix would take 68 MiB. A chunk of 128 rows takes 2 MiB, of which backward holds three, and a copy of
    # the features 4 MiB.
    setup = "propagation = DerivativeLabelPropagation(Softmax(chunk_size=128))"
    assert added_bytes(setup, BACKWARD, "logits", edge=65) < 40 * MIB


@pytest.mark.parametrize("similarity", [pytest.param("cosine", marks=pytest.mark.exhaustive), "gaussian"])
def test_attention(similarity, added_bytes):
    # One M x M matrix would take 68 MiB. What there is are copies of the features, 4.1 MiB each.
    options = f"over='sources', similarity='{similarity}', normalize=None"
    setup = f"propagation = DerivativeLabelPropagation(Softmax({options}))"
    assert added_bytes(setup, FORWARD, "logits", edge=65) < 36 * MIB
    assert added_bytes(setup, BACKWARD, "logits", edge=65) < 64 * MIB


def test_attention_from_clicks_takes_what_the_clicks_take(added_bytes):
    # 17 sources of 16641: their features are not copied to all pixels, and their similarities are 1 MiB.
    setup = "propagation = DerivativeLabelPropagation(Softmax(over='sources', normalize=None, weights=(1.0,)))"
    assert added_bytes(setup, CLICKS, "logits") < 24 * MIB


@pytest.mark.parametrize(
    "run", [pytest.param(FORWARD, marks=pytest.mark.exhaustive), BACKWARD], ids=["forward", "backward"]
)
def test_a_larger_window_takes_no_more(run, added_bytes):
    # 9 offsets or 49: of the features, 2.3 MiB, a window of radius 3 unfolded would hold 115 MiB.
    added = []
    for radius in (1, 3):
        options = f"over='sources', radius={radius}, similarity='gaussian', normalize=None"
        setup = f"propagation = DerivativeLabelPropagation(Softmax({options}))"
        added.append(added_bytes(setup, run, "logits", edge=49))
    assert added[0] < 28 * MIB
    assert added[1] < added[0] + 4 * MIB


def test_the_measurement_sees_a_dense_matrix(added_bytes):
    # Where the dense matrices fit: 2401^2 floats are 22 MiB, and there are several.
    dense = added_bytes(DENSE, LOSS, "labels", edge=49)
    tiled = added_bytes("loss = DerivativeLoss()", LOSS, "labels", edge=49)
    assert dense > tiled + 44 * MIB
