"""Finding pictures by words: the nearest pictures of some texts, and how often the right ones are among the nearest.

If every picture has a name of its own: recall@k, the share of names whose picture is among their k nearest, and of
pictures whose name is among theirs (Karpathy & Fei-Fei 2015). Recall falls as pictures are added. If several pictures
share a name: precision@k, the share of a name's k nearest pictures that have it. `miniclip evaluate` measures data with
several captions for a picture.

The numbers below the pictures are cosines. They rank the pictures of one query. Cosines of different queries can't be
compared, because some texts are near to all pictures; and no cosine proves that a picture is right: the best one of a
query is typically 0.2 to 0.3.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from torch import Tensor

from miniclip.data.lists import DataError
from miniclip.embed import as_list, embed_texts
from miniclip.evaluation.draw import fold, frame, new_figure
from miniclip.evaluation.measures import precision, recall
from miniclip.evaluation.study import Study, picture_of
from miniclip.table import columns
from miniclip.zero_shot import zero_shot_weights

HITS, QUERIES = 8, 6  # pictures of a query, and queries if none are given


def measure(study: Study, templates: Sequence[str] = ("{}",), queries: Sequence[str] = (), seed: int = 0) -> dict:
    """templates: around the names of classes. queries: any texts; none: some classes that `seed` chooses."""
    weights = zero_shot_weights(study.model, study.classes, templates)  # [E, C]
    asked = list(as_list(queries)) or _some_classes(study, seed)
    if queries:
        texts, too_long = embed_texts(study.model, asked)
        if too_long:
            raise DataError("; ".join(too_long.values()))
    else:
        texts = weights.T[[study.classes.index(name) for name in asked]]
    searches = [_search(study, query, text) for query, text in zip(asked, texts, strict=True)]
    if len(study.targets.unique()) < len(study.targets):
        found = precision(study.images, weights, study.targets)
        return {"precision": {f"precision@{k}": value for k, value in found.items()}, "queries": searches}
    image_to_text, text_to_image = recall(study.images, weights.T[study.targets], list(range(len(study.images))))
    return {
        "text_to_image": {f"recall@{k}": value for k, value in text_to_image.items()},
        "image_to_text": {f"recall@{k}": value for k, value in image_to_text.items()},
        "queries": searches,
    }


def _some_classes(study: Study, seed: int) -> list[str]:
    there = [study.classes[i] for i in study.targets.unique().tolist()]
    return random.Random(seed).sample(there, min(QUERIES, len(there)))


def _search(study: Study, query: str, text: Tensor) -> dict:
    cosines, rows = (study.images @ text).topk(min(HITS, len(study.images)))
    hits = [
        {
            "picture": row,
            "image": study.examples[row].title,
            "name": study.classes[study.targets[row]],
            "cosine": cosine,
        }
        for row, cosine in zip(rows.tolist(), cosines.tolist(), strict=True)
    ]
    return {"query": query, "is_class": query in study.classes, "hits": hits}


def table(result: dict) -> str:
    ways = [way for way in ("text_to_image", "image_to_text", "precision") if way in result]
    rows = [[way.replace("_", " "), *(f"{value:.2%}" for value in result[way].values())] for way in ways]
    hits = [
        [row["query"], ", ".join(f"{hit['cosine']:.3f} {hit['name']}" for hit in row["hits"][:4])]
        for row in result["queries"]
    ]
    nearest = columns(["query", "nearest pictures and their cosines"], hits, left=2)
    return f"{columns(['', *result[ways[0]]], rows)}\n\n{nearest}"


def draw(result: dict, study: Study):
    """A row for each query, with the nearest pictures from left to right; right ones have a green frame."""
    queries = result["queries"]
    figure = new_figure(1.45 * (HITS + 1), 1.8 * len(queries) + 0.6)
    figure.get_layout_engine().set(h_pad=0.07)
    for query, axes in zip(queries, figure.subplots(len(queries), HITS + 1, squeeze=False), strict=True):
        for axis in axes:
            axis.set_axis_off()
        text = {"ha": "right", "va": "center", "fontsize": 12, "weight": "bold", "parse_math": False}
        axes[0].text(0.95, 0.5, fold(query["query"], 15), **text)
        for axis, hit in zip(axes[1:], query["hits"], strict=False):
            axis.set_axis_on()
            axis.imshow(picture_of(study.examples[hit["picture"]].image))
            right = query["is_class"] and hit["name"] == query["query"]
            frame(axis, "tab:green" if right else None)
            axis.set_xlabel(f"{hit['cosine']:.3f}\n{fold(hit['name'])}", fontsize=8, parse_math=False)
    green = "; green: the class of the query" if any(query["is_class"] for query in queries) else ""
    figure.suptitle(f"{study.name}: the nearest of {len(study.examples):,} pictures, and their cosines{green}")
    return figure
