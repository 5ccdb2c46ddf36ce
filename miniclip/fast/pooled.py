"""Attention with a single query for each sequence: in the attention pool, and in a transformer's last block."""

from __future__ import annotations

import torch
from torch import Tensor

from miniclip.fast.linear import Linear, linear


class SingleQueryAttention:
    """Attention from one token of each sequence to all of its tokens, without the output projection.

    With a single query it is cheaper to apply W_k to the query than to all tokens, and W_v to the weighted mean of the
    tokens. Of the score q . (W_k x + b_k), the part q . b_k is the same for all tokens, so softmax cancels it.
    """

    def __init__(self, q: Linear, w_k: Tensor, w_v: Tensor, b_v: Tensor | None, heads: int, dtype: torch.dtype):
        self.query, self.heads = q, heads
        self.w_k, self.w_v = (w.detach().to(dtype).unflatten(0, (heads, -1)) for w in (w_k, w_v))  # [H, D / H, D]
        self.b_v = None if b_v is None else b_v.detach().to(dtype)

    def __call__(self, query: Tensor, x: Tensor, padding: Tensor | None = None) -> Tensor:
        """query [N, D], x [N, L, D] -> [N, D]. padding: bool [N, L], tokens to leave out."""
        q = self.query(query).unflatten(1, (self.heads, -1)).transpose(0, 1)  # [H, N, D / H]
        q = (q * q.shape[-1] ** -0.5 @ self.w_k).transpose(0, 1)  # [N, H, D]
        scores = q @ x.transpose(1, 2)  # [N, H, L]
        if padding is not None:
            scores.masked_fill_(padding[:, None], -torch.inf)
        mean = scores.softmax(dim=-1) @ x  # [N, H, D]
        values = (mean.transpose(0, 1) @ self.w_v.transpose(1, 2)).transpose(0, 1).flatten(1)
        return values if self.b_v is None else values + self.b_v


def in_block(weight: Tensor, bias: Tensor, heads: int, dtype: torch.dtype) -> SingleQueryAttention:
    """That of a transformer's block, from its packed projections."""
    (w_q, w_k, w_v), (b_q, _, b_v) = weight.chunk(3), bias.chunk(3)
    return SingleQueryAttention(linear(w_q, b_q, dtype), w_k, w_v, b_v, heads, dtype)


def in_pool(
    w_q: Tensor, b_q: Tensor | None, w_k: Tensor, w_v: Tensor, b_v: Tensor | None, heads: int, dtype: torch.dtype
) -> SingleQueryAttention:
    """That of an attention pool."""
    return SingleQueryAttention(linear(w_q, b_q, dtype), w_k, w_v, b_v, heads, dtype)
