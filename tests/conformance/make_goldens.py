"""Write the goldens of the tiny models, and the tables beside them.

    python tests/conformance/make_goldens.py

Goldens are traces of pictures and texts, and checksums of the weights. The tables are cases.json, models.json,
html_entities.json and windows_1252.json. Run it whenever a tiny model in weights/ has changed; it takes under a minute.
Another Pillow may resample otherwise, another PyTorch sums in another order: the headers say which were used.
"""

import json
import math
import sys
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path

import make_preprocess
import numpy as np
import torch
from PIL import Image

from miniclip import load, preprocess
from miniclip.config import MODELS, CLIPConfig, to_json
from miniclip.conformance.files import save_trace, without_padding
from miniclip.conformance.mistakes import tokens
from miniclip.conformance.rules import bands, utf8
from miniclip.conformance.trace import trace
from miniclip.loading import blank_model
from miniclip.openai.stages import stages
from miniclip.tokenizer import tokenize
from miniclip.web.folder import html_entities, windows_1252
from miniclip.weights.names import LAYOUTS, TRANSPOSE

HERE = Path(__file__).parent
TINY = ("tiny-ViT", "tiny-RN")
GOLDENS, IMAGES = HERE / "goldens", HERE / "images"
DRAWINGS = HERE.parents[1] / "examples" / "images"
MOST_BYTES = 10_000_000
STAGE = ("name", "shape", "definition")  # what models.json says of a stage

# One file has all stages, of this picture and these texts; the other files have the stages of KEY.
PICTURE, TEXTS = DRAWINGS / "dog.png", ["a dog", "It's 2 CAFÉS &amp; 10 crêpes at a café!"]
KEY = ("image.*", "visual.embedded", "visual.avgpool", "visual.transformer.resblocks.?", "visual.layer4.?")
KEY += ("visual.pooled", "visual.ln_post", "visual.proj", "visual.attnpool.c_proj", "image_embedding")
KEY += ("text.utf8", "text.ids", "text.pooled", "text_projection", "text_embedding")

MORE_TEXTS = {
    "short": "cat",
    "empty": "",
    "capitals and digits": "THE 3 Cats of 1984, in 4K",
    "contractions": "I'm sure they're what you'd've seen, isn't it?",
    "entities": "&lt;b&gt;salt &amp;amp; pepper&lt;/b&gt; &#x1F600; &eacute;clair",
    "number references": "1 &#151; 2&#x20AC &#0;&#7;&#xD800;&#1114112; &COPY; &COPYSR; P&EACUTE;REZ",
    "Unicode": "日本の犬 и кошка, ñandú, naïve ﬁancée 👩‍👩‍👧‍👦",
    "white space": "  two\t\tspaces\nand\u00a0a line ",
    "special token": "a <|endoftext|> in the text",
    "unmerged": "pneumonoultramicroscopicsilicovolcanoconiosis hello!!!",
    "long": " ".join(["a very long caption of many words"] * 10),
    "truncated": " ".join(f"number {i}" for i in range(60)),
    "normal forms": "cafe\u0301 \u00bd \u2460 \u212b x\u00b2 \u3392",
    "unescaped twice": "<b> &amp;eacute; &amp;amp;lt;",
    "spaces beyond ASCII": "a\u2003b\u1680c\u205fd \u200be\u180ef g\u0085h\u2028i\x0bj",
    "long s": "it'\u017f the cat'\u017f \u017fun",
    "order of merges": "hmmmmmm zzzz ........ aaaaaaa",
    "ligatures": "fa\ufb05 \ufb06 \ufb01t",
}

# A port may guess at text that was decoded as the wrong encoding, or not, and may resize along either side first: for
# each of both a golden, which names the other as its alternative.
MOJIBAKE = {"mojibake": "CafÃ© â€œquotesâ€\x9d", "twice": "cafÃƒÂ© 50Â°"}
ALTERNATIVES = {"mojibake-repaired": "mojibake-kept", "tall-height-first": "tall-width-first"}
ALTERNATIVES |= {other: one for one, other in ALTERNATIVES.items()}
ORDERS = {"tall-height-first": (1, 0), "tall-width-first": (0, 1)}  # of the sides of Pillow's size

ONLY_PREPARED = ("odd-crop", *ORDERS)  # goldens of one model: the other one resizes and crops in the same way

