"""How fast this machine multiplies matrices of CLIP's shapes, which decides the dtype to compute in."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from miniclip.fast import half, int8
from miniclip.fast.linear import Linear, linear
from miniclip.models.clip import CLIP

WIDTH = 768  # of ViT-B's blocks: 768 -> 2304 -> 768 -> 3072 -> 768
PRODUCTS = ((WIDTH, 3 * WIDTH), (WIDTH, WIDTH), (WIDTH, 4 * WIDTH), (4 * WIDTH, WIDTH))
HALF = (torch.float16, torch.bfloat16)
MIN_SPEEDUP = 1.5  # how much faster than float32 another dtype must be to be chosen
MIN_COSINE = 0.999  # with float32's embeddings
PREFERENCE = {torch.float16: 1.2, torch.bfloat16: 1.0, "int8": 0.8}  # factors of the rates: the more accurate first


@torch.no_grad()
def matrix_rate(dtype: torch.dtype | str, device: str | torch.device = "cpu", rows: int = 1600, runs: int = 3) -> float:
    """Floating-point operations a second in one block's four products with `rows` tokens, the best of `runs`.

    dtype: of the weights, or "int8". They are multiplied as the models' fast forms do it.
    """
    is_cpu = torch.device(device).type == "cpu"
    if dtype == "int8":
        (computed, make), dtype = int8.arithmetic(), torch.float32
    else:
        computed, make = (half.arithmetic(dtype), linear) if is_cpu else (dtype, Linear)
    layers = [make(torch.randn(n_out, n_in, device=device).to(dtype), None, computed) for n_in, n_out in PRODUCTS]
    inputs = [torch.randn(rows, n_in, device=device).to(computed) for n_in, _ in PRODUCTS]
    best = float("inf")
    for run in range(1 + runs):
        start = time.perf_counter()
        for layer, x in zip(layers, inputs, strict=True):
            layer(x)
        if not is_cpu:
            torch.cuda.synchronize(device)
        if run > 0:  # the first one warms up
            best = min(best, time.perf_counter() - start)
    return sum(2 * rows * n_in * n_out for n_in, n_out in PRODUCTS) / best


def fastest_model(build: Callable[[torch.dtype | str], CLIP]) -> CLIP:
    """What `load(dtype="auto")` returns on a CPU; it prints what it chose, and why.

    build: a dtype or "int8" -> the model. The choices are tried in the order of their rates of matrix products. The
    first one counts whose embeddings of noise and of random texts keep a cosine of MIN_COSINE with the float32 model's.
    """
    rates = {dtype: matrix_rate(dtype, rows=50) for dtype in (torch.float32, *HALF, "int8")}
    found = ", ".join(f"{name(dtype)} {rate / 1e9:.0f}" for dtype, rate in rates.items())
    worth_trying = [dtype for dtype in PREFERENCE if rates[dtype] > MIN_SPEEDUP * rates[torch.float32]]
    exact = build(torch.float32)
    model, chosen, cosines = exact, torch.float32, ""
    for dtype in sorted(worth_trying, key=lambda dtype: -rates[dtype] * PREFERENCE[dtype]):
        candidate = build(dtype)
        cosine = lowest_cosine(candidate, exact)
        cosines += f"; cosine of {name(dtype)} {cosine:.5f}"
        if cosine >= MIN_COSINE:
            model, chosen = candidate, dtype
            break
    print(f"miniclip: computing in {name(chosen)}; GFLOP/s of matrix products here: {found}{cosines}", file=sys.stderr)
    return model


@torch.no_grad()
def lowest_cosine(model: CLIP, other: CLIP) -> float:
    """The lowest cosine of two models' embeddings of four images of noise and four random texts."""
    generator = torch.Generator().manual_seed(0)
    size, length = model.config.vision.image_size, model.config.text.context_length
    image = torch.randn(4, 3, size, size, generator=generator)
    text = torch.randint(1, model.vocab_size - 1, (4, length), generator=generator)
    text[torch.arange(4), torch.tensor([length // 8, length // 4, length // 2, length - 1])] = model.vocab_size - 1
    pairs = zip(*[(each.encode_image(image), each.encode_text(text)) for each in (model, other)], strict=True)
    return min(F.cosine_similarity(mine.float(), others.float()).min().item() for mine, others in pairs)


def name(dtype: torch.dtype | str) -> str:
    """The dtype's name without its module, such as float16."""
    return str(dtype).removeprefix("torch.")
