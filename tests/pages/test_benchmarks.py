"""The benchmark suite: its cases agree, its marks and figures are right, and its files are what it generates.

Nothing here looks at how long something took.
"""

import json
import math
import re
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jsonschema
import pytest
import torch
from torch.overrides import TorchFunctionMode

from benchmarks import __main__ as cli
from benchmarks import accuracy, beside, builders, growth, measure, results, rounding, suite, table
from benchmarks.cases import CASES, Case, Target
from benchmarks.growth import GROWTH
from benchmarks.problem import Problem, UnavailableError, Variant, Work, forward

ROOT = Path(__file__).parents[2]
FACTS = {"bfloat16_matrix_units": False, "float32_matmul_precision": "highest"}
RATES = {"float32": 1e11, "bfloat16": 1e11, "copy": 1e10}
SETTINGS = suite.Settings("cpu", "quick", False, RATES, FACTS)
QUICKEST = measure.Effort(0.0, 1, 1, 1e9)


def tiny(problem):
    grid = None if problem.grid is None else (3, 4)
    return replace(problem, height=7, width=5, n=min(problem.n, 2), D=8, C=3, grid=grid)


def tiny_case(**options):
    return Case(
        "a tiny loss", "loss", builders.loss_consistency, tiny(Problem(1, 1)), tolerance=(1e-4, 2e-2), **options
    )


@pytest.fixture
def quickest(monkeypatch):
    monkeypatch.setattr(measure, "EFFORTS", {"quick": QUICKEST, "full": QUICKEST})
    monkeypatch.setattr(measure, "TURN", 1e-9)


@pytest.fixture
def folders(monkeypatch, tmp_path):
    """Results go to a temporary folder, and the tables and plots nowhere."""
    monkeypatch.setattr(results, "FOLDER", tmp_path / "saved")
    monkeypatch.setattr(results, "PARTIAL", tmp_path / "partial")
    monkeypatch.setattr(cli.machine, "ROOT", tmp_path)
    monkeypatch.setattr(cli, "redraw", lambda **_: 0)
    monkeypatch.setattr(cli.machine, "rates", lambda device: RATES)
    return tmp_path


# ---------------------------------------------------------------------------------------------------------------------
# Cases and variants.


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.sample is None])
def test_the_variants_of_a_case_agree(name):
    case = CASES[name]
    variants = case.build(tiny(case.problem))
    assert next(iter(variants)) == "dlprop"
    assert set(case.only) | set(case.quick_without) <= set(variants)
    named = {n for t in case.targets if t.device == "cpu" for n in (t.of, t.against) if n}
    assert named <= set(variants)
    found = {n: v.run() for n, v in variants.items() if not v.compiles and n not in ("dlprop tiled", "dlprop triton")}
    for variant, values in found.items():
        assert all(torch.isfinite(x).all() for x in values), variant
        if variants[variant].kind in ("ours", "equivalent"):
            apart = suite.differences(values, found["dlprop"])
            assert apart[0] <= case.tolerance[0], variant
            assert max(apart[1:], default=0) <= case.tolerance[1], variant


@pytest.mark.parametrize("name", GROWTH)
def test_growth_names_variants_that_exist(name):
    one = GROWTH[name]
    assert set(one.variants) <= set(one.build(tiny(one.problem)))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")  # of the compilers about the machine
def test_the_compiled_and_the_keops_variants_agree():
    pytest.importorskip("pykeops", reason="KeOps is measured where it is installed")
    variants = builders.propagation(tiny(Problem(1, 1)))
    ours = variants["dlprop"].run()
    for name in ("dense, compiled", "KeOps"):
        entry, found, _ = suite.first_run(name, variants[name], SETTINGS, {})
        assert entry["status"] == "ok", entry
        assert max(suite.differences(found, ours)) < 1e-4


