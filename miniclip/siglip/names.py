"""SigLIP's files: names of tensors in transformers' and OpenCLIP's layouts, their configs, and the tokenizer file."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from miniclip.config import UNKNOWN, PreprocessConfig, TransformerConfig
from miniclip.models import CLIP
from miniclip.siglip import tokenizer
from miniclip.siglip.config import EPS, SigLIPConfig, SigLIPTextConfig, SigLIPViTConfig
from miniclip.weights import huggingface
from miniclip.weights.errors import CheckpointError
from miniclip.weights.fields import Fields
from miniclip.weights.names import (
    SAME,
    SCALAR,
    TRANSPOSE,
    Converted,
    Row,
    Table,
    Transform,
    concatenated,
    huggingface_blocks,
    to_canonical,
)

HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
FIRST = Transform(lambda x: x[0], lambda x, i: x[None])  # [1, L, D], of the first row alone
PROBE = Transform(lambda x: x.flatten(), lambda x, i: x[None, None])  # [1, 1, D]
JOINED = Transform(concatenated, lambda x, i: x.tensor_split([len(x) // 3])[i])


def _row(canonical: str, *foreign: str, transform: Transform = SAME) -> Row:
    return Row(canonical, foreign, transform)


SCALARS = (_row("logit_scale", "logit_scale", transform=SCALAR), _row("logit_bias", "logit_bias", transform=SCALAR))

# transformers' SiglipModel.
HUGGINGFACE: Table = (
    *SCALARS,
    _row("token_embedding.weight", "text_model.embeddings.token_embedding.weight"),
    _row("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    *huggingface_blocks("transformer.resblocks.#.", "text_model.encoder.layers.#."),
    _row("ln_final.*", "text_model.final_layer_norm.*"),
    _row("text_projection", "text_model.head.weight", transform=TRANSPOSE),
    _row("text_projection_bias", "text_model.head.bias"),
    _row("visual.conv1.*", "vision_model.embeddings.patch_embedding.*"),
    _row("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    *huggingface_blocks("visual.transformer.resblocks.#.", "vision_model.encoder.layers.#."),
    _row("visual.ln_post.*", "vision_model.post_layernorm.*"),
    _row("visual.pool.attn.probe", "vision_model.head.probe", transform=PROBE),
    _row("visual.pool.attn.in_proj_*", "vision_model.head.attention.in_proj_*"),
    _row("visual.pool.attn.out_proj.*", "vision_model.head.attention.out_proj.*"),
    _row("visual.pool.ln.*", "vision_model.head.layernorm.*"),
    _row("visual.pool.mlp.c_fc.*", "vision_model.head.mlp.fc1.*"),
    _row("visual.pool.mlp.c_proj.*", "vision_model.head.mlp.fc2.*"),
)

# OpenCLIP's CustomTextCLIP with an image tower of timm's.
OPENCLIP: Table = (
    *SCALARS,
    _row("token_embedding.weight", "text.token_embedding.weight"),
    _row("positional_embedding", "text.positional_embedding"),
    _row("transformer.**", "text.transformer.**"),
    _row("ln_final.*", "text.ln_final.*"),
    _row("text_projection", "text.text_projection.weight", transform=TRANSPOSE),
    _row("text_projection_bias", "text.text_projection.bias"),
    _row("visual.conv1.*", "visual.trunk.patch_embed.proj.*"),
    _row("visual.positional_embedding", "visual.trunk.pos_embed", transform=FIRST),
    *(
        _row(f"visual.transformer.resblocks.#.{own}", f"visual.trunk.blocks.#.{theirs}")
        for own, theirs in (
            ("ln_1.*", "norm1.*"),
            ("attn.in_proj_*", "attn.qkv.*"),
            ("attn.out_proj.*", "attn.proj.*"),
            ("ln_2.*", "norm2.*"),
            ("mlp.c_fc.*", "mlp.fc1.*"),
            ("mlp.c_proj.*", "mlp.fc2.*"),
        )
    ),
    _row("visual.ln_post.*", "visual.trunk.norm.*"),
    _row("visual.pool.attn.probe", "visual.trunk.attn_pool.latent", transform=PROBE),
    _row("visual.pool.attn.in_proj_*", "visual.trunk.attn_pool.q.*", "visual.trunk.attn_pool.kv.*", transform=JOINED),
    _row("visual.pool.attn.out_proj.*", "visual.trunk.attn_pool.proj.*"),
    _row("visual.pool.ln.*", "visual.trunk.attn_pool.norm.*"),
    _row("visual.pool.mlp.c_fc.*", "visual.trunk.attn_pool.mlp.fc1.*"),
    _row("visual.pool.mlp.c_proj.*", "visual.trunk.attn_pool.mlp.fc2.*"),
)

LAYOUTS = {"vision_model.head.probe": HUGGINGFACE, "visual.trunk.attn_pool.latent": OPENCLIP}  # by a name of theirs


def owns(names: Collection[str]) -> bool:
    """Whether a file that states no config has these towers."""
    return any(name in names for name in (*LAYOUTS, "visual.pool.attn.probe"))


def read(
    tensors: Mapping[str, Tensor], config: SigLIPConfig | None, activation: str | None
) -> tuple[SigLIPConfig, Mapping[str, Tensor]]:
    """The tensors under the model's own names. CheckpointError if nothing states the config."""
    if config is None:
        raise CheckpointError(
            "this is a SigLIP, and its tensors tell neither the heads nor the activation nor how texts are cleaned: "
            "load the directory that holds its config.json or open_clip_config.json"
        )
    for name, table in LAYOUTS.items():
        if name in tensors:
            renamed = to_canonical("SigLIP", tensors, table)
            no_projection = table is OPENCLIP and not {"text_projection", "text_projection_bias"} & renamed.keys()
            return config, _with_identity(config, renamed) if no_projection else renamed
    return config, tensors


