"""Search: an index of pictures on disk, found by words, by pictures, or by both.

    index.py        the format, documented; reading it
    update.py       making an index, and keeping it up to date with its folders
    query.py        what is asked for, as one vector
    exact.py        the best rows of any number, in bounded memory
    approximate.py  the same through FAISS: faster, and nearly exact
    gallery.py      the answers as a page of pictures
"""

from importlib import import_module

# Imported when it is first asked for: where nothing has changed `miniclip index` does without PyTorch, and its seconds.
_LATER = {"Hit": "index", "Index": "index", "SearchError": "index"}
_LATER |= {"embed_query": "query", "top_k": "exact", "update_index": "update"}
__all__ = ["Hit", "Index", "SearchError", "embed_query", "top_k", "update_index"]


def __getattr__(name: str):
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LATER[name]}"), name)
