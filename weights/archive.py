"""Reads PyTorch's own files. Tensors come out; nothing in the file is imported, called or run.

Three kinds of file hold a pickle that describes tensors, and storages, which are plain little-endian numbers:

    TorchScript archive   zip of data.pkl, data/0, data/1, ..., constants.pkl and code; OpenAI's released files
    torch.save            zip of data.pkl, data/0, data/1, ...
    legacy torch.save     before PyTorch 1.6: five pickles, the last of which lists the storages, which follow

The tensors are views of the memory-mapped file: no storage is read here.
"""

from __future__ import annotations

import math
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable
from mmap import mmap
from typing import BinaryIO

import torch
from torch import Tensor

from miniclip.errors import MiniclipWarning
from miniclip.weights.errors import CheckpointError
from miniclip.weights.unpickle import MAX_PICKLE_BYTES, Module, Storage, View, unpickle

LEGACY_MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # pickle of the number that opens a legacy file
LEGACY_PROTOCOL = 1001

# Of a zip's local file headers (APPNOTE.TXT, 4.3.7): signature, flags, method, lengths of the name and the extra field.
LOCAL_HEADER = struct.Struct("<4s2xHH16xHH")
ENCRYPTED, UTF8 = 1 << 0, 1 << 11  # flags

# Real files stay far below these. Together with those of `miniclip.weights.unpickle` they bound time and memory.
MAX_DIRECTORY = 1 << 22  # bytes of a zip's list of records, of which each takes 60 or more
MAX_ATTRIBUTES = 100_000  # visited in all modules, which may contain each other without end
MAX_NAME = 1000  # characters
MAX_DIMENSIONS = 16

# Keys under which training checkpoints have a state dict.
STATE_DICTS = ("state_dict", "model_state_dict", "model", "net", "network", "module", "weights", "params")
AVERAGE = re.compile("(^|_)ema(_|$)")  # and, in such a key: one of the weights' moving average


def read_zip(file: BinaryIO, data: mmap) -> dict[str, Tensor]:
    """The tensors of a zip that `torch.save` or TorchScript wrote; `data` is the whole file."""
    records = _Records(file, data)
    if "data.pkl" not in records.infos:
        raise CheckpointError("a zip file without data.pkl, so not one that PyTorch wrote")
    if "byteorder" in records.infos and records.read("byteorder") != b"little":  # older files lack it and are little
        raise CheckpointError("its numbers are not little-endian: load it and save it again on a little-endian machine")
    if records.infos["data.pkl"].file_size > MAX_PICKLE_BYTES:
        raise CheckpointError(f"data.pkl takes more than {MAX_PICKLE_BYTES:,} bytes, which no model needs")
    root = unpickle(bytes(records.read("data.pkl"))).value
    views = _module_views(root) if "constants.pkl" in records.infos else _dict_views(root)
    return _tensors(views, lambda key: records.read(f"data/{key}"), _limit(data))


def read_legacy(data: mmap) -> dict[str, Tensor]:
    """The tensors of a file that starts with LEGACY_MAGIC; `data` is the whole file."""
    position, pickles = 0, []
    for _ in ("magic", "protocol", "system", "root", "keys"):
        pickles.append(unpickle(data[position : position + MAX_PICKLE_BYTES]))
        position += pickles[-1].end
    _, protocol, system, root, keys = pickles
    if protocol.value != LEGACY_PROTOCOL or system.value["little_endian"] is not True:
        raise CheckpointError(f"a legacy file that is not of protocol {LEGACY_PROTOCOL} or not little-endian")

    extents = {}
    for key in keys.value:  # each storage: its length, int64, then its elements
        if type(key) is not str:
            raise CheckpointError(f"the key of a storage is a {type(key).__name__}")
        _, dtype, numel = root.storages[key]
        if struct.unpack_from("<q", data, position) != (numel,):
            raise CheckpointError(f"storage {key!r:.100} has not the length that the pickle says")
        extents[key] = (position + 8, position + 8 + numel * dtype.itemsize)
        position = extents[key][1]
    return _tensors(_dict_views(root.value), lambda key: memoryview(data)[slice(*extents[key])], _limit(data))


