"""The training example on two processes: the same run as on one with the same global batch."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from examples.derprop_voc import distributed, losses, trainer
from examples.derprop_voc.__main__ import BAD_INPUT, main
from examples.derprop_voc.config import make_config
from examples.derprop_voc.data import Data
from examples.derprop_voc.distributed import make_fabric
from examples.derprop_voc.errors import ConfigError
from examples.derprop_voc.losses import AdaptiveThreshold, Objective
from examples.derprop_voc.model import Output
from examples.derprop_voc.scenes import write_scenes
from examples.derprop_voc.state import make_state
from examples.derprop_voc.train import run
from examples.derprop_voc.trainer import Length, Trainer
from tests.example.options import TINY as PLAIN

ROOT = Path(__file__).parents[2]
TINY = PLAIN | {
    "dropout": 0.0,
    "batch_norm": "frozen",
    "threshold": 0.2,
    "threshold_momentum": 0.9,
    "labeled_batch": 4,
    "unlabeled_batch": 4,
    "steps": 3,
    "lr": 0.06,
    "evaluate_every": 1,
    "threads": 1,
}
# Three steps of float32: sums over the batch are taken in another order.
TOLERANCE = 1e-5

# Runs compared with one process. Labelled batches of two out of {labelled, void} images have a process without labels.
RUNS = {
    "full": {},
    "one_label": {"partition": "one_label", "labeled_batch": 2, "variant": "supervised", "lr": 0.2},
    "data": {"affinity": "discriminant", "across": "data", "adjust": "alignment", "weight_propagated": 0},
}
RESUMED = {"dropout": 0.5, "weak_mode": "train", "num_anchors": 8}

# Runs each job of a list on every process that torchrun starts, one after the other.
WORKER = """
import json, sys
from pathlib import Path
from matplotlib.figure import Figure
from examples.derprop_voc import losses, train, trainer
from examples.derprop_voc.__main__ import main
from examples.derprop_voc.config import make_config
from examples.derprop_voc.distributed import rank
from examples.derprop_voc.errors import DivergedError

trainer.LOG_EVERY = 1
Figure.savefig = lambda self, file, **options: None
labeled, check = losses.Objective.labeled, trainer.Trainer._check_finite

for job in json.loads(Path(sys.argv[1]).read_text()):
    if "command" in job:
        sys.exit(main(job["command"]))

    def diverging(self, *arguments):
        terms = labeled(self, *arguments)
        return terms | {"ce_l": terms["ce_l"] * float("nan")} if job.get("nan") == rank() else terms

    def stopping(self, *arguments):
        if job.get("stop") == self.state.step:
            raise InterruptedError
        check(self, *arguments)

    losses.Objective.labeled, trainer.Trainer._check_finite = diverging, stopping
    try:
        results = train.run(make_config(job["config"]), resume=job.get("resume", False), progress=False)
    except (InterruptedError, DivergedError) as error:
        results = {"error": str(error)}
    Path(sys.argv[2], f"{job['name']}.{rank()}.json").write_text(json.dumps(results))
"""


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Six labelled images, two of them void in every pixel; and a partition with one that is and one that is not."""
    root = tmp_path_factory.mktemp("scenes")
    write_scenes(root, labeled=6, unlabeled=7, val=3, size=(40, 48), seed=1)
    for index in (1, 4):
        path = root / "SegmentationClass" / f"labeled_{index:04d}.png"
        with Image.open(path) as mask:
            Image.new("L", mask.size, 255).save(path)
    lists = root / "ImageSets" / "Segmentation"
    shutil.copytree(lists / "demo", lists / "one_label")
    (lists / "one_label" / "labeled.txt").write_text("labeled_0000\nlabeled_0001\n")
    return root


def tiny(scenes, out, **options):
    return make_config(TINY | {"data": str(scenes), "out": str(out)} | options)


