"""Checkpoints out again, in the formats that others read. Files appear under their name only once they are complete."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from miniclip.config import CLIPConfig
from miniclip.config_mobileclip import MobileCLIPConfig
from miniclip.weights import huggingface, mobileclip_openclip
from miniclip.weights.errors import CheckpointError
from miniclip.weights.infer import check_names
from miniclip.weights.load import blank_model, shapes_of


def save_checkpoint(config: CLIPConfig, tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """Write tensors that have a model's own names, with their values and dtypes unchanged.

    path: ends in .safetensors, or in .pt or .pth for a state dict that torch.load and openai/CLIP read; without a
    suffix it is a new Hugging Face directory, which states the config too. A MobileCLIP gets OpenCLIP's names, and its
    directory is one of OpenCLIP.
    """
    check_names(shapes_of(blank_model(config, torch.float32).state_dict()), shapes_of(tensors))
    path = Path(path)
    if isinstance(config, MobileCLIPConfig):
        tensors = mobileclip_openclip.to_openclip(config, tensors)
    if path.suffix == ".safetensors":
        save_tensors(tensors, path)
    elif path.suffix in (".pt", ".pth"):
        plain = {name: tensors[name].contiguous() for name in tensors}
        _write(path, lambda unfinished: torch.save(plain, unfinished))
    elif path.suffix == "" and isinstance(config, MobileCLIPConfig):
        plain = {name: tensors[name].contiguous() for name in tensors}
        files = {"open_clip_config.json": mobileclip_openclip.openclip_json(config)}
        huggingface.write_directory(path, "open_clip_model.safetensors", plain, files)
    elif path.suffix == "":
        huggingface.write(tensors, config, path)
    else:
        raise CheckpointError(f"{path}: expected a name that ends in .safetensors, .pt or .pth, or a directory's")


def save_tensors(tensors: Mapping[str, Tensor], path: str | Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, replacing one that is there."""
    plain = {name: tensors[name].contiguous() for name in tensors}

    def write(unfinished: Path) -> None:
        unfinished.touch()
        mode = unfinished.stat().st_mode
        save_file(plain, unfinished, metadata)
        unfinished.chmod(mode)  # safetensors would let nobody but the owner read it

    _write(Path(path), write)


def _write(path: Path, write: Callable[[Path], None]) -> None:
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(unfinished)
        unfinished.replace(path)
    except OSError as error:
        raise CheckpointError(f"can't write {path}: {error}") from error
    finally:
        unfinished.unlink(missing_ok=True)
