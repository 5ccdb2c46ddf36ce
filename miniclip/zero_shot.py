"""Zero-shot classification: each class is the mean of its prompts' embeddings; a picture belongs to the nearest class.

As in the CLIP paper (Radford et al. 2021, section 3.1.4). For N pictures and C classes:

    zero_shot_weights   class names, templates   -> one unit vector for each class [E, C]
    prompt_weights      class names, templates   -> one unit vector for each prompt [templates, E, C]
    probabilities       pictures [N, E], weights -> the softmax over the classes [N, C], or a SigLIP's sigmoid of each
    nearest             pictures [N, E], weights -> the k most probable classes of each picture
    classify            pictures [N, E], weights -> each picture's nearest class, and the rank of its true class
    topk_accuracy       scores [N, C], targets   -> the share of pictures whose true class is among the k best
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from miniclip import ops
from miniclip.cosines import beside, similarity_softmax, similarity_topk
from miniclip.data.lists import DataError
from miniclip.data.templates import TEMPLATES
from miniclip.embed import as_list, embed_texts
from miniclip.io import save_tensors, update_digest
from miniclip.models import CLIP

CACHE_VERSION = 1  # raise it when the same model and prompts give other weights
CHUNK_SCORES = 1 << 22  # scores held in memory at once: 16 MiB


def zero_shot_weights(
    model: CLIP, classes: str | Sequence[str], templates: str | Sequence[str], cache: str | Path | None = None
) -> Tensor:
    """One unit vector for each class, float32 [E, C] on the CPU; a picture's cosines are `image_embedding @ weights`.

    The embeddings of a class's prompts are normalized before the mean, so that all prompts count alike. The mean is
    normalized too, because otherwise a class whose prompts differ more would get lower cosines. A prompt that occurs
    several times is encoded once.

    templates: prompts with {} for the name of the class, or names of sets, see `expand_templates`.
    cache: a folder in which the result is stored under a hash of the text tower's weights and of the prompts.
    DataError for a template that is neither, a prompt that is too long, and a damaged file in the cache.
    """
    classes, templates = _texts(classes), expand_templates(templates)
    if not classes or not templates:
        raise DataError(f"got {len(classes)} classes and {len(templates)} templates; expected one or more of each")
    prompts = [template.replace("{}", name) for name in classes for template in templates]
    key = _content_hash(model, prompts, len(templates)) if cache else ""
    tensors, _ = cached(cache, key, lambda: ({"classes": _mean_embeddings(model, prompts, len(templates)).T}, {}))
    return tensors["classes"].T


def prompt_weights(
    model: CLIP, classes: Sequence[str], templates: Sequence[str], cache: str | Path | None = None
) -> Tensor:
    """The unit embedding of every prompt, float32 [templates, E, C]. Arguments as for `zero_shot_weights`."""
    templates = expand_templates(templates)
    prompts = [template.replace("{}", name) for template in templates for name in _texts(classes)]
    weights = zero_shot_weights(model, prompts, ["{}"], cache)  # each prompt as a class of its own
    return weights.unflatten(1, (len(templates), -1)).transpose(0, 1)


def _texts(classes: str | Sequence[str]) -> Sequence[str]:
    classes = as_list(classes)
    for name in classes:
        if not isinstance(name, str):
            raise DataError(f"a class is {name!r:.60}; expected its name, a string")
    return classes


def check_unit(embeddings: Tensor, size: int | None = None) -> None:
    """DataError unless these are unit embeddings [N, E], up to the rounding of half precision. size: E, if known."""
    advice = "take those of encode_image or encode_text with normalize=True"
    if embeddings.ndim != 2 or size not in (None, embeddings.shape[1]):
        raise DataError(f"got a tensor {list(embeddings.shape)}; expected unit embeddings [N, {size or 'E'}]: {advice}")
    lengths = embeddings.float().norm(dim=1)
    if not torch.allclose(lengths, torch.ones_like(lengths), atol=1e-2):
        found = f"from {lengths.min():.3g} to {lengths.max():.3g}"
        raise DataError(f"the embeddings have lengths {found}; expected 1: {advice}")


def ensemble(weights: Tensor) -> Tensor:
    """The unit mean [E, C] of `prompt_weights` [templates, E, C]: what `zero_shot_weights` returns for all of them."""
    return ops.normalize(weights.mean(0).T).T


def cached(
    folder: str | Path | None, key: str, make: Callable[[], tuple[dict[str, Tensor], dict[str, str]]]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata that `make` returns, or a file in `folder` from an earlier call with the same key.

    folder None: nothing is stored, nor is a result whose metadata has "rejected": an input that can't be read now, for
    want of rights or of a plugin, may be readable later. DataError for a damaged file.
    """
    if folder is None:
        return make()
    file = Path(folder) / f"{key}.safetensors"
    if file.exists():
        try:
            with safe_open(file, "pt") as tensors:
                return {name: tensors.get_tensor(name) for name in tensors.keys()}, tensors.metadata() or {}  # noqa: SIM118
        except Exception as error:  # safetensors raises errors of several types
            raise DataError(f"{file} is damaged: {error}. Delete it; it will be computed again") from error
    file.parent.mkdir(parents=True, exist_ok=True)
    tensors, metadata = make()
    if "rejected" not in metadata:
        save_tensors(tensors, file, metadata)
    return tensors, metadata


