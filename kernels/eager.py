"""Which of two ways a kernel is called: its function, or the custom operator that PyTorch knows it by.

The operator is what torch.compile, torch.export, autograd and modes that trace need. It costs 40 to 60 microseconds of
host time a call, which is more than many kernels take; so plain inference calls the function.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from miniclip.kernels.limits import records_gradient


def function_or_operator(function: Callable, operator: Callable, *tensors: Tensor) -> Callable:
    """`function` if nothing but a result is wanted from a call with these tensors, else `operator`."""
    plain = (
        not torch.compiler.is_compiling()
        and all(type(x) in (Tensor, nn.Parameter) for x in tensors)  # no FakeTensor, no wrapper
        and not records_gradient(*tensors)
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.maybe_current_level() is None  # vmap and the like
    )
    return function if plain else operator
