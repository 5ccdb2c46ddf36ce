"""The differences between folders of pictures and an index. Only pictures whose size or time changed are opened."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

from miniclip.data import pictures
from miniclip.io import open_regular
from miniclip.search.index import HASH_BYTES, SearchError, Shard
from miniclip.search.shards import Stat

Rejected = dict[str, tuple[int, int, str, str]]  # path: size, time of modification, fault, and the decoder's version


@dataclass
class Found:
    """The pictures in some folders, all paths absolute."""

    roots: list[str]
    scan: pictures.Scan

    def covers(self, path: str) -> bool:
        """Whether `path` would be among the pictures if it were there."""
        return _within(path, self.roots) and not _within(path, self.scan.faults)


def find(inputs: str | Path | Sequence[str | Path], hidden: bool = False) -> Found:
    """The pictures in folders and among files, as data/pictures.py finds them.

    SearchError for an input that is not there, and for a folder without pictures: its drive may not be mounted, and the
    index would lose what it has of it.
    """
    inputs = [inputs] if isinstance(inputs, (str, os.PathLike)) else inputs
    roots = [os.path.abspath(os.path.expanduser(path)) for path in inputs]
    for root in roots:
        if not os.path.exists(root):
            raise SearchError(f"there is no file or folder {root}")
    scan = pictures.scan(roots, hidden)
    for root in roots:
        if not any(_within(path, [root]) for path in scan.pictures | scan.faults) and not _elsewhere(root, scan):
            left_out = f" ({scan.summary()})" if scan.summary() else ""
            raise SearchError(f"there are no pictures in {root}{left_out}; expected JPEG, PNG or other image files")
    return Found(roots, scan)


def _elsewhere(root: str, scan: pictures.Scan) -> bool:
    """Whether another input has the pictures of `root`, which is reached through a link."""
    return any(_within(os.path.realpath(path), [os.path.realpath(root)]) for path in scan.pictures)


def _within(path: str, roots: Iterable[str]) -> bool:
    return any(path == root or path.startswith(os.path.join(root, "")) for root in roots)


class Place(NamedTuple):
    """The place of a picture in an index, and its file's size and time when it was indexed."""

    shard: int
    row: int
    stat: Stat


@dataclass
class Changes:
    """What an update has to do."""

    edits: dict[int, dict[int, tuple[str, Stat] | None]]  # shard: row: its new path and stat; None deletes the row
    todo: list[tuple[str, Stat]] = field(default_factory=list)  # the pictures to encode
    unchanged: int = 0
    changed: list[str] = field(default_factory=list)
    moved: list[tuple[str, str]] = field(default_factory=list)  # old and new path
    deleted: list[str] = field(default_factory=list)
    rejected: Rejected = field(default_factory=dict)  # could not be read before, and unchanged


def compare(found: Found, shards: Sequence[Shard], rejected: Rejected) -> Changes:
    """What an update has to do. Pictures outside the folders stay in the index, unless they were moved into one.

    rejected: the files that could not be read the last time. They are not tried again before they change.
    """
    places = {
        path: Place(number, row, tuple(stat))
        for number, shard in enumerate(shards)
        for row, (path, stat) in enumerate(zip(shard.paths(), shard.read("stats").tolist(), strict=True))
    }
    hashes = [shard.read("hashes") for shard in shards]

    def same_content(path: str, place: Place) -> bool:
        return content_hash(path) == bytes(hashes[place.shard][place.row].tolist())

    changes = Changes(defaultdict(dict))
    new: dict[str, Stat] = {}
    for path, stat in found.scan.pictures.items():
        place = places.get(path)
        if place is None:
            new[path] = stat
        elif place.stat == stat:
            changes.unchanged += 1
        elif place.stat[0] == stat[0] and same_content(path, place):  # touched, or copied back
            changes.edits[place.shard][place.row] = path, stat
            changes.unchanged += 1
        else:
            changes.edits[place.shard][place.row] = None
            changes.changed.append(path)
            changes.todo.append((path, stat))

    sizes = {size for size, _ in new.values()}
    gone = {path: place for path, place in places.items() if path not in found.scan.pictures and found.covers(path)}
    candidates = defaultdict(list)  # for a move, by size
    for path, place in places.items():
        if place.stat[0] in sizes and path not in found.scan.pictures and (path in gone or not os.path.lexists(path)):
            candidates[place.stat[0]].append(path)
    for path, stat in new.items():
        if rejected.get(path, ())[:2] == stat:
            changes.rejected[path] = rejected[path]
            continue
        for old in candidates[stat[0]]:
            place = places[old]
            if same_content(path, place):
                candidates[stat[0]].remove(old)
                gone.pop(old, None)
                changes.edits[place.shard][place.row] = path, stat
                changes.moved.append((old, path))
                break
        else:
            changes.todo.append((path, stat))
    for path, place in gone.items():
        changes.edits[place.shard][place.row] = None
        changes.deleted.append(path)
    return changes


def content_hash(path: str | Path) -> bytes | None:
    """BLAKE2b of a file, None if it can't be read."""
    try:
        with open_regular(path) as file:
            return digest_of(file)
    except OSError:
        return None


def digest_of(file: BinaryIO) -> bytes:
    """BLAKE2b of the content of an open file."""
    digest = hashlib.blake2b(digest_size=HASH_BYTES)
    while piece := file.read(1 << 20):
        digest.update(piece)
    return digest.digest()
