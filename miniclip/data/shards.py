"""Sets larger than a disk: WebDataset tar shards, read from start to end, split between ranks and their workers.

In a shard the files of a picture share a name: 000123.jpg (or .png, .webp, ...) with 000123.txt, its caption, or with
000123.json, an object with "caption" or "captions". A sample or shard that can't be read is named, and left out.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import re
import tarfile
import urllib.request
from collections.abc import Iterator
from itertools import count, islice
from typing import BinaryIO

import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from miniclip.data.batches import Batch, from_workers, to_rgba
from miniclip.data.lists import captions_of
from miniclip.data.pictures import SUFFIXES
from miniclip.data.text import DataError
from miniclip.errors import require
from miniclip.io import open_regular
from miniclip.preprocess import ImageError, open_image

SHUFFLED = 2000  # samples that a worker holds, to draw the next one from
SCHEMES = ("file", "http", "https")
TIMEOUT = 60  # seconds without an answer from a server


class Shards(IterableDataset):
    """The training batches of `urls`, "shards-{000..123}.tar" or a list of such joined by "::", without end.

    A shard is a file, or comes from a web server. Continues from a checkpoint by reading again, and skipping, what the
    run had seen. DataError for other schemes, among them WebDataset's "pipe:", which runs a command; if none of the
    shards is there; and for fewer shards than processes that read.
    """

    def __init__(
        self, urls: str, size: int, batch_size: int, seed: int, workers: int, rank: int = 0, world_size: int = 1
    ):
        self._library = require("webdataset", "webdataset", "reading tar shards")
        self.every = every = [_checked(url) for url in self._library.shardlists.expand_urls(urls)]
        if not any(_is_remote(url) or os.path.exists(url) for url in every):
            raise DataError(f"none of the {len(every)} shards in {urls} is there; the first: {every[0]}")
        readers = world_size * max(1, workers)
        if len(every) < readers:
            raise DataError(
                f"{len(every)} shards for {world_size} ranks with {max(1, workers)} workers each; expected at least "
                f"{readers}: lower --workers, or write more, smaller shards"
            )
        self.urls = every[rank::world_size]
        self.size, self.seed, self.workers = size, seed, workers
        self.own_batch_size = len(range(rank, batch_size, world_size))

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """The batches of steps start .. stop - 1, counted from the beginning of the run."""
        yield from islice(from_workers(DataLoader(self, batch_size=None, num_workers=self.workers)), start, stop)

    def __iter__(self) -> Iterator[Batch]:
        """What one worker reads."""
        pixels, captions, problems = [], [], []
        for sample in self._samples():
            try:
                if isinstance(sample, str):
                    raise DataError(sample)
                texts = _captions(sample)
                pixels.append(to_rgba(_image(sample), self.size))
                captions.append(texts)
            except (ImageError, DataError) as error:
                named = "" if isinstance(sample, str) else f"{sample['__url__']}, {sample['__key__']}: "
                problems.append(f"{named}{error}")
                if len(problems) > 10 * self.own_batch_size:
                    raise DataError(
                        f"{len(problems)} samples in the time of one batch can't be used; the last: {problems[-1]}"
                    ) from error
            if len(pixels) == self.own_batch_size:
                yield Batch(torch.stack(pixels), captions, problems)
                pixels, captions, problems = [], [], []

    def _samples(self) -> Iterator[dict | str]:
        """This worker's samples, pass after pass, in an order that the seed decides; for a bad shard a line that says
        what is wrong."""
        worker = get_worker_info()
        share = slice(worker.id, None, worker.num_workers) if worker else slice(None)
        for number in count():
            rng = random.Random(f"{self.seed} {number}")
            urls = rng.sample(self.urls, len(self.urls))[share]  # the sample is the same in all workers
            faults: list[str] = []
            seen = False
            for sample in self._library.shuffle(SHUFFLED, rng=rng)(self._read(urls, faults)):
                yield from faults
                faults.clear()
                yield sample
                seen = True
            yield from faults
            if not seen:
                fault = f"; the last fault: {faults[-1]}" if faults else ""
                raise DataError(f"none of {len(urls)} shards holds a sample{fault}")

    def _read(self, urls: list[str], faults: list[str]) -> Iterator[dict]:
        """The samples of some shards; what is wrong with one is added to `faults`, and the rest of it left out."""
        library = self._library.tariterators
        for url in urls:
            samples = 0
            try:
                with _open(url) as stream:
                    for sample in library.group_by_keys(library.tar_file_expander([{"url": url, "stream": stream}])):
                        samples += 1
                        yield sample
            except (OSError, EOFError, ValueError, tarfile.TarError, http.client.HTTPException) as error:
                reason = getattr(error, "strerror", None) or str(error.args[0] if error.args else error)
                reason = reason.partition(" @ ")[0]  # WebDataset adds the repr of the stream
                faults.append(f"{url}: can't read the shard beyond its first {samples} samples: {reason}")


def _checked(url: str) -> str:
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):", url)
    if scheme and scheme[1].lower() not in SCHEMES:
        raise DataError(f"{url} begins with {scheme[0]}; expected a file, or an address with http: or https:")
    return re.sub(r"^file:(//)?", "", url, flags=re.IGNORECASE)


def _is_remote(url: str) -> bool:
    return url.lower().startswith(("http:", "https:"))


def _open(url: str) -> BinaryIO:
    return urllib.request.urlopen(url, timeout=TIMEOUT) if _is_remote(url) else open_regular(url)


def _image(sample: dict) -> Image.Image:
    data = next((sample[suffix[1:]] for suffix in SUFFIXES if suffix[1:] in sample), None)
    if data is None:
        raise DataError(f"no picture among {_names(sample)}; expected one of {', '.join(SUFFIXES)}")
    return open_image(data)


def _captions(sample: dict) -> tuple[str, ...]:
    try:
        if "txt" in sample:
            fields = {"caption": sample["txt"].decode("utf-8-sig").strip()}
        else:
            fields = json.loads(sample.get("json", b"{}"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"can't read the caption: {error}") from error
    texts = captions_of(fields) if isinstance(fields, dict) else ()
    if not texts:
        raise DataError(f'no caption in {_names(sample)}; expected txt, or json with "caption" or "captions"')
    return texts


def _names(sample: dict) -> str:
    return ", ".join(name for name in sample if not name.startswith("__"))
