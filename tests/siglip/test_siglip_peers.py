"""transformers and open_clip compute the same as miniclip, of their own models' files with seeded weights.

open_clip's models are the smallest that it has, whose towers are cut to two blocks.
"""

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from siglip_small import (
    LENGTH,
    PREPROCESSOR,
    TEXTS,
    difference,
    huggingface_directory,
    inputs,
    json_tokenizer,
    sentencepiece_model,
    weights,
)

from miniclip import load
from miniclip.loading import config_readers
from miniclip.siglip import names
from miniclip.siglip.config import SigLIPConfig
from miniclip.weights import CheckpointError
from miniclip.weights.openclip import read_config

TOLERANCE = 1e-5  # largest difference of unit embeddings
IMAGE = Path(__file__).parents[2] / "examples" / "images" / "dog.png"
STRINGS = [*TEXTS, "x ▁▁ y", "ÉTÉ – straße, “tea”", "A\tB\n\nC", "!!!", "a" * 30, "mid.dot e.g. 3,5%", "日本 語"]


def test_transformers_computes_the_same(tmp_path):
    transformers = pytest.importorskip("transformers")
    tensors = huggingface_directory(tmp_path)
    theirs = transformers.SiglipModel.from_pretrained(tmp_path).eval()
    shapes = {name: tuple(x.shape) for name, x in theirs.state_dict().items()}
    assert shapes == {name: tuple(x.shape) for name, x in tensors.items()}
    model, _ = load(tmp_path, "cpu")

    def computed(pixels: torch.Tensor, ids: torch.Tensor) -> tuple:
        with torch.no_grad():
            output = theirs(pixel_values=pixels, input_ids=ids.long())
        return output.image_embeds.numpy(), output.text_embeds.numpy(), output.logits_per_image.numpy()

    assert difference(model, computed(*inputs())) < TOLERANCE
    theirs.vision_model.head.layernorm.eps = 1e-2  # negative control
    assert difference(model, computed(*inputs())) > TOLERANCE


@pytest.mark.parametrize("resample", [2, 3])
def test_transformers_prepares_pictures_alike(resample, tmp_path):
    transformers = pytest.importorskip("transformers")
    huggingface_directory(tmp_path)
    settings = PREPROCESSOR | {"resample": resample}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    theirs = transformers.SiglipImageProcessorPil.from_pretrained(tmp_path)
    _, preprocess = load(tmp_path, "cpu")
    picture = Image.open(IMAGE).convert("RGB").crop((0, 0, 50, 64))
    expected = np.asarray(theirs(picture)["pixel_values"][0])
    assert np.abs(preprocess(picture).numpy() - expected).max() < 1e-6


def test_transformers_tokenizes_alike(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("sentencepiece")
    huggingface_directory(tmp_path)
    sentencepiece_model(tmp_path / "spiece.model")
    theirs = transformers.SiglipTokenizer(str(tmp_path / "spiece.model"), model_max_length=LENGTH)
    theirs.save_pretrained(tmp_path)
    model, _ = load(tmp_path, "cpu")
    expected = theirs(STRINGS, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt").input_ids
    assert model.tokenize(STRINGS, truncate=True).tolist() == expected.tolist()


def test_transformers_tokenizes_alike_for_siglip_2(tmp_path):
    transformers = pytest.importorskip("transformers")
    huggingface_directory(tmp_path)
    json_tokenizer(tmp_path / "tokenizer.json")
    special = {"eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<bos>"}
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), **special)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GemmaTokenizer", **special}))
    model, _ = load(tmp_path, "cpu")
    for text, row in zip(STRINGS, model.tokenize(STRINGS, truncate=True).tolist(), strict=True):
        expected = [*theirs(text.lower(), add_special_tokens=False).input_ids[: LENGTH - 1], 1]
        assert row == [*expected, *[0] * (LENGTH - len(expected))], text


# OpenCLIP.


