"""How pictures and texts lie in the embedding space: which are near each other, and the gap between pictures and texts.

- Mean cosines within a class and between classes, and of pictures with their own text and with others. (If every class
  has one picture, categories take the place of classes.) The difference of two such means matters, not their height:
  CLIP's cosines of pictures with their own texts are typically 0.2 to 0.3, and those of any two pictures are often
  higher. A cosine is neither a probability nor a percentage of similarity.
- The modality gap (Liang et al. 2022, "Mind the Gap"): the distance between the centroid of the images' unit embeddings
  and that of the texts', in 0..2. It does not affect retrieval, because it shifts all cosines of pictures with texts
  alike; but cosines between pictures can't be compared with cosines between a picture and a text.
- The projection shows the first two principal components of both together, a few percent of the variance of 256 to
  1,024 dimensions. Points that are apart in it are apart; points that are close need not be. The first component often
  is the gap.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from miniclip.evaluation.draw import new_figure, open_frame
from miniclip.evaluation.study import Study
from miniclip.table import columns
from miniclip.zero_shot import zero_shot_weights

DRAWN = 1000  # the most pictures, and the most texts, in the projection and the histograms
BINS = 80
COLOURS = ("tab:blue", "lightsteelblue", "tab:orange", "navajowhite", "tab:green", "silver")  # of the histograms
KIND_COLOURS = ("C0", "C1", "C2", "C3", "C4", "C5", "C6", "C8", "C9", "black")  # C7 is grey


class Space(NamedTuple):
    """Pictures, one text for each of their names, and the groups of both: the names, or their categories."""

    images: Tensor  # [N, E]
    texts: Tensor  # [M, E]
    owner: Tensor  # int64 [N], each picture's text
    names: list[str]  # M
    sort: tuple[str, str]  # what a group is called, and several: ("category", "categories")
    kinds: list[str]
    image_kinds: Tensor  # int64 [N]
    text_kinds: Tensor  # int64 [M]


def measure(study: Study, templates: Sequence[str] = ("{}",), seed: int = 0) -> dict:
    """templates: for the texts, one for each class that has pictures. seed: which pictures and texts are drawn."""
    space = read_space(study, templates)
    images, texts = space.images, space.texts
    cosines = (
        *class_similarity(images, space.image_kinds),
        *class_similarity(texts, space.text_kinds),
        *pair_similarity(images, texts, space.owner),
    )
    one, several = space.sort
    pairs = (f"pictures of one {one}", f"pictures of different {several}", f"texts of one {one}",
             f"texts of different {several}", "a picture and its text", "a picture and another text")  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    rows, text_rows = (torch.randperm(len(x), generator=generator)[:DRAWN] for x in (images, texts))
    edges, heights = _histograms(space, rows, text_rows)
    places, explained = projection(images, texts)
    return {
        "texts": len(texts),
        "cosines": [
            {"pair": pair, "mean": mean, "histogram": histogram, "colour": colour}
            for pair, mean, histogram, colour in zip(pairs, cosines, heights, COLOURS, strict=True)
        ],
        "histogram_edges": edges,
        "modality_gap": modality_gap(images, texts),
        "centroid_length": {"pictures": images.mean(0).norm().item(), "texts": texts.mean(0).norm().item()},
        "explained": explained,
        "pictures_drawn": _points(space, places[rows], space.image_kinds[rows], space.owner[rows]),
        "texts_drawn": _points(space, places[len(images) :][text_rows], space.text_kinds[text_rows], text_rows),
    }


def read_space(study: Study, templates: Sequence[str]) -> Space:
    """The groups are categories only if every class has a single picture, and so no pair within it."""
    there, owner = study.targets.unique(return_inverse=True)
    names = [study.classes[i] for i in there.tolist()]
    texts = zero_shot_weights(study.model, names, templates).T
    sorted_by, sort = {example.captions[0]: example.category for example in study.examples}, ("category", "categories")
    if None in sorted_by.values() or len(study.images) > len(names):
        sorted_by, sort = {name: name for name in names}, ("class", "classes")
    kinds = sorted(set(sorted_by.values()))
    text_kinds = torch.tensor([kinds.index(sorted_by[name]) for name in names])
    return Space(study.images, texts, owner, names, sort, kinds, text_kinds[owner], text_kinds)


def class_similarity(vectors: Tensor, classes: Tensor) -> tuple[float | None, float | None]:
    """The mean cosine of two different vectors of one class, and of two classes; None where there is no such pair.

    vectors: [N, E], of unit length; classes: int64 [N]. The pairs are not formed: the cosines of all ordered pairs of n
    different unit vectors add up to |sum of the vectors|^2 - n.
    """
    vectors = vectors.double()
    counts = classes.bincount().double()
    sums = torch.zeros(len(counts), vectors.shape[1], dtype=torch.float64).index_add_(0, classes, vectors)
    within, all_pairs = (sums**2).sum() - len(vectors), (sums.sum(0) ** 2).sum() - len(vectors)
    pairs_within, pairs = (counts * (counts - 1)).sum(), len(vectors) * (len(vectors) - 1)
    return _ratio(within, pairs_within), _ratio(all_pairs - within, pairs - pairs_within)


def pair_similarity(images: Tensor, texts: Tensor, owner: Tensor) -> tuple[float, float | None]:
    """The mean cosine of images [N, E] with their own text, and with the others' of texts [M, E]; owner: int64 [N]."""
    images, texts = images.double(), texts.double()
    own = (images * texts[owner]).sum()
    every = images.sum(0) @ texts.sum(0)
    return own.item() / len(images), _ratio(every - own, torch.tensor(len(images) * (len(texts) - 1)))


