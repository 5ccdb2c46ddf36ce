"""Augmentations: random changes to a batch of pictures that leave their captions true.

Each takes uint8 pixels [N, 4, S, S], RGB and opacity, the side R to return, the captions, and a random number
generator. It returns float32 pixels [N, 3, R, R] in 0..1, not yet normalised. All random numbers are drawn on the CPU,
so that a run does not depend on the device.
"""

from __future__ import annotations

import math
import re

import torch
import torch.nn.functional as F
from torch import Tensor

from miniclip.config import PreprocessConfig, check_known
from miniclip.errors import UsageError
from miniclip.models.vit import VisionTransformer

Captions = list[tuple[str, ...]]

# Captions that would be false of the mirror image, or that refer to something written in the picture.
ONE_SIDED = re.compile(
    r"left|right|east|west|clockwise|forward|backward|previous|next|return|letter|button|flag|keycap|sign|symbol|mark"
    r"|number|o.?clock|thirty|arrow|japanese|quarter|crescent|abc|text|word|write|writing|slash|check|music|question"
)
GREY_WEIGHTS = (0.299, 0.587, 0.114)  # of red, green, blue (ITU-R BT.601)


def none(images: Tensor, size: int, captions: Captions, rng: torch.Generator) -> Tensor:
    """Scale to R x R, on a white background; nothing random."""
    unit = torch.eye(2, 3, device=images.device).expand(len(images), -1, -1)
    return _on_background(_resample(images, unit, size), images.new_ones(len(images), 3, dtype=torch.float32))


def photo(images: Tensor, size: int, captions: Captions, rng: torch.Generator) -> Tensor:
    """Crop a random part with half to all of the area, mirror half of the pictures, and change the colours a little."""
    n = len(images)
    scale = _uniform(n, 0.5, 1.0, rng).sqrt()
    shift = (1 - scale)[:, None] * _uniform((n, 2), -1, 1, rng)
    mirror = 1 - 2 * (torch.rand(n, generator=rng) < 0.5) * _mirrorable(captions)
    zero = torch.zeros(n)
    rows = [torch.stack([mirror * scale, zero, shift[:, 0]], 1), torch.stack([zero, scale, shift[:, 1]], 1)]
    pixels = _resample(images, torch.stack(rows, 1).to(images.device), size)
    pixels = _on_background(pixels, images.new_ones(n, 3, dtype=torch.float32))
    return _jitter(pixels, brightness=0.2, contrast=0.2, saturation=0.2, tint=0.0, grey=0.0, rng=rng)


def cifar(images: Tensor, size: int, captions: Captions, rng: torch.Generator) -> Tensor:
    """Pad by an eighth on each side with black, crop at random, mirror half: the usual augmentation of CIFAR-10."""
    n, pad = len(images), size // 8
    if images.shape[-1] != size:
        raise UsageError(
            f"the pictures are {images.shape[-1]} pixels wide, the model takes {size}; expected the same: "
            "--model-size cifar-resnet, or another augmentation, which resizes"
        )
    padded = F.pad(images[:, :3], (pad,) * 4)
    offset = torch.randint(2 * pad + 1, (n, 2), generator=rng)
    along = torch.arange(size)
    mirror = torch.rand(n, generator=rng) < 0.5
    columns = torch.where(mirror[:, None], along.flip(0), along) + offset[:, :1]
    rows = along + offset[:, 1:]
    picked = padded[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]]  # [N, R, R, 3]
    return picked.permute(0, 3, 1, 2).float() / 255


def pictogram(images: Tensor, size: int, captions: Captions, rng: torch.Generator, strength: float = 1.0) -> Tensor:
    """Shift, scale, rotate and shear drawings with a transparent background; mirror half of those whose captions allow
    it; put half on white, the others on black or any colour; change the colours; make one in ten grey.

    strength: multiplies all ranges and shares; 0 leaves only the mirroring. A short run learns more with less of it.
    """
    n = len(images)
    # This scales the sampling grid, so that values above 1 make the picture smaller.
    scale = torch.exp(strength * (_uniform((n, 1), -0.25, 0.2, rng) + _uniform((n, 2), -0.08, 0.08, rng)))
    angle = strength * 0.12 * torch.randn(n, generator=rng).clamp(-2, 2)
    shear = strength * 0.06 * torch.randn(n, generator=rng).clamp(-2, 2)
    mirror = 1 - 2 * (torch.rand(n, generator=rng) < 0.5) * _mirrorable(captions)
    cos, sin = torch.cos(angle), torch.sin(angle)
    linear = torch.stack([cos * mirror, sin + shear, -sin * mirror, cos], 1).unflatten(1, (2, 2)) * scale[:, None]
    shift = strength * _uniform((n, 2, 1), -0.12, 0.12, rng)
    pixels = _resample(images, torch.cat([linear, shift], 2).to(images.device), size)

    kind = torch.rand(n, 1, generator=rng) / max(strength, 1e-9)
    any_colour = torch.rand(n, 3, generator=rng)
    ground = torch.where(kind > 0.5, 1.0, torch.where(kind > 0.4, 0.0, any_colour))
    pixels = _on_background(pixels, ground.to(images.device))
    amounts = {"brightness": 0.25, "contrast": 0.25, "saturation": 0.4, "tint": 0.12, "grey": 0.1}
    return _jitter(pixels, **{name: strength * amount for name, amount in amounts.items()}, rng=rng)


