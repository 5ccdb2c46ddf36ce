"""Write both towers of a model, and how to prepare pictures for them, as ONNX or as programs of torch.export.

    miniclip export --model ViT-B/32 -o ViT-B-32-onnx
    miniclip export --model tiny-ViT --with-preprocess --dtype float16 -o tiny-onnx
"""

from __future__ import annotations

import argparse

from miniclip.commands.options import MODEL, add_activation, path
from miniclip.commands.output import show, shown

WITH_PREPROCESS = "the image tower takes an RGB picture of any size, as bytes, instead of pixels; only as ONNX"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="ViT-B/32", help=MODEL)
    parser.add_argument("--format", choices=("onnx", "torch"), default="onnx", help="(default: onnx)")
    parser.add_argument("--with-preprocess", action="store_true", help=WITH_PREPROCESS)
    help = "type of the weights and the arithmetic (default: float32)"
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32", help=help)
    parser.add_argument("-o", "--output", type=path, required=True, metavar="DIR", help="a new directory")
    add_activation(parser)


def run(options: argparse.Namespace) -> int:
    from miniclip.export import check_format, export_model
    from miniclip.loading import load

    check_format(options.format, options.with_preprocess)  # before a model is downloaded
    model, _ = load(options.model, device="cpu", dtype=options.dtype, activation=options.activation)
    export_model(model, options.output, options.format, str(options.model), options.with_preprocess)
    show(f"{options.model} -> {', '.join(shown(file) for file in sorted(options.output.iterdir()))}")
    return 0
