"""`read_file`: any format in, by its content; every broken or hostile file is one kind of error; memory is bounded."""

from __future__ import annotations

import gzip
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file
from test_archive import hostile_archives

from miniclip.weights.errors import CheckpointError
from miniclip.weights.files import MAX_UNZIPPED, read_file

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated:DeprecationWarning")

STATE = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(3).half(), "c": torch.tensor(3), "d": torch.empty(0, 2)}


def scripted(path):
    module = torch.nn.Module()
    for name, tensor in STATE.items():
        module.register_buffer(name, tensor)
    torch.jit.script(module).save(path)


FORMATS = {
    "torchscript": scripted,
    "zip": lambda path: torch.save(STATE, path),
    "legacy": lambda path: torch.save(STATE, path, _use_new_zipfile_serialization=False),
    "safetensors": lambda path: save_file(STATE, path, {"format": "pt"}),
}
each_format = pytest.mark.parametrize("format", FORMATS)


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    """The bytes of a file of each format."""
    folder, contents = tmp_path_factory.mktemp("honest"), {}
    for name, write in FORMATS.items():
        write(folder / name)
        contents[name] = (folder / name).read_bytes()
    return contents


def written(path, content):
    path.write_bytes(content)
    return path


def same(got, expected):
    return got.keys() == expected.keys() and all(
        got[name].dtype == expected[name].dtype and torch.equal(got[name], expected[name]) for name in expected
    )


def refuse(path, fault=None):
    with pytest.raises(CheckpointError, match=fault) as caught:
        read_file(path)
    assert str(path) in str(caught.value)


@each_format
@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ""])
def test_the_content_decides_the_format(tmp_path, honest, format, suffix):
    path = written(tmp_path / f"weights{suffix}", honest[format])
    assert same(read_file(path), STATE)
    assert same(read_file(str(path)), STATE)
    assert not same(read_file(path), {**STATE, "c": torch.tensor(4)})  # a control


@each_format
def test_copies_do_not_need_the_file(tmp_path, honest, format):
    path = written(tmp_path / "f", honest[format])
    checkpoint = read_file(path)
    checkpoint["a"].zero_()  # views are private: this does not write to the file
    assert path.read_bytes() == honest[format]
    checkpoint = read_file(path)
    copies = {name: tensor.clone() for name, tensor in checkpoint.items()}
    del checkpoint
    with path.open("r+b") as file:  # in place: a map would see it, or be gone
        file.write(b"\xff" * len(honest[format]))
        file.truncate(1)
    assert same(copies, STATE)


def test_gzip(tmp_path):
    assert same(read_file(written(tmp_path / "s.gz", gzip.compress(save(STATE)))), STATE)
    refuse(written(tmp_path / "s.gz", gzip.compress(bytes(MAX_UNZIPPED + 1))), "unzips to more than")
    refuse(written(tmp_path / "s.gz", gzip.compress(save(STATE))[:-9]))
    refuse(written(tmp_path / "s.gz", gzip.compress(b"hello")))


@each_format
def test_every_dtype_and_module_prefix(tmp_path, format):
    names = ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"]
    state = {f"module.{name}": torch.tensor([0, 1, 1]).to(getattr(torch, name)) for name in names}
    if format == "safetensors":
        save_file(state, tmp_path / "f")
    else:
        torch.save(state, tmp_path / "f", _use_new_zipfile_serialization=format != "legacy")
    assert same(read_file(tmp_path / "f"), {name[7:]: tensor for name, tensor in state.items()})
    state["other"] = torch.ones(1)  # then `module.` is part of the names
    save_file(state, tmp_path / "f")
    assert same(read_file(tmp_path / "f"), state)


# Broken and hostile files -----------------------------------------------------------------------------------------


