"""Repairs of Triton's interpreter (versions 3.6 to 3.8), which runs kernels on the CPU.

Set TRITON_INTERPRET=1 before Triton is imported, and import this module before a kernel is launched. Without the
repairs the interpreter multiplies the raw bits of bfloat16 matrices as integers, truncates float32 to bfloat16 instead
of rounding, and with NumPy 2.4 or later refuses loop bounds that were computed or loaded (Triton 3.6 only).
"""

from __future__ import annotations

import os

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

if os.environ.get("TRITON_INTERPRET") != "1":
    raise ImportError("set the environment variable TRITON_INTERPRET=1 before Triton is imported")

Builder = interpreter.InterpreterBuilder
create_dot, cast_impl, patch_lang_tensor = Builder.create_dot, Builder.cast_impl, interpreter._patch_lang_tensor


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    """uint16, bfloat16's bits -> float32, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """float32 -> the bits of the nearest bfloat16, ties to even, as the hardware and PyTorch round."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)


def _create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    """a @ b + d in float32, whatever a and b are: tensor cores multiply halves exactly and add in float32."""
    if d.dtype.scalar != tl.float32:
        return create_dot(self, a, b, d, input_precision, max_num_imprecise_acc)
    a, b = (from_bfloat16(x.data) if x.dtype.scalar == tl.bfloat16 else x.data.astype(np.float32) for x in (a, b))
    return interpreter.TensorHandle(a @ b + d.data, tl.float32)


def _cast_impl(self, src, dst_type):
    source, target = src.dtype.scalar, dst_type.scalar
    if source == tl.bfloat16 and target == tl.float32:
        return interpreter.TensorHandle(from_bfloat16(src.data), target)
    if source == tl.float32 and target == tl.bfloat16:
        return interpreter.TensorHandle(to_bfloat16(src.data), target)
    return cast_impl(self, src, dst_type)


def _patch_lang_tensor(tensor, *scope):
    patch_lang_tensor(tensor, *scope)
    tensor.__index__ = lambda self: int(np.squeeze(self.handle.data))


Builder.create_dot, Builder.cast_impl, interpreter._patch_lang_tensor = _create_dot, _cast_impl, _patch_lang_tensor
