"""Reads a file of tensors of any format. Nothing in it is trusted, and nothing is in memory twice."""

from __future__ import annotations

import gzip
import json
import mmap
import re
import struct
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import safetensors
import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor

from miniclip.errors import MiniclipWarning
from miniclip.weights.archive import LEGACY_MAGIC, MAX_NAME, read_legacy, read_zip
from miniclip.weights.errors import CheckpointError
from miniclip.weights.fields import Fields
from miniclip.weights.names import WRAPPERS

DTYPES = {  # in safetensors' spelling
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
ADAPTER = re.compile(r"(^|\.)lora_")  # in the names that peft and diffusers give
CONFIG_KEY = "miniclip_config"  # in a safetensors file's metadata: the config, as `miniclip.config.to_json` has it
CONFIG_FILE = "miniclip.json"  # in a directory: the same
MAX_UNZIPPED = 1 << 26  # bytes; only the tiny models that come with the package are .gz
MAX_TENSORS = 50_000  # the largest real CLIP has 1,353; building a model takes up to a millisecond a tensor


class Checkpoint(Mapping[str, Tensor]):
    """Tensors by name. They are views of the file, to be copied and not to be written to.

    Values come from the file whenever they are used, and each look-up lets go of the memory that the values used before
    it took. So copying tensors one by one costs no more memory than the copies and the largest tensor.
    """

    def __init__(self, tensors: dict[str, Tensor], maps: list[mmap.mmap], metadata: Mapping[str, str] | None = None):
        self._tensors = tensors
        self._maps = maps
        self.metadata = dict(metadata or {})  # a safetensors file's

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        if hasattr(mmap, "MADV_DONTNEED"):  # not on Windows, which does it by itself when memory runs short
            for data in self._maps:
                data.madvise(mmap.MADV_DONTNEED)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def read_file(path: str | Path) -> Checkpoint:
    """The tensors of a checkpoint, under the names that they have in it, without `WRAPPERS` that all names begin with.

    path: a TorchScript archive; a state dict that torch.save wrote, also one that is a value of a training checkpoint's
    dict; a safetensors file; or the index of weights in several such files. The content decides which, but an index is
    *.json.

    Raises CheckpointError that names the file and its fault: missing, cut off, damaged or hostile. Nothing in a file is
    ever run. It takes time and memory in proportion to the file. Once its tensors are copied, the file may change or
    go; if it is cut before, the system ends the process (SIGBUS), as with every memory-mapped file.
    """
    path = Path(path)
    tensors, maps, metadata = _read_shards(path) if path.suffix == ".json" else _read_tensors(path)
    tensors.pop("n_averaged", None)  # beside the moving average of torch.optim.swa_utils.AveragedModel
    if not tensors:
        raise CheckpointError(f"{path} has no tensors")
    if adapters := sum(map(bool, map(ADAPTER.search, tensors))):
        raise CheckpointError(
            f"{path}: {adapters} of {len(tensors)} tensors are of LoRA adapters, which are not merged into the "
            "weights: merge them (peft: model.merge_and_unload()), and save the state dict of the result"
        )
    return Checkpoint(_without_wrappers(tensors, path), maps, metadata)


def _without_wrappers(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The tensors without the prefixes that all names have of the modules which the model was wrapped in."""
    start = 0
    first = min(tensors)
    while prefix := next((each for each in WRAPPERS if first.startswith(each, start)), ""):
        if not all(name.startswith(prefix, start) for name in tensors):
            break
        start += len(prefix)
    if start:
        warnings.warn(f"{path}: all names begin with {first[:start]}, which is left out", MiniclipWarning, stacklevel=3)
        return {name[start:]: tensor for name, tensor in tensors.items()}
    return tensors


def _read_shards(index: Path) -> tuple[dict[str, Tensor], list[mmap.mmap], dict[str, str]]:
    names = defaultdict(set)  # by shard
    for name, shard in Fields.read(index).section("weight_map").values.items():
        names[str(shard)].add(name)
    tensors, maps = {}, []
    for shard, expected in sorted(names.items()):
        if shard != Path(shard).name:
            raise CheckpointError(f"{index} refers to {shard!r:.200}; expected the name of a file beside it")
        part, data, _ = _read_tensors(index.parent / shard)
        if part.keys() != expected:
            wrong = ", ".join(sorted(part.keys() ^ expected)[:5])
            raise CheckpointError(f"{index} and {shard} disagree on which tensors it has, among them {wrong:.500}")
        tensors |= part
        maps += data
    return tensors, maps, {}


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], list[mmap.mmap], dict[str, str]]:
    """The tensors of one file, the maps that they are views of, and a safetensors file's metadata."""
    try:
        if path.exists() and not path.is_file():
            raise CheckpointError("not a file but a directory or device: name the file of weights")
        with path.open("rb") as file:
            if file.seek(0, 2) == 0:
                raise CheckpointError("the file is empty: fetch it again")
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # private, so that nothing changes the file
            tensors, metadata = _read_mapped(path, file, data)
        if longest := next((name for name in tensors if len(name) > MAX_NAME), None):
            raise CheckpointError(f"the name {longest:.50}... has {len(longest):,} characters; expected {MAX_NAME:,}")
    except CheckpointError as fault:
        raise CheckpointError(f"{path}: {fault}") from None
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror or error}") from None
    except Exception as error:  # hostile bytes make zipfile, struct, safetensors and our own code raise many types
        fault = f"{type(error).__name__}: {error!s:.300}"
        raise CheckpointError(f"{path} is damaged, or not a checkpoint: {fault}") from error
    return tensors, [data], metadata


def _read_mapped(path: Path, file: BinaryIO, data: mmap.mmap) -> tuple[dict[str, Tensor], dict[str, str]]:
    if sys.byteorder != "little":
        raise CheckpointError("checkpoints are little-endian, and this machine is not")
    if data[:4] == b"PK\3\4":
        return read_zip(file, data), {}
    if data[: len(LEGACY_MAGIC)] == LEGACY_MAGIC:
        return read_legacy(data), {}
    if data[8:9] == b"{":  # after the length of the header
        return _read_safetensors(path, data)
    if data[:2] == b"\x1f\x8b":
        with gzip.open(path) as unzipped:
            content = unzipped.read(MAX_UNZIPPED + 1)
        if len(content) > MAX_UNZIPPED:
            raise CheckpointError(f"it unzips to more than {MAX_UNZIPPED:,} bytes: unzip it first")
        return load_safetensors(content), _header(content)[0].get("__metadata__", {})
    raise CheckpointError(
        f"it starts with {data[:16]!r}, as neither a PyTorch file nor safetensors does. "
        "A web page instead of the file? Then fetch it again"
    )


def _header(data: bytes | mmap.mmap) -> tuple[dict, int]:
    """A safetensors file's header, already checked, and where the tensors begin."""
    start = 8 + struct.unpack_from("<Q", data)[0]
    return json.loads(data[8:start]), start


def _read_safetensors(path: Path, data: mmap.mmap) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safetensors.safe_open(path, "numpy"):  # checks that the header is sound and the tensors fill the file exactly
        pass
    header, start = _header(data)
    metadata = header.pop("__metadata__", {})
    if len(header) > MAX_TENSORS:
        raise CheckpointError(f"it has {len(header):,} tensors; expected at most {MAX_TENSORS:,}")
    body = memoryview(data)[start:]
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise CheckpointError(f"tensor {name!r:.100} is {entry['dtype']}; expected one of {', '.join(DTYPES)}")
        dtype, (begin, end) = DTYPES[entry["dtype"]], entry["data_offsets"]
        flat = torch.frombuffer(body[begin:end], dtype=dtype) if begin < end else torch.empty(0, dtype=dtype)
        tensors[name] = flat.view(entry["shape"])
    return tensors, metadata
