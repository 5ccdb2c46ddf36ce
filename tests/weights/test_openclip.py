"""OpenCLIP directories: what is read, what is refused, and that open_clip itself computes the same."""

import json
from collections import Counter
from importlib.metadata import version
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from conformance.seeded import image, text, weights
from openclip_count import outcomes

from miniclip.config import MODELS, CLIPConfig, PreprocessConfig, TextConfig, TransformerConfig, ViTConfig
from miniclip.models import CLIP
from miniclip.weights.errors import CheckpointError
from miniclip.weights.names import layout_of, to_canonical
from miniclip.weights.openclip import MEANING, WEIGHT_FILES, read_config
from miniclip.weights.stated import weight_file

TOLERANCE = 1e-5  # largest difference of unit embeddings

VIT_B_32 = {
    "embed_dim": 512,
    "vision_cfg": {"image_size": 224, "layers": 12, "width": 768, "patch_size": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12},
    "quick_gelu": True,
}
RN50 = VIT_B_32 | {
    "embed_dim": 1024,
    "vision_cfg": {"image_size": 224, "layers": [3, 4, 6, 3], "width": 64, "patch_size": None},
}
VIT_G_14 = {
    "embed_dim": 1024,
    "vision_cfg": {
        "image_size": 224, "layers": 40, "width": 1408, "head_width": 88, "mlp_ratio": 4.3637, "patch_size": 14,
    },
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 1024, "heads": 16, "layers": 24},
}  # fmt: skip


def directory(folder, model_cfg, **more):
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_cfg} | more))
    return folder


def test_openai_models(tmp_path):
    assert read_config(directory(tmp_path, VIT_B_32)) == MODELS["ViT-B/32"].config
    assert read_config(directory(tmp_path, RN50)) == MODELS["RN50"].config


def test_vit_g_14(tmp_path):
    config = read_config(directory(tmp_path, VIT_G_14, preprocess_cfg={"mean": [0.5] * 3, "std": [0.25] * 3}))
    vision = ViTConfig(224, 14, TransformerConfig(1408, 40, 16, 6144, "gelu"))
    text = TextConfig(77, 49408, TransformerConfig(1024, 24, 16, 4096, "gelu"))
    assert config == CLIPConfig(1024, vision, text, PreprocessConfig(224, (0.5,) * 3, (0.25,) * 3))


def test_missing_fields_have_the_defaults(tmp_path):
    config = read_config(directory(tmp_path, {"embed_dim": 9, "vision_cfg": {}, "text_cfg": {}}))
    vision = ViTConfig(224, 16, TransformerConfig(768, 12, 12, 3072, "gelu"))
    text = TextConfig(77, 49408, TransformerConfig(512, 12, 8, 2048, "gelu"))
    assert config == CLIPConfig(9, vision, text, PreprocessConfig(224))


def test_preprocessing(tmp_path):
    stated = {
        "size": [224, 224], "mode": "RGB", "mean": None, "std": [1, 1, 1], "interpolation": "bilinear",
        "resize_mode": "squash", "fill_color": 0,
    }  # fmt: skip
    preprocess = read_config(directory(tmp_path, VIT_B_32, preprocess_cfg=stated)).preprocess
    assert preprocess == PreprocessConfig(224, std=(1, 1, 1), interpolation="bilinear", resize_mode="squash")


def test_unknown_fields_of_preprocessing_are_ignored(tmp_path):
    """As OpenCLIP does: published configs have these."""
    stated = {"hf_hub": "imageomics/bioclip", "url": "", "hf_hub_id": None, "x": 1, "mean": [0.5, 0.5, 0.5]}
    config = read_config(directory(tmp_path, VIT_B_32, preprocess_cfg=stated))
    assert config.preprocess == PreprocessConfig(224, mean=(0.5, 0.5, 0.5))


@pytest.mark.parametrize(
    ("section", "field", "value", "meaning"),
    [
        ("vision_cfg", "timm_model_name", "convnext_base", "timm's other architectures"),
        ("vision_cfg", "no_ln_pre", True, "CLIPA"),
        ("vision_cfg", "ls_init_value", 1e-4, "layer scales"),
        ("text_cfg", "hf_model_name", "roberta-base", "language model"),
        ("text_cfg", "hf_tokenizer_name", "google/mt5-base", "tokenizer is not CLIP's"),
        ("", "init_logit_bias", -10, "SigLIP"),
        ("", "multimodal_cfg", {"width": 9}, "CoCa"),
    ],
)
def test_another_architecture_is_named(tmp_path, section, field, value, meaning):
    model = VIT_B_32 | ({section: VIT_B_32[section] | {field: value}} if section else {field: value})
    with pytest.raises(CheckpointError, match=rf"{field} is .*; expected .*: .*{meaning}"):
        read_config(directory(tmp_path, model))


