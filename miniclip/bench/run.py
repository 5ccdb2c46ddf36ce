"""The benchmark: from settings to a report."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from miniclip.bench import report, tasks
from miniclip.bench.peers import chosen, encoders
from miniclip.bench.settings import TASKS, Settings
from miniclip.errors import UsageError
from miniclip.fast.half import EMULATED
from miniclip.fast.rates import HALF, MIN_SPEEDUP, matrix_rate, name
from miniclip.loading import build_model, load, named_models, new_model
from miniclip.models import CLIP

PACKAGES = ("torch", "torchvision", "clip-anytorch", "clip", "open_clip_torch", "transformers", "onnxruntime", "pillow")


@dataclass
class Report:
    """What a run has measured."""

    model: str
    machine: dict
    versions: dict[str, str]
    matrix_rates: dict[str, float]  # floating-point operations per second in matrix products, by dtype
    rows: list[tasks.Row] = field(default_factory=list)

    def as_dict(self) -> dict:
        rows = [{**row.as_dict(), "miniclip_is": report.ratio(self.rows, row)} for row in self.rows]
        best = [found for group in report.tasks_of(self.rows).values() if (found := report.best(group))]
        return {**vars(self), "rows": rows, "best": best}

    def draw(self, file: Path, format: str = "png") -> None:
        report.draw(self.rows, f"{self.model}, {self.machine['cpu']}, {tasks.threads()}", file, format)

    def heading(self) -> str:
        versions = ", ".join(f"{package} {version}" for package, version in self.versions.items())
        rates = ", ".join(f"{dtype} {rate / 1e9:.0f}" for dtype, rate in self.matrix_rates.items())
        return (
            f"{self.model} on {self.machine['cpu']}, {tasks.threads()}, {self.machine['capability']}; {versions}\n"
            f"matrix products of ViT-B's shapes, GFLOP/s: {rates}"
        )


@torch.no_grad()
def run(settings: Settings, show: Callable[[str], object] = print) -> Report:
    """Measure, giving `show` each table as it is done. UsageError for settings that make no sense."""
    if unknown := set(settings.what) - set(TASKS):
        raise UsageError(f"--what has {', '.join(sorted(unknown))}; expected some of {', '.join(TASKS)}")
    peers = chosen(settings.peers)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    model = random_model(settings.model)
    rates = {name(dtype): matrix_rate(dtype, rows=16, runs=1) for dtype in (torch.float32, *HALF)}
    rates |= {dtype: matrix_rate(getattr(torch, dtype)) for dtype in rates if rates[dtype] >= rates["float32"]}
    dtypes = _dtypes(settings.dtypes, rates)
    result = Report(settings.model, tasks.machine(), _versions(), rates)
    show(result.heading())
    for rows in _jobs(model, peers, dtypes, rates, settings):
        result.rows += rows
        show("\n" + report.table(rows))
    return result


def _jobs(
    model: CLIP, peers: list[str], dtypes: list[torch.dtype], rates: dict[str, float], settings: Settings
) -> Iterator[list[tasks.Row]]:
    seconds, wanted = settings.seconds, settings.what
    if {"image", "text", "classifier"} & set(wanted):
        theirs = [dtype for dtype in dtypes if dtype not in EMULATED]  # emulation is many times slower than float32
        ways = encoders(model, "miniclip", dtypes, settings.compile)
        ways += [way for peer in peers for way in encoders(model, peer, theirs, settings.compile)]
        if "image" in wanted:
            for batch in settings.batches:
                yield list(tasks.encode_images(model, ways, batch, seconds, rates))
        if "text" in wanted:
            for count in (1, 100):
                yield list(tasks.encode_texts(model, ways, count, seconds))
        if "classifier" in wanted:
            yield list(tasks.classifier(model, ways, seconds))
        del ways
    if "load" in wanted:
        yield list(tasks.loading(model, peers))
    if "memory" in wanted:
        yield list(tasks.loading(model, peers, encode=True))
    if "tokenizer" in wanted:
        yield list(tasks.tokenizers(peers, seconds / 5))
    if "preprocess" in wanted:
        yield list(tasks.preprocessing(model, peers, seconds / 5))


def random_model(source: str) -> CLIP:
    """A model of a name's shape with random weights that half precision can hold; or the one in a file, float32."""
    named = named_models().get(source)
    if named is None or named.url is None:
        return load(source, device="cpu", dtype=torch.float32)[0]
    torch.manual_seed(0)
    weights = new_model(named.config).state_dict()
    for tensor in weights.values():
        if tensor.is_floating_point():
            tensor.copy_(tensor.half())
    return build_model(weights, named.config)


def _dtypes(given: tuple[str, ...] | None, rates: dict[str, float]) -> list[torch.dtype]:
    if given is None:
        fast = [dtype for dtype in HALF if rates[name(dtype)] > MIN_SPEEDUP * rates["float32"]]
        return [torch.float32, *(fast[:1] if EMULATED else fast)]  # both are then computed in the same way
    known = {name(dtype): dtype for dtype in (torch.float32, *HALF, torch.int8)}
    if unknown := set(given) - set(known):
        raise UsageError(f"--dtypes has {', '.join(sorted(unknown))}; expected some of {', '.join(known)}")
    return [torch.float32, *(known[dtype] for dtype in given if dtype != "float32")]


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
