"""Weights and inputs made from names, so that any language can make the same ones.

The tensor called `name` is filled, row by row, by a PCG64 generator (XSL-RR 128/64, O'Neill 2014; NumPy's) of its own.
The SHA-256 digest of the name's UTF-8 bytes starts it, both halves read as little-endian integers:

    state = bytes 0..15        increment = bytes 16..31, with the lowest bit set

Each 64-bit output r gives u = floor(r / 2^11) / 2^53, uniform in [0, 1), and the value offset + spread * (2 u - 1),
computed in float64 and rounded to float32. `RULES` has offset and spread for each kind of tensor.
"""

from __future__ import annotations

import hashlib
import math
import re

import numpy as np
import torch
from torch import Tensor

# The first pattern that matches the name counts. A spread of None is sqrt(3 / fan-in), which keeps the variance; the
# fan-in is the product of all dimensions but the first, or the first for the two projections, used as x @ P.
RULES = [
    (r"logit_scale$", 2.5, 0.5),
    (r"token_embedding\.weight$", 0.0, 0.04),
    (r"positional_embedding$", 0.0, 0.2),
    (r"class_embedding$", 0.0, 0.2),
    (r"(ln_\w+|bn\d|downsample\.1)\.weight$", 1.0, 0.3),
    (r"running_var$", 1.0, 0.5),
    (r"(bias|running_mean)$", 0.0, 0.1),
    (r"(weight|proj|text_projection)$", 0.0, None),
]


def uniform(name: str, count: int) -> np.ndarray:
    """`count` float64 numbers in [0, 1) that belong to `name`."""
    digest = hashlib.sha256(name.encode()).digest()
    bits = np.random.PCG64()
    state = {"state": int.from_bytes(digest[:16], "little"), "inc": int.from_bytes(digest[16:], "little") | 1}
    bits.state = {"bit_generator": "PCG64", "state": state, "has_uint32": 0, "uinteger": 0}
    return np.random.Generator(bits).random(count)


def tensor(name: str, shape: tuple[int, ...], offset: float = 0.0, spread: float = 1.0) -> Tensor:
    """float32 values around `offset`, at most `spread` away."""
    values = offset + spread * (2 * uniform(name, math.prod(shape)) - 1)
    return torch.from_numpy(values.astype(np.float32).reshape(shape))


def weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """A state dict of these shapes."""
    result = {}
    for name, shape in shapes.items():
        if name.endswith("num_batches_tracked"):
            result[name] = torch.tensor(0)
            continue
        offset, spread = next((o, s) for pattern, o, s in RULES if re.search(pattern, name))
        if spread is None:
            fan_in = shape[0] if name.endswith(("visual.proj", "text_projection")) else math.prod(shape[1:])
            spread = math.sqrt(3 / fan_in)
        result[name] = tensor(name, shape, offset, spread)
    return result


def image(count: int, size: int) -> Tensor:
    """Pixels [count, 3, size, size] in [-2, 2], about the range of normalised photographs."""
    return tensor("image", (count, 3, size, size), spread=2.0)


def text(count: int, context_length: int, vocab_size: int) -> Tensor:
    """Token ids [count, context_length] (int32): a start, words, an end and padding; row i has i + 1 words.

    The last row ends twice, as a text does that has the end-of-text token typed in it.
    """
    words = (uniform("text", count * context_length) * (vocab_size - 2)).astype(np.int32)
    ids = torch.from_numpy(words.reshape(count, context_length))
    ids[:, 0] = vocab_size - 2
    for row in range(count):
        end = min(row + 2, context_length - 1)
        ids[row, end] = vocab_size - 1
        ids[row, end + 1 :] = 0
    ids[-1, -1] = vocab_size - 1
    return ids
