"""Half-precision weights on CPUs without half-precision arithmetic, where PyTorch emulates it slowly.

There the fast forms compute in float32, and products go to FBGEMM, which comes with PyTorch on x86: it reads float16
weights and widens them in registers. That reads half the memory, loses nothing, and is faster than float32 weights.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _onednn_dtypes() -> frozenset[torch.dtype]:
    """The dtypes that oneDNN has arithmetic for on this CPU."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return frozenset()
    native = {
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
    }
    return frozenset([torch.float32, *(dtype for dtype, is_supported in native.items() if is_supported())])


ONEDNN_DTYPES = _onednn_dtypes()
HAS_FBGEMM = "fbgemm" in torch.backends.quantized.supported_engines and bool(ONEDNN_DTYPES)
EMULATED = frozenset([torch.float16, torch.bfloat16] if HAS_FBGEMM else []) - ONEDNN_DTYPES  # FBGEMM multiplies these


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the fast forms compute on a CPU where the weights have this dtype."""
    return torch.float32 if dtype in EMULATED else dtype


def pack(weight: Tensor, bias: Tensor | None = None):
    """FBGEMM's copy of a half-precision weight [n_out, n_in], with a float32 bias [n_out].

    Bfloat16 becomes float16, which has more bits but a smaller range: values below 2^-14 are rounded to multiples of
    2^-24, and values above 65504 become 65504.
    """
    return torch.ops.quantized.linear_prepack_fp16(weight.detach().flatten(1).float(), bias)


def product(x: Tensor, packed) -> Tensor:
    """Float32 x [..., n_in] times the transpose of a packed weight, plus its bias: [..., n_out]."""
    return torch.ops.quantized.linear_dynamic_fp16(x, packed)
