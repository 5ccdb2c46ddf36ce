"""Every mistake of the catalogue, planted by editing the source of a port, is found where it is, and named.

The ports are those in examples/, which share no code with the diagnosis, and our tokenizer. A row of the tables below
is: the mistake's name, the stage where it must show first, and the edits, pairs of old and new source.
"""

import sys
import types
from pathlib import Path

import numpy as np
import planted_mistakes as planted
import pytest
import torch
from conformance import seeded
from PIL import Image

from miniclip.config import CLIPConfig, PreprocessConfig, ResNetConfig, TextConfig, TransformerConfig, ViTConfig
from miniclip.config import openai_transformer as transformer
from miniclip.conformance import TraceError, compare, trace
from miniclip.conformance.mistakes import MISTAKES, weights
from miniclip.conformance.mistakes.resample import Steps, resampled
from miniclip.conformance.rules import bands, utf8
from miniclip.loading import blank_model, build_model, shapes_of
from miniclip.preprocess import resize
from miniclip.stages import tower_of
from miniclip.tokenizer import tokenize

ROOT = Path(__file__).parents[2]
EXAMPLES, TOKENIZER = ROOT / "examples", ROOT / "miniclip" / "tokenizer.py"
TOWERS = ("visual", "text")
TEXTS = ["a dog", "Two <|endoftext|> s!"]
STRINGS = ["It's 2024: a CAFÉ", "<i>&eacute;clair &amp; Â£5</i>", "pterodactylish unfathom!!!", "x <|endoftext|> y"]
STRINGS += ["<b>&EACUTE; 3 &#151; 5 &#x20AC; &amp;lt;", "½ cafe\u0301 \ufb05 it'ſ", "two\u2003spaces hmmmmmm"]
STRINGS += ["cut " * 50]


def model_of(vision, text: TransformerConfig):
    config = CLIPConfig(48, vision, TextConfig(30, 49408, text), PreprocessConfig(vision.image_size))
    return build_model(seeded.weights(shapes_of(blank_model(config, torch.float32).state_dict())), config)


def picture(mode: str, width: int, height: int) -> Image.Image:
    """Smooth in most places, with some edges."""
    y, x, band = np.ogrid[:height, :width, : len(mode)]
    waves = 127 + 90 * np.sin(x / (5 + band) + y / 9) + 37 * np.sign(np.sin(x / 17 - y / (7 + band)))
    return Image.frombytes(mode, (width, height), waves.astype(np.uint8).tobytes())


@pytest.fixture(scope="module")
def models():
    gelu = TransformerConfig(128, 1, 2, 512, "gelu")
    vit = model_of(ViTConfig(32, 8, transformer(128, 2)), transformer(128, 2))
    return {
        "vit": vit,
        "gelu": model_of(ViTConfig(32, 8, gelu), gelu),
        "resnet": model_of(ResNetConfig(64, 8, (2, 1, 1, 1), 4), transformer(64, 1)),
    }


PICTURES = {  # model, width, height
    "RGB": ("vit", picture("RGB", 131, 91)),  # becomes 46 x 32
    "rounded": ("vit", picture("RGB", 127, 91)),  # 44.7
    "rounded up": ("vit", picture("RGB", 120, 91)),  # 42.2
    "excess 9": ("vit", picture("RGB", 41, 32)),  # 4.5 is rounded to 4
    "excess 11": ("vit", picture("RGB", 43, 32)),  # 5.5 to 6
    "RGBA": ("vit", picture("RGBA", 60, 71)),
    "contrast": ("vit", picture("RGB", 131, 91).point(lambda byte: 255 * (byte > 127))),
    "tall": ("vit", picture("RGB", 50, 131)),
}


@pytest.fixture(scope="module")
def goldens(models):
    """The model and a trace of it, by name. Two images, since with one a transposed result can look right."""
    two = seeded.image(2, 32)
    found = {name: (models[model], trace(models[model], image)) for name, (model, image) in PICTURES.items()}
    both = trace(models["vit"], two, TEXTS)
    found |= {tower: (models["vit"], {n: x for n, x in both.items() if tower_of(n) == tower}) for tower in TOWERS}
    found["both"] = (models["vit"], both)
    found["gelu"] = (models["gelu"], trace(models["gelu"], two, TEXTS))
    found["resnet"] = (models["resnet"], trace(models["resnet"], picture("RGB", 97, 80)))
    return found


@pytest.fixture(autouse=True)
def traced_once(monkeypatch, goldens):
    """The diagnosis runs the model on the golden's inputs each time; here it gets the golden, which is the same."""
    monkeypatch.setattr("miniclip.conformance.diagnose._complete", lambda model, golden, wrong: dict(golden))


