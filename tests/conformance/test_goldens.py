"""The golden files and tables that ship: each is what the code computes, and each number is computed a second time."""

import gzip
import html
import json
import math
from fractions import Fraction
from functools import cache
from itertools import pairwise
from pathlib import Path

import ftfy
import make_goldens
import make_preprocess
import numpy as np
import PIL
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from miniclip.conformance import TraceError, compare, load_stages, load_trace, trace
from miniclip.conformance.compare import load_golden_model
from miniclip.conformance.files import weights_sha256
from miniclip.conformance.mistakes import tokens
from miniclip.conformance.rules import bands, strings
from miniclip.loading import load, open_checkpoint, shapes_of
from miniclip.preprocess import open_image, resize
from miniclip.tokenizer import MERGE_FILE, clean, encode, split_words, tokenize

HERE = Path(__file__).parent
GOLDENS = sorted((HERE / "goldens").glob("*/*.safetensors"))
CASES = json.loads((HERE / "cases.json").read_text())
REGENERATE = "regenerate the goldens: python tests/conformance/make_goldens.py"
PILLOW_13 = int(PIL.__version__.split(".")[0]) >= 13  # which resizes tall pictures along the height first


@pytest.fixture(scope="module")
def embedded():
    return {name: load(name, device="cpu", dtype=torch.float32)[0] for name in ("tiny-ViT", "tiny-RN")}


def test_there_are_goldens_of_every_tiny_model():
    for name in make_goldens.TINY:
        cases = {*make_goldens.pictures(), *make_goldens.ALTERNATIVES, "all", "texts"} - {"tall"}
        cases -= set() if name == "tiny-ViT" else {*make_goldens.ONLY_PREPARED}
        assert {path.stem for path in GOLDENS if path.parent.name == name} == cases, REGENERATE
    files = [path for folder in ("goldens", "images") for path in (HERE / folder).rglob("*.*")]
    assert sum(path.stat().st_size for path in files) < make_goldens.MOST_BYTES


