"""What a CLIP is made of, as numbers: a frozen dataclass for each part, and a literal table of OpenAI's nine models.

A config holds everything that decides the function a checkpoint computes, also what tensor shapes cannot reveal: the
activation, the number of heads, and how pixels are prepared. Nothing here imports PyTorch.

Shape letters, used in every docstring of the project:

    N  images or texts in a batch    L  tokens in a sequence    D  width of a transformer      E  width of an embedding
    H  attention heads               C  channels of a map       R  side of the square image    P  side of a patch
"""

from __future__ import annotations

from dataclasses import dataclass

ACTIVATIONS = ("quick_gelu", "gelu")
INTERPOLATIONS = ("bicubic", "bilinear")
RESIZE_MODES = ("shortest", "squash")


def check_choice(name: str, got: str, valid: tuple[str, ...]) -> None:
    if got not in valid:
        raise ValueError(f"{name} is {got!r}; expected one of {', '.join(valid)}")


@dataclass(frozen=True)
class PreprocessConfig:
    """How a picture becomes pixels; see `miniclip.preprocess`. The defaults are those of all OpenAI models."""

    image_size: int  # R, pixels
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)  # of red, green, blue in [0, 1]
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"  # "shortest": shorter side to R, then centre crop; "squash": both sides to R

    def __post_init__(self) -> None:
        check_choice("interpolation", self.interpolation, INTERPOLATIONS)
        check_choice("resize_mode", self.resize_mode, RESIZE_MODES)


@dataclass(frozen=True)
class TransformerConfig:
    """A stack of pre-norm residual attention blocks, the body of both transformers."""

    width: int  # D
    layers: int
    heads: int  # H; OpenAI's are all width / 64
    mlp_width: int  # OpenAI's are all 4 * width
    activation: str = "quick_gelu"

    def __post_init__(self) -> None:
        check_choice("activation", self.activation, ACTIVATIONS)
        if self.width % self.heads:
            raise ValueError(f"width {self.width} does not divide into {self.heads} heads")


@dataclass(frozen=True)
class ViTConfig:
    """The Vision Transformer image tower."""

    image_size: int  # R
    patch_size: int  # P
    transformer: TransformerConfig


@dataclass(frozen=True)
class ResNetConfig:
    """The ModifiedResNet image tower. Its activation is always ReLU."""

    image_size: int  # R, a multiple of 32
    width: int  # channels after the stem; the last stage has 32 * width
    layers: tuple[int, int, int, int]  # bottleneck blocks in each stage
    heads: int  # of the attention pool; OpenAI's are all width * 32 / 64


@dataclass(frozen=True)
class TextConfig:
    """The causal text transformer."""

    context_length: int
    vocab_size: int
    transformer: TransformerConfig


@dataclass(frozen=True)
class CLIPConfig:
    """Two towers, the width E of the space they share, and how pictures are prepared for it."""

    embed_dim: int  # E
    vision: ViTConfig | ResNetConfig
    text: TextConfig
    preprocess: PreprocessConfig


def openai_transformer(width: int, layers: int) -> TransformerConfig:
    """A transformer of OpenAI's proportions: heads 64 wide, and an MLP four times as wide as the stream."""
    return TransformerConfig(width, layers, heads=width // 64, mlp_width=4 * width)


def _model(embed_dim: int, vision: ViTConfig | ResNetConfig, text_width: int) -> CLIPConfig:
    text = TextConfig(77, 49408, openai_transformer(text_width, 12))
    return CLIPConfig(embed_dim, vision, text, PreprocessConfig(vision.image_size))


def _vit(embed_dim: int, image_size: int, patch_size: int, width: int, layers: int, text_width: int) -> CLIPConfig:
    return _model(embed_dim, ViTConfig(image_size, patch_size, openai_transformer(width, layers)), text_width)


def _resnet(embed_dim: int, image_size: int, width: int, layers: tuple, text_width: int) -> CLIPConfig:
    return _model(embed_dim, ResNetConfig(image_size, width, layers, heads=width * 32 // 64), text_width)


# OpenAI's released models (CLIP paper, tables 19 and 20; the numbers agree with the shapes in the released files).
MODELS: dict[str, CLIPConfig] = {
    #                        E     R   width  blocks a stage  text width
    "RN50": _resnet(        1024, 224,  64, ( 3,  4,  6,  3),  512),
    "RN101": _resnet(        512, 224,  64, ( 3,  4, 23,  3),  512),
    "RN50x4": _resnet(       640, 288,  80, ( 4,  6, 10,  6),  640),
    "RN50x16": _resnet(      768, 384,  96, ( 6,  8, 18,  8),  768),
    "RN50x64": _resnet(     1024, 448, 128, ( 3, 15, 36, 10), 1024),
    #                        E     R   P  width layers text width
    "ViT-B/32": _vit(        512, 224, 32,  768, 12, 512),
    "ViT-B/16": _vit(        512, 224, 16,  768, 12, 512),
    "ViT-L/14": _vit(        768, 224, 14, 1024, 24, 768),
    "ViT-L/14@336px": _vit(  768, 336, 14, 1024, 24, 768),
}
