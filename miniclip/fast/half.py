"""Half-precision weights on CPUs without arithmetic for them, where PyTorch's is emulated, at a fraction of the speed.

There the fast forms compute in float32, and the blocks' products go to FBGEMM, which PyTorch brings along for x86: it
reads weights in float16, in the order in which the processor wants them, and widens them as it goes. Half the memory
is read, nothing is lost, and it is faster than with float32 weights.

FBGEMM's copies take as much memory as the weights. They are made when they are first used, and again after an edit that
PyTorch counts. `weight.data.mul_(2)` is none: where you must, call `forget(model)` after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary


def _emulated() -> frozenset[torch.dtype]:
    """The half precisions that oneDNN, which multiplies them, says it is slow at."""
    if "fbgemm" not in torch.backends.quantized.supported_engines or not torch.backends.mkldnn.is_available():
        return frozenset()
    native = {
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
    }
    return frozenset(dtype for dtype, is_supported in native.items() if not is_supported())


EMULATED = _emulated()
_PACKED = WeakTensorKeyDictionary()  # weight: (which edit of it, FBGEMM's copy)


def arithmetic(weight: Tensor) -> torch.dtype:
    """What the fast forms compute in where the model has this weight."""
    return torch.float32 if weight.dtype in EMULATED and weight.device.type == "cpu" else weight.dtype


def product(x: Tensor, weight: Tensor) -> Tensor:
    """Float32 x [..., n_in] times the transpose of a half-precision weight, [n_out, n_in] when flattened: [..., n_out].

    Bfloat16 becomes float16, which has more bits but a smaller range: below 2^-14 it is rounded to 2^-24, and ends at
    65504.
    """
    return torch.ops.quantized.linear_dynamic_fp16(x, _packed(weight))


def pack(weights: Sequence[Tensor]) -> None:
    """Copy these weights for `product` on all cores; it would do so one after the other, seconds for a large model."""
    if weights[0] not in _PACKED:
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            list(pool.map(_packed, weights))


def _packed(weight: Tensor):
    """FBGEMM's copy of what the weight is now."""
    edit = (weight.data_ptr(), 0 if weight.is_inference() else weight._version)
    kept = _PACKED.get(weight)
    if kept is None or kept[0] != edit:
        kept = _PACKED[weight] = edit, torch.ops.quantized.linear_prepack_fp16(weight.detach().flatten(1).float(), None)
    return kept[1]


def forget(model: nn.Module) -> None:
    """Let the next call copy the weights again."""
    for parameter in model.parameters():
        _PACKED.pop(parameter, None)
