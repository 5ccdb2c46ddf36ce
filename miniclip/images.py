"""Image files -> PIL images, whoever made the files: few formats, regular files, bounded time and memory."""

from __future__ import annotations

import io
import os
import re
from contextlib import suppress
from functools import cache
from typing import BinaryIO

from PIL import ExifTags, Image, UnidentifiedImageError

from miniclip.errors import MiniclipError
from miniclip.io import open_regular

# The formats that open_image decodes, by Pillow's names. Pillow knows many others, with more faults, and for EPS it
# starts another program: a file from a stranger must not choose one of those.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "HEIF")

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
SIDEWAYS = range(5, 9)  # orientations that swap width and height


class ImageError(MiniclipError, ValueError):
    """A picture that can't be used. The message names the file, if there is one, and the fault."""


class ImageAccessError(ImageError):
    """A picture that can't be used here and now: the fault is the system's or a limit's, not the content's."""


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
            decode(image, name)
            return turn_upright(image) if upright else image
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        kinds = ", ".join(formats())
        raise ImageError(f"{name} is not an image ({kinds}), or has no pixels; it {_beginning(file)}") from error
    except Exception as error:  # a hostile header makes Pillow's plugins raise anything
        raise _image_error(f"can't open the image {name}", error) from error


def read_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Width and height that an image file has once it is upright. Only its header is read; errors as `open_image`."""
    try:
        with open_regular(path) as file, Image.open(file, formats=formats()) as image:
            width, height = image.size
            return (height, width) if _orientation(image) in SIDEWAYS else (width, height)
    except Exception as error:  # a hostile header makes Pillow's plugins raise anything
        raise _image_error(f"can't open the image {os.fspath(path)}", error) from error


def formats() -> list[str]:
    """Those of FORMATS that this Pillow can decode. HEIF (an iPhone's .heic) needs the package pillow-heif."""
    _register()
    return [format for format in FORMATS if format in Image.OPEN]


@cache
def _register() -> None:
    """Import the plugins of these formats; all that Pillow has would take longer."""
    from PIL import AvifImagePlugin, Jpeg2KImagePlugin, TiffImagePlugin, WebPImagePlugin  # noqa: F401

    Image.preinit()  # the others
    with suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()


def _check_cost(image: Image.Image, file: BinaryIO, name: str) -> None:
    """Refuse what takes too much time or memory, before it is decoded."""
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        raise ImageAccessError(
            f"{describe(image, name)} exceeds Pillow's limit of {limit} pixels against decompression bombs; "
            "if you trust the file, raise PIL.Image.MAX_IMAGE_PIXELS (a command's --max-pixels)"
        )
    if "progressive" in image.info:  # a JPEG in several scans, each of which takes a pass over all pixels
        position = file.tell()
        file.seek(0)
        scans = _count_scans(file.read())
        file.seek(position)
        if scans > MAX_SCANS:
            raise ImageError(f"{describe(image, name)} is a JPEG of {scans} scans; expected at most {MAX_SCANS}")


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
    turn = TURNS.get(_orientation(image))
    if turn is None:
        return image
    turned = image.transpose(turn)
    for key in ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp"):  # they would turn it again
        turned.info.pop(key, None)
    return turned


def _orientation(image: Image.Image) -> int | None:
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged EXIF makes Pillow raise anything
        return None


def decode(image: Image.Image, name: str = "") -> None:
    """Read the pixels, which Pillow does not do before they are needed."""
    try:
        image.load()
    except Exception as error:  # a damaged body makes Pillow's plugins raise anything
        raise _image_error(f"can't decode {describe(image, name)}", error) from error


def _image_error(what: str, error: Exception) -> ImageError:
    if isinstance(error, MemoryError) or getattr(error, "errno", None) is not None:
        return ImageAccessError(f"{what}: {_reason(error)}")
    return ImageError(f"{what}: {_reason(error)}; get the file again")


def describe(image: Image.Image, name: str = "") -> str:
    name = name or getattr(image, "filename", "") or "the image"  # a new image has no file name
    return f"{name} ({image.mode}, {image.width} x {image.height} pixels)"


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _beginning(file: BinaryIO) -> str:
    file.seek(0)
    head = file.read(24)
    return f"begins with {head!r}" if head else "is empty"
