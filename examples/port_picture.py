"""From a decoded picture to pixels in plain NumPy, bit for bit as openai/CLIP with Pillow and torchvision makes them.

Written from "The picture" in tests/conformance/README.md. Only the decoding of image files is left to a library.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
WEIGHT_BITS = 22  # of the filter's fixed-point weights


def prepare(record: Callable, picture: np.ndarray, size: int) -> np.ndarray:
    """uint8 [h, w, B] with B = 1, 2, 3 or 4 (grey, grey and alpha, RGB, RGBA) -> float32 [1, 3, size, size].

    record(name, x) is called with each stage, and returns x.
    """
    cropped = record("image.cropped", center_crop(record("image.resized", resize(picture, size)), size))
    return record("image.pixels", normalize(cropped).transpose(2, 0, 1)[None])


def resize(picture: np.ndarray, size: int) -> np.ndarray:
    """Scale the shorter side to `size` and the longer in proportion, rounded down."""
    height, width, bands = picture.shape
    new_height, new_width = (size * side // min(height, width) for side in (height, width))
    if (new_height, new_width) == (height, width):
        return picture
    has_alpha = bands in (2, 4)
    x = multiply_by_alpha(picture) if has_alpha else picture
    axes = [(1, new_width), (0, new_height)]
    if height - new_height > max(2 * (width - new_width), 0):  # Pillow 13 and later; before, always the width first
        axes.reverse()
    for axis, new_size in axes:
        x = resize_axis(x, axis, new_size)
    return divide_by_alpha(x) if has_alpha else x


def resize_axis(picture: np.ndarray, axis: int, new_size: int) -> np.ndarray:
    if picture.shape[axis] == new_size:
        return picture
    x = np.moveaxis(picture, axis, 0).astype(np.int64)
    sums = np.array([np.tensordot(w, x[i : i + len(w)], 1) for i, w in filter_weights(len(x), new_size)])
    rounded = (sums + (1 << (WEIGHT_BITS - 1))) >> WEIGHT_BITS
    return np.moveaxis(rounded.clip(0, 255).astype(np.uint8), 0, axis)


def filter_weights(size: int, new_size: int) -> list[tuple[int, np.ndarray]]:
    """For each position of the output: the first position of the input that it sees, and the weights from there on."""
    scale = size / new_size
    stretch = max(scale, 1.0)  # the kernel widens where the picture shrinks: the antialias
    result = []
    for i in range(new_size):
        center = (i + 0.5) * scale
        first = max(int(center - 2 * stretch + 0.5), 0)
        last = min(int(center + 2 * stretch + 0.5), size)  # not itself included
        weights = [bicubic((j - center + 0.5) * (1 / stretch)) for j in range(first, last)]
        total = 0.0
        for weight in weights:  # not sum(): Python 3.12's rounds otherwise
            total += weight
        weights = [weight / total * 2**WEIGHT_BITS for weight in weights]
        result.append((first, np.array([int(w + 0.5) if w >= 0 else int(w - 0.5) for w in weights])))
    return result


def bicubic(x: float) -> float:
    x = abs(x)
    if x < 1:
        return (1.5 * x - 2.5) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * -0.5 if x < 2 else 0.0


def multiply_by_alpha(picture: np.ndarray) -> np.ndarray:
    """colour * alpha / 255, rounded to the nearest."""
    colour, alpha = picture[..., :-1].astype(np.int64), picture[..., -1:]
    product = colour * alpha + 128
    return np.concatenate([(product + (product >> 8)) >> 8, alpha], axis=2).astype(np.uint8)


def divide_by_alpha(picture: np.ndarray) -> np.ndarray:
    """255 * colour / alpha, rounded down, at most 255; the colour itself where alpha is 0."""
    colour, alpha = picture[..., :-1].astype(np.int64), picture[..., -1:]
    divided = np.where(alpha > 0, 255 * colour // np.maximum(alpha, 1), colour)
    return np.concatenate([divided.clip(0, 255), alpha], axis=2).astype(np.uint8)


def center_crop(picture: np.ndarray, size: int) -> np.ndarray:
    """The size x size middle, in RGB: grey is repeated, alpha is dropped."""
    top, left = (round((side - size) / 2) for side in picture.shape[:2])  # Python rounds half to even
    middle = picture[top : top + size, left : left + size]
    return middle[..., :3] if middle.shape[2] > 2 else middle[..., :1].repeat(3, axis=2)


def normalize(picture: np.ndarray) -> np.ndarray:
    """uint8 -> float32, rounded to float32 after each of the three operations."""
    return (picture.astype(np.float32) / np.float32(255) - MEAN) / STD
