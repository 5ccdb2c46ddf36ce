"""Finding pictures by words: the nearest pictures of some texts, and how often the right one is among the nearest.

Recall@k of pictures that have a name each: the share of names whose picture is among their k nearest, and of pictures
whose name is among theirs (Karpathy & Fei-Fei 2015). The more pictures there are to search, the lower it is. Where
several pictures share a name: precision@k, the share of a name's k nearest pictures that have it. `miniclip evaluate`
has the recall of data with several captions.

The numbers under the pictures are cosines. They rank the pictures of one query; between queries they say little, since
some texts are near to everything, and there is no cosine above which a picture is right: 0.2 to 0.3 is a typical best.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from miniclip.data.lists import DataError
from miniclip.embed import embed_texts
from miniclip.evaluation.experiments.common import Study, columns, fold, frame, picture_of
from miniclip.evaluation.retrieval import recall
from miniclip.zero_shot import zero_shot_weights

HITS, QUERIES = 8, 6  # pictures of a query, and queries if none are given
KS = (1, 5, 10)


def measure(study: Study, templates: Sequence[str] = ("{}",), queries: Sequence[str] = (), seed: int = 0) -> dict:
    """templates: around the names of classes. queries: any texts; none: some classes that `seed` chooses."""
    weights = zero_shot_weights(study.model, study.classes, templates)  # [E, C]
    asked = list(queries) or _some_classes(study, seed)
    if queries:
        texts, too_long = embed_texts(study.model, asked)
        if too_long:
            raise DataError("; ".join(too_long.values()))
    else:
        texts = weights.T[[study.classes.index(name) for name in asked]]
    searches = [_search(study, query, text) for query, text in zip(asked, texts, strict=True)]
    if len(study.targets.unique()) < len(study.targets):
        return {"precision": {f"precision@{k}": x for k, x in precision(study, weights).items()}, "queries": searches}
    image_to_text, text_to_image = recall(study.images, weights.T[study.targets], torch.arange(len(study.images)), KS)
    return {
        "text_to_image": {f"recall@{k}": value for k, value in text_to_image.items()},
        "image_to_text": {f"recall@{k}": value for k, value in image_to_text.items()},
        "queries": searches,
    }


def _some_classes(study: Study, seed: int) -> list[str]:
    there = [study.classes[i] for i in study.targets.unique().tolist()]
    return random.Random(seed).sample(there, min(QUERIES, len(there)))


def precision(study: Study, weights: Tensor, ks: Sequence[int] = KS) -> dict[int, float]:
    """For each k the share of right ones among the k pictures nearest to a class, in the mean of classes with pictures.

    Of a class with fewer pictures than k it can't be 1.
    """
    nearest = (weights.T @ study.images.T).topk(min(max(ks), len(study.images)), dim=1).indices
    own = study.targets[nearest] == torch.arange(len(study.classes))[:, None]
    own = own[study.targets.unique()].double()
    return {k: own[:, :k].mean().item() for k in ks}


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
    rows = [[way.replace("_", " "), *map(_percent, result[way].values())] for way in ways]
    lines = [columns(["", *result[ways[0]]], rows)]
    lines.append("\nthe nearest pictures, and their cosines:")
    width = max(len(row["query"]) for row in result["queries"])
    for row in result["queries"]:
        hits = ", ".join(f"{hit['cosine']:.3f} {hit['name']}" for hit in row["hits"][:4])
        lines.append(f"{row['query']:{width}}  {hits}")
    return "\n".join(lines)


def _percent(value: float) -> str:
    return f"{value:.2%}"


def draw(result: dict, study: Study):
    """A row a query, the nearest pictures from left to right; a green frame around the class that was asked for."""
    from matplotlib.figure import Figure

    queries = result["queries"]
    figure = Figure(figsize=(1.45 * (HITS + 1), 1.8 * len(queries) + 0.6), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.07)
    for query, axes in zip(queries, figure.subplots(len(queries), HITS + 1, squeeze=False), strict=True):
        for axis in axes:
            axis.set_axis_off()
        text = {"ha": "right", "va": "center", "fontsize": 12, "weight": "bold", "parse_math": False}
        axes[0].text(0.95, 0.5, fold(query["query"], 15), **text)
        for axis, hit in zip(axes[1:], query["hits"], strict=False):
            axis.set_axis_on()
            axis.imshow(picture_of(study.examples[hit["picture"]]))
            right = query["is_class"] and hit["name"] == query["query"]
            frame(axis, "tab:green" if right else None)
            axis.set_xlabel(f"{hit['cosine']:.3f}\n{fold(hit['name'])}", fontsize=8, parse_math=False)
    green = "; in green: what was asked for" if any(query["is_class"] for query in queries) else ""
    figure.suptitle(f"{study.name}: the nearest of {len(study.examples):,} pictures, and their cosines{green}")
    return figure
