"""List the models that `load` and --model take by name, with their sizes and where their files are.

The last table has well-known models on the Hugging Face Hub, which need `pip install "miniclip[hub]"`. `load` takes
any other name on the Hub too, if the model is of an architecture that miniclip has.

    miniclip models
    miniclip models --json
    miniclip models --backend cuda
"""

from __future__ import annotations

import argparse
import functools

from miniclip.commands.options import add_json, device
from miniclip.commands.output import show, show_json, shown
from miniclip.config import CLIPConfig

BACKEND = "instead, which operations of float16 models run as Triton kernels on this device (cuda, cpu), and why"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backend", type=device, metavar="DEVICE", help=BACKEND)
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    if options.backend:
        return _run_backend(options)
    rows = [_row(name) for name in _names()]
    hub = _hub_rows()
    if options.json:
        show_json([*rows, *hub])
    else:
        show("\n".join([*_sizes_table(rows), "", *_published_table(rows), "", *_hub_table(hub)]))
    return 0


def _run_backend(options: argparse.Namespace) -> int:
    from miniclip.kernels.dispatch import explain

    rows = explain(options.backend)
    if options.json:
        show_json(rows)
    else:
        lines = (f"{row['operation']:20}{row['runs as']:8}{row['where'] or 'everywhere'}; {row['why']}" for row in rows)
        show("\n".join(lines))
    return 0


def _names() -> list[str]:
    from miniclip.loading import available_models

    return available_models()


def _row(name: str) -> dict:
    from miniclip.loading import EMBEDDED, named_models
    from miniclip.weights.download import cached

    model = named_models()[name]
    path = cached(model) if model.url else EMBEDDED / model.file
    row = {"name": name, **_sizes(model.config), "file": str(path) if path else None}
    if not model.url:
        row["bytes"] = path.stat().st_size
    if model.notes:
        row["published"] = {**model.notes, "imagenet": model.published["ImageNet"]}
    return row


def _hub_rows() -> list[dict]:
    from miniclip.loading import FAMILIES

    rows = []
    for family in reversed(FAMILIES):
        for name, model in family.hub.items():
            published = {"imagenet": model.imagenet, "source": model.source} if model.imagenet else None
            row = {"name": name, **_sizes(model.config), "file": None, "data": model.data, "published": published}
            rows.append(row)
    return rows


@functools.cache
def _sizes(config: CLIPConfig) -> dict[str, int]:
    """A model's parameters, pixels, and bytes in the half precision that OpenAI stores its models in."""
    import torch

    from miniclip.loading import blank_model

    model = blank_model(config, torch.float16)
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "pixels": config.preprocess.image_size,
        "bytes": sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values()),
    }


def _sizes_table(rows: list[dict]) -> list[str]:
    lines = [f"{'name':16}{'parameters':>13}{'pixels':>8}{'MB':>7}  file"]
    for row in rows:
        file = shown(row["file"]) if row["file"] else "not downloaded yet"
        lines.append(f"{row['name']:16}{row['parameters']:13,}{row['pixels']:8}{row['bytes'] / 1e6:7.0f}  {file}")
    return lines


def _published_table(rows: list[dict]) -> list[str]:
    lines = [
        "Published by Apple, not measured here (milliseconds on an iPhone 12 Pro Max, zero-shot accuracy):",
        f"{'name':16}{'M parameters':>16}{'ms':>13}{'ImageNet':>10}{'38 data sets':>14}",
    ]
    for row in rows:
        if "published" in row:
            figures = row["published"]
            parameters, latency = (f"{image} + {text}" for image, text in (figures["parameters"], figures["latency"]))
            accuracies = f"{figures['imagenet']:9}%{figures['average']:13}%"
            lines.append(f"{row['name']:16}{parameters:>16}{latency:>13}{accuracies}")
    return lines


def _hub_table(rows: list[dict]) -> list[str]:
    lines = [
        "Some models on the Hugging Face Hub (accuracy: zero-shot on ImageNet, from OpenCLIP's table of results):",
        f"{'name':48}{'parameters':>13}{'pixels':>8}{'ImageNet':>10}  trained on",
    ]
    for row in rows:
        accuracy = f"{row['published']['imagenet']:.1f}%" if row["published"] else ""
        lines.append(f"{row['name']:48}{row['parameters']:13,}{row['pixels']:8}{accuracy:>10}  {row['data']}")
    return lines
