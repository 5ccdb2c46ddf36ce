"""PIL image -> float32 pixels [3, R, R], bit for bit those of openai/CLIP (torchvision), with Pillow and NumPy only.

The stages, each a function, in this order:

    open_image   file                 -> PIL image, decoded; in images.py
    resize       any mode, any size   -> shorter side R (Pillow's antialiased bicubic, in the image's own mode)
    center_crop  shorter side R       -> R x R
    to_pixels    R x R, any mode      -> uint8 [R, R, 3], RGB
    normalize    uint8 [R, R, 3]      -> float32 [3, R, R]

Where ports go wrong, with the largest error seen in a channel, of 255:

- Pillow's bicubic has a = -0.5 and widens its kernel by the scale when it shrinks (antialias). Without that: 65. Most
  tensor libraries have a = -0.75.
- Pillow filters along the width first, then along the height, and rounds and clips to 0..255 after each. With floats
  between the passes: 13. Its weights have 22 bits of fixed point: a float filter that rounds in the same places is off
  by 1 in a few of 10,000. From Pillow 13 on, images over twice as tall as wide are reduced along the height first: 10.
- RGB comes after the resize. RGBA and LA are filtered with the colour multiplied by alpha, and alpha is then dropped;
  palette and 1-bit images are resized with the nearest neighbour. Converted first: 254 (RGBA), 75 (palette).
- The longer side is rounded down, the crop's offset half to even (see `center_crop`). Rounded down instead: 110.
- EXIF orientation is ignored, as in openai/CLIP: a photo that viewers turn upright is taken as it is stored, unless
  the option `upright` is set.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from miniclip.config import INTERPOLATIONS, RESIZE_MODES, PreprocessConfig, check_choice, check_known
from miniclip.images import ImageError, decode, describe, turn_upright
from miniclip.images import open_image as open_image

# A long thin image is resized before most of it is cropped. This limit is 512 MiB at 4 bytes a pixel (RGBA takes twice
# as much), and admits 1 x 640 pixels for the largest model, R = 448.
MAX_RESIZED_PIXELS = 2**27


@dataclass(frozen=True)
class Preprocess:
    """All stages from a PIL image to a model's input.

    upright: first turn the image as its EXIF orientation says.

    Takes any mode and size, and returns a float32 tensor [3, R, R]; stack several to a batch [N, 3, R, R].
    Raises TypeError for anything but a PIL image, and ImageError for one that can't be decoded or resized.
    IncompleteModelError if the model's files do not state how pictures are prepared.
    """

    config: PreprocessConfig
    upright: bool = False

    def __call__(self, image: Image.Image) -> torch.Tensor:
        if not isinstance(image, Image.Image):
            raise TypeError(f"expected a PIL image, got {type(image).__name__}; {_advice(image)}")
        config = self.config
        decode(image)
        image = turn_upright(image) if self.upright else image
        if _can_crop_between_passes(image, config):
            image = _resize_and_crop(image, config.image_size, config.interpolation)
        else:
            image = resize(image, config.image_size, config.interpolation, config.resize_mode)
            image = center_crop(image, config.image_size)
        pixels = to_pixels(image)
        if image.mode.startswith(("I", "F")) and pixels.min() == 255:
            text = f"an image of mode {image.mode} becomes all white, because values over 255 are clipped, not scaled"
            warnings.warn(text, stacklevel=2)
        return normalize(pixels, config.mean, config.std)


def resize(image: Image.Image, size: int, interpolation: str, resize_mode: str) -> Image.Image:
    """Scale the shorter side to `size` and the longer in proportion, or with "squash" both to `size`.

    The mode is kept. An image of the right size is copied, not filtered.
    """
    check_known(resize_mode)
    check_choice("interpolation", interpolation, INTERPOLATIONS)
    check_choice("resize_mode", resize_mode, RESIZE_MODES)
    return image.resize(_new_size(image, size, resize_mode), Image.Resampling[interpolation.upper()])


def _new_size(image: Image.Image, size: int, resize_mode: str) -> tuple[int, int]:
    if 0 in image.size:
        raise ImageError(f"{describe(image)} has no pixels")
    new_width, new_height = size, size
    if resize_mode == "shortest":  # torchvision: int() of a float quotient, the same for sides below 2**40
        new_width, new_height = (size * side // min(image.size) for side in image.size)
    rows = max(image.height, new_height)  # Pillow's first pass makes new_width x image.height
    if new_width * rows > MAX_RESIZED_PIXELS:
        raise ImageError(
            f"{describe(image)} would be resized to {new_width} x {rows}, above the limit of {MAX_RESIZED_PIXELS} "
            "pixels; crop it to a less extreme aspect ratio first"
        )
    return new_width, new_height


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The size x size middle of an image that is at least that large.

    An odd excess leaves half a pixel, which torchvision rounds to even: an excess of 3, 4 or 5 starts the crop at 2.
    """
    if min(image.size) < size:
        raise ImageError(f"{describe(image)} is too small for a crop of {size} x {size}")
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    return image.crop((left, top, left + size, top + size))


def _can_crop_between_passes(image: Image.Image, config: PreprocessConfig) -> bool:
    """Whether the resize has two passes, the first along the width: not for other modes, nor always for tall images."""
    return config.resize_mode == "shortest" and image.width > image.height > 0 and image.mode in ("RGB", "L")


def _resize_and_crop(image: Image.Image, size: int, interpolation: str) -> Image.Image:
    """center_crop(resize(image)), the same bits in 7% less time: the second pass skips the columns that are cropped."""
    width, _ = _new_size(image, size, "shortest")
    left = round((width - size) / 2)
    filter = Image.Resampling[interpolation.upper()]
    image = image.resize((width, image.height), filter).crop((left, 0, left + size, image.height))
    return image.resize((size, size), filter)


def to_pixels(image: Image.Image) -> np.ndarray:
    """Convert any mode to RGB, uint8 [height, width, 3], as Pillow does: alpha is dropped, colour profiles are ignored.

    I, I;16 and F are clipped to 0..255, not scaled: a 16-bit grey photo turns almost all white, as in openai/CLIP.
    """
    try:
        return np.array(image if image.mode == "RGB" else image.convert("RGB"))
    except ValueError as error:  # Pillow can't for mode La (grey multiplied by alpha); torchvision raises there too
        raise ImageError(f"{describe(image)} can't become RGB: {error}") from error


def normalize(pixels: np.ndarray, mean: tuple[float, float, float], std: tuple[float, float, float]) -> torch.Tensor:
    """uint8 [R, R, 3] -> float32 [3, R, R]: (pixels / 255 - mean) / std, rounded to float32 after each of the three."""
    planes = np.empty((3, *pixels.shape[:2]), np.float32)
    for i, plane in enumerate(planes):  # one by one, so that each stays in the cache
        np.divide(pixels[:, :, i], np.float32(255), out=plane)
        plane -= np.float32(mean[i])
        plane /= np.float32(std[i])
    return torch.from_numpy(planes)


def _advice(got: object) -> str:
    if isinstance(got, np.ndarray):
        return "make one with PIL.Image.fromarray(array), of uint8 [height, width, 3]"
    if isinstance(got, torch.Tensor):
        return "make one with PIL.Image.fromarray(tensor.permute(1, 2, 0).numpy()), of uint8 [3, height, width]"
    return "open a file with PIL.Image.open(path) or miniclip.preprocess.open_image(path)"
