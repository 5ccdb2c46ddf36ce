"""Pillow's bicubic resize in NumPy, equal in every bit, with an argument for each step that a port may get wrong."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import PIL
import torch
from torch import Tensor

HALF = 1 << 21  # of a weight in fixed point
HEIGHT_FIRST = int(PIL.__version__.split(".")[0]) >= 13  # of tall pictures


class Steps(NamedTuple):
    """What a port may do otherwise in the resize; the defaults are Pillow's."""

    a: float = -0.5  # the coefficient of the cubic
    antialias: bool = True
    rounding: int = HALF  # added before a sum is cut to an integer
    wraps: bool = False  # a byte below 0 or above 255 wraps instead of being clamped
    premultiplied: bool = True  # colours are multiplied by alpha before the filter, and divided by it afterwards
    divided_rounds: bool = False  # that quotient is rounded, not cut
    divided_wraps: bool = False  # above 255 it wraps instead of being clamped


def resampled(picture: Tensor, size: tuple[int, int], steps: Steps) -> Tensor:
    """uint8 [h, w, B] resized to `size`, which is height and width."""
    x = picture.numpy().astype(np.int64)
    if x.shape[:2] == size:
        return picture
    alpha = steps.premultiplied and x.shape[2] in (2, 4)
    if alpha:
        product = x[..., :-1] * x[..., -1:] + 128
        x = np.concatenate([(product + (product >> 8)) >> 8, x[..., -1:]], axis=2)
    height_first = HEIGHT_FIRST and x.shape[0] - size[0] > max(2 * (x.shape[1] - size[1]), 0)
    for axis in (0, 1) if height_first else (1, 0):
        x = _pass(x, axis, size[axis], steps)
    if alpha:
        divisor = np.maximum(x[..., -1:], 1)
        quotient = (255 * x[..., :-1] + divisor // 2 * steps.divided_rounds) // divisor
        quotient = quotient & 255 if steps.divided_wraps else quotient.clip(0, 255)
        x = np.concatenate([np.where(x[..., -1:] > 0, quotient, x[..., :-1]), x[..., -1:]], axis=2)
    return torch.from_numpy(x.astype(np.uint8))


def _pass(x: np.ndarray, axis: int, size: int, steps: Steps) -> np.ndarray:
    if x.shape[axis] == size:
        return x
    sums = np.tensordot(_weights(x.shape[axis], size, steps), x, (1, axis))  # of integers below 2^53: exact
    cut = (sums.astype(np.int64) + steps.rounding) >> 22
    return np.moveaxis(cut & 255 if steps.wraps else cut.clip(0, 255), 0, axis)


def _weights(size: int, new_size: int, steps: Steps) -> np.ndarray:
    """[new_size, size], integers in units of 2^-22."""
    scale = size / new_size
    stretch = max(scale, 1.0) if steps.antialias else 1.0
    center, j = (np.arange(new_size)[:, None] + 0.5) * scale, np.arange(size)
    seen = (j >= np.trunc(center - 2 * stretch + 0.5)) & (j < np.trunc(center + 2 * stretch + 0.5))
    weights = np.where(seen, _cubic((j - center + 0.5) * (1 / stretch), steps.a), 0.0)
    weights = weights / weights.cumsum(axis=1)[:, -1:] * 2**22  # cumsum adds from the left
    return np.trunc(weights + np.copysign(0.5, weights))


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
    x = abs(x)
    near, far = ((a + 2) * x - (a + 3)) * x * x + 1, (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))
