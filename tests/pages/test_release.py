"""What a release uploads, and what a user is told to run."""

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

import dlprop

ROOT = Path(__file__).parents[2]
GITHUB = ROOT / ".github"
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = set(re.findall(r"^([a-z][a-z-]*):", MAKEFILE, flags=re.MULTILINE))
NEEDS_CHECKOUT = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs a git checkout to compare with")
NEEDS_GITHUB = pytest.mark.skipif(not GITHUB.exists(), reason="the archive of a release leaves .github out")

FOLDERS = ("src", "tests", "benchmarks", "examples", "docs")
FILES = {
    "CHANGELOG.md",
    "CITATION.cff",
    "CONTRIBUTING.md",
    "LICENSE",
    "Makefile",
    "README.md",
    "SECURITY.md",
    "pyproject.toml",
}


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """A folder with the archive of the sources and the wheel that was built from it."""
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    return folder


def archived(dist: Path) -> dict[str, bytes]:
    """The files of the archive of the sources, by their paths in the repository."""
    with tarfile.open(dist / f"dlprop-{dlprop.__version__}.tar.gz") as archive:
        members = {member.name: archive.extractfile(member) for member in archive if member.isfile()}
        return {name.split("/", 1)[1]: file.read() for name, file in members.items()}


@NEEDS_CHECKOUT
@pytest.mark.slow
def test_the_source_archive_holds_what_git_knows(dist):
    # Files that are not committed yet count, those that git ignores do not.
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    known = {name for name in names if (ROOT / name).exists() and (name in FILES or name.split("/")[0] in FOLDERS)}
    assert known >= FILES

    files = archived(dist)
    assert set(files) - {"PKG-INFO", ".gitignore"} == known
    assert [name for name in known if files[name] != (ROOT / name).read_bytes()] == []


@pytest.mark.slow
def test_the_wheel_holds_the_library_and_nothing_else(dist):
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
        metadata = archive.read(f"dlprop-{dlprop.__version__}.dist-info/METADATA").decode()
    assert wheel.name == f"dlprop-{dlprop.__version__}-py3-none-any.whl"
    package = {path for path in (ROOT / "src").rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    library = {name for name in names if not name.startswith(f"dlprop-{dlprop.__version__}.dist-info/")}
    assert library == {path.relative_to(ROOT / "src").as_posix() for path in package}
    assert f"dlprop-{dlprop.__version__}.dist-info/licenses/LICENSE" in names

    required = re.findall(r"^Requires-Dist: ([\w-]+)(?!.*extra ==)", metadata, flags=re.MULTILINE)
    assert sorted(required) == ["einops", "numpy", "torch"]


@pytest.mark.slow
def test_the_index_would_take_the_archives(dist):
    check = [sys.executable, "-m", "twine", "--no-color", "check", "--strict", *map(str, dist.iterdir())]
    done = subprocess.run(check, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("PASSED") == 2


def test_the_version_is_written_in_one_place():
    # And repeated, for readers of a static file, in CITATION.cff: test_project.py compares the two.
    literal = re.compile(rf"""version\w*\s*[=:]\s*["']?{re.escape(dlprop.__version__)}\b""", flags=re.IGNORECASE)
    paths = [ROOT / name for name in FILES] + [*(ROOT / "docs").glob("*.py"), *(ROOT / "src").rglob("*.py")]
    found = {path.relative_to(ROOT).as_posix() for path in paths if literal.search(path.read_text())}
    assert found == {"CITATION.cff", "src/dlprop/__init__.py"}


# ---------------------------------------------------------------------------------------------------------------------
# Makefile and tags.


def test_make_lists_its_targets():
    phony = set(re.search(r"^\.PHONY: (.*)$", MAKEFILE, flags=re.MULTILINE)[1].split())
    listed = set(re.findall(r'@echo "make ([a-z-]+)', MAKEFILE))
    assert phony == TARGETS == listed | {"help"}


@NEEDS_GITHUB
def test_workflows_and_pages_call_targets_that_exist():
    pages = [ROOT / name for name in FILES if name.endswith(".md")] + sorted((ROOT / "docs").glob("*.md"))
    texts = [path.read_text() for path in (*sorted((GITHUB / "workflows").glob("*.yml")), *pages)]
    called = {
        target for text in texts for target in re.findall(r"(?:`|run: |^)make ([a-z][a-z-]*)", text, re.MULTILINE)
    }
    assert called >= {"test", "docs", "release-check"}
    assert called - TARGETS == set()


@NEEDS_GITHUB
@pytest.mark.parametrize(("tag", "passes"), [("v{}", True), ("v{}.1", False), ("{}.dev0", False), ("v9.9.9", False)])
def test_a_release_needs_the_tag_of_its_version(tmp_path, tag, passes):
    jobs = yaml.safe_load((GITHUB / "workflows" / "release.yml").read_text())["jobs"]
    (step,) = (step for step in jobs["build"]["steps"] if step.get("name") == "The tag is the version")
    (tmp_path / "dist").mkdir()
    (tmp_path / "dist" / f"dlprop-{dlprop.__version__}.tar.gz").touch()
    environment = {**os.environ, "GITHUB_REF_NAME": tag.format(dlprop.__version__)}
    done = subprocess.run(["bash", "-e", "-c", step["run"]], cwd=tmp_path, env=environment)
    assert (done.returncode == 0) == passes


@NEEDS_GITHUB
def test_the_command_that_a_bug_report_asks_for_prints_the_versions():
    fields = yaml.safe_load((GITHUB / "ISSUE_TEMPLATE" / "bug_report.yml").read_text())["body"]
    versions = next(field for field in fields if field.get("id") == "versions")["attributes"]["description"]
    command = re.search(r'python -c "(.*)"', versions)[1]
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith(dlprop.__version__)
