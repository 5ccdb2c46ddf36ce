"""`miniclip evaluate`: its options, and what it does."""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch

from miniclip.data.datasets import PUBLISHED, class_names, read_classes, read_dataset
from miniclip.data.lists import DataError, Example
from miniclip.data.templates import TEMPLATES
from miniclip.evaluation.pages import plot_answers, plot_confusion, plot_few_shot, plot_mistakes
from miniclip.evaluation.probe import split
from miniclip.evaluation.report import PROBES, TASKS, evaluate
from miniclip.evaluation.tables import comparison, table
from miniclip.zero_shot import expand_templates

DATASET = (
    "sample (240 drawings that come with miniclip), cifar10, cifar100, mnist; a .json, .jsonl or .csv list of pictures "
    "and captions, the name first; or a folder of CLASS NAME/PICTURE"
)
TEMPLATE = f"a prompt with {{}} for the name, or {', '.join(TEMPLATES)}; may be repeated (default: {{}})"
CLASSES = "names to choose from: imagenet, a .txt of lines, or a DATASET (default: all); repeated: what all have"
BACKGROUND = "for transparent pictures (default: as openai/CLIP, which drops the transparency: most end up on black)"
TASK = "may be repeated (default: zero-shot, for a list of captions retrieval too)"
TRAIN = "pictures to learn from (default: the training split, or half of the pictures of each class)"
OUT = "write report.json and draw answers, the surest mistakes, the confusion matrix, few-shot curves to DIR"
TRAINING_SHARE = 0.5  # of a data set that has no training split of its own


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset", metavar="DATASET", help=DATASET)
    parser.add_argument("--data-root", type=Path, metavar="DIR", help="where the published data sets are, or go")
    parser.add_argument("--download", action="store_true", help="get the published data set if it is not there")
    parser.add_argument("--limit", type=int, metavar="N", help="of all pictures take N, at random")
    parser.add_argument("--template", action="append", metavar="TEXT", help=TEMPLATE)
    parser.add_argument("--classes", action="append", metavar="FILE", help=CLASSES)
    parser.add_argument("--by", choices=("name", "category"), default="name", help="what the classes are")
    parser.add_argument("--task", action="append", choices=(*TASKS, *PROBES), help=TASK)
    parser.add_argument("--train", metavar="DATASET", help=TRAIN)
    parser.add_argument("--cache", type=Path, metavar="DIR", help="keep embeddings there, and find them again")
    parser.add_argument("--background", choices=("white", "grey", "black"), help=BACKGROUND)
    parser.add_argument("--json", action="store_true", help="also every picture's predicted name")
    parser.add_argument("--out", type=Path, metavar="DIR", help=OUT)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw some right and some wrong answers")
    parser.add_argument("--seed", type=int, default=0, help="of all that is chosen at random (default: 0)")


def run(options: argparse.Namespace, load: Callable[[str], tuple]) -> tuple[int, list[str]]:
    """Measure, print, write and draw; returns how many inputs there were, and why some of them can't be used.

    load: gives a model and its preprocessing. DataError for options that make no sense, and for missing data.
    """
    models = list(dict.fromkeys(options.model or ["ViT-B/32"]))
    tasks = options.task or _default_tasks(options)
    _check(options, models, tasks)
    templates = expand_templates(options.template or ["{}"])
    examples, train = _read(options, tasks)
    classes = read_classes(*options.classes) if options.classes else None
    results = {}
    for name in models:
        model, preprocess = load(name)
        results[name] = evaluate(
            *(model, preprocess, examples, templates, classes, tasks),
            **{"background": options.background, "train": train, "cache": options.cache, "seed": options.seed},
        )
    first = results[models[0]]
    output = first if len(models) == 1 else {"models": results}
    if options.json:
        print(json.dumps(output, indent=2))
    else:
        print(table(first) if len(models) == 1 else comparison(results))
    if options.plot:
        plot_answers(first["zero_shot"]["predictions"], examples, options.plot, options.seed)
    if options.out:
        _write(results, output, examples, options)
    captions = first["retrieval"]["distinct_captions"] if "retrieval" in tasks else 0
    return first["pictures"] + captions + len(first["rejected"]), first["rejected"]


def _default_tasks(options: argparse.Namespace) -> list[str]:
    """Where captions are no more than the names of classes, retrieval says nothing of its own."""
    is_list = options.dataset not in PUBLISHED and not Path(options.dataset).is_dir() and options.by == "name"
    return list(TASKS if is_list else TASKS[:1])


def _check(options: argparse.Namespace, models: list[str], tasks: list[str]) -> None:
    """DataError, before any work, for what could only fail after it."""
    if options.limit is not None and options.limit < 1:
        raise DataError(f"--limit is {options.limit}; expected a number of pictures from 1")
    if options.plot and len(models) > 1:
        raise DataError("--plot draws one model's answers; --out DIR draws those of several")
    if options.plot and "zero-shot" not in tasks:
        raise DataError("--plot draws the answers of zero-shot, which --task leaves out")
    if options.train and not set(tasks) & set(PROBES):
        raise DataError(f"--train is for --task {' and '.join(PROBES)}; leave it out, or ask for one")
    if set(tasks) & set(PROBES) and find_spec("sklearn") is None:
        raise DataError('a probe needs scikit-learn: pip install "miniclip[probe]"')
    if options.out:
        make_folder(options.out)


def _read(options: argparse.Namespace, tasks: list[str]) -> tuple[list[Example], list[Example]]:
    """What to measure, and what the probes learn from; the latter is empty if there are none."""
    where = {"root": options.data_root, "download": options.download}
    examples = _named(read_dataset(options.dataset, **where), options)
    train = []
    if set(tasks) & set(PROBES):
        if options.train:
            train = _named(read_dataset(options.train, **where), options)
        elif options.dataset in PUBLISHED:
            train = _named(read_dataset(options.dataset, **where, split="train"), options)
        else:
            examples, train = _halves(examples, options.seed)
    if options.limit and options.limit < len(examples):
        examples = random.Random(options.seed).sample(examples, options.limit)
    return examples, train


def _named(examples: list[Example], options: argparse.Namespace) -> list[Example]:
    """The examples, each with its category for a name, if that is what the classes are."""
    if options.by == "name":
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


def _write(results: dict[str, dict], output: dict, examples: list[Example], options: argparse.Namespace) -> None:
    """report.json and the pictures; of several models in a folder for each, but for what shows them together."""
    (options.out / "report.json").write_text(json.dumps(output, indent=2) + "\n", encoding="utf-8")
    for name, result in results.items():
        folder = options.out if len(results) == 1 else options.out / re.sub(r"[^\w.@-]+", "-", name).strip("-.")
        folder.mkdir(exist_ok=True)
        if "zero_shot" in result:
            predictions = result["zero_shot"]["predictions"]
            plot_answers(predictions, examples, folder / "answers.png", options.seed)
            plot_mistakes(predictions, examples, folder / "mistakes.png")
            plot_confusion(predictions, folder / "confusion.png")
    if "few_shot" in next(iter(results.values())):
        plot_few_shot(results, options.out / "few_shot.png")


def make_folder(out: Path) -> None:
    """The one that --out names. DataError, before the work and not after it, if nothing can be drawn into it."""
    if find_spec("matplotlib") is None:
        raise DataError('--out also draws, for which it needs matplotlib: pip install "miniclip[plot]"')
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"--out is {out}; expected a folder, or where one can be made: {error}") from None
