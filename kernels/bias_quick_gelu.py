"""The MLP's bias and activation in one pass over memory: PyTorch's eager mode takes four."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from miniclip.kernels import limits
from miniclip.kernels.eager import function_or_operator

BLOCK = 1024


@triton.jit
def bias_quick_gelu_kernel(X, BIAS, OUT, width, stride, BLOCK: tl.constexpr):
    blocks = tl.cdiv(width, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    columns = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    x = tl.load(X + row * stride + columns, inside, 0.0).to(tl.float32)
    x += tl.load(BIAS + columns, inside, 0.0).to(tl.float32)
    x = x / (1.0 + tl.exp(-1.702 * x))  # where exp overflows, x is so small that -0 is right
    tl.store(OUT + row * width + columns, x.to(OUT.dtype.element_ty), inside)


def bias_quick_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """QuickGELU of x + bias: y * sigmoid(1.702 y). No gradient.

    x: float16, bfloat16 or float32 [..., D]. bias: [D] of the same dtype. The arithmetic is float32, and the result is
    rounded once. Returns a contiguous tensor of x's shape and dtype.
    """
    limits.require(limits.bias_quick_gelu(x, bias))
    run = function_or_operator(_bias_quick_gelu, torch.ops.miniclip.bias_quick_gelu, x, bias)
    return run(x, bias)


def _bias_quick_gelu(x: Tensor, bias: Tensor) -> Tensor:
    out = _fake_bias_quick_gelu(x, bias)
    if x.numel() == 0:
        return out
    x = x.reshape(-1, x.shape[-1])  # copies only what is not a matrix with a row stride
    x = x if x.stride(1) == 1 else x.contiguous()
    with torch.cuda.device_of(x):
        bias_quick_gelu_kernel[len(x) * triton.cdiv(x.shape[1], BLOCK),](
            x, bias.contiguous(), out, x.shape[1], x.stride(0), BLOCK=BLOCK, num_warps=4
        )
    return out


def _fake_bias_quick_gelu(x: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(x.shape)


_operator = torch.library.custom_op("miniclip::bias_quick_gelu", _bias_quick_gelu, mutates_args=())
_operator.register_fake(_fake_bias_quick_gelu)
