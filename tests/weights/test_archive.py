"""PyTorch's own files: what honest ones hold comes out, and hostile ones are refused without doing anything."""

from __future__ import annotations

import argparse
import io
import os
import pickle
import re
import struct
import tarfile
import time
import tracemalloc
import warnings
import zipfile
import zlib
from collections import Counter, OrderedDict, defaultdict
from contextlib import suppress
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from miniclip.weights.errors import CheckpointError
from miniclip.weights.files import read_file
from miniclip.weights.unpickle import GLOBALS, INERT, MAX_OPCODES, unpickle

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated:DeprecationWarning")


class Leaf(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4).to(dtype))
        self.register_buffer("count", torch.tensor(7))
        self.act = nn.ReLU()

    def forward(self, x):
        return self.act(x + self.weight.sum().float() + self.count)


class Tree(nn.Module):
    """Every way in which a tensor can lie in its storage, and children that are shared or have no tensors."""

    def __init__(self):
        super().__init__()
        base = torch.arange(24.0)
        self.left, self.right = Leaf(torch.float16), Leaf(torch.bfloat16)
        self.tied = self.left
        self.transposed = nn.Parameter(base.view(4, 6).t())
        self.offset = nn.Parameter(base[5:17:2])
        self.scalar = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
        self.same = self.scalar
        self.register_buffer("expanded", torch.tensor([1.0, 2.0]).expand(5, 2))
        self.register_buffer("empty", torch.empty(0, 3))
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("bytes", torch.tensor([1, 255], dtype=torch.uint8))
        self.steps = [1, 2]

    def forward(self, x):
        return self.left(x) + self.right(x) + self.offset.sum()


def scripted(path, module=None):
    torch.jit.script(module or Tree()).save(path)
    return path


def saved(path, state, **options):
    torch.save(state, path, **options)
    return path


def rezip(path, change, compression=zipfile.ZIP_STORED):
    """Write the zip again, its records as the dict that `change` makes of the dict of all records."""
    with zipfile.ZipFile(path) as z:
        records = {name: z.read(name) for name in z.namelist()}
    with zipfile.ZipFile(path, "w", compression) as z:
        for name, content in (change(records) or records).items():
            z.writestr(name, content)
    return path


def replace_pickle(path, content):
    def change(records):
        records.update({name: content for name in records if name.endswith("/data.pkl")})

    return rezip(path, change)


def assert_same(got, expected):
    assert list(got) == list(expected)
    for name in expected:
        assert got[name].dtype == expected[name].dtype, name
        assert got[name].stride() == expected[name].stride(), name
        assert torch.equal(got[name], expected[name]), name


def test_torchscript_archive_gives_the_state_dict(tmp_path):
    path = scripted(tmp_path / "m.pt")
    got, expected = read_file(path), torch.jit.load(path).state_dict()
    assert_same(got, expected)
    assert got["tied.weight"].data_ptr() == got["left.weight"].data_ptr()  # shared storages still are
    assert got["same"].data_ptr() == got["scalar"].data_ptr()
    assert got["transposed"].untyped_storage().data_ptr() == got["offset"].untyped_storage().data_ptr()
    with pytest.raises(AssertionError):  # a control: the comparison sees one changed value
        assert_same({**got, "mask": ~got["mask"]}, expected)


def test_traced_archive(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Sequential(nn.Identity())).eval()
    torch.jit.trace(model, torch.zeros(1, 3, 8, 8)).save(tmp_path / "m.pt")
    assert_same(read_file(tmp_path / "m.pt"), model.state_dict())


def test_archive_of_an_older_pytorch(tmp_path):
    """OpenAI's files: no byteorder, version 3, tensors that were on a GPU, another name of the top-level folder."""
    path = scripted(tmp_path / "m.pt")
    expected = {name: tensor.clone() for name, tensor in read_file(path).items()}

    def age(records):
        old = {name.replace("m/", "archive/", 1): content for name, content in records.items()}
        del old["archive/byteorder"]
        old["archive/version"] = b"3\n"
        assert b"X\3\0\0\0cpu" in old["archive/data.pkl"]
        old["archive/data.pkl"] = old["archive/data.pkl"].replace(b"X\3\0\0\0cpu", b"X\6\0\0\0cuda:0")
        return {name: content for name, content in old.items() if ".data" not in name and "traced" not in name}

    got = read_file(rezip(path, age))
    assert list(got) == list(expected) and all(torch.equal(got[name], expected[name]) for name in expected)


