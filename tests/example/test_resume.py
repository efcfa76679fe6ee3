"""The training example's checkpoints: a run that is killed and resumed is the run that was never killed."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from examples.derprop_voc import trainer
from examples.derprop_voc.__main__ import BAD_INPUT, DONE, main
from examples.derprop_voc.data import load_data
from examples.derprop_voc.errors import CheckpointError, ConfigError
from examples.derprop_voc.evaluate import OUTPUTS
from examples.derprop_voc.scenes import CLASS_NAMES
from examples.derprop_voc.state import check_resumable
from examples.derprop_voc.train import run
from tests.example.runs import (
    EPOCH,
    SETTINGS,
    STEPS,
    TINY,
    Stopped,
    assert_same,
    assert_same_run,
    read,
    stop_at,
    tiny,
)
from tests.example.runs import SCENES as SCENES

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _log_every(monkeypatch):
    monkeypatch.setattr(trainer, "LOG_EVERY", 2)


@pytest.fixture(scope="module")
def runs(scenes, tmp_path_factory):
    """Setting -> (config and results of an uninterrupted run, folder of the same run stopped in its second epoch)."""
    made = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "LOG_EVERY", 2)
        for name, options in SETTINGS.items():
            root = tmp_path_factory.mktemp(name)
            whole = tiny(scenes, root / "whole", **options)
            results = run(whole, progress=False)
            with pytest.MonkeyPatch.context() as patch_stop:
                stop_at(patch_stop, 5)
                with pytest.raises(Stopped):
                    run(tiny(scenes, root / "stopped", **options), progress=False)
            made[name] = whole, results, root / "stopped"
    return made


@pytest.fixture
def stopped(runs, tmp_path):
    """A copy of the stopped run with the setting "eval": three steps in its checkpoint, five in its log."""
    shutil.copytree(runs["eval"][2], tmp_path / "run")
    return tmp_path / "run"


def one_line(capsys):
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


def command(config, folder, *flags):
    path = folder / "options.yaml"
    path.write_text(yaml.safe_dump(config.to_dict()))
    return ["train", "--config", str(path), *flags]


# --- nothing is lost -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_stopped_and_resumed_run_is_the_uninterrupted_one(setting, runs, scenes, tmp_path):
    whole, results, folder = runs[setting]
    out = tmp_path / "run"
    shutil.copytree(folder, out)
    assert read(out)["step"] == EPOCH
    assert json.loads((out / "log.jsonl").read_text().splitlines()[-1])["step"] == 4  # more than the checkpoint holds
    resumed = run(tiny(scenes, out, **SETTINGS[setting]), resume=True, progress=False)
    assert_same_run(out, whole.out)
    for key in ("last", "best", "history", "steps"):
        assert resumed[key] == results[key], key
    assert read(out)["epoch"] == 3
    # What the comparison above would not see if it stood still.
    entries = [entry for entry in results["history"] if entry["kind"] == "train"]
    assert len({TINY["threshold"], *(entry["threshold"] for entry in entries)}) == 1 + len(entries)
    assert entries[-1]["kept"] > 0


# Moments at which a run is killed: setting, function, and which of its calls does not return.
# Files are made durable in the order config.yaml, log.jsonl, then best.pt (where it is) and latest.pt of each epoch.
MOMENTS = [
    pytest.param(*moment, id=f"{moment[0]}-{moment[1].rpartition(':')[2]}-{moment[2]}", marks=marks)
    for moment, marks in (
        (("eval", "examples.derprop_voc.trainer:Trainer._check_finite", 1), pytest.mark.exhaustive),
        (("train", "examples.derprop_voc.trainer:Trainer._check_finite", 5), ()),
        (("eval", "os:fsync", 3), ()),
        (("eval", "os:fsync", 4), pytest.mark.exhaustive),
        (("train", "os:fsync", 5), pytest.mark.exhaustive),
        (("eval", "pathlib:Path.replace", 5), ()),
    )
]

KILLER = """
import importlib, json, os, resource, signal, sys
from matplotlib.figure import Figure
from examples.derprop_voc import trainer
from examples.derprop_voc.__main__ import main

