"""Pictures of an evaluation: answers, the most confident mistakes, which classes are confused, few-shot curves.

All need matplotlib: pip install "miniclip[plot]". `predictions` are those of `report.evaluate`, `examples` what it
measured; `output` is a name that ends in .png, .svg or .pdf.
"""

from __future__ import annotations

import random
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from miniclip.data.lists import Example
from miniclip.evaluation.features import on_background
from miniclip.evaluation.statistics import confusion_matrix, most_confused
from miniclip.io import write_json
from miniclip.preprocess import open_image

WRONG = "firebrick"
READABLE = 30  # classes that a matrix shows with their names
NUMBERED = 20  # classes up to which every cell says its share


def write_report(results: dict[str, dict], examples: Sequence[Example], folder: Path, seed: int = 0) -> None:
    """Write report.json and the drawings of one model; for several, each model's drawings in a folder of its own.

    results: what `evaluate` returned, by the name of the model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    first = next(iter(results.values()))
    write_json(folder / "report.json", first if len(results) == 1 else {"models": results})
    for name, result in results.items():
        own = folder if len(results) == 1 else folder / re.sub(r"[^\w.@-]+", "-", name).strip("-.")
        own.mkdir(exist_ok=True)
        if "zero_shot" in result:
            predictions = result["zero_shot"]["predictions"]
            plot_answers(predictions, examples, own / "answers.png", seed)
            plot_mistakes(predictions, examples, own / "mistakes.png")
            plot_confusion(predictions, own / "confusion.png")
    if "few_shot" in first:
        plot_few_shot(results, folder / "few_shot.png")


def plot_answers(
    predictions: list[dict], examples: Sequence[Example], output: Path, seed: int = 0, rows: int = 2, columns: int = 6
) -> None:
    """A page of pictures under their names: right answers above; wrong ones below, with the name they were given.

    Which of them are drawn depends on `seed` alone.
    """
    from matplotlib.figure import Figure

    right = [answer for answer in predictions if answer["rank"] == 1]
    wrong = [answer for answer in predictions if answer["rank"] > 1]
    parts = [(answers, verdict) for answers, verdict in ((right, "right"), (wrong, "wrong")) if answers]
    pictures = {example.title: example.image for example in examples}
    figure = Figure(figsize=(1.9 * columns, 2.7 * rows * len(parts)), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.1)
    for part, (answers, verdict) in zip(figure.subfigures(len(parts), squeeze=False).flat, parts, strict=True):
        part.suptitle(f"{verdict}: {len(answers)} of {len(predictions)}", fontsize=14)
        shown = random.Random(seed).sample(answers, min(rows * columns, len(answers)))
        for axis, answer in zip(part.subplots(rows, columns, squeeze=False).flat, shown, strict=False):
            _draw(axis, pictures[answer["image"]], answer["name"])
            if verdict == "wrong":
                _caption(axis, f"called {answer['predicted']}")
        _bare(part.axes)
    figure.savefig(output, dpi=120)


def plot_mistakes(predictions: list[dict], examples: Sequence[Example], output: Path, most: int = 24) -> None:
    """A page of the wrong answers that the model was surest of: above each picture its name, below what it was called,
    with which probability, and where its own name came. Often the label is wrong, or both are right."""
    from matplotlib.figure import Figure

    wrong = [answer for answer in predictions if answer["rank"] > 1]
    shown = sorted(wrong, key=lambda answer: -answer["probability"])[:most]
    pictures = {example.title: example.image for example in examples}
    columns = min(6, max(3, len(shown)))
    rows = max(1, -(-len(shown) // columns))
    figure = Figure(figsize=(1.9 * columns, 2.75 * rows + 0.6), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.08)
    figure.suptitle(f"The surest of {len(wrong)} mistakes in {len(predictions)} pictures", fontsize=14)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis, answer in zip(axes.flat, shown, strict=False):
        _draw(axis, pictures[answer["image"]], answer["name"])
        own = f"own name: {_ordinal(answer['rank'])}"
        _caption(axis, f"called {answer['predicted']}, {answer['probability']:.0%}", own)
    _bare(axes.flat)
    figure.savefig(output, dpi=120)


def plot_confusion(predictions: list[dict], output: Path) -> None:
    """What pictures of each class were taken for, in shares of the class: a row for each class, the diagonal is right.

    Of more than READABLE classes those that are confused most often are drawn, beside a column for all other answers.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    # Only what occurs, whichever names there were to choose from.
    names = sorted({answer[key] for key in ("name", "predicted") for answer in predictions})
    number = {name: i for i, name in enumerate(names)}
    targets, predicted = (
        torch.tensor([number[answer[key]] for answer in predictions]) for key in ("name", "predicted")
    )
    matrix = confusion_matrix(targets, predicted, len(names))
    shown, title = _shown_classes(matrix), f"{len(predictions)} pictures, {len(names)} classes"
    if len(shown) < len(names):
        title = f"The {len(shown)} most confused of {len(names)} classes"
    totals = matrix.sum(1)
    shown = [i for i in shown if totals[i]]
    cells = matrix[shown][:, shown]
    others = (matrix[shown].sum(1) - cells.sum(1))[:, None]
    labels = [names[i] for i in shown]
    if others.any():
        cells = torch.cat([cells, others], dim=1)
    shares = cells / totals[shown][:, None]

    side = max(4.5, 0.32 * len(shown) + 2)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    below = [*labels, "(others)"][: cells.shape[1]]
    size = 9 if len(shown) <= NUMBERED else 7.5
    style = {"fontsize": size, "parse_math": False}
    axis.set_xticks(range(len(below)), [_shorten(name) for name in below], rotation=90, **style)
    axis.set_yticks(range(len(labels)), [_shorten(name) for name in labels], **style)
    axis.set(xlabel="taken for", ylabel="is")
    axis.set_title(title, fontsize=11)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    if others.any():
        axis.axvline(len(labels) - 0.5, color="0.4", linewidth=0.8)
    for i in range(len(shown)):
        axis.add_patch(Rectangle((i - 0.5, i - 0.5), 1, 1, fill=False, edgecolor="0.6", linewidth=0.8))
    for row, column in shares.nonzero().tolist():
        share = shares[row, column].item()
        if len(shown) <= NUMBERED or row != column:
            text = f"{100 * share:.0f}" if len(shown) <= NUMBERED else str(cells[row, column].item())
            colour = "white" if share > 0.55 else "black"
            axis.text(column, row, text, ha="center", va="center", fontsize=size - 1.5, color=colour)
    bar = figure.colorbar(image, shrink=0.6, format=lambda share, _: f"{share:.0%}")
    unit = "in percent" if len(shown) <= NUMBERED else "the numbers are pictures"
    bar.set_label(f"share of the class's pictures; {unit}", fontsize=8)
    bar.outline.set_visible(False)
    figure.savefig(output, dpi=130)


