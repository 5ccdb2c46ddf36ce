"""How much a simple classifier learns from a model's embeddings: the linear probe, and few-shot classification.

As in the CLIP paper (Radford et al. 2021, appendix A.3): logistic regression by scikit-learn's L-BFGS, at most 1,000
iterations, with the strength of its L2 penalty chosen on pictures held out of the training set, by a search over 1e-6
to 1e6 that ends at eight steps a decade. Its features are the embeddings as `encode_image` gives them, of unit length.
The paper takes those before the last projection, which differs a little.

Needs scikit-learn: pip install "miniclip[probe]"
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from miniclip.data.lists import DataError
from miniclip.data.seeds import generator
from miniclip.evaluation.statistics import bootstrap, class_recall

SHOTS = (1, 2, 4, 8, 16)
LOWEST, HIGHEST = -6, 6  # log10 of C, the inverse strength
COARSE, FINE = 2.0, 0.125  # decades between two tries, at first and at last
VALIDATION_SHARE = 0.2
MAX_ITERATIONS = 1000


def linear_probe(
    train: Tensor, train_targets: Tensor, test: Tensor, test_targets: Tensor, classes: int, seed: int = 0
) -> dict:
    """Accuracy on `test` of a logistic regression that learnt from `train`; ready for JSON.

    train [N, E], test [M, E]: features; targets: int64, in 0 .. classes - 1. The penalty is chosen on a fifth of each
    class of `train`, drawn by `seed`; the final fit is on all of it.

        c, validation_top1      the inverse strength of the penalty, and the accuracy it was chosen for
        top1, interval          accuracy, and its 95% bounds by the bootstrap
        mean_class_recall       the mean over the classes
        train, classes          how many pictures were learnt from, and how many classes have any
    """
    learn, check = split(train_targets, VALIDATION_SHARE, seed)
    if not len(check):
        raise DataError("a probe needs three or more training pictures of a class, to choose its penalty on some")

    def accuracy(exponent: float) -> float:
        predicted = _fit(train[learn], train_targets[learn], train[check], exponent)
        return (predicted == train_targets[check]).double().mean().item()

    exponent, reached = search(accuracy)
    predicted = _fit(train, train_targets, test, exponent)
    right = predicted == test_targets
    return {
        "train": len(train),
        "classes": len(train_targets.unique()),
        "c": 10**exponent,
        "validation_top1": reached,
        "top1": right.double().mean().item(),
        "interval": bootstrap(right, seed=seed),
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
    """Accuracy on `test` after learning from k pictures of each class, for each k in `shots`; arguments as above.

    The penalty is chosen on min(k, 4) further pictures of each class, as CoOp does (Zhou et al. 2022), so k shots look
    at up to 2k pictures. Every k is repeated with other pictures, which are the same for all models: top1 is the mean
    over the repeats, and low and high are the worst and best of them. Of a k for which a class of `train` has too few
    pictures, top1 is None and "why" says so.
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
    """The exponent of C with the best accuracy, and that accuracy; of equals the one nearest to C = 1.

    Every second decade is tried, then both sides of the best, at half the distance, until that is an eighth.
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
    """Indices of two parts, int64: of each class about `share` goes to the second, at least one stays in the first."""
    order = _shuffled_within(targets, seed)
    second = order < (torch.bincount(targets) * share).round().long()[targets].clamp(
        max=torch.bincount(targets)[targets] - 1
    )
    return (~second).nonzero().flatten(), second.nonzero().flatten()


def _shuffled_within(targets: Tensor, *seed: int) -> Tensor:
    """A number for each example: its place, from 0, in a shuffle of its class, int64 [N]."""
    shuffle = torch.randperm(len(targets), generator=generator(seed[0], "shuffle", *seed[1:]))
    by_class = shuffle[targets[shuffle].argsort(stable=True)]
    counts = torch.bincount(targets)
    place = torch.empty_like(targets)
    place[by_class] = torch.arange(len(targets)) - (counts.cumsum(0) - counts)[targets[by_class]]
    return place


def _fit(x: Tensor, y: Tensor, test: Tensor, exponent: float) -> Tensor:
    """What a logistic regression learnt from (x, y) predicts for `test`, int64 [M]."""
    try:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise DataError('a probe needs scikit-learn: pip install "miniclip[probe]"') from error
    if len(y.unique()) < 2:
        raise DataError("a probe needs training pictures of two classes or more")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the paper stops at as many iterations too
        probe = LogisticRegression(C=10**exponent, max_iter=MAX_ITERATIONS).fit(x.numpy(), y.numpy())
    return torch.from_numpy(probe.predict(test.numpy()))


def _share(predicted: Tensor, targets: Tensor) -> float:
    return (predicted == targets).double().mean().item()
