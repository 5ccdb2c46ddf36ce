"""What lies behind an accuracy: which classes are confused, how each does, and how sure the figure is.

Shares are in 0..1; N pictures of C classes, `targets` and `predicted` as int64 [N].
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

CHUNK_DRAWS = 1 << 22  # draws of the bootstrap that are held at once, 32 MiB of them


def confusion_matrix(targets: Tensor, predicted: Tensor, classes: int) -> Tensor:
    """How often a picture of class i was taken for class j, int64 [C, C]; the diagonal is right."""
    return torch.bincount(targets * classes + predicted, minlength=classes**2).view(classes, classes)


def class_recall(targets: Tensor, right: Tensor, classes: int) -> Tensor:
    """The share of each class's pictures that were named rightly, float64 [C]; NaN for a class without pictures.

    right: bool [N]. The mean over the classes (`nanmean`) counts each alike, however many pictures it has.
    """
    counts, hits = torch.bincount(targets, minlength=classes), torch.bincount(targets[right], minlength=classes)
    return hits.double() / counts


def most_confused(matrix: Tensor, most: int) -> list[tuple[int, int, int]]:
    """The pairs of classes that are confused most often, in either direction together: (i, j, count), i < j."""
    both = (matrix + matrix.T).triu(1)
    counts, places = both.flatten().sort(descending=True, stable=True)
    return [
        (place // len(matrix), place % len(matrix), count)
        for place, count in zip(places[:most].tolist(), counts[:most].tolist(), strict=True)
        if count
    ]


def bootstrap(
    values: Tensor, groups: Tensor | None = None, seed: int = 0, resamples: int = 1000, level: float = 0.95
) -> tuple[float, float]:
    """Between which bounds the mean of `values` lies: percentile bootstrap (Efron & Tibshirani 1993, chapter 13).

    The pictures are drawn anew `resamples` times, as many as there are and with replacement; the bounds leave
    (1 - level) / 2 of the means on either side. So they tell how another sample of such pictures might have come out,
    not how another kind of picture would. Values of several models on the same pictures, subtracted, give the bounds of
    the difference.

    values: [N], such as 1 for a right answer and 0 for a wrong one
    groups: int64 [N]; given, each group is drawn from by itself, and counts alike: for the mean recall of the classes.
    Groups of a few pictures make the bounds too narrow: those of one do not vary at all.
    """
    generator = np.random.default_rng(seed)
    data = values.double().numpy()
    group = np.zeros(len(data), dtype=np.int64) if groups is None else groups.numpy()
    order = np.argsort(group, kind="stable")
    _, place, sizes = np.unique(group[order], return_inverse=True, return_counts=True)
    first, size = (np.cumsum(sizes) - sizes)[place], sizes[place]  # of the group that each drawn picture comes from
    weight = 1 / (len(sizes) * size)
    data = data[order]
    means, chunk = [], max(1, CHUNK_DRAWS // len(data))
    for start in range(0, resamples, chunk):
        uniform = generator.random((min(chunk, resamples - start), len(data)))
        means.append(data[(first + uniform * size).astype(np.int64)] @ weight)
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return round(float(low), 9), round(float(high), 9)  # the sums of weights are rounded
