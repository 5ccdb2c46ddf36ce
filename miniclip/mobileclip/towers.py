"""MobileCLIP: CLIP with convolutional towers (Vasu et al. 2024; Faghri et al. 2025), folded for inference.

In training, most of these convolutions are sums of several branches, each with a BatchNorm. A sum of convolutions is a
convolution, so the branches are folded into one when a file is read: see `miniclip.mobileclip.names`, which has the
algebra. What is left is below. Letters as in `miniclip.config`; every activation is the exact GELU.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miniclip import ops
from miniclip.config import TransformerConfig, ViTConfig
from miniclip.mobileclip.config import ConvViTConfig, MCiConfig, MobileCLIPConfig
from miniclip.models.clip import CLIP
from miniclip.models.transformer import LayerNorm, Transformer
from miniclip.models.vit import VisionTransformer

HEAD_WIDTH = 32  # of the attention in MCi towers


def conv(inputs: int, outputs: int, kernel: int | tuple[int, int], stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """A convolution with a bias whose output, at stride 1, has its input's size."""
    height, width = kernel if isinstance(kernel, tuple) else (kernel, kernel)
    return nn.Conv2d(inputs, outputs, (height, width), stride, (height // 2, width // 2), groups=groups)


class SqueezeExcite(nn.Module):
    """Squeeze and excitation: scale each channel by a sigmoid of all channels' means (Hu et al. 2018)."""

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.reduce = conv(channels, hidden, 1)
        self.expand = conv(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(dim=(2, 3), keepdim=True)
        return x * torch.sigmoid(self.expand(F.relu(self.reduce(mean))))


class ConvMLP(nn.Module):
    """A depthwise convolution, then at each position two linear layers with GELU between them."""

    def __init__(self, channels: int, kernel: int | tuple[int, int], ratio: int):
        super().__init__()
        self.conv = conv(channels, channels, kernel, groups=channels)
        self.fc1 = conv(channels, ratio * channels, 1)
        self.fc2 = conv(ratio * channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(self.conv(x))))


class ConvBlock(nn.Module):
    """RepMixer: a depthwise convolution mixes positions, with its residual connection folded into it; then an MLP."""

    def __init__(self, channels: int, kernel: int | tuple[int, int], mlp_kernel: int | tuple[int, int], ratio: int):
        super().__init__()
        self.mixer = conv(channels, channels, kernel, groups=channels)
        self.mlp = ConvMLP(channels, mlp_kernel, ratio)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mixer(x)
        return x + self.mlp(x)


class MapAttention(nn.Module):
    """Multi-head self-attention among the positions of a map [N, C, h, w]; queries, keys and values have no bias."""

    def __init__(self, channels: int):
        super().__init__()
        self.in_proj = nn.Linear(channels, 3 * channels, bias=False)
        self.out_proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)  # [N, h * w, C], row by row
        qkv = self.in_proj(tokens).unflatten(-1, (3, -1, HEAD_WIDTH))
        return self.out_proj(ops.attention(qkv, backend="torch")).transpose(1, 2).unflatten(2, x.shape[2:])


class MapLayerNorm(LayerNorm):
    """LayerNorm over the channels of a map [N, C, h, w]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class MapAttentionBlock(nn.Module):
    def __init__(self, channels: int, ratio: int, norm: str):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels) if norm == "batch" else MapLayerNorm(channels)
        self.attn = MapAttention(channels)
        self.mlp = ConvMLP(channels, 7, ratio)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm(x))
        return x + self.mlp(x)


class Downsample(nn.Module):
    """[N, C / 2, h, w] -> [N, C, h / 2, w / 2]."""

    def __init__(self, channels: int, squeeze: bool):
        super().__init__()
        self.conv = conv(channels // 2, channels, 7, stride=2, groups=channels // 2)
        self.se = SqueezeExcite(channels, channels // 4) if squeeze else nn.Identity()
        self.pointwise = conv(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.pointwise(F.gelu(self.se(self.conv(x)))))


class Stage(nn.Module):
    """One resolution: a downsampling, a convolution for positions where blocks attend, and the blocks."""

    def __init__(self, config: MCiConfig, index: int):
        super().__init__()
        channels, attends = config.widths[index], index >= 3
        self.downsample = Downsample(channels, index in config.squeezed) if index else nn.Identity()
        # Attention has no other information about positions.
        self.position = conv(channels, channels, 7, groups=channels) if attends else nn.Identity()
        self.blocks = nn.ModuleList(
            MapAttentionBlock(channels, config.mlp_ratio, config.norm)
            if attends
            else ConvBlock(channels, 3, 7, config.mlp_ratio)
            for _ in range(config.blocks[index])
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.position(self.downsample(x))
        for block in self.blocks:
            x = block(x)
        return x


class MCi(nn.Module):
    """Pixels [N, 3, R, R] -> image embeddings [N, E]."""

    def __init__(self, config: MCiConfig, embed_dim: int):
        super().__init__()
        self.input_resolution = config.image_size
        self.output_dim = embed_dim
        width, channels = config.widths[0], 2 * config.widths[-1]
        layers = (conv(3, width, 3, stride=2), conv(width, width, 3, stride=2, groups=width), conv(width, width, 1))
        self.stem = nn.ModuleList(layers)
        self.stages = nn.ModuleList(Stage(config, index) for index in range(len(config.widths)))
        self.last = conv(channels // 2, channels, 3, groups=channels // 2)
        self.se = SqueezeExcite(channels, channels // 16)
        self.proj = nn.Linear(channels, embed_dim)

    @property
    def blocks(self) -> list[nn.Module]:
        """The modules that run one after another between the first layers and the last: the stages."""
        return list(self.stages)

    def forward(self, image: Tensor) -> Tensor:
        x = image
        for layer in self.stem:
            x = F.gelu(layer(x))  # the last one [N, C, R / 4, R / 4]
        for stage in self.stages:
            x = stage(x)
        x = F.gelu(self.se(self.last(x)))
        return self.proj(x.mean(dim=(2, 3)))


class ConvVisionTransformer(nn.Module):
    """Pixels [N, 3, R, R] -> image embeddings [N, E]: MobileCLIP-B's tower, see `CONV_VIT` beside its config."""

    def __init__(self, config: ConvViTConfig, embed_dim: int):
        super().__init__()
        self.input_resolution = config.image_size
        self.output_dim = embed_dim
        width, narrow = config.transformer.width, config.stem_width
        first = nn.Conv2d(3, narrow, 4, stride=4, padding=config.padding)
        second, last = nn.Conv2d(narrow, narrow, 2, stride=2), nn.Conv2d(narrow, width, 2, stride=2)
        self.stem = nn.ModuleList((first, second, last))
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty((config.image_size // 16) ** 2, width))  # patches alone
        self.transformer = Transformer(config.transformer, length=(config.image_size // 16) ** 2 + 1)
        self.ln_post = LayerNorm(width)
        self.proj = nn.Linear(width, embed_dim)
        for parameter in (self.class_embedding, self.positional_embedding):
            nn.init.normal_(parameter, std=width**-0.5)
        for module in self.modules():
            if isinstance(module, LayerNorm):
                module.eps = config.eps

    @property
    def blocks(self) -> list[nn.Module]:
        """The modules that run one after another between the first layers and the last: the transformer's blocks."""
        return list(self.transformer.resblocks)

    def forward(self, image: Tensor) -> Tensor:
        first, second, last = self.stem  # to 1/4, 1/8 and 1/16 of the resolution
        patches = last(F.gelu(second(F.gelu(first(image))))).flatten(2).transpose(1, 2)  # [N, (R / 16)^2, D]
        patches = patches + self.positional_embedding.to(patches.dtype)
        class_token = self.class_embedding.to(patches.dtype).expand(patches.shape[0], 1, -1)
        x = self.transformer(torch.cat([class_token, patches], dim=1))
        return self.proj(self.ln_post(x[:, 0]))


class BiasedVisionTransformer(VisionTransformer):
    """OpenAI's tower with a bias after the projection: MobileCLIP-L-14's."""

    def __init__(self, config: ViTConfig, embed_dim: int):
        super().__init__(config, embed_dim)
        self.proj_bias = nn.Parameter(torch.zeros(embed_dim))

    def forward(self, image: Tensor) -> Tensor:
        embedding = super().forward(image)
        return embedding + self.proj_bias.to(embedding.dtype)


class TokenConvBlock(ConvBlock):
    """RepMixer over tokens: x [N, L, D] is a map of one row. `causal` is there as in attention blocks, and ignored."""

    def __init__(self, width: int, taps: int):
        super().__init__(width, (1, taps), (1, taps), ratio=4)

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        return super().forward(x.transpose(1, 2).unsqueeze(2)).squeeze(2).transpose(1, 2)


class ConvTransformer(Transformer):
    """A transformer with a convolution block before and after its own blocks, all in one list."""

    def __init__(self, config: TransformerConfig, taps: int, length: int):
        super().__init__(config, length=length)
        self.resblocks.insert(0, TokenConvBlock(config.width, taps))
        self.resblocks.append(TokenConvBlock(config.width, taps))


class MobileCLIP(CLIP):
    """Both towers. Tensors have OpenAI's names wherever OpenAI's CLIP has such a tensor."""

    towers: ClassVar = {MCiConfig: MCi, ConvViTConfig: ConvVisionTransformer, ViTConfig: BiasedVisionTransformer}

    def __init__(self, config: MobileCLIPConfig):
        super().__init__(config)
        if config.text_taps:
            self.transformer = ConvTransformer(config.text.transformer, config.text_taps, self.context_length)
        self.transformer.causal = config.causal

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """As any CLIP's. Where the tower is not causal, padding takes part in the result, and text must be [N, 77]."""
        if not self.transformer.causal and text.shape[1:] != (self.context_length,):
            raise ValueError(
                f"text is {list(text.shape)}; expected [N, {self.context_length}], with the padding that tokenize() "
                "returns: in this model every token attends to it"
            )
        return super().encode_text(text, normalize)
