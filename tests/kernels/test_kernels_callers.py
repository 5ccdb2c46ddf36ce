"""Zero-shot classification reaches the similarity kernels: which functions the commands call, and what those run as."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

pytest.importorskip("triton", reason="Triton is not installed; it is there for Linux only")
from pretend_gpu import HALF, Launches, pretend_gpu

from miniclip import load, zero_shot
from miniclip.commands import main
from miniclip.evaluation.classifiers import ZeroShotClassifier
from miniclip.kernels import dispatch


@pytest.fixture
def called(monkeypatch) -> list[str]:
    """Which of the two operations were called."""
    names = []
    for name in ("similarity_softmax", "similarity_topk"):
        real = getattr(zero_shot, name)
        spy = lambda *args, name=name, real=real: names.append(name) or real(*args)  # noqa: E731
        monkeypatch.setattr(zero_shot, name, spy)
    return names


@pytest.mark.parametrize("pictures, kernel", [(3000, False), (3100, True)])
def test_nearest_classes_on_a_gpu(pictures, kernel, monkeypatch):
    """Of 21,841 classes: by the kernel from 2^26 logits on. The embeddings come from the CPU in float32."""
    with pretend_gpu(monkeypatch):
        images, weights = torch.empty(pictures, 512), torch.empty(21_841, 512).T
        monkeypatch.setattr("miniclip.cosines._topk", lambda x, k: (x[:, :k], x[:, :k].long(), x[:, 0]))
        with Launches() as seen:
            probability, index = zero_shot.nearest(images, weights, torch.ones((), device="cuda"), 5)
    assert bool(seen.names["similarity_topk"]) == kernel
    assert probability.device.type == index.device.type == "cpu" and index.shape == (pictures, 5)


def test_probabilities_on_a_gpu(monkeypatch):
    rule = dispatch.Rule(dispatch.ANY, dispatch.ANY, "timed")
    for rules, kernel in ({}, False), ({"sm_90": {"similarity_softmax": [rule]}}, True):
        with pretend_gpu(monkeypatch):
            monkeypatch.setattr(dispatch, "RULES", dispatch.RULES | rules)
            scale = torch.ones((), **HALF)  # of a float16 model; the kernel takes float32
            with Launches() as seen:
                found = zero_shot.probabilities(torch.empty(9, 512), torch.empty(512, 1000), scale)
            # classes lie side by side here, a column for each, which the kernel does not read: no default takes it
            assert not seen.names["similarity_softmax"]
            with Launches() as seen:
                found = zero_shot.probabilities(torch.empty(9, 512), torch.empty(1000, 512).T, scale)
            assert bool(seen.names["similarity_softmax"]) == kernel
            assert found.device.type == "cpu" and found.dtype == torch.float32
        monkeypatch.undo()


def test_the_same_numbers_as_by_hand(called):
    images, weights = (F.normalize(torch.randn(n, 16), dim=1) for n in (30, 40))
    expected = (100 * images @ weights.T).softmax(1)
    scale = torch.tensor(100.0, requires_grad=True)
    torch.testing.assert_close(zero_shot.probabilities(images, weights.T, scale), expected)
    probability, index = zero_shot.nearest(images, weights.T, scale, 3)
    torch.testing.assert_close((probability, index), tuple(expected.topk(3)))
    assert called == ["similarity_softmax", "similarity_topk"]


def test_the_classifier(called, tmp_path):
    model, _ = load("tiny-ViT", device="cpu")
    classifier = ZeroShotClassifier(model, ["a red circle", "a blue square", "a green triangle"])
    images = F.normalize(torch.randn(5, 256), dim=1)
    scores = classifier.scores(images)
    assert classifier.predict(images) == [classifier.classes[i] for i in scores.argmax(1)]
    middle = scores.amax(1).sort().values[2:4].mean().item()
    assert [name is None for name in classifier.predict(images, middle)] == (scores.amax(1) < middle).tolist()
    classifier.probabilities(images)
    assert called == ["similarity_topk", "similarity_topk", "similarity_softmax"]


def test_commands(called, tmp_path, capsys):
    picture = tmp_path / "red.png"
    Image.new("RGB", (64, 64), "red").save(picture)
    assert main(["classify", "--model", "tiny-ViT", "--labels", "a cat,a dog", "--json", str(picture)]) == 0
    assert sum(json.loads(capsys.readouterr().out)[0]["probabilities"].values()) == pytest.approx(1)
    assert called == ["similarity_softmax"]
    called.clear()
    assert main(["evaluate", "sample", "--model", "tiny-ViT", "--task", "zero-shot", "--json"]) == 0
    assert called == ["similarity_topk"]


def test_models_says_what_runs_as_what(capsys, monkeypatch):
    assert main(["models", "--backend", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(dispatch.MEASURES)
    assert all("torch   everywhere; the kernels need a GPU" in line for line in lines)
    monkeypatch.setattr(dispatch, "_why_never", lambda *_: None)
    monkeypatch.setattr(dispatch, "architecture", lambda device: "sm_90")
    assert main(["models", "--backend", "cpu", "--json"]) == 0
    rows = {row["operation"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["attention_varlen"]["runs as"] == "triton" and rows["attention"]["runs as"] == "torch"
