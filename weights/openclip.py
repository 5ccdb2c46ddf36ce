"""Directories of OpenCLIP: open_clip_config.json and the weights.

Their config can describe many architectures. Each of its fields stands in one of three tables below, or is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from miniclip.config import (
    INTERPOLATIONS,
    MAX_LAYERS,
    RESIZE_MODES,
    CLIPConfig,
    PreprocessConfig,
    ResNetConfig,
    TextConfig,
    TransformerConfig,
    ViTConfig,
)
from miniclip.weights.errors import CheckpointError
from miniclip.weights.fields import Fields

# In the order in which OpenCLIP prefers them; then what the same model may have beside it for transformers alone.
WEIGHT_FILES = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
    "model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.pth",
    "model.pth",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
)

READ = {
    "model_cfg": {"embed_dim", "quick_gelu", "vision_cfg", "text_cfg"},
    "vision_cfg": {"image_size", "patch_size", "width", "layers", "head_width", "mlp_ratio"},
    "text_cfg": {"context_length", "vocab_size", "width", "layers", "heads", "mlp_ratio"},
    "preprocess_cfg": {"size", "mean", "std", "interpolation", "resize_mode"},
}

# Fields that must have one of these values, if they are there, for the architecture to be CLIP's.
OFF = (False, None)
NONE = (None, "", {})
_BLOCK = {
    "ls_init_value": NONE,
    "act_kwargs": NONE,
    "norm_kwargs": NONE,
    "block_type": (None, "default"),
    "qk_norm": OFF,
    "scaled_cosine_attn": OFF,
    "scale_heads": OFF,
    "scale_attn_inner": OFF,
    "scale_attn": OFF,
    "scale_fc": OFF,
}
FIXED = {
    "model_cfg": {"init_logit_bias": NONE, "multimodal_cfg": NONE},
    "vision_cfg": {
        **_BLOCK,
        "timm_model_name": NONE,
        "attentional_pool": OFF,
        "no_ln_pre": OFF,
        "pos_embed_type": ("learnable",),
        "pool_type": ("tok",),
    },
    "text_cfg": {
        **_BLOCK,
        "hf_model_name": NONE,
        "hf_tokenizer_name": NONE,
        "tokenizer_mode": NONE,
        "tokenizer_kwargs": NONE,
        "embed_cls": OFF,
        "no_causal_mask": OFF,
        "pool_type": ("argmax",),
        "proj_type": ("linear",),
        "proj_bias": OFF,
    },
    "preprocess_cfg": {"mode": ("RGB",)},
}

# What another value of these fields means.
MEANING = {
    "timm_model_name": "the image tower is one of timm's other architectures",
    "init_logit_bias": "it is trained with SigLIP's loss, but its towers are not SigLIP's",
    "multimodal_cfg": "it is a CoCa model, whose text decoder is another architecture",
    "no_ln_pre": "it is a CLIPA model, whose image tower is another architecture",
    "hf_model_name": "the text tower is a language model of Hugging Face's, which is another architecture",
    "hf_tokenizer_name": "the tokenizer is not CLIP's",
    "tokenizer_kwargs": "the tokenizer prepares texts in another way than CLIP's",
    "ls_init_value": "the blocks have layer scales, as those of no CLIP",
}

# Fields that change nothing in such a model: they concern training, how outputs are packed, or what FIXED rules out.
# OpenCLIP ignores every unknown field of preprocess_cfg.
IRRELEVANT = {
    "model_cfg": {"custom_text", "init_logit_scale", "nonscalar_logit_scale", "output_dict"},
    "vision_cfg": {
        *("patch_dropout", "output_tokens", "final_ln_after_pool", "attn_pooler_queries", "attn_pooler_heads"),
        *("timm_model_pretrained", "timm_pool", "timm_proj", "timm_proj_bias", "timm_drop", "timm_drop_path"),
    },
    "text_cfg": {
        *("output_tokens", "final_ln_after_pool", "pad_id", "eos_id"),
        *("hf_model_pretrained", "hf_proj_type", "hf_pooler_type"),
    },
}


def read_config(folder: Path, readers: Sequence[Callable[[Fields], CLIPConfig | None]] = ()) -> CLIPConfig:
    """The model and the preprocessing that a directory describes. Missing fields have OpenCLIP's defaults.

    readers: of `model_cfg`, by the families of models, asked in order; each returns None for another family's model.
    CheckpointError names the field that is wrong, or that asks for what this CLIP does not have.
    """
    fields = Fields.read(folder / "open_clip_config.json")
    model = fields.section("model_cfg")
    config = next(filter(None, (read(model) for read in (*readers, read_model))))
    preprocess = _read_preprocess(_section(fields, "preprocess_cfg", {}), config.vision.image_size)
    return replace(config, preprocess=preprocess)


def read_model(model: Fields) -> CLIPConfig:
    """The CLIP that `model_cfg` describes, with the preprocessing of OpenAI's."""
    _check_fields(model, "model_cfg")
    activation = "quick_gelu" if model.one_of("quick_gelu", (True, False), False) else "gelu"
    vision = _read_vision(_section(model, "vision_cfg"), activation)
    text = _read_text(_section(model, "text_cfg"), activation)
    return CLIPConfig(model.integer("embed_dim"), vision, text, PreprocessConfig(vision.image_size))