def _content_hash(model: CLIP, prompts: Sequence[str], templates: int) -> str:
    """A hash of all that the weights depend on: the text tower's config and weights, and the prompts."""
    config = CACHE_VERSION, model.config.text, model.transformer.causal
    digest = hashlib.sha256(repr((*config, templates, prompts)).encode())
    update_digest(digest, {name: x for name, x in model.state_dict().items() if not name.startswith("visual.")})
    return digest.hexdigest()


def _mean_embeddings(model: CLIP, prompts: Sequence[str], templates: int) -> Tensor:
    """The unit mean of each class's embeddings, [E, C]. prompts: all of the first class, then all of the next, ..."""
    place = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    embeddings, rejected = embed_texts(model, list(place))
    if rejected:
        raise DataError(f"{len(rejected)} of {len(place)} prompts are too long; {next(iter(rejected.values()))}")
    rows = torch.tensor([place[prompt] for prompt in prompts]).view(-1, templates)
    means = F.embedding_bag(rows, embeddings, mode="mean")  # makes no copy [C, templates, E], large for ImageNet
    return ops.normalize(means).T


def expand_templates(given: str | Sequence[str]) -> list[str]:
    """The templates, with the templates of a set in place of its name; see `miniclip.data.templates.TEMPLATES`.

    DataError for a text that is not the name of a set and has no {}, where the name of the class goes.
    """
    given = as_list(given)
    for text in given:
        if "{}" not in text and text not in TEMPLATES:
            expected = f"expected {{}} in it, where the class goes, or one of the sets {', '.join(TEMPLATES)}"
            raise DataError(f"the template is {text!r}; {expected}")
    return [template for text in given for template in TEMPLATES.get(text, (text,))]


def ranks(scores: Tensor, targets: Tensor) -> Tensor:
    """The number of other candidates that score at least as high as the target, int64 [N]; 0 is the best.

    scores: [N, C]; targets: int64 [N]. A tie counts against the target, and so does NaN: no answer is right because of
    the order in which candidates are listed.
    """
    own = scores.gather(1, targets[:, None])
    return (~(scores < own)).sum(1) - 1


def topk_accuracy(scores: Tensor, targets: Tensor, ks: Sequence[int] = (1, 5)) -> dict[int, float]:
    """For each k the share of rows of `scores` [N, C] whose target is among the k highest; see `ranks` for ties."""
    return shares(ranks(scores, targets), ks)


def shares(found: Tensor, ks: Sequence[int]) -> dict[int, float]:
    """For each k the share of ranks below k, in 0..1."""
    return {k: (found < k).double().mean().item() for k in ks}


def classify(
    images: Tensor, weights: Tensor, targets: Tensor, device: str | torch.device = "cpu"
) -> tuple[Tensor, Tensor]:
    """The nearest class of each picture, and the rank of its true class, both int64 [N].

    images: [N, E], of unit length; weights: [E, C]; targets: int64 [N]. device: where the scores are computed; on a GPU
    from embeddings in float16, as `probabilities` are.
    """
    parts = [
        (scores.argmax(dim=1).cpu(), ranks(scores, own.to(scores.device)).cpu())
        for scores, own in _scores(images, weights, targets, torch.ones((), device=device))
    ]
    predicted, found = (torch.cat(part) for part in zip(*parts, strict=True))
    return predicted, found


def probabilities(images: Tensor, weights: Tensor, logit_scale: Tensor, logit_bias: Tensor | None = None) -> Tensor:
    """The softmax of logit_scale * cosines, float32 [N, C] on the CPU; with a logit_bias, which is added, the sigmoid.

    images, weights: as for `classify`, of unit length; logit_scale: the model's `logit_scale.exp()`, on whose device
    they are computed; logit_bias: the model's. A softmax only compares the given classes: it is high also where none
    of them is right. A sigmoid is the probability of each pair by itself, whatever the other classes are.
    """
    logit_scale = logit_scale.detach().float()
    images, classes = beside(logit_scale, images, weights.T)
    if logit_bias is None:
        return similarity_softmax(images, classes, logit_scale).cpu()
    return (logit_scale * images.float() @ classes.float().T + logit_bias.detach()).sigmoid().cpu()


def nearest(
    images: Tensor, weights: Tensor, logit_scale: Tensor, k: int = 1, *, logit_bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The k classes with the highest `probabilities`, best first: those float32 [N, k], and their numbers int64 [N, k].

    The N x C probabilities are never all in memory.
    """
    logit_scale = logit_scale.detach().float()
    images, classes = beside(logit_scale, images, weights.T)
    found, places, _ = similarity_topk(images, classes, logit_scale, k)
    if logit_bias is not None:
        cosines = torch.stack([(images.float() * classes[column].float()).sum(1) for column in places.T], dim=1)
        found = (logit_scale * cosines + logit_bias.detach()).sigmoid()
    return found.cpu(), places.cpu()


def _scores(images: Tensor, weights: Tensor, targets: Tensor, one: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Some rows at a time of scores [N, C], which may not fit in memory, with their targets. Scores are cosines; if
    `one` is on a GPU, the softmax of the cosines, which has the same order."""
    if one.is_cuda:
        images, classes = beside(one, images, weights.T)
    size = max(1, CHUNK_SCORES // weights.shape[1])
    for chunk, own in zip(images.split(size), targets.split(size), strict=True):
        yield similarity_softmax(chunk, classes, one) if one.is_cuda else chunk @ weights, own
