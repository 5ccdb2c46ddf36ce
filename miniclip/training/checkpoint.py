"""Files of a run, written so that a reader, or a run killed at any moment, never meets half of one."""

from __future__ import annotations

from pathlib import Path

import torch

from miniclip.io import write_atomically
from miniclip.models import CLIP
from miniclip.save import save_checkpoint as save_model


def save_checkpoint(state: dict, path: Path) -> None:
    """Write all that a run needs to go on: tensors, numbers and strings in dicts and lists."""
    write_atomically(path, lambda file: torch.save(state, file))


def load_checkpoint(path: Path) -> dict:
    """Read what `save_checkpoint` wrote. Nothing but tensors and plain containers is accepted."""
    return torch.load(path, map_location="cpu", weights_only=True)


def export_weights(model: CLIP, path: Path) -> None:
    """Write the weights alone, float32 safetensors under the names and with the config that `load()` reads."""
    save_model(model.config, {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}, path)
