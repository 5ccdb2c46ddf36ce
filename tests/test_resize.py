"""Models for other image sizes and context lengths than they were trained for."""

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conformance.openai_cases import CASES
from conformance.seeded import image, text, weights
from mobileclip_small import tiny
from PIL import Image
from safetensors.torch import load_file

from miniclip import load, tokenize
from miniclip.commands import main
from miniclip.data.synthetic import create_synthetic
from miniclip.loading import blank_model, build_model
from miniclip.openai.resize import resize_grid, resize_row
from miniclip.save import save_checkpoint
from miniclip.training.options import TrainOptions
from miniclip.training.train import train
from miniclip.weights import CheckpointError

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.filterwarnings("ignore:.*interpolated for")


def files(folder, case: str):
    config = CASES[case]
    blank = blank_model(config, torch.float32).state_dict()
    tensors = weights({name: tuple(tensor.shape) for name, tensor in blank.items()})
    save_checkpoint(config, tensors, folder / "x.safetensors")
    return folder / "x.safetensors", config, tensors


@pytest.mark.parametrize(("case", "size"), [("vit", 64), ("vit", 8), ("resnet", 160), ("resnet", 32)])
def test_another_image_size(case, size, tmp_path):
    path, config, tensors = files(tmp_path, case)
    with pytest.warns(UserWarning, match=rf"positional_embedding: interpolated for images of {size} pixels"):
        model, preprocess = load(path, "cpu", image_size=size)
    assert model.config.vision.image_size == preprocess.config.image_size == model.visual.input_resolution == size
    assert model.config.text == config.text
    name = "visual.positional_embedding" if case == "vit" else "visual.attnpool.positional_embedding"
    side = size // (8 if case == "vit" else 32)
    changed = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, tensors[key])}
    assert changed == {name} and model.state_dict()[name].shape[0] == side**2 + 1
    assert torch.equal(model.state_dict()[name][0], tensors[name][0])
    with torch.no_grad():
        assert model.encode_image(image(2, size)).isfinite().all()
    save_checkpoint(model.config, model.state_dict(), tmp_path / "again.safetensors")
    again, _ = load(tmp_path / "again.safetensors", "cpu")
    assert again.config == model.config
    assert torch.equal(again.state_dict()[name], model.state_dict()[name])


def test_fine_tuning_at_another_size(tmp_path):
    create_synthetic(tmp_path / "shapes", train=2, val=1)
    options = {"data": str(tmp_path / "shapes" / "train.json"), "output": str(tmp_path / "run"), "device": "cpu"}
    options |= {"start_from": "tiny-ViT", "steps": 1, "batch_size": 4, "image_size": 32}
    train(TrainOptions(**options))
    model, preprocess = load(tmp_path / "run", "cpu")
    assert model.visual.positional_embedding.shape == (5, 192) and preprocess.config.image_size == 32
    with pytest.raises(ValueError, match="--image-size is of a model that is fine-tuned"):
        train(TrainOptions(**options | {"start_from": "", "output": str(tmp_path / "new")}))


@pytest.mark.parametrize("length", [5, 13, 40])
def test_another_context_length(length, tmp_path):
    path, _, tensors = files(tmp_path, "vit")
    model, _ = load(path, "cpu", context_length=length)
    assert model.context_length == model.config.text.context_length == length
    with torch.no_grad():
        assert model.encode_text(text(3, length, 301)).isfinite().all()
    got = model.state_dict()["positional_embedding"]
    if length == 13:
        assert torch.equal(got, tensors["positional_embedding"])
    else:  # the centre of each new position, by hand
        old = tensors["positional_embedding"]
        centre = ((torch.arange(length) + 0.5) * 13 / length - 0.5).clamp(0, 12)
        left = centre.long().clamp(max=11)
        share = (centre - left)[:, None]
        torch.testing.assert_close(got, old[left] * (1 - share) + old[left + 1] * share)


def test_the_same_size_changes_nothing(tmp_path, recwarn):
    path, config, tensors = files(tmp_path, "vit")
    model, _ = load(path, "cpu", image_size=40, context_length=13)
    assert model.config == config and not [each for each in recwarn if "interpolated" in str(each.message)]
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(("case", "size"), [("vit", 41), ("vit", 0), ("vit", (40, 48)), ("vit", 48.0), ("resnet", 100)])
def test_sizes_that_make_no_sense(case, size, tmp_path):
    path, _, _ = files(tmp_path, case)
    with pytest.raises(CheckpointError, match=r"image_size is .*; expected a multiple of (8|32): images are square"):
        load(path, "cpu", image_size=size)


