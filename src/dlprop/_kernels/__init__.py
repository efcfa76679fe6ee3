"""Kernels behind the custom ops, pixels as rows: `tiled` runs on any device in little memory, `triton` on NVIDIA GPUs.

`products` holds the plain matrix products whose gradients are worth a node of their own.
"""
