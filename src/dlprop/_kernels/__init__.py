"""Kernels of the custom ops: `dense` is the readable reference, `tiled` runs on any device in little memory."""
