"""The config that a file or a directory states, and which file of a directory holds the weights.

`FORMATS` lists the kinds of directory; another kind is a reader of its config and a row.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from miniclip.config import CLIPConfig, from_json
from miniclip.weights import huggingface, openclip
from miniclip.weights.errors import CheckpointError
from miniclip.weights.fields import MAX_BYTES, Fields
from miniclip.weights.files import CONFIG_FILE, CONFIG_KEY, Checkpoint

RUN_WEIGHTS = ("best.safetensors", "last.safetensors")  # of a training run; the best is there if it was validated
OWN_WEIGHTS = ("model.safetensors", "open_clip_model.safetensors", *RUN_WEIGHTS)
SUFFIXES = (".safetensors", ".bin", ".pth", ".pt")


class Readers(NamedTuple):
    """Each family's functions that read a config, or return None if it describes no model of the family."""

    openclip: Sequence[Callable[[Fields], CLIPConfig | None]]  # of model_cfg in open_clip_config.json
    huggingface: Sequence[Callable[[Fields, Path], CLIPConfig | None]]  # of config.json, in this directory


class Format(NamedTuple):
    """A kind of directory."""

    config_file: str
    read: Callable[[Path, Readers], CLIPConfig]
    weights: tuple[str, ...]  # names of its file of weights; of several that are there, the first counts


def _read_own(folder: Path, readers: Readers) -> CLIPConfig:
    return from_json(Fields.read(folder / CONFIG_FILE).values, str(folder / CONFIG_FILE))


def _read_openclip(folder: Path, readers: Readers) -> CLIPConfig:
    return openclip.read_config(folder, readers.openclip)


def _read_config_json(folder: Path, readers: Readers) -> CLIPConfig:
    """Hugging Face's file, or that of a training run from before there was a miniclip.json."""
    fields = Fields.read(folder / "config.json")
    if "vision" in fields.values:
        return from_json(fields.values, str(fields.path))
    return next(filter(None, (read(fields, folder) for read in readers.huggingface)))


FORMATS = (  # in this order: a directory may have several of these configs
    Format(CONFIG_FILE, _read_own, OWN_WEIGHTS),
    Format("open_clip_config.json", _read_openclip, openclip.WEIGHT_FILES),
    Format("config.json", _read_config_json, (*huggingface.WEIGHT_FILES, *RUN_WEIGHTS)),
)


def open_directory(folder: Path, readers: Readers) -> tuple[CLIPConfig | None, Path]:
    """The config that a directory states, and its file of weights; None: the file states the config itself."""
    if format := _format_of(folder):
        return format.read(folder, readers), weight_file(folder, format.weights)
    for name in OWN_WEIGHTS:
        if (folder / name).is_file():
            return None, folder / name
    expected = ", ".join(format.config_file for format in FORMATS)
    raise CheckpointError(f"{folder} is a directory without any of {expected}: name a file in it")


def weight_file(folder: Path, names: Sequence[str]) -> Path:
    """The first of these files, or else the only file of weights, whatever its name."""
    for name in names:
        if (folder / name).is_file():
            return folder / name
    others = sorted(file for file in folder.iterdir() if file.suffix in SUFFIXES)
    if len(others) != 1:
        found = ", ".join(file.name for file in others[:5]) or "none"
        raise CheckpointError(f"{folder}: expected weights in one of {', '.join(names)}; got {found:.500}")
    return others[0]


def config_of_file(
    path: Path, tensors: Checkpoint, directory: CLIPConfig | None, readers: Readers
) -> CLIPConfig | None:
    """The config in a file's metadata, else the one that its directory states; None: nothing states one.

    directory: what `open_directory` returned if the directory was named; None: the file was. Then its directory counts
    if the file has the name of such a directory's weights. CheckpointError if the two configs differ.
    """
    format = _format_of(path.parent)
    if format and (path.name in format.weights or directory):
        directory = directory or format.read(path.parent, readers)
    text = tensors.metadata.get(CONFIG_KEY)
    own = None if text is None else _read_metadata(text)
    if own and directory and own != directory:
        raise CheckpointError(
            f"{path}: the config in its metadata differs from {path.parent / format.config_file}: remove the wrong one"
        )
    return own or directory


def _format_of(folder: Path) -> Format | None:
    return next((format for format in FORMATS if (folder / format.config_file).is_file()), None)


def _read_metadata(text: str) -> CLIPConfig:
    try:
        if len(text) > MAX_BYTES:
            raise ValueError(f"it has {len(text):,} characters")
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"the config in its metadata can't be read: {error!s:.200}") from None
    return from_json(values, "the config in its metadata")
