"""Image-text retrieval: how often what belongs together is among the k best (Karpathy & Fei-Fei 2015)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from miniclip.zero_shot import CHUNK_SCORES, ranks, shares


def recall(
    images: Tensor, texts: Tensor, owners: Tensor, ks: Sequence[int] = (1, 5, 10)
) -> tuple[dict[int, float], dict[int, float]]:
    """Recall@k in both directions, each a share in 0..1 by k: from images to texts, and from texts to images.

    images: [N, E]; texts: [M, E]; owners: int64 [M], the image that each text describes; both of unit length.
    An image is a hit if *any* of its texts is among the k texts nearest to it, a text if its own image is among the k
    images nearest to it. Ties with what belongs to others count as misses; so a caption that several images share is a
    miss at k = 1 for all of them. ValueError if an image has no text.
    """
    textless = len(images) - len(owners.unique())
    if textless:
        raise ValueError(f"{textless} of {len(images)} images have no text; expected at least one for each")
    from_images, from_texts, start = [], [], 0
    for scores in _scores(images, texts):
        rows = torch.arange(start, start + len(scores))
        own = owners == rows[:, None]
        best = scores.masked_fill(~own, -torch.inf).amax(dim=1, keepdim=True)
        from_images.append((~own & ~(scores < best)).sum(1))  # ahead of the best own text, or level with it
        start += len(scores)
    start = 0
    for scores in _scores(texts, images):
        from_texts.append(ranks(scores, owners[start : start + len(scores)]))
        start += len(scores)
    return shares(torch.cat(from_images), ks), shares(torch.cat(from_texts), ks)


def _scores(queries: Tensor, candidates: Tensor) -> Iterator[Tensor]:
    """The rows of queries @ candidates.T, some at a time.

    Equal candidates get equal scores, so that ties are seen. A plain product does not promise that: the last bits of
    an element may depend on where in the matrix it stands.
    """
    distinct, copies = candidates.unique(dim=0, return_inverse=True)
    for chunk in queries.split(max(1, CHUNK_SCORES // len(candidates))):
        yield (chunk @ distinct.T)[:, copies]
