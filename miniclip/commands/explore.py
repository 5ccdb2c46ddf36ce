"""Run one of nine experiments with a model, each with a table, a figure and a JSON file.

NAME is one of
{experiments}

    miniclip explore zero-shot --model tiny-ViT
    miniclip explore prompts --data cifar10 --download --out prompts
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from types import ModuleType

from miniclip.commands.options import add_data, add_json, add_model, drawing_folder, load_model
from miniclip.commands.output import complain, report_rejected, show, show_json, shown
from miniclip.errors import UsageError
from miniclip.evaluation.experiments import EXPERIMENTS, Experiment
from miniclip.io import write_atomically, write_json

ALL = EXPERIMENTS | {"benchmark": Experiment("latency, throughput, memory: `miniclip bench` as it comes", None, None)}
DATA = "sample (240 drawings that come with miniclip), cifar10, cifar100, mnist, or a list or folder as for evaluate"
TEMPLATE = "a prompt with {} for the name, or a set: imagenet, cifar, ...; may be repeated: an ensemble, or candidates"

__doc__ = __doc__.format(experiments="\n".join(f"  {name:17}{one.help}" for name, one in ALL.items()))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", choices=ALL, metavar="NAME", help="the experiment, one of those above")
    parser.add_argument("--data", metavar="DATASET", help=DATA)
    parser.add_argument("--template", action="append", metavar="TEXT", help=TEMPLATE)
    parser.add_argument("--query", action="append", metavar="TEXT", help="words to search for; may be repeated")
    add_data(parser)
    parser.add_argument("--seed", type=int, help="seed of all random choices (default: 0)")
    add_model(parser)
    add_json(parser)
    parser.add_argument("--out", type=drawing_folder, metavar="DIR", help="write DIR/NAME.json and draw DIR/NAME.png")


def run(options: argparse.Namespace) -> int:
    _check(options)
    if options.name == "benchmark":
        return _benchmark(options)
    module = ALL[options.name].module
    if options.name == "models":
        result = {"experiment": options.name, **module.measure(_unlisted(options.model))}
        heading, drawn = "", (result,)
    else:
        study, about = _study(options)
        result = {**about, **_measure(module, study, options), "rejected": study.rejected}
        heading = "{experiment}: {model} on {data}, {pictures:,} pictures, {classes:,} names\n\n".format(**about)
        drawn = (result, study)
    if options.json:
        show_json(result)
    else:
        show(heading + module.table(result))
    if options.out:
        figure = module.draw(*drawn)
        _write(options, result, lambda file: figure.savefig(file, format="png", dpi=110))
    rejected = result.get("rejected", [])
    return report_rejected(rejected, result.get("pictures", 0) + len(rejected))


def _check(options: argparse.Namespace) -> None:
    """UsageError for an option that the experiment does not have."""
    takes = ALL[options.name].takes
    for option in dict.fromkeys(name for experiment in ALL.values() for name in experiment.takes):
        if getattr(options, option) not in (None, False) and option not in takes:
            raise UsageError(f"{options.name} takes no --{option.replace('_', '-')}: leave it out")


def _study(options: argparse.Namespace):
    """The pictures of the data set, embedded; and what the result says about them."""
    from miniclip.data.datasets import read_dataset
    from miniclip.evaluation.study import embed_study

    data = options.data or ALL[options.name].data
    examples = read_dataset(data, root=options.data_root, download=options.download)
    name, (model, preprocess) = str(options.model), load_model(options)
    study = embed_study(name, model, preprocess, examples, options.limit, options.background, options.seed or 0)
    about = {"experiment": options.name, "model": study.name, "data": data}
    return study, about | {"pictures": len(study.examples), "classes": len(study.classes)}


def _measure(module: ModuleType, study, options: argparse.Namespace) -> dict:
    """The experiment's figures, with those of the options that were given and that its `measure` has."""
    given = {"templates": options.template, "queries": options.query, "seed": options.seed}
    known = signature(module.measure).parameters
    chosen = {name: value for name, value in given.items() if value is not None and name in known}
    return module.measure(study, **chosen)


def _unlisted(model: str) -> str | None:
    """The model, unless it is one of those that the experiment lists anyway."""
    from miniclip.loading import available_models

    return None if model in available_models() else str(model)


def _benchmark(options: argparse.Namespace) -> int:
    """`miniclip bench` with its defaults; with --json its tables go to standard error."""
    from miniclip.bench.run import Settings, run

    complain("this times every part of the model and takes several minutes; `miniclip bench --quick` takes two")
    report = run(Settings(model=str(options.model)), complain if options.json else show)
    result = {"experiment": options.name, **report.as_dict()}
    if options.json:
        show_json(result)
    if options.out:
        _write(options, result, report.draw)
    return 0


def _write(options: argparse.Namespace, result: dict, draw: Callable[[Path], object]) -> None:
    """DIR/NAME.json and DIR/NAME.png."""

    options.out.mkdir(parents=True, exist_ok=True)
    write_json(options.out / f"{options.name}.json", result)
    write_atomically(options.out / f"{options.name}.png", draw)
    complain(f"-> {shown(options.out / options.name)}.json and .png")
