"""The Vision Transformer as inference runs it on a CPU. The patch embedding is one matrix product."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from miniclip import ops
from miniclip.fast.blocks import Arithmetic, Block, prepare_blocks, run_blocks
from miniclip.fast.linear import Linear, Norm, linear, norm, projection
from miniclip.fast.pooled import SingleQueryAttention
from miniclip.models.vit import VisionTransformer


class PreparedViT(NamedTuple):
    """What inference needs of a VisionTransformer."""

    dtype: torch.dtype  # of the embeddings
    computed: torch.dtype
    patch: tuple[int, int, int]  # side, step down, step right
    embed: Linear
    class_token: Tensor  # [D], with its position
    positions: Tensor  # of the patches, [L - 1, D]
    norm_pre: Norm
    causal: bool
    heads: int
    blocks: list[Block]
    norm_post: Norm
    proj: Linear


def prepare(tower: VisionTransformer, derive: Callable, arithmetic: Arithmetic) -> PreparedViT:
    """derive: see `Prepared.get`."""
    conv, first, last = tower.conv1, tower.ln_pre, tower.ln_post
    dtype = arithmetic.dtype
    class_token, positions = derive(_positions, tower.class_embedding, tower.positional_embedding, dtype)
    return PreparedViT(
        tower.proj.dtype,
        dtype,
        (conv.kernel_size[0], *conv.stride),
        derive(linear, conv.weight, conv.bias, dtype),
        class_token,
        positions,
        derive(norm, first.weight, first.bias, first.eps),
        tower.transformer.causal,
        tower.transformer.resblocks[0].attn.heads,
        prepare_blocks(tower.transformer.resblocks, derive, arithmetic),
        derive(norm, last.weight, last.bias, last.eps),
        derive(projection, tower.proj, dtype),
    )


def _positions(class_embedding: Tensor, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return (class_embedding + positions[0]).to(dtype), positions[1:].to(dtype)


def image_embedding(tower: PreparedViT, image: Tensor) -> Tensor:
    """Pixels [N, 3, R, R] -> embeddings [N, E], as the tower."""
    x = _tokens(tower, image)
    count, length, width = x.shape

    def attend(qkv: Tensor) -> Tensor:
        return ops.attention(qkv.view(count, length, 3, tower.heads, -1), tower.causal).flatten(0, 1)

    def attend_from_pooled(attention: SingleQueryAttention, y: Tensor) -> Tensor:
        y = y.view(count, length, width)
        return attention(y[:, 0], y[:, :1] if tower.causal else y)

    x = tower.norm_pre(x.view(-1, width))
    x = run_blocks(tower.blocks, x, attend, attend_from_pooled, torch.arange(0, len(x), length))
    return tower.proj(tower.norm_post(x)).to(tower.dtype)


def _tokens(tower: PreparedViT, image: Tensor) -> Tensor:
    """The class token and the patches, with their positions: [N, L, D]."""
    side, down, right = tower.patch
    patches = image.to(tower.computed).unfold(2, side, down).unfold(3, side, right).permute(0, 2, 3, 1, 4, 5)
    grid = tower.embed(patches.reshape(-1, 3 * side * side)).view(len(image), -1, len(tower.class_token))
    x = grid.new_empty(len(grid), 1 + grid.shape[1], grid.shape[2])
    x[:, 0] = tower.class_token
    torch.add(grid, tower.positions, out=x[:, 1:])
    return x