def _with_identity(config: SigLIPConfig, tensors: Converted) -> Converted:
    """The tensors with a projection of texts that changes nothing: one of OpenCLIP's models has none."""
    width = config.text.transformer.width
    added = {"text_projection": lambda: torch.eye(width), "text_projection_bias": lambda: torch.zeros(width)}
    plan = {name: (SAME.to_canonical, (name,)) for name in tensors} | {name: (x, ()) for name, x in added.items()}
    return Converted(tensors, plan)


# Configs.

TOKENIZERS = {  # transformers' class: the cleaning, and its default end and pad tokens
    "SiglipTokenizer": ("remove punctuation", "</s>", "</s>"),
    "GemmaTokenizer": ("lower", "<eos>", "<pad>"),  # SigLIP 2's, which was trained on lower case
    "Siglip2Tokenizer": ("lower", "<eos>", "<pad>"),
}


def read_huggingface(fields: Fields, folder: Path) -> SigLIPConfig | None:
    """The SigLIP that a config.json describes, with transformers' defaults; None if it describes none."""
    kind = fields.values.get("model_type")
    if kind == "siglip2":
        raise CheckpointError(
            f"{fields.path}: model_type is 'siglip2', a SigLIP 2 for pictures of any shape (NaFlex); only those of a "
            "fixed resolution can be loaded, whose model_type is 'siglip'"
        )
    if kind != "siglip":
        return None
    vision, text = fields.section("vision_config", {}), fields.section("text_config", {})
    vision.one_of("num_channels", (3,), 3)
    vision.one_of("vision_use_head", (True,), True)
    image = SigLIPViTConfig(vision.integer("image_size", 224), vision.integer("patch_size", 16), _transformer(vision))
    width = image.transformer.width
    text.one_of("projection_size", (width, None), width)
    words = SigLIPTextConfig(
        text.integer("max_position_embeddings", 64),
        text.integer("vocab_size", 32000),
        _transformer(text),
        *_read_tokenizer(folder),
    )
    preprocess = huggingface.read_preprocess(folder, image.image_size, PreprocessConfig(image.image_size, **HALF))
    if preprocess.resize_mode not in ("squash", UNKNOWN):
        raise CheckpointError(
            f"{folder}: its pictures are cropped; expected both sides to be resized, as of every SigLIP"
        )
    return SigLIPConfig(width, image, words, preprocess)


def _transformer(tower: Fields) -> TransformerConfig:
    return huggingface.read_transformer(tower, 768, 12, 3072, "gelu_pytorch_tanh", EPS)


def _read_tokenizer(folder: Path) -> tuple[str, str, str]:
    """The cleaning, and the end and the pad token. Without a tokenizer_config.json, transformers' for SigLIP."""
    path = folder / "tokenizer_config.json"
    fields = Fields.read(path) if path.is_file() else Fields(path, {})
    kind = fields.values.get("tokenizer_class", "SiglipTokenizer")
    if str(kind).removesuffix("Fast") not in TOKENIZERS:
        raise fields.fault("tokenizer_class", " or ".join(TOKENIZERS))
    fields.one_of("do_lower_case", (True,), True)
    cleaning, end, pad = TOKENIZERS[kind.removesuffix("Fast")]
    return cleaning, _token(fields, "eos_token", end), _token(fields, "pad_token", pad)


def _token(fields: Fields, key: str, default: str | None = None) -> str:
    """A special token, which stands there as a string or as an object with its spelling."""
    value = fields.values.get(key, default)
    value = value.get("content") if isinstance(value, dict) else value
    if not isinstance(value, str):
        raise fields.fault(key, "the spelling of a token")
    return value


# timm's towers, by the size in their names: width, blocks, heads, width of the MLPs.
TIMM = {
    "base": (768, 12, 12, 3072),
    "large": (1024, 24, 16, 4096),
    "so400m": (1152, 27, 16, 4304),
    "giantopt": (1536, 40, 16, 6144),
}
TIMM_NAME = re.compile(r"vit_(base|large|so400m|giantopt)_patch(14|16|32)_siglip_(\d{3})")
TIMM_TANH = re.compile(r"vit_(base_patch32_siglip_256|large_patch16_siglip_512|so400m_patch16_.*|giantopt_.*)")
IGNORED = {"timm_model_pretrained", "timm_drop", "timm_drop_path", "output_tokens"}  # of training, and of outputs


