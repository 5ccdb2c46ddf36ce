"""`evaluate`: one model's figures on one data set, as a dict."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from miniclip.data.datasets import class_names, read_dataset
from miniclip.data.lists import DataError, Example
from miniclip.embed import as_list, embed_texts
from miniclip.evaluation import PROBES, TASKS
from miniclip.evaluation.measures import (
    KS,
    class_recall,
    confusion_matrix,
    interval,
    mean_reciprocal_rank,
    most_confused,
    retrieval_ranks,
    share,
)
from miniclip.evaluation.probe import few_shot, linear_probe
from miniclip.evaluation.study import Study, embed_study
from miniclip.models import CLIP
from miniclip.tokenizer import clean
from miniclip.zero_shot import classify, expand_templates, nearest, shares, zero_shot_weights

FEW = 5  # the mean over classes has no interval if a class has fewer pictures


def evaluate(
    model: CLIP,
    preprocess: Callable[[Image.Image], Tensor],
    examples: Sequence[Example] | str | Path,
    templates: str | Sequence[str] = ("{}",),
    classes: str | Sequence[str] | None = None,
    tasks: str | Sequence[str] = TASKS,
    background: str | None = None,
    train: Sequence[Example] = (),
    cache: str | Path | None = None,
    seed: int = 0,
    group_by: str | None = None,
    data_root: str | Path | None = None,
    download: bool = False,
) -> dict:
    """Measure a model; the result is ready for JSON.

    examples: the pictures, or what `read_dataset` takes: "sample", "cifar10", "cifar100", "mnist", a list, a folder.
    data_root, download: where it keeps published data (None: ~/.cache/miniclip), and whether to get what is missing.
    templates: prompts with {} for the name, or names of sets of them, see `miniclip.data.templates`.
    classes: the names to choose from; None: those of the examples. Examples with another name are left out.
    tasks: of TASKS and PROBES. background, cache: see `embed_examples`; the prompts' embeddings are stored too.
    train: what the probes learn from. seed: of the bootstrap, and of the pictures that the probes draw.
    group_by: a column of the list of pictures, or "category"; the classes stay the same.

        pictures, left_out   how many were measured, and how many have a name that is not in `classes`
        rejected             a line for each picture that could not be read and each caption that is too long
        zero_shot            classes (their number), templates; top1, top5 and mean_class_recall, in which each class
                             counts alike, in 0..1, each with its 95% interval ("top1_interval", ...; see
                             `measures.interval`; None for mean_class_recall if a class has fewer than FEW pictures);
                             class_recall: each class's pictures and recall; most_confused: pairs of classes and how
                             often one was taken for the other; predictions: each picture's image, name, predicted
                             name, its probability, and the rank of the true name, from 1
        retrieval            captions (their number), distinct_captions, image_to_text and text_to_image, each with
                             recall@1, recall@5, recall@10 and the mean reciprocal rank, in 0..1. A caption that several
                             pictures share is right for all of them
        groups               with group_by: by (the column), and for each of its values, pictures and the share of right
                             answers with its interval. A difference between groups shows a bias of the model, or that
                             the groups' pictures differ in something else
        linear_probe, few_shot   see `probe.py`

    DataError if no picture can be used, or a prompt can't.
    """
    if not hasattr(model, "encode_image"):
        raise DataError(f"expected a model, got {model!r:.60}: model, preprocess = load(...)")
    tasks = as_list(tasks)
    if isinstance(examples, str | Path):
        examples = read_dataset(examples, data_root, download)
    classes = class_names(examples) if classes is None else list(dict.fromkeys(as_list(classes)))
    known = set(classes)
    kept = [example for example in examples if example.captions[0] in known]
    if not kept:
        raise DataError(f"none of the {len(examples)} pictures has a name among the {len(classes)} classes")
    # Before the pictures, which take longer, so that an error in a template is reported at once.
    weights = zero_shot_weights(model, classes, templates, cache) if "zero-shot" in tasks else None
    if group_by:
        _check_groups(kept, group_by, tasks)

    def embed(wanted: list[Example]) -> Study:
        return embed_study("", model, preprocess, wanted, background=background, classes=classes, cache=cache)

    study = embed(kept)
    result = {"pictures": len(study.examples), "left_out": len(examples) - len(kept), "rejected": study.rejected}
    if weights is not None:
        result["zero_shot"] = {"templates": expand_templates(templates), **_zero_shot(study, weights, seed)}
        if group_by:
            result["groups"] = _groups(study, result["zero_shot"]["predictions"], group_by)
    if "retrieval" in tasks:
        result["retrieval"], too_long = _retrieval(study)
        result["rejected"] += too_long
    if set(tasks) & set(PROBES):
        learnable = [example for example in train if example.captions[0] in known]
        if not learnable:
            raise DataError(f"a probe has {len(train)} pictures to learn from, none of them of a known class")
        learnt = embed(learnable)
        result["rejected"] += learnt.rejected
        data = learnt.images, learnt.targets, study.images, study.targets
        if "linear-probe" in tasks:
            result["linear_probe"] = linear_probe(*data, len(classes), seed)
        if "few-shot" in tasks:
            result["few_shot"] = few_shot(*data, seed=seed)
    return result


def _zero_shot(study: Study, weights: Tensor, seed: int) -> dict:
    classes, targets = study.classes, study.targets
    predicted, found = classify(study.images, weights, targets, study.device)
    model = study.model
    probabilities = nearest(study.images, weights, model.logit_scale.exp(), logit_bias=model.logit_bias)[0][:, 0]
    matrix = confusion_matrix(targets, predicted, len(classes))
    accuracy, right = shares(found, (1, 5)), found < 1
    counts, recalls = matrix.sum(1).tolist(), class_recall(targets, right, len(classes))
    fewest = min(count for count in counts if count)
    return {
        "classes": len(classes),
        "top1": accuracy[1],
        "top1_interval": interval(right),
        "top5": accuracy[5],
        "top5_interval": interval(found < 5),
        "mean_class_recall": recalls.nanmean().item(),
        "mean_class_recall_interval": interval(right, targets, seed) if fewest >= FEW else None,
        "class_recall": {
            name: {"pictures": count, "recall": recall}
            for name, count, recall in zip(classes, counts, recalls.tolist(), strict=True)
            if count
        },
        "most_confused": [(classes[i], classes[j], count) for i, j, count in most_confused(matrix, 10)],
        "predictions": predictions(study, predicted, found, probabilities),
    }


def predictions(study: Study, predicted: Tensor, found: Tensor, probabilities: Tensor) -> list[dict]:
    """A row for each picture. predicted: its nearest class; found: the rank of its true class, from 0; both int64 [N];
    probabilities: of the predicted classes, [N]."""
    rows = zip(study.examples, predicted.tolist(), probabilities.tolist(), found.tolist(), strict=True)
    return [
        {
            "image": example.title,
            "name": example.captions[0],
            "predicted": study.classes[best],
            "probability": probability,
            "rank": rank + 1,
        }
        for example, best, probability, rank in rows
    ]


def _check_groups(examples: Sequence[Example], column: str, tasks: Sequence[str]) -> None:
    if "zero-shot" not in tasks:
        raise DataError("groups are of the answers of zero-shot; add it to the tasks")
    without = next((example for example in examples if example.column(column) is None), None)
    if without:
        known = sorted({*without.columns, *(["category"] if without.category else [])})
        raise DataError(f"{without.title} has no column {column!r} to group by; it has {', '.join(known) or 'none'}")


def _groups(study: Study, answers: list[dict], column: str) -> dict:
    """The share of right answers for each value of a column, sorted by the value."""
    right: dict[str, list[bool]] = {}
    for example, answer in zip(study.examples, answers, strict=True):
        right.setdefault(example.column(column), []).append(answer["rank"] == 1)
    rows = {value: {"pictures": len(right[value]), **share(torch.tensor(right[value]))} for value in sorted(right)}
    return {"by": column, "groups": rows}


def _retrieval(study: Study) -> tuple[dict, list[str]]:
    """The figures, and why captions were rejected. An image without a usable caption does not take part."""
    distinct = list(dict.fromkeys(clean(caption) for example in study.examples for caption in example.captions))
    texts, faults = embed_texts(study.model, distinct)
    number = {caption: i for i, caption in enumerate(c for i, c in enumerate(distinct) if i not in faults)}
    own = [[number[c] for c in map(clean, example.captions) if c in number] for example in study.examples]
    described = [i for i, captions in enumerate(own) if captions]
    if not described:
        raise DataError(f"none of the {len(distinct)} captions can be encoded; the first: {faults[0]}")
    owners: list[list[int]] = [[] for _ in texts]
    for image, i in enumerate(described):
        for caption in own[i]:
            owners[caption].append(image)
    directions = retrieval_ranks(study.images[described], texts, owners)
    figures = {
        "captions": sum(map(len, own)),
        "distinct_captions": len(texts),
        **{
            direction: {
                **{f"recall@{k}": value for k, value in shares(found, KS).items()},
                "mean_reciprocal_rank": mean_reciprocal_rank(found),
            }
            for direction, found in zip(("image_to_text", "text_to_image"), directions, strict=True)
        },
    }
    return figures, list(faults.values())
