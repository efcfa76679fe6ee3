"""
Sharp edges from a coarse prediction
====================================

A network predicts on a grid eight times coarser than the image, and bilinear upsampling rounds off what is smaller than
a cell. A window of colours averages each pixel's probabilities with those of its neighbours that look like it, a few
times over, and the edges of the prediction move to the edges of the image.
"""

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.colors import ListedColormap

from dlprop import DerivativeLabelPropagation
from dlprop.affinity import Softmax
from examples.derprop_voc.scenes import CLASS_NAMES, make_scene

scene, truth = make_scene(np.random.default_rng(5), (192, 256))
image = torch.tensor(scene).float().permute(2, 0, 1)[None] / 255
truth = torch.tensor(truth).long()

# %%
# In place of a network: the share of each class in every cell of 8 x 8 pixels, with noise.

torch.manual_seed(0)
classes = len(CLASS_NAMES)
shares = F.one_hot(truth.where(truth != 255, 0), classes).permute(2, 0, 1)[None].float()
coarse = (4 * F.avg_pool2d(shares, 8) + 0.5 * torch.randn(1, classes, 24, 32)).softmax(1)
bilinear = F.interpolate(coarse, image.shape[2:], mode="bilinear")

# %%
# Colours are measured in the image's own unit: the mean of their standard deviation in 9 x 9 pixels. A quarter of it is
# the sigma of the Gaussian, so `weights` is 16. Dilations of 1, 2 and 4 pixels make a window of 25 pixels.

mean, square = (F.avg_pool2d(x, 9, 1, 4, count_include_pad=False) for x in (image, image.square()))
deviation = (square - mean.square()).sum(1).clamp_min(1e-4).sqrt().mean()
window = Softmax(over="sources", similarity="gaussian", normalize=None, weights=(16,), radius=1, dilation=(1, 2, 4))
propagate = DerivativeLabelPropagation(window)

after = {0: bilinear}
for step in range(1, 11):
    after[step] = propagate(after[step - 1], image / deviation)

# %%
# The share of pixels that are right is above each map.

colours = ListedColormap(["#2d3142", "#4f9dde", "#f4a259", "#5fb49c", "#e0535f", "#a37acc"])
fig, grid = plt.subplots(2, 2, figsize=(9, 6.6), layout="constrained")
panels = {"image": scene, "truth": truth, "bilinear": after[0].argmax(1)[0], "10 steps": after[10].argmax(1)[0]}
for ax, (title, panel) in zip(grid.flat, panels.items(), strict=True):
    ax.set(xticks=[], yticks=[])
    if title == "image":
        ax.imshow(panel)
    else:
        ax.imshow(np.ma.masked_equal(panel.numpy(), 255), cmap=colours, vmin=0, vmax=5, interpolation="nearest")
        if title != "truth":
            title += f": {(panel == truth)[truth != 255].float().mean():.1%}"
    ax.set_title(title, fontsize=11)
plt.show()

# %%
# Within two pixels of a boundary of the truth the gain is largest, and most of it comes with the first steps.

spread = F.max_pool2d(torch.stack((truth, -truth))[None].float(), 5, 1, 2)[0]
near = (spread[0] != -spread[1]) & (truth != 255)
right = {step: (P.argmax(1)[0] == truth) for step, P in after.items()}

fig, ax = plt.subplots(figsize=(6, 3.4), layout="constrained")
for name, where, colour in (("all pixels", truth != 255, "#2d3142"), ("near boundaries", near, "#e0535f")):
    ax.plot(list(right), [100 * x[where].float().mean() for x in right.values()], "o-", color=colour, label=name)
ax.set(xlabel="steps", ylabel="right, in percent")
ax.legend(frameon=False)
plt.show()
