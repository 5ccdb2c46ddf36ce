"""Everything that commands print: file names and texts may hold any character, also those that a terminal obeys."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

from miniclip.errors import MiniclipWarning
from miniclip.io import printable


def survive_any_character() -> None:
    """From now on a character that the terminal's encoding lacks is written as an escape, not an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def show_warnings() -> None:
    """From now on print warnings of miniclip's own as messages, without the place in the code."""
    others = warnings.showwarning

    def show(message, category, *where):
        complain(f"note: {message}") if issubclass(category, MiniclipWarning) else others(message, category, *where)

    warnings.showwarning = show


def show(text: str) -> None:
    """Print lines of text."""
    print(_safe(text))


def show_json(value: object) -> None:
    print(json.dumps(value, indent=2))


def show_csv(header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(map(printable, header))
    writer.writerows(rows)


def complain(text: str) -> None:
    """Print a message to standard error."""
    print(f"miniclip: {_safe(text)}", file=sys.stderr)


def report_rejected(faults: Sequence[str], total: int) -> int:
    """Say which inputs could not be used, after the others are done. Returns the exit status."""
    for fault in faults:
        complain(printable(fault))
    if faults:
        complain(f"{len(faults)} of {total} inputs could not be used")
    return 1 if faults else 0


def shown(path: str | Path) -> str:
    """A path as a person would write it: relative, if it lies in the current directory."""
    relative = os.path.relpath(path)
    return printable(str(path) if relative.startswith(os.pardir) else relative)


def _safe(text: str) -> str:
    return "\n".join(map(printable, text.split("\n")))
