"""Lists of pictures with captions.

A list is a JSON list or JSONL of objects, or a CSV with a header. Each row has an image's path, relative to the file,
and its caption or captions, the first of them its name; it may have a "category", one for many names, and further
columns, by which an evaluation can group the pictures:

    [{"image": "image_001.jpg", "caption": "a red circle on white background"},
     {"image": "image_002.jpg", "captions": ["a dog in the snow", "winter in the park"], "camera": "old"}]
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from miniclip.data.text import DataError, read_csv, read_json, read_jsonl

__all__ = ["DataError", "Example", "captions_of", "existing", "read_examples"]

OWN = ("image", "caption", "captions", "category")  # columns with a meaning of their own


@dataclass(frozen=True)
class Example:
    """A picture and what it shows. If the captions are names and keywords, the name comes first.

    image: a file, or a picture in memory, which then has a `source` ("cifar10 test 17") to name it in messages
    category: the kind of thing that it shows, one for many names, if the data set has it
    columns: the further columns of its row in a list, as text
    """

    image: Path | Image.Image
    captions: tuple[str, ...]
    category: str | None = None
    source: str = ""
    columns: Mapping[str, str] = field(default_factory=dict, compare=False)

    def column(self, name: str) -> str | None:
        """The value of a column, "category" among them; None if there is none."""
        return self.category if name == "category" and self.category else self.columns.get(name)

    @property
    def title(self) -> str:
        return self.source or str(self.image)


def read_examples(path: str | Path, root: Path | None = None) -> list[Example]:
    """Read a .json, .jsonl or .csv list. An image that is listed several times has all those captions.

    root: the folder that the images' paths start from, by default that of the list. DataError for a file that is not
    such a list, with the line or row that is wrong.
    """
    path = Path(path).expanduser()
    root = root or path.parent
    captions: dict[Path, list[str]] = {}
    categories: dict[Path, str | None] = {}
    columns: dict[Path, dict[str, str]] = {}
    for place, row in _rows(path):
        image, texts, category = row.get("image"), captions_of(row), row.get("category") or None
        if not (texts and isinstance(image, str) and image and isinstance(category, str | None)):
            raise DataError(
                f'{path}, {place}: got {row!s:.200}; expected "image", a path, and "caption" or "captions", none empty'
            )
        captions.setdefault(root / image, []).extend(texts)
        categories.setdefault(root / image, category)
        further = {key: str(value) for key, value in row.items() if key not in OWN and value not in (None, "")}
        columns.setdefault(root / image, {}).update(further)
    if not captions:
        raise DataError(f"{path} lists no pictures")
    return [
        Example(image, tuple(dict.fromkeys(texts)), categories[image], columns=columns[image])
        for image, texts in captions.items()
    ]


def _rows(path: Path) -> Iterator[tuple[str, dict]]:
    """The rows of a list file, each with its place."""
    readers = {".json": _read_json_list, ".jsonl": read_jsonl, ".csv": read_csv}
    if path.suffix not in readers:
        raise DataError(f"{path} is not a list of pictures; expected a name that ends in {', '.join(readers)}")
    unit = "row" if path.suffix == ".json" else "line"
    for number, row in readers[path.suffix](path):
        if not isinstance(row, dict):
            expected = 'objects like {"image": "a.jpg", "caption": "a dog"}'
            raise DataError(f"{path}, {unit} {number}: got {row!s:.200}; expected a list of {expected}")
        yield f"{unit} {number}", row


def _read_json_list(path: Path) -> Iterator[tuple[int, object]]:
    values = read_json(path)
    return enumerate(values if isinstance(values, list) else [str(values)], start=1)


def captions_of(fields: dict) -> tuple[str, ...]:
    """What an object has as "captions", a list, or as "caption"; empty unless all are texts that are not blank."""
    texts = fields.get("captions", fields.get("caption"))
    texts = [texts] if isinstance(texts, str) else texts
    usable = isinstance(texts, list) and all(isinstance(text, str) and text.strip() for text in texts)
    return tuple(texts) if usable else ()


def existing(examples: list[Example]) -> tuple[list[Example], list[str]]:
    """The examples whose image file is there, and a line about each of the others."""
    found = [example for example in examples if example.image.is_file()]
    there = set(found)
    return found, [f"{example.image}: no such file" for example in examples if example not in there]
