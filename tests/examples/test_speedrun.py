"""The speedrun, on drawings so few and small that it takes a second: what it trains on, and what it writes."""

import importlib.util
import json
from pathlib import Path

import pytest
from PIL import Image

from miniclip.io import write_json

EXAMPLES = Path(__file__).parents[2] / "examples"
COLOURS = ("red", "green", "blue", "black")


@pytest.fixture
def speedrun(tmp_path, monkeypatch):
    """The script, with data of three styles: sixteen drawings of twemoji, four each of fxemoji and Noto."""
    monkeypatch.syspath_prepend(EXAMPLES)
    spec = importlib.util.spec_from_file_location("speedrun", EXAMPLES / "speedrun.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "RECIPE", module.RECIPE | {"steps": 2, "batch_size": 4, "precision": "fp32"})
    rows = {"train": [], "noto": []}
    for style, copies in (("twemoji", 4), ("fxemoji", 1), ("noto", 1)):
        for colour in COLOURS:
            for i in range(copies):
                path = tmp_path / "pictograms" / "images" / style / f"{colour}{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGBA", (40, 40), colour).save(path)
                row = {"image": str(path.relative_to(tmp_path / "pictograms")), "captions": [colour]}
                rows["noto" if style == "noto" else "train"].append(row)
    rows["noto"][0]["captions"] = ["a name that nothing else has"]
    for name, listed in rows.items():
        write_json(tmp_path / "pictograms" / f"{name}.json", listed)
    return module


def styles(path: Path) -> set[str]:
    return {row["image"].split("/")[1] for row in json.loads(path.read_text())}


def test_a_run_and_its_line(speedrun, tmp_path, capsys):
    for seed in (0, 1):
        speedrun.main(tmp_path, "noto", seed)
    assert (tmp_path / "noto-1" / "last.safetensors").exists()
    assert "The target of 40% was " in capsys.readouterr().out
    heading, dashes, *lines = (tmp_path / "runs.md").read_text().splitlines()
    assert heading.startswith("| date |") and set(dashes) <= set("|- ") and len(lines) == 2
    assert [line.split("|")[4].strip() for line in lines] == ["0", "1"] and "| noto |" in lines[0]


def test_the_style_to_test_on_is_not_trained_on(speedrun, tmp_path):
    train, test, names = speedrun.split(tmp_path / "pictograms", "fxemoji")
    assert styles(train) == {"twemoji"} and styles(test) == {"fxemoji"} and names == sorted(COLOURS)
    train, test, names = speedrun.split(tmp_path / "pictograms", "noto")
    assert styles(train) == {"twemoji", "fxemoji"} and styles(test) == {"noto"} and names == sorted(COLOURS[1:])