def test_code_in_an_archive_is_never_compiled(tmp_path):
    def spoil(records):
        records.update({name: b"not TorchScript" for name in records if name.endswith(".py")})

    path = rezip(scripted(tmp_path / "m.pt"), spoil)
    with pytest.raises(RuntimeError):
        torch.jit.load(path)
    assert "left.weight" in read_file(path)


STATE = OrderedDict(a=torch.arange(6.0).view(2, 3), b=nn.Parameter(torch.ones(2).half()), c=torch.tensor(3))
STATE["d"] = STATE["a"].t()
ZIPPED, LEGACY = {}, {"_use_new_zipfile_serialization": False}
FORMATS = pytest.mark.parametrize("options", [ZIPPED, LEGACY], ids=["zip", "legacy"])


@FORMATS
@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
        lambda state: {"state_dict": state, "epoch": 3, "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}}},
        lambda state: {"model": {f"module.{name}": tensor for name, tensor in state.items()}, "args": ["x", 0.1, None]},
    ],
    ids=["plain", "module", "state_dict", "model"],
)
def test_state_dicts(tmp_path, options, wrap):
    assert_same(read_file(saved(tmp_path / "s.pt", wrap(STATE), **options)), STATE)


@FORMATS
def test_a_real_state_dict(tmp_path, options):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    checkpoint = {"epoch": 1, "state_dict": model.state_dict(), "optimizer": optimizer.state_dict()}
    assert_same(read_file(saved(tmp_path / "s.pt", checkpoint, **options)), model.state_dict())


def test_compressed_records_are_read_too(tmp_path):
    path = rezip(saved(tmp_path / "s.pt", STATE), lambda records: None, zipfile.ZIP_DEFLATED)
    assert_same(read_file(path), STATE)