def _section(fields: Fields, name: str, default: dict | None = None) -> Fields:
    section = fields.section(name, default)
    _check_fields(section, name)
    return section


def _check_fields(section: Fields, name: str) -> None:
    known = READ[name] | IRRELEVANT.get(name, section.values.keys() - FIXED[name].keys())
    for key in [key for key in section.values if key not in known]:
        try:
            section.one_of(key, FIXED[name].get(key, OFF))  # an unknown field may be there as long as it is off
        except CheckpointError as fault:
            raise CheckpointError(f"{fault}: {MEANING[key]}") if key in MEANING else fault from None


def _read_vision(vision: Fields, activation: str) -> ViTConfig | ResNetConfig:
    image_size, width = vision.integer("image_size", 224), vision.integer("width", 768)
    layers = vision.values.get("layers")
    if isinstance(layers, list):  # a ResNet; its activation is ReLU whatever the config says
        if len(layers) != 4 or not all(type(n) is int and 1 <= n <= MAX_LAYERS for n in layers):
            raise vision.fault("layers", "the number of layers, or those of four stages")
        pooled = 32 * width
        return ResNetConfig(image_size, width, tuple(layers), pooled // vision.divisor("head_width", 64, pooled))
    heads = width // vision.divisor("head_width", 64, width)
    return ViTConfig(image_size, vision.integer("patch_size", 16), _transformer(vision, width, heads, activation))


def _read_text(text: Fields, activation: str) -> TextConfig:
    width = text.integer("width", 512)
    transformer = _transformer(text, width, text.divisor("heads", 8, width), activation)
    return TextConfig(text.integer("context_length", 77), text.integer("vocab_size", 49408), transformer)


def _transformer(tower: Fields, width: int, heads: int, activation: str) -> TransformerConfig:
    layers = tower.integer("layers", 12, most=MAX_LAYERS)
    return TransformerConfig(width, layers, heads, int(width * tower.number("mlp_ratio", 4.0)), activation)


def _read_preprocess(fields: Fields, image_size: int) -> PreprocessConfig:
    stated = {key: value for key, value in fields.values.items() if value is not None}  # null stands for the default
    fields = Fields(fields.path, stated, fields.prefix)
    fields.one_of("size", (image_size, [image_size, image_size]), image_size)
    return PreprocessConfig(
        image_size,
        mean=fields.rgb("mean", PreprocessConfig.mean),
        std=fields.rgb("std", PreprocessConfig.std),
        interpolation=fields.one_of("interpolation", INTERPOLATIONS, "bicubic"),
        resize_mode=fields.one_of("resize_mode", RESIZE_MODES, "shortest"),
    )