@pytest.mark.parametrize("path", GOLDENS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_golden_is_what_the_model_computes(embedded, path):
    golden, metadata = load_trace(path)
    model = embedded[metadata["model"]]
    assert metadata["model"] == path.parent.name
    assert metadata["model_sha256"] == weights_sha256(model), REGENERATE
    picture = HERE / "images" / f"{path.stem}.png"
    image = open_image(picture) if picture.exists() else golden.get("image.pixels")
    again = trace(model, image, golden.get("text.ids"))
    assert golden.keys() - again.keys() <= {"text.utf8", "image.decoded", "image.resized", "image.cropped"}
    assert compare(golden, again).passed
    last = list(golden)[-1]
    assert not compare(golden, {**again, last: again[last].roll(1, -1)}).passed


def test_goldens_of_texts_and_of_the_tall_picture_are_right(embedded):
    folder = HERE / "goldens" / "tiny-ViT"
    golden = {name: load_trace(folder / f"{name}.safetensors") for name in ("texts", *make_goldens.ALTERNATIVES)}
    for name, other in make_goldens.ALTERNATIVES.items():
        assert golden[name][1]["alternative"] == f"{other}.safetensors"
    for name in ("texts", "mojibake-repaired"):
        stages, _ = golden[name]
        assert torch.equal(stages["text.ids"], tokenize(strings(stages["text.utf8"]), truncate=True))
    repaired, kept = (golden[f"mojibake-{x}"][0] for x in ("repaired", "kept"))
    assert torch.equal(repaired["text.utf8"], kept["text.utf8"])
    assert (repaired["text.ids"] != kept["text.ids"]).any(1).all()
    tall = open_image(HERE / "images" / "tall.png")
    resized = bands(resize(tall, 64, "bicubic", "shortest"))
    orders = {name: golden[name][0]["image.resized"] for name in make_goldens.ORDERS}
    own = "tall-height-first" if PILLOW_13 else "tall-width-first"
    assert [name for name, x in orders.items() if torch.equal(x, resized)] == [own]
    for name, x in orders.items():
        assert torch.equal(golden[name][0]["image.decoded"], bands(tall)) and x.shape == (166, 64, 3)


def test_goldens_of_another_model_are_refused(embedded):
    _, metadata = load_trace(GOLDENS[0])
    assert load_golden_model(metadata["model"], metadata)
    with pytest.raises(TraceError, match="is not the model that made the golden"):
        load_golden_model(metadata["model"], {**metadata, "model_sha256": "0" * 64})


def test_the_full_golden_has_every_stage(embedded):
    for name, model in embedded.items():
        golden, _ = load_trace(HERE / "goldens" / name / "all.safetensors")
        assert list(golden) == list(trace(model, Image.open(make_goldens.PICTURE), make_goldens.TEXTS))
        mine = load_stages(HERE / "goldens" / name / "all.safetensors")
        mine["image_embedding"] = golden["image_embedding"] * model.logit_scale.exp().detach()
        assert compare(golden, mine, model).diagnosis is None


@pytest.mark.parametrize("case", make_goldens.pictures())
def test_pictures_are_those_of_the_script(case):
    made, shipped = make_goldens.pictures()[case], open_image(HERE / "images" / f"{case}.png")
    assert made.mode == shipped.mode and made.size == shipped.size and made.tobytes() == shipped.tobytes()


def test_tables_are_those_of_the_code():
    for name, table in make_goldens.TABLES.items():
        shipped = (HERE / name).read_text()
        made = make_goldens.as_json(table())
        assert shipped == made, REGENERATE
        assert shipped.replace("5", "6") != made
        assert json.loads(shipped) == json.loads(json.dumps(table()))


def test_the_table_of_tensors_is_that_of_a_file():
    shapes = shapes_of(open_checkpoint("tiny-ViT")[1])
    table = json.loads((HERE / "models.json").read_text())["tensors"]["tiny-ViT"]
    assert {name: list(shape) for name, shape in shapes.items()} == table


@pytest.mark.parametrize("case", CASES["sizes"], ids=lambda case: "x".join(map(str, case["size"])))
def test_sizes_computed_with_fractions(case):
    (width, height), size = case["size"], case["image_size"]
    scale = Fraction(size, min(width, height))
    assert case["resized"] == [math.floor(width * scale), math.floor(height * scale)]
    left, top = (half_to_even(Fraction(side - size, 2)) for side in case["resized"])
    assert case["crop"] == [left, top, left + size, top + size]


def half_to_even(x: Fraction) -> int:
    down = math.floor(x)
    if x - down == Fraction(1, 2):
        return down + down % 2
    return math.floor(x + Fraction(1, 2))


@pytest.mark.parametrize("case", CASES["texts"], ids=lambda case: case["case"])
def test_ids_computed_with_spelled_symbols(case):
    """As openai/CLIP does it: symbols as strings, pairs merged by rank throughout the word."""
    table, merges = bytes_and_merges()
    symbols = [*table.values(), *(x + "</w>" for x in table.values()), *map("".join, merges)]
    ids = {symbol: i for i, symbol in enumerate([*symbols, "<|startoftext|>", "<|endoftext|>"])}
    ranks = {pair: i for i, pair in enumerate(merges)}
    found = []
    for word in split_words(clean(case["text"])):
        parts = [word] if word in ids and word.startswith("<|") else [table[byte] for byte in word.encode()]
        if len(parts) > 1 or parts[0] != word or not word.startswith("<|"):
            parts[-1] += "</w>"
        while pairs := [pair for pair in pairwise(parts) if pair in ranks]:
            best, i = min(pairs, key=ranks.get), 0
            while i < len(parts) - 1:
                parts[i : i + 2] = ["".join(best)] if (parts[i], parts[i + 1]) == best else parts[i : i + 2]
                i += 1
        found += [ids[part] for part in parts]
    assert case["ids"] == [49406, *found[:75], 49407]


@pytest.mark.parametrize(
    ("case", "mistakes"),
    [
        ("normal forms", ["normalised to NFKC, not NFC", "not normalised to NFC"]),
        ("unescaped twice", ["HTML entities unescaped once, not twice"]),
        ("spaces beyond ASCII", ["white space beyond ASCII not recognised"]),
        ("long s", ["U+017F not taken for s in contractions"]),
        ("order of merges", ["of equal pairs the last merged first", "merges from the left instead of by rank"]),
        ("ligatures", ["ligature U+FB05 replaced by s and t, not U+017F and t"]),
        ("truncated", ["truncated text without the end-of-text token"]),
    ],
)
def test_the_golden_texts_tell_mistakes_apart(case, mistakes):
    """Each gives this string other ids, and no two the same."""
    (row,) = (row for row in CASES["texts"] if row["case"] == case)
    padded = [tokens.ids_of(row["text"], 77, **tokens.STEPS[name]) for name in mistakes]
    found = [row["ids"], *([i for i in ids if i] for ids in padded)]
    assert len({*map(tuple, found)}) == len(found)


def test_a_line_is_searched_for_markup_before_its_entities_are_replaced():
    """Afterwards it has a `<` and would keep what HTML doesn't know."""
    golden = dict(json.loads((HERE / "tokenizer.json").read_text(encoding="ascii"))["encode"])
    assert golden["&lt;&amp;EACUTE;"] == encode("&lt;&amp;EACUTE;") == encode("<É")
    assert encode("<&EACUTE;") != encode("<É")


def test_the_crop_of_the_odd_picture_tells_roundings_apart():
    """Its excess is 3 mod 4; that of the portrait is 1 mod 4. So rounding down or up shows in one of both."""
    lefts, tops = [], []
    for name, offsets, side in (("odd-crop", lefts, 1), ("portrait", tops, 0)):
        golden, _ = load_trace(HERE / "goldens" / "tiny-ViT" / f"{name}.safetensors")
        resized, cropped = golden["image.resized"][..., :3], golden["image.cropped"]
        places = range(resized.shape[side] - 64 + 1)
        offsets += [i for i in places if torch.equal(resized.narrow(side, i, 64), cropped)]
    assert (lefts, tops) == ([22], [20])  # of 21.5 and 20.5


@cache
def bytes_and_merges():
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printed]
    table = {byte: chr(byte) for byte in printed} | {byte: chr(256 + i) for i, byte in enumerate(rest)}
    lines = gzip.decompress(MERGE_FILE.read_bytes()).decode().split("\n")[1 : 1 + 48894]
    return table, [tuple(line.split()) for line in lines]


