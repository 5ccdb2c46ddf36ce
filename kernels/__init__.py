"""Triton kernels, a file for each operation. Start with README.md.

`import miniclip` reads `dispatch`, `limits` and `tiles`, which import no Triton. A kernel is imported when it is
called.
"""