# Sizes whose resize or crop goes wrong when rounded otherwise: (width, height), R.
SIZES = [((640, 480), 224), ((480, 640), 224), ((224, 224), 224), ((227, 224), 224), ((225, 224), 224)]
SIZES += [((226, 224), 224), ((641, 427), 224), ((427, 641), 224), ((1920, 1080), 224), ((1080, 1920), 336)]
SIZES += [((500, 375), 224), ((375, 500), 224), ((1, 1), 224), ((2, 3), 224), ((640, 1), 224), ((1, 640), 224)]
SIZES += [((1000, 333), 288), ((333, 1000), 288), ((4032, 3024), 336), ((3023, 4031), 336), ((57, 91), 448)]
SIZES += [((173, 100), 64), ((90, 149), 64), ((60, 2), 64), ((3, 2), 64)]


def pictures() -> dict[str, Image.Image]:
    """Cut from the drawings, or made of waves; odd in size or mode."""
    strawberry, sailboat, guitar = (Image.open(DRAWINGS / f"{x}.png") for x in ("strawberry", "sailboat", "guitar"))
    y, x = np.ogrid[:149, :90]
    alpha = Image.fromarray(((x * 5 + y * 3) % 256).astype(np.uint8))
    portrait = guitar.crop((80, 50, 170, 199)).convert("RGBA")
    portrait.putalpha(alpha)
    waves = np.fromfunction(lambda y, x, band: (x * x + 3 * y * y + 61 * band) % 256, (2, 3, 3)).astype(np.uint8)
    palette = sailboat.resize((80, 66)).quantize(16)
    palette.info["transparency"] = 3
    return {
        "landscape": strawberry.crop((40, 70, 215, 170)),  # RGB, 175 x 100 -> 112 x 64
        "portrait": portrait,  # RGBA, 90 x 149 -> 64 x 105: 20.5 is rounded to 20
        "grey": sailboat.crop((0, 0, 197, 180)).convert("L"),  # 70 x 64
        "grey-alpha": sailboat.crop((0, 0, 120, 190)).convert("LA"),
        "tiny": Image.fromarray(waves),  # 3 x 2
        "pixel": Image.new("RGB", (1, 1), (200, 30, 90)),
        "thin": guitar.crop((100, 100, 160, 102)).convert("L"),  # 60 x 2 -> 1920 x 64
        "palette": palette,
        "odd-crop": strawberry.crop((60, 80, 203, 165)),  # 143 x 85 -> 107 x 64: 107.7 is cut, 21.5 rounded to 22
        "tall": guitar.crop((150, 40, 250, 300)),  # 100 x 260 -> 64 x 166, where the order of the passes counts
    }


def write_traces(name: str, folder: Path) -> None:
    model, _ = load(name, device="cpu", dtype=torch.float32)
    folder.mkdir(parents=True, exist_ok=True)
    save(trace(model, preprocess.open_image(PICTURE), TEXTS), folder / "all.safetensors", model, name, ("*",))
    for case in pictures().keys() - {"tall", *(ONLY_PREPARED if name != "tiny-ViT" else ())}:
        image = preprocess.open_image(IMAGES / f"{case}.png")
        save(trace(model, image), folder / f"{case}.safetensors", model, name)
    for case, order in ORDERS.items() if name == "tiny-ViT" else ():
        save(trace_of_tall(model, order), folder / f"{case}.safetensors", model, name)
    save(trace_of_texts(model, list(MORE_TEXTS.values())), folder / "texts.safetensors", model, name)
    for case in ("mojibake-repaired", "mojibake-kept"):
        traced = trace_of_texts(model, list(MOJIBAKE.values()), repaired=case == "mojibake-repaired")
        save(traced, folder / f"{case}.safetensors", model, name)
    (folder / "weights.json").write_text(as_json({"weights": checksums(model.state_dict())}))


def trace_of_tall(model, order: tuple[int, int]) -> dict:
    """The picture `tall`, resized along one side and then along the other, whatever this Pillow would do itself."""
    image = preprocess.open_image(IMAGES / "tall.png")
    size = model.config.preprocess.image_size
    resized, new_size = image, preprocess.resize(image, size, "bicubic", "shortest").size
    for side in order:
        between = tuple(new_size[i] if i == side else resized.size[i] for i in (0, 1))
        resized = resized.resize(between, Image.Resampling.BICUBIC)
    traced = trace(model, resized)  # which is not resized again
    return traced | {"image.decoded": bands(image)}


def trace_of_texts(model, texts: list[str], repaired: bool = True) -> dict:
    """repaired: whether ftfy guesses at mojibake."""
    steps = {} if repaired else tokens.STEPS["no guess at mojibake"]
    ids = torch.tensor([tokens.ids_of(text, model.context_length, **steps) for text in texts], dtype=torch.int32)
    return {"text.utf8": utf8(texts), **trace(model, text=ids)}


