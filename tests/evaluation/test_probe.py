"""The linear probe and few-shot on clusters whose answer is known; the search; the split."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miniclip.data.lists import DataError
from miniclip.errors import MissingExtraError
from miniclip.evaluation.probe import few_shot, linear_probe, search, split

pytest.importorskip("sklearn")


def clusters(count: int, spread: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit vectors around three directions, `count` of each."""
    noise = torch.randn(3 * count, 8, generator=torch.Generator().manual_seed(seed))
    targets = torch.arange(3).repeat(count)
    return torch.nn.functional.normalize(torch.eye(3, 8)[targets] + spread * noise, dim=-1), targets


def test_a_probe_learns_what_can_be_learnt():
    train, test = clusters(30, 0.2, seed=0), clusters(40, 0.2, seed=1)
    result = linear_probe(*train, *test, classes=3)
    assert result["top1"] > 0.95 and result["mean_class_recall"] == pytest.approx(result["top1"])
    assert (result["train"], result["classes"]) == (90, 3)
    low, high = result["interval"]
    assert low - 1e-9 <= result["top1"] <= high + 1e-9
    # Negative control: labels that have nothing to do with the features.
    shuffled = train[1][torch.randperm(90, generator=torch.Generator().manual_seed(0))]
    assert linear_probe(train[0], shuffled, *test, classes=3)["top1"] < 0.6


def test_the_test_pictures_do_not_choose_the_penalty():
    train, test = clusters(20, 0.5, seed=0), clusters(20, 0.5, seed=1)
    wrong = (test[1] + 1) % 3
    assert linear_probe(*train, *test, classes=3)["c"] == linear_probe(*train, test[0], wrong, classes=3)["c"]


def test_more_shots_learn_more():
    arguments = *clusters(20, 0.5, seed=0), *clusters(100, 0.5, seed=1)
    rows = few_shot(*arguments, shots=(1, 16), repeats=2)
    assert [row["shots"] for row in rows] == [1, 16]
    assert rows[0]["top1"] < rows[1]["top1"]
    assert all(row["low"] <= row["top1"] <= row["high"] for row in rows)
    assert rows[:1] == few_shot(*arguments, shots=(1,), repeats=2)
    assert rows[:1] != few_shot(*arguments, shots=(1,), repeats=2, seed=1)


def test_k_shots_are_k_of_each_class(monkeypatch):
    fits = []

    def fit(x, y, test, exponent):
        fits.append(torch.bincount(y).tolist())
        return torch.zeros(len(test), dtype=torch.int64)

    monkeypatch.setattr("miniclip.evaluation.probe._fit", fit)
    train = clusters(12, 0.2, seed=0)
    rows = few_shot(*train, *clusters(3, 0.2, seed=1), shots=(2, 8, 16), repeats=1)
    assert {tuple(counts) for counts in fits} == {(2, 2, 2), (8, 8, 8)}
    assert rows[0]["top1"] == pytest.approx(1 / 3)
    assert rows[2] == {"shots": 16, "top1": None, "why": "20 pictures of each class are needed; one has 12"}


def test_too_few_pictures_are_an_error():
    features = torch.eye(4)
    with pytest.raises(DataError, match="three or more"):
        linear_probe(features, torch.arange(4), features, torch.arange(4), classes=4)
    with pytest.raises(DataError, match="two or more classes"):
        linear_probe(features, torch.zeros(4, dtype=torch.int64), features, torch.arange(4), classes=4)


def test_scikit_learn_is_asked_for(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.exceptions", None)
    with pytest.raises(MissingExtraError, match=r"miniclip\[probe\]"):
        linear_probe(*clusters(9, 0.2, seed=0), *clusters(9, 0.2, seed=1), classes=3)


@settings(deadline=None)
@given(st.integers(-48, 48))
def test_the_search_finds_a_peak_wherever_it_is(eighth):
    """Any peak on the grid of eight steps a decade, in 15 tries of 97."""
    peak, tried = eighth / 8, []

    def accuracy(exponent):
        tried.append(exponent)
        return 1 / (1 + abs(exponent - peak))

    assert search(accuracy) == (peak, 1.0)
    assert len(tried) == len(set(tried)) <= 15 and all(-6 <= exponent <= 6 for exponent in tried)


def test_a_plateau_is_searched_around_one():
    assert search(lambda exponent: 0.5) == (0.0, 0.5)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=60), st.sampled_from([0.2, 0.5]), st.integers(0, 3))
def test_a_split_takes_its_share_of_each_class(targets, share, seed):
    targets = torch.tensor(targets)
    first, second = split(targets, share, seed)
    assert sorted(first.tolist() + second.tolist()) == list(range(len(targets)))
    for name in targets.unique():
        count = int((targets == name).sum())
        assert int((targets[second] == name).sum()) == min(count - 1, round(count * share))
    assert torch.equal(second, split(targets, share, seed)[1])


def test_the_seed_decides_the_split():
    targets = torch.zeros(100, dtype=torch.int64)
    assert not torch.equal(split(targets, 0.5, 0)[1], split(targets, 0.5, 1)[1])
    assert math.isclose(len(split(targets, 0.5, 0)[1]), 50)
