"""What a user does with a SigLIP: classify, evaluate, search, trace, train; its probabilities are of each pair."""

import json
import zlib
from pathlib import Path

import pytest
import torch
from PIL import Image
from siglip_small import TEXTS, inputs

from miniclip import ZeroShotClassifier, classify, compare, embed_images, embed_texts, load, trace
from miniclip.commands import main
from miniclip.conformance.exported import trace_exported
from miniclip.conformance.files import TraceError
from miniclip.data.synthetic import create_synthetic
from miniclip.errors import UsageError
from miniclip.export import export_model
from miniclip.models import CLIP
from miniclip.training.gradient_cache import Embedder
from miniclip.training.options import TrainOptions
from miniclip.training.train import train
from miniclip.zero_shot import nearest, probabilities

IMAGES = Path(__file__).parents[2] / "examples" / "images"
LABELS = ["a dog", "a red house", "two cats"]


@pytest.fixture
def model(folder) -> CLIP:
    return load(folder, "cpu")[0]


@torch.no_grad()
def test_probabilities_are_of_each_pair(model, folder):
    """The sigmoid of the model's own scores, whatever the other labels are."""
    _, preprocess = load(folder, "cpu")
    pixels = preprocess(Image.open(IMAGES / "dog.png"))[None]
    expected = model(pixels, model.tokenize(LABELS))[0].sigmoid()[0].tolist()
    (found,) = classify(IMAGES / "dog.png", LABELS, model=str(folder))
    assert {label.label: label.score for label in found} == pytest.approx(
        dict(zip(LABELS, expected, strict=True)), rel=1e-4
    )
    assert abs(sum(expected) - 1) > 0.01  # they are no softmax
    ((alone,),) = classify(IMAGES / "dog.png", LABELS[:1], model=model)
    assert alone.score == pytest.approx(expected[0], rel=1e-4)
    for ensemble in ("embeddings", "logits"):
        classifier = ZeroShotClassifier(model, LABELS, ensemble=ensemble)
        assert classifier.probabilities(IMAGES / "dog.png")[0].tolist() == pytest.approx(expected, rel=1e-4)
        assert classifier.logits(IMAGES / "dog.png").sigmoid()[0].tolist() == pytest.approx(expected, rel=1e-4)
    with pytest.raises(UsageError, match="a single label"):
        classify(IMAGES / "dog.png", LABELS[:1], model="tiny-ViT")


def test_the_best_classes_have_the_probabilities_of_all(model):
    images, _ = embed_images(model, load_preprocess(model), sorted(IMAGES.glob("*.png"))[:3])
    weights = embed_texts(model, LABELS)[0].T
    scale, bias = model.logit_scale.exp(), model.logit_bias
    every = probabilities(images, weights, scale, bias)
    best, places = nearest(images, weights, scale, 2, logit_bias=bias)
    torch.testing.assert_close(best, every.topk(2).values)
    assert torch.equal(places, every.topk(2).indices)


def load_preprocess(model: CLIP):
    from miniclip.preprocess import Preprocess

    return Preprocess(model.config.preprocess)


