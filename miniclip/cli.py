"""The command line: `miniclip ...`, or `python -m miniclip ...`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from miniclip.config import ACTIVATIONS, CLIPConfig

if TYPE_CHECKING:  # importing it takes seconds, which commands that compute nothing save
    import torch

ACTIVATION = "of a file that can't say (default: quick_gelu, OpenAI's)"
FORMATS = (
    "x.safetensors; x.pt, a state dict as openai/CLIP reads it; or x, a new Hugging Face directory. A MobileCLIP: with "
    "OpenCLIP's names, or as OpenCLIP's directory"
)
DTYPES = ("float32", "float16", "bfloat16")
MODEL = "a name from `miniclip models`, or a file or directory"
INDEXED = "a name or path (default: the index's; for a new one, and for captions, ViT-B/32)"
SEVERAL = "a name from `miniclip models`, a file or directory; several are compared (default: ViT-B/32)"
DTYPE = "of weights and embeddings; auto: what is fastest here (default: float16 on CUDA, else float32)"


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 1 if some inputs were bad, 2 if nothing could be done."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parser(next((word for word in arguments if word in COMMANDS), None)).parse_args(arguments)
    try:
        return options.command(options)
    except BrokenPipeError:  # the reader of our output has seen enough: `miniclip search ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered goes there
        return 1
    except _bad_input() as error:
        print(f"miniclip: error: {error}", file=sys.stderr)
        return 2


def _bad_input() -> tuple[type[Exception], ...]:
    """The errors whose messages say what was wrong and what to do; called only when there is one."""
    from miniclip.preprocess import ImageError
    from miniclip.search import SearchError
    from miniclip.weights import CheckpointError
    from miniclip.weights.download import DownloadError

    return CheckpointError, DownloadError, ImageError, SearchError, UsageError


class UsageError(Exception):
    """What was asked for can't be done; the message says why."""


def _parser(name: str | None) -> argparse.ArgumentParser:
    """With the arguments of the command that is called `name`; of the others the modules needn't be imported."""
    parser = argparse.ArgumentParser(prog="miniclip", description="CLIP in plain PyTorch.")
    commands = parser.add_subparsers(title="commands", required=True)
    for each, (text, add_arguments, run) in COMMANDS.items():
        command = commands.add_parser(each, help=text)
        command.set_defaults(command=run)
        if each == name:
            add_arguments(command)
    return parser


def _add_model_arguments(
    command: argparse.ArgumentParser, default: str | None = "ViT-B/32", text: str = MODEL, action: str = "store"
) -> None:
    command.add_argument("--model", default=default, action=action, help=text)
    command.add_argument("--device", type=_device, help="cpu, cuda, ... (default: CUDA where there is one)")
    command.add_argument("--dtype", choices=(*DTYPES, "auto", "int8"), help=DTYPE)
    command.add_argument("--activation", choices=ACTIVATIONS, help=ACTIVATION)


def _device(name: str) -> torch.device:
    import torch

    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # the latter from a PyTorch without CUDA
        raise argparse.ArgumentTypeError(str(error).splitlines()[0]) from None


def _models_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true")


def models(options: argparse.Namespace) -> int:
    from miniclip.loading import EMBEDDED, available_models, named_models
    from miniclip.weights.download import cached

    rows = []
    for name in available_models():
        model = named_models()[name]
        path = cached(model) if model.url else EMBEDDED / model.file
        row = {"name": name, **_sizes(model.config), "file": str(path) if path else None}
        rows.append(row if model.url else row | {"bytes": path.stat().st_size})
        if model.notes:
            rows[-1]["published"] = {**model.notes, "imagenet": model.published["ImageNet"]}
    if options.json:
        print(json.dumps(rows, indent=2))
        return 0
    print(f"{'name':16}{'parameters':>13}{'pixels':>8}{'MB':>7}  file")
    for row in rows:
        size = f"{row['bytes'] / 1e6:7.0f}"
        print(f"{row['name']:16}{row['parameters']:13,}{row['pixels']:8}{size}  {row['file'] or 'not downloaded yet'}")
    print("\nPublished by Apple, not measured here (milliseconds on an iPhone 12 Pro Max, zero-shot accuracy):")
    print(f"{'name':16}{'M parameters':>16}{'ms':>13}{'ImageNet':>10}{'38 data sets':>14}")
    for row in rows:
        if "published" in row:
            figures = row["published"]
            parameters, latency = (f"{image} + {text}" for image, text in (figures["parameters"], figures["latency"]))
            print(f"{row['name']:16}{parameters:>16}{latency:>13}{figures['imagenet']:9}%{figures['average']:13}%")
    return 0


