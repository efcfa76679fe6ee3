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
from dlprop.affinity import Discriminant, Linear, Ridge, Softmax
from dlprop.statistics import ClassStatistics
from tests.tolerances import assert_close

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "docs" / "recipes"
BLOCK = re.compile(r"^```python\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)

# Third-party imports and ONNX take seconds, the arithmetic takes none.
QUICK = {"clicks", "correlation_head", "edges", "frames", "mmsegmentation", "new_camera", "semi_supervised"}
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


def test_the_semi_supervised_loop_trains_the_network():
    recipe = run("semi_supervised")
    network, images = recipe["network"], torch.rand(2, 3, 32, 32)
    before = {name: parameter.clone() for name, parameter in network.named_parameters()}
    loss = recipe["train_step"](images, torch.randint(0, 5, (2, 32, 32)), images, 1 - images, 5, 10, threshold=0.2)
    assert loss.isfinite()
    assert [name for name, parameter in network.named_parameters() if torch.equal(parameter, before[name])] == []

    # The propagated logits are detached: their loss reaches the features and not the classifier.
    logits, feats = network(images)
    loss = recipe["propagate"](logits.detach(), feats).square().mean() + recipe["pair_loss"](feats, feats.detach() / 2)
    weights = [network.head.weight, network.backbone[0].weight]
    head, backbone = torch.autograd.grad(loss, weights, allow_unused=True)
    assert head is None
    assert backbone.abs().sum() > 0


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


# Of each page the blocks that one adds to code with a model, and the layer that reads the features.
IN_OTHER_CODE = {
    "torchvision": (slice(1, 2), lambda recipe: recipe["model"].classifier[-1]),
    "segmentation_models_pytorch": (slice(1, 2), lambda recipe: recipe["model"].segmentation_head[0]),
    "transformers": (slice(1, 2), lambda recipe: recipe["model"].decode_head.classifier),
    "mmsegmentation": (slice(0, 2), lambda recipe: recipe["segmentor"].decode_head.conv_seg),
    "patch_features": (slice(2, 3), None),
}


@pytest.mark.parametrize("page", IN_OTHER_CODE)
def test_what_is_added_to_other_code_has_under_twenty_lines(page):
    added = "".join(blocks(page)[IN_OTHER_CODE[page][0]]).split("\nassert ")[0].splitlines()
    lines = [line for line in added if line.strip() and not line.startswith(("import ", "from "))]
    assert 0 < len(lines) < 20


@pytest.mark.slow
@pytest.mark.parametrize("page", ["torchvision", "segmentation_models_pytorch", "transformers"])
def test_the_features_are_what_the_classifier_reads(page):
    recipe = run(page)
    images, calls = torch.rand(1, 3, 64, 64), []
    layer = IN_OTHER_CODE[page][1](recipe)
    handle = layer.register_forward_hook(lambda module, inputs, output: calls.append((inputs[0], output)))
    recipe["model"].eval()
    with torch.no_grad():
        recipe["model"](images)
        handle.remove()
        ((read, given),) = calls
        assert recipe["feats"]["V"] is read
        torch.testing.assert_close(layer(read), given)


@pytest.mark.slow
def test_the_grids_of_a_model_meet_as_its_page_says():
    """`align_corners` of a page is that of the model: an upsampled ramp stays one only as the model does it."""
    ramp = torch.arange(4.0).expand(1, 5, 4, 4)
    head = run("segmentation_models_pytorch")["model"].segmentation_head
    expected = torch.nn.functional.interpolate(ramp, scale_factor=4, mode="bilinear", align_corners=True)
    torch.testing.assert_close(head[1](ramp), expected)

    recipe, taken = run("torchvision"), []
    handle = recipe["model"].classifier.register_forward_hook(lambda module, inputs, output: taken.append(output))
    with torch.no_grad():
        logits = recipe["model"](torch.rand(1, 3, 65, 65))["out"]
    handle.remove()
    assert recipe["propagate"].align_corners is False
    expected = torch.nn.functional.interpolate(taken[0], (65, 65), mode="bilinear", align_corners=False)
    torch.testing.assert_close(logits, expected)


@pytest.mark.slow
@pytest.mark.parametrize("confident", [0.0, 1.1])
def test_confident_pseudo_labels_train_the_network(confident, monkeypatch):
    recipe = run("segmentation_models_pytorch")
    monkeypatch.setitem(recipe, "confident", confident)
    images, labels, model = torch.rand(2, 3, 64, 64), torch.zeros(2, 64, 64, dtype=torch.long), recipe["model"].eval()
    supervised = torch.nn.functional.cross_entropy(model(images), labels)
    of_unlabelled = recipe["training_loss"](images, labels, images, 1 - images, 1.0) - supervised
    (grad,) = torch.autograd.grad(of_unlabelled, model.encoder.conv1.weight)
    assert (grad.abs().sum() > 1e-3) == (confident < 1)


@pytest.mark.slow
def test_clicks_correct_the_maps_of_a_transformer_as_they_are():
    recipe, complete = run("transformers"), run("clicks")["complete"]
    labels = torch.full((16, 16), 255)
    labels[2, 3], labels[12, 9] = 4, 0
    with torch.no_grad():
        logits = recipe["model"](pixel_values=torch.rand(1, 3, 64, 64)).logits
        corrected = complete(logits, recipe["feats"]["V"], labels)
    assert corrected[0, :, 2, 3].argmax() == 4
    assert corrected[0, :, 12, 9].argmax() == 0


def test_padding_does_not_change_what_is_inside():
    refine = run("mmsegmentation")["refine"]
    logits, feats = torch.randn(2, 5, 24, 32), torch.randn(2, 8, 24, 32)
    inside = torch.zeros(2, 24, 32, dtype=torch.bool)
    inside[:, :20, :28] = True
    cropped = refine(logits[:, :, :20, :28], feats[:, :, :20, :28])
    torch.testing.assert_close(refine(logits, feats, inside=inside)[:, :, :20, :28], cropped, rtol=1e-4, atol=1e-4)


def test_what_a_frame_receives_are_probabilities():
    recipe = run("frames")
    for probabilities in recipe["carry"](recipe["frames"], recipe["truth"][0], num_classes=2):
        torch.testing.assert_close(probabilities.sum(1), torch.ones_like(probabilities[:, 0]))
        assert (probabilities >= 0).all()


def test_a_batch_of_a_new_camera_is_judged_by_its_statistics():
    """`across="batch"` counts every image once; statistics of the folder and an image of it count that image twice."""
    recipe = run("new_camera")
    images = recipe["folder"][0]
    with torch.no_grad():
        feats = recipe["backbone"](images)
        logits = recipe["head"](feats)
        others = ClassStatistics(num_classes=5, channels=32)
        others.update(logits[1:], feats[1:])
        alone = DerivativeLabelPropagation(Discriminant(statistics=others))(logits[:1], feats[:1])
        together = DerivativeLabelPropagation(Discriminant(across="batch"))(logits, feats)
    assert_close(together[:1], alone.double(), "propagation")


def test_the_statistics_of_a_new_camera_hold_every_pixel_of_the_folder():
    recipe = run("new_camera")
    pixels = sum(recipe["backbone"](images)[:, 0].numel() for images in recipe["folder"])
    torch.testing.assert_close(recipe["statistics"].counts.sum().item(), float(pixels), rtol=1e-6, atol=0)


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
        pytest.param(Linear(), "feats", marks=pytest.mark.exhaustive),  # the page itself runs it
        pytest.param(Linear(scale="degree"), "feats", marks=pytest.mark.exhaustive),
        pytest.param(Linear(similarity="cosine"), "feats", marks=pytest.mark.exhaustive),
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
@pytest.mark.exhaustive
@pytest.mark.parametrize("affinity", [Ridge(), Softmax(), Discriminant()], ids=lambda affinity: type(affinity).__name__)
def test_other_affinities_do_not_go_to_onnx(affinity):
    _, program = export_propagation(affinity)
    with pytest.raises(torch.onnx.OnnxExporterError):
        torch.onnx.export(program, dynamo=True, verbose=False)
