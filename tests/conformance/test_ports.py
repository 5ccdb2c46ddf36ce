"""The ports in examples/ pass every stage, fail where a mistake is put into them, and the specification is complete."""

import json
import math
import os
import re
import shutil
import struct
import subprocess
import sys
import unicodedata
import zlib
from io import BytesIO
from pathlib import Path
from random import Random

import make_preprocess
import numpy as np
import PIL
import planted_mistakes
import pytest
import regex
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
from miniclip.conformance.mistakes import MISTAKES, tokens
from miniclip.conformance.mistakes.weights import WEIGHTS
from miniclip.io import save_tensors
from miniclip.loading import blank_model, build_model, open_checkpoint, shapes_of
from miniclip.openai import stages as tables
from miniclip.stages import IMAGE, LOGITS
from miniclip.tokenizer import split_words

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


SANITIZED = "CFLAGS=-O1 -g -std=c11 -ffp-contract=off -fsanitize=address,undefined -fno-sanitize-recover=all"


def build(folder: Path, edit: tuple[str, str] = ("", ""), *options: str) -> Path:
    for file in (ROOT / "examples" / "port_c").iterdir():
        if file.suffix in (".c", ".h") or file.name == "Makefile":
            text = file.read_text()
            (folder / file.name).write_text(text.replace(*edit) if file.name == "clip.c" and edit[0] else text)
    done = subprocess.run(["make", "-C", folder, *options], capture_output=True, text=True)
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


