"""The folder of the page: what is copied, what is computed from the model, and model.json, which lists it."""

from __future__ import annotations

import gzip
import html.entities
import json
import shutil
import zipfile
from dataclasses import asdict
from html import unescape
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from miniclip.config import ResNetConfig, ViTConfig
from miniclip.conformance.files import without_padding
from miniclip.conformance.measure import tolerance_of
from miniclip.conformance.trace import trace
from miniclip.data import sample
from miniclip.export import ExportError, export_model
from miniclip.images import open_image
from miniclip.io import new_folder, save_tensors, write_json
from miniclip.models import CLIP
from miniclip.save import config_metadata
from miniclip.tokenizer import MERGE_FILE

HERE = Path(__file__).parent
PAGE = ("*.html", "*.css", "*.js", "*.svg", "*.txt")
PORT = next(  # installed, or in a checkout
    folder for folder in (HERE.parent / "port_js", HERE.parents[1] / "examples" / "port_js") if folder.is_dir()
)
RUNTIME = ("package.json", "dist/ort.wasm.bundle.min.mjs", "dist/ort-wasm-simd-threaded.wasm")
INSTALL = "run `npm install onnxruntime-web` and give --onnxruntime-web node_modules/onnxruntime-web"
MOST_WEIGHTS = 50_000_000  # for plain JavaScript, which takes up to a second a picture with the 14 million of tiny-RN
HEAD_WIDTH = 64  # in the plain port
FAMILIES = ("clip", "mobileclip")  # whose tokenizer and scores are those of the page
VOCABULARY = 49408  # of the page's tokenizer

EXAMPLES = ("mammal/elephant", "bird/owl", "bird/penguin", "sea_animal/octopus", "dish/pizza", "fruit/strawberry")
EXAMPLES += ("land_vehicle/bicycle", "musical_instrument/guitar")
BORDER = 18  # columns of transparency on each side of the self-test's picture, which the crop cuts off again
TEXTS = ["a cat", "It's 2 CAFÉS &amp; 10 crêpes at a café!"]
MORE_TEXTS = [
    "",
    "THE 3 Cats of 1984, in 4K",
    "I'm sure they're what you'd've seen, isn't it?",
    "&lt;b&gt;salt &amp;amp; pepper&lt;/b&gt; &#x1F600; &#151; &notit; &EACUTE;",
    "日本の犬 и кошка, ñandú, naïve ﬁancée 👩‍👩‍👧‍👦",
    "  two\t\tspaces\nand\u00a0a line, <|endoftext|> in the text",
    "pneumonoultramicroscopicsilicovolcanoconiosis " + "a very long caption " * 8,
]
ENDS = ("image.", "image_embedding", "text.ids", "text.utf8", "text_embedding", "logits_per_image")


def export_web(model: CLIP, folder: str | Path, name: str = "", onnxruntime_web: str | Path | None = None) -> None:
    """Write a page that names and searches pictures with this model, to `folder`, which appears when it is complete.

    model            in eval mode on the CPU, float32 or, as ONNX, float16
    name             what the page calls the model
    onnxruntime_web  the folder of npm's package of that name, from which the folder gets the runtime of an ONNX model;
                     without it the plain JavaScript of examples/port_js computes the model, which must be small

    Raises ExportError for a model that the page can't compute and for another folder than onnxruntime-web's,
    WriteError if `folder` is not empty or can't be written, and those of `export_model`.
    """
    check_runtime(onnxruntime_web)
    _check_model(model, onnxruntime_web is None)
    with new_folder(folder) as new:
        for source in (HERE, PORT):
            for file in (file for pattern in PAGE for file in source.glob(pattern)):
                shutil.copyfile(file, new / file.name)
        _write_vocabulary(new / "vocabulary")
        if onnxruntime_web is None:
            _write_weights(model, new / "model")
        else:
            export_model(model, new / "model", name=name)
            _copy_runtime(Path(onnxruntime_web), new / "onnxruntime-web")
        needed = [*new.glob("vocabulary/*"), *new.glob("model/*.gz"), *new.glob("model/*.onnx"), *new.rglob("*.wasm")]
        description = {
            "model": name,
            "runtime": "plain" if onnxruntime_web is None else "onnx",
            "files": {file.relative_to(new).as_posix(): file.stat().st_size for file in sorted(needed)},
            "preprocess": asdict(model.config.preprocess),
            "context_length": model.context_length,
            "logit_scale": model.logit_scale.exp().item(),
            "examples": _write_examples(new / "examples"),
            "self_test": _write_self_test(model, new / "self-test", every_stage=onnxruntime_web is None),
        }
        write_json(new / "model.json", description)


def check_runtime(folder: str | Path | None) -> None:
    """ExportError for another folder than that of npm's package onnxruntime-web."""
    missing = [] if folder is None else [file for file in RUNTIME if not (Path(folder) / file).is_file()]
    if missing:
        raise ExportError(f"{folder} has no {', '.join(missing)}; expected the package onnxruntime-web: {INSTALL}")


