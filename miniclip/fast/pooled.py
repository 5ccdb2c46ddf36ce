"""Attention with a single query for each sequence: in the attention pool, and in a transformer's last block."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from miniclip.models.transformer import Attention


def attend_from_one(
    query: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    heads: int,
    padding: Tensor | None = None,
) -> Tensor:
    """Attention from one token of each sequence, query [N, D], to all tokens of it, x [N, L, D].

    weights, biases: of the projections of queries, keys and values. padding: bool [N, L], tokens to leave out.
    Returns [N, D], before the output projection.

    With a single query it is cheaper to apply W_k to the query than to all tokens, and W_v to the weighted mean of the
    tokens. Of the score q . (W_k x + b_k), the part q . b_k is the same for all tokens, so softmax cancels it.
    """
    w_q, w_k, w_v = (weight.to(x.dtype) for weight in weights)
    w_k, w_v = w_k.unflatten(0, (heads, -1)), w_v.unflatten(0, (heads, -1))  # [H, D / H, D]
    b_q, _, b_v = (None if bias is None else bias.to(x.dtype) for bias in biases)
    q = F.linear(query, w_q, b_q).unflatten(1, (heads, -1))  # [N, H, D / H]
    scores = torch.einsum("nhd,hdc->nhc", q * q.shape[-1] ** -0.5, w_k) @ x.transpose(1, 2)  # [N, H, L]
    if padding is not None:
        scores.masked_fill_(padding[:, None], -torch.inf)
    mean = scores.softmax(dim=-1) @ x  # [N, H, D]
    values = torch.einsum("nhc,hdc->nhd", mean, w_v).flatten(1)
    return values if b_v is None else values + b_v


def in_proj(attn: Attention) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """The weights and the biases of the projections of queries, keys and values."""
    return attn.in_proj_weight.chunk(3), attn.in_proj_bias.chunk(3)
