"""The state from which a run continues: a safetensors file, so that nothing in it can run.

Each tensor has its path in the state as a name ("model.visual.conv1.weight"); the metadata has everything else as JSON.
The file before the last one is kept under the name PREVIOUS: if the last one is damaged, the run continues from there.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from miniclip.errors import MiniclipError
from miniclip.io import explained, save_tensors
from miniclip.models import CLIP
from miniclip.save import save_checkpoint
from miniclip.weights.unpickle import View, unpickle

LAST, NEW, PREVIOUS = (f"checkpoint{name}.safetensors" for name in ("", ".new", ".previous"))
LEGACY = "checkpoint.pt"  # what earlier versions wrote with torch.save
STATE = "miniclip_training"  # in the metadata
PARTS = ("model", "optimizer", "done", "best", "options")  # that every state has


class CheckpointDamagedError(MiniclipError, ValueError):
    """A run's checkpoint that can't be read."""


def save_state(state: dict, folder: Path) -> None:
    """Write all that a run needs to continue: tensors, numbers and strings in dicts and lists.

    The file takes the place of the last one after it was read back. Whatever fails, there is one to continue from.
    """
    tensors: dict[str, Tensor] = {}
    metadata = {STATE: json.dumps(_take_tensors(state, "", tensors))}
    save_tensors(tensors, folder / NEW, metadata)
    read_state(folder / NEW)
    with explained(folder / LAST):
        if (folder / LAST).exists():
            (folder / LAST).replace(folder / PREVIOUS)
        (folder / NEW).replace(folder / LAST)


def load_state(folder: Path, say=lambda message: None) -> dict | None:
    """The last state of a run that can be read; None if it has none yet. `say` is told of files that are damaged.

    CheckpointDamagedError if all of them are.
    """
    files = [folder / name for name in (LAST, NEW, PREVIOUS, LEGACY) if (folder / name).exists()]
    for file in files:
        try:
            return _read_legacy(file) if file.name == LEGACY else read_state(file)
        except CheckpointDamagedError as error:
            fault = error
            say(f"{fault}; looking for an earlier one")
    if files:
        raise CheckpointDamagedError(f"{fault}; there is no earlier one: --restart trains from the beginning")
    return None


def read_state(path: Path) -> dict:
    """The state in a file that `save_state` wrote. CheckpointDamagedError for any other."""
    try:
        with safe_open(path, "pt") as file:
            state = _put_tensors(json.loads(file.metadata()[STATE]), file.get_tensor)
        return _checked(state, path)
    except CheckpointDamagedError:
        raise
    except Exception as error:  # damaged files make safetensors and json raise many types
        raise _damaged(path, error) from error


def export_weights(model: CLIP, path: Path) -> None:
    """Write the weights alone, float32 safetensors under the names and with the config that `load()` reads."""
    save_checkpoint(model.config, {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}, path)


def _take_tensors(value: object, path: str, tensors: dict[str, Tensor]) -> object:
    """The value in a form that JSON can hold. Its tensors go into `tensors`, and {"tensor": name} takes their place; a
    dict becomes a list of its keys and values, because JSON would make strings of the optimizer's integer keys."""
    if isinstance(value, Tensor):
        tensors[path] = value.detach().cpu()
        return {"tensor": path}
    if isinstance(value, dict):
        items = [(key, _take_tensors(item, f"{path}.{key}".lstrip("."), tensors)) for key, item in value.items()]
        return {"dict": items}
    if isinstance(value, (list, tuple)):
        items = [_take_tensors(item, f"{path}.{number}", tensors) for number, item in enumerate(value)]
        return {"tuple": items} if isinstance(value, tuple) else items
    return value


def _put_tensors(value: object, read) -> object:
    """The reverse of `_take_tensors`."""
    if isinstance(value, list):
        return [_put_tensors(item, read) for item in value]
    if isinstance(value, dict):
        ((kind, content),) = value.items()
        if kind == "tensor":
            return read(content)
        items = [_put_tensors(item, read) for item in content]
        return dict(items) if kind == "dict" else tuple(items)
    return value


def _read_legacy(path: Path) -> dict:
    """The state in a file of an earlier version."""
    try:
        with zipfile.ZipFile(path) as records:
            infos = {info.filename.partition("/")[2]: info for info in records.infolist()}
            if any(info.compress_type != zipfile.ZIP_STORED for info in infos.values()):
                raise CheckpointDamagedError("its records are compressed")
            storages: dict[str, Tensor] = {}

            def plain(value: object) -> object:
                if isinstance(value, View):
                    key, dtype, count = value.storage
                    if key not in storages:
                        data = bytearray(records.read(infos[f"data/{key}"]))
                        storages[key] = torch.frombuffer(data, dtype=dtype, count=count) if count else torch.empty(0)
                    return torch.as_strided(storages[key], value.size, value.stride, value.offset)
                if isinstance(value, dict):
                    return {key: plain(item) for key, item in value.items()}
                return type(value)(map(plain, value)) if isinstance(value, (list, tuple)) else value

            return _checked(plain(unpickle(records.read(infos["data.pkl"])).value), path)
    except CheckpointDamagedError:
        raise
    except Exception as error:  # damaged files make zipfile and the readers raise many types
        raise _damaged(path, error) from error


def _checked(state: object, path: Path) -> dict:
    if not isinstance(state, dict) or not all(part in state for part in PARTS):
        raise _damaged(path, f"it lacks some of {', '.join(PARTS)}")
    return state


def _damaged(path: Path, fault: object) -> CheckpointDamagedError:
    return CheckpointDamagedError(f"{path} is damaged, or not a checkpoint of `miniclip train`: {fault!s:.300}")