def _module_views(root: object) -> dict[str, View]:
    """The tensors of a TorchScript module, named and in order as in its state_dict()."""
    if not isinstance(root, Module):
        raise CheckpointError(f"the archive holds a {type(root).__name__}, not a module")
    views, pending, met = {}, [("", root)], 0
    while pending:
        prefix, module = pending.pop()
        children = []
        for name, value in module.attributes.items():
            met += 1
            if met > MAX_ATTRIBUTES or len(prefix) + len(name) > MAX_NAME:
                raise CheckpointError("its modules contain themselves, or have more attributes than any model")
            if isinstance(value, View):
                if prefix + name in views:
                    raise CheckpointError(f"two tensors have the name {prefix + name:.100}")
                views[prefix + name] = value
            elif isinstance(value, Module):
                children.append((f"{prefix}{name}.", value))
        pending += reversed(children)
    return views


def _dict_views(root: object) -> dict[str, View]:
    """The tensors of a state dict, which may be one value of a training checkpoint's dict, beside any others."""
    if isinstance(root, dict) and not _is_state_dict(root):
        key = _state_dict_of(root)
        root = root if key is None else root[key]
    if not isinstance(root, dict) or not root:
        raise CheckpointError(f"it holds an empty state dict or a {_kind(root)}; expected a dict of tensors")
    for name, value in root.items():
        if not isinstance(value, View) or type(name) is not str:
            raise CheckpointError(
                f"{name!r:.100}: {_kind(value)}; expected a dict of names and tensors, by itself or under state_dict, "
                "model or another key"
            )
    return root


def _state_dict_of(checkpoint: dict) -> str | int | None:
    """The key of the model's state dict. Beside the weights there may be their moving average (EMA), which is taken."""
    found = [key for key, value in checkpoint.items() if _is_state_dict(value)]
    usual = [key for key in found if key in STATE_DICTS or AVERAGE.search(str(key))] or found
    if not usual:
        return next((key for key in STATE_DICTS if isinstance(checkpoint.get(key), dict)), None)  # to say what is wrong
    averages = [key for key in usual if AVERAGE.search(str(key))]
    chosen, *others = averages if len(averages) == 1 else usual
    if others:
        names = ", ".join(f"{key!s:.50}" for key in usual[:10])
        raise CheckpointError(f"it has several state dicts ({names}): save the one that is meant by itself")
    size = len(checkpoint[chosen])
    if left := [f"{key!s:.50}" for key in found if key != chosen and 2 * len(checkpoint[key]) > size]:
        text = f"the tensors under {chosen!s:.50} are taken, not those under {', '.join(left[:10])}"
        warnings.warn(f"{text}: save the others by themselves to load them", MiniclipWarning, stacklevel=2)
    return chosen


def _is_state_dict(value: object) -> bool:
    return (
        isinstance(value, dict)
        and bool(value)
        and all(isinstance(tensor, View) and type(name) is str for name, tensor in value.items())
    )


def _kind(value: object) -> str:
    return "tensor" if isinstance(value, View) else type(value).__name__


class _Directory:
    """A file as zipfile reads it to find the records; no more than MAX_DIRECTORY bytes at a time."""

    def __init__(self, file: BinaryIO):
        self._file, self.seek, self.tell, self.seekable = file, file.seek, file.tell, file.seekable

    def read(self, count: int = -1) -> bytes:
        if count > MAX_DIRECTORY:
            raise CheckpointError(f"the zip's list of records has {count:,} bytes; expected at most {MAX_DIRECTORY:,}")
        return self._file.read(count)


