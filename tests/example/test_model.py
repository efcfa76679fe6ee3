"""The example's network: sizes, weights from files, and what trains."""

import pytest
import safetensors.torch
import timm
import torch
from torch import nn
from torchvision import models

from examples.derprop_voc.config import make_config
from examples.derprop_voc.errors import ConfigError
from examples.derprop_voc.model import SegmentationNetwork

TIMM = {"backbone": "timm/resnet10t", "timm_stages": [1, 3], "decoder_channels": 8, "feature_channels": 8}


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def network(**options):
    return SegmentationNetwork(make_config(TIMM | options), 3)


def test_resnet101_has_the_size_that_the_paper_says():
    model = SegmentationNetwork(make_config({}), 21)
    without_j = count(model) - count(model.projection)
    assert round(without_j / 1e6, 1) == 59.3
    # The paper says 59.5: with a stem of three 3 x 3 convolutions (64, 64, 128 channels) instead of one 7 x 7.
    stem = sum(9 * a * b + 2 * b for a, b in ((3, 64), (64, 64), (64, 128))) - (49 * 3 * 64 + 2 * 64)
    wider_first_block = 64 * (128 - 64) + 256 * (128 - 64)
    assert round((without_j + stem + wider_first_block) / 1e6, 1) == 59.5


@pytest.mark.parametrize(("stride", "grid"), [(8, 9), (16, 5)])
def test_output_stride_of_the_dilated_resnet(stride, grid):
    model = SegmentationNetwork(make_config({"backbone": "resnet50", "output_stride": stride}), 4).eval()
    with torch.no_grad():
        output = model(torch.rand(1, 3, 65, 65))
    assert output.logits.shape == (1, 4, 65, 65)
    assert output.feats.shape == (1, 256, grid, grid)


