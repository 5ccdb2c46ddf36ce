"""What a comparison found, as text and as JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from miniclip.conformance.diagnose import Diagnosis
from miniclip.conformance.measure import WEIGHT, Difference

MOST_NAMES = 8  # of stages that are only mentioned
MOST_ROWS = 10  # of wrong stages, and of wrong texts, that are shown unless all are asked for


@dataclass(frozen=True)
class StageResult:
    """One stage that the port gave."""

    name: str
    shape: tuple[int, ...]  # the port's
    passed: bool
    fault: str | None = None  # why it can't be measured
    difference: Difference | None = None


@dataclass(frozen=True)
class WrongText:
    """A row of text.ids that is wrong."""

    row: int
    text: str | None  # None: the golden doesn't say
    expected: list[int]
    got: list[int]
    place: int  # of the first id that differs
    mistakes: tuple[str, ...]  # those under which this text gets these ids


@dataclass(frozen=True)
class Comparison:
    """What `compare` finds. `str()` of it is the report that `miniclip compare` prints."""

    stages: tuple[StageResult, ...]  # in forward order
    first_wrong: str | None
    not_given: tuple[str, ...] = ()  # the golden's stages between the last right one and the first wrong one
    diagnosed: bool = False  # whether there was a model to recompute stages with
    diagnosis: Diagnosis | None = None
    texts: tuple[WrongText, ...] = ()
    hints: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()  # the port's names that the golden lacks
    alternative: str | None = None  # the golden file that the port matches instead of the one that was named
    changed: tuple[str, ...] = ()  # the stages that differ between the port's two runs

    @property
    def passed(self) -> bool:
        return self.first_wrong is None and not self.changed

    def __str__(self) -> str:
        return as_text(self)


def as_text(comparison: Comparison, all_stages: bool = False) -> str:
    """The stages that are wrong, or all; then the first wrong one and what explains it; then a summary."""
    failed = [result for result in comparison.stages if not result.passed]
    shown = comparison.stages if all_stages else failed[:MOST_ROWS]
    lines = _table(shown) if shown else []
    if len(failed) > len(shown):
        lines.append(f"... and {len(failed) - len(shown)} later stages that are wrong too (--all shows every stage)")
    if comparison.first_wrong:
        lines += ["", *_explained(comparison)]
    if comparison.unknown:
        weights = any(name.startswith(WEIGHT) for name in comparison.unknown)
        remedy = "; weights (w.NAME) need --model" if weights else ""
        lines.append(f"not compared, since the golden has no such stages: {_listed(comparison.unknown)}{remedy}")
    if comparison.changed:
        lines.append(
            f"the second run differs from the first in {_listed(comparison.changed)}: the port changes its weights or "
            "buffers when it runs, or uses memory that it has not set"
        )
    if comparison.alternative:
        lines.append(f"compared with {comparison.alternative}, which a port may match instead")
    return "\n".join([*lines, *([""] if lines else []), _summary(comparison.stages, len(failed))])


def _summary(stages: tuple[StageResult, ...], failed: int) -> str:
    if failed:
        return f"{failed} of {len(stages)} stages that were given are wrong"
    nearest = max(stages, key=_share)
    return (
        f"all {len(stages)} stages that were given pass; the largest error is {_share(nearest):.0%} of its limit, in "
        f"{nearest.name}"
    )


def _share(result: StageResult) -> float:
    """The larger of the two errors as a part of its limit."""
    d = result.difference
    return max(x / limit if limit else 0.0 for x, limit in ((d[0], d[1]), (d[2], d[3])))


def _explained(comparison: Comparison) -> list[str]:
    lines = [f"first wrong stage: {comparison.first_wrong}"]
    if comparison.not_given:
        lines.append(f"not given, between the last stage that passes and this one: {_listed(comparison.not_given)}")
    for text in comparison.texts[:MOST_ROWS]:
        lines += _wrong_text(text)
    if len(comparison.texts) > MOST_ROWS:
        lines.append(f"... and {len(comparison.texts) - MOST_ROWS} more texts")
    diagnosis = comparison.diagnosis
    if diagnosis:
        lines.append(f"mistake: {diagnosis.mistake} (explains {diagnosis.explained:.2%} of the deviation)")
        if diagnosis.also:
            lines.append(f"         or, which would look the same here: {'; '.join(diagnosis.also)}")
        lines.append(f"done right in {diagnosis.place}: {diagnosis.code}")
    elif comparison.diagnosed:
        lines.append("mistake: unknown; none of the catalogue explains it")
    elif not comparison.texts:
        lines.append("mistake: give the golden's model (--model) to have it looked for")
    return lines + [f"hint: {hint}" for hint in comparison.hints]


def _wrong_text(text: WrongText) -> list[str]:
    width = max(len(name) for name in ("expected", "got"))
    ids = {"expected": text.expected, "got": text.got}
    lines = [f"text {text.row}: {text.text!r}" if text.text is not None else f"text {text.row}"]
    lines += [f"  {name:{width}} {' '.join(map(str, _without_padding(row)))}" for name, row in ids.items()]
    place = text.place
    lines.append(f"  first difference at position {place}: {text.got[place]} instead of {text.expected[place]}")
    return [*lines, *([f"  mistake: {' or '.join(text.mistakes)}"] if text.mistakes else [])]


def _without_padding(ids: list[int]) -> list[int]:
    return ids[: len(ids) - next((i for i, x in enumerate(reversed(ids)) if x), len(ids))]


def _table(results: Sequence[StageResult]) -> list[str]:
    width = max(len(result.name) for result in results)
    heads = ("max error", "limit", "relative", "limit", "cosine", "NMSE", "ULP")
    columns = "  ".join(f"{head:>{wide}}" for head, wide in zip(heads, COLUMNS, strict=True))
    return [f"{'stage':{width}}  {'shape':>16}  {columns}", *(_line(result, width) for result in results)]


COLUMNS = (8, 8, 8, 8, 9, 8, 8)  # widths of the numbers


def _line(result: StageResult, width: int) -> str:
    shape = " ".join(map(str, result.shape)) or "scalar"
    verdict = "pass" if result.passed else "FAIL"
    if result.difference is None:
        return f"{result.name:{width}}  {shape:>16}  {result.fault}  {verdict}"
    d = result.difference
    numbers = [f"{x:8.2e}" for x in (d.max_error, d.max_limit, d.relative_error, d.relative_limit)]
    numbers += [f"{d.cosine:9.6f}", f"{d.nmse:8.2e}", f"{d.ulp if d.ulp is not None else '':>8}"]
    return f"{result.name:{width}}  {shape:>16}  {'  '.join(numbers)}  {verdict}"


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
        "texts": [text.__dict__ for text in comparison.texts],
        "hints": comparison.hints,
        "alternative": comparison.alternative,
        "changed": comparison.changed,
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


def _finite(x: float | None) -> float | None:
    return x if x is not None and math.isfinite(x) else None
