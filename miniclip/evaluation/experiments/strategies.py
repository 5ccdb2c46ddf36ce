"""One data set, its classes worded in several ways: what the experiments `cifar10` and `mnist` measure and draw."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from miniclip.evaluation.experiments.common import Study, columns, fold, percent, share
from miniclip.evaluation.statistics import confusion_matrix
from miniclip.zero_shot import classify


def compare(study: Study, strategies: Mapping[str, Tensor], published: Mapping[str, float]) -> dict:
    """strategies: for each the classes' unit vectors [E, C]. published: accuracies by the model's name."""
    rows = []
    for label, weights in strategies.items():
        predicted, ranks = classify(study.images, weights, study.targets)
        confusion = confusion_matrix(study.targets, predicted, len(study.classes))
        rows.append({"strategy": label, "top1": share(ranks == 0), "confusion": confusion.tolist()})
    return {
        "class_names": study.classes,
        "chance": 1 / len(study.classes),
        "strategies": sorted(rows, key=lambda row: -row["top1"]["share"]),
        "published": published.get(study.name),
    }


def table(result: dict) -> str:
    best, names = result["strategies"][0], result["class_names"]
    note = f"chance: {result['chance']:.2%}"
    if result["published"] is not None:
        note += f"; OpenCLIP's table of results has {result['published']:.2%} for this model, on all 10,000 pictures"
    rows = []
    for i, row in enumerate(best["confusion"]):
        count, other = max((count, j) for j, count in enumerate(row) if j != i)
        found = f"{row[i] / sum(row):.1%}" if sum(row) else ""
        rows.append([names[i], sum(row), found, f"{names[other]} ({count})" if count else ""])
    return "\n".join([
        columns(["prompts", "accuracy", "95% interval"],
                [[row["strategy"], *percent(row["top1"])] for row in result["strategies"]]), "",
        note, "",
        f"with {best['strategy']}:",
        columns(["class", "pictures", "found", "most often taken for"], rows),
    ])  # fmt: skip


def draw(result: dict, title: str):
    """Accuracy by wording, with intervals; and what the best one takes for what."""
    from matplotlib.figure import Figure

    height = max(5.8, 0.35 * len(result["strategies"]))
    figure = Figure(figsize=(13.5, height), layout="constrained")
    bars, matrix = figure.subplots(1, 2, width_ratios=(1, 1.1))
    _draw_accuracies(bars, result)
    _draw_confusion(matrix, result["strategies"][0], result["class_names"])
    figure.suptitle(title)
    return figure


def _draw_accuracies(axis, result: dict) -> None:
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    rows, published = result["strategies"][::-1], result["published"]
    for place, row in enumerate(rows):
        top1 = row["top1"]
        error = [[top1["share"] - top1["low"]], [top1["high"] - top1["share"]]]
        colour = "tab:orange" if row["strategy"].startswith("ensemble") else "tab:blue"
        axis.barh(place, top1["share"], xerr=error, color=colour, capsize=3)
    axis.set_yticks(range(len(rows)), [fold(row["strategy"], 36) for row in rows], fontsize=9)
    axis.axvline(result["chance"], color="grey", linestyle="--", label=f"chance, {result['chance']:.0%}")
    if published is not None:
        axis.axvline(published, color="tab:red", label=f"published, {published:.1%}")
    axis.set_title("accuracy by wording, with 95% intervals", fontsize=11)
    axis.set(xlabel="top-1 accuracy", ylim=(-0.6, len(rows) - 0.4))
    axis.set_xlim(0, 1.05 * max(row["top1"]["high"] for row in rows))
    axis.xaxis.set_major_formatter(PercentFormatter(1))
    axis.xaxis.set_major_locator(MaxNLocator(6))
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=9, loc="lower right")


def _draw_confusion(axis, best: dict, names: list[str]) -> None:
    counts = torch.tensor(best["confusion"], dtype=torch.float64)
    parts = counts / counts.sum(1, keepdim=True).clamp(min=1)
    axis.imshow(parts.numpy(), cmap="Blues", vmin=0, vmax=1)
    for i, row in enumerate(parts.tolist()):
        for j, part in enumerate(row):
            if part >= 0.005:
                colour = "white" if part > 0.5 else "black"
                axis.text(j, i, f"{part:.0%}", ha="center", va="center", fontsize=8, color=colour)
    turned = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if max(map(len, names)) > 2 else {}
    axis.set_xticks(range(len(names)), names, fontsize=9, **turned)
    axis.set_yticks(range(len(names)), names, fontsize=9)
    axis.set_title(f"what is taken for what, with the prompt\n{best['strategy']}", fontsize=11)
    axis.set(xlabel="named", ylabel="true")
