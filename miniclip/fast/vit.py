"""The Vision Transformer as inference runs it on a CPU. The patch embedding is one matrix product."""

from __future__ import annotations

import torch
from torch import Tensor

from miniclip import ops
from miniclip.fast import half
from miniclip.fast.blocks import norm, project, run_blocks
from miniclip.fast.pooled import attend_from_one, in_proj
from miniclip.models.transformer import Attention
from miniclip.models.vit import VisionTransformer


def image_embedding(tower: VisionTransformer, image: Tensor) -> Tensor:
    """Pixels [N, 3, R, R] in the tower's dtype -> embeddings [N, E], as `tower(image)`."""
    x = _tokens(tower, image)
    count, length, width = x.shape
    causal, blocks = tower.transformer.causal, tower.transformer.resblocks

    def attend(qkv: Tensor) -> Tensor:
        return ops.attention(qkv.unflatten(0, (count, length)), causal).flatten(0, 1)

    def attend_from_pooled(attn: Attention, y: Tensor) -> Tensor:
        y = y.view(count, length, width)
        return attend_from_one(y[:, 0], y[:, :1] if causal else y, *in_proj(attn), attn.heads)

    x = norm(tower.ln_pre, x.view(-1, width))
    x = run_blocks(blocks, x, attend, attend_from_pooled, torch.arange(0, len(x), length))
    return project(norm(tower.ln_post, x), tower.proj)


def _tokens(tower: VisionTransformer, image: Tensor) -> Tensor:
    """The class token and the patches, with their positions: [N, L, D]."""
    weight, bias, (down, right) = tower.conv1.weight, tower.conv1.bias, tower.conv1.stride  # [D, 3, P, P]; [D]; P, P
    patch = weight.shape[-1]
    image = image.to(half.arithmetic(weight))
    patches = image.unfold(2, patch, down).unfold(3, patch, right).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    same = weight.dtype is image.dtype
    grid = patches @ weight.flatten(1).T if same else half.product(patches, weight)  # [N, L - 1, D]
    if bias is not None:
        grid += bias
    class_token = (tower.class_embedding + tower.positional_embedding[0]).to(grid.dtype)
    grid += tower.positional_embedding[1:].to(grid.dtype)
    return torch.cat([class_token.expand(len(grid), 1, -1), grid], dim=1)
