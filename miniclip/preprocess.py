"""PIL image -> float32 pixels [3, R, R], bit for bit those of openai/CLIP (torchvision), with Pillow and NumPy only.

The stages, each a function below, in this order:

    open_image   file                 -> PIL image, decoded
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

import io
import os
import re
import warnings
from dataclasses import dataclass
from functools import cache
from typing import BinaryIO

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError

from miniclip.config import INTERPOLATIONS, RESIZE_MODES, PreprocessConfig, check_choice
from miniclip.errors import MiniclipError
from miniclip.io import open_regular

# The formats that open_image decodes, by Pillow's names. Pillow knows many others, with more faults, and for EPS it
# starts another program: a file from a stranger must not choose one of those.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "HEIF")

# A long thin image is resized before most of it is cropped. This limit is 512 MiB at 4 bytes a pixel (RGBA takes twice
# as much), and admits 1 x 640 pixels for the largest model, R = 448.
MAX_RESIZED_PIXELS = 2**27
MAX_SCANS = 50  # of a progressive JPEG; encoders write about 10. At Pillow's limit of pixels, 50 scans take 4 seconds
JPEG_MARKER = re.compile(rb"\xff+[^\x00\xff\xd0-\xd7]")  # without those that stand inside compressed data

TURNS = {  # by EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(MiniclipError, ValueError):
    """A picture that can't be used. The message names the file, if there is one, and the fault."""


class ImageAccessError(ImageError):
    """A picture that can't be used here and now: the fault is the system's or a limit's, not the content's."""


@dataclass(frozen=True)
class Preprocess:
    """All stages from a PIL image to a model's input.

    upright: first turn the image as its EXIF orientation says.

    Takes any mode and size, and returns a float32 tensor [3, R, R]; stack several to a batch [N, 3, R, R].
    Raises TypeError for anything but a PIL image, and ImageError for one that can't be decoded or resized.
    """

    config: PreprocessConfig
    upright: bool = False

    def __call__(self, image: Image.Image) -> torch.Tensor:
        if not isinstance(image, Image.Image):
            raise TypeError(f"expected a PIL image, got {type(image).__name__}; {_advice(image)}")
        config = self.config
        _decode(image)
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


def open_image(source: str | os.PathLike[str] | bytes | BinaryIO, upright: bool = False) -> Image.Image:
    """Decode an image file: its path, its content, or an open binary file. Of several frames the first.

    The content decides on the format, which must be in FORMATS. upright: turn the image as its EXIF orientation says.
    Raises ImageError for anything else, a damaged image or one without pixels; its subclass ImageAccessError for a file
    that can't be read, is no regular file, or is larger than Pillow's `Image.MAX_IMAGE_PIXELS`.
    """
    if isinstance(source, bytes):
        return _open(io.BytesIO(source), "the data", upright)
    if hasattr(source, "read"):
        return _open(source, str(getattr(source, "name", "the data")), upright)
    path = os.path.expanduser(os.fspath(source))
    try:
        file = open_regular(path)
    except OSError as error:
        raise ImageAccessError(f"can't open the image {path}: {_reason(error)}") from error
    with file:
        image = _open(file, path, upright)
    image.filename = path  # for messages; before the image was decoded, Pillow would open the path again
    return image


def _open(file: BinaryIO, name: str, upright: bool) -> Image.Image:
    try:
        with Image.open(file, formats=formats()) as image:  # reads the header only
            _check_cost(image, file, name)
            _decode(image, name)
            return turn_upright(image) if upright else image
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        kinds = ", ".join(formats())
        raise ImageError(f"{name} is not an image ({kinds}), or has no pixels; it {_beginning(file)}") from error
    except Exception as error:  # a hostile header makes Pillow's plugins raise anything
        raise _image_error(f"can't open the image {name}", error) from error


def formats() -> list[str]:
    """Those of FORMATS that this Pillow can decode. HEIF (an iPhone's .heic) needs the package pillow-heif."""
    Image.init()
    _register_heif()
    return [format for format in FORMATS if format in Image.OPEN]


@cache
def _register_heif() -> None:
    try:
        import pillow_heif
    except ImportError:
        return
    pillow_heif.register_heif_opener()


def _check_cost(image: Image.Image, file: BinaryIO, name: str) -> None:
    """Refuse what takes too much time or memory, before it is decoded."""
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        raise ImageAccessError(
            f"{_describe(image, name)} exceeds Pillow's limit of {limit} pixels against decompression bombs; "
            "if you trust the file, raise PIL.Image.MAX_IMAGE_PIXELS (a command's --max-pixels)"
        )
    if "progressive" in image.info:  # a JPEG in several scans, each of which takes a pass over all pixels
        position = file.tell()
        file.seek(0)
        scans = _count_scans(file.read())
        file.seek(position)
        if scans > MAX_SCANS:
            raise ImageError(f"{_describe(image, name)} is a JPEG of {scans} scans; expected at most {MAX_SCANS}")


