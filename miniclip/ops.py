"""The mathematics of the operations that the towers call, in plain PyTorch. Shape letters: see `miniclip.config`.

An operation that also exists as a Triton kernel calls it after asking `use_kernel`. `backend` is "torch"; "triton",
which has an effect on CUDA tensors only; or None, with which `miniclip/kernels/dispatch.py` decides. A kernel's limits
are in its docstring.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from miniclip.kernels.dispatch import use_kernel


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), OpenAI's approximation of GELU; any shape and float dtype.

    Not interchangeable with GELU: the two differ by up to 0.02 (at |x| = 2.27), and a checkpoint trained with one loses
    about 2.5 points of ImageNet accuracy when run with the other.
    """
    return x * torch.sigmoid(1.702 * x)


def gelu_tanh(x: Tensor) -> Tensor:
    """The tanh approximation of GELU, SigLIP's; it differs from GELU by up to 0.0005."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": F.gelu, "gelu_tanh": gelu_tanh}  # F.gelu is the exact, erf form


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """Normalise the last dimension of `x` [..., D] in `weight`'s dtype (float32, also in half-precision models).

    eps matters: fresh token embeddings have a variance of 4e-4, so that 1e-6 instead of 1e-5 moves texts by 1%.
    """
    return F.layer_norm(x.to(weight.dtype), weight.shape, weight, bias, eps).to(x.dtype)


def attention(qkv: Tensor, causal: bool = False, *, backend: str | None = None) -> Tensor:
    """Multi-head softmax(q k^T / sqrt(d)) v over packed projections.

    qkv: [N, L, 3, H, d], as one linear layer gives it: all queries, then all keys, then all values, each head by head.
    causal: token i sees tokens 0..i only. Returns [N, L, H * d], the heads side by side.
    """
    if use_kernel("attention", backend, qkv, causal):
        from miniclip.kernels.attention import attention as kernel

        return kernel(qkv, causal)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [N, H, L, d]
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2)


def normalize(x: Tensor) -> Tensor:
    """Divide each vector of `x` [..., E] by its Euclidean length. A zero vector gives NaN, as in openai/CLIP."""
    return x / x.norm(dim=-1, keepdim=True)
