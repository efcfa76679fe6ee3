"""`MomentumAverager`: Eq. 6 in closed form, and everything a training loop does to an averager."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.utils._python_dispatch import TorchDispatchMode

from dlprop import MomentumAverager

from .tolerances import assert_close


class Counter(nn.Module):
    """A parameter, a float buffer, an integer buffer, a bool buffer, a non-persistent buffer."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 2))
        self.register_buffer("running", torch.randn(3))
        self.register_buffer("steps", torch.tensor(0))
        self.register_buffer("seen", torch.tensor([False, False]))
        self.register_buffer("cache", torch.randn(2), persistent=False)

    def forward(self, x):
        return x @ self.weight.T + self.running


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.encode = nn.Linear(4, 4, bias=False)
        self.decode = nn.Linear(4, 4, bias=False)
        self.decode.weight = self.encode.weight

    def forward(self, x):
        return self.decode(self.encode(x))


def network():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(4, 2, 1))


def randomize(model, seed):
    """New values for all parameters and buffers; returns float64 copies of them by name."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for x in [*model.parameters(), *model.buffers()]:
            if x.is_floating_point():
                x.copy_(torch.rand(x.shape, generator=generator) + 0.5)
            elif x.dtype == torch.bool:
                x.copy_(torch.rand(x.shape, generator=generator) < 0.5)
            else:
                x.copy_(torch.randint(2**40, 2**40 + 1000, x.shape, generator=generator))
    return state(model)


def state(model):
    """All parameters and buffers by name, copied; floats as float64 arrays."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {k: v.detach().double().numpy().copy() if v.is_floating_point() else v.clone() for k, v in named}


def closed_form(states, momenta):
    """Eq. 6 unrolled: the first update copies, then Theta_m <- m Theta_m + (1 - m) Theta_b."""
    K = len(states)
    total = {}
    for k, values in enumerate(states):
        coefficient = 1.0 if k == 0 else 1.0 - momenta[k]
        for later in range(k + 1, K):
            coefficient *= momenta[later]
        for name, value in values.items():
            if not isinstance(value, torch.Tensor):
                total[name] = total.get(name, 0.0) + coefficient * value
    return total


@pytest.mark.parametrize("momentum", [0.5, 0.996, 0.0, 1.0, 0, 1])
@pytest.mark.parametrize("updates", [1, 2, 5])
def test_closed_form(momentum, updates):
    model = network()
    averager = MomentumAverager(model, momentum)
    states = []
    for k in range(updates):
        states.append(randomize(model, k))
        averager.update(model)
    want = closed_form(states, [momentum] * updates)
    for name, value in {**dict(averager.module.named_parameters()), **dict(averager.module.named_buffers())}.items():
        if value.is_floating_point():
            assert_close(value, want[name], "average")


def test_default_is_the_papers_mean_of_the_two():
    model = nn.Linear(1, 1, bias=False)
    averager = MomentumAverager(model)
    for value in (4.0, 8.0, 0.0):
        nn.init.constant_(model.weight, value)
        averager.update(model)
    assert averager.module.weight.item() == ((4 + 8) / 2 + 0) / 2


