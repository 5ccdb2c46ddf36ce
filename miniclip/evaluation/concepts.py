"""Whether something is in a picture, and what is built from that: a check against lists, and a summary of a scene.

CLIP was trained to tell texts apart, not to say yes or no, so presence is always a comparison: the prompt that names
the concept against others that do not. It knows negation badly. "a photo without a dog" is nearer to pictures of dogs
than "a photo" is, since what counts is that a dog is mentioned; prompts that say nothing are therefore the better
contrast, and the default. (Of tiny-ViT, 240 names and 240 drawings: "something" as the contrast finds 95% of what is
there and 7% of what is not; "a picture without {}" finds 97% and 59%.)

What the probabilities here mean: by how much one prompt beats another, on the scale that the model was trained with.
They are not calibrated, not frequencies, and differ between concepts; choose a threshold for each on pictures
(`choose_threshold`). Small things, counts, and who is who are beyond these models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from miniclip import ops
from miniclip.data.lists import DataError
from miniclip.evaluation.classifiers import Pictures, ZeroShotClassifier, embed_pictures
from miniclip.models import CLIP
from miniclip.zero_shot import zero_shot_weights

PRESENT = ("a photo with {}.", "a photo of {}.", "there is {} in this photo.")
NEUTRAL = ("a photo.", "a picture of something.", "a photo of a scene.")


class ConceptDetector:
    """How likely each of some concepts ("a dog", "text") is to be in a picture; several can be.

    present: prompts with {} for the concept. contrast: what they are compared with; with {} ("a photo without {}.") or
    neutral. Of both, the unit mean of the prompts' embeddings counts. cache: see `zero_shot_weights`.
    """

    def __init__(
        self,
        model: CLIP,
        concepts: Sequence[str],
        present: Sequence[str] = PRESENT,
        contrast: Sequence[str] = NEUTRAL,
        cache: str | Path | None = None,
    ):
        if not contrast:
            raise DataError("there is nothing to compare with; expected one contrasting prompt or more")
        self.model, self.concepts = model, list(concepts)
        own = zero_shot_weights(model, self.concepts, present, cache)  # [E, K]
        worded = [prompt.replace("{}", concept) for concept in self.concepts for prompt in contrast]
        each = zero_shot_weights(model, worded, ["{}"], cache).view(len(own), len(self.concepts), len(contrast))
        self.directions = own - ops.normalize(each.mean(2).T).T

    def margins(self, pictures: Pictures) -> Tensor:
        """By how much the cosine with the concept's prompts exceeds that with the contrasting ones, [N, K]."""
        return embed_pictures(self.model, pictures) @ self.directions

    def probabilities(self, pictures: Pictures) -> Tensor:
        """The softmax of each concept against its contrast, [N, K]; they don't add up to one."""
        with torch.no_grad():
            return (self.model.logit_scale.exp().float().cpu() * self.margins(pictures)).sigmoid()


class Finding(NamedTuple):
    """Of `check_content`: the concept of a list that a picture shows most clearly."""

    category: str
    concept: str
    probability: float
    flagged: bool


def check_content(
    model: CLIP,
    pictures: Pictures,
    categories: Mapping[str, Sequence[str]],
    thresholds: float | Mapping[str, float] = 0.5,
    **wording: Sequence[str],
) -> list[list[Finding]]:
    """For each picture, one finding for each of the caller's categories, {"weapons": ["a gun", "a knife"], ...}.

    A category is flagged if the likeliest of its concepts reaches its threshold. wording: `present` and `contrast` of
    `ConceptDetector`. There is no list of what is bad here, and none would do: the probabilities follow what the model
    saw in training, with its prejudices, miss what is small or unusual, and flag what only resembles. A help in sorting
    pictures for people to look at; no safety system, and no ground for a decision about anybody.
    """
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
    """Of `summarize_scenes`: the likeliest value of each aspect with its probability, and the things that are there."""

    aspects: dict[str, tuple[str, float]]
    things: dict[str, float]

    def __str__(self) -> str:
        parts = [f"{aspect}: {name} ({probability:.0%})" for aspect, (name, probability) in self.aspects.items()]
        things = [f"{name} ({probability:.0%})" for name, probability in self.things.items()]
        return "; ".join([*parts, "with " + ", ".join(things) if things else "with nothing of what was looked for"])


def summarize_scenes(
    model: CLIP,
    pictures: Pictures,
    aspects: Mapping[str, Sequence[str]],
    things: Sequence[str] = (),
    templates: Sequence[str] = ("a photo of {}.",),
    threshold: float = 0.5,
    **wording: Sequence[str],
) -> list[Summary]:
    """For each picture, which value each aspect has, and which things are there, likeliest first.

    aspects: values that exclude each other, {"place": ["a beach", "an office"], "time": ["day", "night"]}; one of them
    is always named, also where none fits. things: each for itself, listed from the threshold on; wording: as above.
    """
    embeddings = embed_pictures(model, pictures)
    chosen = {}
    for aspect, values in aspects.items():
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