def test_attention_is_the_softmax_over_sources():
    p = tiny(Problem(1, 1))
    logits, queries, keys = p.logits(), p.features().flatten(2), p.features(5).flatten(2)
    P = (queries.mT @ keys).softmax(dim=-1)  # a target's row sums to one over the sources
    expected = (logits.flatten(2) @ P.mT).view_as(logits)
    torch.testing.assert_close(beside.attention(logits, queries, keys), expected)


def test_inputs_are_the_same_every_time_and_rounded_as_drawn():
    p = Problem(3, 4, dtype=torch.float64, drawn=torch.bfloat16)
    assert torch.equal(p.features(), replace(p, dtype=torch.bfloat16, drawn=None).features().double())
    assert torch.equal(p.labels(), p.labels())


def test_large_inputs_repeat_without_channels_alike(monkeypatch):
    monkeypatch.setattr("benchmarks.problem.REPEATED", 31)
    x = Problem(2, 8, D=7).features()[0].flatten(1)
    assert len({tuple(channel.tolist()) for channel in x}) == 7


def test_a_short_run_measures_what_the_targets_name_and_a_gpu_run_leaves_out_keops():
    case = CASES["propagation_129"]
    names = ("dlprop", "dlprop dense", "dense PyTorch", "dense, compiled", "KeOps")
    variants = {name: Variant(lambda: ()) for name in names}
    assert set(suite.chosen(case, variants, SETTINGS)) == {"dlprop", "dense PyTorch"}
    assert "dense, compiled" in suite.chosen(case, variants, replace(SETTINGS, mode="full"))
    gpu = replace(SETTINGS, device="cuda", mode="full")
    assert "KeOps" not in suite.chosen(CASES["propagation_41"], variants, gpu)
    on_gpu = builders.backends(Problem(1, 1, device="cuda"), lambda backend: backend)
    assert on_gpu == {"dlprop": "auto", "dlprop dense": "dense", "dlprop tiled": "tiled", "dlprop triton": "triton"}
    assert "loss_321" in cli.names("cuda", "full")
    assert "loss_321" not in cli.names("cpu", "full")
    assert "import" not in cli.names("cuda", "full")


# ---------------------------------------------------------------------------------------------------------------------
# Marks, figures, targets.


def raising(error):
    def run():
        raise error

    return run


