"""The operations timed on the GPU at hand, each beside what PyTorch has for it. Part of `miniclip.kernels.check`.

"eager" is the time of a call from Python, with its launches, while the GPU is kept busy. "graph" is the time of these
calls in a CUDA graph, which is what the GPU itself needs. Both go through many sets of inputs in turn, together more
than twice the L2 cache, so that no call finds its inputs there.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from miniclip import cosines, ops
from miniclip.bench import kernel_errors as errors
from miniclip.bench.kernel_errors import random
from miniclip.fast import ops as fused
from miniclip.fast.rates import name as dtype_name
from miniclip.kernels import tiles
from miniclip.kernels.add_layer_norm import add_layer_norm
from miniclip.kernels.attention import attention, attention_varlen
from miniclip.kernels.bias_quick_gelu import bias_quick_gelu
from miniclip.kernels.contrastive_loss import contrastive_loss
from miniclip.kernels.dispatch import MEASURES
from miniclip.kernels.similarity import similarity_softmax, similarity_topk
from miniclip.kernels.tiles import Tile

HALF = torch.float16
SDPA = {
    "SDPA": None,  # which backend PyTorch takes by itself
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
}
TILES = {  # tiles of attention that are timed beside the one in tiles.py: longest sequence -> tiles
    16: [Tile(16, 16, 2)],
    32: [Tile(32, 32, 1), Tile(32, 32, 4)],
    64: [Tile(64, 64, 2), Tile(32, 64, 2)],
    80: [Tile(32, 32, 2, 2), Tile(64, 64, 4, 3), Tile(128, 64, 4, 2)],
    10**6: [Tile(64, 64, 4, 3), Tile(128, 64, 8, 2), Tile(128, 64, 8, 3), Tile(128, 128, 8, 2)],
}
DRY_TILES = {10**6: [Tile(32, 32, 4, 2)]}
MAX_SETS = 256
REPEATS, REPEAT_SECONDS = 5, 0.02


class Rival(NamedTuple):
    """One way of computing an operation. All ways take the same inputs and deliver the same result and layout."""

    name: str
    call: Callable
    context: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    counts: bool = True  # whether the kernel has to be faster than it


class Contest(NamedTuple):
    operation: str
    shape: str
    measure: tuple[int, int]  # the two numbers by which `miniclip.kernels.dispatch` chooses
    make: Callable[[], tuple]  # a set of inputs
    rivals: list[Rival]  # the first is the kernel as it is


def eager_time(calls: list[Callable[[], object]]) -> float:
    """Seconds a call, from Python; the median of some repeats."""
    for call in calls[:3]:
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    calls[0]()
    torch.cuda.synchronize()
    rounds = max(1, round(REPEAT_SECONDS / max(time.perf_counter() - start, 1e-7) / len(calls)))
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        for _ in range(rounds):
            for call in calls:
                call()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / rounds / len(calls))
    return statistics.median(times)


def graph_time(calls: list[Callable[[], object]]) -> float:
    """Seconds a call, as a CUDA graph of all of them; the median of some replays."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:3]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    torch.cuda.synchronize()
    times = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / len(calls))
    return statistics.median(times)


def latency(calls: list[Callable[[], object]]) -> float:
    """Seconds from a call to its result while the GPU does nothing else; the median of some calls."""
    times = []
    for i in range(30):
        torch.cuda.synchronize()
        start = time.perf_counter()
        calls[i % len(calls)]()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[5:])


