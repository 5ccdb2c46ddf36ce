"""Half a CLIP, and hidden states: against the whole model, and against transformers."""

import json

import pytest
import torch
from conformance.openai_cases import CASES
from conformance.seeded import image, text, weights
from safetensors.torch import load_file, save_file

from miniclip import load, trace
from miniclip.hidden import hidden_states
from miniclip.loading import blank_model, build_model
from miniclip.save import save_checkpoint
from miniclip.weights import CheckpointError
from miniclip.weights.names import from_canonical

CONFIG = CASES["vit"]


def whole():
    blank = blank_model(CONFIG, torch.float32).state_dict()
    return build_model(weights({name: tuple(tensor.shape) for name, tensor in blank.items()}), CONFIG)


def half(folder, tower: str, projection: bool):
    """A Hugging Face directory of one tower of the whole model."""
    model, words = whole(), "text" if tower == "text" else "vision"
    save_checkpoint(CONFIG, model.state_dict(), folder / "whole")
    config = json.loads((folder / "whole" / "config.json").read_text())
    suffix = "WithProjection" if projection else ""
    own = config[f"{words}_config"] | {"architectures": [f"CLIP{words.title()}Model{suffix}"]}
    own |= {"model_type": f"clip_{words}_model", "projection_dim": config["projection_dim"]}
    (folder / "half").mkdir()
    (folder / "half" / "config.json").write_text(json.dumps(own))
    if tower == "image":
        preprocessor = (folder / "whole" / "preprocessor_config.json").read_text()
        (folder / "half" / "preprocessor_config.json").write_text(preprocessor)
    names = {"text": ("text_model.", "text_projection"), "image": ("vision_model.", "visual_projection")}[tower]
    tensors = load_file(folder / "whole" / "model.safetensors")
    kept = {name: t for name, t in tensors.items() if name.startswith(names[: 1 + projection])}
    save_file(kept, folder / "half" / "model.safetensors")
    return folder / "half", model


@pytest.mark.parametrize("projection", [True, False])
def test_a_text_tower_alone(projection, tmp_path):
    folder, model = half(tmp_path, "text", projection)
    alone, _ = load(folder, "cpu")
    ids = text(3, 13, 301)
    with torch.no_grad():
        expected = model.encode_text(ids)
        if not projection:
            model.text_projection.data = torch.eye(64)
            expected = model.encode_text(ids)
        assert alone.config.embed_dim == (48 if projection else 64) and "visual.proj" not in alone.state_dict()
        torch.testing.assert_close(alone.encode_text(ids), expected, atol=1e-6, rtol=1e-5)
        for call in (lambda: alone.encode_image(image(1, 40)), lambda: alone(image(1, 40), ids)):
            with pytest.raises(ValueError, match="a text tower alone"):
                call()
    assert "text_embedding" in trace(alone, text=ids)


@pytest.mark.parametrize("projection", [True, False])
def test_an_image_tower_alone(projection, tmp_path):
    folder, model = half(tmp_path, "image", projection)
    alone, preprocess = load(folder, "cpu")
    pixels = image(3, 40)
    with torch.no_grad():
        if not projection:
            model.visual.proj.data = torch.eye(128)
        torch.testing.assert_close(alone.encode_image(pixels), model.encode_image(pixels), atol=1e-6, rtol=1e-5)
        for call in (lambda: alone.encode_text(text(1, 13, 301)), lambda: alone(pixels, text(1, 13, 301))):
            with pytest.raises(ValueError, match="an image tower alone"):
                call()
    assert preprocess.config == CONFIG.preprocess and "token_embedding.weight" not in alone.state_dict()
    assert load(folder, "cpu", dtype=torch.bfloat16)[0].dtype == torch.bfloat16
    assert "image_embedding" in trace(alone, image=pixels)


@pytest.mark.parametrize("tower", ["text", "image"])
def test_a_half_is_saved_and_loaded(tower, tmp_path):
    folder, _ = half(tmp_path, tower, True)
    alone, _ = load(folder, "cpu")
    save_checkpoint(alone.config, alone.state_dict(), tmp_path / "x.safetensors")
    again, _ = load(tmp_path / "x.safetensors", "cpu")
    assert again.config == alone.config
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in alone.state_dict().items())
    for name, message in (("x.pt", "can't hold"), ("x", "no directory format")):
        with pytest.raises(CheckpointError, match=message):
            save_checkpoint(alone.config, alone.state_dict(), tmp_path / name)