def _sizes(config: CLIPConfig) -> dict[str, int]:
    """What a model of this config amounts to; bytes as OpenAI stores it, half precision where the models allow."""
    import torch

    from miniclip.loading import blank_model

    model = blank_model(config, torch.float16)
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "pixels": config.preprocess.image_size,
        "bytes": sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values()),
    }


def _classify_arguments(command: argparse.ArgumentParser) -> None:
    _add_model_arguments(command)
    command.add_argument("images", nargs="+", type=Path, metavar="IMAGE")
    command.add_argument("--labels", required=True, help='separated by commas: "a cat,a dog"')
    command.add_argument("--template", default="{}", help='what {} in it becomes a label: "a photo of a {}."')
    command.add_argument("--json", action="store_true")
    command.add_argument("--plot", type=Path, metavar="FILE", help="draw the pictures with their probabilities")


def classify(options: argparse.Namespace) -> int:
    from miniclip.embed import embed_images, embed_texts

    labels = list(dict.fromkeys(label.strip() for label in options.labels.split(",") if label.strip()))
    if not labels:
        raise UsageError("--labels is empty; expected labels separated by commas")
    if "{}" not in options.template:
        raise UsageError(f"--template is {options.template!r}; expected {{}} where the label goes")
    if options.plot:
        _check_plot(options.plot)
    model, preprocess = _load(options)
    texts, rejected_labels = embed_texts(model, [options.template.replace("{}", label) for label in labels])
    if rejected_labels:
        raise UsageError("; ".join(rejected_labels.values()))
    embeddings, rejected = embed_images(model, preprocess, options.images)
    scores = (model.logit_scale.detach().exp().float().cpu() * embeddings @ texts.T).softmax(dim=-1).tolist()
    images = [path for i, path in enumerate(options.images) if i not in rejected]
    results = [(path, dict(zip(labels, row, strict=True))) for path, row in zip(images, scores, strict=True)]

    if options.json:
        print(json.dumps([{"image": str(path), "probabilities": row} for path, row in results], indent=2))
    else:
        for path, row in results:
            print(path)
            for label in sorted(row, key=row.get, reverse=True):
                print(f"{row[label]:9.2%}  {label}")
    if options.plot and results:
        _plot_probabilities(results, options.plot)
    return _report(list(rejected.values()), len(options.images))


def _plot_probabilities(results: list[tuple[Path, dict[str, float]]], output: Path, most: int = 8) -> None:
    """Each picture beside its likeliest labels."""
    from matplotlib.figure import Figure

    from miniclip.preprocess import open_image

    figure = Figure(figsize=(8, 2.4 * len(results)), layout="constrained")
    axes = figure.subplots(len(results), 2, squeeze=False, width_ratios=(1, 2))
    for (picture, bars), (path, row) in zip(axes, results, strict=True):
        picture.imshow(open_image(path).convert("RGBA"))
        picture.set_axis_off()
        labels = sorted(row, key=row.get)[-most:]
        bars.barh(labels, [row[label] for label in labels], color="tab:blue")
        for label in labels:
            bars.text(row[label] + 0.01, label, f"{row[label]:.1%}", va="center", fontsize=8)
        bars.set_xlim(0, 1.12)
        bars.set_xticks([])
        bars.spines[["top", "right", "bottom"]].set_visible(False)
    figure.savefig(output, dpi=150)


def _embed_arguments(command: argparse.ArgumentParser) -> None:
    from miniclip.search.options import positive

    _add_model_arguments(command)
    command.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="pictures, folders of them, .txt files")
    command.add_argument("-o", "--output", type=Path, required=True, metavar="FILE.safetensors")
    command.add_argument("--batch-size", type=positive, default=32, help="pictures at a time (default: 32)")
    command.add_argument("--workers", type=positive, help="threads that decode pictures (default: one a core)")
    command.add_argument("--output-dtype", choices=DTYPES, default="float32", help="of the file (default: float32)")


def embed(options: argparse.Namespace) -> int:
    from miniclip.embed import embed_images, embed_texts
    from miniclip.io import save_tensors
    from miniclip.parallel import is_main, setup

    if options.output.suffix != ".safetensors":
        raise UsageError(f"--output is {options.output}; expected a name that ends in .safetensors")
    if not options.output.parent.is_dir():
        raise UsageError(f"--output is {options.output}; there is no folder {options.output.parent}")
    images, texts = _inputs(options.paths)
    if not images and not texts:
        raise UsageError(f"there are no pictures or lines of text in {', '.join(map(str, options.paths))}")
    if "RANK" in os.environ:  # started by torchrun
        options.device = setup(options.device and options.device.type)
    model, preprocess = _load(options)
    dtype = _dtype(options.output_dtype)
    tensors, metadata = {}, {"model": str(options.model)}
    rejected = []
    if images:
        tensors["images"], faults = embed_images(
            model, preprocess, images, options.batch_size, dtype=dtype, workers=options.workers
        )
        metadata["images"] = json.dumps([str(path) for i, path in enumerate(images) if i not in faults])
        rejected += faults.values()
    if texts:
        tensors["texts"], faults = embed_texts(model, [text for _, text in texts], dtype=dtype)
        metadata["texts"] = json.dumps([text for i, (_, text) in enumerate(texts) if i not in faults])
        rejected += [f"{texts[i][0]}: {fault}" for i, fault in faults.items()]
    if not is_main():
        return 0
    save_tensors(tensors, options.output, metadata)
    print(", ".join(f"{len(tensor)} {name}" for name, tensor in tensors.items()), "->", options.output)
    return _report(rejected, len(images) + len(texts))


