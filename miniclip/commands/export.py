"""Write both towers of a model, and how to prepare pictures for them, as ONNX or as programs of torch.export.

    miniclip export --model ViT-B/32 -o ViT-B-32-onnx
    miniclip export --model tiny-ViT --format torch -o tiny-programs
"""

from __future__ import annotations

import argparse

from miniclip.commands.options import MODEL, add_activation, path
from miniclip.commands.output import show, shown


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="ViT-B/32", help=MODEL)
    parser.add_argument("--format", choices=("onnx", "torch"), default="onnx", help="(default: onnx)")
    parser.add_argument("-o", "--output", type=path, required=True, metavar="DIR", help="a new directory")
    add_activation(parser)


def run(options: argparse.Namespace) -> int:
    from miniclip.export import check_installed, export_model
    from miniclip.loading import load

    check_installed(options.format)  # before a model is downloaded
    model, _ = load(options.model, device="cpu", dtype="float32", activation=options.activation)
    export_model(model, options.output, options.format, name=str(options.model))
    show(f"{options.model} -> {', '.join(shown(file) for file in sorted(options.output.iterdir()))}")
    return 0
