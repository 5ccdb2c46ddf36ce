"""Print how similar pictures and texts are: the cosines of their embeddings.

    miniclip similarity cat.jpg dog.jpg --text "a cat" --text "a dog"
    miniclip similarity photos --text "a sunset" --csv > sunset.csv
"""

from __future__ import annotations

import argparse

from miniclip.commands.options import add_csv, add_json, add_model, add_pictures, load_model, picture, with_option
from miniclip.commands.output import report_rejected, show, show_csv, show_json
from miniclip.errors import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pictures", nargs="+", type=picture, metavar="PICTURE", help="pictures, and folders of them")
    parser.add_argument("--text", action="append", metavar="TEXT", help="a text; may be repeated; one is needed")
    add_pictures(parser)
    add_model(parser)
    add_json(parser)
    add_csv(parser)


def run(options: argparse.Namespace) -> int:
    if not options.text:
        raise UsageError(f"there are no texts: miniclip similarity {with_option('--text', options.pictures, 'a dog')}")
    from miniclip.answers import find_pictures, text_embeddings
    from miniclip.embed import embed_images

    pictures = find_pictures(options.pictures, options.hidden)
    model, preprocess = load_model(options)
    texts = text_embeddings(model, options.text)
    images, faults = embed_images(model, preprocess, [picture.source for picture in pictures])
    used = [picture for i, picture in enumerate(pictures) if i not in faults]
    rows = list(zip(used, (images @ texts.T).tolist(), strict=True))
    if options.json:
        cosines = [dict(zip(options.text, row, strict=True)) for _, row in rows]
        show_json([{"image": picture.name, "cosines": row} for (picture, _), row in zip(rows, cosines, strict=True)])
    elif options.csv:
        show_csv(["picture", *options.text], ([str(picture), *row] for picture, row in rows))
    else:
        for picture, row in rows:
            lines = (f"{cosine:9.4f}  {text}" for cosine, text in zip(row, options.text, strict=True))
            show("\n".join([str(picture), *lines]))
    return report_rejected(list(faults.values()), len(pictures))
