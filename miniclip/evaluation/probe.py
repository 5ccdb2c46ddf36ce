"""How well logistic regression on a model's embeddings does: the linear probe, and few-shot classification.

As in the CLIP paper (Radford et al. 2021, appendix A.3): scikit-learn's L-BFGS with at most 1,000 iterations. The
strength of the L2 penalty is chosen on pictures held out of the training set, by a search over 1e-6 to 1e6 that ends at
eight steps a decade. The features are the unit embeddings of `encode_image`; the paper takes the features before the
last projection, which gives slightly different figures.

Needs scikit-learn: pip install "miniclip[probe]"
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from miniclip.data.lists import DataError
from miniclip.data.seeds import generator
from miniclip.errors import require
from miniclip.evaluation.measures import class_recall, interval

SHOTS = (1, 2, 4, 8, 16)
LOWEST, HIGHEST = -6, 6  # log10 of C, the inverse strength of the penalty
COARSE, FINE = 2.0, 0.125  # decades between two tries, at the start and at the end of the search
VALIDATION_SHARE = 0.2
MAX_ITERATIONS = 1000


def linear_probe(
    train: Tensor, train_targets: Tensor, test: Tensor, test_targets: Tensor, classes: int, seed: int = 0
) -> dict:
    """Accuracy on `test` of a logistic regression fitted to `train`; ready for JSON.

    train [N, E], test [M, E]: features; targets: int64, in 0 .. classes - 1. The penalty is chosen on a fifth of each
    class of `train`, drawn by `seed`; the final fit is on all of `train`.

        c, validation_top1      the inverse strength of the penalty, and the accuracy on the held-out fifth
        top1, interval          accuracy, and its 95% interval, see `measures.interval`
        mean_class_recall       the mean over the classes
        train, classes          the number of training pictures, and of classes that have any

    DataError if there are too few training pictures or classes; MissingExtraError without scikit-learn.
    """
    learn, check = split(train_targets, VALIDATION_SHARE, seed)
    if not len(check):
        raise DataError("a probe needs a class with three or more training pictures, to hold some out")

    def accuracy(exponent: float) -> float:
        predicted = _fit(train[learn], train_targets[learn], train[check], exponent)
        return _share(predicted, train_targets[check])

    exponent, reached = search(accuracy)
    predicted = _fit(train, train_targets, test, exponent)
    right = predicted == test_targets
    return {
        "train": len(train),
        "classes": len(train_targets.unique()),
        "c": 10**exponent,
        "validation_top1": reached,
        "top1": right.double().mean().item(),
        "interval": interval(right),
        "mean_class_recall": class_recall(test_targets, right, classes).nanmean().item(),
    }


def few_shot(
    train: Tensor,
    train_targets: Tensor,
    test: Tensor,
    test_targets: Tensor,
    shots: Sequence[int] = SHOTS,
    repeats: int = 3,
    seed: int = 0,
) -> list[dict]:
    """Accuracy on `test` after training on k pictures of each class, for each k in `shots`; arguments as above.

    The penalty is chosen on min(k, 4) further pictures of each class, as CoOp does (Zhou et al. 2022), so k shots use
    up to 2k pictures. Every k is repeated with other pictures, which are the same for all models: top1 is the mean over
    the repeats, low and high are the worst and the best repeat. If a class of `train` has too few pictures for a k,
    top1 is None and "why" says so.
    """
    smallest = int(torch.bincount(train_targets).clamp(min=0)[train_targets.unique()].min())
    rows = []
    for k in shots:
        needed = k + min(k, 4)
        if smallest < needed:
            why = f"{needed} pictures of each class are needed; one has {smallest}"
            rows.append({"shots": k, "top1": None, "why": why})
            continue
        reached = []
        for repeat in range(repeats):
            order = _shuffled_within(train_targets, seed, k, repeat)
            learn, check = order < k, (order >= k) & (order < needed)
            x, y, held, wanted = train[learn], train_targets[learn], train[check], train_targets[check]
            exponent, _ = search(lambda e, x=x, y=y, held=held, wanted=wanted: _share(_fit(x, y, held, e), wanted))
            reached.append(_share(_fit(x, y, test, exponent), test_targets))
        rows.append({"shots": k, "top1": sum(reached) / repeats, "low": min(reached), "high": max(reached)})
    return rows


def search(accuracy: Callable[[float], float]) -> tuple[float, float]:
    """The exponent of C with the best accuracy, and that accuracy. Among equally good ones the nearest to C = 1 counts.

    Every second decade is tried first, then both sides of the best one at half the distance, down to an eighth.
    """
    tried = {}

    def best_of(exponents: Sequence[float]) -> float:
        for exponent in exponents:
            if LOWEST <= exponent <= HIGHEST and exponent not in tried:
                tried[exponent] = accuracy(exponent)
        return max(sorted(tried, key=abs), key=tried.get)

    step = COARSE
    best = best_of([LOWEST + i * step for i in range(int((HIGHEST - LOWEST) / step) + 1)])
    while step > FINE:
        step /= 2
        best = best_of([best - step, best + step])
    return best, tried[best]


def split(targets: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """The indices of two parts, int64. The second has about `share` of each class, the first at least one of each."""
    order = _shuffled_within(targets, seed)
    second = order < (torch.bincount(targets) * share).round().long()[targets].clamp(
        max=torch.bincount(targets)[targets] - 1
    )
    return (~second).nonzero().flatten(), second.nonzero().flatten()


def _shuffled_within(targets: Tensor, *seed: int) -> Tensor:
    """For each example its place, from 0, in a random order of its class, int64 [N]."""
    shuffle = torch.randperm(len(targets), generator=generator(seed[0], "shuffle", *seed[1:]))
    by_class = shuffle[targets[shuffle].argsort(stable=True)]
    counts = torch.bincount(targets)
    place = torch.empty_like(targets)
    place[by_class] = torch.arange(len(targets)) - (counts.cumsum(0) - counts)[targets[by_class]]
    return place


def _fit(x: Tensor, y: Tensor, test: Tensor, exponent: float) -> Tensor:
    """The predictions for `test`, int64 [M], of a logistic regression fitted to (x, y)."""
    linear_model = require("sklearn.linear_model", "probe", "a linear probe")
    convergence = require("sklearn.exceptions", "probe", "a linear probe").ConvergenceWarning
    if len(y.unique()) < 2:
        raise DataError("a probe needs training pictures of two or more classes")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", convergence)  # the paper has the same limit of iterations
        probe = linear_model.LogisticRegression(C=10**exponent, max_iter=MAX_ITERATIONS).fit(x.numpy(), y.numpy())
    return torch.from_numpy(probe.predict(test.numpy()))


def _share(predicted: Tensor, targets: Tensor) -> float:
    return (predicted == targets).double().mean().item()