def run(capsys, *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


def test_the_commands(folder, tmp_path, capsys):
    labels = ("--label", LABELS[0], "--label", LABELS[1])
    picture = IMAGES / "dog.png"
    (row,) = json.loads(run(capsys, "classify", picture, *labels, "--model", folder, "--json"))
    assert row["kind"] == "sigmoid" and abs(sum(row["probabilities"].values()) - 1) > 0.01
    assert "each label by itself" in run(capsys, "classify", picture, "--label", "a dog", "--model", folder)
    assert "by itself" not in run(capsys, "classify", picture, *labels, "--model", "tiny-ViT")
    run(capsys, "index", IMAGES, "--output", tmp_path / "index", "--model", folder)
    assert "dog" in run(capsys, "search", tmp_path / "index", "a dog", "--top", "20")
    run(capsys, "convert", folder, tmp_path / "x.safetensors")
    again = json.loads(run(capsys, "classify", picture, *labels, "--model", tmp_path / "x.safetensors", "--json"))
    assert again == [row]
    traced = tmp_path / "golden.safetensors"
    run(capsys, "trace", "--image", picture, "--text", "a dog", "--model", folder, "--output", traced)
    assert "all 29 stages that were given pass" in run(capsys, "compare", traced, traced, "--model", folder)


def test_traces_find_the_first_wrong_stage(model):
    golden = trace(model, Image.open(IMAGES / "dog.png"), TEXTS)
    assert compare(golden, golden).passed
    assert golden["logits_per_image"].shape == (1, 4) and golden["visual.pool"].shape == (1, 32)
    for stage in ("visual.pool.attn", "transformer.resblocks.1", "text.ids", "logits_per_image"):
        later = list(golden)[list(golden).index(stage) :]
        wrong = {
            n: x + 1 if n in later and not x.is_floating_point() else x * 1.1 if n in later else x
            for n, x in golden.items()
        }
        assert compare(golden, wrong).first_wrong == stage
    model.logit_bias.data += 1
    shifted = trace(model, Image.open(IMAGES / "dog.png"), TEXTS)
    assert compare(golden, shifted).first_wrong == "logits_per_image"


def test_training_goes_on_from_the_models_own_bias(folder, tmp_path):
    create_synthetic(tmp_path / "shapes", train=2, val=1)
    options = {"data": str(tmp_path / "shapes" / "train.json"), "val": str(tmp_path / "shapes" / "val.json")}
    options |= {
        "start_from": str(folder),
        "output": str(tmp_path / "run"),
        "steps": 3,
        "batch_size": 4,
        "loss": "sigmoid",
    }
    before, _ = load(folder, "cpu")
    trained = train(TrainOptions(**options, device="cpu"))
    assert trained.logit_bias.item() != before.logit_bias.item()
    assert abs(trained.logit_bias.item() - before.logit_bias.item()) < 0.5
    loaded, _ = load(tmp_path / "run", "cpu")
    assert torch.equal(loaded.tokenize(TEXTS), before.tokenize(TEXTS))
    state = load(tmp_path / "run" / "last.safetensors", "cpu")[0].state_dict()
    assert all(torch.equal(tensor, trained.state_dict()[name]) for name, tensor in state.items())


def test_which_bias_a_loss_takes(model):
    scale, bias = Embedder(model, -10.0).scalars()
    assert bias is model.logit_bias and bias.requires_grad and scale == model.logit_scale.exp()
    assert len(Embedder(model).scalars()) == 1 and not model.logit_bias.requires_grad


@pytest.mark.parametrize("format", ["torch", "onnx"])
@torch.no_grad()
def test_exported_towers(format, model, tmp_path):
    """They compute the model's embeddings; the tokenizer and the bias are beside them."""
    if format == "onnx":
        pytest.importorskip("onnxscript")
        onnxruntime = pytest.importorskip("onnxruntime")
    export_model(model, tmp_path / "out", format)
    pixels, ids = inputs(3)
    for tower, x, expected in (("image", pixels, model.encode_image(pixels)), ("text", ids, model.encode_text(ids))):
        if format == "onnx":
            session = onnxruntime.InferenceSession(tmp_path / "out" / f"{tower}.onnx")
            found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
        else:
            found = torch.export.load(tmp_path / "out" / f"{tower}.pt2").module()(x)
        expected = expected / expected.norm(dim=1, keepdim=True)
        assert (found - expected).abs().max() < 1e-5
        assert (found.roll(1, 0) - expected).abs().max() > 1e-3  # negative control
    description = json.loads((tmp_path / "out" / "config.json").read_text())
    assert description["logit_bias"] == model.logit_bias.item()
    content = (tmp_path / "out" / "tokenizer.model").read_bytes()
    assert content == zlib.decompress(bytes(model.tokenizer_file.numpy()))
    stages = trace_exported(tmp_path / "out", Image.open(IMAGES / "dog.png"), model.tokenize(TEXTS))
    assert compare(trace(model, Image.open(IMAGES / "dog.png"), TEXTS), stages).passed
    with pytest.raises(TraceError, match="give ids"):
        trace_exported(tmp_path / "out", text=TEXTS)
