"""Batches of pictures with captions, in an order that seed and epoch decide, and their pixels."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from miniclip.data.lists import Example
from miniclip.data.seeds import generator
from miniclip.data.text import DataError
from miniclip.preprocess import ImageError, center_crop, open_image, resize

CACHE_BYTES = 2 * 2**30  # decoded pictures are kept in memory if all of them fit into this
SHARED_MEMORY = "/dev/shm"  # where Linux keeps the memory that processes share; a container often has only 64 MB


@dataclass(frozen=True)
class Batch:
    """pixels: uint8 [N, 4, S, S], RGB and opacity, not yet augmented; captions: those of each picture; problems: a line
    for each picture or shard that could not be read. Another picture has taken its place."""

    pixels: Tensor
    captions: list[tuple[str, ...]]
    problems: list[str]


def batch_order(names: list[str], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Split a random permutation of range(len(names)) into full batches that hold each name once, if one pass can.

    Two pictures of one name in a batch would be treated as negatives of each other. Each picture, in the order of the
    permutation, goes to the first batch that has room and lacks its name. Pictures that are left then fill the room
    that is left, whatever their names. The last ones, which do not fill a batch, are not used in this epoch.
    """
    shuffled = torch.randperm(len(names), generator=generator(seed, "order", epoch)).tolist()
    batches: list[list[int]] = [[] for _ in range(len(names) // batch_size)]
    first_open = 0  # batches before this one are full
    next_batch: dict[str, int] = {}  # the first batch that lacks the name
    left_over = []
    for index in shuffled:
        place = max(first_open, next_batch.get(names[index], 0))
        while place < len(batches) and len(batches[place]) == batch_size:
            place += 1
        if place == len(batches):
            left_over.append(index)
            continue
        batches[place].append(index)
        next_batch[names[index]] = place + 1
        while first_open < len(batches) and len(batches[first_open]) == batch_size:
            first_open += 1
    rest = iter(left_over)
    for batch in batches:
        batch.extend(islice(rest, batch_size - len(batch)))
    return batches


class Pictures(Dataset):
    """The pixels of examples as uint8 [4, S, S]: RGB and opacity, the shorter side scaled to S, the middle cut out.

    They are kept after decoding, if all of them fit into CACHE_BYTES; if other processes load them (workers > 0), in
    memory that these share, if it has room. pixels: uint8 [N, 4, S, S], if they are known from the beginning.
    """

    def __init__(self, examples: list[Example], size: int, pixels: Tensor | None = None, workers: int = 0):
        self.examples = examples
        self.size = size
        self._pixels = pixels
        self._known = None if pixels is None else torch.ones(len(examples), dtype=torch.bool)
        needed = len(examples) * (4 * size**2 + 1)
        if pixels is None and needed <= CACHE_BYTES and (not workers or needed < shared_memory() / 2):
            self._pixels = torch.empty(len(examples), 4, size, size, dtype=torch.uint8)
            self._known = torch.zeros(len(examples), dtype=torch.bool)
            if workers:
                self._pixels.share_memory_()
                self._known.share_memory_()

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> tuple[Tensor, int, list[str]]:
        """Returns (pixels, the index of their example, problems). For a broken picture it is the next readable one."""
        problems = []
        for tried in range(len(self)):
            actual = (index + tried) % len(self)
            try:
                return self._load(actual), actual, problems
            except ImageError as error:
                problems.append(str(error))
        raise DataError(f"none of the {len(self)} pictures can be read; the first: {problems[0]}")

    def _load(self, index: int) -> Tensor:
        if self._known is not None and self._known[index]:
            return self._pixels[index]
        pixels = to_rgba(open_image(self.examples[index].image), self.size)
        if self._known is not None:
            self._pixels[index] = pixels
            self._known[index] = True
        return pixels

    def batches(self, order: list[list[int]], workers: int) -> Iterator[Batch]:
        """Load the batches of `order`, with `workers` processes besides this one."""
        yield from from_workers(DataLoader(self, batch_sampler=order, num_workers=workers, collate_fn=self._collate))

    def _collate(self, items: list[tuple[Tensor, int, list[str]]]) -> Batch:
        pixels, indices, problems = zip(*items, strict=True)
        captions = [self.examples[index].captions for index in indices]
        return Batch(torch.stack(pixels), captions, [line for lines in problems for line in lines])


class Epochs:
    """This rank's part of the training batches of `pictures`, epoch after epoch, each in another random order."""

    def __init__(
        self, pictures: Pictures, batch_size: int, seed: int, workers: int, rank: int = 0, world_size: int = 1
    ):
        if len(pictures) < batch_size:
            raise DataError(f"{len(pictures)} pictures do not fill a batch of {batch_size}; lower --batch-size")
        self.pictures, self.batch_size, self.seed, self.workers = pictures, batch_size, seed, workers
        self.rank, self.world_size = rank, world_size
        self.steps_per_epoch = len(pictures) // batch_size
        self._names = [example.captions[0] for example in pictures.examples]

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """The batches of steps start .. stop - 1, counted from the beginning of the run."""
        while start < stop:
            epoch, first = divmod(start, self.steps_per_epoch)
            last = min(self.steps_per_epoch, first + stop - start)
            order = batch_order(self._names, self.batch_size, self.seed, epoch)[first:last]
            own = [batch[self.rank :: self.world_size] for batch in order]
            yield from self.pictures.batches(own, self.workers)
            start += last - first


def from_workers(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches of a DataLoader; a worker's DataError comes without the traceback that PyTorch puts before it."""
    try:
        yield from batches
    except DataError as error:
        raise DataError(str(error).rpartition(f"{DataError.__name__}: ")[2].strip()) from None


def shared_memory() -> float:
    """Free bytes of the memory that processes share; infinity where the system sets no limit of its own."""
    return shutil.disk_usage(SHARED_MEMORY).free if os.path.isdir(SHARED_MEMORY) else math.inf


def to_rgba(image: Image.Image, size: int) -> Tensor:
    """A picture of any mode -> uint8 [4, size, size], RGB and opacity. ImageError if it can't be converted or resized.

    Transparency that makes no sense, such as an index beyond the palette, is ignored.
    """
    try:
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    except (ValueError, TypeError):
        image = image.copy()
        image.info.pop("transparency", None)
        try:
            image = image.convert("RGB")
        except ValueError as error:
            raise ImageError(f"a picture of mode {image.mode} can't become RGB: {error}") from error
    image = center_crop(resize(image, size, "bicubic", "shortest"), size)
    return torch.from_numpy(np.array(image.convert("RGBA"))).permute(2, 0, 1).contiguous()


def choose_captions(
    captions: list[tuple[str, ...]], templates: Sequence[str], first_share: float, rng: torch.Generator
) -> list[str]:
    """One text for each picture: one of its captions, drawn at random, in a template, drawn at random.

    first_share: how often the first caption is taken without drawing. If the batch has a caption already, the picture's
    first is taken, which is most often its name: keywords ("fruit") are shared by many pictures.
    """
    draws = torch.rand(len(captions), 3, generator=rng).tolist()
    chosen: list[str] = []
    seen = {texts[0] for texts in captions}
    for texts, (first, which, template) in zip(captions, draws, strict=True):
        text = texts[0] if first < first_share else texts[int(which * len(texts))]
        text = texts[0] if text in seen else text
        seen.add(text)
        chosen.append(templates[int(template * len(templates))].replace("{}", text))
    return chosen