def edited(source: str, edits: tuple[str, ...], used: set[str]) -> str:
    for old, new in zip(edits[::2], edits[1::2], strict=True):
        if old in source and old not in used:
            assert source.count(old) == 1, f"{old!r} occurs {source.count(old)} times in the port"
            source = source.replace(old, new)
            used.add(old)
    return source


def run_port(model, golden: dict, edits: tuple[str, ...] = (), read=np.asarray) -> dict[str, np.ndarray]:
    """The stages that the NumPy port computes with edited sources, up to where it raises an error if it does.

    read(weight): the weight as the port reads it.
    """
    used: set[str] = set()
    names = ("port_picture", "port_numpy")
    sources = {name: edited((EXAMPLES / f"{name}.py").read_text(), edits, used) for name in names}
    assert used == set(edits[::2]), f"the port no longer has {set(edits[::2]) - used}"
    modules = {name: types.ModuleType(name) for name in names}
    for name, module in modules.items():
        before = sys.modules.get("port_picture")
        sys.modules["port_picture"] = modules["port_picture"]
        try:
            exec(compile(sources[name], name, "exec"), module.__dict__)
        finally:
            sys.modules.pop("port_picture")
            if before:
                sys.modules["port_picture"] = before
    port = modules["port_numpy"]
    stages = port.Stages()
    port.Stages = lambda: stages
    weights = {name: read(tensor.numpy()) for name, tensor in model.state_dict().items()}
    inputs = {name: stage.numpy() for name, stage in golden.items()}
    with np.errstate(all="ignore"):
        try:
            port.forward(weights, inputs)
        except ValueError:  # NumPy's, when shapes no longer fit
            assert edits
    return stages


def check(golden: dict, mine: dict, model, stage: str | None, name: str) -> None:
    comparison = compare(golden, mine, model)
    diagnosis = comparison.diagnosis
    assert comparison.first_wrong and stage in (None, comparison.first_wrong)
    assert diagnosis, comparison
    assert name == diagnosis.mistake or (name in planted.NAMED_SECOND and name in diagnosis.also), diagnosis
    assert diagnosis.mistake not in diagnosis.also
    assert diagnosis.explained > 0.9


@pytest.mark.parametrize("name", ["both", "resnet", "RGB", "RGBA"])
def test_unedited_port_passes(goldens, name):
    model, golden = goldens[name]
    assert compare(golden, run_port(model, golden, ()), model).passed


def test_the_resize_that_mistakes_change_is_pillows():
    for mode, width, height in (("L", 70, 31), ("LA", 33, 80), ("RGB", 9, 60), ("RGBA", 40, 41), ("RGB", 20, 20)):
        image = picture(mode, width, height)
        right = bands(resize(image, 20, "bicubic", "shortest"))
        assert torch.equal(resampled(bands(image), right.shape[:2], Steps()), right)
        other = resampled(bands(image), right.shape[:2], Steps(a=-0.75))
        assert torch.equal(other, right) == ((width, height) == (20, 20))


@pytest.mark.parametrize(("name", "golden", "stage", "edits"), [(n, g, s, e) for n, g, s, *e in planted.PICTURES])
def test_mistake_with_the_picture(goldens, name, golden, stage, edits):
    model, golden = goldens[golden]
    check(golden, run_port(model, golden, tuple(edits)), model, stage, name)


VIT = [*planted.VIT, *planted.TEXT, *planted.TRANSFORMER]


@pytest.mark.parametrize(("name", "stage", "edits"), [(n, s, e) for n, s, *e in VIT])
def test_mistake_in_the_transformers(goldens, name, stage, edits):
    model, golden = goldens[tower_of(stage)]
    check(golden, run_port(model, golden, tuple(edits)), model, stage, name)


def test_the_other_activation(goldens):
    model, golden = goldens["gelu"]
    stage = "visual.transformer.resblocks.0.mlp.activation"
    check(golden, run_port(model, golden, ()), model, stage, "QuickGELU instead of GELU")


@pytest.mark.parametrize(("name", "stage", "edits"), [(n, s, e) for n, s, *e in planted.RESNET])
def test_mistake_in_the_resnet(goldens, name, stage, edits):
    model, golden = goldens["resnet"]
    check(golden, run_port(model, golden, tuple(edits)), model, stage, name)


@pytest.mark.parametrize(("name", "edits"), [(n, e) for n, *e in planted.TOKENS])
def test_mistake_with_the_strings(goldens, name, edits):
    model, _ = goldens["text"]
    golden = {"text.utf8": utf8(STRINGS), "text.ids": tokenize(STRINGS, model.context_length, truncate=True)}
    used: set[str] = set()
    source = edited(TOKENIZER.read_text(), tuple(edits), used)
    assert used == set(edits[::2])
    module = types.ModuleType("edited_tokenizer")
    module.__file__ = str(TOKENIZER)
    exec(compile(source, "tokenizer", "exec"), module.__dict__)
    ids = module.tokenize(STRINGS, model.context_length, truncate=True)
    check(golden, {"text.ids": ids}, model, "text.ids", name)


