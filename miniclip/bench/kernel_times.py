"""Times on the GPU at hand: its ceilings, each kernel and its PyTorch rivals, and whole models. Part of `check`.

Every operation is timed on many sets of inputs in turn, together more than twice the L2 cache, so that none finds its
inputs there. "eager" is the time a call takes from Python, launches included; "graph" is the same calls replayed as a
CUDA graph, which is what the GPU itself needs.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from miniclip import ops, similarity
from miniclip.bench import kernel_errors as correctness
from miniclip.bench.kernel_errors import random
from miniclip.config import MODELS
from miniclip.fast import ops as fused
from miniclip.kernels import tiles
from miniclip.kernels.contrastive_loss import contrastive_loss
from miniclip.models import CLIP, convert_weights, set_backend

HALF = torch.float16
SDPA = {f"SDPA {name}": getattr(SDPBackend, name) for name in (
    "FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH"
)}  # fmt: skip
MAX_SETS = 256
REPEATS, REPEAT_SECONDS = 5, 0.02


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


def copies(make: Callable[[], tuple], cache_bytes: int) -> list[tuple]:
    """So many sets of inputs that they do not fit into the L2 cache twice."""
    first = make()
    size = sum(x.numel() * x.element_size() for x in first if isinstance(x, Tensor))
    return [first, *(make() for _ in range(min(MAX_SETS, 2 * cache_bytes // size)))]


def ceilings(device: torch.device) -> dict[str, float]:
    """What the GPU does at best: bytes a second copied, both directions counted, and float operations in matrices."""
    source = torch.empty(2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    found = {"copy_bytes": 2 * source.numel() / eager_time([lambda: target.copy_(source)])}
    for dtype in (torch.float16, torch.bfloat16):
        a = random(8192, 8192, dtype=dtype, device=device)
        found[str(dtype).removeprefix("torch.") + "_flops"] = 2 * 8192**3 / eager_time([lambda a=a: a @ a])
    return found


Rival = tuple[str, Callable, contextlib.AbstractContextManager]


def rivals(device: torch.device) -> Iterator[tuple[str, str, int, Callable[[], tuple], list[Rival]]]:
    """Operation, shape, the size that dispatch.FASTER counts, a maker of inputs, and who competes: the kernel first.

    Each of them takes the inputs and delivers the same result, in the same layout.
    """
    half, none = {"dtype": HALF, "device": device}, contextlib.nullcontext()
    for n, length, heads, d, causal, name in correctness.ATTENTION:
        make = lambda n=n, length=length, heads=heads, d=d: (random(n, length, 3, heads, d, **half),)  # noqa: E731
        kernel = lambda qkv, causal=causal: ops.attention(qkv, causal, backend="triton")  # noqa: E731
        pytorch = lambda qkv, causal=causal: ops.attention(qkv, causal, backend="torch")  # noqa: E731
        named = [(label, pytorch, sdpa_kernel(backend)) for label, backend in SDPA.items()]
        yield "attention", f"{name} {n} x {length} x {heads}", length, make, [("kernel", kernel, none), *named]

    for count in correctness.PROMPTS:
        packed, starts, longest = correctness.prompts(count, **half)
        make = lambda x=packed, n=count, l=longest: (torch.randn_like(x), random(n, l, 3, 8, 64, **half))  # noqa: E731, E741
        kernel = lambda x, _, s=starts, l=longest: fused.attention_varlen(x, s, l, True, backend="triton")  # noqa: E731, E741
        padded = lambda _, x: ops.attention(x, True, backend="torch")  # noqa: E731
        named = [(f"padded, {label}", padded, sdpa_kernel(backend)) for label, backend in SDPA.items()]
        yield "attention_varlen", f"{count} prompts", longest, make, [("kernel", kernel, none), *named]

    scale = torch.tensor(100.0, device=device)
    for n, m, width in correctness.CLASSES:
        make = lambda n=n, m=m, width=width: (random(n, width, **half), random(m, width, **half))  # noqa: E731

        def usual(x: Tensor, c: Tensor) -> Tensor:
            return (scale * (F.normalize(x, dim=1) @ F.normalize(c, dim=1).T)).softmax(1)

        def usual_topk(x: Tensor, c: Tensor):
            return usual(x, c).topk(5)

        for operation, form, options in (("topk", usual_topk, (5,)), ("softmax", usual, ())):
            name = "similarity_" + operation
            function = getattr(similarity, name)
            kernel = lambda x, c, f=function, o=options: f(x, c, scale, *o, backend="triton")  # noqa: E731
            competing = [("kernel", kernel, none), ("eager", form, none), ("compiled", torch.compile(form), none)]
            yield name, f"{n} x {m} x {width}", n, make, competing

    for count, width in correctness.PAIRS:

        def step(loss: Callable) -> Callable:
            return lambda *leaves: torch.autograd.grad(loss(*leaves), leaves)

        def chunked(dtype: torch.dtype) -> Callable:
            return step(lambda image, text, s: correctness.chunked_loss(image, text, s.to(dtype)))

        def dense(image: Tensor, text: Tensor, s: Tensor) -> Tensor:
            logits, own = s * image.float() @ text.float().T, torch.arange(len(image), device=image.device)
            return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2

        make = lambda count=count, width=width: tuple(correctness.pairs(count, width, **half))  # noqa: E731
        competing = [("kernel", step(contrastive_loss), none), ("chunked, float32", chunked(torch.float32), none)]
        competing += [("chunked, bfloat16", chunked(torch.bfloat16), none), ("dense, float32", step(dense), none)]
        yield "contrastive_loss", f"{count} x {width}, with gradient", count, make, competing

    for count, width in correctness.ROWS:
        weight, bias = torch.randn(2, width, device=device)
        half_bias = bias.to(HALF)
        make = lambda count=count, width=width: tuple(random(2, count, width, **half))  # noqa: E731
        norm = lambda x, y, backend, w=weight, b=bias: fused.add_layer_norm(x, y, w, b, backend=backend)  # noqa: E731
        gelu = lambda x, _, backend, b=half_bias: fused.bias_quick_gelu(x, b, backend=backend)  # noqa: E731
        for name, function in (("add_layer_norm", norm), ("bias_quick_gelu", gelu)):
            kernel = lambda x, y, f=function: f(x, y, "triton")  # noqa: E731
            eager = lambda x, y, f=function: f(x, y, "torch")  # noqa: E731
            competing = [("kernel", kernel, none), ("eager", eager, none), ("compiled", torch.compile(eager), none)]
            yield name, f"{count} x {width}", count * width, make, competing


def race(call: Callable, context, sets: list[tuple]) -> dict:
    """Seconds in both ways, and the bytes that one call needs at its peak beyond its inputs; or what went wrong."""
    found = {}
    with context:
        calls = [lambda inputs=inputs: call(*inputs) for inputs in sets]
        for name, clock in (("eager", eager_time), ("graph", graph_time)):
            try:
                found[name] = clock(calls)
            except Exception as fault:  # a rival that does not take the shape, or can't be captured: say so and go on
                found[name + "_failed"] = f"{type(fault).__name__}: {fault}"[:300]
        if "eager" in found:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            calls[0]()
            torch.cuda.synchronize()
            found["peak_bytes"] = torch.cuda.max_memory_allocated() - before
    return found


MODELS_TIMED = [("ViT-B/32", 256), ("ViT-B/32", 1), ("ViT-L/14", 256), ("RN50", 256)]
TEXTS = 1000


def towers(device: torch.device) -> Iterator[tuple[str, str, int, float, Callable[[], object]]]:
    """Model, how it runs, how many pictures or texts, float operations of them all in the plain form, and the call.

    Plain is what models/ spells out, saving what fast/towers.py does instead, with fewer operations than counted:
    with short texts, and nowhere else, that can be more than the ceiling allows.
    """
    ids = torch.zeros(TEXTS, 77, dtype=torch.long, device=device)
    ends = (6 + torch.arange(TEXTS) * 5 % 8).tolist()  # 7 to 14 tokens
    for row, end in enumerate(ends):
        ids[row, :end] = torch.randint(1, 49_406, (end,), device=device)
        ids[row, end] = 49_407
    for name, batch in MODELS_TIMED:
        with device:
            model = convert_weights(CLIP(MODELS[name]), HALF).eval()
        size = model.visual.input_resolution
        image = random(batch, 3, size, size, dtype=HALF, device=device)
        work = [("encode_image", image, model.encode_image)]
        if (name, batch) == MODELS_TIMED[0]:
            work.append(("encode_text", ids, model.encode_text))
        for method, inputs, function in work:
            model.fast = False
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                function(inputs[:1])
            flops = counter.get_total_flops() * len(inputs)
            shape = f"{name} {method} {len(inputs)}"
            for backend in ("torch", "triton"):
                set_backend(model, backend)
                for fast in (True, False):
                    model.fast = fast
                    form = f"{backend}, {'saving' if fast else 'plain'}"
                    yield shape, form, len(inputs), flops, lambda f=function, x=inputs: f(x)
            set_backend(model, "torch")
            compiled = torch.compile(function)
            yield shape, "torch, compiled", len(inputs), flops, lambda f=compiled, x=inputs: f(x)
        del model, work


def winners(rows: list[dict], architecture: str) -> dict[str, list[int]]:
    """Operation -> the sizes at which the kernel beat every rival, both from Python and in a graph."""
    won: dict[str, dict[int, bool]] = {}
    for row in rows:
        kernel, others = row["times"]["kernel"], [t for name, t in row["times"].items() if name != "kernel"]
        best = {way: min((t[way] for t in others if way in t), default=0.0) for way in ("eager", "graph")}
        wins = all(way in kernel and kernel[way] < best[way] for way in best)
        sizes = won.setdefault(row["operation"], {})
        sizes[row["size"]] = sizes.get(row["size"], True) and wins
    return {name: sorted(size for size, wins in sizes.items() if wins) for name, sizes in won.items()}


def measure(device: torch.device, say: Callable, seconds: float) -> dict:
    """Everything, as far as the time allows; prints as it goes."""
    deadline = time.monotonic() + seconds
    properties = torch.cuda.get_device_properties(device)
    report = {"device": properties.name, "torch": torch.__version__, "triton": triton.__version__}
    report |= {"cuda": torch.version.cuda or torch.version.hip, "cudnn": torch.backends.cudnn.version()}
    report |= {"date": time.strftime("%Y-%m-%d"), "ceilings": ceilings(device), "operations": [], "models": []}
    say("\n" + ", ".join(f"{key} {report[key]}" for key in ("device", "torch", "triton", "cuda", "cudnn", "date")))
    copy, matrix = report["ceilings"]["copy_bytes"], report["ceilings"]["float16_flops"]
    say(f"ceilings: copy {copy / 1e12:.2f} TB/s, float16 matrices {matrix / 1e12:.0f} TFLOP/s")

    say(f"\n{'microseconds a call':82} {'eager':>10} {'graph':>10} {'peak MiB':>10}")
    with torch.no_grad():
        for operation, shape, size, make, competing in rivals(device):
            if time.monotonic() > deadline:
                say(f"{operation} {shape}: no time left")
                continue
            torch.compiler.reset()  # what was compiled for other shapes would count towards a limit
            with torch.enable_grad() if operation == "contrastive_loss" else contextlib.nullcontext():
                sets = copies(make, properties.L2_cache_size)
                times = {name: race(call, context, sets) for name, call, context in competing}
            report["operations"].append({"operation": operation, "shape": shape, "size": size, "times": times})
            for name, row in times.items():
                peak = f"{row['peak_bytes'] / 2**20:10.1f}" if "peak_bytes" in row else ""
                say(f"{operation:18} {shape:30} {name:32} {_columns(row, 1e6)} {peak}")
            del sets

        say(f"\n{'milliseconds a batch':64} {'eager':>10} {'graph':>10} {'of ceiling':>10}")
        for shape, form, count, flops, call in towers(device):
            if time.monotonic() > deadline:
                say(f"{shape} {form}: no time left")
                continue
            row = race(call, contextlib.nullcontext(), [()])
            best = min(row.get("eager", float("inf")), row.get("graph", float("inf")))
            row |= {"shape": shape, "form": form, "per_second": count / best, "of_ceiling": flops / best / matrix}
            report["models"].append(row)
            say(f"{shape:40} {form:23} {_columns(row, 1e3)} {row['of_ceiling']:9.0%}")
    report["faster"] = winners(report["operations"], tiles.architecture(device))
    say(f"\nsizes at which the kernel beat every rival on {tiles.architecture(device)}, for dispatch.FASTER:")
    for operation, sizes in report["faster"].items():
        say(f"{operation:18} {sizes}")
    return report


def _columns(row: dict, unit: float) -> str:
    return " ".join(f"{unit * row[way]:10.2f}" if way in row else f"{'failed':>10}" for way in ("eager", "graph"))
