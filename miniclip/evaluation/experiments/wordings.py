"""One data set whose classes are worded in several ways: what the experiments `cifar10` and `mnist` share."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from miniclip.evaluation.draw import draw_confusion, error_bars, fold, new_figure, open_frame, percent_ticks
from miniclip.evaluation.measures import confusion_matrix, share
from miniclip.evaluation.study import Study
from miniclip.evaluation.tables import percent
from miniclip.loading import named_models
from miniclip.table import columns
from miniclip.zero_shot import classify


def compare(study: Study, wordings: Mapping[str, Tensor], data: str) -> dict:
    """Zero-shot accuracy with each wording. wordings: for each the classes' unit vectors [E, C]. data: the name under
    which the table of models has published accuracies."""
    rows = []
    for label, weights in wordings.items():
        predicted, ranks = classify(study.images, weights, study.targets, study.device)
        confusion = confusion_matrix(study.targets, predicted, len(study.classes))
        rows.append({"strategy": label, "top1": share(ranks == 0), "confusion": confusion.tolist()})
    named = named_models().get(study.name)
    published = named.published.get(data) if named else None
    return {
        "class_names": study.classes,
        "chance": 1 / len(study.classes),
        "strategies": sorted(rows, key=lambda row: -row["top1"]["share"]),
        "published": None if published is None else published / 100,
        "published_in": named.source if published else None,
    }


def table(result: dict) -> str:
    best, names = result["strategies"][0], result["class_names"]
    note = f"chance: {result['chance']:.2%}"
    if result["published"] is not None:
        note += f"; {result['published_in']}: {result['published']:.2%} for this model, on all 10,000 pictures"
    rows = []
    for i, row in enumerate(best["confusion"]):
        count, other = max((count, j) for j, count in enumerate(row) if j != i)
        recall = f"{row[i] / sum(row):.1%}" if sum(row) else ""
        rows.append([names[i], sum(row), recall, f"{names[other]} ({count})" if count else ""])
    return "\n".join([
        columns(["prompts", "accuracy", "95% interval"],
                [[row["strategy"], *percent(row["top1"])] for row in result["strategies"]]), "",
        note, "",
        f"with the prompt {best['strategy']!r}:",
        columns(["class", "pictures", "recall", "most often taken for"], rows),
    ])  # fmt: skip


def draw(result: dict, title: str):
    """Accuracy with each wording, with intervals; and the confusion matrix of the best one."""
    figure = new_figure(13.5, max(5.8, 0.35 * len(result["strategies"])))
    bars, matrix = figure.subplots(1, 2, width_ratios=(1, 1.1))
    _draw_accuracies(bars, result)
    best = result["strategies"][0]
    draw_confusion(matrix, torch.tensor(best["confusion"]), result["class_names"])
    matrix.set_title(f"confusion with the prompt\n{best['strategy']}", fontsize=11)
    figure.suptitle(title)
    return figure


def _draw_accuracies(axis, result: dict) -> None:
    rows, published = result["strategies"][::-1], result["published"]
    for place, row in enumerate(rows):
        colour = "tab:orange" if row["strategy"].startswith("ensemble") else "tab:blue"
        axis.barh(place, row["top1"]["share"], xerr=error_bars([row["top1"]]), color=colour, capsize=3)
    axis.set_yticks(range(len(rows)), [fold(row["strategy"], 36) for row in rows], fontsize=9)
    axis.axvline(result["chance"], color="grey", linestyle="--", label=f"chance, {result['chance']:.0%}")
    if published is not None:
        axis.axvline(published, color="tab:red", label=f"published, {published:.1%}")
    axis.set_title("accuracy by wording, with 95% intervals", fontsize=11)
    axis.set(xlabel="top-1 accuracy", ylim=(-0.6, len(rows) - 0.4))
    axis.set_xlim(0, 1.05 * max(published or 0, *(row["top1"]["high"] for row in rows)))
    axis.locator_params(axis="x", nbins=6)
    percent_ticks(axis.xaxis)
    open_frame(axis)
    axis.legend(fontsize=9, loc="lower right")
