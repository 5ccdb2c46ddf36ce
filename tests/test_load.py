"""`load` and `build_model`: every kind of file gives the same model, and bad ones give an error that helps."""

import dataclasses
import json
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from conformance.openai_cases import CASES, IMAGES, TEXTS
from conformance.seeded import image, text, weights
from safetensors.torch import save_file

from miniclip.config import MODELS, CLIPConfig, PreprocessConfig, to_json
from miniclip.loading import available_models, build_model, load, open_checkpoint
from miniclip.mobileclip.config import MODELS as MOBILECLIPS
from miniclip.models import CLIP, convert_weights
from miniclip.preprocess import Preprocess
from miniclip.save import save_checkpoint
from miniclip.weights import CheckpointError


def state_dict(config: CLIPConfig) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        model = CLIP(config)
    return weights({name: tuple(value.shape) for name, value in model.state_dict().items()})


@torch.no_grad()
def outputs(model: CLIP) -> tuple[torch.Tensor, torch.Tensor]:
    vision, words = model.config.vision, model.config.text
    images = image(IMAGES, vision.image_size)
    texts = text(TEXTS, words.context_length, words.vocab_size)
    return model.encode_image(images), model.encode_text(texts)


def assert_same(model: CLIP, expected: CLIP) -> None:
    for mine, theirs in zip(outputs(model), outputs(expected), strict=True):
        assert torch.equal(mine, theirs)


@pytest.fixture(scope="module", params=["vit", "resnet"])
def tensors(request):
    return state_dict(CASES[request.param])


@pytest.fixture(scope="module")
def vit():
    return state_dict(CASES["vit"])


def test_build_model_infers_the_config(tensors):
    model = build_model(tensors)
    assert model.config in CASES.values()
    assert not model.training
    assert all(torch.equal(value, tensors[name]) for name, value in model.state_dict().items())


def test_the_model_has_a_copy(vit):
    tensors = {name: tensor.clone() for name, tensor in vit.items()}
    model = build_model(tensors)
    before = outputs(model)
    for tensor in tensors.values():
        tensor.zero_()
    assert torch.equal(outputs(model)[0], before[0])


def test_state_dict_files(tensors, tmp_path):
    expected = build_model(tensors)
    buffers = {
        "input_resolution": torch.tensor(40),
        "context_length": torch.tensor(13),
        "vocab_size": torch.tensor(301),
    }
    prefixed = {f"module.{name}": tensor for name, tensor in tensors.items()}
    contents = {
        "plain": {**tensors, **buffers},
        "model": {"model": tensors},
        "ddp": {"epoch": 3, "state_dict": prefixed},
    }
    for name, content in contents.items():
        torch.save(content, tmp_path / f"{name}.pt")
        model, preprocess = load(tmp_path / f"{name}.pt", device="cpu")
        assert_same(model, expected)
        assert preprocess == Preprocess(model.config.preprocess)
    save_file(tensors, tmp_path / "x.safetensors")
    assert_same(load(str(tmp_path / "x.safetensors"), device="cpu")[0], expected)


def test_torchscript_archive(tensors, tmp_path):
    """As openai/CLIP's files were made: traced, in half precision, with three integers among the buffers."""
    model = convert_weights(build_model(tensors), torch.float16)
    for name, value in (("input_resolution", 40), ("context_length", 13), ("vocab_size", 301)):
        delattr(model, name) if hasattr(model, name) else None
        model.register_buffer(name, torch.tensor(value))
    size, length = model.config.vision.image_size, model.config.text.context_length
    example = torch.zeros(1, 3, size, size), torch.zeros(1, length, dtype=torch.int)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(Forward(model), example, check_trace=False)
        torch.jit.save(torch.jit.trace(Forward(model), example, check_trace=False).clip, tmp_path / "archive.pt")
    loaded, _ = load(tmp_path / "archive.pt", device="cpu")
    assert loaded.dtype == torch.float32
    assert_same(loaded, convert_weights(build_model(tensors, dtype=torch.float16), torch.float32))