def torchrun(*arguments, processes=2, timeout=300):
    """Exit code and output of so many processes, with a time limit so that a hang fails."""
    started = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run(
        [*started, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )
    return done.returncode, done.stdout


def read(folder):
    return torch.load(Path(folder) / "latest.pt", weights_only=True)


def assert_close(found, expected, rtol=0):
    assert list(found) == list(expected)
    for key in expected:
        torch.testing.assert_close(
            found[key], expected[key], rtol=rtol, atol=TOLERANCE, msg=lambda text, key=key: key + text
        )


@pytest.fixture(scope="module")
def one(scenes, tmp_path_factory):
    """Folder of `RUNS` on one process."""
    root = tmp_path_factory.mktemp("one")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "LOG_EVERY", 1)
        for name, options in RUNS.items():
            run(tiny(scenes, root / name, **options), progress=False)
    return root


@pytest.fixture(scope="module")
def damaged(scenes, tmp_path_factory):
    """The same with an image damaged where the checks before training, which read its two ends, do not look."""
    root = tmp_path_factory.mktemp("damaged")
    shutil.copytree(scenes, root, dirs_exist_ok=True)
    path = root / "JPEGImages" / "unlabeled_0003.png"
    content = path.read_bytes()
    path.write_bytes(content[:1000] + bytes(1000) + content[2000:])
    return root


@pytest.fixture(scope="module")
def two(scenes, damaged, one, tmp_path_factory):
    """Folder of jobs on two processes, and what they printed."""
    root = tmp_path_factory.mktemp("two")
    jobs = [{"name": name, "config": options} for name, options in RUNS.items()]
    shutil.copytree(one / "full", root / "evaluated")
    jobs += [
        {"name": "evaluated", "config": {}, "resume": True},
        {"name": "whole", "config": RESUMED},
        {"name": "stopped", "config": RESUMED, "stop": 2},
        {"name": "stopped", "config": RESUMED, "resume": True},
        {"name": "nan", "config": {}, "nan": 1},
    ]
    for job in jobs:
        job["config"] = tiny(scenes, root / job["name"], **job["config"]).to_dict()
    # The last job fails on one process, which torchrun answers by ending the other.
    (root / "options.yaml").write_text(yaml.safe_dump(tiny(damaged, root / "damaged").to_dict()))
    jobs.append({"command": ["train", "--config", str(root / "options.yaml")]})
    (root / "jobs.json").write_text(json.dumps(jobs))
    (root / "worker.py").write_text(WORKER)
    code, output = torchrun(root / "worker.py", root / "jobs.json", root)
    assert (root / "nan.1.json").exists(), output
    assert code != 0, output
    return root, output


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_as_one_with_the_same_global_batch(name, one, two, scenes):
    root, _ = two
    found, expected = read(root / name), read(one / name)
    for part in ("network", "averager", "threshold"):
        if expected[part] is not None:
            assert_close(found[part], expected[part])
    # Sums over thousands of pixels.
    assert_close(found["running"], expected["running"], rtol=TOLERANCE)
    assert expected["running"]["predicted"].any() == expected["running"]["labeled"].any() == (name == "data")
    logs = [
        [json.loads(line) for line in (folder / name / "log.jsonl").read_text().splitlines()] for folder in (root, one)
    ]
    losses_of = [[entry for entry in log if entry["kind"] == "train"] for log in logs]
    assert len(losses_of[1]) == TINY["steps"]
    for entry, of_one in zip(*losses_of, strict=True):
        assert entry.keys() == of_one.keys()
        for key in entry.keys() - {"kind"}:
            assert entry[key] == pytest.approx(of_one[key], rel=TOLERANCE, abs=TOLERANCE), key
    assert len({entry["ce_l"] for entry in losses_of[0]}) > 1
    # Both processes return the same results.
    ours, other = (json.loads((root / f"{name}.{rank}.json").read_text()) for rank in range(2))
    assert {**ours, "seconds": 0} == {**other, "seconds": 0}
    assert ours["processes"] == 2
    # The steps are large enough for the tolerance to see them.
    torch.manual_seed(0)
    start = make_state(tiny(scenes, one, **RUNS[name]), 6, torch.device("cpu"), 1).network.state_dict()
    moved = (expected["network"]["classifier.weight"] - start["classifier.weight"]).abs().max()
    assert moved > 100 * TOLERANCE


