"""Trace: every named stage of a forward pass of the model itself."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from PIL import Image
from torch import Tensor, nn

from miniclip.conformance.forward import Forward, stages_of
from miniclip.conformance.rules import PICTURE_MODES, RULES, bands, utf8
from miniclip.models import CLIP
from miniclip.models.transformer import Attention
from miniclip.preprocess import Preprocess, center_crop, resize, to_pixels
from miniclip.stages import Stage, tower_of

OPTIONAL = ("image.decoded", "image.resized", "image.cropped", "text.utf8")  # not there if tensors were given

# How far a stage may be from its definition, as |difference| / |stage|; half precision rounds within a stage.
AGREEMENT = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@torch.no_grad()
def trace(
    model: CLIP, image: Image.Image | Tensor | None = None, text: str | Iterable[str] | Tensor | None = None
) -> dict[str, Tensor]:
    """Run the model and return its stages, which its family names, in forward order, on the CPU.

    image  a PIL image, or pixels [N, 3, R, R] as `preprocess` gives them
    text   a string, several, or token ids [N, L] as `tokenize` gives them, also without columns of padding

    The values are those of the model's own forward pass, in its dtype. Attention probabilities, and what else is no
    tensor there, are recomputed in float32. Every stage that has a rule in `miniclip.conformance.rules` is checked.

    Raises TypeError or ValueError for other inputs, and RuntimeError for a model that does not compute these stages.
    """
    if not isinstance(model, CLIP):
        raise TypeError(f"expected a model as miniclip.load returns it, got {type(model).__name__}")
    if image is None and text is None:
        raise ValueError("there is nothing to trace: give an image, a text or both")
    if model.training:
        raise ValueError("the model is in training mode: call model.eval() first")
    known = _image_inputs(model, image) | _text_inputs(model, text)
    towers = {"visual": image is not None, "text": text is not None, "both": image is not None and text is not None}
    stages = [stage for stage in stages_of(model.config).values() if towers[tower_of(stage.name)]]
    return _complete(model, stages, known, known | _run(model, stages, known))


def _complete(
    model: CLIP, stages: list[Stage], inputs: dict[str, Tensor], found: dict[str, Tensor]
) -> dict[str, Tensor]:
    """What was found in the model, checked by the rules, and the stages that only follow from it by a rule."""
    forward = Forward(model, RULES, found)
    modules = {name for name, _ in model.named_modules()}
    complete = {}
    for stage in stages:
        name = stage.name
        if name not in found:
            if name in OPTIONAL:
                continue
            if stage.rule not in RULES or stage.input_of or name in modules:
                raise RuntimeError(f"the model ran without computing {name}: trace() needs its plain form")
            found[name] = forward[name].to(model.dtype)
        if name not in inputs and stage.rule in RULES:
            _check(found[name], forward.compute(name), name)
        complete[name] = found[name]
    return complete


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
    ids = model.tokenize(texts)
    return {"text.utf8": utf8(texts), "text.ids": ids}


def _run(model: CLIP, stages: list[Stage], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the model's modules take and return, and what the model itself returns."""
    device = model.logit_scale.device
    pixels, ids = (inputs[name].to(device) if name in inputs else None for name in ("image.pixels", "text.ids"))
    with _plain_form(model), _recording(model, stages) as found:
        if pixels is not None:
            found["visual.proj"] = model.encode_image(pixels)  # a ResNet has no stage of this name
            found["image_embedding"] = model.encode_image(pixels, normalize=True)
        if ids is not None:
            found["text_projection"] = model.encode_text(ids)
            found["text_embedding"] = model.encode_text(ids, normalize=True)
        if pixels is not None and ids is not None:
            found["logits_per_image"] = model(pixels, ids)[0]
    for stage in stages:
        if stage.compute and stage.name in found:
            found[stage.name] = stage.compute(model.get_submodule(stage.input_of), found[stage.name])
    return {name: x.cpu().contiguous().clone() for name, x in found.items()}


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
def _recording(model: CLIP, stages: list[Stage]) -> Iterator[dict[str, Tensor]]:
    """Inside it, every call of a module records the stages that it takes, computes or returns."""
    modules = dict(model.named_modules())
    recorded: dict[str, Tensor] = {}
    handles = []
    for stage in stages:
        module = modules.get(stage.input_of or stage.name)
        if module is not None:
            handles.append(module.register_forward_hook(partial(_record, recorded, stage)))
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()


def _record(recorded: dict[str, Tensor], stage: Stage, module: nn.Module, inputs: tuple, output: Tensor) -> None:
    recorded[stage.name] = inputs[0] if stage.input_of else output


def _check(got: Tensor, expected: Tensor, name: str) -> None:
    difference = float((got.float() - expected).norm())
    if not difference <= AGREEMENT[got.dtype] * float(expected.norm()):
        raise RuntimeError(
            f"{name} is {difference:.2g} away from its definition (of length {float(expected.norm()):.2g}): the model "
            "does not compute what its family's stages say, or has NaNs"
        )