class _Records:
    """The records of a zip, by name without the top-level folder."""

    def __init__(self, file: BinaryIO, data: mmap):
        self._data = data
        try:
            infos = zipfile.ZipFile(_Directory(file)).infolist()
        except zipfile.BadZipFile as error:
            raise CheckpointError(f"a zip file that is cut off or damaged ({error}): fetch it again") from None
        folders = {info.filename.partition("/")[0] for info in infos}
        if len(folders) != 1:
            raise CheckpointError(f"the zip has {len(folders)} top-level folders; expected one")
        self.infos = {info.filename.partition("/")[2]: info for info in infos}
        read = [name.casefold() for name in self.infos if not name.startswith("code/")]  # the code is not read
        if len(self.infos) != len(infos) or len(set(read)) != len(read):
            raise CheckpointError("the zip has several records of one name")
        self._inflatable = _limit(data)

        self._starts, end = {}, 0
        for info in sorted(infos, key=lambda info: info.header_offset):
            start = self._starts[info.filename] = self._start(info)
            if info.header_offset < end or start + info.compress_size > len(data):
                raise CheckpointError(f"record {info.filename!r:.100} overlaps another, or the end of the file")
            end = start + info.compress_size

    def read(self, name: str) -> memoryview:
        """A record's bytes: a view of the file unless they are compressed, which PyTorch never does with tensors.

        The CRC is checked only of what is compressed: PyTorch checks none, and to do it would read every tensor twice.
        """
        if name not in self.infos:
            raise CheckpointError(f"record {name!r:.100} is missing")
        info = self.infos[name]
        start = self._starts[info.filename]
        content = memoryview(self._data)[start : start + info.compress_size]
        if info.compress_type == zipfile.ZIP_STORED and info.file_size == info.compress_size:
            return content
        if info.compress_type != zipfile.ZIP_DEFLATED:
            raise CheckpointError(f"record {name!r:.100} is compressed by method {info.compress_type}; expected 0 or 8")
        self._inflatable -= info.file_size
        if self._inflatable < 0:
            raise CheckpointError(
                f"record {name!r:.100} would unzip to {info.file_size:,} bytes: too many for this file"
            )
        inflated = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, info.file_size + 1)
        if len(inflated) != info.file_size or zlib.crc32(inflated) != info.CRC:
            raise CheckpointError(f"record {name!r:.100} is damaged: it has another size or CRC than the zip says")
        return memoryview(bytearray(inflated))

    def _start(self, info: zipfile.ZipInfo) -> int:
        """Where a record's bytes start. Only its local header tells: PyTorch pads that one, to align tensors."""
        header = info.header_offset
        signature, flags, method, name_length, extra_length = LOCAL_HEADER.unpack_from(self._data, header)
        name_start = header + LOCAL_HEADER.size
        name = self._data[name_start : name_start + name_length].decode("utf-8" if flags & UTF8 else "cp437")
        expected = (b"PK\3\4", info.compress_type, info.orig_filename, info.flag_bits)
        if (signature, method, name, flags) != expected or flags & ENCRYPTED:
            raise CheckpointError(f"record {info.filename!r:.100} is encrypted, or is not what the zip's index says")
        return name_start + name_length + extra_length


def _limit(data: mmap) -> int:
    """Bytes that all tensors of a file may take. A few may share a storage; a bomb repeats one without end."""
    return 4 * len(data) + (1 << 20)


def _tensors(views: dict[str, View], read: Callable[[str], memoryview], limit: int) -> dict[str, Tensor]:
    """Views of storages, each of which `read` gives by its key. Tensors that shared a storage still do."""
    tensors, flat = {}, {}
    for name, view in views.items():
        _check(name, view)
        storage, offset, size, stride = view
        limit -= math.prod(size) * storage.dtype.itemsize
        if limit < 0:
            raise CheckpointError(f"with {name!r:.100} its tensors would take far more memory than the file has bytes")
        if storage not in flat:
            flat[storage] = _flat(storage, read)
        tensors[name] = torch.as_strided(flat[storage], size, stride, offset)
    return tensors


def _flat(storage: Storage, read: Callable[[str], memoryview]) -> Tensor:
    data, nbytes = read(storage.key), storage.numel * storage.dtype.itemsize
    if len(data) != nbytes:
        raise CheckpointError(f"storage {storage.key!r:.100} has {len(data):,} bytes; expected {nbytes:,}")
    if not storage.numel:
        return torch.empty(0, dtype=storage.dtype)
    return torch.frombuffer(data, dtype=storage.dtype, count=storage.numel)


def _check(name: str, view: View) -> None:
    """Raise unless the view stays within its storage."""
    storage, offset, size, stride = view
    valid = isinstance(storage, Storage) and type(size) is type(stride) is tuple and len(size) == len(stride)
    valid = valid and len(size) <= MAX_DIMENSIONS and all(type(n) is int and n >= 0 for n in (offset, *size, *stride))
    if not valid:
        raise CheckpointError(f"tensor {name!r:.100} is not a view of a storage, or its shape makes no sense")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if math.prod(size) else offset - 1
    if last >= storage.numel:
        raise CheckpointError(f"tensor {name!r:.100} reaches beyond its storage of {storage.numel:,} elements")