@FORMATS
@pytest.mark.parametrize(
    ("state", "fault"),
    [
        ({}, "empty state dict"),
        ([torch.ones(1)], "a list"),
        (torch.ones(1), "a tensor;"),
        ({"a": torch.ones(1), "epoch": 3}, "'epoch': int"),
        ({"epoch": 3}, "'epoch': int"),
        ({"state_dict": {"a": torch.ones(1)}, "model": {"a": torch.ones(1)}}, "several state dicts .state_dict, model"),
        ({"a": torch.ones(2, dtype=torch.complex64)}, "torch.ComplexFloatStorage"),
        (nn.Linear(2, 2), "torch.nn.modules.linear.Linear.*model.state_dict()"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_a_state_dict(tmp_path, options, state, fault):
    with pytest.raises(CheckpointError, match=fault) as caught:
        read_file(saved(tmp_path / "s.pt", state, **options))
    assert str(tmp_path / "s.pt") in str(caught.value)


# Hostile pickles --------------------------------------------------------------------------------------------------


class Call:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Pickler(pickle.Pickler):
    def persistent_id(self, value):
        return value[1:] if isinstance(value, tuple) and value[:1] == ("persistent",) else None


def pickled(value):
    file = io.BytesIO()
    Pickler(file, protocol=2).dump(value)
    return file.getvalue()


def tensor(offset=0, size=(6,), stride=(1,), *rest, numel=6, key="0", kind=torch.FloatStorage, tag="storage"):
    storage = ("persistent", tag, kind, key, "cpu", numel)
    return Call(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, OrderedDict(), *rest)


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def colliding(i):
    """Opcodes of the i-th integer that has the hash 0."""
    value = (i * (2**61 - 1)).to_bytes(16, "little")
    return b"\x8a" + bytes([len(value)]) + value


def module(*attributes):
    """An object of a scripted class, remembered as 0, with (name, pickled value) attributes."""
    return b"c__torch__.M\nM\n)\x81q\0}(" + b"".join(text(name) + value for name, value in attributes) + b"ub"


def doubling_modules(levels):
    """Each module has the one before it twice: a file of a few hundred bytes with 2^levels names."""
    out = b"\x80\2c__torch__.M\nM\n)\x81q\0"
    for level in range(levels):
        child = b"h" + bytes([level])
        out += b"c__torch__.M\nM\n)\x81q" + bytes([level + 1]) + b"}(" + text("a") + child + text("b") + child + b"ub"
    return out + b"."


DOUBLING = b")" + b"q\0h\0h\0\x86" * 10_000  # twice a tuple of twice a tuple ...: small, but endless to print or hash

BAD_PICKLES = {  # each replaces the data.pkl of a file whose storage "0" has 24 bytes
    "os.system": lambda canary: pickled({"a": Call(os.system, f"touch {canary}")}),
    "exec": lambda canary: pickled({"a": Call(exec, f"open({str(canary)!r}, 'w')")}),
    "open": lambda canary: pickled([Call(open, str(canary), "w")]),
    "getattr": lambda canary: pickled({"a": Call(getattr, torch._utils._rebuild_tensor_v2, "__globals__")}),
    "protocol 4": lambda canary: pickle.dumps({"a": Call(os.system, f"touch {canary}")}, protocol=4),
    "protocol 0": lambda canary: pickle.dumps({"a": Call(os.system, f"touch {canary}")}, protocol=0),
    "inst": lambda canary: b"(S'touch " + str(canary).encode() + b"'\niposix\nsystem\n.",
    "extension": lambda canary: b"\x80\2\x82\1.",
    "call of a str": lambda canary: b"\x80\2" + text("os system") + text("x") + b"\x85R.",
    "call of an argument": lambda canary: pickled(tensor(0, (6,), (1,), {"conj": True})),
    "OrderedDict of arguments": lambda canary: pickled(Call(OrderedDict, [("a", 1)])),
    "state of a tensor": lambda canary: pickled(tensor())[:-1] + b"}b.",
    "key is a tuple": lambda canary: b"\x80\2})Ns.",
    "key is endless": lambda canary: b"\x80\2}" + DOUBLING + b"Ns.",
    "storage type is endless": lambda canary: b"\x80\2(" + text("storage") + DOUBLING + text("0") + b"NK\1tQ.",
    "items of a list": lambda canary: b"\x80\2]NaK\0Ns.",
    "items of a tensor": lambda canary: pickled(tensor())[:-1] + text("a") + b"Ns.",
    "INT that hides a bool": lambda canary: b"\x80\2}" + text("a") + b"I0x10\ns.",
    "storage too long": lambda canary: pickled({"a": tensor(numel=5, size=(5,))}),
    "keys of one hash": lambda canary: b"\x80\2}(" + b"".join(colliding(i) + b"N" for i in range(50_000)) + b"u.",
    "key twice": lambda canary: b"\x80\2}(" + (text("a") + b"N") * 2 + b"u.",
    "empty": lambda canary: b"",
    "no stop": lambda canary: pickled({"a": tensor()})[:-1],
    "underflow": lambda canary: b"\x80\2R.",
    "no mark": lambda canary: b"\x80\2t.",
    "no memo": lambda canary: b"\x80\2h\7.",
    "self": lambda canary: b"\x80\2]q\0h\0a.",
    "deep lists": lambda canary: b"\x80\2" + b"]" * 100_000 + b"a" * 99_999 + b".",
    "deep tuples": lambda canary: b"\x80\2)" + b"\x85" * 100_000 + b".",
    "endless": lambda canary: b"\x80\2" + DOUBLING + b".",
    "endless value": lambda canary: b"\x80\2}" + text("a") + DOUBLING + b"s.",
    "endless size": lambda canary: pickled({"a": tensor(0, 7777)}).replace(b"Ma\x1e", DOUBLING),
    "endless arguments": lambda canary: b"\x80\2ccollections\nOrderedDict\n" + DOUBLING + b"R.",
    "long memo": lambda canary: b"\x80\2}r\xff\xff\xff\xff.",
    "long str": lambda canary: b"\x80\2X\xff\xff\xff\x7f.",
    "long bytes": lambda canary: b"\x80\4\x8e" + struct.pack("<Q", 1 << 60) + b".",
    "many opcodes": lambda canary: b"\x80\2" + b"}" * (MAX_OPCODES + 10) + b".",
    "long int": lambda canary: pickled({"a": tensor(1 << 2000)}),
    "storage of another kind": lambda canary: pickled({"a": tensor(kind=torch._utils._rebuild_tensor)}),
    "not a storage": lambda canary: pickled({"a": tensor(tag="module")}),
    "other record": lambda canary: pickled({"a": tensor(key="../../../etc/passwd")}),
    "storage too short": lambda canary: pickled({"a": tensor(numel=7)}),
    "storage of 2^62": lambda canary: pickled({"a": tensor(numel=1 << 62)}),
    "negative storage": lambda canary: pickled({"a": tensor(numel=-1)}),
    "negative offset": lambda canary: pickled({"a": tensor(-1)}),
    "offset too large": lambda canary: pickled({"a": tensor(1)}),
    "negative size": lambda canary: pickled({"a": tensor(0, (-6,))}),
    "negative stride": lambda canary: pickled({"a": tensor(5, (6,), (-1,))}),
    "size too large": lambda canary: pickled({"a": tensor(0, (2, 4), (3, 1))}),
    "size is a float": lambda canary: pickled({"a": tensor(0, (6.0,))}),
    "size is a bool": lambda canary: pickled({"a": tensor(0, (True,))}),
    "size is a dict": lambda canary: pickled({"a": tensor(0, {})}),
    "fewer strides": lambda canary: pickled({"a": tensor(0, (2, 3), (1,))}),
    "many dimensions": lambda canary: pickled({"a": tensor(0, (1,) * 10_000, (1,) * 10_000)}),
    "expanded to 2^60": lambda canary: pickled({"a": tensor(0, (1 << 60,), (0,))}),
    "expanded often": lambda canary: pickled({str(i): tensor(0, (1 << 17,), (0,)) for i in range(100)}),
    "stride of 2^62": lambda canary: pickled({"a": tensor(0, (4, 2), (1 << 62, 1))}),
    "stride of 2^80": lambda canary: pickled({"a": tensor(0, (1, 2), (1 << 80, 1))}),
    "offset on a storage": lambda canary: pickled({"a": Call(torch._utils._rebuild_tensor, "x", 0, (1,), (1,))}),
    "nested too far": lambda canary: pickled({"state_dict": {"state_dict": {"a": tensor()}}}),
}
MIB = 1 << 20
TENSOR = pickled(tensor())[2:-1]  # without the opcodes that begin and end a pickle
BAD_MODULES = {  # the same for a TorchScript archive
    "not a module": lambda: pickled({"a": tensor()}),
    "contains itself": lambda: b"\x80\2" + module(("a", b"h\0")) + b".",
    "2^200 names": lambda: doubling_modules(200),
    "long names": lambda: b"\x80\2" + module(("x" * MIB, TENSOR), *((str(i), b"h\0") for i in range(1000))) + b".",
    "empty modules without end": lambda: b"\x80\2" + module(("", b"h\0")) + b".",
    "name twice": lambda: b"\x80\2" + module(("a.b", TENSOR), ("a", module(("b", TENSOR)))) + b".",
    "os.system": lambda: pickled({"a": Call(os.system, "touch canary")}),
}


def hostile_archives(folder, canary):
    for name, make in BAD_PICKLES.items():
        yield replace_pickle(saved(folder / f"{name}.pt", {"a": torch.arange(6.0)}), make(canary))
    for name, make in BAD_MODULES.items():
        yield replace_pickle(scripted(folder / f"module {name}.pt", Leaf(torch.float32)), make())


def test_hostile_pickles(tmp_path):
    canary, previous = tmp_path / "canary", time.monotonic()
    for path in hostile_archives(tmp_path, canary):
        with pytest.raises(CheckpointError) as caught:
            read_file(path)
        assert str(path) in str(caught.value) and len(str(caught.value)) < 1000
        assert not canary.exists() and not os.path.exists("canary"), path
        previous, seconds = time.monotonic(), time.monotonic() - previous
        assert seconds < 10, path


def test_the_hostile_pickles_would_have_worked(tmp_path):
    """A control: Python's own reader runs the calls, and the parts that the bad tensors are made of are right."""
    pickle.loads(BAD_PICKLES["os.system"](tmp_path / "canary"))
    assert (tmp_path / "canary").exists()
    path = replace_pickle(saved(tmp_path / "s.pt", {"a": torch.arange(6.0)}), pickled({"a": tensor(1, (2,), (3,))}))
    assert read_file(path)["a"].tolist() == [1.0, 4.0]
    leaf = module(("b", pickled(tensor(kind=torch.LongStorage, numel=1, size=(), stride=(), key="1"))[2:-1]))
    path = replace_pickle(scripted(tmp_path / "m.pt", Leaf(torch.float32)), b"\x80\2" + module(("a", leaf)) + b".")
    assert list(read_file(path)) == ["a.b"]


def test_what_was_refused_is_named(tmp_path):
    path = replace_pickle(saved(tmp_path / "s.pt", STATE), BAD_PICKLES["os.system"](tmp_path / "canary"))
    with pytest.raises(CheckpointError, match=rf"s\.pt: refused {os.name}\.system.*nothing was run"):
        read_file(path)


def test_hostile_legacy_file(tmp_path):
    path = saved(tmp_path / "s.pt", {"a": Call(os.system, f"touch {tmp_path / 'canary'}")}, **LEGACY)
    with pytest.raises(CheckpointError, match=r"refused \w+\.system"):
        read_file(path)
    honest = saved(path, {"a": torch.arange(6.0)}, **LEGACY).read_bytes()
    for length in (5, 7, -1, 1 << 62):
        path.write_bytes(honest[:-32] + struct.pack("<q", length) + honest[-24:])
        with pytest.raises(CheckpointError, match="length"):
            read_file(path)
    start = honest.rindex(b"\x80\2]")
    for keys in (["0"], [0], [("0",)], "0", 0, {}):
        path.write_bytes(honest[:start] + pickled(keys) + honest[-32:])
        with pytest.raises(CheckpointError):
            read_file(path)
    assert not (tmp_path / "canary").exists()


def test_the_closed_list():
    """Whoever adds to it must think again: no name may be one that a pickle could do anything with."""
    assert len(GLOBALS - INERT) == 19
    assert {name.split()[0] for name in GLOBALS - INERT} == {
        *("torch", "torch._utils", "torch.jit._pickle", "collections"),
    }
    assert len(INERT) == 37
    modules = {"argparse", "collections", "_codecs", "torch", "numpy", "__builtin__"}
    assert {name.split()[0] for name in INERT} - modules == {"numpy.core.multiarray", "numpy._core.multiarray"}


# What people save beside a state dict -------------------------------------------------------------------------------

BESIDE = {
    "numpy scalar": np.float64(0.5),
    "numpy array": np.arange(3),
    "Namespace": argparse.Namespace(lr=0.1, tags=["a"]),
    "device": torch.device("cuda:0"),
    "Size": torch.Size([2, 3]),
    "dtype": torch.bfloat16,
    "set": {1, 2},
    "frozenset": frozenset("ab"),
    "defaultdict": defaultdict(list, a=[1]),
    "Counter": Counter("aab"),
    "bytes": b"\0\xff",
    "bytearray": bytearray(b"ab"),
    "complex": 1j,
    "range": range(3),
    "tensor": torch.tensor(0.9),
    "None": None,
    "nested": {"a": [np.int64(3), {"b": (torch.device("cpu"),)}]},
}


@FORMATS
@pytest.mark.parametrize("name", BESIDE)
def test_what_lies_beside_a_state_dict_is_ignored(tmp_path, options, name):
    path = saved(tmp_path / "s.pt", {"state_dict": STATE, "best": BESIDE[name], 3: BESIDE[name]}, **options)
    assert_same(read_file(path), STATE)


def test_nothing_is_called_for_what_is_ignored(monkeypatch):
    """The classes and functions are replaced by one that raises: Python's reader calls it, ours does not."""
    calls = []
    for name in sorted(INERT):
        module, attribute = name.replace("__builtin__", "builtins").split()
        if module == "builtins" or not find_spec(module.split(".")[0]):
            continue
        data = f"\x80\2c{module}\n{attribute}\n".encode("latin-1") + text("uint8") + b"\x85R}b."
        with monkeypatch.context() as patched, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                patched.setattr(f"{module}.{attribute}", lambda *arguments, name=name: calls.append(name))
            except (AttributeError, ImportError):  # of the other numpy
                continue
            assert unpickle(data).value.__class__.__name__ == "Inert"
            assert calls == []
            with suppress(Exception):  # of None, which gets a state
                pickle.loads(data)
            assert calls.pop() == name


def test_a_class_that_is_not_listed_is_refused(tmp_path):
    for value in (Path("x"), datetime.now(), OrderedDict):
        with pytest.raises(CheckpointError, match=r"refused .*nothing was run"):
            read_file(saved(tmp_path / "s.pt", {"state_dict": STATE, "other": Call(type, value)}))


@pytest.mark.parametrize("key", ["model_state_dict", "ema_state_dict", "net", "weights of mine"])
def test_the_one_state_dict_is_found(tmp_path, key):
    path = saved(tmp_path / "s.pt", {key: STATE, "args": {"x": 1}, "ema_decay": torch.tensor(0.9), "model": {"a": 1}})
    assert_same(read_file(path), STATE)


def test_several_state_dicts_are_named(tmp_path):
    for keys in (("state_dict", "model"), ("mine", "yours")):
        with pytest.raises(CheckpointError, match=rf"several state dicts \({keys[0]}, {keys[1]}\): save the one"):
            read_file(saved(tmp_path / "s.pt", dict.fromkeys(keys, STATE)))
    assert_same(read_file(saved(tmp_path / "s.pt", {"state_dict": STATE, "scaler": {"scale": torch.ones(1)}})), STATE)


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "model.", "clip.", "base_model.model.", "module._orig_mod.clip."]
)
def test_what_all_names_begin_with_is_left_out_and_said(tmp_path, prefix):
    path = saved(tmp_path / "s.pt", {f"{prefix}{name}": tensor for name, tensor in STATE.items()})
    with pytest.warns(UserWarning, match=rf"s\.pt: all names begin with {re.escape(prefix)}, which is left out"):
        assert_same(read_file(path), STATE)


def test_a_scripted_class_without_a_module(tmp_path):
    path = scripted(tmp_path / "m.pt", Leaf(torch.float32))

    def rename(records):
        data = next(name for name in records if name.endswith("/data.pkl"))
        records[data] = re.sub(rb"c__torch__[\w.]*\n\w+\n", b"c__torch__\nMine\n", records[data])

    assert list(read_file(rezip(path, rename))) == ["weight", "count"]


# Hostile zips -----------------------------------------------------------------------------------------------------


def without(ending):
    return lambda records: {name: content for name, content in records.items() if not name.endswith(ending)}


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (without("data.pkl"), "without data.pkl"),
        (without("data/0"), "'data/0' is missing"),
        (lambda records: {**records, "other/data/0": b"x"}, "2 top-level folders"),
        (lambda records: {"a.txt": b"x"}, "without data.pkl"),
        (lambda records: {**records, "s/byteorder": b"big"}, "little-endian"),
        (lambda records: {**records, "s/data/0": records["s/data/0"][:-1]}, "23 bytes; expected 24"),
        (lambda records: {**records, "s/data.pkl": b" " * (1 << 24) + b"}"}, "more than 16,777,216 bytes"),
    ],
)
def test_zips_with_other_records(tmp_path, change, fault):
    with pytest.raises(CheckpointError, match=fault):
        read_file(rezip(saved(tmp_path / "s.pt", STATE), change))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_record_that_is_there_twice(tmp_path):
    path = saved(tmp_path / "s.pt", STATE)
    with zipfile.ZipFile(path, "a") as z:
        z.writestr("s/data/0", b"x" * 24)
    with pytest.raises(CheckpointError, match="several records of one name"):
        read_file(path)


