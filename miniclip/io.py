"""Files and folders that are complete or not there, locks between processes, digests: all of it once.

A file is written beside its final name, as `.NAME.HOST.PID.part`, flushed to the disk, and then renamed: a reader, or a
process killed at any moment, never meets half of one, and a full disk leaves the old file as it was. What killed
processes left is deleted when the same file is next written.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import socket
import stat
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from miniclip.errors import MiniclipError

if os.name == "nt":
    import msvcrt
else:
    import fcntl

if TYPE_CHECKING:
    from torch import Tensor

LONGEST_NAME = 100  # characters of a file's name that its temporary file repeats; file systems allow 255 bytes in all


class WriteError(MiniclipError, OSError):
    """A file or folder that can't be written. What stood there before is untouched."""


class LockedError(MiniclipError, OSError):
    """Another process holds a lock."""


def write_atomically(path: str | Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file, and give it the name `path` once it is safely on the disk.

    Symbolic links are followed. WriteError for whatever the system refuses, and for a folder that is not there.
    """
    path = Path(path).expanduser()
    with explained(path):
        path = path.resolve()
        _sweep(path)
        unfinished = _unfinished(path)
        try:
            write(unfinished)
            with unfinished.open("rb+") as file:
                os.fsync(file.fileno())
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)


@contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """A temporary folder to fill, which becomes `folder` at the end of the block, unless an exception leaves it.

    WriteError if the folder exists and is not empty, or can't be written.
    """
    folder = Path(folder).expanduser().absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise WriteError(f"{folder} exists and is not an empty directory: choose another, or remove it")
    with explained(folder):
        _sweep(folder)
        unfinished = _unfinished(folder)
        try:
            unfinished.mkdir(parents=True)
            yield unfinished
            if folder.exists():
                folder.rmdir()  # a rename can't replace even an empty directory on every system
            unfinished.replace(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)


def write_text(path: str | Path, text: str) -> None:
    write_atomically(path, lambda file: file.write_text(text, encoding="utf-8"))


def write_json(path: str | Path, value: Any) -> None:
    """A value as indented JSON."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def save_tensors(tensors: Mapping[str, Tensor], path: str | Path, metadata: dict[str, str] | None = None) -> None:
    """A safetensors file. Tensors may share memory and have any strides."""
    from safetensors.torch import save_file

    plain = {name: tensors[name].contiguous() for name in tensors}

    def write(unfinished: Path) -> None:
        unfinished.touch()
        mode = unfinished.stat().st_mode
        save_file(plain, unfinished, metadata)
        unfinished.chmod(mode)  # safetensors would let only the owner read it

    write_atomically(path, write)


@contextmanager
def locked(path: str | Path, message: str = "", wait: bool = False) -> Iterator[None]:
    """Hold the lock that the file `path` stands for. The system releases it when a process ends, however it ends.

    message: of the LockedError if another process holds it; with `wait`, what is printed once while waiting.

    The file stays: if it were deleted, a process that waits for the old one and another that opens a new one would both
    get a lock.
    """
    with explained(Path(path)):
        file = open(path, "ab")  # noqa: SIM115
    with file:
        told = False
        while not _try_lock(file.fileno()):
            if not wait:
                raise LockedError(message or f"another process holds {path}: wait until it is done")
            if not told:
                print(message or f"waiting for another process, which holds {path}", file=sys.stderr, flush=True)
                told = True
            time.sleep(0.2)
        yield


def _try_lock(descriptor: int) -> bool:
    try:
        if os.name == "nt":
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (PermissionError, BlockingIOError):
        return False
    return True


def open_regular(path: str | Path) -> BinaryIO:
    """Open a file to read its bytes. OSError also for a folder, and for a pipe or device, which might never end."""

    def opener(path: str, flags: int) -> int:
        descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            os.close(descriptor)
            raise OSError(errno.EINVAL, "it is a folder" if stat.S_ISDIR(mode) else "it is not a regular file", path)
        return descriptor

    return open(path, "rb", opener=opener)


def printable(name: str) -> str:
    """A file name, or any text, in one line: characters that control a terminal, and bytes that are not UTF-8, become
    escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in name)


def sha256_of(path: str | Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(1 << 20))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def update_digest(digest: Any, tensors: Mapping[str, Tensor]) -> None:
    """Add the names, dtypes, shapes and bits of tensors to a hashlib object."""
    import torch

    for name, tensor in tensors.items():
        digest.update(repr((name, tensor.dtype, tuple(tensor.shape))).encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def _unfinished(path: Path) -> Path:
    return path.with_name(f".{path.name[:LONGEST_NAME]}.{_host()}.{os.getpid()}.part")


def _host() -> str:
    return re.sub(r"[^\w-]", "_", socket.gethostname())[:60]


def _sweep(path: Path) -> None:
    """Delete what processes of this machine that no longer run left of `path`."""
    begins = f".{path.name[:LONGEST_NAME]}.{_host()}."
    try:
        names = os.listdir(path.parent)
    except OSError:
        return
    for name in names:
        match = re.fullmatch(r"(\d{1,9})\.part", name.removeprefix(begins)) if name.startswith(begins) else None
        if match and not _runs(int(match[1])):
            left = path.with_name(name)
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)


def _runs(process: int) -> bool:
    if os.name == "nt":
        return True  # os.kill would end it
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # it runs, as somebody else's
    return True


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn what the system says into a WriteError that names the path."""
    try:
        yield
    except WriteError:
        raise
    except Exception as error:
        # safetensors and torch.save wrap the system's error in types of their own
        if not isinstance(error, OSError) and type(error).__name__ not in ("SafetensorError", "RuntimeError"):
            raise
        if isinstance(error, MiniclipError):
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise WriteError(f"can't write {path}: {reason:.300}") from error
