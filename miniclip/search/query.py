"""A query as one vector, made of words and pictures that are wanted and others that are not."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from miniclip.data.pictures import SUFFIXES
from miniclip.embed import as_list, embed_images, embed_texts
from miniclip.models import CLIP
from miniclip.search.index import SearchError

UNWANTED = 0.5  # weight of the unwanted parts
Part = str | Path | Image.Image  # words, or a picture


def embed_query(
    model: CLIP,
    preprocess: Callable[[Image.Image], Tensor],
    wanted: Part | Sequence[Part],
    unwanted: Part | Sequence[Part] = (),
) -> Tensor:
    """The mean of the unit embeddings of `wanted`, less half that of `unwanted`; float32 [1, E].

    So its product with a picture's embedding is the picture's mean cosine with the wanted parts, less half the mean
    cosine with the unwanted parts. (With a weight of 1, the pictures least like the unwanted parts would win, whatever
    they show.) A part is a picture if it is a PIL image, a Path, or the name of a file; otherwise it is words. Cosines
    between pictures are higher than between pictures and words, so beside a picture words count little.
    """
    wanted, unwanted = as_list(wanted), as_list(unwanted)
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
    """Whether this part of a query is a picture. SearchError for the name of a picture file that is not there."""
    if not isinstance(part, str):
        return True
    if os.path.isfile(os.path.expanduser(part)):
        return True
    if part.lower().endswith(SUFFIXES):
        raise SearchError(f"there is no picture {part}; a query is words, or the path of a picture")
    return False
