"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009) as their author publishes them: Python 2 pickles, read without running what
is in them."""

from __future__ import annotations

import pickle
import tarfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from miniclip.data.batches import Pictures
from miniclip.data.lists import Example
from miniclip.weights.download import fetch

SIDE = 32  # pixels
FOLDER = "cifar-10-batches-py"  # as the archive calls it
PARTS = {"train": tuple(f"data_batch_{number}" for number in range(1, 6)), "test": ("test_batch",)}
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
VEHICLES = {"airplane", "automobile", "ship", "truck"}
TEMPLATES = ("a photo of a {}", "a picture of a {}", "an image of a {}", "a {} photo", "a {} picture")
SUPERCLASSES = {  # of CIFAR-100, as its page lists them; the labels number the classes in alphabetical order
    "aquatic mammals": "beaver, dolphin, otter, seal, whale",
    "fish": "aquarium fish, flatfish, ray, shark, trout",
    "flowers": "orchid, poppy, rose, sunflower, tulip",
    "food containers": "bottle, bowl, can, cup, plate",
    "fruit and vegetables": "apple, mushroom, orange, pear, sweet pepper",
    "household electrical devices": "clock, keyboard, lamp, telephone, television",
    "household furniture": "bed, chair, couch, table, wardrobe",
    "insects": "bee, beetle, butterfly, caterpillar, cockroach",
    "large carnivores": "bear, leopard, lion, tiger, wolf",
    "large man-made outdoor things": "bridge, castle, house, road, skyscraper",
    "large natural outdoor scenes": "cloud, forest, mountain, plain, sea",
    "large omnivores and herbivores": "camel, cattle, chimpanzee, elephant, kangaroo",
    "medium-sized mammals": "fox, porcupine, possum, raccoon, skunk",
    "non-insect invertebrates": "crab, lobster, snail, spider, worm",
    "people": "baby, boy, girl, man, woman",
    "reptiles": "crocodile, dinosaur, lizard, snake, turtle",
    "small mammals": "hamster, mouse, rabbit, shrew, squirrel",
    "trees": "maple tree, oak tree, palm tree, pine tree, willow tree",
    "vehicles 1": "bicycle, bus, motorcycle, pickup truck, train",
    "vehicles 2": "lawn mower, rocket, streetcar, tank, tractor",
}


class Cifar(NamedTuple):
    title: str
    url: str
    sha256: str  # the one that Keras checks; the author publishes MD5
    folder: str
    parts: dict[str, tuple[str, ...]]  # the files of each split
    labels: str  # what they call their labels
    categories: dict[str, str]  # of each class, the classes in the order of their labels


URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
SHA256 = "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"
CATEGORIES = {name: "vehicle" if name in VEHICLES else "animal" for name in CLASSES}
CIFAR10 = Cifar("CIFAR-10", URL, SHA256, FOLDER, PARTS, "labels", CATEGORIES)
CIFAR100 = Cifar(
    "CIFAR-100",
    "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
    "85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
    "cifar-100-python",
    {"train": ("train",), "test": ("test",)},
    "fine_labels",
    dict(sorted((name, kind) for kind, names in SUPERCLASSES.items() for name in names.split(", "))),
)


class _DType:
    def __init__(self, code: bytes, *_: object):
        self.code = code

    def __setstate__(self, state: tuple) -> None:
        pass


class _Array:
    """What a pickled array says of itself, nothing of it checked."""

    def __setstate__(self, state: tuple) -> None:
        _version, _shape, self.dtype, self.is_fortran, self.data = state


class _ArraysOnly(pickle.Unpickler):
    """An unpickler for NumPy arrays in plain containers, that refuses whatever else a pickle may call.

    The arrays come as descriptions: NumPy itself is not given anything to interpret.
    """

    ALLOWED = {  # noqa: RUF012
        ("numpy.core.multiarray", "_reconstruct"): lambda *_: _Array(),  # as NumPy 1 called the module
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _DType,
    }

    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it wants {module}.{name}, which no file of CIFAR needs")
        return self.ALLOWED[module, name]


def read_cifar(folder: Path, split: str, cifar: Cifar = CIFAR10) -> tuple[np.ndarray, list[str]]:
    """The pixels of a split, "train" or "test", uint8 [N, 3, 32, 32], and the name of each picture's class.

    Raises FileNotFoundError where a file is missing, and ValueError, naming the file, where one is not CIFAR's.
    """
    pixels, labels = zip(*(_read_part(folder / part, cifar) for part in cifar.parts[split]), strict=True)
    classes = list(cifar.categories)
    return np.concatenate(pixels), [classes[label] for part in labels for label in part]


def read_cifar10(folder: Path, split: str) -> Pictures:
    """The pictures of a split of CIFAR-10, of 32 x 32 pixels, each captioned with its class; raises as `read_cifar`."""
    pixels, names = read_cifar(folder, split)
    rgb = torch.from_numpy(pixels)
    examples = [Example(folder / split / str(number), (name,)) for number, name in enumerate(names)]
    return Pictures(examples, SIDE, torch.cat([rgb, torch.full_like(rgb[:, :1], 255)], dim=1))


def _read_part(path: Path, cifar: Cifar) -> tuple[np.ndarray, list[int]]:
    """Returns (uint8 [N, 3, 32, 32], N labels)."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; --download gets {cifar.title}")
    with path.open("rb") as file:
        try:
            part = _ArraysOnly(file, encoding="bytes").load()
            array, labels = part[b"data"], part[cifar.labels.encode()]
            if array.dtype.code != b"u1" or array.is_fortran:
                raise ValueError("its pixels are not bytes, row by row")
            if not all(type(label) is int and 0 <= label < len(cifar.categories) for label in labels):
                raise ValueError(f"its labels are not numbers of {len(cifar.categories)} classes")
            return np.frombuffer(array.data, np.uint8).reshape(len(labels), 3, SIDE, SIDE), labels
        except Exception as error:  # a damaged pickle makes the unpickler raise anything
            fault = f"{path} is not a file of {cifar.title}: {error}"
            raise ValueError(f"{fault}; get it again from {cifar.url}") from error


def download_cifar(folder: Path, cifar: Cifar) -> None:
    """Put the data set into `folder`, which must be called as its archive calls it, unless it is there. 170 MB."""
    if all((folder / part).is_file() for parts in cifar.parts.values() for part in parts):
        return
    if folder.name != cifar.folder:
        raise ValueError(f"{cifar.title} comes as a folder {cifar.folder}, and can't be downloaded to {folder}")
    archive = fetch(cifar.url, folder.parent / Path(cifar.url).name, cifar.sha256)
    with tarfile.open(archive) as tar:
        tar.extractall(folder.parent, filter="data")


def download_cifar10(folder: Path) -> None:
    download_cifar(folder, CIFAR10)
