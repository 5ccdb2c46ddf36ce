"""Traces as safetensors files. The header says what was traced; a port's file needs no header, only the names."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import PIL
import torch
from safetensors import safe_open
from torch import Tensor

from miniclip.errors import MiniclipError
from miniclip.io import save_tensors
from miniclip.models import CLIP
from miniclip.stages import token_sides
from miniclip.version import __version__
from miniclip.weights import CheckpointError
from miniclip.weights.files import read_file

FORMAT = "miniclip trace 1"


class TraceError(MiniclipError, ValueError):
    """Files or stages that can't be compared; the message says why and what to do."""


def save_trace(
    stages: Mapping[str, Tensor], path: str | Path, model: CLIP, name: str, alternative: str | None = None
) -> None:
    """Write stages and, in the file's metadata, what made them; all values of the metadata are strings.

    format, miniclip, torch, pillow   versions
    model, model_sha256, dtype        `name`, the digest of `weights_sha256`, and the dtype of the arithmetic
    stages                            a JSON list of the names in forward order, which safetensors does not keep
    alternative                       only where given: a golden in the same folder that a port may match instead
    """
    metadata = {
        "format": FORMAT,
        "miniclip": __version__,
        "torch": torch.__version__,
        "pillow": PIL.__version__,
        "model": name,
        "model_sha256": weights_sha256(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "stages": json.dumps(list(stages)),
    } | ({"alternative": alternative} if alternative else {})
    save_tensors(stages, path, metadata)


def without_padding(stages: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The stages; those of the text, except its ids, end at the last end-of-text token: the rest has no influence."""
    if "text.ids" not in stages:
        return dict(stages)
    return cut_to(stages, end_of_text(stages)) | {"text.ids": stages["text.ids"]}


def end_of_text(stages: Mapping[str, Tensor]) -> int:
    """The number of tokens up to the last end-of-text token of all rows."""
    return int(stages["text.ids"].argmax(-1).max()) + 1


def cut_to(stages: Mapping[str, Tensor], tokens: int) -> dict[str, Tensor]:
    """The stages with the first `tokens` tokens of the text."""
    cut = dict(stages)
    for name in stages:
        for side in token_sides(name):
            cut[name] = cut[name].narrow(side, 0, tokens)
    return {name: stage.contiguous() for name, stage in cut.items()}


def weights_sha256(model: CLIP) -> str:
    """A digest of the weights, the same for every file format and device.

    SHA-256 over the tensors in the order of their names' bytes, without num_batches_tracked: for each its name in
    UTF-8, a zero byte, and its values as little-endian float32, row by row.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not name.endswith("num_batches_tracked"):
            digest.update(name.encode() + b"\0")
            digest.update(tensor.float().cpu().contiguous().numpy().astype("<f4").data)
    return digest.hexdigest()


def load_trace(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The stages of a file that `save_trace` wrote, in forward order, and its metadata. TraceError for another file."""
    stages, metadata = load_stages(path), {}
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except Exception:  # a PyTorch file, which load_stages reads too
        pass
    if metadata.get("format") != FORMAT:
        raise TraceError(f"{path} is not a trace ({FORMAT}); expected a golden file, which `miniclip trace` writes")
    try:
        order = json.loads(metadata["stages"])
        complete = sorted(order) == sorted(stages) and {"model", "model_sha256", "dtype"} <= metadata.keys()
    except (KeyError, TypeError, ValueError):
        complete = False
    if not complete:
        raise TraceError(f"{path} is damaged: its list of stages differs from its tensors, or metadata is missing")
    return {name: stages[name] for name in order}, metadata


def load_stages(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a port's file: safetensors, or what torch.save writes. TraceError for another file."""
    try:
        tensors = read_file(path)
        return {name: tensors[name].clone() for name in tensors}
    except CheckpointError as error:
        raise TraceError(str(error)) from error