def save(traced: dict, path: Path, model, name: str, patterns: tuple[str, ...] = KEY) -> None:
    stages = without_padding(traced).items()
    kept = {x: stage for x, stage in stages if any(fnmatchcase(x, y) for y in patterns)}
    alternative = ALTERNATIVES.get(path.stem)
    save_trace(kept, path, model, name, f"{alternative}.safetensors" if alternative else None)


def checksums(weights: dict) -> dict:
    """Of each tensor the shape, the exact sum rounded to float64, and the first, middle and last value."""
    rows = {}
    for name, tensor in weights.items():
        if not name.endswith("num_batches_tracked"):
            values = tensor.double().flatten().tolist()
            picked = [values[i] for i in (0, len(values) // 2, -1)]
            rows[name] = {"shape": list(tensor.shape), "sum": math.fsum(values), "values": picked}
    return rows


def cases() -> dict:
    """Strings and their ids; sizes, and what resize and crop make of them; the pictures of preprocess.safetensors."""
    texts = [{"case": case, "text": text, "ids": ids_of(text)} for case, text in (MORE_TEXTS | MOJIBAKE).items()]
    texts += [{"case": "golden", "text": text, "ids": ids_of(text)} for text in TEXTS]
    return {"texts": texts, "sizes": [size_case(*case) for case in SIZES], "preprocess": preprocess_cases()}


def preprocess_cases() -> list[dict]:
    return [
        {"case": name, "mode": mode, "size": [width, height], **asdict(config)}
        for name, (mode, width, height, config) in make_preprocess.CASES.items()
    ]


def ids_of(text: str) -> list[int]:
    """With start and end, cut to 77, without padding (of these texts none has a token 0, "!" within a word)."""
    row = tokenize(text, truncate=True)[0]
    return row[row != 0].tolist()


def size_case(size: tuple[int, int], image_size: int) -> dict:
    """Width and height before and after; the box that is cut out: left, top, right, bottom."""
    resized = preprocess.resize(Image.new("1", size), image_size, "bicubic", "shortest").size
    rows, columns = np.ogrid[: resized[1], : resized[0]]
    top, left = (
        int(np.array(preprocess.center_crop(Image.fromarray(place.astype(np.int32)), image_size))[0, 0])
        for place in (rows + 0 * columns, columns + 0 * rows)
    )
    box = [left, top, left + image_size, top + image_size]
    return {"size": list(size), "image_size": image_size, "resized": list(resized), "crop": box}


def models() -> dict:
    """The config of every model; tensors and stages of some; the tables of names in other formats."""
    configs = {name: model.config for name, model in MODELS.items()}
    described = {name: configs[name] for name in (*TINY, "ViT-B/32", "RN50")}
    return {
        "configs": {name: to_json(config) for name, config in configs.items()},
        "tensors": {name: tensors_of(config) for name, config in described.items()},
        "stages": {name: [dict(zip(STAGE, stage, strict=False)) for stage in stages(configs[name])] for name in TINY},
        "layouts": {name: [names_of(row) for row in rows] for name, rows in LAYOUTS.items() if name != "openai"},
    }


def tensors_of(config: CLIPConfig) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in blank_model(config, torch.float32).state_dict().items()}


def names_of(row) -> dict:
    """In names # is a number, * is weight or bias, ** any rest. Several foreign tensors are put together by rows."""
    return {"openai": row.canonical, "foreign": list(row.foreign), "transposed": row.transform is TRANSPOSE}


def as_json(table: dict) -> str:
    """One entry of an entry a line."""
    lines = []
    for name, entries in table.items():
        items = entries.items() if isinstance(entries, dict) else [(None, entry) for entry in entries]
        rows = [(f"{json.dumps(key)}: " if key is not None else "") + json.dumps(entry) for key, entry in items]
        brackets = "{}" if isinstance(entries, dict) else "[]"
        lines.append(f"{json.dumps(name)}: {brackets[0]}\n  " + ",\n  ".join(rows) + f"\n {brackets[1]}")
    return "{\n " + ",\n ".join(lines) + "\n}\n"


TABLES = {"cases.json": cases, "models.json": models}
TABLES |= {"html_entities.json": html_entities, "windows_1252.json": windows_1252}

if __name__ == "__main__":
    torch.set_num_threads(1)
    IMAGES.mkdir(exist_ok=True)
    for case, image in pictures().items():
        image.save(IMAGES / f"{case}.png")
    for name in TINY:
        write_traces(name, GOLDENS / name)
    for name, table in TABLES.items():
        (HERE / name).write_text(as_json(table()))
    size = sum(path.stat().st_size for folder in (GOLDENS, IMAGES) for path in folder.rglob("*.*"))
    print(f"{size:,} bytes of goldens and pictures")
    if size > MOST_BYTES:
        sys.exit(f"that is more than {MOST_BYTES:,}: leave stages out")
