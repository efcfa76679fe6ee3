"""
Labels of one frame, carried through a clip
===========================================

The first frame of a clip is labelled. Every pixel of a new frame averages the labels of the pixels most like it, in
colour and place, among those of the first frame and of the last three predicted ones: attention over a memory.
"""

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.colors import ListedColormap

from dlprop import DerivativeLabelPropagation
from dlprop.affinity import Softmax
from examples.derprop_voc.scenes import CLASS_NAMES, make_scene

image, truth = make_scene(np.random.default_rng(8), (160, 240))

# %%
# A made clip: the camera moves over a larger scene, and the light fades. Features are blurred colours at three scales,
# in place of what a network would give, on a grid of every second pixel.

H, W, COUNT = 96, 128, 13
tops = np.linspace(64, 24, COUNT).round().astype(int)
lefts = np.linspace(84, 24, COUNT).round().astype(int)
lights = np.linspace(1, 0.7, COUNT)
frames, truths = [], []
for top, left, light in zip(tops, lefts, lights, strict=True):
    window = (slice(top, top + H), slice(left, left + W))
    frames.append(torch.tensor(image[window] * light / 255).permute(2, 0, 1)[None].float())
    truths.append(torch.tensor(truth[window]).long())


def features(frame):
    blurred = [F.avg_pool2d(frame, k, stride=1, padding=k // 2, count_include_pad=False) for k in (3, 7, 15)]
    return F.avg_pool2d(torch.cat(blurred, 1), 2)


def placed(feats, weight=0.3):
    """Features with the place, in heights, as two more channels."""
    h, w = feats.shape[-2:]
    y, x = torch.meshgrid(torch.arange(h) / h, torch.arange(w) / h, indexing="ij")
    return torch.cat((feats, weight * torch.stack((y, x))[None]), 1).flatten(2)


# %%
# All pixels of all frames of the memory are the sources of one softmax, and the new frame is the target. Predicted
# frames enter with their labels, not with their probabilities: those would blur a little more with each frame.

propagate = DerivativeLabelPropagation(
    Softmax(over="sources", similarity="gaussian", weights=(2000.0,), normalize=None)
)
C = len(CLASS_NAMES)


def one_hot(labels):
    return F.one_hot(labels, C).movedim(-1, 1).flatten(2).float()


def carried(last):
    grid = (H // 2, W // 2)
    known = torch.where(truths[0] == 255, 0, truths[0])[::2, ::2]
    memory = [(placed(features(frames[0])), one_hot(known[None]))]
    maps = []
    for frame in frames[1:]:
        target = placed(features(frame))
        kept = memory[:1] + memory[max(1, len(memory) - last) :]
        sources, labels = (torch.cat(parts, 2) for parts in zip(*kept, strict=True))
        scores = propagate(labels, sources, target).unflatten(2, grid)
        memory.append((target, one_hot(scores.argmax(1))))
        maps.append(F.interpolate(scores, (H, W), mode="bilinear")[0].argmax(0))
    return maps


maps = {
    "truth": truths[1:],
    "first frame copied": [truths[0]] * (COUNT - 1),
    "memory: first": carried(0),
    "memory: first, last 3": carried(3),
}

# %%
# The share of pixels that are right is above each map and in the curves below. What comes into view later has no label
# in the memory and takes that of something else. It is no benchmark: one scene, and colours that suit it. On a clip of
# CamVid the last three frames in the memory do harm, see :doc:`the recipe </recipes/frames>`.

shown = (4, 8, 12)
colours = ListedColormap(["#2d3142", "#4f9dde", "#f4a259", "#5fb49c", "#e0535f", "#a37acc"])
fig = plt.figure(figsize=(10, 7.4), layout="constrained")
axes = fig.subplot_mosaic(
    [[f"{row}{n}" for row in ("frame", *maps)] for n in shown] + [["curves"] * (1 + len(maps))],
    height_ratios=[1, 1, 1, 1.1],
)
for n in shown:
    axes[f"frame{n}"].imshow(frames[n][0].permute(1, 2, 0))
    axes[f"frame{n}"].set_title(f"frame {n}", fontsize=10)
for name, predicted in maps.items():
    right = [100 * (labels == t)[t != 255].float().mean() for labels, t in zip(predicted, truths[1:], strict=True)]
    for n in shown:
        labels = np.ma.masked_equal(predicted[n - 1].numpy(), 255)
        axes[f"{name}{n}"].imshow(labels, cmap=colours, vmin=0, vmax=5, interpolation="nearest")
        title = "" if name == "truth" else f"{right[n - 1]:.0f} %"
        axes[f"{name}{n}"].set_title(f"{name}\n{title}" if n == shown[0] else title, fontsize=10)
    if name != "truth":
        axes["curves"].plot(range(1, COUNT), right, label=name)
for name, ax in axes.items():
    if name != "curves":
        ax.set(xticks=[], yticks=[])
axes["curves"].set(xlabel="frames after the labelled one", ylabel="pixels that are right (%)")
axes["curves"].legend(frameon=False)
plt.show()
