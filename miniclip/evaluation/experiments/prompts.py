"""Templates ranked by accuracy, with intervals, and whether an ensemble is better than the best single template.

An ensemble is the mean of the unit embeddings of a class's prompts (CLIP paper, section 3.1.4: 80 templates improved
ImageNet by 3.5 points). The best single template was found by trying all of them on these pictures, so its accuracy is
too high: of a hundred templates that make no difference, one looks good by chance. Therefore it is also chosen on one
half of the pictures and measured on the other.

Two templates whose intervals overlap may still differ reliably, because both were measured on the same pictures. The
interval of the difference tells; see `miniclip.evaluation.measures.difference`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from miniclip.data.templates import TEMPLATES
from miniclip.embed import as_list
from miniclip.evaluation.draw import error_bars, new_figure, open_frame, percent_ticks
from miniclip.evaluation.measures import difference, share
from miniclip.evaluation.study import Study
from miniclip.evaluation.tables import percent
from miniclip.table import columns
from miniclip.zero_shot import classify, ensemble, expand_templates, prompt_weights


def measure(study: Study, templates: Sequence[str] = ("pictograms", "cifar", "imagenet-7"), seed: int = 0) -> dict:
    """templates: candidates, or names of sets of them. Each set is also an ensemble, and so are all together."""
    candidates = list(dict.fromkeys(expand_templates(templates)))
    weights = prompt_weights(study.model, study.classes, candidates)
    sets = {f"ensemble {name}": TEMPLATES[name] for name in as_list(templates) if name in TEMPLATES}
    sets[f"ensemble of all {len(candidates)}"] = tuple(candidates)  # the last
    singles = torch.stack([_right(study, one) for one in weights])  # bool [templates, N]
    rows = [_row(name, right, False) for name, right in zip(candidates, singles, strict=True)]
    for name, members in sets.items():
        right = _right(study, ensemble(weights[[candidates.index(one) for one in members]]))
        rows.append(_row(name, right, True))
    best = int(singles.sum(1).argmax())
    return {
        "chance": 1 / len(study.classes),
        "rows": sorted(rows, key=lambda row: -row["top1"]["share"]),
        "best_single": candidates[best],
        "best_single_chosen_on_other_half": share(chosen_on_other_half(singles, seed)),
        "ensemble_less_best_single": difference(right, singles[best], seed),
    }


def _right(study: Study, weights: Tensor) -> Tensor:
    _, ranks = classify(study.images, weights, study.targets, study.device)
    return ranks == 0


def _row(name: str, right: Tensor, several: bool) -> dict:
    return {"template": name, "ensemble": several, "top1": share(right)}


def chosen_on_other_half(right: Tensor, seed: int = 0) -> Tensor:
    """For each half of the pictures, the answers of the template that is best on the other half, bool [N].

    right: whether each of T templates names each picture correctly, bool [T, N]. seed: of the halves.
    """
    order = torch.randperm(right.shape[1], generator=torch.Generator().manual_seed(seed))
    halves = order.tensor_split(2)
    result = torch.zeros(right.shape[1], dtype=torch.bool)
    for here, elsewhere in (halves, halves[::-1]):
        result[here] = right[right[:, elsewhere].sum(1).argmax()][here]
    return result


def table(result: dict) -> str:
    rows = [[row["template"], *percent(row["top1"])] for row in result["rows"]]
    fair, more = result["best_single_chosen_on_other_half"], result["ensemble_less_best_single"]
    verdict = "" if more["low"] <= 0 <= more["high"] else " (0 is outside)"
    return "\n".join([
        columns(["template", "accuracy", "95% interval"], rows), "",
        f"the best single template, chosen on one half and measured on the other: {fair['share']:.2%}",
        f"the ensemble of all minus {result['best_single']!r}: {100 * more['difference']:+.2f} points, "
        f"95% interval {100 * more['low']:+.2f} to {100 * more['high']:+.2f}{verdict}; "
        f"{more['gained']} pictures gained, {more['lost']} lost",
        f"chance: {result['chance']:.2%}",
    ])  # fmt: skip


def draw(result: dict, study: Study):
    """A dot and its interval for each template, from the best to the worst; ensembles in orange."""
    rows = result["rows"][::-1]
    figure = new_figure(9, 0.27 * len(rows) + 1.6)
    axis = figure.subplots()
    for together, colour, label in ((False, "tab:blue", "one template"), (True, "tab:orange", "ensemble")):
        places = [place for place, row in enumerate(rows) if row["ensemble"] is together]
        figures = [rows[place]["top1"] for place in places]
        style = {"fmt": "o", "color": colour, "capsize": 2, "label": label}
        axis.errorbar([one["share"] for one in figures], places, xerr=error_bars(figures), **style)
    axis.set_yticks(range(len(rows)), [row["template"] for row in rows], fontsize=9)
    for text, row in zip(axis.get_yticklabels(), rows, strict=True):
        text.set_weight("bold" if row["ensemble"] else "normal")
    fair = result["best_single_chosen_on_other_half"]["share"]
    axis.axvline(fair, color="tab:blue", linestyle=":", label="best single template, chosen on other pictures")
    percent_ticks(axis.xaxis)
    axis.set(xlabel="top-1 accuracy, with its 95% interval", ylim=(-0.7, len(rows) - 0.3))
    sizes = f"{len(study.examples):,} pictures, {len(study.classes):,} names"
    axis.set_title(f"{study.name}: templates by accuracy, {sizes}")
    open_frame(axis, "x")
    axis.legend(fontsize=9, loc="lower right")
    return figure
