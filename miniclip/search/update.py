"""Making an index, and keeping it up to date with its folders.

    scan      folders            -> the pictures in them, with size and time of modification
    compare   pictures, index    -> which pictures are new, changed, moved or deleted
    _encode   new pictures       -> a shard for every batch, so that a process that is killed loses one batch
    merge     many small shards  -> few large ones

Where torchrun started several processes, each encodes its share and the first does everything else. They must see the
same files under the same paths. The index has the same bits as one that a single process makes.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from importlib.metadata import distributions
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

from miniclip.images import ImageAccessError, open_image
from miniclip.io import WriteError, locked, open_regular, write_json
from miniclip.search.compare import Found, Rejected, compare, digest_of, find
from miniclip.search.index import DEFAULT_MODEL, Index, SearchError, Settings, open_shards, read_settings
from miniclip.search.shards import Rows, Stat, edit, merge, remove_leftovers

if TYPE_CHECKING:
    import torch
    from PIL import Image

REJECTED = "rejected.json"


class Report(NamedTuple):
    """The result of an update."""

    pictures: int  # number of pictures in the index now
    added: int  # number of new and changed pictures, which were encoded
    unchanged: int
    changed: list[str]
    moved: list[tuple[str, str]]  # old and new path; not encoded again
    deleted: list[str]
    rejected: list[str]  # the faults of files that can't be read
    left_out: dict[str, int]  # number of files that the scan left out, by reason
    seconds: float


class _Job(NamedTuple):
    """The work of an update, which the first process sends to the others."""

    settings: Settings
    todo: list[tuple[str, Stat]]  # the pictures to encode
    first: int  # number of the first batch


def update_index(
    directory: str | Path,
    inputs: str | Path | Sequence[str | Path],
    model: str | Path | None = None,
    *,
    activation: str | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    batch_size: int = 32,
    workers: int | None = None,
    approximate: bool = False,
    upright: bool | None = None,
    hidden: bool = False,
) -> Report | None:
    """Bring an index up to date with folders and pictures, or make it. Only new and changed pictures are encoded.

    inputs: folders, which are searched however deep, and pictures. Pictures of other folders stay in the index.
    model, activation, device, dtype: as `load` takes them; model None: the index's own, for a new one ViT-B/32.
    batch_size, workers: as `embed_images` takes them.
    approximate: also prepare approximate search, which needs FAISS.
    upright: turn pictures as their EXIF orientation says; None: as the index does, a new one does not.
    hidden: take hidden files and folders too.

    A file is unchanged if its size and time of modification are, or its content is. SearchError if there is nothing to
    index, if `directory` is something else, or if it was made with another model; LockedError if another process
    updates it; WriteError if it can't be written. Where torchrun started several processes, the first returns the
    report and the others None.
    """
    started = time.monotonic()
    directory = Path(directory).expanduser()
    parallel = _parallel()

    def encode(job: _Job | None) -> Rejected:
        job = parallel.broadcast_object(job) if parallel else job
        return _encode(directory, job, device, dtype, batch_size, workers)

    if parallel and not parallel.is_main():
        encode(None)
        return None

    if model is not None and Path(model).expanduser().exists():
        model = os.path.abspath(Path(model).expanduser())
    new = None
    if not directory.exists() or _is_empty(directory):  # everything is checked before anything is written
        find(inputs, hidden)
        new = replace(describe(str(model or DEFAULT_MODEL), activation), upright=bool(upright))
    else:
        read_settings(directory)
    _make(directory)
    with locked(directory / ".lock", f"another process is updating {directory}; wait until it is done"):
        settings, checked = choose_settings(directory, new, model, activation)
        if upright not in (None, settings.upright):
            made = "turned upright" if settings.upright else "taken as they are stored"
            raise SearchError(f"the pictures of {directory} were {made}; make another index to change that")
        report = _update(directory, find(inputs, hidden), settings, checked, encode)
        if approximate and report.pictures:
            from miniclip.search.approximate import build

            build(Index(directory))
        return report._replace(seconds=time.monotonic() - started)


def _update(
    directory: Path, found: Found, settings: Settings, checked: bool, encode: Callable[[_Job], Rejected]
) -> Report:
    """Change the index, whose lock is held, to what was found. checked: whether the settings match the model."""
    settings = replace(settings, update=settings.update + 1)
    write_json(directory / "index.json", settings.content())
    remove_leftovers(directory, settings)
    shards = open_shards(directory, settings)
    before = _read_rejected(directory)
    changes = compare(found, shards, {path: fault for path, fault in before.items() if fault[-1] == _decoder()})
    if changes.todo and not checked:
        check_model(directory, settings)
    for number, edits in changes.edits.items():
        edit(directory, shards[number], settings.update, edits)
    faults = encode(_Job(settings, changes.todo, shards[-1].last + 1 if shards else 0))
    merge(directory, settings)
    rejected = {path: fault for path, fault in before.items() if not found.covers(path)} | changes.rejected
    rejected |= {path: fault for path, fault in faults.items() if fault[-1]}
    if rejected != before:
        write_json(directory / REJECTED, rejected)
    return Report(
        sum(shard.rows for shard in open_shards(directory, settings)),
        len(changes.todo) - len(faults),
        changes.unchanged,
        changes.changed,
        changes.moved,
        changes.deleted,
        [*found.scan.faults.values(), *(fault for _, _, fault, _ in (changes.rejected | faults).values())],
        dict(found.scan.left_out),
        0.0,
    )


def choose_settings(
    directory: Path, new: Settings | None, model: str | Path | None, activation: str | None
) -> tuple[Settings, bool]:
    """The settings to use, and whether the model was read for them.

    Those of the index if it is there, else `new`. To read the model takes a while, so it is not done if neither `model`
    nor `activation` is given or differs from the index's. SearchError if they do not match the index.
    """
    if new and not (directory / "index.json").exists():
        return new, True
    settings = read_settings(directory)
    if model in (None, settings.model) and activation in (None, settings.activation):
        return settings, False
    return check_model(directory, settings, model, activation), True


def check_model(
    directory: Path, settings: Settings, model: str | Path | None = None, activation: str | None = None
) -> Settings:
    """The settings with the given model and activation. SearchError unless they make the same image embeddings."""
    given = describe(str(model or settings.model), activation or settings.activation)
    if given.fingerprint != settings.fingerprint:
        raise SearchError(
            f"{directory} was made with {settings.model}, and {given.model} now has another image tower or prepares "
            "pictures differently: name the model that it was made with, or make a new index in another directory"
        )
    return replace(settings, model=given.model, activation=given.activation)


def describe(model: str, activation: str | None) -> Settings:
    """The settings of a new index made with this model.

    The fingerprint covers all that image embeddings depend on: the image tower's config, the preprocessing, and every
    weight of the tower, as float32, so that it does not depend on a file's format. The text tower may be trained
    further.
    """
    from miniclip.loading import open_checkpoint

    config, tensors = open_checkpoint(model, activation=activation)
    digest = hashlib.sha256(repr((config.vision, config.preprocess)).encode())
    for name in sorted(tensors):
        if name.startswith("visual.") and not name.endswith("num_batches_tracked"):
            tensor = tensors[name]
            digest.update(repr((name, tuple(tensor.shape))).encode())
            digest.update(tensor.float().contiguous().numpy())
    return Settings(model, activation, digest.hexdigest(), config.embed_dim)


def _is_empty(directory: Path) -> bool:
    """Whether a new index may be made here. An update that was killed at its beginning may have left hidden files."""
    return directory.is_dir() and all(file.name.startswith(".") for file in directory.iterdir())


def _read_rejected(directory: Path) -> Rejected:
    file = directory / REJECTED
    try:
        entries = json.loads(file.read_text(encoding="ascii"))
        return {path: (size, mtime, fault, *decoder) for path, (size, mtime, fault, *decoder) in entries.items()}
    except FileNotFoundError:
        return {}
    except (ValueError, AttributeError, TypeError) as error:
        raise SearchError(f"{file} is damaged ({error}); delete it, and its files are tried again") from error


@cache
def _decoder() -> str:
    """What decodes pictures here, with its version: another one may decode what this one can't."""
    packages = ("pillow", "pillow-heif", "pi-heif")
    found = {name: package.version for name in packages for package in distributions(name=name)}
    return ", ".join(f"{name} {version}" for name, version in found.items())


