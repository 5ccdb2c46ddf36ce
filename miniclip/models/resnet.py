"""The ModifiedResNet image tower (CLIP paper, section 2.4). Three things differ from the usual ResNet:

- the stem has three convolutions, and an average instead of a max pool;
- strides are anti-aliased: each convolution has stride 1, and an average pool follows where the map shrinks;
- the last pool is an attention whose one query is the mean of the map.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miniclip.config import ResNetConfig


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions beside a shortcut: [N, C_in, h, w] -> [N, 4 * channels, h / stride, w / stride]."""

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        out_channels = 4 * channels
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.avgpool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        nn.init.zeros_(self.bn3.weight)  # each block starts as its shortcut (Goyal et al. 2017, section 5.1)

        self.downsample = None
        if stride > 1 or in_channels != out_channels:  # so in the first block of every stage, also of the first
            shortcut = nn.Conv2d(in_channels, out_channels, 1, bias=False)
            layers = [("-1", nn.AvgPool2d(stride)), ("0", shortcut), ("1", nn.BatchNorm2d(out_channels))]
            self.downsample = nn.Sequential(OrderedDict(layers))  # the checkpoints name the convolution 0, the norm 1

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = self.bn3(self.conv3(self.avgpool(x)))
        return F.relu(x + shortcut)


class AttentionPool(nn.Module):
    """A map [N, C, h, w] -> [N, E], by multi-head attention from its mean to all its positions and the mean itself."""

    def __init__(self, grid: int, channels: int, heads: int, embed_dim: int):
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.empty(grid**2 + 1, channels))  # the mean's first
        self.q_proj = nn.Linear(channels, channels)
        self.k_proj = nn.Linear(channels, channels)
        self.v_proj = nn.Linear(channels, channels)
        self.c_proj = nn.Linear(channels, embed_dim)
        for layer in (self.q_proj, self.k_proj, self.v_proj, self.c_proj):
            nn.init.normal_(layer.weight, std=channels**-0.5)
        nn.init.normal_(self.positional_embedding, std=channels**-0.5)

    def embed(self, x: Tensor) -> Tensor:
        """[N, C, h, w] -> the sequence [N, 1 + h * w, C] that is attended to, the mean first, then row by row."""
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1)
        return x + self.positional_embedding.to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        q, k, v = self.q_proj(x[:, :1]), self.k_proj(x), self.v_proj(x)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))  # [N, H, L, C / H]
        pooled = F.scaled_dot_product_attention(q, k, v)  # [N, H, 1, C / H]
        return self.c_proj(pooled.flatten(1))


class ModifiedResNet(nn.Module):
    """Pixels [N, 3, R, R] -> image embeddings [N, E]."""

    def __init__(self, config: ResNetConfig, embed_dim: int):
        super().__init__()
        self.input_resolution = config.image_size
        self.output_dim = embed_dim
        width = config.width
        self.conv1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width // 2)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width // 2)
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.avgpool = nn.AvgPool2d(2)

        self.layer1 = self._stage(width, width, config.layers[0], stride=1)
        self.layer2 = self._stage(4 * width, 2 * width, config.layers[1], stride=2)
        self.layer3 = self._stage(8 * width, 4 * width, config.layers[2], stride=2)
        self.layer4 = self._stage(16 * width, 8 * width, config.layers[3], stride=2)
        self.attnpool = AttentionPool(config.image_size // 32, 32 * width, config.heads, embed_dim)

    @staticmethod
    def _stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
        first = Bottleneck(in_channels, channels, stride)
        return nn.Sequential(first, *(Bottleneck(4 * channels, channels, stride=1) for _ in range(blocks - 1)))

    @property
    def blocks(self) -> list[nn.Module]:
        """The modules between the stem and the attention pool, in order: the four stages."""
        return [self.layer1, self.layer2, self.layer3, self.layer4]

    def features(self, image: Tensor) -> Tensor:
        """The last map, [N, 32 * width, R / 32, R / 32]."""
        x = F.relu(self.bn1(self.conv1(image)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(x)))
        x = self.avgpool(x)  # [N, width, R / 4, R / 4]
        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        return self.layer4(x)

    def forward(self, image: Tensor) -> Tensor:
        return self.attnpool(self.features(image))
