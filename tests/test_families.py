"""Families of models: a new one is a module and a row, a broken one breaks nothing else, and their tables decide."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conformance.seeded import image, text, weights
from PIL import Image
from safetensors.torch import save_file
from toy_tower import CONFIG, FAMILY, ToyCLIP

from miniclip import compare, load, loading, tokenize, trace
from miniclip.config import (
    MODELS,
    OPENAI_URL,
    NamedModel,
    PreprocessConfig,
    TextConfig,
    TransformerConfig,
    ViTConfig,
    clip_config,
    openai_transformer,
    to_json,
)
from miniclip.data.synthetic import create_synthetic
from miniclip.io import write_json
from miniclip.loading import FAMILIES, build_model, named_models, new_model
from miniclip.models import CLIP
from miniclip.save import save_checkpoint
from miniclip.training.options import TrainOptions
from miniclip.training.train import train
from miniclip.weights import CheckpointError

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "examples" / "images"


# A third image tower.


@pytest.fixture
def toy(monkeypatch) -> CLIP:
    monkeypatch.setattr(loading, "FAMILIES", [FAMILY, *FAMILIES])
    torch.manual_seed(0)
    return new_model(CONFIG).eval()


@torch.no_grad()
def embeddings(model: CLIP) -> torch.Tensor:
    return torch.cat([model.encode_image(image(2, 16)), model.encode_text(tokenize(["a dog", "two cats"]))])


def test_a_third_tower_saves_and_loads(toy, tmp_path):
    save_checkpoint(toy.config, toy.state_dict(), tmp_path / "x.safetensors")
    model, preprocess = load(tmp_path / "x.safetensors", "cpu")
    assert type(model) is ToyCLIP and model.config == CONFIG and preprocess.config == CONFIG.preprocess
    assert torch.equal(embeddings(model), embeddings(toy))
    assert load(tmp_path / "x.safetensors", "cpu", dtype=torch.bfloat16)[0].dtype == torch.bfloat16
    for name, message in (("x.pt", "can't hold"), ("x", "no directory format")):
        with pytest.raises(CheckpointError, match=message):
            save_checkpoint(toy.config, toy.state_dict(), tmp_path / name)
    with pytest.raises(CheckpointError, match=r"1 missing:\n    visual\.proj\.bias"):
        build_model({name: t for name, t in toy.state_dict().items() if name != "visual.proj.bias"}, CONFIG)


def test_a_third_tower_traces_and_compares(toy):
    golden = trace(toy, Image.open(IMAGES / "dog.png"), ["a dog", "a pizza"])
    assert {"image.pixels", "visual.conv", "visual.proj", "image_embedding", "logits_per_image"} <= golden.keys()
    assert golden["visual.conv"].shape == (1, 24, 4, 4)
    assert compare(golden, golden).passed
    wrong = golden | {name: golden[name] * 1.1 for name in ("visual.conv", "visual.proj")}
    assert compare(golden, wrong).first_wrong == "visual.conv"


def test_a_third_tower_trains(toy, tmp_path):
    create_synthetic(tmp_path / "shapes", train=2, val=1)
    write_json(tmp_path / "toy.json", to_json(CONFIG))
    options = {"data": str(tmp_path / "shapes" / "train.json"), "val": str(tmp_path / "shapes" / "val.json")}
    options |= {"model_size": str(tmp_path / "toy.json"), "output": str(tmp_path / "run"), "steps": 2, "batch_size": 4}
    trained = train(TrainOptions(**options, device="cpu"))
    loaded, _ = load(tmp_path / "run" / "last.safetensors", "cpu")
    assert all(torch.equal(tensor, trained.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    torch.testing.assert_close(embeddings(loaded), embeddings(trained.eval()), atol=1e-6, rtol=0)
    assert load(tmp_path / "run", "cpu")[0].config == CONFIG
    assert not torch.equal(embeddings(loaded), embeddings(toy))


def test_a_config_of_no_family_is_an_error(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors", {"miniclip_config": json.dumps(to_json(CONFIG))})
    with pytest.raises(CheckpointError, match=r"x\.safetensors: no family of models here has a ToyConfig"):
        load(tmp_path / "x.safetensors")


# A family that is broken.

CHECK = """
import sys, warnings
from pathlib import Path

