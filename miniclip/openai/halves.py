"""Half a CLIP: the text tower or the image tower alone, as diffusion and vision-language models have them.

Hugging Face directories of a CLIPTextModel or CLIPVisionModel, with or without the projection. Without it the embedding
is the pooled token itself: the projection is the identity matrix.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NoReturn

import torch
from torch import Tensor, nn

from miniclip.config import (
    CLIPConfig,
    PreprocessConfig,
    TextConfig,
    TransformerConfig,
    VisionConfig,
    check_choice,
)
from miniclip.family import Family
from miniclip.models import CLIP
from miniclip.models.vit import VisionTransformer
from miniclip.openai.stages import image_stages, text_stages
from miniclip.stages import Stage
from miniclip.weights import huggingface
from miniclip.weights.errors import CheckpointError
from miniclip.weights.fields import Fields
from miniclip.weights.names import SAME, Converted, layout_of, to_canonical


@dataclass(frozen=True)
class NoVisionConfig(VisionConfig, kind="none"):
    """Stands for the image tower that is not there."""


NO_TEXT = TextConfig(1, 1, TransformerConfig(1, 1, 1, 1))  # stands for the text tower that is not there


@dataclass(frozen=True)
class HalfConfig(CLIPConfig, family="half"):
    """A CLIP's config, of which one tower is there."""

    tower: str  # "text" or "image"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("tower", self.tower, ("text", "image"))
        check_choice("vision.kind", self.vision.kind, ("none",) if self.tower == "text" else ("vit",))

    @property
    def transformer(self) -> TransformerConfig:
        """That of the tower which is there."""
        return (self.text if self.tower == "text" else self.vision).transformer

    @property
    def tensors(self) -> int:
        return self.transformer.tensors

    @property
    def activations(self) -> set[str]:
        return {self.transformer.activation}


class NoTower(nn.Module):
    def __init__(self, config: NoVisionConfig, embed_dim: int):
        super().__init__()
        self.input_resolution = config.image_size
        self.output_dim = embed_dim
        self.blocks: list[nn.Module] = []


class TextHalf(CLIP):
    """The text tower; `encode_image` is an error."""

    towers: ClassVar = {NoVisionConfig: NoTower}

    def encode_image(self, image: Tensor, normalize: bool = False) -> NoReturn:
        raise ValueError("this model is a text tower alone: it has no encode_image and no scores")


class ImageHalf(CLIP):
    """The image tower; `encode_text` is an error."""

    def __init__(self, config: HalfConfig):
        nn.Module.__init__(self)  # without the text tower, which a CLIP is
        self.config = config
        self.context_length, self.vocab_size = config.text.context_length, config.text.vocab_size
        self.visual = VisionTransformer(config.vision, config.embed_dim)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    @property
    def dtype(self) -> torch.dtype:
        return self.visual.proj.dtype

    def encode_text(self, text: Tensor, normalize: bool = False) -> NoReturn:
        raise ValueError("this model is an image tower alone: it has no encode_text and no scores")


def model(config: HalfConfig) -> CLIP:
    return TextHalf(config) if config.tower == "text" else ImageHalf(config)


def read_huggingface(fields: Fields, folder: Path) -> HalfConfig | None:
    """The half that a config.json describes; None if it describes no half."""
    kind = fields.values.get("model_type")
    if kind == "clip_text_model":
        text = huggingface.read_text(fields)
        embed_dim = _embed_dim(fields, text.transformer.width)
        return HalfConfig(embed_dim, NoVisionConfig(1), text, PreprocessConfig(1), tower="text")
    if kind == "clip_vision_model":
        vision = huggingface.read_vision(fields)
        preprocess = huggingface.read_preprocess(folder, vision.image_size)
        return HalfConfig(_embed_dim(fields, vision.transformer.width), vision, NO_TEXT, preprocess, tower="image")
    return None


def _embed_dim(fields: Fields, width: int) -> int:
    """That of the projection, or the tower's width if the architecture has none."""
    architectures = fields.values.get("architectures")
    if any(name in str(architectures) for name in ("WithProjection", "ForImageClassification")):
        return fields.integer("projection_dim", 512)
    return width


def read(
    tensors: Mapping[str, Tensor], config: HalfConfig | None, activation: str | None
) -> tuple[HalfConfig, Mapping[str, Tensor]]:
    """The tensors under OpenAI's names, with an identity for a projection that is not there."""
    if config is None:
        raise CheckpointError("nothing states this half's config: load the directory that holds its config.json")
    if "embeddings.position_embedding.weight" in tensors:  # transformers 5, of a tower without its projection
        prefix = "text_model." if config.tower == "text" else "vision_model."
        tensors = Converted(tensors, {prefix + name: (SAME.to_canonical, (name,)) for name in tensors})
    renamed = to_canonical(layout_of(tensors), tensors)
    plan = {name: (SAME.to_canonical, (name,)) for name in renamed}
    width = config.transformer.width
    projection = "text_projection" if config.tower == "text" else "visual.proj"
    if projection not in renamed and width == config.embed_dim:
        plan[projection] = (lambda: torch.eye(width), ())
    if "logit_scale" not in renamed:
        plan["logit_scale"] = (lambda: torch.tensor(math.log(1 / 0.07)), ())
    return config, Converted(renamed, plan)


def stages(config: HalfConfig) -> list[Stage]:
    return list(text_stages(config) if config.tower == "text" else image_stages(config))


FAMILY = Family(config=HalfConfig, model=model, stages=stages, read=read, read_huggingface=read_huggingface)