def test_decompression_bomb(tmp_path):
    state = {"a": torch.zeros(1 << 22)}
    for part, fault in (slice(None), "far more memory"), (slice(1), "would unzip to 16,777,216 bytes"):
        path = saved(tmp_path / "s.pt", {"a": state["a"][part]})
        rezip(path, lambda records: None, zipfile.ZIP_DEFLATED)
        assert path.stat().st_size < 1 << 15
        with pytest.raises(CheckpointError, match=fault):
            read_file(path)
    path = rezip(path, lambda records: {**records, "s/data.pkl": b"N" * (1 << 27)}, zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match=r"data\.pkl takes more"):
        read_file(path)


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_record_that_claims_to_be_small(tmp_path, method):
    """34 MB of zeros in a record whose size the zip gives as 24 bytes: no more than that is inflated."""
    path = rezip(
        saved(tmp_path / "s.pt", {"a": torch.ones(6)}), lambda r: {**r, "s/data/0": bytes((1 << 25) + 77)}, method
    )
    honest = path.read_bytes()
    size = struct.pack("<I", (1 << 25) + 77)
    assert honest.count(size) == 2 and len(honest) < 1 << 19
    path.write_bytes(honest.replace(size, struct.pack("<I", 24)))
    tracemalloc.start()
    with pytest.raises(CheckpointError, match="damaged" if method == zipfile.ZIP_DEFLATED else "method 1[24]"):
        read_file(path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 22
    tracemalloc.stop()


def test_a_million_records(tmp_path):
    """The list of records alone, 47 MB: refused before it is read."""
    path = saved(tmp_path / "s.pt", STATE)
    honest = path.read_bytes()
    start, end = honest.index(b"PK\1\2"), honest.index(b"PK\5\6")
    with zipfile.ZipFile(path) as z:
        assert end - start < 100 * len(z.namelist()) + 1000
    entry = b"PK\1\2" + bytes(24) + struct.pack("<HHHHHII", 1, 0, 0, 0, 0, 0, 0) + b"x"
    size = len(entry) * 1_000_000
    path.write_bytes(
        honest[:start] + entry * 1_000_000 + struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 9, 9, size, start, 0)
    )
    began = time.monotonic()
    with pytest.raises(CheckpointError, match="list of records has 47,000,000 bytes"):
        read_file(path)
    assert time.monotonic() - began < 1


