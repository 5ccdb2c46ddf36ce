"""What is timed: encoding pictures and texts, a zero-shot classifier, loading, tokenizing, preprocessing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from miniclip.bench.measure import Times, by_turns
from miniclip.bench.peers import Encoder, runs_in_openai
from miniclip.data.templates import TEMPLATES
from miniclip.embed import embed_texts
from miniclip.loading import blank_model, build_model
from miniclip.models import CLIP, convert_weights
from miniclip.preprocess import Preprocess
from miniclip.save import save_checkpoint
from miniclip.tokenizer import tokenize
from miniclip.weights import CheckpointError

CLASSES = 1000  # classes of the zero-shot classifier
# A sample of class names with lengths as ImageNet's: one to three words.
NAMES = (
    "tench", "great white shark", "house finch", "electric locomotive", "tabby cat", "bell pepper", "lighthouse",
    "red fox", "king penguin", "space bar", "paper towel", "cliff dwelling", "bassoon", "hot pot", "ostrich",
    "dung beetle", "garter snake", "bullet train", "ice cream", "mountain bike", "barn", "parachute", "wine bottle",
    "soup bowl",
)  # fmt: skip
PROMPTS = [template.replace("{}", name) for name in NAMES for template in TEMPLATES["imagenet"]]
SHORT = PROMPTS[::7]  # 275 prompts, neighbours nearly always of different templates


@dataclass(frozen=True)
class Row:
    """The times of one implementation in one setting, for one task."""

    what: str
    name: str
    setting: str
    count: int  # items in one run
    times: Times
    agreement: float | None = None  # least cosine with miniclip's float32, or share of equal outputs
    share: float | None = None  # reached share of the machine's matrix rate
    peak_mb: float | None = None
    extrapolated: bool = False

    @property
    def label(self) -> str:
        return f"{self.name} {self.setting}".strip()

    def as_dict(self) -> dict:
        return {**asdict(self), "per_second": self.count / self.times.median}


def encode_images(model: CLIP, ways: Sequence[Encoder], batch: int, seconds: float, rates: dict) -> Iterator[Row]:
    size = model.visual.input_resolution
    pixels = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter:  # on the meta device: it does not count a CPU's fused attention
        blank_model(model.config, torch.float32).visual(pixels[:1].to("meta"))
    yield from _encode(f"encode_image, batch {batch}", ways, "image", pixels, seconds, rates, counter.get_total_flops())


def encode_texts(model: CLIP, ways: Sequence[Encoder], count: int, seconds: float) -> Iterator[Row]:
    ids = model.tokenize(SHORT[:count])
    yield from _encode(f"encode_text, {count} prompt{'s' * (count > 1)}", ways, "text", ids, seconds, {}, 0)


def _encode(
    what: str, ways: Sequence[Encoder], tower: str, inputs: Tensor, seconds: float, rates: dict, flops: float
) -> Iterator[Row]:
    runs = {way.label: partial(getattr(way, tower), inputs) for way in ways}
    times, embeddings = by_turns(runs, seconds)
    expected = embeddings[ways[0].label]
    for way in ways:
        cosine = F.cosine_similarity(embeddings[way.label].float(), expected.float()).min().item()
        rate = rates.get(way.setting.split()[0])
        share = flops * len(inputs) / times[way.label].median / rate if rate and flops else None
        yield Row(what, way.name, way.setting, len(inputs), times[way.label], cosine, share)


def classifier(model: CLIP, ways: Sequence[Encoder], seconds: float) -> Iterator[Row]:
    """The prompts of 1,000 classes, extrapolated from a few. Peers encode each class by itself, as openai/CLIP does."""
    templates = TEMPLATES["imagenet"]
    of_a_class = model.tokenize(PROMPTS[: len(templates)])
    runs: dict[str, Callable] = {}
    classes: dict[str, int] = {}
    for way in ways:
        if way.model:
            runs[way.label] = lambda model=way.model: embed_texts(model, PROMPTS)[0]
            classes[way.label] = len(NAMES)  # with more classes, more prompts have the same beginning
        else:
            runs[way.label], classes[way.label] = partial(way.text, of_a_class), 1
    times, embeddings = by_turns(runs, seconds)
    expected = embeddings[ways[0].label][: len(templates)].float()
    for way in ways:
        found = embeddings[way.label][: len(templates)].float()
        whole = times[way.label].scaled(CLASSES / classes[way.label])
        what = f"classifier, {CLASSES:,} classes x {len(templates)} templates"
        cosine = F.cosine_similarity(found, expected).min().item()
        yield Row(what, way.name, way.setting, CLASSES * len(templates), whole, cosine, extrapolated=True)


def tokenizers(peers: Sequence[str], seconds: float) -> Iterator[Row]:
    ways: dict[str, Callable[[], Tensor]] = {"miniclip": lambda: tokenize(SHORT)}
    if "openai" in peers:
        import clip

        ways["openai/CLIP"] = lambda: clip.tokenize(SHORT)
    if "open_clip" in peers:
        import open_clip

        theirs = open_clip.tokenizer.SimpleTokenizer()
        ways["open_clip"] = lambda: theirs(SHORT)
    if "transformers" in peers:
        rust = _transformers_tokenizer()
        ways["transformers"] = lambda: rust(SHORT, padding="max_length", max_length=77, return_tensors="pt").input_ids
    times, ids = by_turns(ways, seconds)
    for name in ways:
        end = ids["miniclip"].argmax(dim=-1, keepdim=True)
        counts = torch.arange(77) <= end  # transformers pads with the end token
        equal = ((ids[name] == ids["miniclip"]) | ~counts).all(dim=1).double().mean().item()
        yield Row(f"tokenize, {len(SHORT)} short prompts", name, "", len(SHORT), times[name], equal)


def _transformers_tokenizer():
    """The tokenizer in Rust, made from miniclip's table: the files of a released model are not needed."""
    from transformers import CLIPTokenizerFast

    from miniclip.tokenizer import SPECIAL_TOKENS, _read_merge_file

    merges, ids = _read_merge_file()
    spelling = {i: text for text, i in ids.items()}
    pairs = [(spelling[left], spelling[right]) for left, right in merges]
    return CLIPTokenizerFast(vocab=ids | SPECIAL_TOKENS, merges=pairs)