class _Pictures(Sequence):
    """Pictures of files, each decoded when it is taken, by one of several threads."""

    def __init__(self, paths: list[str]):
        self.paths = paths
        self.hashes: dict[int, bytes] = {}
        self.inaccessible: set[int] = set()  # their fault is not the content's

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> Image.Image:
        try:
            with open_regular(self.paths[i]) as file:  # hashed and decoded without opening the path again
                self.hashes[i] = digest_of(file)
                file.seek(0)
                return open_image(file)
        except (OSError, ImageAccessError) as error:
            self.inaccessible.add(i)
            if isinstance(error, ImageAccessError):
                raise
            raise ImageAccessError(f"can't open the image {self.paths[i]}: {error.strerror}") from error


def _encode(directory: Path, job: _Job, device, dtype, batch_size: int, workers: int | None) -> Rejected:
    """Write this process's batches, each as a shard.

    Returns the pictures that could not be read by any process; "" as the decoder if the fault is not the content's.
    """
    if not job.todo:
        return {}
    import torch

    from miniclip.embed import stream_images
    from miniclip.loading import load
    from miniclip.parallel import all_gather_objects

    model, preprocess = load(job.settings.model, device, dtype=dtype, activation=job.settings.activation)
    preprocess = replace(preprocess, upright=job.settings.upright)
    files = _Pictures([path for path, _ in job.todo])
    stats = torch.tensor([stat for _, stat in job.todo])
    rejected: Rejected = {}
    batches = stream_images(model, preprocess, files, batch_size, dtype=torch.float16, workers=workers)
    for indices, embeddings, faults in batches:
        if not embeddings.isfinite().all():
            raise SearchError(f"{job.settings.model} gives NaN or infinity for pictures, of which no index can be made")
        if indices:
            number = job.first + indices[0] // batch_size
            hashes = torch.tensor([list(files.hashes.pop(i)) for i in indices], dtype=torch.uint8)
            paths = [files.paths[i] for i in indices]
            Rows(embeddings, paths, stats[indices], hashes).write(directory, number, number, job.settings.update)
        decoder = _decoder()
        for i, fault in faults.items():
            rejected[files.paths[i]] = (*job.todo[i][1], fault, "" if i in files.inaccessible else decoder)
    return {path: fault for part in all_gather_objects(rejected) for path, fault in part.items()}


def _make(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WriteError(f"can't make the directory {directory}: {error.strerror}") from error


def _parallel() -> ModuleType | None:
    """miniclip.parallel, if there may be several processes. Importing PyTorch to find out would take seconds."""
    if "torch.distributed" not in sys.modules:
        return None
    from miniclip import parallel

    return parallel
