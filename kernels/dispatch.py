"""Which operations run as Triton kernels. Imports no Triton, so that `miniclip.ops` can ask before it needs any.

The backend of a call or a model is "torch", "triton", or None: Triton where a kernel was measured to win.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from miniclip.kernels.tiles import architecture, supported

# Where a kernel beat every PyTorch rival: architecture -> operation -> ranges of its size, both ends included. Sizes:
# attention: sequence length; attention_varlen: longest sequence; similarity_softmax, similarity_topk: queries;
# contrastive_loss: pairs; add_layer_norm, bias_quick_gelu: elements of x.
#
# Measured on: nothing yet. No GPU has timed these kernels, and what was not measured PyTorch wins, so this is empty:
# by default everything runs in PyTorch. `python -m miniclip.kernels.check` prints the rows for the GPU it runs on.
FASTER: dict[str, dict[str, list[tuple[int, int]]]] = {}

INSTALLED = importlib.util.find_spec("triton") is not None


def check_backend(backend: str | None, device: torch.device, dtype: torch.dtype) -> None:
    """Raise ValueError if a model on this device and of this dtype can't have this backend."""
    if backend not in (None, "torch", "triton"):
        raise ValueError(f'backend is {backend!r}; expected "torch", "triton" or None')
    if backend != "triton":
        return
    if device.type != "cuda":
        raise ValueError(f'backend="triton" needs a GPU, and the model is on {device}: use backend="torch" or None')
    if dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f'backend="triton" takes float16 and bfloat16, and the model is {dtype}: use backend="torch"')
    if not INSTALLED:
        raise ValueError('backend="triton", and Triton is not installed: pip install triton, or use backend="torch"')
    supported(device)


def use_kernel(operation: str, backend: str | None, x: Tensor, size: int, fits: bool = True) -> bool:
    """Whether an operation on `x` runs as its kernel. On a CPU it never does: there is nothing for Triton to run on.

    fits: whether the kernel takes the arguments. It is for backend None: with "triton", a kernel that does not take
    its arguments raises ValueError.
    """
    if backend == "torch" or not x.is_cuda:
        return False
    if backend == "triton":
        return True
    if backend is not None:
        raise ValueError(f'backend is {backend!r}; expected "torch", "triton" or None')
    if not FASTER or not INSTALLED or not fits or x.dtype not in (torch.float16, torch.bfloat16):
        return False
    ranges = FASTER.get(architecture(x.device), {}).get(operation, [])
    return any(low <= size <= high for low, high in ranges)


def wants_gradient(*tensors: Tensor) -> bool:
    """Whether autograd records an operation on these tensors."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