def _check_model(model: CLIP, plain: bool) -> None:
    config = model.config
    vocabulary = getattr(config.text, "vocab_size", None)
    if config.family not in FAMILIES:
        raise ExportError(f"the page can't compute models of the family {config.family}; it can {', '.join(FAMILIES)}")
    if vocabulary != VOCABULARY:
        raise ExportError(f"the model's vocabulary has {vocabulary} tokens; the page's tokenizer has {VOCABULARY}")
    if not plain:
        return
    weights = sum(parameter.numel() for parameter in model.parameters())
    if weights > MOST_WEIGHTS:
        reason = f"it has {weights / 1e6:.0f} million weights; expected at most {MOST_WEIGHTS / 1e6:.0f} million"
    elif model.dtype != torch.float32:
        reason = f"its dtype is {model.dtype}; expected float32"
    elif config.family != "clip" or not isinstance(config.vision, (ViTConfig, ResNetConfig)):
        reason = "its architecture is not OpenAI's"
    elif config.activations != {"quick_gelu"}:
        reason = f"its activation is {', '.join(sorted(config.activations))}; expected quick_gelu"
    elif any(width != HEAD_WIDTH * heads for width, heads in _widths_and_heads(model)):
        reason = f"its heads are not {HEAD_WIDTH} wide"
    else:
        return
    raise ExportError(f"plain JavaScript can't compute this model: {reason}. To export it as ONNX, {INSTALL}")


def _widths_and_heads(model: CLIP) -> list[tuple[int, int]]:
    text, vision = model.config.text.transformer, model.config.vision
    if isinstance(vision, ResNetConfig):
        return [(text.width, text.heads), (32 * vision.width, vision.heads)]
    return [(text.width, text.heads), (vision.transformer.width, vision.transformer.heads)]


def html_entities() -> dict:
    """HTML5's names, most with a semicolon, and their characters; then the names in capitals that only ftfy knows."""
    names = html.entities.html5
    capitals = {x.upper(): y.upper() for x, y in names.items() if x.endswith(";") and x.islower()}
    return {"html5": names, "capitals": {x: y for x, y in capitals.items() if unescape(f"&{x}") == f"&{x}"}}


def windows_1252() -> dict:
    """The bytes 128 to 159 that are characters in Windows-1252."""
    characters = {byte: bytes([byte]).decode("windows-1252", errors="ignore") for byte in range(0x80, 0xA0)}
    return {"windows_1252": {str(byte): character for byte, character in characters.items() if character}}


def _write_vocabulary(folder: Path) -> None:
    folder.mkdir()
    shutil.copyfile(MERGE_FILE, folder / MERGE_FILE.name)
    for table in (html_entities, windows_1252):
        (folder / f"{table.__name__}.json").write_text(json.dumps(table()))


def _write_weights(model: CLIP, folder: Path) -> None:
    folder.mkdir()
    weights = {name: _halves(x) for name, x in model.state_dict().items() if not name.endswith("num_batches_tracked")}
    _save_compressed(weights, folder / "weights.safetensors", config_metadata(model.config))


def _halves(x: Tensor) -> Tensor:
    """float16 if that holds the same values."""
    half = x.half()
    return half if half.float().equal(x) else x


def _save_compressed(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> str:
    """Write PATH.gz, and return its name."""
    save_tensors(tensors, path, metadata)
    compressed = path.with_name(f"{path.name}.gz")
    compressed.write_bytes(gzip.compress(path.read_bytes(), mtime=0))
    path.unlink()
    return compressed.name


def _copy_runtime(source: Path, folder: Path) -> None:
    folder.mkdir()
    for file in RUNTIME:
        shutil.copyfile(source / file, folder / Path(file).name.replace(".mjs", ".js"))  # some servers don't know .mjs


def _write_examples(folder: Path) -> list[str]:
    folder.mkdir()
    with zipfile.ZipFile(sample.FILE) as files:
        for name in EXAMPLES:
            (folder / f"{Path(name).name}.webp").write_bytes(files.read(f"{name}.webp"))
    return [f"{folder.name}/{Path(name).name}.webp" for name in EXAMPLES]


def _write_self_test(model: CLIP, folder: Path, every_stage: bool) -> list[dict]:
    """Write goldens, and return for each its file, its picture, and its stages in order with their limits."""
    folder.mkdir()
    _picture().save(folder / "picture.png")
    goldens = {"all": trace(model, open_image(folder / "picture.png"), TEXTS), "texts": trace(model, text=MORE_TEXTS)}
    described = []
    for name, stages in goldens.items():
        if model.transformer.causal:
            stages = without_padding(stages)
        if name == "texts" or not every_stage:
            stages = {stage: x for stage, x in stages.items() if stage.startswith(ENDS)}
        file = _save_compressed(stages, folder / f"{name}.safetensors")
        limits = [[stage, *tolerance_of(stage, model.dtype)] for stage in stages if stage != "text.utf8"]
        picture = f"{folder.name}/picture.png" if "image.decoded" in stages else None
        described.append({"golden": f"{folder.name}/{file}", "picture": picture, "stages": limits})
    return described


def _picture() -> Image.Image:
    """A drawing with transparency on both sides: resizing it multiplies by alpha."""
    with zipfile.ZipFile(sample.FILE) as files:
        drawing = open_image(files.read(f"{EXAMPLES[0]}.webp")).convert("RGBA")
    picture = Image.new("RGBA", (drawing.width + 2 * BORDER, drawing.height))
    picture.paste(drawing, (BORDER, 0))
    return picture