def once(calls: list[Callable[[], object]]) -> float:
    """Seconds from the first call to its result, compilers included."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    calls[0]()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def dry_time(calls: list[Callable[[], object]]) -> float:
    """In place of the clocks above where there is no GPU: one call, and a second that is made up."""
    calls[0]()
    return 1.0


CLOCKS = {"eager": eager_time, "graph": graph_time}


def clocks(dry: bool, with_latency: bool = False) -> dict[str, Callable]:
    wanted = CLOCKS | ({"latency": latency} if with_latency else {})
    return dict.fromkeys(wanted, dry_time) if dry else wanted


def copies(make: Callable[[], tuple], cache_bytes: int) -> list[tuple]:
    """So many sets of inputs that they do not fit into the L2 cache twice."""
    first = make()
    size = sum(x.numel() * x.element_size() for x in first if isinstance(x, Tensor))
    return [first, *(make() for _ in range(min(MAX_SETS, 2 * cache_bytes // size)))]


def race(rival: Rival, sets: list[tuple], wanted: dict[str, Callable]) -> dict:
    """Seconds by each clock, and the bytes that a call needs at its peak beyond its inputs; or what went wrong."""
    found = {}
    with rival.context():
        calls = [lambda inputs=inputs: rival.call(*inputs) for inputs in sets]
        for name, clock in wanted.items():
            try:
                found[name] = clock(calls)
            except Exception as fault:  # it does not take the shape, or can't be captured
                found[name + "_failed"] = f"{type(fault).__name__}: {fault}"[:300]
                if name == "graph":
                    renew_generator()
        if "eager" in found and torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            calls[0]()
            torch.cuda.synchronize()
            found["peak_bytes"] = torch.cuda.max_memory_allocated() - before
    return found


def renew_generator() -> None:
    """A capture that fails may leave PyTorch's random numbers as if it went on, and later inputs could not be drawn."""
    if torch.cuda.is_available():
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        generator.graphsafe_set_state(torch.Generator("cuda").graphsafe_get_state())


def ceilings(device: torch.device, dry: bool) -> Iterator[dict]:
    """What the GPU does at best: bytes a second copied, both directions counted, and float operations in matrices."""
    clock = dry_time if dry else eager_time
    source = torch.empty(2**10 if dry else 2**30, dtype=torch.uint8, device=device)
    target, size = torch.empty_like(source), 64 if dry else 8192
    row = {"operation": "ceilings", "copy_bytes": 2 * source.numel() / clock([lambda: target.copy_(source)])}
    for dtype in (torch.float16, torch.bfloat16):
        a = random(size, size, dtype=dtype, device=device)
        row[f"{dtype_name(dtype)}_flops"] = 2 * size**3 / clock([lambda a=a: a @ a])
    yield row


def times(contests: Callable, device: torch.device, dry: bool) -> Iterator[dict]:
    """A row for each rival of each contest."""
    cache = 0 if dry else torch.cuda.get_device_properties(device).L2_cache_size
    for contest in contests(device, dry):
        torch.compiler.reset()  # what was compiled for other shapes counts towards a limit
        sets = copies(contest.make, cache)
        for rival in contest.rivals:
            row = {"operation": contest.operation, "shape": contest.shape, "measure": contest.measure}
            yield row | {"who": rival.name, "counts": rival.counts} | race(rival, sets, clocks(dry))


def attention_contests(device: torch.device, dry: bool) -> Iterator[Contest]:
    for n, length, heads, d, causal, name in errors.DRY_ATTENTION if dry else errors.ATTENTION:
        make = lambda n=n, length=length, heads=heads, d=d: (random(n, length, 3, heads, d, dtype=HALF, device=device),)  # noqa: E731
        kernel = lambda qkv, causal=causal: attention(qkv, causal)  # noqa: E731
        pytorch = lambda qkv, causal=causal: ops.attention(qkv, causal, backend="torch")  # noqa: E731
        candidates = next(found for most, found in (DRY_TILES if dry else TILES).items() if length <= most)
        others = [Rival(f"kernel, {tuple(tile)}", kernel, lambda t=tile: using(t), False) for tile in candidates]
        measure = MEASURES["attention"].of(make()[0])
        yield Contest("attention", f"{name} {n} x {length} x {heads}", measure, make, [
            Rival("kernel", kernel), *_sdpa(pytorch), *others
        ])  # fmt: skip


@contextlib.contextmanager
def using(tile: Tile):
    """Attention with this tile in place of the table's."""
    table, tiles.tile_for = tiles.tile_for, lambda table, device, size: tile
    try:
        yield
    finally:
        tiles.tile_for = table


def packed_contests(device: torch.device, dry: bool) -> Iterator[Contest]:
    """The rivals attend to texts that are padded to the longest one."""
    for count in errors.DRY_PROMPTS if dry else errors.PROMPTS:
        packed, starts, longest = errors.prompts(count, HALF, device)
        make = lambda x=packed, n=count, most=longest: (  # noqa: E731
            torch.randn_like(x), random(n, most, 3, 8, 64, dtype=HALF, device=device)
        )  # fmt: skip
        kernel = lambda x, _, s=starts, most=longest: attention_varlen(x, s, most, True)  # noqa: E731
        padded = lambda _, x: ops.attention(x, True, backend="torch")  # noqa: E731
        yield Contest("attention_varlen", f"{count} prompts", (longest, count), make, [
            Rival("kernel", kernel), *_sdpa(padded)
        ])  # fmt: skip


