"""The models that `miniclip train` can start from nothing, by name or as a JSON file."""

from __future__ import annotations

import json
from pathlib import Path

from miniclip.config import (
    CLIPConfig,
    ConfigError,
    ResNetConfig,
    ViTConfig,
    clip_config,
    from_arguments,
    from_json,
    openai_transformer,
)
from miniclip.names import named_models, similar


def _vit(image_size: int, patch_size: int, width: int, layers: int) -> CLIPConfig:
    """Both towers of the same width and depth, sharing a space of that width."""
    return clip_config(width, ViTConfig(image_size, patch_size, openai_transformer(width, layers)), width, layers)


# All have heads 64 wide, which openai/CLIP's build_model takes for granted.
SIZES: dict[str, CLIPConfig] = {
    #                  R   P  width layers
    "tiny":  _vit(    64, 16,  256,  6),
    "small": _vit(   128, 16,  384,  8),
    "base":  _vit(   224, 16,  512, 12),
    "large": _vit(   224, 14,  768, 24),
    "cifar-resnet": clip_config(512, ResNetConfig(32, 32, (2, 2, 2, 2), heads=16), text_width=512, text_layers=6),
}  # fmt: skip


def model_config(name: str) -> CLIPConfig:
    """The config called `name` in SIZES or among the named models, or written in the JSON file `name`.

    The file holds a config as `miniclip.config.to_json` writes it, as a run's miniclip.json does, or the arguments of
    `CLIP.from_arguments` by name. ConfigError for any other name, and for a file that holds neither.
    """
    table = {**SIZES, **{each: model.config for each, model in named_models().items()}}
    if name in table:
        return table[name]
    if not name.endswith(".json"):
        meant = similar(name, table)
        hint = f"did you mean {meant}?" if meant else f"expected one of {', '.join(table)}, or a .json file"
        raise ConfigError(f"model size {name[:300]!r} is unknown: {hint}")
    try:
        values = json.loads(Path(name).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        expected = "expected JSON, as a run's miniclip.json"
        raise ConfigError(f"{name} can't be read as a config: {error}; {expected}") from None
    if not isinstance(values, dict) or "image_resolution" not in values:
        return from_json(values, name)
    try:
        return from_arguments(**values)
    except (ConfigError, TypeError) as error:  # a missing or unknown argument is a TypeError
        raise ConfigError(f"{name}: {error}") from None
