"""A run folder without a training, and a network that needs none."""

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from examples.derprop_voc.augment import to_input
from examples.derprop_voc.config import make_config
from examples.derprop_voc.data import Data, read_image
from examples.derprop_voc.files import write_checkpoint
from examples.derprop_voc.model import Output
from examples.derprop_voc.scenes import CLASS_NAMES
from examples.derprop_voc.state import make_state
from tests.example.options import TINY

KEYS = ("prediction", "propagated", "blend")


class FakeNetwork(nn.Module):
    """Three classes whose logits depend on the pixel, on its place in the window and on the window's content."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[3.0, -1, 0], [-2, 2, 1], [0, 1, -3]]))

    def forward(self, x):
        height, width = x.shape[-2:]
        logits = torch.einsum("ck,nkhw->nchw", self.weight, x)
        logits[:, 0] += torch.linspace(-1, 1, height)[:, None]
        logits[:, 1] += torch.linspace(0, 2, width)
        logits[:, 2] += x.mean()
        return Output(logits, F.avg_pool2d(torch.cat([x, 1 - x], 1), 2))


def write_state(path, config, scenes, *, step, seed):
    """A checkpoint of networks whose predictions name several classes, and whose average is another network."""
    torch.manual_seed(seed)
    state = make_state(config, len(CLASS_NAMES), torch.device("cpu"), 10, initialise=False)
    # An untrained network has nearly the same features everywhere: whiten them, so that several classes win.
    names = (scenes / "ImageSets" / "Segmentation" / "val.txt").read_text().split()
    images = torch.stack([read_image(scenes / "JPEGImages" / f"{name}.png", (32, 40)) for name in names])
    classifier, seen = state.network.classifier, []
    handle = classifier.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].double()))
    with torch.no_grad():
        state.network.eval()(to_input(images))
        handle.remove()
        fused = seen[0].movedim(1, 0).flatten(1)
        values, vectors = torch.linalg.eigh(torch.cov(fused))
    for _ in range(2):
        weight = 2 * torch.randn(len(CLASS_NAMES), len(fused)).double() @ (vectors / (values + 1e-12).sqrt()).T
        with torch.no_grad():
            classifier.weight.copy_(weight[:, :, None, None])
            classifier.bias.copy_(-weight @ fused.mean(1))
        if state.averager and not state.averager.n_averaged:
            state.averager.update(state.network)
    state.step = step
    write_checkpoint(path, state.to_dict(config, Data([], [], [], CLASS_NAMES), epoch=step // 2, precision={}))


def make_finished(scenes, out):
    """A run folder with latest.pt and best.pt, whose data has moved since; it works at another size than is stored."""
    options = {"data": "moved/away", "out": str(out), "image_size": [32, 40]}
    # Propagation that does not make all pixels alike.
    options |= {"affinity": "softmax", "similarity": "cosine", "normalize": "none", "order_weights": [20, 20]}
    config = make_config(TINY | options)
    with torch.random.fork_rng():
        write_state(out / "latest.pt", config, scenes, step=10, seed=1)
        write_state(out / "best.pt", config, scenes, step=6, seed=2)


def validation(scenes, tmp_path):
    """The validation images in a folder of their own, and their masks."""
    names = (scenes / "ImageSets" / "Segmentation" / "val.txt").read_text().split()
    folder = tmp_path / "images"
    folder.mkdir()
    for name in names:
        (folder / f"{name}.png").write_bytes((scenes / "JPEGImages" / f"{name}.png").read_bytes())
    (folder / "notes.txt").write_text("no image")
    return folder, {name: np.array(Image.open(scenes / "SegmentationClass" / f"{name}.png")) for name in names}


def confusion_iou(predicted, truth, count):
    """IoU of every class over all images, NaN for absent ones, by counting pixels."""
    matrix = np.zeros((count, count), int)
    for labels, target in zip(predicted, truth, strict=True):
        known = target != 255
        np.add.at(matrix, (target[known], labels[known]), 1)
    union = matrix.sum(0) + matrix.sum(1) - matrix.diagonal()
    return np.where(union > 0, matrix.diagonal() / np.maximum(union, 1), np.nan)
