"""miniclip.training.embedded: a model made small, and what that must not change."""

from __future__ import annotations

import json

import torch

from miniclip.config import CLIPConfig, PreprocessConfig, TextConfig, ViTConfig, openai_transformer
from miniclip.loading import load
from miniclip.models import CLIP
from miniclip.tokenizer import tokenize
from miniclip.training.checkpoint import export_weights
from miniclip.training.embedded import forget_unused_tokens, main

CONFIG = CLIPConfig(
    32,
    ViTConfig(32, 16, openai_transformer(64, 1)),
    TextConfig(77, 49408, openai_transformer(64, 1)),
    PreprocessConfig(32),
)


def test_only_texts_with_other_words_change():
    torch.manual_seed(0)
    model = CLIP(CONFIG).eval()
    seen, unseen = tokenize(["a red apple", "pear"]), tokenize(["a green apple"])
    before = model.encode_text(seen), model.encode_text(unseen)
    assert forget_unused_tokens(model, ["a red apple", "pear"]) == 7  # 4 words, start, end, and 0, the padding
    assert torch.equal(model.encode_text(seen), before[0])
    assert not torch.allclose(model.encode_text(unseen), before[1], atol=1e-4)


def test_the_small_file_loads_and_is_small(tmp_path):
    torch.manual_seed(0)
    model = CLIP(CONFIG).eval()
    export_weights(model, tmp_path / "m.safetensors")
    (tmp_path / "l.json").write_text(json.dumps([{"image": "a.png", "captions": ["a red apple", "pear"]}]))
    for name in ("a.safetensors.gz", "b.safetensors.gz"):
        main(str(tmp_path / "m.safetensors"), str(tmp_path / "l.json"), str(tmp_path / name), "a photo of a {}")
    small = tmp_path / "a.safetensors.gz"
    assert small.read_bytes() == (tmp_path / "b.safetensors.gz").read_bytes()
    assert small.stat().st_size < 0.05 * (tmp_path / "m.safetensors").stat().st_size
    loaded, _ = load(small, device="cpu")
    text = tokenize(["a photo of a pear"])
    torch.testing.assert_close(loaded.encode_text(text), model.encode_text(text), atol=5e-3, rtol=0)