def openclip_directory(folder: Path, open_clip, model_cfg: dict, monkeypatch) -> torch.nn.Module:
    """Fill a directory with open_clip's model of two blocks a tower; returns that model."""
    import timm

    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **options: create(name, depth=2, **options))
    monkeypatch.setattr(names, "TIMM", {name: (w, 2, h, m) for name, (w, _, h, m) in names.TIMM.items()})
    model_cfg = {key: value for key, value in model_cfg.items() if key != "custom_text"}
    model_cfg["text_cfg"] = model_cfg["text_cfg"] | {"layers": 2, "vocab_size": 300}
    theirs = open_clip.model.CustomTextCLIP(**model_cfg).eval()
    tensors = weights({name: tuple(x.shape) for name, x in theirs.state_dict().items()})
    theirs.load_state_dict(tensors)
    save_file(tensors, folder / "open_clip_model.safetensors")
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
    values = {"model_cfg": model_cfg | {"custom_text": True}, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(values))
    return theirs


@pytest.mark.parametrize(
    "name", ["ViT-B-16-SigLIP", "ViT-B-32-SigLIP2-256", "ViT-SO400M-14-SigLIP", "ViT-SO400M-16-SigLIP-i18n-256"]
)
def test_open_clip_computes_the_same(name, tmp_path, monkeypatch):
    open_clip = pytest.importorskip("open_clip")
    theirs = openclip_directory(tmp_path, open_clip, open_clip.get_model_config(name), monkeypatch)
    model, preprocess = load(tmp_path, "cpu")
    assert preprocess.config.resize_mode == "squash" and preprocess.config.mean == (0.5, 0.5, 0.5)
    torch.manual_seed(0)
    size = model.visual.input_resolution
    pixels, ids = torch.randn(1, 3, size, size), torch.randint(0, 300, (2, model.context_length))

    @torch.no_grad()
    def error() -> float:
        image, text, scale, bias = theirs(pixels, ids)
        scalars = torch.stack([scale - model.logit_scale.exp(), bias - model.logit_bias])
        assert scalars.abs().max() < 1e-4
        image_error = (model.encode_image(pixels, normalize=True) - image).abs().max()
        return max(float(image_error), float((model.encode_text(ids, normalize=True) - text).abs().max()))

    assert error() < TOLERANCE
    model.visual.pool.mlp.activation = "quick_gelu"  # negative control
    assert error() > TOLERANCE


def test_every_siglip_of_open_clip_is_read(tmp_path):
    """The sizes that the table of timm's towers states are those of the models that timm builds."""
    pytest.importorskip("open_clip")
    import timm

    folder = Path(find_spec("open_clip").origin).parent / "model_configs"
    read = 0
    for path in sorted(folder.glob("*SigLIP*.json")):
        model_cfg = json.loads(path.read_text())
        (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_cfg}))
        config = read_config(tmp_path, config_readers().openclip)
        assert isinstance(config, SigLIPConfig)
        with torch.device("meta"):
            tower = timm.create_model(model_cfg["vision_cfg"]["timm_model_name"], num_classes=0)
        transformer = config.vision.transformer
        block = tower.blocks[0]
        built = (tower.embed_dim, len(tower.blocks), block.attn.num_heads, block.mlp.fc1.out_features)
        assert built == (transformer.width, transformer.layers, transformer.heads, transformer.mlp_width)
        assert tower.patch_embed.img_size == (config.vision.image_size,) * 2
        assert tower.patch_embed.patch_size == (config.vision.patch_size,) * 2
        assert tower.attn_pool.mlp.fc1.out_features == transformer.mlp_width
        assert tower.attn_pool.num_heads == transformer.heads
        assert (type(block.mlp.act).__name__ == "GELUTanh") == (transformer.activation == "gelu_tanh"), path.name
        read += 1
    assert read == 26


def test_openclip_configs_that_differ_are_refused(tmp_path):
    open_clip = pytest.importorskip("open_clip")
    plain = open_clip.get_model_config("ViT-B-16-SigLIP")
    for section, key, value in (
        ("vision_cfg", "timm_pool", "avg"),
        ("vision_cfg", "timm_proj", "linear"),
        ("vision_cfg", "image_size", 256),
        ("vision_cfg", "patch_dropout", 0.5),
        ("text_cfg", "no_causal_mask", False),
        ("text_cfg", "pool_type", "argmax"),
        ("text_cfg", "norm_kwargs", {}),
        ("text_cfg", "tokenizer_kwargs", {}),
        ("text_cfg", "embed_cls", True),
    ):
        changed = plain | {section: plain[section] | {key: value}}
        (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": changed}))
        with pytest.raises(CheckpointError, match=key):
            read_config(tmp_path, config_readers().openclip)