def split(data: bytes) -> tuple[dict, bytes]:
    """The header of a safetensors file and what follows it."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(header: dict | str, body: bytes) -> bytes:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return len(text).to_bytes(8, "little") + text + body


def crafted(header: dict, body: bytes, random: Random) -> bytes:
    """A file with one to three changes that a reader must notice or survive."""
    header = json.loads(json.dumps(header))
    strange = [0, 1, 2, 3, 63, 64, 65, 192, 2**16, 2**31 - 1, 2**31, 2**32, 2**62, 2**63, 2**64 - 1, 2**64, 2**70]
    for _ in range(random.randint(1, 3)):
        name = random.choice([name for name in header if name != "__metadata__"])
        entry, kind = header[name], random.randrange(8)
        if kind == 0:
            entry["shape"] = [random.choice(strange) for _ in range(random.randrange(5))]
        elif kind == 1 and entry["shape"]:
            entry["shape"][random.randrange(len(entry["shape"]))] = random.choice(strange)
        elif kind == 2:
            entry["shape"] = entry["shape"][::-1] + [1] * random.randrange(3)
        elif kind == 3:
            entry["data_offsets"][random.randrange(2)] = random.choice([*strange, len(body)])
        elif kind == 4:
            entry["dtype"] = random.choice(["F32", "F64", "I64", "U8", "BF16", "X", "F" * 300])
        elif kind == 5:
            count = math.prod(entry["shape"]) // 2  # a smaller tensor that fits its place
            first, size = entry["data_offsets"][0], (entry["data_offsets"][1] - entry["data_offsets"][0]) // 2
            entry |= {"shape": [count], "data_offsets": [first, first + size]}
        elif kind == 6:
            other = random.choice([name for name in header if name != "__metadata__"])
            header[name], header[other] = header[other], header[name]
        else:
            header[random.choice([name + "x", "n" * 500, 'a"b'])] = header.pop(name)
    data = joined(header, body)
    return data[: random.randrange(len(data))] if random.random() < 0.1 else data


@needs_compiler
@pytest.mark.slow  # 200 runs under the address sanitizer, which notices every access outside of what was allocated
def test_c_port_survives_crafted_files(cases, tmp_path):
    program = build(tmp_path, ("", ""), SANITIZED)
    random, case = Random(0), cases["tiny-ViT"]
    files = [(case / f"{name}.safetensors").read_bytes() for name in ("weights", "golden")]
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0:exitcode=99:allocator_may_return_null=1"}
    codes = []
    for i in range(200):
        changed = [crafted(*split(data), random) if k == i % 2 else data for k, data in enumerate(files)]
        paths = [tmp_path / name for name in ("weights", "golden", "mine")]
        for path, data in zip(paths, changed, strict=False):
            path.write_bytes(data)
        done = subprocess.run([program, *paths], capture_output=True, text=True, env=environment, errors="replace")
        assert done.returncode in (0, 1), done.stderr
        codes.append(done.returncode)
    assert 100 < sum(codes) < 200  # most are refused, some have no influence


@needs_compiler
@pytest.mark.slow
def test_the_sanitizer_would_notice(cases, tmp_path):
    """The same check finds a size that is not checked."""
    program = build(tmp_path, ("if (elements(tensor) != count)", "if (0)"), SANITIZED)
    header, body = split((cases["tiny-ViT"] / "weights.safetensors").read_bytes())
    entry = header["ln_final.weight"]
    header["ln_final.weight"] = entry | {"shape": [1], "data_offsets": [len(body) - 2, len(body)]}
    (tmp_path / "weights").write_bytes(joined(header, body))
    paths = [tmp_path / "weights", cases["tiny-ViT"] / "golden.safetensors", tmp_path / "mine"]
    done = subprocess.run([program, *paths], capture_output=True, text=True, errors="replace")
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr


# The port in JavaScript

JAVASCRIPT = ROOT / "examples" / "port_js"
needs_node = pytest.mark.skipif(
    not (shutil.which("node") and int(subprocess.check_output(["node", "--version"])[1:].split(b".")[0]) >= 20),
    reason="the port in JavaScript needs Node 20 or later",
)


def run_javascript_port(case: str, golden: Path, output: Path, *options: str, folder: Path = JAVASCRIPT) -> None:
    weights = ROOT / "weights" / f"{case}.safetensors.gz"
    subprocess.run(["node", folder / "run.mjs", weights, golden, output, *options], check=True)


@needs_node
@pytest.mark.parametrize("model", ["tiny-ViT", "tiny-RN"])
def test_javascript_port_passes_every_golden(model, tmp_path):
    """From the decoded picture and the strings on: its tokenizer makes text.ids."""
    run_javascript_port(model, GOLDENS / model, tmp_path)
    goldens = sorted((GOLDENS / model).glob("*.safetensors"))
    assert len(goldens) > 10
    for golden in goldens:
        check_all_stages_pass(golden, tmp_path / golden.name)
        has_text = "text.utf8" in load_trace(golden)[0]
        assert ("text.ids" in load_file(tmp_path / golden.name)) == has_text


@needs_node
def test_javascript_port_reads_the_weights(tmp_path):
    golden, mine = GOLDENS / "tiny-ViT" / "pixel.safetensors", tmp_path / "mine.safetensors"
    run_javascript_port("tiny-ViT", golden, mine, "--weights")
    comparison = compare_files(golden, mine, "tiny-ViT")
    assert comparison.passed and sum(stage.name.startswith("w.") for stage in comparison.stages) > 50


@needs_node
def test_comparison_finds_a_mistake_in_the_javascript_port(tmp_path):
    shutil.copytree(JAVASCRIPT, tmp_path / "examples" / "port_js")
    for name in ("miniclip/bpe_simple_vocab_16e6.txt.gz", *(f"tests/conformance/{x}.json" for x in TABLES)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    source = tmp_path / "examples" / "port_js" / "tokenizer.js"
    changed = source.read_text(encoding="utf-8").replace(".toLowerCase()", "")
    assert changed != source.read_text(encoding="utf-8")
    source.write_text(changed, encoding="utf-8")
    golden, mine = GOLDENS / "tiny-ViT" / "all.safetensors", tmp_path / "mine.safetensors"
    run_javascript_port("tiny-ViT", golden, mine, folder=source.parent)
    comparison = compare_files(golden, mine)
    assert comparison.first_wrong == "text.ids" and comparison.texts[0].mistakes == ("not lower-cased",)


TABLES = ("html_entities", "windows_1252")
TOKENIZE = """
import {{ readFileSync }} from "node:fs";
import {{ gunzip }} from "{port}/safetensors.js";
import {{ makeTokenizer }} from "{port}/tokenizer.js";
const read = (path) => readFileSync("{root}/" + path);
const [golden, entities, windows1252] = ["tokenizer", "html_entities", "windows_1252"].map((name) =>
  JSON.parse(read(`tests/conformance/${{name}}.json`).toString()));