AUGMENTATIONS = {"none": none, "photo": photo, "cifar": cifar, "pictogram": pictogram}


def normalize(pixels: Tensor, config: PreprocessConfig) -> Tensor:
    """float [N, 3, R, R] in 0..1 -> the model's input."""
    check_known(config.resize_mode)
    mean, std = (pixels.new_tensor(x)[:, None, None] for x in (config.mean, config.std))
    return (pixels - mean) / std


def _mirrorable(captions: Captions) -> Tensor:
    """bool [N]: whether a picture's first caption is true of its mirror image as well."""
    return torch.tensor([ONE_SIDED.search(texts[0].lower()) is None for texts in captions])


def _uniform(shape: int | tuple[int, ...], low: float, high: float, rng: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=rng)


def _resample(images: Tensor, theta: Tensor, size: int) -> Tensor:
    """uint8 [N, 4, S, S] through the affine maps theta [N, 2, 3] -> float [N, 4, R, R] in 0..1.

    The returned colours are multiplied by the opacity, so that neither the area beyond the edge nor the colour of
    transparent pixels is mixed into their neighbours.
    """
    pixels = images.float() / 255
    opacity = pixels[:, 3:]
    pixels = torch.cat([pixels[:, :3] * opacity, opacity], 1)
    grid = F.affine_grid(theta, [len(images), 4, size, size], align_corners=False)
    return F.grid_sample(pixels, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _on_background(pixels: Tensor, colour: Tensor) -> Tensor:
    """Put pictures [N, 4, R, R], colours multiplied by the opacity, over a colour each [N, 3] -> [N, 3, R, R]."""
    return pixels[:, :3] + (1 - pixels[:, 3:]) * colour[:, :, None, None]


def _jitter(
    pixels: Tensor,
    *,
    brightness: float,
    contrast: float,
    saturation: float,
    tint: float,
    grey: float,
    rng: torch.Generator,
) -> Tensor:
    """Multiply brightness, contrast and saturation of each picture by random factors within 1 +- the amounts, and its
    channels by factors within 1 +- tint; the fraction `grey` of the pictures loses all colour."""
    n, device = len(pixels), pixels.device
    gain = _uniform((n, 1), 1 - brightness, 1 + brightness, rng) * _uniform((n, 3), 1 - tint, 1 + tint, rng)
    slope = _uniform((n, 1, 1, 1), 1 - contrast, 1 + contrast, rng).to(device)
    colour = _uniform((n, 1, 1, 1), 1 - saturation, 1 + saturation, rng)
    colour = (colour * (torch.rand(n, 1, 1, 1, generator=rng) >= grey)).to(device)
    pixels = pixels * gain[:, :, None, None].to(device)
    pixels = pixels.mean(dim=(1, 2, 3), keepdim=True).lerp(pixels, slope)
    luminance = (pixels * pixels.new_tensor(GREY_WEIGHTS)[:, None, None]).sum(1, keepdim=True)
    return luminance.lerp(pixels, colour).clamp(0, 1)


class PatchDropout:
    """Trains a ViT on a random part of the patches of each batch (Li et al. 2022, FLIP): with half of them, a step is
    nearly twice as fast. The class token is always kept."""

    def __init__(self, visual: torch.nn.Module, fraction: float):
        self.fraction = fraction
        self.rng: torch.Generator | None = None  # to be set before each forward pass that drops patches
        if fraction:
            if not isinstance(visual, VisionTransformer):
                kind = type(visual).__name__
                raise UsageError(f"--patch-dropout needs a VisionTransformer as image tower; this one is a {kind}")
            visual.ln_pre.register_forward_pre_hook(self._drop)
            visual.transformer.length = None  # fewer than the tower has positions for

    def _drop(self, module: torch.nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        (x,) = inputs
        if self.rng is None:
            return inputs
        patches = x.shape[1] - 1
        kept = torch.randperm(patches, generator=self.rng)[: math.ceil(patches * (1 - self.fraction))]
        chosen = torch.cat([kept.new_zeros(1), 1 + kept.sort().values])
        return (x[:, chosen.to(x.device)],)
