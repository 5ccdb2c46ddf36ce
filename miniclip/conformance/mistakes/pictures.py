"""From the picture's file to the pixels."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from miniclip import preprocess
from miniclip.conformance.forward import Scope
from miniclip.conformance.mistakes.mistake import Mistake
from miniclip.conformance.mistakes.resample import Steps, resampled
from miniclip.conformance.rules import bands, picture, resize

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _new_size(s: Scope, rounded=math.floor) -> tuple[int, int]:
    """Height and width after the resize."""
    height, width = s["image.decoded"].shape[:2]
    size, shorter = s.config.preprocess.image_size, min(height, width)
    return tuple(size if side == shorter else rounded(size * side / shorter) for side in (height, width))


def _interpolated(s: Scope, **options) -> Tensor:
    """As a tensor library resizes: all bands alike, floats to the end, rounded once."""
    planes = s["image.decoded"].permute(2, 0, 1)[None].float()
    resized = F.interpolate(planes, _new_size(s), align_corners=options.pop("align_corners", False), **options)
    return resized[0].permute(1, 2, 0).round().clamp(0, 255).to(torch.uint8)


def _pillow(s: Scope, image: Image.Image | None = None, filter: int = Image.Resampling.BICUBIC, rounded=math.floor):
    height, width = _new_size(s, rounded)
    return bands((image or picture(s["image.decoded"])).resize((width, height), filter))


def _in_other_order(s: Scope) -> Tensor:
    """The two passes in the other order than this Pillow's."""
    image = picture(s["image.decoded"])
    height, width = _new_size(s)
    by_width = image.resize((width, image.height), Image.Resampling.BICUBIC)
    by_height = image.resize((image.width, height), Image.Resampling.BICUBIC)
    width_first = bands(by_width.resize((width, height), Image.Resampling.BICUBIC))
    height_first = bands(by_height.resize((width, height), Image.Resampling.BICUBIC))
    return height_first if torch.equal(width_first, bands(resize(s))) else width_first


def _in_linear_light(s: Scope) -> Tensor:
    """sRGB's curve undone before the resize and applied after it; alpha has no curve."""
    planes = s["image.decoded"].permute(2, 0, 1).float() / 255
    colours = planes[: 3 if len(planes) > 2 else 1]
    linear = torch.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    planes = torch.cat([linear, planes[len(linear) :]])[None]
    resized = F.interpolate(planes, _new_size(s), mode="bicubic", antialias=True)[0].clamp(0, 1)
    linear = resized[: len(linear)]
    curved = torch.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)
    return (torch.cat([curved, resized[len(linear) :]]) * 255).round().to(torch.uint8).permute(1, 2, 0)


def _premultiplied(s: Scope) -> Tensor:
    """Colours multiplied by alpha before the resize, and not divided by it afterwards."""
    image = picture(s["image.decoded"]).convert("RGBA")
    height, width = _new_size(s)
    resized = image.convert("RGBa").resize((width, height), Image.Resampling.BICUBIC)
    found = torch.from_numpy(np.array(resized).copy())
    return found[..., [0, 3]] if s["image.decoded"].shape[2] == 2 else found


def _on_background(s: Scope, level: int) -> Tensor:
    image = picture(s["image.decoded"])
    canvas = Image.new("RGBA", image.size, (level, level, level, 255))
    return bands(Image.alpha_composite(canvas, image.convert("RGBA")).convert("RGB"))


def _composited(s: Scope, level: int) -> Tensor:
    return _pillow(s, picture(_on_background(s, level)))


def _cropped(s: Scope, rounded) -> Tensor:
    resized = s["image.resized"]
    size = s.config.preprocess.image_size
    top, left = (rounded((side - size) / 2) for side in resized.shape[:2])
    return torch.from_numpy(preprocess.to_pixels(picture(resized)))[top : top + size, left : left + size]


def _unit(s: Scope) -> Tensor:
    """The cropped picture in [0, 1], channels first."""
    return s["image.cropped"].permute(2, 0, 1)[None].float() / 255


