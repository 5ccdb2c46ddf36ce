"""Strict reading of JSON configs: each field is checked, and each error names the file and the field."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from miniclip.config import MAX_INTEGER
from miniclip.weights.errors import CheckpointError

MAX_BYTES = 1 << 24  # of a config file; real ones have some thousand


class Fields:
    """A JSON object. A method returns the named field, or `default` if there is none, or raises CheckpointError."""

    def __init__(self, path: Path, values: dict[str, Any], prefix: str = ""):
        self.path, self.values, self.prefix = path, values, prefix

    @classmethod
    def read(cls, path: Path) -> Fields:
        try:
            if path.stat().st_size > MAX_BYTES:
                raise CheckpointError(f"{path} has {path.stat().st_size} bytes; expected a JSON config, a few thousand")
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} can't be read as a JSON config: {error}") from None
        if not isinstance(values, dict):
            raise CheckpointError(f"{path} holds a JSON {type(values).__name__}; expected an object")
        return cls(path, values)

    def fault(self, key: str, expected: str) -> CheckpointError:
        got = f"is {self.values[key]!r:.200}" if key in self.values else "is missing"
        return CheckpointError(f"{self.path}: {self.prefix}{key} {got}; expected {expected}")

    def section(self, key: str, default: dict | None = None) -> Fields:
        """An object inside this one."""
        values = self.values.get(key, default)
        if not isinstance(values, dict):
            raise self.fault(key, "an object")
        return Fields(self.path, values, f"{self.prefix}{key}.")

    def integer(self, key: str, default: int | None = None, most: int = MAX_INTEGER) -> int:
        """A size or a count."""
        value = self.values.get(key, default)
        if type(value) is not int or not 1 <= value <= most:
            raise self.fault(key, f"an integer from 1 to {most}")
        return value

    def divisor(self, key: str, default: int, whole: int) -> int:
        value = self.integer(key, default)
        if whole % value:
            raise self.fault(key, f"a divisor of {whole}")
        return value

    def number(self, key: str, default: float) -> float:
        value = self.values.get(key, default)
        if type(value) not in (int, float) or not 0 < value <= MAX_INTEGER:
            raise self.fault(key, "a positive number")
        return value

    def rgb(self, key: str, default: tuple[float, float, float]) -> tuple[float, float, float]:
        """Three numbers, for red, green and blue."""
        value = self.values.get(key, default)
        numbers = value if isinstance(value, list | tuple) else ()
        if len(numbers) != 3 or not all(type(x) in (int, float) and abs(x) < 256 for x in numbers):
            raise self.fault(key, "three numbers")
        return tuple(map(float, numbers))

    def one_of(self, key: str, valid: Collection, default: Any = None) -> Any:
        value = self.values.get(key, default)
        if not any(value == v and type(value) is type(v) for v in valid):
            raise self.fault(key, " or ".join(map(repr, valid)))
        return value
