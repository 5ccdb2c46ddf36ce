"""Preprocessing against torchvision, bit for bit, and the errors for pictures that can't be used."""

import io
import os
import random
import socket
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
from conformance.make_preprocess import CASES, GOLDEN, MODES, picture, samples, sha256, torchvision_transform
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from safetensors import safe_open

from miniclip import images, preprocess
from miniclip.config import PreprocessConfig
from miniclip.images import ImageAccessError
from miniclip.preprocess import (
    ImageError,
    Preprocess,
    center_crop,
    normalize,
    open_image,
    resize,
    to_pixels,
)

pytestmark = pytest.mark.filterwarnings("ignore:Palette images with Transparency")
SIDES = st.integers(1, 90)
SIZES = st.integers(1, 48)


def check_golden(name: str, pixels: torch.Tensor) -> None:
    with safe_open(GOLDEN, "pt") as golden:
        metadata, expected = golden.metadata(), golden.get_tensor(name)
    difference = (samples(pixels) - expected).abs().max().item()
    assert sha256(pixels) == metadata[name], (
        f"{name}: pixels differ, by {difference} in 64 samples. Golden: {metadata['made_with']}; here: Pillow "
        f"{PIL.__version__}. If test_equals_torchvision passes here, Pillow has changed: run make_preprocess.py"
    )


@pytest.mark.parametrize("name", CASES)
def test_golden(name):
    mode, width, height, config = CASES[name]
    pixels = Preprocess(config)(picture(mode, width, height))
    assert (pixels.dtype, pixels.shape) == (torch.float32, (3, config.image_size, config.image_size))
    check_golden(name, pixels)


# Negative controls: each mistake that ports make, and a case that catches it.


def floor_crop(image, size):
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def rounded_resize(image, size, interpolation, resize_mode):
    width, height = (round(size * side / min(image.size)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def resize_without_antialias(image, size, interpolation, resize_mode):
    width, height = (size * side // min(image.size) for side in image.size)
    scale = (image.width / width, 0, 0, 0, image.height / height, 0)
    return image.transform((width, height), Image.Transform.AFFINE, scale, Image.Resampling.BICUBIC)


def normalize_in_float64(pixels, mean, std):
    return torch.from_numpy((pixels / 255 - mean) / std).permute(2, 0, 1).float().contiguous()


@pytest.mark.parametrize(
    ("name", "stage", "wrong"),
    [
        ("landscape", "center_crop", floor_crop),
        ("portrait", "center_crop", floor_crop),
        ("enlarged", "resize", rounded_resize),
        ("landscape", "resize", resize_without_antialias),
        ("unchanged", "normalize", normalize_in_float64),
    ],
)
def test_golden_catches_a_wrong_stage(name, stage, wrong, monkeypatch):
    monkeypatch.setattr(preprocess, stage, wrong)
    monkeypatch.setattr(preprocess, "_can_crop_between_passes", lambda image, config: False)
    with pytest.raises(AssertionError, match="pixels differ"):
        test_golden(name)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["RGB", "L"]), SIDES, SIDES, SIZES, st.sampled_from(["bicubic", "bilinear"]))
def test_cropping_between_the_passes_changes_no_bit(mode, height, more, size, interpolation):
    image = picture(mode, height + more, height)
    plain = center_crop(resize(image, size, interpolation, "shortest"), size)
    early = preprocess._resize_and_crop(image, size, interpolation)
    assert early.size == (size, size) and early.tobytes() == plain.tobytes()


def test_cropping_elsewhere_between_the_passes_is_seen(monkeypatch):
    image = picture("RGB", 61, 40)
    plain = center_crop(resize(image, 20, "bicubic", "shortest"), 20)
    assert preprocess._resize_and_crop(image, 20, "bicubic").tobytes() == plain.tobytes()
    monkeypatch.setattr(preprocess, "round", lambda x: int(x) + 1, raising=False)
    assert preprocess._resize_and_crop(image, 20, "bicubic").tobytes() != plain.tobytes()


@pytest.mark.parametrize("change", [{"interpolation": "bilinear"}, {"resize_mode": "squash"}, {"std": (0.5, 0.5, 0.5)}])
def test_golden_catches_a_wrong_setting(change):
    mode, width, height, config = CASES["landscape"]
    with pytest.raises(AssertionError, match="pixels differ"):
        check_golden("landscape", Preprocess(replace(config, **change))(picture(mode, width, height)))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "PA", "1", "CMYK", "F"])
