"""`ablate`: the plan of a grid, what is kept of earlier runs, failures, and the table."""

import json
import shutil
import signal
import statistics
import sys
import time

import pytest

from examples.derprop_voc import ablate as ablate_module
from examples.derprop_voc import tables
from examples.derprop_voc.__main__ import main
from examples.derprop_voc.ablate import is_done, make_jobs, read_grid, read_results, run_all
from examples.derprop_voc.config import make_config
from examples.derprop_voc.data import load_data
from examples.derprop_voc.demo import CONFIGS
from examples.derprop_voc.errors import ConfigError
from examples.derprop_voc.scenes import write_scenes
from examples.derprop_voc.tables import add_differences, details, draw_quality, markdown
from tests.example.options import TINY, flags

GRID = {"a": {"variant": "supervised"}, "b": {"variant": "full", "scale": "degree"}}


def scores(value):
    iou = {"road": value, "sky": None if value == 0.3 else 0.5}  # None: neither in the truth nor predicted
    return {key: {"miou": value, "accuracy": value, "iou": iou} for key in ("prediction", "propagated", "blend")}


def summarise(jobs):
    return tables.summarise([(job.variant, read_results(job)) for job in jobs])


def finish(job, trained, averaged=None, lists=None):
    """Writes what a finished run of `job` leaves."""
    job.out.mkdir(parents=True)
    results = {
        "seed": job.config.seed,
        "config": job.config.to_dict(),
        "lists": lists,
        "evaluation": {"mode": "original"},
        "last": {"trained": scores(trained), "averaged": scores(averaged) if averaged is not None else None},
        "seconds": {"train": 1.0},
        "history": [
            {"step": 2, "epoch": 1, "kind": "pseudo", "labeled_prediction": trained, "unlabeled_prediction": 0.01},
            {"step": 2, "epoch": 1, "kind": "confident", "pseudo_share": 0.02},
            {"step": 3, "epoch": 1, "kind": "pseudo", "labeled_prediction": trained, "unlabeled_prediction": trained},
            {"step": 3, "epoch": 1, "kind": "confident", "pseudo_share": 0.25},
        ],
    }
    (job.out / "results.json").write_text(json.dumps(results))


def test_every_variant_meets_every_seed(tmp_path):
    jobs = make_jobs({"lr": 0.5, "variant": "full"}, GRID, [0, 3, 3], tmp_path)
    assert [(job.variant, job.config.seed) for job in jobs] == [("a", 0), ("a", 3), ("b", 0), ("b", 3)]
    assert {job.config.lr for job in jobs} == {0.5}
    assert [job.config.variant for job in jobs[1:3]] == ["supervised", "full"]  # the grid wins over the base
    assert len({job.out for job in jobs}) == 4
    assert [job.variant for job in make_jobs({}, GRID, [0], tmp_path, only=["b"])] == ["b"]
    with pytest.raises(ConfigError, match=r"only: expected names of the grid \(a, b\), got 'c'"):
        make_jobs({}, GRID, [0], tmp_path, only=["c"])
    with pytest.raises(ConfigError, match="unknown option scal"):
        make_jobs({}, {"a": {"scal": "sum"}}, [0], tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 3\n", r"a: expected `name: \{option: value, \.\.\.\}`, found 3"),
        ("a: {seed: 3}\n", "a: seed is set by ablate itself"),
        ("a/b: {lr: 3}\n", "a/b: expected"),
        ("..: {lr: 3}\n", "expected"),
        ("", "expected at least one variant, found none"),
        ("- a\n", "expected 'option: value' lines, found list"),
    ],
)
def test_grids_are_checked(text, message, tmp_path):
    path = tmp_path / "grid.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_grid(path)


def test_shipped_grids_are_valid(tmp_path):
    paths = sorted((CONFIGS / "grids").glob("*.yaml"))
    assert paths
    for path in paths:
        assert make_jobs({}, {str(i): options for i, options in enumerate(read_grid(path).values())}, [0], tmp_path)


