"""A GPU that is not there: models and tensors that say they are on one, and a count of what would be launched on it."""

from __future__ import annotations

import contextlib
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from miniclip.config import MODELS
from miniclip.fast import clip as fast_clip
from miniclip.fast import gpu, graphs
from miniclip.fast.clip import FastCLIP
from miniclip.kernels import dispatch, tiles
from miniclip.models import convert_weights

HALF = {"device": "cuda", "dtype": torch.float16}


@contextlib.contextmanager
def pretend_gpu(monkeypatch: pytest.MonkeyPatch, name: str = "sm_90"):
    """Inside it tensors can be made on "cuda". They have shapes, dtypes and strides, and no numbers.

    What would read a number raises an exception, so that a test that ends has not waited for the GPU.
    """
    for module in dispatch, tiles:
        monkeypatch.setattr(module, "architecture", lambda device: name)
    monkeypatch.setattr(dispatch, "INSTALLED", True)
    monkeypatch.setattr(dispatch, "triton_works", lambda device: True)
    monkeypatch.setattr(fast_clip, "applies", lambda *_: True)  # fake tensors are not of the types that these look for
    monkeypatch.setattr(fast_clip, "tensors_of", lambda *_: [])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(graphs, "stream", lambda inputs: 0)
    monkeypatch.setattr(FastCLIP, "graphs", False)  # what a graph would hold is launched one by one, and seen
    with FakeTensorMode() as mode, _Repairs(), torch.no_grad():
        yield mode


def shadowed(function, mode: FakeTensorMode, seen: Launches):
    """`function` for a program with real tensors. It is called with tensors that say they are on the GPU, once for the
    same shapes, and its launches are counted; the program gets unit vectors of the result's shape."""
    results = {}

    def real(x: Tensor) -> Tensor:
        return torch.full(x.shape, x.shape[-1] ** -0.5 if x.is_floating_point() else 0, dtype=x.dtype)

    def run(*args, **kwargs):
        key = str(tree_map(lambda x: (x.shape, x.dtype) if isinstance(x, Tensor) else x, (args, kwargs)))
        if key not in results:
            with mode, seen, torch.no_grad():
                fakes = tree_map(lambda x: mode.from_tensor(x) if type(x) is Tensor else x, args)
                results[key] = function(*fakes, **kwargs)
        return tree_map(lambda x: real(x) if isinstance(x, Tensor) else x, results[key])

    return run


def texts_of(monkeypatch: pytest.MonkeyPatch, longest: int, tokens: int) -> list:
    """Let texts have these lengths; returns a list that grows with every time the host asks for them."""
    asked = []
    monkeypatch.setattr(gpu, "lengths", lambda *_: asked.append(1) or (longest, tokens))
    return asked


def on_gpu(name: str, dtype: torch.dtype = torch.float16) -> FastCLIP:
    """A named model as `load` returns it, on the GPU; call it inside `pretend_gpu`."""
    with unset_fake_temporarily(), torch.device("meta"):
        model = convert_weights(FastCLIP(MODELS[name].config), dtype).eval()
    for module in model.modules():
        for tensors in module._parameters, module._buffers:
            for key, x in tensors.items():
                if x is not None:
                    moved = torch.empty(x.shape, dtype=x.dtype, device="cuda")
                    tensors[key] = nn.Parameter(moved, requires_grad=False) if tensors is module._parameters else moved
    return model


class Launches(TorchDispatchMode):
    """Counts the operations that launch a kernel: not views, nor memory that is only allocated."""

    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        schema, kwargs = function._schema, kwargs or {}
        aliases = [x.alias_info for x in schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in aliases)
        if not is_view and "empty" not in schema.name and schema.name not in ("aten::_unsafe_view", "prim::device"):
            self.names[schema.name.split("::")[1]] += 1
        written = [i for i, x in enumerate(schema.arguments) if x.alias_info is not None and x.alias_info.is_write]
        if written and len(schema.returns) == 1 and FakeTensor in types:  # in place: PyTorch without CUDA refuses it
            return args[written[0]] if written[0] < len(args) else kwargs[schema.arguments[written[0]].name]
        return function(*args, **kwargs)


class _Repairs(TorchFunctionMode):
    """What PyTorch without CUDA does not do with such tensors: indexing, `~`, and the choice of an attention."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is Tensor.__getitem__ and isinstance(args[0], FakeTensor):
            return _index(*args)
        if function is Tensor.__invert__ and isinstance(args[0], FakeTensor):
            return torch.ops.aten.bitwise_not(args[0])
        if function is F.scaled_dot_product_attention:  # one launch, and the layout of the flash kernel's result
            n, heads, length, d = args[0].shape
            torch.ops.aten.relu(args[0])
            return args[0].new_empty(n, length, heads, d).transpose(1, 2)
        return function(*args, **(kwargs or {}))


def _index(x: Tensor, keys) -> Tensor:
    keys = keys if isinstance(keys, tuple) else (keys,)
    if any(isinstance(key, Tensor) for key in keys):
        return torch.ops.aten.index.Tensor(x, [key if isinstance(key, Tensor) else None for key in keys])
    dim = 0
    for key in keys:
        if isinstance(key, int):
            x = x.select(dim, key)
        elif key is None:
            x, dim = x.unsqueeze(dim), dim + 1
        else:
            x, dim = torch.ops.aten.slice.Tensor(x, dim, key.start, key.stop), dim + 1
    return x
