"""Which mistake of the catalogue explains a wrong stage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from miniclip.conformance.files import TraceError
from miniclip.conformance.forward import Forward, UnknownStageError, stages_of
from miniclip.conformance.measure import INPUTS, Tolerance, fit, measure, tolerance_of
from miniclip.conformance.mistakes import MISTAKES, Mistake
from miniclip.conformance.rules import RULES, picture
from miniclip.conformance.trace import trace
from miniclip.models import CLIP
from miniclip.preprocess import ImageError
from miniclip.stages import tower_of

MOST_UNEXPLAINED = 0.1  # of a stage's deviation, by a mistake that is named
AS_GOOD = 2.0  # times the best explanation's remaining error: then it could be either


@dataclass(frozen=True)
class Diagnosis:
    """A mistake under which our code gives what the port gave."""

    mistake: str
    explained: float  # part of the port's deviation, 1 for all of it
    place: str  # where our code does it right: file:line
    code: str  # that line
    also: tuple[str, ...]  # other mistakes that would look the same


def diagnose(
    model: CLIP,
    golden: Mapping[str, Tensor],
    mine: Tensor,
    wrong: str,
    passed: set[str],
    dtype: torch.dtype | None = None,
) -> Diagnosis | None:
    """Plant every mistake that could show at the stage `wrong`, recompute that stage, and see which one gives `mine`.

    passed: stages that the port has right, from which the stage is recomputed. Raises TraceError if the model is not
    the one that the golden was made with, or the golden lacks what the stage is computed from.
    """
    right = _complete(model, golden, wrong)
    tolerance = tolerance_of(wrong, golden[wrong].dtype, mine.dtype, dtype)
    # If what passed is not where it goes wrong, small errors may have added up on the way: then from the beginning.
    for known in (passed, set()):
        explanations = []
        for mistake, forward in _planted(model, right, wrong, known):
            try:
                remaining = _remaining(wrong, forward[wrong], golden[wrong], mine, tolerance)
            except (UnknownStageError, RuntimeError, ImageError):  # this model, or picture, can't show the mistake
                continue
            if remaining is not None:
                explanations.append((remaining, mistake))
        if explanations:
            return _best(explanations)
    return None


def _best(explanations: list[tuple[float, Mistake]]) -> Diagnosis:
    (least, best), *others = sorted(explanations, key=lambda pair: pair[0])
    also = [other.name for remaining, other in others if remaining <= AS_GOOD * least + 1e-6]
    return Diagnosis(best.name, 1 - least, *best.place(), tuple(dict.fromkeys(also)))


def _complete(model: CLIP, golden: Mapping[str, Tensor], wrong: str) -> dict[str, Tensor]:
    """All stages, also those that the golden leaves out, of the golden's own inputs."""
    image, text = golden.get("image.pixels"), golden.get("text.ids")
    if image is None and "image.decoded" in golden:
        image = picture(golden["image.decoded"])
    needed = {"visual": image, "text": text}
    if tower_of(wrong) in needed and needed[tower_of(wrong)] is None:
        raise TraceError(f"the golden has neither image.pixels nor text.ids before {wrong}: nothing can be recomputed")
    try:
        right = trace(model, image, text)
    except (ValueError, RuntimeError) as error:
        raise TraceError(f"the model can't be run on the golden's inputs: {error}") from error
    for name in golden:
        both = fit(name, golden[name], right.get(name, golden[name]))
        tolerance = tolerance_of(name, golden[name].dtype, model.dtype)
        if both is None or not measure(*both, tolerance).passed:
            raise TraceError(f"this model does not compute the golden's {name}: give the model that made the golden")
    return {name: golden[name] for name in INPUTS if name in golden} | right


def _planted(
    model: CLIP, right: Mapping[str, Tensor], wrong: str, passed: set[str]
) -> Iterator[tuple[Mistake, Forward]]:
    """Every mistake that could show at the wrong stage, in a forward pass in which nothing else is wrong."""
    order = list(stages_of(model.config).values())
    order = order[: [stage.name for stage in order].index(wrong) + 1]
    for tower in (None, "visual", "text") if tower_of(wrong) == "both" else (tower_of(wrong),):
        for mistake in MISTAKES:
            known, wrong_towers = {}, set()
            for stage in order:
                name, of = stage.name, tower_of(stage.name)
                if name in passed:
                    known[name] = right[name]
                elif stage.rule in mistake.planted and tower in (None, of):
                    wrong_towers.add(of)
                elif of not in wrong_towers and name != wrong and name in right:
                    known[name] = right[name]
            if wrong_towers:
                yield mistake, Forward(model, RULES, known, mistake.planted, tower)


def _remaining(stage: str, planted: Tensor, golden: Tensor, mine: Tensor, tolerance: Tolerance) -> float | None:
    """The part of the port's deviation that a mistake leaves unexplained, or None if that is too much."""
    both, deviating = fit(stage, planted, mine), fit(stage, golden, mine)
    if both is None or not torch.equal(both[0].isnan(), both[1].isnan()):
        return None
    unexplained = measure(*(x.double().nan_to_num() for x in both), tolerance)
    if not unexplained.passed:
        return None
    if deviating is None or mine.isnan().any():  # a wrong shape, or NaNs in the same places
        return unexplained.relative_error
    deviation = measure(*deviating, tolerance).relative_error
    remaining = unexplained.relative_error / deviation
    return remaining if remaining <= MOST_UNEXPLAINED else None