def test_first_update_copies():
    model = network()
    averager = MomentumAverager(model, 0.9)
    randomize(model, 1)
    averager.update(model)
    for a, b in zip(averager.module.state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(a, b)
        assert a.data_ptr() != b.data_ptr()


def test_momentum_may_be_a_callable_of_the_number_of_updates():
    asked = []

    def momentum(updates):
        asked.append(int(updates))
        return 1 - 1 / (updates + 1) if updates else 1 / updates  # the plain mean of all models

    model = network()
    averager = MomentumAverager(model, momentum)
    states = []
    for k in range(4):
        states.append(randomize(model, k))
        averager.update(model)
    assert asked == [1, 2, 3]  # the first update copies
    for name, value in averager.module.named_parameters():
        assert_close(value, sum(s[name] for s in states) / 4, "average")


def test_a_constant_callable_is_its_constant():
    results = []
    for momentum in (0.7, lambda _: 0.7):
        model = nn.Linear(3, 3)
        averager = MomentumAverager(model, momentum)
        for k in range(3):
            randomize(model, k)
            averager.update(model)
        results.append(averager.module.weight.clone())
    assert torch.equal(*results)


@pytest.mark.parametrize("buffers", ["average", "copy", "none"])
def test_buffers(buffers):
    """Float buffers as asked, integer and bool buffers always the newest and exact."""
    model = Counter()
    start = state(model)
    averager = MomentumAverager(model, 0.75, buffers=buffers)
    states = []
    for k in range(3):
        states.append(randomize(model, k))
        averager.update(model)
    want = closed_form(states, [0.75] * 3)
    assert_close(averager.module.weight, want["weight"], "average")
    for name in ("running", "cache"):
        kept = {"average": want[name], "copy": states[-1][name], "none": start[name]}[buffers]
        assert_close(getattr(averager.module, name), kept, "average")
    assert torch.equal(averager.module.steps, model.steps)
    assert averager.module.steps.dtype == torch.long
    assert torch.equal(averager.module.seen, model.seen)


def test_default_averages_buffers():
    model = Counter()
    averager = MomentumAverager(model, 0.75)
    states = []
    for k in range(2):
        states.append(randomize(model, k))
        averager.update(model)
    assert_close(averager.module.running, closed_form(states, [0.75] * 2)["running"], "average")


@pytest.mark.parametrize("buffers", ["average", "copy"])
def test_batch_norm(buffers):
    """`num_batches_tracked` is an integer: copied, not averaged."""
    model = nn.Sequential(nn.BatchNorm1d(3))
    averager = MomentumAverager(model, 0.5, buffers=buffers)
    for _ in range(3):
        model(torch.randn(8, 3))
        averager.update(model)
    assert averager.module[0].num_batches_tracked.item() == 3


def _loader(images=4):
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(8, 3, 6, 6, generator=generator) * (k + 1) + k for k in range(images)]


def _statistics(model):
    return {name: x.clone() for name, x in model.named_buffers()}


def _averager_with_statistics():
    """Two BatchNorm layers, the second after the first, of momenta of their own, and one without statistics."""
    model = nn.Sequential(
        nn.BatchNorm2d(3, momentum=0.3),
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.Dropout(0.5),
        nn.BatchNorm2d(4, track_running_stats=False),
    )
    averager = MomentumAverager(model, buffers="none")
    for k in range(2):
        randomize(model, k)
        averager.update(model)
    return model, averager


@pytest.mark.parametrize("as_pairs", [False, True])
def test_update_bn_refills_the_statistics(as_pairs):
    _, averager = _averager_with_statistics()
    loader = _loader()
    reference = copy.deepcopy(averager.module)
    reference[3].p = 0.0  # there update_bn turns the dropout on
    update_bn(loader, reference)
    update_bn([(x, None) for x in loader] if as_pairs else loader, averager)
    for name, expected in _statistics(reference).items():
        assert torch.equal(_statistics(averager.module)[name], expected)
    assert_close(averager.module[0].running_mean, torch.cat(loader).double().mean((0, 2, 3)).numpy(), "average")
    assert int(averager.module[0].num_batches_tracked) == len(loader)
    assert not any(m.training for m in averager.modules())
    assert [averager.module[i].momentum for i in (0, 2, 4)] == [0.3, 0.1, 0.1]
    # What was refilled stays, whatever comes after it.
    kept = _statistics(averager.module)
    averager(loader[0])
    averager.train()(loader[1])
    assert all(torch.equal(x, kept[name]) for name, x in _statistics(averager.module).items())


def test_update_bn_of_the_averager_is_that_of_its_module():
    """As exactly as two runs of it, again and again, and of copies."""
    model, averager = _averager_with_statistics()
    averager.module[3].p = 0.0
    twins = [averager, copy.deepcopy(averager), pickle.loads(pickle.dumps(averager))]
    for loader in (_loader(), _loader(2)):
        reference = copy.deepcopy(averager.module)
        update_bn(loader, reference)
        for twin in twins:
            update_bn(loader, twin)
            assert all(torch.equal(x, _statistics(twin.module)[k]) for k, x in _statistics(reference).items())
        for twin in twins:
            twin.update(model)


def test_a_layer_without_momentum_is_never_in_train_mode():
    """`update_bn` cannot tell it from a layer whose momentum it took: nothing refills it, and nothing else moves it."""
    averager = MomentumAverager(nn.Sequential(nn.BatchNorm2d(3, momentum=None)), buffers="none")
    before = _statistics(averager.module)
    for x in _loader():
        averager(x)
    assert all(torch.equal(x, before[name]) for name, x in _statistics(averager.module).items())


