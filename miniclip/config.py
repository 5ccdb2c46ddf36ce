"""What a CLIP is made of, as numbers: a frozen dataclass for each part, a table of named models, configs as JSON.

A config holds everything that decides the function a checkpoint computes, including what tensor shapes cannot show: the
activation, the number of heads, and how pixels are prepared. Nothing here imports PyTorch.

Shape letters, used in every docstring of the project:

    N  images or texts in a batch    L  tokens in a sequence    D  width of a transformer      E  width of an embedding
    H  attention heads               C  channels of a map       R  side of the square image    P  side of a patch
"""

from __future__ import annotations

import math
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from typing import Any, ClassVar

from miniclip.errors import IncompleteModelError, MiniclipError

JSON_FORMAT = "miniclip config"  # followed by a version
JSON_VERSION = 1
MAX_INTEGER = 1 << 24  # of sizes and counts; the largest real one is a vocabulary of 901,629
MAX_LAYERS = 1000  # a config from a hostile file must not take hours to build; the deepest real tower has 56 layers

ACTIVATIONS = ("quick_gelu", "gelu", "gelu_tanh")
INTERPOLATIONS = ("bicubic", "bilinear")
RESIZE_MODES = ("shortest", "squash")
UNKNOWN = "unknown"  # resize mode of a model whose files do not state how pictures are prepared


class ConfigError(MiniclipError, ValueError):
    """A config that describes no model; the message names the field."""


def check_choice(name: str, got: str, valid: tuple[str, ...]) -> None:
    """ConfigError unless `got` is one of the valid values."""
    if got not in valid:
        raise ConfigError(f"{name} is {got!r}; expected one of {', '.join(valid)}")


def check_known(resize_mode: str) -> None:
    """IncompleteModelError if the model's files do not state how pictures are prepared."""
    if resize_mode == UNKNOWN:
        raise IncompleteModelError(
            "this model's files do not state how pictures are prepared: copy the preprocessor_config.json of the model "
            "that it was trained from into its directory. Without it only texts and ready pixels can be embedded"
        )


def check_sizes(config: object, *names: str, most: int = MAX_INTEGER) -> None:
    """ConfigError unless each of these fields of a config is an integer from 1 to `most`."""
    for name in names:
        check_size(name, getattr(config, name), most)


def check_size(name: str, value: object, most: int = MAX_INTEGER) -> None:
    """ConfigError unless the value is an integer from 1 to `most`."""
    if type(value) is not int or not 1 <= value <= most:
        raise ConfigError(f"{name} is {value!r:.100}; expected an integer from 1 to {most}")


@dataclass(frozen=True)
class PreprocessConfig:
    """How a picture becomes pixels; see `miniclip.preprocess`. The defaults are those of all OpenAI models."""

    image_size: int  # R, pixels
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)  # of red, green, blue in [0, 1]
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"  # "shortest": shorter side to R, then centre crop; "squash": both sides to R

    def __post_init__(self) -> None:
        check_sizes(self, "image_size")
        check_choice("interpolation", self.interpolation, INTERPOLATIONS)
        check_choice("resize_mode", self.resize_mode, (*RESIZE_MODES, UNKNOWN))
        for name, numbers in (("mean", self.mean), ("std", self.std)):
            if len(numbers) != 3 or not all(math.isfinite(x) for x in numbers) or (name == "std" and min(numbers) <= 0):
                expected = "three positive numbers" if name == "std" else "three numbers"
                raise ConfigError(f"{name} is {numbers!r:.100}; expected {expected}, of red, green and blue")


@dataclass(frozen=True)
class TransformerConfig:
    """A stack of pre-norm residual attention blocks, the body of both transformers."""

    width: int  # D
    layers: int
    heads: int  # H; OpenAI's are all width / 64
    mlp_width: int  # OpenAI's are all 4 * width
    activation: str = "quick_gelu"

    def __post_init__(self) -> None:
        check_sizes(self, "width", "heads", "mlp_width")
        check_sizes(self, "layers", most=MAX_LAYERS)
        check_choice("activation", self.activation, ACTIVATIONS)
        if self.width % self.heads:
            raise ConfigError(f"width {self.width} does not divide into {self.heads} heads")

    @property
    def tensors(self) -> int:
        """How many tensors a state dict has of it."""
        return 12 * self.layers


