"""The names of models, and what a wrong one was probably meant to be. Imports no PyTorch, which takes seconds."""

from __future__ import annotations

import re
from collections.abc import Collection
from contextlib import suppress
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any

from miniclip.config import is_hub_name

TABLES = ("miniclip.config", "miniclip.mobileclip.config")  # the modules that have a table MODELS


def named_models() -> dict[str, Any]:
    """The models of all tables by name. A family that can't be imported is left out."""
    models: dict[str, Any] = {}
    for module in TABLES:
        with suppress(ImportError, AttributeError):
            models |= import_module(module).MODELS
    return models


def fault(name: str, names: Collection[str]) -> str | None:
    """Why `load` can't take a name; None if it is one of `names`, a path, or may be a name on the Hub."""
    if name in names or _exists(name):
        return None
    on_hub = is_hub_name(name)
    if meant := similar(name, names, 1 if on_hub else 0.75):
        return f"{name} is neither a file or directory nor one of the models: did you mean {meant}?"
    if on_hub:
        return None
    return f"{name[:300]} is neither a file or directory nor one of the models: {', '.join(names)}"


def _exists(name: str) -> bool:
    try:
        return Path(name).expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # too long, a null byte, an unknown home
        return False


def similar(name: str, names: Collection[str], cutoff: float = 0.75) -> str | None:
    """The name that was probably meant: "ViT-B/32" for "vit-b-32", "ViT-B32" or "Vit B/23"."""
    plain = {_plain(each): each for each in names}
    found = get_close_matches(_plain(name[:100]), plain, n=1, cutoff=cutoff)
    return plain[found[0]] if found else None


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