const merges = new TextDecoder().decode(await gunzip(read("miniclip/bpe_simple_vocab_16e6.txt.gz")));
const {{ encode }} = makeTokenizer(merges, entities, windows1252);
console.log(JSON.stringify(golden.encode.map(([text]) => encode(text))));
"""


@needs_node
def test_javascript_tokenizer_on_all_strings(tmp_path):
    """Every string gets the reference's ids, or those of the reference without the guess at mojibake."""
    script = tmp_path / "all.mjs"
    script.write_text(TOKENIZE.format(root=ROOT.as_posix(), port=JAVASCRIPT.as_posix()))
    got = json.loads(subprocess.check_output(["node", script]))
    golden = json.loads((SPECIFICATION.parent / "tokenizer.json").read_text(encoding="ascii"))
    steps, others = tokens.STEPS["no guess at mojibake"], []
    for i, (ids, (text, expected)) in enumerate(zip(got, golden["encode"], strict=True)):
        if ids != expected:
            others.append(i)
            assert [49406, *ids, 49407] == tokens.ids_of(text, len(ids) + 2, **steps), text
    assert others == golden["guess"] and len(others) == 406  # as section 4.6 says


# The specification


def test_specification_cuts_words_as_the_tokenizer():
    """Its five alternatives, taken without ignoring case, for every letter, mark, number and symbol."""
    cut = r"<\|[sſ]tartoftext\|>|<\|endoftext\|>|'[sſ]|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}\u0345]+"
    characters = [c for c in map(chr, range(0x110000)) if unicodedata.category(c)[0] not in "CZ"]
    text = " ".join(f"x{c}y '{c} !{c}1 <|{c}tartoftext|>" for c in characters).lower()
    expected = split_words(text)
    assert regex.findall(cut, text) == expected
    assert regex.findall(cut.replace(r"\u0345", ""), text) != expected


def test_specification_says_where_samples_are_taken():
    for case in json.loads((SPECIFICATION.parent / "cases.json").read_text())["preprocess"]:
        count = 3 * case["image_size"] ** 2
        assert make_preprocess.samples(torch.arange(count)).tolist() == [k * (count - 1) // 63 for k in range(64)]


def test_specification_counts_goldens_and_mistakes():
    goldens, mistakes = len(list(GOLDENS.glob("*/*.safetensors"))), len({x.name for x in MISTAKES} | WEIGHTS.keys())
    text = SPECIFICATION.read_text()
    assert f"on all {goldens} goldens" in text and f"`compare` knows {mistakes} mistakes" in text
    assert len(planted_mistakes.NAMED_SECOND) == 1 and "all but\none are named first" in text


def png(depth: int, colour: int, row: bytes, transparent: bytes = b"") -> Image.Image:
    """One row of at most two pixels."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 2 if depth < 8 else 1, 1, depth, colour, 0, 0, 0))]
    chunks += [(b"tRNS", transparent)] if transparent else []
    chunks += [(b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b"")]
    parts = [len(x).to_bytes(4, "big") + kind + x + zlib.crc32(kind + x).to_bytes(4, "big") for kind, x in chunks]
    return Image.open(BytesIO(b"\x89PNG\r\n\x1a\n" + b"".join(parts)))


def test_specification_says_how_png_is_decoded():
    found = [png(2, 0, b"\x60"), png(4, 0, b"\x1f"), png(16, 2, bytes([1, 255, 128, 200, 3, 4]))]
    found += [png(16, 6, bytes([1, 255, 128, 200, 3, 4, 7, 9])), png(16, 4, bytes([9, 255, 128, 200]))]
    found += [png(8, 2, bytes([1, 2, 3]), bytes([0, 1, 0, 2, 0, 3])), png(8, 0, bytes([1]), bytes([0, 1]))]
    expected = [("L", b"\x55\xaa"), ("L", b"\x11\xff"), ("RGB", b"\x01\x80\x03"), ("RGBA", b"\x01\x80\x03\x07")]
    expected += [("RGBA", b"\x09\x09\x09\x80"), ("RGB", b"\x01\x02\x03"), ("L", b"\x01")]
    assert [(image.mode, image.tobytes()) for image in found] == expected


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
    for largest, relative, _ in {*INPUTS.values(), *PRECISIONS.values()}:
        assert f"| {spelled(largest)} | {spelled(relative)} |" in text
    assert f"| {spelled(2e-4)} | {spelled(2e-5)} |" not in text


def spelled(tolerance: float) -> str:
    if tolerance == 1 / 128:
        return "1/128"
    return "0" if tolerance == 0 else f"{tolerance:.1e}".replace(".0e", "e").replace("e-0", "e-")
