"""An index that is searched while `miniclip index` may update it, and the pictures that may be shown: those in it."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from torch import Tensor

from miniclip.images import open_image
from miniclip.search.gallery import jpeg
from miniclip.search.index import Hit, Index, SearchError, shard_files


class Pictures:
    """The pictures of an index. Its current state is used, not that at the start. Threads may share it."""

    def __init__(self, directory: str | Path):
        self.index = Index(directory)
        self._lock = threading.Lock()
        self._paths: dict[Path, frozenset[str]] = {}  # by shard; a shard never changes

    def __len__(self) -> int:
        return len(self._current())

    def search(self, query: Tensor, top: int) -> list[Hit]:
        """query: a unit embedding [1, E]."""
        (hits,) = self._current().search(query, top)
        return hits

    def __contains__(self, path: str) -> bool:
        index = self._current()
        with self._lock:
            try:
                known = self._paths
                self._paths = {s.file: known.get(s.file) or frozenset(s.paths()) for s in index.shards}
            except FileNotFoundError as error:
                raise SearchError(f"{index.directory} is being changed; try again") from error
            return any(path in paths for paths in self._paths.values())

    def jpeg(self, path: str, size: int) -> bytes:
        """A picture of the index, upright, of at most size x size pixels. KeyError if the index does not hold it."""
        if path not in self:
            raise KeyError(path)
        return jpeg(open_image(os.fspath(path), upright=True), size)

    def _current(self) -> Index:
        """The index as its directory is now."""
        index = self.index
        try:
            changed = shard_files(index.directory)[0] != [shard.file for shard in index.shards]
        except OSError as error:
            raise SearchError(f"can't read the index {index.directory}: {error.strerror}") from error
        if changed:
            index = Index(index.directory)
            if index.settings.fingerprint != self.index.settings.fingerprint:
                raise SearchError(f"{index.directory} was made anew with another model; start the server again")
            self.index = index
        return index
