"""Checkpoints out again, in the formats that others read. Each carries the whole config, or the format is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from miniclip.config import CLIPConfig, to_json
from miniclip.io import new_folder, save_tensors, write_atomically, write_json
from miniclip.loading import blank_model, family_of, owner_of
from miniclip.weights.errors import CheckpointError
from miniclip.weights.files import CONFIG_FILE, CONFIG_KEY
from miniclip.weights.infer import check_names
from miniclip.weights.names import shapes_of


def save_checkpoint(config: CLIPConfig, tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """Write tensors that have a model's own names, with their values and dtypes unchanged; `load` reads all of it back.

    path: ends in .safetensors, whose metadata holds the config; or in .pt or .pth, for a state dict that torch.load
    and openai/CLIP read, which has no place for the config and is refused unless `load` infers the same one; without a
    suffix it is a new directory, of Hugging Face's layout or, for a MobileCLIP, OpenCLIP's, with the config as
    miniclip.json beside theirs. CheckpointError for what the format can't hold, WriteError for what can't be written.
    """
    check_names(shapes_of(blank_model(config, torch.float32).state_dict()), shapes_of(tensors))
    path, family = Path(path).expanduser(), family_of(config)
    if path.suffix == ".safetensors":
        save_tensors(family.write_file(config, tensors), path, config_metadata(config))
    elif path.suffix in (".pt", ".pth"):
        renamed = family.write_file(config, tensors)
        plain = {name: renamed[name].contiguous() for name in renamed}
        _check_inferred(config, plain, path)
        write_atomically(path, lambda unfinished: torch.save(plain, unfinished))
    elif path.suffix == "":
        if family.write_directory is None:
            raise CheckpointError(f"{path}: there is no directory format for a model of this family: use .safetensors")
        with new_folder(path) as folder:
            family.write_directory(config, tensors, folder)
            write_json(folder / CONFIG_FILE, to_json(config))
    else:
        raise CheckpointError(f"{path}: expected a name that ends in .safetensors, .pt or .pth, or a directory's")


def config_metadata(config: CLIPConfig) -> dict[str, str]:
    """The metadata of a safetensors file that holds a model of this config."""
    return {CONFIG_KEY: json.dumps(to_json(config))}


def _check_inferred(config: CLIPConfig, tensors: Mapping[str, Tensor], path: Path) -> None:
    """CheckpointError unless whoever reads the bare tensors takes them for a model of this config."""
    try:
        inferred, _ = owner_of(tensors).read(tensors, None, None)
    except CheckpointError as error:
        fault = f"{path}: a state dict can't hold this model's config: {error}"
        raise CheckpointError(f"{fault}; use .safetensors") from None
    if inferred != config:
        differing = "; ".join(_differences(config, inferred)) or "the family"
        raise CheckpointError(
            f"{path}: a state dict can't hold this model's config, and a reader would take it for another one "
            f"({differing}): use .safetensors"
        )


def _differences(config: Any, other: Any, prefix: str = "") -> list[str]:
    """The fields in which two configs differ, each with both values."""
    if type(config) is type(other) and is_dataclass(config):
        names = [each.name for each in fields(config)]
        pairs = ((getattr(config, name), getattr(other, name), f"{prefix}.{name}".lstrip(".")) for name in names)
        return [line for pair in pairs for line in _differences(*pair)]
    return [] if config == other else [f"{prefix} is {config!r:.60}, not {other!r:.60}"]
