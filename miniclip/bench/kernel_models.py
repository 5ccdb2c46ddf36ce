"""Whole models on the GPU at hand, beside the peers that are installed, with the same weights and inputs, in float16.

Part of `miniclip.kernels.check`.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from miniclip.bench.kernel_errors import random
from miniclip.bench.kernel_times import HALF, Rival, clocks, dry_time, once, race
from miniclip.bench.peers import Encoder, encoders, installed
from miniclip.config import CLIPConfig, PreprocessConfig, TextConfig, TransformerConfig, ViTConfig
from miniclip.loading import build_model, named_models
from miniclip.models import CLIP, convert_weights, set_backend

TEXTS, DRY_TEXTS = 1000, 3
NEW_LENGTHS = 12  # texts of a length that was not seen before, one after the other


def seeded_model(name: str, device: torch.device, dry: bool) -> CLIP:
    """A named model's shape with random weights, float32; in a dry run a small model."""
    block = TransformerConfig(width=64, layers=2, heads=1, mlp_width=256)
    small = CLIPConfig(16, ViTConfig(16, 8, block), TextConfig(77, 49_408, block), PreprocessConfig(16))
    torch.manual_seed(0)
    with device:
        return build_model(CLIP(small if dry else named_models()[name].config).state_dict())


def prompts(count: int, device: torch.device) -> Tensor:
    """Token ids of as many texts, 7 to 14 tokens long, as the prompts of ImageNet's classes are."""
    ids = torch.zeros(count, 77, dtype=torch.long)
    for row in range(count):
        end = 6 + row * 5 % 8
        ids[row, 0], ids[row, 1:end], ids[row, end] = 49_406, torch.randint(1, 49_406, (end - 1,)), 49_407
    return ids.to(device)


def models(name: str, device: torch.device, dry: bool, batches=(256, 1), peers: bool = True) -> Iterator[dict]:
    """encode_image for each batch, encode_text for many prompts and for one, then texts of new lengths."""
    whole = seeded_model(name, device, dry)
    model = convert_weights(build_model(whole.state_dict(), whole.config), HALF)
    others = list(_peers(whole)) if peers else []
    size = model.visual.input_resolution
    ids = prompts(DRY_TEXTS if dry else TEXTS, device)
    for batch in (2, 1) if dry else batches:
        pixels = random(batch, 3, size, size, dtype=HALF, device=device)
        rivals = _forms(model, model.encode_image, dry) + [Rival(peer.name, peer.image) for peer in others]
        yield from _rows(f"{name} encode_image", pixels, model, rivals, dry)
    for some in (ids, ids[:1]):
        rivals = _forms(model, model.encode_text, dry) + [Rival(peer.name, peer.text) for peer in others]
        yield from _rows(f"{name} encode_text", some, model, rivals, dry)
    yield from _new_lengths(name, model, ids, dry)


def _peers(whole: CLIP) -> Iterator[Encoder]:
    """onnxruntime is left out: its files are for the CPU."""
    for peer in installed():
        if peer != "onnxruntime":
            try:
                yield from encoders(whole, peer, [HALF], compiled=False)
            except Exception as fault:  # whatever version of another project is installed
                warnings.warn(f"{peer} is left out: {type(fault).__name__}: {fault}", stacklevel=2)


def _forms(model: CLIP, call: Callable, dry: bool) -> list[Rival]:
    """The ways in which a model of ours encodes. The first, plain PyTorch, is what all are compared with."""

    @contextlib.contextmanager
    def running(backend: str | None, fast: bool, graphs: bool):
        set_backend(model, backend)
        model.fast, model.graphs = fast, graphs
        try:
            yield
        finally:
            set_backend(model, None)
            model.fast, model.graphs = True, True

    backends = {None: "by default"} if dry else {"torch": "torch", "triton": "triton", None: "by default"}
    forms = [
        (f"miniclip {named}, {'fast' if fast else 'plain'}", backend, fast, False)
        for backend, named in backends.items()
        for fast in (False, True)
    ]
    forms.append(("miniclip by default, fast, small batches as graphs", None, True, True))
    return [Rival(name, call, partial(running, *settings)) for name, *settings in forms]


@torch.no_grad()
def _rows(what: str, inputs: Tensor, model: CLIP, rivals: list[Rival], dry: bool) -> Iterator[dict]:
    """A row for each, with the least cosine of its embeddings with the first one's.

    flops: those of the plain form. The fast form computes no padding: its texts need fewer.
    """
    with rivals[0].context(), FlopCounterMode(display=False) as counter:
        rivals[0].call(inputs[:1])
    flops, expected = counter.get_total_flops() * len(inputs), None
    for rival in rivals:
        row = {"operation": what, "shape": str(len(inputs)), "who": rival.name, "flops": flops}
        try:
            with rival.context():
                got = rival.call(inputs).float()
            expected = got if expected is None else expected
            row["cosine"] = F.cosine_similarity(got, expected).min().item()
        except Exception as fault:  # a peer that does not take these inputs
            row["failed"] = f"{type(fault).__name__}: {fault}"[:300]
        else:
            row |= race(rival, [(inputs,)], clocks(dry, with_latency=True))
        yield row


@torch.no_grad()
def _new_lengths(name: str, model: CLIP, ids: Tensor, dry: bool) -> Iterator[dict]:
    """Seconds of the first calls: cuDNN makes plans for them, and Triton compiles."""
    found = []
    for length in range(20, 20 + (2 if dry else NEW_LENGTHS)):
        some = ids[:1].expand(2 if dry else 64, -1).clone()
        some[:, 1:length], some[:, length] = 320, 49_407
        found.append((dry_time if dry else once)([lambda some=some: model.encode_text(some)]))
    yield {"operation": f"{name} encode_text", "shape": "64, new lengths", "who": "miniclip", "first_calls": found}


@torch.no_grad()
def compiled(name: str, device: torch.device, dry: bool) -> Iterator[dict]:
    """The plain form under torch.compile, in two of its modes. Compiling takes a minute, so this is the last stage."""
    model = convert_weights(seeded_model(name, device, dry), HALF)
    model.fast = False
    size = model.visual.input_resolution
    for mode in ("default", "reduce-overhead"):
        call = model.encode_image if dry else torch.compile(model.encode_image, mode=mode)
        for batch in (2, 1) if dry else (256, 1):
            pixels = random(batch, 3, size, size, dtype=HALF, device=device)
            row = {"operation": f"{name} encode_image", "shape": str(batch), "who": f"miniclip, torch.compile {mode}"}
            wanted = clocks(dry, with_latency=True)
            yield row | race(Rival("", call), [(pixels,)], {k: v for k, v in wanted.items() if k != "graph"})
        torch.compiler.reset()
