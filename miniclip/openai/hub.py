"""Well-known models of this architecture on the Hugging Face Hub, which `miniclip models` lists.

`load` takes any name on the Hub and reads the config that is stored there: it does not use this table. Architectures,
preprocessing and names are those of OpenCLIP 3.3.0's configs and table of pretrained weights (openai/clip-*: those of
OpenAI's files). The last two rows have the sizes that their model cards name; their activation was not checked.
Accuracies are those of OpenCLIP's table of results.
"""

from __future__ import annotations

from dataclasses import replace

from miniclip.config import (
    MODELS,
    OPENCLIP_RESULTS,
    CLIPConfig,
    PreprocessConfig,
    TextConfig,
    TransformerConfig,
    ViTConfig,
    openai_transformer,
)
from miniclip.family import HubModel


def _gelu(config: CLIPConfig) -> CLIPConfig:
    """The same architecture with GELU, which OpenCLIP trains with."""
    vision, text = (
        replace(tower, transformer=replace(tower.transformer, activation="gelu"))
        for tower in (config.vision, config.text)
    )
    return replace(config, vision=vision, text=text)


def _large(embed_dim: int, image_size: int, vision: TransformerConfig, text: TransformerConfig) -> CLIPConfig:
    """The models that are larger than OpenAI's."""
    preprocess = PreprocessConfig(image_size)
    return CLIPConfig(embed_dim, ViTConfig(image_size, 14, vision), TextConfig(77, 49408, text), preprocess)


def _preprocessed(config: CLIPConfig, **changes) -> CLIPConfig:
    return replace(config, preprocess=replace(config.preprocess, **changes))


B32, B16, L14, L14_336 = (MODELS[f"ViT-{name}"].config for name in ("B/32", "B/16", "L/14", "L/14@336px"))
B32_256 = replace(B32, vision=replace(B32.vision, image_size=256), preprocess=PreprocessConfig(256))
HUGE = TransformerConfig(1280, 32, 16, 5120)
H14, H14_378 = (_large(1024, size, HUGE, openai_transformer(1024, 24)) for size in (224, 378))
g14 = _large(1024, 224, TransformerConfig(1408, 40, 16, 6144), openai_transformer(1024, 24))
bigG14 = _large(1280, 224, TransformerConfig(1664, 48, 16, 8192), openai_transformer(1280, 32))
HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}

ROWS = (  # name, config, what it was trained on, accuracy on ImageNet
    ("openai/clip-vit-base-patch32", B32, "OpenAI's data", 63.32),
    ("openai/clip-vit-base-patch16", B16, "OpenAI's data", 68.34),
    ("openai/clip-vit-large-patch14", L14, "OpenAI's data", 75.54),
    ("openai/clip-vit-large-patch14-336", L14_336, "OpenAI's data", 76.56),
    ("laion/CLIP-ViT-B-32-laion2B-s34B-b79K", _gelu(B32), "LAION-2B", 66.56),
    ("laion/CLIP-ViT-B-16-laion2B-s34B-b88K", _gelu(B16), "LAION-2B", 70.23),
    ("laion/CLIP-ViT-L-14-laion2B-s32B-b82K", _preprocessed(_gelu(L14), **HALF), "LAION-2B", 75.25),
    ("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", _gelu(H14), "LAION-2B", 77.96),
    ("laion/CLIP-ViT-g-14-laion2B-s34B-b88K", _gelu(g14), "LAION-2B", 78.47),
    ("laion/CLIP-ViT-bigG-14-laion2B-39B-b160k", _gelu(bigG14), "LAION-2B", 80.09),
    ("laion/CLIP-ViT-B-32-DataComp.XL-s13B-b90K", _gelu(B32), "DataComp-1B", 69.17),
    ("laion/CLIP-ViT-B-32-256x256-DataComp-s34B-b86K", _gelu(B32_256), "DataComp-1B", 72.81),
    ("laion/CLIP-ViT-B-16-DataComp.XL-s13B-b90K", _gelu(B16), "DataComp-1B", 73.49),
    ("laion/CLIP-ViT-L-14-DataComp.XL-s13B-b90K", _gelu(L14), "DataComp-1B", 79.21),
    ("apple/DFN2B-CLIP-ViT-B-16", B16, "DFN-2B", 76.24),
    ("apple/DFN2B-CLIP-ViT-L-14", L14, "DFN-2B", 81.41),
    ("apple/DFN5B-CLIP-ViT-H-14", _preprocessed(H14, resize_mode="squash"), "DFN-5B", 83.44),
    ("apple/DFN5B-CLIP-ViT-H-14-378", _preprocessed(H14_378, resize_mode="squash"), "DFN-5B", 84.37),
    ("timm/vit_base_patch32_clip_224.metaclip_400m", B32, "MetaCLIP, 400M", 65.58),
    ("timm/vit_base_patch32_clip_224.metaclip_2pt5b", B32, "MetaCLIP, 2.5B", 67.66),
    ("timm/vit_base_patch16_clip_224.metaclip_400m", B16, "MetaCLIP, 400M", 70.80),
    ("timm/vit_base_patch16_clip_224.metaclip_2pt5b", B16, "MetaCLIP, 2.5B", 72.12),
    ("timm/vit_large_patch14_clip_224.metaclip_400m", L14, "MetaCLIP, 400M", 76.20),
    ("timm/vit_large_patch14_clip_224.metaclip_2pt5b", L14, "MetaCLIP, 2.5B", 79.17),
    ("timm/vit_huge_patch14_clip_224.metaclip_2pt5b", H14, "MetaCLIP, 2.5B", 80.51),
    ("patrickjohncyh/fashion-clip", _gelu(B32), "fashion, from LAION's", None),
    ("imageomics/bioclip", B16, "TreeOfLife-10M, from OpenAI's", None),
)
HUB = {
    name: HubModel(config, data, accuracy, source=OPENCLIP_RESULTS if accuracy else "")
    for name, config, data, accuracy in ROWS
}
