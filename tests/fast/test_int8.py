"""Products of eight-bit integers: how far embeddings move, and when they are not taken."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from miniclip import load, tokenize
from miniclip.fast import int8
from miniclip.models import CLIP

COSINE = 0.999
TEXTS = ["a photo of a dog", "cat", "a drawing of a red apple, on a table", "octopus", "a rocket in space"]
PICTURES = sorted((Path(__file__).parents[2] / "examples" / "images").glob("*.png"))

if not set(int8.ENGINES) & set(torch.backends.quantized.supported_engines):
    pytest.skip("PyTorch has no int8 products here", allow_module_level=True)


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


def test_rounding_is_as_fine_as_the_bits_allow():
    """Of normal numbers: 1/127 of the largest weight, and of twice the largest activation, seven bits."""
    x, weight = torch.randn(2, 128, 256, generator=torch.Generator().manual_seed(0))
    exact = x @ weight.T
    assert 0.01 < (int8.product(x, int8._pack(weight)) - exact).norm() / exact.norm() < 0.02


def test_one_scale_for_all_tokens_is_not_enough(models, monkeypatch):
    """Negative control."""

    def coarse(x, weight):
        return torch.ops.quantized.linear_dynamic(x, weight, reduce_range=True)

    monkeypatch.setattr(int8, "product", coarse)
    assert cosine(*models) < COSINE


@torch.no_grad()
def test_the_model_itself_stays_float32(models):
    model, quantized, pixels = models
    tensors = quantized.state_dict()
    assert list(tensors) == list(model.state_dict())
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())
    plain = copy.deepcopy(quantized)
    plain.fast = False
    assert torch.equal(plain.encode_image(pixels), model.visual(pixels))
    half = copy.deepcopy(quantized).to(torch.bfloat16)  # the integers are of what the weights were
    assert half.encode_image(pixels).dtype == torch.bfloat16


@torch.no_grad()
def test_edited_weights_count_when_quantised_again(models):
    _, quantized, pixels = models
    edited = copy.deepcopy(quantized)
    edited.visual.transformer.resblocks[0].mlp.c_fc.weight.mul_(0.5)
    before = edited.encode_image(pixels)
    assert torch.equal(before, quantized.encode_image(pixels))
    assert not torch.equal(int8.quantize(edited).encode_image(pixels), before)


def test_what_cannot_be_quantised(models, monkeypatch):
    half = copy.deepcopy(models[0]).to(torch.bfloat16)
    with pytest.raises(ValueError, match="expected a float32 model on the CPU"):
        int8.quantize(half)
    monkeypatch.setattr(int8, "ENGINES", ("none",))
    with pytest.raises(ValueError, match=r"engines none; got \d+ blocks"):
        int8.quantize(copy.deepcopy(models[0]))
