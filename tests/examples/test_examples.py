"""The example that people copy, and the model that it runs by default."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from miniclip import load, tokenize
from miniclip.config import ResNetConfig
from miniclip.errors import MiniclipError
from miniclip.loading import EMBEDDED
from miniclip.preprocess import open_image

ROOT = Path(__file__).parents[2]
IMAGES = sorted((ROOT / "examples" / "images").glob("*.png"))


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs one of examples/ offline, as a script but in this process; returns the lines that it printed."""
    monkeypatch.setenv("MINICLIP_OFFLINE", "1")

    def run(name: str, *arguments) -> list[str]:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
        return capsys.readouterr().out.splitlines()

    return run


def test_without_arguments_it_names_the_picture_that_ships():
    command = [sys.executable, ROOT / "examples" / "zero_shot.py"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "MINICLIP_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    first, *rest = done.stdout.splitlines()
    assert first.endswith("%  elephant")
    assert len(rest) == 14


def test_a_picture_and_labels_of_ones_own(run):
    rocket = ROOT / "examples" / "images" / "rocket.png"
    lines = run("zero_shot.py", rocket, "--labels", "rocket, umbrella", "--model", "tiny-ViT")
    assert [line.split()[1] for line in lines] == ["rocket", "umbrella"]


def test_a_missing_picture_is_named(run):
    with pytest.raises(MiniclipError, match=r"can't open the image nowhere\.png"):
        run("zero_shot.py", "nowhere.png")


def test_searching_photos(run, tmp_path):
    first, *rest = run("search_photos.py", "a guitar", "--index", tmp_path / "photos.index")
    assert first == "12 pictures, 12 of them new"
    assert rest[0].endswith("guitar.png") and len(rest) == 5


def test_prompt_ensembles_on_the_drawings_that_ship(run):
    title, *rows = run("prompt_ensembles.py", "--template", "{}", "a {} emoji", "a drawing of a {}")
    assert title == "240 pictures, 240 classes"
    accuracy = {row.split(")  ")[1]: float(row.split("%")[0]) for row in rows}
    assert accuracy["{}"] == pytest.approx(75.42, abs=2)  # tiny-RN, on drawings that it never saw
    assert accuracy["all, mean of embeddings"] > accuracy["all, mean of logits"] > accuracy["a {} emoji"]


def test_a_linear_probe_on_the_drawings_that_ship(run):
    pytest.importorskip("sklearn")
    title, zero_shot, probe = run("linear_probe.py")
    assert title.startswith("20 kinds; 120 pictures to learn from, 120 to name")
    assert float(probe.split("%")[0]) > 1.5 * float(zero_shot.split("%")[0]) > 10


@pytest.fixture(scope="module", params=("tiny-ViT", "tiny-RN"))
def tiny(request):
    return load(request.param, device="cpu")


def test_tiny_models_name_unseen_drawings(tiny):
    """Twelve drawings of a set that they were not trained on; with shuffled weights they would name one of them."""
    model, preprocess = tiny
    names = [path.stem.replace("-", " ") for path in IMAGES]
    with torch.inference_mode():
        logits, _ = model(torch.stack([preprocess(open_image(path)) for path in IMAGES]), tokenize(names))
    assert len(IMAGES) == 12
    assert (logits.argmax(dim=1) == torch.arange(12)).sum() >= 10


def test_tiny_models_are_clips_in_everything_but_size(tiny):
    model, _ = tiny
    assert (model.vocab_size, model.context_length, model.visual.input_resolution) == (49408, 77, 64)
    vision, transformers = model.config.vision, [model.config.text.transformer]
    if isinstance(vision, ResNetConfig):
        assert 32 * vision.width == 64 * vision.heads  # as openai/CLIP's build_model assumes
    else:
        transformers.append(vision.transformer)
    for transformer in transformers:
        assert transformer.width == 64 * transformer.heads  # likewise
        assert transformer.activation == "quick_gelu"
    unused = ~model.token_embedding.weight.any(dim=1)
    assert 40_000 < unused.sum() < 45_000
    for file in EMBEDDED.glob("*.gz"):
        assert file.stat().st_size < 16e6
