"""Products of eight-bit integers: how far embeddings move, and when they are not taken."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from miniclip import load, tokenize
from miniclip.fast import half, int8
from miniclip.models import CLIP

COSINE = 0.999
TEXTS = ["a photo of a dog", "cat", "a drawing of a red apple, on a table", "octopus", "a rocket in space"]
PICTURES = sorted((Path(__file__).parents[2] / "examples" / "images").glob("*.png"))

if torch.float32 not in half.ONEDNN_DTYPES:
    pytest.skip("PyTorch has no oneDNN here", allow_module_level=True)


@pytest.fixture(scope="module")
def models() -> tuple[CLIP, CLIP, torch.Tensor]:
    """Trained, since random weights have none of the outliers that make rounding hard; with pixels."""
    model, preprocess = load("tiny-ViT", device="cpu")
    pixels = torch.stack([preprocess(Image.open(path)) for path in PICTURES])
    return model, load("tiny-ViT", device="cpu", dtype="int8")[0], torch.cat([pixels, pixels.flip(3), pixels / 2])


@torch.no_grad()
def cosine(model: CLIP, other: CLIP, pixels: torch.Tensor) -> float:
    ids = tokenize(TEXTS)
    pairs = [(m.encode_image(pixels), m.encode_text(ids)) for m in (model, other)]
    return min(F.cosine_similarity(mine, theirs).min().item() for mine, theirs in zip(*pairs, strict=True))


def test_embeddings_stay_close(models):
    model, quantized, pixels = models
    found = cosine(model, quantized, pixels)
    assert COSINE <= found < 1 - 1e-6  # and integers were indeed used
    assert cosine(model, copy.deepcopy(quantized), pixels) == found


@pytest.mark.parametrize("limit", [127, 63])
def test_rounding_is_as_fine_as_the_bits_allow(limit, monkeypatch):
    """Of normal numbers: half of 1/127 or 1/63 of a row's largest weight, and of 1/255 of the range of activations."""
    if limit > int8.weight_limit():
        pytest.skip("this processor's sums overflow with weights of eight bits")
    monkeypatch.setattr(int8, "weight_limit", lambda: limit)
    x, weight = torch.randn(2, 128, 256, generator=torch.Generator().manual_seed(0))
    bias, total = torch.randn(2, 128, generator=torch.Generator().manual_seed(1))
    layer = int8.Int8Linear(weight, bias, torch.float32, 0.5, 2.0)
    exact = x @ weight.T / 2 + 2 * bias
    for found, expected in (
        (layer(x), exact),
        (layer(x, "silu"), torch.nn.functional.silu(exact)),
        (layer(x, "gelu"), torch.nn.functional.gelu(exact)),
        (layer.add(x, total.expand(128, -1).contiguous()), exact + total),
    ):
        assert 1e-4 < (found - expected).norm() / expected.norm() < (0.02 if limit == 127 else 0.03)


def test_constant_activations():
    layer = int8.Int8Linear(torch.eye(64), None, torch.float32)
    for value in (0.0, 2.0, -3.0):
        torch.testing.assert_close(layer(torch.full((5, 64), value)), torch.full((5, 64), value), atol=0.05, rtol=0)


def test_fewer_bits_are_not_enough(models, monkeypatch):
    """Negative control."""
    monkeypatch.setattr(int8, "weight_limit", lambda: 15)
    quantized = copy.deepcopy(models[1])
    assert cosine(models[0], quantized, models[2]) < COSINE


@torch.no_grad()
def test_the_model_itself_stays_float32(models):
    model, quantized, pixels = models
    tensors = quantized.state_dict()
    assert list(tensors) == list(model.state_dict())
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())
    plain = copy.deepcopy(quantized)
    plain.fast = False
    assert torch.equal(plain.encode_image(pixels), model.visual(pixels))


def test_what_cannot_be_quantised(models, monkeypatch):
    with pytest.raises(ValueError, match="expected a float32 model on the CPU"):
        int8.quantize(copy.deepcopy(models[0]).to(torch.bfloat16))
    with pytest.raises(ValueError, match="the model has none"):
        int8.quantize(torch.nn.Linear(2, 2))
    monkeypatch.setattr(half, "ONEDNN_DTYPES", frozenset())
    with pytest.raises(ValueError, match="int8 needs oneDNN"):
        int8.quantize(copy.deepcopy(models[0]))