def test_golden_catches_rgb_before_resize(mode):
    with pytest.raises(AssertionError, match="pixels differ"):
        check_golden(f"mode/{mode}", Preprocess(PreprocessConfig(32))(picture(mode, 64, 43).convert("RGB")))


# Properties


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(MODES), SIDES, SIDES, SIZES, st.sampled_from(["bicubic", "bilinear"]),
    st.sampled_from(["shortest", "squash"]),
)  # fmt: skip
def test_equals_torchvision(mode, width, height, size, interpolation, resize_mode):
    pytest.importorskip("torchvision")
    config = PreprocessConfig(size, interpolation=interpolation, resize_mode=resize_mode)
    image = picture(mode, width, height)
    assert torch.equal(Preprocess(config)(image), torchvision_transform(config)(image))


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(MODES), SIDES, SIDES, SIZES)
def test_output_is_normalized_bytes(mode, width, height, size):
    config = PreprocessConfig(size)
    image = picture(mode, width, height)
    before = image.tobytes()
    pixels = Preprocess(config)(image)
    assert (pixels.dtype, pixels.shape) == (torch.float32, (3, size, size)) and pixels.is_contiguous()
    values = 255 * (pixels.permute(1, 2, 0).double() * torch.tensor(config.std) + torch.tensor(config.mean))
    assert (values - values.round()).abs().max() < 1e-3
    assert values.min() > -0.5 and values.max() < 255.5
    assert image.tobytes() == before


@settings(max_examples=50, deadline=None)
@given(SIDES, SIDES, SIZES, st.tuples(*[st.integers(0, 255)] * 3))
def test_one_colour_stays_that_colour(width, height, size, colour):
    config = PreprocessConfig(size)
    expected = normalize(np.array([[colour]], np.uint8), config.mean, config.std).expand(3, size, size)
    assert torch.equal(Preprocess(config)(Image.new("RGB", (width, height), colour)), expected)


@given(st.integers(1, 40), st.integers(0, 40), st.integers(0, 40))
def test_crop_starts_at_half_the_excess_rounded_to_even(size, excess_x, excess_y):
    y, x = np.mgrid[: size + excess_y, : size + excess_x]
    cropped = np.array(center_crop(Image.fromarray((1000 * y + x).astype(np.int32)), size))
    assert cropped.shape == (size, size)
    top, left = divmod(int(cropped[0, 0]), 1000)
    for start, excess in ((left, excess_x), (top, excess_y)):
        assert start == (excess + (excess % 4 == 3)) // 2


def test_stages():
    image = picture("RGBA", 64, 43)
    resized = resize(image, 32, "bicubic", "shortest")
    cropped = center_crop(resized, 32)
    pixels = to_pixels(cropped)
    config = PreprocessConfig(32)
    assert (resized.mode, resized.size, cropped.size) == ("RGBA", (47, 32), (32, 32))
    assert (pixels.dtype, pixels.shape) == (np.uint8, (32, 32, 3))
    assert torch.equal(normalize(pixels, config.mean, config.std), Preprocess(config)(image))


def test_repr_says_everything():
    assert repr(PreprocessConfig(224)) in repr(Preprocess(PreprocessConfig(224)))


def test_exif_orientation_is_ignored(tmp_path):
    image, exif = picture("RGB", 64, 43), Image.Exif()
    exif[0x0112] = 6  # the tag Orientation: turn by 90 degrees
    image.save(tmp_path / "turned.png", exif=exif)
    turned = open_image(tmp_path / "turned.png")
    transform = Preprocess(PreprocessConfig(32))
    assert torch.equal(transform(turned), transform(image))
    assert not torch.equal(transform(ImageOps.exif_transpose(turned)), transform(image))


# Errors


def encoded(format: str, mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    picture(mode, 64, 43).save(buffer, format)
    return buffer.getvalue()


BAD_FILES = {
    "empty": (b"", "it is empty"),
    "html": (b"<!DOCTYPE html><title>404</title>", "it begins with b'<!DOCTYPE html>"),
    "jpeg": (encoded("JPEG")[:-200], "truncated"),
    "png": (encoded("PNG")[:-200], "truncated|broken"),
    "gif": (encoded("GIF")[:-200], "truncated"),
    "tiff": (encoded("TIFF")[:-200], "truncated"),
    "damaged png": (encoded("PNG")[:300] + bytes(100) + encoded("PNG")[400:], "data stream"),
    "jpeg header": (encoded("JPEG")[:20], "JFIF"),
    "no width": (b"P6\n0 5\n255\n", "no pixels"),
    "no size": (encoded("BMP")[:18] + bytes(8) + encoded("BMP")[26:], "no pixels"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file(name, tmp_path):
    content, fault = BAD_FILES[name]
    path = tmp_path / f"{name}.jpg"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=fault) as raised:
        open_image(path)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "TIFF"])