def test_an_error_inside_update_bn_leaves_the_layers_in_eval_mode():
    _, averager = _averager_with_statistics()
    with pytest.raises(RuntimeError):
        update_bn([*_loader(1), torch.randn(2, 5, 6, 6)], averager)
    assert not any(m.training for m in averager.modules())
    before = _statistics(averager.module)
    averager(_loader(1)[0])  # a prediction again, which moves no statistics
    assert all(torch.equal(x, before[name]) for name, x in _statistics(averager.module).items())


def test_an_update_bn_whose_loader_fails_is_over_with_the_next_update():
    model, averager = _averager_with_statistics()

    def failing():
        yield from _loader(1)
        raise OSError("a damaged file")

    with pytest.raises(OSError, match="a damaged file"):
        update_bn(failing(), averager)
    averager.update(model)
    assert not any(m.momentum is None for m in averager.modules() if isinstance(m, nn.BatchNorm2d))


def test_update_bn_refills_layers_that_were_exchanged():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    averager = MomentumAverager(model, buffers="none")
    averager.update(model)
    averager.module[1] = nn.BatchNorm2d(4)
    update_bn(_loader(), averager)
    assert averager.module[1].running_mean.any()


class ReadsOfTheDevice(TorchDispatchMode):
    """Counts the tensors whose value the host asks for, which makes it wait for the device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket is torch.ops.aten._local_scalar_dense
        return function(*args, **(kwargs or {}))


def test_reads_of_the_device_are_seen():
    x = torch.tensor(3)
    with ReadsOfTheDevice() as reads:
        assert [int(x), x.item(), bool(x > 2)] == [3, 3, True]
    assert reads.count == 3


@pytest.mark.parametrize("momentum", [0.75, lambda updates: 0.5 + 0.01 * updates])
@pytest.mark.parametrize("buffers", ["average", "copy", "none"])
def test_an_update_waits_for_nothing(momentum, buffers):
    model = network()
    averager = MomentumAverager(model, momentum, buffers=buffers)
    with ReadsOfTheDevice() as reads:
        for _ in range(3):
            averager.update(model)
    assert reads.count == 0
    assert int(averager.n_averaged) == 3


@pytest.mark.parametrize("nested", [False, True])
def test_a_loaded_count_is_read_once(nested):
    asked = []

    def momentum(updates):
        asked.append(updates)
        return 0.5

    model = network()
    averager, resumed = MomentumAverager(model, momentum), MomentumAverager(network(), momentum)
    for _ in range(4):
        averager.update(model)
    resumed.update(model)  # a count of its own, which the loaded one replaces
    del asked[:]
    if nested:
        nn.ModuleDict({"teacher": resumed}).load_state_dict(nn.ModuleDict({"teacher": averager}).state_dict())
    else:
        resumed.load_state_dict(averager.state_dict())
    resumed = copy.deepcopy(resumed)
    with ReadsOfTheDevice() as reads:
        for _ in range(3):
            resumed.update(model)
    assert reads.count == 1
    assert asked == [4, 5, 6]
    assert all(type(updates) is int for updates in asked)
    assert int(resumed.n_averaged) == 7


def test_the_state_is_that_of_an_averaged_model():
    model = network()
    averager = MomentumAverager(model)
    assert averager.state_dict().keys() == AveragedModel(model).state_dict().keys()
    averager.update(model)
    update_bn(_loader(), averager)
    assert averager.state_dict().keys() == AveragedModel(model).state_dict().keys()


def test_tied_weights_stay_tied_and_are_averaged_once():
    model = Tied()
    averager = MomentumAverager(model, 0.75)
    states = []
    for k in range(3):
        states.append(randomize(model, k))
        averager.update(model)
    assert averager.module.encode.weight is averager.module.decode.weight
    assert averager.module.encode.weight is not model.encode.weight
    assert_close(averager.module.encode.weight, closed_form(states, [0.75] * 3)["encode.weight"], "average")
    copied = copy.deepcopy(averager)
    assert copied.module.encode.weight is copied.module.decode.weight


def test_frozen_and_in_eval_mode_whatever_happens():
    model = network().train()
    averager = MomentumAverager(model)

    def check():
        assert not any(p.requires_grad for p in averager.module.parameters())
        assert not any(m.training for m in averager.module.modules())

    check()
    averager.update(model)
    check()
    assert averager.train() is averager
    check()
    averager.train(False)
    averager.eval()
    averager.train(True)
    check()
    nn.Sequential(averager).train()
    check()
    assert all(p.requires_grad for p in model.parameters())
    assert all(m.training for m in model.modules())


def test_forward_calls_the_module_without_dropout():
    model = network().train()
    averager = MomentumAverager(model)
    x = torch.randn(2, 3, 5, 5, requires_grad=True)
    before = averager.module[1].running_mean.clone()
    out = averager(x)
    assert torch.equal(out, averager.module(x))
    assert torch.equal(averager.module[1].running_mean, before)
    out.sum().backward()
    assert x.grad is not None
    assert all(p.grad is None for p in averager.parameters())


def test_the_model_is_left_alone():
    model = network()
    averager = MomentumAverager(model)
    before = randomize(model, 3)
    averager.update(model)
    averager.update(model)
    for name, value in state(model).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, before[name])
        else:
            assert (value == before[name]).all()


@pytest.mark.parametrize("interrupted_after", [0, 1, 3])
def test_state_dict_round_trip_continues_identically(interrupted_after):
    """Also before the first update, and through the file format of torch.save."""
    model = network()
    averager = MomentumAverager(model, lambda updates: 0.9 if updates < 3 else 0.6)
    for k in range(interrupted_after):
        randomize(model, k)
        averager.update(model)
    resumed = MomentumAverager(network(), lambda updates: 0.9 if updates < 3 else 0.6)
    saved = {k: v.clone() for k, v in averager.state_dict().items()}
    resumed.load_state_dict(saved)
    for k in range(3):
        randomize(model, 10 + k)
        averager.update(model)
        resumed.update(model)
    a, b = averager.state_dict(), resumed.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_state_dict_file(tmp_path):
    model = network()
    averager = MomentumAverager(model)
    averager.update(model)
    torch.save(averager.state_dict(), tmp_path / "averager.pt")
    resumed = MomentumAverager(network())
    resumed.load_state_dict(torch.load(tmp_path / "averager.pt", weights_only=True))
    assert all(torch.equal(v, resumed.state_dict()[k]) for k, v in averager.state_dict().items())


def test_is_an_averaged_model():
    """What knows torch's class knows this one: its state is the same, and so is the name of its update."""
    model = network()
    averager = MomentumAverager(model, 0.75)
    assert isinstance(averager, AveragedModel)
    states = []
    for k in range(2):
        states.append(randomize(model, k))
        averager.update_parameters(model)
    assert int(averager.n_averaged) == 2
    want = closed_form(states, [0.75] * 2)
    for name, value in averager.module.named_parameters():
        assert_close(value, want[name], "average")
    AveragedModel(network()).load_state_dict(averager.state_dict())