def test_pictures_of_preprocess_are_those_of_its_file():
    assert [case["case"] for case in CASES["preprocess"]] == list(make_preprocess.CASES)
    assert {case["case"] for case in CASES["preprocess"]} == set(load_file(make_preprocess.GOLDEN))


def test_html_names_are_those_of_ftfy_and_python():
    table = json.loads((HERE / "html_entities.json").read_text())
    with_semicolon = {f"&{name}": x for name, x in table["html5"].items() if name.endswith(";")}
    assert with_semicolon | {f"&{name}": x for name, x in table["capitals"].items()} == ftfy.chardata.HTML_ENTITIES
    for name, characters in table["html5"].items():
        assert html.unescape(f"&{name}") == characters
    assert table["capitals"]["EACUTE;"] == "É" and "COPY;" not in table["capitals"]


def test_windows_1252_is_that_of_ftfy():
    table = json.loads((HERE / "windows_1252.json").read_text())["windows_1252"]
    assert len(table) == 27
    for byte in range(0x80, 0xA0):
        assert ftfy.fixes.fix_c1_controls(chr(byte)) == table.get(str(byte), chr(byte))


@pytest.mark.parametrize("name", make_goldens.TINY)
def test_checksums_of_the_weights(embedded, name):
    """The same sums by NumPy, in another order of summation."""
    table = json.loads((HERE / "goldens" / name / "weights.json").read_text())["weights"]
    weights = {n: x.numpy() for n, x in embedded[name].state_dict().items() if not n.endswith("num_batches_tracked")}
    assert table.keys() == weights.keys()
    for n, x in weights.items():
        row, flat = table[n], x.reshape(-1).astype(np.float64)
        assert row["shape"] == list(x.shape)
        assert row["sum"] == pytest.approx(flat[::-1].cumsum()[-1], rel=1e-9, abs=1e-9)
        assert row["values"] == [flat[0], flat[flat.size // 2], flat[-1]]
        assert row["sum"] != pytest.approx(flat.sum() + 1e-4, rel=1e-9, abs=1e-9)


def test_safetensors_alone_reads_the_goldens():
    stages = load_file(HERE / "goldens" / "tiny-ViT" / "texts.safetensors")
    assert bytes(stages["text.utf8"].tolist()).split(b"\xff")[0] == b"cat"
