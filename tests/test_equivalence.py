"""The models against the outputs of openai/CLIP's own code, on weights made from a seed."""

import functools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conformance.openai_cases import CASES, IMAGES, TEXTS
from conformance.seeded import image, text, weights
from safetensors.torch import load_file

from miniclip import ops
from miniclip.models import CLIP, convert_weights

GOLDEN = load_file(Path(__file__).parent / "conformance" / "openai_outputs.safetensors")
EMBEDDING_TOLERANCE = 1e-5  # largest difference of unit embeddings, float32
COSINE = {torch.float16: 0.9999, torch.bfloat16: 0.999}  # least cosine with the float32 embedding


@functools.cache
def seeded_state_dict(case: str) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        model = CLIP(CASES[case])
    return weights({name: tuple(value.shape) for name, value in model.state_dict().items()})


def seeded_model(case: str) -> CLIP:
    model = CLIP(CASES[case]).eval()
    model.load_state_dict(seeded_state_dict(case))
    return model


@torch.no_grad()
def embeddings(model: CLIP) -> dict[str, torch.Tensor]:
    config = model.config
    images = image(IMAGES, config.vision.image_size)
    texts = text(TEXTS, config.text.context_length, config.text.vocab_size)
    return {
        "image_embedding": model.encode_image(images).float(),
        "text_embedding": model.encode_text(texts).float(),
        "logits_per_image": model(images, texts)[0].float(),
    }


def unit_difference(case: str, model: CLIP) -> float:
    """Largest difference between the unit embeddings of `model` and the golden ones."""
    mine = embeddings(model)
    return max(
        (F.normalize(mine[key]) - F.normalize(GOLDEN[f"{case}/{key}"])).abs().max().item()
        for key in ("image_embedding", "text_embedding")
    )


@pytest.mark.parametrize("case", CASES)
def test_float32_equals_openai(case):
    model = seeded_model(case)
    assert unit_difference(case, model) <= EMBEDDING_TOLERANCE
    mine, golden = embeddings(model), {key: GOLDEN[f"{case}/{key}"] for key in ("image_embedding", "text_embedding")}
    for key, value in golden.items():  # the length of the raw embeddings too
        torch.testing.assert_close(mine[key], value, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mine["logits_per_image"], GOLDEN[f"{case}/logits_per_image"], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("dtype", COSINE, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_half_precision_stays_close(case, dtype):
    mine = embeddings(convert_weights(seeded_model(case), dtype))
    for key in ("image_embedding", "text_embedding"):
        assert F.cosine_similarity(mine[key], GOLDEN[f"{case}/{key}"]).min() >= COSINE[dtype]


@pytest.mark.parametrize("case", CASES)
def test_float64_shows_that_what_remains_is_rounding(case):
    assert unit_difference(case, convert_weights(seeded_model(case), torch.float64)) <= 1e-6


# Negative controls: each mistake must be seen by the comparison above.


def test_gelu_fails(monkeypatch):
    monkeypatch.setitem(ops.ACTIVATIONS, "quick_gelu", F.gelu)
    assert unit_difference("vit", seeded_model("vit")) > 100 * EMBEDDING_TOLERANCE


def test_losing_the_causal_mask_fails():
    model = seeded_model("resnet")
    model.transformer.causal = False
    assert unit_difference("resnet", model) > 100 * EMBEDDING_TOLERANCE


def test_a_causal_image_tower_fails():
    model = seeded_model("vit")
    model.visual.transformer.causal = True
    assert unit_difference("vit", model) > 100 * EMBEDDING_TOLERANCE


def test_reading_out_the_last_token_fails(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "argmax", lambda ids, dim: torch.full((len(ids),), ids.shape[1] - 1))
    assert unit_difference("vit", seeded_model("vit")) > 100 * EMBEDDING_TOLERANCE


def test_a_transposed_attention_layout_fails(monkeypatch):
    plain = ops.attention

    def head_major(qkv, causal, backend=None):
        heads = qkv.shape[3]
        return plain(qkv.flatten(2).unflatten(-1, (heads, 3, -1)).transpose(2, 3), causal)

    monkeypatch.setattr(ops, "attention", head_major)
    assert unit_difference("vit", seeded_model("vit")) > 100 * EMBEDDING_TOLERANCE


@pytest.mark.parametrize("eps", [1e-6, 1e-3])
def test_another_layer_norm_eps_fails(eps):
    model = seeded_model("vit")
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = eps
    assert unit_difference("vit", model) > 2 * EMBEDDING_TOLERANCE


def test_openai_itself_agrees_live():
    """The same comparison against the code, where it is installed, so that the goldens cannot go stale unnoticed."""
    openai = pytest.importorskip("clip.model")
    for case in CASES:
        model = seeded_model(case)
        theirs = openai.build_model(model.state_dict()).float()
        theirs.load_state_dict(model.state_dict())
        images = image(IMAGES, model.config.vision.image_size)
        with torch.no_grad():
            torch.testing.assert_close(model.encode_image(images), theirs.encode_image(images), atol=1e-6, rtol=1e-5)
