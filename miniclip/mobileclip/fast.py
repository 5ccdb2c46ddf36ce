"""MobileCLIP's towers as inference runs them on a CPU; towers.py has the architecture. What is saved:

- Maps are [N, h, w, C], the channels innermost: a 1 x 1 convolution is then one matrix product over all positions.
- Convolutions and products are packed once, and apply GELU and add residuals themselves.
- There is no good CPU kernel for a grouped convolution with two outputs for each channel. Its input channels are
  repeated, which makes it a depthwise convolution: 3 to 5 times as fast.
- In the text tower's last block only the end-of-text token is a query, and only it goes through the MLP.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miniclip import ops
from miniclip.fast import text as text_tower
from miniclip.fast.blocks import Arithmetic, run_blocks
from miniclip.fast.clip import FastCLIP, Form
from miniclip.fast.conv import Conv, Geometry, conv
from miniclip.fast.linear import Linear, Norm, linear, norm
from miniclip.fast.pooled import SingleQueryAttention
from miniclip.fast.untouched import FORWARD
from miniclip.mobileclip import towers as plain

# How much is computed at a time. Measured on an AMD EPYC, two cores: the system clears the memory of larger tensors.
PICTURES = 8
TEXTS = 32

# MobileCLIP's modules whose arithmetic is repeated here.
KNOWN = (plain.MCi, plain.Stage, plain.Downsample, plain.SqueezeExcite, plain.ConvBlock, plain.ConvMLP)
KNOWN += (plain.MapAttentionBlock, plain.MapAttention, plain.MapLayerNorm)
FORWARD.update({kind: kind.forward for kind in KNOWN})


class Depthwise(NamedTuple):
    """A convolution of which each input channel is repeated first."""

    conv: Conv
    repeats: int


class Affine(NamedTuple):
    """A BatchNorm: one factor and one summand for each channel."""

    factor: Tensor
    summand: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.summand, x, self.factor)


class SqueezeExcite(NamedTuple):
    reduce: Linear
    expand: Linear


class MLP(NamedTuple):
    conv: Depthwise
    fc1: Linear
    fc2: Linear


class Block(NamedTuple):
    """A ConvBlock, which has a mixer, or a MapAttentionBlock, which has the other three."""

    mixer: Depthwise | None
    norm: Norm | Affine | None
    in_proj: Linear | None
    out_proj: Linear | None
    mlp: MLP


class Stage(NamedTuple):
    down: Depthwise | None
    squeeze: SqueezeExcite | None
    pointwise: Linear | None
    position: Depthwise | None
    blocks: list[Block]


class PreparedMCi(NamedTuple):
    """What inference needs of an MCi tower; the classes above are what it needs of the tower's parts."""

    dtype: torch.dtype  # of the embeddings
    computed: torch.dtype
    stem: tuple[Depthwise, Depthwise, Linear]
    stages: list[Stage]
    last: Depthwise
    squeeze: SqueezeExcite
    proj: Linear


def prepare_image(tower: plain.MCi, derive: Callable, arithmetic: Arithmetic) -> PreparedMCi:
    """derive: see `Prepared.get`."""
    dtype = arithmetic.dtype

    def convolution(layer: nn.Conv2d, size: int) -> Depthwise:
        groups, outputs = layer.groups, len(layer.weight)
        repeats = outputs // groups if 1 < groups < outputs else 1
        geometry = Geometry.of(layer)._replace(groups=groups * repeats)
        return Depthwise(derive(conv, layer.weight, layer.bias, dtype, geometry, size, size), repeats)

    def product(layer: nn.Conv2d | nn.Linear) -> Linear:
        return derive(linear, layer.weight, layer.bias, dtype)

    def squeeze_excite(layer: nn.Module) -> SqueezeExcite | None:
        if isinstance(layer, plain.SqueezeExcite):
            return SqueezeExcite(product(layer.reduce), product(layer.expand))
        return None

    def mlp(layer: plain.ConvMLP, size: int) -> MLP:
        return MLP(convolution(layer.conv, size), product(layer.fc1), product(layer.fc2))

    def block(layer: plain.ConvBlock | plain.MapAttentionBlock, size: int) -> Block:
        if isinstance(layer, plain.ConvBlock):
            return Block(convolution(layer.mixer, size), None, None, None, mlp(layer.mlp, size))
        before = layer.norm
        if isinstance(before, nn.BatchNorm2d):
            tensors = before.weight, before.bias, before.running_mean, before.running_var
            before = derive(_affine, *tensors, before.eps, dtype)
        else:
            before = derive(norm, before.weight, before.bias, before.eps)
        return Block(None, before, product(layer.attn.in_proj), product(layer.attn.out_proj), mlp(layer.mlp, size))

    first, second, third = tower.stem
    size = tower.input_resolution // 2
    stem = convolution(first, 2 * size), convolution(second, size), product(third)
    size, stages = size // 2, []
    for stage in tower.stages:
        down = squeeze = pointwise = position = None
        if isinstance(stage.downsample, plain.Downsample):
            down, squeeze = convolution(stage.downsample.conv, size), squeeze_excite(stage.downsample.se)
            pointwise, size = product(stage.downsample.pointwise), size // 2
        if isinstance(stage.position, nn.Conv2d):
            position = convolution(stage.position, size)
        stages.append(Stage(down, squeeze, pointwise, position, [block(layer, size) for layer in stage.blocks]))
    last, squeeze, proj = convolution(tower.last, size), squeeze_excite(tower.se), product(tower.proj)
    return PreparedMCi(tower.proj.weight.dtype, dtype, stem, stages, last, squeeze, proj)


