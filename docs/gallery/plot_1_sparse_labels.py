"""
From one pixel in a hundred to all of them
==========================================

Labels are known at one pixel in a hundred, drawn at random. `DerivativeLabelPropagation` brings them to all others
with hand-made features: soft bins of the blurred colour times soft bins of the position. Nothing here is trained, and
no feature has seen the truth.
"""

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.colors import ListedColormap

from dlprop import DerivativeLabelPropagation
from dlprop.affinity import Linear
from examples.derprop_voc.scenes import CLASS_NAMES, make_scene

torch.manual_seed(0)
image, truth = make_scene(np.random.default_rng(8), (120, 160))
H, W = truth.shape


def soft_bins(x, bins, width):
    """Membership of the values of x in Gaussian bins on [0, 1], one channel a bin."""
    centres = torch.linspace(0, 1, bins)[:, None, None]
    return torch.exp(-width * ((x - centres) * (bins - 1)) ** 2)


def products(*factors):
    """All products of one channel of each factor."""
    result = factors[0]
    for factor in factors[1:]:
        result = (result[:, None] * factor).flatten(0, 1)
    return result


# %%
# Three colour axes (brightness, red to green, yellow to blue), blurred to quieten the textures, and two of position.

pixels = torch.tensor(image).float().permute(2, 0, 1)[None] / 255
red, green, blue = F.avg_pool2d(pixels, 5, stride=1, padding=2, count_include_pad=False)[0]
axes = [red + green + blue, red - green, red + green - 2 * blue]
axes = [(x - x.min()) / (x.max() - x.min()) for x in axes]
y, x = torch.meshgrid(torch.linspace(0, 1, H), torch.linspace(0, 1, W), indexing="ij")
position = products(soft_bins(y, 6, 1.5), soft_bins(x, 8, 1.5))
colour = products(*(soft_bins(axis, bins, 1.0) for axis, bins in zip(axes, (2, 5, 5), strict=True)))
feats = products(position, colour)[None]

# %%
# Known labels are the logits and the mask says where they are known. `scale="degree"` makes the result a weighted mean
# of the known labels. The similarity matrix of all pixels would have 369 million entries; it is never formed.

known = (torch.rand(H, W) < 0.01) & torch.tensor(truth != 255)
labels = torch.tensor(truth).long()
logits = F.one_hot(labels.where(known, 0), len(CLASS_NAMES)).permute(2, 0, 1).float()[None]


def propagated(feats, *weights):
    propagate = DerivativeLabelPropagation(Linear(weights=weights, scale="degree"))
    return propagate(logits, feats, mask=known[None])[0].argmax(0)


panels = {
    "image": image,
    f"known labels ({int(known.sum())} pixels)": labels.where(known, 255),
    "truth": labels,
    "position alone": propagated(position[None], 1),
    "with colour, order 0": propagated(feats, 1),
    "with colour, orders 0 and 1": propagated(feats, 1, 1),
}

# %%
# The derivative term discounts what neighbouring channels have in common, which sharpens the broad bins. The share of
# pixels that are right is above each map. It is no benchmark: one scene, and features that suit it.

colours = ListedColormap(["#2d3142", "#4f9dde", "#f4a259", "#5fb49c", "#e0535f", "#a37acc"])
fig, grid = plt.subplots(2, 3, figsize=(9, 5.2), layout="constrained")
for ax, (title, panel) in zip(grid.flat, panels.items(), strict=True):
    ax.set(xticks=[], yticks=[])
    if title == "image":
        ax.imshow(panel)
    elif title.startswith("known"):
        rows, columns = np.nonzero(known.numpy())
        ax.scatter(columns, rows, c=panel[known], cmap=colours, vmin=0, vmax=5, s=7, marker="s", linewidths=0)
        ax.set(xlim=(0, W), ylim=(H, 0), aspect="equal", facecolor="#eef0f4")
    else:
        ax.imshow(np.ma.masked_equal(panel.numpy(), 255), cmap=colours, vmin=0, vmax=5, interpolation="nearest")
        if title != "truth":
            right = (panel == labels)[labels != 255].float().mean()
            title += f": {right:.1%}"
    ax.set_title(title, fontsize=11)
plt.show()
