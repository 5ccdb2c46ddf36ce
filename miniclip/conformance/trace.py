"""Trace: every named stage of a forward pass of the model itself."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from PIL import Image
from torch import Tensor, nn

from miniclip.conformance.forward import Forward, key_of
from miniclip.conformance.rules import RULES, bands, utf8
from miniclip.mobileclip import stages as mobileclip
from miniclip.mobileclip.towers import MobileCLIP
from miniclip.models import CLIP
from miniclip.models.transformer import Attention
from miniclip.openai.stages import PICTURE_MODES, stages, tower_of
from miniclip.preprocess import Preprocess, center_crop, resize, to_pixels
from miniclip.tokenizer import tokenize

# Stages that are not the output of a module but the input of one: the key of the stage, and the module.
INPUT_OF = {
    "visual.embedded": "visual.ln_pre",
    "visual.pooled": "visual.ln_post",
    "resblock.attn.context": ".attn.out_proj",
    "resblock.residual": ".ln_2",
    "resblock.mlp.activation": ".mlp.c_proj",
    "stem.relu1": "visual.conv2",
    "stem.relu2": "visual.conv3",
    "stem.relu3": "visual.avgpool",
    "bottleneck.relu1": ".conv2",
    "bottleneck.relu2": ".avgpool",
    "visual.attnpool.embedded": "visual.attnpool.k_proj",
    "visual.attnpool.context": "visual.attnpool.c_proj",
    "text.embedded": "transformer",
}
NEVER_IN_THE_MODEL = (".q", ".k", ".v", ".probabilities", "text.pooled")  # what stages that are recomputed end with
OPTIONAL = ("image.decoded", "image.resized", "image.cropped", "text.utf8")  # not there if tensors were given

# How far a stage may be from its definition, as |difference| / |stage|; half precision rounds within a stage.
AGREEMENT = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@torch.no_grad()
def trace(
    model: CLIP, image: Image.Image | Tensor | None = None, text: str | Iterable[str] | Tensor | None = None
) -> dict[str, Tensor]:
    """Run the model and return its stages, by the names of `miniclip.openai.stages`, in forward order, on the CPU.

    image  a PIL image, or pixels [N, 3, R, R] as `preprocess` gives them
    text   a string, several, or token ids [N, L] as `tokenize` gives them, also without columns of padding

    The values are those of the model's own forward pass, in its dtype. Queries, keys, values and attention
    probabilities are no tensors there: they are recomputed, in float32. Every stage is checked against its definition
    in `miniclip.conformance.rules`.

    Raises TypeError or ValueError for other inputs, and RuntimeError for a model that does not compute these stages.
    """
    if not isinstance(model, CLIP):
        raise TypeError(f"expected a model as miniclip.load returns it, got {type(model).__name__}")
    if image is None and text is None:
        raise ValueError("there is nothing to trace: give an image, a text or both")
    if model.training:
        raise ValueError("the model is in training mode: call model.eval() first")
    known = _image_inputs(model, image) | _text_inputs(model, text)
    if isinstance(model, MobileCLIP):
        return mobileclip.run(model, known)
    inputs = set(known)
    towers = {"visual": image is not None, "text": text is not None, "both": image is not None and text is not None}
    names = [stage.name for stage in stages(model.config) if towers[tower_of(stage.name)]]
    known |= _run(model, names, known.get("image.pixels"), known.get("text.ids"))

    forward = Forward(model, RULES, known)
    for name in names:
        if name not in known and name.endswith(NEVER_IN_THE_MODEL):
            known[name] = forward[name].to(model.dtype)
        elif name not in known and name not in OPTIONAL:
            raise RuntimeError(f"the model ran without computing {name}: trace() needs its plain form")
        if name in known and name not in inputs:
            _check(known[name], forward.compute(name), name)
    return {name: known[name] for name in names if name in known}


def _image_inputs(model: CLIP, image: Image.Image | Tensor | None) -> dict[str, Tensor]:
    if image is None:
        return {}
    if isinstance(image, Tensor):
        return {"image.pixels": image.detach().cpu()}
    config = model.config.preprocess
    pixels = Preprocess(config)(image)[None]
    resized = resize(image, config.image_size, config.interpolation, config.resize_mode)
    cropped = torch.from_numpy(to_pixels(center_crop(resized, config.image_size)))
    found = {"image.cropped": cropped, "image.pixels": pixels}
    if image.mode in PICTURE_MODES.values():
        found |= {"image.decoded": bands(image), "image.resized": bands(resized)}
    return found


def _text_inputs(model: CLIP, text: str | Iterable[str] | Tensor | None) -> dict[str, Tensor]:
    if text is None:
        return {}
    if isinstance(text, Tensor):
        return {"text.ids": text.detach().cpu()}
    texts = [text] if isinstance(text, str) else list(text)
    if not texts:
        raise ValueError("there is no text to trace: the list is empty")
    ids = tokenize(texts, model.context_length)
    return {"text.utf8": utf8(texts), "text.ids": ids}


def _run(model: CLIP, names: list[str], pixels: Tensor | None, ids: Tensor | None) -> dict[str, Tensor]:
    """What the model's modules take and return, and what the model itself returns."""
    device = model.logit_scale.device
    pixels = None if pixels is None else pixels.to(device)
    ids = None if ids is None else ids.to(device)
    with _plain_form(model), _recording(model, names) as found:
        if pixels is not None:
            found["visual.proj"] = model.encode_image(pixels)  # a ResNet has no stage of this name
            found["image_embedding"] = model.encode_image(pixels, normalize=True)
        if ids is not None:
            found["text_projection"] = model.encode_text(ids)
            found["text_embedding"] = model.encode_text(ids, normalize=True)
        if pixels is not None and ids is not None:
            found["logits_per_image"] = model(pixels, ids)[0]
    return {name: found[name].cpu().contiguous().clone() for name in names if name in found}


