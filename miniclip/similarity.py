"""Cosine similarities between embeddings: the softmax over classes, and the best classes of each query.

Zero-shot classification and search call these. On a GPU both can run as Triton kernels; `backend`: see `miniclip.ops`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from miniclip.kernels.dispatch import use_kernel, wants_gradient


def similarity_softmax(x: Tensor, c: Tensor, logit_scale: Tensor, *, backend: str | None = None) -> Tensor:
    """softmax(logit_scale * cosine(x, c)) over the classes: the probabilities of zero-shot classification.

    x: [N, E], c: [M, E], of any length: they are normalised here, and a zero vector's cosines are 0. logit_scale:
    scalar tensor, exp(model.logit_scale). Half-precision input is computed in float32, and the result is float32: at a
    scale of 100 neighbouring bfloat16 logits are 0.5 apart. Returns [N, M].
    """
    if use_kernel("similarity_softmax", backend, x, size=len(x), fits=not wants_gradient(x, c, logit_scale)):
        from miniclip.kernels.similarity import similarity_softmax as kernel

        return kernel(x, c, logit_scale)
    return _scaled_cosines(x, c, logit_scale).softmax(dim=1)


def similarity_topk(
    x: Tensor, c: Tensor, logit_scale: Tensor, k: int, *, backend: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The k best classes of `similarity_softmax`. The kernel never holds the N x M logits in memory.

    Returns (probability [N, k], best first; index int64 [N, k]; lse [N], the logarithm of the softmax's denominator).
    Where logits are equal the lower index comes first. A NaN counts as the largest logit, as for torch.topk, and makes
    the row's probabilities NaN.
    """
    fits = k <= 16 and not wants_gradient(x, c, logit_scale)
    if use_kernel("similarity_topk", backend, x, size=len(x), fits=fits):
        from miniclip.kernels.similarity import similarity_topk as kernel

        return kernel(x, c, logit_scale, k)
    if not 1 <= k <= len(c):
        raise ValueError(f"k is {k}; expected 1 to {len(c)}, the number of classes")
    logits = _scaled_cosines(x, c, logit_scale)
    index = logits.sort(dim=1, descending=True, stable=True).indices[:, :k]  # torch.topk orders equal logits at will
    return logits.softmax(dim=1).gather(1, index), index, logits.logsumexp(dim=1)


def _scaled_cosines(x: Tensor, c: Tensor, logit_scale: Tensor) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return logit_scale * F.normalize(x.to(dtype), dim=1) @ F.normalize(c.to(dtype), dim=1).T