@each_format
def test_every_cut_is_noticed(tmp_path, honest, format):
    content = honest[format]
    for length in {*range(0, len(content), max(1, len(content) // 150)), len(content) - 1}:
        refuse(written(tmp_path / "f", content[:length]))


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "empty"),
        (b"\n", "starts with"),
        (b"<!DOCTYPE html><html><body>404 Not Found</body></html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4665", "starts with b'version https"),
        (b"\x80\x02}q\x00.", "starts with"),
        (bytes(range(256)) * 9, "starts with"),
        (struct.pack("<Q", 1 << 60) + b"{", "header too"),
        (struct.pack("<Q", 1 << 60) + b"{" + b" " * 1000, "header too large"),
        (struct.pack("<Q", (1 << 64) - 1) + b"{}", "header too large"),
        (struct.pack("<Q", 1 << 16) + b"{" * (1 << 16), "damaged"),
        (struct.pack("<Q", 2) + b"{}x", "damaged"),
        (struct.pack("<Q", 2) + b"{}", "no tensors"),
        (b"PK\5\6" + bytes(18), "starts with"),
    ],
)
def test_what_is_no_checkpoint(tmp_path, content, fault):
    refuse(written(tmp_path / "f.pt", content), fault)


def test_paths_that_are_no_file(tmp_path):
    refuse(tmp_path, "not a file")
    refuse(tmp_path / "missing.pt", "No such file")
    refuse(written(tmp_path / "f.pt", b"x") / "inside.pt", "Not a directory")
    refuse(tmp_path / ("long" * 1000), "name too long")
    refuse("/dev/null" if os.path.exists("/dev/null") else tmp_path, "not a file")
    with pytest.raises(CheckpointError, match="null"):
        read_file("a\0b")


def test_unreadable_file(tmp_path, monkeypatch):
    path = written(tmp_path / "f.pt", b"x")

    def refuse_to_open(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse_to_open)  # chmod would not keep root out
    refuse(path, "can't be read: Permission denied")


