"""Making an index, and keeping it up to date with the folders that it is of.

    scan      folders            -> the pictures in them, with size and time of modification
    compare   pictures, index    -> what is new, changed, moved or gone
    _encode   what is new        -> a shard for every batch, so that a process that is killed loses the batch in hand
    merge     many small shards  -> few large ones

Where torchrun started several processes, the first does all but the encoding, of which each does its share. They must
see the same files under the same paths. The index is the same in every bit as one process's.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from miniclip.search.compare import Rejected, compare, content_hash, scan
from miniclip.search.index import APPROXIMATE, DEFAULT_MODEL, SearchError, Settings, open_shards, read_settings
from miniclip.search.shards import HASH_BYTES, Rows, Stat, edit, locked, merge, remove_leftovers, write_json

if TYPE_CHECKING:
    import torch

REJECTED = "rejected.json"


class Report(NamedTuple):
    """What an update did."""

    pictures: int  # in the index now
    added: int  # pictures that were encoded: new ones, and changed ones
    unchanged: int
    changed: list[str]
    moved: list[tuple[str, str]]  # from, to; not encoded again
    deleted: list[str]
    rejected: list[str]  # what can't be read, and why
    seconds: float


class _Job(NamedTuple):
    """What the first process tells the others."""

    settings: Settings
    todo: list[tuple[str, Stat]]
    first: int  # the number of the first batch


def update_index(
    directory: str | Path,
    inputs: Sequence[str | Path],
    model: str | Path | None = None,
    *,
    activation: str | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    batch_size: int = 32,
    workers: int | None = None,
) -> Report | None:
    """Bring an index up to date with folders and pictures; make it, if it is not there. Only what is new is encoded.

    inputs: folders, with all that is in them, and pictures. What the index has of other folders stays as it is.
    model, activation, device, dtype: as `load` takes them; model None: the index's own, for a new one ViT-B/32.
    batch_size, workers: as `embed_images` takes them.

    A file is unchanged if its size and time of modification are, or its content is. SearchError if there is nothing to
    index, if `directory` is something else, or if it was made with another model. Where torchrun started several
    processes the first returns the report, the others None.
    """
    started = time.monotonic()
    directory = Path(directory)
    if (several := _several()) and several.get_rank() > 0:
        _encode(directory, _broadcast(None), device, dtype, batch_size, workers)
        return None

    found = scan(inputs)
    settings, checked = choose_settings(directory, model, activation)
    directory.mkdir(parents=True, exist_ok=True)
    with locked(directory):
        write_json(directory / "index.json", settings.content())
        remove_leftovers(directory)
        shards = open_shards(directory)
        before = _read_rejected(directory)
        changes = compare(found, shards, before)
        if changes.todo and not checked:
            check_model(directory, settings)
        if changes.todo or changes.edits:
            (directory / APPROXIMATE).unlink(missing_ok=True)  # it is of other rows
        for number, edits in changes.edits.items():
            edit(directory, shards[number], edits)
        job = _Job(settings, changes.todo, shards[-1].last + 1 if shards else 0)
        faults = _encode(directory, _broadcast(job), device, dtype, batch_size, workers)
        merge(directory)
        rejected = {path: fault for path, fault in before.items() if not found.covers(path)} | changes.rejected | faults
        if rejected != before:
            write_json(directory / REJECTED, rejected)
        return Report(
            sum(shard.rows for shard in open_shards(directory)),
            len(changes.todo) - len(faults),
            changes.unchanged,
            changes.changed,
            changes.moved,
            changes.deleted,
            [*found.unreadable.values(), *(why for *_, why in (changes.rejected | faults).values())],
            time.monotonic() - started,
        )


def choose_settings(directory: Path, model: str | Path | None, activation: str | None) -> tuple[Settings, bool]:
    """Those of the index that is there, for a new one those of the model; and whether the model was looked at.

    That takes a while, so it is put off where nothing is given that is not what the index has. SearchError if the two
    disagree.
    """
    if model is not None and Path(model).exists():
        model = os.path.abspath(model)
    if not directory.exists() or _is_empty(directory):
        return describe(str(model or DEFAULT_MODEL), activation), True
    settings = read_settings(directory)
    if model in (None, settings.model) and activation in (None, settings.activation):
        return settings, False
    return check_model(directory, settings, model, activation), True


def check_model(
    directory: Path, settings: Settings, model: str | Path | None = None, activation: str | None = None
) -> Settings:
    """The settings with what is given in place of what is recorded. SearchError unless the embeddings are the same."""
    given = describe(str(model or settings.model), activation or settings.activation)
    if given.fingerprint != settings.fingerprint:
        raise SearchError(
            f"{directory} was made with {settings.model}, and {given.model} now has another image tower or prepares "
            "pictures differently: name the model that it was made with, or make a new index in another directory"
        )
    return given


def describe(model: str, activation: str | None) -> Settings:
    """What an index made with this model records.

    The fingerprint is of all that image embeddings depend on: the tower's config, the preprocessing, and every weight,
    as float32, so that it does not depend on a file's format. The text tower may be trained further.
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
    """Whether an index may be made here: hidden files are of one that was killed in its first moment."""
    return directory.is_dir() and all(file.name.startswith(".") for file in directory.iterdir())


def _read_rejected(directory: Path) -> Rejected:
    file = directory / REJECTED
    try:
        return {path: tuple(fault) for path, fault in json.loads(file.read_text(encoding="ascii")).items()}
    except FileNotFoundError:
        return {}
    except (ValueError, AttributeError, TypeError) as error:
        raise SearchError(f"{file} is damaged ({error}); delete it, and its files are tried again") from error


class _Hashed(Sequence):
    """Paths of files, each hashed when it is asked for: by the threads that are about to decode it."""

    def __init__(self, paths: list[str]):
        self.paths = paths
        self.hashes: dict[int, bytes] = {}

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> str:
        self.hashes[i] = content_hash(self.paths[i]) or bytes(HASH_BYTES)  # unreadable: decoding says why
        return self.paths[i]


def _encode(directory: Path, job: _Job, device, dtype, batch_size: int, workers: int | None) -> Rejected:
    """Write this process's batches, each as a shard. Returns what could not be read, by any process."""
    if not job.todo:
        return {}
    import torch

    from miniclip.embed import stream_images
    from miniclip.loading import load

    model, preprocess = load(job.settings.model, device, dtype=dtype, activation=job.settings.activation)
    files = _Hashed([path for path, _ in job.todo])
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
            Rows(embeddings, paths, stats[indices], hashes).write(directory, number, number)
        rejected |= {files.paths[i]: (*job.todo[i][1], why) for i, why in faults.items()}
    if several := _several():
        every: list[Rejected] = [{}] * several.get_world_size()
        several.all_gather_object(every, rejected)
        rejected = {path: fault for part in every for path, fault in part.items()}
    return rejected


def _broadcast(job: _Job | None) -> _Job:
    """The first process's, in all."""
    if several := _several():
        jobs = [job]
        several.broadcast_object_list(jobs)
        (job,) = jobs
    return job


def _several():
    """torch.distributed, where this process is one of several; not imported to find out, which takes seconds."""
    distributed = sys.modules.get("torch.distributed")
    return distributed if distributed and distributed.is_available() and distributed.is_initialized() else None
