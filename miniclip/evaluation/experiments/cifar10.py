"""Zero-shot CIFAR-10 (Krizhevsky 2009): 10,000 photographs of 32 x 32 pixels in ten classes, and how they are worded.

The templates are the bare name, and the 18 that OpenAI used (openai/CLIP, data/prompts.md), each alone and as an
ensemble. `published` are the accuracies of OpenAI's weights with that ensemble in OpenCLIP's table of results, to be
met within some tenths of a percent on all pictures. The CLIP paper's own table differs.

A model that knows other pictures, as the embedded ones do, is near chance here, and nothing is wrong with it.
"""

from __future__ import annotations

from miniclip.data.templates import CIFAR_18
from miniclip.evaluation.experiments import strategies
from miniclip.evaluation.experiments.common import Study, each_template, ensemble
from miniclip.evaluation.experiments.strategies import table

__all__ = ["draw", "measure", "table"]

PUBLISHED = {
    "RN50": 0.7157, "RN101": 0.8078, "RN50x4": 0.7943, "RN50x16": 0.8134, "RN50x64": 0.8510,
    "ViT-B/32": 0.8983, "ViT-B/16": 0.9077, "ViT-L/14": 0.9559, "ViT-L/14@336px": 0.9493,
}  # fmt: skip


def measure(study: Study) -> dict:
    templates = ["{}", *CIFAR_18]
    weights = each_template(study.model, study.classes, templates)
    ways = dict(zip(templates, weights, strict=True))
    ways[f"ensemble of the {len(CIFAR_18)}"] = ensemble(weights[1:])
    return strategies.compare(study, ways, PUBLISHED)


def draw(result: dict, study: Study):
    return strategies.draw(result, f"{study.name}: zero-shot CIFAR-10, {len(study.examples):,} pictures")
