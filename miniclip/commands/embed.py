"""Write the unit embeddings of pictures and of lines of text to a file.

The name of the file decides its format. A .safetensors file has the tensors `images` and `texts`, and metadata that
lists the paths and the lines. A .csv file has a row for each picture and line: its name, then its numbers. A .npy file
is one array, of pictures or of texts. torchrun shares the work among several processes.

    miniclip embed photos captions.txt -o photos.safetensors
    miniclip embed photos -o photos.npy --output-dtype float16
"""

from __future__ import annotations

import argparse
import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from miniclip.commands.options import (
    DTYPES,
    add_batches,
    add_model,
    add_pictures,
    join_processes,
    load_model,
    output_file,
    path,
)
from miniclip.commands.output import complain, report_rejected, show, shown
from miniclip.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

FORMATS = (".safetensors", ".npy", ".csv")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paths", nargs="+", type=path, metavar="PATH", help="pictures, folders of them, .txt files")
    parser.add_argument("-o", "--output", type=_output, required=True, metavar="FILE", help=" ".join(FORMATS))
    parser.add_argument("--output-dtype", choices=DTYPES, default="float32", help="type in the file (default: float32)")
    add_batches(parser)
    add_pictures(parser)
    add_model(parser)


def _output(text: str) -> Path:
    file = output_file(text)
    if file.suffix not in FORMATS:
        raise argparse.ArgumentTypeError(f"{file}: expected a name that ends in one of {', '.join(FORMATS)}")
    return file


def run(options: argparse.Namespace) -> int:
    import torch

    from miniclip.data.pictures import scan
    from miniclip.embed import embed_images, embed_texts
    from miniclip.parallel import is_main

    lists = [each for each in options.paths if each.suffix == ".txt" and each.is_file()]
    texts = _lines(lists)
    found = scan([each for each in options.paths if each not in lists], options.hidden)
    images, rejected = list(found.pictures), list(found.faults.values())
    total = len(images) + len(rejected) + len(texts)
    if not images and not texts:
        where = ", ".join(map(str, options.paths))
        raise UsageError("; ".join(rejected) or f"there are no pictures or lines of text in {where}")
    _check(options, bool(images), bool(texts))
    join_processes(options)
    model, preprocess = load_model(options)
    dtype = getattr(torch, options.output_dtype)
    results = {}
    if images:
        settings = {"dtype": dtype, "workers": options.workers}
        embeddings, faults = embed_images(model, preprocess, images, options.batch_size, **settings)
        results["images"] = [image for i, image in enumerate(images) if i not in faults], embeddings
        rejected += faults.values()
    if texts:
        embeddings, faults = embed_texts(model, [text for _, text in texts], dtype=dtype)
        results["texts"] = [text for i, (_, text) in enumerate(texts) if i not in faults], embeddings
        rejected += [f"{texts[i][0]}: {fault}" for i, fault in faults.items()]
    if not is_main():
        return 0
    _write(results, options.output, str(options.model))
    counts = ", ".join(f"{len(names)} {kind}" for kind, (names, _) in results.items())
    show(f"{counts} -> {shown(options.output)}")
    if left_out := found.summary():
        complain(left_out)
    return report_rejected(rejected, total)


def _lines(lists: Sequence[Path]) -> list[tuple[str, str]]:
    """The lines of text, each with its file and number."""
    from miniclip.data.text import read_lines

    return [(f"{file}:{number}", line) for file in lists for number, line in enumerate(read_lines(file), 1) if line]


def _check(options: argparse.Namespace, images: bool, texts: bool) -> None:
    if options.output.suffix == ".npy":
        if images and texts:
            raise UsageError("a .npy file has one array: give pictures or texts, or write .safetensors or .csv")
        if options.output_dtype == "bfloat16":
            raise UsageError("NumPy has no bfloat16: write .safetensors, or float32")


def _write(results: dict[str, tuple[list[str], Tensor]], output: Path, model: str) -> None:
    """results: names and embeddings of "images", "texts" or both."""
    import numpy as np

    from miniclip.io import printable, save_tensors, write_atomically, write_text

    if output.suffix == ".safetensors":
        metadata = {"model": model} | {kind: json.dumps(names) for kind, (names, _) in results.items()}
        save_tensors({kind: embeddings for kind, (_, embeddings) in results.items()}, output, metadata)
    elif output.suffix == ".npy":
        ((_, embeddings),) = results.values()
        array = io.BytesIO()
        np.save(array, embeddings.numpy())
        write_atomically(output, lambda file: file.write_bytes(array.getbuffer()))
    else:
        lines = io.StringIO()
        for names, embeddings in results.values():
            rows = zip(map(printable, names), embeddings.tolist(), strict=True)
            csv.writer(lines, lineterminator="\n").writerows([name, *row] for name, row in rows)
        write_text(output, lines.getvalue())
