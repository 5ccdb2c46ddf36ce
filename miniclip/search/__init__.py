"""Search: an index of pictures on disk, searched by words, by pictures, or by both.

    index.py        the format of an index; reading it
    update.py       making an index, and keeping it up to date with its folders
    compare.py      the differences between folders and an index
    shards.py       writing the shards of an index
    query.py        a query as one vector
    exact.py        the rows with the highest scores, in bounded memory
    approximate.py  the same through FAISS: faster, and nearly exact
    gallery.py      the answers as a page of pictures
"""

from importlib import import_module

# Imported at first use: `miniclip index` where nothing changed does not import PyTorch, which takes seconds.
_LATER = {"Hit": "index", "Index": "index", "SearchError": "index"}
_LATER |= {"embed_query": "query", "top_k": "exact", "update_index": "update"}
__all__ = ["Hit", "Index", "SearchError", "embed_query", "top_k", "update_index"]


def __getattr__(name: str):
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LATER[name]}"), name)