@pytest.mark.parametrize("stride", [8, 16])
def test_output_stride_of_a_timm_backbone(stride):
    model = network(timm_stages=[1, 4], output_stride=stride).eval()
    output = model(torch.rand(1, 3, 64, 64))
    assert output.feats.shape == (1, 8, 64 // stride, 64 // stride)


def test_images_are_normalised_as_the_backbone_expects():
    model = network().eval()
    seen = []
    model.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(torch.full((1, 3, 32, 32), 0.5))
    settings = timm.get_pretrained_cfg("resnet10t")
    expected = (0.5 - torch.tensor(settings.mean)) / torch.tensor(settings.std)
    torch.testing.assert_close(seen[0][0, :, 0, 0], expected)


def test_logits_do_not_depend_on_the_projection():
    model = network().eval()
    x = torch.rand(1, 3, 32, 32)
    before = model(x)
    with torch.no_grad():
        for parameter in model.projection.parameters():
            parameter.add_(1)
    after = model(x)
    assert torch.equal(before.logits, after.logits)
    assert not torch.equal(before.feats, after.feats)


@pytest.mark.parametrize(
    ("options", "trained"),
    [
        ({"variant": "supervised"}, False),
        ({"variant": "no_propagation"}, False),
        ({"variant": "no_derivative_loss", "weight_propagated": 0}, False),
        ({"variant": "no_derivative_loss"}, True),
        ({"variant": "full", "weight_propagated": 0}, True),
    ],
)
def test_the_projection_is_frozen_where_nothing_trains_it(options, trained):
    model = network(**options)
    assert all(parameter.requires_grad == trained for parameter in model.projection.parameters())
    grouped = {id(parameter) for group in model.parameter_groups(0.1, 10) for parameter in group["params"]}
    assert grouped == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert [group["lr"] for group in model.parameter_groups(0.1, 10)] == [0.1, 1.0]


def test_features_of_the_decoder_are_what_the_classifier_reads():
    model = network(propagation_features="decoder", decoder_channels=12).eval()
    assert model.projection is None
    output = model(torch.rand(1, 3, 32, 32))
    assert output.feats.shape == (1, 12, 8, 8)
    resized = nn.functional.interpolate(model.classifier(output.feats), (32, 32), mode="bilinear", align_corners=True)
    torch.testing.assert_close(resized, output.logits)
    with pytest.raises(ConfigError, match="decoder_channels: expected more than 2 for differences of order 2"):
        make_config(TIMM | {"propagation_features": "decoder", "decoder_channels": 2})


def test_frozen_statistics_stay():
    model = network(batch_norm="frozen").train()
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model(torch.rand(2, 3, 32, 32))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# --- weights ---------------------------------------------------------------------------------------------------------


def classifier_state(seed=0):
    torch.manual_seed(seed)
    return timm.create_model("resnet10t").state_dict()


def save_bare(state, path):
    torch.save(state, path)


def save_nested(state, path):
    torch.save({"epoch": 3, "state_dict": {f"module.{name}": value for name, value in state.items()}}, path)


def save_safe(state, path):
    safetensors.torch.save_file(state, path)


def save_renamed(state, path):
    torch.save({f"other_{index}": value for index, value in enumerate(state.values())}, path)


def save_without_head(state, path):
    torch.save({name: value for name, value in state.items() if not name.startswith("fc.")}, path)


@pytest.mark.parametrize("save", [save_bare, save_nested, save_safe, save_renamed, save_without_head])
def test_weights_of_a_file_are_the_backbones(save, tmp_path):
    state, path = classifier_state(), tmp_path / ("w.safetensors" if save is save_safe else "w.pth")
    save(state, path)
    loaded = network(weights=str(path)).backbone.model.model.state_dict()
    assert loaded
    assert all(torch.equal(value, state[name]) for name, value in loaded.items())
    torch.manual_seed(1)
    untouched = SegmentationNetwork(make_config(TIMM | {"weights": str(path)}), 3, initialise=False)
    assert not torch.equal(untouched.backbone.model.model.conv1[0].weight, state["conv1.0.weight"])


def test_weights_of_a_file_for_torchvision(tmp_path):
    torch.manual_seed(0)
    state, path = models.resnet50().state_dict(), tmp_path / "w.pth"
    torch.save(state, path)
    body = SegmentationNetwork(make_config({"backbone": "resnet50", "weights": str(path)}), 3).backbone
    assert all(torch.equal(value, state[name]) for name, value in body.state_dict().items())


def test_torchvision_enum_members_are_asked_for_their_weights(monkeypatch):
    state = models.resnet50().state_dict()
    member = models.ResNet50_Weights.IMAGENET1K_V2
    calls = []

    def get_state_dict(self, **options):
        calls.append((self, options))
        return state

    monkeypatch.setattr(type(member), "get_state_dict", get_state_dict)
    body = SegmentationNetwork(make_config({"backbone": "resnet50", "weights": "IMAGENET1K_V2"}), 3).backbone
    assert [call[0] for call in calls] == [member]
    assert calls[0][1]["check_hash"]
    assert torch.equal(body.state_dict()["layer4.2.conv3.weight"], state["layer4.2.conv3.weight"])


def drop(name):
    return lambda state: {key: value for key, value in state.items() if key != name}


def reshape(name):
    return lambda state: state | {name: state[name][:, :1]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("layer2.0.conv1.weight"), r"w\.pth lacks layer2\.0\.conv1\.weight, which the backbone needs"),
        (
            reshape("layer1.0.conv1.weight"),
            r"layer1\.0\.conv1\.weight: expected shape \[64, .*, found \[64, 1, 3",
        ),
        (lambda state: list(state), r"w\.pth lacks conv1\.0\.weight"),
        (lambda state: {"a": torch.zeros(1)}, r"w\.pth lacks conv1\.0\.weight"),
    ],
)
def test_weights_that_do_not_fit(change, message, tmp_path):
    path = tmp_path / "w.pth"
    torch.save(change(classifier_state()), path)
    with pytest.raises(ConfigError, match=message):
        network(weights=str(path))


def test_weights_that_cannot_be_read(tmp_path):
    path = tmp_path / "w.pth"
    path.write_text("no weights")
    with pytest.raises(ConfigError, match=r"weights: .*w\.pth cannot be read as weights"):
        network(weights=str(path))
    with pytest.raises(ConfigError, match="weights: expected none, timm or a file, found no file 'IMAGENET1K_V2'"):
        network(weights="IMAGENET1K_V2")
    with pytest.raises(
        ConfigError,
        match="expected none, IMAGENET1K_V1, IMAGENET1K_V2, DEFAULT or a file, found no file 'timm'",
    ):
        SegmentationNetwork(make_config({"backbone": "resnet50", "weights": "timm"}), 3)


def test_timms_weights_that_cannot_be_downloaded(monkeypatch):
    def create_model(*_, **options):
        assert options["pretrained"]
        raise FileNotFoundError("check your connection")

    monkeypatch.setattr(timm, "create_model", create_model)
    with pytest.raises(ConfigError, match=r"weights: timm could not download those of resnet10t .*give a file"):
        network(weights="timm")
