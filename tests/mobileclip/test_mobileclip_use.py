"""What is done with models is done with MobileCLIPs too: a small one, and one with OpenCLIP's own code."""

import dataclasses
import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conformance.mobileclip_cases import inputs, weights
from mobileclip_branched import branched_shapes
from mobileclip_small import SMALL_MCI, SMALL_TEXT, outputs, small, texts, tiny
from safetensors.torch import load_file
from test_mobileclip import TOLERANCE, difference, published

from miniclip import load, tokenize
from miniclip.commands import main
from miniclip.config import NamedModel, PreprocessConfig
from miniclip.conformance import TraceError, compare, trace
from miniclip.conformance.plot import attention_of
from miniclip.embed import embed_texts
from miniclip.export import export_model
from miniclip.loading import build_model
from miniclip.mobileclip.config import CONV_VIT, MODELS
from miniclip.mobileclip.names import read
from miniclip.mobileclip.stages import stages as conformance_stages
from miniclip.models import CLIP, convert_weights
from miniclip.preprocess import open_image
from miniclip.save import save_checkpoint

IMAGES = Path(__file__).parents[2] / "examples" / "images"
needs_onnx = pytest.mark.skipif(
    not all(find_spec(package) for package in ("onnx", "onnxscript", "onnxruntime")),
    reason='writing and running ONNX needs pip install "miniclip[onnx]"',
)


@pytest.fixture(params=["MCi", "ViT"])
def named(request, tmp_path, monkeypatch) -> str:
    """The name of a model that `load` finds, with all the words there are."""
    text = dataclasses.replace(SMALL_TEXT, vocab_size=49408)
    config = dataclasses.replace(small(text_taps=0), text=text)
    if request.param == "ViT":
        config = dataclasses.replace(config, vision=vit(), preprocess=PreprocessConfig(32), causal=True)
    tensors = read(weights(branched_shapes(config)), config, None)[1]
    path = tmp_path / "model.safetensors"
    save_checkpoint(config, tensors, path)
    monkeypatch.setitem(MODELS, "small", NamedModel(config, str(path)))
    return "small"


def vit():
    return dataclasses.replace(CONV_VIT["openclip"], image_size=32, stem_width=8, transformer=SMALL_TEXT.transformer)


def run(capsys, *arguments) -> str:
    assert main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


def test_classify_embed_and_evaluate(named, tmp_path, capsys):
    model, preprocess = load(named)
    labels, pictures = ["a dog", "a pizza"], [IMAGES / "dog.png", IMAGES / "pizza.png"]
    pixels = torch.stack([preprocess(open_image(path)) for path in pictures])
    with torch.inference_mode():
        expected = model(pixels, tokenize(labels))[0].softmax(dim=-1)
        images = model.encode_image(pixels, normalize=True)
        captions = model.encode_text(tokenize(labels), normalize=True)
    for dtype, tolerance in (("float32", 1e-5), ("bfloat16", 0.05)):
        options = ("--labels", ",".join(labels), "--model", named, "--dtype", dtype, "--json")
        rows = json.loads(run(capsys, "classify", *pictures, *options))
        np.testing.assert_allclose([list(row["probabilities"].values()) for row in rows], expected, atol=tolerance)
    (tmp_path / "labels.txt").write_text("\n".join(labels))
    run(capsys, "embed", *pictures, tmp_path / "labels.txt", "--model", named, "-o", tmp_path / "e.safetensors")
    written = load_file(tmp_path / "e.safetensors")
    torch.testing.assert_close(written["images"], images, atol=1e-6, rtol=0)
    torch.testing.assert_close(written["texts"], captions, atol=1e-6, rtol=0)
    for name, path in zip(("dog", "pizza"), pictures, strict=True):
        (tmp_path / "set" / name).mkdir(parents=True)
        shutil.copy(path, tmp_path / "set" / name)
    result = json.loads(run(capsys, "evaluate", tmp_path / "set", "--model", named, "--template", "a {}", "--json"))
    assert result["pictures"] == 2


def test_bench_times_it(named, tmp_path, capsys):
    """By its name, with random weights."""
    options = ("--peers", "none", "--what", "image,text", "--batches", "2", "--seconds", "0.1", "--dtypes", "float32")
    run(capsys, "bench", "--model", named, *options, "--json", tmp_path / "b.json")
    assert {row["count"] for row in json.loads((tmp_path / "b.json").read_text())["rows"]} == {1, 2, 100}


