"""Directories of transformers' CLIPModel, in and out: config.json, preprocessor_config.json and the weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from miniclip import tokenizer
from miniclip.config import (
    MAX_LAYERS,
    UNKNOWN,
    CLIPConfig,
    PreprocessConfig,
    TextConfig,
    TransformerConfig,
    ViTConfig,
)
from miniclip.io import save_tensors, write_text
from miniclip.weights.errors import CheckpointError
from miniclip.weights.fields import Fields
from miniclip.weights.names import from_canonical

# In the order in which transformers prefers them.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)

LEGACY_EOS = 2  # in configs older than transformers 4.31, where it stands for the largest id
LAYER_NORM_EPS = 1e-5
STEPS = ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb")  # without exception
HIDDEN_ACT = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}  # and our names
RESAMPLE = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers


def read_config(folder: Path, model_type: str = "clip") -> CLIPConfig:
    """The model and the preprocessing that a directory describes. Missing fields have transformers' defaults.

    CheckpointError names the field that is wrong, or that asks for what this CLIP does not have.
    """
    fields = Fields.read(folder / "config.json")
    fields.one_of("model_type", (model_type,))
    vision = read_vision(_tower(fields, "vision"))
    return CLIPConfig(
        embed_dim=fields.integer("projection_dim", 512),  # its copies in the towers are often stale
        vision=vision,
        text=read_text(_tower(fields, "text")),
        preprocess=read_preprocess(folder, vision.image_size),
    )


def read_vision(vision: Fields) -> ViTConfig:
    vision.one_of("num_channels", (3,), 3)
    transformer = read_transformer(vision, 768, 12, 3072)
    return ViTConfig(vision.integer("image_size", 224), vision.integer("patch_size", 32), transformer)


def read_text(text: Fields) -> TextConfig:
    vocab_size = text.integer("vocab_size", 49408)
    # miniclip pools a text at the first occurrence of its largest id, and these two values mean the same.
    if text.values.get("eos_token_id", 49407) not in (LEGACY_EOS, vocab_size - 1):
        raise text.fault(
            "eos_token_id",
            f"{LEGACY_EOS} or {vocab_size - 1}, the largest id: a text is pooled at its largest id, which is another "
            "token if tokens were added after the end token",
        )
    return TextConfig(text.integer("max_position_embeddings", 77), vocab_size, read_transformer(text, 512, 8, 2048))


def _tower(fields: Fields, name: str) -> Fields:
    """The section of a tower. Some older files have it twice, and transformers uses the one with the longer name."""
    twin = f"{name}_config_dict"
    return fields.section(f"{name}_config" if fields.values.get(twin) is None else twin, {})


def read_transformer(
    tower: Fields, width: int, heads: int, mlp_width: int, act: str = "quick_gelu", eps: float = LAYER_NORM_EPS
) -> TransformerConfig:
    """A tower's transformer, whose defaults are given."""
    tower.one_of("layer_norm_eps", (eps,), eps)
    width = tower.integer("hidden_size", width)
    return TransformerConfig(
        width,
        layers=tower.integer("num_hidden_layers", 12, most=MAX_LAYERS),
        heads=tower.divisor("num_attention_heads", heads, width),
        mlp_width=tower.integer("intermediate_size", mlp_width),
        activation=HIDDEN_ACT[tower.one_of("hidden_act", HIDDEN_ACT, act)],
    )


def read_preprocess(folder: Path, image_size: int, default: PreprocessConfig | None = None) -> PreprocessConfig:
    """How a directory says that pictures are prepared; if it has no such file, the resize mode is UNKNOWN.

    default: has the mean and the std of a file that states none; None: OpenAI's.
    """
    default = default or PreprocessConfig(image_size)
    path = folder / "processor_config.json"  # transformers 5 writes this one, and prefers it
    nested = Fields.read(path).section("image_processor", {}) if path.is_file() else None
    if nested and nested.values:
        fields = nested
    elif (folder / "preprocessor_config.json").is_file():
        fields = Fields.read(folder / "preprocessor_config.json")
    else:
        return PreprocessConfig(image_size, resize_mode=UNKNOWN)

    square = {"height": image_size, "width": image_size}
    size = fields.one_of("size", (image_size, {"shortest_edge": image_size}, square), 224)
    squash = size == square
    if not squash:
        fields.one_of("crop_size", (image_size, square), 224)
    fields.one_of("do_center_crop", (True, False) if squash else (True,), True)
    for step in STEPS:
        fields.one_of(step, (True, None) if step == "do_convert_rgb" else (True,), True)  # RGB anyway, of most files
    for other in [key for key in fields.values if key.startswith("do_") and key not in (*STEPS, "do_center_crop")]:
        fields.one_of(other, (False, None))
    if abs(fields.number("rescale_factor", 1 / 255) * 255 - 1) > 1e-6:
        raise fields.fault("rescale_factor", "1/255")
    return PreprocessConfig(
        image_size,
        mean=fields.rgb("image_mean", default.mean),
        std=fields.rgb("image_std", default.std),
        interpolation=RESAMPLE[fields.one_of("resample", RESAMPLE, 3)],
        resize_mode="squash" if squash else "shortest",
    )


