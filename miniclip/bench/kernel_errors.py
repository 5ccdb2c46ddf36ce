"""Each kernel's error against float64, beside PyTorch's own: a part of `miniclip.kernels.check`. The tests use its
tolerances.

Runs on a GPU, or on a CPU in Triton's interpreter, on smaller shapes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from miniclip import cosines, ops
from miniclip.fast import ops as fused
from miniclip.fast.rates import name as dtype_name
from miniclip.kernels.add_layer_norm import add_layer_norm
from miniclip.kernels.attention import attention, attention_varlen
from miniclip.kernels.bias_quick_gelu import bias_quick_gelu
from miniclip.kernels.contrastive_loss import contrastive_loss
from miniclip.kernels.similarity import similarity_softmax, similarity_topk

# Relative error, |got - expected| / |expected| in Frobenius norms, against float64 of the inputs as rounded. Rounding
# the result alone takes up to 2^-11 = 4.9e-4 of each number in float16 and 2^-8 = 3.9e-3 in bfloat16; about half of it
# on average.
TOLERANCE = {torch.float16: 5e-4, torch.bfloat16: 4e-3, torch.float32: 2e-6}
# Absolute, of a softmax in float32, whatever the embeddings' dtype: float32 rounds a logit of 50 by up to 1.9e-6, which
# is then the probability's relative error, and there are two or three such roundings.
PROBABILITY = 4e-6
LOSS = 5e-6  # relative, of the contrastive loss, and of the embeddings' gradients in float32
SCALE_GRADIENT = 1e-6  # absolute: it is a mean of differences of cosines, which may cancel


class Case(NamedTuple):
    operation: str
    shape: str
    dtype: torch.dtype
    kernel: Callable[[], Tensor]
    pytorch: Callable[[], Tensor]
    exact: Callable[[], Tensor]  # in float64, of the first rows of what the others return
    tolerance: float
    absolute: bool = False


# Batch, length, heads, head dimension, causal, what it is.
ATTENTION = [
    (256, 50, 12, 64, False, "ViT-B/32"),
    (128, 197, 12, 64, False, "ViT-B/16"),
    (64, 257, 16, 64, False, "ViT-L/14"),
    (32, 577, 16, 64, False, "ViT-L/14@336px"),
    (256, 77, 8, 64, True, "text, whole"),
    (1000, 32, 8, 64, True, "text, cut"),
    (1000, 16, 8, 64, True, "text, cut"),
    (1, 50, 12, 64, False, "ViT-B/32, one image"),
    (1, 257, 16, 64, False, "ViT-L/14, one image"),
]
DRY_ATTENTION = [(2, 50, 2, 64, False, "ViT-B/32"), (2, 77, 1, 64, True, "text, whole"), (3, 16, 2, 64, True, "text")]
PROMPTS, DRY_PROMPTS = [1000, 4000], [12]
CLASSES = [(1, 1000, 512), (256, 1000, 512), (4096, 1000, 768), (50_000, 21_841, 768)]
DRY_CLASSES = [(3, 100, 64)]
PAIRS, DRY_PAIRS = [(4096, 512), (8192, 768), (32_768, 512)], [(40, 64)]
ROWS, DRY_ROWS = [(50, 768), (3200, 768), (10_500, 512), (256 * 50, 768), (64 * 257, 1024)], [(7, 768)]


def random(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(shape, device=device).to(dtype)


def prompts(count: int, dtype: torch.dtype, device: torch.device, heads: int = 8) -> tuple[Tensor, Tensor, int]:
    """Packed projections of `count` prompts of 7 to 14 tokens, as for ImageNet's classes: qkv, cu_seqlens, max_len."""
    lengths = 7 + torch.arange(count) * 5 % 8
    starts = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]).to(device, torch.int32)
    return random(int(lengths.sum()), 3, heads, 64, dtype=dtype, device=device), starts, int(lengths.max())


