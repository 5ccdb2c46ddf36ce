"""Triton kernels, one operation a file, and what goes with them. Start with README.md.

The modules with kernels import torch and triton only; nothing here is imported before `miniclip.ops` asks for a kernel,
except `dispatch`, which decides whether it does, and imports no Triton.
"""
