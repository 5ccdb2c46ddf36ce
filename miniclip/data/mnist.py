"""MNIST (LeCun, Cortes & Burges 1998) as published: four files of bytes, gzip-compressed or not.

An idx file is a magic number, 2049 for labels and 2051 for images, the sizes, all as big-endian int32, and the bytes.
"""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np

from miniclip.data.text import DataError
from miniclip.weights.download import fetch

URL = "https://storage.googleapis.com/cvdf-datasets/mnist"  # a copy; the authors' own server no longer gives them out
SHA256 = {  # as TensorFlow Datasets checks them
    "train-images-idx3-ubyte.gz": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    "train-labels-idx1-ubyte.gz": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    "t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    "t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
}
PREFIX = {"train": "train", "test": "t10k"}
MAX_BYTES = 1 << 26  # MNIST's largest file has 47,040,016


def read_mnist(folder: Path, split: str) -> tuple[np.ndarray, list[int]]:
    """The digits of a split, "train" or "test", uint8 [N, 28, 28], white on black, and which digits they are.

    DataError for a file that is missing or is not MNIST's.
    """
    images = _read_idx(folder, f"{PREFIX[split]}-images-idx3-ubyte", 3)
    labels = _read_idx(folder, f"{PREFIX[split]}-labels-idx1-ubyte", 1).tolist()
    if images.shape[1:] != (28, 28) or len(images) != len(labels) or not all(label < 10 for label in labels):
        raise DataError(
            f"{folder} holds no digits of MNIST: got images of shape {images.shape} and {len(labels)} labels up to "
            f"{max(labels, default=0)}; expected N of 28 x 28, and N labels up to 9"
        )
    return images, labels


def _read_idx(folder: Path, name: str, dimensions: int) -> np.ndarray:
    path = next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)
    if path is None:
        raise DataError(f"{folder / name}(.gz) is missing; --download gets MNIST")
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
        magic, *shape = struct.unpack_from(f">{dimensions + 1}i", data)
        values = np.frombuffer(data, np.uint8, offset=4 * (dimensions + 1))
        if magic != 0x0800 + dimensions or min(shape) < 0:  # 8: the type, bytes
            raise ValueError(f"it begins with {magic}, {shape}")
        return values.reshape(shape)
    except (OSError, EOFError, ValueError, struct.error, zlib.error) as error:
        raise DataError(f"{path} is not a file of MNIST: {error}; delete it, and get it again from {URL}") from error


def download_mnist(folder: Path) -> None:
    """Put MNIST into `folder`, unless it is there. 12 MB."""
    for name, sha256 in SHA256.items():
        if not (folder / name).is_file() and not (folder / name.removesuffix(".gz")).is_file():
            fetch(f"{URL}/{name}", folder / name, sha256)
