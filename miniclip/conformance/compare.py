"""Compare the stages of a port with a golden trace: the first one that is wrong, and why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import permutations, takewhile

import numpy as np
import torch
from torch import Tensor

from miniclip.conformance.diagnose import diagnose
from miniclip.conformance.files import TraceError, weights_sha256
from miniclip.conformance.measure import PRECISIONS, Tolerance, fit, measure, tolerance_of
from miniclip.conformance.report import Comparison, StageResult
from miniclip.loading import load
from miniclip.models import CLIP

CLOSE = Tolerance(1e-3, 1e-4)  # for a hint


def compare(
    golden: Mapping[str, Tensor],
    mine: Mapping[str, Tensor | np.ndarray],
    model: CLIP | None = None,
    dtype: torch.dtype | None = None,
) -> Comparison:
    """Compare a port's stages, any subset, with those of `trace`.

    golden     all stages, or some, in forward order
    mine       the port's, under the same names, in any float dtype; for the shapes that are taken see `measure.fit`
    model      the model that made the golden: then a wrong stage is diagnosed
    dtype      what the port computes in, where its file doesn't show it; None: the dtype of each stage

    Raises TraceError when there is nothing to compare, the golden is not sound, or the model is another one.
    """
    if dtype not in (None, *PRECISIONS):
        raise TraceError(f"dtype is {dtype}; expected one of {', '.join(map(str, PRECISIONS))}")
    for name, stage in golden.items():
        if stage.is_floating_point() and not stage.isfinite().all():
            raise TraceError(f"the golden's {name} has NaNs or infinities: trace the model again")
    given = {name: _as_tensor(mine[name]) for name in golden if name in mine}
    unknown = tuple(name for name in mine if name not in golden)
    if not given:
        raise TraceError(f"the two have no stage in common: the golden has {_some(golden)}; the port {_some(mine)}")

    results = [_judge(name, golden[name], x, dtype) for name, x in given.items()]
    wrong = next((result.name for result in results if not result.passed), None)
    if wrong is None:
        return Comparison(tuple(results), None, unknown=unknown)
    passed = {result.name for result in results if result.passed}
    return Comparison(
        stages=tuple(results),
        first_wrong=wrong,
        not_given=_not_given(golden, given, wrong),
        diagnosed=model is not None,
        diagnosis=diagnose(model, golden, given[wrong], wrong, passed, dtype) if model is not None else None,
        hints=tuple(_hints(golden, given, wrong)),
        unknown=unknown,
    )


def _as_tensor(x: Tensor | np.ndarray) -> Tensor:
    return x if isinstance(x, Tensor) else torch.from_numpy(np.array(x, order="C"))  # any strides, also read-only ones


def _some(names: Mapping[str, Tensor]) -> str:
    return ", ".join([*list(names)[:3], *(["..."] if len(names) > 3 else [])]) or "nothing"


def _judge(name: str, golden: Tensor, mine: Tensor, dtype: torch.dtype | None) -> StageResult:
    shape = tuple(mine.shape)
    both = fit(name, golden, mine)
    if both is None:
        return StageResult(name, shape, False, f"has shape {list(shape)}; expected {list(golden.shape)}")
    strange = ~both[1].isfinite()
    if strange.any():
        first = strange.nonzero()[0].tolist()
        return StageResult(name, shape, False, f"has {int(strange.sum())} NaNs or infinities, the first at {first}")
    difference = measure(*both, tolerance_of(name, golden.dtype, mine.dtype, dtype))
    return StageResult(name, shape, difference.passed, None, difference)


def _not_given(golden: Mapping[str, Tensor], given: Mapping[str, Tensor], wrong: str) -> tuple[str, ...]:
    """The golden's stages right before the wrong one that the port did not give."""
    before = list(golden)[: list(golden).index(wrong)]
    return tuple(reversed(list(takewhile(lambda name: name not in given, reversed(before)))))


def _hints(golden: Mapping[str, Tensor], given: Mapping[str, Tensor], wrong: str) -> Iterator[str]:
    """What can be said about a wrong stage without knowing how it is computed."""
    expected, mine = golden[wrong].double(), given[wrong].double()
    for name, stage in golden.items():
        both = fit(wrong, stage, mine) if name != wrong else None
        if both is not None and both[0].any() and measure(*both, CLOSE).passed:
            yield f"it is the golden's {name}"
    if mine.ndim == expected.ndim <= 4:
        for order in list(permutations(range(mine.ndim)))[1:]:
            turned = mine.permute(order)
            if turned.shape == expected.shape and measure(expected, turned, CLOSE).passed:
                yield f"its dimensions are in another order: it is right after permute{order}"
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
    pixels = "image.pixels"
    if pixels in given and wrong.startswith(("visual", "image_embedding", "logits")) and pixels in golden:
        both = fit(pixels, golden[pixels], given[pixels])
        if both is not None and not torch.equal(*(x.double() for x in both)):
            yield "the port's pixels are not quite the golden's: run its towers on the golden's image.pixels first"


def load_golden_model(name: str, metadata: Mapping[str, str]) -> CLIP:
    """The model of this name, on the CPU, if it has the weights that the golden was made with."""
    model, _ = load(name, device="cpu", dtype=metadata["dtype"])
    digest = weights_sha256(model)
    if digest != metadata["model_sha256"]:
        raise TraceError(
            f"{name} is not the model that made the golden ({metadata['model']}): the sha256 of its weights is "
            f"{digest[:16]}..., the golden's {metadata['model_sha256'][:16]}...; give that one, or trace this one anew"
        )
    return model
