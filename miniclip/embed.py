"""Embeddings of many pictures or texts: decoded by threads, sorted by length, in batches, with a progress bar.

    embed_images, embed_texts      all at once, in order
    stream_images, stream_texts    batch by batch as they are done, for what does not fit in memory

Where torchrun started several processes and `torch.distributed` is set up, each takes its share of the batches. Which
inputs make a batch depends on nothing but their order, so the result is the same in every bit, however many processes
there are, as long as they are alike: a matrix product may round differently on another CPU or number of threads.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from miniclip.models import CLIP
from miniclip.preprocess import open_image
from miniclip.tokenizer import tokenize

Rejected = dict[int, str]  # index of an input that can't be used: why
WINDOW = 1 << 16  # texts that are sorted by length, and held as token ids, at a time: 20 MB


class Batch(NamedTuple):
    """Some of the inputs, done: their indices, unit embeddings [len(indices), E] on the CPU, and what was rejected."""

    indices: list[int]
    embeddings: Tensor
    rejected: Rejected


def embed_images(
    model: CLIP,
    preprocess: Callable[[Image.Image], Tensor],
    images: Sequence[str | Path | Image.Image],
    batch_size: int = 32,
    *,
    dtype: torch.dtype = torch.float32,
    workers: int | None = None,
) -> tuple[Tensor, Rejected]:
    """Unit embeddings [N, E] of image files or PIL images, on the CPU, in order, without the rejected ones.

    dtype: of the result. workers: threads that decode and preprocess; None: one for each CPU core, at most 16.
    """
    batches = stream_images(model, preprocess, images, batch_size, dtype=dtype, workers=workers)
    return _collect(batches, len(images), model, dtype)


def embed_texts(
    model: CLIP, texts: Sequence[str], batch_size: int = 256, *, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Rejected]:
    """Unit embeddings [N, E] of texts, on the CPU, in order, without the rejected ones: those too long."""
    return _collect(stream_texts(model, texts, batch_size, dtype=dtype), len(texts), model, dtype)


def stream_images(
    model: CLIP,
    preprocess: Callable[[Image.Image], Tensor],
    images: Sequence[str | Path | Image.Image],
    batch_size: int = 32,
    *,
    dtype: torch.dtype = torch.float32,
    workers: int | None = None,
) -> Iterator[Batch]:
    """This process's share of `embed_images`. No more than three batches of pixels are in memory."""

    def prepare(index: int) -> Tensor | str:
        image = images[index]
        try:
            return preprocess(image if isinstance(image, Image.Image) else open_image(image))
        except (ValueError, RuntimeError) as error:  # ImageError among them
            return str(error)

    batches = _share([range(i, min(i + batch_size, len(images))) for i in range(0, len(images), batch_size)])
    pixels = _in_threads(prepare, [i for batch in batches for i in batch], workers, ahead=2 * batch_size)
    with _progress(sum(map(len, batches)), "images") as progress:
        for batch in batches:
            prepared = {i: next(pixels) for i in batch}
            rejected = {i: why for i, why in prepared.items() if isinstance(why, str)}
            indices = [i for i in batch if i not in rejected]
            if indices:
                stacked = torch.stack([prepared[i] for i in indices])
                yield Batch(indices, _encode(model, model.encode_image, stacked, dtype), rejected)
            else:
                yield Batch([], _no_embeddings(model, dtype), rejected)
            progress.update(len(batch))


