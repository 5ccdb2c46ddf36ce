"""The stages of a MobileCLIP: the outputs of its modules, coarser than those of OpenAI's architecture.

All of them in order: IMAGE of `miniclip.stages`; MCI, MCI_STAGE and MCI_END, or CONV_VIT or VIT and then VIT_END; then
IMAGE_END, TEXT and LOGITS of `miniclip.stages`. Of an MCi tower, C and t are the channels and the side of a stage's
maps, and L is the number of places in a map, row by row. Other letters are those of `miniclip.stages`.

The stages in RULES are checked and diagnosed; of the others `compare` finds the first wrong one, but not why. Where the
text tower is not causal, padding has an influence, so files keep the rows after the end-of-text token.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miniclip.config import ViTConfig
from miniclip.mobileclip.config import MCiConfig, MobileCLIPConfig
from miniclip.mobileclip.towers import HEAD_WIDTH
from miniclip.stages import IMAGE, LOGITS, Stage, rows

MCI = (
    ("visual.stem.0",    "N C R/2 R/2", "3 x 3 convolution, stride 2, padding 1; before GELU"),
    ("visual.stem.1",    "N C R/4 R/4", "3 x 3 depthwise convolution, stride 2, padding 1; before GELU"),
    ("visual.stem.2",    "N C R/4 R/4", "1 x 1 convolution; before GELU"),
)  # fmt: skip
MCI_STAGE = (  # names follow the stage's own, as in visual.stages.1.downsample
    (".downsample",      "N C t t", "after both of its convolutions, each followed by GELU; not in the first stage"),
    (".position",        "N C t t", "7 x 7 depthwise convolution, which includes its input's residual; from stage 3"),
    (".blocks.*",        "N C t t", "a block's output"),
)  # fmt: skip
ATTENTION = (".attn.probabilities", "N H L L", "softmax over the last side of q k^T / sqrt(d)")  # of blocks that attend
MCI_END = (
    ("visual.last",      "N 2C t t", "3 x 3 grouped convolution, two outputs for each channel"),
    ("visual.se",        "N 2C t t", "squeeze and excite: times a sigmoid for each channel; before GELU"),
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
IMAGE_END = (("image_embedding", "N E", "visual.proj divided by its Euclidean length"),)
TEXT = (
    ("text.utf8",        "bytes", "uint8; the strings in UTF-8, each followed by the byte 255, which UTF-8 never has"),
    ("text.ids",         "N L",   "int32, padded by zeros to the context length 77"),
    ("token_embedding",  "N L D", "row of token_embedding.weight for each id"),
    ("text.embedded",    "N L D", "plus positional_embedding"),
    ("transformer.resblocks.*", "N L D", "a block's output; each token attends to all, unless the config says causal"),
    ("ln_final",         "N L D", "LayerNorm of the last block's output"),
    ("text.pooled",      "N D",   "row of ln_final at the first occurrence of the largest id, the end-of-text token"),
    ("text_projection",  "N E",   "pooled @ text_projection"),
    ("text_embedding",   "N E",   "text_projection divided by its Euclidean length"),
)  # fmt: skip
RULES = {name for name, *_ in (*IMAGE, *IMAGE_END, *TEXT, *LOGITS) if "*" not in name}  # the same as in OpenAI's
INPUT_OF = {"visual.pooled": "visual.proj", "text.embedded": "transformer"}  # a stage that is a module's input


def stages(config: MobileCLIPConfig) -> list[Stage]:
    """All stages of a picture and a text, in forward order."""
    layers, convolutions = config.text.transformer.layers, 1 if config.text_taps else 0
    attends = range(convolutions, convolutions + layers)
    table = (*IMAGE, *_tower(config), *IMAGE_END, *_numbered(TEXT, layers + 2 * convolutions, attends), *LOGITS)
    return [_located(stage, config) for stage in rows(table, {})]


def _located(stage: Stage, config: MobileCLIPConfig) -> Stage:
    """The stage with its rule and its place in the model."""
    if stage.name.endswith(ATTENTION[0]):
        causal = config.causal and stage.name.startswith("transformer.")
        attention = stage.name.removesuffix(".probabilities")
        return stage._replace(rule="", input_of=attention, compute=partial(_probabilities, causal=causal))
    rule = stage.rule if stage.name in RULES else ""
    return stage._replace(rule=rule, input_of=INPUT_OF.get(stage.name, ""))


def _probabilities(attention: nn.Module, x: Tensor, causal: bool) -> Tensor:
    """Computed in float32 from what the module takes: [N, C, h, w] in an MCi tower, [N, L, D] in a transformer."""
    if x.ndim == 4:
        qkv = attention.in_proj(x.flatten(2).transpose(1, 2)).unflatten(-1, (3, -1, HEAD_WIDTH))
    else:
        qkv = F.linear(x, attention.in_proj_weight, attention.in_proj_bias).unflatten(-1, (3, attention.heads, -1))
    q, k, _ = qkv.float().permute(2, 0, 3, 1, 4)
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if causal:
        scores += torch.full_like(scores, -torch.inf).triu(1)
    return scores.softmax(dim=-1).to(x.dtype)


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