def test_finished_runs_are_kept_if_they_are_of_the_same_options(tmp_path):
    job = make_jobs({"data": "here/camvid"}, GRID, [0], tmp_path)[0]
    assert not is_done(job)
    finish(job, 0.5)
    assert is_done(job)
    moved = make_jobs({"data": "elsewhere/camvid", "threads": 2}, GRID, [0], tmp_path)[0]
    assert is_done(moved)
    for name, theirs, ours in (("lr", 0.001, 0.5), ("data", "here/camvid", "here/voc"), ("weights", "none", "a.pth")):
        other = make_jobs({"data": "here/camvid", name: ours}, GRID, [0], tmp_path)[0]
        with pytest.raises(ConfigError, match=f"results.json: {name} is {theirs!r} there, {ours!r} here; choose anoth"):
            is_done(other)


def test_finished_runs_are_kept_if_their_lists_are_the_same(tmp_path, scenes):
    lists = tmp_path / "lists"
    shutil.copytree(scenes / "ImageSets" / "Segmentation" / "demo", lists)
    job = make_jobs({"data": str(scenes), "partition": str(lists)}, GRID, [0], tmp_path)[0]
    data = load_data(job.config)
    finish(job, 0.5, lists=data.digest)
    assert is_done(job)
    names = (lists / "labeled.txt").read_text().split()
    (lists / "labeled.txt").write_text("\n".join(names[:-1]))
    with pytest.raises(ConfigError, match=r"results.json: the lists of .*lists have changed since"):
        is_done(job)
    (lists / "labeled.txt").unlink()
    assert is_done(job)  # nothing to compare with


def test_table_has_means_and_standard_deviations(tmp_path):
    jobs = make_jobs({}, GRID, [0, 1, 2], tmp_path)
    values = [0.30, 0.32, 0.37]
    for job, value in zip(jobs, values + values, strict=True):
        finish(job, value, value + 0.1 if job.variant == "b" else None)
    rows = summarise(jobs)
    assert [row["variant"] for row in rows] == ["a", "b"]
    assert rows[0]["columns"]["P"]["values"] == values
    assert rows[0]["columns"]["P"]["mean"] == pytest.approx(statistics.mean(values))
    assert rows[0]["columns"]["P"]["std"] == pytest.approx(statistics.stdev(values))
    assert "P, momentum" not in rows[0]["columns"]
    lines = markdown(rows).splitlines()
    assert lines[2] == "| a | 3 | 33.0 ± 3.6 | 33.0 ± 3.6 | - | - |"
    assert lines[3] == "| b | 3 | 33.0 ± 3.6 | 33.0 ± 3.6 | 43.0 ± 3.6 | 43.0 ± 3.6 |"
    assert markdown(summarise(jobs[:1])).splitlines()[2] == "| a | 1 | 30.0 | 30.0 | - | - |"


def test_details_are_of_classes_and_of_the_last_pseudo_labels(tmp_path):
    jobs = make_jobs({}, GRID, [0, 1], tmp_path)
    for job, value in zip(jobs, (0.3, 0.4, 0.6, 0.6), strict=True):
        finish(job, value, 0.7 if job.variant == "b" else None)
    text = details(summarise(jobs))
    assert text.startswith(
        """IoU of each class, P, mean over seeds:

| variant | road | sky |
|---|---|---|
| a | 35.0 | 50.0 |
| b | 60.0 | 50.0 |

IoU of each class, P~, mean over seeds:
"""
    )
    assert "IoU of each class, P~, momentum, mean over seeds:\n\n| variant | road | sky |\n|---|---|---|\n| b |" in text
    assert text.endswith(
        """Unlabelled crops, the last measurement of training:

| variant | mIoU of P | of P~ | of P_bar | of P_bar above the threshold | share above it | accuracy above it |
|---|---|---|---|---|---|---|
| a | 35.0 ± 7.1 | - | - | - | 25.0 ± 0.0 | - |
| b | 60.0 ± 0.0 | - | - | - | 25.0 ± 0.0 | - |"""
    )
    assert "| - |" in details(summarise(jobs[:1]))  # a class that no run saw


