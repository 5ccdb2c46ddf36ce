"""The preparation of pictures in ONNX gives Pillow's pixels, up to a rounding. `python tests/test_export_picture.py`
measures the differences that miniclip/export/README.md states.
"""

from functools import cache
from importlib.util import find_spec

import numpy as np
import PIL
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from test_export import CONFIGS, model_of

from miniclip import load
from miniclip.commands import main
from miniclip.config import PreprocessConfig
from miniclip.conformance import TraceError, compare, load_stages, trace
from miniclip.conformance.exported import trace_exported
from miniclip.export import OPSET, ExportError, export_model, picture
from miniclip.preprocess import ImageError, Preprocess

pytestmark = pytest.mark.skipif(
    not all(find_spec(package) for package in ("onnx", "onnxscript", "onnxruntime")),
    reason='writing and running ONNX needs pip install "miniclip[onnx]"',
)
PILLOW_13 = int(PIL.__version__.split(".")[0]) >= 13  # which resizes tall pictures along the height first
SETTINGS = [(interpolation, mode) for interpolation in ("bicubic", "bilinear") for mode in ("shortest", "squash")]
MOST = 2  # of 255; more than 1 only where Pillow's sum lies halfway between two bytes in both passes


@cache
def session(config: PreprocessConfig):
    import onnxruntime

    return onnxruntime.InferenceSession(picture.picture_graph(config, OPSET).SerializeToString())


def onnx_pixels(image: Image.Image, config: PreprocessConfig) -> torch.Tensor:
    return torch.from_numpy(session(config).run(None, {"picture": np.array(image)})[0][0])


def difference(image: Image.Image, config: PreprocessConfig) -> np.ndarray:
    """How far each byte of the prepared picture is from Pillow's, in 255ths."""
    scale = 255 * torch.tensor(config.std)[:, None, None]
    return ((onnx_pixels(image, config) - Preprocess(config)(image)) * scale).abs().numpy()


KINDS = ("noise", "black and white", "smooth", "gradient", "flat")


def make(kind: str, width: int, height: int, seed: int = 0) -> Image.Image:
    random = np.random.default_rng(seed)
    if kind == "noise":
        return Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
    if kind == "black and white":
        return Image.fromarray(random.integers(0, 2, (height, width, 3), dtype=np.uint8) * 255)
    if kind == "smooth":
        return make("noise", 9, 9, seed).resize((width, height), Image.Resampling.BICUBIC)
    if kind == "gradient":
        rows, columns = np.ogrid[:height, :width]
        bands = [rows * 255 // height, columns * 255 // width, (rows + columns) % 256]
        bands = [np.broadcast_to(band, (height, width)) for band in bands]
        return Image.fromarray(np.stack(bands, axis=-1).astype(np.uint8))
    return Image.new("RGB", (width, height), tuple(random.integers(0, 256, 3).tolist()))


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(KINDS),
    st.integers(1, 700),
    st.integers(1, 700),
    st.sampled_from([17, 32, 64]),
    st.sampled_from(SETTINGS),
    st.integers(0, 9),
)
@example("noise", 1, 1, 32, SETTINGS[0], 0)
@example("noise", 1, 600, 32, SETTINGS[0], 0)
@example("noise", 600, 1, 32, SETTINGS[0], 0)
@example("noise", 2, 3000, 32, SETTINGS[1], 0)
@example("noise", 67, 64, 64, SETTINGS[0], 0)  # the crop starts at 2 of 3, not at 1
@example("noise", 64, 69, 64, SETTINGS[0], 0)  # at 2 of 5, not at 3
def test_pixels_are_those_of_pillow(kind, width, height, side, how, seed):
    assume(PILLOW_13 or height <= 2 * width)  # older Pillows filter tall pictures along the width first too
    config = PreprocessConfig(side, interpolation=how[0], resize_mode=how[1])
    assert difference(make(kind, width, height, seed), config).max() <= MOST + 1e-3


def test_a_picture_of_the_right_size_is_equal_in_every_bit():
    config = PreprocessConfig(64, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    image = make("noise", 64, 64)
    assert torch.equal(onnx_pixels(image, config), Preprocess(config)(image))


MISTAKES = {  # what is replaced in the graph, and the size of a picture that shows it
    "another cubic": ("cubic_coeff_a = -0.5", "cubic_coeff_a = -0.75", (300, 200)),
    "the crop rounded down": ("Add (excess, half_is_odd)", "Identity (excess)", (67, 64)),
    "the width first": ("Where (is_tall, new_height, height)", "Identity (height)", (70, 200)),
    "the longer side rounded up": ("Div (side_times_width, short_or_1)", "Add (new_height, three)", (139, 133)),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_seen(mistake, monkeypatch):
    if mistake == "the width first" and not PILLOW_13:
        pytest.skip("older Pillows do so themselves")
    right, wrong, size = MISTAKES[mistake]
    config, image = PreprocessConfig(64), make("black and white", *size)
    text = picture.graph_text(config, OPSET)
    assert text.count(right) in (1, 3) and difference(image, config).max() <= MOST + 1e-3
    monkeypatch.setattr(picture, "graph_text", lambda config, opset: text.replace(right, wrong))
    session.cache_clear()
    try:
        assert difference(image, config).max() > 5
    finally:
        session.cache_clear()


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((0, 5, 3), "the picture has no pixels"),
        ((5, 0, 3), "the picture has no pixels"),
        ((1, 1_000_000, 3), "the resized picture would have over 134217728 pixels; crop it"),
        ((1_000_000, 1, 3), "the resized picture would have over 134217728 pixels; crop it"),
        ((5, 5, 4), "index: 2 Got: 4 Expected: 3"),
    ],
)
def test_pictures_that_can_not_be_prepared(shape, message):
    """Where `miniclip.preprocess` refuses a picture, so does the graph, and the runtime's error says why."""
    config = PreprocessConfig(224)
    with pytest.raises(Exception, match=message):
        session(config).run(None, {"picture": np.zeros(shape, np.uint8)})
    if shape[2] == 3 and 0 not in shape:
        with pytest.raises(ImageError, match="above the limit of 134217728 pixels"):
            Preprocess(config)(Image.new("RGB", (shape[1], shape[0])))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("picture") / "out"
    model = model_of(CONFIGS["ViT"])
    export_model(model, folder, with_preprocess=True)
    return model, folder


