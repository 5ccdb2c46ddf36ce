"""Templates ranked by the accuracy that they give, with intervals, and whether an ensemble beats the best one.

An ensemble is the mean of unit embeddings of a class's prompts (CLIP paper, section 3.1.4, where 80 templates gave 3.5
points on ImageNet). The best single template was found by trying all of them on these very pictures, which flatters it:
with a hundred templates that do nothing, one looks good. So it is also chosen fairly: on one half of the pictures, and
measured on the other.

Intervals of two templates that overlap don't say that there is no difference, as both named the same pictures. The
difference is therefore bootstrapped over pictures: whether it holds for others of the same kind.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from miniclip.data.templates import TEMPLATES
from miniclip.evaluation.experiments.common import Study, columns, each_template, ensemble, percent, share
from miniclip.evaluation.statistics import bootstrap
from miniclip.zero_shot import classify, expand_templates


def measure(study: Study, templates: Sequence[str] = ("pictograms", "cifar", "imagenet-7"), seed: int = 0) -> dict:
    """templates: candidates, or names of sets of them; each set is an ensemble too, as all of them together are."""
    candidates = list(dict.fromkeys(expand_templates(templates)))
    weights = each_template(study.model, study.classes, candidates)
    sets = {f"ensemble {name}": TEMPLATES[name] for name in templates if name in TEMPLATES}
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
    _, ranks = classify(study.images, weights, study.targets)
    return ranks == 0


def _row(name: str, right: Tensor, ensemble: bool) -> dict:
    return {"template": name, "ensemble": ensemble, "top1": share(right)}


def chosen_on_other_half(right: Tensor, seed: int = 0) -> Tensor:
    """Whether each picture is got right by the way that is best on the half without it: bool [ways, N] -> bool [N]."""
    order = torch.randperm(right.shape[1], generator=torch.Generator().manual_seed(seed))
    halves = order.tensor_split(2)
    result = torch.zeros(right.shape[1], dtype=torch.bool)
    for here, elsewhere in (halves, halves[::-1]):
        result[here] = right[right[:, elsewhere].sum(1).argmax()][here]
    return result


def difference(ours: Tensor, theirs: Tensor, seed: int = 0) -> dict[str, float]:
    """How much more often `ours` is right than `theirs`, both bool [N], in -1..1; its interval by `bootstrap`."""
    low, high = bootstrap(ours.double() - theirs.double(), seed=seed)
    gained, lost = int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
    return {"difference": (gained - lost) / len(ours), "low": low, "high": high, "gained": gained, "lost": lost}


def table(result: dict) -> str:
    rows = [[row["template"], *percent(row["top1"])] for row in result["rows"]]
    fair, more = result["best_single_chosen_on_other_half"], result["ensemble_less_best_single"]
    verdict = "" if more["low"] <= 0 <= more["high"] else " (0 is outside)"
    return "\n".join([
        columns(["template", "accuracy", "95% interval"], rows), "",
        f"the best single one, chosen on one half and measured on the other: {fair['share']:.2%}",
        f"the ensemble of all, less {result['best_single']!r}: {100 * more['difference']:+.2f} points, "
        f"95% interval {100 * more['low']:+.2f} to {100 * more['high']:+.2f}{verdict}; "
        f"{more['gained']} pictures gained, {more['lost']} lost",
        f"chance: {result['chance']:.2%}",
    ])  # fmt: skip


def draw(result: dict, study: Study):
    """A dot and its interval for each template, from the best to the worst; ensembles in orange."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    rows = result["rows"][::-1]
    figure = Figure(figsize=(9, 0.27 * len(rows) + 1.6), layout="constrained")
    axis = figure.subplots()
    for together, colour, label in ((False, "tab:blue", "one template"), (True, "tab:orange", "ensemble")):
        these = [(place, row["top1"]) for place, row in enumerate(rows) if row["ensemble"] is together]
        places = [place for place, _ in these]
        values = [top1["share"] for _, top1 in these]
        errors = [
            [top1["share"] - top1["low"] for _, top1 in these],
            [top1["high"] - top1["share"] for _, top1 in these],
        ]
        axis.errorbar(values, places, xerr=errors, fmt="o", color=colour, ecolor=colour, capsize=2, label=label)
    axis.set_yticks(range(len(rows)), [row["template"] for row in rows], fontsize=9)
    for text, row in zip(axis.get_yticklabels(), rows, strict=True):
        text.set_weight("bold" if row["ensemble"] else "normal")
    fair = result["best_single_chosen_on_other_half"]["share"]
    axis.axvline(fair, color="tab:blue", linestyle=":", label="best single one, chosen on other pictures")
    axis.xaxis.set_major_formatter(PercentFormatter(1))
    axis.set(xlabel="top-1 accuracy, with its 95% interval", ylim=(-0.7, len(rows) - 0.3))
    axis.set_title(
        f"{study.name}: templates by accuracy, {len(study.examples):,} pictures, {len(study.classes):,} names"
    )
    axis.grid(axis="x", alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=9, loc="lower right")
    return figure
