"""Whole models with all their kernels, in Triton's interpreter: what a GPU would run, on the CPU."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import HALVES
from pretend_gpu import Launches

from miniclip import ops
from miniclip.config import CLIPConfig, PreprocessConfig, TextConfig, TransformerConfig, ViTConfig
from miniclip.fast import gpu
from miniclip.fast import ops as fused
from miniclip.models import CLIP, convert_weights

COSINE = {torch.float16: 0.99999, torch.bfloat16: 0.9995}


def small_clip(dtype: torch.dtype, activation: str = "quick_gelu") -> CLIP:
    torch.manual_seed(0)
    block = TransformerConfig(width=64, layers=2, heads=2, mlp_width=128, activation=activation)
    config = CLIPConfig(16, ViTConfig(16, 8, block), TextConfig(12, 50, block), PreprocessConfig(16))
    return convert_weights(CLIP(config), dtype).eval()


def embeddings(model: CLIP, form) -> list[torch.Tensor]:
    """Of three pictures and four texts, by the plain form or by the GPU's."""
    image = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1)).to(model.dtype)
    text = torch.randint(1, 49, (4, 12), generator=torch.Generator().manual_seed(2))
    for row, end in enumerate([2, 11, 0, 6]):
        text[row, end], text[row, end + 1 :] = 49, 0
    with torch.no_grad():
        if form is gpu:
            return [gpu.image_embedding(model.visual, image), gpu.text_embedding(model, text)]
        return [model.encode_image(image), model.encode_text(text)]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_the_form_for_gpus_with_all_kernels(dtype, activation, monkeypatch):
    expected = embeddings(small_clip(torch.float32, activation), None)
    model = small_clip(dtype, activation)
    pytorch = embeddings(model, gpu)
    for module in ops, fused, gpu:
        monkeypatch.setattr(module, "use_kernel", lambda *_: True)
    seen = Counter()
    with Launches() as launches:
        embeddings(model, gpu)
    seen = launches.names
    assert seen["attention"] == 2 and seen["attention_varlen"] == 2 and seen["add_layer_norm"] == 6
    assert seen["bias_quick_gelu"] == (4 if activation == "quick_gelu" else 0)
    for exact, plain, kernels in zip(expected, pytorch, embeddings(model, gpu), strict=True):
        assert F.cosine_similarity(exact, plain.float()).min() > COSINE[dtype]
        assert F.cosine_similarity(exact, kernels.float()).min() > COSINE[dtype]


def test_the_plain_form_with_kernels(monkeypatch):
    model = small_clip(torch.bfloat16)
    plain = embeddings(model, None)
    monkeypatch.setattr(ops, "use_kernel", lambda *_: True)
    with Launches() as launches:
        kernels = embeddings(model, None)
    assert launches.names["attention"] == 4
    for a, b in zip(plain, kernels, strict=True):
        assert F.cosine_similarity(a.float(), b.float()).min() > COSINE[torch.bfloat16]
