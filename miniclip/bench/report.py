"""The rows of a benchmark as a table, in which every figure is beside miniclip's, and as a bar chart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from miniclip.bench.tasks import Row

HEADINGS = ("", "setting", "median", "mean", "p95", "spread", "per second", "miniclip is", "agreement", "of rate", "MB")


def ours(rows: Sequence[Row], row: Row) -> Row | None:
    """miniclip's row that `row` is measured against: of the same precision where there is one, else its fastest."""
    same = [other for other in rows if other.what == row.what and other.name == "miniclip"]
    alike = [other for other in same if other.setting.split()[:1] == row.setting.split()[:1]]
    return min(alike or same, key=lambda other: other.times.median, default=None)


def ratio(rows: Sequence[Row], row: Row) -> float | None:
    """How many times as fast miniclip is."""
    mine = ours(rows, row)
    return row.times.median / mine.times.median if mine and row.name != "miniclip" else None


def table(rows: Sequence[Row]) -> str:
    lines = []
    for what in dict.fromkeys(row.what for row in rows):
        group = [row for row in rows if row.what == what]
        note = " (extrapolated from a sample)" if group[0].extrapolated else ""
        lines += ["", f"{what}{note}", _line(HEADINGS)]
        lines += [_line(_cells(rows, row)) for row in group]
    return "\n".join(lines[1:])


def _cells(rows: Sequence[Row], row: Row) -> tuple[str, ...]:
    factor = ratio(rows, row)
    return (
        row.name,
        row.setting,
        *(duration(seconds) for seconds in (row.times.median, row.times.mean, row.times.p95)),
        f"{row.times.spread:.0%}",
        f"{row.count / row.times.median:,.1f}",
        f"{factor:.2f}x" if factor else "",
        f"{row.agreement:.6f}" if row.agreement is not None else "",
        f"{row.share:.0%}" if row.share is not None else "",
        f"{row.peak_mb:,.0f}" if row.peak_mb is not None else "",
    )


def _line(cells: Sequence[str]) -> str:
    widths = (12, 17, 9, 9, 9, 6, 10, 11, 9, 7, 6)
    left, right = cells[:2], cells[2:]
    aligned = [cell.ljust(width) for cell, width in zip(left, widths[:2], strict=True)]
    aligned += [cell.rjust(width) for cell, width in zip(right, widths[2:], strict=True)]
    return "  " + "  ".join(aligned).rstrip()


def duration(seconds: float) -> str:
    """With its unit: "1.23 ms", "45.6 s", "2.5 min"."""
    for unit, least in (("h", 3600), ("min", 60), ("s", 1)):
        if seconds >= least:
            return f"{seconds / least:.3g} {unit}"
    return f"{1e3 * seconds:.3g} ms"


def draw(rows: Sequence[Row], title: str, output: Path, format: str) -> None:
    """Items a second, the peers' in multiples of miniclip's; a panel for each thing that was timed."""
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(row.what for row in rows))
    columns = min(3, len(tasks))
    depth = -(-len(tasks) // columns)
    most = max(sum(row.what == what for row in rows) for what in tasks)
    figure = Figure(figsize=(4.8 * columns, (0.3 * most + 0.5) * depth + 0.6), layout="constrained")
    panels = figure.subplots(depth, columns, squeeze=False).flatten()
    for panel, what in zip(panels, tasks, strict=False):
        group = [row for row in rows if row.what == what][::-1]
        best = ours(rows, group[-1]).times.median
        labels = [f"{row.name} {row.setting}".strip() for row in group]
        speeds = [best / row.times.median for row in group]
        colours = ["tab:orange" if row.name == "miniclip" else "tab:blue" for row in group]
        panel.barh(range(len(group)), speeds, color=colours)
        panel.set_yticks(range(len(group)), labels, fontsize=8)
        for place, (speed, row) in enumerate(zip(speeds, group, strict=True)):
            times = f"  {speed:.2f}x" if row.name != "miniclip" else ""
            panel.text(speed, place, f" {duration(row.times.median)}{times}", va="center", fontsize=8)
        panel.set_xlim(0, 1.5 * max(speeds))
        panel.set_ylim(len(group) - most - 0.6, len(group) - 0.4)  # bars are equally thick in all panels
        panel.set_xticks([])
        panel.spines[:].set_visible(False)
        panel.tick_params(left=False)
        panel.set_title(what + (" *" if group[0].extrapolated else ""), fontsize=9, loc="left")
    for panel in panels[len(tasks) :]:
        panel.set_axis_off()
    star = "\n* extrapolated from a sample" if any(row.extrapolated for row in rows) else ""
    figure.suptitle(f"{title}\nmedian times; speeds in multiples of miniclip's{star}", fontsize=10)
    figure.savefig(output, format=format, dpi=130)
