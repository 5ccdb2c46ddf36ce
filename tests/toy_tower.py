"""A third image tower, of a family of its own: everything that a new one needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from miniclip.config import CLIPConfig, PreprocessConfig, TextConfig, VisionConfig, check_sizes, openai_transformer
from miniclip.family import Family
from miniclip.models import CLIP
from miniclip.openai.stages import text_stages
from miniclip.stages import IMAGE, LOGITS, Stage, rows


@dataclass(frozen=True)
class ToyVisionConfig(VisionConfig, kind="toy"):
    width: int
    patch_size: int

    def __post_init__(self) -> None:
        check_sizes(self, "image_size", "width", "patch_size")


@dataclass(frozen=True)
class ToyConfig(CLIPConfig, family="toy"):
    """As any CLIP's."""


class Toy(nn.Module):
    """Pixels [N, 3, R, R] -> image embeddings [N, E]: a convolution over patches, tanh, their mean, a linear layer."""

    def __init__(self, config: ToyVisionConfig, embed_dim: int):
        super().__init__()
        self.input_resolution = config.image_size
        self.output_dim = embed_dim
        self.conv = nn.Conv2d(3, config.width, config.patch_size, stride=config.patch_size)
        self.proj = nn.Linear(config.width, embed_dim)

    @property
    def blocks(self) -> list[nn.Module]:
        return []

    def forward(self, image: Tensor) -> Tensor:
        return self.proj(torch.tanh(self.conv(image)).mean(dim=(2, 3)))


class ToyCLIP(CLIP):
    towers: ClassVar = {ToyVisionConfig: Toy}


def stages(config: ToyConfig) -> list[Stage]:
    vision = config.vision
    sizes = {"R": vision.image_size, "C": vision.width, "G": vision.image_size // vision.patch_size}
    sizes["E"] = config.embed_dim
    tower = (("visual.conv", "N C G G", "P x P convolution of stride P"), ("visual.proj", "N E", "a linear layer"))
    embedding = (("image_embedding", "N E", "visual.proj divided by its Euclidean length"),)
    visual = (stage._replace(rule="") for stage in rows((*tower, *embedding), sizes))
    return [*rows(IMAGE, sizes), *visual, *text_stages(config), *rows(LOGITS, {})]


FAMILY = Family(config=ToyConfig, model=ToyCLIP, stages=stages)

CONFIG = ToyConfig(
    embed_dim=16,
    vision=ToyVisionConfig(image_size=16, width=24, patch_size=4),
    text=TextConfig(77, 49408, openai_transformer(64, 1)),
    preprocess=PreprocessConfig(16, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), interpolation="bilinear"),
)
