"""Configs from tensor shapes, and the list of everything that is wrong with a file's tensors."""

from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from miniclip.config import (
    MODELS,
    CLIPConfig,
    PreprocessConfig,
    ResNetConfig,
    TextConfig,
    TransformerConfig,
    ViTConfig,
    openai_transformer,
)
from miniclip.loading import blank_model
from miniclip.weights.errors import CheckpointError
from miniclip.weights.infer import TEXT_WIDTHS, VISION_WIDTHS, check_names, infer_config

TEXT = TextConfig(9, 50, openai_transformer(64, 2))
VIT = CLIPConfig(24, ViTConfig(24, 8, TransformerConfig(128, 3, 2, 200)), TEXT, PreprocessConfig(24))
RESNET = CLIPConfig(24, ResNetConfig(64, 4, (1, 2, 3, 1), 2), TEXT, PreprocessConfig(64))


def shapes_of(config: CLIPConfig) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in blank_model(config, torch.float32).state_dict().items()}


SMALL_SHAPES = {"vit": shapes_of(VIT), "resnet": shapes_of(RESNET)}


@pytest.mark.parametrize("name", MODELS)
def test_openai_models(name):
    assert infer_config(shapes_of(MODELS[name].config)) == MODELS[name].config


@pytest.mark.parametrize("config", [VIT, RESNET], ids=["vit", "resnet"])
def test_small_models(config):
    assert infer_config(shapes_of(config)) == config


def test_every_size_is_read():
    other = CLIPConfig(
        40, ViTConfig(30, 5, TransformerConfig(192, 2, 3, 60)), TextConfig(5, 70, TransformerConfig(128, 3, 2, 90)),
        PreprocessConfig(30),
    )  # fmt: skip
    assert infer_config(shapes_of(other)) == other


def test_activation_is_the_callers():
    config = infer_config(SMALL_SHAPES["vit"], "gelu")
    assert (config.vision.transformer.activation, config.text.transformer.activation) == ("gelu", "gelu")
    assert config != VIT
    assert infer_config(SMALL_SHAPES["resnet"], "gelu").text.transformer.activation == "gelu"
    with pytest.raises(ValueError, match="activation is 'relu'"):
        infer_config(SMALL_SHAPES["vit"], "relu")


