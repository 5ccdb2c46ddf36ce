"""Which files of a folder are taken for pictures: one rule for index, embed, evaluate and train. Opens no picture.

A file is taken if its name ends as a picture's does, or if it begins as one does. Hidden files and folders, and what
storage devices and systems add by themselves, stay out unless they are asked for. A link to a folder is followed, but
no folder is read twice. A file that the user names is taken whatever it is called.
"""

from __future__ import annotations

import os
import re
import stat
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm"),
    *(".pnm", ".jp2", ".j2k", ".jpx", ".avif", ".heic", ".heif"),
)
# The first bytes of JPEG, PNG, GIF, WebP, BMP, PPM, JPEG 2000, AVIF and HEIC. TIFF is told by the name alone, because
# cameras' raw files begin in the same way.
BEGINNING = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|RIFF.{4}WEBP|BM.{4}\0{4}.{4}[\x0c(48@l|]\0\0\0|P[1-6]\s+[#\d]"
    rb"|\0\0\0\x0cjP  \r\n|\xff\x4f\xff\x51|.{4}ftyp(avif|avis|hei[cxms]|hev[cx]|mif1|msf1)",
    re.DOTALL,
)
HIDDEN = {"@eadir", "#recycle", "#snapshot", "$recycle.bin", "system volume information", "__macosx", "lost+found"}

# Why something is left out.
HIDDEN_REASON = "hidden files and folders"
OTHER = "files that are not pictures"
VISITED = "links to folders that are scanned already"
IRREGULAR = "pipes, devices and sockets"


@dataclass
class Scan:
    """What `scan` found.

    pictures: the path of each, with its size in bytes and its time of modification in nanoseconds
    left_out: how many files and folders were left out, by reason
    faults: the paths of files and folders that can't be read, and of inputs that are not there: why
    """

    pictures: dict[str, tuple[int, int]] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)
    faults: dict[str, str] = field(default_factory=dict)

    def summary(self) -> str:
        """What was left out, as one line; "" if nothing was."""
        counts = ", ".join(f"{count:,} {reason}" for reason, count in sorted(self.left_out.items()))
        return f"left out: {counts}" if counts else ""


def scan(inputs: Sequence[str | Path], hidden: bool = False) -> Scan:
    """Find the pictures in folders, however deep, and among files that are named.

    Paths begin as the inputs do; a picture that several inputs hold is found once. The order is that of the inputs,
    within a folder that of the names; what lies behind links to folders comes last. hidden: take hidden ones too.
    """
    found, seen, links = Scan(), set(), []
    for path in map(os.path.expanduser, inputs):
        if os.path.isdir(path):
            _walk(found, path, hidden, seen, links)
        elif status := _stat(found, path):
            if stat.S_ISREG(status.st_mode):
                _add(found, path, status, seen)
            else:
                found.faults[path] = f"can't read {path}: it is not a regular file"
    for link in links:  # the list grows while they are followed
        found.left_out[VISITED] += os.path.realpath(link) in seen
        _walk(found, link, hidden, seen, links)
    found.left_out = +found.left_out  # without those that are 0
    return found


def _walk(found: Scan, root: str, hidden: bool, seen: set[str], links: list[str]) -> None:
    """Scan a folder and all below it that is not in `seen`, except behind links to folders, which go into `links`."""
    waiting = [root]
    while waiting:
        folder = waiting.pop()
        real = os.path.realpath(folder)
        if real in seen:
            continue
        seen.add(real)
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            _note(found, folder, error)
            continue
        subfolders = []
        for entry in entries:
            if not hidden and (entry.name.startswith(".") or entry.name.lower() in HIDDEN):
                found.left_out[HIDDEN_REASON] += 1
            elif (status := _stat(found, entry.path)) is None:
                continue
            elif stat.S_ISDIR(status.st_mode):
                (links if entry.is_symlink() else subfolders).append(entry.path)
            elif not stat.S_ISREG(status.st_mode):
                found.left_out[IRREGULAR] += 1  # not opened: a pipe would wait for a writer
            elif entry.name.lower().endswith(SUFFIXES) or _begins_as_picture(found, entry.path):
                _add(found, entry.path, status, seen)
            elif entry.path not in found.faults:
                found.left_out[OTHER] += 1
        waiting += reversed(subfolders)


def _add(found: Scan, path: str, status: os.stat_result, seen: set[str]) -> None:
    absolute = os.path.abspath(path)
    if absolute not in seen:
        seen.add(absolute)
        found.pictures[path] = status.st_size, status.st_mtime_ns


def _begins_as_picture(found: Scan, path: str) -> bool:
    try:
        with open(path, "rb") as file:
            return BEGINNING.match(file.read(32)) is not None
    except OSError as error:
        _note(found, path, error)
        return False


def _stat(found: Scan, path: str) -> os.stat_result | None:
    try:
        return os.stat(path)
    except OSError as error:
        _note(found, path, error)
        return None


def _note(found: Scan, path: str, error: OSError) -> None:
    found.faults[path] = f"can't read {path}: {error.strerror}"
