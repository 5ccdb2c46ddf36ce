"""Which pictures of a data set are measured, and which a probe learns from."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import torch

from miniclip.data.datasets import PUBLISHED, class_names, read_dataset
from miniclip.data.lists import DataError, Example
from miniclip.evaluation.probe import split

TRAINING_SHARE = 0.5  # of a data set that has no training split of its own


def select(
    dataset: str,
    train: str | None = None,
    *,
    learns: bool = False,
    by: str = "name",
    limit: int | None = None,
    seed: int = 0,
    root: Path | None = None,
    download: bool = False,
    imagenet: bool = False,
    hidden: bool = False,
    objectnet: str | None = None,
) -> tuple[list[Example], list[Example]]:
    """What to measure, and what a probe learns from, which is empty unless `learns`.

    train: a data set to learn from; None: the training split of a published data set, else half of each class.
    by: "name", or "category", which is then each picture's name. limit: measure so many, chosen by `seed`.
    The others: see `read_dataset`. DataError for data that is missing or can't be split.
    """
    where = {"root": root, "download": download, "imagenet": imagenet, "hidden": hidden, "objectnet": objectnet}
    examples = _named(read_dataset(dataset, **where), by)
    learned: list[Example] = []
    if learns and train:
        learned = _named(read_dataset(train, **where), by)
    elif learns and dataset in PUBLISHED:
        learned = _named(read_dataset(dataset, **where, split="train"), by)
    elif learns:
        examples, learned = _halves(examples, seed)
    if limit and limit < len(examples):
        examples = random.Random(seed).sample(examples, limit)
    return examples, learned


def _named(examples: list[Example], by: str) -> list[Example]:
    if by == "name":
        return examples
    without = next((example for example in examples if example.category is None), None)
    if without:
        raise DataError(f"{without.title} has no category; --by category needs one for each picture")
    return [replace(example, captions=(example.category,)) for example in examples]


def _halves(examples: list[Example], seed: int) -> tuple[list[Example], list[Example]]:
    """Half of each class to measure, and half to learn from."""
    number = {name: i for i, name in enumerate(class_names(examples))}
    targets = torch.tensor([number[example.captions[0]] for example in examples])
    test, train = split(targets, TRAINING_SHARE, seed)
    if not len(train):
        raise DataError("every class has one picture, so none is left to learn from; name others with --train")
    return [examples[i] for i in test], [examples[i] for i in train]
