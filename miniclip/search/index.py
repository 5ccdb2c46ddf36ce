"""An index of pictures: a directory that any program can map into memory. This is the whole format, version 1.

    INDEX/
        index.json                          what made it: format, version, model, activation, fingerprint, embedding (E)
        000000000-000000311.safetensors     a shard: the pictures of batches 0 to 311
        000000312-000000312.safetensors     another, of one batch; more are written while an index is made
        rejected.json                       files that can't be read: path -> [bytes, mtime, why]
        approximate.faiss                   optional, see approximate.py
        .lock                               held by the process that writes; others may read meanwhile

A shard has four tensors, with a row for each of its n pictures; all shards' rows in the order of their names are the
rows of the index:

    embeddings  F16 [n, E]    of unit length, so that the product of two is their cosine
    paths       U8  [bytes]   a JSON list of n strings, absolute; bytes that are not UTF-8 as Python's surrogates
    stats       I64 [n, 2]    the file's size in bytes and its time of modification in nanoseconds, when it was read
    hashes      U8  [n, 16]   the BLAKE2b of its content

To read it in NumPy, without this project:

    for file in sorted(Path("photos.index").glob("*.safetensors")):
        with safetensors.safe_open(file, "numpy") as shard:
            paths = json.loads(shard.get_tensor("paths").tobytes())
            scores = shard.get_tensor("embeddings").astype("float32") @ query  # float32 [E], of unit length
            print([(scores[i], paths[i]) for i in (-scores).argsort()[:10]])

A file appears under its name once it is complete, and is never changed after that, only replaced by another of the same
name or deleted. Merging writes one shard over the numbers of several, then deletes those. So a process may be killed at
any moment. A reader MUST ignore a shard whose numbers lie within another's: a merge was interrupted there. The next
`miniclip index` deletes it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from miniclip.errors import MiniclipError

if TYPE_CHECKING:
    from torch import Tensor

DEFAULT_MODEL = "ViT-B/32"
APPROXIMATE = "approximate.faiss"
FORMAT, VERSION = "miniclip search index", 1
SHARD_NAME = re.compile(r"(\d{9})-(\d{9})\.safetensors")
ATTEMPTS = 5  # to read an index that another process is merging


class SearchError(MiniclipError, ValueError):
    """An index, a folder or a query that can't be used; the message says what to do."""


class Hit(NamedTuple):
    """One answer: its score, a cosine for a query of one part, and which picture (or text) it is."""

    score: float
    path: str


@dataclass(frozen=True)
class Settings:
    """What is in index.json: what every embedding of an index was made with."""

    model: str  # a name or an absolute path, as load() takes it
    activation: str | None
    fingerprint: str  # of the image tower and the preprocessing, see update.describe
    embedding: int  # E

    def content(self) -> dict[str, object]:
        return {"format": FORMAT, "version": VERSION, **vars(self)}


@dataclass(frozen=True)
class Shard:
    """One file of an index."""

    file: Path
    first: int
    last: int
    rows: int

    @staticmethod
    def open(file: Path) -> Shard:
        first, last = map(int, SHARD_NAME.fullmatch(file.name).groups())
        with _complaining(file), safe_open(file, "np") as tensors:
            return Shard(file, first, last, tensors.get_slice("embeddings").get_shape()[0])

    def read(self, name: str) -> np.ndarray:
        """A copy, in memory."""
        with _complaining(self.file), safe_open(self.file, "np") as tensors:
            return tensors.get_tensor(name)

    def map(self, name: str) -> Tensor:
        """Mapped into memory: read from the file when it is used. The mapping goes when the tensor does."""
        with _complaining(self.file), safe_open(self.file, "pt") as tensors:
            return tensors.get_tensor(name)

    def paths(self) -> list[str]:
        return json.loads(self.read("paths").tobytes())


