"""`miniclip explore`: the nine experiments as a table, their options, and the run."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from importlib import import_module
from inspect import signature
from io import BytesIO
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from miniclip.data.datasets import read_dataset
from miniclip.data.lists import DataError
from miniclip.evaluation.experiments.common import Study, embed_study
from miniclip.evaluation.options import make_folder
from miniclip.io import write_atomically


class Experiment(NamedTuple):
    """data: the data set it looks at, by default or always; takes: which further options it knows."""

    help: str
    data: str | None
    takes: tuple[str, ...]


PUBLISHED = ("data_root", "download", "limit", "seed", "device", "dtype", "activation")  # of published data sets
ANY = (*PUBLISHED, "data", "background", "template")
EXPERIMENTS = {
    "models": Experiment("parameters, resolution and FLOPs of every model's towers", None, ()),
    "zero-shot": Experiment("how many pictures get their right name", "sample", ANY),
    "cifar10": Experiment("CIFAR-10, by the wording of its classes", "cifar10", PUBLISHED),
    "mnist": Experiment("MNIST, by the wording of the digits", "mnist", PUBLISHED),
    "retrieval": Experiment("the pictures nearest to some words", "sample", (*ANY, "query")),
    "embedding-space": Experiment("what is near what, and the modality gap", "sample", ANY),
    "benchmark": Experiment("latency, throughput, memory: `miniclip bench` as it comes", None, ()),
    "temperature": Experiment("what the scale does to probabilities; calibration", "sample", ANY),
    "prompts": Experiment("templates ranked by accuracy, and ensembles of them", "sample", ANY),
}
DATA = "sample (240 drawings that come with miniclip), cifar10, cifar100, mnist, or a list or folder as for evaluate"
TEMPLATE = "a prompt with {} for the name, or a set: imagenet, cifar, ...; may be repeated: an ensemble, or candidates"
BACKGROUND = "for transparent pictures (default: as openai/CLIP, which drops the transparency: most end up on black)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "\n".join(["NAME is one of", *(f"  {name:17}{one.help}" for name, one in EXPERIMENTS.items())])
    parser.add_argument("name", choices=EXPERIMENTS, metavar="NAME", help="of the experiment, see below")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write DIR/NAME.json and draw DIR/NAME.png")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--data", metavar="SPEC", help=DATA)
    parser.add_argument("--data-root", type=Path, metavar="DIR", help="where the published data sets are, or go")
    parser.add_argument("--download", action="store_true", help="get the data set if it is not there")
    parser.add_argument("--limit", type=int, metavar="N", help="of all pictures take N, at random")
    parser.add_argument("--background", choices=("white", "grey", "black"), help=BACKGROUND)
    parser.add_argument("--template", action="append", metavar="TEXT", help=TEMPLATE)
    parser.add_argument("--query", action="append", metavar="TEXT", help="what to look for; may be repeated")
    parser.add_argument("--seed", type=int, help="of all that is chosen at random (default: 0)")


def run(options: argparse.Namespace, load: Callable[[], tuple]) -> tuple[int, list[str]]:
    """Measure, print and write; returns how many pictures there were, and why some can't be used.

    load: gives the model and its preprocessing, if they are needed. DataError for options that make no sense, and
    for data that is missing.
    """
    check_options(options)
    module = import_module(f"miniclip.evaluation.experiments.{options.name.replace('-', '_')}")
    if options.name == "benchmark":
        return _benchmark(module, options)
    if options.name == "models":
        result = {"experiment": options.name, **module.measure(_file(options.model))}
        heading, drawn = "", (result,)
    else:
        data = options.data or EXPERIMENTS[options.name].data
        study = read_study(options, data, load)
        about = {"experiment": options.name, "model": study.name, "data": data}
        about |= {"pictures": len(study.examples), "classes": len(study.classes)}
        result = {**about, **_measure(module, study, options), "rejected": study.rejected}
        heading = "{experiment}: {model} on {data}, {pictures:,} pictures, {classes:,} names\n\n".format(**about)
        drawn = (result, study)
    print(json.dumps(result, indent=2) if options.json else heading + module.table(result))
    if options.out:
        figure = module.draw(*drawn)
        _write(options, result, lambda file: figure.savefig(file, format="png", dpi=110))
    rejected = result.get("rejected", [])
    return result.get("pictures", 0) + len(rejected), rejected


def check_options(options: argparse.Namespace) -> None:
    """DataError for what the experiment does not know, or can't do."""
    takes = EXPERIMENTS[options.name].takes
    for option in dict.fromkeys(name for experiment in EXPERIMENTS.values() for name in experiment.takes):
        if getattr(options, option) not in (None, False) and option not in takes:
            raise DataError(f"{options.name} takes no --{option.replace('_', '-')}: leave it out")
    if options.limit is not None and options.limit < 1:
        raise DataError(f"--limit is {options.limit}; expected a number of pictures from 1")
    if options.out:
        make_folder(options.out)


def read_study(options: argparse.Namespace, data: str, load: Callable[[], tuple]) -> Study:
    """The pictures of a data set, embedded as the options say."""
    examples = read_dataset(data, root=options.data_root, download=options.download)
    name, (model, preprocess) = str(options.model), load()
    return embed_study(name, model, preprocess, examples, options.limit, options.background, options.seed or 0)


def _measure(module: ModuleType, study: Study, options: argparse.Namespace) -> dict:
    """With those of the options that were given and that the experiment's `measure` has."""
    given = {"templates": options.template, "queries": options.query, "seed": options.seed}
    known = signature(module.measure).parameters
    chosen = {name: value for name, value in given.items() if value is not None and name in known}
    return module.measure(study, **chosen)


def _file(model: str) -> str | None:
    """What --model names, if it is not one of those that are listed anyway."""
    from miniclip.loading import available_models

    return None if model in available_models() else str(model)


def _benchmark(module: ModuleType, options: argparse.Namespace) -> tuple[int, list[str]]:
    """It prints as it goes, and draws for itself."""
    page = BytesIO() if options.out else None
    with redirect_stdout(sys.stderr if options.json else sys.stdout):
        result = {"experiment": options.name, **module.measure(str(options.model), page)}
    if options.json:
        print(json.dumps(result, indent=2))
    if options.out:
        _write(options, result, lambda file: file.write_bytes(page.getvalue()))
    return 0, []


def _write(options: argparse.Namespace, result: dict, draw: Callable[[Path], object]) -> None:
    """DIR/NAME.json and DIR/NAME.png, whole or not at all."""
    text = json.dumps(result, indent=2) + "\n"
    write_atomically(options.out / f"{options.name}.json", lambda file: file.write_text(text, encoding="utf-8"))
    write_atomically(options.out / f"{options.name}.png", draw)
    print(f"-> {options.out / options.name}.json and .png", file=sys.stderr)
