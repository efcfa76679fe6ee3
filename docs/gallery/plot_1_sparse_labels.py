"""
From clicks to a dense map
==========================

A small classifier has seen three scenes and mistakes much of the fourth. Someone clicks five pixels of each class. What
the classifier gets wrong there is carried, by attention over the clicked pixels, to the pixels that look like them and
lie near them; where it is right nothing changes.
"""

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.colors import ListedColormap

from dlprop import DerivativeLabelPropagation
from dlprop.affinity import Softmax
from examples.derprop_voc.scenes import CLASS_NAMES, make_scene

VOID, CLASSES = 255, len(CLASS_NAMES)
torch.manual_seed(0)


def scene(seed):
    """An image (H, W, 3), its truth (H, W) and features (1, D, H, W): colours, smoothed and rough."""
    image, truth = make_scene(np.random.default_rng(seed), (120, 160))
    pixels = torch.tensor(image).float().permute(2, 0, 1)[None] / 255
    smooth = [F.avg_pool2d(pixels, k, 1, k // 2, count_include_pad=False) for k in (1, 5, 11)]
    rough = F.avg_pool2d((pixels - smooth[1]).abs(), 9, 1, 4, count_include_pad=False)
    return image, torch.tensor(truth).long(), torch.cat([*smooth, 4 * rough], dim=1)


# %%
# The classifier: a layer of 64 units and one of the classes, on these features, trained on three scenes.

hidden = torch.nn.Sequential(torch.nn.Conv2d(12, 64, 1), torch.nn.ReLU())
classifier = torch.nn.Conv2d(64, CLASSES, 1)
optimizer = torch.optim.Adam([*hidden.parameters(), *classifier.parameters()], lr=0.02)
training = [scene(seed)[1:] for seed in (1, 2, 3)]
truths, inputs = torch.stack([x for x, _ in training]), torch.cat([x for _, x in training])
for _ in range(150):
    optimizer.zero_grad()
    F.cross_entropy(classifier(hidden(inputs)), truths, ignore_index=VOID).backward()
    optimizer.step()

image, truth, pixels = scene(8)
with torch.no_grad():
    feats = hidden(pixels)
    logits = classifier(feats)

# %%
# Five clicks a class. Sources are the clicked pixels alone, flat; targets are all pixels. Features are the activities
# of the units, at length 1, with the place beside them, so that similar means alike and near.

rng = np.random.default_rng(0)
clicks = torch.full_like(truth, VOID)
for label in truth.unique().tolist():
    if label != VOID:
        rows, columns = np.nonzero(truth.numpy() == label)
        chosen = rng.choice(len(rows), 5, replace=False)
        clicks[rows[chosen], columns[chosen]] = label

y, x = torch.meshgrid(torch.linspace(0, 0.75, 120), torch.linspace(0, 1, 160), indexing="ij")
targets = torch.cat([F.normalize(feats), torch.stack([y, x])[None]], dim=1).flatten(2)
clicked = clicks.flatten() != VOID
sources = targets[:, :, clicked]
labels = F.one_hot(clicks.flatten()[clicked], CLASSES).T[None].float()

attention = DerivativeLabelPropagation(Softmax(over="sources", similarity="gaussian", normalize=None, weights=(40.0,)))
corrected = logits.flatten(2)
for _ in range(3):
    errors = labels - corrected[:, :, clicked].softmax(1)
    corrected = corrected + attention(errors, sources, targets)

# %%
# The share of pixels that are right is above each map. It is no benchmark: one scene, and features that suit it. For
# real images see :doc:`the recipe </recipes/clicks>`.


def title(name, prediction):
    right = (prediction == truth)[truth != VOID].float().mean()
    return f"{name}: {right:.0%}"


network, completed = logits[0].argmax(0), corrected[0].argmax(0).view_as(truth)
colours = ListedColormap(["#2d3142", "#4f9dde", "#f4a259", "#5fb49c", "#e0535f", "#a37acc"])
fig, grid = plt.subplots(1, 4, figsize=(12, 2.7), layout="constrained")
for ax in grid:
    ax.set(xticks=[], yticks=[])
grid[0].imshow(image)
grid[0].set_title("image")
grid[1].imshow(image, alpha=0.35)
rows, columns = np.nonzero(clicks.numpy() != VOID)
grid[1].scatter(
    columns, rows, c=clicks[rows, columns], cmap=colours, vmin=0, vmax=5, s=40, edgecolors="white", linewidths=1
)
grid[1].set_title("five clicks a class")
for ax, name, prediction in zip(grid[2:], ("classifier", "with the clicks"), (network, completed), strict=True):
    ax.imshow(prediction, cmap=colours, vmin=0, vmax=5, interpolation="nearest")
    ax.set_title(title(name, prediction))
plt.show()
