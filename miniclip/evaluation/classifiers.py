"""Classifiers out of words: one of several classes, base class before specific ones, and none of them.

    classifier = ZeroShotClassifier(model, ["cat", "dog"], ["a photo of a {}."])
    classifier.predict(["a.jpg", "b.jpg"])            # ["dog", "cat"]

Pictures are files, PIL images, or a tensor [N, E] of their unit embeddings, so that several classifiers can share them
(`embed_pictures`). What the numbers mean:

    scores          cosines. For the right text 0.2 to 0.3 is usual in OpenAI's models; what is high depends on the
                    model and the wording, so a score is compared with other scores of the same classifier, or with a
                    threshold that was chosen on pictures (`choose_threshold`)
    logits          cosines times the scale that the model was trained with, `logit_scale.exp()`; 100 in OpenAI's
    probabilities   the softmax of the logits: how the given classes compare with each other. They add up to one also
                    where no class fits, and another list of classes gives others
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from miniclip.data.lists import DataError
from miniclip.embed import embed_images
from miniclip.models import CLIP
from miniclip.preprocess import ImageError, Preprocess
from miniclip.zero_shot import expand_templates, zero_shot_weights

Pictures = Sequence[str | Path | Image.Image] | Tensor
ENSEMBLES = ("embeddings", "logits")


def embed_pictures(model: CLIP, pictures: Pictures) -> Tensor:
    """Unit embeddings float32 [N, E] on the CPU, which a tensor is taken to be. ImageError says what is broken."""
    if isinstance(pictures, Tensor):
        return pictures
    embeddings, rejected = embed_images(model, Preprocess(model.config.preprocess), pictures)
    if rejected:
        raise ImageError("; ".join(rejected.values()))
    return embeddings


class ZeroShotClassifier:
    """Which of some classes fits a picture best: the one whose prompts are nearest (CLIP paper, section 3.1.4).

    templates: prompts with {} for the class, or names of sets, see `expand_templates`
    cache: a folder in which the prompts' embeddings are kept, see `zero_shot_weights`
    ensemble: how a class's prompts become one score.
        "embeddings": the cosine with the unit mean of their unit embeddings; the usual way
        "logits": the mean of their cosines. That is the cosine above times the length of the mean, which is below one
        by as much as the prompts differ; so it prefers classes whose prompts all say the same
    """

    def __init__(
        self,
        model: CLIP,
        classes: Sequence[str],
        templates: Sequence[str] = ("{}",),
        cache: str | Path | None = None,
        ensemble: str = "embeddings",
    ):
        if len(set(classes)) < len(classes):
            raise DataError("a class is given twice; expected each once")
        if ensemble not in ENSEMBLES:
            raise DataError(f"the ensemble is {ensemble!r}; expected one of {', '.join(ENSEMBLES)}")
        self.model, self.classes = model, list(classes)
        if ensemble == "embeddings":
            self.weights = zero_shot_weights(model, self.classes, templates, cache)  # [E, C]
        else:
            templates = expand_templates(templates)
            prompts = [template.replace("{}", name) for name in self.classes for template in templates]
            each = zero_shot_weights(model, prompts, ["{}"], cache)  # [E, C * T]: every prompt a class of its own
            self.weights = each.view(len(each), len(self.classes), len(templates)).mean(2)

    def scores(self, pictures: Pictures) -> Tensor:
        """Cosines [N, C]; with ensemble="logits" means of cosines."""
        return embed_pictures(self.model, pictures) @ self.weights

    def logits(self, pictures: Pictures) -> Tensor:
        """The scores [N, C] times the model's scale."""
        return self.model.logit_scale.exp().float().cpu() * self.scores(pictures)

    def probabilities(self, pictures: Pictures) -> Tensor:
        """The softmax of the logits [N, C]: a comparison of these classes, no more."""
        with torch.no_grad():
            return self.logits(pictures).softmax(dim=1)

    def predict(self, pictures: Pictures, threshold: float | None = None) -> list[str | None]:
        """The best class of each picture; None where its score is below the threshold, if one is given.

        A threshold turns "which of these" into "which of these, if any" (open-set recognition). See `choose_threshold`.
        """
        best, places = self.scores(pictures).max(dim=1)
        known = best >= (-torch.inf if threshold is None else threshold)
        return [
            self.classes[place] if is_known else None
            for place, is_known in zip(places.tolist(), known.tolist(), strict=True)
        ]