def _sdpa(call: Callable) -> list[Rival]:
    return [Rival("SDPA", call)] + [
        Rival(name, call, lambda b=backend: sdpa_kernel(b)) for name, backend in SDPA.items() if backend is not None
    ]


def similarity_contests(device: torch.device, dry: bool) -> Iterator[Contest]:
    scale = torch.tensor(100.0, device=device)
    for n, m, width in errors.DRY_CLASSES if dry else errors.CLASSES:
        make = lambda n=n, m=m, width=width: tuple(random(k, width, dtype=HALF, device=device) for k in (n, m))  # noqa: E731

        def usual(x: Tensor, c: Tensor) -> Tensor:
            return (scale * (F.normalize(x, dim=1) @ F.normalize(c, dim=1).T)).softmax(1)

        def usual_topk(x: Tensor, c: Tensor):
            return usual(x, c).topk(5)

        for operation, kernel, plain, half in (
            ("similarity_topk", similarity_topk, cosines.similarity_topk, usual_topk),
            ("similarity_softmax", similarity_softmax, cosines.similarity_softmax, usual),
        ):
            options = (5,) if operation == "similarity_topk" else ()
            yield Contest(operation, f"{n} x {m} x {width}", (n, n * m), make, [
                Rival("kernel", lambda x, c, f=kernel, o=options: f(x, c, scale, *o)),
                Rival("PyTorch, float32", lambda x, c, f=plain, o=options: f(x, c, scale, *o, backend="torch")),
                Rival("PyTorch, half precision", half),
            ])  # fmt: skip


def loss_contests(device: torch.device, dry: bool) -> Iterator[Contest]:
    """bfloat16 is shown but does not count: it is less accurate than the kernel."""

    def step(loss: Callable) -> Callable:
        def run(*leaves: Tensor):
            with torch.enable_grad():
                return torch.autograd.grad(loss(*leaves), leaves)

        return run

    for count, width in errors.DRY_PAIRS if dry else errors.PAIRS:
        make = lambda count=count, width=width: tuple(errors.pairs(count, width, HALF, device))  # noqa: E731
        whole = lambda *leaves: errors.chunked_loss(*leaves, chunk=len(leaves[0]))  # noqa: E731
        bfloat16 = lambda image, text, s: errors.chunked_loss(image, text, s.bfloat16())  # noqa: E731
        yield Contest("contrastive_loss", f"{count} x {width}, with gradient", (count, count**2), make, [
            Rival("kernel", step(contrastive_loss)),
            Rival("in chunks, float32", step(errors.chunked_loss)),
            Rival("in chunks, bfloat16", step(bfloat16), counts=False),
            *([Rival("whole, float32", step(whole))] if count <= 8192 else []),
        ])  # fmt: skip


def row_contests(device: torch.device, dry: bool) -> Iterator[Contest]:
    for count, width in errors.DRY_ROWS if dry else errors.ROWS:
        weight, bias = torch.randn(2, width, device=device)
        half_bias = bias.to(HALF)
        make = lambda count=count, width=width: tuple(random(2, count, width, dtype=HALF, device=device))  # noqa: E731
        norm = lambda x, y, w=weight, b=bias: add_layer_norm(x, y, w, b)  # noqa: E731
        plain_norm = lambda x, y, w=weight, b=bias: fused.add_layer_norm(x, y, w, b, backend="torch")  # noqa: E731
        gelu = lambda x, _, b=half_bias: bias_quick_gelu(x, b)  # noqa: E731
        plain_gelu = lambda x, _, b=half_bias: fused.bias_quick_gelu(x, b, backend="torch")  # noqa: E731
        silu = lambda x, _: F.silu(x)  # noqa: E731
        shape, measure = f"{count} x {width}", (width, count * width)
        yield Contest("add_layer_norm", shape, measure, make, [Rival("kernel", norm), Rival("PyTorch", plain_norm)])
        # Folded into SiLU, QuickGELU takes one pass, and its bias none: that is what the fast forms do otherwise.
        rivals = [Rival("kernel", gelu), Rival("SiLU alone", silu), Rival("PyTorch", plain_gelu, counts=False)]
        yield Contest("bias_quick_gelu", shape, measure, make, rivals)
