"""Classifiers made of words: flat, with a threshold for "none of them", and base class before specific class.

    classifier = ZeroShotClassifier(model, ["cat", "dog"], ["a photo of a {}."])
    classifier.predict(["a.jpg", "b.jpg"])            # ["dog", "cat"]

Pictures are paths, PIL images, or a tensor [N, E] of their unit embeddings (`embed_pictures`), which several
classifiers can share. One path or PIL image is a list of one.

    scores          cosines. For the right text 0.2 to 0.3 is usual in OpenAI's models. They depend on the model and the
                    wording, so compare a score only with scores of the same classifier, or with a threshold that was
                    chosen on pictures (`choose_threshold`)
    logits          cosines times the scale that the model was trained with, `logit_scale.exp()`, 100 in OpenAI's
                    models; a SigLIP adds its `logit_bias`
    probabilities   the softmax of the logits, which compares the given classes with each other. They add up to one even
                    if no class fits, and change with the list of classes. A SigLIP's are the sigmoid of each logit: the
                    probability of each class by itself, whatever the other classes are
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
from miniclip.embed import as_list, embed_images
from miniclip.models import CLIP
from miniclip.preprocess import ImageError, Preprocess
from miniclip.zero_shot import check_unit, nearest, probabilities, prompt_weights, zero_shot_weights

Picture = str | Path | Image.Image
Pictures = Picture | Sequence[Picture] | Tensor
ENSEMBLES = ("embeddings", "logits")


def embed_pictures(model: CLIP, pictures: Pictures) -> Tensor:
    """Unit embeddings float32 [N, E] on the CPU. A tensor is taken to be such embeddings already.

    ImageError names the pictures that can't be read; DataError for a tensor that holds no unit embeddings.
    """
    if isinstance(pictures, Tensor):
        check_unit(pictures, model.text_projection.shape[1])
        return pictures.detach().float().cpu()
    embeddings, rejected = embed_images(model, Preprocess(model.config.preprocess), pictures)
    if rejected:
        raise ImageError("; ".join(rejected.values()))
    return embeddings


class ZeroShotClassifier:
    """Finds the class whose prompts are nearest to a picture (CLIP paper, section 3.1.4).

    templates: prompts with {} for the class, or names of sets, see `expand_templates`.
    cache: a folder in which the prompts' embeddings are stored, see `zero_shot_weights`.
    ensemble: how a class's prompts become one score.
        "embeddings": the cosine with the unit mean of their unit embeddings; the usual way.
        "logits": the mean of their cosines, which is the cosine above times the length of the mean. The more the
        prompts differ, the shorter the mean is, so classes whose prompts are alike are preferred.
    """

    def __init__(
        self,
        model: CLIP,
        classes: str | Sequence[str],
        templates: str | Sequence[str] = ("{}",),
        cache: str | Path | None = None,
        ensemble: str = "embeddings",
    ):
        if not hasattr(model, "encode_text"):
            raise DataError(f"expected a model, got {model!r:.60}: model, preprocess = load(...)")
        classes = list(as_list(classes))
        if len(set(classes)) < len(classes):
            raise DataError("a class is given twice; expected each once")
        if ensemble not in ENSEMBLES:
            raise DataError(f"the ensemble is {ensemble!r}; expected one of {', '.join(ENSEMBLES)}")
        self.model, self.classes, self.ensemble = model, classes, ensemble
        if ensemble == "embeddings":
            self.weights = zero_shot_weights(model, classes, templates, cache)  # [E, C]
        else:
            self.weights = prompt_weights(model, classes, templates, cache).mean(0)

    def scores(self, pictures: Pictures) -> Tensor:
        """Cosines [N, C]; with ensemble="logits", means of cosines."""
        return embed_pictures(self.model, pictures) @ self.weights

    def logits(self, pictures: Pictures) -> Tensor:
        """The scores [N, C] times the model's scale, plus its bias if it has one."""
        bias = 0 if self.model.logit_bias is None else self.model.logit_bias.float().cpu()
        return self.model.logit_scale.exp().float().cpu() * self.scores(pictures) + bias

    def probabilities(self, pictures: Pictures) -> Tensor:
        """The softmax of the logits, [N, C], which only compares these classes; of a SigLIP the sigmoid of each."""
        model = self.model
        with torch.no_grad():
            if self.ensemble == "logits":  # the weights are not of unit length
                logits = self.logits(pictures)
                return logits.softmax(dim=1) if model.logit_bias is None else logits.sigmoid()
            images = embed_pictures(model, pictures)
            return probabilities(images, self.weights, model.logit_scale.exp(), model.logit_bias)

    def predict(self, pictures: Pictures, threshold: float | None = None) -> list[str | None]:
        """The best class of each picture; None where its score is below the threshold, if one is given.

        A threshold turns "which of these" into "which of these, if any" (open-set recognition). See `choose_threshold`.
        """
        if self.ensemble == "logits":
            best, places = self.scores(pictures).max(dim=1)
        else:
            images = embed_pictures(self.model, pictures)
            places = nearest(images, self.weights, self.model.logit_scale.exp())[1][:, 0]
            best = (images * self.weights.T[places]).sum(dim=1)
        known = best >= (-torch.inf if threshold is None else threshold)
        return [
            self.classes[place] if is_known else None
            for place, is_known in zip(places.tolist(), known.tolist(), strict=True)
        ]


def choose_threshold(known: Tensor, unknown: Tensor | None = None, keep: float = 0.95) -> float:
    """A threshold for `ZeroShotClassifier.predict`, chosen on pictures like those that will be classified.

    known: [N], the best scores of pictures of the classes. unknown: [M], the best scores of pictures of other things.
    Without `unknown`: the threshold that keeps a share of `keep` of the known pictures, however many others it keeps.
    With `unknown`: the threshold, midway between two scores, for which the share of known pictures kept and the share
    of unknown pictures refused have the highest mean. It holds only for the model and the prompts of the scores.
    """
    if not len(known) or (unknown is not None and not len(unknown)):
        raise DataError("got no scores; expected those of one picture or more of each kind")
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
    """Of a `HierarchicalClassifier`. name and probability are None if it refused to name a specific class."""

    base: str
    base_probability: float
    name: str | None
    probability: float | None  # among the specific classes of the base


class HierarchicalClassifier:
    """Finds the base class first, then one of its specific classes; it can refuse pictures of other base classes.

    Specific classes alone give an answer for every picture: one of two breeds of dogs is always nearer to a car.

    tree: the specific classes of each base class, {"dog": ["beagle", "pug"], "cat": ["tabby"], "car": []}. A base class
    without specific classes is only there to be refused. base_templates: prompts for the base classes (default: those
    for the specific ones).
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
            raise DataError(f"got {len(tree)} base classes; expected two or more, to compare them with each other")
        self.model = model
        self.base = ZeroShotClassifier(model, list(tree), base_templates or templates, cache)
        self.specific = {
            base: ZeroShotClassifier(model, names, templates, cache) for base, names in tree.items() if names
        }

    def predict(self, pictures: Pictures, expected: str | None = None, threshold: float = 0.5) -> list[Answer]:
        """A picture is refused if its best base class has a probability below the threshold, or no specific classes, or
        is not the `expected` one, if one is given.

        Both probabilities are softmaxes: the first over the base classes, the second over the specific classes of one
        base class. Their product is not a probability.
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
