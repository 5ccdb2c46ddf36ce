"""The Vision Transformer image tower (Dosovitskiy et al. 2021, with CLIP's extra LayerNorm before the blocks)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from miniclip.config import ViTConfig
from miniclip.models.transformer import LayerNorm, Transformer


class VisionTransformer(nn.Module):
    """Pixels [N, 3, R, R] -> image embeddings [N, E]."""

    def __init__(self, config: ViTConfig, embed_dim: int):
        super().__init__()
        self.input_resolution = config.image_size
        self.output_dim = embed_dim
        width, grid = config.transformer.width, config.image_size // config.patch_size
        self.conv1 = nn.Conv2d(3, width, config.patch_size, stride=config.patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty(grid**2 + 1, width))  # the class token's first
        self.ln_pre = LayerNorm(width)
        self.transformer = Transformer(config.transformer, length=grid**2 + 1)
        self.ln_post = LayerNorm(width)
        self.proj = nn.Parameter(torch.empty(width, embed_dim))
        for parameter in (self.class_embedding, self.positional_embedding, self.proj):
            nn.init.normal_(parameter, std=width**-0.5)

    @property
    def blocks(self) -> list[nn.Module]:
        """The modules that run one after another between the first layers and the last: the transformer's blocks."""
        return list(self.transformer.resblocks)

    def forward(self, image: Tensor) -> Tensor:
        patches = self.conv1(image).flatten(2).transpose(1, 2)  # [N, (R / P)^2, D], row by row
        class_token = self.class_embedding.to(patches.dtype).expand(patches.shape[0], 1, -1)
        x = torch.cat([class_token, patches], dim=1)
        x = x + self.positional_embedding.to(x.dtype)
        x = self.transformer(self.ln_pre(x))
        return self.ln_post(x[:, 0]) @ self.proj  # the class token is pooled
