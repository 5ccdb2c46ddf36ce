"""Files of a run, written so that a reader, or a run killed at any moment, never meets half of one."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save

from miniclip.models import CLIP


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a file beside `path`, see it safely on the disk, and only then give it the name `path`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(state: dict, path: Path) -> None:
    """Write all that a run needs to go on: tensors, numbers and strings in dicts and lists."""
    write_atomically(path, lambda file: torch.save(state, file))


def load_checkpoint(path: Path) -> dict:
    """Read what `save_checkpoint` wrote. Nothing but tensors and plain containers is accepted."""
    return torch.load(path, map_location="cpu", weights_only=True)


def export_weights(model: CLIP, path: Path) -> None:
    """Write the weights alone, float32 safetensors under OpenAI's names, as `load()` reads them."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    write_atomically(path, lambda file: file.write_bytes(save(state)))
