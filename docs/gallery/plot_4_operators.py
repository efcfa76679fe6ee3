"""
The four difference operators
=============================

`finite_difference` along the channels of one pixel, by each `scheme`, for the orders 1 and 2.
"""

import matplotlib.pyplot as plt
import numpy as np
import torch

from dlprop import finite_difference
from dlprop.theory import derivative_metric

channels = torch.arange(24.0)
profile = torch.exp(-(((channels - 7) / 2.5) ** 2)) + 0.5 * (channels > 15)
schemes = {"forward": "Eq. 2", "central": "Eq. 10", "sum": "Eq. 11", "laplacian": "Eq. 12"}
colours = ("#2a6f97", "#c8553d")

fig, axes = plt.subplots(5, 1, figsize=(7, 8.5), layout="constrained", sharex=True)
axes[0].stem(channels, profile, linefmt="0.3", basefmt="0.8")
axes[0].set_title("features of one pixel", fontsize=11)
for ax, (scheme, equation) in zip(axes[1:], schemes.items(), strict=True):
    for order, colour in zip((1, 2), colours, strict=True):
        y = finite_difference(profile[None], order, scheme=scheme)[0]
        start = (len(channels) - len(y)) / 2  # a difference lies in the middle of the channels it comes from
        ax.plot(start + np.arange(len(y)), y, "o-", ms=4, color=colour, label=f"order {order}")
    ax.axhline(0, color="0.8", zorder=0)
    ax.set_title(f'"{scheme}", {equation}', fontsize=11)
axes[0].legend(*axes[1].get_legend_handles_labels(), frameon=False, ncols=2, loc="upper right")
axes[-1].set_xlabel("channel")
for ax in axes:
    ax.spines[["top", "right"]].set_visible(False)
plt.show()

# %%
# In the metric `K` of propagation an operator decides which changes along channels count. The curves show by how much
# orders 0 and 1 together weigh a wave of each frequency: forward and laplacian favour fast waves, central those of
# middle frequency, and the sum the constant.

D = 64
frequency = np.arange(D) / D
waves = np.cos(np.pi * np.outer(np.arange(D) + 0.5, np.arange(D)) / D)
fig, ax = plt.subplots(figsize=(6.5, 3.8), layout="constrained")
for scheme, colour in zip(schemes, ("#2a6f97", "#c8553d", "#6a994e", "#7b5ea7"), strict=True):
    weight = (waves * (derivative_metric(D, 1, scheme=scheme) @ waves)).sum(0) / (waves**2).sum(0)
    ax.plot(frequency, weight, color=colour, lw=2, label=scheme)
ax.axhline(1, color="0.5", ls="--", label="order 0 alone")
ax.set(yscale="log", xlabel="frequency along channels (1: alternating signs)", ylabel="weight in the similarity")
ax.legend(frameon=False)
ax.spines[["top", "right"]].set_visible(False)
plt.show()
