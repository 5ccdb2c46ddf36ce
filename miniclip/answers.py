"""Answers in one call: which labels fit pictures, how similar pictures and texts are, which pictures fit some words.

    classify(pictures, labels, model="ViT-B/32")    the labels of each picture, the most probable first
    similarity(model, pictures, texts)              cosines [pictures, texts]
    search_pictures(model, query, pictures)         the pictures, the most similar first

pictures: one or several of: paths, folders (all pictures in them, however deep), PIL images, arrays uint8 [H, W],
[H, W, 3] or [H, W, 4], and http or https URLs. model: a name or path as `load` takes it, a model, or the pair that
`load` returns, which saves loading it in each call. In all three, the model may also be given by its name, after the
others: similarity(pictures, texts, model="tiny-ViT"). All raise ImageError for a picture that can't be used.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import NamedTuple, ParamSpec, TypeVar
from urllib.request import urlopen

import numpy as np
from PIL import Image
from torch import Tensor

from miniclip.data.pictures import SUFFIXES, scan
from miniclip.embed import as_list, decode, embed_images, embed_texts
from miniclip.errors import UsageError
from miniclip.io import printable
from miniclip.loading import load
from miniclip.models import CLIP
from miniclip.preprocess import ImageError, Preprocess, open_image
from miniclip.zero_shot import probabilities, zero_shot_weights

Source = str | Path | Image.Image | np.ndarray
Model = str | Path | CLIP | tuple[CLIP, Callable[[Image.Image], Tensor]]
P, R = ParamSpec("P"), TypeVar("R")
URLS = ("http://", "https://")
MOST_BYTES = 1 << 26  # of a picture from the web
CALLS = "classify(pictures, labels, model), similarity(model, pictures, texts), search_pictures(model, query, pictures)"
ONE_LABEL = "a single label always has the probability 100%: give two or more, or ask for its cosine"
THUMBNAIL = 256  # pixels of the longer side in a notebook


@dataclass(frozen=True)
class Picture:
    """A picture and its name: the path or URL, or "picture 3" for the third that was given as an image or array."""

    name: str
    source: str | Image.Image  # a path, or a decoded image

    def open(self) -> Image.Image:
        return self.source if isinstance(self.source, Image.Image) else open_image(self.source)

    def __str__(self) -> str:
        return printable(self.name)

    def _repr_png_(self) -> bytes:
        """What notebooks show."""
        image = self.open().convert("RGBA")
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        file = io.BytesIO()
        image.save(file, "png")
        return file.getvalue()


class Label(NamedTuple):
    """A label of a picture: its probability among all labels, or with a SigLIP by itself, and its cosine."""

    label: str
    score: float
    cosine: float

    def __repr__(self) -> str:
        return f"{self.label} {self.score:.1%}"


class Labels(list[Label]):
    """The labels of one picture, the most probable first."""

    def __init__(self, picture: Picture, labels: Sequence[Label]):
        super().__init__(labels)
        self.picture = picture

    def __repr__(self) -> str:
        return f"{self.picture}: {', '.join(map(repr, self))}"

    def _repr_png_(self) -> bytes:
        return self.picture._repr_png_()


class Match(NamedTuple):
    """A picture that was found, and its cosine with the query."""

    score: float
    picture: Picture

    def __repr__(self) -> str:
        return f"{self.score:.4f} {self.picture}"

    def _repr_png_(self) -> bytes:
        return self.picture._repr_png_()


def classify(
    pictures: Source | Sequence[Source],
    labels: Sequence[str],
    model: Model = "ViT-B/32",
    templates: str | Sequence[str] = "{}",
) -> list[Labels]:
    """The labels of each picture with their probabilities, the most probable first.

    The probabilities of a picture add up to one; a SigLIP's do not: each is that of its label by itself.

    labels: two or more; for a SigLIP one is enough. templates: prompts in which {} stands for the label, or names of
    sets such as "imagenet"; the embedding of a label is the mean of its prompts. UsageError for no label and for a
    single one, DataError for a label that is too long.
    """
    clip, preprocess = resolve(model)
    check_labels(clip, as_list(labels))
    results, faults = label_pictures(clip, preprocess, find_pictures(pictures), labels, templates)
    _raise(faults)
    return results


def check_labels(model: CLIP, labels: Sequence[str]) -> None:
    """UsageError for no label, and for a single label where probabilities only compare labels."""
    if not labels:
        raise UsageError("there are no labels: give two or more")
    if len(set(labels)) < 2 and model.logit_bias is None:
        raise UsageError(ONE_LABEL)


def label_pictures(
    model: CLIP,
    preprocess: Callable[[Image.Image], Tensor],
    pictures: Sequence[Picture],
    labels: Sequence[str],
    templates: str | Sequence[str] = "{}",
) -> tuple[list[Labels], list[str]]:
    """As `classify`, for one label too; also why some pictures can't be used."""
    labels = list(dict.fromkeys(as_list(labels)))
    weights = zero_shot_weights(model, labels, templates)
    embeddings, faults = embed_images(model, preprocess, [picture.source for picture in pictures])
    cosines = embeddings @ weights
    scores = probabilities(embeddings, weights, model.logit_scale.exp(), model.logit_bias)
    used = [picture for i, picture in enumerate(pictures) if i not in faults]
    rows = zip(used, scores.tolist(), cosines.tolist(), strict=True)
    results = [
        Labels(picture, sorted(map(Label, labels, *figures), key=lambda label: -label.score))
        for picture, *figures in rows
    ]
    return results, list(faults.values())


