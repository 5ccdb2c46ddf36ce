"""Find the pictures that are nearest to words or pictures: in an index, or in a folder without one, which takes longer.

In a .txt file, lines are found instead. Several queries are averaged. The score is a cosine.

    miniclip search photos.index "a dog in the snow" --not "people" --html dogs.html
    miniclip search examples/images "a guitar" --model tiny-ViT
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from miniclip.commands.index import MODEL
from miniclip.commands.options import add_json, add_model, add_pictures, load_model, output_file, path, positive
from miniclip.commands.output import complain, report_rejected, show, show_json, shown
from miniclip.errors import UsageError
from miniclip.io import printable
from miniclip.search.index import DEFAULT_MODEL, Hit, Index, SearchError

if TYPE_CHECKING:
    from torch import Tensor

    from miniclip.models import CLIP

INDEX = "an index of `miniclip index`, a folder of pictures, or a .txt file with a caption in each line"
UNWANTED = "words or a picture to stay away from: half of its score is subtracted; may be repeated"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("index", type=path, metavar="INDEX", help=INDEX)
    parser.add_argument("query", nargs="+", metavar="QUERY", help="words, or a picture's file")
    parser.add_argument("--not", action="append", default=[], dest="unwanted", metavar="QUERY", help=UNWANTED)
    parser.add_argument("--top", type=positive, default=10, metavar="K", help="number of answers (default: 10)")
    parser.add_argument("--faiss", action="store_true", help="approximate: faster for millions; see `index --faiss`")
    parser.add_argument("--html", type=output_file, metavar="FILE", help="also write the answers as a page of pictures")
    add_pictures(parser)
    add_model(parser, None, MODEL, resize=False)  # for another size: `miniclip convert`, then name the new file
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    from miniclip.search.query import is_picture

    for part in (*options.query, *options.unwanted):
        is_picture(part)  # raises SearchError for a picture that is not there, before a model is loaded
    if not options.index.exists() and (places := [part for part in options.query if Path(part).is_dir()]):
        right = shlex.join([places[0], str(options.index), *(part for part in options.query if part != places[0])])
        raise UsageError(f"there is no {options.index}; the index or folder comes first: miniclip search {right}")
    captions = options.index.suffix == ".txt" and options.index.is_file()
    folder = options.index.is_dir() and not (options.index / "index.json").exists()
    search = _search_captions if captions else _search_folder if folder else _search_index
    hits = search(options)
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


def _query(model: CLIP, preprocess: Callable, options: argparse.Namespace) -> Tensor:
    """The query as one vector, on the model's device, where it is searched for."""
    from miniclip.search.query import embed_query

    return embed_query(model, preprocess, options.query, options.unwanted).to(model.logit_scale.device)


def _search_index(options: argparse.Namespace) -> list[Hit]:
    from miniclip.search.update import check_model

    index = Index(options.index)
    settings = check_model(options.index, index.settings, options.model, options.activation)
    options.model, options.activation = settings.model, settings.activation
    if options.faiss:
        from miniclip.search import approximate

        approximate.check_installed()
    if not len(index):
        raise SearchError(f"{options.index} is empty; `miniclip index FOLDER -o {options.index}` adds to it")
    options.upright = options.upright or index.settings.upright
    query = _query(*load_model(options), options)
    (hits,) = approximate.search(index, query.cpu(), options.top) if options.faiss else index.search(query, options.top)
    return hits


def _search_folder(options: argparse.Namespace) -> list[Hit]:
    """The pictures of a folder, all embedded now. What can't be used is reported."""
    from miniclip.data.pictures import scan
    from miniclip.embed import embed_images
    from miniclip.search.exact import top_k

    if options.faiss:
        raise SearchError(f"{options.index} is a folder; --faiss is for an index: `miniclip index --faiss`")
    found = scan([options.index], options.hidden)
    if not found.pictures:
        raise SearchError(f"{options.index} is not an index, and there are no pictures in it")
    options.model = options.model or DEFAULT_MODEL
    model, preprocess = load_model(options)
    query = _query(model, preprocess, options)
    embeddings, faults = embed_images(model, preprocess, list(found.pictures))
    report_rejected([*found.faults.values(), *faults.values()], len(found.pictures) + len(found.faults))
    paths = [picture for i, picture in enumerate(found.pictures) if i not in faults]
    scores, rows = top_k([embeddings], query, options.top)
    return [Hit(score, paths[row]) for score, row in zip(scores[0].tolist(), rows[0].tolist(), strict=True)]


def _search_captions(options: argparse.Namespace) -> list[Hit]:
    from miniclip.data.text import read_lines
    from miniclip.embed import embed_texts
    from miniclip.search.exact import top_k

    if options.html or options.faiss:
        raise SearchError(f"{options.index} has captions; --html and --faiss are for an index of pictures")
    captions = list(dict.fromkeys(filter(None, read_lines(options.index))))
    if not captions:
        raise SearchError(f"{options.index} has no lines; expected one caption in each line")
    options.model = options.model or DEFAULT_MODEL
    model, preprocess = load_model(options)
    query = _query(model, preprocess, options)
    embeddings, faults = embed_texts(model, captions)
    if faults:
        raise SearchError(f"{options.index}: {next(iter(faults.values()))}")
    scores, rows = top_k([embeddings], query, options.top)
    return [Hit(score, captions[row]) for score, row in zip(scores[0].tolist(), rows[0].tolist(), strict=True)]
