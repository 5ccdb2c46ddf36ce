"""`miniclip bench`: the run."""

from __future__ import annotations

import argparse
import importlib.metadata
import json

import torch

from miniclip.bench import report, tasks
from miniclip.bench.arguments import WHAT
from miniclip.bench.peers import chosen, encoders
from miniclip.fast.half import EMULATED
from miniclip.fast.rates import HALF, WORTH, matrix_rate, name
from miniclip.loading import build_model, load, named_models, new_model
from miniclip.models import CLIP

PACKAGES = ("torch", "torchvision", "clip-anytorch", "clip", "open_clip_torch", "transformers", "onnxruntime", "pillow")


@torch.no_grad()
def run(options: argparse.Namespace) -> dict:
    """Measure, print and write; returns what the JSON file has. ValueError for options that make no sense."""
    wanted = options.what.split(",")
    if unknown := set(wanted) - set(WHAT):
        raise ValueError(f"--what has {', '.join(sorted(unknown))}; expected some of {', '.join(WHAT)}")
    peers = chosen(options.peers)
    if options.threads:
        torch.set_num_threads(options.threads)
    model = random_model(options.model)
    rates = {name(dtype): matrix_rate(dtype, rows=16, runs=1) for dtype in (torch.float32, *HALF)}
    rates |= {dtype: matrix_rate(getattr(torch, dtype)) for dtype in rates if rates[dtype] >= rates["float32"]}
    dtypes = _dtypes(options.dtypes, rates)
    print(_heading(options.model, rates), flush=True)

    rows: list[tasks.Row] = []
    for produced in _jobs(model, wanted, peers, dtypes, rates, options):
        rows += produced
        print("\n" + report.table(rows[-len(produced) :]), flush=True)
    result = {
        "model": str(options.model),
        "machine": tasks.machine(),
        "versions": _versions(),
        "matrix_rates": rates,
        "rows": [{**row.as_dict(), "miniclip_is": report.ratio(rows, row)} for row in rows],
    }
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    if options.plot:
        title = f"{options.model}, {result['machine']['cpu']}, {tasks.threads()}"
        report.plot(rows, title, options.plot)
    return result


def _jobs(model: CLIP, wanted: list[str], peers: list[str], dtypes: list[torch.dtype], rates: dict, options):
    seconds = options.seconds
    if {"image", "text", "classifier"} & set(wanted):
        theirs = [dtype for dtype in dtypes if dtype not in EMULATED]  # it takes many times as long as their float32
        ways = encoders(model, "miniclip", dtypes, options.compile)
        ways += [way for peer in peers for way in encoders(model, peer, theirs, options.compile)]
        if "image" in wanted:
            for batch in map(int, options.batches.split(",")):
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


def _dtypes(given: str | None, rates: dict[str, float]) -> list[torch.dtype]:
    if given is None:
        fast = [dtype for dtype in HALF if rates[name(dtype)] > WORTH * rates["float32"]]
        return [torch.float32, *(fast[:1] if EMULATED else fast)]  # weights of either are then multiplied alike
    known = {name(dtype): dtype for dtype in (torch.float32, *HALF, torch.int8)}
    if unknown := set(given.split(",")) - set(known):
        raise ValueError(f"--dtypes has {', '.join(sorted(unknown))}; expected some of {', '.join(known)}")
    return [torch.float32, *(known[dtype] for dtype in given.split(",") if dtype != "float32")]


def _heading(model: str, rates: dict[str, float]) -> str:
    machine = tasks.machine()
    versions = ", ".join(f"{package} {version}" for package, version in _versions().items())
    found = ", ".join(f"{dtype} {rate / 1e9:.0f}" for dtype, rate in rates.items())
    return (
        f"{model} on {machine['cpu']}, {tasks.threads()}, {machine['capability']}; {versions}\n"
        f"matrix products of ViT-B's shapes, GFLOP/s: {found}"
    )


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
