"""Measure how well a model names the pictures of a data set, and how well it finds them by their captions.

    miniclip evaluate sample --model tiny-ViT
    miniclip evaluate cifar10 --download --template cifar --task zero-shot --task linear-probe --out report
    miniclip evaluate imagenet/val imagenetv2 imagenet-a imagenet-r sketch objectnet/images --template imagenet

The last compares a model's robustness, in one table: folders of ImageNet's and ObjectNet's names are known.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from miniclip.commands.options import (
    add_data,
    add_hidden,
    add_json,
    add_model,
    add_plot,
    drawing_folder,
    load_model,
    output_file,
    path,
)
from miniclip.commands.output import complain, report_rejected, show, show_json
from miniclip.data.templates import TEMPLATES
from miniclip.errors import UsageError, require
from miniclip.evaluation import PROBES, TASKS

MODEL = "a name from `miniclip models`, a file or directory; may be repeated, to compare them (default: ViT-B/32)"
DATASET = (
    "sample (240 drawings that come with miniclip), cifar10, cifar100, mnist; a .json, .jsonl or .csv list of pictures "
    "and captions, the name first; or a folder of CLASS NAME/PICTURE. Several are compared in one table"
)
TEMPLATE = f"a prompt with {{}} for the name, or {', '.join(TEMPLATES)}; may be repeated (default: {{}})"
CLASSES = (
    "names to choose from: imagenet, imagenet-a, imagenet-r, objectnet (the 113 that ImageNet has too), objectnet-313, "
    "a .txt of lines, or a DATASET; may be repeated (default: the data set's)"
)
TASK = "may be repeated (default: zero-shot, and for a list of captions also retrieval)"
GROUP_BY = "also the accuracy for each value of a column of the list, or category; the classes stay the same"
TRAIN = "pictures to learn from (default: the training split, or half of the pictures of each class)"
MONITOR = "append the run to FILE (JSONL): its scores, rejected inputs, and the drift since the first run there"
OUT = "write report.json, and draw answers, mistakes, confusion matrix, few-shot curves and a comparison of data sets"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset", nargs="+", metavar="DATASET", help=DATASET)
    parser.add_argument("--task", action="append", choices=(*TASKS, *PROBES), help=TASK)
    parser.add_argument("--template", action="append", metavar="TEXT", help=TEMPLATE)
    parser.add_argument("--classes", action="append", metavar="FILE", help=CLASSES)
    parser.add_argument("--by", choices=("name", "category"), default="name", help="what the classes are")
    parser.add_argument("--group-by", metavar="COLUMN", help=GROUP_BY)
    parser.add_argument("--train", metavar="DATASET", help=TRAIN)
    parser.add_argument("--cache", type=path, metavar="DIR", help="keep embeddings there, and reuse them")
    add_data(parser)
    add_hidden(parser)
    parser.add_argument("--seed", type=int, default=0, help="seed of all random choices (default: 0)")
    add_model(parser, None, MODEL, action="append")
    add_json(parser, "print JSON, with the predicted name of every picture")
    add_plot(parser, "draw some right and some wrong answers")
    parser.add_argument("--monitor", type=output_file, metavar="FILE", help=MONITOR)
    parser.add_argument("--out", type=drawing_folder, metavar="DIR", help=OUT)


def run(options: argparse.Namespace) -> int:
    from miniclip.evaluation.monitor import describe, monitor
    from miniclip.evaluation.pages import as_json, plot_answers, write_reports
    from miniclip.evaluation.tables import overview

    models, datasets = list(dict.fromkeys(options.model or ["ViT-B/32"])), list(dict.fromkeys(options.dataset))
    tasks = {data: options.task or _default_tasks(data, options.by) for data in datasets}
    for each in tasks.values():
        _check(options, models, each)
    results, pictures = _measure(options, models, tasks)
    if options.json:
        show_json(as_json(results))
    else:
        show(overview(results))
    firsts = [results[data][models[0]] for data in datasets]
    if options.plot:
        plot_answers(firsts[0]["zero_shot"]["predictions"], pictures[datasets[0]], options.plot, options.seed)
    if options.monitor:
        complain(describe(monitor(firsts[0], options.monitor)))
    if options.out:
        write_reports(results, pictures, options.out, options.seed)
    captions = sum(first["retrieval"]["distinct_captions"] for first in firsts if "retrieval" in first)
    rejected = [fault for first in firsts for fault in first["rejected"]]
    return report_rejected(rejected, sum(first["pictures"] for first in firsts) + captions + len(rejected))


def _measure(options: argparse.Namespace, models: list[str], tasks: dict[str, list[str]]) -> tuple[dict, dict]:
    """The results by data set and model, and the pictures by data set."""
    from miniclip.data import imagenet, objectnet
    from miniclip.data.datasets import read_classes
    from miniclip.evaluation.report import evaluate
    from miniclip.evaluation.select import select
    from miniclip.zero_shot import expand_templates

    templates = expand_templates(options.template or ["{}"])
    classes = read_classes(*options.classes) if options.classes else None
    chosen = {"by": options.by, "limit": options.limit, "seed": options.seed}
    where = {"root": options.data_root, "download": options.download, "hidden": options.hidden}
    where["imagenet"] = bool(set(imagenet.SETS).intersection(options.classes or []))
    where["objectnet"] = next((name for name in options.classes or [] if name in objectnet.SETS), None)
    pictures = {
        data: select(data, options.train, learns=bool(set(each) & set(PROBES)), **chosen, **where)
        for data, each in tasks.items()
    }
    settings = {name: getattr(options, name) for name in ("background", "cache", "seed", "group_by")}
    results: dict[str, dict[str, dict]] = {data: {} for data in tasks}
    for name in models:
        model, preprocess = load_model(argparse.Namespace(**vars(options) | {"model": name}))
        for data, (examples, train) in pictures.items():
            arguments = model, preprocess, examples, templates, classes, tasks[data]
            results[data][name] = evaluate(*arguments, train=train, **settings)
    return results, {data: examples for data, (examples, _) in pictures.items()}


def _default_tasks(data: str, by: str) -> list[str]:
    """Retrieval says nothing new if the captions are only the names of the classes."""
    from miniclip.data.datasets import PUBLISHED

    is_list = data not in PUBLISHED and not Path(data).is_dir() and by == "name"
    return list(TASKS if is_list else TASKS[:1])


def _check(options: argparse.Namespace, models: list[str], tasks: list[str]) -> None:
    """UsageError, before any work, for what could only fail after it."""
    if options.plot and (len(models) > 1 or len(options.dataset) > 1):
        raise UsageError("--plot draws one model's answers on one data set; --out DIR draws those of several")
    if options.monitor and (len(models) > 1 or len(options.dataset) > 1):
        raise UsageError("--monitor is for one model and one data set; run it for each, with a file of its own")
    for name in ("plot", "group_by", "monitor"):
        if getattr(options, name) and "zero-shot" not in tasks:
            raise UsageError(f"--{name.replace('_', '-')} needs the answers of zero-shot, which --task leaves out")
    if options.train and not set(tasks) & set(PROBES):
        raise UsageError(f"--train is for --task {' and '.join(PROBES)}; leave it out, or ask for one")
    if set(tasks) & set(PROBES):
        require("sklearn", "probe", "a probe")