def test_differences_are_of_pairs_of_one_seed(tmp_path):
    jobs = make_jobs({}, GRID, [0, 1, 2, 3], tmp_path)
    values = {
        ("a", 0): 0.30,
        ("a", 1): 0.35,
        ("a", 2): 0.41,
        ("b", 2): 0.42,
        ("b", 1): 0.38,
        ("b", 0): 0.31,
        ("b", 3): 0.9,
    }
    done = [job for job in jobs if (job.variant, job.config.seed) in values]
    for job in done:
        value = values[job.variant, job.config.seed]
        finish(job, value, value if job.variant == "b" else None)
    rows = summarise(done[::-1])
    plain = markdown(rows)
    add_differences(rows, "a")
    assert [row["differences"]["against"] for row in rows] == ["a", "a"]
    of_b = rows[0]["differences"]["columns"]
    assert set(of_b) == {"P", "P~"}  # the reference has no momentum network
    pairs = {0: 0.01, 1: 0.03, 2: 0.01}
    assert dict(zip(of_b["P"]["seeds"], of_b["P"]["values"], strict=True)) == pytest.approx(pairs)
    assert of_b["P"]["mean"] == pytest.approx(0.05 / 3)
    variance = sum((x - 0.05 / 3) ** 2 for x in pairs.values()) / 2
    assert of_b["P"]["error"] == pytest.approx((variance / 3) ** 0.5)
    text = markdown(rows)
    assert text.startswith(plain)
    assert text.splitlines()[-5:] == [
        "Less a, the mean over pairs of one seed ± its standard error:",
        "",
        "| variant | P | P~ | P, momentum | P~, momentum |",
        "|---|---|---|---|---|",
        "| b | +1.7 ± 0.7 | +1.7 ± 0.7 | - | - |",
    ]
    rows = summarise([done[0], *done[-1:]])  # seeds that do not meet
    add_differences(rows, "a")
    assert markdown(rows).splitlines()[-1] == "| b | - | - | - | - |"


def test_the_reference_is_a_variant_of_the_grid(tmp_path, capsys):
    grid = tmp_path / "grid.yaml"
    grid.write_text("a: {}\nb: {}\n")
    assert main(["ablate", f"--grid={grid}", "--against", "c", "--dry-run"]) == 2
    assert capsys.readouterr().err == "error: against: expected one of a, b, got 'c'\n"
    assert main(["ablate", f"--grid={grid}", "--against", "b", "--only", "a", "--dry-run"]) == 2
    assert "error: against: expected one of a, got 'b'" in capsys.readouterr().err


def test_curves_are_means_over_seeds(tmp_path, monkeypatch):
    jobs = make_jobs({}, GRID, [0, 1], tmp_path)
    for job, value in zip(jobs, (0.2, 0.4, 0.5, 0.5), strict=True):
        finish(job, value)
    figures = []
    monkeypatch.setattr(tables, "write_figure", lambda path, figure: figures.append(figure))
    draw_quality(tmp_path / "curves.png", [(job.variant, read_results(job)) for job in jobs])
    lines = [axis.get_lines()[0].get_xydata().tolist() for axis in figures[0].axes]
    assert lines == [[[step, pytest.approx(value)] for step in (2, 3)] for value in (30, 50)]
    assert [axis.get_title(loc="left") for axis in figures[0].axes] == ["a", "b"]


