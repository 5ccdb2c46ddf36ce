"""Whatever is written carries its config: `load` gives the same function back, in every bit, with no argument."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from conformance.seeded import image, text, weights
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mobileclip.mobileclip_small import SMALL_TEXT, small, tiny
from safetensors.torch import load_file, save_file

from miniclip.config import (
    ACTIVATIONS,
    INTERPOLATIONS,
    MODELS,
    RESIZE_MODES,
    CLIPConfig,
    PreprocessConfig,
    ResNetConfig,
    TextConfig,
    TransformerConfig,
    ViTConfig,
    from_json,
    openai_transformer,
    to_json,
)
from miniclip.errors import MiniclipError
from miniclip.loading import EMBEDDED, blank_model, build_model, load
from miniclip.mobileclip.config import ConvViTConfig
from miniclip.preprocess import Preprocess
from miniclip.save import save_checkpoint
from miniclip.weights import CheckpointError
from miniclip.weights.files import read_file

PLAIN = CLIPConfig(  # what shapes alone can tell
    8, ViTConfig(16, 8, openai_transformer(64, 1)), TextConfig(6, 20, openai_transformer(64, 2)), PreprocessConfig(16)
)


def gelu(config: CLIPConfig) -> CLIPConfig:
    transformers = (dataclasses.replace(tower.transformer, activation="gelu") for tower in (config.vision, config.text))
    vision, words = (
        dataclasses.replace(tower, transformer=transformer)
        for tower, transformer in zip((config.vision, config.text), transformers, strict=True)
    )
    return dataclasses.replace(config, vision=vision, text=words)


@st.composite
def transformers(draw) -> TransformerConfig:
    heads = draw(st.integers(1, 5))
    width = heads * draw(st.integers(1, 9))
    return TransformerConfig(
        width, draw(st.integers(1, 2)), heads, draw(st.integers(1, 50)), draw(st.sampled_from(ACTIVATIONS))
    )


@st.composite
def visions(draw):
    if draw(st.booleans()):
        patch = draw(st.integers(1, 9))
        return ViTConfig(patch * draw(st.integers(1, 3)) + draw(st.integers(0, patch - 1)), patch, draw(transformers()))
    heads, width = draw(st.sampled_from([(1, 2), (3, 6), (4, 2), (5, 10), (2, 4)]))
    return ResNetConfig(
        32 * draw(st.integers(1, 2)), width, tuple(draw(st.lists(st.integers(1, 2), min_size=4, max_size=4))), heads
    )


def numbers(least: float, most: float):
    return st.tuples(*[st.floats(least, most, allow_subnormal=False)] * 3)


@st.composite
def configs(draw) -> CLIPConfig:
    vision = draw(visions())
    preprocess = PreprocessConfig(
        vision.image_size,
        mean=draw(numbers(-2, 2)),
        std=draw(numbers(0.01, 200)),
        interpolation=draw(st.sampled_from(INTERPOLATIONS)),
        resize_mode=draw(st.sampled_from(RESIZE_MODES)),
    )
    words = TextConfig(draw(st.integers(2, 12)), draw(st.integers(4, 40)), draw(transformers()))
    if draw(st.booleans()):  # a model that shapes tell all about
        words = dataclasses.replace(words, transformer=openai_transformer(64, 1))
        preprocess = PreprocessConfig(vision.image_size)
        if isinstance(vision, ViTConfig):
            image_size = vision.image_size // vision.patch_size * vision.patch_size
            vision = ViTConfig(image_size, vision.patch_size, openai_transformer(128, 2))
            preprocess = PreprocessConfig(image_size)
    return CLIPConfig(draw(st.integers(1, 20)), vision, words, preprocess)


def state_of(config: CLIPConfig) -> dict[str, torch.Tensor]:
    return weights({name: tuple(t.shape) for name, t in blank_model(config, torch.float32).state_dict().items()})


@torch.no_grad()
def embeddings(model) -> torch.Tensor:
    config = model.config
    pixels = image(2, config.vision.image_size)
    ids = text(2, config.text.context_length, config.text.vocab_size)
    return torch.cat([model.encode_image(pixels), model.encode_text(ids)])


def assert_same_function(path: Path, config: CLIPConfig, tensors: dict[str, torch.Tensor]) -> None:
    model, preprocess = load(path, "cpu")
    assert model.config == config and preprocess == Preprocess(config.preprocess)
    assert torch.equal(embeddings(model), embeddings(build_model(tensors, config)))


@given(config=configs())
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_every_format_gives_the_same_function_or_refuses(config, tmp_path_factory):
    folder, tensors = tmp_path_factory.mktemp("x"), state_of(config)
    save_checkpoint(config, tensors, folder / "x.safetensors")
    assert_same_function(folder / "x.safetensors", config, tensors)
    assert from_json(json.loads(json.dumps(to_json(config)))) == config
    for name in ("x.pt", "directory"):
        try:
            save_checkpoint(config, tensors, folder / name)
        except CheckpointError as error:
            assert "Use .safetensors" in str(error) or "no ResNets" in str(error)
            assert not (folder / name).exists()
        else:
            assert_same_function(folder / name, config, tensors)
        assert (folder / "directory").exists() == (name == "directory" and isinstance(config.vision, ViTConfig))


def test_what_a_state_dict_holds_and_what_not(tmp_path):
    """The refusal names each field that would be another one, and its two values."""
    tensors = state_of(PLAIN)
    save_checkpoint(PLAIN, tensors, tmp_path / "plain.pt")
    assert_same_function(tmp_path / "plain.pt", PLAIN, tensors)
    other = dataclasses.replace(gelu(PLAIN), preprocess=PreprocessConfig(16, std=(1.0, 1.0, 1.0)))
    with pytest.raises(CheckpointError) as error:
        save_checkpoint(other, tensors, tmp_path / "other.pt")
    for line in ("vision.transformer.activation is 'gelu', not 'quick_gelu'", "preprocess.std is (1.0, 1.0, 1.0), not"):
        assert line in str(error.value)
    assert "preprocess.mean" not in str(error.value) and not (tmp_path / "other.pt").exists()


@pytest.mark.parametrize("kind", ["MCi", "MCi with layer norm", "ViT"])
@pytest.mark.parametrize("apple", [False, True])
def test_mobileclips(kind, apple, tmp_path):
    tensors, config = tiny(norm="layer" if "layer" in kind else "batch", text_taps=0 if kind == "ViT" else 11)
    if kind == "ViT":
        vision = ConvViTConfig(32, 8, SMALL_TEXT.transformer, padding=int(apple), eps=1e-5 if apple else 1e-6)
        config = dataclasses.replace(small(text_taps=0), vision=vision, preprocess=PreprocessConfig(32), causal=True)
        tensors = state_of(config)
    save_checkpoint(config, tensors, tmp_path / "x.safetensors")
    assert_same_function(tmp_path / "x.safetensors", config, tensors)
    for name in ("x.pt", "directory"):
        with pytest.raises(CheckpointError, match=r"OpenCLIP does not have|can't hold the model's config"):
            save_checkpoint(config, tensors, tmp_path / name)
        assert not (tmp_path / name).exists()


# Negative controls: the comparison above notices what a reader could get wrong.


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values["vision"]["transformer"].update(activation="gelu"),
        lambda values: values["text"]["transformer"].update(heads=2),
        lambda values: values["preprocess"].update(interpolation="bilinear"),
        lambda values: values["preprocess"]["mean"].__setitem__(0, 0.5),
    ],
)
def test_another_config_is_noticed(change, tmp_path):
    tensors, values = state_of(PLAIN), to_json(PLAIN)
    change(values)
    save_file(tensors, tmp_path / "x.safetensors", {"miniclip_config": json.dumps(values)})
    with pytest.raises(AssertionError):
        assert_same_function(tmp_path / "x.safetensors", PLAIN, tensors)


def test_one_bit_is_noticed(tmp_path):
    tensors = state_of(PLAIN)
    save_checkpoint(PLAIN, tensors, tmp_path / "x.safetensors")
    changed = tensors | {"ln_final.bias": tensors["ln_final.bias"] * (1 + 2**-20)}
    with pytest.raises(AssertionError):
        assert_same_function(tmp_path / "x.safetensors", PLAIN, changed)


# What is stated, where, and what wins.


def test_a_contradiction_is_an_error(tmp_path):
    config, tensors = gelu(PLAIN), state_of(PLAIN)
    save_checkpoint(config, tensors, tmp_path / "x.safetensors")
    load(tmp_path / "x.safetensors", "cpu", activation="gelu")
    with pytest.raises(CheckpointError, match=r"x\.safetensors: .* states gelu, not quick_gelu"):
        load(tmp_path / "x.safetensors", "cpu", activation="quick_gelu")
    (tmp_path / "run").mkdir()
    save_checkpoint(config, tensors, tmp_path / "run" / "best.safetensors")
    (tmp_path / "run" / "miniclip.json").write_text(json.dumps(to_json(PLAIN)))
    with pytest.raises(CheckpointError, match=r"best\.safetensors: .* differs from .*miniclip\.json"):
        load(tmp_path / "run", "cpu")


def test_a_newer_format_is_refused_by_name(tmp_path):
    tensors, values = state_of(PLAIN), to_json(PLAIN) | {"format": "miniclip config 2", "novelty": True}
    save_file(tensors, tmp_path / "x.safetensors", {"miniclip_config": json.dumps(values)})
    with pytest.raises(CheckpointError, match=r"x\.safetensors: .*miniclip config 2, .* up to miniclip config 1"):
        load(tmp_path / "x.safetensors", "cpu")
    (tmp_path / "miniclip.json").write_text(json.dumps(values))
    save_file(tensors, tmp_path / "best.safetensors")
    with pytest.raises(CheckpointError, match=r"miniclip\.json was written by a newer miniclip"):
        load(tmp_path, "cpu")


@pytest.mark.parametrize("metadata", ["", "{", "[]", "[" * 10**5, "null", '{"format": "other 1"}', "{}"])
def test_a_damaged_config_is_an_error(metadata, tmp_path):
    save_file(state_of(PLAIN), tmp_path / "x.safetensors", {"miniclip_config": metadata})
    with pytest.raises(CheckpointError, match=r"x\.safetensors: the config in its metadata") as error:
        load(tmp_path / "x.safetensors", "cpu")
    assert len(str(error.value)) < 1000


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda x: st.lists(x) | st.dictionaries(st.sampled_from(["vision", "kind", "layers", "x"]), x),
    ),
    st.data(),
)
def test_only_our_errors_for_any_json(value, data):
    """Some value of a good config is replaced by any other: it is an error of ours, or a config again."""
    values = to_json(PLAIN)
    section = data.draw(
        st.sampled_from([values, values["vision"], values["vision"]["transformer"], values["preprocess"]])
    )
    section[data.draw(st.sampled_from(sorted(section)))] = value
    try:
        assert isinstance(from_json(values), CLIPConfig)
    except MiniclipError as error:
        assert len(str(error)) < 500


# Files from before configs travelled.


@pytest.mark.parametrize("files", [("best", "last"), ("last",)])
def test_a_run_folder_from_before(files, tmp_path):
    """A config.json without format and kinds, beside bare files: its config counts, and the best checkpoint."""
    config, states = gelu(PLAIN), {}
    old = dataclasses.asdict(config)
    (tmp_path / "config.json").write_text(json.dumps(old))
    for file in files:
        states[file] = {name: t * (2 if file == "last" else 1) for name, t in state_of(config).items()}
        save_file(states[file], tmp_path / f"{file}.safetensors")
    assert_same_function(tmp_path, config, states[files[0]])
    assert_same_function(tmp_path / "last.safetensors", config, states["last"])


def test_a_run_folder(tmp_path):
    config = gelu(PLAIN)
    (tmp_path / "miniclip.json").write_text(json.dumps(to_json(config)))
    tensors = state_of(config)
    save_checkpoint(config, tensors, tmp_path / "last.safetensors")
    assert_same_function(tmp_path, config, tensors)
    better = tensors | {"ln_final.bias": tensors["ln_final.bias"] + 1}
    save_checkpoint(config, better, tmp_path / "best.safetensors")
    assert_same_function(tmp_path, config, better)
    (tmp_path / "miniclip.json").unlink()
    assert_same_function(tmp_path, config, better)


def test_a_bare_file_is_inferred_as_before(tmp_path):
    save_file(state_of(PLAIN), tmp_path / "x.safetensors")
    assert_same_function(tmp_path / "x.safetensors", PLAIN, state_of(PLAIN))


def test_the_files_themselves(tmp_path):
    """A safetensors file has the config in its metadata, a directory as miniclip.json beside the format's own."""
    tensors = state_of(PLAIN)
    save_checkpoint(PLAIN, tensors, tmp_path / "x.safetensors")
    assert load_file(tmp_path / "x.safetensors").keys() == tensors.keys()
    save_checkpoint(PLAIN, tensors, tmp_path / "hf")
    assert from_json(json.loads((tmp_path / "hf" / "miniclip.json").read_text())) == PLAIN
    (tmp_path / "hf" / "miniclip.json").unlink()
    assert_same_function(tmp_path / "hf", PLAIN, tensors)


@pytest.mark.parametrize("name", ["tiny-ViT", "tiny-RN"])
def test_the_embedded_models_carry_theirs(name):
    tensors = read_file(EMBEDDED / MODELS[name].file)
    assert from_json(json.loads(tensors.metadata["miniclip_config"])) == MODELS[name].config
