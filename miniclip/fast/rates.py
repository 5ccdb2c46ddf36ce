"""How fast this machine multiplies matrices of CLIP's shapes, which decides the dtype to compute in."""

from __future__ import annotations

import sys
import time

import torch

from miniclip.fast import half
from miniclip.fast.linear import Linear, linear

WIDTH = 768  # of ViT-B's blocks: 768 -> 2304 -> 768 -> 3072 -> 768
PRODUCTS = ((WIDTH, 3 * WIDTH), (WIDTH, WIDTH), (WIDTH, 4 * WIDTH), (4 * WIDTH, WIDTH))
HALF = (torch.float16, torch.bfloat16)  # the more accurate first
MIN_SPEEDUP = 1.5  # how much faster than float32 half precision must be to be chosen


@torch.no_grad()
def matrix_rate(dtype: torch.dtype, device: str | torch.device = "cpu", rows: int = 1600, runs: int = 3) -> float:
    """Floating-point operations a second in one block's four products with `rows` tokens, the best of `runs`.

    dtype: of the weights. They are multiplied as the models' fast forms do it.
    """
    is_cpu = torch.device(device).type == "cpu"
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


def fastest_dtype(device: str | torch.device = "cpu") -> torch.dtype:
    """What `load(dtype="auto")` takes: float16 on a GPU; on a CPU, what a quick measurement finds, which is printed."""
    if torch.device(device).type != "cpu":
        return torch.float16
    rates = {dtype: matrix_rate(dtype, rows=16, runs=1) for dtype in (torch.float32, *HALF)}
    best = max(HALF, key=lambda dtype: rates[dtype] * (1.2 if dtype is HALF[0] else 1))
    chosen = best if rates[best] > MIN_SPEEDUP * rates[torch.float32] else torch.float32
    found = ", ".join(f"{name(dtype)} {rate / 1e9:.0f}" for dtype, rate in rates.items())
    print(f"miniclip: computing in {name(chosen)}; GFLOP/s of matrix products here: {found}", file=sys.stderr)
    return chosen


def name(dtype: torch.dtype) -> str:
    """The dtype's name without its module, such as float16."""
    return str(dtype).removeprefix("torch.")
