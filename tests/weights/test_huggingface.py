"""Hugging Face directories: what is read, what is refused, what is written, and that transformers agrees."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conformance.seeded import image, text, weights
from PIL import Image
from safetensors import safe_open

from miniclip import load, tokenizer
from miniclip.commands import main
from miniclip.config import (
    MODELS,
    CLIPConfig,
    PreprocessConfig,
    ResNetConfig,
    TextConfig,
    TransformerConfig,
    ViTConfig,
)
from miniclip.errors import IncompleteModelError
from miniclip.io import WriteError
from miniclip.models import CLIP
from miniclip.preprocess import Preprocess, resize
from miniclip.save import save_checkpoint
from miniclip.training import augment
from miniclip.weights.errors import CheckpointError
from miniclip.weights.files import read_file
from miniclip.weights.huggingface import WEIGHT_FILES, read_config
from miniclip.weights.names import from_canonical, to_canonical
from miniclip.weights.stated import weight_file

TOLERANCE = 1e-5  # largest difference of unit embeddings

# The parts that matter of a directory as of 2021: a legacy end token, and a preprocessor without rescaling.
OLD_CONFIG = {
    "architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": 512, "logit_scale_init_value": 2.6592,
    "text_config_dict": None, "vision_config_dict": None, "torch_dtype": "float32", "transformers_version": None,
    "text_config": {
        "attention_dropout": 0.0, "bos_token_id": 0, "dropout": 0.0, "eos_token_id": 2, "hidden_act": "quick_gelu",
        "hidden_size": 512, "intermediate_size": 2048, "layer_norm_eps": 1e-05, "max_position_embeddings": 77,
        "model_type": "clip_text_model", "num_attention_heads": 8, "num_hidden_layers": 12, "pad_token_id": 1,
        "projection_dim": 640, "vocab_size": 49408,
    },
    "vision_config": {
        "hidden_act": "quick_gelu", "hidden_size": 768, "image_size": 224, "intermediate_size": 3072,
        "layer_norm_eps": 1e-05, "num_attention_heads": 12, "num_hidden_layers": 12, "patch_size": 32,
    },
}  # fmt: skip
OLD_PREPROCESSOR = {
    "crop_size": 224, "do_center_crop": True, "do_normalize": True, "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor", "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711], "resample": 3, "size": 224,
}  # fmt: skip
NEW_PREPROCESSOR = OLD_PREPROCESSOR | {
    "crop_size": {"height": 224, "width": 224}, "do_convert_rgb": True, "do_rescale": True, "rescale_factor": 1 / 255,
    "size": {"shortest_edge": 224},
}  # fmt: skip


def small_config(activation: str, vocab_size: int = 60) -> CLIPConfig:
    vision = ViTConfig(24, 8, TransformerConfig(80, 2, 1, 123, activation))
    text = TextConfig(9, vocab_size, TransformerConfig(48, 3, 4, 100, activation))
    return CLIPConfig(16, vision, text, PreprocessConfig(24, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear"))


def random_model(config: CLIPConfig) -> CLIP:
    model = CLIP(config).eval()
    model.load_state_dict(weights({name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}))
    return model


def directory(folder, config=OLD_CONFIG, **files):
    """Write a directory of JSON files; the names lack their suffix."""
    folder.mkdir(exist_ok=True)
    for name, content in {"config": config, "preprocessor_config": OLD_PREPROCESSOR, **files}.items():
        if content is not None:
            (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def changed(config: dict, **changes) -> dict:
    """A copy, with fields of towers named as text__vocab_size; the value `...` removes the field."""
    config = json.loads(json.dumps(config))
    for name, value in changes.items():
        tower, _, field = name.rpartition("__")
        section = config[f"{tower}_config"] if tower else config
        section[field] = value
        if value is ...:
            del section[field]
    return config


@pytest.mark.parametrize("preprocessor", [OLD_PREPROCESSOR, NEW_PREPROCESSOR], ids=["old", "new"])
def test_old_directory_is_vit_b_32(tmp_path, preprocessor):
    assert read_config(directory(tmp_path, preprocessor_config=preprocessor)) == MODELS["ViT-B/32"].config


def test_missing_fields_have_the_defaults(tmp_path):
    assert read_config(directory(tmp_path, {"model_type": "clip"}, preprocessor_config={})) == MODELS["ViT-B/32"].config


def test_every_field_is_read(tmp_path):
    tower = {"num_hidden_layers": 3, "num_attention_heads": 5, "intermediate_size": 7}
    config = {
        "model_type": "clip",
        "projection_dim": 9,
        "text_config": {
            **tower, "hidden_size": 10, "vocab_size": 11, "max_position_embeddings": 13, "eos_token_id": 10,
            "hidden_act": "gelu",
        },
        "vision_config": {**tower, "hidden_size": 15, "image_size": 28, "patch_size": 14},
    }  # fmt: skip
    preprocessor = {
        "size": {"height": 28, "width": 28}, "do_center_crop": False, "resample": 2, "image_mean": [0, 0.5, 1],
        "image_std": [1, 1, 0.5],
    }  # fmt: skip
    assert read_config(directory(tmp_path, config, preprocessor_config=preprocessor)) == CLIPConfig(
        9,
        ViTConfig(28, 14, TransformerConfig(15, 3, 5, 7, "quick_gelu")),
        TextConfig(13, 11, TransformerConfig(10, 3, 5, 7, "gelu")),
        PreprocessConfig(28, (0, 0.5, 1), (1, 1, 0.5), "bilinear", "squash"),
    )


def test_the_twin_section_of_older_files_wins(tmp_path):
    config = OLD_CONFIG | {"text_config_dict": {"hidden_size": 1024, "num_attention_heads": 16}}
    text = read_config(directory(tmp_path, config)).text.transformer
    assert (text.width, text.heads, text.mlp_width) == (1024, 16, 2048)


def test_processor_config_of_transformers_5(tmp_path):
    processor = {"processor_class": "CLIPProcessor", "image_processor": NEW_PREPROCESSOR | {"resample": 2}}
    folder = directory(tmp_path, processor_config=processor)
    assert read_config(folder).preprocess.interpolation == "bilinear"
    directory(folder, processor_config={"processor_class": "CLIPProcessor"})
    assert read_config(folder).preprocess.interpolation == "bicubic"


REFUSED = {
    "another model": ({"model_type": "siglip"}, r"model_type is 'siglip'; expected 'clip'"),
    "no model type": ({"model_type": ...}, r"model_type is missing"),
    "tanh gelu": ({"text__hidden_act": "gelu_new"}, r"text_config\.hidden_act is 'gelu_new'"),
    "another eps": ({"vision__layer_norm_eps": 1e-6}, r"vision_config\.layer_norm_eps is 1e-06; expected 1e-05"),
    "added tokens": (
        {"text__eos_token_id": 49407, "text__vocab_size": 49410},
        r"eos_token_id is 49407; expected 2 or 49409, the largest id: .* if tokens were added after the end token",
    ),
    "another end": ({"text__eos_token_id": 7}, r"eos_token_id is 7; expected 2 or 49407"),
    "end not in the vocabulary": ({"text__eos_token_id": ..., "text__vocab_size": 99}, r"eos_token_id is missing"),
    "heads": ({"text__num_attention_heads": 7}, r"num_attention_heads is 7; expected a divisor of 512"),
    "no width": ({"text__hidden_size": 0}, r"hidden_size is 0"),
    "width as text": ({"vision__hidden_size": "768"}, r"hidden_size is '768'"),
    "true is no number": ({"projection_dim": True}, r"projection_dim is True"),
    "endless": ({"vision__num_hidden_layers": 10**9}, r"num_hidden_layers is 1000000000"),
    "huge": ({"text__vocab_size": 2**60}, r"vocab_size is 1152921504606846976"),
    "greyscale": ({"vision__num_channels": 1}, r"num_channels is 1"),
    "a list for a section": ({"text_config": []}, r"text_config is \[\]; expected an object"),
    "oblong": ({"vision__image_size": [224, 448]}, r"image_size is \[224, 448\]"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_config(tmp_path, case):
    changes, message = REFUSED[case]
    with pytest.raises(CheckpointError, match=message):
        read_config(directory(tmp_path, changed(OLD_CONFIG, **changes)))


REFUSED_PREPROCESSORS = {
    "another size": ({"size": 256}, r"size is 256; expected 224 or"),
    "another crop": ({"crop_size": {"height": 224, "width": 200}}, r"crop_size is"),
    "longest edge": ({"size": {"longest_edge": 224}}, r"size is"),
    "no crop": ({"do_center_crop": False}, r"do_center_crop is False; expected True"),
    "no rescaling": ({"do_rescale": False}, r"do_rescale is False"),
    "another factor": ({"rescale_factor": 1 / 127.5}, r"rescale_factor is 0\.0078"),
    "padding": ({"do_pad": True}, r"do_pad is True"),
    "nearest": ({"resample": 0}, r"resample is 0; expected 2 or 3"),
    "one mean": ({"image_mean": 0.5}, r"image_mean is 0\.5; expected three numbers"),
    "not a number": ({"image_std": [1, float("nan"), 1]}, r"image_std"),
}


@pytest.mark.parametrize("case", REFUSED_PREPROCESSORS)
def test_refused_preprocessor(tmp_path, case):
    changes, message = REFUSED_PREPROCESSORS[case]
    with pytest.raises(CheckpointError, match=rf"preprocessor_config\.json: {message}"):
        read_config(directory(tmp_path, preprocessor_config=OLD_PREPROCESSOR | changes))


def test_preprocessing_is_never_guessed(tmp_path):
    """Without preprocessor_config.json texts and ready pixels are embedded, and pictures are refused."""
    config = read_config(directory(tmp_path / "text", preprocessor_config=None))
    known = read_config(directory(tmp_path))
    assert config == replace(known, preprocess=PreprocessConfig(224, resize_mode="unknown"))
    picture = Image.new("RGB", (40, 30))
    assert Preprocess(known.preprocess)(picture).shape == (3, 224, 224)
    for prepare in (
        lambda: Preprocess(config.preprocess)(picture),
        lambda: resize(picture, 8, config.preprocess.interpolation, config.preprocess.resize_mode),
        lambda: augment.normalize(torch.zeros(1, 3, 8, 8), config.preprocess),
    ):
        with pytest.raises(IncompleteModelError, match=r"copy the preprocessor_config\.json"):
            prepare()


def test_texts_alone_on_the_command_line(tmp_path, monkeypatch, capsys):
    """One error for all pictures, and no file; texts are embedded."""
    monkeypatch.chdir(tmp_path)
    model, _ = load("tiny-ViT", "cpu")
    save_checkpoint(model.config, model.state_dict(), "x")
    for file in ("preprocessor_config.json", "miniclip.json"):
        (tmp_path / "x" / file).unlink()
    (tmp_path / "texts.txt").write_text("a dog\n")
    Image.new("RGB", (40, 30)).save("a.png")
    assert main(["embed", "texts.txt", "--model", "x", "-o", "texts.npy"]) == 0
    assert main(["embed", "a.png", "--model", "x", "-o", "pictures.npy"]) == 2
    assert "error: this model's files do not state how pictures are prepared" in capsys.readouterr().err
    assert np.load("texts.npy").shape == (1, 256) and not (tmp_path / "pictures.npy").exists()


def test_unknown_preprocessing_travels(tmp_path):
    """It stays unknown in what miniclip writes, whatever the format."""
    config = replace(small_config("gelu"), preprocess=PreprocessConfig(24, resize_mode="unknown"))
    tensors = random_model(config).state_dict()
    for name in ("x.safetensors", "folder"):
        save_checkpoint(config, tensors, tmp_path / name)
        assert load(tmp_path / name, "cpu")[0].config == config
    (tmp_path / "folder" / "miniclip.json").unlink()
    assert not (tmp_path / "folder" / "preprocessor_config.json").exists()
    assert load(tmp_path / "folder", "cpu")[0].config == config
    with pytest.raises(CheckpointError, match="can't hold"):
        save_checkpoint(config, tensors, tmp_path / "x.pt")


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"<html>", b"[" * 10**6, b" " * (1 << 25)])
def test_broken_json(tmp_path, content):
    directory(tmp_path)
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_config(tmp_path)


def test_weight_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"expected weights in one of model\.safetensors, .*; got none"):
        weight_file(tmp_path, WEIGHT_FILES)
    for name in (
        "pytorch_model.bin.index.json",
        "pytorch_model.bin",
        "model.safetensors.index.json",
        "model.safetensors",
    ):
        (tmp_path / name).touch()
        assert weight_file(tmp_path, WEIGHT_FILES).name == name


def read_weights(folder) -> dict[str, torch.Tensor]:
    return dict(to_canonical("huggingface", read_file(weight_file(folder, WEIGHT_FILES))))


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_written_directory_reads_back(tmp_path, activation):
    model = random_model(small_config(activation))
    save_checkpoint(model.config, model.state_dict(), tmp_path / "new" / "model")
    assert read_config(tmp_path / "new" / "model") == model.config
    with safe_open(tmp_path / "new" / "model" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    tensors = read_weights(tmp_path / "new" / "model")
    assert tensors.keys() == model.state_dict().keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in model.state_dict().items())
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["model"]


def test_squash_reads_back(tmp_path):
    config = small_config("gelu")
    config = replace(config, preprocess=replace(config.preprocess, resize_mode="squash", interpolation="bicubic"))
    save_checkpoint(config, random_model(config).state_dict(), tmp_path / "model")
    assert read_config(tmp_path / "model") == config


def test_dtype_holds_every_tensor(tmp_path):
    model = random_model(small_config("gelu"))

    def stated(tensors) -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        save_checkpoint(model.config, tensors, folder)
        return json.loads((folder / "config.json").read_text())["torch_dtype"]

    state = model.state_dict()
    assert stated(state) == "float32"
    assert stated({name: tensor.half() for name, tensor in state.items()}) == "float16"
    assert stated(state | {"visual.proj": state["visual.proj"].half()}) == "float32"


def test_what_is_there_is_not_overwritten(tmp_path):
    model = random_model(small_config("gelu"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("full", "file", "file/model"):
        with pytest.raises(WriteError, match=name):
            save_checkpoint(model.config, model.state_dict(), tmp_path / name)
    assert [file.read_text() for file in (tmp_path / "full").iterdir()] == ["mine"]
    (tmp_path / "empty").mkdir()
    save_checkpoint(model.config, model.state_dict(), tmp_path / "empty")
    assert weight_file(tmp_path / "empty", WEIGHT_FILES)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["empty", "file", "full"]


def test_nothing_is_left_of_a_write_that_fails(tmp_path, monkeypatch):
    model = random_model(small_config("gelu"))
    with pytest.raises(CheckpointError, match="1 unexpected"):
        save_checkpoint(model.config, model.state_dict() | {"extra": torch.zeros(1)}, tmp_path / "model")
    monkeypatch.setattr("miniclip.weights.huggingface._tokenizer_files", lambda length: {"a/b": ""})
    config = small_config("gelu", tokenizer.VOCAB_SIZE)
    with pytest.raises(WriteError, match="model"):
        save_checkpoint(config, random_model(config).state_dict(), tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_resnets_are_refused(tmp_path):
    config = replace(small_config("gelu"), vision=ResNetConfig(32, 4, (1, 1, 1, 1), 2), preprocess=PreprocessConfig(32))
    with pytest.raises(CheckpointError, match="no ResNets"):
        save_checkpoint(config, random_model(config).state_dict(), tmp_path / "model")


def test_tokenizer_files(tmp_path):
    config = small_config("gelu", tokenizer.VOCAB_SIZE)
    save_checkpoint(config, random_model(config).state_dict(), tmp_path / "model")
    vocab = json.loads((tmp_path / "model" / "vocab.json").read_text(encoding="utf-8"))
    merges = (tmp_path / "model" / "merges.txt").read_text(encoding="utf-8").splitlines()
    assert sorted(vocab.values()) == list(range(49408))
    assert (vocab["!"], vocab["hello</w>"], vocab["<|endoftext|>"]) == (0, 3306, 49407)
    assert merges[:2] == ["#version: 0.2", "i n"] and len(merges) == 1 + 48894
    model = random_model(small_config("gelu"))
    save_checkpoint(model.config, model.state_dict(), tmp_path / "other")
    assert not (tmp_path / "other" / "vocab.json").exists()  # there is no tokenizer for other vocabularies


# Against transformers itself


def embeddings(model, images, texts) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit embeddings by this CLIP or by transformers'."""
    with torch.no_grad():
        if isinstance(model, CLIP):
            return model.encode_image(images, normalize=True), model.encode_text(texts, normalize=True)
        outputs = model.eval()(input_ids=texts, pixel_values=images)
        return F.normalize(outputs.image_embeds), F.normalize(outputs.text_embeds)