def test_convert_and_back(named, tmp_path, capsys):
    """The file's metadata holds the config, which no state dict of this size can tell."""
    run(capsys, "convert", named, tmp_path / "out.safetensors")
    assert load_file(tmp_path / "out.safetensors").keys() == load_file(tmp_path / "model.safetensors").keys()
    model, again = load(named)[0], load(tmp_path / "out.safetensors")[0]
    assert again.config == model.config
    torch.testing.assert_close(dict(again.state_dict()), dict(model.state_dict()), atol=0, rtol=0)
    assert main(["convert", named, str(tmp_path / "out.pt")]) == 2
    assert "this format can't hold the model's config" in capsys.readouterr().err


def test_trace_plot_and_compare(named, tmp_path, capsys):
    file, plot = tmp_path / "t.safetensors", tmp_path / "p.png"
    given = ("--model", named, "--image", IMAGES / "dog.png", "--text", "a dog", "--text", "a pizza")
    run(capsys, "trace", *given, "-o", file)
    if find_spec("matplotlib"):
        run(capsys, "trace", *given, "--plot", plot, "--layer", "0")
        assert plot.read_bytes().startswith(b"\x89PNG")
    assert "stages that were given pass" in run(capsys, "compare", file, file)
    assert "stages that were given pass" in run(capsys, "compare", file, file, "--model", named)


@pytest.mark.parametrize("norm", SMALL_MCI)
@pytest.mark.parametrize(("dtype", "cosine"), [(torch.float16, 0.9999), (torch.bfloat16, 0.999)], ids=str)
def test_half_precision_stays_close(norm, dtype, cosine):
    tensors, config = tiny(norm=norm)
    model = build_model(tensors, config)
    expected = outputs(model, config).unflatten(0, (-1, config.embed_dim))
    half = convert_weights(model, dtype)
    assert half.dtype == dtype and half.visual.stem[0].weight.dtype == dtype
    got = outputs(half, config).unflatten(0, (-1, config.embed_dim))
    assert F.cosine_similarity(got, expected).min() >= cosine


def test_trace_and_compare(tmp_path):
    tensors, config = tiny()
    model = build_model(tensors, config)
    ids = torch.zeros(1, 77, dtype=torch.int64)
    ids[0, :3] = torch.tensor([62, 5, 63])
    pixels = inputs(64)[0]
    golden = trace(model, pixels, ids)
    given = ("image.decoded", "image.resized", "image.cropped", "text.utf8")
    assert list(golden) == [stage.name for stage in conformance_stages(config) if stage.name not in given]
    with torch.no_grad():
        torch.testing.assert_close(golden["image_embedding"], model.encode_image(pixels, normalize=True))
        torch.testing.assert_close(golden["logits_per_image"], model(pixels, ids)[0])
    assert golden["visual.stages.3.position"].shape == (1, 64, 2, 2) and golden["ln_final"].shape == (1, 77, 64)
    mine = {name: stage.clone() for name, stage in golden.items()}
    assert compare(golden, mine).passed
    for name in list(mine)[list(mine).index("visual.stages.2.blocks.0") :]:
        if name.startswith("visual"):
            mine[name] = mine[name] * 1.1
    assert compare(golden, mine).first_wrong == "visual.stages.2.blocks.0"
    assert compare(golden, mine, model).diagnosis is None
    mine = {"image_embedding": golden["visual.proj"], "text_embedding": golden["text_embedding"]}
    assert compare(golden, mine, model).diagnosis.mistake == "image embedding not normalised"


def test_trace_of_a_vit():
    vision = dataclasses.replace(CONV_VIT["apple"], image_size=32, stem_width=8, transformer=SMALL_TEXT.transformer)
    config = dataclasses.replace(small(text_taps=0), vision=vision, preprocess=PreprocessConfig(32), causal=True)
    model = build_model(read(weights(branched_shapes(config)), config, None)[1], config)
    ids = torch.zeros(1, 77, dtype=torch.int64)
    ids[0, :3] = torch.tensor([62, 5, 63])
    golden = trace(model, inputs(32)[0], ids)
    with torch.no_grad():  # the text in its inference form, which is allowed here: the tower is causal
        torch.testing.assert_close(golden["text_embedding"], model.encode_text(ids, normalize=True), atol=1e-6, rtol=0)
    assert golden["visual.stem.0"].shape == (1, 8, 8, 8)