@pytest.mark.parametrize(
    ("variant", "status"),
    [
        (Variant(lambda: (torch.ones(1),), work=Work(peak=1e18)), "out of memory"),
        (Variant(lambda: (torch.ones(1),), work=Work(operations=1e18)), "too slow"),
        (Variant(raising(torch.OutOfMemoryError("no"))), "out of memory"),
        (Variant(raising(RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"))), "out of memory"),
        (Variant(raising(UnavailableError("not installed"))), "unavailable"),
        (Variant(raising(ZeroDivisionError("oops"))), "failed"),
        (Variant(lambda: (torch.ones(1),)), "ok"),
    ],
)
def test_marks(variant, status):
    entry, values, _ = suite.first_run("x", variant, SETTINGS, {})
    assert entry["status"] == status
    assert (values is not None) == (status == "ok")
    assert status == "ok" or entry["note"]


def test_what_a_smaller_size_took_tells_what_is_too_slow():
    variant = Variant(lambda: (torch.ones(1),), work=Work(operations=100.0))
    assert suite.first_run("x", variant, SETTINGS, {"x": (10.0, 1.0)})[0]["expected_seconds"] == 1000
    assert suite.first_run("x", variant, SETTINGS, {"x": (0.01, 1.0)})[0]["status"] == "ok"


def test_a_variant_that_disagrees_is_not_timed(quickest):
    x = torch.ones(3)
    variants = {
        "dlprop": Variant(forward(lambda: x), "ours"),
        "same": Variant(forward(lambda: x.clone())),
        "wrong": Variant(forward(lambda: x + 1)),
        "nan": Variant(forward(lambda: x * math.nan)),
        "other": Variant(forward(lambda: x + 1), "related"),
    }
    entries, samples = suite.measured(variants, SETTINGS, (1e-4, 1e-4))
    assert {name: e["status"] for name, e in entries.items()} == {
        "dlprop": "ok",
        "same": "ok",
        "wrong": "disagrees",
        "nan": "disagrees",
        "other": "ok",
    }
    assert set(samples) == {"dlprop", "same", "other"}
    assert "ratio" in entries["same"]


def test_rounds_are_interleaved():
    calls = []
    runs = {name: lambda name=name: calls.append(name) for name in "ab"}
    samples = measure.interleaved(runs, {"a": 2.0, "b": 2.0}, "cpu", measure.Effort(100.0, 3, 3, 1.0))
    assert calls == ["a", "b"] * 3
    assert [len(s) for s in samples.values()] == [3, 3]
    # A round longer than the whole effort: the first runs, which were in turn, are its first samples.
    calls.clear()
    samples = measure.interleaved(runs, {"a": 2.0, "b": 2.0}, "cpu", measure.Effort(1.0, 3, 3, 1.0))
    assert calls == ["a", "b"] * 2
    assert samples["a"][0] == 2.0
    assert len(samples["a"]) == 3


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_slope_of_a_power_law(power):
    pixels = [10, 100, 1000]
    assert measure.slope(pixels, [3 * m**power for m in pixels]) == pytest.approx(power)
    assert measure.slope([10], [1.0]) is None


def test_slopes_leave_out_what_did_not_run():
    ran = {"status": "ok", "seconds": {"median": 1.0}, "peak_mib": 2.0}
    twice = {"status": "ok", "seconds": {"median": 4.0}, "peak_mib": 4.0}
    points = [
        {"pixels": 10, "variants": {"dlprop": ran}},
        {"pixels": 20, "variants": {"dlprop": twice}},
        {"pixels": 40, "variants": {"dlprop": {"status": "out of memory"}}},
    ]
    assert growth.slopes_of(points, "dlprop") == {"time": pytest.approx(2), "memory": pytest.approx(1)}


def test_cliff_is_the_worst_neighbour():
    points = [{"pixels": m, "seconds": {"median": m**2 * (3.0 if m == 12 else 1.0)}} for m in range(10, 15)]
    assert growth.cliff(points) == {"cliff": pytest.approx(3), "cliff_pixels": 12}


def test_growth_and_ragged_sizes_at_tiny_sizes(monkeypatch, quickest):
    one = replace(GROWTH["growth_loss"], problem=tiny(Problem(1, 1)), edges=(4, 6, 9), quick_edges=(4, 6))
    monkeypatch.setitem(GROWTH, "growth_loss", one)
    monkeypatch.setattr(growth, "RAGGED_PIXELS", {"small": (11, 12, 13)})
    full = replace(SETTINGS, mode="full")
    found = growth.run("growth_loss", replace(SETTINGS, mode="quick"))
    assert [set(point["variants"]) for point in found["points"]] == [{"dlprop"}] * len(one.quick_edges)
    assert found["slopes"]["dlprop"]["time"] is not None
    assert [target["value"] for target in found["targets"]] == [None]  # memory was not measured
    ragged = growth.run_ragged(full)
    assert [point["pixels"] for point in ragged["series"][0]["points"]] == [11, 12, 13]
    assert ragged["series"][0]["cliff"] >= 1


@pytest.mark.parametrize(
    ("target", "value", "met"),
    [
        (Target("speedup", 2, "other"), 2.5, True),
        (Target("speedup", 3, "other"), 2.5, False),
        (Target("cost", 0.5, "other"), 0.4, True),
        (Target("cost", 0.3, "other"), 0.4, False),
        (Target("speedup", 2, "absent"), None, None),
        (Target("seconds", 3), 2.0, True),
        (Target("peak", 64), 60.0, True),
        (Target("copy", 1.3), 20.0, False),
        (Target("share", 0.75), 4e11 / (2 * 2048**3) / 2, True),
        (Target("cost", 0.5, "other", needs="bfloat16_matrix_units"), 0.4, None),
    ],
)
def test_targets_are_judged_by_ratios_within_rounds(target, value, met):
    samples = {"dlprop": [1.0, 2.0, 3.0], "other": [2.5, 5.0, 7.5], suite.PROBE: [0.5, 1.0, 1.5]}
    work = {"operations": 4e11, "bytes": 1e9}
    entry = {"seconds": {"median": 2.0}, "peak_mib": 76.0, "result_mib": 16.0, "roofline": work}
    judged = suite.judged(target, {"dlprop": entry}, samples, SETTINGS)
    assert judged["value"] == (None if value is None else pytest.approx(value))
    assert judged["met"] is met
    if met is None and value is not None:
        assert "does not apply" in table.figure(judged, {})


def test_errors_that_are_not_finite_are_told():
    assert accuracy.errors(torch.tensor([math.nan]), torch.ones(1))["status"] == "not finite"
    found = accuracy.errors(torch.tensor([3.0, 1.0]), torch.tensor([4.0, 1.0]))
    assert found == {"status": "ok", "max_error": 1.0, "relative_error": 0.25}


def test_accuracy_of_a_small_size(monkeypatch):
    monkeypatch.setattr(accuracy, "EDGES", {"quick": (4,)})
    entry = accuracy.run("cpu", "quick")
    rows = {(r["subject"], r["variant"], r["dtype"], r["result"]): r for r in entry["rows"]}
    assert rows["loss against labels", "dlprop", "float32", "value"]["relative_error"] < 1e-5
    assert rows["loss against a view", "autocast bfloat16", "float32", "gradient"]["status"] == "ok"
    assert {r["dtype"] for r in entry["rows"]} == {"float32", "bfloat16", "float16"}


# ---------------------------------------------------------------------------------------------------------------------
# The command, the files, the tables.


def test_one_case_from_the_command_line(monkeypatch, quickest, folders, capsys):
    target = Target("speedup", 1e-9, "dense autograd")
    monkeypatch.setitem(cli.CASES, "loss_41", tiny_case(targets=(target,)))
    assert cli.main(["loss_41", "--no-memory"]) == 0
    assert "| a tiny loss | at least 1e-09 times faster |" in capsys.readouterr().out
    kept = json.loads((folders / "partial" / "cpu.json").read_text())
    results.check(kept)
    assert list(kept["entries"]) == ["loss_41"]
    assert not (folders / "saved").exists()


def test_saving_keeps_the_cases_that_were_not_measured_again(monkeypatch, quickest, folders):
    monkeypatch.setitem(cli.CASES, "loss_41", tiny_case())
    monkeypatch.setitem(cli.CASES, "loss_81", tiny_case())
    assert cli.main(["loss_41", "--no-memory", "--save"]) == 0
    assert cli.main(["loss_81", "--no-memory", "--save"]) == 0
    saved = results.load("cpu", folders / "saved")
    assert list(saved["entries"]) == [name for name in CASES if name in ("loss_41", "loss_81")]
    with pytest.raises(ValueError, match="measure all cases again"):
        results.merged(saved | {"machine": saved["machine"] | {"threads": 99}}, saved)


def test_what_raises_costs_no_other_result_and_fails_the_run(monkeypatch, quickest, folders, capsys):
    def build(problem):
        raise ZeroDivisionError("oops")

    monkeypatch.setitem(cli.CASES, "loss_41", Case("broken", "loss", build, Problem(2, 2)))
    monkeypatch.setitem(cli.CASES, "loss_81", tiny_case())
    assert cli.main(["loss_41", "loss_81", "--no-memory"]) == 1
    kept = json.loads((folders / "partial" / "cpu.json").read_text())
    results.check(kept)
    assert kept["entries"]["loss_41"]["note"] == "ZeroDivisionError: oops"
    assert kept["entries"]["loss_81"]["variants"]["dlprop"]["status"] == "ok"
    assert "FAILED loss_41: ZeroDivisionError: oops" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["nonsense"], ["--threads", "0"], ["--device", "tpu"]])
def test_bad_arguments_are_told(arguments, capsys):
    with pytest.raises(SystemExit):
        cli.main(arguments)
    assert "error:" in capsys.readouterr().err


def test_help_lists_every_case(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    text = capsys.readouterr().out
    assert [name for name in (*CASES, *GROWTH, "ragged", "accuracy") if name not in text] == []


@pytest.mark.slow
@pytest.mark.skipif(not measure.RESET_PEAK.exists(), reason="reads the peak from /proc")
def test_peak_memory_in_a_fresh_process():
    problem = replace(tiny(Problem(1, 1)), height=40, width=40)
    found = {
        name: measure.in_fresh_process(
            suite.peak_of, builders.loss_consistency, problem, name, 1, "highest", timeout=120
        )
        for name in ("dlprop", "dense autograd")
    }
    matrix = 4 * problem.M**2 / 2**20
    assert found["dense autograd"]["peak_mib"] > 2 * matrix
    assert found["dense autograd"]["result_mib"] == pytest.approx(4 * (1 + problem.D * problem.M) / 2**20)
    with pytest.raises(RuntimeError, match="KeyError"):
        measure.in_fresh_process(suite.peak_of, builders.softmax, problem, "nonsense", 1, "highest", timeout=120)


def test_files_are_written_whole_or_not_at_all(tmp_path):
    good = {"device": "cpu", "value": math.nan}
    path = results.write(good, tmp_path)
    assert json.loads(path.read_text())["value"] is None
    with pytest.raises(TypeError):
        results.write({"device": "cpu", "value": object()}, tmp_path)
    assert json.loads(path.read_text())["device"] == "cpu"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("path", sorted(results.FOLDER.glob("c*.json")), ids=lambda path: path.stem)
def test_committed_results_follow_the_schema(path):
    found = json.loads(path.read_text(), parse_constant=lambda text: pytest.fail(f"{text} is not JSON"))
    results.check(found)
    with pytest.raises(jsonschema.ValidationError):
        results.check(found | {"entries": {"loss_81": {"title": "no figures"}}})
    assert set(found["entries"]) <= {*CASES, *GROWTH, "ragged", "accuracy"}
    assert cli.failures(found) == []


def test_tables_are_made_of_the_results():
    found = results.load("cpu")
    text = table.targets(found)
    judged = [target for entry in found["entries"].values() for target in entry.get("targets", ())]
    assert text.count("\n") == len(judged) + 1
    assert text.count("**missed**") == sum(target["met"] is False for target in judged)
    for make in (table.competitors, table.growth, table.accuracy, table.ragged):
        lines = make(found).splitlines()
        assert len({line.count("|") for line in lines}) == 1


def test_the_gpu_table_has_its_rows_and_no_figures():
    text = table.cuda(None)
    rows = [line.split("|") for line in text.splitlines()[2:]]
    assert len(rows) == sum(target.device == "cuda" for case in CASES.values() for target in case.targets)
    assert {row[3].strip() for row in rows} == {"not measured"}
    assert {row[4].strip() for row in rows} == {"not measured"}


def test_the_documentation_shows_this_version_and_only_what_is_generated():
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    folder = results.FOLDER.relative_to(ROOT).as_posix()
    assert set(re.findall(r"benchmarks/results/[^/]+", page)) == {folder}
    readme = (ROOT / "README.md").read_text()
    assert set(re.findall(r"benchmarks/results/[^/)]+", readme)) == {folder}


def test_plots_are_drawn_from_the_results(tmp_path):
    plots = pytest.importorskip("benchmarks.plots", reason="needs matplotlib")
    found = results.load("cpu")
    drawn = plots.draw_all(found, tmp_path)
    assert [path.name for path in drawn] == [f"cpu_{name}.svg" for name in ("time", "memory", "targets", "roofline")]
    assert plots.draw_all(found | {"entries": {}}, tmp_path) == []


def test_fewer_bits_cost_accuracy_most_where_views_are_close():
    x = torch.tensor([1 + 2.0**-7, 1 + 2.0**-8, 3.0, 0.0], dtype=torch.float64)
    assert rounding.rounded(x, 8).tolist() == [1 + 2.0**-7, 1.0, 3.0, 0.0]
    rows = {(title, order): errors for title, order, errors in rounding.rows(13)}
    for errors in rows.values():
        assert errors == sorted(errors, reverse=True)
    assert rows["the loss against labels", 0][1] < 1e-4
    close, far = (rows[f"the loss against a view {distance} apart", 0] for distance in ("1%", "100%"))
    assert close[1] > 10 * far[1] > 0.01
    assert rounding.table(5).count("\n") == 1 + len(rows)
    assert [rounding._percent(x) for x in (0.0004, 0.0123, 0.456)] == ["below 0.1 %", "1.2 %", "46 %"]


# ---------------------------------------------------------------------------------------------------------------------
# The GPU section where there is none: everything but the GPU is real.


class _OnTheCpu(TorchFunctionMode):
    """What asks for a CUDA device gets the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        args = ["cpu" if isinstance(x, str) and x == "cuda" else x for x in args]
        kwargs = {name: "cpu" if isinstance(x, str) and x == "cuda" else x for name, x in (kwargs or {}).items()}
        return func(*args, **kwargs)


class _Event:
    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.time = time.perf_counter()

    def elapsed_time(self, end):
        return 1e3 * (end.time - self.time)


@pytest.fixture
def pretended_gpu(monkeypatch, folders, quickest):
    """A GPU of which nothing is real but its name."""
    properties = SimpleNamespace(name="a pretended GPU", major=9, minor=0, total_memory=1 << 30)
    for name, value in {
        "is_available": lambda: True,
        "get_device_properties": lambda _: properties,
        "mem_get_info": lambda: (1 << 40, 1 << 40),
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda: None,
        "memory_allocated": lambda: 1 << 20,
        "max_memory_allocated": lambda: 3 << 20,
        "is_bf16_supported": lambda: True,
        "Event": _Event,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(cli.machine, "rates", lambda device: RATES | {"tf32": 2e11})
    monkeypatch.setattr(cli.machine, "MATRIX", {"cuda": 16})
    monkeypatch.setattr(measure, "in_fresh_process", lambda function, *arguments, timeout: function(*arguments))
    for name, case in CASES.items():
        monkeypatch.setitem(CASES, name, replace(case, problem=tiny(case.problem), extra=None))
    for name, one in GROWTH.items():
        monkeypatch.setitem(GROWTH, name, replace(one, cuda_edges=(3, 5)))
    monkeypatch.setattr(growth, "RAGGED_PIXELS", {"5": (24, 25)})
    monkeypatch.setattr(accuracy, "EDGES", {"full": (5,)})
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(suite.gc, "collect", lambda: None)  # slow among so many modules
    with _OnTheCpu():
        yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda':UserWarning")
def test_the_gpu_section_runs(pretended_gpu, capsys):
    assert cli.main(["--device", "cuda", "--full", "--save"]) == 1
    captured = capsys.readouterr()
    troubles = [line for line in captured.err.splitlines() if line.startswith("FAILED")]
    assert troubles
    # The Triton kernels alone need more than a pretended GPU.
    assert all("triton" in line and "backend='triton' cannot run here" in line for line in troubles)
    found = results.load("cuda")
    assert found["machine"]["gpu"]["name"] == "a pretended GPU"
    assert found["machine"]["float32_matmul_precision"] == "high"
    assert list(found["entries"]) == [name for name in cli.EVERYTHING if name in cli.names("cuda", "full")]
    assert found["entries"]["loss_129"]["variants"]["dlprop"]["peak_mib"] == 2
    assert all(t["value"] is not None for entry in found["entries"].values() for t in entry.get("targets", ()))
    text = table.cuda(found)
    assert "a pretended GPU" in text
    assert "TF32" in text
    assert "a pretended GPU" in captured.out
