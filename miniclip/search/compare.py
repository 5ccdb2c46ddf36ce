"""The differences between folders of pictures and an index. Only pictures whose size or time changed are opened."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from miniclip.search.index import HASH_BYTES, SearchError, Shard
from miniclip.search.shards import Stat

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")

Rejected = dict[str, tuple[int, int, str]]  # path: size, time of modification, why


@dataclass
class Scan:
    """The pictures in some folders, all paths absolute."""

    roots: list[str]
    files: dict[str, Stat] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)  # folder or file: why

    def covers(self, path: str) -> bool:
        """Whether `path` would be among the files if it were there."""
        return _within(path, self.roots) and not _within(path, self.unreadable)


def scan(inputs: Sequence[str | Path]) -> Scan:
    """Find the pictures: in folders, however deep, by suffix; or named themselves. SearchError where there are none."""
    found = Scan([os.path.abspath(path) for path in inputs])
    for root in found.roots:
        before = len(found.files)
        if not os.path.isdir(root):
            if not os.path.exists(root):
                raise SearchError(f"there is no file or folder {root}")
            _add(found, root)
            continue
        for folder, folders, names in os.walk(root, onerror=lambda fault: _note(found, fault)):
            folders.sort()
            for name in sorted(names):
                if name.lower().endswith(IMAGE_SUFFIXES):
                    _add(found, os.path.join(folder, name))
        if len(found.files) == before and not found.unreadable:
            suffixes = " ".join(IMAGE_SUFFIXES)
            raise SearchError(f"there are no pictures in {root}; expected files that end in one of {suffixes}")
    return found


def _add(found: Scan, path: str) -> None:
    try:
        stat = os.stat(path)
        found.files[path] = stat.st_size, stat.st_mtime_ns
    except OSError as fault:
        _note(found, fault)


def _note(found: Scan, fault: OSError) -> None:
    found.unreadable[fault.filename] = f"can't read {fault.filename}: {fault.strerror}"


def _within(path: str, roots: Sequence[str] | dict[str, str]) -> bool:
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


def compare(found: Scan, shards: Sequence[Shard], rejected: Rejected) -> Changes:
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
    for path, stat in found.files.items():
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
    gone = {path: place for path, place in places.items() if path not in found.files and found.covers(path)}
    candidates = defaultdict(list)  # for a move, by size
    for path, place in places.items():
        if place.stat[0] in sizes and path not in found.files and (path in gone or not os.path.lexists(path)):
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
    digest = hashlib.blake2b(digest_size=HASH_BYTES)
    try:
        with open(path, "rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
    except OSError:
        return None
    return digest.digest()
