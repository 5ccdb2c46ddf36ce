"""The fused operations that only the fast forms call, each in plain PyTorch and with the one line that swaps its Triton
kernel in. `backend`: see `miniclip.ops`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from miniclip.kernels.dispatch import use_kernel
from miniclip.ops import attention, layer_norm, quick_gelu


def attention_varlen(
    qkv: Tensor, cu_seqlens: Tensor, max_len: int, causal: bool = False, *, backend: str | None = None
) -> Tensor:
    """`attention` within each of many sequences that are packed one after the other, without padding.

    qkv: [T, 3, H, d]. cu_seqlens: int32 [N + 1], from 0 to T: sequence i is rows cu_seqlens[i] to cu_seqlens[i + 1].
    max_len: at least the length of the longest sequence. Returns [T, H * d].
    """
    if use_kernel("attention_varlen", backend, qkv, cu_seqlens, max_len):
        from miniclip.kernels.attention import attention_varlen as kernel

        return kernel(qkv, cu_seqlens, max_len, causal)
    lengths = cu_seqlens.diff().tolist()
    if max(lengths, default=0) > max_len:
        raise ValueError(f"max_len is {max_len}; the longest sequence has {max(lengths)} tokens: expected no less")
    return torch.cat([attention(part[None], causal, backend="torch")[0] for part in qkv.split(lengths)])


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """x + residual, [..., D], and the `layer_norm` of the sum."""
    if use_kernel("add_layer_norm", backend, x, residual, weight, bias):
        from miniclip.kernels.add_layer_norm import add_layer_norm as kernel

        return kernel(x, residual, weight, bias, eps)
    total = x + residual
    return total, layer_norm(total, weight, bias, eps)


def bias_quick_gelu(x: Tensor, bias: Tensor, *, backend: str | None = None) -> Tensor:
    """`quick_gelu` of x [..., D] + bias [D]."""
    if use_kernel("bias_quick_gelu", backend, x, bias):
        from miniclip.kernels.bias_quick_gelu import bias_quick_gelu as kernel

        return kernel(x, bias)
    return quick_gelu(x + bias)
