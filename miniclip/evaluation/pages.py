"""Figures of an evaluation: answers, the most confident mistakes, confused classes, few-shot accuracy.

`predictions` are those of `report.evaluate`, `examples` what it measured; `output` is a file name that ends in .png,
.svg or .pdf.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from pathlib import Path

import torch

from miniclip.data.lists import Example
from miniclip.evaluation.draw import draw_confusion, fold, frame, new_figure, open_frame, percent_ticks, shown_classes
from miniclip.evaluation.measures import confusion_matrix
from miniclip.evaluation.study import picture_of
from miniclip.io import write_json

WRONG = "firebrick"


def as_json(results: dict[str, dict[str, dict]]) -> dict:
    """What `miniclip evaluate` writes: the result of one model on one data set as it is; several under their names.

    results: of `report.evaluate`, by data set and then by model.
    """
    reports = {data: {"models": found} if len(found) > 1 else _first(found) for data, found in results.items()}
    return {"data": reports} if len(reports) > 1 else _first(reports)


def write_reports(
    results: dict[str, dict[str, dict]], examples: dict[str, Sequence[Example]], folder: Path, seed: int = 0
) -> None:
    """Write report.json and the figures. Several data sets, and several models, get a folder of figures each.

    results: as for `as_json`. examples: what was measured, by data set.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "report.json", as_json(results))
    for data, found in results.items():
        of_data = folder / _file_name(data) if len(results) > 1 else folder
        for name, result in found.items():
            own = of_data / _file_name(name) if len(found) > 1 else of_data
            own.mkdir(parents=True, exist_ok=True)
            if "zero_shot" in result:
                predictions = result["zero_shot"]["predictions"]
                plot_answers(predictions, examples[data], own / "answers.png", seed)
                plot_mistakes(predictions, examples[data], own / "mistakes.png")
                plot_confusion(predictions, own / "confusion.png")
        if "few_shot" in _first(found):
            plot_few_shot(found, of_data / "few_shot.png")
    if len(results) > 1 and any("zero_shot" in _first(found) for found in results.values()):
        plot_data_sets(results, folder / "data_sets.png")


def _first(values: dict[str, dict]) -> dict:
    return next(iter(values.values()))


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.@-]+", "-", name).strip("-.")


def plot_answers(
    predictions: list[dict], examples: Sequence[Example], output: Path, seed: int = 0, rows: int = 2, columns: int = 6
) -> None:
    """Pictures with their names: right answers above; wrong ones below, with the predicted name.

    `seed` alone decides which of them are drawn.
    """
    right = [answer for answer in predictions if answer["rank"] == 1]
    wrong = [answer for answer in predictions if answer["rank"] > 1]
    parts = [(answers, verdict) for answers, verdict in ((right, "right"), (wrong, "wrong")) if answers]
    figure = new_figure(1.9 * columns, 2.7 * rows * len(parts))
    figure.get_layout_engine().set(h_pad=0.1)
    for part, (answers, verdict) in zip(figure.subfigures(len(parts), squeeze=False).flat, parts, strict=True):
        part.suptitle(f"{verdict}: {len(answers)} of {len(predictions)}", fontsize=14)
        shown = random.Random(seed).sample(answers, min(rows * columns, len(answers)))
        captions = [[f"predicted: {answer['predicted']}"] if verdict == "wrong" else [] for answer in shown]
        _draw_grid(part.subplots(rows, columns, squeeze=False), shown, captions, examples)
    figure.savefig(output, dpi=120)


