"""The ports in examples/ pass every stage, fail where a mistake is put into them, and the specification is complete."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
from conformance import seeded
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import load_file

from miniclip import preprocess
from miniclip.config import MODELS, PreprocessConfig
from miniclip.conformance import compare, load_stages, load_trace, save_trace, trace
from miniclip.conformance.compare import compare_files
from miniclip.conformance.measure import INPUTS, PRECISIONS
from miniclip.io import save_tensors
from miniclip.loading import blank_model, build_model, open_checkpoint, shapes_of
from miniclip.openai import stages as tables
from miniclip.stages import IMAGE, LOGITS

ROOT = Path(__file__).parents[2]
SPECIFICATION = ROOT / "tests" / "conformance" / "README.md"
sys.path.insert(0, str(ROOT / "examples"))

import port_numpy  # noqa: E402
import port_picture  # noqa: E402

GOLDENS = ROOT / "tests" / "conformance" / "goldens"
TEXTS = ["a cat", "Two <|endoftext|> and a text that is a good deal longer, 12 words or so!"]
PILLOW_13 = int(PIL.__version__.split(".")[0]) >= 13


def picture(mode: str, width: int, height: int) -> Image.Image:
    values = seeded.uniform("picture", height * width * len(mode)) * 256
    return Image.frombytes(mode, (width, height), values.astype(np.uint8).tobytes())


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """For some models the folder of their weights and of a trace of all stages; "ResNet" has random weights."""
    folders = {}
    for name in [folder.name for folder in GOLDENS.iterdir()]:
        folders[name] = tmp_path_factory.mktemp(name)
        _, weights = open_checkpoint(name)
        save_tensors(weights, folders[name] / "weights.safetensors", {"note": 'with "quotes" and a \\'})
        shutil.copy(GOLDENS / name / "all.safetensors", folders[name] / "golden.safetensors")
    folder = folders["ResNet"] = tmp_path_factory.mktemp("ResNet")
    config = MODELS["tiny-RN"].config
    weights = seeded.weights(shapes_of(blank_model(config, torch.float32).state_dict()))
    save_tensors(weights, folder / "weights.safetensors")
    model = build_model(weights, config)
    save_trace(trace(model, picture("RGBA", 97, 131), TEXTS), folder / "golden.safetensors", model, "ResNet")
    return folders


def golden_of(case: Path) -> dict[str, torch.Tensor]:
    return load_trace(case / "golden.safetensors")[0]


def run_numpy_port(case: Path, *inputs: str, golden: Path | None = None) -> dict[str, np.ndarray]:
    """What the port writes to its file; `inputs` are the golden's stages that it gets, by default all."""
    stages = port_numpy.read_safetensors(golden or case / "golden.safetensors")
    given = {name: stages[name] for name in inputs or stages}
    stages = port_numpy.forward(port_numpy.read_safetensors(case / "weights.safetensors"), given)
    port_numpy.write_safetensors(stages, case / "numpy.safetensors")
    return load_file(case / "numpy.safetensors")


def check_all_stages_pass(golden: Path, mine: Path) -> None:
    expected, given = load_trace(golden)[0], load_stages(mine)
    inputs = {"text.utf8", "text.ids"}  # what a port starts from
    inputs |= {"image.decoded"} if "image.decoded" in expected else {"image.cropped", "image.pixels"}
    assert set(expected) - set(given) <= inputs
    comparison = compare_files(golden, mine)
    assert comparison.passed, str(comparison)
    if comparison.alternative:
        expected = load_trace(golden.parent / comparison.alternative)[0]
    for name in {"image.resized", "image.cropped", "image.pixels"} & set(given):
        assert torch.equal(expected[name], given[name]), name


def test_numpy_port_passes_with_random_weights(cases):
    run_numpy_port(cases["ResNet"])
    check_all_stages_pass(cases["ResNet"] / "golden.safetensors", cases["ResNet"] / "numpy.safetensors")


@pytest.mark.parametrize("golden", sorted(GOLDENS.glob("*/*.safetensors")), ids=lambda path: "/".join(path.parts[-2:]))
def test_numpy_port_passes(cases, golden):
    run_numpy_port(cases[golden.parent.name], golden=golden)
    check_all_stages_pass(golden, cases[golden.parent.name] / "numpy.safetensors")