def test_records_that_differ_only_in_case(tmp_path):
    path = saved(tmp_path / "s.pt", STATE)
    with pytest.raises(CheckpointError, match="several records of one name"):
        read_file(rezip(path, lambda records: {**records, "s/DATA.pkl": b"x"}))


def test_other_containers_and_later_pickles(tmp_path):
    with tarfile.open(tmp_path / "t.pt", "w") as tar:
        tar.add(saved(tmp_path / "s.pt", STATE))
    (tmp_path / "7.pt").write_bytes(b"7z\xbc\xaf\x27\x1c" + bytes(100))
    for name in ("t.pt", "7.pt"):
        with pytest.raises(CheckpointError, match="as neither a PyTorch file nor safetensors does"):
            read_file(tmp_path / name)
    legacy = saved(tmp_path / "l.pt", STATE, **LEGACY).read_bytes()
    for content in (b"cposix\nsystem\n", b"\x80\4\x95"):
        for position in [i for i in range(len(legacy)) if legacy.startswith(b"\x80\2", i)][1:]:
            (tmp_path / "l.pt").write_bytes(legacy[:position] + content + legacy[position:])
            with pytest.raises(CheckpointError, match=r"l\.pt"):
                read_file(tmp_path / "l.pt")


def test_the_crc_of_stored_records_is_not_checked(tmp_path):
    """As in PyTorch itself: it would mean to read each tensor twice."""
    path = saved(tmp_path / "s.pt", STATE)
    content = STATE["a"].numpy().tobytes()
    path.write_bytes(path.read_bytes().replace(content, bytes(len(content))))
    assert not read_file(path)["a"].any() and not torch.load(path)["a"].any()


