"""Intervals, confusion, recall, retrieval and calibration against values by hand, formulas and plain loops."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miniclip.data.lists import DataError
from miniclip.evaluation import measures
from miniclip.evaluation.measures import (
    bootstrap,
    calibration,
    class_recall,
    confusion_matrix,
    difference,
    interval,
    mean_reciprocal_rank,
    most_confused,
    precision,
    recall,
    retrieval_ranks,
    share,
    wilson,
)
from miniclip.zero_shot import cached, shares

TARGETS = torch.tensor([0, 0, 0, 0, 1, 1, 3])
PREDICTED = torch.tensor([0, 0, 1, 3, 1, 0, 2])


def test_the_confusion_matrix_by_hand():
    matrix = confusion_matrix(TARGETS, PREDICTED, 4)
    assert matrix.tolist() == [[2, 1, 0, 1], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0]]
    assert matrix.tolist() != confusion_matrix(PREDICTED, TARGETS, 4).tolist()


def recalls(images, texts, owners, ks):
    """Recall@k of any vectors: as `recall`, which takes unit vectors alone."""
    return tuple(shares(ranks, ks) for ranks in retrieval_ranks(images, texts, owners))


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
    monkeypatch.setattr(measures, "CHUNK_DRAWS", 120)
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


# Shares and their intervals.


def test_wilson_matches_values_by_hand():
    """9 of 10: (0.9 + 3.8415 / 20 -+ 1.96 sqrt(0.09 / 10 + 3.8415 / 400)) / (1 + 0.38415)."""
    assert wilson(9, 10) == pytest.approx((0.5958, 0.9821), abs=1e-4)
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)


def test_wilson_covers_where_the_normal_interval_does_not():
    """Of 10,000 samples of 20 with a share of 0.05, about 95% of the intervals hold it; of p -+ 1.96 s, 64% do."""
    counts = np.random.default_rng(0).binomial(20, 0.05, 10_000)
    intervals = {count: wilson(count, 20) for count in range(21)}
    covered = np.mean([intervals[count][0] <= 0.05 <= intervals[count][1] for count in counts])
    half = 1.96 * np.sqrt(counts / 20 * (1 - counts / 20) / 20)
    normal = np.mean(abs(counts / 20 - 0.05) <= half)
    assert 0.9 < covered < 0.98
    assert normal < 0.7


def test_share_counts():
    assert share(torch.tensor([True, False, True, True]))["share"] == 0.75


# Retrieval.


def test_recall_by_hand():
    """Cosines of image 0: 0.1, 0.9, 0.5; of image 1: 0.2, 0.8, 0.85."""
    images, texts = torch.eye(2), torch.tensor([[0.1, 0.2], [0.9, 0.8], [0.5, 0.85]])
    from_images, from_texts = recalls(images, texts, torch.tensor([0, 0, 1]), (1, 2))
    assert from_images == {1: 1.0, 2: 1.0}  # image 0 by its second text
    assert from_texts == pytest.approx({1: 2 / 3, 2: 1.0})  # text 0 is nearer to image 1
    from_images, from_texts = recalls(images, texts, torch.tensor([0, 1, 1]), (1, 2))
    assert from_images == {1: 0.5, 2: 0.5}
    assert from_texts == pytest.approx({1: 1 / 3, 2: 1.0})

    without_second_texts, _ = recalls(images, texts[[0, 2]], torch.tensor([0, 1]), (1,))
    assert without_second_texts == {1: 0.5}


def slow_recall(images, texts, owners, k: int) -> tuple[float, float]:
    """Sorting whole lists, with what belongs to others first among equals."""
    scores = (images @ texts.T).tolist()
    hits_of_images = hits_of_texts = 0
    for i, row in enumerate(scores):
        best_first = sorted((-score, owner == i) for score, owner in zip(row, owners.tolist(), strict=True))
        hits_of_images += any(own for _, own in best_first[:k])
    for j, owner in enumerate(owners.tolist()):
        best_first = sorted((-row[j], i == owner) for i, row in enumerate(scores))
        hits_of_texts += any(own for _, own in best_first[:k])
    return hits_of_images / len(images), hits_of_texts / len(texts)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_recall_is_that_of_whole_sorted_lists(data):
    """Small integers make many ties; small chunks make several of them."""
    count = data.draw(st.integers(1, 6))
    owners = data.draw(st.permutations([*range(count), *data.draw(st.lists(st.integers(0, count - 1), max_size=8))]))
    vectors = st.lists(st.integers(-1, 1), min_size=2, max_size=2)
    images = torch.tensor([data.draw(vectors) for _ in range(count)], dtype=torch.float32)
    texts = torch.tensor([data.draw(vectors) for _ in owners], dtype=torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measures, "CHUNK_SCORES", data.draw(st.sampled_from([1, 20, 1000])))
        from_images, from_texts = recalls(images, texts, torch.tensor(owners), (1, 2, 5))
    for k in (1, 2, 5):
        expected = slow_recall(images, texts, torch.tensor(owners), k)
        assert (from_images[k], from_texts[k]) == pytest.approx(expected)


def test_a_caption_that_all_share_finds_nothing(monkeypatch):
    """Also where a plain product would give equal texts unequal scores, as one row times a matrix does on x86."""
    torch.manual_seed(0)
    images, text = unit(torch.randn(13, 64)), unit(torch.randn(1, 64))
    monkeypatch.setattr(measures, "CHUNK_SCORES", 1)
    from_images, _ = recall(images, text.repeat(13, 1), torch.arange(13), (1, 12, 13))
    assert from_images == {1: 0.0, 12: 0.0, 13: 1.0}


def unit(vectors):
    return torch.nn.functional.normalize(vectors, dim=1)


def test_recall_refuses_what_is_not_of_unit_length():
    one = torch.eye(2)
    for images, texts in ((2 * one, one), (one, 0.9 * one), (one, torch.eye(3))):
        with pytest.raises(DataError, match=r"normalize=True"):
            recall(images, texts, [0, 1])


def test_recall_needs_a_text_for_each_image():
    with pytest.raises(ValueError, match="1 of 2 images have no text"):
        recall(torch.eye(2), torch.eye(2), torch.tensor([0, 0]))


def test_precision_by_hand():
    """Nearest to class a are right, wrong, right pictures, to b wrong, wrong, right; c has none and counts nowhere."""
    weights = torch.tensor([[0.9, 0.9, 0.5], [0.8, 0.5, 0.5], [0.1, 0.6, 0.5]])
    found = precision(torch.eye(3), weights, torch.tensor([0, 1, 0]), (1, 2, 3))
    assert found == pytest.approx({1: (1 + 0) / 2, 2: (1 / 2 + 0) / 2, 3: (2 / 3 + 1 / 3) / 2})
    assert precision(torch.eye(3), weights, torch.tensor([1, 0, 1]), (2,))[2] == (1 / 2 + 1) / 2


# Differences of two models on the same pictures, and calibration.


def test_difference_by_hand():
    ours, theirs = torch.tensor([True, True, False, True]), torch.tensor([True, False, True, False])
    found = difference(ours, theirs)
    assert (found["gained"], found["lost"], found["difference"]) == (2, 1, 0.25)
    assert found["low"] < 0 < found["high"]
    assert difference(ours, ours) == {"difference": 0, "low": 0, "high": 0, "gained": 0, "lost": 0}


def test_difference_is_that_of_pairs():
    """Right wherever the other is, and elsewhere too, is better; of two samples of such shares nobody could tell."""
    random = np.random.default_rng(0)
    ours = random.random(200) < 0.7
    theirs = ours & (random.random(200) < 0.95)
    assert difference(torch.from_numpy(ours), torch.from_numpy(theirs))["low"] > 0
    unpaired = [random.choice(ours, 200).mean() - random.choice(theirs, 200).mean() for _ in range(1000)]
    assert np.percentile(unpaired, 2.5) < 0
    unrelated = difference(torch.from_numpy(ours), torch.from_numpy(random.permutation(theirs)))
    assert unrelated["low"] < 0 < unrelated["high"]


def test_calibration_by_hand():
    """Two bins: (0, 0.5] with confidence 0.4 and all right, (0.5, 1] with 0.8 and half right: (0.6 + 2 * 0.3) / 3."""
    confidence, right = torch.tensor([0.4, 0.7, 0.9]), torch.tensor([True, True, False])
    error, bins = calibration(confidence, right, bins=2)
    assert error == pytest.approx(1 / 3 * 0.6 + 2 / 3 * 0.3)
    assert [(row["count"], round(row["confidence"], 6), row["accuracy"]) for row in bins] == [
        (1, 0.4, 1),
        (2, 0.8, 0.5),
    ]
    assert calibration(confidence, right, bins=1)[0] == pytest.approx(0, abs=1e-6)  # 2/3 sure, 2/3 right


def test_calibration_of_what_knows_how_sure_it_is_is_small():
    random = torch.Generator().manual_seed(0)
    confidence = torch.rand(50_000, generator=random)
    right = torch.rand(50_000, generator=random) < confidence
    assert calibration(confidence, right)[0] < 0.01
    assert calibration(confidence.sqrt(), right)[0] > 0.1  # too sure
    assert calibration(torch.tensor([0.0, 1.0]), torch.tensor([False, True]))[0] == 0


def test_calibration_puts_an_edge_into_the_bin_below():
    _, bins = calibration(torch.tensor([0.0, 0.5, 0.51, 1.0]), torch.tensor([True] * 4), bins=2)
    assert [(row["from"], row["to"], row["count"]) for row in bins] == [(0, 0.5, 2), (0.5, 1, 2)]


# One kind of interval for each kind of figure.


def test_a_share_of_pictures_has_wilsons_interval_and_other_means_the_bootstraps():
    right = torch.tensor([True] * 10)
    assert interval(right) == wilson(10, 10) != bootstrap(right)
    values = torch.tensor([1.0, 0.0, -1.0, 1.0, 1.0])
    assert interval(values, seed=2) == bootstrap(values, seed=2)
    classes = torch.tensor([0] * 5 + [1] * 5)
    assert interval(right, classes) == bootstrap(right, classes) == (1.0, 1.0)


# Captions that several pictures share.


def test_perfect_embeddings_give_full_recall_though_captions_repeat():
    """Six pictures of two kinds, "a red circle" three times: one text each, which belongs to its three pictures."""
    kinds = torch.eye(2)
    images, owners = kinds[[0, 0, 0, 1, 1, 1]], [[0, 1, 2], [3, 4, 5]]
    assert recall(images, kinds, owners, (1, 5)) == ({1: 1.0, 5: 1.0}, {1: 1.0, 5: 1.0})
    # Negative control: as separate texts the three copies compete with each other.
    from_images, from_texts = recall(images, images, torch.arange(6), (1, 3))
    assert from_images == from_texts == {1: 0.0, 3: 1.0}
    # And wrong embeddings find nothing.
    assert recall(images, kinds.flip(0), owners, (1,)) == ({1: 0.0}, {1: 0.0})


def test_ranks_of_shared_captions_by_hand():
    """Text 0 belongs to images 0 and 1, text 1 to image 2, text 2 to images 1 and 2."""
    scores = torch.tensor([[0.2, 0.9, 0.5], [0.3, 0.8, 0.7], [0.6, 0.1, 0.4]])  # of images (rows) with texts
    of_images, of_texts = retrieval_ranks(scores, torch.eye(3), [[0, 1], [2], [1, 2]])
    assert of_images.tolist() == [2, 1, 1]  # image 1: text 2 at 0.7, behind text 1 alone
    assert of_texts.tolist() == [1, 2, 0]  # text 0: image 1 at 0.3, behind image 2 alone
    assert mean_reciprocal_rank(of_images) == pytest.approx((1 / 3 + 1 / 2 + 1 / 2) / 3)
    assert mean_reciprocal_rank(of_texts) == pytest.approx((1 / 2 + 1 / 3 + 1) / 3)
    assert mean_reciprocal_rank(torch.zeros(4)) == 1


def test_one_owner_for_each_text_may_be_a_tensor():
    images, texts = unit(torch.randn(4, 8)), unit(torch.randn(6, 8))
    owners = torch.tensor([0, 1, 2, 3, 3, 0])
    assert recall(images, texts, owners) == recall(images, texts, [[own] for own in owners.tolist()])


def test_a_picture_that_was_unreadable_once_is_read_again(tmp_path):
    """What is remembered with size and time alone would hide a picture whose rights were mended."""
    make_calls = []

    def make(rejected):
        make_calls.append(rejected)
        return {"images": torch.zeros(1, 2)}, {"rejected": "{}"} if rejected else {}

    cached(tmp_path, "key", lambda: make(True))
    assert not list(tmp_path.glob("*.safetensors"))
    cached(tmp_path, "key", lambda: make(False))
    cached(tmp_path, "key", lambda: make(False))
    assert make_calls == [True, False]  # the third call reads the file
