"""One model on one data set: the figures as a dict, and as a table; and several models in one table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from miniclip.data.datasets import class_names
from miniclip.data.lists import DataError, Example
from miniclip.embed import embed_texts
from miniclip.evaluation.features import embed_examples
from miniclip.evaluation.probe import few_shot, linear_probe
from miniclip.evaluation.retrieval import recall
from miniclip.evaluation.statistics import bootstrap, class_recall, confusion_matrix, most_confused
from miniclip.models import CLIP
from miniclip.zero_shot import classify, confidences, expand_templates, shares, zero_shot_weights

TASKS = ("zero-shot", "retrieval")
PROBES = ("linear-probe", "few-shot")  # which need pictures to learn from
FEW = 5  # a class of fewer pictures says too little about how others of it would fare


def evaluate(
    model: CLIP,
    preprocess: Callable[[Image.Image], Tensor],
    examples: Sequence[Example],
    templates: Sequence[str] = ("{}",),
    classes: Sequence[str] | None = None,
    tasks: Sequence[str] = TASKS,
    background: str | None = None,
    train: Sequence[Example] = (),
    cache: str | Path | None = None,
    seed: int = 0,
) -> dict:
    """Measure a model; the result is ready for JSON.

    templates: prompts with {} for the name, or names of sets of them, see `prompts.py`
    classes: the names to choose from; None: those of the examples. Examples of another name are left out of all tasks.
    tasks: of TASKS and PROBES. background, cache: see `embed_examples`; prompts are kept in the cache too.
    train: what the probes learn from. seed: of the bootstrap, and of which pictures the probes draw

        pictures, left_out   how many were measured, and how many have a name that is not in `classes`
        rejected             why pictures could not be read, and captions not be encoded, a line each
        zero_shot            classes (their number), templates; top1, top5 and mean_class_recall, in which each class
                             counts alike, in 0..1, each with its 95% bounds ("top1_interval", ...: the bootstrap's;
                             None for mean_class_recall where a class has fewer than FEW pictures); class_recall: each
                             class's pictures and recall; most_confused: pairs of classes and how often one was taken
                             for the other; and predictions: each picture's image, name, predicted name, its
                             probability, and the rank of its own name, 1 being the best
        retrieval            captions (their number), distinct_captions, image_to_text and text_to_image, each with
                             recall@1, recall@5 and recall@10 in 0..1
        linear_probe, few_shot   see `probe.py`

    DataError if no picture can be used, or a prompt can't.
    """
    classes = class_names(examples) if classes is None else list(dict.fromkeys(classes))
    number = {name: i for i, name in enumerate(classes)}
    kept = [example for example in examples if example.captions[0] in number]
    left_out = len(examples) - len(kept)
    if not kept:
        raise DataError(f"none of the {len(examples)} pictures has a name among the {len(classes)} classes")
    # Before the pictures, which take longer, so that a bad template is known at once.
    weights = zero_shot_weights(model, classes, templates, cache) if "zero-shot" in tasks else None

    def embed(wanted: list[Example]) -> tuple[Tensor, Tensor, list[Example], list[str]]:
        images, faults = embed_examples(model, preprocess, wanted, background, cache)
        wanted = [example for i, example in enumerate(wanted) if i not in faults]
        targets = torch.tensor([number[example.captions[0]] for example in wanted])
        return images, targets, wanted, list(faults.values())

    images, targets, kept, faults = embed(kept)
    result = {"pictures": len(kept), "left_out": left_out, "rejected": faults}
    if weights is not None:
        figures = _zero_shot(images, weights, targets, kept, classes, model.logit_scale.exp().item(), seed)
        result["zero_shot"] = {"templates": expand_templates(templates), **figures}
    if "retrieval" in tasks:
        result["retrieval"], too_long = _retrieval(model, images, kept)
        result["rejected"] += too_long
    if set(tasks) & set(PROBES):
        known = [example for example in train if example.captions[0] in number]
        if not known:
            raise DataError(f"a probe has {len(train)} pictures to learn from, none of them of a known class")
        learnt, learnt_targets, _, faults = embed(known)
        result["rejected"] += faults
        if "linear-probe" in tasks:
            result["linear_probe"] = linear_probe(learnt, learnt_targets, images, targets, len(classes), seed)
        if "few-shot" in tasks:
            result["few_shot"] = few_shot(learnt, learnt_targets, images, targets, seed=seed)
    return result


def _zero_shot(
    images: Tensor,
    weights: Tensor,
    targets: Tensor,
    examples: list[Example],
    classes: list[str],
    scale: float,
    seed: int,
) -> dict:
    predicted, found = classify(images, weights, targets)
    probabilities = confidences(images, weights, predicted, scale).tolist()
    matrix = confusion_matrix(targets, predicted, len(classes))
    accuracy = shares(found, (1, 5))
    right = found < 1
    counts, recalls = matrix.sum(1).tolist(), class_recall(targets, right, len(classes))
    fewest = min(count for count in counts if count)
    rows = zip(examples, predicted.tolist(), probabilities, found.tolist(), strict=True)
    return {
        "classes": len(classes),
        "top1": accuracy[1],
        "top1_interval": bootstrap(right, seed=seed),
        "top5": accuracy[5],
        "top5_interval": bootstrap(found < 5, seed=seed),
        "mean_class_recall": recalls.nanmean().item(),
        "mean_class_recall_interval": bootstrap(right, targets, seed=seed) if fewest >= FEW else None,
        "class_recall": {
            name: {"pictures": count, "recall": recall}
            for name, count, recall in zip(classes, counts, recalls.tolist(), strict=True)
            if count
        },
        "most_confused": [(classes[i], classes[j], count) for i, j, count in most_confused(matrix, 10)],
        "predictions": [
            {
                "image": example.title,
                "name": example.captions[0],
                "predicted": classes[best],
                "probability": probability,
                "rank": rank + 1,
            }
            for example, best, probability, rank in rows
        ],
    }


def _retrieval(model: CLIP, images: Tensor, examples: list[Example]) -> tuple[dict, list[str]]:
    """The figures, and why captions were rejected. An image that has none left does not take part."""
    distinct = list(dict.fromkeys(caption for example in examples for caption in example.captions))
    texts, faults = embed_texts(model, distinct)
    usable = [caption for i, caption in enumerate(distinct) if i not in faults]
    number = {caption: i for i, caption in enumerate(usable)}
    rows, owners, described = [], [], []
    for i, example in enumerate(examples):
        captions = [number[caption] for caption in example.captions if caption in number]
        if captions:
            rows += captions
            owners += [len(described)] * len(captions)
            described.append(i)
    if not described:
        raise DataError(f"none of the {len(distinct)} captions can be encoded; the first: {faults[0]}")
    image_to_text, text_to_image = recall(images[described], texts[rows], torch.tensor(owners))
    figures = {
        "captions": len(rows),
        "distinct_captions": len(usable),
        "image_to_text": {f"recall@{k}": value for k, value in image_to_text.items()},
        "text_to_image": {f"recall@{k}": value for k, value in text_to_image.items()},
    }
    return figures, list(faults.values())