@dataclass(frozen=True)
class VisionConfig:
    """The base of every image tower's config. A subclass names its `kind`, by which JSON tells the towers apart."""

    kinds: ClassVar[dict[str, type[VisionConfig]]] = {}
    kind: ClassVar[str]

    image_size: int  # R, pixels

    def __init_subclass__(cls, kind: str):
        cls.kind = kind
        VisionConfig.kinds[kind] = cls

    def __post_init__(self) -> None:
        check_sizes(self, "image_size")

    @property
    def summary(self) -> str:
        """The tower in a few words, for tables."""
        return self.kind

    @property
    def tensors(self) -> int:
        """How many tensors a state dict has of the tower at least: those of its blocks, which take time to build."""
        return self.transformer.tensors if hasattr(self, "transformer") else 0


@dataclass(frozen=True)
class ViTConfig(VisionConfig, kind="vit"):
    """The Vision Transformer image tower."""

    patch_size: int  # P
    transformer: TransformerConfig

    def __post_init__(self) -> None:
        check_sizes(self, "image_size", "patch_size")
        if self.patch_size > self.image_size:
            raise ConfigError(f"patch_size is {self.patch_size}; expected at most image_size, {self.image_size}")

    @property
    def summary(self) -> str:
        return f"ViT/{self.patch_size} {self.transformer.layers} x {self.transformer.width}"


@dataclass(frozen=True)
class ResNetConfig(VisionConfig, kind="resnet"):
    """The ModifiedResNet image tower; image_size is a multiple of 32. Its activation is always ReLU."""

    width: int  # channels after the stem; the last stage has 32 * width
    layers: tuple[int, int, int, int]  # bottleneck blocks in each stage
    heads: int  # of the attention pool; OpenAI's are all width * 32 / 64

    def __post_init__(self) -> None:
        check_sizes(self, "image_size", "width", "heads")
        if len(self.layers) != 4 or not all(type(n) is int and 1 <= n <= MAX_LAYERS for n in self.layers):
            raise ConfigError(f"layers is {self.layers!r:.100}; expected the blocks of four stages, 1 to {MAX_LAYERS}")

    @property
    def tensors(self) -> int:
        return 15 * sum(self.layers)

    @property
    def summary(self) -> str:
        return f"ResNet {'-'.join(map(str, self.layers))} x {self.width}"


@dataclass(frozen=True)
class TextConfig:
    """The causal text transformer."""

    context_length: int
    vocab_size: int
    transformer: TransformerConfig

    def __post_init__(self) -> None:
        check_sizes(self, "context_length", "vocab_size")


@dataclass(frozen=True)
class CLIPConfig:
    """Two towers, the width E of the space they share, and how pictures are prepared for it.

    The config of another family is a subclass, which names its `family`.
    """

    families: ClassVar[dict[str, type[CLIPConfig]]] = {}
    family: ClassVar[str] = "clip"

    embed_dim: int  # E
    vision: VisionConfig
    text: TextConfig
    preprocess: PreprocessConfig

    def __init_subclass__(cls, family: str):
        cls.family = family
        CLIPConfig.families[family] = cls

    def __post_init__(self) -> None:
        check_sizes(self, "embed_dim")
        if self.vision.image_size != self.preprocess.image_size:
            raise ConfigError(
                f"preprocess.image_size is {self.preprocess.image_size}; expected the image tower's, "
                f"{self.vision.image_size}"
            )

    @property
    def tensors(self) -> int:
        """How many tensors a state dict of this model has at least."""
        return self.vision.tensors + self.text.transformer.tensors

    @property
    def activations(self) -> set[str]:
        """The activations of the config's transformers."""
        towers = (self.vision, self.text)
        return {tower.transformer.activation for tower in towers if hasattr(tower, "transformer")}


CLIPConfig.families[CLIPConfig.family] = CLIPConfig


