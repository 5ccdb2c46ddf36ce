"""examples/pictograms.py: names into captions, icons into classes, SVG into pictures. Nothing here uses the network."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
import tarfile
from pathlib import Path

import pytest
from PIL import Image

SCRIPT = Path(__file__).parents[2] / "examples" / "pictograms.py"
spec = importlib.util.spec_from_file_location("pictograms", SCRIPT)
pictograms = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pictograms)

VOCABULARY = {  # as emojilib writes it: the name, then keywords
    "🍎": ["red_apple", "fruit", "mac", "snake", "7a7a"],
    "🍏": ["green_apple", "fruit", "sour\xa0apple"],
    "🐍": ["snake", "hiss"],
    "♠️": ["spade_suit", "poker"],
    "🇯🇴": ["flag_jordan", "jordanian"],
    "🧔": ["man_beard", "whiskers"],  # an old name, which now belongs to the next
    "🧔‍♂️": ["man_beard", "whiskers"],
}
CHARACTERS = {
    "1f34e": "red-apple",
    "1f40d": "snake",
    "2660-fe0f": "spade-suit",
    "1f9d4": "person-beard",
    "1f9d4-200d-2642-fe0f": "man-beard",
    "1f44b-1f3fd": "waving-hand-medium-skin-tone",
    "e14d": "3d-printer",
}
ALIASES = {"boa": {"parent": "snake"}, "snake-to-the-left": {"parent": "snake", "hFlip": True}}


@pytest.fixture
def concepts():
    known = pictograms.Concepts(VOCABULARY)
    known.learn_set({"aliases": ALIASES}, CHARACTERS)
    known.learn_vocabulary()
    return known


@pytest.mark.parametrize(
    "name, words",
    [
        ("red-apple", "red apple"),
        ("flag-jordan", "flag of jordan"),
        ("flag-for-jordan", "flag of jordan"),
        ("flag-for-flag-jordan", "flag of jordan"),
        ("flag-in-hole", "flag in hole"),
        ("white-flag", "white flag"),
        ("flag_u_s_virgin_islands", "flag of us virgin islands"),
        ("mans-shoe", "man's shoe"),
        ("woman_s_hat", "woman's hat"),
        ("rescue-workers-helmet", "rescue worker's helmet"),
        ("three-oclock", "three o'clock"),
        ("jack_o_lantern", "jack o lantern"),
        ("1st-place-medal", "1st place medal"),
        ("Piñata", "pinata"),
    ],
)
def test_caption(name, words):
    assert pictograms.caption(name) == words


def test_character_drops_variation_selectors_and_private_code_points():
    assert pictograms.character("2660-FE0F") == pictograms.character("2660") == "♠"
    assert pictograms.character("1f1ef-1f1f4") == "🇯🇴"
    assert pictograms.character("e14d") == pictograms.character("fe82b") == ""


@pytest.mark.parametrize(
    "icons, icon, concept",
    [
        ("twemoji", "red-apple", "🍎"),
        ("twemoji", "boa", "🐍"),  # an alias
        ("twemoji", "snake-to-the-left", "snake-to-the-left"),  # a mirrored alias is another picture
        ("emojione", "flag-for-jordan", "🇯🇴"),
        ("streamline-emojis", "jordan", "🇯🇴"),
        ("streamline-emojis", "red-apple-2", "🍎"),
        ("streamline-emojis", "turkey", "🇹🇷"),  # not the bird
        ("fxemoji", "redapple", "🍎"),
        ("fxemoji", "blackspadesuit", "♠"),  # Unicode's name
        ("fxemoji", "dog", "🐶"),
        ("fxemoji", "emptynotepage", None),
        ("emojione-v1", "empty-note-page", "empty-note-page"),
        ("openmoji", "3d-printer", "3d-printer"),
    ],
)
def test_icons_of_all_sets_meet_in_one_concept(concepts, icons, icon, concept):
    assert concepts.find(icon, icons) == concept


def test_a_name_that_one_set_spells_out_explains_the_next_sets(concepts):
    assert concepts.find("emptynotepage", "fxemoji") is None
    concepts.find("empty-note-page", "emojione-v1")
    assert concepts.find("emptynotepage", "fxemoji") == "empty-note-page"


def test_titles_are_unique_and_skip_an_outdated_name(concepts):
    assert concepts.title("🍎") == "red apple"
    assert concepts.title("🧔") == "person beard"  # our vocabulary's "man beard" is the other's
    assert concepts.title("🧔\u200d♂") == "man beard"


def test_captions_drop_what_names_another_class_or_is_no_word(concepts, monkeypatch):
    titles = {"red apple", "green apple", "snake"}
    assert concepts.captions("🍎", titles) == ["red apple", "fruit", "mac"]  # not "snake", not "7a7a"
    assert concepts.captions("🍎", titles - {"snake"}) == ["red apple", "fruit", "mac", "snake"]
    assert concepts.captions("🍏", titles) == ["green apple", "fruit", "sour apple"]
    assert concepts.captions("🐍", titles) == ["snake", "boa", "hiss"]
    monkeypatch.setattr(pictograms, "COMMON", 1)
    fewer = pictograms.Concepts(VOCABULARY)
    fewer.learn_vocabulary()
    assert fewer.captions("🍎", titles) == ["red apple", "mac"]  # two apples are "fruit"


@pytest.mark.parametrize("concept, skin", [("👋🏽", True), ("mage-dark-skin-tone", True), ("👋", False)])
def test_has_skin_tone(concept, skin):
    assert pictograms.has_skin_tone(concept) is skin


SQUARE = '<path fill="#f00" d="M0 0h8v8H0z"/>'
ICONS = {"width": 8, "height": 8, "icons": {"spade-suit": {"body": SQUARE}}}


def pixels(png: bytes) -> Image.Image:
    return Image.open(io.BytesIO(png))


def test_render_fills_the_square_and_keeps_the_rest_transparent():
    pytest.importorskip("resvg_py")
    whole = pixels(pictograms.render({"body": SQUARE}, ICONS))
    assert (whole.size, whole.mode) == ((pictograms.PIXELS, pictograms.PIXELS), "RGBA")
    assert whole.getcolors() == [(pictograms.PIXELS**2, (255, 0, 0, 255))]
    wide = pixels(pictograms.render({"body": SQUARE, "width": 16}, ICONS))  # 16 x 8: half as high, centred, left half
    assert wide.getbbox() == (0, 24, 48, 72)


def test_draw_set_leaves_out_skin_tones_withdrawn_empty_and_repeated_drawings(concepts, capsys):
    pytest.importorskip("resvg_py")
    drawn = {
        "boa": {"body": SQUARE},
        "snake": {"body": SQUARE},
        "red-apple": {"body": SQUARE.replace("f00", "0f0")},
        "spade-suit": {"body": ""},
        "waving-hand-medium-skin-tone": {"body": SQUARE.replace("f00", "00f")},
        "man-beard": {"body": SQUARE.replace("f00", "ff0"), "hidden": True},
    }
    kept = pictograms.draw_set("twemoji", {**ICONS, "icons": drawn}, concepts)
    assert [(icon, concept) for icon, concept, _ in kept] == [("boa", "🐍"), ("red-apple", "🍎")]
    said = capsys.readouterr().out
    assert "2 of 5 icons; left out: 1 with a skin tone, 0 without a readable name, 2 empty or" in said


def test_fetch_uses_what_is_there_and_names_npm_when_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    there = tmp_path / "iconify-json-twemoji-1.2.5.tgz"
    there.touch()
    assert pictograms.fetch("@iconify-json/twemoji@1.2.5", tmp_path) == there
    with pytest.raises(SystemExit, match=r"npm was not found; it is needed to fetch emojilib@4\.0\.3"):
        pictograms.fetch("emojilib@4.0.3", tmp_path)


def test_render_names_the_extra_when_the_renderer_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(SystemExit, match=r"pip install 'miniclip\[pictograms\]'"):
        pictograms.render({"body": SQUARE}, ICONS)


def pack(archive: Path, files: dict[str, object]) -> None:
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, "w:gz") as tar:
        for name, content in files.items():
            data = json.dumps(content).encode()
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def test_main_writes_both_splits_and_trains_on_no_held_out_picture(tmp_path, monkeypatch, capsys):
    pytest.importorskip("resvg_py")
    packages = {"twemoji": "@i/twemoji@1", "noto": "@i/noto@1"}
    monkeypatch.setattr(pictograms, "PACKAGES", packages)
    info = {"name": "Set", "author": {"name": "A", "url": "u"}, "license": {"spdx": "MIT"}}
    for name, icons in (("twemoji", ["red-apple", "snake"]), ("noto", ["red-apple", "spade-suit"])):
        colours = {icon: {"body": SQUARE.replace("f00", f"{i}{i}f")} for i, icon in enumerate(icons)}
        files = {"icons.json": {**ICONS, "icons": colours}, "chars.json": CHARACTERS, "info.json": info}
        pack(tmp_path / "packages" / f"i-{name}-1.tgz", files)
    pack(tmp_path / "packages" / "emojilib-4.0.3.tgz", {"dist/emoji-en-US.json": VOCABULARY})
    pictograms.main(tmp_path)
    train, noto = (json.loads((tmp_path / f"{split}.json").read_text("utf-8")) for split in ("train", "noto"))
    assert train == [
        {"image": "images/twemoji/red-apple.png", "captions": ["red apple", "fruit", "mac"]},
        {"image": "images/twemoji/snake.png", "captions": ["snake", "hiss"]},
    ]
    assert [row["image"] for row in noto] == ["images/noto/red-apple.png", "images/noto/spade-suit.png"]
    assert all((tmp_path / row["image"]).exists() for row in train + noto)
    assert "2 pictures of 2 names for training; 2 held out (noto), 1 of them" in capsys.readouterr().out
    assert "| Set | @i/twemoji@1 | A, u | MIT | 2 |" in (tmp_path / "README.md").read_text("utf-8")


def test_picture_files_of_the_wanted_characters_alone(tmp_path, concepts):
    def webp(colour: str) -> bytes:
        Image.new("RGB", (8, 8), colour).save(file := io.BytesIO(), "webp", lossless=True)
        return file.getvalue()

    files = {"1f34e": "red", "1f40d": "green", "1f1ef-1f1f4": "blue", "1f3f4-e0067_e007f": "blue"}
    archive = tmp_path / "pictures.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        for name, colour in files.items():
            member = tarfile.TarInfo(f"package/assets/{name}.webp")
            member.size = len(webp(colour))
            tar.addfile(member, io.BytesIO(webp(colour)))
    icons = pictograms.read_pictures(archive, {"🍎", "🐍", "🍏"})
    assert icons["icons"].keys() == {"1f34e", "1f40d"}
    kept = pictograms.draw_set("fluent-emoji-3d", icons, concepts)
    assert [(icon, concept) for icon, concept, _ in kept] == [("1f34e", "🍎"), ("1f40d", "🐍")]
    assert pixels(kept[0][2]).getcolors() == [(pictograms.PIXELS**2, (255, 0, 0, 255))]


def test_no_noto_artwork_but_the_held_out_set():
    drawings = [package for package in pictograms.PACKAGES.values() if "noto" in package or "blob" in package]
    assert drawings == [pictograms.PACKAGES[pictograms.HELD_OUT]]
