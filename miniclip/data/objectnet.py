"""ObjectNet's 313 classes (Barbu et al., 2019): its folders, their labels, and the 113 that ImageNet has too.

The robustness figures of CLIP's paper and blog post are of these 113. Each picture of ObjectNet has a red border of two
pixels, which is not cut off here.
"""

from __future__ import annotations

import gzip
from collections.abc import Collection
from functools import cache
from pathlib import Path

FILE = Path(__file__).with_name("objectnet_classes.txt.gz")  # lines: folder, label, "shared" or ""
SETS = {"objectnet": "shared", "objectnet-313": ""}  # what `objectnet_classes` takes


@cache
def _rows() -> list[tuple[str, str, str]]:
    return [tuple(line.split("\t")) for line in gzip.decompress(FILE.read_bytes()).decode().splitlines()]


def objectnet_classes(name: str = "objectnet") -> list[str]:
    """The labels of one of SETS in lower case, in the order of their folders: the 113 shared with ImageNet, or all."""
    return [label.lower() for _, label, shared in _rows() if SETS[name] in shared]


def names_of_folders(folders: Collection[str], stated: str | None = None) -> dict[str, str] | None:
    """The label of each folder that ImageNet has too, if the folders are ObjectNet's 313 or these 113; else None.

    stated: one of SETS says that folders of it are ObjectNet's, even if there are fewer: otherwise "tape" or "button"
    may be a class of any data set. With "objectnet-313" no folder is left out.
    """
    rows = {folder: (label.lower(), shared) for folder, label, shared in _rows()}
    of_113 = {folder for folder, (_, shared) in rows.items() if shared}
    found = set(folders)
    if not (found in (of_113, rows.keys()) or (stated and rows.keys() >= found)):
        return None
    return {folder: rows[folder][0] for folder in found if SETS[stated or "objectnet"] in rows[folder][1]}