def test_attention_of_an_mci_tower():
    """What all places attend to, on average; the probabilities are those that give the model's own output."""
    model = build_model(*tiny())
    traced = trace(model, inputs(64)[0])
    block = model.visual.stages[3].blocks[1]
    maps = attention_of(traced)
    assert maps.shape == (2, 2, 2) and torch.equal(maps, attention_of(traced, 1))
    assert not torch.equal(maps, attention_of(traced, 0))
    torch.testing.assert_close(maps.sum(dim=(1, 2)), torch.ones(2))
    with torch.no_grad():
        x = traced["visual.stages.3.blocks.0"]
        values = block.attn.in_proj(block.norm(x).flatten(2).mT).unflatten(-1, (3, 2, 32))[:, :, 2]  # [N, L, H, d]
        heard = torch.einsum("nhqk,nkhd->nqhd", traced["visual.stages.3.blocks.1.attn.probabilities"], values)
        expected = block.attn(block.norm(x))
    torch.testing.assert_close(block.attn.out_proj(heard.flatten(2)).mT.unflatten(2, (2, 2)), expected)
    with pytest.raises(TraceError, match="layers 0 to 1"):
        attention_of(traced, 2)


@pytest.mark.slow  # the exporters take their time
@pytest.mark.parametrize("format", [pytest.param("onnx", marks=needs_onnx), "torch"])
@pytest.mark.parametrize("norm", SMALL_MCI)
def test_export(format, norm, tmp_path):
    """In the files, too, all 77 tokens count: to cut a text is an error."""
    tensors, config = tiny(norm=norm, text_taps=11 if norm == "batch" else 0)
    model = build_model(tensors, config)
    export_model(model, tmp_path / "out", format)
    suffix = {"onnx": "onnx", "torch": "pt2"}[format]
    image, text = (exported(tmp_path / "out" / f"{tower}.{suffix}") for tower in ("image", "text"))
    pixels, ids = inputs(64)[0].expand(3, -1, -1, -1), texts().int()
    with torch.no_grad():
        torch.testing.assert_close(image(pixels), model.encode_image(pixels, normalize=True), atol=1e-6, rtol=0)
        torch.testing.assert_close(text(ids), model.encode_text(ids, normalize=True), atol=1e-6, rtol=0)
        with pytest.raises(Exception, match="77"):
            text(ids[:, :9])


def exported(file: Path):
    """A tower that was exported, as a function of its input."""
    if file.suffix == ".pt2":
        return torch.export.load(file).module()
    import onnxruntime

    session = onnxruntime.InferenceSession(file)
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


LIVE = ("MobileCLIP2-S0", "MobileCLIP2-B", "MobileCLIP2-L-14", "MobileCLIP2-S3")


@pytest.mark.slow  # models of 75 to 430 million weights are built, written and read
@pytest.mark.parametrize("name", LIVE)
def test_openclip_itself_agrees_live(name, tmp_path):
    """It loads what we write, and computes the same."""
    open_clip = pytest.importorskip("open_clip")
    config, tensors = read(published(name), MODELS[name].config, None)
    save_checkpoint(config, build_model(tensors, config).state_dict(), tmp_path / "out")
    theirs = open_clip.create_model(f"local-dir:{tmp_path / 'out'}").eval()
    written = load_file(tmp_path / "out" / "open_clip_model.safetensors")
    assert theirs.load_state_dict(written, strict=True)
    theirs.visual.input_resolution = config.preprocess.image_size
    encode = theirs.encode_text
    theirs.encode_text = lambda ids, normalize: encode(ids.long(), normalize=normalize)
    assert difference(name, theirs) <= TOLERANCE


# Not causal: all 77 tokens of a text count, and nothing may cut it.


def test_no_way_to_embed_a_text_cuts_it(named, monkeypatch):
    """Both forms and `embed_texts` give a short text what all 77 tokens give; cut after its end it gets another."""
    model, _ = load(named)
    captions = ["a dog", "two dogs and a pizza on a table"]
    ids = tokenize(captions)
    with torch.inference_mode():
        fast = model.encode_text(ids, normalize=True)
        batches = embed_texts(model, captions)[0]
        model.fast = False
        plain = model.encode_text(ids, normalize=True)
        cut = F.normalize(CLIP.encode_text(model, ids[:1, : int(ids[0].argmax()) + 1]))  # past the check
    for embeddings in (fast, batches):
        torch.testing.assert_close(embeddings, plain, atol=1e-6, rtol=0)
    assert ((cut - plain[:1]).abs().max() < 1e-6) == model.transformer.causal
