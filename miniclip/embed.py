"""Embeddings of many pictures or texts: decoded by threads, sorted by length, in batches, with a progress bar.

    embed_images, embed_texts      all at once, in order
    stream_images, stream_texts    batch by batch, for results that do not fit in memory

Where torchrun started several processes, each embeds its share of the batches. The inputs of a batch depend on their
order alone, so the result has the same bits for any number of processes on equal machines. (A matrix product may round
differently on another CPU, or with another number of threads.)
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from miniclip import parallel
from miniclip.models import CLIP
from miniclip.preprocess import ImageError, open_image

Rejected = dict[int, str]  # index of an input that can't be used: why
Picture = str | Path | Image.Image | np.ndarray
WINDOW = 1 << 16  # number of texts that are tokenized and sorted by length together: 20 MB of token ids


class Batch(NamedTuple):
    """The result for some of the inputs."""

    indices: list[int]  # of the inputs that were embedded
    embeddings: Tensor  # [len(indices), E], of unit length, on the CPU
    rejected: Rejected


def as_list(inputs: object) -> Sequence:
    """The argument of a function that takes several inputs: one string, path or picture becomes a list of one.

    TypeError for what is neither one of these nor a list (or another iterable of them).
    """
    is_picture = isinstance(inputs, np.ndarray) and inputs.ndim in (2, 3)
    if is_picture or isinstance(inputs, (str, os.PathLike, Image.Image)):
        return [inputs]
    if isinstance(inputs, (bytes, Mapping)) or not isinstance(inputs, Iterable):
        raise TypeError(f"expected a list of texts, paths or pictures, got {type(inputs).__name__}")
    return inputs if isinstance(inputs, Sequence) else list(inputs)


def embed_images(
    model: CLIP,
    preprocess: Callable[[Image.Image], Tensor],
    images: Picture | Sequence[Picture],
    batch_size: int = 32,
    *,
    dtype: torch.dtype = torch.float32,
    workers: int | None = None,
) -> tuple[Tensor, Rejected]:
    """Unit embeddings [N, E] of image files, PIL images or arrays uint8 [H, W, 3], on the CPU, in order, without the
    rejected ones: their reasons are returned by their places.

    dtype: of the result. workers: threads that decode and preprocess; None means one for each CPU core, at most 16.
    """
    images = as_list(images)
    batches = stream_images(model, preprocess, images, batch_size, dtype=dtype, workers=workers)
    return _collect(batches, len(images), model, dtype)


def decode(picture: Picture) -> Image.Image:
    """The PIL image of a path, or of an array uint8 [H, W], [H, W, 3] or [H, W, 4]. ImageError if there is none."""
    if isinstance(picture, Image.Image):
        return picture
    if not isinstance(picture, np.ndarray):
        return open_image(picture)
    if picture.dtype != np.uint8 or picture.ndim not in (2, 3):
        raise ImageError(f"an array is {picture.dtype} {list(picture.shape)}; expected uint8 [H, W, 3]")
    return Image.fromarray(picture)


def embed_texts(
    model: CLIP, texts: str | Sequence[str], batch_size: int = 256, *, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Rejected]:
    """Unit embeddings [N, E] of texts, on the CPU, in order, without the rejected ones, which are too long."""
    texts = as_list(texts)
    return _collect(stream_texts(model, texts, batch_size, dtype=dtype), len(texts), model, dtype)


def stream_images(
    model: CLIP,
    preprocess: Callable[[Image.Image], Tensor],
    images: Picture | Sequence[Picture],
    batch_size: int = 32,
    *,
    dtype: torch.dtype = torch.float32,
    workers: int | None = None,
) -> Iterator[Batch]:
    """This process's share of `embed_images`. At most three batches of pixels are in memory."""
    images = as_list(images)

    def prepare(index: int) -> Tensor | str:
        try:
            return preprocess(decode(images[index]))
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
    model: CLIP, texts: str | Sequence[str], batch_size: int = 256, *, dtype: torch.dtype = torch.float32
) -> Iterator[Batch]:
    """This process's share of `embed_texts`.

    Each `WINDOW` texts are sorted by length, and texts of equal length by their ids: less padding is computed, and a
    beginning that the texts of a batch have in common is computed once. In every process, the first batch of a window
    is empty and lists all texts of the window that were rejected.
    """
    texts = as_list(texts)
    with _progress(len(texts), "texts") as progress:
        for start in range(0, len(texts), WINDOW):
            window = texts[start : start + WINDOW]
            places, tokens, rejected = _tokenize(model, window)
            rejected = {start + place: why for place, why in rejected.items()}
            order = _by_length_and_beginning(tokens)
            yield Batch([], _no_embeddings(model, dtype), rejected)
            for rows in _share(order.split(batch_size)):
                embeddings = _encode(model, model.encode_text, tokens[rows], dtype)
                yield Batch([start + places[row] for row in rows.tolist()], embeddings, {})
            progress.update(len(window))


