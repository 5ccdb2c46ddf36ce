"""Write preprocess.safetensors: what torchvision makes of the pictures below. test_preprocess.py uses them too.

Run once, with torchvision installed; a later Pillow may resample otherwise, then run it again:

    python tests/conformance/make_preprocess.py

For each case the file holds 64 of the float32 values, and in its metadata the sha256 of all of them: little-endian,
in the order channel, row, column.
"""

import hashlib
from pathlib import Path

import numpy as np
import PIL
import torch
from PIL import Image
from safetensors.torch import save_file

from miniclip.config import PreprocessConfig

GOLDEN = Path(__file__).with_name("preprocess.safetensors")
WIDE_MODES = {"I": "<i4", "F": "<f4", "I;16": "<u2", "I;16B": ">u2"}  # one band of more than 8 bits: its dtype
MODES = ("RGB", "RGBA", "L", "LA", "P", "P+transparency", "PA", "1", "CMYK", "YCbCr", "HSV", "LAB", "RGBX", *WIDE_MODES)

# name: (mode, width, height, config). 64 x 43 becomes 47 x 32, where the crop's offset is 7.5, rounded to 8.
CASES = {f"mode/{mode}": (mode, 64, 43, PreprocessConfig(32)) for mode in MODES} | {
    "landscape": ("RGB", 640, 427, PreprocessConfig(224)),  # offset 55.5
    "portrait": ("RGB", 427, 640, PreprocessConfig(224)),
    "portrait/336": ("RGBA", 500, 749, PreprocessConfig(336)),
    "enlarged": ("RGB", 57, 91, PreprocessConfig(224)),
    "unchanged": ("RGBA", 224, 224, PreprocessConfig(224)),
    "cropped only": ("RGB", 227, 224, PreprocessConfig(224)),
    "line across": ("RGB", 640, 1, PreprocessConfig(224)),
    "line down": ("RGB", 1, 640, PreprocessConfig(224)),
    "one pixel": ("RGB", 5, 4, PreprocessConfig(1)),
    "bilinear": ("RGB", 64, 43, PreprocessConfig(32, interpolation="bilinear")),
    "squash": ("RGB", 64, 43, PreprocessConfig(32, resize_mode="squash")),
    "raw": ("RGB", 64, 43, PreprocessConfig(32, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))),
    "half": ("RGB", 64, 43, PreprocessConfig(32, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))),
}


def picture(mode: str, width: int, height: int) -> Image.Image:
    """Waves that grow finer to the right and down, different in each band; all values of a byte occur."""
    base = mode.split("+")[0]
    bands = Image.getmodebands(base)
    y, x, band = np.ogrid[:height, :width, :bands]
    waves = (x * x + 3 * y * y + 5 * (band + 1) * x * y + 61 * band) % 256  # int64 [height, width, bands]
    if base == "1":
        return Image.fromarray(waves[..., 0] > 127)
    if base in WIDE_MODES:  # beyond 255, and below 0 where there is a sign
        waves = waves * 3 if "16" in base else waves * 2.7 - 200
    image = Image.frombytes(base, (width, height), waves.astype(WIDE_MODES.get(base, "u1")).tobytes())
    if base in ("P", "PA"):
        image.putpalette(bytes(i * i * 37 % 256 for i in range(768)))
    if mode == "P+transparency":
        image.info["transparency"] = bytes(range(256))
    return image


def torchvision_transform(config: PreprocessConfig):
    """openai/CLIP's transform, and what OpenCLIP makes of the other settings."""
    from torchvision import transforms

    size = config.image_size
    return transforms.Compose(
        [
            transforms.Resize(
                size if config.resize_mode == "shortest" else (size, size),
                transforms.InterpolationMode(config.interpolation),
            ),
            transforms.CenterCrop(size),
            lambda image: image.convert("RGB"),
            transforms.ToTensor(),
            transforms.Normalize(config.mean, config.std),
        ]
    )


def sha256(pixels: torch.Tensor) -> str:
    return hashlib.sha256(pixels.numpy().astype("<f4").tobytes()).hexdigest()


def samples(pixels: torch.Tensor) -> torch.Tensor:
    return pixels.flatten()[torch.linspace(0, pixels.numel() - 1, 64).long()]


if __name__ == "__main__":
    import torchvision

    outputs = {
        name: torchvision_transform(config)(picture(mode, width, height))
        for name, (mode, width, height, config) in CASES.items()
    }
    made_with = f"Pillow {PIL.__version__}, torchvision {torchvision.__version__}"
    save_file(
        {name: samples(pixels) for name, pixels in outputs.items()},
        GOLDEN,
        metadata={name: sha256(pixels) for name, pixels in outputs.items()} | {"made_with": made_with},
    )