def test_compiled_models_are_unwrapped():
    model = network()
    compiled = torch.compile(model, backend="eager")
    averager = MomentumAverager(compiled, 0.75)
    assert type(averager.module) is nn.Sequential
    plain = MomentumAverager(model, 0.75)
    assert averager.state_dict().keys() == plain.state_dict().keys()
    for k in range(3):
        randomize(model, k)
        plain.update(model)
        averager.update(compiled if k < 2 else model)  # either may be handed in
    assert all(torch.equal(v, averager.state_dict()[k]) for k, v in plain.state_dict().items())
    x = torch.randn(1, 3, 5, 5)
    assert torch.equal(averager(x), plain(x))


@pytest.fixture
def process_group(tmp_path):
    """A group of this one process."""
    dist = torch.distributed
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
@pytest.mark.parametrize("compiled", [False, True])
def test_distributed_models_are_unwrapped(process_group, compiled):
    model = network()
    wrapped = nn.parallel.DistributedDataParallel(model)
    if compiled:
        wrapped = torch.compile(wrapped, backend="eager")
    averager, plain = MomentumAverager(wrapped, 0.75), MomentumAverager(model, 0.75)
    assert type(averager.module) is nn.Sequential
    assert averager.state_dict().keys() == plain.state_dict().keys()
    for k in range(3):
        randomize(model, k)
        plain.update(model)
        averager.update(wrapped if k < 2 else model)
    assert all(torch.equal(v, averager.state_dict()[k]) for k, v in plain.state_dict().items())


def other_shape():
    model = network()
    model[4] = nn.Conv2d(4, 5, 1)
    return model, r"4\.weight"


