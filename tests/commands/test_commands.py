"""The commands, run as a user runs them, on a small model with OpenAI's vocabulary."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from miniclip import load, tokenize
from miniclip.commands import main
from miniclip.config import MODELS, CLIPConfig, PreprocessConfig, TextConfig, ViTConfig, openai_transformer
from miniclip.models import CLIP
from miniclip.preprocess import open_image

CONFIG = CLIPConfig(
    embed_dim=32,
    vision=ViTConfig(32, 8, openai_transformer(64, 1)),
    text=TextConfig(77, 49408, openai_transformer(64, 1)),
    preprocess=PreprocessConfig(32),
)
IMAGES = Path(__file__).parents[2] / "examples" / "images"
PICTURES = [str(IMAGES / name) for name in ("dog.png", "guitar.png", "pizza.png")]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model") / "small.safetensors"
    save_file(CLIP(CONFIG).state_dict(), path)
    return str(path)


def probabilities(model: str, picture: str, labels: list[str]) -> list[float]:
    """What openai/CLIP's own example computes."""
    clip, preprocess = load(model, device="cpu")
    with torch.no_grad():
        logits, _ = clip(preprocess(open_image(picture)).unsqueeze(0), tokenize(labels))
    return logits[0].softmax(dim=-1).tolist()


def test_models(capsys):
    assert main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:10]] == list(MODELS)[:9]
    assert "151,277,313" in next(line for line in lines if line.startswith("ViT-B/32"))
    assert main(["models", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    # payload of the released file, which is 0.2% larger
    assert rows["ViT-B/32"]["bytes"] == 353_436_676
    assert rows["RN50"]["bytes"] == 255_262_844
    assert rows["ViT-L/14@336px"]["pixels"] == 336


def test_classify(model, capsys):
    labels = ["a dog", "a guitar", "a slice of pizza"]
    assert main(["classify", *PICTURES, "--labels", ", ".join(labels), "--model", model, "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert [result["image"] for result in results] == PICTURES
    for result in results:
        expected = probabilities(model, result["image"], labels)
        assert list(result["probabilities"]) == labels
        np.testing.assert_allclose(list(result["probabilities"].values()), expected, atol=1e-6)


def test_classify_prints_the_likeliest_first(model, capsys):
    labels = ["dog", "guitar", "pizza"]
    options = ["--labels", ",".join(labels), "--template", "a photo of a {}.", "--model", model]
    assert main(["classify", PICTURES[0], *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == PICTURES[0]
    expected = probabilities(model, PICTURES[0], [f"a photo of a {label}." for label in labels])
    ranked = sorted(zip(expected, labels, strict=True), reverse=True)
    assert [line.split() for line in lines[1:]] == [[f"{p:.2%}", label] for p, label in ranked]


def test_classify_draws(model, tmp_path):
    plot = tmp_path / "plot.png"
    assert main(["classify", *PICTURES, "--labels", "dog,guitar", "--model", model, "--plot", str(plot)]) == 0
    assert Image.open(plot).size[1] > 900  # three rows


def test_embed_pictures_and_texts(model, tmp_path, capsys):
    texts = tmp_path / "lines.txt"
    texts.write_text("a dog\n\na guitar\n" + "word " * 100 + "\n", encoding="utf-8")
    folder = tmp_path / "folder"
    folder.mkdir()
    for picture in PICTURES:
        shutil.copy(picture, folder)
    broken = folder / "broken.jpg"
    broken.write_bytes(Path(PICTURES[0]).read_bytes()[:500])
    (folder / "notes.md").write_text("not a picture")
    output = tmp_path / "out.safetensors"

    status = main(["embed", str(folder), str(texts), "-o", str(output), "--model", model, "--batch-size", "2"])
    assert status == 1  # some were bad, and the rest is there
    errors = capsys.readouterr().err
    assert str(broken) in errors
    assert f"{texts}:4" in errors
    assert "2 of 7 inputs could not be used" in errors

    with safe_open(output, "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["images"]) == [str(folder / Path(picture).name) for picture in PICTURES]
    assert json.loads(metadata["texts"]) == ["a dog", "a guitar"]
    clip, preprocess = load(model, device="cpu")
    with torch.no_grad():
        images = clip.encode_image(torch.stack([preprocess(open_image(p)) for p in PICTURES]), normalize=True)
        words = clip.encode_text(tokenize(["a dog", "a guitar"]), normalize=True)
    embeddings = load_file(output)
    torch.testing.assert_close(embeddings["images"], images, atol=1e-6, rtol=0)
    torch.testing.assert_close(embeddings["texts"], words, atol=1e-6, rtol=0)


def test_convert(model, tmp_path):
    for output in ("a.pt", "b", "c.safetensors"):
        assert main(["convert", model, str(tmp_path / output)]) == 0
        model = str(tmp_path / output)
    original = CLIP(CONFIG).state_dict()
    assert load_file(tmp_path / "c.safetensors").keys() == original.keys()
    assert torch.load(tmp_path / "a.pt", weights_only=True).keys() == original.keys()
    assert json.loads((tmp_path / "b" / "config.json").read_text())["model_type"] == "clip"


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["classify", PICTURES[0], "--labels", "a", "--model", "ViT-B-32"], "nor one of the models: RN50"),
        (["classify", PICTURES[0], "--labels", " , "], "--labels: it is empty"),
        (["classify", PICTURES[0], "--labels", "a", "--template", "a photo"], "expected {} where the label goes"),
        (["classify", PICTURES[0], "--labels", "a", "--plot", "x.doc"], ".png, .svg or .pdf"),
        (["embed", PICTURES[0], "-o", "x.npy"], "ends in .safetensors"),
        (["embed", PICTURES[0], "-o", "nowhere/x.safetensors"], "there is no folder nowhere"),
        (["embed", str(Path(__file__).parents[2] / "kernels"), "-o", "x.safetensors"], "no pictures or lines of text"),
        (["train"], "no data to train on"),
        (["convert", "nothing.pt", "x"], "nothing.pt is neither a file or directory"),
    ],
)
def test_bad_arguments(arguments, fault, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("miniclip: error: ")
    assert fault in error


@pytest.mark.parametrize("option", [["--device", "gpu"], ["--batch-size", "0"], ["--dtype", "int3"]])
def test_bad_options(option, capsys):
    assert main(["embed", PICTURES[0], "-o", "x.safetensors", *option]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"miniclip: error: argument {option[0]}: ") and option[1] in error
    assert "`miniclip embed --help` lists the options" in error


def test_python_m_miniclip():
    done = subprocess.run([sys.executable, "-m", "miniclip", "--help"], capture_output=True, text=True, check=True)
    for command in ("models", "classify", "embed", "evaluate", "train", "convert"):
        assert command in done.stdout