def write(config: CLIPConfig, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Fill a directory that transformers loads, with the tokenizer if the vocabulary is OpenAI's.

    tensors: a state dict, with OpenAI's names and the shapes of `config`; their dtypes are kept.
    CheckpointError for a model that transformers' CLIPModel does not have.
    """
    if not isinstance(config.vision, ViTConfig):
        raise CheckpointError("Hugging Face's CLIPModel has no ResNets: this model can't be written as one")
    renamed = from_canonical("huggingface", tensors)
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}
    files = {
        "config.json": _config_json(config, dtypes.pop() if len(dtypes) == 1 else "float32"),
    }
    if config.preprocess.resize_mode != UNKNOWN:
        files["preprocessor_config.json"] = _preprocessor_json(config.preprocess)
    if config.text.vocab_size == tokenizer.VOCAB_SIZE:
        files |= _tokenizer_files(config.text.context_length)
    for name, content in files.items():
        write_text(folder / name, content if isinstance(content, str) else json.dumps(content, indent=2) + "\n")
    save_tensors(renamed, folder / "model.safetensors", {"format": "pt"})  # transformers insists on the format


def _config_json(config: CLIPConfig, dtype: str) -> dict[str, Any]:
    text, vision = config.text, config.vision
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": config.embed_dim,
        "logit_scale_init_value": 2.6592,
        "torch_dtype": dtype,  # what transformers casts all tensors to
        "text_config": {
            "model_type": "clip_text_model",
            "max_position_embeddings": text.context_length,
            "vocab_size": text.vocab_size,
            "bos_token_id": text.vocab_size - 2,
            "eos_token_id": text.vocab_size - 1,
            "pad_token_id": text.vocab_size - 1,
            **_transformer_json(text.transformer, config.embed_dim),
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "num_channels": 3,
            **_transformer_json(vision.transformer, config.embed_dim),
        },
    }


def _transformer_json(transformer: TransformerConfig, embed_dim: int) -> dict[str, Any]:
    return {
        "hidden_size": transformer.width,
        "num_hidden_layers": transformer.layers,
        "num_attention_heads": transformer.heads,
        "intermediate_size": transformer.mlp_width,
        "hidden_act": next(name for name, own in HIDDEN_ACT.items() if own == transformer.activation),
        "layer_norm_eps": LAYER_NORM_EPS,
        "projection_dim": embed_dim,
    }


def _preprocessor_json(preprocess: PreprocessConfig) -> dict[str, Any]:
    square = {"height": preprocess.image_size, "width": preprocess.image_size}
    squash = preprocess.resize_mode == "squash"
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": square if squash else {"shortest_edge": preprocess.image_size},
        "resample": next(number for number, name in RESAMPLE.items() if name == preprocess.interpolation),
        "do_center_crop": not squash,
        "crop_size": square,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": preprocess.mean,
        "image_std": preprocess.std,
    }


def _tokenizer_files(context_length: int) -> dict[str, Any]:
    merges, ids = tokenizer._read_merge_file()
    spelling = {i: symbol for symbol, i in ids.items()}
    special = {"bos_token": "<|startoftext|>"} | dict.fromkeys(["eos_token", "unk_token", "pad_token"], "<|endoftext|>")
    return {
        "vocab.json": ids | tokenizer.SPECIAL_TOKENS,
        "merges.txt": "\n".join(["#version: 0.2", *(f"{spelling[a]} {spelling[b]}" for a, b in merges)]) + "\n",
        "special_tokens_map.json": special,
        "tokenizer_config.json": {"tokenizer_class": "CLIPTokenizer", "model_max_length": context_length, **special},
    }