class Forward(torch.nn.Module):
    """Keeps a model's checks of Python integers out of the trace."""

    def __init__(self, clip: CLIP):
        super().__init__()
        self.clip = clip

    def forward(self, images, texts):
        return self.clip.visual(images.to(self.clip.dtype))


def test_missing_counters_of_batches_are_fine():
    tensors = {k: v for k, v in state_dict(CASES["resnet"]).items() if not k.endswith("num_batches_tracked")}
    assert_same(build_model(tensors), build_model(state_dict(CASES["resnet"])))


def test_directories(vit, tmp_path):
    config = CASES["vit"]
    save_checkpoint(config, vit, tmp_path / "hf")
    model, preprocess = load(tmp_path / "hf", device="cpu")
    assert model.config == config
    assert_same(model, build_model(vit))

    folder = tmp_path / "openclip"
    folder.mkdir()
    save_file(vit, folder / "open_clip_model.safetensors")
    vision = {"image_size": 40, "layers": 3, "width": 128, "patch_size": 8}
    words = {"context_length": 13, "vocab_size": 301, "width": 64, "heads": 1, "layers": 2}
    model_cfg = {"embed_dim": 48, "quick_gelu": True, "vision_cfg": vision, "text_cfg": words}
    preprocess_cfg = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "interpolation": "bilinear"}
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg})
    )
    model, preprocess = load(folder, device="cpu")
    assert_same(model, build_model(vit))
    assert preprocess.config.mean == (0.5, 0.5, 0.5)
    assert preprocess.config.interpolation == "bilinear"


def test_a_directory_states_its_activation(vit, tmp_path):
    transformer = dataclasses.replace(CASES["vit"].text.transformer, activation="gelu")
    text_config = dataclasses.replace(CASES["vit"].text, transformer=transformer)
    vision_transformer = dataclasses.replace(CASES["vit"].vision.transformer, activation="gelu")
    vision_config = dataclasses.replace(CASES["vit"].vision, transformer=vision_transformer)
    save_checkpoint(dataclasses.replace(CASES["vit"], vision=vision_config, text=text_config), vit, tmp_path / "hf")
    model, _ = load(tmp_path / "hf", device="cpu", activation="gelu")
    assert not torch.allclose(outputs(model)[0], outputs(build_model(vit))[0], atol=1e-3)
    with pytest.raises(CheckpointError, match="states gelu, not quick_gelu"):
        load(tmp_path / "hf", device="cpu", activation="quick_gelu")


def test_the_activation_of_a_bare_file(vit, tmp_path):
    save_file(vit, tmp_path / "x.safetensors")
    assert load(tmp_path / "x.safetensors", "cpu")[0].config.vision.transformer.activation == "quick_gelu"
    assert load(tmp_path / "x.safetensors", "cpu", activation="gelu")[0].config.vision.transformer.activation == "gelu"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype(vit, tmp_path, dtype):
    save_file(vit, tmp_path / "x.safetensors")
    model, _ = load(tmp_path / "x.safetensors", device="cpu", dtype=dtype)
    assert model.dtype == dtype
    assert_same(model, convert_weights(build_model(vit), dtype))


def test_the_file_may_be_overwritten_after_loading(vit, tmp_path):
    path = tmp_path / "x.pt"
    torch.save(vit, path)
    model, _ = load(path, device="cpu")
    path.write_bytes(b"")  # a model that still looked into the file would crash the process
    assert_same(model, build_model(vit))


def test_every_wrong_tensor_is_listed(vit):
    wrong = dict(vit)
    del wrong["visual.ln_post.bias"], wrong["ln_final.bias"]
    wrong["visual.proj"] = torch.zeros(7, 9)
    wrong["visual.extra"] = torch.zeros(3)
    with pytest.raises(CheckpointError) as error:
        build_model(wrong)
    lines = ["visual.ln_post.bias [128]", "ln_final.bias [64]", "visual.proj is [7, 9]; expected [128, 48]"]
    for line in [*lines, "visual.extra [3]"]:
        assert line in str(error.value)


