"""What commands print: any file name and any text, on any terminal; and how errors and interruptions end a command."""

import io
import json
import os
import sys

import pytest
from PIL import Image
from safetensors import SafetensorError

from miniclip.commands import main, models, output

ESCAPE = "\x1b[31mred\x1b[0m\u202e.png"


@pytest.fixture
def folder(tmp_path):
    """Pictures whose names a terminal would obey, that are not ASCII, and that are not UTF-8."""
    for name in (ESCAPE, "naïve 猫.png", os.fsdecode(b"caf\xe9.png"), "two\nlines.png"):
        Image.new("RGB", (8, 8), "red").save(tmp_path / name)
    return tmp_path


@pytest.mark.skipif(os.name == "nt", reason="there file names are Unicode")
@pytest.mark.parametrize("encoding", ["utf-8", "cp1252", "ascii"])
def test_any_name_on_any_terminal(folder, encoding, monkeypatch):
    pictures = sorted(str(file) for file in folder.iterdir())
    command = ["classify", *pictures, str(folder / "\x1b[2Jgone.png"), "--labels", "猫,red", "--model", "tiny-ViT"]
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding, write_through=True))
    status, printed, said = main(command), sys.stdout.buffer.getvalue(), sys.stderr.buffer.getvalue()
    assert status == 1, said
    assert b"\x1b" not in printed + said and b"Traceback" not in said
    lines = printed.decode(encoding).splitlines()
    assert len(lines) == 3 * len(pictures)
    assert sum("\\x1b[31mred\\x1b[0m\\u202e.png" in line for line in lines) == 1
    assert sum("caf\\udce9.png" in line for line in lines) == 1
    assert sum("two\\nlines.png" in line for line in lines) == 1
    assert "\\x1b[2Jgone.png" in said.decode(encoding)


def test_without_escapes_the_terminal_would_obey(folder, monkeypatch, capsys):
    """The control of the test above."""
    monkeypatch.setattr("miniclip.answers.printable", str)
    monkeypatch.setattr(output, "printable", str)
    assert main(["classify", str(folder / ESCAPE), "--labels", "a,b", "--model", "tiny-ViT"]) == 0
    assert "\x1b" in capsys.readouterr().out


@pytest.mark.skipif(os.name == "nt", reason="there file names are Unicode")
def test_json_holds_names_exactly(folder, capsys):
    pictures = sorted(str(file) for file in folder.iterdir())
    assert main(["classify", *pictures, "--labels", "a,b", "--model", "tiny-ViT", "--json"]) == 0
    printed = capsys.readouterr().out
    assert printed.isascii()
    assert [result["image"] for result in json.loads(printed)] == pictures


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (KeyboardInterrupt(), 130, "miniclip: interrupted\n"),
        (PermissionError(13, "Permission denied", "/x/y"), 2, "miniclip: error: /x/y: Permission denied\n"),
        (OSError("no space"), 2, "miniclip: error: no space\n"),
        (SafetensorError("bad header"), 2, "bad header"),
        (RuntimeError("not enough memory: you tried to allocate 9 bytes\nstack"), 2, "not enough memory"),
    ],
)
def test_how_a_command_ends(error, status, message, monkeypatch, capsys):
    def fail():
        raise error

    monkeypatch.setattr(models, "_names", fail)
    assert main(["models"]) == status
    printed = capsys.readouterr().err
    assert message in printed and "stack" not in printed and len(printed.splitlines()) == 1


@pytest.mark.parametrize("error", [TypeError("a fault of the code"), NotImplementedError("the same")])
def test_faults_of_the_code_are_not_hidden(error, monkeypatch):
    def fail():
        raise error

    monkeypatch.setattr(models, "_names", fail)
    with pytest.raises(type(error)):
        main(["models"])


def test_output_that_nobody_reads(monkeypatch, capfd):
    """The reader has closed the pipe, as `head` does."""
    monkeypatch.setattr(models, "_names", lambda: ["tiny-ViT"])
    monkeypatch.setattr(models, "_hub_rows", list)
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as output:
        monkeypatch.setattr(sys, "stdout", output)
        assert main(["models", "--json"]) == 1
        print("what Python flushes when it exits")
    assert capfd.readouterr().err == ""
