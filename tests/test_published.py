"""Published figures, on OpenAI's real checkpoints: pytest --weights

The checkpoints are taken from ~/.cache/clip or downloaded (4 GB for all nine). Pictures come from the folder that
MINICLIP_PICTURES names, ~/.cache/clip by default.
"""

import os
from pathlib import Path

import pytest
import torch

from miniclip import load, tokenize
from miniclip.config import MODELS
from miniclip.preprocess import open_image
from miniclip.weights.download import fetch

pytestmark = pytest.mark.weights

FOLDER = Path(os.environ.get("MINICLIP_PICTURES", Path.home() / ".cache" / "clip"))
README_PICTURE = "https://raw.githubusercontent.com/openai/CLIP/d05afc436d78f1c48dc0dbf8e5980a9d471f35f6/CLIP.png"
README_PICTURE_SHA256 = "308a3ca4503f1c7a07803916c369d78c4ef501e5ab7fc727da9b5e1d2f9ec85b"
COCO_PICTURE = "http://images.cocodataset.org/val2017/000000039769.jpg"


def logits(name: str, picture: Path, texts: list[str]) -> torch.Tensor:
    model, preprocess = load(name, device="cpu")
    with torch.inference_mode():
        return model(preprocess(open_image(picture)).unsqueeze(0), tokenize(texts))[0][0]


def test_the_picture_in_openais_readme():
    """github.com/openai/CLIP README: Label probs: [[0.9927937  0.00421068 0.00299572]]."""
    picture = fetch(README_PICTURE, FOLDER / "CLIP.png", README_PICTURE_SHA256)
    probabilities = logits("ViT-B/32", picture, ["a diagram", "a dog", "a cat"]).softmax(dim=-1)
    torch.testing.assert_close(probabilities, torch.tensor([0.9927937, 0.00421068, 0.00299572]), atol=1e-4, rtol=0)


def test_the_picture_in_transformers_tests():
    """transformers tests/models/clip/test_modeling_clip.py: logits 24.5701 and 19.3049, to 1e-3."""
    picture = FOLDER / "000000039769.jpg"
    if not picture.exists():
        pytest.skip(f"its checksum is not published: get {COCO_PICTURE} and put it at {picture}")
    result = logits("ViT-B/32", picture, ["a photo of a cat", "a photo of a dog"])
    torch.testing.assert_close(result, torch.tensor([24.5701, 19.3049]), atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", MODELS)
def test_every_released_file_loads(name):
    """The config that the file's shapes give is the one of the table, and the temperature is the clamped one."""
    model, _ = load(name, device="cpu")
    assert model.config == MODELS[name]
    assert model.logit_scale.exp().item() == pytest.approx(100, rel=1e-3)
