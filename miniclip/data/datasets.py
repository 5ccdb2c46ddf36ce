"""Pictures with the names or captions that belong to them: published data sets, lists, and folders of pictures."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from PIL import Image

from miniclip.data.cifar import CIFAR10, CIFAR100, Cifar, download_cifar, read_cifar
from miniclip.data.imagenet import SETS, imagenet_classes, look_like_ids, names_of_folders
from miniclip.data.lists import Example, read_examples
from miniclip.data.mnist import download_mnist, read_mnist
from miniclip.data.objectnet import SETS as OBJECTNET
from miniclip.data.objectnet import names_of_folders as objectnets_names
from miniclip.data.objectnet import objectnet_classes
from miniclip.data.pictures import scan
from miniclip.data.sample import read_sample
from miniclip.data.text import DataError, read_lines
from miniclip.errors import MiniclipWarning

PUBLISHED = {"cifar10": CIFAR10, "cifar100": CIFAR100, "mnist": None}
NAMES = ("sample", *PUBLISHED)
SPLITS = ("train", "test")
ROOT = "~/.cache/miniclip"  # where published data sets are kept


def read_dataset(
    spec: str | Path,
    root: str | Path | None = None,
    download: bool = False,
    split: str = "test",
    imagenet: bool = False,
    hidden: bool = False,
    objectnet: str | None = None,
) -> list[Example]:
    """Read a data set; of an example's captions the first is the name of its class.

    spec: one of
        "sample"    the 240 drawings that come with miniclip
        "cifar10", "cifar100", "mnist"    as their authors publish them, in `root`; `split` is "train" or "test".
                    With `download` they are downloaded if they are missing. Also the path of the CIFARs' own folders
        a path      of a .json, .jsonl or .csv list (see `miniclip.data.lists`), or of a folder with one folder for each
                    class, as torchvision's ImageFolder reads them (which files are pictures: `miniclip.data.pictures`).
                    The name of a class is that of its folder, with spaces for underscores. Folders that are ImageNet's
                    ids or labels are named as OpenAI worded the classes (see `data.imagenet`). Of ObjectNet's 313
                    folders the 113 are read that ImageNet has too (see `data.objectnet`)
    No picture of a list or folder is opened.

    root: the folder that holds cifar-10-batches-py, cifar-100-python or mnist (also torchvision's MNIST/raw), or one of
    these folders; ROOT by default.
    imagenet: folders with numbers for names are ImageNet's labels, even if there are fewer than 1,000.
    objectnet: "objectnet" says that folders are some of ObjectNet's 113, "objectnet-313" some of all.
    hidden: take hidden files and folders too, see `miniclip.data.pictures`.

    DataError for what can't be read, DownloadError for a failed download. A MiniclipWarning says which wording folders
    were named in, and which were left out, and warns of names that look like ids.
    """
    if split not in SPLITS:
        raise DataError(f"the split is {split!r}; expected train or test")
    published = {cifar.folder: name for name, cifar in PUBLISHED.items() if cifar}.get(Path(spec).name)
    if published:
        spec, root = published, spec
    if spec in PUBLISHED:
        return _read_published(str(spec), Path(root or ROOT).expanduser(), download, split)
    if split != "test":
        raise DataError(f"{spec} has no split {split!r}; only {', '.join(PUBLISHED)} have")
    if spec == "sample":
        return read_sample()
    path = Path(spec).expanduser()
    if not path.exists():
        raise DataError(f"{spec} is not a data set; expected {', '.join(NAMES)}, or the path of a list or folder")
    examples = read_folder(path, imagenet, hidden, objectnet) if path.is_dir() else read_examples(path)
    _warn_of_ids(class_names(examples), path)
    return examples


def _warn_of_ids(names: list[str], path: Path) -> None:
    if look_like_ids(names):
        text = f"the classes of {path} look like ids ({', '.join(names[:3])}, ...)"
        warnings.warn(f"{text}: name them in words, as ids are no prompts that a model knows", MiniclipWarning, 3)


def read_folder(
    path: Path, imagenet: bool = False, hidden: bool = False, objectnet: str | None = None
) -> list[Example]:
    """The pictures in a folder with one folder for each class, as of `read_dataset`; what is left out is warned of.

    hidden: take hidden files and folders too, see `miniclip.data.pictures`.
    """
    found = scan([path], hidden)
    folders = {Path(file): Path(file).relative_to(path).parts for file in found.pictures}
    folders = {file: parts[0] for file, parts in folders.items() if len(parts) > 1}
    reasons = "; ".join(filter(None, [*found.faults.values(), found.summary()]))
    if not folders:
        what = "no folders of pictures" if found.pictures else "no pictures"
        why = f" ({reasons:.500})" if reasons else ""
        raise DataError(f"{path} has {what}{why}; expected {path}/CLASS NAME/PICTURE, or a .json list")
    if reasons:
        warnings.warn(f"{path}: {reasons:.500}", MiniclipWarning, stacklevel=3)
    names = _wording(path, set(folders.values()), imagenet, objectnet)
    return [Example(file, (names[folder],)) for file, folder in folders.items() if folder in names]


def _wording(path: Path, folders: set[str], imagenet: bool, objectnet: str | None) -> dict[str, str]:
    """The name of each class by its folder, without folders that are left out. A warning says which wording it is."""
    first = min(folders)
    if names := names_of_folders(folders, imagenet):
        text = f"its {len(names)} folders are ImageNet's classes, in OpenAI's wording: {first} is {names[first]!r}"
    elif names := objectnets_names(folders, objectnet):
        text = f"its {len(folders)} folders are ObjectNet's classes, in ObjectNet's wording"
        if left_out := len(folders) - len(names):
            text += f"; the {left_out} that ImageNet lacks are left out (objectnet-313 as classes takes them)"
    else:
        return {folder: folder.replace("_", " ") for folder in folders}
    warnings.warn(f"{path}: {text}", MiniclipWarning, stacklevel=4)
    return names


def _read_published(name: str, root: Path, download: bool, split: str) -> list[Example]:
    cifar = PUBLISHED[name]
    try:
        return _cifar(name, cifar, root, download, split) if cifar else _mnist(root, download, split)
    except DataError as error:
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

    specs: also "imagenet", "imagenet-a" and "imagenet-r", see `imagenet_classes`, "objectnet" and "objectnet-313", see
    `objectnet_classes`. Several specs: the names that all of them have, in the order of the first.
    """
    first, *others = (_classes(spec) for spec in specs)
    shared = set(first).intersection(*others)
    return [name for name in dict.fromkeys(first) if name in shared]


def _classes(spec: str | Path) -> list[str]:
    if str(spec) in SETS:
        return imagenet_classes(str(spec))
    if str(spec) in OBJECTNET:
        return objectnet_classes(str(spec))
    path = Path(spec)
    if path.suffix != ".txt":
        return class_names(read_dataset(spec))
    names = [line for line in read_lines(path) if line]
    _warn_of_ids(names, path)
    return names


def class_names(examples: list[Example]) -> list[str]:
    """The names of the examples, each once, in order."""
    return list(dict.fromkeys(example.captions[0] for example in examples))