@dataclass(frozen=True)
class NamedModel:
    """A model that `load` takes by name: its config, its file, and what was published about it."""

    config: CLIPConfig
    file: str  # its name in the cache; of a model that comes with the package, in `weights/`
    url: str | None = None  # where it is downloaded from; None: it comes with the package
    sha256: str | None = None  # of the file; None: not published
    size: int | None = None  # bytes of the file; where that is not published, the least it can have
    published: Mapping[str, float] = field(default_factory=dict)  # zero-shot top-1 accuracy, %, by data set
    source: str = ""  # of the published figures
    notes: Mapping[str, Any] = field(default_factory=dict)  # further published figures


def openai_transformer(width: int, layers: int) -> TransformerConfig:
    """A transformer of OpenAI's proportions: heads 64 wide, and an MLP four times as wide as the stream."""
    return TransformerConfig(width, layers, heads=width // 64, mlp_width=4 * width)


def clip_config(embed_dim: int, vision: VisionConfig, text_width: int, text_layers: int = 12) -> CLIPConfig:
    """A CLIP with OpenAI's vocabulary, context length and preprocessing."""
    text = TextConfig(77, 49408, openai_transformer(text_width, text_layers))
    return CLIPConfig(embed_dim, vision, text, PreprocessConfig(vision.image_size))


def from_arguments(
    embed_dim: int,
    image_resolution: int,
    vision_layers: int | Sequence[int],
    vision_width: int,
    vision_patch_size: int | None,
    context_length: int,
    vocab_size: int,
    transformer_width: int,
    transformer_heads: int,
    transformer_layers: int,
    *,
    activation: str = "quick_gelu",
    mean: Sequence[float] = PreprocessConfig.mean,
    std: Sequence[float] = PreprocessConfig.std,
) -> CLIPConfig:
    """The config that the arguments of openai/CLIP's constructor describe, with the meanings that they have there.

    vision_layers: four numbers for a ResNet (bottleneck blocks in each stage), whose vision_patch_size is None; one
    number for a ViT. Heads of the image tower are 64 wide, MLPs four times as wide as their transformer.
    mean, std: of red, green and blue in [0, 1]; (0.5, 0.5, 0.5) for both maps pixels to [-1, 1]
    ConfigError names the argument that is wrong.
    """
    sizes = {"image_resolution": image_resolution, "vision_width": vision_width, "transformer_width": transformer_width}
    for name, value in sizes.items():
        check_size(name, value)
    vision: VisionConfig
    if isinstance(vision_layers, Sequence) and not isinstance(vision_layers, str):
        if vision_patch_size is not None:
            raise ConfigError(f"vision_patch_size is {vision_patch_size!r:.100}; expected None for a ResNet")
        vision = ResNetConfig(image_resolution, vision_width, tuple(vision_layers), heads=vision_width * 32 // 64)
    else:
        check_size("vision_layers", vision_layers, MAX_LAYERS)
        check_size("vision_patch_size", vision_patch_size, image_resolution)
        if vision_width < 64:
            raise ConfigError(f"vision_width is {vision_width}; expected 64 or more, because a ViT's heads are 64 wide")
        transformer = replace(openai_transformer(vision_width, vision_layers), activation=activation)
        vision = ViTConfig(image_resolution, vision_patch_size, transformer)
    mlp_width = 4 * transformer_width
    transformer = TransformerConfig(transformer_width, transformer_layers, transformer_heads, mlp_width, activation)
    text = TextConfig(context_length, vocab_size, transformer)
    return CLIPConfig(embed_dim, vision, text, PreprocessConfig(image_resolution, tuple(mean), tuple(std)))


def _vit(embed_dim: int, image_size: int, patch_size: int, width: int, layers: int, text_width: int) -> CLIPConfig:
    return clip_config(embed_dim, ViTConfig(image_size, patch_size, openai_transformer(width, layers)), text_width)


def _resnet(embed_dim: int, image_size: int, width: int, layers: tuple, text_width: int) -> CLIPConfig:
    return clip_config(embed_dim, ResNetConfig(image_size, width, layers, heads=width * 32 // 64), text_width)


HUB_PREFIX = "hf-hub:"
HUB_NAME = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(\w[\w./-]*))?")  # organisation/name@revision
OPENAI_URL = "https://openaipublic.azureedge.net/clip/models"  # below it: <sha256>/<file>
OPENCLIP_RESULTS = "OpenCLIP's table of results"


def _openai(config: CLIPConfig, file: str, sha256: str, *accuracies: float, size: int | None = None) -> NamedModel:
    published = dict(zip(("ImageNet", "CIFAR-10", "CIFAR-100", "MNIST"), accuracies, strict=True))
    return NamedModel(config, file, f"{OPENAI_URL}/{sha256}/{file}", sha256, size, published, OPENCLIP_RESULTS)


# OpenAI's released models. Sizes: CLIP paper, tables 19 and 20; they agree with the shapes in the released files. Files
# and sha256: openai/CLIP, clip/clip.py. Then the two small models that come with the package.
MODELS: dict[str, NamedModel] = {
    #                        E     R   width  blocks a stage  text width
    "RN50": _openai(
        _resnet(            1024, 224,  64, ( 3,  4,  6,  3),  512),
        "RN50.pt", "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762",
        59.82, 71.57, 40.30, 57.55, size=255_827_503),
    "RN101": _openai(
        _resnet(             512, 224,  64, ( 3,  4, 23,  3),  512),
        "RN101.pt", "8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599",
        62.28, 80.78, 47.64, 52.54, size=291_791_292),
    "RN50x4": _openai(
        _resnet(             640, 288,  80, ( 4,  6, 10,  6),  640),
        "RN50x4.pt", "7e526bd135e493cef0776de27d5f42653e6b4c8bf9e0f653bb11773263205fdd",
        66.27, 79.43, 45.14, 49.03),
    "RN50x16": _openai(
        _resnet(             768, 384,  96, ( 6,  8, 18,  8),  768),
        "RN50x16.pt", "52378b407f34354e150460fe41077663dd5b39c54cd0bfd2b27167a4a06ec9aa",
        70.72, 81.34, 52.10, 67.98),
    "RN50x64": _openai(
        _resnet(            1024, 448, 128, ( 3, 15, 36, 10), 1024),
        "RN50x64.pt", "be1cfb55d75a9666199fb2206c106743da0f6468c9d327f3e0d0a543a9919d9c",
        73.91, 85.10, 59.90, 85.83),
    #                        E     R   P  width layers text width
    "ViT-B/32": _openai(
        _vit(                512, 224, 32,  768, 12, 512),
        "ViT-B-32.pt", "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
        63.32, 89.83, 64.23, 48.39, size=353_976_522),
    "ViT-B/16": _openai(
        _vit(                512, 224, 16,  768, 12, 512),
        "ViT-B-16.pt", "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
        68.34, 90.77, 66.95, 51.35, size=350_837_078),
    "ViT-L/14": _openai(
        _vit(                768, 224, 14, 1024, 24, 768),
        "ViT-L-14.pt", "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
        75.54, 95.59, 75.82, 76.34, size=932_768_134),
    "ViT-L/14@336px": _openai(
        _vit(                768, 336, 14, 1024, 24, 768),
        "ViT-L-14-336px.pt", "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02",
        76.56, 94.93, 74.36, 79.16),
    "tiny-ViT": NamedModel(
        clip_config(256, ViTConfig(64, 16, openai_transformer(192, 4)), text_width=192, text_layers=2),
        "tiny-ViT.safetensors.gz"),
    "tiny-RN": NamedModel(
        clip_config(256, ResNetConfig(64, 24, (1, 2, 2, 1), heads=12), text_width=192, text_layers=2),
        "tiny-RN.safetensors.gz"),
}  # fmt: skip


def is_hub_name(name: str) -> bool:
    """Whether `load` looks for this name on the Hub, unless it is a path: [hf-hub:]organisation/name.

    A name that ends as weight files do is a path, also where there is no such file.
    """
    is_file = name.endswith((".pt", ".pth", ".bin", ".ckpt", ".safetensors"))
    return name.startswith(HUB_PREFIX) or (HUB_NAME.fullmatch(name) is not None and not is_file)


def to_json(config: CLIPConfig) -> dict[str, Any]:
    """All of a config as JSON objects: its fields by name, with the format's version, the family, the tower's kind.

    `from_json` is the inverse: from_json(json.loads(json.dumps(to_json(config)))) == config.
    """
    return {"format": f"{JSON_FORMAT} {JSON_VERSION}", "family": config.family, **_plain(config)}


def from_json(values: object, where: str = "the config") -> CLIPConfig:
    """The config that `to_json` wrote. ConfigError, which begins with `where`, names the field that is wrong.

    Files from before the format had a version are read too: there a tower with a "patch_size" is a ViT, else a ResNet.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{where} is a JSON {type(values).__name__}; expected an object")
    values = dict(values)
    stated = values.pop("format", f"{JSON_FORMAT} 0")
    version = str(stated).removeprefix(f"{JSON_FORMAT} ")
    if not version.isdecimal() or str(stated) == version:
        raise ConfigError(f"{where}: format is {stated!r:.100}; expected {JSON_FORMAT} {JSON_VERSION}")
    if len(version) > 9 or int(version) > JSON_VERSION:
        newest = f"this miniclip reads up to {JSON_FORMAT} {JSON_VERSION}"
        raise ConfigError(f"{where} was written by a newer miniclip: it is {stated:.100}, {newest}. Upgrade miniclip")
    family = CLIPConfig.families.get(str(values.pop("family", "clip")))
    if family is None:
        raise ConfigError(f"{where}: the family is unknown; expected one of {', '.join(CLIPConfig.families)}")
    if int(version) == 0 and isinstance(values.get("vision"), dict):
        vision = values["vision"]
        values["vision"] = {"kind": "vit" if "patch_size" in vision else "resnet"} | vision
    try:
        return _parse(family, values, "")
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(x) for x in value]
    if not is_dataclass(value):
        return value
    kind = {"kind": value.kind} if isinstance(value, VisionConfig) else {}
    return kind | {each.name: _plain(getattr(value, each.name)) for each in fields(value)}


def _parse(kind: Any, value: Any, path: str) -> Any:
    """A value of the type `kind`, from JSON; `path` names its field in errors."""
    if kind is VisionConfig:
        value = dict(value) if isinstance(value, dict) else {}
        name = value.pop("kind", None)
        if not isinstance(name, str) or name not in VisionConfig.kinds:
            known = ", ".join(VisionConfig.kinds)
            raise ConfigError(f"{path}.kind is {name!r:.100}; expected the kind of an image tower, one of {known}")
        kind = VisionConfig.kinds[name]
    if is_dataclass(kind):
        return _parse_dataclass(kind, value, path)
    if typing.get_origin(kind) is tuple:
        kinds = typing.get_args(kind)
        if not isinstance(value, list) or len(value) > 64 or (kinds[-1] is not ... and len(value) != len(kinds)):
            raise ConfigError(f"{path} is {value!r:.100}; expected a list of {len(kinds)}")
        return tuple(_parse(kinds[0], x, path) for x in value)
    if kind is float and type(value) is int:
        value = float(value)
    valid = type(value) is kind and (kind is not float or math.isfinite(value))
    if not valid or (kind is int and not 0 <= value <= MAX_INTEGER):
        expected = f"an integer from 0 to {MAX_INTEGER}" if kind is int else f"a {kind.__name__}"
        raise ConfigError(f"{path} is {value!r:.100}; expected {expected}")
    return value


def _parse_dataclass(kind: type, value: Any, path: str) -> Any:
    prefix = f"{path}." if path else ""
    if not isinstance(value, dict):
        raise ConfigError(f"{path or 'it'} is {value!r:.100}; expected an object")
    known = {each.name: each for each in fields(kind)}
    if unknown := sorted(map(str, value.keys() - known.keys())):
        raise ConfigError(f"{prefix}{unknown[0]:.100} is no field; expected {', '.join(known)}")
    for name, each in known.items():
        if name not in value and each.default is MISSING:
            raise ConfigError(f"{prefix}{name} is missing")
    hints = typing.get_type_hints(kind)
    arguments = {name: _parse(hints[name], value[name], prefix + name) for name in known if name in value}
    try:
        return kind(**arguments)
    except ConfigError as error:
        raise ConfigError(f"{prefix}{error}") from None