def _affine(weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, eps: float, dtype: torch.dtype) -> Affine:
    factor = weight * torch.rsqrt(variance + eps)
    return Affine(factor.to(dtype), (bias - mean * factor).to(dtype))


def image_embedding(tower: PreparedMCi, image: Tensor) -> Tensor:
    """Pixels [N, 3, R, R] -> embeddings [N, E], as an MCi tower."""
    return torch.cat([_mci(tower, pixels) for pixels in image.split(PICTURES)])


def _mci(tower: PreparedMCi, image: Tensor) -> Tensor:
    first, second, third = tower.stem
    x = image.to(tower.computed, memory_format=torch.channels_last).permute(0, 2, 3, 1)
    x = _linear(third, _conv(second, _conv(first, x, "gelu"), "gelu"), "gelu")
    for stage in tower.stages:
        x = _stage(stage, x)
    x = F.gelu(_squeeze_excite(tower.squeeze, _conv(tower.last, x)))
    return tower.proj(x.mean(dim=(1, 2))).to(tower.dtype)


def _stage(stage: Stage, x: Tensor) -> Tensor:
    if stage.down:
        x = _conv(stage.down, x, "none" if stage.squeeze else "gelu")
        if stage.squeeze:
            x = torch.ops.aten.gelu_(_squeeze_excite(stage.squeeze, x))
        x = _linear(stage.pointwise, x, "gelu")
    if stage.position:
        x = _conv(stage.position, x)
    for block in stage.blocks:
        if block.mixer:
            x = _conv(block.mixer, x)
        else:
            tokens = block.norm(x.flatten(1, 2))  # [N, h w, C]
            qkv = _linear(block.in_proj, tokens).unflatten(-1, (3, -1, plain.HEAD_WIDTH))
            attended = ops.attention(qkv, backend="torch")
            x = block.out_proj.add(attended.flatten(0, 1), x.reshape(-1, x.shape[-1])).view(x.shape)
        x = _add_mlp(x, block.mlp)
    return x


def _add_mlp(x: Tensor, mlp: MLP) -> Tensor:
    """x + mlp(x), of x [N, h, w, C]."""
    y, total = (maps.reshape(-1, maps.shape[-1]) for maps in (_conv(mlp.conv, x), x))
    return mlp.fc2.add(mlp.fc1(y, "gelu"), total).view(x.shape)


def _linear(layer: Linear, x: Tensor, activation: str = "none") -> Tensor:
    """A 1 x 1 convolution of [..., C]."""
    return layer(x.reshape(-1, x.shape[-1]), activation).unflatten(0, x.shape[:-1])


def _conv(layer: Depthwise, x: Tensor, activation: str = "none") -> Tensor:
    """A convolution of [N, h, w, C] -> [N, h', w', C'], contiguous, in new memory."""
    if layer.repeats > 1:
        x = x.repeat_interleave(layer.repeats, dim=3)
    x = layer.conv(x.permute(0, 3, 1, 2), activation)
    return x.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)


def _squeeze_excite(layer: SqueezeExcite, x: Tensor) -> Tensor:
    weights = torch.sigmoid(layer.expand(layer.reduce(x.mean(dim=(1, 2)), "relu")))
    return x.mul_(weights[:, None, None])


def text_embedding(tower: text_tower.PreparedText, text: Tensor) -> Tensor:
    """Token ids [N, 77] -> embeddings [N, E], of a tower that is not causal: all tokens count, padding too."""
    return torch.cat([_text(tower, ids) for ids in text.split(TEXTS)])


def _text(tower: text_tower.PreparedText, text: Tensor) -> Tensor:
    x = F.embedding(text, tower.tokens).to(tower.positions.dtype).add_(tower.positions)
    pooled = torch.arange(0, text.numel(), text.shape[1]) + text.argmax(dim=-1)

    def attend(qkv: Tensor) -> Tensor:
        return ops.attention(qkv.view(*text.shape, 3, tower.heads, -1), backend="torch").flatten(0, 1)

    def attend_from_pooled(attention: SingleQueryAttention, y: Tensor) -> Tensor:
        return attention(y[pooled], y.unflatten(0, text.shape))

    x = run_blocks(tower.blocks, x.flatten(0, 1), attend, attend_from_pooled, pooled)
    return tower.proj(tower.norm(x)).to(tower.dtype)


class FastMobileCLIP(FastCLIP, plain.MobileCLIP):
    """A MobileCLIP whose towers run in the forms above, or in CLIP's, where these apply."""

    image_forms: ClassVar = {**FastCLIP.image_forms, plain.MCi: Form(prepare_image, image_embedding)}
    text_forms: ClassVar = {**FastCLIP.text_forms, False: Form(text_tower.prepare, text_embedding)}
