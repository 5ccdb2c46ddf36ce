"""Which mistake of the catalogue explains a wrong stage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from miniclip.conformance.files import TraceError, cut_to, end_of_text
from miniclip.conformance.forward import Forward, UnknownStageError, stages_of
from miniclip.conformance.measure import INPUTS, WEIGHT, Tolerance, fit, measure, tolerance_of
from miniclip.conformance.mistakes import MISTAKES, Mistake, weights
from miniclip.conformance.rules import RULES, picture
from miniclip.conformance.trace import trace
from miniclip.models import CLIP
from miniclip.preprocess import ImageError
from miniclip.stages import token_sides, tower_of

MOST_UNEXPLAINED = 0.1  # the part of the port's error that a mistake may leave unexplained
LARGE = 50_000_000  # a model with fewer weights is diagnosed in one thread
CANNOT_SHOW = (UnknownStageError, RuntimeError, IndexError, ImageError)  # raised where a model or picture lacks a part
AS_GOOD = 2.0  # a mistake that leaves at most this many times what the best one leaves is named too


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
    """Plant each mistake that could show at the stage `wrong`, recompute that stage and find the one that gives `mine`.

    passed: stages that the port has right, from which the stage is recomputed. Raises TraceError if the model is not
    the one that the golden was made with, or the golden lacks what the stage is computed from.
    """
    if wrong.startswith(WEIGHT):
        return _weight(golden[wrong], mine)
    tolerance = tolerance_of(wrong, golden[wrong].dtype, mine.dtype, dtype)
    with _one_thread(model):
        right = _complete(model, golden, wrong)
        columns = (right, *_in_fewer_columns(model, right, wrong, mine))
        # First recompute only stages that did not pass. If no mistake explains the result, small errors may have passed
        # and then added up: recompute all.
        for known in (passed, set()) if passed else (set(),):
            explanations = []
            for mistake, forward in chain.from_iterable(_planted(model, x, wrong, known) for x in columns):
                try:
                    remaining = _remaining(wrong, forward[wrong], golden[wrong], mine, tolerance)
                    if remaining is not None:
                        contradicted = _contradicted(mistake, forward, right, wrong, passed)
                        explanations.append((contradicted, remaining, mistake))
                except CANNOT_SHOW:
                    continue
            if explanations:
                return _best(explanations)
    return None


def _weight(right: Tensor, mine: Tensor) -> Diagnosis | None:
    if names := weights.explain(right, mine):
        return Diagnosis(names[0], 1.0, *weights.place(), tuple(names[1:]))
    return None


@contextmanager
def _one_thread(model: CLIP) -> Iterator[None]:
    """Inside it PyTorch uses one thread if the model is small: several would mostly wait for each other."""
    threads = torch.get_num_threads()
    if sum(x.numel() for x in model.parameters()) < LARGE:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _contradicted(
    mistake: Mistake, forward: Forward, right: Mapping[str, Tensor], wrong: str, passed: set[str]
) -> bool:
    """Whether the mistake would also show at a stage of the same block, or of none, that the port has right."""
    block = forward.stages[wrong].block
    for name in passed:
        stage = forward.stages.get(name)
        same = stage and stage.block == block and tower_of(name) == tower_of(wrong)
        if same and stage.rule in mistake.planted:
            both = fit(name, right[name], forward.compute(name))
            if both is None or not measure(*both, tolerance_of(name, right[name].dtype)).passed:
                return True
    return False


def _best(explanations: list[tuple[bool, float, Mistake]]) -> Diagnosis:
    (contradicted, least, best), *others = sorted(explanations, key=lambda row: row[:2])
    alike = [row[2].name for row in others if row[0] == contradicted and row[1] <= AS_GOOD * least + 1e-6]
    return Diagnosis(best.name, 1 - least, *best.place(), tuple(x for x in dict.fromkeys(alike) if x != best.name))


def _complete(model: CLIP, golden: Mapping[str, Tensor], wrong: str) -> dict[str, Tensor]:
    """All stages for the golden's inputs, also those that the golden leaves out."""
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
    for name in filter(right.__contains__, golden):
        both = fit(name, golden[name], right[name])
        tolerance = tolerance_of(name, golden[name].dtype, model.dtype)
        if both is None or not measure(*both, tolerance).passed:
            raise TraceError(f"this model does not compute the golden's {name}: give the model that made the golden")
    return {name: golden[name] for name in INPUTS if name in golden} | right


def _in_fewer_columns(
    model: CLIP, right: Mapping[str, Tensor], wrong: str, mine: Tensor
) -> Iterator[Mapping[str, Tensor]]:
    """The stages of a port that leaves columns of padding out, since a mistake may give other values there.

    The columns of a stage with tokens are known; a stage without tokens may come from those up to the last end.
    """
    if wrong == "text.ids" or "text.ids" not in right or tower_of(wrong) == "visual" or not model.transformer.causal:
        return
    both, sides = fit(wrong, right[wrong], mine), token_sides(wrong)
    columns = both[1].shape[sides[0]] if both and sides else end_of_text(right)
    if columns < right["text.ids"].shape[1]:
        yield cut_to(right, columns)


def _planted(
    model: CLIP, right: Mapping[str, Tensor], wrong: str, passed: set[str]
) -> Iterator[tuple[Mistake, Forward]]:
    """Every mistake that could show at the wrong stage, in a forward pass in which nothing else is wrong."""
    order = list(stages_of(model.config).values())
    order = order[: [stage.name for stage in order].index(wrong) + 1]
    towers = (None, "visual", "text") if tower_of(wrong) == "both" else (tower_of(wrong),)
    for mistake in MISTAKES:
        affected = {tower_of(x.name) for x in order if x.rule in mistake.planted and x.name not in passed}
        for tower in towers:
            if tower is not None and affected == {tower} and None in towers:
                continue  # the same as in both towers
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
