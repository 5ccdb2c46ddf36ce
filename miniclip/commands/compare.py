"""Compare the stages of a port with those that `miniclip trace` wrote: the first wrong stage, and why it is wrong.

The exit status is 1 if a stage is wrong.
"""

from __future__ import annotations

import argparse

from miniclip.commands.options import DTYPES, add_json, path
from miniclip.commands.output import show, show_json

MODEL = "the golden file's model; with it, the mistake that explains the first wrong stage is looked for"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("golden", type=path, metavar="GOLDEN", help="a file that `miniclip trace` wrote")
    help = "the port's file: any of these stages, as .safetensors or .pt"
    parser.add_argument("mine", type=path, metavar="MINE", help=help)
    parser.add_argument("--model", help=MODEL)
    help = "type of the port's arithmetic, if the dtypes in its file do not show it"
    parser.add_argument("--dtype", choices=DTYPES, help=help)
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    import torch

    from miniclip.conformance.compare import compare, load_golden_model
    from miniclip.conformance.files import load_stages, load_trace
    from miniclip.conformance.report import as_json, as_text

    golden, metadata = load_trace(options.golden)
    model = load_golden_model(options.model, metadata) if options.model else None
    dtype = getattr(torch, options.dtype) if options.dtype else None
    comparison = compare(golden, load_stages(options.mine), model, dtype)
    if options.json:
        show_json(as_json(comparison))
    else:
        show(as_text(comparison))
    return 0 if comparison.passed else 1