def test_the_error_names_the_file(vit, tmp_path):
    vit = dict(vit)
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=r"other\.pt: tensor text_projection is missing"):
        load(tmp_path / "other.pt")
    del vit["ln_final.bias"]
    save_file(vit, tmp_path / "part.safetensors")
    with pytest.raises(CheckpointError, match=r"part\.safetensors: (.|\n)*ln_final\.bias \[64\]"):
        load(tmp_path / "part.safetensors")
    with pytest.raises(CheckpointError, match=r"ln_final\.bias \[64\]"):
        save_checkpoint(*open_checkpoint(tmp_path / "part.safetensors"), tmp_path / "out.pt")
    assert not (tmp_path / "out.pt").exists()


def test_no_file_runs_code(tmp_path):
    class Call:
        def __reduce__(self):
            return open, (str(tmp_path / "canary"), "w")

    torch.save({"weight": Call()}, tmp_path / "hostile.pt")
    with pytest.raises(CheckpointError, match=r"hostile\.pt: refused io\.open"):
        load(tmp_path / "hostile.pt")
    assert not (tmp_path / "canary").exists()


def test_names():
    assert available_models()[:2] == ["RN50", "RN101"]
    assert "ViT-L/14@336px" in available_models()
    with pytest.raises(CheckpointError, match=r"ViT-B-32 is neither a file .*models: did you mean ViT-B/32\?$"):
        load("ViT-B-32")


def test_a_named_model_is_downloaded(vit, tmp_path, monkeypatch):
    config = dataclasses.replace(CASES["vit"], preprocess=PreprocessConfig(40, interpolation="bilinear"))
    monkeypatch.setitem(MODELS, "ViT-B/32", dataclasses.replace(MODELS["ViT-B/32"], config=config))
    save_file(vit, tmp_path / "ViT-B-32.pt")
    asked = []

    def download(model, root):
        asked.append((model.file, root))
        return tmp_path / "ViT-B-32.pt"

    monkeypatch.setattr("miniclip.loading.download", download)
    assert_same(load("ViT-B/32", "cpu", False, tmp_path)[0], build_model(vit))
    assert asked == [("ViT-B-32.pt", tmp_path)]


def test_arguments_that_make_no_sense(tmp_path):
    with pytest.raises(ValueError, match=r"torch\.compile"):
        load("ViT-B/32", jit=True)
    with pytest.raises(ValueError, match=r'backend="triton" needs a GPU, and the model is on cpu'):
        load("ViT-B/32", device="cpu", backend="triton")
    with pytest.raises(ValueError, match="backend is 'cudnn'"):
        load("ViT-B/32", backend="cudnn")
    with pytest.raises(CheckpointError, match="directory without"):
        load(tmp_path)


def test_convert_round_trip(vit, tmp_path):
    """safetensors -> Hugging Face -> state dict -> safetensors changes no bit and no dtype."""
    half = convert_weights(build_model(vit), torch.float16).state_dict()
    save_file(half, tmp_path / "a.safetensors")
    path = tmp_path / "a.safetensors"
    for name in ("b", "c.pt", "d.safetensors"):
        save_checkpoint(*open_checkpoint(path), tmp_path / name)
        path = tmp_path / name
    _, tensors = open_checkpoint(path)
    assert sorted(tensors) == sorted(half)
    for name, tensor in half.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)
    with pytest.raises(CheckpointError, match=r"\.bin: expected a name that ends in"):
        save_checkpoint(*open_checkpoint(path), tmp_path / "x.bin")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells a process's own peak")
