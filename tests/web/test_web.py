"""The page that `miniclip export --web` writes: the folder, and the page itself in a real browser."""

import gzip
import json
import os
import re
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import CHROMIUM, Browser, served
from conformance import seeded
from PIL import Image
from safetensors.torch import load, save

from miniclip import load as load_model
from miniclip import tokenize
from miniclip.commands import main
from miniclip.config import CLIPConfig, PreprocessConfig, TextConfig, TransformerConfig, ViTConfig
from miniclip.export import ExportError
from miniclip.io import WriteError
from miniclip.loading import blank_model, build_model, shapes_of
from miniclip.save import save_checkpoint
from miniclip.web import export_web, folder

IMAGES = Path(__file__).parents[2] / "examples" / "images"
HOSTILE = "<img src=x onerror=document.title='taken'>"
needs_browser = pytest.mark.skipif(not CHROMIUM, reason="the page needs a browser: install chromium")
needs_onnx = pytest.mark.skipif(
    not all(find_spec(package) for package in ("onnx", "onnxscript")), reason='needs pip install "miniclip[onnx]"'
)


def small(activation: str = "quick_gelu", heads: int = 1, vocabulary: int = 49408, **preprocess):
    transformer = TransformerConfig(width=64, layers=1, heads=heads, mlp_width=128, activation=activation)
    text = TextConfig(77, vocabulary, transformer)
    config = CLIPConfig(32, ViTConfig(32, 16, transformer), text, PreprocessConfig(32, **preprocess))
    return build_model(seeded.weights(shapes_of(blank_model(config, torch.float32).state_dict())), config)


@pytest.fixture(scope="module")
def page_folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("web") / "page"
    assert main(["export", "--model", "tiny-ViT", "--web", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def small_folder(tmp_path_factory) -> Path:
    """The page of a model with random weights, which loads faster."""
    path = tmp_path_factory.mktemp("small") / "page"
    export_web(small(), path, "small")
    return path


# The folder


def test_folder_is_complete_and_its_policy_strict(page_folder):
    page = (page_folder / "index.html").read_text(encoding="utf-8")
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', page)[1]
    assert "default-src 'none'" in policy and "script-src 'self'" in policy and "unsafe" not in policy
    assert not re.search(r"<script>|<style|\son\w+=|\sstyle=", page)
    scripts = {file: file.read_text(encoding="utf-8") for file in page_folder.glob("*.js")}
    assert len(scripts) == 10
    named = re.findall(r'(?:src|href)="([^"#]+)"', page)
    named += re.findall(r'(?:from|import\(|Worker\() ?"([^"]+)"', "".join(scripts.values()))
    assert {name for name in named if not (page_folder / name).exists()} == {
        "./onnxruntime-web/ort.wasm.bundle.min.js"  # of another runtime
    }
    for file, text in scripts.items():
        assert not re.search(r"https?:|innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", text), file
    description = json.loads((page_folder / "model.json").read_text())
    assert {name: (page_folder / name).stat().st_size for name in description["files"]} == description["files"]
    assert len(description["files"]) == 4
    assert sum(file.stat().st_size for file in page_folder.rglob("*")) < 12e6


def test_weights_keep_their_values(page_folder):
    weights = load(gzip.decompress((page_folder / "model" / "weights.safetensors.gz").read_bytes()))
    model, _ = load_model("tiny-ViT", device="cpu", dtype=torch.float32)
    assert all(weights[name].float().equal(x) for name, x in model.state_dict().items())


def test_a_trained_model_is_named_without_its_folder(tmp_path):
    model = small()
    save_checkpoint(model.config, model.state_dict(), tmp_path / "mine.safetensors")
    assert main(["export", "--model", str(tmp_path / "mine.safetensors"), "--web", str(tmp_path / "page")]) == 0
    assert json.loads((tmp_path / "page" / "model.json").read_text())["model"] == "mine.safetensors"
    assert not any(tmp_path.name.encode() in file.read_bytes() for file in tmp_path.rglob("page/**/*.js*"))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: small("gelu"), "its activation is gelu"),
        (lambda: small(heads=2), "heads are not 64 wide"),
        (lambda: small(vocabulary=500), "vocabulary has 500 tokens"),
    ],
    ids=["activation", "heads", "vocabulary"],
)
def test_models_that_the_port_cannot_compute_are_refused(model, reason, tmp_path):
    with pytest.raises(ExportError, match=reason):
        export_web(model(), tmp_path / "page")
    assert not (tmp_path / "page").exists()


