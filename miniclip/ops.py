"""The mathematics of CLIP's operations, each in its plain form. Shape letters: see `miniclip.config`.

Some also exist as Triton kernels, under the same name and with the same arguments, in `miniclip.kernels`; `use_kernel`
is where those are swapped in. `backend` is "torch", "triton", which needs CUDA tensors to have an effect, or None: the
kernel where it was measured to be faster (`miniclip/kernels/dispatch.py`). Limits are in the kernels' docstrings.
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


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": F.gelu}  # F.gelu is the exact, erf form; the tanh form is neither


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
    if use_kernel("attention", backend, qkv, size=qkv.shape[1], fits=qkv.shape[-1] == 64):
        from miniclip.kernels.attention import attention as kernel

        return kernel(qkv, causal)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [N, H, L, d]
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2)


def attention_varlen(
    qkv: Tensor, cu_seqlens: Tensor, max_len: int, causal: bool = False, *, backend: str | None = None
) -> Tensor:
    """`attention` within each of many sequences that stand one after the other, without padding.

    qkv: [T, 3, H, d]. cu_seqlens: int32 [N + 1], from 0 to T: sequence i is rows cu_seqlens[i] to cu_seqlens[i + 1].
    max_len: the longest sequence's length, or more. Returns [T, H * d].
    """
    if use_kernel("attention_varlen", backend, qkv, size=max_len, fits=not _wants_gradient(qkv)):
        from miniclip.kernels.attention import attention_varlen as kernel

        return kernel(qkv, cu_seqlens, max_len, causal)
    lengths = cu_seqlens.diff().tolist()
    if max(lengths, default=0) > max_len:
        raise ValueError(f"max_len is {max_len}; the longest sequence has {max(lengths)} tokens: expected no less")
    return torch.cat([attention(part[None], causal, backend="torch")[0] for part in qkv.split(lengths)])


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """x + residual, [..., D], and the `layer_norm` of that. The kernel is for eager inference, see `_is_eager`."""
    if use_kernel("add_layer_norm", backend, x, size=x.numel()) and _is_eager(x, residual, weight, bias):
        from miniclip.kernels.add_layer_norm import add_layer_norm as kernel

        return kernel(x, residual, weight, bias, eps)
    total = x + residual
    return total, layer_norm(total, weight, bias, eps)


def bias_quick_gelu(x: Tensor, bias: Tensor, *, backend: str | None = None) -> Tensor:
    """`quick_gelu` of x [..., D] + bias [D]. The kernel is for eager inference, see `_is_eager`."""
    if use_kernel("bias_quick_gelu", backend, x, size=x.numel()) and _is_eager(x, bias):
        from miniclip.kernels.bias_quick_gelu import bias_quick_gelu as kernel

        return kernel(x, bias)
    return quick_gelu(x + bias)


def _is_eager(*tensors: Tensor) -> bool:
    """Whether a kernel without gradient has its place: torch.compile fuses by itself, with a gradient, what it does."""
    return not _wants_gradient(*tensors) and not torch.compiler.is_compiling()


def _wants_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def normalize(x: Tensor) -> Tensor:
    """Divide each vector of `x` [..., E] by its Euclidean length. A zero vector gives NaN, as in openai/CLIP."""
    return x / x.norm(dim=-1, keepdim=True)


def similarity_softmax(x: Tensor, c: Tensor, logit_scale: Tensor, *, backend: str | None = None) -> Tensor:
    """softmax(logit_scale * cosine(x, c)) over the classes: zero-shot classification's probabilities.

    x: [N, D], c: [M, D], of any length: they are normalised here, and a zero vector's cosines are 0. logit_scale:
    scalar tensor, exp(model.logit_scale). Half precision is computed in, and the result is, float32: at a scale of 100
    neighbouring bfloat16 logits are 0.5 apart. Returns [N, M].
    """
    if use_kernel("similarity_softmax", backend, x, size=len(x), fits=not _wants_gradient(x, c, logit_scale)):
        from miniclip.kernels.similarity import similarity_softmax as kernel

        return kernel(x, c, logit_scale)
    return _scaled_cosines(x, c, logit_scale).softmax(dim=1)


def similarity_topk(
    x: Tensor, c: Tensor, logit_scale: Tensor, k: int, *, backend: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The k best classes of `similarity_softmax`; the kernel never has the N x M logits in memory.

    Returns (probability [N, k], best first; index int64 [N, k]; lse [N], the logarithm of the softmax's denominator).
    Where logits are equal the lower index comes first. A NaN counts as the largest logit, as for torch.topk, and makes
    the row's probabilities NaN.
    """
    fits = k <= 16 and not _wants_gradient(x, c, logit_scale)
    if use_kernel("similarity_topk", backend, x, size=len(x), fits=fits):
        from miniclip.kernels.similarity import similarity_topk as kernel

        return kernel(x, c, logit_scale, k)
    if not 1 <= k <= len(c):
        raise ValueError(f"k is {k}; expected 1 to {len(c)}, the number of classes")
    logits = _scaled_cosines(x, c, logit_scale)
    index = logits.sort(dim=1, descending=True, stable=True).indices[:, :k]  # torch.topk may order equals as it likes
    return logits.softmax(dim=1).gather(1, index), index, logits.logsumexp(dim=1)


def _scaled_cosines(x: Tensor, c: Tensor, logit_scale: Tensor) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return logit_scale * F.normalize(x.to(dtype), dim=1) @ F.normalize(c.to(dtype), dim=1).T


def contrastive_loss(image: Tensor, text: Tensor, logit_scale: Tensor, *, backend: str | None = None) -> Tensor:
    """Symmetric InfoNCE (CLIP paper, figure 3): each image picks its text out of the batch, each text its image.

    image, text: [N, E], of unit length; row i of both is a pair. logit_scale: scalar tensor, the multiplier of the
    cosines, exp(model.logit_scale). Returns a scalar, ln N where the model cannot tell the pairs apart.

    Everything is computed in logit_scale's dtype, also under autocast. The kernel has no N x N matrix in memory.
    """
    if len(image) != len(text) or len(image) == 0:
        raise ValueError(f"got {len(image)} images and {len(text)} texts; expected pairs, at least one")
    if use_kernel("contrastive_loss", backend, image, size=len(image), fits=image.shape[1] <= 1024):
        from miniclip.kernels.contrastive_loss import contrastive_loss as kernel

        return kernel(image, text, logit_scale)
    with torch.autocast(image.device.type, enabled=False):
        logits = logit_scale * image.to(logit_scale.dtype) @ text.to(logit_scale.dtype).T  # [N images, N texts]
        pairs = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)) / 2
