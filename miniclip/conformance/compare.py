"""Compare the stages of a port with a golden trace: find the first one that is wrong, and explain it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import takewhile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from miniclip.conformance.diagnose import diagnose
from miniclip.conformance.files import TraceError, load_stages, load_trace, weights_sha256
from miniclip.conformance.hints import hints
from miniclip.conformance.measure import INPUTS, PRECISIONS, WEIGHT, fit, measure, tolerance_of
from miniclip.conformance.mistakes.tokens import explain
from miniclip.conformance.report import Comparison, StageResult, WrongText
from miniclip.conformance.rules import strings
from miniclip.conformance.trace import trace
from miniclip.loading import load
from miniclip.models import CLIP
from miniclip.stages import tower_of


def compare(
    golden: Mapping[str, Tensor],
    mine: Mapping[str, Tensor | np.ndarray],
    model: CLIP | None = None,
    dtype: torch.dtype | None = None,
) -> Comparison:
    """Compare a port's stages, any subset, with those of `trace`.

    golden     all stages, or some, in forward order
    mine       the port's, under the same names, in any float dtype; for the shapes that are taken see `measure.fit`.
               With a model also w.NAME, the weight NAME as the port has read it
    model      the model that made the golden: then a wrong stage is diagnosed, and if the port's pixels pass without
               being equal, the stages after them are compared with those that the model computes from these pixels
    dtype      what the port computes in, where its file doesn't show it; None: the dtype of each stage

    Raises TraceError when there is nothing to compare, the golden is not sound, or the model is another one.
    """
    if dtype not in (None, *PRECISIONS):
        raise TraceError(f"dtype is {dtype}; expected one of {', '.join(map(str, PRECISIONS))}")
    for name, stage in golden.items():
        if stage.is_floating_point() and not stage.isfinite().all():
            raise TraceError(f"the golden's {name} has NaNs or infinities: trace the model again")
    golden = _weights(model, mine) | dict(golden)
    given = {name: _as_tensor(mine[name]) for name in golden if name in mine}
    unknown = tuple(name for name in mine if name not in golden)
    if not given:
        remedy = "; its weights (w.NAME) are compared if the model is given" if model is None else ""
        has = f"the golden has {_some(golden)}; the port {_some(mine)}"
        raise TraceError(f"the two have no stage in common: {has}{remedy if _has_weights(mine) else ''}")

    right = _after_own_pixels(model, golden, given, dtype)
    results = [_judge(name, (golden if name in INPUTS else right)[name], x, dtype) for name, x in given.items()]
    wrong = next((result.name for result in results if not result.passed), None)
    if wrong is None:
        return Comparison(tuple(results), None, unknown=unknown)
    passed = {result.name for result in results if result.passed}
    diagnosis = diagnose(model, right, given[wrong], wrong, passed, dtype) if model is not None else None
    return Comparison(
        stages=tuple(results),
        first_wrong=wrong,
        not_given=_not_given(golden, given, wrong),
        diagnosed=model is not None,
        diagnosis=diagnosis,
        texts=tuple(_wrong_texts(golden, given[wrong])) if wrong == "text.ids" else (),
        hints=tuple(hints(right, given, wrong, diagnosis is not None)),
        unknown=unknown,
    )


def compare_files(
    golden: Path, mine: Path, model: str | None = None, dtype: torch.dtype | None = None, again: Path | None = None
) -> Comparison:
    """Compare a port's file with a golden file, or with the golden's alternative, if there is one and only that passes.

    model      the name of the golden's model, which is loaded only if it is needed: a stage is wrong, or there are
               weights to compare
    again      what the port wrote in a second run of the same process, which must be the same in every bit
    """
    expected, metadata = load_trace(golden)
    stages = load_stages(mine)
    needed = model is not None and _has_weights(stages)
    loaded = load_golden_model(model, metadata) if needed else None
    comparison = compare(expected, stages, loaded, dtype)
    alternative = metadata.get("alternative")
    if alternative and not comparison.passed:
        other = compare(load_trace(golden.parent / Path(alternative).name)[0], stages, loaded, dtype)
        if other.passed:
            comparison = replace(other, alternative=alternative)
    if model is not None and loaded is None and not comparison.passed:
        comparison = compare(expected, stages, load_golden_model(model, metadata), dtype)
    return replace(comparison, changed=_changed(stages, load_stages(again), expected)) if again else comparison


def _has_weights(stages: Iterable[str]) -> bool:
    return any(name.startswith(WEIGHT) for name in stages)


def _weights(model: CLIP | None, mine: Mapping[str, Tensor | np.ndarray]) -> dict[str, Tensor]:
    """The model's weights that the port gave."""
    weights = model.state_dict() if model is not None else {}
    return {WEIGHT + name: x.float().cpu() for name, x in weights.items() if WEIGHT + name in mine}


def _after_own_pixels(
    model: CLIP | None, golden: Mapping[str, Tensor], given: Mapping[str, Tensor], dtype: torch.dtype | None
) -> Mapping[str, Tensor]:
    """The golden for the port's own pixels, if these pass: a byte off by one moves an embedding beyond its limit."""
    name = "image.pixels"
    if model is None or name not in given or not _judge(name, golden[name], given[name], dtype).passed:
        return golden
    pixels = given[name].reshape(golden[name].shape).to(golden[name].dtype)
    if torch.equal(pixels, golden[name]):
        return golden
    own = trace(model, pixels, golden.get("text.ids"))
    return {stage: own[stage] if stage in own and tower_of(stage) != "text" else x for stage, x in golden.items()}


def _changed(first: Mapping[str, Tensor], second: Mapping[str, Tensor], order: Iterable[str]) -> tuple[str, ...]:
    """The stages that differ between two runs, or that only one of them has; those of `order` first."""
    names = [name for name in dict.fromkeys([*order, *first, *second]) if name in first or name in second]
    both = first.keys() & second.keys()
    return tuple(name for name in names if name not in both or not _same_bits(first[name], second[name]))


def _same_bits(x: Tensor, y: Tensor) -> bool:
    bits = [z.contiguous().flatten().view(torch.uint8) for z in (x, y)]
    return x.shape == y.shape and x.dtype == y.dtype and torch.equal(*bits)


def _wrong_texts(golden: Mapping[str, Tensor], mine: Tensor) -> Iterator[WrongText]:
    """Each row of ids that is wrong, with its string and the mistakes that explain this row by itself."""
    both = fit("text.ids", golden["text.ids"], mine)
    if both is None:
        return
    texts = strings(golden["text.utf8"]) if "text.utf8" in golden else [None] * len(both[0])
    for i, (text, right, got) in enumerate(zip(texts, *(x.tolist() for x in both), strict=True)):
        if right != got:
            place = next(k for k, pair in enumerate(zip(right, got, strict=True)) if pair[0] != pair[1])
            yield WrongText(i, text, right, got, place, tuple(explain(text, got)) if text is not None else ())


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
