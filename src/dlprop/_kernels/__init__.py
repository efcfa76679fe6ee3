"""Kernels of the custom ops: `dense` is the readable reference, `tiled` runs on any device in little memory.

`triton` holds fused kernels for CUDA and is imported when it is first asked for.
"""
