"""The stages of a MobileCLIP: the outputs of its modules, coarser than those of the other models.

All of them in order, after the picture's (IMAGE in stages.py) and before `logits_per_image`. Names are the paths of
the modules whose outputs they are, but for `text.ids`, `text.embedded`, the two named pooled, the two embeddings and
probabilities of attention. Letters as in stages.py; of an MCi tower, C and t are the channels and the side of a stage's
maps, and L the places of a map, row by row.

There are no definitions to check them against and no known mistakes: `compare` finds the first stage that is wrong,
but not why. Where the text tower is not causal, files have the rows of the padding too, which have an influence.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miniclip.config import ViTConfig
from miniclip.family import Stage
from miniclip.mobileclip.config import MCiConfig, MobileCLIPConfig
from miniclip.mobileclip.towers import HEAD_WIDTH, MapAttention, MobileCLIP
from miniclip.openai.stages import IMAGE, LOGITS

MCI = (
    ("visual.stem.0",    "N C R/2 R/2", "3 x 3 convolution, stride 2, padding 1; before GELU"),
    ("visual.stem.1",    "N C R/4 R/4", "3 x 3 convolution of each channel, stride 2, padding 1; before GELU"),
    ("visual.stem.2",    "N C R/4 R/4", "1 x 1 convolution; before GELU"),
)  # fmt: skip
MCI_STAGE = (  # names follow the stage's own, as in visual.stages.1.downsample
    (".downsample",      "N C t t", "after both of its convolutions, each followed by GELU; not in the first stage"),
    (".position",        "N C t t", "7 x 7 convolution of each channel, its input's sum folded in; from stage 3"),
    (".blocks.*",        "N C t t", "a block's output"),
)  # fmt: skip
ATTENTION = (".attn.probabilities", "N H L L", "softmax over the last side of q k^T / sqrt(d)")  # of blocks that attend
MCI_END = (
    ("visual.last",      "N 2C t t", "3 x 3 convolution, two outputs for each channel"),
    ("visual.se",        "N 2C t t", "times the sigmoid of what all channels say; before GELU"),
    ("visual.pooled",    "N 2C",     "mean over the map, after GELU"),
    ("visual.proj",      "N E",      "pooled @ proj.weight^T + proj.bias"),
)  # fmt: skip
CONV_VIT = (
    ("visual.stem.0",    "N W R/4 R/4",   "4 x 4 convolution, stride 4, padding as the config says; before GELU"),
    ("visual.stem.1",    "N W R/8 R/8",   "2 x 2 convolution, stride 2; before GELU"),
    ("visual.stem.2",    "N D R/16 R/16", "2 x 2 convolution, stride 2"),
)  # fmt: skip
VIT = (
    ("visual.conv1",     "N D G G", "P x P convolution of stride P, no bias, no padding"),
    ("visual.ln_pre",    "N L D",   "LayerNorm of class token and patches, plus positional_embedding"),
)  # fmt: skip
VIT_END = (
    ("visual.transformer.resblocks.*", "N L D", "a block's output"),
    ("visual.ln_post",   "N D",     "LayerNorm of the class token"),
    ("visual.proj",      "N E",     "ln_post projected, plus the bias"),
)  # fmt: skip
TEXT = (
    ("text.ids",         "N L",   "int32, padded by zeros to the context length 77"),
    ("token_embedding",  "N L D", "row of token_embedding.weight for each id"),
    ("text.embedded",    "N L D", "plus positional_embedding"),
    ("transformer.resblocks.*", "N L D", "a block's output; tokens see all others, unless the config says causal"),
    ("ln_final",         "N L D", "LayerNorm of the last block's output"),
    ("text.pooled",      "N D",   "row of ln_final at the first occurrence of the largest id, the end token"),
    ("text_projection",  "N E",   "pooled @ text_projection"),
    ("text_embedding",   "N E",   "text_projection divided by its Euclidean length"),
)  # fmt: skip
IMAGE_END = (("image_embedding", "N E", "visual.proj divided by its Euclidean length"),)
INPUT_OF = {"visual.pooled": "visual.proj", "text.embedded": "transformer"}  # of an MCi tower, and of any


def stages(config: MobileCLIPConfig) -> list[Stage]:
    """All stages of a picture and a text, in forward order."""
    rows = [*IMAGE, *_tower(config), *IMAGE_END, ("text.utf8", "bytes", "as in stages.py")]
    layers, convolutions = config.text.transformer.layers, 1 if config.text_taps else 0
    attends = range(convolutions, convolutions + layers)
    rows += [*_numbered(TEXT, layers + 2 * convolutions, attends), *LOGITS]
    return [Stage(name, tuple(shape.split()), definition) for name, shape, definition in rows]


def _tower(config: MobileCLIPConfig) -> Iterator[tuple[str, str, str]]:
    vision = config.vision
    if isinstance(vision, MCiConfig):
        yield from MCI
        for stage, blocks in enumerate(vision.blocks):
            absent = ([".downsample"] if stage == 0 else []) + ([".position"] if stage < 3 else [])
            for name, shape, definition in _numbered(MCI_STAGE, blocks, range(blocks if stage >= 3 else 0)):
                if name not in absent:
                    yield f"visual.stages.{stage}{name}", shape, definition
        yield from MCI_END
    else:
        yield from VIT if isinstance(vision, ViTConfig) else CONV_VIT
        yield from _numbered(VIT_END, vision.transformer.layers, range(vision.transformer.layers))


def _numbered(table: tuple, count: int, attends: range) -> Iterator[tuple[str, str, str]]:
    """The rows of a table, those of blocks once for each; attends: which blocks have attention."""
    for name, shape, definition in table:
        if not name.endswith(".*"):
            yield name, shape, definition
            continue
        for i in range(count):
            if i in attends:
                yield f"{name[:-1]}{i}{ATTENTION[0]}", *ATTENTION[1:]
            yield f"{name[:-1]}{i}", shape, definition


def run(model: MobileCLIP, known: dict[str, Tensor]) -> dict[str, Tensor]:
    """The stages of the towers that `known`, pixels or ids or both, is the input of; `known` among them."""
    device = model.logit_scale.device
    pixels = known["image.pixels"].to(device) if "image.pixels" in known else None
    ids = known["text.ids"].to(device) if "text.ids" in known else None
    names = [stage.name for stage in stages(model.config)]
    modules, found, handles = dict(model.named_modules()), dict(known), []
    for name in names:
        if name.endswith(ATTENTION[0]):
            module = modules[name.removesuffix(".probabilities")]
            causal = name.startswith("transformer.") and model.transformer.causal
            handles.append(module.register_forward_pre_hook(partial(_note_probabilities, found, name, causal)))
            continue
        module = modules.get(INPUT_OF.get(name, name))
        if module is not None:
            register = module.register_forward_pre_hook if name in INPUT_OF else module.register_forward_hook
            handles.append(register(partial(_note, found, name)))
    try:
        if pixels is not None:
            found["visual.proj"] = model.encode_image(pixels)
            found["image_embedding"] = model.encode_image(pixels, normalize=True)
        if ids is not None:
            found["text_projection"] = model.encode_text(ids)
            found["text.pooled"] = found["ln_final"][torch.arange(len(ids)), ids.argmax(-1)]
            found["text_embedding"] = model.encode_text(ids, normalize=True)
        if pixels is not None and ids is not None:
            found["logits_per_image"] = model(pixels, ids)[0]
    finally:
        for handle in handles:
            handle.remove()
    return {name: found[name].cpu().contiguous().clone() for name in names if name in found}


def _note(found: dict[str, Tensor], name: str, module: nn.Module, inputs: tuple, output: Tensor | None = None) -> None:
    found[name] = inputs[0] if output is None else output


def _note_probabilities(found: dict[str, Tensor], name: str, causal: bool, attn: nn.Module, inputs: tuple) -> None:
    """Of an attention's inputs, in float32: the model itself never has them."""
    x = inputs[0]
    if isinstance(attn, MapAttention):
        qkv = attn.in_proj(x.flatten(2).transpose(1, 2)).unflatten(-1, (3, -1, HEAD_WIDTH))
    else:
        qkv = F.linear(x, attn.in_proj_weight, attn.in_proj_bias).unflatten(-1, (3, attn.heads, -1))
    q, k, _ = qkv.float().permute(2, 0, 3, 1, 4)
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if causal:
        scores += torch.full_like(scores, -torch.inf).triu(1)
    found[name] = scores.softmax(dim=-1).to(x.dtype)
