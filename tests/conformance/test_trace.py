"""Every stage of a trace is what the model computed and what its definition says; the attention can be drawn."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conformance import seeded
from conformance.openai_cases import CASES
from PIL import Image

import miniclip
from miniclip.conformance import TraceError, load_trace, save_trace, trace
from miniclip.conformance.files import weights_sha256, without_padding
from miniclip.conformance.forward import Forward, inputs_of
from miniclip.conformance.plot import attention_of, plot_attention
from miniclip.conformance.rules import RULES, bands, picture, strings, utf8
from miniclip.loading import blank_model, build_model, shapes_of
from miniclip.models import set_backend
from miniclip.openai.stages import stages
from miniclip.preprocess import Preprocess
from miniclip.stages import tower_of

DOG = Path(__file__).parents[2] / "examples" / "images" / "dog.png"
PICTURE = Image.open(DOG).crop((0, 0, 201, 170))


def model_of(case: str, dtype: torch.dtype = torch.float32):
    config = CASES[case]
    return build_model(seeded.weights(shapes_of(blank_model(config, dtype).state_dict())), config, dtype=dtype)


def ids_for(model) -> torch.Tensor:
    return seeded.text(2, model.context_length, model.vocab_size)


@pytest.fixture(scope="module")
def models():
    return {case: model_of(case) for case in CASES}


@pytest.fixture(scope="module")
def traces(models):
    return {case: trace(model, PICTURE, ids_for(model)) for case, model in models.items()}


@pytest.mark.parametrize("case", CASES)
def test_all_stages_are_there_in_order_and_shape(models, traces, case):
    expected = [stage for stage in stages(CASES[case]) if stage.name != "text.utf8"]
    assert list(traces[case]) == [stage.name for stage in expected]
    for stage in expected:
        shape = traces[case][stage.name].shape
        assert len(shape) == len(stage.shape)
        for got, stated in zip(shape, stage.shape, strict=True):
            letters = {"N": 2 if tower_of(stage.name) == "text" else 1, "L": models[case].context_length}
            letters |= {"images": 1, "texts": 2, "B": 3}
            assert got == letters.get(stated, stated) or stated in ("h", "w"), stage


@pytest.mark.parametrize("case", CASES)
def test_results_are_bit_for_bit_those_of_the_plain_model(models, traces, case):
    model, traced = models[case], traces[case]
    pixels, ids = Preprocess(model.config.preprocess)(PICTURE)[None], ids_for(model)
    with torch.enable_grad():  # with gradients a model always computes its plain form
        assert torch.equal(traced["image_embedding"], model.encode_image(pixels, normalize=True))
        assert torch.equal(traced["text_embedding"], model.encode_text(ids, normalize=True))
        assert torch.equal(traced["logits_per_image"], model(pixels, ids)[0])
        assert torch.equal(traced["text_projection"], model.encode_text(ids))
        assert torch.equal(traced["ln_final"], model.ln_final(model.transformer(traced["text.embedded"])))
    assert torch.equal(traced["image.pixels"], pixels)


@pytest.mark.parametrize("case", CASES)
def test_every_stage_follows_from_the_inputs_by_its_rule(models, traces, case):
    traced = traces[case]
    forward = Forward(models[case], RULES, {name: traced[name] for name in ("image.decoded", "text.ids")})
    for name, stage in traced.items():
        error = (forward[name].double() - stage.double()).norm() / stage.double().norm()
        assert error < 1e-5, name


def test_a_wrong_rule_is_noticed(models, traces, monkeypatch):
    monkeypatch.setitem(RULES, "resblock.attn.k", RULES["resblock.attn.v"])
    with pytest.raises(RuntimeError, match=r"visual.transformer.resblocks.0.attn.context is .* from its definition"):
        trace(models["vit"], PICTURE)


def test_a_model_that_computes_something_else_is_noticed():
    model = model_of("vit")
    model.visual.transformer.resblocks[1].mlp.activation = "gelu"  # which its config does not say
    with pytest.raises(RuntimeError, match=r"resblocks.1.mlp.activation is .* away"):
        trace(model, PICTURE)


def test_a_model_that_leaves_modules_out_is_refused():
    model = model_of("vit")
    block = model.visual.transformer.resblocks[1]
    block.forward = lambda x, causal: x
    with pytest.raises(RuntimeError, match=r"without computing visual.transformer.resblocks.1.ln_1"):
        trace(model, PICTURE)


@pytest.mark.parametrize(
    ("parameter", "first"),
    [
        ("visual.transformer.resblocks.1.mlp.c_fc.bias", "visual.transformer.resblocks.1.mlp.c_fc"),
        ("visual.transformer.resblocks.0.attn.in_proj_weight", "visual.transformer.resblocks.0.attn.q"),
        ("visual.ln_post.weight", "visual.ln_post"),
        ("visual.proj", "visual.proj"),
        ("positional_embedding", "text.embedded"),
        ("text_projection", "text_projection"),
        ("logit_scale", "logits_per_image"),
    ],
)
def test_a_changed_weight_shows_first_where_it_is_used(traces, parameter, first):
    model = model_of("vit")
    with torch.no_grad():
        model.get_parameter(parameter).mul_(1.5)
    changed = trace(model, PICTURE, ids_for(model))
    assert next(name for name in changed if not torch.equal(changed[name], traces["vit"][name])) == first


def test_stages_of_the_batch_are_those_of_each_alone(models):
    model = models["resnet"]
    pixels = seeded.image(3, 96)
    together = trace(model, pixels)
    assert "image.cropped" not in together and next(iter(together)) == "image.pixels"
    for i in range(3):
        for name, stage in trace(model, pixels[i : i + 1]).items():
            torch.testing.assert_close(stage, together[name][i : i + 1], rtol=1e-4, atol=1e-5)


def test_pictures_of_every_mode(models):
    for mode in ("L", "LA", "RGB", "RGBA", "P", "1", "CMYK"):
        image = PICTURE.convert("RGB").convert(mode)
        traced = trace(models["vit"], image)
        assert torch.equal(traced["image.pixels"][0], Preprocess(models["vit"].config.preprocess)(image))
        assert traced["image.cropped"].shape == (40, 40, 3)
        if mode in ("L", "LA", "RGB", "RGBA"):
            assert picture(traced["image.decoded"]).tobytes() == image.tobytes()
            assert traced["image.resized"].shape == (40, 47, len(mode))
        else:
            assert "image.decoded" not in traced and "image.resized" not in traced


def test_strings_and_their_ids_are_recorded():
    model, _ = miniclip.load("tiny-ViT", device="cpu", dtype=torch.float32)
    texts = ["a dog", "日本 \ud800 €"]
    traced = trace(model, text=texts)
    assert torch.equal(traced["text.ids"], miniclip.tokenize(texts))
    assert strings(traced["text.utf8"]) == texts and strings(utf8([""])) == [""]
    assert torch.equal(trace(model, text="a dog")["text.pooled"], trace(model, text=["a dog"])["text.pooled"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(traces, dtype):
    model = model_of("vit", dtype)
    traced = trace(model, PICTURE, ids_for(model))
    assert traced["visual.ln_pre"].dtype == traced["visual.transformer.resblocks.0.attn.q"].dtype == dtype
    cosine = torch.cosine_similarity(traced["image_embedding"].float(), traces["vit"]["image_embedding"])
    assert cosine > (0.9999 if dtype == torch.float16 else 0.999)


def test_nothing_is_left_behind(models):
    for model in models.values():
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with pytest.raises(ValueError, match="expected float pixels"):
        trace(models["vit"], torch.zeros(1, 3, 8, 8))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in models["vit"].modules())
    model = set_backend(model_of("vit"), "torch")
    model.fast = False
    trace(model, PICTURE)
    assert not model.fast and model.visual.transformer.resblocks[0].attn.backend == "torch"
    assert models["vit"].fast and models["vit"].visual.transformer.resblocks[0].attn.backend is None


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((None, None), ValueError, "nothing to trace"),
        ((str(DOG), None), TypeError, "expected a PIL image"),
        ((None, "dog " * 100), RuntimeError, "needs 102 tokens"),
        ((None, [3]), TypeError, "a text must be a str"),
        ((None, []), ValueError, "the list is empty"),
        ((torch.zeros(2, 40, 40), None), ValueError, "expected float pixels"),
        ((None, torch.zeros(2, 400, dtype=torch.int32)), ValueError, "expected integer token ids"),
    ],
)
def test_what_cannot_be_traced(models, arguments, error, message):
    with pytest.raises(error, match=message):
        trace(models["vit"], *arguments)


def test_what_is_no_model_cannot_be_traced(models):
    with pytest.raises(TypeError, match="got VisionTransformer"):
        trace(models["vit"].visual, PICTURE)


def test_models_in_training_or_with_nans_cannot_be_traced():
    model = model_of("resnet").train()
    with pytest.raises(ValueError, match="training mode"):
        trace(model, PICTURE)
    model.eval().visual.bn1.weight.data[0] = torch.nan
    with pytest.raises(RuntimeError, match=r"visual.bn1 .* has NaNs"):
        trace(model, PICTURE)


def test_rules():
    for config in CASES.values():
        inputs = {"image.decoded", "text.utf8"}
        assert all(stage.rule in RULES for stage in stages(config) if stage.name not in inputs)
    vit, resnet = ({stage.name: stage for stage in stages(CASES[case])} for case in ("vit", "resnet"))
    assert vit["visual.conv1"].rule == "visual.conv1" and resnet["visual.conv1"].rule == "stem.conv1"
    assert resnet["visual.layer2.0.downsample.-1"].rule == "bottleneck.downsample.-1"
    assert vit["transformer.resblocks.1"].rule == "resblock"


def test_what_each_stage_takes():
    before = inputs_of(CASES["vit"])
    assert before["visual.transformer.resblocks.0.mlp.c_fc"] == "visual.ln_pre"
    assert before["visual.transformer.resblocks.2"] == "visual.transformer.resblocks.1"
    assert before["visual.pooled"] == "visual.transformer.resblocks.2"
    assert before["transformer.resblocks.0.ln_1"] == "text.embedded"
    assert before["image_embedding"] == "visual.proj"
    before = inputs_of(CASES["resnet"])
    assert before["visual.layer1.0.conv1"] == "visual.avgpool" and before["image_embedding"] == "visual.attnpool.c_proj"
    assert before["visual.layer2.0.bn3"] == "visual.layer1.0" and before["visual.layer3.2"] == "visual.layer3.1"


# Files


def test_files(models, traces, tmp_path):
    model, traced = models["vit"], traces["vit"]
    save_trace(traced, tmp_path / "golden.safetensors", model, "mine")
    stages_read, metadata = load_trace(tmp_path / "golden.safetensors")
    assert list(stages_read) == list(traced)
    assert all(torch.equal(stages_read[name], traced[name]) for name in traced)
    assert metadata["model"] == "mine" and metadata["dtype"] == "float32"
    assert metadata["torch"] == torch.__version__ and metadata["model_sha256"] == weights_sha256(model)


def test_digest_of_weights():
    """By hand: names in order, each with a zero byte, and float32 values."""
    import hashlib

    model = model_of("resnet")
    names = sorted(name for name in model.state_dict() if "num_batches" not in name)
    content = b"".join(n.encode() + b"\0" + model.state_dict()[n].numpy().astype("<f4").tobytes() for n in names)
    assert weights_sha256(model) == hashlib.sha256(content).hexdigest()
    model.visual.bn1.running_mean[0] += 1e-3
    assert weights_sha256(model) != hashlib.sha256(content).hexdigest()


def test_padding_is_left_out_of_files(models, traces):
    cut = without_padding(traces["vit"])
    assert cut["text.ids"].shape == (2, 13)
    assert cut["ln_final"].shape == (2, 4, 64)  # the longer text has 2 words
    assert cut["transformer.resblocks.0.attn.v"].shape == (2, 1, 4, 64)
    assert cut["transformer.resblocks.0.attn.probabilities"].shape == (2, 1, 4, 4)
    shorter = trace(models["vit"], text=ids_for(models["vit"])[:, :4])
    for name, stage in shorter.items():
        if name != "text.ids":
            torch.testing.assert_close(stage, cut[name], rtol=1e-4, atol=1e-6)


# Attention


def test_attention_of_a_vit(models, traces):
    traced = traces["vit"]
    maps = attention_of(traced)
    assert maps.shape == (2, 5, 5)
    probabilities = traced["visual.transformer.resblocks.2.attn.probabilities"]
    assert torch.equal(maps[1, 3, 4], probabilities[0, 1, 0, 1 + 3 * 5 + 4])
    assert torch.equal(maps, attention_of(traced, -1)) and torch.equal(maps, attention_of(traced, 2))
    assert not torch.equal(maps, attention_of(traced, 0))
    with pytest.raises(TraceError, match="layers 0 to 2"):
        attention_of(traced, 3)


def test_attention_of_a_resnet(traces):
    maps = attention_of(traces["resnet"])
    assert maps.shape == (4, 3, 3)
    assert torch.equal(maps[:, 2, 1], traces["resnet"]["visual.attnpool.probabilities"][0, :, 0, 1 + 2 * 3 + 1])
    with pytest.raises(TraceError, match="layers 0 to 0"):
        attention_of(traces["resnet"], 1)


@pytest.mark.parametrize("case", ["vit", "resnet"])
def test_attention_is_drawn(traces, case, tmp_path):
    pytest.importorskip("matplotlib")
    plot_attention(traces[case], CASES[case], tmp_path / "a.png")
    drawn = np.array(Image.open(tmp_path / "a.png").convert("RGB")).astype(int)
    assert drawn.std() > 30  # not blank
    uniform = dict(traces[case])
    for name in uniform:
        if name.endswith("probabilities"):
            uniform[name] = torch.full_like(uniform[name], 1 / uniform[name].shape[-1])
    plot_attention(uniform, CASES[case], tmp_path / "b.png")
    assert not np.array_equal(drawn, np.array(Image.open(tmp_path / "b.png").convert("RGB")))


def test_the_drawing_of_attention_says_what_it_is(traces, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    drawn = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: drawn.append(figure))
    for case, layer in (("vit", 1), ("resnet", None)):
        plot_attention(traces[case], CASES[case], tmp_path / "a.png", layer)
    places = {name: x[..., 1:, 1:] for name, x in traces["vit"].items() if name.endswith("probabilities")}
    plot_attention(traces["vit"] | places, CASES["vit"], tmp_path / "a.png")
    of_token = "Attention of the pooled token, {}; what is not on patches is on the token itself;"
    assert drawn[0].get_suptitle().startswith(of_token.format("layer 1 (0 to 2)"))
    assert drawn[1].get_suptitle().startswith(of_token.format("the only layer that has any"))
    assert drawn[2].get_suptitle().startswith("Attention to each place, mean of all queries, layer 2 (0 to 2)")
    titles = [axis.get_title() for axis in drawn[0].axes]
    on_patches = [f"{float(weights.sum()):.0%}" for weights in attention_of(traces["vit"], 1)]
    assert titles[:1] + titles[2:] == ["picture", *(f"head {i}: {x} on patches" for i, x in enumerate(on_patches))]


def test_bands_and_back():
    for mode in ("L", "LA", "RGB", "RGBA"):
        image = PICTURE.convert(mode)
        assert bands(image).shape == (170, 201, len(mode))
        assert picture(bands(image)).mode == mode


def test_importing_miniclip_does_not_import_the_kit():
    code = "import sys, miniclip; kit = 'miniclip.conformance'; a = kit in sys.modules; miniclip.trace; "
    code += "print(a, kit in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]
    assert miniclip.trace is trace
    with pytest.raises(AttributeError, match="no attribute 'tracing'"):
        miniclip.tracing  # noqa: B018
