"""SigLIP's towers against the same written in NumPy, in float64, from transformers' tensors."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import save_file
from siglip_small import difference, huggingface_directory, huggingface_json, inputs, reference, small

from miniclip import load
from miniclip.loading import new_model
from miniclip.models import CLIP
from miniclip.save import save_checkpoint
from miniclip.siglip.towers import SigLIP
from miniclip.weights import CheckpointError

TOLERANCE = 1e-5  # largest difference of unit embeddings


@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu"])
def test_towers(activation, tmp_path):
    config = small(activation)
    tensors = huggingface_directory(tmp_path, config)
    model, preprocess = load(tmp_path, "cpu")
    assert isinstance(model, SigLIP) and model.config == config and preprocess.config == config.preprocess
    expected = reference(config, tensors, *inputs())
    assert difference(model, expected) < TOLERANCE


def test_a_wrong_tensor_or_step_shows(tmp_path):
    """Negative controls: each tensor, the GELU, the mask, the pooled token and the eps have an influence."""
    config = small()
    tensors = huggingface_directory(tmp_path, config)
    model, _ = load(tmp_path, "cpu")
    pixels, ids = inputs()
    for name, x in tensors.items():
        if name.endswith("k_proj.bias"):  # adds the same to all scores of a query, which softmax cancels
            continue
        changed = tensors | {name: x * 1.05 + (0.05 if x.ndim == 1 else 0)}
        assert difference(model, reference(config, changed, pixels, ids)) > TOLERANCE, name
    expected = reference(config, tensors, pixels, ids)
    for change in (_exact_gelu, _causal, _rolled, _eps):
        wrong, _ = load(tmp_path, "cpu")
        change(wrong)
        assert difference(wrong, expected) > TOLERANCE, change


def _exact_gelu(model: CLIP) -> None:
    for module in model.modules():
        if hasattr(module, "activation"):
            module.activation = "gelu"


def _causal(model: CLIP) -> None:
    model.transformer.causal = True


def _rolled(model: CLIP) -> None:
    model.ln_final.register_forward_hook(lambda module, inputs, output: output.roll(1, 1))


def _eps(model: CLIP) -> None:
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-3


@pytest.mark.parametrize(("dtype", "cosine"), [(torch.bfloat16, 0.999), (torch.float16, 0.9999)])
def test_half_precision(dtype, cosine, tmp_path):
    huggingface_directory(tmp_path)
    (exact, _), (model, _) = load(tmp_path, "cpu"), load(tmp_path, "cpu", dtype=dtype)
    pixels, ids = inputs()
    with torch.no_grad():
        for a, b in (
            (exact.encode_image(pixels), model.encode_image(pixels)),
            (exact.encode_text(ids), model.encode_text(ids)),
        ):
            assert b.dtype == dtype and torch.cosine_similarity(a, b.float()).min() > cosine


def test_texts_of_another_length_are_refused():
    model = new_model(small()).eval()
    for ids in (torch.zeros(1, 77, dtype=torch.int32), torch.zeros(1, 5, dtype=torch.int32)):
        with pytest.raises(ValueError, match=r"expected \[N, 16\] with the padding"):
            model.encode_text(ids)


def test_saved_and_loaded(tmp_path):
    torch.manual_seed(0)
    model = new_model(small()).eval()
    save_checkpoint(model.config, model.state_dict(), tmp_path / "x.safetensors")
    loaded, _ = load(tmp_path / "x.safetensors", "cpu")
    assert loaded.config == model.config
    assert all(torch.equal(x, loaded.state_dict()[name]) for name, x in model.state_dict().items())
    with pytest.raises(CheckpointError, match="can't hold"):
        save_checkpoint(model.config, model.state_dict(), tmp_path / "x.pt")


# Files that are wrong.


def broken(folder, section: str, change: dict) -> None:
    huggingface_directory(folder)
    values = huggingface_json(small())
    (values[section] if section else values).update(change)
    (folder / "config.json").write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("", {"model_type": "siglip2"}, "any shape"),
        ("text_config", {"hidden_act": "relu"}, r"text_config\.hidden_act is 'relu'; expected"),
        ("text_config", {"layer_norm_eps": 1e-5}, r"text_config\.layer_norm_eps is 1e-05; expected 1e-06"),
        ("text_config", {"projection_size": 64}, r"text_config\.projection_size is 64; expected 32"),
        ("text_config", {"num_attention_heads": 5}, "expected a divisor of 24"),
        ("text_config", {"num_hidden_layers": 10**9}, r"text_config\.num_hidden_layers"),
        ("text_config", {"num_hidden_layers": 3}, "missing"),
        ("text_config", {"vocab_size": True}, r"text_config\.vocab_size is True"),
        ("vision_config", {"vision_use_head": False}, r"vision_config\.vision_use_head"),
        ("vision_config", {"image_size": [30, 30]}, r"vision_config\.image_size"),
        ("vision_config", {"patch_size": 31}, "patch_size is 31"),
        ("vision_config", {"image_size": 38}, "size is"),
        ("", {"vision_config": []}, "vision_config is"),
    ],
)
def test_wrong_configs(section, change, message, tmp_path):
    broken(tmp_path, section, change)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path, "cpu")


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("preprocessor_config.json", {"size": {"shortest_edge": 30}, "crop_size": 30}, "are cropped"),
        ("preprocessor_config.json", {"do_pad": True}, "do_pad"),
        ("tokenizer_config.json", {"tokenizer_class": "BertTokenizer"}, "tokenizer_class is 'BertTokenizer'; expected"),
        ("tokenizer_config.json", {"tokenizer_class": 3}, "tokenizer_class is 3"),
        ("tokenizer_config.json", {"pad_token": 3}, "pad_token is 3; expected the spelling"),
        ("tokenizer_config.json", {"do_lower_case": False}, "do_lower_case"),
    ],
)
def test_wrong_files_beside_it(file, change, message, tmp_path):
    huggingface_directory(tmp_path)
    path = tmp_path / file
    values = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(values | change))
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path, "cpu")


def test_a_file_without_its_config(tmp_path):
    tensors = huggingface_directory(tmp_path / "model")
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"x\.safetensors: this is a SigLIP, and its tensors tell neither"):
        load(tmp_path / "x.safetensors")
    del tensors["logit_bias"]
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"1 missing:\n    logit_bias"):
        load(tmp_path / "model", "cpu")


def test_configs_that_describe_no_model():
    with pytest.raises(ValueError, match="embed_dim is 24; expected the width of the image tower, 32"):
        dataclasses.replace(small(), embed_dim=24)
    with pytest.raises(ValueError, match="cleaning is 'none'; expected one of"):
        dataclasses.replace(small().text, cleaning="none")
