"""What is asked for, as one vector: words and pictures to be near to, and others to stay away from."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from miniclip.embed import embed_images, embed_texts
from miniclip.models import CLIP
from miniclip.search.compare import IMAGE_SUFFIXES
from miniclip.search.index import SearchError

UNWANTED = 0.5  # weight of what to stay away from
Part = str | Path | Image.Image  # of a query: words, or a picture


def embed_query(
    model: CLIP,
    preprocess: Callable[[Image.Image], Tensor],
    wanted: Sequence[Part],
    unwanted: Sequence[Part] = (),
) -> Tensor:
    """The mean of the unit embeddings of `wanted`, less half that of `unwanted`; float32 [1, E].

    Its product with a picture's embedding is therefore the picture's mean cosine with all parts that are wanted, less
    half of that with those that are not; all of it would find what is least like the unwanted, whatever that is. A part
    is a picture if it is a PIL image, a Path, or a file's name, and words otherwise. Pictures are nearer to each other
    than to words: beside a picture, words count little.
    """
    if not wanted:
        raise SearchError("there is no query: give words or a picture to search for")
    vector = _mean(model, preprocess, wanted)
    return vector - UNWANTED * _mean(model, preprocess, unwanted) if unwanted else vector


def _mean(model: CLIP, preprocess: Callable, parts: Sequence[Part]) -> Tensor:
    rows = []
    for part in parts:
        if is_picture(part):
            row, faults = embed_images(model, preprocess, [part])
        else:
            row, faults = embed_texts(model, [part])
        if faults:
            raise SearchError(f"the query {str(part)!r} can't be used: {faults[0]}")
        rows.append(row)
    return torch.cat(rows).mean(dim=0, keepdim=True)


def is_picture(part: Part) -> bool:
    """Whether this part of a query is a picture. SearchError for a name that ends as a picture's, of no file."""
    if not isinstance(part, str):
        return True
    if os.path.isfile(part):
        return True
    if part.lower().endswith(IMAGE_SUFFIXES):
        raise SearchError(f"there is no picture {part}; a query is words, or a picture's file")
    return False
