"""The pages of docs/recipes: every Python block runs as it is printed, and does what its page says."""

import difflib
import re
import sys
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.export import Dim, export

from dlprop import DerivativeLabelPropagation
from dlprop.affinity import Linear, Softmax
from tests.tolerances import assert_close

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "docs" / "recipes"
BLOCK = re.compile(r"^```python\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)

# Third-party imports and ONNX take seconds, the arithmetic takes none.
QUICK = {"clicks", "correlation_head", "edges", "frames", "new_camera", "semi_supervised"}
PAGES = sorted(path.stem for path in RECIPES.glob("*.md") if path.stem != "index")
MARKED = [pytest.param(page, marks=[] if page in QUICK else pytest.mark.slow) for page in PAGES]


def text(page: str) -> str:
    return (RECIPES / f"{page}.md").read_text()


def blocks(page: str) -> list[str]:
    return BLOCK.findall(text(page))


@cache
def run(page: str) -> dict[str, Any]:
    """Run the blocks of a page in order in one namespace, which is returned; a traceback shows the page's lines."""
    namespace: dict[str, Any] = {"__name__": f"recipe_{page}"}
    for block in BLOCK.finditer(text(page)):
        lines_before = text(page)[: block.start(1)].count("\n")
        exec(compile("\n" * lines_before + block[1], str(RECIPES / f"{page}.md"), "exec"), namespace)
    return namespace


@pytest.mark.parametrize("page", MARKED)
def test_the_page_runs(page):
    assert re.search(r"^(assert|torch\.testing\.assert_close)\b", "\n".join(blocks(page)), flags=re.MULTILINE)
    run(page)


def test_the_index_lists_every_page():
    toctree = re.search(r"```{toctree}\n.*?\n\n(.*?)\n```", text("index"), flags=re.DOTALL)
    assert sorted(toctree[1].split()) == PAGES
    assert sorted(re.findall(r"^\|.*\]\((\w+)\.md\) \|$", text("index"), flags=re.MULTILINE)) == PAGES


@pytest.mark.parametrize("page", ["index", *PAGES])
def test_links_of_the_page_exist(page):
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text(page)) if not link.startswith("http")]
    assert [link for link in links if not (RECIPES / link).exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_the_extra_installs_what_the_page_imports(page):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = [*project["dependencies"], *project["optional-dependencies"]["recipes"]]
    installed = {re.split(r"[^\w-]", requirement)[0].replace("-", "_") for requirement in required}
    imported = set(re.findall(r"^(?:import|from) (\w+)", "\n".join(blocks(page)), flags=re.MULTILINE))
    assert imported - installed - {"dlprop"} - set(sys.stdlib_module_names) == set()


# ---------------------------------------------------------------------------------------------------------------------
# What single pages claim.


def test_the_semi_supervised_loop_takes_under_fifteen_lines():
    before, after, *_ = (block.splitlines()[1:] for block in blocks("semi_supervised"))
    added = [line[2:] for line in difflib.ndiff(before, after) if line.startswith("+ ")]
    assert 0 < len(added) < 15
    assert [line for line in after if line.endswith("  # +")] == added


def test_the_semi_supervised_loop_trains_the_projection():
    recipe = run("semi_supervised")
    network, images = recipe["network"], torch.rand(2, 3, 32, 32)
    before = {name: parameter.clone() for name, parameter in network.named_parameters()}
    loss = recipe["train_step"](images, torch.randint(0, 5, (2, 32, 32)), images, 1 - images, 5, 10, threshold=0.2)
    assert loss.isfinite()
    assert [name for name, parameter in network.named_parameters() if torch.equal(parameter, before[name])] == []

    # The propagated logits are detached: their loss reaches the features and not the classifier.
    logits, feats = network(images)
    loss = recipe["propagate"](logits.detach(), feats).square().mean() + recipe["pair_loss"](feats, feats.detach() / 2)
    head, projection = torch.autograd.grad(loss, [network.head.weight, network.projection.weight], allow_unused=True)
    assert head is None
    assert projection.abs().sum() > 0


def literal_correlation_head(head, maps, logits, max_order):
    """`L softmax(S, -1)`, `S_ij = sum_q (A_q f1_i) . (A_q f2_j) / sqrt(C - q)`, entry by entry."""
    maps, logits = maps.flatten(2).numpy(), logits.flatten(2).numpy()
    f1, f2 = (
        np.einsum("cd,ndm->ncm", p.weight[:, :, 0, 0].numpy(), maps) + p.bias.numpy()[:, None]
        for p in (head.project1, head.project2)
    )
    C, M = f1.shape[1:]
    out = np.zeros_like(logits)
    for n in range(len(maps)):
        for i in range(M):
            row = np.zeros(M)
            for j in range(M):
                row[j] = sum(f1[n, c, i] * f2[n, c, j] for c in range(C)) / np.sqrt(C)
                if max_order == 1:
                    derivative = sum(
                        (f1[n, c + 1, i] - f1[n, c, i]) * (f2[n, c + 1, j] - f2[n, c, j]) for c in range(C - 1)
                    )
                    row[j] += derivative / np.sqrt(C - 1)
            share = np.exp(row - row.max())
            out[n] += np.outer(logits[n, :, i], share / share.sum())
    return out


@pytest.mark.parametrize("max_order", [0, 1])
def test_the_correlation_head_is_its_literal_formula(max_order):
    head = run("correlation_head")["PropagationHead"](12, 6, max_order=max_order).double()
    maps, logits = torch.randn(2, 12, 5, 4, dtype=torch.float64), torch.randn(2, 3, 5, 4, dtype=torch.float64)
    with torch.no_grad():
        expected = literal_correlation_head(head, maps, logits, max_order)
        assert_close(head(maps, logits).flatten(2), expected, "propagation")


def test_the_correlation_head_trains_both_projections():
    head = run("correlation_head")["PropagationHead"](12, 6, max_order=1)
    logits = torch.randn(2, 3, 5, 4, requires_grad=True)
    head(torch.randn(2, 12, 5, 4), logits).square().sum().backward()
    for tensor in (logits, head.project1.weight, head.project2.weight):
        assert tensor.grad.abs().sum() > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "weight"),
    [
        ("segmentation_models_pytorch", lambda recipe: recipe["projection"].weight),
        ("transformers", lambda recipe: recipe["model"].decode_head.linear_fuse.weight),
    ],
)
def test_the_pair_loss_of_a_model_reaches_its_features(page, weight):
    recipe = run(page)
    recipe["model"](recipe["images"])
    loss = recipe["pair_loss"](recipe["feats"]["V"], recipe["labels"])
    assert torch.autograd.grad(loss, weight(recipe))[0].abs().sum() > 0


