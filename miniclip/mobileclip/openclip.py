"""MobileCLIP in OpenCLIP's form: its directories are read and written, and the tensors are unfolded.

OpenCLIP builds the model as it is trained, with all its branches. So tensors are written for all branches: one has the
folded weights, and the others are zero.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from miniclip.io import save_tensors, write_json
from miniclip.mobileclip.config import CONV_VIT, MCI, VIT_L, MCiConfig, MobileCLIPConfig, mobileclip_config
from miniclip.mobileclip.names import BATCH_NORM, EPS, TABLES, Parts, delta, expected_branches, tower_of
from miniclip.weights.errors import CheckpointError
from miniclip.weights.fields import Fields
from miniclip.weights.names import SAME, Converted, from_canonical

TIMM = {  # names of image towers, in timm
    **{f"fastvit_{name.lower()}": tower for name, tower in MCI.items()},
    "vit_base_mci_224": CONV_VIT["openclip"],
    "vit_large_patch14_clip_224": VIT_L,
}
TIMM_FIELDS = {"timm_model_name", "timm_model_pretrained", "timm_drop", "timm_drop_path"}  # known, or of training
UNFOLDED = (  # patterns of the names of folded convolutions; the group is the module
    r"(.*)\.reparam_conv\.(?:weight|bias)",
    r"(.*\.mlp\.conv)\.(?:weight|bias)",
    r"(.*\.patch_embed\.backbone\.\d+)\.(?:weight|bias)",
)


def read_config(fields: Fields) -> MobileCLIPConfig | None:
    """The model that OpenCLIP's model_cfg describes, preprocessing as published; None if it is no MobileCLIP."""
    vision = fields.section("vision_cfg")
    if str(vision.values.get("timm_model_name")) not in TIMM:
        return None
    text = fields.section("text_cfg")
    tower = TIMM[vision.values["timm_model_name"]]
    config = mobileclip_config(tower)
    transformer = config.text.transformer
    expected = {"context_length": 77, "vocab_size": 49408, "width": transformer.width, "layers": transformer.layers}
    expected["heads"] = transformer.heads
    fields.one_of("embed_dim", (config.embed_dim,))
    fields.one_of("quick_gelu", (False, None))
    vision.one_of("image_size", (tower.image_size,))
    vision.one_of("timm_pool", ("avg" if isinstance(tower, MCiConfig) else "token",))
    vision.one_of("timm_proj", (None, ""))
    for key, value in expected.items():
        text.one_of(key, (value,))
    for key in vision.values.keys() - TIMM_FIELDS - {"image_size", "timm_pool", "timm_proj"}:
        vision.one_of(key, (False, None))
    for key in text.values.keys() - expected.keys() - {"no_causal_mask"}:
        text.one_of(key, (False, None))
    return replace(config, causal=not text.one_of("no_causal_mask", (True, False), False))