def test_records_that_are_not_where_the_index_says(tmp_path):
    """Fields of the zip's index, and of the local headers, changed by hand."""
    path = saved(tmp_path / "s.pt", STATE)
    honest = path.read_bytes()
    with zipfile.ZipFile(path) as z:
        first, second = z.getinfo("s/data/0"), z.getinfo("s/data/1")
    index = honest.rindex(b"PK\1\2", 0, honest.index(b"s/data/1", honest.index(b"PK\1\2")))
    local = second.header_offset
    changes = {  # position: bytes
        "overlap": (index + 42, struct.pack("<I", first.header_offset)),
        "offset beyond the end": (index + 42, struct.pack("<I", len(honest) - 3)),
        "size beyond the end": (index + 20, struct.pack("<II", len(honest), len(honest))),
        "other method": (local + 8, b"\x08"),
        "encrypted": (local + 6, b"\x01"),
        "encrypted in the index": (index + 8, b"\x01"),
        "flags that differ": (local + 6, b"\x20"),
        "other name": (local + 30, b"t"),
        "no header": (local, b"XX"),
        "name beyond the end": (local + 26, b"\xff\xff"),
        "extra beyond the end": (local + 28, b"\xff\xff"),
    }
    for name, (position, content) in changes.items():
        path.write_bytes(honest[:position] + content + honest[position + len(content) :])
        with pytest.raises(CheckpointError):
            read_file(path)
            pytest.fail(f"{name} was not noticed")
    path.write_bytes(honest)
    assert_same(read_file(path), STATE)


def test_damaged_compressed_record(tmp_path):
    """Compressed records are checked against their CRC, as zipfile does."""
    path = rezip(saved(tmp_path / "s.pt", STATE), lambda records: None, zipfile.ZIP_DEFLATED)
    honest, crc = path.read_bytes(), struct.pack("<I", zlib.crc32(STATE["c"].numpy().tobytes()))
    assert honest.count(crc) == 2  # in the local header and in the index
    path.write_bytes(honest.replace(crc, b"\0\0\0\0"))
    with pytest.raises(CheckpointError, match="CRC"):
        read_file(path)
