"""
How time grows with the image
=============================

The same product, `L S`, evaluated with the M x M matrix `S` and as a low-rank product (the default).
The times are processor seconds of one thread on the machine that built this page, at small sizes; what counts is the
slope. For measured figures with their machine see the benchmarks page.
"""

import time

import matplotlib.pyplot as plt
import numpy as np
import torch

from dlprop import DerivativeLabelPropagation, derivative_similarity

torch.set_num_threads(1)
C, D = 21, 64


def seconds(propagate, size):
    logits, feats = torch.randn(1, C, size, size), torch.rand(1, D, size, size)
    times = []
    for _ in range(4):  # the first run warms up
        start = time.process_time()
        propagate(logits, feats)
        times.append(time.process_time() - start)
    return min(times)


def dense(logits, feats):
    return logits.flatten(2) @ sum(derivative_similarity(feats, order=order) for order in (0, 1))


low_rank = DerivativeLabelPropagation()
small, large = [12, 17, 24, 34, 48], [24, 34, 48, 68, 96, 136, 192]
curves = {
    "dense matrix": (np.square(small), [seconds(dense, size) for size in small], 2, "#c8553d"),
    "low rank": (np.square(large), [seconds(low_rank, size) for size in large], 1, "#2a6f97"),
}

# %%
# Memory needs no clock: the matrix has M x M entries, the low-rank form little more than its inputs.

fig, (ax, bytes_ax) = plt.subplots(1, 2, figsize=(9.5, 4.2), layout="constrained")
for name, (M, t, power, colour) in curves.items():
    ax.loglog(M, t, "o-", color=colour, label=name)
    through = t[-1] * (M / M[-1]) ** power
    ax.loglog(M, through, ":", color=colour, label=f"grows like M{'' if power == 1 else '²'}")
ax.set(xlabel="pixels M", ylabel="processor seconds", title="time, one image")
ax.legend(frameon=False)

M = np.logspace(2, 6.5, 50)
bytes_ax.loglog(M, 4 * M**2 / 2**30, color="#c8553d", label="M x M matrix")
bytes_ax.loglog(M, 4 * M * (C + D) / 2**30, color="#2a6f97", label="features and logits")
for size, name in ((41 * 41, "41 x 41"), (321 * 321, "321 x 321"), (1024 * 2048, "1024 x 2048")):
    bytes_ax.axvline(size, color="0.85", zorder=0)
    bytes_ax.text(size, 2e-7, name, rotation=90, ha="right", va="bottom", color="0.4", fontsize=9)
bytes_ax.set(xlabel="pixels M", ylabel="GiB in float32", title="memory, by count", ylim=(1e-7, 1e5))
bytes_ax.legend(frameon=False, loc="upper left")
for panel in (ax, bytes_ax):
    panel.spines[["top", "right"]].set_visible(False)
plt.show()