def test_good_file_is_decoded_and_closed(format, tmp_path):
    path = tmp_path / "picture"
    path.write_bytes(encoded(format))
    image = open_image(path)
    path.unlink()
    with Image.open(io.BytesIO(encoded(format))) as expected:
        assert image.convert("RGB").tobytes() == expected.convert("RGB").tobytes()


def written(format: str) -> bytes:
    """A picture in any format that Pillow writes; of others what its plugin accepts."""
    if format in ALL_THAT_PILLOW_CANNOT_WRITE:
        return ALL_THAT_PILLOW_CANNOT_WRITE[format] + bytes(1000)
    mode = {"XBM": "1", "MSP": "1", "SPIDER": "F", "BLP": "P", "PALM": "P"}.get(format, "RGB")
    stream = io.BytesIO()
    Image.new(mode, (32, 32)).save(stream, format)
    return stream.getvalue()


ALL_THAT_PILLOW_CANNOT_WRITE = {
    "PSD": b"8BPS\0\1" + bytes(6) + b"\0\3" + b"\0\0\0\x20" * 2 + b"\0\x08\0\3",
    "WMF": b"\xd7\xcd\xc6\x9a\0\0" + b"\0\0\0\0\x20\0\x20\0\x48\0" + bytes(8),
    "FPX": b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1",
    "FLI": bytes(4) + b"\x11\xaf" + bytes(122),
    "FITS": b"SIMPLE  =                    T",
    "GRIB": b"GRIB\0\0\0\1",
    "HDF5": b"\x89HDF\r\n\x1a\n",
    "MPEG": b"\0\0\1\xb3\2\0\x20",
    "PIXAR": b"\x80\xe8\0\0",
    "XPM": b"/* XPM */\n",
    "CUR": b"\0\0\2\0\1\0",
}
FORBIDDEN = ["BLP", "DDS", "EPS", "ICNS", "ICO", "IM", "MSP", "PCX", "PDF", "QOI", "SGI", "SPIDER", "TGA", "XBM"]


@pytest.fixture
def started(monkeypatch) -> list:
    """The programs that were started."""
    programs = []

    def start(*arguments, **options):
        programs.append(arguments)
        raise FileNotFoundError

    monkeypatch.setattr("subprocess.Popen", start)
    monkeypatch.setattr("os.system", start)
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", "gs")
    return programs


@pytest.mark.parametrize("format", [*FORBIDDEN, *ALL_THAT_PILLOW_CANNOT_WRITE])
def test_other_formats_are_refused_whatever_the_name(format, tmp_path, started):
    path = tmp_path / "holiday.jpg"
    path.write_bytes(written(format))
    for source in (path, path.read_bytes(), io.BytesIO(path.read_bytes())):
        with pytest.raises(ImageError, match="is not an image"):
            open_image(source)
    assert started == []


def test_pillow_alone_would_start_a_program(tmp_path, started):
    """The control of the test above."""
    (tmp_path / "holiday.jpg").write_bytes(written("EPS"))
    with pytest.raises(OSError), Image.open(tmp_path / "holiday.jpg") as image:
        image.load()
    assert started and started[0][0][0] == "gs"


@pytest.mark.parametrize("format", [name for name in images.FORMATS if name != "HEIF"])
def test_the_content_decides_on_the_format(format, tmp_path):
    path = tmp_path / "picture.eps"
    path.write_bytes(encoded(format))
    assert format in images.formats()
    expected = open_image(path)
    assert expected.size == (64, 43) and expected.filename == str(path)
    with path.open("rb") as file:
        assert open_image(file).tobytes() == open_image(path.read_bytes()).tobytes() == expected.tobytes()


def test_a_plugin_for_heic(monkeypatch):
    if "HEIF" in images.formats():  # pillow-heif is installed
        stream = io.BytesIO()
        picture("RGB", 64, 43).save(stream, "HEIF")
        assert open_image(stream.getvalue()).size == (64, 43)
        monkeypatch.delitem(Image.OPEN, "HEIF")
    assert "HEIF" not in images.formats()
    monkeypatch.setitem(Image.OPEN, "HEIF", (Image.OPEN["PNG"][0], lambda prefix: prefix[:4] == b"HEIC"))
    assert "HEIF" in images.formats()
    with pytest.raises(ImageError, match="is not an image"):  # the plugin was asked, but this is no PNG
        open_image(b"HEIC" + encoded("PNG"))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes in the file system")