def write(config: MobileCLIPConfig, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Fill a directory that open_clip loads. CheckpointError for a model that OpenCLIP does not have."""
    write_json(folder / "open_clip_config.json", openclip_json(config))
    save_tensors(to_openclip(config, tensors), folder / "open_clip_model.safetensors", {"format": "pt"})


def openclip_json(config: MobileCLIPConfig) -> dict:
    """open_clip_config.json. CheckpointError for a model that OpenCLIP does not have, or computes differently."""
    timm = next((name for name, tower in TIMM.items() if tower == config.vision), None)
    if timm is None or config.text_taps:
        raise CheckpointError(
            "OpenCLIP does not have this model (the text tower of MobileCLIP-S0 is Apple's alone): write .safetensors"
        )
    text, preprocess = config.text, config.preprocess
    return {
        "model_cfg": {
            "embed_dim": config.embed_dim,
            "vision_cfg": {
                "timm_model_name": timm,
                "timm_model_pretrained": False,
                "timm_pool": "avg" if isinstance(config.vision, MCiConfig) else "token",
                "timm_proj": None,
                "timm_drop": 0.0,
                "timm_drop_path": 0.0,
                "image_size": config.vision.image_size,
            },
            "text_cfg": {
                "context_length": text.context_length,
                "vocab_size": text.vocab_size,
                "width": text.transformer.width,
                "heads": text.transformer.heads,
                "layers": text.transformer.layers,
                "no_causal_mask": not config.causal,
            },
            "custom_text": True,
        },
        "preprocess_cfg": {
            "mean": list(preprocess.mean),
            "std": list(preprocess.std),
            "interpolation": preprocess.interpolation,
            "resize_mode": preprocess.resize_mode,
        },
    }


def to_openclip(config: MobileCLIPConfig, tensors: Mapping[str, Tensor]) -> Converted:
    """The tensors of OpenCLIP's unfolded model, which is the one that it builds, for tensors that have our names.

    What the dtype of a kernel would round is float64, so that folding gives the same kernel and bias again.
    MobileCLIP-S0, whose text tower OpenCLIP does not have, gets the names that it would have there. CheckpointError for
    Apple's MobileCLIP-B, of which OpenCLIP computes something else.
    """
    if config.vision == CONV_VIT["apple"]:
        raise CheckpointError(
            "Apple's MobileCLIP-B pads its first convolution and has another eps than OpenCLIP's, so that there its "
            "tensors are another model: keep Apple's file"
        )
    folded = from_canonical("MobileCLIP", tensors, TABLES[tower_of(tensors, "visual.")])
    large = any(name.startswith("visual.stages.4.") for name in tensors)
    plan = {}
    for name, shape in folded.shapes().items():
        module = next((match[1] for pattern in UNFOLDED if (match := re.fullmatch(pattern, name))), None)
        if module is None:
            plan[name] = (SAME.to_canonical, (name,))
        elif name.endswith(".weight"):
            sources = (name, name.removesuffix("weight") + "bias")
            meta = (torch.empty(shape, device="meta"), torch.empty(shape[0], device="meta"))
            for part in _unfolded(module, large, *meta):
                plan[f"{module}.{part}"] = (partial(_part, module, large, part), sources)
    return Converted(folded, plan)


def _part(module: str, large: bool, part: str, kernel: Tensor, bias: Tensor) -> Tensor:
    result = _unfolded(module, large, kernel.double(), bias.double())[part]
    rounded = result.to(torch.int64 if part.endswith("num_batches_tracked") else kernel.dtype)
    return rounded if rounded.is_meta or torch.equal(rounded.double(), result.double()) else result


def _unfolded(module: str, large: bool, kernel: Tensor, bias: Tensor) -> Parts:
    if module.endswith(".token_mixer"):  # the mixer has all but the residual
        mixer = _branches(f"{module}.mixer", large, kernel - delta(kernel), bias)
        parts = {f"mixer.{name}": tensor for name, tensor in mixer.items()}
        return parts | _norm("norm.identity", 0 * bias, 0) | {"layer_scale.gamma": torch.ones_like(bias)[:, None, None]}
    if module.endswith(".downsample.proj.0"):
        small = _convolution("small_conv", torch.zeros_like(kernel[:, :, :3, :3]), 0 * bias)
        return _convolution("large_conv", kernel, bias) | small
    if module.endswith(".pos_emb"):
        return {"pos_enc.weight": kernel - delta(kernel), "pos_enc.bias": bias}
    if module.endswith(".backbone.2"):
        return {"conv.weight": kernel, "conv.bias": bias}
    if module.endswith((".mlp.conv", ".backbone.0", ".backbone.1")):
        return {"conv.weight": kernel} | _norm("bn", bias)
    return _branches(module, large, kernel, bias)


def _branches(module: str, large: bool, kernel: Tensor, bias: Tensor) -> Parts:
    """A MobileOne whose k x k convolution does everything."""
    parts, branches = _convolution("conv_kxk.0", kernel, bias), expected_branches(module, large)
    if "conv_scale" in branches:
        parts |= _convolution("conv_scale", torch.zeros_like(kernel[:, :, :1, :1]), 0 * bias)
    if "identity" in branches:
        parts |= _norm("identity", 0 * bias, 0)
    return parts


def _convolution(name: str, kernel: Tensor, bias: Tensor) -> Parts:
    return {f"{name}.conv.weight": kernel} | _norm(f"{name}.bn", bias)


def _norm(name: str, bias: Tensor, scale: float = 1) -> Parts:
    """A BatchNorm that multiplies by `scale` and adds `bias`."""
    weight = torch.full_like(bias, scale * (1 + EPS) ** 0.5)
    tensors = (weight, bias, torch.zeros_like(bias), torch.ones_like(bias))
    parts = {f"{name}.{key}": tensor for key, tensor in zip(BATCH_NORM, tensors, strict=True)}
    return parts | {f"{name}.num_batches_tracked": torch.tensor(0)}
