"""Write every stage of a forward pass to a file, to compare a port with; or draw the attention over a picture.

    miniclip trace --model tiny-ViT --image cat.png --text "a cat" -o golden.safetensors
    miniclip trace --image cat.png --plot attention.png
    miniclip trace --exported tiny-onnx --image cat.png --text "a cat" -o mine.safetensors
"""

from __future__ import annotations

import argparse
from fnmatch import fnmatchcase

from miniclip.commands.options import add_model, add_plot, load_model, path, safetensors_file
from miniclip.commands.output import show, shown
from miniclip.errors import UsageError

EXPORTED = "trace what `miniclip export` wrote to this folder instead of a model; it shows only inputs and results"
ONLY = "stages to keep, with * for anything: 'visual.*.attn.probabilities'; may be repeated (default: all)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--image", type=path, metavar="FILE", help="a picture")
    parser.add_argument("--text", action="append", metavar="TEXT", help="a text; may be repeated")
    parser.add_argument("-o", "--output", type=safetensors_file, metavar="FILE.safetensors", help="file of the stages")
    parser.add_argument("--only", action="append", metavar="PATTERN", help=ONLY)
    add_plot(parser, "draw the attention over the picture")
    parser.add_argument("--layer", type=int, help="the layer to draw, from 0 (default: the last)")
    parser.add_argument("--exported", type=path, metavar="DIR", help=EXPORTED)
    add_model(parser)


def run(options: argparse.Namespace) -> int:
    if options.image is None and options.text is None:
        raise UsageError("there is nothing to trace: give --image, --text or both")
    if options.output is None and options.plot is None:
        raise UsageError("there is nothing to do: give --output or --plot")
    if options.plot and options.image is None:
        raise UsageError("--plot draws the attention over a picture: give --image")
    if options.plot and options.exported:
        raise UsageError("--plot draws the attention, which an exported model does not show: leave --exported out")
    from miniclip.conformance.exported import trace_exported
    from miniclip.conformance.files import save_trace, without_padding
    from miniclip.conformance.plot import plot_attention
    from miniclip.conformance.trace import trace
    from miniclip.io import save_tensors
    from miniclip.preprocess import open_image

    model = None if options.exported else load_model(options)[0]
    image = open_image(options.image) if options.image else None
    try:
        if model is None:
            stages = trace_exported(options.exported, image, options.text)
        else:
            stages = trace(model, image, options.text)
    except RuntimeError as error:  # tokenize's, of a text that is too long, as in openai/CLIP
        raise UsageError(str(error)) from error
    if options.plot:
        plot_attention(stages, model.config, options.plot, options.layer)
        show(shown(options.plot))
    if options.output:
        patterns = options.only or ["*"]
        stages = without_padding(stages) if model is not None and model.transformer.causal else stages
        kept = {name: x for name, x in stages.items() if any(fnmatchcase(name, p) for p in patterns)}
        if not kept:
            raise UsageError(f"--only {' '.join(patterns)} leaves no stage; there are {', '.join(stages)}")
        if model is None:
            save_tensors(kept, options.output)
        else:
            save_trace(kept, options.output, model, str(options.model))
        size = sum(x.nbytes for x in kept.values()) / 1e6
        show(f"{shown(options.output)}: {len(kept)} stages, {size:.1f} MB")
    return 0
