"""The MLP's bias and activation in one pass over memory: PyTorch's eager mode takes four."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def bias_quick_gelu_kernel(X, BIAS, OUT, width, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    x = tl.load(X + row * stride + columns, inside, 0.0).to(tl.float32)
    x += tl.load(BIAS + columns, inside, 0.0).to(tl.float32)
    x = x / (1.0 + tl.exp(-1.702 * x))  # where exp overflows, x is so small that -0 is right
    tl.store(OUT + row * width + columns, x.to(OUT.dtype.element_ty), inside)


def bias_quick_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """QuickGELU of x + bias: y * sigmoid(1.702 y). No gradient.

    x: float16, bfloat16 or float32 [..., D]. bias: [D], of any of these dtypes. The arithmetic is float32, rounded once
    at the end. Returns a contiguous tensor of x's shape and dtype.
    """
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f'x is {x.dtype}; the kernel takes half precision and float32: use backend="torch"')
    if bias.shape != x.shape[-1:]:
        raise ValueError(f"bias has shape {list(bias.shape)}; expected [{x.shape[-1]}]")
    return torch.ops.miniclip.bias_quick_gelu(x, bias)


@torch.library.custom_op("miniclip::bias_quick_gelu", mutates_args=())
def _bias_quick_gelu(x: Tensor, bias: Tensor) -> Tensor:
    out = x.new_empty(x.shape)
    x = x.reshape(-1, x.shape[-1])  # copies only what is not a matrix with a row stride
    x = x if x.stride(1) == 1 else x.contiguous()
    with torch.cuda.device_of(x):
        bias_quick_gelu_kernel[len(x), triton.cdiv(x.shape[1], BLOCK)](
            x, bias.contiguous(), out, x.shape[1], x.stride(0), BLOCK=BLOCK, num_warps=4
        )
    return out


@_bias_quick_gelu.register_fake
def _(x: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(x.shape)