@pytest.mark.slow
def test_a_failed_run_stops_no_other_and_the_command_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    failing = [sys.executable, "-c", "import sys; print('a line'); sys.exit('error: option partition: none')"]
    make_command = ablate_module.command
    monkeypatch.setattr(ablate_module, "command", lambda job: failing if job.variant == "broken" else make_command(job))
    data, out, grid = tmp_path / "data", tmp_path / "out", tmp_path / "grid.yaml"
    write_scenes(data, labeled=3, unlabeled=4, val=2, size=(40, 48), seed=1)
    grid.write_text("broken: {partition: none}\ngood: {variant: supervised}\nalso: {variant: supervised, lr: 0.02}\n")
    command = ["ablate", f"--grid={grid}", "--seeds", "0", "--jobs", "2", f"--data={data}", f"--out={out}"]
    command += flags(TINY | {"threads": 1})
    assert main([*command, "--dry-run"]) == 0
    assert capsys.readouterr().out.count("missing") == 3
    assert not out.exists()
    options = TINY | {"threads": 1, "data": str(data)}
    [also] = make_jobs(options, {"also": {"variant": "supervised", "lr": 0.02}}, [0], out)
    finish(also, 0.3, lists=load_data(also.config).digest)
    assert main(command) == 2
    captured = capsys.readouterr()
    assert "3 runs, 1 of them done" in captured.out
    assert "1 of 3 runs failed" in captured.err
    assert "option partition" in captured.err
    assert captured.err.count("\n") == 1
    rows = json.loads((out / "table.json").read_text())["rows"]
    assert [(row["variant"], row["seeds"]) for row in rows] == [("good", [0]), ("also", [0])]
    assert "| good | 1 |" in (out / "table.md").read_text()
    assert (out / "details.md").read_text() == details(rows) + "\n"

    written = (out / "good" / "seed_0" / "results.json").stat().st_mtime_ns
    assert main([*command, "--only", "good"]) == 0
    assert "1 runs, 1 of them done" in capsys.readouterr().out
    assert (out / "good" / "seed_0" / "results.json").stat().st_mtime_ns == written
    table = (out / "table.md").read_text()
    assert "| also | 1 |" in table  # what was done before stays in the table
    capsys.readouterr()
    assert main([*command, "--seed", "0"]) == 2
    assert capsys.readouterr().err == "error: seed: ablate takes several, --seeds 0\n"


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit], ids=["ctrl-c", "kill"])
def test_interrupting_stops_the_runs(tmp_path, monkeypatch, error):
    jobs = make_jobs({}, GRID, [0, 1], tmp_path)
    monkeypatch.setattr(ablate_module, "command", lambda _: [sys.executable, "-c", "import time; time.sleep(600)"])

    def interrupted(futures):
        while not (jobs[0].out / "output.txt").exists() or not (jobs[1].out / "output.txt").exists():
            time.sleep(0.01)
        time.sleep(0.3)
        if error is SystemExit:
            signal.raise_signal(signal.SIGTERM)
        raise KeyboardInterrupt

    monkeypatch.setattr(ablate_module, "as_completed", interrupted)
    start = time.monotonic()
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(error):
        run_all(jobs, 2)
    assert signal.getsignal(signal.SIGTERM) == before
    assert time.monotonic() - start < 60
    assert not jobs[3].out.exists()  # what waited was never started


def test_jobs_are_positive(tmp_path, capsys):
    grid = tmp_path / "grid.yaml"
    grid.write_text("a: {}\n")
    assert main(["ablate", f"--grid={grid}", "--jobs", "0"]) == 2
    assert capsys.readouterr().err == "error: jobs: expected at least 1, got 0\n"


def test_defaults_of_a_grid_are_checked_before_anything_runs(tmp_path, capsys):
    grid = tmp_path / "grid.yaml"
    grid.write_text("good: {}\nbad: {lr: fast}\n")
    assert main(["ablate", f"--grid={grid}", f"--out={tmp_path / 'out'}"]) == 2
    assert capsys.readouterr().err == "error: lr: expected a number, got 'fast'\n"
    assert make_config({}).lr == 0.001


def test_the_page_of_results_shows_their_tables():
    results = CONFIGS.parent / "results"
    page = (results / "README.md").read_text()
    folders = [path.parent for path in results.glob("*/table.json")]
    assert folders
    for folder in folders:
        table = (folder / "table.md").read_text()
        rows = json.loads((folder / "table.json").read_text())["rows"]
        assert table.rstrip("\n") == markdown(rows)
        assert table in page, f"README.md lacks {folder.name}/table.md as it is"
        for picture in folder.glob("*.png"):
            assert f"{folder.name}/{picture.name}" in page
