"""Pictures with the names or captions that belong to them: from a list, or from folders of pictures."""

from __future__ import annotations

from pathlib import Path

from miniclip.evaluation.zero_shot import EvaluationError
from miniclip.training.data import Example, read_examples


def read_dataset(path: Path) -> list[Example]:
    """Read a data set; of an example's captions the first is the name of its class.

    path: a .json, .jsonl or .csv list (see `miniclip.training.data`), or a folder of one folder a class, as
    torchvision's ImageFolder reads them, the class named as its folder with spaces for underscores. There every file
    below is taken for a picture, but for hidden ones. EvaluationError for anything else. No picture is opened.
    """
    if not path.is_dir():
        try:
            return read_examples(path)
        except (OSError, ValueError) as error:
            raise EvaluationError(f"not a data set: {error}") from error
    files = [file for file in sorted(path.glob("*/**/*")) if file.is_file()]
    visible = [file for file in files if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    if not visible:
        raise EvaluationError(f"{path} holds no pictures; expected {path}/CLASS NAME/PICTURE, or a .json list")
    return [Example(file, (file.relative_to(path).parts[0].replace("_", " "),)) for file in visible]


def read_classes(*paths: Path) -> list[str]:
    """The names of classes, each once: the lines of a .txt file, or what the pictures of a data set are called.

    Of several files, the names that are in all of them, in the order of the first.
    """
    first, *others = (_lines(path) if path.suffix == ".txt" else class_names(read_dataset(path)) for path in paths)
    shared = set(first).intersection(*others)
    return [name for name in dict.fromkeys(first) if name in shared]


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise EvaluationError(f"can't read the classes in {path}: {error}") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def class_names(examples: list[Example]) -> list[str]:
    """The names of the examples, each once, in order."""
    return list(dict.fromkeys(example.captions[0] for example in examples))