def _count_scans(jpeg: bytes) -> int:
    """The number of "start of scan" markers, without those of thumbnails inside other segments."""
    scans, position = 0, 0
    while marker := JPEG_MARKER.search(jpeg, position):
        kind, position = jpeg[marker.end() - 1], marker.end()
        if kind == 0xD9:  # end of image
            break
        scans += kind == 0xDA
        if kind not in (0x01, 0xD8):  # these two have no segment, whose length comes next
            position += int.from_bytes(jpeg[position : position + 2], "big")
    return scans


def turn_upright(image: Image.Image) -> Image.Image:
    """Undo the EXIF orientation; an image whose EXIF is damaged stays as it is stored."""
    try:
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # damaged EXIF makes Pillow raise anything
        turn = None
    if turn is None:
        return image
    turned = image.transpose(turn)
    for key in ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp"):  # they would turn it again
        turned.info.pop(key, None)
    return turned


def resize(image: Image.Image, size: int, interpolation: str, resize_mode: str) -> Image.Image:
    """Scale the shorter side to `size` and the longer in proportion, or with "squash" both to `size`.

    The mode is kept. An image of the right size is copied, not filtered.
    """
    check_choice("interpolation", interpolation, INTERPOLATIONS)
    check_choice("resize_mode", resize_mode, RESIZE_MODES)
    return image.resize(_new_size(image, size, resize_mode), Image.Resampling[interpolation.upper()])


def _new_size(image: Image.Image, size: int, resize_mode: str) -> tuple[int, int]:
    if 0 in image.size:
        raise ImageError(f"{_describe(image)} has no pixels")
    new_width, new_height = size, size
    if resize_mode == "shortest":  # torchvision: int() of a float quotient, the same for sides below 2**40
        new_width, new_height = (size * side // min(image.size) for side in image.size)
    rows = max(image.height, new_height)  # Pillow's first pass makes new_width x image.height
    if new_width * rows > MAX_RESIZED_PIXELS:
        raise ImageError(
            f"{_describe(image)} would be resized to {new_width} x {rows}, above the limit of {MAX_RESIZED_PIXELS} "
            "pixels; crop it to a less extreme aspect ratio first"
        )
    return new_width, new_height


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The size x size middle of an image that is at least that large.

    An odd excess leaves half a pixel, which torchvision rounds to even: an excess of 3, 4 or 5 starts the crop at 2.
    """
    if min(image.size) < size:
        raise ImageError(f"{_describe(image)} is too small for a crop of {size} x {size}")
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
        raise ImageError(f"{_describe(image)} can't become RGB: {error}") from error


def normalize(pixels: np.ndarray, mean: tuple[float, float, float], std: tuple[float, float, float]) -> torch.Tensor:
    """uint8 [R, R, 3] -> float32 [3, R, R]: (pixels / 255 - mean) / std, rounded to float32 after each of the three."""
    planes = np.empty((3, *pixels.shape[:2]), np.float32)
    for i, plane in enumerate(planes):  # one by one, so that each stays in the cache
        np.divide(pixels[:, :, i], np.float32(255), out=plane)
        plane -= np.float32(mean[i])
        plane /= np.float32(std[i])
    return torch.from_numpy(planes)


def _decode(image: Image.Image, name: str = "") -> None:
    """Read the pixels, which Pillow does not do before they are needed."""
    try:
        image.load()
    except Exception as error:  # a damaged body makes Pillow's plugins raise anything
        raise _image_error(f"can't decode {_describe(image, name)}", error) from error


def _image_error(what: str, error: Exception) -> ImageError:
    if isinstance(error, MemoryError) or getattr(error, "errno", None) is not None:
        return ImageAccessError(f"{what}: {_reason(error)}")
    return ImageError(f"{what}: {_reason(error)}; get the file again")


def _describe(image: Image.Image, name: str = "") -> str:
    name = name or getattr(image, "filename", "") or "the image"  # a new image has no file name
    return f"{name} ({image.mode}, {image.width} x {image.height} pixels)"


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _beginning(file: BinaryIO) -> str:
    file.seek(0)
    head = file.read(24)
    return f"begins with {head!r}" if head else "is empty"


def _advice(got: object) -> str:
    if isinstance(got, np.ndarray):
        return "make one with PIL.Image.fromarray(array), of uint8 [height, width, 3]"
    if isinstance(got, torch.Tensor):
        return "make one with PIL.Image.fromarray(tensor.permute(1, 2, 0).numpy()), of uint8 [3, height, width]"
    return "open a file with PIL.Image.open(path) or miniclip.preprocess.open_image(path)"
