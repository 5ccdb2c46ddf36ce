"""Compare the stages of a port with those that `miniclip trace` wrote: the first wrong stage, and why it is wrong.

The exit status is 1 if a stage is wrong.

    miniclip compare golden.safetensors mine.safetensors
    miniclip compare golden.safetensors mine.safetensors --model tiny-ViT
"""

from __future__ import annotations

import argparse

from miniclip.commands.options import DTYPES, add_json, model, path
from miniclip.commands.output import show, show_json

MODEL = "the golden file's model; with it, the mistake that explains the first wrong stage is looked for"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("golden", type=path, metavar="GOLDEN", help="a file that `miniclip trace` wrote")
    help = "the port's file: any of these stages, as .safetensors or .pt"
    parser.add_argument("mine", type=path, metavar="MINE", help=help)
    help = "the port's file of a second run in the same process: it must be the same in every bit"
    parser.add_argument("again", type=path, nargs="?", metavar="AGAIN", help=help)
    parser.add_argument("--model", type=model, help=MODEL)
    parser.add_argument("--all", action="store_true", help="show all stages, also those that pass")
    help = "type of the port's arithmetic, if the dtypes in its file do not show it"
    parser.add_argument("--dtype", choices=DTYPES, help=help)
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    import torch

    from miniclip.conformance.compare import compare_files
    from miniclip.conformance.report import as_json, as_text

    dtype = getattr(torch, options.dtype) if options.dtype else None
    comparison = compare_files(options.golden, options.mine, options.model, dtype, options.again)
    if options.json:
        show_json(as_json(comparison))
    else:
        show(as_text(comparison, options.all))
    return 0 if comparison.passed else 1
