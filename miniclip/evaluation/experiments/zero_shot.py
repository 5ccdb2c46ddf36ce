"""How often pictures get their right name, out of all names, from a model that was not trained for it.

As in the CLIP paper, section 3.1. Top-k is the share of pictures whose right name is among the k nearest. The interval
holds for other pictures of the same kind; drawings say nothing about photographs. Chance is the accuracy of guessing.
Accuracy falls when names are added, so models can only be compared on the same names and with the same prompts.

The bars in the figure are softmax probabilities: logits (cosines times the model's scale) compared with each other. 90%
for a name means that the other names fit much worse, not that the name fits: its cosine is typically 0.2 to 0.3 for
right answers too (CLIP, photographs), and a picture of something else also gets a best name.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from miniclip.evaluation.draw import fold, frame, new_figure, percent_ticks, plain_ticks
from miniclip.evaluation.measures import share
from miniclip.evaluation.report import predictions
from miniclip.evaluation.study import Study, picture_of
from miniclip.evaluation.tables import percent
from miniclip.table import columns
from miniclip.zero_shot import classify, expand_templates, nearest, shares, zero_shot_weights

SHOWN = 5  # names below each picture
DRAWN = 4  # right answers, and as many wrong ones


def measure(study: Study, templates: Sequence[str] = ("{}",), seed: int = 0) -> dict:
    """templates: prompts or names of sets, used as one ensemble. seed: which pictures are drawn."""
    weights = zero_shot_weights(study.model, study.classes, templates)
    predicted, ranks = classify(study.images, weights, study.targets, study.device)
    model = study.model
    probabilities = nearest(study.images, weights, model.logit_scale.exp(), logit_bias=model.logit_bias)[0][:, 0]
    cosines = study.images @ weights
    number = len(study.classes)
    return {
        "templates": expand_templates(templates),
        "chance": {"top1": 1 / number, "top5": min(1, 5 / number)},
        "top1": share(ranks < 1),
        "top5": share(ranks < 5),
        "right_category": _right_category(study, predicted),
        "median_rank": int(ranks.median()) + 1,
        "top_k": shares(ranks, _steps(number)),
        "cosine": {"right_name": _mean_std(cosines.gather(1, study.targets[:, None])), "all_names": _mean_std(cosines)},
        "too_often": _too_often(study, predicted),
        "drawn": _answers(study, cosines, ranks, seed),
        "predictions": predictions(study, predicted, ranks, probabilities),
    }


def _steps(number: int) -> list[int]:
    """1, 2, 3, 5, 10, 20, ... up to the number of classes."""
    steps = [k * 10**power for power in range(7) for k in (1, 2, 3, 5)]
    return [k for k in steps if k < number] + [number]


def _mean_std(values: Tensor) -> dict[str, float]:
    return {"mean": values.mean().item(), "std": values.std(correction=0).item()}


def _right_category(study: Study, predicted: Tensor) -> dict[str, float] | None:
    """How often the predicted name belongs to the right category; None where there are no categories."""
    category = {example.captions[0]: example.category for example in study.examples}
    given = [category.get(study.classes[name]) for name in predicted.tolist()]
    if None in category.values():
        return None
    return share(torch.tensor([own.category == other for own, other in zip(study.examples, given, strict=True)]))


def _too_often(study: Study, predicted: Tensor) -> list[dict]:
    """The names that were most often predicted wrongly."""
    wrong = predicted[predicted != study.targets].tolist()
    return [{"name": study.classes[name], "wrongly": count} for name, count in Counter(wrong).most_common(5)]


def _answers(study: Study, cosines: Tensor, ranks: Tensor, seed: int) -> list[dict]:
    """Some right and some wrong answers, with the likeliest names of each."""
    choose = random.Random(seed)
    answers = []
    for these in ((ranks == 0).nonzero(), (ranks > 0).nonzero()):
        for row in choose.sample(these[:, 0].tolist(), min(DRAWN, len(these))):
            probabilities = (study.scale * cosines[row]).softmax(dim=0)
            likeliest = [
                {"name": study.classes[i], "cosine": cosines[row, i].item(), "probability": probabilities[i].item()}
                for i in cosines[row].topk(min(SHOWN, len(study.classes))).indices.tolist()
            ]
            name = study.examples[row].captions[0]
            answers.append({"picture": row, "name": name, "rank": int(ranks[row]) + 1, "likeliest": likeliest})
    return answers


def table(result: dict) -> str:
    chance = result["chance"]
    rows = [[f"top-{k}", *percent(result[f"top{k}"]), f"{chance[f'top{k}']:.2%}"] for k in (1, 5)]
    if result["right_category"]:
        rows.append(["its category", *percent(result["right_category"]), ""])
    cosine = {key: f"{value['mean']:.3f} +- {value['std']:.3f}" for key, value in result["cosine"].items()}
    often = ", ".join(f"{row['name']} ({row['wrongly']})" for row in result["too_often"])
    return "\n".join([
        columns(["", "accuracy", "95% interval", "chance"], rows), "",
        f"median rank of the right name: {result['median_rank']}",
        f"cosine with the right name: {cosine['right_name']}; with all names: {cosine['all_names']}",
        f"most often predicted wrongly: {often or 'none'}",
    ])  # fmt: skip


def draw(result: dict, study: Study):
    """Right and wrong answers with their probabilities, beside the accuracy among the k best for every k."""
    figure = new_figure(14, 7)
    cards, side = figure.subfigures(1, 2, width_ratios=(2.3, 1))
    right = [answer for answer in result["drawn"] if answer["rank"] == 1]
    wrong = [answer for answer in result["drawn"] if answer["rank"] > 1]
    for part, answers, verdict in zip(cards.subfigures(2), (right, wrong), ("right", "wrong"), strict=True):
        part.suptitle(f"{'some' if answers else 'no'} {verdict} answers", fontsize=11, color="dimgrey")
        grid = part.subplots(2, DRAWN, height_ratios=(1.5, 1))
        for axis in grid.flat:
            axis.set_axis_off()
        for column, answer in enumerate(answers):
            _card(grid[0, column], grid[1, column], answer, study)
    axis = side.subplots()
    ks = [int(k) for k in result["top_k"]]
    axis.plot(ks, list(result["top_k"].values()), "o-", color="tab:blue", label=study.name)
    axis.plot(ks, [k / max(ks) for k in ks], "--", color="grey", label="guessing")
    axis.set(xscale="log", ylim=(0, 1.02), xlabel=f"k, of {max(ks):,} names", ylabel="pictures")
    axis.set_title("right name among the k nearest", fontsize=11, color="dimgrey")
    percent_ticks(axis.yaxis)
    plain_ticks(axis.xaxis)
    axis.grid(alpha=0.3)
    axis.legend(loc="lower right" if result["top1"]["share"] > 0.3 else "upper left")
    accuracy = f"top-1 {result['top1']['share']:.1%}, top-5 {result['top5']['share']:.1%}"
    figure.suptitle(f"{study.name}, zero-shot: {accuracy} of {len(study.examples):,} pictures", fontsize=13)
    return figure


def _card(picture, bars, answer: dict, study: Study) -> None:
    """A picture under its name, over the likeliest names; the right one's bar is green."""
    picture.imshow(picture_of(study.examples[answer["picture"]].image))
    picture.set_axis_on()
    frame(picture)
    picture.set_title(fold(answer["name"], 24), fontsize=10, weight="bold", parse_math=False)
    for place, row in enumerate(answer["likeliest"]):
        bars.barh(-place, row["probability"], color="lightgreen" if row["name"] == answer["name"] else "lightgrey")
        bars.text(0.01, -place, f"{row['probability']:.0%}  {row['name']}", va="center", fontsize=8, parse_math=False)
    bars.set(xlim=(0, 1), ylim=(0.5 - SHOWN, 0.5))
