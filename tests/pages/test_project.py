"""What a user installs and reads: the wheel, the README's snippet and table, the version."""

import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import dlprop
from benchmarks import results, table

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def readme_snippets() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_there_is_one_version():
    assert dlprop.__version__ == version("dlprop")
    assert f"version: {dlprop.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_the_tables_are_those_of_the_results():
    found = results.load("cpu")
    if found is None:
        pytest.skip(f"there are no results of {dlprop.__version__} yet")
    results.check(found)
    for page, expected in table.pages(found).items():
        assert page.read_text(encoding="utf-8") == expected, "refresh the tables with `python -m benchmarks --table`"
    for page in (ROOT / "README.md", ROOT / "docs" / "benchmarks.md"):
        assert set(re.findall(r"benchmarks/results/([^/)]+)", page.read_text())) <= {dlprop.__version__}


@pytest.mark.slow
def test_the_wheel_away_from_the_source_tree_runs_the_readme(tmp_path):
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", str(site), str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    assert (site / "dlprop" / "py.typed").exists()

    first, correction, second = readme_snippets()
    images = "torch.rand(2, 3, 65, 65)"
    step = f"training_loss({images}, torch.randint(0, 21, (2, 65, 65)), {images}, {images}, 0.5).backward()"
    script = tmp_path / "snippet.py"
    told = "print({0}.shape, {0}[0, 60, 122], {0}[0, 30, 40], {0}[0, 150, 300])"
    first, correction = (first + told.format("dense"), correction + told.format("logits.argmax(1)"))
    seed = "import torch\ntorch.manual_seed(0)"
    script.write_text("\n".join((seed, first, correction, second, step, "import dlprop", "print(dlprop.__file__)", "")))
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *_, shapes, corrected, origin = done.stdout.splitlines()
    assert shapes == corrected == "torch.Size([1, 256, 384]) tensor(0) tensor(2) tensor(3)"
    assert Path(origin).is_relative_to(site)