def test_numpy_port_from_pixels(cases):
    mine = run_numpy_port(cases["tiny-ViT"], "image.pixels")
    assert "text_embedding" not in mine and "image.resized" not in mine
    assert compare(golden_of(cases["tiny-ViT"]), mine).passed


@pytest.mark.parametrize(
    ("name", "attribute", "mistake", "stage"),
    [
        ("tiny-ViT", "quick_gelu", lambda x: x / (1 + np.exp(-x)), "visual.transformer.resblocks.0.mlp.activation"),
        ("tiny-ViT", "EPS", 1e-2, "visual.ln_pre"),
        ("tiny-ViT", "unit", lambda x: x, "image_embedding"),
        ("ResNet", "batch_norm", lambda x, w, name: x, "visual.bn1"),
        ("ResNet", "average_pool", lambda x, side: x[:, :, ::side, ::side], "visual.avgpool"),
        ("ResNet", "prepare", lambda record, *_: record("image.cropped", np.zeros((64, 64, 3), "u1")), "image.cropped"),
    ],
)
def test_comparison_finds_a_mistake_in_the_numpy_port(cases, name, attribute, mistake, stage, monkeypatch):
    monkeypatch.setattr(port_numpy, attribute, mistake)
    mine = run_numpy_port(cases[name], "image.decoded")
    assert compare(golden_of(cases[name]), mine).first_wrong == stage


# The picture, bit for bit


def equals_pillow(mode: str, width: int, height: int, size: int) -> bool:
    image = picture(mode, width, height)
    stages = port_numpy.Stages()
    bands = np.array(image).reshape(height, width, len(mode))
    port_picture.prepare(stages, bands, size)
    resized = np.array(preprocess.resize(image, size, "bicubic", "shortest"))
    pixels = preprocess.Preprocess(PreprocessConfig(size))(image).numpy()
    return np.array_equal(resized.reshape(stages["image.resized"].shape), stages["image.resized"]) and np.array_equal(
        pixels[None], stages["image.pixels"]
    )


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["L", "LA", "RGB", "RGBA"]), st.integers(1, 90), st.integers(1, 90), st.integers(1, 48))
def test_picture_equals_pillow(mode, width, height, size):
    assume(PILLOW_13 or height <= 2 * width)  # older Pillows filter tall pictures along the width first too
    assert equals_pillow(mode, width, height, size)


def test_the_order_of_the_passes_counts():
    bands = np.array(picture("RGB", 40, 120))
    resized = port_picture.resize_axis(port_picture.resize_axis(bands, 1, 20), 0, 60)
    assert not np.array_equal(resized, port_picture.resize(bands, 20))
    assert np.array_equal(resized, Image.fromarray(bands).resize((20, 60), Image.Resampling.BICUBIC)) != PILLOW_13


@pytest.mark.parametrize(
    ("function", "mistake"),
    [
        ("bicubic", lambda x: (1.25 * abs(x) - 2.25) * x * x + 1 if abs(x) < 1 else 0.0),
        ("multiply_by_alpha", lambda picture: picture),
        ("divide_by_alpha", lambda picture: picture),
        ("center_crop", lambda picture, size: picture[:size, :size, :3]),
        ("normalize", lambda picture: ((picture / 255 - port_picture.MEAN) / port_picture.STD).astype(np.float32)),
    ],
)
def test_picture_with_a_mistake_differs_from_pillow(function, mistake, monkeypatch):
    assert equals_pillow("RGBA", 97, 60, 32)
    monkeypatch.setattr(port_picture, function, mistake)
    assert not equals_pillow("RGBA", 97, 60, 32)


# The port in C


def build(folder: Path, edit: tuple[str, str] = ("", "")) -> Path:
    for file in (ROOT / "examples" / "port_c").iterdir():
        if file.suffix in (".c", ".h") or file.name == "Makefile":
            text = file.read_text()
            (folder / file.name).write_text(text.replace(*edit) if file.name == "clip.c" and edit[0] else text)
    done = subprocess.run(["make", "-C", folder], capture_output=True, text=True)
    assert done.returncode == 0 and "warning" not in done.stderr, done.stderr
    return folder / "clip"


