"""One row of the catalogue."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from miniclip.conformance.forward import Rule


class Mistake(NamedTuple):
    """What a port does wrong, and the rules that do it."""

    name: str
    planted: dict[str, Rule]  # by the keys of rules.RULES: how each of these stages comes out
    right: Callable | ModuleType  # the function, class or module of ours that does it right
    line: str  # what is written in the line there that matters

    def place(self) -> tuple[str, str]:
        """Where our code does it right: "miniclip/ops.py:21", and that line."""
        return place_of(self.right, self.line)


def place_of(right: Callable | ModuleType, part: str) -> tuple[str, str]:
    """The file and number of the first line of `right` that has `part` in it, and that line."""
    lines, first = inspect.getsourcelines(right)
    first = max(first, 1)  # 0 of a module
    offset = next((i for i, line in enumerate(lines) if part in line), 0)
    file = Path(inspect.getsourcefile(inspect.unwrap(right)))
    return f"{file.parent.relative_to(_root(file)) / file.name}:{first + offset}", lines[offset].strip()


def _root(file: Path) -> Path:
    return next(folder for folder in file.parents if folder.name == "miniclip").parent
