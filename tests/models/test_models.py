"""The models' shapes, names, initial values and errors; what they compute is checked in test_equivalence.py."""

import pytest
import torch
import torch.nn.functional as F
from conformance.openai_cases import CASES

from miniclip.config import MODELS, TransformerConfig, openai_transformer
from miniclip.models import CLIP, convert_weights

# Parameters and tensors of OpenAI's released models; openai/CLIP's notebook prints the first figure for ViT-B/32.
PARAMETERS = {
    "RN50": 102_007_137,
    "RN101": 119_688_033,
    "RN50x4": 178_300_601,
    "RN50x16": 290_979_217,
    "RN50x64": 623_258_305,
    "ViT-B/32": 151_277_313,
    "ViT-B/16": 149_620_737,
    "ViT-L/14": 427_616_513,
    "ViT-L/14@336px": 427_944_193,
}
TENSORS = {"RN50": 489, "RN101": 795, "RN50x4": 669, "RN50x16": 921, "RN50x64": 1353}
TENSORS |= {"ViT-B/32": 302, "ViT-B/16": 302, "ViT-L/14": 446, "ViT-L/14@336px": 446}


@pytest.mark.parametrize("name", TENSORS)
def test_named_models_have_the_size_of_the_released_ones(name):
    with torch.device("meta"):
        model = CLIP(MODELS[name].config)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]
    assert len(model.state_dict()) == TENSORS[name]


# Every tensor name of a one-layer model, as they stand in OpenAI's files.
TRANSFORMER = [
    f"transformer.resblocks.0.{name}"
    for name in (
        *("attn.in_proj_weight", "attn.in_proj_bias", "attn.out_proj.weight", "attn.out_proj.bias"),
        *("ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias"),
        *("mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight", "mlp.c_proj.bias"),
    )
]
TEXT = ["positional_embedding", "text_projection", "logit_scale", "token_embedding.weight"]
TEXT += ["ln_final.weight", "ln_final.bias", *TRANSFORMER]
VIT = ["class_embedding", "positional_embedding", "proj", "conv1.weight", *TRANSFORMER]
VIT += ["ln_pre.weight", "ln_pre.bias", "ln_post.weight", "ln_post.bias"]


def test_names_are_openais():
    config = CASES["vit"]
    one_layer = type(config)(
        config.embed_dim,
        type(config.vision)(40, 8, openai_transformer(64, 1)),
        type(config.text)(8, 50, openai_transformer(64, 1)),
        config.preprocess,
    )
    assert sorted(CLIP(one_layer).state_dict()) == sorted([*TEXT, *(f"visual.{name}" for name in VIT)])


def test_resnet_names_are_openais():
    names = set(CLIP(CASES["resnet"]).visual.state_dict())
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    expected = {f"{place}bn{i}.{n}" for place in ("", "layer1.0.", "layer3.2.") for i in (1, 2, 3) for n in norm}
    expected |= {f"layer{i}.0.downsample.1.{n}" for i in (1, 2, 3, 4) for n in norm}
    expected |= {f"{place}conv{i}.weight" for place in ("", "layer1.0.", "layer3.2.") for i in (1, 2, 3)}
    expected |= {f"attnpool.{p}_proj.{n}" for p in "qkvc" for n in ("weight", "bias")}
    assert names >= expected | {"attnpool.positional_embedding"}
    assert len(names) == 18 + 9 + 4 * 6 + 7 * 18  # stem, pool, shortcuts, blocks


@pytest.mark.parametrize("case", CASES)
def test_attributes_of_openais_model(case):
    model = CLIP(CASES[case])
    assert model.visual.input_resolution == CASES[case].vision.image_size
    assert model.context_length == CASES[case].text.context_length
    assert model.vocab_size == CASES[case].text.vocab_size
    assert model.dtype == torch.float32
    torch.testing.assert_close(model.logit_scale.exp(), torch.tensor(1 / 0.07))


@pytest.mark.parametrize("case", CASES)
def test_outputs(case):
    config = CASES[case]
    model = CLIP(config).eval()
    image = torch.randn(2, 3, config.vision.image_size, config.vision.image_size)
    text = torch.randint(config.text.vocab_size, (3, config.text.context_length))
    assert model.encode_image(image).shape == (2, config.embed_dim)
    assert model.encode_text(text).shape == (3, config.embed_dim)
    for embedding in (model.encode_image(image, normalize=True), model.encode_text(text, normalize=True)):
        torch.testing.assert_close(embedding.norm(dim=-1), torch.ones(len(embedding)))
    per_image, per_text = model(image, text)
    assert per_image.shape == (2, 3)
    assert torch.equal(per_image, per_text.T)


def test_what_follows_the_end_token_has_no_influence():
    model = CLIP(CASES["vit"]).eval()
    text = torch.tensor([[299, 5, 6, 300, 0, 0, 0]])
    other = torch.tensor([[299, 5, 6, 300, 7, 8, 9]])
    torch.testing.assert_close(model.encode_text(text), model.encode_text(other))
    torch.testing.assert_close(model.encode_text(text), model.encode_text(text[:, :4]))  # so padding may be cut
    assert not torch.allclose(model.encode_text(text), model.encode_text(torch.tensor([[299, 5, 7, 300, 0, 0, 0]])))


