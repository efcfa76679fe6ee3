"""
What features have to be like
=============================

A prediction with blobs of error is propagated along features that get worse from left to right. The features are made
of the truth and noise, so this shows the mechanism and says nothing about a network.
"""

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.colors import ListedColormap

from dlprop import DerivativeLabelPropagation
from dlprop.affinity import Discriminant
from examples.derprop_voc.scenes import CLASS_NAMES, make_scene

torch.manual_seed(0)
C = len(CLASS_NAMES)
image, truth = make_scene(np.random.default_rng(14), (60, 80))
labels = torch.tensor(np.where(truth == 255, 0, truth)).long()
Y = F.one_hot(labels, C).permute(2, 0, 1).float()[None]

# %%
# Logits: the truth, disturbed by smooth noise, so that the errors are blobs as a network's are.

blobs = F.interpolate(torch.randn(1, C, 10, 14), labels.shape, mode="bicubic")
logits = 2 * Y + blobs

# %%
# Features: every class has its own two of twelve channels, and noise of each pixel is added to all channels. Eq. 4
# sums over all pixels; the discriminant describes each class by the mean features of the pixels predicted as it, and
# learns from the image which channels are noise.

settings = {
    "Eq. 4": DerivativeLabelPropagation(),
    "discriminant": DerivativeLabelPropagation(Discriminant()),
}
noise = torch.rand(1, 2 * C, *labels.shape)
clean = Y.repeat_interleave(2, dim=1)
levels = np.linspace(0, 2, 7)


def miou(prediction):
    pairs = torch.bincount(C * labels.flatten() + prediction.argmax(1).flatten(), minlength=C * C).view(C, C)
    union = pairs.sum(0) + pairs.sum(1) - pairs.diag()
    return (pairs.diag() / union)[pairs.sum(1) > 0].mean().item()


curves = {name: [miou(p(logits, clean + level * noise)) for level in levels] for name, p in settings.items()}
shown = {level: [p(logits, clean + level * noise) for p in settings.values()] for level in (0.25, 0.75, 2.0)}

colours = ListedColormap(["#2d3142", "#4f9dde", "#f4a259", "#5fb49c", "#e0535f", "#a37acc"])
fig, grid = plt.subplots(3, 3, figsize=(9, 7), layout="constrained")
for ax, panel, title in zip(
    grid[0],
    (image, logits.argmax(1)[0], labels),
    ("image", f"prediction: mIoU {miou(logits):.2f}", "truth"),
    strict=True,
):
    ax.imshow(panel, cmap=colours, vmin=0, vmax=C - 1, interpolation="nearest")
    ax.set_title(title, fontsize=11)
for column, (level, results) in enumerate(shown.items()):
    for row, (name, result) in enumerate(zip(settings, results, strict=True), start=1):
        ax = grid[row, column]
        ax.imshow(result.argmax(1)[0], cmap=colours, vmin=0, vmax=C - 1, interpolation="nearest")
        ax.set_title(f"{name}, noise {level:g}: {miou(result):.2f}", fontsize=11)
for ax in grid.flat:
    ax.set(xticks=[], yticks=[])
plt.show()

# %%
# With features that separate the classes both settings mend the blobs. With noisy ones Eq. 4 is the first to fail: the
# part that all features share makes every pixel similar to every other, and the largest class wins. The discriminant
# takes that part away; it fails where noise hides the classes, and then the prediction itself is better.

fig, ax = plt.subplots(figsize=(6.5, 3.8), layout="constrained")
for (name, values), colour in zip(curves.items(), ("#c8553d", "#2a6f97"), strict=True):
    ax.plot(levels, values, "o-", color=colour, label=name)
ax.axhline(miou(logits), color="0.4", ls="--", label="the prediction itself")
ax.set(xlabel="noise in the features", ylabel="mIoU", ylim=(0, 1.02))
ax.legend(frameon=False)
ax.spines[["top", "right"]].set_visible(False)
plt.show()
