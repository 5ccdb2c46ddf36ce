"""Measure how well a model names the pictures of a data set, and how well it finds them by their captions."""

from __future__ import annotations

import argparse
from pathlib import Path

from miniclip.commands.options import (
    add_data,
    add_json,
    add_model,
    add_plot,
    drawing_folder,
    load_model,
    path,
)
from miniclip.commands.output import report_rejected, show, show_json
from miniclip.data.templates import TEMPLATES
from miniclip.errors import UsageError, require
from miniclip.evaluation.report import PROBES, TASKS

MODEL = "a name from `miniclip models`, a file or directory; may be repeated, to compare them (default: ViT-B/32)"
DATASET = (
    "sample (240 drawings that come with miniclip), cifar10, cifar100, mnist; a .json, .jsonl or .csv list of pictures "
    "and captions, the name first; or a folder of CLASS NAME/PICTURE"
)
TEMPLATE = f"a prompt with {{}} for the name, or {', '.join(TEMPLATES)}; may be repeated (default: {{}})"
CLASSES = (
    "names to choose from: imagenet, imagenet-a or imagenet-r, a .txt of lines, or a DATASET; may be repeated "
    "(default: the data set's)"
)
TASK = "may be repeated (default: zero-shot, and for a list of captions also retrieval)"
GROUP_BY = "also the accuracy for each value of a column of the list, or category; the classes stay the same"
TRAIN = "pictures to learn from (default: the training split, or half of the pictures of each class)"
OUT = "write report.json, and draw answers, mistakes, the confusion matrix and few-shot curves into DIR"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset", metavar="DATASET", help=DATASET)
    parser.add_argument("--task", action="append", choices=(*TASKS, *PROBES), help=TASK)
    parser.add_argument("--template", action="append", metavar="TEXT", help=TEMPLATE)
    parser.add_argument("--classes", action="append", metavar="FILE", help=CLASSES)
    parser.add_argument("--by", choices=("name", "category"), default="name", help="what the classes are")
    parser.add_argument("--group-by", metavar="COLUMN", help=GROUP_BY)
    parser.add_argument("--train", metavar="DATASET", help=TRAIN)
    parser.add_argument("--cache", type=path, metavar="DIR", help="keep embeddings there, and reuse them")
    add_data(parser)
    parser.add_argument("--seed", type=int, default=0, help="seed of all random choices (default: 0)")
    add_model(parser, None, MODEL, action="append")
    add_json(parser, "print JSON, with the predicted name of every picture")
    add_plot(parser, "draw some right and some wrong answers")
    parser.add_argument("--out", type=drawing_folder, metavar="DIR", help=OUT)


def run(options: argparse.Namespace) -> int:
    from miniclip.data.datasets import read_classes
    from miniclip.evaluation.pages import plot_answers, write_report
    from miniclip.evaluation.report import evaluate
    from miniclip.evaluation.select import select
    from miniclip.evaluation.tables import comparison, table
    from miniclip.zero_shot import expand_templates

    models = list(dict.fromkeys(options.model or ["ViT-B/32"]))
    tasks = options.task or _default_tasks(options)
    _check(options, models, tasks)
    templates = expand_templates(options.template or ["{}"])
    examples, train = select(
        options.dataset, options.train, learns=bool(set(tasks) & set(PROBES)), by=options.by, limit=options.limit,
        seed=options.seed, root=options.data_root, download=options.download,
    )  # fmt: skip
    classes = read_classes(*options.classes) if options.classes else None
    results = {}
    for name in models:
        model, preprocess = load_model(argparse.Namespace(**vars(options) | {"model": name}))
        settings = {"background": options.background, "train": train, "cache": options.cache, "seed": options.seed}
        settings["group_by"] = options.group_by
        results[name] = evaluate(model, preprocess, examples, templates, classes, tasks, **settings)
    first = results[models[0]]
    if options.json:
        show_json(first if len(models) == 1 else {"models": results})
    else:
        show(table(first) if len(models) == 1 else comparison(results))
    if options.plot:
        plot_answers(first["zero_shot"]["predictions"], examples, options.plot, options.seed)
    if options.out:
        write_report(results, examples, options.out, options.seed)
    captions = first["retrieval"]["distinct_captions"] if "retrieval" in tasks else 0
    return report_rejected(first["rejected"], first["pictures"] + captions + len(first["rejected"]))


def _default_tasks(options: argparse.Namespace) -> list[str]:
    """Retrieval says nothing new if the captions are only the names of the classes."""
    from miniclip.data.datasets import PUBLISHED

    is_list = options.dataset not in PUBLISHED and not Path(options.dataset).is_dir() and options.by == "name"
    return list(TASKS if is_list else TASKS[:1])


def _check(options: argparse.Namespace, models: list[str], tasks: list[str]) -> None:
    """UsageError, before any work, for what could only fail after it."""
    if options.plot and len(models) > 1:
        raise UsageError("--plot draws one model's answers; --out DIR draws those of several")
    if options.plot and "zero-shot" not in tasks:
        raise UsageError("--plot draws the answers of zero-shot, which --task leaves out")
    if options.group_by and "zero-shot" not in tasks:
        raise UsageError("--group-by groups the answers of zero-shot, which --task leaves out")
    if options.train and not set(tasks) & set(PROBES):
        raise UsageError(f"--train is for --task {' and '.join(PROBES)}; leave it out, or ask for one")
    if set(tasks) & set(PROBES):
        require("sklearn", "probe", "a probe")
