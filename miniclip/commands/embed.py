"""Write the unit embeddings of pictures and of lines of text to a .safetensors file.

The file has the tensors `images` and `texts`; its metadata lists the paths and the lines. torchrun shares the work
among several processes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from miniclip.commands.options import (
    DTYPES,
    add_batches,
    add_model,
    join_processes,
    load_model,
    path,
    safetensors_file,
)
from miniclip.commands.output import report_rejected, show, shown
from miniclip.errors import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paths", nargs="+", type=path, metavar="PATH", help="pictures, folders of them, .txt files")
    parser.add_argument("-o", "--output", type=safetensors_file, required=True, metavar="FILE.safetensors")
    parser.add_argument("--output-dtype", choices=DTYPES, default="float32", help="type in the file (default: float32)")
    add_batches(parser)
    add_model(parser)


def run(options: argparse.Namespace) -> int:
    import torch

    from miniclip.embed import embed_images, embed_texts
    from miniclip.io import save_tensors
    from miniclip.parallel import is_main

    images, texts = _inputs(options.paths)
    if not images and not texts:
        raise UsageError(f"there are no pictures or lines of text in {', '.join(map(str, options.paths))}")
    join_processes(options)
    model, preprocess = load_model(options)
    dtype = getattr(torch, options.output_dtype)
    tensors, metadata, rejected = {}, {"model": str(options.model)}, []
    if images:
        settings = {"dtype": dtype, "workers": options.workers}
        tensors["images"], faults = embed_images(model, preprocess, images, options.batch_size, **settings)
        metadata["images"] = json.dumps([str(image) for i, image in enumerate(images) if i not in faults])
        rejected += faults.values()
    if texts:
        tensors["texts"], faults = embed_texts(model, [text for _, text in texts], dtype=dtype)
        metadata["texts"] = json.dumps([text for i, (_, text) in enumerate(texts) if i not in faults])
        rejected += [f"{texts[i][0]}: {fault}" for i, fault in faults.items()]
    if not is_main():
        return 0
    save_tensors(tensors, options.output, metadata)
    counts = ", ".join(f"{len(tensor)} {name}" for name, tensor in tensors.items())
    show(f"{counts} -> {shown(options.output)}")
    return report_rejected(rejected, len(images) + len(texts))


def _inputs(paths: list[Path]) -> tuple[list[Path], list[tuple[str, str]]]:
    """The pictures; and the lines of text, each with its file and number."""
    from miniclip.search.compare import IMAGE_SUFFIXES

    images, texts = [], []
    for each in paths:
        if each.is_dir():
            images += sorted(file for file in each.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
        elif each.suffix == ".txt" and each.is_file():
            lines = each.read_text(encoding="utf-8").splitlines()
            texts += [(f"{each}:{number}", line) for number, line in enumerate(lines, 1) if line.strip()]
        else:
            images.append(each)
    return images, texts
