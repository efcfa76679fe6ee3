"""The benchmarks: variants agree, figures carry what they are worth, and files are what one whole run generates.

Nothing here looks at how long something took.
"""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from benchmarks import __main__ as cli
from benchmarks import measure, results, runner, table
from benchmarks.cases import CASES, Target
from benchmarks.problem import OURS, PLAIN, Problem, Variant

FULL = runner.Settings("cpu", "full")


def tiny(case):
    grid = None if case.problem.grid is None else (3, 4)
    problem = replace(case.problem, height=7, width=5, n=min(case.problem.n, 2), D=8, C=3, grid=grid)
    return replace(case, problem=problem, edges=(4, 6)[: len(case.edges)], plain_edges=(4,)[: len(case.plain_edges)])


@pytest.fixture(autouse=True)
def quickly(monkeypatch, tmp_path):
    """One round, no memory, nothing compiled or collected, and nothing written outside a temporary folder."""
    monkeypatch.setattr(runner.gc, "collect", lambda: 0)
    monkeypatch.setattr(measure, "EFFORTS", dict.fromkeys(("quick", "full"), measure.Effort(1, 1, 0.0)))
    monkeypatch.setattr(measure, "TURN", 1e-9)
    monkeypatch.setattr(measure, "can_measure_memory", lambda device: False)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(cli.machine, "rates", lambda device: {"matrix": 1e11, "copy": 1e10})
    monkeypatch.setattr(results, "FOLDER", tmp_path / "results")
    marks = {}
    for page, names in table.MARKS.items():
        marks[tmp_path / page.name] = names
        lines = [form.format(name) for name in names for form in (table.BEGIN, table.END)]
        (tmp_path / page.name).write_text("\n".join(lines))
    monkeypatch.setattr(table, "MARKS", marks)


@pytest.fixture
def whole(monkeypatch):
    """All cases, at tiny sizes."""
    for name, case in CASES.items():
        monkeypatch.setitem(CASES, name, replace(tiny(case), error=None))
    sampled = dict.fromkeys((OURS,), Variant(kind="ours", sample=lambda: 0.03))
    monkeypatch.setitem(CASES, "import", replace(CASES["import"], build=lambda p: sampled))
    monkeypatch.setitem(CASES, "averager", replace(CASES["averager"], build=lambda p: sampled))


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("averager", "import")])
def test_the_variants_of_a_case_agree(name):
    case = tiny(CASES[name])
    entries, taken = runner.checked(replace(case, edges=()), case.problem, FULL)
    assert next(iter(entries)) == OURS
    assert set(taken) == set(entries)
    assert {t.of for t in case.targets} | {t.against for t in case.targets if t.against} <= set(entries)
    exact = case.build(replace(case.problem, dtype=torch.float64))
    for variant in exact.values():
        if variant.kind == "equivalent":
            assert max(runner.differences(variant.run(), exact[OURS].run())) < 1e-9


@pytest.mark.parametrize(("n", "left_out"), [(1, 0), (5, 0), (6, 0), (8, 0), (9, 1), (12, 2), (20, 5), (60, 21)])
def test_the_interval_holds_the_median_with_confidence(n, left_out):
    assert measure.interval([float(i) for i in range(n, 0, -1)]) == (1 + left_out, n - left_out)
    with_one_more = 2 * sum(math.comb(n, i) for i in range(left_out + 2)) / 2**n
    assert with_one_more > 0.05


def test_a_target_is_judged_by_the_whole_interval():
    spans = [(2, 3), (1, 3), (1, 1.9), (2.1, 3), (1, 2)]
    at_least, at_most = ([measure.verdict(*span, 2, at_least=side) for span in spans] for side in (True, False))
    assert at_least == ["met", "unclear", "missed", "met", "unclear"]
    assert at_most == ["unclear", "unclear", "met", "missed", "met"]


def test_rounds_go_on_until_the_ratio_stands_still_or_the_machine_is_too_noisy():
    def rounds(*others):
        calls = []
        seconds = iter(others)
        ours = Variant(sample=lambda: calls.append("a") or 1.0)
        other = Variant(sample=lambda: calls.append("b") or next(seconds))
        figure, effort = partial(runner.figure, Target("cost", 1, "a", of="b")), measure.Effort(3, 8, 1e9)
        found, spread = measure.rounds({("a", 1): ours, ("b", 1): other}, {}, [figure], "cpu", effort)
        return "".join(calls), len(found), spread

    assert rounds(2.0, 2.0, 2.0) == ("abbaab", 3, 0.0)
    assert rounds(2.0, 1.0, 3.0, 2.0, 2.0)[1:] == (5, 0.0)
    _, n, spread = rounds(*(1.0 + i for i in range(8)))
    assert (n, spread > measure.STEADY) == (8, True)
    assert "8, machine too noisy: spread" in table.rounds({"rounds": n, "spread": spread, "is_noisy": True})


def test_growth_is_repeated_until_its_slopes_stand_still(monkeypatch):
    watched = []

    def spy(runs, taken, figures, *rest):
        found = rounds(runs, taken, figures, *rest)
        watched.extend([figure(found[0][0]) for figure in figures])
        return found

    rounds = measure.rounds
    monkeypatch.setattr(measure, "rounds", spy)
    monkeypatch.setitem(CASES, "growth_loss", replace(tiny(CASES["growth_loss"]), edges=(4, 6), plain_edges=(4, 6)))
    slopes = runner.run("growth_loss", FULL)["slopes"]
    assert watched == [slopes[variant]["time slope"]["median"] for variant in (OURS, PLAIN)]


