"""The body of a request -> checked texts and pictures. What is wrong with it is said in a `RequestError`."""

from __future__ import annotations

import base64
import json
import re
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from PIL import Image

from miniclip.errors import MiniclipError
from miniclip.images import ImageError, open_image

DATA_URL = re.compile(r"data:([^,\s]*),", re.IGNORECASE)
PICTURE = 'expected a data URL: "data:image/png;base64,..."'


@dataclass(frozen=True)
class Limits:
    """What clients may use."""

    body: int = 16 << 20  # bytes of a request's body
    inputs: int = 256  # texts or pictures in a request
    letters: int = 2000  # in a text; 77 tokens rarely have 600
    prompts: int = 4096  # labels times templates
    seconds: float = 30.0  # for a client to send a request, or to take the answer
    clients: int = 64  # connections at a time, each with a thread
    waiting: int = 32  # requests that wait for the model


class RequestError(MiniclipError, ValueError):
    """A request that can't be answered. status: of HTTP."""

    def __init__(self, message: str, status: int = 400):
        super().__init__(message)
        self.status = status


def parse(body: bytes, expected: Sequence[str]) -> dict:
    """The JSON object, which has no other fields than `expected`."""
    try:
        found = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is not JSON in UTF-8 ({error!s:.200}); expected {_example(expected)}") from None
    if not isinstance(found, dict):
        raise RequestError(f"the body is a JSON {type(found).__name__}; expected an object: {_example(expected)}")
    if unknown := sorted(found.keys() - set(expected)):
        raise RequestError(f"the body has {unknown[0]!r:.60}; expected only {', '.join(expected)}")
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _example(expected: Sequence[str]) -> str:
    return "{" + ", ".join(f'"{name}": ...' for name in expected) + "}"


def strings(request: dict, field: str, most: int) -> list[str]:
    """The field's value, a string or a list of at most `most` strings, as a list."""
    value = request.get(field)
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(each, str) for each in values):
        ids = "; token ids are not taken, send the text" if isinstance(values, list) and values else ""
        raise RequestError(f"{field} is {reprlib.repr(value)}; expected a string or a list of strings{ids}")
    if not 0 < len(values) <= most:
        raise RequestError(f"{field} has {len(values)} elements; expected 1 to {most}: send several requests")
    return values


def choice(request: dict, field: str, choices: Sequence[object]) -> object:
    """The field's value, by default the first of the choices."""
    value = request.get(field, choices[0])
    if isinstance(value, bool) or value not in choices:
        raise RequestError(f"{field} is {reprlib.repr(value)}; expected {' or '.join(map(repr, choices))}")
    return value


def is_data_url(text: str) -> bool:
    return DATA_URL.match(text) is not None


def picture(url: str, name: str) -> Image.Image:
    """The picture in a data URL. Its content decides on the format, whatever the URL says. name: for messages."""
    head = DATA_URL.match(url)
    if head is None:
        raise RequestError(f"{name} is {reprlib.repr(url)}; {PICTURE} (paths and other URLs are not opened)")
    if not head[1].lower().endswith(";base64"):
        raise RequestError(f"{name} is a data URL of {head[1]!r:.60}; {PICTURE}")
    try:
        return open_image(base64.b64decode(url[head.end() :], validate=True))
    except ImageError as error:
        raise RequestError(f"{name}: {error}") from None
    except ValueError as error:
        raise RequestError(f"{name} is not base64 ({error}); {PICTURE}") from None
