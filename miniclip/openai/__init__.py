"""The family of OpenAI's CLIP: ViTs and ModifiedResNets beside the causal text transformer, whoever trained them."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor

from miniclip.config import MODELS, CLIPConfig
from miniclip.family import Family
from miniclip.fast.clip import FastCLIP
from miniclip.models import CLIP
from miniclip.openai import halves, metaclip2, stages
from miniclip.openai.hub import HUB
from miniclip.openai.resize import resize
from miniclip.weights import huggingface, openclip
from miniclip.weights.infer import infer_config
from miniclip.weights.names import layout_of, shapes_of, to_canonical


def owns(names: Collection[str]) -> bool:
    """Any file that no other family claims is read as one of this family, whose errors say what is missing."""
    return True


def read(
    tensors: Mapping[str, Tensor], config: CLIPConfig | None, activation: str | None
) -> tuple[CLIPConfig, Mapping[str, Tensor]]:
    """The config, inferred from shapes unless it is known, and the tensors under OpenAI's names."""
    tensors = to_canonical(layout_of(tensors), tensors)
    return config or infer_config(shapes_of(tensors), activation or "quick_gelu"), tensors


CLIPS = Family(
    config=CLIPConfig,
    model=CLIP,
    fast=FastCLIP,
    owns=owns,
    read=read,
    stages=stages.stages,
    models=MODELS,
    hub=HUB,
    resize=resize,
    write_directory=huggingface.write,
    read_openclip=openclip.read_model,
    read_huggingface=lambda fields, folder: huggingface.read_config(folder),
)
FAMILIES = (halves.FAMILY, metaclip2.FAMILY, CLIPS)