def _tokenize(model: CLIP, texts: Sequence[str]) -> tuple[list[int], Tensor, Rejected]:
    """Indices of the texts that can be used, their token ids, and the faults of the others."""
    try:
        return list(range(len(texts))), model.tokenize(texts), {}
    except (ValueError, RuntimeError):  # at least one text is too long
        places, rows, rejected = [], [torch.empty(0, model.context_length, dtype=torch.int32)], {}
        for place, text in enumerate(texts):
            try:
                rows.append(model.tokenize(text))
                places.append(place)
            except (ValueError, RuntimeError) as error:
                rejected[place] = str(error)
        return places, torch.cat(rows), rejected


def _by_length_and_beginning(tokens: Tensor) -> Tensor:
    """The order of the rows of token ids [N, L]: int64 [N]."""
    lengths = tokens.argmax(dim=-1)
    columns = tokens[:, : int(lengths.max()) + 1].T if len(tokens) else tokens.T
    return torch.from_numpy(np.lexsort([*columns.flip(0).numpy(), lengths.numpy()]))  # sorts by the last key first


def _in_threads(work: Callable[[int], object], items: Iterable[int], workers: int | None, ahead: int) -> Iterator:
    """`work(item)` of each item, in order; at most `ahead` results are computed before they are taken.

    Pillow and NumPy release Python's lock, so the threads run at the same time.
    """
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
            for future in waiting:  # the caller stopped early
                future.cancel()


@torch.no_grad()
def _encode(model: CLIP, encode: Callable[..., Tensor], inputs: Tensor, dtype: torch.dtype) -> Tensor:
    return encode(inputs.to(model.logit_scale.device), normalize=True).to("cpu", dtype)


def _no_embeddings(model: CLIP, dtype: torch.dtype) -> Tensor:
    return torch.empty(0, model.text_projection.shape[1], dtype=dtype)


def _collect(batches: Iterable[Batch], count: int, model: CLIP, dtype: torch.dtype) -> tuple[Tensor, Rejected]:
    """The embeddings of all processes' batches, in the order of the inputs, in every process."""
    result = torch.zeros(count, model.text_projection.shape[1], dtype=dtype)
    rejected: Rejected = {}
    for batch in batches:
        result[batch.indices] = batch.embeddings
        rejected |= batch.rejected
    result = parallel.merge_rows(result)
    rejected = {i: why for part in parallel.all_gather_objects(rejected) for i, why in part.items()}
    if rejected:
        result = result[[i for i in range(count) if i not in rejected]]
    return result, dict(sorted(rejected.items()))


def _share(batches: Sequence) -> Sequence:
    """This process's batches. Neighbours cost about the same, so each process takes every n-th."""
    return batches[parallel.rank() :: parallel.world_size()]


def _progress(total: int, unit: str) -> tqdm:
    """A progress bar on a terminal, of the first process's share."""
    return tqdm(total=total, unit=f" {unit}", disable=None if parallel.is_main() else True)