@pytest.mark.slow
@pytest.mark.exhaustive
def test_three_processes_train_as_one(scenes, tmp_path):
    batches = {"labeled_batch": 6, "unlabeled_batch": 6} | RUNS["data"]
    run(tiny(scenes, tmp_path / "one", **batches), progress=False)
    options = tmp_path / "options.yaml"
    options.write_text(yaml.safe_dump(tiny(scenes, tmp_path / "three", **batches).to_dict()))
    code, output = torchrun("-m", "examples.derprop_voc", "train", "--config", options, processes=3)
    assert code == 0, output
    found, expected = read(tmp_path / "three"), read(tmp_path / "one")
    assert_close(found["network"], expected["network"])
    assert_close(found["running"], expected["running"], rtol=TOLERANCE)


@pytest.mark.slow
def test_the_same_weights_have_the_same_scores(one, two):
    root, _ = two
    ours, of_one = (json.loads((folder / "results.json").read_text()) for folder in (root / "evaluated", one / "full"))
    assert ours["processes"] == 2
    assert ours["evaluation"]["images"] % 2 == 1
    for key in ("last", "best"):
        assert ours[key] == of_one[key]


@pytest.mark.slow
def test_batches_are_global_and_the_share_of_a_process_is_printed(two):
    _, output = two
    lines = [line for line in output.splitlines() if line.startswith("supervised: ")]
    assert lines == [
        "supervised: step 0 of 3, 1 an epoch; global batch 2 labeled (1 a process), 0 unlabeled (0 a process); "
        "2 process(es) on cpu"
    ]
    assert "full: step 0 of 3, 2 an epoch; global batch 4 labeled (2 a process), 4 unlabeled (2 a process); " in output


@pytest.mark.slow
def test_two_processes_resume_as_if_never_stopped(two):
    root, output = two
    assert "step 2 of 3" in output
    found, expected = read(root / "stopped"), read(root / "whole")
    for part in ("network", "averager", "threshold"):
        assert list(found[part]) == list(expected[part])
        assert all(torch.equal(found[part][key], values) for key, values in expected[part].items()), part
    assert found["history"] == expected["history"]
    ours, theirs = ([entry["cpu"] for entry in checkpoint["random"]] for checkpoint in (found, expected))
    assert len(ours) == len(theirs) == 2
    assert all(map(torch.equal, ours, theirs))
    assert not torch.equal(*ours)  # dropout and anchors differ between processes


@pytest.mark.slow
def test_another_number_of_processes_goes_on_with_a_note(two, scenes, tmp_path, capsys):
    shutil.copytree(two[0] / "whole", tmp_path / "run")
    path = tmp_path / "run" / "latest.pt"
    checkpoint = read(tmp_path / "run")
    checkpoint["step"] = 2
    torch.save(checkpoint, path)
    results = run(tiny(scenes, tmp_path / "run", **RESUMED), resume=True, progress=False)
    assert f"note: {path} was made by 2 processes and goes on with 1: " in capsys.readouterr().out
    assert (results["steps"]["run"], results["processes"]) == (3, 1)
    assert f"note: {two[0] / 'evaluated' / 'latest.pt'} was made by 1 processes and goes on with 2: " in two[1]


@pytest.mark.slow
def test_every_process_stops_when_one_diverges_and_only_its_images_are_named(two):
    root, _ = two
    errors = [json.loads((root / f"nan.{rank}.json").read_text())["error"] for rank in range(2)]
    assert errors[0] == errors[1]
    assert errors[0].startswith("loss is nan at step 0, on images ")
    assert len(re.findall(r"(?:un)?labeled_\d+", errors[0])) == 4  # two labelled and two unlabelled ones
    assert not (root / "nan" / "latest.pt").exists()