def _model_by_name(function: Callable[P, R]) -> Callable[P, R]:
    """Take a model that is given by its name for the first argument, wherever it stands."""

    @wraps(function)
    def call(*args: P.args, **given: P.kwargs) -> R:
        first = [given.pop("model")] if "model" in given else []
        return function(*first, *args, **given)

    return call


@_model_by_name
def similarity(model: Model, pictures: Source | Sequence[Source], texts: str | Sequence[str]) -> Tensor:
    """The cosine of each picture with each text, float32 [pictures, texts], in the order given; folders by name."""
    clip, preprocess = resolve(model)
    embeddings = _embed(clip, preprocess, find_pictures(pictures))
    return embeddings @ text_embeddings(clip, texts).T


@_model_by_name
def search_pictures(
    model: Model, query: str | Sequence[str], pictures: Source | Sequence[Source], top: int = 10
) -> list[Match]:
    """The pictures with the highest cosines with the words of the query, the best first. Several queries are averaged.

    Every call embeds all pictures; for many, make an index once with `miniclip index`.
    """
    clip, preprocess = resolve(model)
    found = find_pictures(pictures)
    scores = _embed(clip, preprocess, found) @ text_embeddings(clip, query).mean(dim=0)
    best = scores.topk(min(top, len(found)))
    return [Match(score, found[i]) for score, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)]


def text_embeddings(model: CLIP, texts: str | Sequence[str]) -> Tensor:
    """Unit embeddings [N, E]. UsageError for a text that is too long."""
    embeddings, faults = embed_texts(model, texts)
    if faults:
        raise UsageError("; ".join(faults.values()))
    return embeddings


def resolve(model: Model) -> tuple[CLIP, Callable[[Image.Image], Tensor]]:
    """The model and its preprocessing. UsageError for what is neither a model nor the name or path of one."""
    if isinstance(model, CLIP):
        return model, Preprocess(model.config.preprocess)
    if isinstance(model, tuple) and len(model) == 2 and isinstance(model[0], CLIP):
        return model
    if not isinstance(model, (str, Path)) or str(model).lower().endswith(SUFFIXES):
        what = model if isinstance(model, (str, Path)) else f"a {type(model).__name__}"
        raise UsageError(f"got {what} for the model; expected its name or path, or what load() returns: {CALLS}")
    return load(model)


def find_pictures(sources: Source | Sequence[Source], hidden: bool = False) -> list[Picture]:
    """The pictures, with all those of folders in place of the folders. ImageError if there are none.

    hidden: take hidden files and folders too.
    """
    sources = as_list(sources)
    found: list[Picture] = []
    for i, source in enumerate(sources):
        found += _find(source, f"picture {i + 1}", hidden)
    if not found:
        raise ImageError(f"there are no pictures in {', '.join(map(str, sources)) or 'an empty list'}")
    return found


def _find(source: Source, name: str, hidden: bool) -> list[Picture]:
    if isinstance(source, Image.Image):
        return [Picture(getattr(source, "filename", "") or name, source)]
    if isinstance(source, np.ndarray):
        return [Picture(name, decode(source))]
    if not isinstance(source, (str, Path)):
        raise TypeError(f"{name} is a {type(source).__name__}; expected a path, a PIL image, a NumPy array or a URL")
    if str(source).lower().startswith(URLS):
        return [Picture(str(source), _download(str(source)))]
    path = Path(source).expanduser()
    if path.is_dir():
        return [Picture(file, file) for file in scan([path], hidden).pictures]
    return [Picture(str(path), str(path))]


def _download(url: str) -> Image.Image:
    try:
        with urlopen(url, timeout=60) as response:
            data = response.read(MOST_BYTES + 1)
    except (OSError, ValueError) as error:
        raise ImageError(f"can't get {url}: {error}") from error
    if len(data) > MOST_BYTES:
        raise ImageError(f"{url} has more than {MOST_BYTES >> 20} MiB, too many for a picture")
    try:
        return open_image(data)
    except ImageError as error:
        raise ImageError(f"{url}: {error}") from error


def _embed(model: CLIP, preprocess: Callable[[Image.Image], Tensor], pictures: Sequence[Picture]) -> Tensor:
    embeddings, faults = embed_images(model, preprocess, [picture.source for picture in pictures])
    _raise(list(faults.values()))
    return embeddings


def _raise(faults: Sequence[str]) -> None:
    if faults:
        others = f" (and {len(faults) - 1} others can't be used)" if len(faults) > 1 else ""
        raise ImageError(faults[0] + others)
