"""miniclip.data.text and what reads with it: encodings, quotes, empty captions."""

from __future__ import annotations

import json
import os

import pytest

from miniclip.data.datasets import read_classes
from miniclip.data.lists import DataError, Example, read_examples
from miniclip.data.text import read_csv, read_lines, read_text

ROW = {"image": "a.png", "caption": "a café"}
LISTS = {
    "x.json": json.dumps([ROW], ensure_ascii=False),
    "x.jsonl": json.dumps(ROW, ensure_ascii=False) + "\n",
    "x.csv": "image,caption\na.png,a café\n",
}


@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_a_list_may_have_a_byte_order_mark_and_any_line_ends(tmp_path, name, mark, end):
    (tmp_path / name).write_bytes(mark + LISTS[name].encode().replace(b"\n", end))
    assert read_examples(tmp_path / name) == [Example(tmp_path / "a.png", ("a café",))]


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_class_names_may_have_a_byte_order_mark(tmp_path, mark):
    (tmp_path / "c.txt").write_bytes(mark + "dog\r\n\r\n café \r\n".encode())
    assert read_classes(tmp_path / "c.txt") == ["dog", "café"]


def test_lines_keep_their_numbers_and_what_is_in_them(tmp_path):
    (tmp_path / "t").write_text("one\n\n two\u2028three \x0cfour\n")
    assert read_lines(tmp_path / "t") == ["one", "", "two\u2028three \x0cfour"]
    (tmp_path / "t").write_text("")
    assert read_lines(tmp_path / "t") == [""]


@pytest.mark.parametrize("name", [*LISTS, "x.txt"])
@pytest.mark.parametrize("encoding", ["latin1", "cp1252", "utf-16"])
def test_other_encodings_are_refused_with_the_line(tmp_path, name, encoding):
    text = "image,caption\nb.png,b\na.png,a café\n"
    (tmp_path / name).write_bytes(text.encode(encoding))
    line = 1 if encoding == "utf-16" else 3
    with pytest.raises(DataError, match=rf"{name}, line {line}: b'.* is not UTF-8; save the file with the encoding"):
        read_classes(tmp_path / name) if name == "x.txt" else read_examples(tmp_path / name)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('image,caption\nb.png,b\na.png,"a dog\nc.png,c\n', "the row that begins at line 3: unexpected end of data"),
        ('image,caption\na.png,"a" dog\n', "the row that begins at line 2: .* expected after"),
        ("image,caption\nb.png,b\na.png,a dog, in the snow\n", "line 3: got 3 values; expected 2"),
        ("image,caption\na.png," + "x" * 200_000 + "\n", "line 2: field larger than field limit"),
        ("image,caption\na.png,\n", "line 2: got .* none empty"),
        ("image,caption\na.png\n", "line 2: got .* none empty"),
        ("", "lists no pictures"),
    ],
)
def test_csv_that_would_be_read_wrongly_is_refused(tmp_path, text, complaint):
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(DataError, match=complaint):
        read_examples(tmp_path / "x.csv")


def test_csv_takes_quotes_commas_and_line_breaks(tmp_path):
    text = 'image,caption,note\na.png,"a ""good"" dog,\nin the snow",\n\nb.png,5" screen\n'
    (tmp_path / "x.csv").write_text(text)
    expected = [(2, 'a "good" dog,\nin the snow'), (5, '5" screen')]
    assert [(line, row["caption"]) for line, row in read_csv(tmp_path / "x.csv")] == expected


@pytest.mark.parametrize("caption", ["NaN", '""', '" \\n"', "null", '["a", ""]', "[NaN]", "[]"])
@pytest.mark.parametrize("name", ["x.json", "x.jsonl"])
def test_nan_and_empty_captions_are_refused(tmp_path, caption, name):
    key = "captions" if caption.startswith("[") else "caption"
    row = f'{{"image": "a.png", "{key}": {caption}}}'
    (tmp_path / name).write_text(f"[{row}]" if name == "x.json" else row)
    with pytest.raises(DataError, match=r"1: got .* none empty"):
        read_examples(tmp_path / name)


@pytest.mark.parametrize("text", ["[" * 100_000, '[{"image": "a.png", "caption": "\\ud800', "\0" * 50])
def test_what_is_not_json_is_a_message(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(DataError, match=r"x\.json"):
        read_examples(tmp_path / "x.json")


def test_what_is_no_file_is_a_message(tmp_path):
    with pytest.raises(DataError, match="No such file"):
        read_text(tmp_path / "none")
    with pytest.raises(DataError, match="it is a folder"):
        read_text(tmp_path)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.txt")
        with pytest.raises(DataError, match="not a regular file"):  # and does not wait
            read_text(tmp_path / "pipe.txt")
