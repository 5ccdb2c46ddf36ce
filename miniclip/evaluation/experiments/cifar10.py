"""Zero-shot CIFAR-10 (Krizhevsky 2009): 10,000 photographs of 32 x 32 pixels in ten classes, worded in several ways.

The templates are the bare name and OpenAI's 18 (openai/CLIP, data/prompts.md), each alone and all 18 as an ensemble.
`published` is the model's accuracy with that ensemble in OpenCLIP's table of results; on all pictures the measured one
should differ by a few tenths of a percent at most. The CLIP paper's own table has other figures.

A model trained on other kinds of pictures, as the embedded ones are, is near chance here; nothing is wrong with it.
"""

from __future__ import annotations

from miniclip.data.templates import CIFAR_18
from miniclip.evaluation.experiments import wordings
from miniclip.evaluation.experiments.wordings import table
from miniclip.evaluation.study import Study
from miniclip.zero_shot import prompt_weights, zero_shot_weights

__all__ = ["draw", "measure", "table"]


def measure(study: Study) -> dict:
    templates = ["{}", *CIFAR_18]
    ways = dict(zip(templates, prompt_weights(study.model, study.classes, templates), strict=True))
    ways[f"ensemble of the {len(CIFAR_18)}"] = zero_shot_weights(study.model, study.classes, CIFAR_18)
    return wordings.compare(study, ways, "CIFAR-10")


def draw(result: dict, study: Study):
    return wordings.draw(result, f"{study.name}: zero-shot CIFAR-10, {len(study.examples):,} pictures")
