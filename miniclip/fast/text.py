"""The causal text transformer as inference runs it on a CPU. What is saved:

- Padding: only the tokens up to each text's end are computed. Exact where attention is causal, and only there.
- Prefixes: where texts begin alike, as prompts made from a template do, the common tokens are computed once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from miniclip import ops
from miniclip.fast import half
from miniclip.fast.blocks import norm, project, run_blocks
from miniclip.fast.pooled import attend_from_one, in_proj
from miniclip.models.text import TextTransformer
from miniclip.models.transformer import Attention


def text_embedding(tower: TextTransformer, text: Tensor) -> Tensor:
    """Token ids [N, L] -> embeddings [N, E], as the plain form; `tower.transformer` must be causal."""
    end = text.argmax(dim=-1)
    length = int(end.max()) + 1
    text = text[:, :length]
    prefix, first = distinct_prefixes(text, end)  # [N, length]; [T]
    pooled = prefix.gather(1, end[:, None]).squeeze(1)
    padding = torch.arange(length) > end[:, None]
    dtype = half.arithmetic(tower.text_projection)
    x = F.embedding(text.flatten()[first], tower.token_embedding.weight).to(dtype)
    x = x + tower.positional_embedding[first % length].to(dtype)

    def attend(qkv: Tensor) -> Tensor:
        sequences = qkv.index_select(0, prefix.flatten()).unflatten(0, prefix.shape)
        return ops.attention(sequences, causal=True).flatten(0, 1).index_select(0, first)

    def attend_from_pooled(attn: Attention, y: Tensor) -> Tensor:
        return attend_from_one(y[pooled], y[prefix], *in_proj(attn), attn.heads, padding)

    x = run_blocks(tower.transformer.resblocks, x, attend, attend_from_pooled, pooled)
    return project(norm(tower.ln_final, x), tower.text_projection)


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
