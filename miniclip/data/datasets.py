"""Pictures with the names or captions that belong to them: published data sets, lists, and folders of pictures."""

from __future__ import annotations

import gzip
import re
from pathlib import Path

import numpy as np
from PIL import Image

from miniclip.data.cifar import CIFAR10, CIFAR100, Cifar, download_cifar, read_cifar
from miniclip.data.lists import DataError, Example, read_examples
from miniclip.data.mnist import download_mnist, read_mnist
from miniclip.data.sample import read_sample
from miniclip.weights.download import DownloadError

PUBLISHED = {"cifar10": CIFAR10, "cifar100": CIFAR100, "mnist": None}
NAMES = ("sample", *PUBLISHED)
SPLITS = ("train", "test")
ROOT = "~/.cache/miniclip"  # where published data sets are kept
IMAGENET_CLASSES = Path(__file__).with_name("imagenet_classes.txt.gz")


def read_dataset(
    spec: str | Path, root: str | Path | None = None, download: bool = False, split: str = "test"
) -> list[Example]:
    """Read a data set; of an example's captions the first is the name of its class.

    spec: "sample", the 240 drawings that ship; "cifar10", "cifar100" or "mnist", of which `split`, "train" or "test",
    is read from `root`, where it is as its authors publish it, after it was downloaded, if need be and `download` says
    so. Or a path: of a .json, .jsonl or .csv list (see `miniclip.data.batches`), or of a folder of one folder a class,
    as torchvision's ImageFolder reads them, the class named as its folder with spaces for underscores, or, if there are
    ImageNet's thousand (n01440764, ...), as OpenAI worded them. There every file below is taken for a picture, but for
    hidden ones; no picture of a list or folder is opened.

    root: the folder that holds cifar-10-batches-py, cifar-100-python or mnist (also torchvision's MNIST/raw), or is it;
    ROOT by default. DataError for whatever can't be read, DownloadError for what can't be had.
    """
    if split not in SPLITS:
        raise DataError(f"the split is {split!r}; expected train or test")
    if spec in PUBLISHED:
        return _read_published(str(spec), Path(root or ROOT).expanduser(), download, split)
    if split != "test":
        raise DataError(f"{spec} has no split {split!r}; only {', '.join(PUBLISHED)} have")
    if spec == "sample":
        return read_sample()
    path = Path(spec)
    if not path.is_dir():
        try:
            return read_examples(path)
        except (OSError, ValueError) as error:
            raise DataError(f"not a data set: {error}; expected {', '.join(NAMES)}, or a path") from error
    files = [file for file in sorted(path.glob("*/**/*")) if file.is_file()]
    visible = [file for file in files if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    if not visible:
        raise DataError(f"{path} holds no pictures; expected {path}/CLASS NAME/PICTURE, or a .json list")
    folders = [file.relative_to(path).parts[0] for file in visible]
    names = _folder_names(sorted(set(folders)))
    return [Example(file, (names[folder],)) for file, folder in zip(visible, folders, strict=True)]


def _folder_names(folders: list[str]) -> dict[str, str]:
    """What the classes are called whose folders these are. ImageNet's labels number its folders in sorted order."""
    if len(folders) == 1000 and all(re.fullmatch(r"n\d{8}", folder) for folder in folders):
        return dict(zip(folders, imagenet_classes(), strict=True))
    return {folder: folder.replace("_", " ") for folder in folders}


def _read_published(name: str, root: Path, download: bool, split: str) -> list[Example]:
    cifar = PUBLISHED[name]
    try:
        return _cifar(name, cifar, root, download, split) if cifar else _mnist(root, download, split)
    except DownloadError:
        raise
    except (OSError, ValueError) as error:
        hint = "" if download else f"; --data-root says where it is, if not in {root}"
        raise DataError(f"{error}{hint}") from error


def _cifar(name: str, cifar: Cifar, root: Path, download: bool, split: str) -> list[Example]:
    folder = root if root.name == cifar.folder else root / cifar.folder
    if download:
        download_cifar(folder, cifar)
    pixels, names = read_cifar(folder, split, cifar)
    pictures = np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))
    return [
        Example(Image.fromarray(picture), (label,), cifar.categories[label], f"{name} {split} {number}")
        for number, (picture, label) in enumerate(zip(pictures, names, strict=True))
    ]


def _mnist(root: Path, download: bool, split: str) -> list[Example]:
    places = (root, root / "mnist", root / "MNIST" / "raw")
    folder = next((place for place in places if any(place.glob("t10k-*"))), root / "mnist")
    if download:
        download_mnist(folder)
    pictures, labels = read_mnist(folder, split)
    return [
        Example(Image.fromarray(picture), (str(label),), None, f"mnist {split} {number}")
        for number, (picture, label) in enumerate(zip(pictures, labels, strict=True))
    ]


def read_classes(*specs: str | Path) -> list[str]:
    """The names of classes, each once: the lines of a .txt file, or what the pictures of a data set are called.

    "imagenet": see `imagenet_classes`. Of several, the names that are in all of them, in the order of the first.
    """
    first, *others = (_classes(spec) for spec in specs)
    shared = set(first).intersection(*others)
    return [name for name in dict.fromkeys(first) if name in shared]


def imagenet_classes() -> list[str]:
    """ImageNet's 1,000 classes as OpenAI worded them, in the order of their labels.

    Two names occur twice, "missile" (657, 744) and "sunglasses" (836, 837): as names they are 998 classes, and what
    tells such two apart by their labels is up to 0.2% lower.
    """
    return gzip.decompress(IMAGENET_CLASSES.read_bytes()).decode().splitlines()


def _classes(spec: str | Path) -> list[str]:
    if str(spec) == "imagenet":
        return imagenet_classes()
    path = Path(spec)
    if path.suffix != ".txt":
        return class_names(read_dataset(spec))
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise DataError(f"can't read the classes in {path}: {error}") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def class_names(examples: list[Example]) -> list[str]:
    """The names of the examples, each once, in order."""
    return list(dict.fromkeys(example.captions[0] for example in examples))