def pairs(count: int, width: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Unit embeddings of images and texts, and a scale: leaves for a gradient.

    A pair is about as close as the closest two that are none. If it were closer, the loss and its gradients would be
    near zero, and their relative error would say nothing.
    """
    image, noise = (F.normalize(torch.randn(count, width, device=device), dim=1) for _ in range(2))
    text = F.normalize(image + math.sqrt(width / (2 * math.log(count + 1))) * noise, dim=1)
    return [x.requires_grad_() for x in (image.to(dtype), text.to(dtype), torch.tensor(100.0, device=device))]


def chunked_loss(image: Tensor, text: Tensor, scale: Tensor, chunk: int = 2048) -> Tensor:
    """The symmetric InfoNCE loss in the scale's dtype, with the logits of `chunk` rows in memory at a time."""
    image, text = image.to(scale.dtype), text.to(scale.dtype)

    def denominators(a: Tensor, b: Tensor) -> Tensor:
        part = lambda own: (scale * own @ b.T).logsumexp(1)  # noqa: E731
        return torch.cat([checkpoint(part, own, use_reentrant=False) for own in a.split(chunk)])

    return ((denominators(image, text) + denominators(text, image)) / 2 - scale * (image * text).sum(1)).mean()


def cases(device: torch.device, dry: bool) -> Iterator[Case]:
    """All cases. The inputs of each are made when it is its turn."""
    for dtype in (torch.float16, torch.bfloat16):
        half = {"dtype": dtype, "device": device}
        for n, length, heads, d, causal, name in DRY_ATTENTION if dry else ATTENTION:
            yield from _attention(random(n, length, 3, heads, d, **half), causal, f"{name} {n} x {length} x {heads}")
        for count in DRY_PROMPTS if dry else PROMPTS:
            yield _varlen(*prompts(count, **half, heads=2 if dry else 8), f"{count} prompts")
        for n, m, width in DRY_CLASSES if dry else CLASSES:
            yield from _similarity(random(n, width, **half), random(m, width, **half), f"{n} x {m} x {width}")
        for count, width in DRY_PAIRS if dry else PAIRS:
            yield from _loss(pairs(count, width, **half), f"{count} x {width}")
        for count, width in DRY_ROWS if dry else ROWS:
            yield from _rows(random(2, count, width, **half), f"{count} x {width}")


def _attention(qkv: Tensor, causal: bool, shape: str) -> Iterator[Case]:
    """The forward pass and the gradient, where every implementation rounds two more matrices to half precision."""
    few, tolerance = qkv[:4].double(), TOLERANCE[qkv.dtype]
    weights = random(*qkv.shape[:2], qkv.shape[3] * qkv.shape[4], dtype=qkv.dtype, device=qkv.device)

    def pytorch(x: Tensor) -> Tensor:
        return ops.attention(x, causal, backend="torch")

    def kernel(x: Tensor) -> Tensor:
        return attention(x, causal)

    def gradient(form: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(form(x), x, weights[: len(x)].to(x.dtype))[0]

    forms = lambda: kernel(qkv), lambda: pytorch(qkv), lambda: pytorch(few)
    yield Case("attention", shape, qkv.dtype, *forms, tolerance)
    forms = lambda: gradient(kernel, qkv), lambda: gradient(pytorch, qkv), lambda: gradient(pytorch, few)
    yield Case("attention d qkv", shape, qkv.dtype, *forms, 3 * tolerance)


def _varlen(qkv: Tensor, starts: Tensor, longest: int, shape: str) -> Case:
    def form(function, **options):
        return lambda: function(qkv, starts, longest, True, **options)

    def exact():
        return fused.attention_varlen(qkv[: starts[4]].double(), starts[:5], longest, True, backend="torch")

    pytorch = form(fused.attention_varlen, backend="torch")
    return Case("attention_varlen", shape, qkv.dtype, form(attention_varlen), pytorch, exact, TOLERANCE[qkv.dtype])


def _similarity(x: Tensor, c: Tensor, shape: str) -> Iterator[Case]:
    """PyTorch's error here is that of the usual code in half precision; our plain form computes in float32."""
    scale = torch.tensor(100.0, device=x.device)
    k = 5

    def usual():
        return (100 * F.normalize(x, dim=1) @ F.normalize(c, dim=1).T).float().softmax(1)

    def exact():
        return cosines.similarity_softmax(x[:64].double(), c.double(), scale.double(), backend="torch")

    def best(function):
        return lambda: function().topk(k).values

    topk = lambda: similarity_topk(x, c, scale, k)[0]  # noqa: E731
    yield Case("similarity_topk", shape, x.dtype, topk, best(usual), best(exact), PROBABILITY, absolute=True)
    softmax = lambda: similarity_softmax(x, c, scale)  # noqa: E731
    yield Case("similarity_softmax", shape, x.dtype, softmax, usual, exact, PROBABILITY, absolute=True)


def _loss(leaves: list[Tensor], shape: str) -> Iterator[Case]:
    def part(loss, of, double=False):
        def run():
            inputs = [x.detach().double().requires_grad_() for x in leaves] if double else leaves
            value = loss(*inputs)
            return value.detach() if of is None else torch.autograd.grad(value, inputs)[of]

        return run

    dtype, half = leaves[0].dtype, TOLERANCE[leaves[0].dtype]
    parts = {"": (None, LOSS), " d image": (0, half), " d text": (1, half), " d scale": (2, SCALE_GRADIENT)}
    for name, (of, tolerance) in parts.items():
        forms = part(contrastive_loss, of), part(chunked_loss, of), part(chunked_loss, of, double=True)
        yield Case("contrastive_loss" + name, shape, dtype, *forms, tolerance, absolute=of == 2)


def _rows(inputs: Tensor, shape: str) -> Iterator[Case]:
    x, residual = inputs
    weight, bias = torch.randn(2, x.shape[1], device=x.device)
    tolerance = TOLERANCE[x.dtype]
    kernel = lambda: add_layer_norm(x, residual, weight, bias)[1]  # noqa: E731
    pytorch = lambda: fused.add_layer_norm(x, residual, weight, bias, backend="torch")[1]  # noqa: E731
    exact = lambda: ops.layer_norm((x + residual).double(), weight.double(), bias.double())  # noqa: E731
    yield Case("add_layer_norm", shape, x.dtype, kernel, pytorch, exact, tolerance)
    bias = bias.to(x.dtype)
    kernel = lambda: bias_quick_gelu(x, bias)  # noqa: E731
    pytorch = lambda: fused.bias_quick_gelu(x, bias, backend="torch")  # noqa: E731
    exact = lambda: ops.quick_gelu(x.double() + bias.double())  # noqa: E731
    yield Case("bias_quick_gelu", shape, x.dtype, kernel, pytorch, exact, tolerance)


def error(got: Tensor, exact: Tensor, absolute: bool) -> float:
    """The error of the rows that `exact` has. It is NaN if one of them has a NaN; no tolerance admits that."""
    difference = (got[: len(exact)] if exact.ndim else got).double() - exact
    return (difference.abs().max() if absolute else difference.norm() / exact.norm()).item()


def check(device: torch.device, dry: bool) -> Iterator[dict]:
    """Run all cases; a row for each. One that fails on a GPU is a row too; in a dry run it is a fault of this code."""
    torch.manual_seed(0)
    for case in cases(device, dry):
        row = {"operation": case.operation, "shape": case.shape, "dtype": dtype_name(case.dtype)}
        try:
            exact = case.exact()
            kernel, pytorch = (error(run(), exact, case.absolute) for run in (case.kernel, case.pytorch))
        except Exception as fault:
            if dry:
                raise
            yield row | {"ok": False, "failed": f"{type(fault).__name__}: {fault}"[:300]}
        else:
            ok = kernel <= case.tolerance
            yield row | {"kernel": kernel, "pytorch": pytorch, "tolerance": case.tolerance, "ok": ok}
