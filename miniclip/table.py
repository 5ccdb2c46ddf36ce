"""Tables in plain text."""

from __future__ import annotations

from collections.abc import Sequence


def columns(headings: Sequence[object], rows: Sequence[Sequence[object]], left: int = 1) -> str:
    """A table with as many columns as there are headings. The first `left` columns are aligned left, the others right.

    None becomes an empty cell.
    """
    cells = [["" if cell is None else str(cell) for cell in row] for row in (headings, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place < left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    )