# OpenCLIP's towers whose heads are not 64 wide, and widths that no published model has.
@pytest.mark.parametrize("width", [32, 96, 1152, 1280, 1408, 1664, 1792])
def test_unknown_heads_of_an_image_tower(width):
    vision = replace(VIT.vision, transformer=TransformerConfig(width, 1, width // 16, width))
    with pytest.raises(CheckpointError, match=rf"image transformer is {width} wide.*config=\.\.\."):
        infer_config(shapes_of(replace(VIT, vision=vision)))


@pytest.mark.parametrize("width", [32, 96, 1152, 1408])
def test_unknown_heads_of_a_text_tower(width):
    text = replace(TEXT, transformer=TransformerConfig(width, 1, width // 16, width))
    with pytest.raises(CheckpointError, match=rf"text transformer is {width} wide"):
        infer_config(shapes_of(replace(VIT, text=text)))


def test_the_1280_wide_text_tower_has_20_heads():
    text = replace(TEXT, transformer=openai_transformer(1280, 1))
    assert infer_config(shapes_of(replace(VIT, text=text))).text.transformer.heads == 20


def test_known_heads_are_those_of_open_clips_models():
    open_clip = pytest.importorskip("open_clip")
    for name in open_clip.list_models():
        config = open_clip.get_model_config(name)
        text, vision = config["text_cfg"], config["vision_cfg"]
        if "heads" in text:
            assert (text["width"] in TEXT_WIDTHS) == (text["width"] == 64 * text["heads"]), name
        if isinstance(vision.get("layers"), int) and "timm_model_name" not in vision:
            assert (vision["width"] in VISION_WIDTHS) == (vision.get("head_width", 64) == 64), name


READ = {  # what infer_config reads, beside the numbers of the layers
    "vit": [
        "text_projection", "positional_embedding", "token_embedding.weight", "visual.conv1.weight",
        "visual.positional_embedding", "visual.transformer.resblocks.0.mlp.c_fc.weight",
        "transformer.resblocks.0.mlp.c_fc.weight",
    ],
    "resnet": ["text_projection", "visual.attnpool.positional_embedding", "visual.layer1.0.conv1.weight"],
}  # fmt: skip


@pytest.mark.parametrize("name", READ["vit"])
def test_missing_or_odd_tensor_is_named(name):
    shapes = SMALL_SHAPES["vit"]
    with pytest.raises(CheckpointError, match=f"tensor {name} is missing"):
        infer_config({key: shape for key, shape in shapes.items() if key != name})
    for odd in ((), (3,), (1, 2, 3, 4, 5), (0,) * len(shapes[name])):
        with pytest.raises(CheckpointError, match=f"tensor {name} is "):
            infer_config(shapes | {name: odd})


@pytest.mark.parametrize(
    ("model", "change", "message"),
    [
        ("vit", {"visual.positional_embedding": (9, 128)}, "visual.positional_embedding has 9 rows"),
        ("vit", {"visual.positional_embedding": (1, 128)}, "visual.positional_embedding has 1 rows"),
        ("vit", {"transformer.resblocks.3.ln_1.bias": (64,)}, "no transformer.resblocks.2 among 3"),
        ("vit", {"transformer.resblocks.00.ln_1.bias": (64,)}, "no transformer.resblocks.2 among 3"),
        ("vit", {"transformer.resblocks.99999999999.ln_1.bias": (64,)}, "no transformer.resblocks.2 among 3"),
        ("resnet", {"visual.layer2.7.conv1.weight": (8, 32, 1, 1)}, "no visual.layer2.2 among 3"),
        ("resnet", {"visual.layer1.0.conv1.weight": (5, 4, 1, 1)}, "5 channels"),
    ],
)
def test_contradictions(model, change, message):
    with pytest.raises(CheckpointError, match=message):
        infer_config(SMALL_SHAPES[model] | change)


def test_no_layers():
    with pytest.raises(CheckpointError, match=r"no transformer\.resblocks\.0 among 0"):
        infer_config({name: shape for name, shape in SMALL_SHAPES["vit"].items() if not name.startswith("transformer")})


@given(st.data())
def test_only_checkpoint_errors(data):
    """Whatever the shapes are, the outcome is a config or a CheckpointError."""
    shapes = dict(SMALL_SHAPES[data.draw(st.sampled_from(["vit", "resnet"]))])
    for name in data.draw(st.lists(st.sampled_from(READ["vit"] + READ["resnet"]), max_size=4)):
        if data.draw(st.booleans()):
            shapes.pop(name, None)
        else:
            shapes[name] = tuple(data.draw(st.lists(st.integers(0, 2**70), max_size=5)))
    with suppress(CheckpointError):
        assert isinstance(infer_config(shapes), CLIPConfig)


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("vision_model.pre_layrnorm.weight", "Hugging Face"),
        ("text.token_embedding.weight", "open_clip_config.json"),
        ("visual.trunk.stem.0.bias", "timm"),
        ("image_encoder.model.head.proj", "MobileCLIP"),
        ("logit_bias", "SigLIP"),
    ],
)
def test_foreign_names_are_explained(name, cause):
    with pytest.raises(CheckpointError, match=cause):
        infer_config({name: (1,)})
    with pytest.raises(CheckpointError, match=cause):
        check_names(SMALL_SHAPES["vit"], {name: (1,)})
    with pytest.raises(CheckpointError) as unexplained:
        infer_config({"weight": (1,)})
    assert "Its names" not in str(unexplained.value)


@pytest.mark.parametrize("model", SMALL_SHAPES)
def test_equal_names_pass(model):
    check_names(SMALL_SHAPES[model], SMALL_SHAPES[model])


def test_what_a_file_may_have_or_lack():
    shapes = SMALL_SHAPES["resnet"]
    counters = [name for name in shapes if name.endswith("num_batches_tracked")]
    assert len(counters) == 3 + 3 * 7 + 4  # the stem's norms, each block's, and each stage's shortcut's
    extra = {"input_resolution": (), "context_length": (), "vocab_size": (), "attn_mask": (9, 9)}
    check_names(shapes, {name: shape for name, shape in shapes.items() if name not in counters} | extra)
    with pytest.raises(CheckpointError, match="1 of another shape"):
        check_names(shapes, shapes | {counters[0]: (1,)})


def test_every_fault_is_in_one_error():
    file = dict(SMALL_SHAPES["vit"])
    del file["visual.ln_pre.weight"], file["logit_scale"]
    file |= {"visual.ln_pre.gain": (128,), "text_projection": (24, 64), "visual.bn1.num_batches_tracked": ()}
    with pytest.raises(CheckpointError) as error:
        check_names(SMALL_SHAPES["vit"], file)
    assert str(error.value).splitlines() == [
        "the file's tensors are not those of the model",
        "2 missing:",
        "    logit_scale []",
        "    visual.ln_pre.weight [128]",
        "2 unexpected:",
        "    visual.ln_pre.gain [128]",
        "    visual.bn1.num_batches_tracked []",
        "1 of another shape:",
        "    text_projection is [24, 64]; expected [64, 24]",
    ]


def test_long_lists_are_cut_with_their_count():
    with pytest.raises(CheckpointError) as error:
        check_names(SMALL_SHAPES["vit"], {})
    lines = str(error.value).splitlines()
    count = len(SMALL_SHAPES["vit"])
    assert lines[1] == f"{count} missing:"
    assert lines[-1] == f"    ... and {count - 20} more"
    assert len(lines) == 2 + 20 + 1
