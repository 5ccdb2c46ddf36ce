"""What can be said about a wrong stage without knowing how it is computed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import permutations

import torch
from torch import Tensor

from miniclip.conformance.measure import PRECISIONS, WEIGHT, Tolerance, fit, measure

CLOSE = Tolerance(1e-3, 1e-4)  # within this, a hint counts as true


def hints(
    golden: Mapping[str, Tensor], given: Mapping[str, Tensor], wrong: str, explained: bool = False
) -> Iterator[str]:
    """A sentence for each observation about the stage `wrong` of those that the port gave.

    explained: a mistake that explains the stage is known. Then a small error is no sign of half precision.
    """
    expected, mine = golden[wrong].double(), given[wrong].double()
    yield from _of_place(golden, mine, wrong)
    yield from _of_shape(expected, mine)
    both = fit(wrong, expected, mine)
    if both is None:
        if expected.numel() == mine.numel() and measure(expected.flatten(), mine.flatten(), CLOSE).passed:
            yield "its numbers are right, only its shape is not"
    elif not both[1].any():
        yield "it is all zeros"
    else:
        factor = float((both[0] * both[1]).sum() / both[0].square().sum())
        if abs(factor - 1) > 1e-3 and measure(both[0] * factor, both[1], CLOSE).passed:
            yield f"it is the golden's times {factor:.6g}"
        if not explained and not wrong.startswith(WEIGHT) and measure(*both, PRECISIONS[torch.bfloat16]).passed:
            yield from _of_precision(given[wrong])
    pixels = "image.pixels"
    if pixels in given and wrong.startswith(("visual", "image_embedding", "logits")) and pixels in golden:
        both = fit(pixels, golden[pixels], given[pixels])
        if both is not None and not torch.equal(*(x.double() for x in both)):
            yield "the port's pixels are not quite the golden's: run its towers on the golden's image.pixels first"


def _of_place(golden: Mapping[str, Tensor], mine: Tensor, wrong: str) -> Iterator[str]:
    for name, stage in golden.items():
        both = fit(wrong, stage, mine) if name != wrong else None
        if both is not None and both[0].any() and measure(*both, CLOSE).passed:
            yield f"it is the golden's {name}"


def _of_shape(expected: Tensor, mine: Tensor) -> Iterator[str]:
    if mine.ndim == expected.ndim <= 4:
        for order in list(permutations(range(mine.ndim)))[1:]:
            turned = mine.permute(order)
            if turned.shape == expected.shape and measure(expected, turned, CLOSE).passed:
                yield f"its dimensions are in another order: it is right after permute{order}"


def _of_precision(mine: Tensor) -> Iterator[str]:
    """mine: a stage that is as near to the golden as half precision comes."""
    if mine.dtype != torch.float32:
        return
    for half in (torch.float16, torch.bfloat16):
        if torch.equal(mine.to(half).float(), mine):
            name = str(half).removeprefix("torch.")
            yield f"all its numbers are {name}'s: the port rounds to it. If it shall, say so with --dtype {name}"
            return
    yield (
        "it is as near as half precision comes: are weights read wrongly (section 3.1: compare them with "
        "weights.json, or give them as w.NAME), or kept in half precision, or sums accumulated in it?"
    )
