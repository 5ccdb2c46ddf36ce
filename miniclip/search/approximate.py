"""Approximate search through FAISS (optional), for millions of pictures: `miniclip index --faiss`, `search --faiss`.

An inverted file: k-means divides the embeddings into about sqrt(n) cells, and a query looks only into the nearest. What
lies in another cell is not found. The embeddings in it have half precision, so the scores are those of exact search up
to rounding. The file is mapped, like the shards; it is deleted when the index changes.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
from torch import Tensor

from miniclip.search.index import APPROXIMATE, Hit, Index, SearchError

PER_CELL = 64  # embeddings that k-means sees for a cell; FAISS warns below 39
SHARE_OF_CELLS = 1 / 16  # that a query looks into
BLOCK = 1 << 14  # embeddings that are float32 at a time, for FAISS


def check_installed() -> None:
    """SearchError, which says how to install it, if FAISS is not there."""
    try:
        import faiss  # noqa: F401
    except ImportError:
        raise SearchError('--faiss needs FAISS: pip install "miniclip[faiss]"') from None


def build(index: Index) -> Path:
    """Write the index's approximate form, into its directory. It is the same each time."""
    import faiss

    cells = max(1, round(math.sqrt(len(index))))
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
    file = index.directory / APPROXIMATE
    unfinished = file.with_name(f".{file.name}.{os.getpid()}.part")
    faiss.write_index(inverted, str(unfinished))
    return unfinished.replace(file)


def search(index: Index, queries: Tensor, top: int = 10) -> list[list[Hit]]:
    """As `Index.search`, but what it finds may not be the best."""
    import faiss

    file = index.directory / APPROXIMATE
    if not file.exists():
        raise SearchError(f"{index.directory} has no approximate index, or has changed: run `miniclip index --faiss`")
    inverted = faiss.read_index(str(file), faiss.IO_FLAG_MMAP)
    inverted.nprobe = max(8, math.ceil(inverted.nlist * SHARE_OF_CELLS))
    scores, rows = inverted.search(queries.float().numpy(), top)
    answers = []
    for line, numbers in zip(scores.tolist(), rows.tolist(), strict=True):
        found = [(score, row) for score, row in zip(line, numbers, strict=True) if row >= 0]
        paths = index.paths([row for _, row in found])
        answers.append([Hit(score, path) for (score, _), path in zip(found, paths, strict=True)])
    return answers
