"""What a test needs to see which operations run on PyTorch's meta device."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# PyTorch does these in Python there, which is slow, and the first of them imports a compiler: more than a second.
SLOW = {"add", "cat", "constant_pad_nd", "div", "index_put_", "mul", "sqrt", "sub"}


class MetaCalls(TorchDispatchMode):
    """Collects the names of operations on meta tensors in `names`."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        given = [x for each in arguments for x in (each if isinstance(each, list | tuple) else [each])]
        if any(isinstance(x, torch.Tensor) and x.is_meta for x in given):
            self.names.add(function.overloadpacket.__name__)
        return function(*arguments, **(options or {}))
