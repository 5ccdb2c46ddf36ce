"""Stages: the tensors of a forward pass that have a name, for those who port a model. See `miniclip.conformance`.

Each family lists its own stages in a table (`miniclip/openai/stages.py`, `miniclip/mobileclip/stages.py`). Here is what
all families share: the kind of a row, the stages of the picture and of the scores, and what a name tells.

Arrays are row-major. N is kept when it is 1; the stages before `image.pixels` have no N. The dtype is the model's where
nothing else is said. Letters of the shapes are those of `miniclip.config`, and

    h, w  height and width        B  bands of the picture's mode: 1 grey, 2 grey and alpha, 3 RGB, 4 RGBA
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from torch import Tensor, nn


class Stage(NamedTuple):
    """One stage, and where the model has it.

    A stage is the output of the module that has its name, or the input of the module `input_of`, or, where that is no
    tensor in the model, compute(that module, its input). The embeddings, their projections and the scores are what the
    model returns. A stage that is none of these follows from the stages before it by its rule.
    """

    name: str
    shape: tuple[int | str, ...]  # a number where the config decides it, otherwise a letter
    definition: str
    rule: str = ""  # its key in `miniclip.conformance.rules`; "": it is recorded and compared, but not checked
    block: str = ""  # the path of the block that it is part of; in the rule, names that begin with a dot belong to it
    input_of: str = ""  # the path of a module
    compute: Callable[[nn.Module, Tensor], Tensor] | None = None


IMAGE = (
    # name             shape      dtype is uint8 but for the last; definition
    ("image.decoded",  "h w B",   "the picture's own bands, 0..255, as decoded"),
    ("image.resized",  "h w B",   "shorter side R, longer side floor(R * long / short); Pillow's bicubic, own bands"),
    ("image.cropped",  "R R 3",   "the R x R middle, left = round_half_even((w - R) / 2), top likewise; then to RGB"),
    ("image.pixels",   "N 3 R R", "(cropped / 255 - mean) / std, channels first: red, green, blue"),
)  # fmt: skip
LOGITS = (("logits_per_image", "images texts", "exp(logit_scale) * image_embedding @ text_embedding^T"),)


def rows(
    table: tuple[tuple[str, str, str], ...], sizes: Mapping[str, int], block: str = "", kind: str = ""
) -> Iterator[Stage]:
    """The stages of a table, whose names follow `block`, and whose rules are those of this kind of block."""
    for name, shape, definition in table:
        sides = tuple(int(side) if side.isdecimal() else sizes.get(side, side) for side in shape.split())
        yield Stage(block + name, sides, definition, rule=kind + name, block=block)


@functools.cache
def tower_of(name: str) -> str:
    """The tower that a stage belongs to: "visual", "text" or, for the scores, "both"."""
    return "visual" if name.startswith(("visual", "image")) else "both" if name.startswith("logits") else "text"


def token_sides(stage: str) -> tuple[int, ...]:
    """The dimensions of a text stage that count tokens."""
    if tower_of(stage) != "text" or stage in ("text.utf8", "text.pooled", "text_projection", "text_embedding"):
        return ()
    if stage.endswith(".probabilities"):
        return (2, 3)
    return (2,) if stage.endswith((".q", ".k", ".v")) else (1,)
