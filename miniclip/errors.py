"""The base of every error that a user can mend, and the one for a package that is not installed."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType


class MiniclipError(Exception):
    """What was asked for can't be done. The message says what was got, what was expected, and what to do."""


class UsageError(MiniclipError, ValueError):
    """Arguments or options that make no sense, by themselves or together."""


class IncompleteModelError(MiniclipError, LookupError):
    """The model's files lack what is needed: its tokenizer, or how its pictures are prepared."""


class MissingExtraError(MiniclipError, ImportError):
    """A package of an optional extra is not installed; the message names the extra."""


class MiniclipWarning(UserWarning):
    """Something that the user should know about the result; the work goes on."""


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """Import a package that comes with an optional extra.

    purpose: the subject of the error's sentence, "drawing a plot". MissingExtraError if the package is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise MissingExtraError(f'{purpose} needs {module.split(".")[0]}: pip install "miniclip[{extra}]"') from error
