"""miniclip/EQUIVALENTS.md: both sides of every line give the same, where the other package is installed."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import miniclip
from miniclip import load, open_image
from miniclip.save import save_checkpoint

PAGE = Path(miniclip.__file__).with_name("EQUIVALENTS.md")
PICTURE = Path(__file__).parents[1] / "examples" / "images" / "dog.png"
MODULES = {"openai/CLIP": "clip", "sentence-transformers": "sentence_transformers"}
# With what the tests put in place of the models that the page names: tiny-ViT, in each project's own format.
TINY = {
    '"ViT-B-32-quickgelu", pretrained="openai"': '"tiny", pretrained={file!r}',
    '"ViT-B-32-quickgelu"': '"tiny"',
    '"ViT-B/32"': "{file!r}",
    '"openai/clip-vit-base-patch32"': "{directory!r}",
    '"clip-ViT-B-32"': "{sentences!r}",
}
ROUNDING = 1e-5


def tables() -> dict[str, list[tuple[str, str]]]:
    """The lines of the page by project: its code, and miniclip's."""
    sections = re.split(r"^## (.+)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    line = re.compile(r"^\| `(.+?)` \| (?:`(.+?)`)? ?\|$", re.MULTILINE)
    return {name: line.findall(text) for name, text in zip(sections[1::2], sections[2::2], strict=True)}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> dict[str, str]:
    """tiny-ViT in float32, in the formats that the projects read."""
    folder = tmp_path_factory.mktemp("tiny")
    model, _ = load("tiny-ViT", device="cpu")
    for name in ("tiny.pt", "directory"):
        save_checkpoint(model.config, model.state_dict(), folder / name)
    return {"file": str(folder / "tiny.pt"), "directory": str(folder / "directory"), "sentences": str(folder / "words")}


def prepare_open_clip(tiny: dict[str, str]) -> None:
    import open_clip

    config = load(tiny["file"], device="cpu")[0].config
    text, vision = config.text.transformer, config.vision
    image = {"image_size": vision.image_size, "patch_size": vision.patch_size, "head_width": 64}
    image |= {"width": vision.transformer.width, "layers": vision.transformer.layers}
    words = {"width": text.width, "layers": text.layers, "heads": text.heads}
    file = Path(tiny["directory"]).with_name("tiny.json")
    towers = {"vision_cfg": image, "text_cfg": words}
    file.write_text(json.dumps({"embed_dim": config.embed_dim, "quick_gelu": True, **towers}))
    open_clip.add_model_config(file)


def prepare_sentences(tiny: dict[str, str]) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import CLIPModel

    SentenceTransformer(modules=[CLIPModel(tiny["directory"])], device="cpu").save(tiny["sentences"])


PREPARE = {"open_clip": prepare_open_clip, "sentence-transformers": prepare_sentences}


def run(code: str, names: dict) -> object:
    """Run a line: its value, or the tensors that it assigns, by name."""
    *first, last = ast.parse(code or "None").body
    exec(compile(ast.Module(first, []), code, "exec"), names)
    if isinstance(last, ast.Expr):
        return eval(compile(ast.Expression(last.value), code, "eval"), names)
    exec(compile(ast.Module([last], []), code, "exec"), names)
    targets = [node.id for node in ast.walk(last) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
    return {name: names[name] for name in targets if isinstance(names[name], (Tensor, np.ndarray))}


def check_same(theirs: object, mine: object) -> bool:
    """Whether there was anything to compare. An AssertionError unless it is the same up to ROUNDING."""
    if theirs is None or mine is None:
        return False
    if isinstance(theirs, nn.Module):
        theirs, mine = ([(name, list(x.shape)) for name, x in each.state_dict().items()] for each in (theirs, mine))
        assert sorted(theirs) == sorted(mine)
    elif isinstance(theirs, (Tensor, np.ndarray)):
        theirs, mine = torch.as_tensor(theirs), torch.as_tensor(mine)
        torch.testing.assert_close(mine.float(), theirs.float(), atol=ROUNDING, rtol=ROUNDING)
    elif isinstance(theirs, Mapping):
        return sum(check_same(theirs[name], mine[name]) for name in theirs.keys() & mine.keys()) > 0
    elif isinstance(theirs, Sequence) and not isinstance(theirs, str):
        assert len(theirs) == len(mine)
        return sum(check_same(one, other) for one, other in zip(theirs, mine, strict=True)) > 0
    else:
        assert theirs == (pytest.approx(mine, abs=ROUNDING) if isinstance(theirs, float) else mine)
    return True


def check_lines(lines: list[tuple[str, str]], tiny: dict[str, str]) -> int:
    """How many lines of a table had something to compare. An AssertionError for one that is not the same."""
    x = torch.randn(2, 77, 192, generator=torch.Generator().manual_seed(0))
    given = {"picture": open_image(PICTURE).convert("RGB"), "texts": ["a dog", "a guitar"], "x": x, "torch": torch}
    theirs, mine = dict(given), dict(given)
    compared = 0
    for line in lines:
        left, right = line
        for code, other in TINY.items():
            left, right = (side.replace(code, other.format_map(tiny)) for side in (left, right))
        with torch.no_grad():
            results = run(left, theirs), run(right, mine)
        try:
            compared += check_same(*results)
        except AssertionError as error:
            raise AssertionError(f"{line[0]} | {line[1]}: {error}") from None
    return compared


@pytest.mark.parametrize("name", tables())
@pytest.mark.filterwarnings("ignore")  # the other projects' own
def test_both_sides_give_the_same(name, tiny):
    package = MODULES.get(name, name)
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    PREPARE.get(name, lambda tiny: None)(tiny)
    lines = tables()[name]
    assert check_lines(lines, tiny) >= {"openai/CLIP": 15, "open_clip": 6, "transformers": 6}.get(name, 4)
    change = {"encode_text(tokens": "encode_text(tokens.flip(0)", "(model, texts)": "(model, texts[::-1])"}
    wrong = [(left, next((right.replace(*each) for each in change.items() if each[0] in right), right))
             for left, right in lines]  # fmt: skip
    with pytest.raises(AssertionError, match=r"texts|tokens"):
        check_lines(wrong, tiny)


def test_our_side_of_every_line_runs(tiny):
    """Where the other packages are not installed too."""
    for lines in tables().values():
        assert len(lines) >= 7
        check_lines([(right, right) for _, right in lines], tiny)


def test_every_line_of_the_page_is_read():
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    assert sum(map(len, tables().values())) == len(rows) > 40
