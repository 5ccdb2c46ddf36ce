"""What the tests of the kernels share. Importing it skips a test module where Triton is not installed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed; it is there for Linux only")
import miniclip.kernels.interpreter  # noqa: F401  (repairs the interpreter)
from miniclip.bench.kernel_errors import LOSS, PROBABILITY, SCALE_GRADIENT, TOLERANCE

__all__ = ["HALVES", "LOSS", "PROBABILITY", "SCALE_GRADIENT", "TOLERANCE", "random", "relative_error"]

HALVES = [torch.float16, torch.bfloat16]


def relative_error(got: Tensor, expected: Tensor) -> float:
    return ((got.double() - expected).norm() / expected.norm()).item()


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
