"""Search: an index of pictures on disk, found by words, by pictures, or by both.

    index.py        the format, documented; reading it
    update.py       making an index, and keeping it up to date with its folders
    query.py        what is asked for, as one vector
    exact.py        the best rows of any number, in bounded memory
    approximate.py  the same through FAISS: faster, and nearly exact
    gallery.py      the answers as a page of pictures
"""

from miniclip.search.exact import top_k
from miniclip.search.index import Hit, Index, SearchError
from miniclip.search.query import embed_query
from miniclip.search.update import update_index

__all__ = ["Hit", "Index", "SearchError", "embed_query", "top_k", "update_index"]
