"""How far a stage is from another, and how far it may be."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from miniclip.stages import token_sides


class Tolerance(NamedTuple):
    """A stage passes when both errors are at most this."""

    largest: float  # largest |difference| of an element / largest |element| of the golden
    relative: float  # |difference| / |golden|, in Euclidean norms
    least: float = 0.0  # the golden's largest element counts as at least this, its root mean square as at least half


EXACT = Tolerance(0.0, 0.0)
INPUTS = {  # stages whose tolerance does not come from the arithmetic
    "image.decoded": EXACT,
    # Now and then a byte is off by one, in a dark picture too: Pillow's weights are fixed point.
    "image.resized": Tolerance(1 / 128, 1e-3, least=255.0),
    "image.cropped": Tolerance(1 / 128, 1e-3, least=255.0),
    "image.pixels": Tolerance(1e-2, 1e-3, least=2.0),
    "text.utf8": EXACT,
    "text.ids": EXACT,
}
# All other stages, by the precision in which the port, or the golden, was computed. About ten times what the rounding
# of 2 to 7 blocks was seen to do in float32 (1e-6, 4e-6), five times in float16 (2e-3, 4e-3), three times in bfloat16
# (1.6e-2, 3.4e-2).
PRECISIONS = {
    torch.float64: Tolerance(1e-4, 2e-5),
    torch.float32: Tolerance(1e-4, 2e-5),
    torch.float16: Tolerance(2e-2, 1e-2),
    torch.bfloat16: Tolerance(1e-1, 4.5e-2),
}
WEIGHT = "w."  # a port's stage w.NAME is the weight NAME as it has read it


class Difference(NamedTuple):
    """What `measure` finds: each error with its limit in the same unit, then the units of other projects' kits."""

    max_error: float  # largest |difference| of an element
    max_limit: float
    relative_error: float  # |difference| / |golden|
    relative_limit: float
    cosine: float
    nmse: float  # squared difference / squared golden, as in ggml's tests
    ulp: int | None  # largest distance in units in the last place of float32, as in WebNN's; None with NaNs
    passed: bool


def tolerance_of(stage: str, *dtypes: torch.dtype | None) -> Tolerance:
    """What the least precise of these dtypes allows."""
    if INPUTS.get(stage) == EXACT:
        return EXACT
    fixed = EXACT if stage.startswith(WEIGHT) else INPUTS.get(stage)
    rounded = [PRECISIONS.get(dtype, EXACT) for dtype in dtypes] if fixed is None else [fixed]
    rounded += [PRECISIONS[dtype] for dtype in dtypes if dtype in (torch.float16, torch.bfloat16)]
    return Tolerance(*(max(sides) for sides in zip(*rounded, strict=True)))


def fit(stage: str, golden: Tensor, mine: Tensor) -> tuple[Tensor, Tensor] | None:
    """Both in the same shape, or None if they can't be.

    A first side of 1, of one image or text, may be left out. Text stages may differ in their number of tokens, since
    padding has no influence on what comes before it: those that both have are kept.
    """
    if golden.ndim == mine.ndim + 1 and golden.shape[0] == 1:
        mine = mine[None]
    if golden.ndim == mine.ndim and not stage.startswith(WEIGHT):
        for side in token_sides(stage):
            tokens = min(golden.shape[side], mine.shape[side])
            golden, mine = golden.narrow(side, 0, tokens), mine.narrow(side, 0, tokens)
    return (golden, mine) if golden.shape == mine.shape else None


def measure(golden: Tensor, mine: Tensor, tolerance: Tolerance) -> Difference:
    """Compare two tensors of the same shape. NaNs and infinities anywhere make the errors NaN, which never passes."""
    golden, mine = golden.double(), mine.double()
    difference = mine - golden
    max_error, length = float(difference.abs().max()), float(golden.norm())
    relative = _quotient(difference, max(length, tolerance.least / 2 * math.sqrt(golden.numel())))
    norms = length * float(mine.norm())
    cosine = float((golden * mine).sum()) / norms if norms else float(max_error == 0)
    max_limit = tolerance.largest * max(float(golden.abs().max()), tolerance.least)
    passed = max_error <= max_limit and relative <= tolerance.relative
    ulp = None if math.isnan(max_error) else int((_ordered(golden) - _ordered(mine)).abs().max())
    nmse = _quotient(difference, length) ** 2
    return Difference(max_error, max_limit, relative, tolerance.relative, cosine, nmse, ulp, passed)


def _quotient(difference: Tensor, length: float) -> float:
    """|difference| / length."""
    norm = float(difference.norm())
    return norm / length if length else (0.0 if norm == 0 else math.inf)


def _ordered(x: Tensor) -> Tensor:
    """float32 numbers as integers, neighbours one apart; 0 and -0 are the same."""
    bits = x.float().view(torch.int32).long()
    return torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)