def _shown_classes(matrix: Tensor) -> list[int]:
    """All classes, or those of the most confused pairs, the two of a pair beside each other."""
    if len(matrix) <= READABLE:
        return list(range(len(matrix)))
    shown: dict[int, None] = {}
    for i, j, _ in most_confused(matrix, len(matrix)):
        if len({*shown, i, j}) <= READABLE:
            shown |= dict.fromkeys((i, j))
    return list(shown) or list(range(READABLE))


def plot_few_shot(results: dict[str, dict], output: Path) -> None:
    """Accuracy by the number of pictures learnt from, a line for each model; its zero-shot accuracy as a star at none.

    results: of `report.evaluate`, by model.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    every = [row for result in results.values() for row in result["few_shot"] if row["top1"] is not None]
    shots = sorted({row["shots"] for row in every})
    place = {k: i + 1 for i, k in enumerate(shots)}
    for i, (name, result) in enumerate(results.items()):
        rows = [row for row in result["few_shot"] if row["top1"] is not None]
        x, colour = [place[row["shots"]] for row in rows], f"C{i}"
        axis.plot(x, [row["top1"] for row in rows], "o-", color=colour, label=f"{name}, logistic regression")
        axis.fill_between(
            x, [row["low"] for row in rows], [row["high"] for row in rows], color=colour, alpha=0.15, linewidth=0
        )
        if "zero_shot" in result:
            axis.plot(0, result["zero_shot"]["top1"], "*", color=colour, markersize=14, label=f"{name}, zero-shot")
    axis.set_xticks([0, *place.values()], ["0", *map(str, shots)])
    axis.set(xlabel="pictures of each class that were learnt from", ylabel="accuracy")
    axis.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axis.grid(axis="y", color="0.9")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=9)
    figure.savefig(output, dpi=130)


def _draw(axis, picture: Path | Image.Image, name: str) -> None:
    image = picture if isinstance(picture, Image.Image) else open_image(picture)
    axis.imshow(on_background(image, "white").convert("RGB"))
    axis.set_title(_fold(name), fontsize=9, weight="bold", parse_math=False)


def _caption(axis, *texts: str) -> None:
    axis.set_xlabel("\n".join(_fold(text) for text in texts), fontsize=9, color=WRONG, parse_math=False)


def _bare(axes) -> None:
    for axis in axes:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)


def _fold(text: str) -> str:
    """A name in lines that fit over a picture, at most three."""
    return "\n".join(textwrap.wrap(text, 20, max_lines=3, placeholder="..."))


def _shorten(name: str) -> str:
    return textwrap.shorten(name, 24, placeholder="...")


def _ordinal(number: int) -> str:
    """2 -> "2nd"; 11, 12 and 13 are no exceptions of their tens."""
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"