@pytest.mark.parametrize(("name", "stage", "edits"), [(n, s, e) for n, s, *e in planted.UNKNOWN])
def test_mistake_that_nobody_knows(goldens, name, stage, edits):
    """The stage is found, and no explanation is made up."""
    model, golden = goldens[name or tower_of(stage)]
    comparison = compare(golden, run_port(model, golden, tuple(edits)), model)
    assert comparison.first_wrong == stage
    assert comparison.diagnosed and comparison.diagnosis is None
    assert "none of the catalogue explains it" in str(comparison)


@pytest.mark.parametrize("name", weights.WEIGHTS)
def test_mistake_in_reading_weights(models, name):
    model = models["vit"]
    matrix = model.visual.proj.detach().half().float()
    matrix[0, :8] = torch.arange(1, 9) / 2**20  # below 2^-14 most float16 numbers are subnormal
    if name == "bfloat16 read as float16":
        matrix = matrix.bfloat16().float()
    with torch.no_grad():
        model.visual.proj.copy_(matrix)
    mine = weights.WEIGHTS[name](matrix)
    golden = {"text.ids": torch.zeros(1, 3)}
    comparison = compare(golden, {"w.visual.proj": matrix}, model)
    assert comparison.passed
    check(golden, {"w.visual.proj": mine}, model, "w.visual.proj", name)  # some have NaNs


@pytest.mark.parametrize(("name", "read"), planted.NUMBERS)
def test_mistake_in_reading_weights_shows_in_the_towers(name, read):
    """All weights are in half precision; those of one convolution are small, so that most of them are subnormal."""
    dtype = torch.bfloat16 if name.startswith("bfloat16") else torch.float16
    model = model_of(ViTConfig(32, 8, transformer(128, 2)), transformer(128, 2))
    with torch.no_grad():
        model.visual.conv1.weight *= 2.0**-11
        for weight in model.state_dict().values():
            weight.copy_(weight.to(dtype))
    golden = trace(model, seeded.image(2, 32))

    def as_planted(weight: np.ndarray) -> np.ndarray:
        return read(torch.from_numpy(weight).to(dtype).view(torch.uint16).numpy())

    assert compare(golden, run_port(model, golden), model).passed
    check(golden, run_port(model, golden, (), as_planted), model, "visual.conv1", name)


def test_a_mistake_that_depends_on_the_padding_is_named_without_it(goldens):
    """Without a mask, what is left of padding counts: a port that leaves columns out gets other numbers."""
    model, golden = goldens["text"]
    columns = int(golden["text.ids"].argmax(1).max()) + 1
    inputs = golden | {"text.ids": golden["text.ids"][:, :columns]}
    (edits,) = (edits for name, _, *edits in planted.TRANSFORMER if name == "no causal mask")
    mine = run_port(model, inputs, tuple(edits))
    assert golden["text.ids"].shape[1] > columns == mine["ln_final"].shape[1]
    check(golden, mine, model, "transformer.resblocks.0.attn.probabilities", "no causal mask")
    check(golden, {"text_embedding": mine["text_embedding"]}, model, "text_embedding", "no causal mask")


def test_weights_must_be_exact(models):
    model = models["vit"]
    golden, matrix = {"text.ids": torch.zeros(1, 3)}, model.visual.proj.detach()
    changed = matrix.clone()
    changed[3, 4] += 1e-6
    comparison = compare(golden, {"w.visual.proj": changed}, model)
    assert comparison.first_wrong == "w.visual.proj" and comparison.diagnosis is None
    assert compare(golden, {"w.visual.proj": matrix.half()}, model).passed  # a port in half precision
    with pytest.raises(TraceError, match="compared if the model is given"):
        compare(golden, {"w.visual.proj": matrix})


def test_every_mistake_is_planted():
    names = [row[0] for row in (*planted.PICTURES, *VIT, *planted.RESNET, *planted.TOKENS, *planted.NUMBERS)]
    assert sorted([*names, "QuickGELU instead of GELU"]) == sorted(mistake.name for mistake in MISTAKES)
    assert len(planted.UNKNOWN) >= 10


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_every_mistake_names_a_line_of_ours(mistake):
    place, code = mistake.place()
    file, line = place.split(":")
    assert code in (ROOT / file).read_text(encoding="utf-8").splitlines()[int(line) - 1]
    assert mistake.line in code