def stream_texts(
    model: CLIP, texts: Sequence[str], batch_size: int = 256, *, dtype: torch.dtype = torch.float32
) -> Iterator[Batch]:
    """This process's share of `embed_texts`: of each `WINDOW` texts first the short ones, then the long ones, and among
    those of a length beside each other what begins alike, which encode_text computes once for a batch.

    The first batch of each window also has what was rejected in the window, in every process.
    """
    with _progress(len(texts), "texts") as progress:
        for start in range(0, len(texts), WINDOW):
            window = texts[start : start + WINDOW]
            places, tokens, rejected = _tokenize(window, model.context_length)
            rejected = {start + place: why for place, why in rejected.items()}
            order = _by_length_and_beginning(tokens)
            yield Batch([], _no_embeddings(model, dtype), rejected)
            for rows in _share(order.split(batch_size)):
                embeddings = _encode(model, model.encode_text, tokens[rows], dtype)
                yield Batch([start + places[row] for row in rows.tolist()], embeddings, {})
            progress.update(len(window))


def _tokenize(texts: Sequence[str], context_length: int) -> tuple[list[int], Tensor, Rejected]:
    """Which texts can be used, their ids, and why the others can't."""
    try:
        return list(range(len(texts))), tokenize(texts, context_length), {}
    except (ValueError, RuntimeError):  # at least one of them; which ones?
        places, rows, rejected = [], [torch.empty(0, context_length, dtype=torch.int32)], {}
        for place, text in enumerate(texts):
            try:
                rows.append(tokenize(text, context_length))
                places.append(place)
            except (ValueError, RuntimeError) as error:
                rejected[place] = str(error)
        return places, torch.cat(rows), rejected


def _by_length_and_beginning(tokens: Tensor) -> Tensor:
    """An order of the rows of token ids [N, L]."""
    lengths = tokens.argmax(dim=-1)
    columns = tokens[:, : int(lengths.max()) + 1].T if len(tokens) else tokens.T
    return torch.from_numpy(np.lexsort([*columns.flip(0).numpy(), lengths.numpy()]))  # the last key counts most


def _in_threads(work: Callable[[int], object], items: Iterable[int], workers: int | None, ahead: int) -> Iterator:
    """`work` of each item, in order; at most `ahead` results wait to be taken. Pillow and NumPy let threads run."""
    with ThreadPoolExecutor(workers or min(16, os.cpu_count() or 1)) as pool:
        waiting = deque()
        try:
            for item in items:
                if len(waiting) == ahead:
                    yield waiting.popleft().result()
                waiting.append(pool.submit(work, item))
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:  # the caller gave up
                future.cancel()


@torch.no_grad()
def _encode(model: CLIP, encode: Callable[..., Tensor], inputs: Tensor, dtype: torch.dtype) -> Tensor:
    return encode(inputs.to(model.logit_scale.device), normalize=True).to("cpu", dtype)


def _no_embeddings(model: CLIP, dtype: torch.dtype) -> Tensor:
    return torch.empty(0, model.text_projection.shape[1], dtype=dtype)


def _collect(batches: Iterable[Batch], count: int, model: CLIP, dtype: torch.dtype) -> tuple[Tensor, Rejected]:
    """All processes' batches, in the order of the inputs, in every process."""
    result = torch.zeros(count, model.text_projection.shape[1], dtype=dtype)
    rejected: Rejected = {}
    for batch in batches:
        result[batch.indices] = batch.embeddings
        rejected |= batch.rejected
    _, processes = _rank_and_processes()
    if processes > 1:
        bits = result.view(torch.uint8).to("cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(bits)  # a sum in which all others have zeros, so every bit stays
        result = bits.cpu().view(dtype)
        every: list[Rejected] = [{}] * processes
        dist.all_gather_object(every, rejected)
        rejected = {i: why for part in every for i, why in part.items()}
    if rejected:
        result = result[[i for i in range(count) if i not in rejected]]
    return result, dict(sorted(rejected.items()))


def _share(batches: Sequence) -> Sequence:
    """The batches that this process does: every so manyth, since neighbours cost about the same."""
    rank, processes = _rank_and_processes()
    return batches[rank::processes]


def _rank_and_processes() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def _progress(total: int, unit: str) -> tqdm:
    """A bar on a terminal, for the first process's share."""
    return tqdm(total=total, unit=f" {unit}", disable=None if _rank_and_processes()[0] == 0 else True)
