"""What a comparison found, as text and as JSON."""

from __future__ import annotations

import math
from dataclasses import dataclass

from miniclip.conformance.diagnose import Diagnosis
from miniclip.conformance.measure import Difference

MOST_NAMES = 8  # of stages that are only mentioned


@dataclass(frozen=True)
class StageResult:
    """One stage that the port gave."""

    name: str
    shape: tuple[int, ...]  # the port's
    passed: bool
    fault: str | None = None  # why it can't be measured
    difference: Difference | None = None


@dataclass(frozen=True)
class Comparison:
    """What `compare` finds. `str()` of it is the report that `miniclip compare` prints."""

    stages: tuple[StageResult, ...]  # in forward order
    first_wrong: str | None
    not_given: tuple[str, ...] = ()  # the golden's stages between the last right one and the first wrong one
    diagnosed: bool = False  # whether there was a model to recompute stages with
    diagnosis: Diagnosis | None = None
    hints: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()  # the port's names that the golden lacks

    @property
    def passed(self) -> bool:
        return self.first_wrong is None

    def __str__(self) -> str:
        return as_text(self)


def as_text(comparison: Comparison) -> str:
    """A line for each stage that the port gave, then the first wrong one and what explains it."""
    width = max(len(result.name) for result in comparison.stages)
    lines = [f"{'stage':{width}}  {'shape':>16} {'max error':>10} {'relative':>9} {'cosine':>10}"]
    lines += [_line(result, width) for result in comparison.stages]
    if comparison.unknown:
        lines.append(f"not compared, since the golden has no such stages: {_listed(comparison.unknown)}")
    if comparison.passed:
        return "\n".join([*lines, "", f"all {len(comparison.stages)} stages that were given pass"])
    lines += ["", f"first wrong stage: {comparison.first_wrong}"]
    if comparison.not_given:
        lines.append(f"not given, right before it: {_listed(comparison.not_given)}")
    diagnosis = comparison.diagnosis
    if diagnosis:
        lines.append(f"mistake: {diagnosis.mistake} (explains {diagnosis.explained:.2%} of the deviation)")
        if diagnosis.also:
            lines.append(f"         or, which would look the same here: {'; '.join(diagnosis.also)}")
        lines.append(f"done right in {diagnosis.place}: {diagnosis.code}")
    elif comparison.diagnosed:
        lines.append("mistake: unknown; none of the catalogue explains it")
    else:
        lines.append("mistake: give the golden's model (--model) to have it looked for")
    return "\n".join([*lines, *(f"hint: {hint}" for hint in comparison.hints)])


def _line(result: StageResult, width: int) -> str:
    shape = " ".join(map(str, result.shape)) or "scalar"
    verdict = "pass" if result.passed else "FAIL"
    if result.difference is None:
        return f"{result.name:{width}}  {shape:>16} {result.fault}  {verdict}"
    max_error, relative, cosine, _ = result.difference
    return f"{result.name:{width}}  {shape:>16} {max_error:10.2e} {relative:9.2e} {cosine:10.7f}  {verdict}"


def _listed(names: tuple[str, ...]) -> str:
    more = len(names) - MOST_NAMES
    return ", ".join(names[-MOST_NAMES:]) + (f" and {more} more" if more > 0 else "")


def as_json(comparison: Comparison) -> dict:
    """For json.dumps. A number that JSON lacks (an infinite relative error) is null."""
    diagnosis = comparison.diagnosis
    return {
        "passed": comparison.passed,
        "first_wrong": comparison.first_wrong,
        "diagnosed": comparison.diagnosed,
        "diagnosis": diagnosis and diagnosis.__dict__,
        "hints": comparison.hints,
        "not_given": comparison.not_given,
        "unknown": comparison.unknown,
        "stages": [
            {
                "name": result.name,
                "shape": result.shape,
                "passed": result.passed,
                "fault": result.fault,
                **{name: _finite(x) for name, x in (result.difference._asdict() if result.difference else {}).items()},
            }
            for result in comparison.stages
        ],
    }


def _finite(x: float) -> float | None:
    return x if math.isfinite(x) else None
