"""The documentation: its snippets run, its gallery runs, and what it names exists."""

import re
import runpy
from pathlib import Path

import pytest

import dlprop
from dlprop import affinity, statistics, theory

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if not {"_build", "auto_gallery"} & set(path.parts))
SCRIPTS = sorted((DOCS / "gallery").glob("plot_*.py"))


def snippets(page):
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)


# The recipes are run in test_recipes.py.
@pytest.mark.parametrize(
    "page", [page for page in PAGES if snippets(page) and page.parent.name != "recipes"], ids=lambda page: page.stem
)
def test_the_snippets_of_a_page_run_one_after_the_other(page):
    namespace = {}
    for number, snippet in enumerate(snippets(page), start=1):
        exec(compile(snippet, f"{page.name}, snippet {number}", "exec"), namespace)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # between torch and numpy
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_the_gallery_runs(script, monkeypatch):
    plt = pytest.importorskip("matplotlib.pyplot", reason="the gallery needs matplotlib, of the extra example or docs")
    plt.switch_backend("agg")
    drawn = []

    def show():
        drawn.extend(plt.get_fignums())
        plt.close("all")

    monkeypatch.setattr(plt, "show", show)
    runpy.run_path(str(script))
    assert drawn


def test_every_public_name_has_its_page():
    pages = {path.stem for path in (DOCS / "api").glob("*.md")}
    assert pages == {*dlprop.__all__, *affinity.__all__, *statistics.__all__, "theory"}
    documented = (DOCS / "api" / "theory.md").read_text()
    assert [name for name in theory.__all__ if name not in documented] == []


def test_the_tests_that_the_theory_page_names_exist():
    page = (DOCS / "theory.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(test_\w+)`", page))
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    assert named - set(re.findall(r"^def (test_\w+)", tests, flags=re.MULTILINE)) == set()
    files = (ROOT / "tests" / f"test_{name}.py" for name in ("theory_statements", "closed_form_theory"))
    statements = "".join(path.read_text(encoding="utf-8") for path in files)
    assert set(re.findall(r"^def (test_\w+)", statements, flags=re.MULTILINE)) - named == set(), "not on the page"


def test_links_and_pictures_exist():
    missing = []
    for page in (*PAGES, ROOT / "README.md", *sorted((ROOT / "examples" / "derprop_voc").rglob("README.md"))):
        text = re.sub(r"```python\n.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        targets = re.findall(r"\]\(([^)#\s]+)(?:#\S*)?\)", text) + re.findall(r"<(\.\./[^>]+)>", text)
        for target in targets:
            if target.startswith("http"):
                continue
            made = re.fullmatch(r"auto_gallery/(?:images/sphx_glr_)?(plot_\w+?)(?:_\d{3}\.png|\.rst)", target)
            source = DOCS / "gallery" / f"{made[1]}.py" if made else page.parent / target
            if not source.exists():
                missing.append((page.name, target))
    assert missing == []


# Pages with scores of the training example, each a mean and its spread.
SCORED = ["README.md", "examples/derprop_voc/README.md", "examples/derprop_voc/results/README.md"]
SCORED += [f"docs/recipes/{name}.md" for name in ("clicks", "edges", "frames", "new_camera")]


def scores(*files):
    """Pairs of figures, with the last digit's place of the first."""
    text = "".join(file.read_text(encoding="utf-8") for file in files)
    found = re.findall(r"(\d+\.(\d+)) ± (\d+\.\d+)", text)
    return {(float(mean), float(spread), 10.0 ** -len(digits)) for mean, digits, spread in found}


@pytest.mark.parametrize("page", SCORED)
def test_the_scores_of_a_page_are_among_the_results(page):
    """Up to the digits that the page leaves out; their signs may stand in words."""
    results = ROOT / "examples" / "derprop_voc" / "results"
    written = scores(*(file for suffix in ("md", "txt") for file in results.glob(f"*/*.{suffix}")))
    nowhere = [
        (mean, spread)
        for mean, spread, place in scores(ROOT / page)
        if not any(max(abs(mean - x), abs(spread - y)) <= 0.5001 * place for x, y, _ in written)
    ]
    assert nowhere == []
