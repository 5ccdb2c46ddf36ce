"""The rows of a benchmark as tables, with the ratio of each to miniclip's row, and as a bar chart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from miniclip.bench.tasks import Row

ACCURATE = 0.999  # least agreement of a row that may be called the best
HEADINGS = ("", "setting", "median", "mean", "p95", "spread", "per second", "miniclip is", "agreement", "of rate", "MB")


def ours(rows: Sequence[Row], row: Row) -> Row | None:
    """miniclip's row that `row` is compared with: that of the same precision, or the fastest if there is none."""
    same = [other for other in rows if other.what == row.what and other.name == "miniclip"]
    alike = [other for other in same if other.setting.split()[:1] == row.setting.split()[:1]]
    return min(alike or same, key=lambda other: other.times.median, default=None)


def ratio(rows: Sequence[Row], row: Row) -> float | None:
    """How many times as fast miniclip is, in the same precision."""
    mine = ours(rows, row)
    return row.times.median / mine.times.median if mine and row.name != "miniclip" else None


def best(rows: Sequence[Row]) -> dict | None:
    """One task's fastest row of the peers and of miniclip, in any precision that is accurate enough."""
    accurate = [row for row in rows if row.agreement is None or row.agreement >= ACCURATE]
    peers = [row for row in accurate if row.name != "miniclip"]
    own = [row for row in accurate if row.name == "miniclip"]
    if not peers or not own:
        return None
    peer, mine = (min(group, key=lambda row: row.times.median) for group in (peers, own))
    return {
        "what": peer.what,
        "peer": peer.label,
        "peer_median": peer.times.median,
        "peer_agreement": peer.agreement,
        "miniclip": mine.label,
        "median": mine.times.median,
        "agreement": mine.agreement,
        "miniclip_is": peer.times.median / mine.times.median,
    }


def tasks_of(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows by what was timed."""
    return {what: [row for row in rows if row.what == what] for what in dict.fromkeys(row.what for row in rows)}


def table(rows: Sequence[Row]) -> str:
    lines = []
    for what, group in tasks_of(rows).items():
        note = " (extrapolated from a sample)" if group[0].extrapolated else ""
        lines += ["", f"{what}{note}", _line(HEADINGS)]
        lines += [_line(_cells(rows, row)) for row in group]
        if found := best(group):
            peer = f"{found['peer']}, {duration(found['peer_median'])}"
            own = f"{found['miniclip']}, {duration(found['median'])}"
            lines.append(f"  best peer: {peer}; best of miniclip: {own}: {found['miniclip_is']:.2f}x as fast")
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
    """Seconds in a fitting unit: "1.23 ms", "45.6 s", "2.5 min"."""
    for unit, least in (("h", 3600), ("min", 60), ("s", 1)):
        if seconds >= least:
            return f"{seconds / least:.3g} {unit}"
    return f"{1e3 * seconds:.3g} ms"


def draw(rows: Sequence[Row], title: str, output: Path, format: str) -> None:
    """Draw speeds as multiples of miniclip's, in a panel for each task."""
    from matplotlib.figure import Figure

    tasks = tasks_of(rows)
    columns = min(3, len(tasks))
    depth = -(-len(tasks) // columns)
    most = max(map(len, tasks.values()))
    figure = Figure(figsize=(4.8 * columns, (0.3 * most + 0.5) * depth + 0.6), layout="constrained")
    panels = figure.subplots(depth, columns, squeeze=False).flatten()
    for panel, (what, group) in zip(panels, tasks.items(), strict=False):
        group = group[::-1]
        own = ours(rows, group[-1]).times.median
        labels = [f"{row.name} {row.setting}".strip() for row in group]
        speeds = [own / row.times.median for row in group]
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
    meaning = "median times, and speeds in multiples of miniclip's; longer bars are faster"
    figure.suptitle(f"{title}\n{meaning}{star}", fontsize=10)
    figure.savefig(output, format=format, dpi=130)
