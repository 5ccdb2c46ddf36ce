"""MobileCLIP's towers as inference runs them on a CPU: see `miniclip.fast.towers`, and read mobileclip.py first.

What is saved:

- Maps are [N, h, w, C], the channels side by side: a 1 x 1 convolution is then a matrix product over all positions.
- Where a convolution of each channel has two outputs, it is given each channel twice, and so has one output for each:
  for the other kind PyTorch has no good kernel on a CPU, and it takes 3 to 5 times as long.
- GELU and sums are computed in place, of as many positions at a time as stay in the processor's cache.
- In the text tower's last block only the end token goes on after attention.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miniclip import ops
from miniclip.fast import half
from miniclip.fast import towers as inference
from miniclip.fast.clip import FastCLIP
from miniclip.mobileclip import towers as plain
from miniclip.models.transformer import Attention

# Measured on an AMD EPYC, two cores. Tensors of more at a time are so large that the system clears memory for each.
PICTURES = 8  # at a time
TEXTS = 32  # at a time
HIDDEN = 1 << 19  # numbers in the widest tensor, between two products: 2 MB

gelu_ = torch.ops.aten.gelu_

# The modules whose arithmetic is repeated here, as they were when this was imported.
_OURS = (plain.MCi, plain.Stage, plain.Downsample, plain.SqueezeExcite, plain.ConvBlock, plain.ConvMLP)
_OURS += (plain.MapAttentionBlock, plain.MapAttention, plain.MapLayerNorm)
_THEIRS = (nn.ModuleList, nn.Linear, nn.Conv2d, nn.BatchNorm2d, nn.Identity)
_FORWARD = {kind: kind.forward for kind in (*_OURS, *_THEIRS)}


def image_applies(tower: nn.Module, image: Tensor) -> bool:
    """Whether `image_embedding` computes what `tower(image)` would, and nobody could tell the difference."""
    if image.device.type != "cpu" or not inference.applies(image):
        return False
    return inference.is_untouched(tower, _FORWARD, any_bias=True)


def image_embedding(tower: plain.MCi, image: Tensor) -> Tensor:
    """Pixels [N, 3, R, R] in the tower's dtype -> embeddings [N, E], as `tower(image)`."""
    return torch.cat([_mci(tower, pixels) for pixels in image.split(PICTURES)])


def text_applies(model: plain.MobileCLIP, text: Tensor) -> bool:
    """Whether `text_embedding` computes what the plain form would: not in the tower with convolutions, and on a CPU."""
    parts = (model.token_embedding, model.transformer, model.ln_final)
    return not model.transformer.causal and text.device.type == "cpu" and inference.applies(text, *parts)


def text_embedding(model: plain.MobileCLIP, text: Tensor) -> Tensor:
    """Token ids [N, 77] -> embeddings [N, E], of a tower that is not causal: all tokens count, padding too."""
    return torch.cat([_text(model, ids) for ids in text.split(TEXTS)])


def _text(model: plain.MobileCLIP, text: Tensor) -> Tensor:
    dtype = half.arithmetic(model.text_projection)
    x = model.token_embedding(text).to(dtype).add_(model.positional_embedding)
    first = torch.arange(0, text.numel(), text.shape[1])

    def attend(qkv: Tensor) -> Tensor:
        return ops.attention(qkv.unflatten(0, text.shape), backend="torch").flatten(0, 1)

    def attend_once(attn: Attention, y: Tensor) -> Tensor:
        return inference._attend_once(y[pooled], y.unflatten(0, text.shape), *inference._in_proj(attn), attn.heads)

    pooled = first + text.argmax(dim=-1)
    x = inference._run_blocks(model.transformer, x.flatten(0, 1), attend, attend_once, pooled)
    return inference._project(model.ln_final(x), model.text_projection)


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
            heard = ops.attention(qkv, backend="torch")
            _add_linear(x.view(-1, x.shape[-1]), heard.flatten(0, 1), block.attn.out_proj)
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
    """[N, h, w, C] -> [N, h', w', C'], in new memory, side by side."""
    weight, groups = layer.weight, layer.groups
    if 1 < groups < len(weight):
        x, groups = x.repeat_interleave(len(weight) // groups, dim=3), len(weight)
    weight, bias = weight.to(x.dtype), layer.bias.to(x.dtype)
    x = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, layer.stride, layer.padding, groups=groups)
    return x.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)


def _squeeze_excite(layer: plain.SqueezeExcite, x: Tensor) -> Tensor:
    weights = torch.sigmoid(_linear(layer.expand, F.relu(_linear(layer.reduce, x.mean(dim=(1, 2))))))
    return x.mul_(weights[:, None, None])


class FastMobileCLIP(FastCLIP, plain.MobileCLIP):
    """A MobileCLIP whose towers run in the forms above, or in CLIP's, where these apply."""

    def image_embedding(self, image: Tensor) -> Tensor:
        if self.fast and image_applies(self.visual, image):
            return image_embedding(self.visual, image)
        return super().image_embedding(image)

    def text_embedding(self, text: Tensor) -> Tensor:
        if self.fast and text_applies(self, text):
            return text_embedding(self, text)
        return super().text_embedding(text)
