"""miniclip.data.cifar: CIFAR-10 as published, and what is refused in its place."""

from __future__ import annotations

import io
import pickle
import resource
import tarfile
import time

import numpy as np
import pytest

from miniclip.data import cifar
from miniclip.data.lists import DataError


class Python2Pickler(pickle._Pickler):
    """Writes byte strings and strings alike as Python 2's str, as the published files have them."""

    dispatch = dict(pickle._Pickler.dispatch)  # noqa: RUF012

    def save_bytes(self, data):
        data = data.encode() if isinstance(data, str) else data
        self.write(pickle.BINSTRING + len(data).to_bytes(4, "little") + data)
        self.memoize(data)

    dispatch[bytes] = dispatch[str] = save_bytes


def write_part(path, pixels, labels):
    stream = io.BytesIO()
    Python2Pickler(stream, protocol=2).dump({b"data": pixels, b"labels": labels, b"batch_label": b"x"})
    path.write_bytes(stream.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))


def write_cifar(folder):
    folder.mkdir(parents=True)
    for number, part in enumerate(cifar.PARTS["train"] + cifar.PARTS["test"]):
        pixels = np.arange(2 * 3072, dtype=np.uint32).reshape(2, 3072) % 251 + number
        write_part(folder / part, pixels.astype(np.uint8), [number, 9])
    return folder


def test_cifar10_is_read_as_published(tmp_path):
    folder = write_cifar(tmp_path / cifar.FOLDER)
    train, test = cifar.read_cifar10(folder, "train"), cifar.read_cifar10(folder, "test")
    assert (len(train), len(test)) == (10, 2)
    assert [example.captions[0] for example in train.examples[:4]] == ["airplane", "truck", "automobile", "truck"]
    pixels, index, problems = train[2]
    assert (index, problems, pixels.shape) == (2, [], (4, 32, 32))
    assert pixels[1, 2, 3] == (1024 + 2 * 32 + 3) % 251 + 1  # green, row 2, column 3 of the second file
    assert pixels[3].min() == 255


class Evil:
    def __reduce__(self):
        return (print, ("run!",))


@pytest.mark.parametrize(
    "data",
    [
        pickle.dumps(Evil()),
        pickle.dumps({b"data": np.zeros((1, 3072)), b"labels": [0]}, protocol=2),
        pickle.dumps([1]),
        b"",
        b"\x80\x02}",
    ],
)
def test_what_is_not_cifar10_is_refused(tmp_path, data, capsys):
    folder = write_cifar(tmp_path / cifar.FOLDER)
    (folder / "test_batch").write_bytes(data)
    with pytest.raises(ValueError, match="test_batch is not a file of CIFAR-10"):
        cifar.read_cifar10(folder, "test")
    assert capsys.readouterr().out == ""


def test_a_missing_part_points_to_the_download(tmp_path):
    with pytest.raises(DataError, match=r"data_batch_1 is missing; --download"):
        cifar.read_cifar10(tmp_path, "train")


def test_the_download_is_unpacked(tmp_path, monkeypatch):
    source = write_cifar(tmp_path / "source" / cifar.FOLDER)

    def fetch(url, path, sha256):
        assert (url, sha256) == (cifar.URL, cifar.SHA256)
        with tarfile.open(path, "w:gz") as tar:
            tar.add(source, cifar.FOLDER)
        return path

    monkeypatch.setattr(cifar, "fetch", fetch)
    target = tmp_path / cifar.FOLDER
    cifar.download_cifar10(target)
    assert len(cifar.read_cifar10(target, "test")) == 2
    monkeypatch.setattr(cifar, "fetch", None)  # not called when all is there
    cifar.download_cifar10(target)
    with pytest.raises(ValueError, match="can't be downloaded to"):
        cifar.download_cifar10(tmp_path / "elsewhere")


# Pickles of Python 3, and hostile ones


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("keys", [bytes, str])
def test_files_pickled_by_python_3_are_read(tmp_path, protocol, keys):
    folder = write_cifar(tmp_path / cifar.FOLDER)
    pixels = np.arange(2 * 3072, dtype=np.uint32).reshape(2, 3072).astype(np.uint8)
    part = {"data": pixels, "labels": [3, 9], "filenames": ["a.png", "b.png"]}
    part = {keys(name, "ascii") if keys is bytes else name: value for name, value in part.items()}
    (folder / "test_batch").write_bytes(pickle.dumps(part, protocol))
    if protocol < 2:
        with pytest.raises(DataError, match="refused the pickle opcode"):  # text, which says no lengths
            cifar.read_cifar(folder, "test")
    else:
        got, names = cifar.read_cifar(folder, "test")
        assert names == ["cat", "truck"]
        assert np.array_equal(got.reshape(2, 3072), pixels)


def encoded_often(times: int) -> bytes:
    """A megabyte of text, once, and calls that would make bytes of it again and again."""
    call = b"h\x01h\x02\x86Rr" + b"\x03\0\0\0"
    text = b"X" + (1 << 20).to_bytes(4, "little") + b"a" * (1 << 20)
    return b"\x80\x02(c_codecs\nencode\nq\0" + text + b"q\x01U\x06latin1q\x020" + times * (b"h\0" + call + b"0") + b"N."


def colliding(count: int) -> bytes:
    """A dict whose integer keys have one hash."""
    keys = ((2**61 - 1) * i for i in range(1, count))
    return b"\x80\x02}(" + b"".join(pickle.dumps(key, 2)[2:-1] + b"N" for key in keys) + b"u."


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x02Nr\xff\xff\xff\x7f.",  # puts None at place 2^31 of the memo: 9 bytes that take gigabytes
        b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f.",  # a frame of 2^63 bytes
        b"\x80\x02T\xff\xff\xff\x7fabc.",
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",
        encoded_often(3000),
        colliding(60_000),
        b"\x80\x02cbuiltins\neval\nU\x0bprint('ran')\x85R.",
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n}(U\x08__code__Nu\x86b.",
    ],
    ids=["memo", "frame", "string", "bytes", "encode", "hashes", "eval", "attributes"],
)
def test_hostile_pickles_take_neither_memory_nor_time(tmp_path, data, capsys):
    (tmp_path / "test_batch").write_bytes(data)
    started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match="test_batch is not a file of CIFAR-10"):
        cifar.read_cifar10(tmp_path, "test")
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < 100 * 2**20
    assert time.monotonic() - started < 10
    assert capsys.readouterr().out == ""