def test_what_a_frame_receives_are_probabilities():
    recipe = run("frames")
    for probabilities in recipe["carry"](recipe["frames"], recipe["truth"][0], num_classes=2):
        torch.testing.assert_close(probabilities.sum(1), torch.ones_like(probabilities[:, 0]))
        assert (probabilities >= 0).all()


def test_the_statistics_of_a_new_camera_hold_the_confident_pixels():
    recipe = run("new_camera")
    with torch.no_grad():
        logits = recipe["head"](recipe["backbone"](torch.cat(recipe["folder"])))
    confident = (logits.softmax(1).amax(1) > 0.2).sum()
    torch.testing.assert_close(recipe["statistics"].counts.sum(), confident.double(), rtol=1e-6, atol=0)


def export_propagation(affinity, resolution="feats"):
    """The Module and its exported program, with every size free."""
    propagate = DerivativeLabelPropagation(affinity, resolution=resolution).eval()
    N, H, W, h, w = (Dim(name, min=2, max=1024) for name in "NHWhw")
    shapes = {"logits": {0: N, 2: H, 3: W}, "feats": {0: N, 2: h, 3: w}}
    example = (torch.randn(2, 5, 24, 26), torch.rand(2, 16, 12, 13))
    return propagate, export(propagate, example, dynamic_shapes=shapes)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("affinity", "resolution"),
    [
        (Linear(), "feats"),
        (Linear(scale="degree"), "feats"),
        (Linear(similarity="cosine"), "feats"),
        (Linear(), "logits"),
    ],
    ids=["Eq. 4", "degree", "cosine", "logits"],
)
def test_every_linear_propagation_goes_to_onnx(affinity, resolution):
    import onnxruntime  # in the recipes only

    propagate, program = export_propagation(affinity, resolution)
    onnx = torch.onnx.export(program, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(onnx.model_proto.SerializeToString())
    logits, feats = torch.randn(3, 5, 40, 31), torch.rand(3, 16, 21, 17)
    (actual,) = session.run(None, {"logits": logits.numpy(), "feats": feats.numpy()})
    assert_close(torch.from_numpy(actual), propagate(logits, feats).double(), "propagation")


@pytest.mark.slow
def test_the_softmax_affinity_does_not_go_to_onnx():
    _, program = export_propagation(Softmax())
    with pytest.raises(torch.onnx.OnnxExporterError):
        torch.onnx.export(program, dynamo=True, verbose=False)
