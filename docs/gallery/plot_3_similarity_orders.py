"""
What one pixel is similar to, order by order
============================================

`derivative_similarity` with `query` gives the row of one pixel without the matrix. Order 0 compares the channels
themselves, higher orders their differences.
"""

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F

from dlprop import derivative_similarity
from examples.derprop_voc.scenes import make_scene

image, truth = make_scene(np.random.default_rng(11), (96, 128))
H, W = truth.shape

# %%
# Features of each pixel: histograms of the three colours around it, in ten soft bins each, channel beside channel.

pixels = torch.tensor(image).float().permute(2, 0, 1)[None] / 255
centres = torch.linspace(0, 1, 10)
bins = torch.exp(-(((pixels[:, :, None] - centres[:, None, None]) * 9) ** 2)).flatten(1, 2)
feats = F.avg_pool2d(bins, 9, 1, 4, count_include_pad=False)

# %%
# All channels are positive, so at order 0 everything is similar to everything. Differences along the channels have both
# signs: what is unlike the pixel turns negative, and the rest stands out.

row, column = 44, 64
query = torch.tensor([row * W + column])
fig, grid = plt.subplots(2, 2, figsize=(8, 6.4), layout="constrained")
grid[0, 0].imshow(image)
grid[0, 0].set_title("the pixel", fontsize=11)
for ax, order in zip(grid.flat[1:], (0, 1, 2), strict=True):
    S = derivative_similarity(feats, order=order, query=query)[0, 0].view(H, W)
    limit = S.abs().max()
    picture = ax.imshow(S / limit, cmap="RdBu_r", vmin=-1, vmax=1)
    ax.set_title(f"order {order}", fontsize=11)
fig.colorbar(picture, ax=grid, shrink=0.6, label="similarity / its largest value")
for ax in grid.flat:
    ax.plot(column, row, "o", ms=9, mfc="none", mec="black", mew=2)
    ax.plot(column, row, "o", ms=7, mfc="none", mec="white", mew=1.5)
    ax.set(xticks=[], yticks=[])
plt.show()
