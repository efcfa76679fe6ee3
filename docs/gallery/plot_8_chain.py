"""
From Eq. 4 to a classifier
==========================

What is wrong with Eq. 4 on an image, and what mends it: class means in place of class sums, a bias and a prior, and a
metric that is estimated in place of one that is assumed. The last step is `Discriminant`. `Ridge` mends it another way.
"""

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.colors import ListedColormap

from dlprop import DerivativeLabelPropagation
from dlprop.affinity import Discriminant, Linear, Ridge
from dlprop.theory import derivative_metric
from examples.derprop_voc.scenes import CLASS_NAMES, make_scene

torch.manual_seed(0)
C = len(CLASS_NAMES)
image, mask = make_scene(np.random.default_rng(14), (120, 160))
truth = torch.tensor(mask).long()
is_known = truth != 255  # a thin line around every object belongs to no class

# %%
# A prediction: the truth, disturbed by smooth noise, so that the errors are blobs as a network's are.

one_hot = F.one_hot(truth.where(is_known, 0), C).permute(2, 0, 1).float()[None]
logits = 2 * one_hot + 1.2 * F.interpolate(torch.randn(1, C, 12, 16), truth.shape, mode="bicubic")

# %%
# Features: colours and how much they vary, over windows of three sizes. No feature has seen the truth.


def mean(x, window):
    return F.avg_pool2d(x, window, stride=1, padding=window // 2, count_include_pad=False)


pixels = torch.tensor(image).float().permute(2, 0, 1)[None] / 255
red, green, blue = pixels.split(1, dim=1)
shares = pixels / pixels.sum(dim=1, keepdim=True).clamp_min(1e-3)
colour = torch.cat((red + green + blue, red - green, red + green - 2 * blue, shares), dim=1)
windows = [(mean(colour, k), mean((colour - mean(colour, k)) ** 2, k).sqrt()) for k in (3, 7, 15)]
feats = torch.cat([x for pair in windows for x in pair], dim=1)
low, high = feats.amin((2, 3), keepdim=True), feats.amax((2, 3), keepdim=True)
feats = (feats - low) / (high - low)

# %%
# The steps between Eq. 4 and the discriminant, as they read. `K` is the derivative metric, here in units of the
# features' variance, so that distances weigh something beside the prior.

P, V = logits.softmax(dim=1)[0].flatten(1), feats[0].flatten(1)
n, E = P.sum(dim=1, keepdim=True), V - V.mean(dim=1, keepdim=True)
K = torch.tensor(derivative_metric(len(V), 1)).float()
K *= K.inverse().diagonal().mean() / E.square().mean()
m = P @ E.T / (n + 1)  # class means, less the mean of all pixels
bias = torch.log(n / n.sum() + 1e-4) - (m @ K * m).sum(dim=1, keepdim=True) / 2

panels = {
    "prediction": logits,
    "Eq. 4": DerivativeLabelPropagation(Linear(normalize=None))(logits, feats),
    "1. class means": m @ K @ E,
    "2. bias and prior": m @ K @ E + bias,
    "3. metric (Discriminant)": DerivativeLabelPropagation(Discriminant())(logits, feats),
    "Ridge": DerivativeLabelPropagation(Ridge())(logits, feats),
}

# %%
# The share of pixels that are right is above each map. Eq. 4 adds up whole classes, and the background, half of the
# image, wins everywhere. It is no benchmark: one scene, and features that suit it.

colours = ListedColormap(["#2d3142", "#4f9dde", "#f4a259", "#5fb49c", "#e0535f", "#a37acc"])
fig, grid = plt.subplots(2, 4, figsize=(10, 4.4), layout="constrained")
shown = {"image": image, "truth": np.ma.masked_where(~is_known.numpy(), truth.numpy())}
for name, scores in panels.items():
    classes = scores.reshape(C, *truth.shape).argmax(dim=0)
    shown[f"{name}: {(classes == truth)[is_known].float().mean():.0%}"] = classes
for ax, (title, panel) in zip(grid.flat, shown.items(), strict=True):
    ax.imshow(panel, cmap=colours, vmin=0, vmax=C - 1, interpolation="nearest")
    ax.set_title(title, fontsize=10.5)
    ax.set(xticks=[], yticks=[])
plt.show()

# %%
# What each step stands for is on the theory page. Both closed forms cost what Eq. 4 costs, and one product `V V^T`.