def missing_parameter():
    model = network()
    model[4] = nn.Conv2d(4, 2, 1, bias=False)
    return model, r"4\.bias"


def extra_parameter():
    model = network()
    model.register_parameter("extra", nn.Parameter(torch.zeros(1)))
    return model, "extra"


def missing_buffer():
    model = network()
    model[1] = nn.BatchNorm2d(4, track_running_stats=False)
    return model, r"1\.(running_mean|running_var|num_batches_tracked)"


def other_buffer_shape():
    model = network()
    model[1].register_buffer("running_var", torch.ones(9))
    return model, r"1\.running_var"


@pytest.mark.parametrize("updates", [0, 2])
@pytest.mark.parametrize("buffers", ["average", "copy"])
@pytest.mark.parametrize(
    "mismatch", [other_shape, missing_parameter, extra_parameter, missing_buffer, other_buffer_shape]
)
def test_mismatched_models_change_nothing(mismatch, buffers, updates):
    """A ValueError that names what differs, before anything is written."""
    model = network()
    averager = MomentumAverager(model, buffers=buffers)
    for k in range(updates):
        randomize(model, k)
        averager.update(model)
    before = copy.deepcopy(averager.state_dict())
    other, name = mismatch()
    randomize(other, 9)
    with pytest.raises(ValueError, match=name):
        averager.update(other)
    after = averager.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in before.items())


def test_parameters_are_matched_by_name():
    """Registered in another order, two tensors of one shape must not trade places."""

    def model(names):
        return nn.ModuleDict({name: nn.Linear(2, 2) for name in names})

    averager = MomentumAverager(model("ab"))
    other = model("ba")
    averager.update(other)
    assert torch.equal(averager.module["a"].weight, other["a"].weight)
    assert torch.equal(averager.module["b"].weight, other["b"].weight)


@pytest.mark.parametrize("momentum", [0.5, 0.996])
def test_pickle_and_deepcopy(momentum):
    model = network()
    averager = MomentumAverager(model, momentum, buffers="copy")
    randomize(model, 0)
    averager.update(model)
    clones = [pickle.loads(pickle.dumps(averager)), copy.deepcopy(averager)]
    randomize(model, 1)
    for x in (averager, *clones):
        x.update(model)
        assert not any(m.training for m in x.module.modules())
        assert not any(p.requires_grad for p in x.module.parameters())
    for clone in clones:
        assert all(torch.equal(v, clone.state_dict()[k]) for k, v in averager.state_dict().items())


def test_float32_averager_of_a_bfloat16_model():
    """The way to average without losing small steps: 0.996 of a bfloat16 average would stand still."""
    model = network()
    averager = MomentumAverager(model, 0.996)
    model.bfloat16()
    states = []
    for k in range(4):
        states.append(randomize(model, k))
        averager.update(model)
    want = closed_form(states, [0.996] * 4)
    for name, value in averager.module.named_parameters():
        assert value.dtype == torch.float32
        assert_close(value, want[name], "average")
    assert averager.module[1].running_mean.dtype == torch.float32
    assert_close(averager.module[1].running_mean, want["1.running_mean"], "average")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype):
    model = network().to(dtype)
    averager = MomentumAverager(model, 0.75)
    states = []
    for k in range(3):
        states.append(randomize(model, k))
        averager.update(model)
    want = closed_form(states, [0.75] * 3)
    for name, value in averager.module.named_parameters():
        assert value.dtype == dtype
        assert_close(value, want[name], "average")


def test_non_finite_weights_show():
    model = nn.Linear(2, 2)
    averager = MomentumAverager(model)
    averager.update(model)
    with torch.no_grad():
        model.weight[0, 0] = float("nan")
    averager.update(model)
    assert averager.module.weight[0, 0].isnan()
    assert averager.module.weight.isnan().sum() == 1


def test_in_a_training_loop():
    """The average follows the optimiser, receives no gradient, and may be used as the teacher."""
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    averager = MomentumAverager(model, 0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    history = []
    for _ in range(4):
        loss = (model(torch.randn(16, 4)) - averager(torch.randn(16, 4)).detach() - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        averager.update(model)
        history.append(state(model))
    want = closed_form(history, [0.5] * 4)
    assert_close(averager.module.weight, want["weight"], "average")
    assert_close(averager.module.bias, want["bias"], "average")
