"""miniclip.data.batches: lists of pictures, the order of batches, pixels, and the choice of captions."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from miniclip.data import batches as data
from miniclip.data.batches import Epochs, Pictures, batch_order, choose_captions
from miniclip.data.lists import DataError, Example, existing, read_examples
from miniclip.data.seeds import generator
from miniclip.preprocess import ImageError


def write_pictures(folder, count):
    """`count` pictures, the n-th of the grey level n."""
    for number in range(count):
        Image.new("RGB", (10, 12), (number,) * 3).save(folder / f"{number}.png")
    return [Example(folder / f"{number}.png", (f"grey {number}", "a keyword")) for number in range(count)]


ROWS = [{"image": "a.png", "caption": "a red circle"}, {"image": "b/c.png", "captions": ["a dog", "snow"]}]
SUFFIXES = {
    ".json": json.dumps(ROWS),
    ".jsonl": "\n".join(json.dumps(row) for row in ROWS) + "\n\n",
    ".csv": 'image,caption\na.png,a red circle\nb/c.png,"a dog"\nb/c.png,snow\n',
}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_all_three_kinds_of_list_say_the_same(tmp_path, suffix):
    path = tmp_path / f"list{suffix}"
    path.write_text(SUFFIXES[suffix])
    expected = [Example(tmp_path / "a.png", ("a red circle",)), Example(tmp_path / "b/c.png", ("a dog", "snow"))]
    assert read_examples(path) == expected


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("x.json", '[{"image": "a.png"}]', 'row 1: .* expected "image"'),
        ("x.json", '[{"image": "a.png", "caption": "a"}, {"image": "a.png", "captions": []}]', "row 2"),
        ("x.json", '[{"image": "a.png", "captions": [1]}]', "row 1"),
        ("x.json", '[{"image": 3, "caption": "a"}]', "row 1"),
        ("x.json", '{"image": "a.png", "caption": "a"}', "row 1: .*expected a list of objects"),
        ("x.json", "[", "x.json is not JSON: Expecting"),
        ("x.json", "[]", "lists no pictures"),
        ("x.csv", "file,caption\na.png,a\n", "line 2"),
        ("x.txt", "a.png a", "ends in .json, .jsonl, .csv"),
    ],
)
def test_a_bad_list_is_refused(tmp_path, name, text, complaint):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=complaint):
        read_examples(tmp_path / name)


def test_missing_pictures_are_told_apart(tmp_path):
    examples = [*write_pictures(tmp_path, 2), Example(tmp_path / "none.png", ("nothing",))]
    found, missing = existing(examples)
    assert found == examples[:2]
    assert missing == [f"{tmp_path / 'none.png'}: no such file"]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from("abcdefghijkl"), min_size=4, max_size=60), st.integers(2, 4), st.integers(0, 5))
def test_batches_are_full_and_hold_no_picture_twice(names, batch_size, epoch):
    batches = batch_order(names, batch_size, seed=1, epoch=epoch)
    assert len(batches) == len(names) // batch_size
    assert {len(batch) for batch in batches} == {batch_size}
    indices = [index for batch in batches for index in batch]
    assert len(set(indices)) == len(indices)
    assert set(indices) <= set(range(len(names)))


def test_a_name_comes_once_in_a_batch_but_for_the_last_few():
    names = [str(number) for number in range(300) for _ in range(5)]

    def repetitions(batches):
        return sum(len(batch) - len({names[index] for index in batch}) for batch in batches)

    assert repetitions(batch_order(names, 50, seed=0, epoch=0)) < 20
    plain = torch.randperm(len(names), generator=generator(0, "order", 0)).split(50)
    assert repetitions(batch.tolist() for batch in plain) > 80  # negative control: a mere shuffle


def test_the_order_depends_on_seed_and_epoch_and_nothing_else():
    names = [str(number) for number in range(50)]
    order = batch_order(names, 10, seed=3, epoch=2)
    assert order == batch_order(names, 10, seed=3, epoch=2)
    assert order != batch_order(names, 10, seed=3, epoch=3)
    assert order != batch_order(names, 10, seed=4, epoch=2)


def first_pixels(batches):
    return [batch.pixels[:, 0, 0, 0].tolist() for batch in batches]


def test_epochs_go_on_anywhere_and_are_shared_out_to_ranks(tmp_path):
    pictures = Pictures(write_pictures(tmp_path, 11), 8)
    whole = first_pixels(Epochs(pictures, 4, seed=5, workers=0).batches(0, 7))
    assert [len(batch) for batch in whole] == [4] * 7
    assert first_pixels(Epochs(pictures, 4, seed=5, workers=0).batches(3, 7)) == whole[3:]
    ranks = [first_pixels(Epochs(pictures, 4, 5, 0, rank, 2).batches(0, 7)) for rank in (0, 1)]
    assert [sorted(a + b) for a, b in zip(*ranks, strict=True)] == [sorted(batch) for batch in whole]


def test_workers_load_the_same(tmp_path):
    pictures = Pictures(write_pictures(tmp_path, 8), 8)
    assert first_pixels(pictures.batches([[0, 5], [7, 2]], workers=1)) == [[0, 5], [7, 2]]


def test_too_few_pictures_for_a_batch(tmp_path):
    with pytest.raises(ValueError, match="3 pictures do not fill a batch of 4"):
        Epochs(Pictures(write_pictures(tmp_path, 3), 8), 4, seed=0, workers=0)


@pytest.mark.parametrize("cache_bytes", [0, 2**20])
def test_a_broken_picture_is_replaced_and_told(tmp_path, monkeypatch, cache_bytes):
    monkeypatch.setattr(data, "CACHE_BYTES", cache_bytes)
    examples = write_pictures(tmp_path, 4)
    (tmp_path / "1.png").write_bytes(b"no picture")
    (tmp_path / "2.png").write_bytes((tmp_path / "2.png").read_bytes()[:50])
    pictures = Pictures(examples, 8)
    for _ in range(2):  # the second time some come from memory
        (batch,) = pictures.batches([[0, 1]], workers=0)
        assert batch.pixels[:, 0, 0, 0].tolist() == [0, 3]
        assert batch.captions == [("grey 0", "a keyword"), ("grey 3", "a keyword")]
        assert ["1.png" in batch.problems[0], "2.png" in batch.problems[1], len(batch.problems)] == [True, True, 2]


def test_nothing_but_broken_pictures_is_an_error(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"none of the 1 pictures can be read; the first: .*a\.png"):
        Pictures([Example(tmp_path / "a.png", ("a",))], 8)[0]


def test_pixels_keep_opacity_and_proportion():
    image = Image.new("RGBA", (40, 20), (255, 0, 0, 255))
    image.paste((0, 0, 255, 0), (0, 0, 15, 20))  # transparent on the left; the middle 20 columns are cut out
    pixels = data.to_rgba(image, 10)
    assert pixels.shape == (4, 10, 10)
    assert pixels[3, 5].tolist()[0] == 0
    assert pixels[:, 5, 9].tolist() == [255, 0, 0, 255]


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "LA"])
def test_pixels_of_any_mode(mode):
    pixels = data.to_rgba(Image.new(mode, (9, 9)), 6)
    assert pixels.shape == (4, 6, 6)
    assert pixels.dtype == torch.uint8
    assert pixels.is_contiguous()


@pytest.mark.parametrize("transparency", [300, -1, b"", b"\0" * 300, (1, 2, 3), "x", None])
@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "I;16"])
def test_transparency_that_makes_no_sense_is_ignored(mode, transparency):
    image = Image.new(mode, (9, 9), 1)
    expected = data.to_rgba(image, 6)
    image.info["transparency"] = transparency
    pixels = data.to_rgba(image, 6)
    assert pixels.shape == (4, 6, 6)
    if transparency in ("x", None):  # Pillow makes something of the others in some modes
        assert torch.equal(pixels, expected)


@pytest.mark.parametrize("palette", ["RGB", "RGBA", "LA", "CMYK", "RGBX", "BGR"])
def test_palettes_of_any_mode(palette):
    image = Image.new("P", (9, 9), 3)
    image.putpalette(bytes(range(48)) * 4, palette)
    assert data.to_rgba(image, 6).shape == (4, 6, 6)


def test_a_picture_that_has_no_rgb_is_a_broken_one():
    with pytest.raises(ImageError, match="mode La can't become RGB"):
        data.to_rgba(Image.new("La", (9, 9)), 6)


def test_captions_are_drawn_and_names_win_over_repetitions():
    captions = [("apple", "fruit", "red"), ("pear", "fruit", "green"), ("banana", "fruit", "apple")]
    drawn = [choose_captions(captions, ["{}", "a {}"], 0.0, generator(seed, "test")) for seed in range(200)]
    words = Counter(text for texts in drawn for text in texts)
    assert {"apple", "a apple", "red", "green", "fruit", "a fruit", "banana"} <= set(words)
    for texts in drawn:
        plain = [text.removeprefix("a ") for text in texts]
        assert len(set(plain)) == 3  # "fruit" once at most, "apple" only for the apple
        assert plain[2] != "apple"
    assert drawn[0] == choose_captions(captions, ["{}", "a {}"], 0.0, generator(0, "test"))


def test_first_captions_share():
    captions = [(str(number), f"keyword of {number}") for number in range(1000)]
    chosen = choose_captions(captions, ["{}"], 0.6, generator(1, "test"))
    share = np.mean([not text.startswith("keyword") for text in chosen])
    assert 0.75 < share < 0.85  # 0.6, and half of the rest
    assert choose_captions(captions, ["{}"], 1.0, generator(1, "test")) == [names[0] for names in captions]
