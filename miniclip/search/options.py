"""`miniclip index` and `miniclip search`: their arguments, and what they print."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

from miniclip.search.index import APPROXIMATE, DEFAULT_MODEL, Hit, Index, SearchError, printable

UNWANTED = "words or a picture to stay away from: half its score is taken off (may be repeated: of several the mean)"


def add_index_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("inputs", nargs="+", type=Path, metavar="FOLDER", help="searched however deep; also pictures")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="INDEX", help="a directory of its own")
    parser.add_argument("--batch-size", type=positive, default=32, help="pictures at a time (default: 32)")
    parser.add_argument("--workers", type=positive, help="threads that decode pictures (default: one a core)")
    parser.add_argument("--faiss", action="store_true", help="also prepare approximate search (needs faiss)")
    parser.add_argument("--json", action="store_true")


def add_search_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("index", type=Path, metavar="INDEX", help="as `miniclip index` makes it; or captions, a .txt")
    parser.add_argument("query", nargs="+", metavar="QUERY", help="words, or a picture's file; of several the mean")
    parser.add_argument("--not", action="append", default=[], dest="unwanted", metavar="QUERY", help=UNWANTED)
    parser.add_argument("--top", type=positive, default=10, metavar="K", help="how many answers (default: 10)")
    parser.add_argument("--faiss", action="store_true", help="approximate: faster for millions; see `index --faiss`")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write the answers as a page of pictures")


def positive(number: str) -> int:
    """An argument's type."""
    if not number.isdecimal() or int(number) == 0:
        raise argparse.ArgumentTypeError(f"{number!r} is not a number from 1")
    return int(number)


def run_index(options: argparse.Namespace, dtype: object) -> int:
    """Returns the exit status; dtype: as load() takes it."""
    from miniclip.search.update import update_index

    if options.faiss:
        from miniclip.search import approximate

        approximate.check_installed()
    if "RANK" in os.environ:  # started by torchrun
        from miniclip.parallel import setup

        options.device = setup(options.device and options.device.type)
    try:
        report = update_index(
            options.output, options.inputs, options.model, activation=options.activation, device=options.device,
            dtype=dtype, batch_size=options.batch_size, workers=options.workers,
        )  # fmt: skip
    except KeyboardInterrupt:
        print(f"\nminiclip: interrupted; the same command goes on where {options.output} stands", file=sys.stderr)
        return 130
    if report is None:  # not the first of torchrun's processes
        return 0
    if options.json:
        print(json.dumps(report._asdict(), indent=2))
    else:
        _print_report(report, options.output)
    if options.faiss and report.pictures and not (options.output / APPROXIMATE).exists():  # it goes with every change
        approximate.build(Index(options.output))
    for fault in report.rejected:
        print(f"miniclip: {printable(fault)}", file=sys.stderr)
    if report.rejected:
        print(f"miniclip: {len(report.rejected)} files could not be used; the rest is indexed", file=sys.stderr)
    return 1 if report.rejected else 0


def _print_report(report, output: Path) -> None:
    counts = {"new": report.added - len(report.changed), "changed": len(report.changed), "moved": len(report.moved)}
    counts |= {"deleted": len(report.deleted), "unchanged": report.unchanged}
    done = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    rate = f", {report.added / report.seconds:.1f} images/s" if report.added else ""
    for old, new in report.moved:
        print(f"moved: {shown(old)} -> {shown(new)}")
    for path in report.deleted:
        print(f"deleted: {shown(path)}")
    print(f"{output}: {report.pictures} pictures ({done or 'nothing new'}) in {report.seconds:.1f} s{rate}")


def run_search(options: argparse.Namespace, load: Callable[[argparse.Namespace], tuple]) -> int:
    """Returns the exit status; load: gives the model and preprocessing that the options name."""
    from miniclip.search.query import is_picture

    for part in (*options.query, *options.unwanted):
        is_picture(part)  # complains of a picture that is not there, before a model is loaded
    if options.html and not options.html.absolute().parent.is_dir():
        raise SearchError(f"--html is {options.html}; there is no folder {options.html.parent}")
    captions = options.index.suffix == ".txt" and options.index.is_file()
    hits = _search_captions(options, load) if captions else _search_index(options, load)
    if options.html:
        from miniclip.search.gallery import write_gallery

        write_gallery(options.html, hits, options.query, options.unwanted)
        print(f"{len(hits)} pictures -> {options.html}", file=sys.stderr)
    if options.json:
        kind = "caption" if captions else "image"
        answers = [{"score": round(hit.score, 6), kind: hit.path} for hit in hits]
        print(json.dumps({"query": options.query, "not": options.unwanted, "results": answers}, indent=2))
    else:
        for hit in hits:
            print(f"{hit.score:8.4f}  {printable(hit.path) if captions else shown(hit.path)}")
    return 0


def _search_index(options: argparse.Namespace, load: Callable) -> list[Hit]:
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
    query = embed_query(*load(options), options.query, options.unwanted)
    (hits,) = approximate.search(index, query, options.top) if options.faiss else index.search(query, options.top)
    return hits


def _search_captions(options: argparse.Namespace, load: Callable) -> list[Hit]:
    from miniclip.embed import embed_texts
    from miniclip.search.exact import top_k
    from miniclip.search.query import embed_query

    if options.html or options.faiss:
        raise SearchError(f"{options.index} has captions; --html and --faiss are for an index of pictures")
    lines = options.index.read_text(encoding="utf-8").splitlines()
    captions = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not captions:
        raise SearchError(f"{options.index} has no lines; expected a caption a line")
    options.model = options.model or DEFAULT_MODEL
    model, preprocess = load(options)
    query = embed_query(model, preprocess, options.query, options.unwanted)
    embeddings, faults = embed_texts(model, captions)
    if faults:
        raise SearchError(f"{options.index}: {next(iter(faults.values()))}")
    scores, rows = top_k([embeddings], query, options.top)
    return [Hit(score, captions[row]) for score, row in zip(scores[0].tolist(), rows[0].tolist(), strict=True)]


def shown(path: str) -> str:
    """A path as a person would give it: relative, where that is shorter."""
    relative = os.path.relpath(path)
    return printable(path if relative.startswith(os.pardir) else relative)
