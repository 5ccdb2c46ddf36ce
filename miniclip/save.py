"""Checkpoints out again, in the formats that others read. Each carries the whole config, or the format is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from miniclip.config import CLIPConfig, to_json
from miniclip.errors import MiniclipError
from miniclip.io import new_folder, save_tensors, write_atomically, write_json
from miniclip.loading import config_readers, family_of, matching_model, owner_of
from miniclip.weights.errors import CheckpointError
from miniclip.weights.files import CONFIG_FILE, CONFIG_KEY
from miniclip.weights.stated import open_directory


def save_checkpoint(config: CLIPConfig, tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """Write tensors that have a model's own names, with their values unchanged; `load` reads the same model back.

    path: ends in .safetensors, whose metadata holds the config; or in .pt or .pth, for a state dict that torch.load
    and openai/CLIP read, which has no place for the config and is refused unless `load` infers the same one; without a
    suffix it is a new directory, of Hugging Face's layout or, for a MobileCLIP, OpenCLIP's, with the config as
    miniclip.json beside theirs. CheckpointError for what the format can't hold, WriteError for what can't be written.
    """
    matching_model(config, torch.float32, tensors)
    path = Path(path).expanduser()
    if path.suffix == ".safetensors":
        save_tensors(tensors, path, config_metadata(config))
    elif path.suffix in (".pt", ".pth"):
        plain = {name: tensors[name].contiguous() for name in tensors}
        _check_held(config, lambda: owner_of(plain).read(plain, None, None)[0], path)
        write_atomically(path, lambda unfinished: torch.save(plain, unfinished))
    elif path.suffix == "":
        write = family_of(config).write_directory
        if write is None:
            raise CheckpointError(f"{path}: there is no directory format for a model of this family: use .safetensors")
        with new_folder(path) as folder:
            write(config, tensors, folder)
            _check_held(config, lambda: open_directory(folder, config_readers())[0], path)
            write_json(folder / CONFIG_FILE, to_json(config))
    else:
        raise CheckpointError(f"{path}: expected a name that ends in .safetensors, .pt or .pth, or a directory's")


def config_metadata(config: CLIPConfig) -> dict[str, str]:
    """The metadata of a safetensors file that holds a model of this config."""
    return {CONFIG_KEY: json.dumps(to_json(config))}


def _check_held(config: CLIPConfig, read: Callable[[], CLIPConfig | None], path: Path) -> None:
    """CheckpointError unless `read`, which reads a foreign format, gives the config that was written."""
    try:
        differing = _differences(config, read())
    except MiniclipError as error:
        differing = [f"{error!s:.500}"]
    if differing:
        raise CheckpointError(
            f"{path}: this format can't hold the model's config, whose reader would get another one: "
            f"{'; '.join(differing)}. Use .safetensors"
        )


def _differences(config: Any, other: Any, prefix: str = "") -> list[str]:
    """The fields in which two configs differ, each with both values."""
    if type(config) is type(other) and is_dataclass(config):
        names = [each.name for each in fields(config)]
        pairs = ((getattr(config, name), getattr(other, name), f"{prefix}.{name}".lstrip(".")) for name in names)
        return [line for pair in pairs for line in _differences(*pair)]
    return [] if config == other else [f"{prefix or 'it'} is {config!r:.60}, not {other!r:.60}"]