class Index:
    """An index that is open for reading. Others may search it and one may update it meanwhile."""

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        self.settings = read_settings(self.directory)
        self.shards = open_shards(self.directory)

    def __len__(self) -> int:
        return sum(shard.rows for shard in self.shards)

    def blocks(self) -> Iterator[Tensor]:
        """The embeddings of one shard after another, float16 [n, E], mapped: read from the file when they are used."""
        for shard in self.shards:
            yield shard.map("embeddings")

    def paths(self, rows: list[int]) -> list[str]:
        """Which pictures these rows are of. Only the tables of the shards that they lie in are read."""
        found, start = {}, 0
        for shard in self.shards:
            inside = [row for row in set(rows) if start <= row < start + shard.rows]
            if inside:
                table = shard.paths()
                found |= {row: table[row - start] for row in inside}
            start += shard.rows
        return [found[row] for row in rows]

    def search(self, queries: Tensor, top: int = 10) -> list[list[Hit]]:
        """For each query the pictures of the highest score, best first; of equals the lower row first.

        queries: float [Q, E] on the CPU, see `embed_query`. Exact, in memory that does not grow with the index.
        """
        from miniclip.search.exact import top_k

        for _ in range(ATTEMPTS):
            try:
                scores, rows = top_k(self.blocks(), queries, top)
                paths = iter(self.paths(rows.flatten().tolist()))
                return [[Hit(score, next(paths)) for score in line] for line in scores.tolist()]
            except FileNotFoundError:  # shards were merged or replaced since they were listed
                self.shards = open_shards(self.directory)
        raise SearchError(f"{self.directory} kept changing while it was searched; try again when its update is done")


def read_settings(directory: Path) -> Settings:
    """Raises SearchError, which says what to do, for what is not an index that this version can read."""
    make = f"make one with `miniclip index FOLDER -o {directory}`"
    file = directory / "index.json"
    if not directory.exists():
        raise SearchError(f"there is no index {directory}; {make}")
    if not file.is_file():
        raise SearchError(f"{directory} is not an index, which is a directory with an index.json; {make}")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        ours = found["format"] == FORMAT
        version = int(found["version"])
    except (ValueError, TypeError, KeyError):
        ours = False
    if not ours:
        raise SearchError(f"{file} is not of an index of miniclip; choose another directory, or {make}")
    if version != VERSION:
        raise SearchError(f"{directory} has version {version}, this miniclip reads {VERSION}: update it, or {make}")
    try:
        return Settings(found["model"], found["activation"], found["fingerprint"], int(found["embedding"]))
    except (KeyError, ValueError, TypeError) as error:
        raise SearchError(f"{file} is damaged ({error!r} is missing or wrong); delete {directory} and {make}") from None


def open_shards(directory: Path) -> list[Shard]:
    """All shards in order, without those that are within another."""
    for _ in range(ATTEMPTS):
        try:
            return [Shard.open(file) for file in shard_files(directory)[0]]
        except FileNotFoundError:  # merged since they were listed
            pass
    raise SearchError(f"{directory} kept changing while it was opened; try again when its update is done")


def shard_files(directory: Path) -> tuple[list[Path], list[Path]]:
    """The files of the shards in order, and those that an interrupted merge left over."""
    ranges = []
    for file in directory.iterdir():
        if match := SHARD_NAME.fullmatch(file.name):
            first, last = map(int, match.groups())
            ranges.append((first, -last, file))
    current, leftover, end = [], [], -1
    for _, negative_last, file in sorted(ranges):
        (current if -negative_last > end else leftover).append(file)
        end = max(end, -negative_last)
    return current, leftover


class _complaining:
    """Turns what safetensors makes of a damaged shard into a SearchError."""

    def __init__(self, file: Path):
        self.file = file

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, trace) -> None:
        if isinstance(error, SafetensorError):
            raise SearchError(f"{self.file} is damaged: {error}; delete it and run `miniclip index` again") from error


def printable(text: str) -> str:
    """Bytes of a file name that are not UTF-8, and what would move the cursor, as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)
