"""The stages of a SigLIP: the outputs of its modules, coarser than those of OpenAI's architecture.

All of them in order: IMAGE of `miniclip.stages`, VISION, TEXT, LOGITS. Letters are those of `miniclip.stages`; G is the
patches a side, R / P, and L in VISION their number, G^2.

The stages in RULES are checked and diagnosed; of the others `compare` finds the first wrong one, but not why. Tokens
attend to the padding, so files keep the rows after the end token.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor, nn

from miniclip.siglip.config import SigLIPConfig
from miniclip.siglip.towers import ProbeAttention
from miniclip.stages import IMAGE, Stage, rows

VISION = (
    ("visual.conv1",          "N D G G", "P x P convolution of stride P with a bias, no padding"),
    ("visual.embedded",       "N L D",   "the patches row by row, plus positional_embedding; no class token"),
    ("visual.transformer.resblocks.*", "N L D", "a block's output"),
    ("visual.ln_post",        "N L D",   "LayerNorm of all tokens, eps 1e-6"),
    ("visual.pool.attn.probabilities", "N H 1 L", "of the probe: softmax over the last side of q k^T / sqrt(d)"),
    ("visual.pool.attn",      "N D",     "multi-head attention from the probe to all tokens, through out_proj"),
    ("visual.pool.ln",        "N D",     "LayerNorm of visual.pool.attn, eps 1e-6"),
    ("visual.pool.mlp",       "N D",     "two linear layers around the activation"),
    ("visual.pool",           "N D",     "visual.pool.attn + visual.pool.mlp"),
    ("image_embedding",       "N D",     "visual.pool divided by its Euclidean length"),
)  # fmt: skip
TEXT = (
    ("text.utf8",        "bytes", "uint8; the strings in UTF-8, each followed by the byte 255, which UTF-8 never has"),
    ("text.ids",         "N L",   "int32: the ids of the cleaned text, the end token, then pad tokens"),
    ("token_embedding",  "N L D", "row of token_embedding.weight for each id"),
    ("text.embedded",    "N L D", "plus positional_embedding"),
    ("transformer.resblocks.*", "N L D", "a block's output; each token attends to all, padding too"),
    ("ln_final",         "N L D", "LayerNorm of the last block's output, eps 1e-6"),
    ("text_projection",  "N E",   "the last row of ln_final @ text_projection + text_projection_bias"),
    ("text_embedding",   "N E",   "text_projection divided by its Euclidean length"),
)  # fmt: skip
LOGITS = (("logits_per_image", "images texts", "exp(logit_scale) * image_embedding @ text_embedding^T + logit_bias"),)
ATTENTION = (".attn.probabilities", "N H L L", "softmax over the last side of q k^T / sqrt(d)")

# Stages whose rule is that of OpenAI's architecture.
RULES = {*(name for name, *_ in IMAGE), "text.ids", "token_embedding", "text.embedded"}
RULES |= {"image_embedding", "text_embedding"}
INPUT_OF = {"visual.embedded": "visual.transformer", "text.embedded": "transformer"}  # a stage that a module takes


def stages(config: SigLIPConfig) -> list[Stage]:
    """All stages of a picture and a text, in forward order."""
    vision, text = config.vision.transformer.layers, config.text.transformer.layers
    table = (*IMAGE, *_with_blocks(VISION, vision), *_with_blocks(TEXT, text), *LOGITS)
    return [_located(stage) for stage in rows(table, {"R": config.vision.image_size, "E": config.embed_dim})]


def _with_blocks(table: tuple, count: int) -> Iterator[tuple[str, str, str]]:
    """The rows of a table, that of the blocks once for each, after the block's attention."""
    for name, shape, definition in table:
        if not name.endswith(".*"):
            yield name, shape, definition
            continue
        for i in range(count):
            yield f"{name[:-1]}{i}{ATTENTION[0]}", *ATTENTION[1:]
            yield f"{name[:-1]}{i}", shape, definition


def _located(stage: Stage) -> Stage:
    """The stage with its rule and its place in the model."""
    if stage.name.endswith(ATTENTION[0]):
        return stage._replace(rule="", input_of=stage.name.removesuffix(".probabilities"), compute=_probabilities)
    if stage.name == "logits_per_image":
        return stage._replace(rule="biased logits_per_image")
    return stage._replace(rule=stage.rule if stage.name in RULES else "", input_of=INPUT_OF.get(stage.name, ""))


def _probabilities(attention: nn.Module, x: Tensor) -> Tensor:
    """Computed in float32 from what the module takes."""
    if isinstance(attention, ProbeAttention):
        q, k, _ = attention.project(x)
    else:
        qkv = F.linear(x, attention.in_proj_weight, attention.in_proj_bias).unflatten(-1, (3, attention.heads, -1))
        q, k, _ = qkv.permute(2, 0, 3, 1, 4)
    return (q.float() @ k.float().mT * q.shape[-1] ** -0.5).softmax(dim=-1).to(x.dtype)
