"""MobileCLIP's configs: its image towers, and the table of its named models.

MobileCLIP (Vasu et al., CVPR 2024) and MobileCLIP2 (Faghri et al., TMLR 2025). Sizes are those of Apple's published
configs and code (github.com/apple/ml-mobileclip) and of timm. What the shapes in a file can't tell, as how pictures are
prepared, is stated here too, with its source.
"""

from __future__ import annotations

from dataclasses import dataclass

from miniclip.config import (
    MAX_INTEGER,
    MAX_LAYERS,
    CLIPConfig,
    ConfigError,
    NamedModel,
    PreprocessConfig,
    TextConfig,
    TransformerConfig,
    VisionConfig,
    ViTConfig,
    check_choice,
    check_sizes,
)


@dataclass(frozen=True)
class MCiConfig(VisionConfig, kind="mci"):
    """The convolutional image tower, a FastViT (Vasu et al. 2023): a stem, stages, a last convolution.

    Each stage has half the resolution of the one before and more channels. The first three mix positions by
    convolution, those after them by attention, with heads 32 wide.
    """

    # image_size: a multiple of 4 * 2**(stages - 1)
    widths: tuple[int, ...]  # C, channels of each stage; the stem has those of the first, the last convolution 2 C
    blocks: tuple[int, ...]  # in each stage
    mlp_ratio: int  # hidden channels of the MLPs, in C
    squeezed: tuple[int, ...]  # numbers of the stages whose downsampling has squeeze-and-excitation
    norm: str  # before attention: "batch", or "layer" over the channels

    def __post_init__(self) -> None:
        check_sizes(self, "image_size", "mlp_ratio")
        check_choice("norm", self.norm, ("batch", "layer"))
        for name, most in (("widths", MAX_INTEGER), ("blocks", MAX_LAYERS)):
            numbers = getattr(self, name)
            if not 1 <= len(numbers) == len(self.widths) <= 8 or not all(1 <= number <= most for number in numbers):
                expected = f"an integer from 1 to {most} for each stage, of which there are 1 to 8"
                raise ConfigError(f"{name} is {numbers!r:.100}; expected {expected}")

    @property
    def tensors(self) -> int:
        return 8 * sum(self.blocks)

    @property
    def summary(self) -> str:
        return f"FastViT {'-'.join(map(str, self.blocks))} x {self.widths[0]}"


@dataclass(frozen=True)
class ConvViTConfig(VisionConfig, kind="conv-vit"):
    """A Vision Transformer whose patches come from three convolutions, of stride 4, 2 and 2, and without ln_pre."""

    # image_size: a multiple of 16
    stem_width: int  # channels between the convolutions
    transformer: TransformerConfig
    padding: int  # of the first convolution, see `CONV_VIT`
    eps: float  # of every LayerNorm

    def __post_init__(self) -> None:
        check_sizes(self, "image_size", "stem_width")
        if self.image_size % 16 or self.padding not in (0, 1) or not 0 < self.eps < 1:
            got = f"image_size {self.image_size}, padding {self.padding} and eps {self.eps}"
            raise ConfigError(f"got {got}; expected a multiple of 16, 0 or 1, and a number between 0 and 1")

    @property
    def summary(self) -> str:
        return f"conv ViT/16 {self.transformer.layers} x {self.transformer.width}"


@dataclass(frozen=True)
class MobileCLIPConfig(CLIPConfig, family="mobileclip"):
    """A CLIP's config with two more fields, for the text tower."""

    causal: bool  # whether tokens attend to earlier ones only; if not, they attend to all 77, padding too
    text_taps: int = 0  # width of the convolutions in a block before and a block after the transformer; 0: none

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.text_taps and (self.text_taps % 2 == 0 or not 1 <= self.text_taps <= self.text.context_length):
            raise ConfigError(f"text_taps is {self.text_taps}; expected 0, or an odd number up to the context length")


def _mci(widths: tuple[int, ...], blocks: tuple[int, ...], large: bool = False) -> MCiConfig:
    if large:
        return MCiConfig(256, widths, blocks, mlp_ratio=4, squeezed=(), norm="layer")
    return MCiConfig(256, widths, blocks, mlp_ratio=3, squeezed=(2, 3), norm="batch")


MCI = {
    "MCi0": _mci((64, 128, 256, 512), (2, 6, 10, 2)),
    "MCi1": _mci((64, 128, 256, 512), (4, 12, 20, 4)),
    "MCi2": _mci((80, 160, 320, 640), (4, 12, 24, 4)),
    "MCi3": _mci((96, 192, 384, 768, 1536), (2, 12, 24, 4, 2), large=True),
    "MCi4": _mci((128, 256, 512, 1024, 2048), (2, 12, 24, 4, 4), large=True),
}


