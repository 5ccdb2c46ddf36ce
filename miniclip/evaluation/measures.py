"""What is measured, and how sure it is. N pictures of C classes; shares are in 0..1.

    interval           the 95% interval of a figure; the one place that says which kind, and why
    share, difference  a share with its interval; how much better one model or prompt is than another
    confusion_matrix, class_recall, most_confused
    retrieval_ranks, recall, mean_reciprocal_rank, precision
    calibration        whether confidence is accuracy

Accuracy and ranks are in `miniclip.zero_shot`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from miniclip.zero_shot import CHUNK_SCORES, check_unit, shares

Z = 1.959964  # 95% of a normal distribution lie within this many standard deviations of its mean
RESAMPLES = 1000  # of the bootstrap
CHUNK_DRAWS = 1 << 22  # draws of the bootstrap held in memory at once: 32 MiB
BINS = 15  # of the calibration error
KS = (1, 5, 10)

Owners = Tensor | Sequence[int | Sequence[int]]


def interval(values: Tensor, groups: Tensor | None = None, seed: int = 0) -> tuple[float, float]:
    """The 95% interval of the mean of `values` [N]: how far it may lie from the mean over other pictures *of the same
    kind*. It says nothing about pictures of another kind.

    A share of pictures (bool values, no groups) has Wilson's interval. It holds for few pictures, and near 0 and 1,
    where a bootstrap shrinks to nothing: for 10 right answers of 10 the bootstrap gives 100% to 100%, Wilson's interval
    72% to 100%. Any other mean has the bootstrap's: the mean recall of classes (`groups`), and the difference of two
    models on the same pictures (values -1, 0 and 1).

    groups: int64 [N], the class of each picture; each class then counts alike. See `bootstrap`.
    """
    if groups is None and values.dtype == torch.bool:
        return wilson(int(values.sum()), len(values))
    return bootstrap(values, groups, seed)


def wilson(count: int, total: int) -> tuple[float, float]:
    """Wilson's score interval of the share count / total, at 95% (Wilson 1927)."""
    middle = (count + Z**2 / 2) / (total + Z**2)
    half = Z / (total + Z**2) * math.sqrt(count * (total - count) / total + Z**2 / 4)
    return max(0.0, middle - half), min(1.0, middle + half)


