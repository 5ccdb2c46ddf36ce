"""MetaCLIP 2: token ids alone, pooled at an end-of-text token that does not have the largest id."""

import json

import pytest
import torch
from conformance.openai_cases import CASES
from conformance.seeded import image, weights
from safetensors.torch import save_file

from miniclip import load, trace
from miniclip.embed import embed_texts
from miniclip.errors import IncompleteModelError
from miniclip.hidden import hidden_states
from miniclip.loading import blank_model, build_model
from miniclip.openai.metaclip2 import MetaCLIP2
from miniclip.save import save_checkpoint
from miniclip.weights import CheckpointError

CONFIG = CASES["vit"]
VOCABULARY, END = CONFIG.text.vocab_size, 2
STATE = weights({name: tuple(tensor.shape) for name, tensor in blank_model(CONFIG, torch.float32).state_dict().items()})
MODEL_CFG = {
    "embed_dim": 48, "quick_gelu": True,
    "vision_cfg": {"image_size": 40, "layers": 3, "width": 128, "patch_size": 8},
    "text_cfg": {
        "context_length": 13, "vocab_size": VOCABULARY, "width": 64, "heads": 1, "layers": 2,
        "hf_tokenizer_name": "facebook/xlm-v-base", "pool_type": "eos", "eos_id": END,
    },
}  # fmt: skip


def ids() -> torch.Tensor:
    """As XLM-V's tokenizer: 0, words, 2, then 1 as padding; the last text has two ends."""
    x = torch.ones(4, 13, dtype=torch.long)
    for row in range(4):
        x[row, : row + 3] = torch.tensor([0, *range(100 + row, 101 + 2 * row), END])
    x[-1, 9] = END
    return x


def directory(folder, **text_cfg):
    folder.mkdir(exist_ok=True)
    cfg = MODEL_CFG | {"text_cfg": MODEL_CFG["text_cfg"] | text_cfg}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": cfg}))
    save_file(STATE, folder / "open_clip_model.safetensors")
    return folder


def test_the_first_end_is_pooled(tmp_path):
    """As a CLIP's largest id, if the two ids change places."""
    model, _ = load(directory(tmp_path / "x"), "cpu")
    order = torch.arange(VOCABULARY)
    order[[END, VOCABULARY - 1]] = order[[VOCABULARY - 1, END]]
    clip = build_model(STATE | {"token_embedding.weight": STATE["token_embedding.weight"][order]}, CONFIG)
    plain = build_model(STATE, CONFIG)
    with torch.no_grad():
        torch.testing.assert_close(model.encode_text(ids()), clip.encode_text(order[ids()]), atol=1e-6, rtol=1e-5)
        assert (model.encode_text(ids()) - plain.encode_text(ids())).abs().max() > 1e-2
        pixels = image(2, 40)
        torch.testing.assert_close(model.encode_image(pixels), plain.encode_image(pixels), atol=1e-6, rtol=1e-5)
        assert len(hidden_states(model, text=ids())) == 3
    assert "image_embedding" in trace(model, image=pixels)


def test_texts_are_refused(tmp_path):
    model, _ = load(directory(tmp_path / "x"), "cpu")
    given = ["a dog"]
    for call in (lambda: model.tokenize(given), lambda: embed_texts(model, given), lambda: trace(model, text=given)):
        with pytest.raises(IncompleteModelError, match="by facebook/xlm-v-base, which miniclip does not have"):
            call()


def test_it_is_saved_and_resized(tmp_path):
    model, _ = load(directory(tmp_path / "x"), "cpu")
    save_checkpoint(model.config, model.state_dict(), tmp_path / "y.safetensors")
    again, _ = load(tmp_path / "y.safetensors", "cpu")
    assert again.config == model.config and type(again) is MetaCLIP2
    assert torch.equal(again.encode_text(ids()), model.encode_text(ids()))
    with pytest.warns(UserWarning, match="interpolated"):
        assert load(tmp_path / "y.safetensors", "cpu", image_size=64)[0].config.vision.image_size == 64


@pytest.mark.parametrize(
    ("field", "value"), [("pool_type", "argmax"), ("eos_id", 10**6), ("eos_id", "2"), ("heads", 7)]
)
def test_other_configs_are_refused(field, value, tmp_path):
    expected = {"pool_type": "the tokenizer is not CLIP's", "eos_id": "end is|eos_id is", "heads": "heads is"}[field]
    with pytest.raises(CheckpointError, match=expected):
        load(directory(tmp_path / "x", **{field: value}), "cpu")


# Against the libraries themselves


def test_open_clip_computes_the_same(tmp_path):
    open_clip = pytest.importorskip("open_clip")
    theirs = open_clip.CLIP(**MODEL_CFG).eval()
    theirs.load_state_dict(STATE, strict=False)
    mine, _ = load(directory(tmp_path / "x"), "cpu")
    with torch.no_grad():
        torch.testing.assert_close(mine.encode_text(ids()), theirs.encode_text(ids()), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_transformers_computes_the_same(activation, tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"hidden_act": activation}
    special = {"eos_token_id": END, "bos_token_id": 0, "pad_token_id": 1}
    config = transformers.MetaClip2Config(
        text_config=sizes | special | {"vocab_size": VOCABULARY, "max_position_embeddings": 13},
        vision_config=sizes | {"image_size": 40, "patch_size": 8},
        projection_dim=24,
    )
    torch.manual_seed(0)
    theirs = transformers.MetaClip2Model(config).eval()
    theirs.save_pretrained(tmp_path / "x")
    mine, _ = load(tmp_path / "x", "cpu")
    assert type(mine) is MetaCLIP2
    with torch.no_grad():
        outputs = theirs(input_ids=ids(), pixel_values=image(2, 40))
        for got, expected in (
            (mine.encode_text(ids(), normalize=True), outputs.text_embeds),
            (mine.encode_image(image(2, 40), normalize=True), outputs.image_embeds),
        ):
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
