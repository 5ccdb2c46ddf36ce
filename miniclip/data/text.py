"""Text files as people have them: UTF-8, with or without a byte order mark."""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

from miniclip.errors import MiniclipError
from miniclip.io import open_regular


class DataError(MiniclipError, ValueError):
    """A data set, a list of classes or a template that can't be used; the message says what to do."""


def read_text(path: str | Path) -> str:
    """The content of a text file, its lines ended by \\n. DataError if it can't be read or is not UTF-8."""
    path = Path(path).expanduser()
    try:
        with open_regular(path) as file:
            data = file.read()
    except OSError as error:
        raise DataError(f"can't read {path}: {error.strerror or error}") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        found = data[error.start : error.start + 8]
        raise DataError(f"{path}, line {line}: {found!r} is not UTF-8; save the file with the encoding UTF-8") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_lines(path: str | Path) -> list[str]:
    """The lines of a text file, without surrounding white space; DataError as of `read_text`.

    Empty lines are among them, so that the index of a line plus one is its number.
    """
    return [line.strip() for line in read_text(path).removesuffix("\n").split("\n")]


def read_json(path: str | Path) -> object:
    """The value in a JSON file. DataError as of `read_text`, and for what is not JSON, with its line."""
    return _parse_json(read_text(path), path)


def read_jsonl(path: str | Path) -> Iterator[tuple[int, object]]:
    """The values in a JSONL file, one a line, each with the number of its line. DataError as of `read_json`."""
    for number, line in enumerate(read_lines(path), start=1):
        if line:
            yield number, _parse_json(line, f"{path}, line {number}")


def read_csv(path: str | Path) -> Iterator[tuple[int, dict[str, str]]]:
    """The rows of a CSV file with a header, each with the number of the line where it begins; missing values are "".

    DataError as of `read_text`, and for quotes that are not closed, and a row with more values than the header.
    """
    reader = csv.reader(io.StringIO(read_text(path)), strict=True)
    header: list[str] = []
    line = 1
    try:
        for values in reader:
            if len(values) > len(header) > 0:
                raise DataError(
                    f"{path}, line {line}: got {len(values)} values; expected {len(header)}, as many as the header has "
                    "names: put quotes around values that contain commas"
                )
            if values and header:
                yield line, dict(itertools.zip_longest(header, values, fillvalue=""))
            header = header or [name.strip() for name in values]
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{path}, the row that begins at line {line}: {error}; a value that begins with a quote must end with one, "
            "and quotes within it are doubled"
        ) from None


def _parse_json(text: str, where: object) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where} is not JSON: {error}") from None
    except RecursionError:
        raise DataError(f"{where} is not a list of pictures: its JSON is nested too deeply") from None
