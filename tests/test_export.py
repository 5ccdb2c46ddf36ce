"""Exported towers compute what the model computes, for every batch size, in runtimes that know nothing of it."""

import json
import subprocess
import sys
from functools import cache
from importlib.util import find_spec

import pytest
import torch
from conformance import seeded

from miniclip import export, load, tokenize
from miniclip.commands import main
from miniclip.config import (
    CLIPConfig,
    PreprocessConfig,
    ResNetConfig,
    TextConfig,
    TransformerConfig,
    ViTConfig,
    from_json,
)
from miniclip.conformance import compare, trace
from miniclip.conformance.exported import trace_exported
from miniclip.export import ExportError, export_model
from miniclip.io import WriteError
from miniclip.loading import blank_model, build_model, shapes_of
from miniclip.models import convert_weights

needs_onnx = pytest.mark.skipif(
    not all(find_spec(package) for package in ("onnx", "onnxscript", "onnxruntime")),
    reason='writing and running ONNX needs pip install "miniclip[onnx]"',
)
TEXTS = ["a cat", "<|endoftext|> within", "a " * 75]  # the last one fills the context

small = TransformerConfig(width=64, layers=1, heads=1, mlp_width=256)
gelu = TransformerConfig(width=64, layers=1, heads=2, mlp_width=128, activation="gelu")
CONFIGS = {
    "ViT": CLIPConfig(32, ViTConfig(32, 16, small), TextConfig(77, 49408, small), PreprocessConfig(32)),
    "ResNet": CLIPConfig(
        32, ResNetConfig(64, 2, (1, 1, 1, 1), heads=1), TextConfig(77, 49408, gelu), PreprocessConfig(64)
    ),
}


