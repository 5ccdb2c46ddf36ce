"""Mistakes in reading the file of weights. They show in a port's stages w.NAME, which must be equal in every bit.

Those in reading numbers are also looked for in the towers, where all weights have them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from miniclip.conformance.forward import Rule
from miniclip.conformance.mistakes.mistake import Mistake, place_of
from miniclip.conformance.rules import RULES
from miniclip.loading import build_model

LEAST_NORMAL = 2.0**-14  # of float16; below it there is no leading 1


def _subnormals(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.where((x != 0) & (x.abs() < LEAST_NORMAL), change(x), x)


def _with_leading_one(x: Tensor) -> Tensor:
    """m / 1024 * 2^-14 read as (1 + m / 1024) * 2^-15."""
    return x.sign() * (LEAST_NORMAL / 2 + x.abs() / 2)


def _as(dtype: torch.dtype, read_as: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda x: x.to(dtype).view(read_as).float()


def _other_order(x: Tensor) -> Tensor:
    """The two bytes of each float16 swapped."""
    pairs = x.half().contiguous().view(torch.uint8).reshape(-1, 2)
    return pairs.flip(1).contiguous().view(torch.float16).float().reshape(x.shape)


def _transposed(x: Tensor) -> Tensor:
    return x.T if x.ndim == 2 else x


NUMBERS: dict[str, Callable[[Tensor], Tensor]] = {
    "float16 subnormals read as zero (section 3.1)": _subnormals(torch.zeros_like),
    "float16 subnormals read as if they had a leading 1 (section 3.1)": _subnormals(_with_leading_one),
    "float16 subnormals read with an exponent that is one too low (section 3.1)": _subnormals(lambda x: x / 2),
    "float16 read as bfloat16": _as(torch.float16, torch.bfloat16),
    "bfloat16 read as float16": _as(torch.bfloat16, torch.float16),
    "bytes of float16 in big-endian order": _other_order,
}
WEIGHTS = NUMBERS | {
    "matrix transposed": _transposed,
    "matrix read with its sides exchanged": lambda x: x.reshape(x.T.shape) if x.ndim == 2 else x,
}


def _equal(x: Tensor, y: Tensor) -> bool:
    return x.shape == y.shape and torch.allclose(x, y, rtol=0, atol=0, equal_nan=True)


def place() -> tuple[str, str]:
    """Where our code does it right: the file and line, and that line."""
    return place_of(build_model, "copy_(state_dict[name])")


def _with_weights(rule: Rule, change: Callable[[Tensor], Tensor]) -> Rule:
    return lambda s: rule(s.with_weights(change))


def _misread(name: str, change: Callable[[Tensor], Tensor]) -> Mistake:
    rules = {key: rule for key, rule in RULES.items() if not key.startswith(("image.", "text.ids"))}
    planted = {key: _with_weights(rule, change) for key, rule in rules.items()}
    planted["token_embedding"] = lambda s: change(RULES["token_embedding"](s))  # not the whole table: that is slow
    return Mistake(name, planted, build_model, "copy_(")


MISREAD = tuple(_misread(name, change) for name, change in NUMBERS.items())


def explain(right: Tensor, mine: Tensor) -> list[str]:
    """The mistakes that turn the right weight into `mine`, NaNs among them."""
    found = {name: change(right.float()) for name, change in WEIGHTS.items()}
    return [name for name, x in found.items() if _equal(x, mine.float()) and not _equal(x, right.float())]