def _standardized(x: Tensor, mean: tuple, std: tuple) -> Tensor:
    return (x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def _as_configured(s: Scope, x: Tensor) -> Tensor:
    return _standardized(x, s.config.preprocess.mean, s.config.preprocess.std)


def _resized(name: str, rule) -> Mistake:
    return Mistake(name, {"image.resized": rule}, preprocess, "image.resize(")


def _step(name: str, **steps) -> Mistake:
    """One step of the resize otherwise than Pillow does it."""
    return _resized(name, lambda s: resampled(s["image.decoded"], _new_size(s), Steps(**steps)))


def _sized(name: str, rule) -> Mistake:
    return Mistake(name, {"image.resized": rule}, preprocess, "size * side // min(")


def _pixels(name: str, rule, line: str) -> Mistake:
    return Mistake(name, {"image.pixels": rule}, preprocess, line)


_HALF_TO_EVEN = (preprocess.center_crop, "round(")
_RGB = (preprocess.to_pixels, 'convert("RGB")')

PICTURES = (
    _resized("bilinear instead of bicubic", lambda s: bands(resize(s, interpolation="bilinear"))),
    _resized("nearest neighbour instead of bicubic", lambda s: _pillow(s, filter=Image.Resampling.NEAREST)),
    _resized("Lanczos instead of bicubic", lambda s: _pillow(s, filter=Image.Resampling.LANCZOS)),
    _resized("box filter instead of bicubic", lambda s: _pillow(s, filter=Image.Resampling.BOX)),
    _resized("bicubic without antialias, a = -0.75", lambda s: _interpolated(s, mode="bicubic")),
    _resized("bilinear without antialias", lambda s: _interpolated(s, mode="bilinear")),
    _resized("corners aligned", lambda s: _interpolated(s, mode="bicubic", align_corners=True)),
    _resized("no rounding to bytes between the two passes", lambda s: _interpolated(s, mode="bicubic", antialias=True)),
    _step("bicubic with a = -0.75", a=-0.75),
    _step("bicubic without antialias, a = -0.5", antialias=False),
    _step("sums cut, not rounded: 2^21 missing", rounding=0),
    _step("bytes below 0 or above 255 wrap instead of being clamped", wraps=True),
    _resized("resized in linear light", _in_linear_light),
    _resized("the other order of the two passes", _in_other_order),
    _sized("squashed to a square", lambda s: bands(resize(s, resize_mode="squash"))),
    _sized("longer side rounded, not floored", lambda s: _pillow(s, rounded=round)),
    _sized("longer side rounded up", lambda s: _pillow(s, rounded=math.ceil)),
    Mistake(
        "alpha dropped before the resize",
        {"image.resized": lambda s: _pillow(s, picture(s["image.decoded"]).convert("RGB"))},
        *_RGB,
    ),
    _step("colours not multiplied by alpha before the resize", premultiplied=False),
    _step("colours divided by alpha are rounded, not cut", divided_rounds=True),
    _step("colours divided by alpha wrap beyond 255, not clamped", divided_wraps=True),
    Mistake("alpha kept premultiplied", {"image.resized": _premultiplied}, preprocess, "image.resize("),
    Mistake("alpha composited on white", {"image.resized": lambda s: _composited(s, 255)}, *_RGB),
    Mistake("alpha composited on black", {"image.resized": lambda s: _composited(s, 0)}, *_RGB),
    Mistake("crop offset rounded down", {"image.cropped": lambda s: _cropped(s, math.floor)}, *_HALF_TO_EVEN),
    Mistake("crop offset rounded up", {"image.cropped": lambda s: _cropped(s, math.ceil)}, *_HALF_TO_EVEN),
    Mistake("cropped at the top left", {"image.cropped": lambda s: _cropped(s, lambda x: 0)}, *_HALF_TO_EVEN),
    Mistake("BGR instead of RGB", {"image.cropped": lambda s: _right_crop(s).flip(2)}, *_RGB),
    Mistake("rows and columns swapped", {"image.cropped": lambda s: _right_crop(s).transpose(0, 1)}, *_RGB),
    Mistake("picture upside down", {"image.cropped": lambda s: _right_crop(s).flip(0)}, *_RGB),
    _pixels("no mean and std", _unit, "-= np."),
    _pixels("scaled to [-1, 1]", lambda s: 2 * _unit(s) - 1, "-= np."),
    _pixels("not divided by 255", lambda s: _as_configured(s, 255 * _unit(s)), "np.float32(255)"),
    _pixels("bytes as they are", lambda s: 255 * _unit(s), "np.float32(255)"),
    _pixels("divided by 256", lambda s: _as_configured(s, _unit(s) * 255 / 256), "np.float32(255)"),
    _pixels("ImageNet's mean and std", lambda s: _standardized(_unit(s), IMAGENET_MEAN, IMAGENET_STD), "-= np."),
    _pixels("mean not subtracted", lambda s: _standardized(_unit(s), (0, 0, 0), s.config.preprocess.std), "-= np."),
    _pixels("not divided by std", lambda s: _standardized(_unit(s), s.config.preprocess.mean, (1, 1, 1)), "(std"),
    _pixels("channels reversed after normalisation", lambda s: _as_configured(s, _unit(s)).flip(1), "np.float32(255)"),
    _pixels("mean and std in the order BGR", lambda s: _as_configured(s, _unit(s).flip(1)).flip(1), "-= np."),
    _pixels(
        "channels last taken for channels first",
        lambda s: _as_configured(s, _unit(s)).permute(0, 2, 3, 1).reshape(_unit(s).shape),
        "np.float32(255)",
    ),
)


def _right_crop(s: Scope) -> Tensor:
    resized, size = picture(s["image.resized"]), s.config.preprocess.image_size
    return torch.from_numpy(preprocess.to_pixels(preprocess.center_crop(resized, size)))