@pytest.mark.slow
def test_a_failing_process_ends_the_run(two, damaged):
    root, output = two
    path = re.escape(str(damaged / "JPEGImages" / "unlabeled_0003.png"))
    # The other process read whole images only, waited for this one, and was ended.
    assert len(re.findall(rf"^error: {path}: expected ", output, re.MULTILINE)) == 1, output
    assert (root / "damaged" / "config.yaml").exists()
    assert not (root / "damaged" / "results.json").exists()


# --- one process -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"labeled_batch": 3},
            r"labeled_batch: expected a multiple of the 2 processes \(it is the global batch\), got 3",
        ),
        ({"unlabeled_batch": 5}, r"unlabeled_batch: expected a multiple of the 2 processes .*, got 5"),
        ({"unlabeled_batch": 6}, r"unlabeled_batch: expected an even number for each of the 2 processes .*, got 6"),
        ({"batch_norm": "train"}, r"batch_norm: SyncBatchNorm has no CPU form; use --batch-norm frozen"),
    ],
)
def test_what_does_not_split_is_one_line(options, message, scenes, tmp_path, monkeypatch, capsys):
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    config = tiny(scenes, tmp_path / "run", **options)
    with pytest.raises(ConfigError, match=message):
        make_fabric(config)
    path = tmp_path / "options.yaml"
    path.write_text(yaml.safe_dump(config.to_dict()))
    assert main(["train", "--config", str(path)]) == BAD_INPUT
    assert capsys.readouterr().err.count("\n") == 1


class Processes:
    """Stands in for `world_size`, `rank` and the reductions: what `compute` gives on each process's share."""

    def __init__(self, monkeypatch, count):
        self.monkeypatch, self.count, self.rank = monkeypatch, count, 0
        monkeypatch.setattr(distributed, "world_size", lambda: count)
        monkeypatch.setattr(distributed, "rank", lambda: self.rank)

    def each(self, compute):
        """Two rounds: the first collects what is reduced, the second answers with the reduced values."""
        sent, results = [[] for _ in range(self.count)], []

        def collect(x, operation):
            sent[self.rank].append((x.detach().clone(), operation))
            return x.detach()

        self.monkeypatch.setattr(distributed, "_reduced", collect)
        for rank in range(self.count):
            self.rank = rank
            compute(rank)
        for rank in range(self.count):
            self.rank = rank
            calls = iter(zip(*sent, strict=True))

            def reduced(_, operation, calls=calls):
                values, operations = zip(*next(calls), strict=True)
                assert set(operations) == {operation}
                stacked = torch.stack(values)
                return stacked.sum(0) if operation == torch.distributed.ReduceOp.SUM else stacked.amax(0)

            self.monkeypatch.setattr(distributed, "_reduced", reduced)
            results.append(compute(rank))
        return results


def test_helpers_of_one_process_do_nothing():
    x = torch.tensor([1.0, 3.0], requires_grad=True)
    assert (distributed.world_size(), distributed.rank()) == (1, 0)
    for reduce in (distributed.total, distributed.highest):
        assert torch.equal(reduce(x), x)
        assert not reduce(x).requires_grad
    assert distributed.gathered({"a": 1}) == [{"a": 1}]
    assert distributed.share(5) == slice(0, 5)
    mean = distributed.global_mean(x.sum(), torch.tensor(4))
    assert mean == 1
    assert torch.equal(torch.autograd.grad(mean, x)[0], torch.full((2,), 0.25))
    assert distributed.global_mean(torch.tensor(0.0), torch.tensor(0)) == 0


def test_shares_cover_the_global_batch(monkeypatch):
    processes = Processes(monkeypatch, 3)
    places = []
    for rank in range(3):
        processes.rank = rank
        places += range(6)[distributed.share(6)]
    assert places == list(range(6))