def _inputs(paths: list[Path]) -> tuple[list[Path], list[tuple[str, str]]]:
    """The pictures, and the lines of text, each with its place."""
    from miniclip.search.compare import IMAGE_SUFFIXES

    images, texts = [], []
    for path in paths:
        if path.is_dir():
            images += sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
        elif path.suffix == ".txt" and path.is_file():
            lines = path.read_text(encoding="utf-8").splitlines()
            texts += [(f"{path}:{number}", line) for number, line in enumerate(lines, 1) if line.strip()]
        else:
            images.append(path)
    return images, texts


def _index_arguments(command: argparse.ArgumentParser) -> None:
    from miniclip.search.options import add_index_arguments

    _add_model_arguments(command, None, INDEXED)
    add_index_arguments(command)


def index(options: argparse.Namespace) -> int:
    from miniclip.search.options import run_index

    return run_index(options, _dtype(options.dtype))


def _search_arguments(command: argparse.ArgumentParser) -> None:
    from miniclip.search.options import add_search_arguments

    _add_model_arguments(command, None, INDEXED)
    add_search_arguments(command)


def search(options: argparse.Namespace) -> int:
    from miniclip.search.options import run_search

    return run_search(options, _load)


def _evaluate_arguments(command: argparse.ArgumentParser) -> None:
    from miniclip.evaluation.options import add_arguments

    _add_model_arguments(command, None, SEVERAL, action="append")
    add_arguments(command)


def evaluate(options: argparse.Namespace) -> int:
    from miniclip.data.lists import DataError
    from miniclip.evaluation.options import run

    if options.plot:
        _check_plot(options.plot)
    try:
        total, rejected = run(options, lambda name: _load(argparse.Namespace(**vars(options) | {"model": name})))
    except DataError as error:
        raise UsageError(str(error)) from error
    return _report(rejected, total)


def _explore_arguments(command: argparse.ArgumentParser) -> None:
    from miniclip.evaluation.experiments.options import add_arguments

    _add_model_arguments(command)
    add_arguments(command)


def explore(options: argparse.Namespace) -> int:
    from miniclip.data.lists import DataError
    from miniclip.evaluation.experiments.options import run

    try:
        pictures, rejected = run(options, lambda: _load(options))
    except (DataError, ValueError, ImportError) as error:
        raise UsageError(str(error)) from error
    return _report(rejected, pictures)


def _check_plot(output: Path) -> None:
    """Say before the work, not after it, that a picture can't be drawn."""
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError:
        raise UsageError('--plot needs matplotlib: pip install "miniclip[plot]"') from None
    if output.suffix[1:].lower() not in FigureCanvasBase.filetypes:
        raise UsageError(f"--plot is {output}; expected a name that ends in .png, .svg or .pdf")
    if not output.parent.is_dir():
        raise UsageError(f"--plot is {output}; there is no folder {output.parent}")


def _train_arguments(command: argparse.ArgumentParser) -> None:
    from miniclip.training.options import add_arguments

    add_arguments(command)


def train(options: argparse.Namespace) -> int:
    from miniclip.training.diverged import TrainingDivergedError
    from miniclip.training.options import options_from
    from miniclip.training.train import train as run

    try:
        run(options_from(options))
    except (ValueError, FileNotFoundError, ImportError, TrainingDivergedError) as error:
        raise UsageError(str(error)) from error
    return 0


def _trace_arguments(command: argparse.ArgumentParser) -> None:
    from miniclip.conformance.options import add_trace_arguments

    _add_model_arguments(command)
    add_trace_arguments(command)