@pytest.mark.parametrize("shape", [(3, 40, 40), (1, 1, 40, 40), (1, 3, 32, 32), (1, 40, 40, 3)])
def test_an_image_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"expected float pixels \[N, 3, 40, 40\]"):
        CLIP(CASES["vit"]).encode_image(torch.zeros(shape))


def test_uint8_pixels_are_refused():
    with pytest.raises(ValueError, match="expected float pixels"):
        CLIP(CASES["vit"]).encode_image(torch.zeros(1, 3, 40, 40, dtype=torch.uint8))


@pytest.mark.parametrize(("shape", "dtype"), [((13,), torch.int), ((1, 14), torch.int), ((1, 13), torch.float)])
def test_text_of_another_shape_is_refused(shape, dtype):
    with pytest.raises(ValueError, match=r"expected integer token ids \[N, L\] with L <= 13"):
        CLIP(CASES["vit"]).encode_text(torch.zeros(shape, dtype=dtype))


def test_initial_values():
    """The deviations of openai/CLIP's `initialize_parameters`, and its zeros."""
    torch.manual_seed(0)
    vit, resnet = CLIP(CASES["vit"]), CLIP(CASES["resnet-wide"])
    width, layers = 64, 2
    block = vit.transformer.resblocks[1]
    expected = [
        (vit.token_embedding.weight, 0.02),
        (vit.positional_embedding, 0.01),
        (vit.text_projection, width**-0.5),
        (block.attn.in_proj_weight, width**-0.5),
        (block.attn.out_proj.weight, width**-0.5 * (2 * layers) ** -0.5),
        (block.mlp.c_fc.weight, (2 * width) ** -0.5),
        (block.mlp.c_proj.weight, width**-0.5 * (2 * layers) ** -0.5),
        (vit.visual.positional_embedding, 128**-0.5),
        (vit.visual.proj, 128**-0.5),
        (vit.visual.transformer.resblocks[0].attn.in_proj_weight, (2 / (4 * 128)) ** 0.5),  # Xavier, of 128 to 3 * 128
        (resnet.visual.attnpool.positional_embedding, 640**-0.5),
        (resnet.visual.attnpool.k_proj.weight, 640**-0.5),
    ]
    for tensor, deviation in expected:
        assert tensor.std().item() == pytest.approx(deviation, rel=0.08)
    assert not vit.visual.transformer.resblocks[0].attn.in_proj_bias.any()
    assert not vit.visual.transformer.resblocks[0].attn.out_proj.bias.any()
    assert not resnet.visual.layer2[0].bn3.weight.any()


def test_a_training_step_reaches_every_parameter():
    for case in ("vit", "resnet"):
        config = CASES[case]
        model = CLIP(config).train()
        image = torch.randn(4, 3, config.vision.image_size, config.vision.image_size)
        text = torch.randint(config.text.vocab_size - 1, (4, config.text.context_length))
        text[:, -1] = config.text.vocab_size - 1
        per_image, per_text = model(image, text)
        labels = torch.arange(4)
        (F.cross_entropy(per_image, labels) + F.cross_entropy(per_text, labels)).backward()
        assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


# dtypes as in the released files (float16 marked), which `convert_weights` must reproduce.
HALVED = {"text_projection", "visual.proj", "visual.conv1.weight"}
HALVED_ENDINGS = ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
HALVED_ENDINGS += tuple(f"{layer}.{kind}" for layer in ("c_fc", "c_proj") for kind in ("weight", "bias"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_stored_as_in_openais_files(dtype):
    model = convert_weights(CLIP(CASES["vit"]), dtype)
    for name, tensor in model.state_dict().items():
        halved = name in HALVED or name.endswith(HALVED_ENDINGS)
        assert tensor.dtype == (dtype if halved else torch.float32), name
    assert model.dtype == dtype


def test_resnet_in_half_precision_keeps_its_norms():
    model = convert_weights(CLIP(CASES["resnet"]), torch.float16)
    for name, tensor in model.visual.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            norm = ".bn" in f".{name}" or "downsample.1" in name or name.endswith("positional_embedding")
            assert tensor.dtype == (torch.float32 if norm else torch.float16), name


def test_back_to_float32():
    model = convert_weights(convert_weights(CLIP(CASES["vit"]), torch.bfloat16), torch.float32)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}


def test_config_refuses_what_cannot_be():
    with pytest.raises(ValueError, match="quick_gelu, gelu"):
        TransformerConfig(64, 1, 1, 256, activation="relu")
    with pytest.raises(ValueError, match="7 heads"):
        TransformerConfig(64, 1, 7, 256)


@pytest.mark.parametrize("case", CASES)
def test_a_sequence_first_input_is_refused(case):
    """As openai/CLIP's transformers take it: [L, N, D]. With another batch first it would give other numbers."""
    model = CLIP(CASES[case])
    towers = [model.transformer, *([model.visual.transformer] if hasattr(model.visual, "transformer") else [])]
    for transformer in towers:
        x = torch.randn(2, transformer.length, transformer.resblocks[0].ln_1.weight.numel())
        assert transformer(x).shape == x.shape
        with pytest.raises(ValueError, match=rf"expected \[N, {transformer.length}, D\]: batch first"):
            transformer(x.permute(1, 0, 2))
    shorter = torch.randint(1, 9, (model.context_length, 3))  # texts as many as a text has tokens, and short
    assert model.encode_text(shorter).shape[0] == model.context_length
