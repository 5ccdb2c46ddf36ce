"""MobileCLIP: every layout of its files against what Apple's code and OpenCLIP compute, on weights made from names."""

import dataclasses
import functools
import importlib
import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conformance.mobileclip_cases import CASES, digest, inputs, weights
from meta_calls import SLOW, MetaCalls
from mobileclip_branched import Branched, apple_names, branched_shapes
from mobileclip_small import SMALL_MCI, outputs, small, tiny
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from miniclip import available_models, load
from miniclip.commands import main
from miniclip.config import NamedModel
from miniclip.loading import blank_model, build_model, open_checkpoint, shapes_of
from miniclip.mobileclip.config import CONV_VIT, MODELS
from miniclip.mobileclip.names import read, reparameterize
from miniclip.mobileclip.openclip import to_openclip
from miniclip.models import CLIP
from miniclip.models.transformer import LayerNorm
from miniclip.save import save_checkpoint
from miniclip.weights import CheckpointError
from miniclip.weights.infer import check_names

MOBILECLIP = {name: model.config for name, model in MODELS.items()}
OUTPUTS = Path(__file__).parents[1] / "conformance" / "mobileclip_outputs.safetensors"
GOLDEN = load_file(OUTPUTS)
FAMILIES = ("MobileCLIP", "MobileCLIP2")
TOLERANCE = 1e-5  # largest difference of unit embeddings, float32
QUICK = {"MobileCLIP-S0"}  # the others are many or large tensors to make: seconds to a minute each
ALL = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES]


def published_shapes(name: str) -> dict[str, tuple[int, ...]]:
    """Of the model's file, under the names that it has there."""
    with torch.device("meta"):
        tensors = Branched(MOBILECLIP[name]).state_dict()
    tensors = apple_names(tensors) if CASES[name] == "apple" else tensors
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}


@functools.lru_cache(maxsize=1)
def published(name: str) -> dict[str, torch.Tensor]:
    return weights(published_shapes(name))


def model_of(name: str, tensors=None):
    config, tensors = read(tensors or published(name), MOBILECLIP[name], None)
    return build_model(tensors, config)


@torch.no_grad()
def difference(name: str, model, folded: str = "") -> float:
    """Largest difference between the model's unit embeddings and the golden ones."""
    pixels, ids = inputs(model.visual.input_resolution)
    mine = {"image": model.encode_image(pixels, normalize=True), "text": model.encode_text(ids, normalize=True)}
    return max(float((mine[key] - GOLDEN[f"{name}/{key}_embedding{folded}"]).abs().max()) for key in mine)


@pytest.mark.parametrize("name", ALL)
def test_equals_apple_and_openclip(name):
    model = model_of(name)
    assert difference(name, model) <= TOLERANCE
    assert difference(name, model, "/folded") <= TOLERANCE


@pytest.mark.slow  # up to 450 million weights to make
@pytest.mark.parametrize("name", CASES)
def test_folded_files_and_the_plain_form_equal_them_too(name):
    model = model_of(name, dict(reparameterize(published(name))))
    model.fast = False
    assert difference(name, model) <= TOLERANCE


def test_what_has_no_golden_of_its_own_is_what_has_one():
    """Apple's configs of these, and OpenCLIP's, differ in nothing that is computed; pictures are another matter."""
    for size in ("S3", "S4", "L-14"):
        first, second = (MOBILECLIP[f"{family}-{size}"] for family in FAMILIES)
        assert first == dataclasses.replace(second, preprocess=first.preprocess)
    assert MOBILECLIP["MobileCLIP-B-LT"] == MOBILECLIP["MobileCLIP-B"]
    assert MOBILECLIP.keys() - CASES.keys() == {f"MobileCLIP-{name}" for name in ("S3", "S4", "L-14", "B-LT")}


@pytest.mark.parametrize("name", CASES)
def test_names_and_shapes_are_the_published_ones(name):
    with safe_open(OUTPUTS, "pt") as file:
        assert digest(published_shapes(name)) == file.metadata()[name]


