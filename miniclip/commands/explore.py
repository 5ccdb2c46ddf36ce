"""Run one of nine experiments with a model, each with a table, a figure and a JSON file.

NAME is one of
{experiments}

    miniclip explore zero-shot --model tiny-ViT
    miniclip explore prompts --data cifar10 --download --out prompts
"""

from __future__ import annotations

import argparse

from miniclip.commands.options import add_data, add_json, add_model, drawing_folder
from miniclip.commands.output import complain, report_rejected, show, show_json, shown
from miniclip.evaluation.experiments import EXPERIMENTS, check_options

DATA = "sample (240 drawings that come with miniclip), cifar10, cifar100, mnist, or a list or folder as for evaluate"
TEMPLATE = "a prompt with {} for the name, or a set: imagenet, cifar, ...; may be repeated: an ensemble, or candidates"
QUERY = "words to search for; may be repeated"
OPTIONS = ("data", "data_root", "download", "limit", "background", "templates", "queries", "seed")
OPTIONS += ("device", "dtype", "activation", "image_size", "context_length")

__doc__ = __doc__.format(experiments="\n".join(f"  {name:17}{one.help}" for name, one in EXPERIMENTS.items()))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", type=_name, choices=EXPERIMENTS, metavar="NAME", help="one of those above")
    parser.add_argument("--data", metavar="DATASET", help=DATA)
    parser.add_argument("--template", dest="templates", action="append", metavar="TEXT", help=TEMPLATE)
    parser.add_argument("--query", dest="queries", action="append", metavar="TEXT", help=QUERY)
    add_data(parser)
    parser.add_argument("--seed", type=int, help="seed of all random choices (default: 0)")
    add_model(parser)
    add_json(parser)
    parser.add_argument("--out", type=drawing_folder, metavar="DIR", help="write DIR/NAME.json and draw DIR/NAME.png")


def _name(text: str) -> str:
    return text.replace("_", "-")


def run(options: argparse.Namespace) -> int:
    given = {name: getattr(options, name) for name in OPTIONS if getattr(options, name) not in (None, False)}
    check_options(options.name, given, _written)
    from miniclip.exploring import explore

    findings = explore(options.name, options.model, **given)
    if options.json:
        show_json(findings.result)
    else:
        show(findings.table)
    if options.out:
        complain(f"-> {shown(findings.save(options.out))}.json and .png")
    rejected = findings.result.get("rejected", [])
    return report_rejected(rejected, findings.result.get("pictures", 0) + len(rejected))


def _written(option: str) -> str:
    """The option as the command line has it."""
    return {"templates": "--template", "queries": "--query"}.get(option, f"--{option.replace('_', '-')}")