def test_large_models_and_other_folders_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(folder, "MOST_WEIGHTS", 1_000_000)
    with pytest.raises(ExportError, match=r"3 million weights.*npm install onnxruntime-web"):
        export_web(small(), tmp_path / "page")
    with pytest.raises(ExportError, match="expected the package onnxruntime-web"):
        export_web(small(), tmp_path / "page", onnxruntime_web=tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    monkeypatch.undo()
    with pytest.raises(WriteError, match="not an empty directory"):
        export_web(small(), tmp_path / "full")
    assert main(["export", "-o", str(tmp_path / "out"), "--onnxruntime-web", str(tmp_path)]) == 2
    assert "--onnxruntime-web is for --web" in capsys.readouterr().err
    assert main(["export", "--web", str(tmp_path / "out"), "--with-preprocess"]) == 2
    assert "--with-preprocess and --format are not for --web" in capsys.readouterr().err
    with pytest.raises(ExportError, match=r"its dtype is torch.float16.*npm install"):
        export_web(small().half(), tmp_path / "page")


# The page in a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    opened = Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


def open_page(browser, address: str, **settings):
    page = browser.open(address, **settings)
    page.wait("document.getElementById('loading').hidden")
    return page


def write(page, field: str, text: str) -> None:
    page.run(
        f"{{ const field = document.getElementById('{field}'); field.value = {json.dumps(text)}; field.oninput(); }}"
    )


ANSWERS = """[...document.querySelectorAll(".card")].map((card) => [card.querySelector(".file").textContent,
  [...card.querySelectorAll(".answers li")].map((line) => [".label", ".score"].map((part) =>
    line.querySelector(part).textContent))])"""
ELEMENTS = "document.querySelectorAll('.card *').length"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> dict[str, Path]:
    path = tmp_path_factory.mktemp("pictures")
    dog = Image.open(IMAGES / "dog.png").convert("RGB")
    wide = dog.resize((700, 300))
    wide.putalpha(Image.fromarray(np.tile(np.linspace(0, 255, 700).astype(np.uint8), (300, 1))))
    files = {f"{HOSTILE}.png": dog, "wide.png": wide, "grey.png": dog.convert("L").crop((0, 0, 100, 230))}
    files["guitar.webp"] = Image.open(IMAGES / "guitar.png").convert("RGB")
    for name, picture in files.items():
        picture.save(path / name, **({"lossless": True} if name.endswith("webp") else {}))
    return {name: path / name for name in files}


@torch.no_grad()
def library(pictures: dict[str, Path], texts: list[str]):
    """The scores [pictures, texts] of the Python library, and their cosines."""
    model, preprocess = load_model("tiny-ViT", device="cpu", dtype=torch.float32)
    pixels = torch.stack([preprocess(Image.open(file)) for file in pictures.values()])
    logits = model(pixels, tokenize(texts))[0]
    return logits, logits / model.logit_scale.exp()


@needs_browser
def test_names_and_order_are_the_librarys_and_the_self_test_passes(page_folder, pictures, browser):
    labels = ["a dog", "<b>a pizza</b> &amp; more", "a guitar", HOSTILE]
    with served(page_folder) as address:
        page = open_page(browser, address)
        write(page, "labels", "\n".join([*labels, " ", labels[0]]))
        page.choose("#files", list(pictures.values()))
        page.wait(f"document.querySelectorAll('.answers li').length === {len(pictures) * len(labels)}")
        probabilities = library(pictures, labels)[0].softmax(-1)
        answers = page.run(ANSWERS)
        assert [name for name, _ in answers] == list(pictures)
        for (name, rows), expected in zip(answers, probabilities.tolist(), strict=True):
            shown = {label: float(percent.removesuffix(" %")) / 100 for label, percent in rows}
            assert list(shown) == sorted(shown, key=shown.get, reverse=True), name
            assert shown == pytest.approx(dict(zip(labels, expected, strict=True)), abs=2e-4), name
        assert probabilities.max(-1).values.min() > 0.5  # so that the comparison means something

        page.run("document.querySelector('[value=search]').click()")
        write(page, "query", "a musical instrument")
        page.wait("document.getElementById('status').textContent.includes('a musical instrument')")
        cosines = dict(zip(pictures, library(pictures, ["a musical instrument"])[1][:, 0].tolist(), strict=True))
        ranked = page.run(ANSWERS)
        assert [name for name, _ in ranked] == sorted(cosines, key=cosines.get, reverse=True)
        shown = [float(rows[0][1].replace("−", "-")) for _, rows in ranked]
        assert shown == pytest.approx(sorted(cosines.values())[::-1], abs=1e-4)
        assert page.run("document.title") == "CLIP: pictures and words"
        assert page.run("document.querySelectorAll('.card img').length") == len(pictures)

        verdict, rows = self_test(page)
        assert verdict == f"Passed. All {len(rows)} steps agree with the Python library."
        assert len(rows) == 99 and rows[0] == ["image.decoded", "passed"]
        assert page.events("Log.entryAdded") == page.events("Runtime.exceptionThrown") == []
        page.run("document.getElementById('clear').click()")
        assert page.run("document.querySelectorAll('.card').length") == 0


def self_test(page) -> tuple[str, list[list[str]]]:
    """The verdict of the self-test, and each step with its result."""
    page.run("document.getElementById('test').click()")
    page.wait("document.getElementById('stages').rows.length")
    rows = "[...document.getElementById('stages').rows].map((row) => [row.cells[0].textContent, row.className])"
    return page.run("document.getElementById('verdict').textContent"), page.run(rows)


@needs_browser
def test_self_test_finds_a_fault_in_a_weight(small_folder, browser, tmp_path):
    faulty = shutil.copytree(small_folder, tmp_path / "faulty")
    file = faulty / "model" / "weights.safetensors.gz"
    weights = load(gzip.decompress(file.read_bytes()))
    weights["transformer.resblocks.0.ln_2.bias"][5] += 0.01
    file.write_bytes(gzip.compress(save(weights), 1))
    with served(small_folder) as right, served(faulty) as wrong:
        assert self_test(open_page(browser, right))[0].startswith("Passed.")
        verdict, rows = self_test(open_page(browser, wrong))
    assert verdict.startswith("Failed. The first wrong step is transformer.resblocks.0.ln_2:")
    assert ["transformer.resblocks.0.residual", "passed"] in rows and ["text_embedding", "failed"] in rows


@needs_browser
def test_files_that_are_no_pictures_and_names_as_text(small_folder, browser, tmp_path):
    """Dropped, not chosen. The control is a page that takes names for HTML."""
    drop = """{
      const data = new DataTransfer();
      data.items.add(new File(["none"], "notes <i>.txt", { type: "text/plain" }));
      data.items.add(new File(["none"], "x<i>".repeat(5), { type: "image/png" }));
      document.body.dispatchEvent(new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true }));
    }"""
    changed = shutil.copytree(small_folder, tmp_path / "changed")
    script = (changed / "page.js").read_text(encoding="utf-8")
    assert ".textContent = text;\n  return" in script
    (changed / "page.js").write_text(script.replace(".textContent = text;\n  return", ".innerHTML = text;\n  return"))
    elements = {}
    for path in (small_folder, changed):
        with served(path) as address:
            page = open_page(browser, address)
            page.run(drop)
            page.wait("document.querySelector('.unreadable')")
            assert page.run("document.getElementById('problem').textContent") == "notes <i>.txt is not a picture."
            elements[path] = page.run("document.querySelectorAll('#pictures i').length")
    assert elements == {small_folder: 0, changed: 5}


@needs_browser
@pytest.mark.parametrize("dark", [False, True])
def test_phone_keyboard_and_screen_reader(small_folder, browser, dark):
    with served(small_folder) as address:
        page = open_page(browser, address, width=375, height=700, dark=dark)
        page.run("document.getElementById('examples').click()")
        page.wait("document.getElementById('status').textContent === '8 pictures named'")
        assert page.run("document.documentElement.scrollWidth") == 375
        colour = page.run("getComputedStyle(document.body).backgroundColor")
        assert (max(map(int, re.findall(r"\d+", colour))) < 60) == dark
        nodes = page.call("Accessibility.getFullAXTree")["nodes"]
        focusable = [
            (node["role"]["value"], node["name"]["value"])
            for node in nodes
            if any(each["name"] == "focusable" for each in node.get("properties", [])) and not node["ignored"]
        ]
        assert all(name for _, name in focusable) and len(focusable) > 15
        assert ("textbox", "Labels, one in each line") in focusable and ("button", "Remove owl.webp") in focusable
        reached = []
        for _ in range(6):
            page.key("Tab", 9, "\t")
            reached.append(
                page.run("(({ id, value, textContent }) => id || value || textContent)(document.activeElement)")
            )
        assert reached == ["Skip to the pictures", "files", "examples", "name", "labels", "clear"]
        page.run("document.querySelector('[value=name]').focus()")
        page.key("ArrowRight", 39)
        page.wait(
            "document.getElementById('status').textContent.startsWith('Best of 8 pictures for “a red strawberry”')"
        )


RUNTIME = os.environ.get("ONNXRUNTIME_WEB")  # the folder of npm's package


@needs_onnx
@needs_browser
@pytest.mark.skipif(not RUNTIME, reason="needs npm's package onnxruntime-web: ONNXRUNTIME_WEB is its folder")
def test_onnx_in_the_browser(browser, tmp_path):
    """With what plain JavaScript refuses: GELU, narrow heads and another preparation of pictures."""
    settings = {"mean": (0.5, 0.4, 0.3), "std": (0.5, 0.5, 0.5), "interpolation": "bilinear", "resize_mode": "squash"}
    export_web(small("gelu", heads=2, **settings), tmp_path / "page", "small", RUNTIME)
    with served(tmp_path / "page") as address:
        page = open_page(browser, address)
        verdict, _ = self_test(page)
        assert verdict == "Passed. All 10 steps agree with the Python library."
        assert page.events("Log.entryAdded") == page.events("Runtime.exceptionThrown") == []
