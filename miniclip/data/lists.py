"""Lists of pictures with captions.

A list is a JSON list or JSONL of objects, or a CSV with a header, of an image's path, relative to the file, and its
caption or captions, the first of them its name; a "category", one for many names, may be there too:

    [{"image": "image_001.jpg", "caption": "a red circle on white background"},
     {"image": "image_002.jpg", "captions": ["a dog in the snow", "winter in the park"]}]
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from miniclip.errors import MiniclipError


class DataError(MiniclipError, ValueError):
    """A data set, a list of classes or a template that can't be used; the message says what to do."""


@dataclass(frozen=True)
class Example:
    """A picture and what it shows. Where captions are names and keywords, the name comes first.

    image: a file, or a picture in memory, which then has a source ("cifar10 test 17") to call it by
    category: the kind of thing that it shows, one for many names, where the data set says so
    """

    image: Path | Image.Image
    captions: tuple[str, ...]
    category: str | None = None
    source: str = ""

    @property
    def title(self) -> str:
        return self.source or str(self.image)


def read_examples(path: Path) -> list[Example]:
    """Read a .json, .jsonl or .csv list. An image that is listed several times has all those captions.

    Raises ValueError for what is no such list, naming the row; FileNotFoundError if there is none.
    """
    captions: dict[Path, list[str]] = {}
    categories: dict[Path, str | None] = {}
    for number, row in _rows(path):
        image, texts, category = row.get("image"), row.get("captions", row.get("caption")), row.get("category") or None
        texts = [texts] if isinstance(texts, str) else texts
        has_texts = isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts)
        if not (has_texts and isinstance(image, str) and isinstance(category, str | None)):
            raise ValueError(
                f'{path}, row {number}: got {str(row)[:200]}; expected "image", a path, and "caption" or "captions"'
            )
        captions.setdefault(path.parent / image, []).extend(texts)
        categories.setdefault(path.parent / image, category)
    if not captions:
        raise ValueError(f"{path} lists no pictures")
    return [Example(image, tuple(dict.fromkeys(texts)), categories[image]) for image, texts in captions.items()]


def _rows(path: Path) -> Iterator[tuple[int, dict]]:
    """The rows of a list file, numbered from 1."""
    with path.open(encoding="utf-8", newline="") as file:
        try:
            if path.suffix == ".csv":
                rows = list(csv.DictReader(file))
            elif path.suffix == ".jsonl":
                rows = [json.loads(line) for line in file if line.strip()]
            elif path.suffix == ".json":
                rows = json.load(file)
            else:
                raise ValueError(f"{path} is no list of pictures; expected .json, .jsonl or .csv")
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: {error}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} holds no list of objects")
    yield from enumerate(rows, start=1)


def existing(examples: list[Example]) -> tuple[list[Example], list[str]]:
    """The examples whose image file is there, and a line about each of the others."""
    found = [example for example in examples if example.image.is_file()]
    there = set(found)
    return found, [f"{example.image}: no such file" for example in examples if example not in there]
