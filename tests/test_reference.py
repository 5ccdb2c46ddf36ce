"""miniclip/API.md says what the code says. `python tests/test_reference.py` writes it anew."""

import inspect
from pathlib import Path

import pytest

import miniclip
from miniclip.commands import COMMANDS

PAGE = Path(miniclip.__file__).with_name("API.md")
HEAD = """# The public names of miniclip

What `from miniclip import ...` offers, with its docstrings, and the commands. `python tests/test_reference.py` writes
this page, and a test compares it with the code. [`EQUIVALENTS.md`](EQUIVALENTS.md) has
the equivalents in openai/CLIP, open_clip, transformers and sentence-transformers.
"""


def reference() -> str:
    parts = [HEAD]
    for name in miniclip.__all__:
        thing = getattr(miniclip, name)
        parts.append(_section(f"## {name}", name, thing))
        if inspect.isclass(thing):
            for method, function in inspect.getmembers(thing, inspect.isfunction):
                own = function.__module__.startswith("miniclip") and not method.startswith("_")
                if own and function.__doc__:
                    parts.append(_section(f"### {name}.{method}", method, function))
    rows = [f"| `miniclip {name}` | {text} |" for name, text in COMMANDS.items()]
    table = "\n".join(["| command | what it does |", "| --- | --- |", *rows])
    end = "\n`miniclip COMMAND --help` shows the options and two examples.\n"
    return "\n".join([*parts, "## Commands\n", table, end])


def _section(heading: str, name: str, thing: object) -> str:
    kind = "class" if inspect.isclass(thing) else "def"
    code = f"{kind} {name}{_signature(thing)}"
    return f"{heading}\n\n```python\n{code}\n```\n\n```text\n{inspect.getdoc(thing)}\n```\n"


class _Unquoted(str):
    __repr__ = str.__str__


def _signature(thing: object) -> str:
    """With annotations as the source has them, without the quotes of strings, and a long one in several lines."""
    signature = inspect.signature(thing)
    parameters = [p.replace(annotation=_Unquoted(p.annotation)) if p.annotation is not p.empty else p
                  for p in signature.parameters.values() if p.name != "self"]  # fmt: skip
    result = signature.return_annotation
    returns = {} if result in (None, signature.empty) else {"return_annotation": _Unquoted(result)}
    text = str(inspect.Signature(parameters, **returns))
    if len(text) < 100:
        return text
    *_, end = text.rpartition(")")
    lines = [str(inspect.Signature([p]))[1:-1] for p in parameters if p.kind is not p.KEYWORD_ONLY]
    only = [str(inspect.Signature([p]))[4:-1] for p in parameters if p.kind is p.KEYWORD_ONLY]
    return "".join(["(\n", *(f"    {line},\n" for line in [*lines, *(["*"] if only else []), *only]), ")", end])


def test_the_page_says_what_the_code_says():
    assert PAGE.read_text(encoding="utf-8") == reference(), "run python tests/test_reference.py"


def test_a_changed_docstring_is_seen(monkeypatch):
    monkeypatch.setattr(miniclip.tokenize, "__doc__", "something else")
    with pytest.raises(AssertionError, match="run python"):
        test_the_page_says_what_the_code_says()


def test_every_name_is_explained():
    for name in miniclip.__all__:
        assert len(inspect.getdoc(getattr(miniclip, name)) or "") > 40, name


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
