"""What each kernel takes: a function for each returns what is wrong with the arguments, or None if the kernel can run.

The kernels raise ValueError with that text, and `dispatch.use_kernel` asks before it chooses a kernel by default. This
module imports no Triton.
"""

from __future__ import annotations

import torch
from torch import Tensor

HALVES = (torch.float16, torch.bfloat16)
FLOATS = (*HALVES, torch.float32)
MAX_K = 16
MAX_NORM_WIDTH = 8192  # of add_layer_norm: a program holds one row
MAX_LOSS_WIDTH = 1024  # of contrastive_loss: a program holds whole embeddings


def require(problem: str | None) -> None:
    """ValueError if there is a problem."""
    if problem:
        raise ValueError(f'{problem}. Or use backend="torch"')


def attention(qkv: Tensor, causal: bool = False) -> str | None:
    return _qkv(qkv, 5, "[N, L, 3, H, d]")


def attention_varlen(qkv: Tensor, cu_seqlens: Tensor, max_len: int, causal: bool = False) -> str | None:
    if problem := _qkv(qkv, 4, "[T, 3, H, d]") or _gradient(qkv):
        return problem
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.ndim != 1 or cu_seqlens.device != qkv.device:
        got = f"{cu_seqlens.dtype} {list(cu_seqlens.shape)} on {cu_seqlens.device}"
        return f"cu_seqlens is {got}; expected torch.int32 [N + 1] on {qkv.device}"
    if cu_seqlens.stride(0) != 1:
        return f"cu_seqlens has a stride of {cu_seqlens.stride(0)}; expected 1: call .contiguous() on it"
    return None


def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> str | None:
    if x.shape != residual.shape or x.dtype != residual.dtype:
        return f"x is {_name(x)} and residual {_name(residual)}; expected the same"
    if x.dtype not in FLOATS or not 1 <= x.shape[-1] <= MAX_NORM_WIDTH:
        return f"x is {_name(x)}; the kernel takes half precision or float32, 1 to {MAX_NORM_WIDTH} wide"
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter.shape != x.shape[-1:] or parameter.dtype not in FLOATS:
            return f"{name} is {_name(parameter)}; expected half precision or float32 [{x.shape[-1]}]"
    return _device(x, residual=residual, weight=weight, bias=bias) or _gradient(x, residual, weight, bias)


def bias_quick_gelu(x: Tensor, bias: Tensor) -> str | None:
    if x.dtype not in FLOATS or x.ndim == 0:
        return f"x is {_name(x)}; the kernel takes half precision and float32 [..., D]"
    if bias.shape != x.shape[-1:] or bias.dtype != x.dtype:
        return f"bias is {_name(bias)}; expected {x.dtype} [{x.shape[-1]}]"
    return _device(x, bias=bias) or _gradient(x, bias)


def similarity_softmax(x: Tensor, c: Tensor, logit_scale: Tensor) -> str | None:
    if x.ndim != 2 or c.ndim != 2 or x.shape[1] != c.shape[1]:
        return f"x has shape {list(x.shape)} and c {list(c.shape)}; expected [N, E] and [M, E]"
    if x.dtype != c.dtype or x.dtype not in FLOATS:
        return f"x is {x.dtype} and c {c.dtype}; expected both float16, bfloat16 or float32"
    if len(c) == 0:
        return "there are no classes; expected at least one"
    return _last_strides(x=x, c=c) or _scale(x, logit_scale) or _device(x, c=c) or _gradient(x, c, logit_scale)


def similarity_topk(x: Tensor, c: Tensor, logit_scale: Tensor, k: int) -> str | None:
    if problem := similarity_softmax(x, c, logit_scale):
        return problem
    most = min(MAX_K, len(c))
    return None if 1 <= k <= most else f"k is {k}; the kernel takes 1 to {most} of {len(c)}"


def contrastive_loss(image: Tensor, text: Tensor, logit_scale: Tensor) -> str | None:
    if image.ndim != 2 or image.shape != text.shape or len(image) == 0:
        return f"image has shape {list(image.shape)} and text {list(text.shape)}; expected [N, E] twice"
    if image.dtype != text.dtype or image.dtype not in HALVES:
        return f"image is {image.dtype} and text {text.dtype}; expected both float16 or both bfloat16"
    if image.shape[1] > MAX_LOSS_WIDTH:
        return f"embeddings are {image.shape[1]} wide; the kernel takes at most {MAX_LOSS_WIDTH}"
    return _last_strides(image=image, text=text) or _scale(image, logit_scale) or _device(image, text=text)


def records_gradient(*tensors: Tensor) -> bool:
    """Whether autograd records operations on these tensors."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _qkv(qkv: Tensor, ndim: int, shape: str) -> str | None:
    if qkv.ndim != ndim or qkv.shape[-3] != 3:
        return f"qkv has shape {list(qkv.shape)}; expected {shape}"
    if qkv.dtype not in HALVES:
        return f"qkv is {qkv.dtype}; the kernel takes float16 and bfloat16"
    if qkv.shape[-1] % 8 or not 32 <= qkv.shape[-1] <= 128:
        return f"the head dimension is {qkv.shape[-1]}; the kernel takes a multiple of 8 from 32 to 128"
    return _last_strides(qkv=qkv)


def _last_strides(**tensors: Tensor) -> str | None:
    for name, x in tensors.items():
        if x.stride(-1) != 1:
            return f"{name} has a last stride of {x.stride(-1)}; expected 1: call .contiguous() on it"
    return None


def _scale(x: Tensor, scale: Tensor) -> str | None:
    if scale.numel() != 1 or scale.dtype != torch.float32:
        return f"logit_scale is {_name(scale)}; expected a float32 scalar"
    return _device(x, logit_scale=scale)


def _device(x: Tensor, **others: Tensor) -> str | None:
    for name, other in others.items():
        if other.device != x.device:
            return f"{name} is on {other.device}; expected {x.device}"
    return None


def _gradient(*tensors: Tensor) -> str | None:
    return "the kernel has no gradient; expected torch.no_grad()" if records_gradient(*tensors) else None


def _name(x: Tensor) -> str:
    return f"{x.dtype} {list(x.shape)}"