def _ratio(total: Tensor, count: Tensor) -> float | None:
    return (total / count).item() if count > 0 else None


def modality_gap(images: Tensor, texts: Tensor) -> float:
    """The distance between the centroids of unit vectors [N, E] and [M, E], in 0..2."""
    return (images.double().mean(0) - texts.double().mean(0)).norm().item()


def projection(images: Tensor, texts: Tensor) -> tuple[Tensor, list[float]]:
    """All vectors on the first two principal components, float64 [N + M, 2], and the components' shares of variance.

    Images and texts have the same total weight, however many there are of each. The sign of a component is arbitrary;
    here its largest weight is positive.
    """
    vectors = torch.cat([images, texts]).double()
    weight = torch.cat([torch.full((len(x), 1), 0.5 / len(x), dtype=torch.float64) for x in (images, texts)])
    vectors = vectors - (weight * vectors).sum(0)
    variance, axes = torch.linalg.eigh(vectors.T @ (weight * vectors))  # ascending
    axes = axes[:, [-1, -2]]
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    return vectors @ axes, (variance[[-1, -2]] / variance.sum()).tolist()


def _histograms(space: Space, rows: Tensor, text_rows: Tensor) -> tuple[list[float], list[list[float] | None]]:
    """The densities of the cosines of each kind of pair, with the same edges; None where there is no such pair."""
    images, texts = space.images[rows], space.texts[text_rows]
    values = []
    for vectors, kinds in ((images, space.image_kinds[rows]), (texts, space.text_kinds[text_rows])):
        cosines, alike = vectors @ vectors.T, kinds[:, None] == kinds
        values += [cosines[alike & ~torch.eye(len(vectors), dtype=torch.bool)], cosines[~alike]]
    cosines, own = images @ texts.T, space.owner[rows][:, None] == text_rows
    values += [cosines[own], cosines[~own]]
    every = torch.cat(values)
    edges = torch.linspace(every.min().item(), every.max().item(), BINS + 1)
    densities = [torch.histogram(part, edges, density=True).hist.tolist() if len(part) else None for part in values]
    return edges.tolist(), densities


