"""The options of `miniclip bench`."""

from __future__ import annotations

import argparse
from pathlib import Path

WHAT = ("image", "text", "classifier", "load", "memory", "tokenizer", "preprocess")
PEERS = ("openai", "open_clip", "transformers", "onnxruntime")
MODEL = "a name from `miniclip models`, timed with random weights; or a file (default: ViT-B/32)"
DTYPES = (
    "of float32, float16, bfloat16 and int8 (default: float32, and half precision where it is faster); peers are not "
    "timed in half precision that PyTorch only emulates here"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="ViT-B/32", help=MODEL)
    parser.add_argument("--peers", default="all", help=f"all that are installed, none, or some of {','.join(PEERS)}")
    parser.add_argument("--what", default=",".join(WHAT), help="(default: %(default)s)")
    parser.add_argument("--batches", default="1,8,32", help="of pictures (default: %(default)s)")
    parser.add_argument("--dtypes", help=DTYPES)
    parser.add_argument("--compile", action="store_true", help="also all of them compiled, which takes minutes")
    parser.add_argument("--seconds", type=float, default=10, help="for each comparison, about (default: 10)")
    parser.add_argument("--threads", type=int, help="of PyTorch (default: one a core)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw bars")
