"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009) as their author publishes them, which is as pickles of Python 2, or pickled
again by Python 3. Nothing in them is run."""

from __future__ import annotations

import io
import pickle
import pickletools
import tarfile
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from miniclip.data.batches import Pictures
from miniclip.data.lists import Example
from miniclip.data.text import DataError
from miniclip.io import explained, open_regular, write_atomically
from miniclip.weights.download import fetch

SIDE = 32  # pixels
MAX_BYTES = 1 << 28  # of a file; CIFAR-100's largest has 155,249,918
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
    """A pickled numpy.dtype, of which only the code is kept."""

    def __init__(self, code: bytes | str, *_: object):
        self.code = code

    def __setstate__(self, state: tuple) -> None:
        pass


class _Array:
    """A pickled numpy.ndarray, as the pickle describes it. NumPy itself interprets nothing."""

    def __setstate__(self, state: tuple) -> None:
        _version, _shape, self.dtype, self.is_fortran, self.data = state


def _frombuffer(data: bytes, dtype: _DType, shape: tuple, order: str) -> _Array:
    array = _Array()
    array.__setstate__((1, shape, dtype, order != "C", data))
    return array


class _ArraysOnly(pickle.Unpickler):
    """Reads NumPy arrays in plain containers, and refuses whatever else a pickle may name or do.

    Memory and time are proportional to the size of the data: of the opcodes only OPCODES are taken, because others
    reserve memory that the data only announces, or make keys of a dict that all have one hash.
    """

    OPCODES = (
        *("PROTO", "FRAME", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2"),
        *("SHORT_BINSTRING", "BINSTRING", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8"),
        *("SHORT_BINUNICODE", "BINUNICODE", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
        *("EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_DICT", "SETITEM", "SETITEMS"),
        *("BINPUT", "LONG_BINPUT", "MEMOIZE", "BINGET", "LONG_BINGET", "GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD"),
    )

    def __init__(self, data: bytes):
        for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if opcode.name not in self.OPCODES or (opcode.name.endswith("BINPUT") and argument > 2 * count):
                raise pickle.UnpicklingError(f"refused the pickle opcode {opcode.name}, which no file of CIFAR needs")
        super().__init__(io.BytesIO(data), encoding="bytes")
        self.room = len(data)
        # Functions of this reader's own, because a pickle may set attributes of what it names.
        self.allowed = {"numpy": {"ndarray": _Array, "dtype": _DType}, "_codecs": {"encode": self._encode}}
        for core in ("numpy.core", "numpy._core"):  # as NumPy 1 and 2 call it
            self.allowed[f"{core}.multiarray"] = {"_reconstruct": lambda *_: _Array()}
            self.allowed[f"{core}.numeric"] = {"_frombuffer": lambda *state: _frombuffer(*state)}

    def find_class(self, module: str, name: str) -> object:
        if name not in self.allowed.get(module, {}):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no file of CIFAR needs")
        return self.allowed[module][name]

    def _encode(self, text: str, encoding: str) -> bytes:
        """How Python 3 writes bytes in Python 2's pickles."""
        self.room -= len(text)
        if encoding != "latin1" or self.room < 0:
            raise pickle.UnpicklingError("it encodes more text than it has, or not as Latin-1")
        return text.encode("latin1")


def read_cifar(folder: Path, split: str, cifar: Cifar = CIFAR10) -> tuple[np.ndarray, list[str]]:
    """The pixels of a split, "train" or "test", uint8 [N, 3, 32, 32], and the name of each picture's class.

    DataError for a file that is missing or is not CIFAR's.
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
    if not path.exists():
        raise DataError(f"{path} is missing; --download gets {cifar.title}")
    try:
        with open_regular(path) as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise ValueError(f"it has more than {MAX_BYTES:,} bytes")
        part = {_name(key): value for key, value in _ArraysOnly(data).load().items()}
        array, labels = part["data"], part[cifar.labels]
        if _name(array.dtype.code) != "u1" or array.is_fortran:
            raise ValueError("its pixels are not bytes, row by row")
        if not all(type(label) is int and 0 <= label < len(cifar.categories) for label in labels):
            raise ValueError(f"its labels are not numbers of {len(cifar.categories)} classes")
        return np.frombuffer(array.data, np.uint8).reshape(len(labels), 3, SIDE, SIDE), labels
    except Exception as error:  # a damaged pickle makes the unpickler raise anything
        fault = f"{path} is not a file of {cifar.title}: {error!s:.300}"
        raise DataError(f"{fault}; get it again from {cifar.url}") from error


def _name(key: object) -> str:
    """A name that Python 2 or 3 wrote."""
    return key.decode("latin1") if isinstance(key, bytes) else str(key)


def download_cifar(folder: Path, cifar: Cifar) -> None:
    """Put the data set into `folder`, which must be called as its archive calls it, unless it is there. 170 MB."""
    if all((folder / part).is_file() for parts in cifar.parts.values() for part in parts):
        return
    if folder.name != cifar.folder:
        raise DataError(f"{cifar.title} comes as a folder {cifar.folder}, and can't be downloaded to {folder}")
    archive = fetch(cifar.url, folder.parent / Path(cifar.url).name, cifar.sha256)
    with explained(folder):
        folder.mkdir(exist_ok=True)
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.isreg():
                data = tar.extractfile(member).read()
                write_atomically(folder / Path(member.name).name, partial(Path.write_bytes, data=data))


def download_cifar10(folder: Path) -> None:
    download_cifar(folder, CIFAR10)
