"""Whether something is in a picture; from it a check of content against lists, and a summary of a scene.

CLIP was trained to tell texts apart, not to answer yes or no. Presence is therefore a comparison of the prompts that
name the concept with prompts that don't. CLIP understands negation badly: "a photo without a dog" is nearer to pictures
of dogs than "a photo" is, because it mentions a dog. Neutral prompts are the better contrast, and the default. (With
tiny-ViT, 240 names and 240 drawings, the contrast "something" finds 95% of what is there and 7% of what is not; "a
picture without {}" finds 97% and 59%.)

The probabilities say by how much one prompt beats another, on the scale that the model was trained with. They are not
calibrated, and differ between concepts; choose a threshold for each on pictures (`choose_threshold`). Small things,
counting, and who is who are beyond these models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from miniclip import ops
from miniclip.data.lists import DataError
from miniclip.embed import as_list
from miniclip.evaluation.classifiers import Pictures, ZeroShotClassifier, embed_pictures
from miniclip.models import CLIP
from miniclip.zero_shot import zero_shot_weights

PRESENT = ("a photo with {}.", "a photo of {}.", "there is {} in this photo.")
NEUTRAL = ("a photo.", "a picture of something.", "a photo of a scene.")


class ConceptDetector:
    """How likely each of some concepts ("a dog", "text") is to be in a picture; several can be in one.

    present: prompts with {} for the concept. contrast: prompts that they are compared with, neutral or with {} ("a
    photo without {}."). The unit means of both sets of prompts are compared. cache: see `zero_shot_weights`.
    """

    def __init__(
        self,
        model: CLIP,
        concepts: str | Sequence[str],
        present: str | Sequence[str] = PRESENT,
        contrast: str | Sequence[str] = NEUTRAL,
        cache: str | Path | None = None,
    ):
        contrast = as_list(contrast)
        if not contrast:
            raise DataError("got no contrasting prompt; expected one or more to compare with")
        self.model, self.concepts = model, list(as_list(concepts))
        own = zero_shot_weights(model, self.concepts, present, cache)  # [E, K]
        worded = [prompt.replace("{}", concept) for concept in self.concepts for prompt in contrast]
        each = zero_shot_weights(model, worded, ["{}"], cache).view(len(own), len(self.concepts), len(contrast))
        self.directions = own - ops.normalize(each.mean(2).T).T

    def margins(self, pictures: Pictures) -> Tensor:
        """The cosine with the concept's prompts minus that with the contrasting ones, [N, K]."""
        return embed_pictures(self.model, pictures) @ self.directions

    def probabilities(self, pictures: Pictures) -> Tensor:
        """The softmax of each concept and its contrast, [N, K]. They don't add up to one over the concepts."""
        with torch.no_grad():
            return (self.model.logit_scale.exp().float().cpu() * self.margins(pictures)).sigmoid()


class Finding(NamedTuple):
    """Of `check_content`: the most likely concept of a category, for one picture."""

    category: str
    concept: str
    probability: float
    flagged: bool


def check_content(
    model: CLIP,
    pictures: Pictures,
    categories: Mapping[str, str | Sequence[str]],
    thresholds: float | Mapping[str, float] = 0.5,
    **wording: Sequence[str],
) -> list[list[Finding]]:
    """For each picture, one finding for each category, {"weapons": ["a gun", "a knife"], ...}.

    A category is flagged if its most likely concept reaches the threshold. wording: `present` and `contrast` of
    `ConceptDetector`. miniclip has no list of bad content. The probabilities depend on what the model saw in training,
    including its prejudices; it misses what is small or unusual, and flags what only looks similar. Use this to sort
    pictures for people to look at; it is not a safety system, and no basis for a decision about anybody.
    """
    categories = {name: as_list(concepts) for name, concepts in categories.items()}
    concepts = [concept for category in categories.values() for concept in category]
    if not all(categories.values()):
        raise DataError("a category has no concepts; expected one or more in each")
    limits = dict(thresholds) if isinstance(thresholds, Mapping) else dict.fromkeys(categories, thresholds)
    if limits.keys() != categories.keys():
        raise DataError(f"there are thresholds for {', '.join(limits)}; expected {', '.join(categories)}")
    found = ConceptDetector(model, concepts, **wording).probabilities(pictures).split(
        [len(category) for category in categories.values()], dim=1
    )
    findings: list[list[Finding]] = [[] for _ in found[0]]
    for (category, names), probabilities in zip(categories.items(), found, strict=True):
        for row, (best, place) in zip(findings, zip(*probabilities.max(dim=1), strict=True), strict=True):
            row.append(Finding(category, names[place], best.item(), best.item() >= limits[category]))
    return findings


class Summary(NamedTuple):
    """Of `summarize_scenes`: the most likely value of each aspect and the things found, each with its probability."""

    aspects: dict[str, tuple[str, float]]
    things: dict[str, float]

    def __str__(self) -> str:
        parts = [f"{aspect}: {name} ({probability:.0%})" for aspect, (name, probability) in self.aspects.items()]
        things = [f"{name} ({probability:.0%})" for name, probability in self.things.items()]
        return "; ".join([*parts, "with " + ", ".join(things) if things else "with none of the things asked for"])


def summarize_scenes(
    model: CLIP,
    pictures: Pictures,
    aspects: Mapping[str, str | Sequence[str]],
    things: str | Sequence[str] = (),
    templates: str | Sequence[str] = ("a photo of {}.",),
    threshold: float = 0.5,
    **wording: Sequence[str],
) -> list[Summary]:
    """For each picture, the value of each aspect, and which things are in it, the most likely first.

    aspects: values that exclude each other, {"place": ["a beach", "an office"], "time": ["day", "night"]}; one of them
    is always named, even if none fits. things: listed if their probability reaches the threshold. wording: `present`
    and `contrast` of `ConceptDetector`, for the things.
    """
    things = as_list(things)
    embeddings = embed_pictures(model, pictures)
    chosen = {}
    for aspect, values in aspects.items():
        values = as_list(values)
        probabilities = ZeroShotClassifier(model, values, templates).probabilities(embeddings)
        best, places = probabilities.max(dim=1)
        chosen[aspect] = [(values[place], sure) for place, sure in zip(places.tolist(), best.tolist(), strict=True)]
    there = torch.zeros(len(embeddings), 0)
    if things:
        there = ConceptDetector(model, things, **wording).probabilities(embeddings)
    summaries = []
    for i, row in enumerate(there.tolist()):
        present = {name: sure for name, sure in zip(things, row, strict=True) if sure >= threshold}
        ordered = dict(sorted(present.items(), key=lambda item: -item[1]))
        summaries.append(Summary({aspect: values[i] for aspect, values in chosen.items()}, ordered))
    return summaries
