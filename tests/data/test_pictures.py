"""miniclip.data.pictures: which files of a folder are pictures."""

from __future__ import annotations

import io
import os
import time
from pathlib import Path

import pytest
from PIL import Image

from miniclip.data import pictures
from miniclip.data.datasets import read_dataset
from miniclip.data.pictures import BEGINNING, scan

# Every format that is read, as Pillow calls it, with the names that its files have.
FORMATS = {
    "JPEG": (".jpg", ".JPEG", ".jpe", ".jfif"),
    "PNG": (".png",),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pnm"),
    "JPEG2000": (".jp2", ".j2k"),
    "AVIF": (".avif",),
}


def encoded(name: str) -> bytes:
    stream = io.BytesIO()
    try:
        Image.new("RGB", (3, 2), "red").save(stream, name)
    except (KeyError, OSError):
        pytest.skip(f"this Pillow writes no {name}")
    return stream.getvalue()


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"nothing")


def names(found: pictures.Scan, folder: Path) -> list[str]:
    return [os.path.relpath(path, folder) for path in found.pictures]


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_known_by_its_name_and_by_its_content(tmp_path, name):
    data = encoded(name)
    expected = [f"a{suffix}" for suffix in FORMATS[name]] + ([] if name == "TIFF" else ["b", "c.dat"])
    for file in (*expected, "b", "c.dat"):
        (tmp_path / file).write_bytes(data)
    assert sorted(names(scan([tmp_path]), tmp_path)) == sorted(expected)


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b"BM", b"BMW makes cars, and this is a text about them", b"P6", b"P3rsonal notes", b"II*\0raw"),
        *(b"%!PS-Adobe-3.0 EPSF", b"8BPS\0\1", b"\0\0\0\x20ftypisom", b"RIFF\0\0\0\0WAVEfmt ", b"<svg xmlns="),
    ],
)
def test_other_content_is_no_picture(tmp_path, data):
    assert not BEGINNING.match(data)
    (tmp_path / "a").write_bytes(data)
    found = scan([tmp_path])
    assert not found.pictures
    assert found.left_out == {pictures.OTHER: 1}
    assert found.summary() == "left out: 1 files that are not pictures"


CLUTTER = ("._a.jpg", ".hidden.png", ".Trashes/501/b.jpg", "@eaDir/c.jpg", ".thumbnails/d.png", "sub/@EADIR/e.jpg")


def test_what_systems_add_stays_out_unless_asked_for(tmp_path):
    touch(tmp_path, "a.jpg", "sub/b.png", "Thumbs.db", *CLUTTER)
    found = scan([tmp_path])
    assert names(found, tmp_path) == ["a.jpg", "sub/b.png"]
    assert found.left_out == {pictures.HIDDEN_REASON: len(CLUTTER), pictures.OTHER: 1}
    with_hidden = scan([tmp_path], hidden=True)
    assert sorted(names(with_hidden, tmp_path)) == sorted(["a.jpg", "sub/b.png", *CLUTTER])
    assert with_hidden.left_out == {pictures.OTHER: 1}  # Thumbs.db, which no option makes a picture
    assert names(scan([tmp_path / ".thumbnails", tmp_path / "._a.jpg"]), tmp_path) == [".thumbnails/d.png", "._a.jpg"]


@pytest.mark.parametrize("order", [("", "2024"), ("2024", ""), ("2024/a.jpg", "", "2024", ""), ("./2024/..", "2024")])
def test_each_picture_comes_once_whatever_the_order(tmp_path, order):
    touch(tmp_path, "2024/a.jpg", "2024/deep/b.jpg", "c.jpg")
    found = scan([f"{tmp_path}/{part}" for part in order])
    assert sorted(os.path.realpath(path) for path in found.pictures) == sorted(
        str(tmp_path / name) for name in ("2024/a.jpg", "2024/deep/b.jpg", "c.jpg")
    )


def test_links_to_folders_are_followed_once_and_loops_end(tmp_path):
    touch(tmp_path, "photos/a.jpg", "photos/sub/b.jpg", "elsewhere/c.jpg")
    (tmp_path / "photos/loop").symlink_to(tmp_path / "photos")
    (tmp_path / "photos/sub/up").symlink_to(tmp_path / "photos", target_is_directory=True)
    (tmp_path / "photos/one").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "photos/two").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "photos/itself.jpg").symlink_to("itself.jpg")
    (tmp_path / "photos/z.jpg").symlink_to(tmp_path / "photos/a.jpg")  # a link to a file is a file
    found = scan([tmp_path / "photos"])
    assert names(found, tmp_path / "photos") == ["a.jpg", "z.jpg", "sub/b.jpg", "one/c.jpg"]
    assert found.left_out == {pictures.VISITED: 3}
    assert list(found.faults) == [f"{tmp_path}/photos/itself.jpg"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_pipes_and_devices_are_never_opened(tmp_path):
    os.mkfifo(tmp_path / "a.jpg")
    os.mkfifo(tmp_path / "b")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    started = time.monotonic()
    found = scan([tmp_path, tmp_path / "a.jpg"])
    assert time.monotonic() - started < 5
    assert not found.pictures
    assert found.left_out == {pictures.IRREGULAR: 3}
    assert list(found.faults.values()) == [f"can't read {tmp_path}/a.jpg: it is not a regular file"]


def test_what_can_not_be_read_is_said(tmp_path):
    touch(tmp_path, "closed/a.jpg", "b.jpg")
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere")
    (tmp_path / "closed").chmod(0)
    try:
        readable = os.access(tmp_path / "closed", os.R_OK)
        found = scan([tmp_path, tmp_path / "missing.jpg"])
    finally:
        (tmp_path / "closed").chmod(0o700)
    expected = {"gone.jpg", "missing.jpg"} | (set() if readable else {"closed"})
    assert {os.path.basename(path) for path in found.faults} == expected
    assert "missing.jpg: No such file" in found.faults[f"{tmp_path}/missing.jpg"]
    assert f"{tmp_path}/b.jpg" in found.pictures


def test_names_that_are_not_utf8_and_home_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    name = os.fsdecode(b"caf\xe9.jpg")
    (tmp_path / name).write_bytes(b"abc")
    (found,) = scan(["~"]).pictures.items()
    assert found[0] == f"{tmp_path}/{name}"
    assert found[1] == (3, (tmp_path / name).stat().st_mtime_ns)


def test_evaluate_takes_hidden_pictures_when_asked(tmp_path):
    for name in ("red/a.png", "red/.b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), "red").save(tmp_path / name)
    assert len(read_dataset(tmp_path)) == 1
    assert len(read_dataset(tmp_path, hidden=True)) == 2
