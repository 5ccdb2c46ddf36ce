"""Writing the shards of an index."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from miniclip.search.index import Settings, Shard, approximate_file, open_shards, shard_files

if TYPE_CHECKING:
    from torch import Tensor

SHARD_ROWS = 1 << 16  # the most that shards are merged to: 64 MiB with OpenAI's smaller models

Stat = tuple[int, int]  # a file's size in bytes, its time of modification in nanoseconds


@dataclass
class Rows:
    """The content of a shard."""

    embeddings: Tensor  # float16 [n, E]
    paths: list[str]
    stats: Tensor  # int64 [n, 2]
    hashes: Tensor  # uint8 [n, 16]

    @staticmethod
    def read(shard: Shard) -> Rows:
        return Rows(shard.map("embeddings"), shard.paths(), shard.map("stats"), shard.map("hashes"))

    def write(self, directory: Path, first: int, last: int, update: int) -> None:
        import torch

        from miniclip.io import save_tensors

        table = torch.frombuffer(bytearray(json.dumps(self.paths), "ascii"), dtype=torch.uint8)
        tensors = {"embeddings": self.embeddings, "paths": table, "stats": self.stats, "hashes": self.hashes}
        save_tensors(tensors, directory / f"{first:09}-{last:09}-{update:06}.safetensors")

    def select(self, rows: list[int]) -> Rows:
        paths = [self.paths[row] for row in rows]
        return Rows(self.embeddings[rows], paths, self.stats[rows], self.hashes[rows])


def edit(directory: Path, shard: Shard, update: int, edits: Mapping[int, tuple[str, Stat] | None]) -> None:
    """Replace a shard: each row in `edits` gets another path and stat, or is deleted if None."""
    rows = Rows.read(shard)
    stats = rows.stats.clone()
    for row, change in edits.items():
        if change:
            rows.paths[row], stat = change
            stats[row, 0], stats[row, 1] = stat
    rows.stats = stats
    kept = [row for row in range(shard.rows) if edits.get(row, True)]
    if kept:
        rows.select(kept).write(directory, shard.first, shard.last, update)
    shard.file.unlink()


def merge(directory: Path, settings: Settings) -> None:
    """Make few large shards of many small ones. Only neighbours are merged, so the rows keep their order."""
    for group in _groups(open_shards(directory, settings)):
        if len(group) > 1:
            import torch

            parts = [Rows.read(shard) for shard in group]
            merged = Rows(
                torch.cat([part.embeddings for part in parts]),
                [path for part in parts for path in part.paths],
                torch.cat([part.stats for part in parts]),
                torch.cat([part.hashes for part in parts]),
            )
            merged.write(directory, group[0].first, group[-1].last, settings.update)
    remove_leftovers(directory, settings)


def _groups(shards: Iterable[Shard]) -> Iterator[list[Shard]]:
    group: list[Shard] = []
    for shard in shards:
        if group and sum(member.rows for member in group) + shard.rows > SHARD_ROWS:
            yield group
            group = []
        group.append(shard)
    yield group


def remove_leftovers(directory: Path, settings: Settings) -> None:
    """Delete unfinished files, shards that are to be ignored, and approximate forms of other shards."""
    approximate = set(directory.glob("approximate*.faiss"))
    if approximate:
        approximate.discard(approximate_file(directory, open_shards(directory, settings)))
    for file in [*shard_files(directory)[1], *directory.glob(".*.part"), *approximate]:
        file.unlink()