def test_what_does_not_matter_is_allowed(tmp_path):
    model = VIT_B_32 | {"custom_text": True, "init_logit_scale": 3.0, "multimodal_cfg": None}
    model["vision_cfg"] = model["vision_cfg"] | {"patch_dropout": 0.5, "ls_init_value": None, "act_kwargs": {}}
    model["text_cfg"] = model["text_cfg"] | {"eos_id": 2, "pool_type": "argmax", "no_causal_mask": False, "newer": None}
    assert read_config(directory(tmp_path, model)) == MODELS["ViT-B/32"].config


REFUSED = [
    ("vision_cfg", "timm_model_name", "convnext_base"),
    ("vision_cfg", "ls_init_value", 1e-4),
    ("vision_cfg", "no_ln_pre", True),
    ("vision_cfg", "pool_type", "avg"),
    ("vision_cfg", "attentional_pool", "parallel"),
    ("vision_cfg", "pos_embed_type", "sin_cos_2d"),
    ("vision_cfg", "act_kwargs", {"approximate": "tanh"}),
    ("vision_cfg", "norm_kwargs", {"eps": 1e-6}),
    ("vision_cfg", "qk_norm", True),
    ("vision_cfg", "invented", 1),
    ("vision_cfg", "image_size", [224, 448]),
    ("vision_cfg", "head_width", 100),
    ("vision_cfg", "mlp_ratio", float("inf")),
    ("vision_cfg", "layers", [3, 4, 6]),
    ("vision_cfg", "layers", 10**9),
    ("text_cfg", "hf_model_name", "roberta-base"),
    ("text_cfg", "hf_tokenizer_name", "bert-base-uncased"),
    ("text_cfg", "tokenizer_kwargs", {"clean": "canonicalize"}),
    ("text_cfg", "no_causal_mask", True),
    ("text_cfg", "pool_type", "last"),
    ("text_cfg", "embed_cls", True),
    ("text_cfg", "proj_bias", True),
    ("text_cfg", "proj_type", "none"),
    ("text_cfg", "norm_kwargs", {"eps": 1e-6}),
    ("text_cfg", "block_type", "custom"),
    ("text_cfg", "scale_fc", True),
    ("text_cfg", "heads", 7),
    ("text_cfg", "width", 2**60),
]


@pytest.mark.parametrize(("section", "field", "value"), REFUSED, ids=lambda part: str(part)[:20])
def test_refused_towers(tmp_path, section, field, value):
    model = VIT_B_32 | {section: VIT_B_32[section] | {field: value}}
    with pytest.raises(CheckpointError, match=rf"clip_config\.json: model_cfg\.{section}\.{field} is .*; expected"):
        read_config(directory(tmp_path, model))


@pytest.mark.parametrize(
    ("field", "value"),
    [("init_logit_bias", -10), ("multimodal_cfg", {"width": 9}), ("quick_gelu", "yes"), ("embed_dim", 0), ("new", 1)],
)
def test_refused_models(tmp_path, field, value):
    with pytest.raises(CheckpointError, match=rf"model_cfg\.{field} is"):
        read_config(directory(tmp_path, VIT_B_32 | {field: value}))


@pytest.mark.parametrize("field", ["embed_dim", "vision_cfg", "text_cfg"])
def test_what_has_no_default(tmp_path, field):
    with pytest.raises(CheckpointError, match=rf"model_cfg\.{field} is missing"):
        read_config(directory(tmp_path, {key: value for key, value in VIT_B_32.items() if key != field}))


@pytest.mark.parametrize(
    ("field", "value"),
    [("size", 256), ("mode", "L"), ("mean", [0.5]), ("interpolation", "random"), ("resize_mode", "longest")],
)
def test_refused_preprocessing(tmp_path, field, value):
    with pytest.raises(CheckpointError, match=rf"preprocess_cfg\.{field} is"):
        read_config(directory(tmp_path, VIT_B_32, preprocess_cfg={field: value}))


def test_weight_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"expected weights in one of open_clip_model\.safetensors, .*; got none"):
        weight_file(tmp_path, WEIGHT_FILES)
    for name in ("epoch_32.pt", *reversed(WEIGHT_FILES)):
        (tmp_path / name).touch()
        assert weight_file(tmp_path, WEIGHT_FILES).name == name
        (tmp_path / "other.pt").touch()
    for name in WEIGHT_FILES:
        (tmp_path / name).unlink()
    with pytest.raises(CheckpointError, match=r"got epoch_32\.pt, other\.pt"):
        weight_file(tmp_path, WEIGHT_FILES)


