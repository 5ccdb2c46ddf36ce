"""The models that `miniclip train` can start from nothing, by name or as a JSON file."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from miniclip.config import (
    MODELS,
    CLIPConfig,
    PreprocessConfig,
    ResNetConfig,
    TextConfig,
    TransformerConfig,
    ViTConfig,
    openai_transformer,
)


def _vit(image_size: int, patch_size: int, width: int, layers: int) -> CLIPConfig:
    """Both towers of the same width and depth, sharing a space of that width."""
    vision = ViTConfig(image_size, patch_size, openai_transformer(width, layers))
    return _with_text(vision, width, width, layers)


def _with_text(vision: ViTConfig | ResNetConfig, embed_dim: int, text_width: int, text_layers: int) -> CLIPConfig:
    text = TextConfig(77, 49408, openai_transformer(text_width, text_layers))
    return CLIPConfig(embed_dim, vision, text, PreprocessConfig(vision.image_size))


# All have heads 64 wide, which openai/CLIP's build_model takes for granted.
SIZES: dict[str, CLIPConfig] = {
    #                   R   P  width layers
    "tiny":  _vit(     64, 16,  256,  6),
    "small": _vit(    128, 16,  384,  8),
    "base":  _vit(    224, 16,  512, 12),
    "large": _vit(    224, 14,  768, 24),
    #                                       R   P / width                              E   text width, layers
    "tiny-ViT": _with_text(       ViTConfig(64, 16, openai_transformer(192, 4)),      256, 192, 2),
    "tiny-RN": _with_text(     ResNetConfig(64, 24, (1, 2, 2, 1), heads=12),          256, 192, 2),
    "cifar-resnet": _with_text(ResNetConfig(32, 32, (2, 2, 2, 2), heads=16),          512, 512, 6),
}  # fmt: skip


def model_config(name: str) -> CLIPConfig:
    """The config called `name` in SIZES or among OpenAI's models, or written in the JSON file `name`.

    The file holds a CLIPConfig as `save_config` writes it. Raises ValueError for any other name.
    """
    table = {**SIZES, **MODELS}
    if name in table:
        return table[name]
    if name.endswith(".json"):
        return read_config(Path(name))
    raise ValueError(f"model size {name!r} is unknown; expected one of {', '.join(table)}, or a .json file")


def save_config(config: CLIPConfig, path: Path) -> None:
    """Write a config as JSON: its fields by name, the parts as nested objects."""
    path.write_text(json.dumps(asdict(config), indent=2) + "\n")


def read_config(path: Path) -> CLIPConfig:
    """The inverse of `save_config`. A vision tower with "patch_size" is a ViT, without one a ModifiedResNet.

    Raises ValueError, naming the file, for a field that is missing or unknown.
    """
    try:
        fields = json.loads(path.read_text())
        vision, text = fields["vision"], fields["text"]
        if "patch_size" in vision:
            vision_config = ViTConfig(**{**vision, "transformer": TransformerConfig(**vision["transformer"])})
        else:
            vision_config = ResNetConfig(**{**vision, "layers": tuple(vision["layers"])})
        text_config = TextConfig(**{**text, "transformer": TransformerConfig(**text["transformer"])})
        preprocess = {name: tuple(x) if isinstance(x, list) else x for name, x in fields["preprocess"].items()}
        return CLIPConfig(fields["embed_dim"], vision_config, text_config, PreprocessConfig(**preprocess))
    except KeyError as error:
        raise ValueError(f"{path} has no {error}; expected a CLIPConfig, as in the config.json of a run") from error
    except (TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: {error}; expected a CLIPConfig, as in the config.json of a run") from error