def read_openclip(fields: Fields) -> SigLIPConfig | None:
    """The SigLIP that OpenCLIP's model_cfg describes, preprocessing as trained; None if it describes none."""
    vision, text = fields.section("vision_cfg", {}), fields.section("text_cfg", {})
    name = str(vision.values.get("timm_model_name"))
    match = TIMM_NAME.fullmatch(name)
    if match is None or text.values.get("hf_model_name"):  # the text tower of some is a language model
        return None
    width, layers, heads, mlp_width = TIMM[match[1]]
    image_size, patch_size = int(match[3]), int(match[2])
    activation = "gelu_tanh" if TIMM_TANH.fullmatch(name) else "gelu"
    fields.one_of("embed_dim", (width,))
    fields.one_of("quick_gelu", (False, None))
    fields.one_of("multimodal_cfg", (None,))
    vision.one_of("image_size", (image_size,))
    vision.one_of("timm_pool", ("map",))
    vision.one_of("timm_proj", ("none",))
    _rest_is_off(vision, {"timm_model_name", "image_size", "timm_pool", "timm_proj"})
    image = SigLIPViTConfig(image_size, patch_size, TransformerConfig(width, layers, heads, mlp_width, activation))
    preprocess = PreprocessConfig(image_size, **HALF, resize_mode="squash")
    return SigLIPConfig(width, image, _openclip_text(text), preprocess)


def _openclip_text(text: Fields) -> SigLIPTextConfig:
    expected = {
        "no_causal_mask": (True,),
        "pool_type": ("last",),
        "norm_kwargs": ({"eps": EPS},),
        "act_kwargs": (None, {}, {"approximate": "tanh"}),
        "tokenizer_kwargs": ({"clean": "canonicalize"},),
    }
    for key, values in expected.items():
        text.one_of(key, values)
    text.one_of("proj_bias", (True,) if text.one_of("proj_type", ("linear", "none"), "linear") == "linear" else (None,))
    read = {"width", "layers", "heads", "mlp_ratio", "context_length", "vocab_size", "proj_bias", "proj_type"}
    _rest_is_off(text, expected.keys() | read | {"hf_tokenizer_name"})
    width = text.integer("width", 512)
    transformer = TransformerConfig(
        width,
        layers=text.integer("layers", 12),
        heads=text.divisor("heads", 8, width),
        mlp_width=int(width * text.number("mlp_ratio", 4.0)),
        activation="gelu_tanh" if text.values.get("act_kwargs") else "gelu",
    )
    path = text.path.parent / "tokenizer_config.json"
    tokens = "</s>", "</s>"
    if path.is_file():
        fields = Fields.read(path)
        tokens = _token(fields, "eos_token"), _token(fields, "pad_token")
    elif _tokenizer_file(text.path.parent):
        raise CheckpointError(f"{path} is missing, which names the special tokens: fetch it too")
    return SigLIPTextConfig(
        text.integer("context_length", 77), text.integer("vocab_size", 49408), transformer, "canonicalize", *tokens
    )


def _rest_is_off(fields: Fields, known: Collection[str]) -> None:
    for key in fields.values.keys() - known - IGNORED:
        fields.one_of(key, (False, None, {}))


# The tokenizer.


def add_tokenizer(
    config: SigLIPConfig, tensors: Mapping[str, Tensor], path: Path
) -> tuple[SigLIPConfig, Mapping[str, Tensor]]:
    """The config and the tensors with the tokenizer file, unless they have one; path: that file, or its directory."""
    file = _tokenizer_file(path) if path.is_dir() else path
    if config.text.tokenizer_size and not path.is_dir():
        raise CheckpointError("the model has its tokenizer already: leave tokenizer= out")
    if file is None or config.text.tokenizer_size:
        return config, tensors
    packed = torch.frombuffer(bytearray(tokenizer.pack(file)), dtype=torch.uint8)
    plan = {name: (SAME.to_canonical, (name,)) for name in tensors} | {"tokenizer_file": (lambda: packed, ())}
    return replace(config, text=replace(config.text, tokenizer_size=len(packed))), Converted(tensors, plan)


def write_tokenizer(model: CLIP, folder: Path) -> None:
    """The model's tokenizer file, if it has one, as tokenizer.model or tokenizer.json."""
    if model.config.text.tokenizer_size:
        content = tokenizer.decompress(bytes(model.tokenizer_file.cpu().numpy()))
        (folder / ("tokenizer.json" if content[:1] == b"{" else "tokenizer.model")).write_bytes(content)


def _tokenizer_file(folder: Path) -> Path | None:
    return next((folder / name for name in tokenizer.FILES if (folder / name).is_file()), None)