# Negative controls: each mistake must be seen by the comparison above.


def fails(name, model):
    return difference(name, model) > 100 * TOLERANCE


def test_another_activation_fails(monkeypatch):
    model = model_of("MobileCLIP-S0")
    model.fast = False
    monkeypatch.setattr(F, "gelu", lambda x: x * torch.sigmoid(1.702 * x))
    assert fails("MobileCLIP-S0", model)


@pytest.mark.parametrize("part", ["conv_scale", "skip", "layer_scale", "batch norm's eps", "small kernel", "position"])
def test_another_folding_fails(part, monkeypatch):
    module = importlib.import_module("miniclip.mobileclip.names")
    tensors = dict(published("MobileCLIP-S0"))
    if part == "batch norm's eps":
        monkeypatch.setattr(module, "EPS", 1e-2)
    elif part == "position":
        monkeypatch.setattr(module, "delta", torch.zeros_like)
    else:
        pattern = {"skip": "rbr_skip.weight", "small kernel": "small_conv.bn.weight"}.get(part, "rbr_scale.bn.weight")
        pattern = "token_mixer.layer_scale" if part == "layer_scale" else pattern
        tensors |= {key: 1.1 * value for key, value in tensors.items() if key.endswith(pattern)}
    assert fails("MobileCLIP-S0", model_of("MobileCLIP-S0", tensors))


def test_a_causal_text_tower_fails():
    model = model_of("MobileCLIP-S0")
    model.transformer.causal = True
    assert fails("MobileCLIP-S0", model)


@pytest.mark.slow  # 150 million weights
def test_the_other_code_s_padding_fails():
    config = dataclasses.replace(MOBILECLIP["MobileCLIP-B"], vision=CONV_VIT["openclip"])
    model = build_model(read(published("MobileCLIP-B"), config, None)[1], config)
    assert fails("MobileCLIP-B", model)


# Padding takes part.


def test_nothing_is_cut_and_cutting_would_change_the_result():
    model = model_of("MobileCLIP-S0")
    _, ids = inputs(256)
    with torch.no_grad():
        expected = model.encode_text(ids)
        model.fast = False
        torch.testing.assert_close(model.encode_text(ids), expected)
        end = int(ids[0].argmax()) + 1
        shorter = CLIP.encode_text(model, ids[:1, :end])  # past the check
        assert (F.normalize(shorter) - F.normalize(expected[:1])).abs().max() > 100 * TOLERANCE
    with pytest.raises(ValueError, match="every token attends"):
        model.encode_text(ids[:, :end])


def test_the_inference_form_for_causal_towers_would_be_wrong():
    model = build_model(*tiny(text_taps=0))
    ids = torch.zeros(1, 77, dtype=torch.int32)
    ids[0, :4] = torch.tensor([5, 6, 7, 50])
    with torch.no_grad():
        plain = model.encode_text(ids, normalize=True)
        model.text_forms = {False: model.text_forms[True]}
        cut = model.encode_text(ids, normalize=True)
    assert (plain - cut).abs().max() > 100 * TOLERANCE


# Small models of every kind of tower, folded or not, under all names.


@pytest.mark.parametrize("norm", SMALL_MCI)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_folded_equals_branched(norm, dtype):
    config = small(norm)
    tensors = {name: t.to(dtype) for name, t in weights(branched_shapes(config)).items()}
    branched = Branched(config).to(dtype).eval()
    branched.load_state_dict(tensors)
    model = build_model(read(tensors, config, None)[1], config, dtype=dtype)
    cast = inputs(64)[0].to(dtype)
    with torch.no_grad():
        torch.testing.assert_close(
            F.normalize(model.encode_image(cast)),
            F.normalize(branched.encode_image(cast)),
            atol=1e-6 if dtype == torch.float32 else 1e-14,
            rtol=0,
        )
    if dtype == torch.float32:
        assert (outputs(model, config) - outputs(branched, config)).abs().max() <= 1e-6