@pytest.mark.parametrize("counts", [(3, 5), (0, 8), (0, 0)])
def test_means_over_uneven_shares_are_those_of_the_whole(counts, monkeypatch):
    """The mean over processes of value and gradient, as DDP takes it, whatever each process has."""
    torch.manual_seed(0)
    x = torch.randn(sum(counts), dtype=torch.float64)
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    parts = x.split(list(counts))

    def mean(rank):
        values = (weight * parts[rank]).square()
        return distributed.global_mean(values.sum(), torch.tensor(len(values)))

    results = Processes(monkeypatch, 2).each(mean)
    gradient = sum(torch.autograd.grad(result, weight)[0] for result in results) / 2
    expected = (weight * x).square().sum() / max(1, len(x))
    torch.testing.assert_close(sum(results).detach() / 2, expected.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, weight)[0])


@pytest.fixture
def halves(scenes, tmp_path):
    """Config, output and labels of four images, the last two all void, and a pixel mask."""
    torch.manual_seed(0)
    config = tiny(scenes, tmp_path)
    output = Output(torch.randn(4, 3, 8, 8), torch.rand(4, 8, 4, 4))
    target = torch.randint(0, 3, (4, 8, 8))
    target[2:] = 255
    valid = torch.ones(4, 8, 8, dtype=torch.bool)
    valid[0, :3] = False
    return config, output, target, valid


def test_terms_of_a_process_without_labels(halves, monkeypatch):
    config, output, target, valid = halves
    objective = Objective(config)
    pseudo = torch.rand(4, 3, 8, 8).softmax(1)
    confident = torch.zeros(4, 8, 8, dtype=torch.bool)
    confident[:2] = True  # nothing to trust on the second process

    def terms(part):
        of_part = Output(*(x[part] for x in output))
        return objective.labeled(of_part, target[part], valid[part]) | objective.unlabeled(
            of_part, pseudo[part], confident[part], output.feats[part].flip(1), valid[part]
        )

    expected = terms(slice(None))
    shares = Processes(monkeypatch, 2).each(lambda rank: terms(slice(2 * rank, 2 * rank + 2)))
    for name, value in expected.items():
        torch.testing.assert_close(
            (shares[0][name] + shares[1][name]) / 2, value, msg=lambda text, name=name: name + text
        )
    assert shares[1]["ce_l"] == 0
    assert expected["ce_l"] > 0


def test_the_threshold_follows_the_classes_of_all_processes(monkeypatch):
    torch.manual_seed(0)
    probabilities = torch.randn(4, 3, 8, 8).softmax(1)
    probabilities[2:, 1] += 1  # only the second process predicts class 1 with high confidence
    valid = torch.rand(4, 8, 8) > 0.5

    def followed(part):
        threshold = AdaptiveThreshold(0.5, 0.9)
        threshold.update(probabilities[part], valid[part])
        return threshold.value

    expected = followed(slice(None))
    shares = Processes(monkeypatch, 2).each(lambda rank: followed(slice(2 * rank, 2 * rank + 2)))
    assert shares == [expected, expected]
    assert losses.highest is distributed.highest


def test_synchronised_batch_norm_keeps_the_activations_of_timms_layers(scenes, tmp_path, monkeypatch):
    config = tiny(scenes, tmp_path, batch_norm="train", backbone="timm/test_efficientnet", timm_stages=[1, 3])
    fabric = make_fabric(config)
    images = torch.rand(2, 3, 32, 32)

    def made():
        state = make_state(config, 3, fabric.device, 1)
        before = state.network.eval()(images)
        one = Trainer(fabric, config, Data([], [], [], ("a", "b", "c")), state, Length(1, 1), progress=False)
        return one, before

    alone, _ = made()
    assert not any(isinstance(module, torch.nn.SyncBatchNorm) for module in alone.state.network.modules())
    monkeypatch.setattr(trainer, "world_size", lambda: 2)
    both, before = made()
    layers = [module for module in both.state.network.modules() if isinstance(module, torch.nn.SyncBatchNorm)]
    assert len(layers) > 10
    for found, expected in zip(both.state.network.eval()(images), before, strict=True):
        assert torch.equal(found, expected)
    # The optimiser and the momentum network, made before, still go with the network.
    trained = {id(p) for p in both.state.network.parameters()}
    assert {id(p) for group in both.state.optimizer.param_groups for p in group["params"]} == trained
    both.state.averager.update(both.state.network)
