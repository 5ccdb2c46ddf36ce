"""`Study`: the pictures of a data set, their classes, and a model's embeddings of them. Measures start from one."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from miniclip.data.datasets import class_names
from miniclip.data.lists import DataError, Example
from miniclip.embed import Rejected, embed_images
from miniclip.io import update_digest
from miniclip.models import CLIP
from miniclip.preprocess import open_image
from miniclip.zero_shot import cached

CACHE_VERSION = 1  # raise it when the same model and pictures give other embeddings


@dataclass(frozen=True)
class Study:
    """Pictures, their classes, and a model's embeddings of them."""

    name: str  # of the model
    model: CLIP
    examples: list[Example]  # N, without those that can't be read
    classes: list[str]  # C; also classes that have no picture here
    targets: Tensor  # int64 [N], each picture's class
    images: Tensor  # float32 [N, E], of unit length, on the CPU
    rejected: list[str]  # why pictures could not be read

    @property
    def scale(self) -> float:
        """The factor that the model multiplies cosines by to get logits; 100 in OpenAI's models."""
        return self.model.logit_scale.exp().item()

    @property
    def device(self) -> torch.device:
        """The model's, where large products are computed."""
        return self.model.logit_scale.device


def embed_study(
    name: str,
    model: CLIP,
    preprocess: Callable[[Image.Image], Tensor],
    examples: Sequence[Example],
    limit: int | None = None,
    background: str | None = None,
    seed: int = 0,
    *,
    classes: Sequence[str] | None = None,
    cache: str | Path | None = None,
) -> Study:
    """Embed a data set's pictures, or `limit` of them, chosen at random by `seed`.

    classes: must have every example's name; None: the names of all examples, sorted. background, cache: see
    `embed_examples`. DataError if no picture can be read.
    """
    classes = sorted(class_names(examples)) if classes is None else list(classes)
    number = {label: i for i, label in enumerate(classes)}
    chosen = random.Random(seed).sample(examples, limit) if limit and limit < len(examples) else list(examples)
    images, faults = embed_examples(model, preprocess, chosen, background, cache)
    kept = [example for i, example in enumerate(chosen) if i not in faults]
    targets = torch.tensor([number[example.captions[0]] for example in kept])
    return Study(name, model, kept, classes, targets, images, list(faults.values()))


def embed_examples(
    model: CLIP,
    preprocess: Callable[[Image.Image], Tensor],
    examples: Sequence[Example],
    background: str | None = None,
    cache: str | Path | None = None,
) -> tuple[Tensor, Rejected]:
    """Unit embeddings float32 [N, E] of the pictures, on the CPU, without the rejected ones; see `embed_images`.

    background: see `on_background`; None: transparent pictures are left to `preprocess`.
    cache: a folder in which the result is stored under a hash of the image tower's weights, of the preprocessing and of
    the pictures (their pixels; for files the path, size and time of the last change).

    DataError if no picture can be read, and for a damaged file in the cache.
    """

    def prepare(image: Image.Image) -> Tensor:
        return preprocess(on_background(image, background) if background else image)

    def embed() -> tuple[dict[str, Tensor], dict[str, str]]:
        embeddings, rejected = embed_images(model, prepare, [example.image for example in examples])
        if not len(embeddings):
            hint = "" if examples[0].source else ". A path in a list is relative to the folder of the list"
            raise DataError(f"none of the {len(examples)} pictures can be read; the first: {rejected[0]}{hint}")
        return {"images": embeddings}, {"rejected": json.dumps(rejected)} if rejected else {}

    key = _content_hash(model, f"{preprocess} {background}", examples) if cache else ""
    tensors, metadata = cached(cache, key, embed)
    return tensors["images"], {int(index): why for index, why in json.loads(metadata.get("rejected", "{}")).items()}


def _content_hash(model: CLIP, preparation: str, examples: Sequence[Example]) -> str:
    digest = hashlib.sha256(repr((CACHE_VERSION, model.config.vision, preparation)).encode())
    update_digest(digest, model.visual.state_dict())
    for example in examples:
        image = example.image
        if isinstance(image, Image.Image):
            digest.update(repr((image.mode, image.size)).encode() + image.tobytes())
        elif image.is_file():
            state = image.stat()
            digest.update(repr((str(image.resolve()), state.st_size, state.st_mtime_ns)).encode())
        else:
            digest.update(repr((str(image), "missing")).encode())
    return digest.hexdigest()


def on_background(image: Image.Image, colour: str) -> Image.Image:
    """A transparent picture over a colour (a name that Pillow knows); any other picture unchanged.

    `preprocess` alone drops the transparency, as openai/CLIP does; most drawings then end up on black.
    """
    if not image.has_transparency_data:
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, colour), image).convert("RGB")


def picture_of(picture: Path | Image.Image) -> Image.Image:
    """A picture for a figure: RGB, on white where it is transparent."""
    image = picture if isinstance(picture, Image.Image) else open_image(picture)
    return on_background(image, "white").convert("RGB")
