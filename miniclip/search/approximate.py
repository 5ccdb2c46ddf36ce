"""Approximate search through FAISS (optional), for millions of pictures: `miniclip index --faiss`, `search --faiss`.

An inverted file: k-means divides the embeddings into about sqrt(n) cells, and a query is compared only with the
embeddings of the nearest cells, in half precision: the scores are those of exact search up to rounding, but pictures in
other cells are missed. The file is mapped into memory, like the shards. Its name has a hash of the names of the shards
that it was built from, which never change, so it is never used with others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from miniclip.errors import require
from miniclip.io import write_atomically
from miniclip.search.index import Hit, Index, SearchError, Shard, approximate_file, shard_files

PER_CELL = 64  # embeddings that k-means is trained on, per cell
FEWEST = 39  # per cell; FAISS warns of fewer
SHARE_OF_CELLS = 1 / 16  # that a query is compared with
BLOCK = 1 << 14  # embeddings that are converted to float32 at a time, for FAISS


def check_installed() -> None:
    """MissingExtraError, which says how to install FAISS, if it is not there."""
    require("faiss", "faiss", "--faiss")


def build(index: Index) -> Path:
    """Write the approximate form of an index into its directory, unless it is there. It is deterministic."""
    import faiss

    file = approximate_file(index.directory, index.shards)
    if file.exists():
        return file
    cells = max(1, min(round(math.sqrt(len(index))), len(index) // FEWEST))
    width = index.settings.embedding
    coarse = faiss.IndexFlatIP(width)
    inverted = faiss.IndexIVFScalarQuantizer(
        coarse, width, cells, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT, False
    )
    stride = max(1, len(index) // (PER_CELL * cells))
    inverted.train(np.concatenate([block[::stride].float().numpy() for block in index.blocks()]))
    for block in index.blocks():
        for part in block.split(BLOCK):
            inverted.add(part.float().numpy())
    write_atomically(file, lambda unfinished: faiss.write_index(inverted, str(unfinished)))
    return file


def search(index: Index, queries: Tensor, top: int = 10) -> list[list[Hit]]:
    """As `Index.search`, but better pictures may be missed."""
    return index.answer(queries, lambda shards: _search(index, shards, queries, top))


def _search(index: Index, shards: Sequence[Shard], queries: Tensor, top: int) -> tuple[Tensor, Tensor]:
    import faiss

    file = approximate_file(index.directory, shards)
    if not file.exists():
        if shard_files(index.directory)[0] != [shard.file for shard in shards]:
            raise FileNotFoundError(file)  # an update changed the shards
        raise SearchError(f"{index.directory} has no approximate index, or has changed: run `miniclip index --faiss`")
    try:
        inverted = faiss.read_index(str(file), faiss.IO_FLAG_MMAP)
    except RuntimeError as error:
        raise SearchError(f"{file} is damaged: delete it and run `miniclip index --faiss` ({error!s:.200})") from error
    if (inverted.ntotal, inverted.d) != (sum(shard.rows for shard in shards), index.settings.embedding):
        raise SearchError(f"{file} is damaged: delete it and run `miniclip index --faiss`")
    inverted.nprobe = max(8, math.ceil(inverted.nlist * SHARE_OF_CELLS))
    scores, rows = inverted.search(queries.float().numpy(), top)
    return torch.from_numpy(scores), torch.from_numpy(rows)
