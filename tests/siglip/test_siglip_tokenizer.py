"""SigLIP's tokenizers: cleaning, ids, padding, and how the tokenizer file travels with the model."""

import copy
import json
import pickle
import zlib
from pathlib import Path

import pytest
import torch
from siglip_small import LENGTH, TEXTS, huggingface_directory, json_tokenizer, small, tensor

from miniclip import embed_texts, load
from miniclip.loading import new_model
from miniclip.save import save_checkpoint
from miniclip.siglip import names, tokenizer
from miniclip.siglip.tokenizer import CLEANINGS, TokenizerError
from miniclip.weights import CheckpointError, hub

GEMMA = {"tokenizer_class": "GemmaTokenizerFast", "eos_token": {"content": "<eos>"}, "pad_token": "<pad>"}


@pytest.mark.parametrize(
    ("cleaning", "text", "expected"),
    [
        ("lower", " A Photo,  of_a DOG! ", " a photo,  of_a dog! "),
        ("remove punctuation", " A Photo,\n of_a (DOG)! ", "a photo ofa dog"),
        ("remove punctuation", "Straße – “ÉTÉ”&amp;", "straße – “été”amp"),
        ("canonicalize", " A Photo,\n of_a (DOG)! ", "a photo of a dog"),
        ("canonicalize", "cafÃ© &amp;amp; “tea”", "café tea"),
    ],
)
def test_cleaning(cleaning, text, expected):
    assert CLEANINGS[cleaning](text) == expected


def test_ids_are_the_pieces_then_the_end_token_then_padding(folder):
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model"))
    model, _ = load(folder, "cpu")
    ids = model.tokenize(TEXTS)
    assert ids.dtype == torch.int32 and ids.shape == (4, LENGTH)
    for row, text in zip(ids.tolist(), ["a photo of the dog", "two cats", "", "a redblue house"], strict=True):
        pieces = processor.encode(text)
        assert row == [*pieces, 1, *[1] * (LENGTH - 1 - len(pieces))]
    assert torch.equal(model.tokenize("two cats"), ids[1:2])


def test_long_texts(folder):
    model, _ = load(folder, "cpu")
    long = "dog " * 40
    with pytest.raises(RuntimeError, match=r"needs 41 tokens, the end token included, but 16 fit: 'dog dog"):
        model.tokenize(["a dog", long])
    ids = model.tokenize(long, truncate=True)[0].tolist()
    assert ids[-1] == 1 and len(set(ids[:-1])) == 1
    embeddings, rejected = embed_texts(model, ["a dog", long, "two cats"])
    assert embeddings.shape == (2, 32) and list(rejected) == [1] and "16 fit" in rejected[1]
    with pytest.raises(TypeError, match="a text must be a str, got bytes"):
        model.tokenize([b"dog"])


def test_the_tokenizer_travels(folder, tmp_path):
    model, _ = load(folder, "cpu", dtype=torch.bfloat16)
    ids = model.tokenize(TEXTS)
    save_checkpoint(model.config, model.state_dict(), tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="has its tokenizer already"):
        load(tmp_path / "x.safetensors", "cpu", tokenizer=folder / "spiece.model")
    for other in (load(tmp_path / "x.safetensors", "cpu")[0], copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other.tokenize(TEXTS), ids)
        assert other.tokenizer_file.dtype == torch.uint8


def test_a_json_tokenizer(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    huggingface_directory(tmp_path)
    json_tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(GEMMA))
    model, _ = load(tmp_path, "cpu")
    assert (model.config.text.cleaning, model.config.text.end_token) == ("lower", "<eos>")
    plain = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in TEXTS:
        pieces = plain.encode(text.lower()).ids
        assert model.tokenize(text).tolist() == [[*pieces, 1, *[0] * (LENGTH - 1 - len(pieces))]]
    assert model.tokenize("a, b").tolist() != model.tokenize("a b").tolist()  # punctuation is kept
    assert model.tokenize("A DOG").tolist() == model.tokenize("a dog").tolist()


def test_which_file_is_taken(folder, tmp_path):
    huggingface_directory(tmp_path)
    model, _ = load(tmp_path, "cpu", tokenizer=folder / "spiece.model")
    other, _ = load(tmp_path, "cpu", tokenizer=folder)
    assert torch.equal(model.tokenizer_file, other.tokenizer_file)
    assert zlib.decompress(bytes(model.tokenizer_file.numpy())) == (folder / "spiece.model").read_bytes()
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "spiece.model").write_bytes((folder / "spiece.model").read_bytes())
    assert torch.equal(load(tmp_path, "cpu")[0].tokenizer_file, model.tokenizer_file)


def test_without_a_tokenizer(tmp_path):
    huggingface_directory(tmp_path)
    model, _ = load(tmp_path, "cpu")
    assert model.config.text.tokenizer_size == 0
    for use in (model.tokenize, lambda texts: embed_texts(model, texts)):
        with pytest.raises(TokenizerError, match=r"without its tokenizer: put its spiece\.model"):
            use(["a dog"])
    with pytest.raises(CheckpointError, match="can't be read: No such file"):
        load(tmp_path, "cpu", tokenizer=tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="tokenizer is CLIP's own: leave tokenizer= out"):
        load("tiny-ViT", "cpu", tokenizer=tmp_path)


def test_damaged_tokenizers(tmp_path, monkeypatch):
    pytest.importorskip("sentencepiece")
    pytest.importorskip("tokenizers")
    huggingface_directory(tmp_path)
    for name, content in (("spiece.model", b"nonsense"), ("spiece.model", b""), ("tokenizer.json", b'{"model": 1}')):
        (tmp_path / name).write_bytes(content)
        model, _ = load(tmp_path, "cpu")
        with pytest.raises(TokenizerError, match="tokenizer file is damaged"):
            model.tokenize("a dog")
        (tmp_path / name).unlink()
    json_tokenizer(tmp_path / "tokenizer.json")  # whose end token is <eos>
    with pytest.raises(TokenizerError, match="has no '</s>', which its config names"):
        load(tmp_path, "cpu")[0].tokenize("a dog")
    monkeypatch.setattr(tokenizer, "MAX_BYTES", 100)
    with pytest.raises(TokenizerError, match="bytes; expected at most 100"):
        load(tmp_path, "cpu")


def test_a_packed_file_that_unpacks_to_much_is_cut(monkeypatch):
    monkeypatch.setattr(tokenizer, "MAX_BYTES", 1000)
    with pytest.raises(TokenizerError, match="damaged"):
        tokenizer.unpack(zlib.compress(b"{" + b" " * 10**6 + b"}"))


def test_a_model_of_a_config_alone_has_no_tokenizer_yet():
    config, tensors = names.add_tokenizer(small(), {"x": tensor("x", (2,))}, Path("/"))
    assert config == small() and list(tensors) == ["x"]
    assert not hasattr(new_model(small()), "tokenizer_file")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "siglip"}, ["config.json", "tokenizer_config.json", "tokenizer.model", "model.safetensors"]),
        ({"model_type": "clip"}, ["config.json", "model.safetensors"]),
    ],
)
def test_the_hub_is_asked_for_a_tokenizer(config, expected, tmp_path):
    asked = []

    def get(file: str) -> Path | None:
        if file not in expected:
            return None
        asked.append(file)
        (tmp_path / file).write_text(json.dumps(config))
        return tmp_path / file

    assert hub._get_model("x", get, "here") == tmp_path and asked == expected
