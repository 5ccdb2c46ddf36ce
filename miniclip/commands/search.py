"""Find the pictures of an index, or the lines of a .txt file, that are nearest to words or pictures.

Several queries are averaged. The score is a cosine.
"""

from __future__ import annotations

import argparse

from miniclip.commands.index import MODEL
from miniclip.commands.options import add_json, add_model, load_model, output_file, path, positive
from miniclip.commands.output import complain, show, show_json, shown
from miniclip.io import printable
from miniclip.search.index import DEFAULT_MODEL, Hit, Index, SearchError

UNWANTED = "words or a picture to stay away from: half of its score is subtracted; may be repeated"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("index", type=path, metavar="INDEX", help="an index of `miniclip index`, or a .txt of captions")
    parser.add_argument("query", nargs="+", metavar="QUERY", help="words, or a picture's file")
    parser.add_argument("--not", action="append", default=[], dest="unwanted", metavar="QUERY", help=UNWANTED)
    parser.add_argument("--top", type=positive, default=10, metavar="K", help="number of answers (default: 10)")
    parser.add_argument("--faiss", action="store_true", help="approximate: faster for millions; see `index --faiss`")
    parser.add_argument("--html", type=output_file, metavar="FILE", help="also write the answers as a page of pictures")
    add_model(parser, None, MODEL)
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    from miniclip.search.query import is_picture

    for part in (*options.query, *options.unwanted):
        is_picture(part)  # raises SearchError for a picture that is not there, before a model is loaded
    captions = options.index.suffix == ".txt" and options.index.is_file()
    hits = _search_captions(options) if captions else _search_index(options)
    if options.html:
        from miniclip.search.gallery import write_gallery

        write_gallery(options.html, hits, options.query, options.unwanted)
        complain(f"{len(hits)} pictures -> {shown(options.html)}")
    if options.json:
        kind = "caption" if captions else "image"
        answers = [{"score": round(hit.score, 6), kind: hit.path} for hit in hits]
        show_json({"query": options.query, "not": options.unwanted, "results": answers})
    else:
        for hit in hits:
            show(f"{hit.score:8.4f}  {printable(hit.path) if captions else shown(hit.path)}")
    return 0


def _search_index(options: argparse.Namespace) -> list[Hit]:
    from miniclip.search.query import embed_query
    from miniclip.search.update import check_model

    index = Index(options.index)
    settings = check_model(options.index, index.settings, options.model, options.activation)
    options.model, options.activation = settings.model, settings.activation
    if options.faiss:
        from miniclip.search import approximate

        approximate.check_installed()
    if not len(index):
        raise SearchError(f"{options.index} is empty; `miniclip index FOLDER -o {options.index}` adds to it")
    query = embed_query(*load_model(options), options.query, options.unwanted)
    (hits,) = approximate.search(index, query, options.top) if options.faiss else index.search(query, options.top)
    return hits


def _search_captions(options: argparse.Namespace) -> list[Hit]:
    from miniclip.embed import embed_texts
    from miniclip.search.exact import top_k
    from miniclip.search.query import embed_query

    if options.html or options.faiss:
        raise SearchError(f"{options.index} has captions; --html and --faiss are for an index of pictures")
    lines = options.index.read_text(encoding="utf-8").splitlines()
    captions = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not captions:
        raise SearchError(f"{options.index} has no lines; expected one caption in each line")
    options.model = options.model or DEFAULT_MODEL
    model, preprocess = load_model(options)
    query = embed_query(model, preprocess, options.query, options.unwanted)
    embeddings, faults = embed_texts(model, captions)
    if faults:
        raise SearchError(f"{options.index}: {next(iter(faults.values()))}")
    scores, rows = top_k([embeddings], query, options.top)
    return [Hit(score, captions[row]) for score, row in zip(scores[0].tolist(), rows[0].tolist(), strict=True)]