def bootstrap(
    values: Tensor, groups: Tensor | None = None, seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """The percentile bootstrap of the mean, at 95% (Efron & Tibshirani 1993, chapter 13).

    N pictures are drawn with replacement, `resamples` times; 2.5% of the means lie below the interval and 2.5% above.

    groups: int64 [N]. Pictures are drawn within each group, and the groups count alike. Groups of a few pictures make
    the interval too narrow: a group of one does not vary at all.
    """
    generator = np.random.default_rng(seed)
    data = values.double().numpy()
    group = np.zeros(len(data), dtype=np.int64) if groups is None else groups.numpy()
    order = np.argsort(group, kind="stable")
    _, place, sizes = np.unique(group[order], return_inverse=True, return_counts=True)
    first, size = (np.cumsum(sizes) - sizes)[place], sizes[place]  # of the group that each draw comes from
    weight = 1 / (len(sizes) * size)
    data = data[order]
    means, chunk = [], max(1, CHUNK_DRAWS // len(data))
    for start in range(0, resamples, chunk):
        uniform = generator.random((min(chunk, resamples - start), len(data)))
        means.append(data[(first + uniform * size).astype(np.int64)] @ weight)
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return round(float(low), 9), round(float(high), 9)  # the weights are rounded, so their sums are too


def share(right: Tensor) -> dict[str, float]:
    """The share of True in bool [N], with its 95% interval."""
    low, high = interval(right)
    return {"share": right.double().mean().item(), "low": low, "high": high}


def difference(right: Tensor, reference: Tensor, seed: int = 0) -> dict[str, float]:
    """How much more often `right` is True than `reference`, both bool [N] of the same pictures, in -1..1.

    The interval is that of the differences of single pictures. It is narrower than the two shares' own intervals
    suggest, since both mostly find the same pictures hard.
    """
    gains = right.double() - reference.double()
    low, high = interval(gains, seed=seed)
    gained, lost = int((gains > 0).sum()), int((gains < 0).sum())
    return {"difference": (gained - lost) / len(gains), "low": low, "high": high, "gained": gained, "lost": lost}


def confusion_matrix(targets: Tensor, predicted: Tensor, classes: int) -> Tensor:
    """How often a picture of class i was taken for class j, int64 [C, C]; both arguments int64 [N]."""
    return torch.bincount(targets * classes + predicted, minlength=classes**2).view(classes, classes)


def class_recall(targets: Tensor, right: Tensor, classes: int) -> Tensor:
    """For each class the share of its pictures that were named correctly, float64 [C]; NaN for a class without any.

    right: bool [N]. In the mean over the classes (`nanmean`) each class counts alike, however many pictures it has.
    """
    counts, hits = torch.bincount(targets, minlength=classes), torch.bincount(targets[right], minlength=classes)
    return hits.double() / counts


def most_confused(matrix: Tensor, most: int) -> list[tuple[int, int, int]]:
    """The pairs of classes that are confused most often, both directions added: (i, j, count), i < j."""
    both = (matrix + matrix.T).triu(1)
    pairs = both.nonzero()  # few; sorting all C x C pairs would take minutes for thousands of classes
    counts, order = both[tuple(pairs.T)].sort(descending=True, stable=True)
    return [(*pair, count) for pair, count in zip(pairs[order[:most]].tolist(), counts[:most].tolist(), strict=True)]


def retrieval_ranks(images: Tensor, texts: Tensor, owners: Owners) -> tuple[Tensor, Tensor]:
    """The rank of each image's best own text, int64 [N], and of each text's best own image, int64 [M]; 0 is the best.

    images: [N, E]; texts: [M, E], both of unit length. owners: for each text the image that it describes, int64 [M], or
    a list of images. A caption that several images share is *one* text with several owners: given once for each image,
    the copies would count as wrong answers for each other's images.

    A tie with another image's text counts against the own one. ValueError if an image has no text.
    """
    pairs = torch.tensor(
        [(image, text) for text, own in enumerate(_lists(owners)) for image in own], dtype=torch.int64
    ).view(-1, 2)
    without = len(images) - len(pairs[:, 0].unique())
    if without:
        raise ValueError(f"{without} of {len(images)} images have no text; expected at least one for each")
    return _best_ranks(images, texts, pairs), _best_ranks(texts, images, pairs.flip(1))


def recall(
    images: Tensor, texts: Tensor, owners: Owners, ks: Sequence[int] = KS
) -> tuple[dict[int, float], dict[int, float]]:
    """Recall@k in both directions, as shares by k: from images to texts, and from texts to images.

    An image is a hit if *any* of its texts is among the k texts nearest to it, and a text if any of its images is among
    the k images nearest to it (Karpathy & Fei-Fei 2015). Arguments and errors: see `retrieval_ranks`; DataError for
    embeddings that are not of unit length.
    """
    check_unit(images)
    check_unit(texts, images.shape[1])
    of_images, of_texts = retrieval_ranks(images, texts, owners)
    return shares(of_images, ks), shares(of_texts, ks)


def mean_reciprocal_rank(found: Tensor) -> float:
    """The mean of 1 / (rank + 1) for ranks [N] from 0: 1 if all are first, 1/2 if all are second."""
    return (1 / (found.double() + 1)).mean().item()


def _lists(owners: Owners) -> list[list[int]]:
    owners = owners.tolist() if isinstance(owners, Tensor) else owners
    return [[own] if isinstance(own, int) else list(own) for own in owners]


def _best_ranks(queries: Tensor, candidates: Tensor, pairs: Tensor) -> Tensor:
    """For each query the number of candidates, not its own, that score at least as high as the best of its own."""
    found, start = [], 0
    for scores in _scores(queries, candidates):
        own = torch.zeros(scores.shape, dtype=torch.bool)
        here = pairs[(pairs[:, 0] >= start) & (pairs[:, 0] < start + len(scores))]
        own[here[:, 0] - start, here[:, 1]] = True
        best = scores.masked_fill(~own, -torch.inf).amax(dim=1, keepdim=True)
        found.append((~own & ~(scores < best)).sum(1))
        start += len(scores)
    return torch.cat(found)


def _scores(queries: Tensor, candidates: Tensor) -> Iterator[Tensor]:
    """The rows of queries @ candidates.T, some at a time.

    Equal candidates get equal scores, so that ties are seen. A plain product does not promise that: the last bits of
    an element may depend on its place in the matrix.
    """
    distinct, copies = candidates.unique(dim=0, return_inverse=True)
    for chunk in queries.split(max(1, CHUNK_SCORES // len(candidates))):
        yield (chunk @ distinct.T)[:, copies]


def precision(images: Tensor, weights: Tensor, targets: Tensor, ks: Sequence[int] = KS) -> dict[int, float]:
    """For each k the share of right pictures among the k nearest to a class, averaged over the classes with pictures.

    images: [N, E]; weights: [E, C]; targets: int64 [N]. A class with fewer pictures than k can't reach 1.
    """
    nearest = (weights.T @ images.T).topk(min(max(ks), len(images)), dim=1).indices
    own = targets[nearest] == torch.arange(weights.shape[1])[:, None]
    own = own[targets.unique()].double()
    return {k: own[:, :k].mean().item() for k in ks}


def calibration(confidence: Tensor, right: Tensor, bins: int = BINS) -> tuple[float, list[dict]]:
    """Expected calibration error, in 0..1, and the bins that have pictures (Guo et al. 2017, section 2).

    confidence: [N], in 0..1; right: bool [N]. Bin b holds the confidences in (b / bins, (b + 1) / bins].
    """
    number = ((confidence.double() * bins).ceil().long() - 1).clamp(0, bins - 1)
    rows, error = [], 0.0
    for b in number.unique().tolist():
        there = number == b
        count, mean, accuracy = int(there.sum()), *(x[there].double().mean().item() for x in (confidence, right))
        rows.append({"from": b / bins, "to": (b + 1) / bins, "count": count, "confidence": mean, "accuracy": accuracy})
        error += count / len(confidence) * abs(accuracy - mean)
    return error, rows