@pytest.mark.parametrize("tower", ["text", "image"])
def test_a_half_with_wrong_tensors(tower, tmp_path):
    folder, model = half(tmp_path, tower, True)
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if "layers.1.mlp.fc1.weight" in name)
    save_file({other: tensor for other, tensor in tensors.items() if other != name}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"1 missing:\n.*resblocks\.1\.mlp\.c_fc\.weight"):
        load(folder, "cpu")
    every = from_canonical("huggingface", model.state_dict())
    save_file({name: tensor.contiguous() for name, tensor in every.items()}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="unexpected"):
        load(folder, "cpu")


def test_a_projection_is_not_made_up(tmp_path):
    """Where the config states one of another width, its tensor must be there."""
    folder, _ = half(tmp_path, "text", True)
    tensors = load_file(folder / "model.safetensors")
    save_file({name: t for name, t in tensors.items() if "projection" not in name}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"1 missing:\n    text_projection \[64, 48\]"):
        load(folder, "cpu")


@pytest.mark.parametrize("tower", ["text", "image"])
def test_hidden_states(tower):
    model = whole()
    given = {"text": text(3, 13, 301)} if tower == "text" else {"image": image(2, 40)}
    layers = 2 if tower == "text" else 3
    with torch.no_grad():
        states = hidden_states(model, **given)
        assert len(states) == layers + 1
        if tower == "text":
            end = given["text"].argmax(dim=-1)
            pooled = model.ln_final(states[-1])[torch.arange(3), end] @ model.text_projection
            expected = model.encode_text(given["text"])
        else:
            pooled = model.visual.ln_post(states[-1][:, 0]) @ model.visual.proj
            expected = model.encode_image(given["image"])
    assert model.fast
    torch.testing.assert_close(pooled, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(states[-2], states[-1], atol=1e-2)


def test_hidden_states_of_what_has_none():
    model = whole()
    for given in ({}, {"text": text(1, 13, 301), "image": image(1, 40)}):
        with pytest.raises(ValueError, match="those of one tower"):
            hidden_states(model, **given)
    resnet, _ = load("tiny-RN", "cpu")
    with pytest.raises(ValueError, match="no transformer"):
        hidden_states(resnet, image=image(1, 64))


# Against transformers itself


@pytest.mark.parametrize("projection", [True, False])
@pytest.mark.parametrize("tower", ["text", "image"])
def test_transformers_computes_the_same(tower, projection, tmp_path):
    """Directories that it writes, its pooled outputs and all its hidden states."""
    transformers = pytest.importorskip("transformers")
    words = "Text" if tower == "text" else "Vision"
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    sizes |= {"projection_dim": 24, "hidden_act": "gelu"}
    if tower == "text":
        sizes |= {"vocab_size": 99, "max_position_embeddings": 11, "eos_token_id": 98, "bos_token_id": 97}
    else:
        sizes |= {"image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    kind = getattr(transformers, f"CLIP{words}Model{'WithProjection' if projection else ''}")
    theirs = kind(getattr(transformers, f"CLIP{words}Config")(**sizes)).eval()
    theirs.save_pretrained(tmp_path)
    if tower == "image":
        (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": 32, "crop_size": 32}))
    mine, _ = load(tmp_path, "cpu")
    given = text(2, 11, 99) if tower == "text" else image(2, 32)
    with torch.no_grad():
        options = {"input_ids": given} if tower == "text" else {"pixel_values": given}
        outputs = theirs(**options, output_hidden_states=True)
        pooled = outputs[0] if projection else outputs.pooler_output
        got = mine.encode_text(given) if tower == "text" else mine.encode_image(given)
        states = hidden_states(mine, **{tower: given})
    torch.testing.assert_close(got, pooled, atol=1e-5, rtol=1e-5)
    for state, expected in zip(states, outputs.hidden_states, strict=True):
        torch.testing.assert_close(state, expected, atol=1e-5, rtol=1e-5)
