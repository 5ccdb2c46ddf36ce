"""The ModifiedResNet as inference runs it on a CPU.

Each BatchNorm is folded into the convolution before it, maps are stored with their channels innermost (channels last),
and activations and sums are in place.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miniclip.fast import half
from miniclip.fast.pooled import attend_from_one
from miniclip.models.resnet import AttentionPool, ModifiedResNet


def image_embedding(tower: ModifiedResNet, image: Tensor) -> Tensor:
    """Pixels [N, 3, R, R] in the tower's dtype -> embeddings [N, E], as `tower(image)`."""
    dtype = half.arithmetic(tower.conv1.weight)
    plainly = len(image) == 1 and dtype is image.dtype  # for a single picture folding costs as much as it saves
    return attention_pool(tower.attnpool, tower.features(image) if plainly else features(tower, image.to(dtype)))


def features(tower: ModifiedResNet, image: Tensor) -> Tensor:
    """The last map, as `tower.features`."""
    x = image.contiguous(memory_format=torch.channels_last)
    x = conv_norm(x, tower.conv1, tower.bn1).relu_()
    x = conv_norm(x, tower.conv2, tower.bn2).relu_()
    x = conv_norm(x, tower.conv3, tower.bn3).relu_()
    x = tower.avgpool(x)
    for stage in (tower.layer1, tower.layer2, tower.layer3, tower.layer4):
        for block in stage:
            shortcut = x
            if block.downsample is not None:
                pool, conv, norm = block.downsample
                shortcut = conv_norm(pool(x), conv, norm)
            x = conv_norm(x, block.conv1, block.bn1).relu_()
            x = conv_norm(x, block.conv2, block.bn2).relu_()
            x = conv_norm(block.avgpool(x), block.conv3, block.bn3).add_(shortcut).relu_()
    return x


def conv_norm(x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Tensor:
    """norm(conv(x)), with the norm's scale in the convolution's weight and its shift as the bias."""
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    shift = norm.bias - norm.running_mean * scale
    if conv.bias is not None:
        shift = shift + conv.bias * scale
    weight = conv.weight * scale[:, None, None, None]  # in float32, also where conv.weight has half precision
    return F.conv2d(x, weight.to(x.dtype), shift.to(x.dtype), conv.stride, conv.padding, conv.dilation, conv.groups)


def attention_pool(pool: AttentionPool, x: Tensor) -> Tensor:
    """A map [N, C, h, w] -> [N, E], as `pool(x)`."""
    x = pool.embed(x)  # [N, L, C]
    projections = (pool.q_proj, pool.k_proj, pool.v_proj)
    weights, biases = [layer.weight for layer in projections], [layer.bias for layer in projections]
    pooled, last = attend_from_one(x[:, 0], x, weights, biases, pool.heads), pool.c_proj
    bias = None if last.bias is None else last.bias.to(x.dtype)
    return F.linear(pooled, last.weight.to(x.dtype), bias).to(last.weight.dtype)