def difference(mine: CLIP, theirs) -> float:
    """The largest of any unit embedding of some pixels and texts."""
    config = mine.config
    images, texts = image(3, config.vision.image_size), text(5, config.text.context_length, config.text.vocab_size)
    pairs = zip(embeddings(mine, images, texts), embeddings(theirs, images, texts), strict=True)
    return max((x - y).abs().max().item() for x, y in pairs)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_transformers_reads_what_we_write(tmp_path, activation):
    transformers = pytest.importorskip("transformers")
    model = random_model(small_config(activation))
    save_checkpoint(model.config, model.state_dict(), tmp_path / "model")
    theirs, info = transformers.CLIPModel.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(info.values()), info
    assert theirs.config.text_config.hidden_act == activation
    assert difference(model, theirs) <= TOLERANCE
    block = theirs.vision_model.encoder.layers[0].self_attn
    block.q_proj, block.k_proj = block.k_proj, block.q_proj
    assert difference(model, theirs) > 10 * TOLERANCE


@pytest.mark.parametrize("end", [2, 59])
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_we_read_what_transformers_writes(tmp_path, activation, end):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    common = {"hidden_act": activation, "num_hidden_layers": 2}
    theirs = transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config={
                **common, "hidden_size": 48, "intermediate_size": 100, "num_attention_heads": 4, "vocab_size": 60,
                "max_position_embeddings": 9, "bos_token_id": 58, "eos_token_id": end,
            },
            vision_config={
                **common, "hidden_size": 80, "intermediate_size": 123, "num_attention_heads": 1, "image_size": 24,
                "patch_size": 8,
            },
            projection_dim=16,
        )
    )  # fmt: skip
    theirs.save_pretrained(tmp_path / "one")
    theirs.save_pretrained(tmp_path / "parts", max_shard_size="50KB")
    assert weight_file(tmp_path / "parts", WEIGHT_FILES).name == "model.safetensors.index.json"
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 24}, crop_size=24, resample=2)
    for name in ("one", "parts"):
        processor.save_pretrained(tmp_path / name)
        config = read_config(tmp_path / name)
        assert config.preprocess == PreprocessConfig(24, interpolation="bilinear")
        model = random_model(config)
        assert difference(model, theirs) > 10 * TOLERANCE
        model.load_state_dict(read_weights(tmp_path / name))
        assert difference(model, theirs) <= TOLERANCE
    assert set(from_canonical("huggingface", model.state_dict())) == set(theirs.state_dict())


