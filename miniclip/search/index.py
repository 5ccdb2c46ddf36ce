"""An index of pictures: a directory that any program can map into memory. This is the whole format, version 2.

    INDEX/
        index.json                                what it was made with, see Settings
        000000000-000000311-000001.safetensors    a shard: the pictures of batches 0 to 311, written by update 1
        000000312-000000312-000002.safetensors    another, of one batch; merged at the end of the update
        rejected.json                             files whose content can't be decoded, see update.py
        approximate-<hash>.faiss                  optional, see approximate.py
        .lock                                     locked by the process that writes; others may read meanwhile

A shard has four tensors, with a row for each of its n pictures. The rows of the index are the rows of all shards, in
the order of the shards' names:

    embeddings  F16 [n, E]    of unit length, so the product of two is their cosine
    paths       U8  [bytes]   a JSON list of n absolute paths; bytes that are not UTF-8 as Python's surrogates
    stats       I64 [n, 2]    the file's size in bytes and its time of modification in nanoseconds, when it was read
    hashes      U8  [n, 16]   the BLAKE2b of its content

To read it in NumPy, without this project:

    for file in sorted(Path("photos.index").glob("*.safetensors")):
        with safetensors.safe_open(file, "numpy") as shard:
            paths = json.loads(shard.get_tensor("paths").tobytes())
            scores = shard.get_tensor("embeddings").astype("float32") @ query  # float32 [E], of unit length
            print([(scores[i], paths[i]) for i in (-scores).argsort()[:10]])

A shard appears under its name once it is complete, never changes, and its name is never used again. An update that
edits a shard, or merges several, first writes the new one with its own number as the last part of the name, then
deletes the old ones. A process may therefore be killed at any moment, and whoever opens a file by its name gets the
content that was listed, or no file: then the index has changed, and is to be listed again. A reader MUST ignore a shard
whose batches lie within another's, and of shards of equal batches all but that of the latest update: an update was
interrupted there. The next one deletes what is to be ignored.

Version 1 had no number of an update in the names. It is read, and becomes version 2 when it is updated.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from miniclip.errors import MiniclipError

if TYPE_CHECKING:
    from torch import Tensor

DEFAULT_MODEL = "ViT-B/32"
FORMAT, VERSION = "miniclip search index", 2
SHARD_NAME = re.compile(r"(\d{9})-(\d{9})(?:-(\d{6,}))?\.safetensors")
HASH_BYTES = 16
ATTEMPTS = 20  # to read an index that another process is changing


class SearchError(MiniclipError, ValueError):
    """An index, a folder or a query that can't be used; the message says what to do."""


class Hit(NamedTuple):
    """One answer: which picture (or text) it is, and its score, the cosine with the query if that has one part."""

    score: float
    path: str


@dataclass(frozen=True)
class Settings:
    """The content of index.json: what all embeddings of an index were made with."""

    model: str  # a name or an absolute path, as load() takes it
    activation: str | None
    fingerprint: str  # of the image tower and the preprocessing, see update.describe
    embedding: int  # E
    update: int = 0  # number of the last update
    upright: bool = False  # whether pictures were turned as their EXIF orientation says

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
    def open(file: Path, width: int) -> Shard:
        """width: E. SearchError for a file that is damaged."""
        first, last, _ = SHARD_NAME.fullmatch(file.name).groups()
        with _explained(file), safe_open(file, "np") as tensors:
            shapes = {name: tensors.get_slice(name).get_shape() for name in ("embeddings", "stats", "hashes")}
        rows = shapes["embeddings"][0]
        if shapes != {"embeddings": [rows, width], "stats": [rows, 2], "hashes": [rows, HASH_BYTES]}:
            raise _damaged(file, f"its tensors are {shapes}, for embeddings of {width} numbers")
        return Shard(file, int(first), int(last), rows)

    def read(self, name: str) -> np.ndarray:
        """A copy, in memory."""
        with _explained(self.file), safe_open(self.file, "np") as tensors:
            return tensors.get_tensor(name)

    def map(self, name: str) -> Tensor:
        """Mapped into memory: read from the disk when it is used, and unmapped with the tensor."""
        with _explained(self.file), safe_open(self.file, "pt") as tensors:
            return tensors.get_tensor(name)

    def paths(self) -> list[str]:
        try:
            paths = json.loads(self.read("paths").tobytes())
        except ValueError as error:
            raise _damaged(self.file, f"its paths are not JSON: {error}") from error
        if not isinstance(paths, list) or len(paths) != self.rows or not all(isinstance(path, str) for path in paths):
            raise _damaged(self.file, f"its paths are not a list of {self.rows} strings")
        return paths


