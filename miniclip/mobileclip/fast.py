"""MobileCLIP's towers as inference runs them on a CPU; towers.py has the architecture. What is saved:

- Maps are [N, h, w, C], the channels innermost: a 1 x 1 convolution is then one matrix product over all positions.
- PyTorch has no good CPU kernel for a grouped convolution with two outputs for each channel. Its input channels are
  repeated, which makes it a depthwise convolution: 3 to 5 times as fast.
- GELU and sums are in place, over as many positions at a time as fit into the processor's cache.
- In the text tower's last block only the end-of-text token is a query, and only it goes through the MLP.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miniclip import ops
from miniclip.fast import half
from miniclip.fast.blocks import norm, project, run_blocks
from miniclip.fast.clip import FastCLIP
from miniclip.fast.pooled import attend_from_one, in_proj
from miniclip.fast.untouched import FORWARD, applies
from miniclip.mobileclip import towers as plain
from miniclip.models.transformer import Attention

# How much is computed at a time. Measured on an AMD EPYC, two cores: the system clears the memory of larger tensors.
PICTURES = 8
TEXTS = 32
HIDDEN = 1 << 19  # numbers in an MLP's hidden tensor: 2 MB of float32

gelu_ = torch.ops.aten.gelu_

# MobileCLIP's modules whose arithmetic is repeated here.
KNOWN = (plain.MCi, plain.Stage, plain.Downsample, plain.SqueezeExcite, plain.ConvBlock, plain.ConvMLP)
KNOWN += (plain.MapAttentionBlock, plain.MapAttention, plain.MapLayerNorm)
FORWARD.update({kind: kind.forward for kind in KNOWN})


def image_embedding(tower: plain.MCi, image: Tensor) -> Tensor:
    """Pixels [N, 3, R, R] in the tower's dtype -> embeddings [N, E], as `tower(image)`."""
    return torch.cat([_mci(tower, pixels) for pixels in image.split(PICTURES)])


def text_embedding(model: plain.MobileCLIP, text: Tensor) -> Tensor:
    """Token ids [N, 77] -> embeddings [N, E], of a tower that is not causal: all tokens count, padding too."""
    return torch.cat([_text(model, ids) for ids in text.split(TEXTS)])


def _text(model: plain.MobileCLIP, text: Tensor) -> Tensor:
    dtype = half.arithmetic(model.text_projection)
    x = model.token_embedding(text).to(dtype).add_(model.positional_embedding)
    first = torch.arange(0, text.numel(), text.shape[1])

    def attend(qkv: Tensor) -> Tensor:
        return ops.attention(qkv.unflatten(0, text.shape), backend="torch").flatten(0, 1)

    def attend_from_pooled(attn: Attention, y: Tensor) -> Tensor:
        return attend_from_one(y[pooled], y.unflatten(0, text.shape), *in_proj(attn), attn.heads)

    pooled = first + text.argmax(dim=-1)
    x = run_blocks(model.transformer.resblocks, x.flatten(0, 1), attend, attend_from_pooled, pooled)
    return project(norm(model.ln_final, x), model.text_projection)


def _mci(tower: plain.MCi, image: Tensor) -> Tensor:
    first, second, last = tower.stem
    image = image.to(half.arithmetic(first.weight), memory_format=torch.channels_last)
    x = gelu_(_conv(first, image.permute(0, 2, 3, 1)))
    x = gelu_(_linear(last, gelu_(_conv(second, x))))
    for stage in tower.stages:
        x = _stage(stage, x)
    x = gelu_(_squeeze_excite(tower.se, _conv(tower.last, x)))
    return _linear(tower.proj, x.mean(dim=(1, 2))).to(tower.proj.weight.dtype)


def _stage(stage: plain.Stage, x: Tensor) -> Tensor:
    if isinstance(stage.downsample, plain.Downsample):
        down = stage.downsample
        x = _conv(down.conv, x)
        if isinstance(down.se, plain.SqueezeExcite):
            x = _squeeze_excite(down.se, x)
        x = gelu_(_linear(down.pointwise, gelu_(x)))
    if isinstance(stage.position, nn.Conv2d):
        x = _conv(stage.position, x)
    for block in stage.blocks:
        if isinstance(block, plain.ConvBlock):
            x = _conv(block.mixer, x)
        else:
            tokens = block.norm(x.permute(0, 3, 1, 2).to(block.norm.weight.dtype)).permute(0, 2, 3, 1).flatten(1, 2)
            qkv = _linear(block.attn.in_proj, tokens.to(x.dtype)).unflatten(-1, (3, -1, plain.HEAD_WIDTH))
            attended = ops.attention(qkv, backend="torch")
            _add_linear(x.view(-1, x.shape[-1]), attended.flatten(0, 1), block.attn.out_proj)
        _add_mlp(x, block.mlp)
    return x


def _add_mlp(x: Tensor, mlp: plain.ConvMLP) -> None:
    """x += mlp(x), of x [N, h, w, C]."""
    y, x = (maps.view(-1, maps.shape[-1]) for maps in (_conv(mlp.conv, x), x))
    count = max(1, HIDDEN // mlp.fc1.out_channels)
    for rows, total in zip(y.split(count), x.split(count), strict=True):
        _add_linear(total, gelu_(_linear(mlp.fc1, rows)), mlp.fc2)


def _add_linear(x: Tensor, y: Tensor, layer: nn.Conv2d | nn.Linear) -> None:
    """x += layer(y), of x [T, C]."""
    if layer.bias is not None:
        x.add_(layer.bias)
    if layer.weight.dtype is x.dtype:
        x.addmm_(y, layer.weight.flatten(1).T)
    else:
        x.add_(half.product(y, layer.weight))


def _linear(layer: nn.Conv2d | nn.Linear, x: Tensor) -> Tensor:
    """A 1 x 1 convolution of [..., C]."""
    if layer.weight.dtype is x.dtype:
        return F.linear(x, layer.weight.flatten(1), layer.bias)
    y = half.product(x, layer.weight)
    return y if layer.bias is None else y.add_(layer.bias)


def _conv(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """A convolution of [N, h, w, C] -> [N, h', w', C'], contiguous, in new memory."""
    weight, groups = layer.weight, layer.groups
    if 1 < groups < len(weight):
        x, groups = x.repeat_interleave(len(weight) // groups, dim=3), len(weight)
    weight, bias = weight.to(x.dtype), None if layer.bias is None else layer.bias.to(x.dtype)
    x = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, layer.stride, layer.padding, groups=groups)
    return x.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)


def _squeeze_excite(layer: plain.SqueezeExcite, x: Tensor) -> Tensor:
    weights = torch.sigmoid(_linear(layer.expand, F.relu(_linear(layer.reduce, x.mean(dim=(1, 2))))))
    return x.mul_(weights[:, None, None])


class FastMobileCLIP(FastCLIP, plain.MobileCLIP):
    """A MobileCLIP whose towers run in the forms above, or in CLIP's, where these apply."""

    image_forms: ClassVar = {**FastCLIP.image_forms, ("cpu", plain.MCi): image_embedding}

    def text_embedding(self, text: Tensor) -> Tensor:
        parts = (self.token_embedding, self.transformer, self.ln_final)
        if self.fast and not self.transformer.causal and text.device.type == "cpu" and applies(text, *parts):
            return text_embedding(self, text)
        return super().text_embedding(text)
