"""Runs of a model in use against the first one: drift by hand, by chance, and by a real change."""

from __future__ import annotations

import json

import numpy as np
import pytest

from miniclip import commands
from miniclip.data.lists import DataError
from miniclip.evaluation.monitor import QUANTILES, describe, distance, monitor


def result(scores, rejected: int = 0) -> dict:
    answers = [{"probability": float(score)} for score in scores]
    return {
        "pictures": len(answers),
        "rejected": ["broken"] * rejected,
        "zero_shot": {"top1": 0.5, "predictions": answers},
    }


def test_the_distance_by_hand():
    """Of uniform scores in 0..1 a quarter lies above 0.75; of those in 0..0.75 none does."""
    one, other = QUANTILES.tolist(), (0.75 * QUANTILES).tolist()
    assert distance(one, one) == 0
    assert distance(one, other) == distance(other, one) == pytest.approx(0.25, abs=0.011)
    assert distance([0.1] * 101, [0.9] * 101) == 1


def test_runs_are_appended_and_compared_with_the_first(tmp_path):
    file = tmp_path / "runs.jsonl"
    random = np.random.default_rng(0)
    first = monitor(result(random.random(500)), file)
    assert first["drift"] == 0 and first["rejected"] == 0
    same, other = monitor(result(random.random(400)), file), monitor(result(random.random(400) ** 2, 100), file)
    assert same["drift"] < same["limit"] == pytest.approx(0.01 + 1.358 * (1 / 500 + 1 / 400) ** 0.5)
    assert other["drift"] > other["limit"] and other["rejected"] == 0.2
    assert "within chance" in describe(same) and "more than chance" in describe(other)
    assert [json.loads(line) for line in file.read_text().splitlines()] == [first, same, other]


def test_chance_exceeds_the_limit_in_few_runs(tmp_path):
    random, drifted = np.random.default_rng(1), 0
    for number in range(200):
        file = tmp_path / f"{number}.jsonl"
        monitor(result(random.random(300)), file)
        run = monitor(result(random.random(300)), file)
        drifted += run["drift"] > run["limit"]
    assert drifted <= 0.07 * 200


@pytest.mark.parametrize("content", ["a photo\n", "[1]\n", '{"time": 1}\n'])
def test_other_files_are_left_alone(tmp_path, content):
    file = tmp_path / "notes.txt"
    file.write_text(content)
    with pytest.raises(DataError):
        monitor(result([0.5]), file)
    assert file.read_text() == content


def test_the_command_watches_itself(tmp_path, capsys):
    arguments = ["evaluate", "sample", "--model", "tiny-ViT", "--monitor", str(tmp_path / "runs.jsonl")]
    for expected, more in ((0, []), (0, []), (1, ["--by", "category"])):
        assert commands.main([*arguments, "--task", "zero-shot", *more]) == 0
        assert ("more than chance" in capsys.readouterr().err) == expected
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == 3
    assert commands.main([*arguments, "--model", "tiny-RN"]) == 2
    assert "--monitor is for one model" in capsys.readouterr().err