@pytest.mark.parametrize("length", [0, -1, "77", 1 << 30])
def test_lengths_that_make_no_sense(length, tmp_path):
    path, _, _ = files(tmp_path, "vit")
    with pytest.raises(CheckpointError, match="context_length is"):
        load(path, "cpu", context_length=length)


def test_sizes_on_the_command_line(tmp_path):
    """embed and convert have the options of every command that loads a model."""
    caption = tmp_path / "captions.txt"
    caption.write_text("a dog\n")
    picture, sizes = "examples/images/dog.png", ["--image-size", "96", "--context-length", "8"]
    paths = [str(caption), str(ROOT / picture)]
    assert main(["embed", *paths, "--model", "tiny-ViT", *sizes, "-o", str(tmp_path / "e.safetensors")]) == 0
    assert main(["convert", "tiny-ViT", str(tmp_path / "x.safetensors"), *sizes]) == 0
    got = load_file(tmp_path / "e.safetensors")
    plain, (model, preprocess) = load("tiny-ViT", "cpu")[0], load("tiny-ViT", "cpu", image_size=96, context_length=8)
    assert load(tmp_path / "x.safetensors", "cpu")[0].config == model.config
    with torch.no_grad():
        pixels, ids = preprocess(Image.open(ROOT / picture))[None], tokenize("a dog", 8)
        torch.testing.assert_close(got["images"], model.encode_image(pixels, normalize=True), atol=1e-5, rtol=0)
        torch.testing.assert_close(got["texts"], model.encode_text(ids, normalize=True), atol=1e-5, rtol=0)
        assert (got["texts"] - plain.encode_text(ids, normalize=True)).abs().max() > 1e-3


@pytest.mark.parametrize(
    "command", ["classify", "similarity", "embed", "evaluate", "explore", "trace", "export", "convert"]
)
def test_every_command_that_loads_a_model_has_both(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert {"--image-size", "--context-length", "--activation"} <= set(capsys.readouterr().out.split())


def test_an_index_has_its_model_s_size(tmp_path, capsys):
    assert main(["index", str(tmp_path), "-o", str(tmp_path / "i"), "--image-size", "96"]) == 2
    assert "unrecognized arguments: --image-size" in capsys.readouterr().err
    size = ["--image-size", "65", "-o", str(tmp_path / "e.npy")]
    assert main(["embed", str(ROOT / "examples/images/dog.png"), "--model", "tiny-ViT", *size]) == 2
    assert "expected a multiple of 16" in capsys.readouterr().err


def test_half_precision_is_interpolated_in_float32():
    x = torch.randn(17, 24).half()
    expected = resize_grid(x.float(), 7)
    assert resize_grid(x, 7).dtype == torch.float16
    torch.testing.assert_close(resize_grid(x, 7).float(), expected, atol=2e-3, rtol=1e-3)
    assert not torch.allclose(resize_grid(x, 7)[1:], F.interpolate(x.float().T[None], 49)[0].T.half(), atol=1e-2)


def test_a_family_of_fixed_sizes_refuses(tmp_path):

    tensors, config = tiny()
    save_checkpoint(config, build_model(tensors, config).state_dict(), tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match=r"m\.safetensors: the sizes of a MobileCLIPConfig are fixed"):
        load(tmp_path / "m.safetensors", "cpu", image_size=128)


@pytest.mark.skipif(importlib.util.find_spec("open_clip") is None, reason="needs open_clip")
def test_equals_openclip():
    model = pytest.importorskip("open_clip.model")

    class Visual:
        grid_size = (9, 9)

    class Model:
        visual = Visual()
        positional_embedding = torch.empty(40, 24)

    x, row = torch.randn(50, 24), torch.randn(13, 24)
    state = {"visual.positional_embedding": x, "positional_embedding": row}
    model.resize_pos_embed(state, Model())
    model.resize_text_pos_embed(state, Model())
    torch.testing.assert_close(resize_grid(x, 9), state["visual.positional_embedding"], atol=1e-6, rtol=0)
    torch.testing.assert_close(resize_row(row, 40), state["positional_embedding"], atol=1e-6, rtol=0)
    assert not torch.allclose(resize_grid(x, 9)[1:], resize_row(x[1:], 81), atol=1e-3)
