"""The transformers as inference runs them on a GPU.

There the cost is the number of passes over memory: each norm goes with the sum before it, and padding is left out.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miniclip import ops
from miniclip.fast.ops import add_layer_norm, attention_varlen, bias_quick_gelu
from miniclip.kernels.dispatch import use_kernel
from miniclip.models.text import TextTransformer
from miniclip.models.vit import VisionTransformer


def image_embedding(tower: VisionTransformer, image: Tensor) -> Tensor:
    """Pixels [N, 3, R, R] in the tower's dtype -> embeddings [N, E], as `tower(image)`."""
    grid = tower.conv1(image).flatten(2).transpose(1, 2)  # [N, L - 1, D]
    class_token = tower.class_embedding.to(grid.dtype).expand(len(grid), 1, -1)
    x = torch.cat([class_token, grid], dim=1) + tower.positional_embedding.to(grid.dtype)
    count, length, width = x.shape
    blocks = tower.transformer.resblocks

    def attend(qkv: Tensor) -> Tensor:
        sequences = qkv.unflatten(0, (count, length))
        return ops.attention(sequences, tower.transformer.causal, backend=blocks[0].attn.backend).flatten(0, 1)

    first = torch.arange(0, count * length, length, device=x.device)
    return tower.ln_post(run_blocks(blocks, tower.ln_pre(x.view(-1, width)), attend, first)) @ tower.proj


def text_embedding(tower: TextTransformer, text: Tensor) -> Tensor:
    """Token ids [N, L] -> embeddings [N, E], as the plain form; `tower.transformer` must be causal."""
    end = text.argmax(dim=-1)
    length = int(end.max()) + 1
    text = text[:, :length]
    is_text = torch.arange(length, device=text.device) <= end[:, None]
    first = is_text.flatten().nonzero().squeeze(1)  # [T], where each token stands in text.flatten()
    sequence = (is_text.flatten().cumsum(0) - 1).view(is_text.shape)  # [N, length], the row of each token
    pooled = sequence.gather(1, end[:, None]).squeeze(1)
    dtype, blocks = tower.text_projection.dtype, tower.transformer.resblocks
    backend = blocks[0].attn.backend
    x = F.embedding(text.flatten()[first], tower.token_embedding.weight).to(dtype)
    x = x + tower.positional_embedding[first % length].to(dtype)

    def attend(qkv: Tensor) -> Tensor:
        if use_kernel("attention_varlen", backend, qkv, size=length):
            starts = F.pad((end + 1).cumsum(0, dtype=torch.int32), (1, 0))
            return attention_varlen(qkv, starts, length, causal=True, backend=backend)
        sequences = qkv.index_select(0, sequence.flatten()).unflatten(0, sequence.shape)
        return ops.attention(sequences, causal=True, backend=backend).flatten(0, 1).index_select(0, first)

    return tower.ln_final(run_blocks(blocks, x, attend, pooled)) @ tower.text_projection


def run_blocks(blocks: nn.ModuleList, x: Tensor, attend: Callable[[Tensor], Tensor], pooled: Tensor) -> Tensor:
    """All blocks over the tokens x [T, D] of all sequences; returns the pooled tokens [N, D].

    attend: packed projections [T, 3, H, D / H] -> [T, D], within each sequence.
    pooled: the row of each sequence's pooled token, [N].
    """
    first, backend = blocks[0].ln_1, blocks[0].attn.backend
    y = ops.layer_norm(x, first.weight, first.bias, first.eps)
    for block, after in zip(blocks, [*blocks[1:], None], strict=True):
        attn, mlp = block.attn, block.mlp
        attended = attend(F.linear(y, attn.in_proj_weight, attn.in_proj_bias).unflatten(1, (3, attn.heads, -1)))
        if after is None:
            attended, x = attended[pooled], x[pooled]
        norm = block.ln_2
        x, y = add_layer_norm(attn.out_proj(attended), x, norm.weight, norm.bias, norm.eps, backend=backend)
        activation = ops.ACTIVATIONS[mlp.activation]
        fits = activation is ops.quick_gelu and mlp.c_fc.bias is not None
        if fits and use_kernel("bias_quick_gelu", backend, y, size=4 * y.numel()):
            hidden = bias_quick_gelu(y @ mlp.c_fc.weight.T, mlp.c_fc.bias, backend=backend)
        else:
            hidden = activation(mlp.c_fc(y))
        y = mlp.c_proj(hidden)
        if after is not None:
            norm = after.ln_1
            x, y = add_layer_norm(y, x, norm.weight, norm.bias, norm.eps, backend=backend)
    return x + y
