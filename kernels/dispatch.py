"""Which operation runs as its Triton kernel. Imports no Triton, so that `miniclip.ops` can ask before it needs any.

The backend of a call or a model is "torch"; "triton"; or None, which takes the kernel where a rule below says so and
the kernel can do what is asked (limits.py).
"""

from __future__ import annotations

import functools
import importlib.util
import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from miniclip.kernels import limits
from miniclip.kernels.tiles import ARCHITECTURES, architecture, supported

INSTALLED = importlib.util.find_spec("triton") is not None


class Measure(NamedTuple):
    """The two numbers of a call by which rules choose."""

    length: str  # what they are
    count: str
    of: Callable[..., tuple[int, int]]  # the operation's arguments -> (length, count)


def _of_attention(qkv: Tensor, causal: bool = False) -> tuple[int, int]:
    return (qkv.shape[1], qkv.numel() // 3) if qkv.ndim == 5 and qkv.shape[-1] == 64 else (0, 0)


MEASURES = {
    "attention": Measure("tokens of a sequence, heads being 64 wide", "elements of the result", _of_attention),
    "attention_varlen": Measure(
        "tokens of the longest text", "texts", lambda qkv, cu_seqlens, max_len, *_: (max_len, len(cu_seqlens) - 1)
    ),
    "add_layer_norm": Measure("width", "elements", lambda x, *_: (x.shape[-1] if x.ndim else 0, x.numel())),
    "bias_quick_gelu": Measure("width", "elements", lambda x, *_: (x.shape[-1] if x.ndim else 0, x.numel())),
    "similarity_softmax": Measure("queries", "logits", lambda x, c, *_: (len(x), len(x) * len(c))),
    "similarity_topk": Measure("queries", "logits", lambda x, c, *_: (len(x), len(x) * len(c))),
    "contrastive_loss": Measure("pairs", "logits", lambda image, *_: (len(image), len(image) ** 2)),
}  # fmt: skip


class Rule(NamedTuple):
    """Take the kernel where both numbers of `MEASURES` are in these ranges, ends included."""

    length: tuple[float, float]
    count: tuple[float, float]
    source: str


ANY, BY_BYTES = (1, math.inf), "by bytes, not timed"
# Architecture -> operation -> rules. "any" is for architectures without rules of their own. Its rules follow from the
# bytes that PyTorch and the kernel move: 26 against 8 an element for add_layer_norm, 14 against 4 for bias_quick_gelu;
# packed texts have no padding, and the logits of similarity_topk are never stored. No GPU has timed a kernel yet.
# `python -m miniclip.kernels.check` prints the rules for the GPU that it runs on.
RULES: dict[str, dict[str, list[Rule]]] = {
    "any": {
        "add_layer_norm": [Rule(ANY, (2**22, math.inf), BY_BYTES)],
        "bias_quick_gelu": [Rule(ANY, (2**22, math.inf), BY_BYTES)],
        "attention_varlen": [Rule((1, 32), (64, math.inf), BY_BYTES)],
        "similarity_topk": [Rule(ANY, (2**26 + 1, math.inf), BY_BYTES)],
    },
}


def rules(operation: str, name: str) -> list[Rule]:
    """The rules of an operation on an architecture."""
    return RULES.get(name, {}).get(operation) or RULES["any"].get(operation, [])


def check_backend(backend: str | None, device: torch.device, dtype: torch.dtype) -> None:
    """Raise ValueError if a model on this device and of this dtype can't have this backend."""
    if backend not in (None, "torch", "triton"):
        raise ValueError(f'backend is {backend!r}; expected "torch", "triton" or None')
    if backend != "triton":
        return
    if device.type != "cuda":
        raise ValueError(f'backend="triton" needs a GPU, and the model is on {device}: use backend="torch" or None')
    if dtype not in limits.HALVES:
        raise ValueError(f'backend="triton" takes float16 and bfloat16, and the model is {dtype}: use backend="torch"')
    if not INSTALLED:
        raise ValueError('backend="triton", and Triton is not installed: pip install triton, or use backend="torch"')
    supported(device)


def use_kernel(operation: str, backend: str | None, x: Tensor, *arguments) -> bool:
    """Whether the operation on `x` and further arguments runs as its kernel. On a CPU it never does.

    "triton": always; the kernel raises ValueError for what it cannot do. None: in half precision, without a gradient,
    outside torch.compile, where a rule and the kernel's limits allow it.
    """
    if backend == "torch" or not x.is_cuda:
        return False
    if backend == "triton":
        return True
    if backend is not None:
        raise ValueError(f'backend is {backend!r}; expected "torch", "triton" or None')
    if x.dtype not in limits.HALVES or not INSTALLED or torch.compiler.is_compiling() or limits.records_gradient(x):
        return False
    length, count = MEASURES[operation].of(x, *arguments)
    name = architecture(x.device)
    return (
        name in ARCHITECTURES
        and any(
            rule.length[0] <= length <= rule.length[1] and rule.count[0] <= count <= rule.count[1]
            for rule in rules(operation, name)
        )
        and getattr(limits, operation)(x, *arguments) is None
        and triton_works(x.device)
    )


@functools.cache
def triton_works(device: torch.device) -> bool:
    """Whether Triton can build and launch a kernel here; it needs a C compiler. If it cannot, a warning says why."""
    from miniclip.kernels.bias_quick_gelu import bias_quick_gelu

    try:
        with torch.no_grad():
            x = torch.zeros(1, 16, dtype=torch.float16, device=device)
            bias_quick_gelu(x, x[0])
    except Exception as error:  # a compiler's, a driver's or Triton's own
        warnings.warn(
            f"Triton cannot build or launch a kernel here, so PyTorch runs instead: {type(error).__name__}: "
            f'{error!s:.300}. backend="torch" avoids this warning',
            stacklevel=2,
        )
        return False
    return True


def explain(device: str | torch.device, dtype: torch.dtype = torch.float16, backend: str | None = None) -> list[dict]:
    """What runs as what for a model on this device, of this dtype and backend, and why: a row for each operation.

    Keys: "operation"; "runs as": "torch" or "triton"; "where": the sizes at which it does, or ""; "why".
    """
    device = torch.device(device)
    check_backend(backend, device, dtype)
    return [
        {"operation": operation, "runs as": runs_as, "where": where, "why": why}
        for operation in MEASURES
        for runs_as, where, why in _explain(operation, device, dtype, backend)
    ]


def _explain(operation: str, device: torch.device, dtype: torch.dtype, backend: str | None) -> list[tuple]:
    reason = _why_never(device, dtype, backend)
    if reason:
        return [("torch", "", reason)]
    if backend == "triton":
        return [("triton", "", 'backend="triton"')]
    chosen = rules(operation, architecture(device))
    found = [("triton", _ranges(rule, MEASURES[operation]), rule.source) for rule in chosen]
    return found or [("torch", "", "no GPU has shown that the kernel is faster")]


def _why_never(device: torch.device, dtype: torch.dtype, backend: str | None) -> str | None:
    """Why no operation runs as a kernel, or None if some may."""
    if device.type != "cuda":
        return f"the kernels need a GPU, and the device is {device}"
    if backend == "torch":
        return 'backend="torch"'
    if dtype not in limits.HALVES:
        return f"the kernels are chosen in half precision, and the dtype is {str(dtype).removeprefix('torch.')}"
    if not INSTALLED:
        return "Triton is not installed: pip install triton"
    name = architecture(device)
    if name not in ARCHITECTURES:
        return f"the kernels have no tiles for {name}"
    return None if triton_works(device) else "Triton cannot build or launch kernels here: it needs a C compiler"


def _ranges(rule: Rule, measure: Measure) -> str:
    """The rule in words: "1 to 32 tokens of the longest text, at least 64 texts"."""
    parts = []
    for (low, high), what in ((rule.length, measure.length), (rule.count, measure.count)):
        if (low, high) != ANY:
            parts.append(f"at least {low} {what}" if high == math.inf else f"{low} to {high} {what}")
    return ", ".join(parts)