def test_the_measured_side_of_a_target():
    one = {(OURS, 10): 2.0, ("other", 10): 6.0, (OURS, 100): 200.0}
    wanted = {"speedup": 3.0, "share": 3.0, "cost": 1 / 3, "time slope": 2.0}
    assert {m: runner.figure(Target(m, 1, "other"), one) for m in wanted} == pytest.approx(wanted)
    assert runner.figure(Target("seconds", 1), one) == 2.0


def test_one_case_from_the_command_line(whole, capsys):
    assert cli.main(["loss_view_41"]) == 0
    assert "| loss against a view, N = 4, 41 x 41 | at least 3 times faster than plain" in capsys.readouterr().out
    assert not results.FOLDER.exists()


@pytest.mark.slow
def test_a_whole_run_is_published_and_a_failed_check_saves_nothing(whole, monkeypatch, capsys):
    assert cli.main(["--table"]) == 1  # there are no results
    case, (readme, page, _) = CASES["loss_labels_81"], table.MARKS

    def wrong(problem):
        variants = case.build(problem)
        run = variants[PLAIN].run
        return variants | {PLAIN: replace(variants[PLAIN], run=lambda: tuple(1.01 * x for x in run()))}

    with monkeypatch.context() as patch:
        patch.setitem(CASES, "loss_labels_81", replace(case, build=wrong))
        patch.setattr(cli, "EVERYTHING", ("propagation_41", "loss_labels_81"))
        assert cli.main(["--full", "--save"]) == 1
    assert "FAILED loss against labels" in capsys.readouterr().err
    assert not results.FOLDER.exists()
    assert cli.main(["--full", "--save"]) == 0
    assert [path.name for path in results.FOLDER.iterdir()] == ["cpu.json", "cpu_time.svg"]
    found = results.load("cpu", results.FOLDER)
    assert "discriminant propagation, 1024 x 2048" in readme.read_text()
    assert "**missed**" in page.read_text()
    assert cli.main(["--table"]) == 0
    before = results.FOLDER.joinpath("cpu.json").read_text()
    with pytest.raises(ValueError, match="cases must be"):
        cli.publish(found | {"cases": {}})
    page.write_text("no marks")
    with pytest.raises(ValueError, match=r"benchmarks\.md must have the mark"):
        cli.main(["--full", "--save"])
    assert results.FOLDER.joinpath("cpu.json").read_text() == before


def test_tables_say_what_was_measured():
    ratio = {"median": 520.4, "low": 510.0, "high": 531.0}
    target = ratio | {"measure": "speedup", "of": OURS, "against": PLAIN, "bound": 500, "verdict": "met"}
    ours = {"kind": "ours", "seconds": {"median": 0.0095}, "peak_mib": 11.0}
    plain = {"kind": "equivalent", "seconds": {"median": 4.78}, "peak_mib": 3208.0, "ratio": ratio}
    points = [{"pixels": 16641, "variants": {OURS: ours, PLAIN: plain, "large": {"kind": "bound", "needs_gib": 48.0}}}]
    entry = {"title": "Eq. 4", "rounds": 9, "spread": 0.01, "is_noisy": False, "targets": [target], "points": points}
    found = {"cases": {"propagation_129": entry}}
    assert "| 520 times faster than plain PyTorch | 9.5 ms instead of 4.78 s | 11 MiB instead of 3,208 MiB |" in (
        table.short(found).replace(table.NBSP, " ")
    )
    assert "| at least 500 times faster than plain PyTorch | 520 (510 to 531) | met | 9 |" in table.targets(found)
    assert "large (a bound) | needs 48 GiB |" in table.variants(found).replace(table.NBSP, " ")
    points[0]["variants"][PLAIN] = {"kind": "related", "needs_gib": 49152.0}
    assert "| 9.5 ms | 11 MiB instead of 49,152 GiB |" in table.short(found).replace(table.NBSP, " ")
    points[0]["variants"]["its products"] = {"kind": "bound", "seconds": {"median": 0.008}, "ratio": ratio}
    points[0]["variants"]["a matrix"] = {"kind": "related", "seconds": {"median": 3.0}, "peak_mib": 3000.0}
    for against, beside in (("its products", "; plain PyTorch 49,152 GiB"), ("a matrix", " instead of 3,000 MiB")):
        entry["targets"] = [target | {"against": against}]
        assert f"| 11 MiB{beside} |" in table.short(found).replace(table.NBSP, " ")
    says = [table.in_words(target | {"measure": "cost", "median": cost}) for cost in (1.04, 0.93, 1.6)]
    assert says == [f"{how} plain PyTorch" for how in ("as fast as", "93% of the time of", "1.6 times the time of")]
    assert table.in_words(target | {"median": 0.5}) == "2 times the time of plain PyTorch"
    assert sum(case.readme is not None for case in CASES.values()) <= 6


@pytest.mark.parametrize("arguments", ["nonsense", "--threads 0", "--device tpu", "--save", "--full --save import"])
def test_bad_arguments_are_told(arguments, capsys):
    with pytest.raises(SystemExit):
        cli.main(arguments.split())
    assert "error:" in capsys.readouterr().err


def test_help_lists_every_case(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert not {*CASES, "accuracy"} - set(capsys.readouterr().out.split())


@pytest.mark.slow
@pytest.mark.skipif(not measure.RESET_PEAK.exists(), reason="reads the peak from /proc")
def test_peak_memory_in_a_fresh_process():
    problem = Problem(40, 40, D=8)
    found = {v: measure.in_fresh_process(runner.peak_of, "loss_view_81", problem, v) for v in (OURS, PLAIN)}
    matrix = problem.matrix_bytes / 2**20
    assert found[PLAIN]["peak_mib"] > 2 * matrix > found[OURS]["peak_mib"]
    assert found[PLAIN]["result_mib"] == pytest.approx(4 * (1 + problem.D * problem.pixels) / 2**20)
