"""Triton kernels, one operation a file. Imports torch and triton only.

No kernel has been written yet. `load(..., backend="triton")` says so, and `miniclip.ops` runs everything in PyTorch.
"""