def _points(space: Space, places: Tensor, kinds: Tensor, names: Tensor) -> list[dict]:
    return [
        {"x": x, "y": y, "kind": space.kinds[kind], "name": space.names[name]}
        for (x, y), kind, name in zip(places.tolist(), kinds.tolist(), names.tolist(), strict=True)
    ]


def table(result: dict) -> str:
    rows = [[row["pair"], "no such pair" if row["mean"] is None else f"{row['mean']:.3f}"] for row in result["cosines"]]
    length, shown = result["centroid_length"], " and ".join(f"{part:.1%}" for part in result["explained"])
    gap = f"{result['modality_gap']:.3f}, between the centroids of the pictures and of {result['texts']:,} texts"
    return "\n".join([
        columns(["mean cosine of", ""], rows), "",
        f"modality gap: {gap}",
        f"centroids' lengths (1 if all are equal): pictures {length['pictures']:.3f}, texts {length['texts']:.3f}",
        f"the two components have {shown} of the variance",
    ])  # fmt: skip


def draw(result: dict, study: Study):
    """A histogram of the cosines of each kind of pair; and the projection of pictures and texts."""
    figure = new_figure(13.5, 7)
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.3))
    _draw_histograms(left, result)
    _draw_plane(right.subplots(), result)
    sizes = f"{len(study.examples):,} pictures, {result['texts']:,} texts"
    figure.suptitle(f"{study.name}: {sizes}; modality gap {result['modality_gap']:.2f}")
    return figure


def _draw_histograms(figure, result: dict) -> None:
    shown = [row for row in result["cosines"] if row["histogram"]]
    axes = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
    for axis, row in zip(axes, shown, strict=True):
        axis.stairs(row["histogram"], result["histogram_edges"], fill=True, color=row["colour"])
        axis.axvline(row["mean"], color="black", linewidth=1)
        axis.set_title(f"{row['pair']}: mean {row['mean']:.3f}", fontsize=10, loc="left")
        axis.set_yticks([])
        axis.spines[["top", "right", "left"]].set_visible(False)
    axes[-1].set_xlabel("cosine")


def _draw_plane(axis, result: dict) -> None:
    """Pictures as dots, texts as hollow squares, joined to their pictures; the largest groups in colours."""
    pictures, texts = result["pictures_drawn"], result["texts_drawn"]
    counts = Counter(point["kind"] for point in pictures)
    large = sorted((kind for kind in counts if counts[kind] > 1), key=lambda kind: (-counts[kind], kind))
    colours = dict(zip(large, KIND_COLOURS, strict=False))
    text_of = {point["name"]: point for point in texts}
    for picture in pictures:
        if text := text_of.get(picture["name"]):
            ends = [picture["x"], text["x"]], [picture["y"], text["y"]]
            axis.plot(*ends, color=colours.get(picture["kind"], "lightgrey"), linewidth=0.5, zorder=0)
    for points, marker, other in ((pictures, "o", "C0"), (texts, "s", "C1")):
        edges = [colours.get(point["kind"], "lightgrey" if large else other) for point in points]
        style = {"marker": marker, "s": 24, "edgecolor": edges, "facecolor": edges if marker == "o" else "white"}
        axis.scatter([point["x"] for point in points], [point["y"] for point in points], **style)
    others = {"other kinds": "lightgrey"} if len(counts) > len(colours) else {}
    for label, colour in ((colours | others) if large else {"a picture": "C0", "a text": "C1"}).items():
        axis.scatter([], [], s=24, color=colour, label=label)
    first, second = result["explained"]
    axis.set(xlabel=f"first component, {first:.1%} of the variance", ylabel=f"second component, {second:.1%}")
    axis.set(aspect="equal", adjustable="datalim")
    axis.set_title("dots: pictures; squares: their texts", fontsize=10)
    open_frame(axis)
    axis.legend(fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=5)
