"""Tensor shapes: the config that those of a bare state dict imply, and whether a file's tensors are those of a model.

Names here are OpenAI's; `miniclip.weights.names` converts others.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping

from miniclip.config import (
    ACTIVATIONS,
    CLIPConfig,
    ConfigError,
    PreprocessConfig,
    ResNetConfig,
    TextConfig,
    TransformerConfig,
    ViTConfig,
    check_choice,
)
from miniclip.weights.errors import CheckpointError
from miniclip.weights.names import IGNORED, WRAPPERS, listed

Shapes = Mapping[str, tuple[int, ...]]

HEAD_WIDTH = 64
# Widths at which every published model has heads 64 wide, as openai/CLIP assumes of all. OpenCLIP's wider image towers
# (1280, 1408, 1664, 1792) have 16 heads, and one text tower is 1152 wide and has 16 heads as well.
VISION_WIDTHS = frozenset(range(64, 1024 + 1, 64))
TEXT_WIDTHS = VISION_WIDTHS | {1280}

# Beginnings of names that are never in OpenAI's layout, and the models that have them.
FOREIGN = {
    "vision_model.": "a Hugging Face model, to be loaded as the directory that holds its config.json",
    "text_model.": "a Hugging Face model, to be loaded as the directory that holds its config.json",
    "text.token_embedding.": "an OpenCLIP model, to be loaded as the directory that holds its open_clip_config.json",
    "text.transformer.embeddings.": "OpenCLIP's Hugging Face text tower, which miniclip does not have",
    "visual.trunk.": "OpenCLIP's timm image tower, which miniclip does not have",
    "visual.attn_pool.": "OpenCLIP's attentional pooler, which miniclip does not have",
    "image_encoder.": "Apple's MobileCLIP, to be loaded as the file they are in",
    "logit_bias": "a SigLIP model, which miniclip does not have",
}


def infer_config(shapes: Shapes, activation: str = "quick_gelu") -> CLIPConfig:
    """The config of a state dict with OpenAI's names, as openai/CLIP's `build_model` finds it.

    Shapes can't tell the activation, which the caller states, nor how pictures are prepared, which is taken to be
    OpenAI's way; nor the number of heads, which is width / 64 where that is known to be true: image towers up to 1024
    wide and text towers up to 1024 or of 1280, if a multiple of 64, and all ResNets.

    CheckpointError names the tensor that is missing or contradicts the others, or the width whose heads aren't known.
    """
    check_choice("activation", activation, ACTIVATIONS)
    try:
        return _infer_config(shapes, activation)
    except ConfigError as error:
        raise CheckpointError(f"the tensors' shapes are those of no model: {error}") from None


def _infer_config(shapes: Shapes, activation: str) -> CLIPConfig:
    _, embed_dim = _shape(shapes, "text_projection", 2)
    context_length, width = _shape(shapes, "positional_embedding", 2)
    vocab_size, _ = _shape(shapes, "token_embedding.weight", 2)
    text = TextConfig(context_length, vocab_size, _transformer(shapes, "", width, TEXT_WIDTHS, activation))
    vision = _resnet(shapes) if "visual.attnpool.positional_embedding" in shapes else _vit(shapes, activation)
    return CLIPConfig(embed_dim, vision, text, PreprocessConfig(vision.image_size))


def _vit(shapes: Shapes, activation: str) -> ViTConfig:
    width, _, _, patch_size = _shape(shapes, "visual.conv1.weight", 4)
    transformer = _transformer(shapes, "visual.", width, VISION_WIDTHS, activation)
    return ViTConfig(patch_size * _grid(shapes, "visual.positional_embedding"), patch_size, transformer)


def _resnet(shapes: Shapes) -> ResNetConfig:
    grid = _grid(shapes, "visual.attnpool.positional_embedding")
    width = _shape(shapes, "visual.layer1.0.conv1.weight", 4)[0]
    layers = tuple(_count(shapes, f"visual.layer{stage}.") for stage in (1, 2, 3, 4))
    heads, rest = divmod(32 * width, HEAD_WIDTH)
    if rest:
        raise CheckpointError(f"visual.layer1.0.conv1.weight has {width} channels; expected an even number")
    return ResNetConfig(32 * grid, width, layers, heads)


def _transformer(
    shapes: Shapes, tower: str, width: int, known_widths: Collection[int], activation: str
) -> TransformerConfig:
    if width not in known_widths:
        raise CheckpointError(
            f"the {'image' if tower else 'text'} transformer is {width} wide, and how many heads such a one has can't "
            "be told from tensors: load a directory with its config.json or open_clip_config.json, or call "
            "build_model(state_dict, config=...)"
        )
    layers = _count(shapes, f"{tower}transformer.resblocks.")
    mlp_width, _ = _shape(shapes, f"{tower}transformer.resblocks.0.mlp.c_fc.weight", 2)
    return TransformerConfig(width, layers, width // HEAD_WIDTH, mlp_width, activation)


def _shape(shapes: Shapes, name: str, dimensions: int) -> tuple[int, ...]:
    if name not in shapes:
        raise CheckpointError(f"tensor {name} is missing: this is not a CLIP in OpenAI's layout{_cause(shapes)}")
    if len(shapes[name]) != dimensions or 0 in shapes[name]:
        raise CheckpointError(f"tensor {name} is {list(shapes[name])}; expected {dimensions} dimensions, none empty")
    return shapes[name]


def _grid(shapes: Shapes, name: str) -> int:
    """The side of the square map that a table of positions covers, after its first row."""
    rows, _ = _shape(shapes, name, 2)
    side = math.isqrt(rows - 1)
    if side == 0 or side**2 != rows - 1:
        raise CheckpointError(f"tensor {name} has {rows} rows; expected 1 and those of a square map")
    return side


def _count(shapes: Shapes, prefix: str) -> int:
    """How many layers there are under `prefix`, which is followed by their numbers."""
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
    numbers = {match[1] for match in map(pattern.match, shapes) if match}
    gap = next((n for n in range(len(numbers) or 1) if str(n) not in numbers), None)
    if gap is not None:
        raise CheckpointError(f"there is no {prefix}{gap} among {len(numbers)} such layers; expected 0, 1, 2, ...")
    return len(numbers)


def _cause(names: Collection[str]) -> str:
    """What a file's names show it to be, if they can't be in OpenAI's layout."""
    causes = {f"Its names are those of {cause}." for start, cause in FOREIGN.items() if _begin(names, start)}
    causes |= {
        f"{count} of {len(names)} names begin with {start}, which is left out if all do: save those tensors alone."
        for start in WRAPPERS
        if (count := _begin(names, start))
    }
    return "".join(f"\n{cause}" for cause in sorted(causes))


def _begin(names: Collection[str], start: str) -> int:
    return sum(name.startswith(start) for name in names)


def check_names(model_shapes: Shapes, file_shapes: Shapes) -> None:
    """One CheckpointError with every tensor that a file lacks, has beyond a model's, or has in another shape.

    A file may have what `names.IGNORED` lists, and need not have BatchNorm's `num_batches_tracked`.
    """
    shared = model_shapes.keys() & file_shapes.keys()
    settled = shared | IGNORED | {name for name in model_shapes if name.endswith(".num_batches_tracked")}
    faults = {
        "missing": [f"{name} {list(model_shapes[name])}" for name in model_shapes if name not in settled],
        "unexpected": [f"{name} {list(file_shapes[name])}" for name in file_shapes if name not in settled],
        "of another shape": [
            f"{name} is {list(file_shapes[name])}; expected {list(model_shapes[name])}"
            for name in model_shapes
            if name in shared and tuple(model_shapes[name]) != tuple(file_shapes[name])
        ],
    }
    if any(faults.values()):
        lists = "".join(f"\n{len(names)} {fault}:{listed(names)}" for fault, names in faults.items() if names)
        raise CheckpointError(f"the file's tensors are not those of the model{lists}{_cause(file_shapes)}")
