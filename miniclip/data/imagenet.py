"""ImageNet's 1,000 classes: their WordNet ids, OpenAI's wording, and the 200 classes of ImageNet-A and of ImageNet-R.

Folders of pictures name the classes by id ("n02504458": ImageNet, ImageNet-A, -R and -Sketch) or by label ("386":
ImageNet-V2). Neither is a prompt; `names_of_folders` gives the words.
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Collection
from functools import cache
from pathlib import Path

FILE = Path(__file__).with_name("imagenet_classes.txt.gz")  # lines: id, wording, subsets ("", "A", "AR")
SETS = {"imagenet": "", "imagenet-a": "A", "imagenet-r": "R"}  # what `imagenet_classes` takes


@cache
def _rows() -> list[tuple[str, str, str]]:
    return [tuple(line.split("\t")) for line in gzip.decompress(FILE.read_bytes()).decode().splitlines()]


def imagenet_classes(name: str = "imagenet") -> list[str]:
    """The classes of one of SETS as OpenAI worded them, in the order of their labels.

    Two names occur twice among the 1,000, "missile" (657, 744) and "sunglasses" (836, 837): as names they are 998
    classes, and accuracies that tell such two apart by their labels are up to 0.2% lower.
    """
    return [wording for _, wording, subsets in _rows() if SETS[name] in subsets]


def names_of_folders(folders: Collection[str], labels: bool = False) -> dict[str, str] | None:
    """The wording of each class, if all folders are ImageNet's ids, or if they are its labels, "0" to "999"; else None.

    A part of the labels is not enough, unless `labels` says that numbers are ImageNet's labels: "0" to "9" may be the
    classes of any data set.
    """
    by_id = {identifier: wording for identifier, wording, _ in _rows()}
    by_label = {str(label): wording for label, (_, wording, _) in enumerate(_rows())}
    are_labels = by_label.keys() >= set(folders) and (labels or len(set(folders)) == len(by_label))
    known = by_label if are_labels else by_id
    return {folder: known[folder] for folder in folders} if known.keys() >= set(folders) else None


def look_like_ids(names: Collection[str]) -> bool:
    """Whether names of classes are ids: a WordNet id among them, or all numbers, and not just the digits."""
    if any(re.fullmatch(r"n\d{8}", name) for name in names):
        return True
    return all(name.isdecimal() for name in names) and (len(names) > 10 or any(len(name) > 1 for name in names))