# Against open_clip itself

SMALL = {
    "vit": {
        "embed_dim": 16,
        "vision_cfg": {
            "image_size": 24, "layers": 2, "width": 160, "head_width": 80, "mlp_ratio": 1.2345, "patch_size": 8,
        },
        "text_cfg": {
            "context_length": 9, "vocab_size": 60, "width": 48, "heads": 3, "layers": 2, "mlp_ratio": 2.7183,
        },
    },
    "resnet": {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 64, "layers": [1, 2, 1, 1], "width": 8, "patch_size": None},
        "text_cfg": {"context_length": 7, "vocab_size": 50, "width": 32, "heads": 4, "layers": 2},
    },
}  # fmt: skip


def difference(model: CLIP, theirs) -> float:
    """The largest of any unit embedding of some pixels and texts."""
    config = model.config
    images, texts = image(3, config.vision.image_size), text(5, config.text.context_length, config.text.vocab_size)
    with torch.no_grad():
        pairs = [
            (model.encode_image(images), theirs.encode_image(images)),
            (model.encode_text(texts), theirs.encode_text(texts)),
        ]
    return max((F.normalize(x) - F.normalize(y)).abs().max().item() for x, y in pairs)


@pytest.mark.parametrize("quick_gelu", [True, False], ids=["quick_gelu", "gelu"])
@pytest.mark.parametrize("layout", ["CLIP", "CustomTextCLIP"])
@pytest.mark.parametrize("name", SMALL)
def test_open_clip_computes_the_same(tmp_path, name, layout, quick_gelu):
    open_clip = pytest.importorskip("open_clip")
    model_cfg = SMALL[name] | {"quick_gelu": quick_gelu}
    theirs = getattr(open_clip, layout)(**model_cfg, nonscalar_logit_scale=layout == "CustomTextCLIP").eval()
    theirs.load_state_dict(weights({name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}))
    directory(tmp_path, model_cfg | {"custom_text": layout == "CustomTextCLIP"})
    torch.save(theirs.state_dict(), tmp_path / "open_clip_pytorch_model.bin")

    tensors = torch.load(weight_file(tmp_path, WEIGHT_FILES), weights_only=True)
    assert layout_of(tensors) == {"CLIP": "openai", "CustomTextCLIP": "openclip"}[layout]
    tensors = dict(to_canonical(layout_of(tensors), tensors))

    def load() -> CLIP:
        model = CLIP(read_config(tmp_path)).eval()
        model.load_state_dict(tensors)
        return model

    assert difference(load(), theirs) <= TOLERANCE
    directory(tmp_path, model_cfg | {"quick_gelu": not quick_gelu})
    assert difference(load(), theirs) > 10 * TOLERANCE


BUILT = {"RN50", "ViT-S-32-alt", "ViT-M-16", "ViT-B-16-plus-240"}  # quick to build


def test_published_configs_are_read_or_refused(tmp_path):
    open_clip = pytest.importorskip("open_clip")
    read = set()
    for name in open_clip.list_models():
        model_cfg = open_clip.get_model_config(name)
        try:
            config = read_config(directory(tmp_path, model_cfg))
        except CheckpointError as error:
            assert "; expected " in str(error)
            continue
        read.add(name)
        if name in BUILT:
            with torch.device("meta"):
                mine, theirs = CLIP(config).state_dict(), open_clip.CLIP(**model_cfg).state_dict()
            assert {key: tensor.shape for key, tensor in mine.items()} == {key: t.shape for key, t in theirs.items()}
    assert read >= BUILT | {"ViT-B-32-quickgelu", "ViT-H-14", "ViT-g-14", "ViT-bigG-14", "ViT-e-14"}
    assert not read & {"ViT-M-16-alt", "ViT-L-14-CLIPA", "coca_ViT-B-32", "ViT-B-16-SigLIP", "convnext_base"}


def test_openclip_s_own_configs():
    """Of 3.3.0: 41 OpenAI's architecture, 26 SigLIP, 9 MobileCLIP, 7 MetaCLIP 2; each other error says why."""
    if not find_spec("open_clip") or version("open_clip_torch") != "3.3.0":
        pytest.skip("needs open_clip_torch 3.3.0")
    found = outcomes().values()
    families = Counter(family for family, reason in found if not reason)
    assert families == {"clip": 41, "mobileclip": 9, "siglip": 26, "metaclip2": 7} and len(found) == 144
    assert {reason for _, reason in found} <= {"", *MEANING.values()}
