"""The ModifiedResNet as inference runs it on a CPU: each BatchNorm is folded into the convolution before it, which also
adds the shortcut and applies ReLU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from miniclip.fast.blocks import Arithmetic
from miniclip.fast.conv import Conv, Geometry, conv_norm
from miniclip.fast.linear import Linear, linear
from miniclip.fast.pooled import SingleQueryAttention, in_pool
from miniclip.models.resnet import AttentionPool, Bottleneck, ModifiedResNet


class PreparedBottleneck(NamedTuple):
    """What inference needs of a Bottleneck."""

    first: Conv
    second: Conv
    pool: nn.Module
    third: Conv
    shortcut: tuple[nn.Module, Conv] | None  # pool, convolution; None: the input itself


class PreparedPool(NamedTuple):
    """What inference needs of an AttentionPool."""

    positions: Tensor  # [L, C], the mean's first
    attention: SingleQueryAttention
    proj: Linear


class PreparedResNet(NamedTuple):
    """What inference needs of a ModifiedResNet."""

    dtype: torch.dtype  # of the embeddings
    computed: torch.dtype
    stem: list[Conv]
    stem_pool: nn.Module
    blocks: list[PreparedBottleneck]
    attention_pool: PreparedPool


def prepare(tower: ModifiedResNet, derive: Callable, arithmetic: Arithmetic) -> PreparedResNet:
    """derive: see `Prepared.get`."""
    dtype, size = arithmetic.dtype, tower.input_resolution
    layers = ((tower.conv1, tower.bn1), (tower.conv2, tower.bn2), (tower.conv3, tower.bn3))
    stem = [_conv_norm(derive, *layer, dtype, size if layer is layers[0] else size // 2) for layer in layers]
    blocks, size = [], size // 4
    for stage in (tower.layer1, tower.layer2, tower.layer3, tower.layer4):
        for block in stage:
            blocks.append(_bottleneck(derive, block, dtype, size))
            size //= block.avgpool.kernel_size if isinstance(block.avgpool, nn.AvgPool2d) else 1
    pool = prepare_pool(tower.attnpool, derive, dtype)
    return PreparedResNet(tower.attnpool.c_proj.weight.dtype, dtype, stem, tower.avgpool, blocks, pool)


def _bottleneck(derive: Callable, block: Bottleneck, dtype: torch.dtype, size: int) -> PreparedBottleneck:
    smaller = size // (block.avgpool.kernel_size if isinstance(block.avgpool, nn.AvgPool2d) else 1)
    shortcut = None
    if block.downsample is not None:
        pool, layer, norm = block.downsample
        shortcut = pool, _conv_norm(derive, layer, norm, dtype, smaller)
    return PreparedBottleneck(
        _conv_norm(derive, block.conv1, block.bn1, dtype, size),
        _conv_norm(derive, block.conv2, block.bn2, dtype, size),
        block.avgpool,
        _conv_norm(derive, block.conv3, block.bn3, dtype, smaller),
        shortcut,
    )


def _conv_norm(derive: Callable, layer: nn.Conv2d, norm: nn.BatchNorm2d, dtype: torch.dtype, size: int) -> Conv:
    tensors = layer.weight, layer.bias, norm.weight, norm.bias, norm.running_mean, norm.running_var
    return derive(conv_norm, *tensors, norm.eps, dtype, Geometry.of(layer), size, size)


def prepare_pool(pool: AttentionPool, derive: Callable, dtype: torch.dtype) -> PreparedPool:
    """derive: see `Prepared.get`."""
    q, k, v, last = pool.q_proj, pool.k_proj, pool.v_proj, pool.c_proj
    return PreparedPool(
        pool.positional_embedding.detach().to(dtype),
        derive(in_pool, q.weight, q.bias, k.weight, v.weight, v.bias, pool.heads, dtype),
        derive(linear, last.weight, last.bias, dtype),
    )


def image_embedding(tower: PreparedResNet, image: Tensor) -> Tensor:
    """Pixels [N, 3, R, R] -> embeddings [N, E], as the tower."""
    return attention_pool(tower.attention_pool, features(tower, image.to(tower.computed))).to(tower.dtype)


def features(tower: PreparedResNet, image: Tensor) -> Tensor:
    """The last map, as `ModifiedResNet.features`."""
    x = image.contiguous(memory_format=torch.channels_last)
    for layer in tower.stem:
        x = layer(x, "relu")
    x = tower.stem_pool(x)
    for block in tower.blocks:
        shortcut = x
        if block.shortcut is not None:
            pool, layer = block.shortcut
            shortcut = layer(pool(x))
        x = block.third.add(block.pool(block.second(block.first(x, "relu"), "relu")), shortcut, "relu")
    return x


def attention_pool(pool: PreparedPool, x: Tensor) -> Tensor:
    """A map [N, C, h, w] -> [N, E], as `AttentionPool`."""
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1) + pool.positions
    return pool.proj(pool.attention(x[:, 0], x))