trainer.LOG_EVERY = 2
Figure.savefig = lambda self, file, **options: None

def kill_at(place, count):
    module, _, path = place.partition(":")
    owner = importlib.import_module(module)
    *owners, name = path.split(".")
    for part in owners:
        owner = getattr(owner, part)
    original, calls = getattr(owner, name), [0]
    def killing(*arguments, **options):
        calls[0] += 1
        if calls[0] == count:
            if name == "fsync":  # as if only half had been written by now
                os.ftruncate(arguments[0], os.fstat(arguments[0]).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)
    setattr(owner, name, killing)

answers = []
for job in json.load(sys.stdin):
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.dup2(write, 1), os.dup2(write, 2)
        os.close(read), os.close(write)
        if job.get("kill"):
            kill_at(*job["kill"])
        if job.get("limit"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (job["limit"], resource.RLIM_INFINITY))
        code = main(job["arguments"])
        sys.stdout.flush()
        os._exit(code)
    os.close(write)
    with os.fdopen(read) as stream:
        output = stream.read()
    answers.append([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), output])
print(json.dumps(answers))
"""


def in_processes(jobs):
    """(exit code, output) of each job in a process of its own, forked from one so that torch is imported once."""
    done = subprocess.run(
        [sys.executable, "-c", KILLER],
        input=json.dumps(jobs),
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def ended(scenes, runs, tmp_path_factory):
    """Name of a job, or moment -> (run folder, exit code, output) of a run in a process of its own."""
    jobs, folders = {}, {}

    def add(name, setting, *flags, folder=None, **job):
        folder = folders[name] = folder or tmp_path_factory.mktemp("ended")
        jobs[name] = {"arguments": command(tiny(scenes, folder / "run", **SETTINGS[setting]), folder, *flags), **job}

    for moment in MOMENTS:
        setting, *kill = moment.values
        add(moment.values, setting, kill=kill)
    add("workers", "eval", "--workers", "2", kill=["examples.derprop_voc.trainer:Trainer._check_finite", 5])
    add("other workers", "eval", "--resume", "--workers", "1", folder=folders["workers"])
    full = tmp_path_factory.mktemp("full")
    shutil.copytree(runs["eval"][2], full / "run")
    limit = (full / "run" / "latest.pt").stat().st_size // 2
    add("full disk", "eval", "--resume", folder=full, limit=limit)
    answers = in_processes(list(jobs.values()))
    return {name: (folders[name] / "run", *answer) for name, answer in zip(jobs, answers, strict=True)}


@pytest.mark.slow
@pytest.mark.parametrize(("setting", "place", "call"), MOMENTS)
def test_sigkill_at_any_moment_loses_nothing(setting, place, call, ended, runs, scenes):
    out, code, output = ended[setting, place, call]
    assert code == -signal.SIGKILL, output
    assert (out / "latest.pt").exists() == (call == 5)
    if place == "os:fsync":
        [half] = out.glob(".*")
        assert half.name == (".best.pt.part" if call == 3 else ".latest.pt.part")
    run(tiny(scenes, out, **SETTINGS[setting]), resume=True, progress=False)
    assert_same_run(out, runs[setting][0].out)


@pytest.mark.slow
def test_sigkill_with_workers_and_a_resume_with_others(runs, ended):
    _, code, output = ended["workers"]
    assert code == -signal.SIGKILL, output
    out, code, output = ended["other workers"]
    assert code == DONE, output
    assert f"step {EPOCH} of {STEPS}" in output
    assert_same_run(out, runs["eval"][0].out)


def test_a_finished_run_is_only_evaluated_again(runs, tmp_path, scenes, monkeypatch):
    whole, results, _ = runs["eval"]
    out = tmp_path / "run"
    shutil.copytree(whole.out, out)
    before = (out / "latest.pt").read_bytes()
    stop_at(monkeypatch, 1)
    again = run(tiny(scenes, out, **SETTINGS["eval"]), resume=True, progress=False)
    assert {**again, "seconds": 0, "config": 0} == {**results, "seconds": 0, "config": 0}
    assert (out / "latest.pt").read_bytes() == before
    assert_same_run(out, whole.out)


def test_a_checkpoint_holds_what_was_promised_and_no_code(runs):
    whole, results, _ = runs["train"]
    checkpoint = read(whole.out)
    assert (checkpoint["step"], checkpoint["epoch"]) == (STEPS, 3)
    assert checkpoint["config"] == whole.to_dict()
    assert checkpoint["class_names"] == list(CLASS_NAMES)
    assert checkpoint["history"] == results["history"]
    assert checkpoint["best"] == results["best"]
    assert checkpoint["schedule"]["last_epoch"] == STEPS
    assert checkpoint["threshold"]["value"].item() == pytest.approx(results["history"][-2]["threshold"])
    assert checkpoint["averager"]["n_averaged"] == STEPS
    assert checkpoint["precision"] == {}
    [random] = checkpoint["random"]
    assert random["cuda"] is None
    torch.Generator().set_state(random["cpu"])
    trained = [name for name in checkpoint["network"] if name.endswith(("weight", "bias"))]
    assert len(checkpoint["optimizer"]["state"]) == len(trained)
    assert all(entry["momentum_buffer"].any() for entry in checkpoint["optimizer"]["state"].values())


def test_best_is_the_epoch_of_the_highest_validation_miou(scenes, tmp_path, monkeypatch):
    def scored(*mious):
        left = iter(mious)

        def evaluate(networks, *_, **__):
            miou = next(left)
            # The network that the run is tested with comes last; the other one must not decide.
            values = dict(zip(networks, (1 - miou, miou), strict=True))
            return {
                network: {name: {"miou": value, "accuracy": 0.0, "iou": {}} for name in OUTPUTS}
                for network, value in values.items()
            }

        monkeypatch.setattr(trainer, "evaluate", evaluate)

    config = tiny(scenes, tmp_path / "run", steps=12)
    with pytest.MonkeyPatch.context() as patch:
        scored(0.2, 0.5)
        stop_at(patch, 8)
        with pytest.raises(Stopped):
            run(config, progress=False)
    assert (read(config.out, "best.pt")["step"], read(config.out)["step"]) == (6, 6)
    best = (tmp_path / "run" / "best.pt").read_bytes()
    scored(0.4, 0.5, 0.1)  # lower; the same, where the first stays; and the evaluation after training
    results = run(config, resume=True, progress=False)
    assert (tmp_path / "run" / "best.pt").read_bytes() == best
    assert (results["best"]["epoch"], results["best"]["step"], results["best"]["miou"]) == (2, 6, 0.5)
    assert results["best"]["scores"]["averaged"]["prediction"]["miou"] == 0.5
    assert read(config.out)["best"] == results["best"]


def test_overwriting_leaves_nothing_of_the_earlier_run(stopped, scenes, monkeypatch):
    stop_at(monkeypatch, 1)
    with pytest.raises(Stopped):
        run(tiny(scenes, stopped), overwrite=True, progress=False)
    assert not list(stopped.glob("*.pt"))
    assert (stopped / "log.jsonl").read_text() == ""


# --- what is refused -------------------------------------------------------------------------------------------------


def test_a_folder_that_holds_a_run_is_refused(stopped, scenes, tmp_path, capsys):
    before = {path: path.read_bytes() for path in stopped.iterdir()}
    assert main(command(tiny(scenes, stopped), tmp_path)) == BAD_INPUT
    assert "holds a run already; go on with it (--resume) or choose another folder" in one_line(capsys)
    assert {path: path.read_bytes() for path in stopped.iterdir()} == before


@pytest.mark.parametrize(("name", "value"), [("lr", 0.5), ("variant", "no_momentum"), ("steps", 20), ("seed", 1)])
def test_an_option_that_matters_must_not_change(name, value, stopped, scenes, tmp_path, capsys):
    config = tiny(scenes, stopped)
    assert main(command(tiny(scenes, stopped, **{name: value}), tmp_path, "--resume")) == BAD_INPUT
    found = f"error: {name}: {stopped / 'latest.pt'} was made with {getattr(config, name)!r}, this run has {value!r}\n"
    assert one_line(capsys) == found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda options: options.pop("max_order"), "max_order: {} was made with None, this run has 1"),
        (lambda options: options.update(old=[2]), "old: {} was made with [2], this run has None"),
    ],
)
def test_a_checkpoint_of_other_options_than_there_are_is_refused(change, message, stopped, scenes, tmp_path, capsys):
    path = stopped / "latest.pt"
    _edit(lambda values: change(values["config"]))(path)
    assert main(command(tiny(scenes, stopped), tmp_path, "--resume")) == BAD_INPUT
    assert one_line(capsys) == f"error: {message.format(path)}\n"


def test_other_class_names_are_refused(stopped, scenes):
    config = tiny(scenes, stopped)
    data = load_data(config)
    check_resumable(stopped / "latest.pt", read(stopped), config, data)
    with pytest.raises(ConfigError, match=r"class_names: .*latest\.pt was made with \['background', .*, found \['a'\]"):
        check_resumable(stopped / "latest.pt", read(stopped), config, replace(data, class_names=("a",)))


@pytest.mark.parametrize("name", ["labeled", "unlabeled"])
def test_other_lists_are_refused(name, stopped, scenes, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(scenes, data)
    path = data / "ImageSets" / "Segmentation" / "demo" / f"{name}.txt"
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    assert main(command(tiny(data, stopped), tmp_path, "--resume")) == BAD_INPUT
    assert "partition: " in (error := one_line(capsys))
    assert error.endswith("latest.pt was made with other lists of images than demo holds now\n")


def test_free_options_may_change(stopped, runs, scenes, tmp_path):
    moved = stopped.rename(tmp_path / "moved")
    data = tmp_path / "data"
    shutil.copytree(scenes, data)
    run(tiny(data, moved, evaluate_every=0, cache_images=True), resume=True, progress=False)
    for key in ("network", "averager", "optimizer", "threshold"):
        assert_same(read(moved)[key], read(runs["eval"][0].out)[key], key)


def _edit(change):
    def damage(path):
        checkpoint = torch.load(path, weights_only=True)
        change(checkpoint)
        torch.save(checkpoint, path)

    return damage


def _flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _other_optimizer(checkpoint):
    other = torch.optim.SGD([torch.zeros(3, requires_grad=True)], lr=1.0, momentum=0.9)
    checkpoint["optimizer"] = other.state_dict()


DAMAGE = {
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:5000]), "damaged, or not a file of torch.save"),
    "bit": (_flip, "damaged, or not a file of torch.save"),
    "empty": (lambda path: path.write_bytes(b""), "damaged, or not a file of torch.save"),
    "text": (lambda path: path.write_text("step: 3\n"), "damaged, or not a file of torch.save"),
    "tensor": (lambda path: torch.save(torch.zeros(2), path), "expected a checkpoint of this program, found a Tensor"),
    "foreign": (
        lambda path: torch.save({"state_dict": {}, "lr": 1.0}, path),
        "found no key 'format' (but state_dict, lr)",
    ),
    "format": (_edit(lambda values: values.update(format="other 2")), "key 'format': expected 'derprop_voc 3', found"),
    "missing": (_edit(lambda values: values.pop("threshold")), "found no key 'threshold'"),
    "type": (_edit(lambda values: values.update(config=3)), "key 'config': expected dict, found int"),
    "network-missing": (
        _edit(lambda values: values["network"].pop("classifier.bias")),
        "network: key 'classifier.bias' is missing",
    ),
    "network-unknown": (
        _edit(lambda values: values["network"].update(extra=torch.zeros(1))),
        "network: key 'extra' is unknown",
    ),
    "network-shape": (
        _edit(lambda values: values["network"].update({"classifier.bias": torch.zeros(2)})),
        "network: key 'classifier.bias': expected shape [6], found [2]",
    ),
    "averager": (_edit(lambda values: values.update(averager=None)), "averager: key 'n_averaged' is missing"),
    "optimizer": (_edit(_other_optimizer), "optimizer: does not fit: "),
    "optimizer-shape": (
        _edit(lambda values: values["optimizer"]["state"][1].update(momentum_buffer=torch.zeros(3))),
        "optimizer: momentum_buffer: key 1: expected shape",
    ),
    "optimizer-missing": (
        _edit(lambda values: values["optimizer"]["state"].pop(1)),
        "optimizer: momentum_buffer: key 1 is missing",
    ),
    "running": (_edit(lambda values: values["running"].pop("predicted")), "running: key 'predicted' is missing"),
    "schedule": (_edit(lambda values: values["schedule"].pop("last_epoch")), "schedule: key 'last_epoch' is missing"),
    "random": (_edit(lambda values: values.update(random=[{"cpu": torch.zeros(3)}])), "random: does not fit: "),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_or_foreign_checkpoint_is_one_line_that_says_which_key(name, stopped, scenes, tmp_path, capsys):
    damage, message = DAMAGE[name]
    damage(stopped / "latest.pt")
    before = (stopped / "latest.pt").read_bytes()
    assert main(command(tiny(scenes, stopped), tmp_path, "--resume")) == BAD_INPUT
    error = one_line(capsys)
    assert error.startswith(f"error: {stopped / 'latest.pt'}: ")
    assert message in error
    assert (stopped / "latest.pt").read_bytes() == before


# --- a full disk --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_full_disk_leaves_the_checkpoint(runs, ended, scenes):
    out, code, output = ended["full disk"]
    assert code == BAD_INPUT, output
    errors = [line for line in output.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, output
    assert errors[0].endswith("the checkpoint could not be written (File too large); the previous one is untouched"), (
        output
    )
    assert "Traceback" not in output
    assert (out / "latest.pt").read_bytes() == (runs["eval"][2] / "latest.pt").read_bytes()
    assert not list(out.glob(".*"))
    run(tiny(scenes, out), resume=True, progress=False)
    assert_same_run(out, runs["eval"][0].out)


@pytest.mark.parametrize("name", ["config.yaml", "panel.png"])
def test_no_space_for_another_file_is_one_line(name, stopped, scenes, tmp_path, monkeypatch, capsys):
    replace_file = Path.replace

    def full(self, target):
        if Path(target).name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        return replace_file(self, target)

    monkeypatch.setattr(Path, "replace", full)
    assert main(command(tiny(scenes, stopped), tmp_path, "--resume")) == BAD_INPUT
    assert one_line(capsys) == f"error: {stopped / name}: No space left on device\n"


@pytest.mark.parametrize("first", [False, True])
def test_no_space_while_writing_a_checkpoint(first, stopped, scenes, monkeypatch):
    if first:
        for path in stopped.glob("*.pt"):
            path.unlink()
    before = {path.name: path.read_bytes() for path in stopped.glob("*.pt")}
    sync = os.fsync

    def full(handle):
        if os.fstat(handle).st_size > 100_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(handle)

    monkeypatch.setattr(os, "fsync", full)
    kept = "there is none before it" if first else "the previous one is untouched"
    with pytest.raises(CheckpointError, match=rf"\.pt: .* could not be written \(No space left on device\); {kept}$"):
        run(tiny(scenes, stopped), resume=True, progress=False)
    assert {path.name: path.read_bytes() for path in stopped.glob("*.pt")} == before
    assert not list(stopped.glob(".*"))
