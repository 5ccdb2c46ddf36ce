"""What reaches the kernels: programs on a GPU that is not there, and commands in Triton's interpreter."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

pytest.importorskip("triton", reason="Triton is not installed; it is there for Linux only")
from pretend_gpu import HALF, Launches, on_gpu, pretend_gpu, shadowed, texts_of
from torch._subclasses.fake_tensor import unset_fake_temporarily

import miniclip.kernels.interpreter  # noqa: F401  (repairs the interpreter)
from miniclip import cosines, embed, load, zero_shot
from miniclip.commands import main
from miniclip.data.lists import Example
from miniclip.data.synthetic import create_synthetic
from miniclip.evaluation import classifiers, evaluate, report
from miniclip.evaluation.classifiers import ZeroShotClassifier
from miniclip.fast.clip import FastCLIP
from miniclip.kernels import contrastive_loss, dispatch, similarity
from miniclip.search import exact
from miniclip.training import loss


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


LARGE = {"attention_varlen", "add_layer_norm", "bias_quick_gelu", "similarity_topk"}


@pytest.mark.parametrize("pictures, classes, kernels", [(16_000, 4200, LARGE), (3, 40, set())])
@pytest.mark.parametrize("through", ["evaluate", "ZeroShotClassifier"])
def test_by_default_from_pictures_to_answers(through, pictures, classes, kernels, monkeypatch):
    """What a GPU would launch for whole programs. ViT-L/14, 32 pictures at a time, 256 texts at a time."""
    names, picture = [f"thing {i}" for i in range(classes)], Image.new("RGB", (8, 8))
    with pretend_gpu(monkeypatch) as mode:
        model, seen = on_gpu("ViT-L/14"), Launches()
        texts_of(monkeypatch, 9, 256 * 9)
        encode = model.encode_image
        monkeypatch.setattr(model, "encode_image", lambda x, **how: encode(x.expand(-1, -1, 224, 224), **how))
        for module in embed, zero_shot, report, classifiers:
            for name in "_encode", "nearest", "probabilities", "classify":
                if hasattr(module, name):
                    monkeypatch.setattr(module, name, shadowed(getattr(module, name), mode, seen))
        monkeypatch.setattr("miniclip.cosines._topk", lambda x, k: (x[:, :k], x[:, :k].long(), x[:, 0]))
        with unset_fake_temporarily():
            preprocess = lambda image: torch.zeros(3, 1, 1)  # noqa: E731
            monkeypatch.setattr(classifiers, "Preprocess", lambda config: preprocess)
            if through == "evaluate":
                examples = [Example(picture, (names[0],), source="a picture")] * pictures
                found = evaluate(model, preprocess, examples, classes=names, tasks="zero-shot")
                assert found["pictures"] == len(found["zero_shot"]["predictions"]) == pictures
            else:
                found = ZeroShotClassifier(model, names).predict([picture] * pictures)
                assert found == names[:1] * pictures
    assert dispatch.MEASURES.keys() & seen.names.keys() == kernels
    assert ("_softmax" in seen.names) == (through == "evaluate")  # whose ranks are computed there too
    assert seen.names["bmm"] + seen.names["mm"] + seen.names["addmm"] > 100  # both towers ran


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


def test_ranks_on_a_gpu():
    """Those of float32 cosines, for embeddings that float16 holds; far classes do not become equal at zero."""

    class OnGPU(torch.Tensor):
        is_cuda = True

    torch.manual_seed(0)
    images, classes = (F.normalize(torch.randn(n, 32), dim=1).half().float() for n in (50, 200))
    cosines, targets = F.normalize(images, dim=1) @ F.normalize(classes, dim=1).T, torch.randint(200, (50,))
    ((scores, own),) = zero_shot._scores(images, classes.T, targets, torch.ones(()).as_subclass(OnGPU))
    assert isinstance(scores, OnGPU) and torch.equal(own, targets)
    assert torch.equal(zero_shot.ranks(scores.as_subclass(torch.Tensor), own), zero_shot.ranks(cosines, targets))
    assert not torch.equal(zero_shot.ranks((1000 * cosines).softmax(1), own), zero_shot.ranks(cosines, targets))


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
    assert type(model) is FastCLIP and model.visual.transformer.resblocks[0].attn.backend is None  # as `on_gpu`
    classifier = ZeroShotClassifier(model, ["a red circle", "a blue square", "a green triangle"])
    images = F.normalize(torch.randn(5, 256), dim=1)
    scores = classifier.scores(images)
    assert classifier.predict(images) == [classifier.classes[i] for i in scores.argmax(1)]
    middle = scores.amax(1).sort().values[2:4].mean().item()
    assert [name is None for name in classifier.predict(images, middle)] == (scores.amax(1) < middle).tolist()
    classifier.probabilities(images)
    assert called == ["similarity_topk", "similarity_topk", "similarity_softmax"]


@pytest.fixture
def reached(monkeypatch) -> set[str]:
    """The kernels that ran, in Triton's interpreter: on the CPU everything is taken by its kernel."""
    names = set()
    for module, name in (
        (similarity, "similarity_softmax"),
        (similarity, "similarity_topk"),
        (contrastive_loss, "contrastive_loss"),
    ):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, name=name, real=real: names.add(name) or real(*args))
    for module in cosines, loss:
        monkeypatch.setattr(module, "use_kernel", lambda *_: True)
    return names


