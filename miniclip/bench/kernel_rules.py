"""Rules for `miniclip.kernels.dispatch` from what was timed: where the kernel beat every rival that counts."""

from __future__ import annotations

import math

from miniclip.kernels.dispatch import ANY, Rule

EXACT = {"attention"}  # what depends on the length itself, by the fill of its tiles: a rule for each length
PACKED = "attention_varlen"  # what holds for a length holds for shorter ones


def contests(rows: list[dict]) -> list[tuple[str, tuple[int, int], bool]]:
    """Operation, measure, and whether the kernel was the fastest both from Python and in a CUDA graph."""
    found: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        if "measure" in row:
            found.setdefault((row["operation"], row["shape"], tuple(row["measure"])), {})[row["who"]] = row
    return [(name, measure, _won(rivals)) for (name, _, measure), rivals in found.items() if "kernel" in rivals]


def _won(rivals: dict[str, dict]) -> bool:
    kernel = rivals["kernel"]
    others = [row for who, row in rivals.items() if who != "kernel" and row["counts"]]
    best = {clock: min((row[clock] for row in others if clock in row), default=0.0) for clock in ("eager", "graph")}
    return all(clock in kernel and kernel[clock] < best[clock] for clock in best)


def rules(rows: list[dict], source: str) -> dict[str, list[Rule]]:
    """Operation -> rules. A rule begins at the least count from which the kernel won every contest."""
    found: dict[str, list[Rule]] = {}
    timed: dict[str, list[tuple[tuple[int, int], bool]]] = {}
    for operation, measure, won in contests(rows):
        timed.setdefault(operation, []).append((measure, won))
    for operation, results in timed.items():
        if operation in EXACT:
            lengths = sorted({length for (length, _), _ in results})
            groups = {length: [x for x in results if x[0][0] == length] for length in lengths}
            ranges = {length: (length, length) for length in groups}
        else:
            groups = {0: results}
            ranges = {0: (1, max(length for (length, _), _ in results)) if operation == PACKED else ANY}
        made = [Rule(ranges[key], (least, math.inf), source) for key, some in groups.items() if (least := _least(some))]
        found[operation] = made or [Rule(ANY, (math.inf, math.inf), source)]  # never
    return found


def _least(results: list[tuple[tuple[int, int], bool]]) -> int | None:
    lost = max((count for (_, count), won in results if not won), default=0)
    return min((count for (_, count), won in results if won and count > lost), default=None)


def as_python(architecture: str, found: dict[str, list[Rule]]) -> str:
    """The entry of `dispatch.RULES`, to be pasted there."""
    lines = [f'    "{architecture}": {{']
    for operation, some in found.items():
        written = ", ".join(f"Rule({_range(rule.length)}, {_range(rule.count)}, {rule.source!r})" for rule in some)
        lines.append(f'        "{operation}": [{written}],')
    return "\n".join([*lines, "    },"])


def _range(ends: tuple[float, float]) -> str:
    return "ANY" if ends == ANY else f"({', '.join('math.inf' if end == math.inf else str(end) for end in ends)})"
