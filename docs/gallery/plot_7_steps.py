"""
Propagation in four steps
=========================

Eight pixels of two classes, small enough to see every number: features, their differences, the similarity, and what
propagation makes of the logits.
"""

import matplotlib.pyplot as plt
import torch

from dlprop import DerivativeLabelPropagation, derivative_similarity, finite_difference

feats = torch.tensor(
    [
        [9, 8, 9, 7, 1, 0, 1, 2],
        [6, 7, 5, 6, 2, 1, 2, 1],
        [2, 1, 2, 3, 1, 2, 1, 2],
        [1, 2, 1, 1, 3, 2, 3, 2],
        [1, 1, 2, 2, 7, 6, 7, 8],
        [1, 1, 1, 1, 6, 9, 6, 5],
    ],
    dtype=torch.float32,
)[None]
logits = torch.tensor([[2.0, 0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 2.0]])[None]  # first and last are known

V = feats / feats.sum(dim=1, keepdim=True)
steps = [
    ("1. features V", V[0], "channel"),
    ("2. differences", finite_difference(V)[0], "channel"),
    ("3. similarity, orders 0 + 1", sum(derivative_similarity(feats, order=q) for q in (0, 1))[0], "pixel"),
    ("logits L", logits[0], "class"),
    ("4. propagated L'", DerivativeLabelPropagation()(logits, feats)[0], "class"),
]

fig = plt.figure(figsize=(9, 6.2), layout="constrained")
axes = fig.subplot_mosaic([["a", "b", "c"], ["a", "b", "c"], ["d", "e", "e"]], height_ratios=[1, 1, 0.9])
for ax, (title, values, rows) in zip(axes.values(), steps, strict=True):
    limit = values.abs().max()
    ax.imshow(values, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
    ax.set(xticks=range(8), yticks=range(len(values)), xlabel="pixel", ylabel=rows)
    ax.set_title(title, fontsize=11)
    ax.tick_params(length=0)
    if rows == "class":
        for (i, j), value in zip(torch.cartesian_prod(*map(torch.arange, values.shape)), values.flatten(), strict=True):
            tone = "white" if abs(value) > 0.6 * limit else "black"
            ax.text(j, i, f"{value:.2f}" if ax is axes["e"] else f"{value:g}", ha="center", va="center", color=tone)
plt.show()

# %%
# The first pixel was known to be of class 0, the last of class 1. The others receive most from the one they are like.
# Order 0 alone would carry more between the two halves: where the differences have opposite signs, order 1 takes off.
