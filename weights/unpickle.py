"""Reads the pickles that describe tensors, without importing, calling or running anything that they name.

Pickle is a language of calls, so Python's own reader is not used, not even with restrictions. `unpickle` interprets the
few opcodes that PyTorch writes, makes inert values of them, and refuses every name that is not in `GLOBALS`.
"""

from __future__ import annotations

import pickletools
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from miniclip.weights.errors import CheckpointError

# What a pickle may refer to, as "module name".
STORAGES = {
    "torch DoubleStorage": torch.float64,
    "torch FloatStorage": torch.float32,
    "torch HalfStorage": torch.float16,
    "torch BFloat16Storage": torch.bfloat16,
    "torch LongStorage": torch.int64,
    "torch IntStorage": torch.int32,
    "torch ShortStorage": torch.int16,
    "torch CharStorage": torch.int8,
    "torch ByteStorage": torch.uint8,
    "torch BoolStorage": torch.bool,
}
FIRST_ARGUMENT = {  # functions whose first argument stands for their result
    "torch._utils _rebuild_parameter",
    "torch.jit._pickle build_intlist",
    "torch.jit._pickle build_doublelist",
    "torch.jit._pickle build_boollist",
    "torch.jit._pickle build_tensorlist",
    "torch.jit._pickle restore_type_tag",
}
TENSORS = {"torch._utils _rebuild_tensor", "torch._utils _rebuild_tensor_v2"}
# What people save beside a state dict. Each becomes an `Inert`, whatever its arguments and its state are.
INERT = {
    *("argparse Namespace", "collections defaultdict", "collections Counter", "_codecs encode"),
    *("torch device", "torch Size"),
    *("numpy dtype", "numpy ndarray"),
    *(f"numpy.{core}.multiarray {name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    *(f"__builtin__ {name}" for name in ("set", "frozenset", "bytes", "bytearray", "complex", "slice", "xrange")),
    *(f"__builtin__ {name}" for name in ("list", "dict", "tuple", "long", "float", "unicode", "bool")),
    *(f"torch float{kind}" for kind in ("16", "32", "64")),
    *(f"torch {kind}" for kind in ("bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool", "complex64")),
}
GLOBALS = {*STORAGES, *FIRST_ARGUMENT, *TENSORS, *INERT, "collections OrderedDict"}

# Real files stay far below: a tensor takes about 30 opcodes and 130 bytes, and OpenAI's largest model has 1,353.
MAX_PICKLE_BYTES = 1 << 24
MAX_OPCODES = 1 << 19  # bounds time and memory
MAX_KEY = 1 << 63  # of integers in dicts: of larger ones any number can have the same hash, which takes quadratic time


class Storage(NamedTuple):
    key: str
    dtype: torch.dtype
    numel: int


class View(NamedTuple):
    """A tensor as the pickle describes it, nothing of it checked."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(eq=False)
class Module:
    """Stands for an object of any class of a TorchScript archive."""

    attributes: dict = field(default_factory=dict)


class Inert:
    """Stands for a value of one of the classes in `INERT`, of which nothing is kept."""


class Pickle(NamedTuple):
    value: object
    end: int  # bytes that it took
    storages: dict[str, Storage]


def unpickle(data: bytes) -> Pickle:
    """Interpret the pickle that `data` starts with; raises on what PyTorch does not write for tensors.

    The result is made of None, bool, int, float, str, tuple, list, dict, View, Module and Inert. A reference by name
    becomes a str, the name. The result may contain itself, or one part so often that printing, comparing or
    hashing it never ends: look only at values of a known type.
    """
    stack, marks, memo, storages = [], [], {}, {}

    def pop_to_mark() -> list:
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    def set_items(items: list) -> None:
        target = stack[-1]
        if isinstance(target, Inert):
            return
        if type(target) is not dict:
            raise CheckpointError(f"the pickle sets the items of a {type(target).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            valid = type(key) is str or (type(key) is int and -MAX_KEY <= key < MAX_KEY)
            if not valid or key in target:
                raise CheckpointError("the pickle has a key twice, or one that is neither a str nor an int of 64 bits")
            target[key] = value

    for count, (opcode, argument, position) in enumerate(pickletools.genops(data)):
        if count > MAX_OPCODES:
            raise CheckpointError(f"the pickle has more than {MAX_OPCODES:,} opcodes, which no model needs")
        match opcode.name:
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE":
                stack.append(argument)
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode.name])
            case "EMPTY_TUPLE" | "EMPTY_LIST" | "EMPTY_DICT":
                stack.append({"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict}[opcode.name]())
            case "MARK":
                marks.append(len(stack))
            case "TUPLE":
                stack.append(tuple(pop_to_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                marks.append(len(stack) - int(opcode.name[-1]))
                stack.append(tuple(pop_to_mark()))
            case "APPEND":
                value = stack.pop()
                stack[-1].append(value)
            case "APPENDS":
                values = pop_to_mark()
                stack[-1].extend(values)
            case "SETITEM":
                marks.append(len(stack) - 2)
                set_items(pop_to_mark())
            case "SETITEMS":
                set_items(pop_to_mark())
            case "GLOBAL":
                stack.append(_permitted(argument))
            case "NEWOBJ" | "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                stack.append(_made_by(function, arguments))
            case "BUILD":
                state = stack.pop()
                _set_state(stack[-1], state)
            case "BINPERSID":
                storage = _storage(stack.pop())
                storages[storage.key] = storage
                stack.append(storage)
            case "PROTO":
                pass
            case "STOP":
                return Pickle(stack.pop(), position + 1, storages)
            case _:
                raise CheckpointError(f"refused the pickle opcode {opcode.name}, which no tensor needs")
    raise CheckpointError("the pickle is cut off")


def _permitted(name: str) -> str:
    if name in GLOBALS or _is_scripted(name):
        return name
    raise CheckpointError(
        f"refused {name.replace(' ', '.'):.100}, which has no place in a file of tensors; nothing was run. "
        "Where the file was made, save model.state_dict() by itself"
    )


def _is_scripted(name: str) -> bool:
    """Whether it is the name of one of a TorchScript archive's own classes."""
    return name.startswith(("__torch__ ", "__torch__."))


def _made_by(function: str, arguments: tuple) -> View | Module | Inert | dict:
    """The value that stands for the result of a call."""
    if type(function) is not str:
        raise CheckpointError(f"the pickle calls a {type(function).__name__}")
    if _is_scripted(function):
        return Module()
    if function in INERT:
        return Inert()
    if function in FIRST_ARGUMENT:
        return arguments[0]
    if function in TENSORS:
        storage, offset, size, stride, *rest = arguments  # and requires_grad, hooks, metadata
        if len(rest) > 2 and rest[2]:
            raise CheckpointError("a tensor has metadata (a lazy conjugate or negation): save a clone of it")
        return View(storage, offset, size, stride)
    if function == "collections OrderedDict" and not arguments:
        return {}
    raise CheckpointError(f"the pickle calls {function!r:.100}")


def _set_state(made: object, state: object) -> None:
    if isinstance(made, Module):
        made.attributes = state if isinstance(state, dict) else {}  # a class of one's own may pack any state
    elif not isinstance(made, dict | Inert):  # an OrderedDict, whose own attributes say nothing about tensors
        raise CheckpointError(f"the pickle sets the state of a {type(made).__name__}")


def _storage(identity: tuple) -> Storage:
    kind, dtype, key, _device, numel, *rest = identity  # the device is where it once was; it is read to the CPU
    types = (type(kind), type(dtype), type(key), type(numel))
    if types != (str, str, str, int) or kind != "storage" or dtype not in STORAGES or numel < 0 or any(rest):
        raise CheckpointError("the pickle refers to something other than a storage of numbers")
    return Storage(key, STORAGES[dtype], numel)