def preprocessing(model: CLIP, peers: Sequence[str], seconds: float) -> Iterator[Row]:
    noise = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    ours = Preprocess(model.config.preprocess)
    size = model.visual.input_resolution
    ways: dict[str, Callable[[], Tensor]] = {"miniclip": lambda: ours(image)}
    if "openai" in peers:
        from clip.clip import _transform

        theirs = _transform(size)
        ways["openai/CLIP"] = lambda: theirs(image)
    if "open_clip" in peers:
        from open_clip import image_transform

        transform = image_transform(size, is_train=False)
        ways["open_clip"] = lambda: transform(image)
    times, pixels = by_turns(ways, seconds)
    for name in ways:
        equal = (pixels[name] == pixels["miniclip"]).double().mean().item()
        yield Row("preprocess, 640 x 480", name, "", 1, times[name], equal)


def loading(model: CLIP, peers: Sequence[str], encode: bool = False, rounds: int = 3) -> Iterator[Row]:
    """Load in a new process each time, to measure the peak of memory; with `encode`, also encode pictures and texts.

    The file is a TorchScript archive of half weights, as OpenAI's are; transformers gets a directory of its own.
    """
    known = ("openai", "open_clip", "transformers") if runs_in_openai(model) else ()  # they read such a file
    peers = [peer for peer in peers if peer in known]
    settings = [("miniclip", "float32"), ("miniclip", "float16"), *((peer, "float32") for peer in peers)]
    work = str(model.visual.input_resolution if encode else 0)
    with tempfile.TemporaryDirectory() as folder:
        half = convert_weights(build_model(model.state_dict(), model.config), torch.float16).state_dict()
        _save_archive(half, Path(folder) / "openai.pt")
        try:
            if "transformers" in peers:
                save_checkpoint(model.config, half, Path(folder) / "transformers")
        except CheckpointError:  # transformers has no ModifiedResNet
            settings.remove(("transformers", "float32"))
        found: dict[tuple, list[dict]] = {setting: [] for setting in settings}
        for _ in range(rounds):
            for setting, results in found.items():
                command = [sys.executable, "-m", "miniclip.bench.load_once", *setting, folder, work]
                results.append(json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout))
    for (peer, dtype), results in found.items():
        times = Times.of([result["seconds"] for result in results])
        peak = min(result["peak"] for result in results) / 1e6 if "peak" in results[0] else None
        what = "load, embed 8 pictures and 8 texts" if encode else "load"
        yield Row(what, "openai/CLIP" if peer == "openai" else peer, dtype, 1, times, peak_mb=peak)


def _save_archive(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a TorchScript archive of modules that have these tensors, and no code."""
    root = torch.nn.Module()
    for name, tensor in tensors.items():
        module, (*parents, last) = root, name.split(".")
        for parent in parents:
            if not hasattr(module, parent):
                module.add_module(parent, torch.nn.Module())
            module = getattr(module, parent)
        module.register_buffer(last, tensor)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, but OpenAI's files use it
        torch.jit.script(root).save(path)


def threads() -> str:
    """"1 thread", "2 threads"."""
    count = torch.get_num_threads()
    return f"{count} thread{'s' * (count > 1)}"


def machine() -> dict:
    """What the figures depend on, apart from versions."""
    model = ""
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return {"cpu": model, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "platform": sys.platform,
            "capability": torch.backends.cpu.get_cpu_capability()}  # fmt: skip