def half_folded(tensors: dict) -> dict:
    """What Apple's and timm's own folding leaves: as ours, but the convolution in each MLP keeps its norm."""
    folded = reparameterize(tensors)
    mlp = {name: tensor for name, tensor in tensors.items() if ".mlp.conv." in name}
    return {name: folded[name] for name in folded if ".mlp.conv." not in name} | mlp


LAYOUTS = {
    "openclip": lambda tensors: tensors,
    "openclip folded": half_folded,
    "openclip fully folded": lambda tensors: dict(reparameterize(tensors)),
    "apple": apple_names,
    "apple folded": lambda tensors: apple_names(half_folded(tensors)),
    "apple, wrapped": lambda tensors: {f"module.{name}": tensor for name, tensor in apple_names(tensors).items()},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("suffix", ["pt", "nested.pt", "safetensors"])
def test_every_layout_and_format(layout, suffix, tmp_path, monkeypatch):
    config = small()
    monkeypatch.setitem(MODELS, "small", NamedModel(config, str(tmp_path / f"x.{suffix}")))
    tensors = weights(branched_shapes(config))
    tensors["visual.trunk.head.fc.bias"].zero_()  # which Apple's files don't have
    expected = outputs(build_model(read(tensors, config, None)[1], config), config)
    file = {name: tensor.contiguous().clone() for name, tensor in LAYOUTS[layout](tensors).items()}
    if suffix == "safetensors":
        save_file(file, tmp_path / "x.safetensors")
    else:
        torch.save({"state_dict": file} if suffix.startswith("nested") else file, tmp_path / f"x.{suffix}")
    model, _ = load("small")
    assert (outputs(model, config) - expected).abs().max() <= 1e-6


def test_a_missing_or_extra_tensor_is_an_error():
    config = small()
    tensors = {name: t for name, t in weights(branched_shapes(config)).items() if "num_batches" not in name}
    expected = shapes_of(blank_model(config, torch.float32).state_dict())
    check_names(expected, shapes_of(read(tensors, config, None)[1]))
    kinds = {re.sub(r"\d+", "#", name): name for name in tensors}
    for name in list(kinds.values())[::4]:
        rest = {other: tensor for other, tensor in tensors.items() if other != name}
        with pytest.raises(CheckpointError):
            check_names(expected, shapes_of(read(rest, config, None)[1]))
    for name in ("visual.trunk.stem.0.conv_kxk.1.conv.weight", "visual.trunk.what", "text.what", "visual.what"):
        with pytest.raises(CheckpointError):
            check_names(expected, shapes_of(read(tensors | {name: torch.zeros(1)}, config, None)[1]))


def test_shapes_are_found_without_arithmetic():
    config = small()
    tensors = {name: tensor.to("meta") for name, tensor in weights(branched_shapes(config)).items()}
    with MetaCalls() as calls:
        shapes = shapes_of(read(tensors, config, None)[1])
    check_names(shapes_of(blank_model(config, torch.float32).state_dict()), shapes)
    assert calls.names and calls.names.isdisjoint(SLOW)


@pytest.mark.parametrize(
    "name",
    [
        "stem.1.conv_scale.bn.running_mean",
        "stem.1.conv_scale.conv.weight",
        "stages.0.blocks.0.layer_scale.gamma",
        "stages.0.blocks.0.token_mixer.layer_scale.gamma",
        "stages.0.blocks.0.token_mixer.norm.identity.weight",
    ],
)
def test_a_part_of_another_size_is_an_error(name):
    """PyTorch would repeat a single value for all channels, and cut a kernel that is too large."""
    config, name = small(), f"visual.trunk.{name}"
    tensors = weights(branched_shapes(config))
    wrong = F.pad(tensors[name], (3, 3, 3, 3)) if name.endswith("conv.weight") else tensors[name][:1]
    with pytest.raises(CheckpointError):
        build_model(read(tensors | {name: wrong}, config, None)[1], config)


def test_a_branch_that_is_missing_as_a_whole_is_an_error():
    config = small()
    tensors = weights(branched_shapes(config))
    for branch in ("visual.trunk.stem.1.conv_scale", "visual.trunk.stages.0.blocks.0.token_mixer.mixer.identity"):
        with pytest.raises(CheckpointError, match="branches"):
            read({name: tensor for name, tensor in tensors.items() if not name.startswith(branch)}, config, None)


SHAPES = {"MobileCLIP-S0", "MobileCLIP-B", "MobileCLIP2-B", "MobileCLIP-L-14", "MobileCLIP2-S3"}


@pytest.mark.parametrize(
    "name", [name if name in SHAPES else pytest.param(name, marks=pytest.mark.slow) for name in MOBILECLIP]
)
def test_config_from_names_and_shapes(name):
    """What the tensors of each published file tell of its config: all but the interpolation of L-14."""
    with torch.device("meta"):
        tensors = Branched(MOBILECLIP[name]).state_dict()
    v1 = not name.startswith("MobileCLIP2")
    config, ours = read(apple_names(tensors) if v1 and "L-14" not in name else tensors, None, None)
    known = MOBILECLIP[name]
    if name == "MobileCLIP-L-14":
        known = dataclasses.replace(known, preprocess=dataclasses.replace(known.preprocess, interpolation="bicubic"))
    assert config == known
    expected = shapes_of(blank_model(known, torch.float32).state_dict())
    assert shapes_of(ours) == {key: shape for key, shape in expected.items() if "num_batches" not in key}


def test_parameter_counts_are_the_published_ones():
    """Apple counts the folded towers. The README's 304.3 million for L-14 is not that tower, which has 304.0."""
    for name in ("MobileCLIP-S0", "MobileCLIP-S2", "MobileCLIP-B", "MobileCLIP2-L-14", "MobileCLIP2-S4"):
        image, text = 0, 0
        for key, parameter in blank_model(MOBILECLIP[name], torch.float32).named_parameters():
            image, text = (image + parameter.numel(), text) if "visual" in key else (image, text + parameter.numel())
        published_image, published_text = MODELS[name].notes["parameters"]
        assert abs(image / 1e6 - published_image) < (0.4 if "L-14" in name else 0.1)
        assert abs(text / 1e6 - published_text) < 0.1


def test_quick_gelu_is_refused():
    with pytest.raises(CheckpointError, match="gelu"):
        read(weights(branched_shapes(small())), small(), "quick_gelu")


# OpenCLIP's directories, out and in.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("norm", SMALL_MCI)
def test_openclip_names_out_and_in(norm, dtype):
    """OpenCLIP's unfolded model computes the same, and folding it again changes no bit."""
    tensors, config = tiny(norm=norm)
    state = build_model(tensors, config).state_dict()
    tensors = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    out = to_openclip(config, tensors)
    assert shapes_of(out) == branched_shapes(config)
    for name, tensor in read(out, config, None)[1].items():
        assert torch.equal(tensor.to(dtype), tensors[name]), name
    branched = Branched(config).eval()
    branched.load_state_dict(dict(out))
    expected = outputs(build_model(tensors, config), config)
    assert (outputs(branched, config) - expected).abs().max() <= 1e-6


def test_openclip_directory(tmp_path):
    config = MOBILECLIP["MobileCLIP2-S0"]
    shapes = shapes_of(blank_model(config, torch.float32).state_dict())
    tensors = {name: torch.zeros(shape) for name, shape in shapes.items()}
    save_checkpoint(config, tensors, tmp_path / "out")
    assert open_checkpoint(tmp_path / "out")[0] == config
    (tmp_path / "out" / "miniclip.json").unlink()  # without it, OpenCLIP's own fields count
    assert open_checkpoint(tmp_path / "out")[0] == config
    fields = json.loads((tmp_path / "out" / "open_clip_config.json").read_text())
    for section, key, value in (
        ("vision_cfg", "timm_pool", "token"),
        ("vision_cfg", "timm_proj", "linear"),
        ("text_cfg", "width", 768),
        ("text_cfg", "pool_type", "last"),
    ):
        wrong = json.loads(json.dumps(fields))
        wrong["model_cfg"][section][key] = value
        (tmp_path / "out" / "open_clip_config.json").write_text(json.dumps(wrong))
        with pytest.raises(CheckpointError, match=key):
            open_checkpoint(tmp_path / "out")


def test_what_openclip_does_not_have_is_refused(tmp_path):
    for name in ("MobileCLIP-S0", "MobileCLIP-B"):
        tensors = blank_model(MOBILECLIP[name], torch.float32).state_dict()
        with pytest.raises(CheckpointError, match="Apple"):
            save_checkpoint(MOBILECLIP[name], tensors, tmp_path / "out")


# Everything else that a model of this project does.


def test_names_are_models_with_files(capsys):
    assert [name for name in available_models() if name.startswith("MobileCLIP")] == list(MOBILECLIP)
    assert main(["models", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["MobileCLIP-S1"]["published"]["imagenet"] == 72.6
    for name, model in MODELS.items():
        assert 0.99 < model.size / (2 * rows[name]["parameters"]) < 1.01


def test_a_file_without_published_sha256_is_held_to_the_first_one(tmp_path, monkeypatch, capsys):
    module = importlib.import_module("miniclip.weights.download")
    model = dataclasses.replace(MODELS["MobileCLIP-S1"], url="http://x/s1.pt", file="s1.pt", size=10)
    asked = []

    def answer(body):
        def request_until_whole(url, part):
            asked.append(url)
            part.write_bytes(body)

        monkeypatch.setattr(module, "_request_until_whole", request_until_whole)

    answer(b"<html>")
    with pytest.raises(module.DownloadError, match="at least 10"):
        module.download(model, tmp_path)
    assert not (tmp_path / "s1.pt").exists() and not (tmp_path / "s1.pt.sha256").exists()
    answer(b"0123456789")
    path = module.download(model, tmp_path)
    assert (tmp_path / "s1.pt.sha256").read_text() == f"{module.sha256_of(path)}\n"
    assert "no sha256 is published" in capsys.readouterr().err
    assert module.download(model, tmp_path) == path and len(asked) == 2
    path.unlink()
    answer(b"9876543210")
    with pytest.raises(module.DownloadError, match="sha256"):
        module.download(model, tmp_path)
    monkeypatch.setenv("MINICLIP_MIRROR", "http://mirror/clip/")
    with pytest.raises(module.DownloadError):
        module.download(MODELS["MobileCLIP-S0"], tmp_path)
    assert asked[-1] == "http://mirror/clip/mobileclip_s0.pt"


def test_preprocess_of_each_model():
    for name, config in MOBILECLIP.items():
        large = any(part in name for part in ("S3", "S4", "L-14"))
        assert (config.preprocess.mean == (0.0, 0.0, 0.0)) == (config.preprocess.std == (1.0, 1.0, 1.0)) == (not large)
        assert config.preprocess.interpolation == ("bicubic" if name == "MobileCLIP2-L-14" else "bilinear")
        assert config.preprocess.image_size == (224 if name.removesuffix("-LT").endswith(("B", "14")) else 256)


def test_every_layer_norm_of_mobileclip_b_has_its_eps():
    for code, eps in (("apple", 1e-5), ("openclip", 1e-6)):
        model = blank_model(dataclasses.replace(MOBILECLIP["MobileCLIP-B"], vision=CONV_VIT[code]), torch.float32)
        assert {module.eps for module in model.visual.modules() if isinstance(module, LayerNorm)} == {eps}