def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    (tmp_path / "random.jpg").symlink_to("/dev/random")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket.jpg"))
        for name in ("pipe", "zero", "random", "socket"):
            with pytest.raises(ImageAccessError, match=f"{name}.jpg: (it is not a regular file|No such device)"):
                open_image(tmp_path / f"{name}.jpg")


def progressive(scans: int, thumbnail: bytes = b"") -> bytes:
    """A progressive JPEG whose last scan is repeated."""
    stream = io.BytesIO()
    exif = Image.Exif()
    exif[0x927C] = thumbnail  # any data: in a segment of its own
    picture("RGB", 300, 200).save(stream, "JPEG", progressive=True, exif=exif)
    whole = stream.getvalue()
    last = whole[whole.rindex(b"\xff\xda") : -2]
    return whole[:-2] + last * (scans - 10) + b"\xff\xd9"


def test_a_jpeg_of_many_scans_is_refused():
    assert open_image(progressive(10)).size == open_image(progressive(50)).size == (300, 200)
    with pytest.raises(ImageError, match="is a JPEG of 200 scans; expected at most 50"):
        open_image(progressive(200))
    head, *scans = progressive(51).split(b"\xff\xda")
    with pytest.raises(ImageError, match="51 scans"):
        open_image(head + b"\xff\xda" + b"\xff\x01\xff\xda".join(scans))  # after markers that have no segment
    film = b"\xff\xda" * 1000  # a phone appends one; and thumbnails
    assert open_image(progressive(10, thumbnail=film) + film).size == (300, 200)


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stream = io.BytesIO()
    picture("RGB", 64, 43).save(stream, "JPEG", exif=exif)
    return stream.getvalue()


@pytest.mark.parametrize("orientation", range(10))
def test_upright(orientation):
    """As Pillow turns it, once."""
    image = open_image(turned(orientation), upright=True)
    assert image.tobytes() == ImageOps.exif_transpose(open_image(turned(orientation))).tobytes()
    assert (image.size == (43, 64)) == (5 <= orientation <= 8)
    assert ImageOps.exif_transpose(image).tobytes() == image.tobytes()
    transform = Preprocess(PreprocessConfig(32), upright=True)
    assert torch.equal(transform(open_image(turned(orientation))), replace(transform, upright=False)(image))


def test_damaged_exif_is_no_fault_of_the_pixels():
    data = turned(6)
    at = data.index(b"Exif\0\0") + 6
    for end in (4, 8, 12, 14, 20, 26):
        damaged = data[:at] + bytes(255 - b for b in data[at : at + end]) + data[at + end :]
        assert open_image(damaged, upright=True).size in ((64, 43), (43, 64))


def test_sixteen_bits_that_become_all_white(recwarn):
    gradient = Image.fromarray(np.arange(300, 300 + 64 * 64, dtype=np.uint16).reshape(64, 64))
    with pytest.warns(UserWarning, match="mode I;16 becomes all white"):
        Preprocess(PreprocessConfig(32))(gradient)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Preprocess(PreprocessConfig(32))(Image.fromarray(np.arange(64 * 64, dtype=np.uint16).reshape(64, 64)))
        Preprocess(PreprocessConfig(32))(Image.new("L", (64, 64), 255))


