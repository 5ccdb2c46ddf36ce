"""Other image sizes and context lengths: positional embeddings interpolated as OpenCLIP does when it loads a model."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from miniclip.config import CLIPConfig, ConfigError, ViTConfig
from miniclip.weights.names import SAME, Converted


def resize(
    config: CLIPConfig, tensors: Mapping[str, Tensor], image_size: int | None, context_length: int | None
) -> tuple[CLIPConfig, Mapping[str, Tensor]]:
    """The config for square images of another size, texts of another length or both, and the tensors of that model.

    Images: bicubic with antialiasing over the map of positions; the embedding of the class token (ResNet: of
    the mean) stays. Texts: linear. None leaves the config's. ConfigError for a size that is no multiple of the patch
    size, or of a ResNet's 32. A warning says what changes.
    """
    changed = {}
    if image_size not in (None, config.vision.image_size):
        step, name = 32, "visual.attnpool.positional_embedding"
        if isinstance(config.vision, ViTConfig):
            step, name = config.vision.patch_size, "visual.positional_embedding"
        if type(image_size) is not int or image_size < step or image_size % step:
            raise ConfigError(f"image_size is {image_size!r:.100}; expected a multiple of {step}: images are square")
        changed[name] = partial(resize_grid, side=image_size // step)
        vision = replace(config.vision, image_size=image_size)
        config = replace(config, vision=vision, preprocess=replace(config.preprocess, image_size=image_size))
    if context_length not in (None, config.text.context_length):
        config = replace(config, text=replace(config.text, context_length=context_length))
        changed["positional_embedding"] = partial(resize_row, length=context_length)
    if changed:
        sizes = f"images of {config.vision.image_size} pixels and texts of {config.text.context_length} tokens"
        warnings.warn(f"{', '.join(changed)}: interpolated for {sizes}", stacklevel=4)
    return config, Converted(tensors, {name: (changed.get(name, SAME.to_canonical), (name,)) for name in tensors})


def resize_grid(x: Tensor, side: int) -> Tensor:
    """Embeddings [1 + G^2, D] of one token and a map -> [1 + side^2, D]."""
    grid = math.isqrt(len(x) - 1)
    maps = x[1:].float().T.reshape(1, -1, grid, grid)
    maps = F.interpolate(maps, size=(side, side), mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([x[:1], maps.flatten(2)[0].T.to(x.dtype)])


def resize_row(x: Tensor, length: int) -> Tensor:
    """Embeddings [L, D] -> [length, D]."""
    return F.interpolate(x.float().T[None], size=length, mode="linear", align_corners=False)[0].T.to(x.dtype)