@pytest.mark.parametrize("resize_mode", ["shortest", "squash"])
def test_processor_reads_what_we_write(tmp_path, resize_mode):
    transformers = pytest.importorskip("transformers")
    config = small_config("gelu", tokenizer.VOCAB_SIZE)
    config = replace(config, preprocess=replace(config.preprocess, resize_mode=resize_mode))
    save_checkpoint(config, random_model(config).state_dict(), tmp_path / "model")
    processor = transformers.CLIPProcessor.from_pretrained(tmp_path / "model")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8))
    texts = ["a photo of a cat", "it's 10 cafés!"]
    theirs = processor(text=texts, images=picture, padding="max_length", return_tensors="pt")
    pixels = Preprocess(config.preprocess)(picture)
    # transformers resizes by another library, of which a channel may differ by one of 255 steps.
    assert (theirs["pixel_values"][0] - pixels).abs().max() < 1.5 / 255 / min(config.preprocess.std)
    other = replace(config.preprocess, resize_mode={"shortest": "squash", "squash": "shortest"}[resize_mode])
    assert (theirs["pixel_values"][0] - Preprocess(other)(picture)).abs().max() > 0.1
    ours = tokenizer.tokenize(texts, config.text.context_length)
    for row, mine in zip(theirs["input_ids"], ours, strict=True):
        length = mine.argmax() + 1
        assert row[:length].tolist() == mine[:length].tolist()
        assert row[length:].tolist() == [tokenizer.END] * (len(row) - length)