def _transformer(width: int, layers: int) -> TransformerConfig:
    return TransformerConfig(width, layers, width // 64, 4 * width, "gelu")


# The same tensors are two functions, depending on the code that trained them, and nothing in a file tells which one:
# Apple's pads the first convolution by 1 and has an eps of 1e-5; timm's vit_base_mci_224, which OpenCLIP runs for both
# generations, pads nothing and has 1e-6. With random weights the two embeddings' cosine is 0.998.
CONV_VIT = {
    "apple": ConvViTConfig(224, 192, _transformer(768, 12), padding=1, eps=1e-5),
    "openclip": ConvViTConfig(224, 192, _transformer(768, 12), padding=0, eps=1e-6),
}
VIT_L = ViTConfig(224, 14, _transformer(1024, 24))  # OpenAI's ViT-L/14 with the exact GELU, and a bias at the end


def mobileclip_config(
    vision: MCiConfig | ConvViTConfig | ViTConfig, *, mct: bool = False, bicubic: bool = False
) -> MobileCLIPConfig:
    """The config of a MobileCLIP with this image tower.

    mct: the small text tower, of MobileCLIP-S0 alone: four layers of attention between two blocks of convolution.
    bicubic: how pictures are resized. Apple's code does it bilinearly, and OpenCLIP's table of pretrained models says
    so of all but MobileCLIP2-L-14. Its mean and std are OpenAI's for S3, S4 and L-14, otherwise 0 and 1.
    """
    large = isinstance(vision, ViTConfig) or vision in (MCI["MCi3"], MCI["MCi4"])
    embed_dim = text_width = 768 if large else 512
    statistics = {} if large else {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    interpolation = "bicubic" if bicubic else "bilinear"
    return MobileCLIPConfig(
        embed_dim,
        vision,
        TextConfig(77, 49408, _transformer(text_width, 4 if mct else 12)),
        PreprocessConfig(vision.image_size, interpolation=interpolation, **statistics),
        causal=isinstance(vision, ConvViTConfig),
        text_taps=11 if mct else 0,
    )


APPLE_URL = "https://docs-assets.developer.apple.com/ml-research/datasets/mobileclip"
HUGGING_FACE_URL = "https://huggingface.co/apple"


def _named(
    name: str,
    config: MobileCLIPConfig,
    size: int,
    parameters: tuple[float, float],
    latency: tuple[float, float],
    imagenet: float,
    average: float,
    small: tuple[float, float, float] | None = None,
    sha256: str | None = None,
) -> NamedModel:
    """size: bytes of the file at the least, two for each parameter; parameters: millions, of the image and the text
    tower; latency: milliseconds of both on an iPhone 12 Pro Max; average: over 38 data sets, %; small: CIFAR-10,
    CIFAR-100 and MNIST."""
    file = f"{name.lower().replace('-lt', 'lt').replace('-14', '14').replace('-', '_')}.pt"
    first_release = name in ("MobileCLIP-S0", "MobileCLIP-S1", "MobileCLIP-S2", "MobileCLIP-B", "MobileCLIP-B-LT")
    url = f"{APPLE_URL}/{file}" if first_release else f"{HUGGING_FACE_URL}/{name}/resolve/main/{file}"
    published = {"ImageNet": imagenet} | dict(zip(("CIFAR-10", "CIFAR-100", "MNIST"), small or (), strict=bool(small)))
    notes = {"parameters": parameters, "latency": latency, "average": average}
    return NamedModel(config, file, url, sha256, size, published, "Apple's README and results files", notes)


# Files: ml-mobileclip's get_pretrained_models.sh and README; mobileclip_l14.pt is named as its second generation's is.
# The README gives MobileCLIP2-S0 the small text tower's 42.4 M and 1.6 ms; its config has the larger tower.
MODELS: dict[str, NamedModel] = {
    name: _named(name, *row)
    for name, *row in (
        ("MobileCLIP-S0", mobileclip_config(MCI["MCi0"], mct=True), 107_695_362, (11.4, 42.4), (1.5, 1.6), 67.8, 58.1,
         (93.18, 74.86, 68.63), "809b408eff74f8058843e86a1f92967097d42ba782450e85b8f4867b7f0ca0b7"),
        ("MobileCLIP-S1", mobileclip_config(MCI["MCi1"]), 169_938_434, (21.5, 63.4), (2.5, 3.3), 72.6, 61.3,
         (95.00, 79.18, 83.16)),
        ("MobileCLIP-S2", mobileclip_config(MCI["MCi2"]), 198_485_634, (35.7, 63.4), (3.6, 3.3), 74.4, 63.7,
         (95.90, 81.28, 87.02)),
        ("MobileCLIP-B", mobileclip_config(CONV_VIT["apple"]), 299_553_282, (86.3, 63.4), (10.4, 3.3), 76.8, 65.2,
         (97.78, 86.21, 84.59)),
        ("MobileCLIP-B-LT", mobileclip_config(CONV_VIT["apple"]), 299_553_282, (86.3, 63.4), (10.4, 3.3), 77.2, 65.8,
         (98.04, 86.72, 88.49)),
        ("MobileCLIP-S3", mobileclip_config(MCI["MCi3"]), 497_771_906, (125.1, 123.6), (8.0, 6.6), 78.3, 66.3),
        ("MobileCLIP-L-14", mobileclip_config(VIT_L), 855_234_562, (304.3, 123.6), (57.9, 6.6), 79.5, 66.9),
        ("MobileCLIP-S4", mobileclip_config(MCI["MCi4"]), 890_870_274, (321.6, 123.6), (19.6, 6.6), 79.4, 68.1),
        ("MobileCLIP2-S0", mobileclip_config(MCI["MCi0"]), 149_670_146, (11.4, 63.4), (1.5, 3.3), 71.5, 59.7,
         (94.23, 77.78, 85.03)),
        ("MobileCLIP2-S2", mobileclip_config(MCI["MCi2"]), 198_486_658, (35.7, 63.4), (3.6, 3.3), 77.2, 64.1),
        ("MobileCLIP2-B", mobileclip_config(CONV_VIT["openclip"]), 299_554_306, (86.3, 63.4), (10.4, 3.3), 79.4, 65.8),
        ("MobileCLIP2-S3", mobileclip_config(MCI["MCi3"]), 497_771_906, (125.1, 123.6), (8.0, 6.6), 80.7, 66.8),
        ("MobileCLIP2-L-14", mobileclip_config(VIT_L, bicubic=True), 855_234_562, (304.3, 123.6), (57.9, 6.6), 81.9,
         67.8),
        ("MobileCLIP2-S4", mobileclip_config(MCI["MCi4"]), 890_870_274, (321.6, 123.6), (19.6, 6.6), 81.9, 67.5),
    )
}  # fmt: skip
