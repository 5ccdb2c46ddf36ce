"""Find pictures in folders by words, or by another picture.

    python examples/search_photos.py "a guitar" [--folder PHOTOS ...] [--index DIR] [--model NAME_OR_PATH] [--top K]

The first time all pictures are embedded, which takes a while; after that only those that are new or changed.
"""

import argparse
from pathlib import Path

from miniclip import load
from miniclip.search import Index, embed_query, update_index

parser = argparse.ArgumentParser(description="Find pictures in folders by words, or by another picture.")
parser.add_argument("query", nargs="+", help='words, or the file of a picture; several are averaged: "a dog" "snow"')
parser.add_argument("--folder", nargs="+", type=Path, default=[Path(__file__).parent / "images"], metavar="PHOTOS")
parser.add_argument("--index", type=Path, default=Path("photos.index"), help="where the embeddings are kept")
parser.add_argument("--model", default="tiny-ViT", help="a name that `miniclip models` lists, or a file or directory")
parser.add_argument("--top", type=int, default=5)
args = parser.parse_args()

report = update_index(args.index, args.folder, args.model)
print(f"{report.pictures} pictures, {report.added} of them new")
for fault in report.rejected:
    print(f"left out: {fault}")

model, preprocess = load(args.model, device="cpu")
query = embed_query(model, preprocess, args.query)
(hits,) = Index(args.index).search(query, args.top)
for hit in hits:
    print(f"{hit.score:7.3f}  {hit.path}")