def scores(capsys, *arguments: str) -> list[float]:
    """All numbers below 1 that a command prints as JSON, in order."""
    capsys.readouterr()
    assert main([*map(str, arguments), "--json"]) == 0
    numbers = []
    json.loads(capsys.readouterr().out, parse_float=lambda text: numbers.append(float(text)))
    return numbers


def test_each_command_reaches_its_kernel(request, capsys, monkeypatch, tmp_path):
    picture, captions = tmp_path / "red.png", tmp_path / "captions.txt"
    Image.new("RGB", (64, 64), "red").save(picture)
    captions.write_text("".join(f"a {kind} thing\n" for kind in ("red", "blue", "green", "large", "small", "flat")))
    commands = {
        ("classify", picture, "--labels", "red,blue,a green thing", "--model", "tiny-ViT"): "similarity_softmax",
        ("evaluate", "sample", "--task", "zero-shot", "--model", "tiny-ViT"): "similarity_topk",
        ("search", captions, "something red", "--top", 4, "--model", "tiny-ViT"): "similarity_topk",
    }
    plain = [scores(capsys, *command) for command in commands]
    reached = request.getfixturevalue("reached")
    monkeypatch.setattr(exact, "top_k", exact.top_k_by_cosine)  # as where the model is on a GPU
    for (command, kernel), expected in zip(commands.items(), plain, strict=True):
        reached.clear()
        assert scores(capsys, *command) == pytest.approx(expected, abs=2e-5)
        assert reached == {kernel}


def test_training_reaches_the_loss_kernel(reached, monkeypatch, tmp_path):
    create_synthetic(tmp_path, train=2, val=1)
    monkeypatch.setitem(loss.LOSSES, "interpreted", loss.LOSSES["triton"])  # which the command takes on a GPU only
    for name, kernels in (("softmax", set()), ("interpreted", {"contrastive_loss"})):
        command = ["train", tmp_path / "train.json", "--loss", name, "--output", tmp_path / name, "--steps", 1]
        assert main([*map(str, command), "--batch-size", "6", "--device", "cpu"]) == 0
        assert reached == kernels
    lines = [
        json.loads((tmp_path / name / "log.jsonl").read_text().splitlines()[0]) for name in ("softmax", "interpreted")
    ]
    assert lines[0]["loss"] == pytest.approx(lines[1]["loss"], rel=1e-3)


def test_queries_on_a_gpu_are_searched_there(monkeypatch):
    """16 rows, so that all are candidates: which queries to compute again needs numbers, and here are none."""
    monkeypatch.setattr(exact, "AGAIN", 1 << 30)
    monkeypatch.setattr(cosines, "_topk", lambda x, k: (x[:, :k], x[:, :k].long(), x[:, 0]))
    for queries, kernel in ((1 << 22, False), ((1 << 22) + 1, True)):
        with pretend_gpu(monkeypatch), Launches() as seen:
            rows = torch.empty(16, 64, dtype=torch.float16)
            found = exact.top_k([rows[:7], rows[7:]], torch.empty(queries, 64, device="cuda"), 10)
        assert [x.device.type for x in found] == ["cpu", "cpu"] and found[1].shape == (queries, 10)
        assert bool(seen.names["similarity_topk"]) == kernel


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