def test_whose_fault_it_is(tmp_path, monkeypatch):
    """A fault of the content stays; any other may be gone the next time."""
    (tmp_path / "cut.png").write_bytes(encoded("PNG")[:-200])
    good = tmp_path / "good.png"
    good.write_bytes(encoded("PNG"))
    with pytest.raises(ImageError) as raised:
        open_image(tmp_path / "cut.png")
    assert not isinstance(raised.value, ImageAccessError)
    for error in (MemoryError(), OSError(5, "Input/output error")):
        with monkeypatch.context() as patched, pytest.raises(ImageAccessError, match=r"good\.png"):
            patched.setattr("PIL.ImageFile.ImageFile.load", lambda self, error=error: (_ for _ in ()).throw(error))
            open_image(good)
    monkeypatch.setattr("os.open", lambda *_: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    with pytest.raises(ImageAccessError, match="Permission denied"):
        open_image(good)


def test_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x.png").write_bytes(encoded("PNG"))
    assert open_image("~/x.png").size == open_image(Path("~/x.png")).size == (64, 43)


def mutated(content: bytes, chance: random.Random) -> bytes:
    """Some bytes changed, deleted, repeated or made extreme, and perhaps the end cut off."""
    data = bytearray(content)
    for _ in range(chance.choice((1, 2, 5, 20))):
        at = chance.randrange(min(len(data), chance.choice((32, 200, len(data)))))
        length = chance.choice((1, 1, 2, 4, 16))
        part = [bytes(length), b"\xff" * length, chance.randbytes(length), b"", bytes(data[at : at + length]) * 2]
        data[at : at + length] = chance.choice(part)
        if not data:
            break
    return bytes(data[: chance.randrange(len(data) + 1)] if chance.random() < 0.2 else data)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_mutated_pictures():
    """Nothing but an ImageError, in time, and nothing is started. The seed and number say which picture it was."""
    good = [encoded(format) for format in images.FORMATS if format in Image.SAVE]
    good += [progressive(10), turned(6), written("EPS"), encoded("TIFF", "CMYK"), encoded("PNG", "P")]
    transform, decoded = Preprocess(PreprocessConfig(32), upright=True), 0
    started = time.monotonic()
    for number in range(20_000):
        chance = random.Random(number)
        before = time.monotonic()
        try:
            decoded += transform(open_image(mutated(chance.choice(good), chance))).isfinite().all().item()
        except ImageError as error:
            assert str(error), number
        assert time.monotonic() - before < 20, number
        if time.monotonic() - started > 120:
            break
    assert number > 1000 and number / 20 < decoded < number * 0.9


def test_missing_file_and_directory(tmp_path):
    with pytest.raises(ImageError, match=r"missing\.jpg: No such file"):
        open_image(str(tmp_path / "missing.jpg"))
    with pytest.raises(ImageError, match=tmp_path.name):  # the reason is the operating system's
        open_image(tmp_path)


@pytest.mark.parametrize("limit", [64 * 43 - 1, 64 * 43 // 3])  # Pillow warns above it, and raises above twice it
def test_decompression_bomb(limit, tmp_path, monkeypatch):
    path = tmp_path / "bomb.png"
    path.write_bytes(encoded("PNG"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with warnings.catch_warnings(), pytest.raises(ImageError, match=r"bomb\.png.*decompression bomb"):
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        open_image(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 43)
    assert open_image(path).size == (64, 43)


def test_truncated_file_opened_by_pillow(tmp_path):
    path = tmp_path / "half.jpg"
    path.write_bytes(BAD_FILES["jpeg"][0])
    with Image.open(path) as image, pytest.raises(ImageError, match=r"half\.jpg .*truncated"):
        Preprocess(PreprocessConfig(32))(image)
    with Image.open(io.BytesIO(path.read_bytes())) as image, pytest.raises(ImageError, match=r"the image .*truncated"):
        Preprocess(PreprocessConfig(32))(image)


@pytest.mark.parametrize(
    ("got", "advice"),
    [
        ("cat.jpg", r"got str; .*open_image"),
        (np.zeros((4, 4, 3), np.uint8), r"got ndarray; .*fromarray\(array\)"),
        (torch.zeros(3, 4, 4), r"got Tensor; .*permute"),
        (None, "got NoneType"),
    ],
)
def test_not_an_image(got, advice):
    with pytest.raises(TypeError, match=advice):
        Preprocess(PreprocessConfig(32))(got)


def test_mode_that_pillow_cannot_convert():
    with pytest.raises(ImageError, match=r"La.*can't become RGB"):
        Preprocess(PreprocessConfig(32))(Image.new("La", (40, 40)))


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (0, 0)])
def test_no_pixels(size):
    with pytest.raises(ImageError, match="no pixels"):
        Preprocess(PreprocessConfig(32))(Image.new("RGB", size))


def test_thin_image_is_refused_before_it_is_resized(monkeypatch):
    asked = []
    monkeypatch.setattr(Image.Image, "resize", lambda self, size, resample: asked.append(size))
    for width, height, mode in ((1, 10**6, "shortest"), (10**6, 1, "shortest"), (1, 10**6, "squash")):
        with pytest.raises(ImageError, match=f"{width} x {height} pixels.*crop it"):
            resize(Image.new("L", (width, height)), 448, "bicubic", mode)
    assert asked == []
    resize(Image.new("L", (1, 640)), 448, "bicubic", "shortest")
    assert asked == [(448, 448 * 640)]


def test_wrong_arguments():
    image = picture("RGB", 64, 43)
    with pytest.raises(ValueError, match="interpolation is 'lanczos'"):
        resize(image, 32, "lanczos", "shortest")
    with pytest.raises(ValueError, match="resize_mode is 'longest'"):
        resize(image, 32, "bicubic", "longest")
    with pytest.raises(ImageError, match=r"64 x 43 pixels.*too small for a crop of 44 x 44"):
        center_crop(image, 44)
