"""Confusion, recall and the bootstrap against values by hand, SciPy-free formulas and plain loops."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miniclip.evaluation import statistics
from miniclip.evaluation.statistics import bootstrap, class_recall, confusion_matrix, most_confused

TARGETS = torch.tensor([0, 0, 0, 0, 1, 1, 3])
PREDICTED = torch.tensor([0, 0, 1, 3, 1, 0, 2])


def test_the_confusion_matrix_by_hand():
    matrix = confusion_matrix(TARGETS, PREDICTED, 4)
    assert matrix.tolist() == [[2, 1, 0, 1], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0]]
    assert matrix.tolist() != confusion_matrix(PREDICTED, TARGETS, 4).tolist()


def test_recall_by_hand_counts_classes_alike():
    recall = class_recall(TARGETS, TARGETS == PREDICTED, 4)
    assert recall[[0, 1, 3]].tolist() == [0.5, 0.5, 0.0] and math.isnan(recall[2])
    assert recall.nanmean().item() == pytest.approx(1 / 3)
    assert (TARGETS == PREDICTED).double().mean().item() == pytest.approx(3 / 7)  # another figure


def test_the_most_confused_by_hand():
    assert most_confused(confusion_matrix(TARGETS, PREDICTED, 4), 9) == [(0, 1, 2), (0, 3, 1), (2, 3, 1)]
    assert most_confused(torch.eye(3, dtype=torch.int64), 9) == []


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=40))
def test_the_confusion_matrix_is_that_of_a_plain_loop(pairs):
    expected = [[0] * 5 for _ in range(5)]
    for target, predicted in pairs:
        expected[target][predicted] += 1
    targets, predicted = torch.tensor(pairs).T
    matrix = confusion_matrix(targets, predicted, 5)
    assert matrix.tolist() == expected
    assert class_recall(targets, targets == predicted, 5).nan_to_num(-1).tolist() == [
        row[i] / sum(row) if sum(row) else -1 for i, row in enumerate(expected)
    ]


def test_the_bootstrap_gives_the_bounds_of_a_binomial_share():
    """Of 400 pictures 300 right: 0.75, give or take 1.96 standard errors, as far as 4,000 resamples tell."""
    low, high = bootstrap((torch.arange(400) < 300).float(), resamples=4000)
    error = 1.96 * math.sqrt(0.75 * 0.25 / 400)
    assert low == pytest.approx(0.75 - error, abs=0.005) and high == pytest.approx(0.75 + error, abs=0.005)
    narrow = bootstrap((torch.arange(1600) < 1200).float(), resamples=4000)
    assert narrow[1] - narrow[0] == pytest.approx((high - low) / 2, rel=0.1)
    half = bootstrap((torch.arange(400) < 300).float(), resamples=4000, level=0.5)
    assert half[1] - half[0] == pytest.approx((high - low) * 0.6745 / 1.96, rel=0.15)


def test_the_bootstrap_is_that_of_a_plain_loop():
    values = [0.0, 1.0, 1.0, 5.0, 2.0]
    rng = random.Random(1)
    means = sorted(sum(rng.choices(values, k=5)) / 5 for _ in range(20_000))
    low, high = bootstrap(torch.tensor(values), resamples=20_000)
    assert low == pytest.approx(means[500], abs=0.11) and high == pytest.approx(means[19_500], abs=0.11)


def test_the_seed_decides_and_chunks_do_not(monkeypatch):
    values = torch.rand(50, generator=torch.Generator().manual_seed(0))
    whole = bootstrap(values, seed=3)
    assert whole == bootstrap(values, seed=3) != bootstrap(values, seed=4)
    monkeypatch.setattr(statistics, "CHUNK_DRAWS", 120)
    assert bootstrap(values, seed=3) == pytest.approx(whole)


def test_groups_are_drawn_from_by_themselves():
    """Two classes, one always right, one never: every resample's mean recall is a half. All together it varies."""
    right = torch.tensor([1.0] * 9 + [0.0] * 3)
    classes = torch.tensor([7] * 9 + [2] * 3)
    shuffle = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    assert bootstrap(right[shuffle], classes[shuffle]) == pytest.approx((0.5, 0.5))
    low, high = bootstrap(right)
    assert low < 0.6 < 0.9 < high


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 1), min_size=5, max_size=60), st.integers(0, 5))
def test_the_bounds_enclose_the_mean(values, seed):
    low, high = bootstrap(torch.tensor(values), seed=seed)
    assert 0 <= low <= sum(values) / len(values) + 1e-9 and sum(values) / len(values) - 1e-9 <= high <= 1 + 1e-9
