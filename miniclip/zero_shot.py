"""Zero-shot classification: a class is the mean of its prompts, a picture belongs to the nearest class.

As in the CLIP paper (Radford et al. 2021, section 3.1.4). Of N pictures and C classes:

    zero_shot_weights   class names, templates   -> one unit vector a class [E, C]
    classify            pictures [N, E], weights -> the nearest class of each, and the rank of its true one
    topk_accuracy       scores [N, C], targets   -> the share of pictures whose true class is among the k best
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from miniclip import ops
from miniclip.data.lists import DataError
from miniclip.data.templates import TEMPLATES
from miniclip.embed import embed_texts
from miniclip.io import save_tensors
from miniclip.models import CLIP

CACHE_VERSION = 1  # to be raised when the same model and prompts give other weights

CHUNK_SCORES = 1 << 22  # scores that are held at once, 16 MiB of them


def zero_shot_weights(
    model: CLIP, classes: Sequence[str], templates: Sequence[str], cache: str | Path | None = None
) -> Tensor:
    """One unit vector a class, float32 [E, C] on the CPU; a picture's cosines are `image_embedding @ weights`.

    Each prompt's embedding is normalised before the mean, so that all prompts count alike, and the mean after it:
    without that, classes whose prompts disagree would be at a disadvantage. A prompt is encoded once, however often it
    occurs. templates: also names of sets, see `expand_templates`. cache: a folder in which the result is kept and found
    again, by a hash of the text tower's weights and of the prompts. DataError for a template that is neither, for
    a prompt that is too long, and for a damaged file in the cache.
    """
    templates = expand_templates(templates)
    if not classes or not templates:
        raise DataError(f"got {len(classes)} classes, {len(templates)} templates; expected one or more of each")
    prompts = [template.replace("{}", name) for name in classes for template in templates]
    if cache is None:
        return _mean_embeddings(model, prompts, len(templates))
    file = Path(cache) / f"{_content_hash(model, prompts, len(templates))}.safetensors"
    if file.exists():
        try:
            return load_file(file)["classes"].T
        except Exception as error:  # whatever safetensors makes of it
            raise DataError(f"{file} is damaged: {error}; delete it, and it is made again") from error
    weights = _mean_embeddings(model, prompts, len(templates))
    file.parent.mkdir(parents=True, exist_ok=True)
    save_tensors({"classes": weights.T}, file)
    return weights


def _content_hash(model: CLIP, prompts: Sequence[str], templates: int) -> str:
    """Of all that a classifier depends on: the text tower to the last bit, its config, and the prompts."""
    config = CACHE_VERSION, model.config.text, model.transformer.causal
    digest = hashlib.sha256(repr((*config, templates, prompts)).encode())
    for name, tensor in model.state_dict().items():
        if not name.startswith("visual."):
            digest.update(repr((name, tensor.dtype, tuple(tensor.shape))).encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _mean_embeddings(model: CLIP, prompts: Sequence[str], templates: int) -> Tensor:
    """The unit mean of each class's embeddings, [E, C]; prompts: all templates of the first class, of the next, ..."""
    place = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    embeddings, rejected = embed_texts(model, list(place))
    if rejected:
        raise DataError(f"{len(rejected)} of {len(place)} prompts are too long; {next(iter(rejected.values()))}")
    rows = torch.tensor([place[prompt] for prompt in prompts]).view(-1, templates)
    means = F.embedding_bag(rows, embeddings, mode="mean")  # without a copy [C, templates, E], large for ImageNet
    return ops.normalize(means).T


def expand_templates(given: Sequence[str]) -> list[str]:
    """Put the templates of a set in place of its name, as `miniclip.data.templates.TEMPLATES` has them.

    DataError for what is neither a set nor has {}, where the name of a class goes.
    """
    for text in given:
        if "{}" not in text and text not in TEMPLATES:
            expected = f"expected {{}} in it, where the class goes, or one of the sets {', '.join(TEMPLATES)}"
            raise DataError(f"the template is {text!r}; {expected}")
    return [template for text in given for template in TEMPLATES.get(text, (text,))]


def ranks(scores: Tensor, targets: Tensor) -> Tensor:
    """How many of the other candidates score at least as high as the target, int64 [N]; 0 is the best.

    scores: [N, C]; targets: int64 [N]. Ties count against the target, as does NaN: nothing is right by the luck of the
    order in which candidates are listed.
    """
    own = scores.gather(1, targets[:, None])
    return (~(scores < own)).sum(1) - 1


def topk_accuracy(scores: Tensor, targets: Tensor, ks: Sequence[int] = (1, 5)) -> dict[int, float]:
    """For each k the share of rows of `scores` [N, C] whose target is among the k highest; see `ranks` for ties."""
    return shares(ranks(scores, targets), ks)


def shares(found: Tensor, ks: Sequence[int]) -> dict[int, float]:
    """For each k the share of ranks below it, in 0..1."""
    return {k: (found < k).double().mean().item() for k in ks}


def classify(images: Tensor, weights: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest class of each picture, and the rank of its true class, both int64 [N].

    images: [N, E], of unit length; weights: [E, C]; targets: int64 [N]. Only a part of the scores [N, C] is held.
    """
    predicted, found = [], []
    size = max(1, CHUNK_SCORES // weights.shape[1])
    for chunk, target in zip(images.split(size), targets.split(size), strict=True):
        scores = chunk @ weights
        predicted.append(scores.argmax(dim=1))
        found.append(ranks(scores, target))
    return torch.cat(predicted), torch.cat(found)


def confidences(images: Tensor, weights: Tensor, chosen: Tensor, scale: float) -> Tensor:
    """The probability of each picture's chosen class, float32 [N]: of the softmax over scale * cosines.

    Arguments as of `classify`; chosen: int64 [N]; scale: the model's `logit_scale.exp()`. A probability only compares
    the given classes: it is high also where none of them is right.
    """
    size = max(1, CHUNK_SCORES // weights.shape[1])
    parts = zip(images.split(size), chosen.split(size), strict=True)
    return torch.cat([(scale * part @ weights).softmax(1).gather(1, own[:, None])[:, 0] for part, own in parts])
