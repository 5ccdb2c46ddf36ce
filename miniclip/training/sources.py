"""What a run trains and validates on: a list, a folder of classes, CIFAR-10, tar shards or drawn shapes."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

import torch

from miniclip import parallel
from miniclip.data import cifar
from miniclip.data.batches import Epochs, Pictures, shared_memory
from miniclip.data.datasets import read_folder
from miniclip.data.lists import Example, existing, read_examples
from miniclip.data.seeds import generator
from miniclip.data.shards import Shards
from miniclip.data.synthetic import create_synthetic
from miniclip.data.text import DataError
from miniclip.training.options import TrainOptions
from miniclip.training.report import Reporter

# Pictures are kept a little larger than the model takes them, for augmentations to cut from and to enlarge.
MARGIN = 1.25


class Data(NamedTuple):
    """Batches to train on, pictures to validate on, if any, and a digest of the names and captions to train on."""

    train: Epochs | Shards
    val: Pictures | None
    digest: str


def is_cifar10(data: str) -> bool:
    return Path(data).name == cifar.FOLDER


def is_shards(data: str) -> bool:
    return data.endswith(".tar")


def make_data(options: TrainOptions) -> None:
    """Draw or download what to train on, if the options say so."""
    if options.create_synthetic:
        create_synthetic(Path(options.data).parent, options.seed, options.synthetic_pictures)
    if options.download and is_cifar10(options.data):
        cifar.download_cifar10(Path(options.data))


def open_data(options: TrainOptions, image_size: int, report: Reporter) -> Data:
    """Open what to train and validate on. DataError if it can't be read, or is too little for a batch."""
    margin = round(image_size * MARGIN)
    workers = _workers(options, margin, report)
    settings = (options.batch_size, options.seed, workers, parallel.rank(), parallel.world_size())
    val = Pictures(_read(options.val, options, report), image_size) if options.val else None
    if is_shards(options.data):
        shards = Shards(options.data, margin, *settings)
        return Data(shards, val, _digest([Path(url).name for url in shards.every]))
    if is_cifar10(options.data):
        folder = Path(options.data)
        return Data(
            Epochs(cifar.read_cifar10(folder, "train"), *settings), val or cifar.read_cifar10(folder, "test"), "cifar10"
        )
    examples = _read(options.data, options, report)
    if options.val_split:
        examples, held_out = _split(examples, options)
        val = Pictures(held_out, image_size)
    digest = _digest([f"{example.image.name} {example.captions}" for example in examples])
    return Data(Epochs(Pictures(examples, margin, workers=workers), *settings), val, digest)


def _read(data: str, options: TrainOptions, report: Reporter) -> list[Example]:
    """The examples of a folder of classes, or those of a list whose files are there; the others are reported."""
    path = Path(data)
    if path.is_dir():
        return read_folder(path, hidden=options.hidden)
    roots = [Path(options.image_root)] if options.image_root else [path.parent, path.parent / "images"]
    looked = []
    for root in roots:
        examples = read_examples(path, root)
        found, missing = existing(examples)
        if found:
            report.problems(missing, f"of {len(examples)} pictures in {path}; the others are used")
            return found
        looked.append(str(examples[0].image))
    raise DataError(
        f"none of the {len(examples)} pictures in {path} is there; looked for the first at {' and '.join(looked)}: "
        "--image-root names the folder that their paths start from"
    )


def _split(examples: list[Example], options: TrainOptions) -> tuple[list[Example], list[Example]]:
    """The examples to train on, and those to validate on, chosen by the seed."""
    count = round(options.val_split * len(examples))
    if not 0 < count < len(examples):
        raise DataError(f"--val-split {options.val_split} of {len(examples)} pictures leaves none on one side")
    order = torch.randperm(len(examples), generator=generator(options.seed, "val")).tolist()
    held_out = set(order[:count])
    train = [example for i, example in enumerate(examples) if i not in held_out]
    return train, [examples[i] for i in sorted(held_out)]


def _workers(options: TrainOptions, size: int, report: Reporter) -> int:
    """As many workers as asked for, or none if the memory that processes share has no room for their batches."""
    needed = 3 * options.workers * options.batch_size * 4 * size**2  # each worker prepares two batches; one is in use
    free = shared_memory()
    if needed <= free or not options.workers:
        return options.workers
    report.say(
        f"{options.workers} workers need {needed / 2**20:.1f} MiB of shared memory, and {free / 2**20:.1f} are free: "
        "pictures are loaded without workers (a container gets more by --shm-size or --ipc=host)"
    )
    return 0


def _digest(names: list[str]) -> str:
    content = hashlib.sha256("\n".join(names).encode("utf-8", "surrogateescape")).hexdigest()
    return f"{len(names):,} pictures or shards ({content[:16]})"
