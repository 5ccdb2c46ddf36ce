"""Measure speed and memory beside openai/CLIP, open_clip, transformers and onnxruntime, where they are installed.

All have the same weights and inputs and run by turns in one process; each answer is checked against miniclip's.
"""

from __future__ import annotations

import argparse

from miniclip.bench.peers import MODULES
from miniclip.bench.run import TASKS, Settings
from miniclip.bench.run import run as measure
from miniclip.commands.options import add_plot, output_file, positive
from miniclip.commands.output import show
from miniclip.io import write_atomically, write_json

MODEL = "a name from `miniclip models`, timed with random weights; or a file (default: ViT-B/32)"
DTYPES = (
    "some of float32,float16,bfloat16,int8 (default: float32, and half precision where it is faster); peers are not "
    "timed in half precision that PyTorch only emulates here"
)
DEFAULT = Settings()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default=DEFAULT.model, help=MODEL)
    parser.add_argument("--peers", default="all", help=f"all that are installed, none, or some of {','.join(MODULES)}")
    parser.add_argument("--what", type=_listed, default=TASKS, metavar="TASKS", help=f"some of {','.join(TASKS)}")
    parser.add_argument("--batches", type=_numbers, default=DEFAULT.batches, help="batch sizes (default: 1,8,32)")
    parser.add_argument("--dtypes", type=_listed, help=DTYPES)
    parser.add_argument("--compile", action="store_true", help="also with torch.compile, which takes minutes")
    parser.add_argument("--seconds", type=float, default=DEFAULT.seconds, help="time for each comparison (default: 10)")
    parser.add_argument("--threads", type=positive, help="threads of PyTorch (default: one for each core)")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write every figure")
    add_plot(parser, "draw bars")


def _listed(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(positive, text.split(",")))


def run(options: argparse.Namespace) -> int:
    names = ("model", "peers", "what", "batches", "dtypes", "compile", "seconds", "threads")
    report = measure(Settings(**{name: getattr(options, name) for name in names}), show)
    if options.json:
        write_json(options.json, report.as_dict())
    if options.plot:
        write_atomically(options.plot, lambda file: report.draw(file, options.plot.suffix[1:]))
    return 0
