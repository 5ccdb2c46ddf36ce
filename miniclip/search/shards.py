"""Writing an index: its shards, one at a time and each complete, and the lock that keeps a second writer out."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from miniclip.search.index import SearchError, Shard, open_shards, shard_files

if TYPE_CHECKING:
    from torch import Tensor

SHARD_ROWS = 1 << 16  # of a merged shard: 64 MiB with OpenAI's smaller models
HASH_BYTES = 16

Stat = tuple[int, int]  # a file's size in bytes, its time of modification in nanoseconds


@dataclass
class Rows:
    """What a shard holds, in memory."""

    embeddings: Tensor  # float16 [n, E]
    paths: list[str]
    stats: Tensor  # int64 [n, 2]
    hashes: Tensor  # uint8 [n, 16]

    @staticmethod
    def read(shard: Shard) -> Rows:
        return Rows(shard.map("embeddings"), shard.paths(), shard.map("stats"), shard.map("hashes"))

    def write(self, directory: Path, first: int, last: int) -> None:
        import torch

        from miniclip.io import save_tensors

        table = torch.frombuffer(bytearray(json.dumps(self.paths), "ascii"), dtype=torch.uint8)
        tensors = {"embeddings": self.embeddings, "paths": table, "stats": self.stats, "hashes": self.hashes}
        save_tensors(tensors, directory / f"{first:09}-{last:09}.safetensors")

    def select(self, rows: list[int]) -> Rows:
        paths = [self.paths[row] for row in rows]
        return Rows(self.embeddings[rows], paths, self.stats[rows], self.hashes[rows])


def edit(directory: Path, shard: Shard, edits: Mapping[int, tuple[str, Stat] | None]) -> None:
    """Replace a shard: its rows in `edits` get another path and stat, or with None go."""
    rows = Rows.read(shard)
    stats = rows.stats.clone()
    for row, change in edits.items():
        if change:
            rows.paths[row], stat = change
            stats[row, 0], stats[row, 1] = stat
    rows.stats = stats
    kept = [row for row in range(shard.rows) if edits.get(row, True)]
    if kept:
        rows.select(kept).write(directory, shard.first, shard.last)
    else:
        shard.file.unlink()


def merge(directory: Path) -> None:
    """Make few large shards of many small ones. Neighbours are merged, so the order of the rows stays."""
    for group in _groups(open_shards(directory)):
        if len(group) > 1:
            import torch

            parts = [Rows.read(shard) for shard in group]
            merged = Rows(
                torch.cat([part.embeddings for part in parts]),
                [path for part in parts for path in part.paths],
                torch.cat([part.stats for part in parts]),
                torch.cat([part.hashes for part in parts]),
            )
            merged.write(directory, group[0].first, group[-1].last)
    remove_leftovers(directory)


def _groups(shards: Iterable[Shard]) -> Iterator[list[Shard]]:
    group: list[Shard] = []
    for shard in shards:
        if group and sum(member.rows for member in group) + shard.rows > SHARD_ROWS:
            yield group
            group = []
        group.append(shard)
    yield group


def remove_leftovers(directory: Path) -> None:
    """Delete what processes that were killed left: unfinished files, and shards that were merged."""
    for file in [*shard_files(directory)[1], *directory.glob(".*.part")]:
        file.unlink()


def write_json(file: Path, content: object) -> None:
    unfinished = file.with_name(f".{file.name}.{os.getpid()}.part")
    unfinished.write_text(json.dumps(content, indent=2) + "\n", encoding="ascii")
    unfinished.replace(file)


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Keep other writers out. The system drops the lock when a process ends, however it does."""
    with open(directory / ".lock", "w") as file:
        try:
            if os.name == "nt":
                import msvcrt

                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise SearchError(f"another process is updating {directory}; wait until it is done") from error
        yield
