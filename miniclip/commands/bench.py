"""Measure speed and memory beside openai/CLIP, open_clip, transformers and onnxruntime, where they are installed.

All run with the same weights and inputs, alternately in one process, and every output is compared with miniclip's.

    miniclip bench --quick
    miniclip bench --model RN50 --peers onnxruntime --what image --batches 1,8
"""

from __future__ import annotations

import argparse
import math
from dataclasses import fields, replace

from miniclip.bench.settings import MODULES, QUICK, TASKS, Settings
from miniclip.commands.options import add_plot, output_file, positive
from miniclip.commands.options import model as model_type
from miniclip.commands.output import show
from miniclip.io import write_atomically, write_json

MODEL = "a name from `miniclip models`, timed with random weights; or a file (default: ViT-B/32)"
DTYPES = (
    "some of float32,float16,bfloat16,int8 (default: float32, and half precision where it is faster); peers are not "
    "timed in half precision that PyTorch only emulates here"
)
COMPILE = "also compiled by torch.compile with constant weights, each at its fastest; it takes many minutes"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=model_type, help=MODEL)
    parser.add_argument("--peers", help=f"all that are installed (default), none, or some of {','.join(MODULES)}")
    parser.add_argument("--quick", action="store_true", help="fewer tasks, batches and seconds: within two minutes")
    parser.add_argument("--what", type=_listed, metavar="TASKS", help=f"some of {','.join(TASKS)} (default: all)")
    parser.add_argument("--batches", type=_numbers, help="batch sizes of pictures (default: 1,8,32)")
    parser.add_argument("--dtypes", type=_listed, help=DTYPES)
    parser.add_argument("--compile", action="store_true", default=None, help=COMPILE)
    parser.add_argument("--seconds", type=_seconds, help="time for each comparison (default: 10)")
    parser.add_argument("--threads", type=positive, help="threads of PyTorch (default: one for each core)")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write every figure")
    add_plot(parser, "draw bars")


def _listed(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(positive, text.split(",")))


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return seconds


def run(options: argparse.Namespace) -> int:
    from miniclip.bench.run import run as measure

    given = {field.name: getattr(options, field.name) for field in fields(Settings)}
    given = {name: value for name, value in given.items() if value is not None}
    report = measure(replace(QUICK if options.quick else Settings(), **given), show)
    if options.json:
        write_json(options.json, report.as_dict())
    if options.plot:
        write_atomically(options.plot, lambda file: report.draw(file, options.plot.suffix[1:]))
    return 0