def test_memory(tmp_path):
    """Loading peaks at no more than 1.3 times the model's bytes: half precision in the file, float32 in memory."""
    config = dataclasses.replace(CASES["vit"], text=dataclasses.replace(CASES["vit"].text, vocab_size=300))
    wide = dataclasses.replace(config.vision.transformer, width=512, heads=8, layers=24, mlp_width=2048)
    config = dataclasses.replace(config, vision=dataclasses.replace(config.vision, transformer=wide))
    torch.save(convert_weights(CLIP(config), torch.float16).state_dict(), tmp_path / "x.pt")  # 150 MB
    code = f"""
import re, miniclip, torch
torch.set_num_threads(1)
warm_up = miniclip.CLIP, torch.zeros(9).half().float()
def status(field): return 1024 * int(re.search(field + r":\\s+(\\d+)", open("/proc/self/status").read())[1])
before = status("VmRSS")
model, _ = miniclip.load({str(tmp_path / "x.pt")!r}, device="cpu")
print((status("VmHWM") - before) / sum(p.numel() * p.element_size() for p in model.parameters()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0.9 < float(done.stdout) < 1.3  # below 1 there would be no model


# Faults of files and directories, each a CheckpointError of bounded length that names the file.


def fault(*arguments, **options) -> str:
    with pytest.raises(CheckpointError) as error:
        load(*arguments, device="cpu", **options)
    assert len(str(error.value)) <= 5000
    return str(error.value)


def test_names_that_no_file_can_have(tmp_path, monkeypatch):
    assert "neither a file" in fault("x" * 10_000) or "can't be read" in fault("x" * 10_000)
    assert "embedded null byte" in fault("a\0b") or "neither a file" in fault("a\0b")
    monkeypatch.setattr(Path, "exists", lambda path: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    assert fault(tmp_path / "closed" / "x.pt").endswith("closed/x.pt: it can't be read: Permission denied")


def test_the_home_folder(vit, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save_checkpoint(CASES["vit"], vit, "~/x.safetensors")
    assert (tmp_path / "x.safetensors").exists()
    assert_same(load("~/x.safetensors", "cpu")[0], build_model(vit))
    assert_same(load(Path("~/x.safetensors"), "cpu")[0], build_model(vit))


def test_shapes_and_names_that_no_model_has(vit, tmp_path):
    apple = {name: torch.zeros(2, 2) for name in ("image_encoder.model.patch_emb.0.block.conv.weight",)}
    odd = {
        "5,000 digits": {
            f"visual.stages.{'9' * 5000}.blocks.0.x": torch.zeros(1),
            "visual.stem.0.weight": torch.zeros(1),
        },
        "digits": {"visual.stages.99999.blocks.0.x": torch.zeros(1), "visual.stem.0.weight": torch.zeros(1)},
        "class token": {"visual.trunk.cls_token": torch.zeros(5), "visual.trunk.norm_pre.weight": torch.zeros(1)},
        "stem": {"visual.stem.0.weight": torch.zeros(())},
        "apple": apple,
        "many layers": {f"transformer.resblocks.{i}.ln_1.bias": torch.zeros(1) for i in range(5000)} | vit,
        "embedding": vit | {"token_embedding.weight": torch.zeros(1 << 25, 0)},
        "long names": {f"{i}{'x' * 900}": torch.zeros(1) for i in range(1000)} | vit,
    }
    for name, tensors in odd.items():
        save_file({key: tensor.clone() for key, tensor in tensors.items()}, tmp_path / f"{name}.safetensors")
        assert f"{name}.safetensors" in fault(tmp_path / f"{name}.safetensors")


HF = {"model_type": "clip", "projection_dim": 16}


@pytest.mark.parametrize(
    "config",
    [
        {**HF, "text_config": {"hidden_size": 1 << 24, "intermediate_size": 1 << 24}},
        {**HF, "vision_config": {"image_size": 1 << 24, "patch_size": 1}},
        {**HF, "vision_config": {"num_hidden_layers": 1000}, "text_config": {"num_hidden_layers": 1000}},
        {**HF, "projection_dim": []},
        {**HF, "text_config": {"hidden_act": "x" * 10**6}},
    ],
)
def test_configs_that_no_file_fits(config, vit, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    size = config.get("vision_config", {}).get("image_size", 224)
    preprocessor = {"size": size, "crop_size": size}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    save_checkpoint(CASES["vit"], vit, tmp_path / "hf")
    shutil.copy(tmp_path / "hf" / "model.safetensors", tmp_path)
    start = time.monotonic()
    assert str(tmp_path) in fault(tmp_path)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    "model_cfg",
    [
        {"embed_dim": 512, "vision_cfg": {"timm_model_name": []}, "text_cfg": {}},
        {"embed_dim": 512, "vision_cfg": {"timm_model_name": {"a": 1}}, "text_cfg": {}},
        {"embed_dim": 512, "vision_cfg": {"timm_model_name": "x" * 10**6}, "text_cfg": {}},
        {"embed_dim": 512, "vision_cfg": [], "text_cfg": {}},
    ],
)
def test_an_openclip_config_of_other_types(model_cfg, vit, tmp_path):
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_cfg}))
    save_file(vit, tmp_path / "open_clip_model.safetensors")
    assert "vision_cfg" in fault(tmp_path)


def test_a_std_of_zero(vit, tmp_path):
    save_checkpoint(CASES["vit"], vit, tmp_path / "hf")
    (tmp_path / "hf" / "miniclip.json").unlink()
    path = tmp_path / "hf" / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"image_std": [0, 1, 1]}))
    assert "std is (0.0, 1.0, 1.0); expected three positive numbers" in fault(tmp_path / "hf")


def test_a_mobileclip_s_config_is_bounded(vit, tmp_path):
    values = to_json(MOBILECLIPS["MobileCLIP-S0"].config)
    for change in (
        {"widths": [64] * 4, "blocks": [1 << 24] * 4},
        {"blocks": [1, 1]},
        {"widths": []},
        {"widths": [1 << 24] * 4, "blocks": [1] * 4},
    ):
        wrong = values | {"vision": values["vision"] | change}
        save_file(vit, tmp_path / "x.safetensors", {"miniclip_config": json.dumps(wrong)})
        assert "x.safetensors" in fault(tmp_path / "x.safetensors")


# A file of weights in a directory whose config says what it is.


def test_a_file_in_a_directory_obeys_its_config(vit, tmp_path):
    """Other heads than the shapes suggest: the file by its name gives what the directory gives."""
    transformer = dataclasses.replace(CASES["vit"].vision.transformer, heads=8)
    config = dataclasses.replace(CASES["vit"], vision=dataclasses.replace(CASES["vit"].vision, transformer=transformer))
    save_checkpoint(config, vit, tmp_path / "hf")
    for keep in ("miniclip.json", "config.json"):  # with both, and with Hugging Face's own alone
        assert load(tmp_path / "hf" / "model.safetensors", "cpu")[0].config == config
        (tmp_path / "hf" / keep).unlink()
    assert load(tmp_path / "hf" / "model.safetensors", "cpu")[0].config == CASES["vit"]  # a bare file again


def test_another_file_in_such_a_directory_is_its_own(vit, tmp_path):
    save_checkpoint(CASES["resnet"], state_dict(CASES["resnet"]), tmp_path / "other.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "blip"}')
    assert load(tmp_path / "other.safetensors", "cpu")[0].config == CASES["resnet"]
    save_file(vit, tmp_path / "model.safetensors")
    assert "model_type is 'blip'; expected 'clip'" in fault(tmp_path / "model.safetensors")


def test_a_prefix_of_some_names_is_explained(vit, tmp_path):
    mixed = {f"model.{name}": tensor for name, tensor in vit.items()} | {"criterion.weight": torch.zeros(1)}
    torch.save({"state_dict": mixed}, tmp_path / "lightning.ckpt")
    assert f"{len(vit)} of {len(vit) + 1} names begin with model., which is left out if all do" in fault(
        tmp_path / "lightning.ckpt"
    )