def trace(options: argparse.Namespace) -> int:
    from miniclip.conformance.files import TraceError
    from miniclip.conformance.options import run_trace

    if options.image is None and options.text is None:
        raise UsageError("there is nothing to trace: give --image, --text or both")
    if options.output is None and options.plot is None:
        raise UsageError("there is nothing to do: give --output or --plot")
    if options.output and (options.output.suffix != ".safetensors" or not options.output.parent.is_dir()):
        raise UsageError(f"--output is {options.output}; expected a name that ends in .safetensors, in a folder")
    if options.plot:
        if options.image is None:
            raise UsageError("--plot draws the attention over a picture: give --image")
        _check_plot(options.plot)
    model, _ = _load(options)
    try:
        return run_trace(model, options)
    except TraceError as error:
        raise UsageError(str(error)) from error


def _compare_arguments(command: argparse.ArgumentParser) -> None:
    from miniclip.conformance.options import add_compare_arguments

    add_compare_arguments(command)


def compare(options: argparse.Namespace) -> int:
    from miniclip.conformance.files import TraceError
    from miniclip.conformance.options import run_compare

    try:
        return run_compare(options)
    except TraceError as error:
        raise UsageError(str(error)) from error


def _bench_arguments(command: argparse.ArgumentParser) -> None:
    from miniclip.bench.arguments import add_arguments

    add_arguments(command)


def bench(options: argparse.Namespace) -> int:
    from miniclip.bench.run import run

    for file in (options.json, options.plot):
        if file and not file.parent.is_dir():
            raise UsageError(f"there is no folder {file.parent} for {file}")
    if options.plot:
        _check_plot(options.plot)
    try:
        run(options)
    except ValueError as error:
        raise UsageError(str(error)) from error
    return 0


def _convert_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("input", metavar="IN", help=MODEL)
    command.add_argument("output", type=Path, metavar="OUT", help=FORMATS)
    command.add_argument("--activation", choices=ACTIVATIONS, help=ACTIVATION)


def convert(options: argparse.Namespace) -> int:
    from miniclip.loading import open_checkpoint
    from miniclip.save import save_checkpoint

    config, tensors = open_checkpoint(options.input, activation=options.activation)
    save_checkpoint(config, tensors, options.output)
    print(f"{options.input} -> {options.output}: {len(tensors)} tensors")
    return 0


def _export_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", default="ViT-B/32", help=MODEL)
    command.add_argument("--activation", choices=ACTIVATIONS, help=ACTIVATION)
    command.add_argument("--format", choices=("onnx", "torch"), default="onnx", help="(default: onnx)")
    command.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="a new directory")


def export(options: argparse.Namespace) -> int:
    from miniclip.export import ExportError, check_installed, export_model
    from miniclip.loading import load

    try:
        check_installed(options.format)  # before a model is downloaded
        model, _ = load(options.model, device="cpu", dtype=_dtype("float32"), activation=options.activation)
        export_model(model, options.output, options.format, name=str(options.model))
    except (ExportError, ImportError) as error:
        raise UsageError(str(error)) from error
    print(f"{options.model} -> {', '.join(str(file) for file in sorted(options.output.iterdir()))}")
    return 0


def _load(options: argparse.Namespace):
    from miniclip.loading import load

    return load(options.model, options.device, dtype=_dtype(options.dtype), activation=options.activation)


def _dtype(name: str | None) -> torch.dtype | str | None:
    """None, "auto" and "int8" are what load() takes too."""
    if name not in DTYPES:
        return name
    import torch

    return getattr(torch, name)


def _report(rejected: list[str], total: int) -> int:
    """Say which inputs were bad, after the good ones are done."""
    for fault in rejected:
        print(f"miniclip: {fault}", file=sys.stderr)
    if rejected:
        print(f"miniclip: {len(rejected)} of {total} inputs could not be used", file=sys.stderr)
    return 1 if rejected else 0


COMMANDS = {  # what each is for, its arguments, and what runs
    "models": ("list the models that can be loaded by name", _models_arguments, models),
    "classify": ("probabilities of labels for pictures", _classify_arguments, classify),
    "embed": ("unit embeddings of pictures and texts, to a file", _embed_arguments, embed),
    "index": ("make pictures searchable; again: only what is new", _index_arguments, index),
    "search": ("find pictures in an index by words or pictures", _search_arguments, search),
    "evaluate": ("accuracy, retrieval and probes on a data set", _evaluate_arguments, evaluate),
    "explore": ("nine experiments, each with a table and a picture", _explore_arguments, explore),
    "train": ("train a CLIP from scratch, or fine-tune one", _train_arguments, train),
    "trace": ("every stage of a forward pass, for ports, to a file", _trace_arguments, trace),
    "compare": ("the first stage of a port that is wrong, and why", _compare_arguments, compare),
    "bench": ("speed and memory, beside openai/CLIP, open_clip and others", _bench_arguments, bench),
    "convert": ("rewrite a checkpoint in another format, its values unchanged", _convert_arguments, convert),
    "export": ("write both towers as ONNX, or as torch.export's programs", _export_arguments, export),
}