def choose_threshold(known: Tensor, unknown: Tensor | None = None, keep: float = 0.95) -> float:
    """A threshold for `ZeroShotClassifier.predict`, chosen on pictures that are like those it will meet.

    known: [N], the best score of pictures that are of one of the classes. unknown: [M], of pictures that are of none.
    Without the latter: the threshold that keeps a share of `keep` of the known ones, however many others it lets pass.
    With them: the one at which the shares of known kept and unknown refused have the highest mean, midway between two
    scores. Chosen for one model and one set of prompts, it means nothing for others.
    """
    if not len(known) or (unknown is not None and not len(unknown)):
        raise DataError("a threshold is chosen on the scores of one picture or more of each kind; got none")
    known = known.double().sort().values
    if unknown is None:
        return known[math.floor((1 - keep) * len(known) + 1e-9)].item()
    unknown = unknown.double().sort().values
    every = torch.cat([known, unknown]).unique()
    between = torch.cat([every[:1], (every[1:] + every[:-1]) / 2, every[-1:] + 1e-6])
    kept = 1 - torch.searchsorted(known, between) / len(known)
    refused = torch.searchsorted(unknown, between) / len(unknown)
    return between[(kept + refused).argmax()].item()


class Answer(NamedTuple):
    """Of a `HierarchicalClassifier`. name and probability are None if it refused to go on from the base class."""

    base: str
    base_probability: float
    name: str | None
    probability: float | None  # among the specific classes of the base


class HierarchicalClassifier:
    """The base class first, then which of its specific classes; a refusal where the base is not what was asked for.

    Specific names alone are a trap: of two breeds of dogs one is always nearer to a picture of a car.

    tree: the specific classes of each base class, {"dog": ["beagle", "pug"], "cat": ["tabby"], "car": []}. Bases with
    none only serve to be told from. base_templates: prompts for the bases (default: those of the specific ones).
    """

    def __init__(
        self,
        model: CLIP,
        tree: Mapping[str, Sequence[str]],
        templates: Sequence[str] = ("{}",),
        base_templates: Sequence[str] | None = None,
        cache: str | Path | None = None,
    ):
        if len(tree) < 2:
            raise DataError(f"got {len(tree)} base classes; expected two or more, to be told from each other")
        self.model = model
        self.base = ZeroShotClassifier(model, list(tree), base_templates or templates, cache)
        self.specific = {
            base: ZeroShotClassifier(model, names, templates, cache) for base, names in tree.items() if names
        }

    def predict(self, pictures: Pictures, expected: str | None = None, threshold: float = 0.5) -> list[Answer]:
        """Refused are pictures whose best base class has a probability below the threshold, or no specific classes,
        or is not the `expected` one, if one is given.

        Both probabilities are of softmaxes: the first says how the bases compare with each other, the second how the
        specific classes of one base do; their product is no probability of anything.
        """
        if expected is not None and expected not in self.specific:
            raise DataError(f"{expected!r} has no specific classes; expected one of {', '.join(self.specific)}")
        embeddings = embed_pictures(self.model, pictures)
        sure, places = self.base.probabilities(embeddings).max(dim=1)
        answers = []
        for embedding, base_probability, place in zip(embeddings, sure.tolist(), places.tolist(), strict=True):
            base = self.base.classes[place]
            specific = self.specific.get(base)
            if base_probability < threshold or specific is None or expected not in (None, base):
                answers.append(Answer(base, base_probability, None, None))
                continue
            probability, best = specific.probabilities(embedding[None]).max(dim=1)
            answers.append(Answer(base, base_probability, specific.classes[best], probability.item()))
        return answers
