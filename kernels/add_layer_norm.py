"""The residual sum and the layer norm after it, in one pass over memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from miniclip.kernels import limits
from miniclip.kernels.eager import function_or_operator


@triton.jit
def add_layer_norm_kernel(
    X, RESIDUAL, WEIGHT, BIAS, SUM, OUT, width, stride_x, stride_residual, eps, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    x = tl.load(X + row * stride_x + columns, inside, 0.0).to(tl.float32)
    x += tl.load(RESIDUAL + row * stride_residual + columns, inside, 0.0).to(tl.float32)
    x = x.to(SUM.dtype.element_ty)
    tl.store(SUM + row * width + columns, x, inside)
    x = x.to(tl.float32)  # what is normalised is the sum as rounded and stored
    mean = tl.sum(x, 0) / width
    centred = tl.where(inside, x - mean, 0.0)
    variance = tl.sum(centred * centred, 0) / width
    weight = tl.load(WEIGHT + columns, inside, 0.0).to(tl.float32)
    bias = tl.load(BIAS + columns, inside, 0.0).to(tl.float32)
    out = centred * tl.rsqrt(variance + eps) * weight + bias
    tl.store(OUT + row * width + columns, out.to(OUT.dtype.element_ty), inside)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """x + residual, and the layer norm of that over the last dimension. No gradient.

    x, residual: [..., D] of the same dtype, float16, bfloat16 or float32, D at most 8192. weight, bias: [D], of any of
    these dtypes; the arithmetic is float32. Returns (sum, normalised), contiguous, in x's dtype.
    """
    limits.require(limits.add_layer_norm(x, residual, weight, bias))
    run = function_or_operator(_add_layer_norm, torch.ops.miniclip.add_layer_norm, x, residual, weight, bias)
    return run(x, residual, weight, bias, eps)


def _add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    total, out = _fake_add_layer_norm(x, residual, weight, bias, eps)
    width = x.shape[-1]
    x, residual = (y.reshape(-1, width) for y in (x, residual))  # copies only what is not a matrix with a row stride
    x, residual = (y if y.stride(1) == 1 else y.contiguous() for y in (x, residual))
    if x.numel() == 0:
        return total, out
    with torch.cuda.device_of(x):
        add_layer_norm_kernel[len(x),](
            x, residual, weight.contiguous(), bias.contiguous(), total, out,
            width, x.stride(0), residual.stride(0), eps,
            BLOCK=triton.next_power_of_2(width), num_warps=4 if width <= 2048 else 8,
        )  # fmt: skip
    return total, out


def _fake_add_layer_norm(x, residual, weight, bias, eps) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


_operator = torch.library.custom_op("miniclip::add_layer_norm", _add_layer_norm, mutates_args=())
_operator.register_fake(_fake_add_layer_norm)
