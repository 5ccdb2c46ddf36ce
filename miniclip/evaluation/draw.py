"""Parts of figures that several figures share. They need matplotlib: pip install "miniclip[plot]"."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import torch
from torch import Tensor

from miniclip.errors import require
from miniclip.evaluation.measures import most_confused

READABLE = 30  # the most classes that a confusion matrix shows by name
NUMBERED = 20  # the most classes with which it writes the share into each cell


def new_figure(width: float, height: float):
    """An empty figure; width and height in inches."""
    figures = require("matplotlib.figure", "plot", "drawing")
    return figures.Figure(figsize=(width, height), layout="constrained")


def fold(text: str, width: int = 18) -> str:
    """A name in at most three lines, to be written beside or below a picture."""
    return "\n".join(textwrap.wrap(text, width, max_lines=3, placeholder="..."))


def frame(axis, colour: str | None = None) -> None:
    """No ticks, and a frame in the colour, or none."""
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(colour is not None)
    axis.spines[:].set(color=colour, linewidth=2.5)


def open_frame(axis, grid: str | None = None) -> None:
    """No lines at the top and on the right; thin grid lines for the ticks of the "x" or "y" axis."""
    axis.spines[["top", "right"]].set_visible(False)
    if grid:
        axis.grid(axis=grid, alpha=0.3)
        axis.set_axisbelow(True)


def plain_ticks(axis) -> None:
    """Ticks of a logarithmic axis as 0.1, 1, 10, not as powers. axis: as `axes.xaxis`."""
    axis.set_major_formatter(lambda value, _: f"{value:g}")


def percent_ticks(axis) -> None:
    """Ticks of an axis of shares as exact percentages: 0.425 is 42.5%. axis: as `axes.xaxis`."""
    axis.set_major_formatter(lambda value, _: f"{100 * value:.4g}%")


def error_bars(figures: Sequence[dict[str, float]]) -> list[list[float]]:
    """Of shares with intervals (see `measures.share`), what matplotlib's xerr and yerr take."""
    return [[x["share"] - x["low"] for x in figures], [x["high"] - x["share"] for x in figures]]


def shown_classes(matrix: Tensor) -> list[int]:
    """The classes of a confusion matrix that are drawn: all, or those of the most confused pairs, side by side."""
    if len(matrix) <= READABLE:
        return list(range(len(matrix)))
    shown: dict[int, None] = {}
    for i, j, _ in most_confused(matrix, len(matrix)):
        if len({*shown, i, j}) <= READABLE:
            shown |= dict.fromkeys((i, j))
    return list(shown) or list(range(READABLE))


def draw_confusion(axis, matrix: Tensor, names: Sequence[str]) -> None:
    """A confusion matrix [C, C] of counts, in shares of each row: a row for each class that has pictures.

    With more than READABLE classes only the most confused are drawn, with one column for all other answers.
    """
    totals, shown = matrix.sum(1), shown_classes(matrix)
    columns = [names[i] for i in shown]
    rows = [i for i in shown if totals[i]]
    cells = matrix[rows][:, shown]
    others = (totals[rows] - cells.sum(1))[:, None]
    if others.any():
        cells, columns = torch.cat([cells, others], dim=1), [*columns, "(others)"]
        axis.axvline(len(shown) - 0.5, color="0.4", linewidth=0.8)
    parts = cells / totals[rows][:, None]
    image = axis.imshow(parts.numpy(), cmap="Blues", vmin=0, vmax=1)
    few = len(shown) <= NUMBERED
    size = 9 if few else 7.5
    for row, column in parts.nonzero().tolist():
        part = parts[row, column].item()
        if few or rows[row] != [*shown, -1][column]:
            text = f"{100 * part:.0f}" if few else str(int(cells[row, column]))
            colour = "white" if part > 0.55 else "black"
            axis.text(column, row, text, ha="center", va="center", fontsize=size - 1.5, color=colour)
    for row, i in enumerate(rows):  # a box around the right answers
        left, right, upper, lower = (x - 0.5 for x in (shown.index(i), shown.index(i) + 1, row, row + 1))
        axis.plot([left, right, right, left, left], [upper, upper, lower, lower, upper], color="0.6", linewidth=0.8)
    rotation = 90 if max(map(len, columns)) > 2 else 0  # digits stay upright
    style = {"fontsize": size, "parse_math": False}
    axis.set_xticks(range(len(columns)), [_shorten(name) for name in columns], rotation=rotation, **style)
    axis.set_yticks(range(len(rows)), [_shorten(names[i]) for i in rows], **style)
    axis.set(xlabel="predicted class", ylabel="true class")
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    bar = axis.figure.colorbar(image, ax=axis, shrink=0.6, format=lambda part, _: f"{part:.0%}")
    numbers = "numbers: percent" if few else "numbers: pictures"
    bar.set_label(f"share of the true class's pictures ({numbers})", fontsize=8)
    bar.outline.set_visible(False)


def _shorten(name: str) -> str:
    return textwrap.shorten(name, 24, placeholder="...")