@contextmanager
def _plain_form(model: CLIP) -> Iterator[None]:
    """Inside it, the model computes as its modules are written, in PyTorch's operations, at full precision."""
    fast = getattr(model, "fast", False)
    attentions = [module for module in model.modules() if isinstance(module, Attention)]
    backends = [module.backend for module in attentions]
    try:
        model.fast = False
        for module in attentions:
            module.backend = "torch"
        with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, deterministic=True, allow_tf32=False):
            yield
    finally:
        model.fast = fast
        for module, backend in zip(attentions, backends, strict=True):
            module.backend = backend


@contextmanager
def _recording(model: CLIP, names: list[str]) -> Iterator[dict[str, Tensor]]:
    """Inside it, every call of a module notes the stages that are its input and its output."""
    modules = dict(model.named_modules())
    recorded: dict[str, Tensor] = {}
    handles = []
    for name in names:
        key, block = key_of(name, model.config)
        if key in INPUT_OF:
            module = modules[block + INPUT_OF[key] if block else INPUT_OF[key]]
            handles.append(module.register_forward_pre_hook(partial(_note_input, recorded, name)))
        elif name in modules:
            handles.append(modules[name].register_forward_hook(partial(_note_output, recorded, name)))
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()


def _note_input(recorded: dict[str, Tensor], name: str, module: nn.Module, inputs: tuple) -> None:
    recorded[name] = inputs[0]


def _note_output(recorded: dict[str, Tensor], name: str, module: nn.Module, inputs: tuple, output: Tensor) -> None:
    recorded[name] = output


def _check(got: Tensor, expected: Tensor, name: str) -> None:
    difference = float((got.float() - expected).norm())
    if not difference <= AGREEMENT[got.dtype] * float(expected.norm()):
        raise RuntimeError(
            f"{name} is {difference:.2g} away from its definition (of length {float(expected.norm()):.2g}): the model "
            "does not compute the stages of miniclip.openai.stages, or has NaNs"
        )