class Index:
    """An index that is open for reading. Others may search it and one may update it meanwhile."""

    def __init__(self, directory: str | Path):
        self.directory = Path(directory).expanduser()
        self.settings = read_settings(self.directory)
        self.shards = open_shards(self.directory, self.settings)

    def __len__(self) -> int:
        return sum(shard.rows for shard in self.shards)

    def __repr__(self) -> str:
        return f"<Index {self.directory}: {len(self)} pictures, model {self.settings.model}>"

    def blocks(self) -> Iterator[Tensor]:
        """The embeddings, shard by shard: float16 [n, E], mapped into memory."""
        return blocks_of(self.shards)

    def paths(self, rows: list[int]) -> list[str]:
        """The paths of the pictures in these rows."""
        paths = paths_of(self.shards, rows)
        return [paths[row] for row in rows]

    def search(self, queries: Tensor, top: int = 10) -> list[list[Hit]]:
        """For each query the pictures of the highest score, best first; of equal scores the lower row first.

        queries: float [Q, E], see `embed_query`; on a GPU, they are compared there, which pays for many queries. Exact,
        in memory that does not grow with the index.
        """
        from miniclip.search.exact import top_k

        return self.answer(queries, lambda shards: top_k(blocks_of(shards), queries, top))

    def answer(self, queries: Tensor, find: Callable[[list[Shard]], tuple[Tensor, Tensor]]) -> list[list[Hit]]:
        """The pictures that `find` gives: scores [Q, K] and row numbers [Q, K], below 0 for none.

        It is called again with the current shards if an update deleted some before all were read.
        """
        if queries.ndim != 2 or queries.shape[1] != self.settings.embedding:
            width = self.settings.embedding
            raise SearchError(f"queries are {list(queries.shape)}; expected [Q, {width}], as embed_query gives them")
        shards = self.shards
        for _ in range(ATTEMPTS):
            try:
                scores, rows = (found.tolist() for found in find(shards))
                paths = paths_of(shards, [row for line in rows for row in line if row >= 0])
                return [
                    [Hit(score, paths[row]) for score, row in zip(*line, strict=True) if row >= 0]
                    for line in zip(scores, rows, strict=True)
                ]
            except FileNotFoundError:
                self.shards = shards = open_shards(self.directory, self.settings)
        raise _unsteady(self.directory)


def blocks_of(shards: list[Shard]) -> Iterator[Tensor]:
    for shard in shards:
        yield shard.map("embeddings")


def paths_of(shards: list[Shard], rows: Sequence[int]) -> dict[int, str]:
    """The path of the picture in each of these rows. Only shards that hold one of the rows are read."""
    found, start = {}, 0
    for shard in shards:
        inside = [row for row in set(rows) if start <= row < start + shard.rows]
        if inside:
            table = shard.paths()
            found |= {row: table[row - start] for row in inside}
        start += shard.rows
    return found


def read_settings(directory: Path) -> Settings:
    """Raises SearchError, which says what to do, for what is not an index that this version can read."""
    new = f"{directory}.index" if directory.exists() else str(directory)
    make = f"make one with `miniclip index FOLDER -o {shlex.quote(new)}`"
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
    if version not in (1, VERSION):
        raise SearchError(f"{directory} has version {version}, this miniclip reads 1 and 2: update it, or {make}")
    try:
        settings = Settings(**{field.name: found[field.name] for field in fields(Settings) if field.name in found})
        if not isinstance(settings.model, str) or not isinstance(settings.embedding, int):
            raise TypeError(f"model is {settings.model!r}, embedding {settings.embedding!r}")
        return settings
    except TypeError as error:
        raise SearchError(f"{file} is damaged: {error}; delete {directory} and {make}") from None


def open_shards(directory: Path, settings: Settings) -> list[Shard]:
    """All shards in order, without those that are to be ignored."""
    for _ in range(ATTEMPTS):
        try:
            files = shard_files(directory)
            if files == shard_files(directory):  # a merge while the directory is read could hide old and new shards
                return [Shard.open(file, settings.embedding) for file in files[0]]
        except FileNotFoundError:  # merged since the directory was read
            pass
    raise _unsteady(directory)


def shard_files(directory: Path) -> tuple[list[Path], list[Path]]:
    """The files of the shards in order, and those that are to be ignored."""
    found = []
    for file in directory.iterdir():
        if match := SHARD_NAME.fullmatch(file.name):
            first, last, update = (int(number or 0) for number in match.groups())
            found.append((first, -last, -update, file))
    current, ignored, end = [], [], -1
    for _, negative_last, _, file in sorted(found):
        (current if -negative_last > end else ignored).append(file)
        end = max(end, -negative_last)
    return current, ignored


def approximate_file(directory: Path, shards: Sequence[Shard]) -> Path:
    """Where the approximate form of these shards is, if there is one."""
    names = "\n".join(shard.file.name for shard in shards)
    return directory / f"approximate-{hashlib.sha256(names.encode()).hexdigest()[:16]}.faiss"


@contextmanager
def _explained(file: Path) -> Iterator[None]:
    """Turn what is raised for a damaged or unreadable shard into a SearchError. FileNotFoundError stays."""
    try:
        yield
    except FileNotFoundError:
        raise
    except RuntimeError as error:  # PyTorch's, which opens the file once more to map it
        if file.exists():
            raise _damaged(file, str(error)) from error
        raise FileNotFoundError(file) from error
    except OSError as error:
        raise SearchError(f"can't read {file}: {error.strerror or error}") from error
    except SafetensorError as error:
        raise _damaged(file, str(error)) from error


def _damaged(file: Path, why: str) -> SearchError:
    return SearchError(f"{file} is damaged: {why:.300}; delete it and run `miniclip index` again")


def _unsteady(directory: Path) -> SearchError:
    return SearchError(f"{directory} kept changing while it was read; try again when its update is done")