def test_random_bytes(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for head in (b"", b"PK\3\4", b"\x1f\x8b", struct.pack("<Q", 100) + b"{"):
        for _ in range(20):
            noise = torch.randint(256, (500,), dtype=torch.uint8, generator=generator)
            refuse(written(tmp_path / "f", head + bytes(noise.tolist())))


def entry(begin, end, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": (begin, end)}


@pytest.mark.parametrize(
    "header",
    [
        {"a": entry(0, 8), "b": entry(4, 12)},  # overlap
        {"a": entry(0, 8), "b": entry(0, 8)},
        {"a": entry(0, 8)},  # bytes of no tensor
        {"a": entry(4, 12)},
        {"a": entry(0, 16)},  # beyond the end, or of another length than the shape's
        {"a": entry(0, 1 << 40, (1 << 38,))},
        {"a": entry(0, 12)},
        {"a": entry(12, 0, (0,))},
        {"a": entry(0, 12, (1 << 40, 1 << 40))},
        {"a": entry(0, 12, (-3,))},
        {"a": entry(0, 12, (3,), "F99")},
        {"a": entry(0, 12, (12,), "F8_E4M3")},  # sound, but not among ours
        {"a": {"dtype": "F32"}},
        {"a": 1},
        [],
    ],
    ids=str,
)
def test_hostile_safetensors(tmp_path, header):
    def content(header):
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + bytes(12)

    refuse(written(tmp_path / "f.safetensors", content(header)))
    assert list(read_file(written(tmp_path / "f", content({"a": entry(0, 12, (3,))})))) == ["a"]  # a control


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@each_format
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_flipped_bytes_give_other_values_or_an_error(scratch, honest, format, data):
    content = bytearray(honest[format])
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        checkpoint = read_file(written(scratch / format, content))
    except CheckpointError:
        return
    for tensor in checkpoint.values():
        assert tensor.clone().nbytes < 1 << 21


# Weights in several files -----------------------------------------------------------------------------------------


def shards(folder, weight_map, write=save_file):
    for file in {"x", "y"}:
        write({name: tensor for name, tensor in STATE.items() if (name == "a") == (file == "x")}, folder / file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


IN_SHARDS = {"a": "x", "b": "y", "c": "y", "d": "y"}


@pytest.mark.parametrize("write", [save_file, torch.save])
def test_shards(tmp_path, write):
    assert same(read_file(shards(tmp_path, IN_SHARDS, write)), STATE)
    (tmp_path / "y").rename(tmp_path / "elsewhere")
    (tmp_path / "y").symlink_to(tmp_path / "elsewhere")  # as in the Hugging Face cache
    assert same(read_file(tmp_path / "model.safetensors.index.json"), STATE)


@pytest.mark.parametrize(
    ("weight_map", "fault"),
    [
        ({**IN_SHARDS, "a": "../../etc/passwd"}, "expected the name of a file"),
        ({**IN_SHARDS, "a": "/etc/passwd"}, "expected the name of a file"),
        ({**IN_SHARDS, "a": "./x"}, "expected the name of a file"),
        ({**IN_SHARDS, "a": ".."}, "not a file"),
        ({**IN_SHARDS, "a": ""}, "expected the name of a file|not a file"),
        ({**IN_SHARDS, "a": "missing"}, "missing can't be read"),
        ({**IN_SHARDS, "a": "model.safetensors.index.json"}, "starts with"),
        ({**IN_SHARDS, "a": "y"}, "disagree"),
        ({**IN_SHARDS, "e": "y"}, "y disagree .* e"),
        ({"a": "x", "b": "y", "c": "y"}, "y disagree .* d"),
        ({**IN_SHARDS, "a": 7}, "7 can't be read"),
        ({**IN_SHARDS, "a": ["x"]}, r"\['x'\] can't be read"),
        ([], "weight_map"),
        ({}, "no tensors"),
    ],
    ids=str,
)
def test_hostile_index(tmp_path, weight_map, fault):
    with pytest.raises(CheckpointError, match=fault) as caught:
        read_file(shards(tmp_path, weight_map))
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 100_000, b"\xff", b"[]", b"{}", b'{"weight_map": {"a": null}}'])
def test_an_index_that_is_none(tmp_path, content):
    path = written(tmp_path / "model.safetensors.index.json", content)
    with pytest.raises(CheckpointError):
        read_file(path)


# Memory -----------------------------------------------------------------------------------------------------------

MIB = 1 << 20
MEASURE = """
import re, sys
from pathlib import Path
import torch
from miniclip.weights.errors import CheckpointError
from miniclip.weights.files import read_file

torch.set_num_threads(1)
torch.ones(1).half().float()

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024  # MiB

before = peak()
"""
on_linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads peak memory from /proc")


def measure(code, argument):
    """The numbers that `code` prints in a fresh process."""
    run = [sys.executable, "-c", MEASURE + code, str(argument)]
    return [float(line) for line in subprocess.run(run, check=True, capture_output=True, text=True).stdout.split()]


@on_linux
def test_peak_memory_of_a_load(tmp_path):
    """48 MiB of float16 that become 96 MiB of float32: no more than 1.3 times that, in any format."""
    state = {f"{i}.weight": torch.full((MIB,), i).half() for i in range(24)}
    save_file(state, tmp_path / "safetensors")
    torch.save(state, tmp_path / "zip")
    torch.save(state, tmp_path / "legacy", _use_new_zipfile_serialization=False)
    code = """
import os

def load(tensors):
    {name: tensor.to(torch.float32, copy=True) for name, tensor in tensors.items()}

for path in Path(sys.argv[1]).iterdir():
    if not os.fork():  # a new process, whose peak is its own
        before = peak()
        load(read_file(path))
        print(peak() - before)
        load(read_file(path)._tensors)  # a control: without letting go of the file's memory it is more
        print(peak() - before, flush=True)
        os._exit(0)
    os.wait()
"""
    peaks = measure(code, tmp_path)
    assert len(peaks) == 6
    for letting_go, holding_on in zip(peaks[::2], peaks[1::2], strict=True):
        assert 90 < letting_go < 1.3 * 96
        assert holding_on > 1.4 * 96


@on_linux
def test_hostile_files_take_little_memory(tmp_path):
    for path in hostile_archives(tmp_path, tmp_path / "canary"):
        assert path.stat().st_size < 2 * MIB
    (tmp_path / "header.pt").write_bytes(struct.pack("<Q", 1 << 60) + b"{" + b" " * 1000)
    code = """
for path in sorted(Path(sys.argv[1]).iterdir()):
    try:
        read_file(path)
        sys.exit(f"{path} was read")
    except CheckpointError:
        pass
print(peak() - before)
"""
    assert measure(code, tmp_path)[0] < 128
    assert not (tmp_path / "canary").exists()