needs_compiler = pytest.mark.skipif(
    not (shutil.which("make") and shutil.which("cc")), reason="building the port in C needs make and cc"
)


@pytest.fixture(scope="module")
def c_port(tmp_path_factory):
    return build(tmp_path_factory.mktemp("port_c"))


def run_c_port(program: Path, case: Path, output: Path) -> subprocess.CompletedProcess:
    files = (case / "weights.safetensors", case / "golden.safetensors", output)
    return subprocess.run([program, *files], capture_output=True, text=True)


@needs_compiler
@pytest.mark.parametrize("golden", sorted(GOLDENS.glob("tiny-ViT/*.safetensors")), ids=lambda path: path.stem)
def test_c_port_passes(cases, golden, c_port, tmp_path):
    weights, mine = cases["tiny-ViT"] / "weights.safetensors", tmp_path / "mine.safetensors"
    subprocess.run([c_port, weights, golden, mine], check=True)
    check_all_stages_pass(golden, mine)


@needs_compiler
def test_comparison_finds_a_mistake_in_the_c_port(cases, tmp_path):
    program = build(tmp_path, ("-1.702f", "-1.6f"))
    run_c_port(program, cases["tiny-ViT"], tmp_path / "mine.safetensors")
    comparison = compare(golden_of(cases["tiny-ViT"]), load_stages(tmp_path / "mine.safetensors"))
    assert comparison.first_wrong == "visual.transformer.resblocks.0.mlp.activation"


@needs_compiler
def test_c_port_refuses_a_resnet(cases, c_port, tmp_path):
    done = run_c_port(c_port, cases["ResNet"], tmp_path / "mine.safetensors")
    assert done.returncode == 1 and "is not a CLIP with a Vision Transformer" in done.stderr


DAMAGED = [b"", b"\xff" * 64, b"\x10" + bytes(7) + b'{"a":{"dtype":"F', b"\x02" + bytes(7) + b"[]"]


@needs_compiler
@pytest.mark.parametrize("content", DAMAGED)
def test_c_port_refuses_a_damaged_file(content, c_port, tmp_path):
    (tmp_path / "weights.safetensors").write_bytes(content)
    (tmp_path / "golden.safetensors").write_bytes(b"\x02" + bytes(7) + b"{}")
    done = run_c_port(c_port, tmp_path, tmp_path / "mine.safetensors")
    assert done.returncode == 1 and done.stderr
    assert not (tmp_path / "mine.safetensors").exists()


# The specification


def stage_names() -> list[str]:
    rows = [IMAGE, tables.VIT, tables.BLOCK, tables.STEM, tables.BOTTLENECK, tables.POOL, tables.IMAGE_END]
    rows += [tables.TEXT, LOGITS]
    return [name for table in rows for name, *_ in table if name and not name.endswith("*")]


def test_specification_defines_every_stage():
    defined = {
        name
        for row in re.findall(r"^\| (`[^|]*`) \|", SPECIFICATION.read_text(), re.MULTILINE)
        for name in re.findall(r"`([^`]+)`", row)
    }
    missing = [name for name in stage_names() if name not in defined and "." + name.rsplit(".", 1)[-1] not in defined]
    assert not missing
    assert "visual.ln_pre" in defined and "visual.ln_mid" not in defined


def test_specification_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", SPECIFICATION.read_text())
    assert len(links) > 10
    assert [link for link in links if not (SPECIFICATION.parent / link).exists()] == []


def test_specification_states_the_tolerances():
    text = SPECIFICATION.read_text()
    for largest, relative in {*INPUTS.values(), *PRECISIONS.values()}:
        assert f"| {spelled(largest)} | {spelled(relative)} |" in text
    assert f"| {spelled(2e-4)} | {spelled(2e-5)} |" not in text


def spelled(tolerance: float) -> str:
    if tolerance == 1 / 128:
        return "1/128"
    return "0" if tolerance == 0 else f"{tolerance:.1e}".replace(".0e", "e").replace("e-0", "e-")
