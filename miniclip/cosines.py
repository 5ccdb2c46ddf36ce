"""Cosine similarities between embeddings: the softmax over classes, and the best classes of each query.

Zero-shot classification and search call these. On a GPU both can run as Triton kernels; `backend`: see `miniclip.ops`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from miniclip.kernels.dispatch import use_kernel

CHUNK_LOGITS = 1 << 22  # logits that the plain form of similarity_topk holds at a time


def similarity_softmax(x: Tensor, c: Tensor, logit_scale: Tensor, *, backend: str | None = None) -> Tensor:
    """softmax(logit_scale * cosine(x, c)) over the classes: the probabilities of zero-shot classification.

    x: [N, E], c: [M, E], of any length: they are normalised here, and a zero vector's cosines are 0. logit_scale:
    scalar tensor, exp(model.logit_scale). Half-precision input is computed in float32, and the result is float32: at a
    scale of 100 neighbouring bfloat16 logits are 0.5 apart. Returns [N, M].
    """
    if use_kernel("similarity_softmax", backend, x, c, logit_scale):
        from miniclip.kernels.similarity import similarity_softmax as kernel

        return kernel(x, c, logit_scale)
    return (logit_scale * _unit(x, x.dtype) @ _unit(c, x.dtype).T).softmax(dim=1)


def similarity_topk(
    x: Tensor, c: Tensor, logit_scale: Tensor, k: int, *, backend: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The k best classes of `similarity_softmax`. The kernel never holds the N x M logits in memory.

    Returns (probability [N, k], best first; index int64 [N, k]; lse [N], the logarithm of the softmax's denominator).
    Where logits are equal the lower index comes first. A NaN counts as the largest logit, as for torch.topk, and makes
    the row's probabilities NaN.
    """
    if use_kernel("similarity_topk", backend, x, c, logit_scale, k):
        from miniclip.kernels.similarity import similarity_topk as kernel

        return kernel(x, c, logit_scale, k)
    if not 1 <= k <= len(c):
        raise ValueError(f"k is {k}; expected 1 to {len(c)}, the number of classes")
    rows, classes = max(1, CHUNK_LOGITS // len(c)), _unit(c, x.dtype).T
    parts = [_topk(logit_scale * _unit(part, x.dtype) @ classes, k) for part in x.split(rows)]
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


def beside(logit_scale: Tensor, *embeddings: Tensor) -> tuple[Tensor, ...]:
    """Unit embeddings [N, E] where the scale is: that is the model's device, whose similarities are computed there.

    On a GPU they are in float16, which the kernels take; the logits of float16 models are off by as much.
    """
    dtype = torch.float16 if logit_scale.is_cuda else torch.float32
    return tuple(x.to(logit_scale.device, dtype) for x in embeddings)


def _topk(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    index = _best(logits.detach(), k)
    largest = logits.detach().amax(1)  # apart from the sum: the rounding of their logsumexp would show
    total = (logits - largest[:, None]).exp().sum(1)
    probability = (logits.gather(1, index) - largest[:, None]).exp() / total[:, None]
    return probability, index, largest + total.log()


def _best(logits: Tensor, k: int) -> Tensor:
    """The columns of the k largest of each row, best first, the lower column first where they are equal.

    Which of equal ones torch.topk takes is not defined, so only its k-th value is used. Sorting rows would take longer.
    """
    last = logits.topk(k).values[:, -1:]  # NaN counts as the largest
    is_nan, last_is_nan = logits.isnan(), last.isnan()
    above = ((logits > last) | is_nan) & ~last_is_nan
    equal = (logits == last) | (is_nan & last_is_nan)
    count = logits.shape[1]
    places = (above * 2 + equal * 1) * count - torch.arange(count, device=logits.device)  # int64, no two alike
    index = places.topk(k).indices.sort(dim=1).values
    return index.gather(1, logits.gather(1, index).sort(dim=1, descending=True, stable=True).indices)


def _unit(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x [N, E], each row of unit length, in this dtype, but at least in float32."""
    return F.normalize(x.to(torch.promote_types(dtype, torch.float32)), dim=1)
