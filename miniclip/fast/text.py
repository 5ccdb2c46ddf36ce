"""The causal text transformer as inference runs it on a CPU. What is saved:

- Padding: only the tokens up to each text's end are computed. Exact where attention is causal, and only there.
- Prefixes: where texts begin alike, as prompts made from a template do, the common tokens are computed once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from miniclip import ops
from miniclip.fast.blocks import Arithmetic, Block, prepare_blocks, run_blocks
from miniclip.fast.linear import Linear, Norm, norm, projection
from miniclip.fast.pooled import SingleQueryAttention
from miniclip.models.text import TextTransformer


class PreparedText(NamedTuple):
    """What inference needs of a TextTransformer."""

    dtype: torch.dtype  # of the embeddings
    tokens: Tensor  # [vocabulary, D]
    positions: Tensor  # [77, D], in the dtype that is computed in
    heads: int
    blocks: list[Block]
    norm: Norm
    proj: Linear


def prepare(tower: TextTransformer, derive: Callable, arithmetic: Arithmetic) -> PreparedText:
    """derive: see `Prepared.get`."""
    blocks, last = tower.transformer.resblocks, tower.ln_final
    return PreparedText(
        tower.text_projection.dtype,
        tower.token_embedding.weight.detach(),
        tower.positional_embedding.detach().to(arithmetic.dtype),
        blocks[0].attn.heads,
        prepare_blocks(blocks, derive, arithmetic),
        derive(norm, last.weight, last.bias, last.eps),
        derive(projection, tower.text_projection, arithmetic.dtype),
    )


def text_embedding(tower: PreparedText, text: Tensor) -> Tensor:
    """Token ids [N, L] -> embeddings [N, E], as a causal tower."""
    end = text.argmax(dim=-1)
    length = int(end.max()) + 1
    text = text[:, :length]
    prefix, first = distinct_prefixes(text, end)  # [N, length]; [T]
    pooled = prefix.gather(1, end[:, None]).squeeze(1)
    padding = torch.arange(length) > end[:, None]
    x = F.embedding(text.flatten()[first], tower.tokens).to(tower.positions.dtype)
    x = x + tower.positions[first % length]

    def attend(qkv: Tensor) -> Tensor:
        sequences = qkv.index_select(0, prefix.flatten()).view(*prefix.shape, 3, tower.heads, -1)
        return ops.attention(sequences, causal=True).flatten(0, 1).index_select(0, first)

    def attend_from_pooled(attention: SingleQueryAttention, y: Tensor) -> Tensor:
        return attention(y[pooled], y[prefix], padding)

    x = run_blocks(tower.blocks, x, attend, attend_from_pooled, pooled)
    return tower.proj(tower.norm(x)).to(tower.dtype)


def distinct_prefixes(text: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """What has to be computed of texts [N, L] whose end-of-text tokens are at `end` [N].

    Attention is causal: a token's result depends only on the ids up to it. Two tokens are the same where their texts
    agree up to and including them; T tokens differ. Returns, for each token of each text, which of the T it is, [N, L]
    (padding counts as its text's end), and for each of the T, where it first occurs in text.flatten(), [T].
    """
    count, length = text.shape
    is_text = torch.arange(length) <= end[:, None]
    if count == 1:
        return (is_text.flatten().cumsum(0) - 1).view(1, length), is_text.flatten().nonzero().squeeze(1)
    prefix, found, columns = torch.zeros_like(end), 0, []
    for position, ids in enumerate(text.long().T):
        rows = is_text[:, position].nonzero().squeeze(1)
        longer, inverse = torch.unique(prefix[rows] << 32 | ids[rows], return_inverse=True)
        prefix = prefix.index_copy(0, rows, found + inverse)
        found += len(longer)
        columns.append(prefix)
    prefix = torch.stack(columns, dim=1)
    positions = torch.arange(prefix.numel())
    first = positions.new_empty(found).scatter_reduce_(0, prefix.flatten(), positions, "amin", include_self=False)
    return prefix, first