def model_of(config: CLIPConfig):
    return build_model(seeded.weights(shapes_of(blank_model(config, torch.float32).state_dict())), config)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Gives the model of a config of CONFIGS and the directory that it was exported to, once for each format."""

    @cache
    def export_once(name: str, format: str):
        model, folder = model_of(CONFIGS[name]), tmp_path_factory.mktemp(format)
        export_model(model, folder, format, name)
        return model, folder

    return export_once


@pytest.mark.parametrize(
    ("name", "format"),
    [
        pytest.param("ViT", "onnx", marks=needs_onnx),
        pytest.param("ResNet", "onnx", marks=[needs_onnx, pytest.mark.slow]),  # the exporter takes its time
        ("ViT", "torch"),
        ("ResNet", "torch"),
    ],
)
def test_exported_towers_equal_the_model(name, format, exported):
    model, folder = exported(name, format)
    ids = tokenize(TEXTS)
    for count in (3, 1):  # the example that is exported has 2
        pixels = seeded.image(count, model.visual.input_resolution)
        golden, mine = trace(model, pixels, ids[:count]), trace_exported(folder, pixels, ids[:count])
        assert compare(golden, mine).passed
        for stage in ("image_embedding", "text_embedding"):
            x = mine[stage]
            assert (x - golden[stage]).abs().max() <= 1e-5
            assert not compare(golden, {stage: x.roll(1, dims=-1)}).passed
    for file in folder.iterdir():
        assert b"export.py" not in file.read_bytes()  # PyTorch notes the paths of our code
    assert from_json(json.loads((folder / "miniclip.json").read_text())) == model.config
    config = json.loads((folder / "config.json").read_text())
    assert config["logit_scale"] == pytest.approx(model.logit_scale.exp().item())
    assert config["preprocess"]["image_size"] == model.visual.input_resolution


@needs_onnx
def test_onnx_files_state_shapes_and_opset_and_keep_to_one_tower(exported):
    import onnx

    model, folder = exported("ViT", "onnx")
    shapes = {"image": [["batch", 3, 32, 32], ["batch", 32]], "text": [["batch", "length"], ["batch", 32]]}
    for tower in shapes:
        file = onnx.load(folder / f"{tower}.onnx")
        assert [(part.domain, part.version) for part in file.opset_import] == [("", export.OPSET)]
        assert [shape_of(end) for end in (*file.graph.input, *file.graph.output)] == shapes[tower]
        (own,) = file.metadata_props
        assert from_json(json.loads(own.value)) == model.config and own.key == "miniclip_config"
    size = 4 * sum(x.numel() for x in model.visual.parameters())
    assert size < (folder / "image.onnx").stat().st_size < size + 100_000
    assert str(export.OPSET) in json.loads((folder / "config.json").read_text())["format"]


def shape_of(end) -> list:
    return [side.dim_param or side.dim_value for side in end.type.tensor_type.shape.dim]


@pytest.mark.slow  # another export
@needs_onnx
def test_models_too_large_for_one_file_keep_their_tensors_beside(tmp_path, monkeypatch):
    model = model_of(CONFIGS["ViT"])
    monkeypatch.setattr(export, "MOST_IN_ONE_FILE", 0)
    export_model(model, tmp_path / "out")
    sizes = {file.name: file.stat().st_size for file in (tmp_path / "out").iterdir()}
    assert sizes["text.onnx"] < 100_000 < sizes["text.onnx.data"]
    pixels, ids = seeded.image(1, 32), tokenize("a cat")
    assert compare(trace(model, pixels, ids), trace_exported(tmp_path / "out", pixels, ids)).passed


@pytest.mark.slow  # another process, which imports torch.export
def test_programs_of_torch_export_load_without_miniclip(exported, tmp_path):
    model, folder = exported("ViT", "torch")
    ids = tokenize(TEXTS)
    torch.save(ids, tmp_path / "ids")
    code = (
        "import sys, torch; program, ids, output = sys.argv[1:]; text = torch.export.load(program).module();"
        "torch.save(text(torch.load(ids)), output); assert 'miniclip' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, folder / "text.pt2", tmp_path / "ids", tmp_path / "mine"], check=True)
    with torch.inference_mode():
        expected = model.encode_text(ids, normalize=True)
    assert (torch.load(tmp_path / "mine") - expected).abs().max() <= 1e-5


def test_the_model_is_left_as_it_was(exported):
    model, _ = exported("ViT", "torch")
    before = model_of(CONFIGS["ViT"]).state_dict()
    assert model.fast and not model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("format", [pytest.param("onnx", marks=needs_onnx), "torch"])
def test_texts_of_any_length_give_the_same_embeddings(format, exported):
    """The embedding is that at the first end-of-text token, wherever it is; a text that lacks it differs."""
    _, folder = exported("ViT", format)
    ids = tokenize(TEXTS[:2])
    end = int(ids.argmax(-1).max())
    whole = trace_exported(folder, text=ids)["text_embedding"]
    for length in (end + 1, 40):
        cut = trace_exported(folder, text=ids[:, :length])["text_embedding"]
        torch.testing.assert_close(cut, whole, atol=1e-6, rtol=0)
    for length in (1, end):
        assert not torch.allclose(trace_exported(folder, text=ids[:, :length])["text_embedding"], whole, atol=1e-2)
    with pytest.raises(Exception, match="77"):  # the runtime's own error
        trace_exported(folder, text=torch.cat([ids, ids[:, :1]], dim=1))


HALVES = [
    pytest.param("ViT", "onnx", marks=needs_onnx),
    pytest.param("ResNet", "onnx", marks=[needs_onnx, pytest.mark.slow]),
    ("ViT", "torch"),
]


@pytest.mark.parametrize(("name", "format"), HALVES)
def test_float16(name, format, tmp_path, exported):
    """Half the size, float32 at both ends, and a cosine of at least 0.9999."""
    model, whole = exported(name, format)
    export_model(convert_weights(model_of(CONFIGS[name]), torch.float16), tmp_path / "out", format)
    half, single = (sum(file.stat().st_size for file in folder.iterdir()) for folder in (tmp_path / "out", whole))
    assert half < 0.55 * single
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float16"
    pixels, ids = seeded.image(3, model.visual.input_resolution), tokenize(TEXTS)
    golden, mine = trace(model, pixels, ids), trace_exported(tmp_path / "out", pixels, ids)
    assert compare(golden, mine, dtype=torch.float16).passed
    for stage in ("image_embedding", "text_embedding"):
        assert mine[stage].dtype == torch.float32
        assert torch.cosine_similarity(mine[stage], golden[stage]).min() >= 0.9999
        assert (mine[stage] - golden[stage]).abs().max() > 1e-6  # it is not the float32 model


# Errors


def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr(torch.export, "save", fail)
    with pytest.raises(WriteError, match="the disk is full"):
        export_model(model_of(CONFIGS["ViT"]), tmp_path / "out", "torch")
    assert list(tmp_path.iterdir()) == []


def test_a_directory_with_something_in_it_is_kept(tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(WriteError, match="not an empty directory"):
        export_model(model_of(CONFIGS["ViT"]), tmp_path, "torch")
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("change", [lambda model: model.bfloat16(), lambda model: model.train()])
def test_models_that_can_not_be_exported(change, tmp_path):
    with pytest.raises(ExportError, match="float32 or float16 model in eval mode"):
        export_model(change(model_of(CONFIGS["ViT"])), tmp_path / "out", "torch")


def test_an_unknown_format(tmp_path):
    with pytest.raises(ExportError, match="expected one of onnx, torch"):
        export_model(model_of(CONFIGS["ViT"]), tmp_path / "out", "tflite")


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_missing_packages_are_named(package, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["export", "--model", "tiny-ViT", "-o", str(tmp_path / "out")]) == 2
    assert f'writing ONNX needs {package}: pip install "miniclip[onnx]"' in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow  # a model of real depth takes the exporter half a minute
@needs_onnx
def test_command_line(tmp_path, capsys):
    assert main(["export", "--model", "tiny-ViT", "-o", str(tmp_path / "out")]) == 0
    assert "image.onnx" in capsys.readouterr().out
    model, _ = load("tiny-ViT", device="cpu")
    pixels, ids = seeded.image(2, 64), tokenize(["a cat", "a dog"])
    mine = trace_exported(tmp_path / "out", pixels, ids)
    assert "logits_per_image" in mine
    assert compare(trace(model, pixels, ids), mine).passed
