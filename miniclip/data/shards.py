"""Sets larger than a disk: WebDataset tar shards, read from start to end, split between ranks and their workers.

In a shard the files of a picture share a name: 000123.jpg (or .jpeg, .png, .webp) with 000123.txt, its caption, or with
000123.json, an object with "caption" or "captions".
"""

from __future__ import annotations

import io
import json
import random
from collections.abc import Iterator
from itertools import count, islice

import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset

from miniclip.data.batches import Batch, to_rgba
from miniclip.preprocess import ImageError

IMAGES = ("jpg", "jpeg", "png", "webp")
SHUFFLED = 2000  # samples that a worker holds, to draw the next one from


class Shards(IterableDataset):
    """The training batches of `urls`, "shards-{000..123}.tar" or a list of such joined by "::", without end.

    Goes on from a checkpoint by reading again, and skipping, what the run had seen.
    """

    def __init__(
        self, urls: str, size: int, batch_size: int, seed: int, workers: int, rank: int = 0, world_size: int = 1
    ):
        try:
            import webdataset
        except ImportError as error:
            raise ImportError('tar shards need webdataset: pip install "miniclip[webdataset]"') from error
        self._library = webdataset
        every = webdataset.shardlists.expand_urls(urls)
        readers = world_size * max(1, workers)
        if len(every) < readers:
            raise ValueError(
                f"{len(every)} shards for {world_size} ranks with {max(1, workers)} workers each; expected at least "
                f"{readers}: lower --workers, or write more, smaller shards"
            )
        self.urls = every[rank::world_size]
        self.size, self.seed, self.workers = size, seed, workers
        self.own_batch_size = len(range(rank, batch_size, world_size))

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """The batches of steps start .. stop - 1, counted from the beginning of the run."""
        yield from islice(DataLoader(self, batch_size=None, num_workers=self.workers), start, stop)

    def __iter__(self) -> Iterator[Batch]:
        """What one worker reads."""
        pixels, captions, problems = [], [], []
        for sample in self._samples():
            try:
                texts = _captions(sample)
                pixels.append(to_rgba(_image(sample), self.size))
                captions.append(texts)
            except (ImageError, ValueError) as error:
                problems.append(f"{sample['__url__']}, {sample['__key__']}: {error}")
                if len(problems) > 10 * self.own_batch_size:
                    raise ValueError(
                        f"{len(problems)} samples in the time of one batch can't be used; the last: {problems[-1]}"
                    ) from error
            if len(pixels) == self.own_batch_size:
                yield Batch(torch.stack(pixels), captions, problems)
                pixels, captions, problems = [], [], []

    def _samples(self) -> Iterator[dict]:
        """This worker's samples, pass after pass, in an order that the seed decides."""
        library = self._library
        for number in count():
            rng = random.Random(f"{self.seed} {number}")
            urls = rng.sample(self.urls, len(self.urls))  # the same in all workers, which then share them out
            yield from library.DataPipeline(
                library.SimpleShardList(urls),
                library.split_by_worker,
                library.tarfile_to_samples(),
                library.shuffle(SHUFFLED, rng=rng),
            )


def _image(sample: dict) -> Image.Image:
    data = next((sample[suffix] for suffix in IMAGES if suffix in sample), None)
    if data is None:
        raise ValueError(f"no picture among {_names(sample)}; expected one of {', '.join(IMAGES)}")
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
        return image
    except Exception as error:  # a damaged file makes Pillow's plugins raise anything
        raise ImageError(f"can't decode the picture: {error}") from error


def _captions(sample: dict) -> tuple[str, ...]:
    if "txt" in sample:
        return (sample["txt"].decode("utf-8").strip(),)
    if "json" in sample:
        fields = json.loads(sample["json"])
        texts = fields.get("captions", fields.get("caption"))
        if texts:
            return (texts,) if isinstance(texts, str) else tuple(texts)
    raise ValueError(f'no caption among {_names(sample)}; expected txt, or json with "caption" or "captions"')


def _names(sample: dict) -> str:
    return ", ".join(name for name in sample if not name.startswith("__"))