def plot_mistakes(predictions: list[dict], examples: Sequence[Example], output: Path, most: int = 24) -> None:
    """The wrong answers with the highest probability: above each picture its name, below it the predicted name with the
    probability, and the rank of the true name. Often the label is wrong, or both names fit."""
    wrong = [answer for answer in predictions if answer["rank"] > 1]
    shown = sorted(wrong, key=lambda answer: -answer["probability"])[:most]
    columns = min(6, max(3, len(shown)))
    rows = max(1, -(-len(shown) // columns))
    figure = new_figure(1.9 * columns, 2.75 * rows + 0.6)
    figure.get_layout_engine().set(h_pad=0.08)
    figure.suptitle(f"The most confident of {len(wrong)} mistakes in {len(predictions)} pictures", fontsize=14)
    captions = [
        [f"predicted: {answer['predicted']}, {answer['probability']:.0%}", f"true name: rank {answer['rank']}"]
        for answer in shown
    ]
    _draw_grid(figure.subplots(rows, columns, squeeze=False), shown, captions, examples)
    figure.savefig(output, dpi=120)


def _draw_grid(axes, answers: list[dict], captions: list[list[str]], examples: Sequence[Example]) -> None:
    """A picture with its name in each place, and the captions below it."""
    pictures = {example.title: example.image for example in examples}
    for axis in axes.flat:
        frame(axis)
    for axis, answer, lines in zip(axes.flat, answers, captions, strict=False):
        axis.imshow(picture_of(pictures[answer["image"]]))
        axis.set_title(fold(answer["name"], 20), fontsize=9, weight="bold", parse_math=False)
        axis.set_xlabel("\n".join(fold(line, 24) for line in lines), fontsize=9, color=WRONG, parse_math=False)


def plot_confusion(predictions: list[dict], output: Path) -> None:
    """Which class the pictures of each class were taken for; see `draw_confusion`. Only classes that occur."""
    names = sorted({answer[key] for key in ("name", "predicted") for answer in predictions})
    number = {name: i for i, name in enumerate(names)}
    targets, predicted = (
        torch.tensor([number[answer[key]] for answer in predictions]) for key in ("name", "predicted")
    )
    matrix = confusion_matrix(targets, predicted, len(names))
    shown, title = len(shown_classes(matrix)), f"{len(predictions)} pictures, {len(names)} classes"
    if shown < len(names):
        title = f"The {shown} most confused of {len(names)} classes"
    side = max(4.5, 0.32 * shown + 2)
    figure = new_figure(side + 1, side)
    axis = figure.subplots()
    draw_confusion(axis, matrix, names)
    axis.set_title(title, fontsize=11)
    figure.savefig(output, dpi=130)


def plot_data_sets(results: dict[str, dict[str, dict]], output: Path) -> None:
    """Zero-shot top-1 with its 95% interval: a row for each data set, and a colour for each model.

    results: of `report.evaluate`, by data set and then by model.
    """
    named = {data: found for data, found in results.items() if "zero_shot" in _first(found)}
    models = list(_first(named))
    figure = new_figure(8, 1.5 + len(named) * (0.35 + 0.15 * len(models)))
    axis = figure.subplots()
    for i, name in enumerate(models):
        figures = [found[name]["zero_shot"] for found in named.values()]
        low, high = zip(*(each["top1_interval"] for each in figures), strict=True)
        rows = [row + 0.6 * ((i + 0.5) / len(models) - 0.5) for row in range(len(named))]
        axis.hlines(rows, low, high, color=f"C{i}", linewidth=2, alpha=0.4)
        axis.plot([each["top1"] for each in figures], rows, "o", color=f"C{i}", label=name)
    shown = [fold(f"{data}, {_first(found)['zero_shot']['classes']} classes", 40) for data, found in named.items()]
    axis.set_yticks(range(len(named)), shown, parse_math=False)
    axis.set(xlabel="zero-shot top-1, with its 95% interval", ylim=(len(named) - 0.5, -0.5))
    axis.set_xlim(left=0)
    percent_ticks(axis.xaxis)
    open_frame(axis, "x")
    axis.legend(frameon=False, fontsize=9)
    figure.savefig(output, dpi=130)


def plot_few_shot(results: dict[str, dict], output: Path) -> None:
    """Accuracy by the number of training pictures of each class, a line for each model; its zero-shot accuracy as a
    star at 0.

    results: of `report.evaluate`, by the model's name.
    """
    figure = new_figure(7, 4.5)
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
    axis.set(xlabel="training pictures of each class (shaded: from the worst to the best draw)", ylabel="accuracy")
    percent_ticks(axis.yaxis)
    open_frame(axis, "y")
    axis.legend(frameon=False, fontsize=9)
    figure.savefig(output, dpi=130)