def loads(name):
    from miniclip import loading
    try:
        loading.blank_model(loading.named_models()[name].config, loading.torch.float32, fast=True)
        if name == "tiny-ViT":
            loading.load(name, "cpu")
    except Exception:
        return False
    return True

def works():
    for name in [name for name in sys.modules if name.split(".")[0] == "miniclip"]:
        del sys.modules[name]
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        return loads("tiny-ViT"), loads("MobileCLIP-S0"), [str(each.message) for each in warned]

root = Path(sys.argv[1])
assert works() == (True, True, [])
for family, expected in (("mobileclip", (True, False)), ("siglip", (True, True)), ("openai", (False, True))):
    for file in sorted((root / "miniclip" / family).rglob("*.py")):
        file.rename(file.with_suffix(".away"))
        *got, warned = works()
        file.with_suffix(".away").rename(file)
        assert tuple(got) == expected, (file, got, warned)
        assert len(warned) == 1 and f"the models of miniclip/{family} can't be loaded" in warned[0], (file, warned)
        print(file.name)
"""


def test_without_any_one_of_its_files_a_family_alone_is_missing(tmp_path):
    for folder in ("miniclip", "kernels", "weights"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "tiny-RN*"))
    (tmp_path / "setup.py").touch()
    command = [sys.executable, "-c", CHECK, str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) >= 15


# The tables.


def test_a_row_decides_and_not_the_shapes(tmp_path, monkeypatch):
    """A ViT-H/14, whose heads are not 64 wide, and a changed interpolation, loaded from their own files."""
    wide = ViTConfig(28, 14, TransformerConfig(1280, 1, 16, 5120, "gelu"))
    tower = TextConfig(8, 40, TransformerConfig(64, 1, 2, 256, "gelu"))
    config = dataclasses.replace(clip_config(32, wide, 64, 1), text=tower)
    tensors = weights(
        {name: tuple(t.shape) for name, t in loading.blank_model(config, torch.float32).state_dict().items()}
    )
    save_file(tensors, tmp_path / "h.safetensors")
    with pytest.raises(CheckpointError, match="1280 wide"):
        load(tmp_path / "h.safetensors", "cpu")
    monkeypatch.setitem(MODELS, "ViT-H/14", NamedModel(config, str(tmp_path / "h.safetensors")))
    model, _ = load("ViT-H/14", "cpu")
    assert model.config == config and model.visual.transformer.resblocks[0].attn.heads == 16
    expected = build_model(tensors, config)
    with torch.no_grad():
        assert torch.equal(model.encode_image(image(1, 28)), expected.encode_image(image(1, 28)))
        assert torch.equal(model.encode_text(text(1, 8, 40)), expected.encode_text(text(1, 8, 40)))

    small = clip_config(16, ViTConfig(16, 8, openai_transformer(64, 1)), 64, 1)
    bilinear = dataclasses.replace(small, preprocess=PreprocessConfig(16, interpolation="bilinear"))
    save_checkpoint(small, new_model(small).state_dict(), tmp_path / "b.safetensors")
    monkeypatch.setitem(MODELS, "bilinear", NamedModel(bilinear, str(tmp_path / "b.safetensors")))
    assert load("bilinear", "cpu")[1].config.interpolation == "bilinear"
    assert load(tmp_path / "b.safetensors", "cpu")[1].config.interpolation == "bicubic"


def test_openais_table_is_consistent():
    """A file's folder is its sha256, and what is known of the sizes is the tensors, in half precision, and a little."""
    released = {name: model for name, model in MODELS.items() if model.url}
    assert len(released) == 9 == len({model.sha256 for model in released.values()})
    for name, model in released.items():
        assert re.fullmatch(r"[0-9a-f]{64}", model.sha256)
        assert model.url == f"{OPENAI_URL}/{model.sha256}/{model.file}"
        assert model.file == f"{name.replace('/', '-').replace('@', '-')}.pt"
        if model.size:
            tensors = loading.blank_model(model.config, torch.float16).state_dict().values()
            assert 0 < model.size - sum(t.numel() * t.element_size() for t in tensors) < 1_000_000
    assert named_models().keys() >= MODELS.keys()
