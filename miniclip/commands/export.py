"""Write both towers of a model as ONNX or as programs of torch.export, or a page that runs the model in a browser.

    miniclip export --model ViT-B/32 -o ViT-B-32-onnx
    miniclip export --model tiny-ViT --with-preprocess --dtype float16 -o tiny-onnx
    miniclip export --model tiny-ViT --web page && python -m http.server --directory page
"""

from __future__ import annotations

import argparse
from pathlib import Path

from miniclip.commands.options import MODEL, add_loading, loading_arguments, model, path
from miniclip.commands.output import show, shown
from miniclip.errors import UsageError

WEB = "a new directory for a page that any file server serves: it names and searches pictures, and tests the browser"
RUNTIME = (
    "with --web: the folder of npm's package onnxruntime-web, which is copied into the page to run the model as ONNX "
    "(default: plain JavaScript, for small models)"
)
WITH_PREPROCESS = "the image tower takes an RGB picture of any size, as bytes, instead of pixels; only as ONNX"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=model, default="ViT-B/32", help=MODEL)
    parser.add_argument("--format", choices=("onnx", "torch"), default="onnx", help="(default: onnx)")
    parser.add_argument("--with-preprocess", action="store_true", help=WITH_PREPROCESS)
    help = "type of the weights and the arithmetic (default: float32)"
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32", help=help)
    output = parser.add_mutually_exclusive_group(required=True)
    output.add_argument("-o", "--output", type=path, metavar="DIR", help="a new directory for the towers")
    output.add_argument("--web", type=path, metavar="DIR", help=WEB)
    parser.add_argument("--onnxruntime-web", type=path, metavar="DIR", help=RUNTIME)
    add_loading(parser)


def run(options: argparse.Namespace) -> int:
    from miniclip.export import check_format, export_model
    from miniclip.loading import load
    from miniclip.web import export_web
    from miniclip.web.folder import check_runtime

    if options.onnxruntime_web and not options.web:
        raise UsageError("--onnxruntime-web is for --web")
    if options.web and (options.with_preprocess or options.format != "onnx"):
        raise UsageError("--with-preprocess and --format are not for --web, whose page prepares pictures itself")
    if not options.web or options.onnxruntime_web:
        check_format(options.format, options.with_preprocess)  # before a model is downloaded
    check_runtime(options.onnxruntime_web)
    model, _ = load(options.model, device="cpu", dtype=options.dtype, **loading_arguments(options))
    if options.web:
        file = Path(options.model)
        name = file.name if file.exists() else options.model  # the page is for others: no path of this machine
        export_web(model, options.web, name, options.onnxruntime_web)
        show(f"{options.model} -> {shown(options.web)}; to see it: python -m http.server --directory {options.web}")
    else:
        export_model(model, options.output, options.format, str(options.model), options.with_preprocess)
        show(f"{options.model} -> {', '.join(shown(file) for file in sorted(options.output.iterdir()))}")
    return 0