def test_an_export_takes_pictures(exported):
    import onnx

    model, folder = exported
    image, texts = make("noise", 75, 48), ["a cat", "two dogs and a cat"]  # a few bytes differ from Pillow's
    golden, mine = trace(model, image, texts), trace_exported(folder, image, texts)
    expected = ["image.pixels", "image_embedding", "text.utf8", "text.ids", "text_embedding", "logits_per_image"]
    assert list(mine) == expected
    assert compare(golden, mine, model).passed
    assert not compare(golden, trace_exported(folder, image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), texts)).passed
    file = onnx.load(folder / "image.onnx")
    assert [end.name for end in (*file.graph.input, *file.graph.output)] == ["picture", "image_embedding", "pixels"]


def test_embeddings_hardly_differ():
    model, preprocess = load("tiny-ViT", device="cpu")
    images = [make(kind, *size) for kind in KINDS for size in ((100, 75), (48, 64), (320, 999))]
    for image in images if PILLOW_13 else images[::3]:
        pixels = torch.stack([onnx_pixels(image, model.config.preprocess), preprocess(image)])
        with torch.inference_mode():
            mine, expected = model.encode_image(pixels)
        assert torch.cosine_similarity(mine, expected, dim=0) > 0.999999


def test_traced_by_the_command_line(exported, tmp_path, capsys):
    model, folder = exported
    make("smooth", 100, 75).save(tmp_path / "picture.png")
    arguments = ["--image", str(tmp_path / "picture.png"), "--text", "a cat", "-o", str(tmp_path / "mine.safetensors")]
    assert main(["trace", "--exported", str(folder), *arguments]) == 0
    assert "6 stages" in capsys.readouterr().out
    assert compare(trace(model, make("smooth", 100, 75), ["a cat"]), load_stages(tmp_path / "mine.safetensors")).passed


def test_folders_that_are_no_export(tmp_path):
    with pytest.raises(TraceError, match=r"is not a folder that `miniclip export` wrote: .*config\.json"):
        trace_exported(tmp_path, text=["a cat"])
    for text, message in (("[]", "no context_length"), ('{"preprocess": 1}', "no context_length")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(TraceError, match=message):
            trace_exported(tmp_path, text=["a cat"])
    (tmp_path / "config.json").write_text('{"preprocess": {}, "context_length": 77, "logit_scale": 1}')
    with pytest.raises(TraceError, match=r"it has no text\.onnx"):
        trace_exported(tmp_path, text=["a cat"])


def test_only_onnx_holds_the_preparation(tmp_path, capsys):
    with pytest.raises(ExportError, match="expected 'onnx'"):
        export_model(model_of(CONFIGS["ViT"]), tmp_path / "out", "torch", with_preprocess=True)
    assert main(["export", "--format", "torch", "--with-preprocess", "-o", str(tmp_path / "out")]) == 2
    assert "can't hold the preparation of pictures" in capsys.readouterr().err


def measure(side: int, sizes: list[tuple[int, int]]) -> dict[tuple[str, str], tuple[float, float, float]]:
    """For each setting: the largest difference, the share of bytes that differ, and the share that differ by more."""
    rows = {}
    for how in SETTINGS:
        config = PreprocessConfig(side, interpolation=how[0], resize_mode=how[1])
        found = [difference(make(kind, *size), config) for kind in KINDS for size in sizes]
        any_difference, more = (float(np.mean([x > least for x in found])) for least in (0.5, 1.5))
        rows[how] = max(x.max() for x in found), any_difference, more
    return rows


def test_few_bytes_differ():
    for most, share, _ in measure(64, [(100, 75), (321, 200), (64, 60), (75, 140)]).values():
        assert most <= MOST + 1e-3 and 0 < share < 0.03


SIZES = [(640, 480), (480, 640), (500, 333), (300, 1000), (64, 48), (48, 64), (2000, 1300)]

if __name__ == "__main__":
    print("| resize | largest difference, of 255 | bytes that differ | by more than 1 |\n|---|---|---|---|")
    for (interpolation, mode), (most, share, more) in measure(224, SIZES).items():
        print(f"| {interpolation}, {mode} | {most:.0f} | {share:.3%} | {more:.5%} |")
