"""CIFAR-10 (Krizhevsky 2009) as its author publishes it: Python 2 pickles, read without running what is in them."""

from __future__ import annotations

import pickle
import tarfile
from pathlib import Path

import numpy as np
import torch

from miniclip.training.data import Example, Pictures
from miniclip.weights.download import fetch

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
SHA256 = "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"
FOLDER = "cifar-10-batches-py"  # as the archive calls it
SIDE = 32  # pixels
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
TEMPLATES = ("a photo of a {}", "a picture of a {}", "an image of a {}", "a {} photo", "a {} picture")
PARTS = {"train": tuple(f"data_batch_{number}" for number in range(1, 6)), "test": ("test_batch",)}


class _ArraysOnly(pickle.Unpickler):
    """An unpickler for NumPy arrays in plain containers, that refuses whatever else a pickle may call."""

    # The array module's name in the published files; NumPy 2 has moved it.
    ALLOWED = {  # noqa: RUF012
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it wants {module}.{name}, which no file of CIFAR-10 needs")
        return self.ALLOWED[module, name]


def read_cifar10(folder: Path, split: str) -> Pictures:
    """The pictures of a split, "train" or "test", of 32 x 32 pixels, each captioned with its class.

    Raises FileNotFoundError where a file is missing, and ValueError, naming the file, where one is not CIFAR-10.
    """
    pixels, labels = zip(*(_read_part(folder / part) for part in PARTS[split]), strict=True)
    rgb = torch.from_numpy(np.concatenate(pixels))
    captions = [(CLASSES[label],) for label in np.concatenate(labels)]
    examples = [Example(folder / split / str(number), names) for number, names in enumerate(captions)]
    return Pictures(examples, SIDE, torch.cat([rgb, torch.full_like(rgb[:, :1], 255)], dim=1))


def _read_part(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Returns (uint8 [N, 3, 32, 32], labels [N])."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; --download gets CIFAR-10")
    with path.open("rb") as file:
        try:
            part = _ArraysOnly(file, encoding="bytes").load()
            pixels, labels = part[b"data"], np.asarray(part[b"labels"])
            if pixels.dtype != np.uint8 or not all(0 <= label < len(CLASSES) for label in labels):
                raise ValueError("other values than bytes of pixels and labels of ten classes")
            return pixels.reshape(len(labels), 3, SIDE, SIDE), labels
        except Exception as error:  # a damaged pickle makes the unpickler raise anything
            raise ValueError(f"{path} is not a file of CIFAR-10: {error}; get it again from {URL}") from error


def download_cifar10(folder: Path) -> None:
    """Put CIFAR-10 into `folder`, which must be called cifar-10-batches-py, unless it is there. 170 MB."""
    if all((folder / part).is_file() for parts in PARTS.values() for part in parts):
        return
    if folder.name != FOLDER:
        raise ValueError(f"CIFAR-10 comes as a folder {FOLDER}, and can't be downloaded to {folder}")
    archive = fetch(URL, folder.parent / Path(URL).name, SHA256)
    with tarfile.open(archive) as tar:
        tar.extractall(folder.parent, filter="data")
