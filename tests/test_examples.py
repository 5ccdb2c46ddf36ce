"""The example that people copy, and the model that it runs by default."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from miniclip import load, tokenize
from miniclip.preprocess import open_image

ROOT = Path(__file__).parents[1]
IMAGES = sorted((ROOT / "examples" / "images").glob("*.png"))


def zero_shot(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "examples" / "zero_shot.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "MINICLIP_OFFLINE": "1"})


def test_without_arguments_it_names_the_picture_that_ships():
    done = zero_shot()
    assert done.returncode == 0, done.stderr
    first, *rest = done.stdout.splitlines()
    assert first.endswith("%  elephant")
    assert len(rest) == 14


def test_a_picture_and_labels_of_ones_own():
    done = zero_shot(
        str(ROOT / "examples" / "images" / "rocket.png"), "--labels", "rocket, umbrella", "--model", "tiny-ViT"
    )
    assert [line.split()[1] for line in done.stdout.splitlines()] == ["rocket", "umbrella"]


def test_a_missing_picture_is_named():
    done = zero_shot("nowhere.png")
    assert done.returncode != 0
    assert "can't open the image nowhere.png" in done.stderr


@pytest.fixture(scope="module")
def tiny_vit():
    return load("tiny-ViT", device="cpu")


def test_tiny_vit_names_unseen_drawings(tiny_vit):
    """Twelve drawings of a set that it was not trained on; with shuffled weights it would name one of them."""
    model, preprocess = tiny_vit
    names = [path.stem.replace("-", " ") for path in IMAGES]
    with torch.inference_mode():
        logits, _ = model(torch.stack([preprocess(open_image(path)) for path in IMAGES]), tokenize(names))
    assert len(IMAGES) == 12
    assert (logits.argmax(dim=1) == torch.arange(12)).sum() >= 10


def test_tiny_vit_is_a_clip_in_everything_but_size(tiny_vit):
    model, _ = tiny_vit
    assert (model.vocab_size, model.context_length, model.visual.input_resolution) == (49408, 77, 64)
    for transformer in (model.config.vision.transformer, model.config.text.transformer):
        assert transformer.width == 64 * transformer.heads  # as openai/CLIP's build_model assumes
        assert transformer.activation == "quick_gelu"
    unused = ~model.token_embedding.weight.any(dim=1)
    assert 40_000 < unused.sum() < 45_000
