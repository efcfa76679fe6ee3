"""
The loss on features that separate the classes, and on features that do not
===========================================================================

`DerivativeLoss` compares the similarity of every pair of pixels with 1 for pairs of one class and 0 for others.
"""

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F

from dlprop import DerivativeLoss, derivative_similarity

generator = torch.Generator().manual_seed(0)
labels = torch.arange(4).repeat_interleave(12)[None]
peaks = torch.eye(16)[[0, 5, 10, 15]][labels[0]].T[None]  # one channel a class, first and last among them
noise = torch.rand(peaks.shape, generator=generator)

# %%
# From peaked to mixed features. Pixels are sorted by class, so the target is four squares. At order 1 a class on an
# inner channel reaches 2, not 1: no features meet both targets for more than two classes (see the theory page).

mixing = (0.0, 0.03, 0.15)
fig, grid = plt.subplots(2, 3, figsize=(9, 6), layout="constrained")
for column, amount in enumerate(mixing):
    for order in (0, 1):
        S = derivative_similarity((1 - amount) * peaks + amount * noise, order=order)[0]
        ax = grid[order, column]
        picture = ax.imshow(S, cmap="RdBu_r", vmin=-2, vmax=2, interpolation="nearest")
        ax.set(xticks=[], yticks=[], title=f"order {order}, {amount:.0%} noise")
fig.colorbar(picture, ax=grid, shrink=0.7, label="similarity")
plt.show()

# %%
# The pair terms rise as the classes run into each other; the sparsity term, here with the paper's weight 0.5, falls,
# because smooth features have small differences.

amounts = np.linspace(0, 0.8, 17)
mixed = [(1 - a) * peaks + a * noise for a in amounts]
order0 = [DerivativeLoss(max_order=0, eta=0.0)(V, labels).item() for V in mixed]
pairs = [DerivativeLoss(eta=0.0)(V, labels).item() for V in mixed]
whole = [DerivativeLoss()(V, labels).item() for V in mixed]
parts = {
    "order 0": order0,
    "order 1": np.subtract(pairs, order0),
    "sparsity": np.subtract(whole, pairs),
}

# %%
# Gradient descent from noise alone, on the features themselves:

V = noise.clone().requires_grad_()
optimizer = torch.optim.Adam([V], lr=0.03)
history = []
for _ in range(200):
    optimizer.zero_grad()
    loss = DerivativeLoss()(F.relu(V), labels)
    loss.backward()
    optimizer.step()
    history.append(loss.item())

fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
left.stackplot(amounts, parts.values(), labels=parts, colors=("#2a6f97", "#8ab6d6", "#f4a259"))
left.set(xlabel="share of noise", ylabel="loss", title="its parts")
left.legend(loc="lower right", fontsize=9)
right.plot(history, color="#c8553d", lw=2)
right.set(xlabel="step", title="descent from noise", ylim=(0, None))
for ax in (left, right):
    ax.spines[["top", "right"]].set_visible(False)
plt.show()
