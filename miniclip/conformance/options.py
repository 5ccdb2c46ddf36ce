"""`miniclip trace` and `miniclip compare`: their arguments, and what they do."""

from __future__ import annotations

import argparse
import json
from fnmatch import fnmatchcase
from pathlib import Path

from miniclip.conformance.files import TraceError, load_stages, load_trace, save_trace, weights_sha256, without_padding
from miniclip.conformance.measure import PRECISIONS

ONLY = "stages to keep, with * for anything: 'visual.*.attn.probabilities'; may be repeated (default: all)"
DTYPE = "what the port computes in, where the dtypes in its file don't show it"
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in PRECISIONS}


def add_trace_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--image", type=Path, metavar="FILE", help="a picture")
    parser.add_argument("--text", action="append", metavar="TEXT", help="may be repeated")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE.safetensors", help="where the stages go")
    parser.add_argument("--only", action="append", metavar="PATTERN", help=ONLY)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the attention over the picture")
    parser.add_argument("--layer", type=int, help="of --plot: a layer that attends, from 0 (default: the last)")


def add_compare_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("golden", type=Path, metavar="GOLDEN", help="a file that `miniclip trace` wrote")
    parser.add_argument("mine", type=Path, metavar="MINE", help="a port's: any of these stages, as .safetensors or .pt")
    parser.add_argument("--model", help="the golden's model: to find the mistake that explains the first wrong stage")
    parser.add_argument("--dtype", choices=DTYPES, help=DTYPE)
    parser.add_argument("--json", action="store_true")


def run_trace(model, options: argparse.Namespace) -> int:
    """Trace a model that is loaded. Raises TraceError for what can't be traced or drawn."""
    from miniclip.conformance.plot import plot_attention
    from miniclip.conformance.trace import trace
    from miniclip.preprocess import open_image

    image = open_image(options.image) if options.image else None
    try:
        stages = trace(model, image, options.text)
    except RuntimeError as error:  # a text that is too long
        raise TraceError(str(error)) from error
    if options.plot:
        plot_attention(stages, model.config, options.plot, options.layer)
        print(options.plot)
    if options.output:
        patterns = options.only or ["*"]
        stages = without_padding(stages) if model.transformer.causal else stages
        kept = {name: x for name, x in stages.items() if any(fnmatchcase(name, p) for p in patterns)}
        if not kept:
            raise TraceError(f"--only {' '.join(patterns)} leaves no stage; there are {', '.join(stages)}")
        save_trace(kept, options.output, model, str(options.model))
        print(f"{options.output}: {len(kept)} stages, {sum(x.nbytes for x in kept.values()) / 1e6:.1f} MB")
    return 0


def run_compare(options: argparse.Namespace) -> int:
    """Returns 0 if all stages that were given pass, and 1 if not. Raises TraceError for what can't be compared."""
    from miniclip.conformance.compare import compare
    from miniclip.conformance.report import as_json, as_text

    golden, metadata = load_trace(options.golden)
    model = load_golden_model(options.model, metadata) if options.model else None
    comparison = compare(golden, load_stages(options.mine), model, DTYPES.get(options.dtype))
    print(json.dumps(as_json(comparison), indent=2) if options.json else as_text(comparison))
    return 0 if comparison.passed else 1


def load_golden_model(name: str, metadata: dict[str, str]):
    """The model of this name, on the CPU, if it has the weights that the golden was made with."""
    from miniclip.loading import load

    model, _ = load(name, device="cpu", dtype=DTYPES.get(metadata["dtype"]))
    digest = weights_sha256(model)
    if digest != metadata["model_sha256"]:
        raise TraceError(
            f"{name} is not the model that made the golden ({metadata['model']}): the sha256 of its weights is "
            f"{digest[:16]}..., the golden's {metadata['model_sha256'][:16]}...; give that one, or trace this one anew"
        )
    return model
