"""The sample that ships, CIFAR and MNIST as published (from a folder, or a local server), lists, and ImageFolders."""

from __future__ import annotations

import gzip
import hashlib
import io
import struct
import tarfile
import threading
import warnings
import zipfile
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image
from test_training_cifar import Python2Pickler, write_cifar

from miniclip.data import cifar, datasets, imagenet, mnist, objectnet
from miniclip.data.datasets import read_classes, read_dataset
from miniclip.data.lists import DataError, read_examples
from miniclip.data.sample import FILE, KINDS, make_sample, read_sample
from miniclip.errors import MiniclipWarning
from miniclip.preprocess import open_image
from miniclip.weights.download import DownloadError

CIFAR100_LABELS = {0: "apple", 1: "aquarium fish", 42: "leopard", 78: "snake", 99: "worm"}  # as published


def write_cifar100(folder):
    folder.mkdir(parents=True)
    for split in ("train", "test"):
        labels = list(CIFAR100_LABELS)
        pixels = np.repeat(np.arange(len(labels), dtype=np.uint8)[:, None], 3072, axis=1)
        stream = io.BytesIO()
        Python2Pickler(stream, protocol=2).dump({b"data": pixels, b"fine_labels": labels, b"coarse_labels": [0] * 5})
        (folder / split).write_bytes(stream.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    return folder


def write_mnist(folder, pack=gzip.compress, count=3):
    folder.mkdir(parents=True)
    suffix = ".gz" if pack is gzip.compress else ""
    for prefix in mnist.PREFIX.values():
        pixels = (np.arange(count * 784) % 251).astype(np.uint8)
        images = struct.pack(">4i", 2051, count, 28, 28) + pixels.tobytes()
        labels = struct.pack(">2i", 2049, count) + bytes(range(7, 7 + count))
        (folder / f"{prefix}-images-idx3-ubyte{suffix}").write_bytes(pack(images))
        (folder / f"{prefix}-labels-idx1-ubyte{suffix}").write_bytes(pack(labels))
    return folder


# The sample


def test_the_sample_is_as_its_table_says():
    examples = read_sample()
    kinds = {kind: [example.captions[0] for example in examples if example.category == kind] for kind in KINDS}
    assert kinds == {kind: names.split(", ") for kind, names in KINDS.items()}
    assert len(examples) == 240 == len(read_classes("sample"))
    assert {(example.image.mode, example.image.size) for example in examples} == {("RGB", (96, 96))}
    assert examples[0].title == "sample mammal/badger.webp"
    assert FILE.stat().st_size < 1.5e6


def test_the_sample_shows_what_it_names():
    """The name has the first of Noto's colours that come to mind, on white."""
    pictures = {example.captions[0]: np.asarray(example.image, dtype=int) for example in read_sample()}
    for name, strongest in {"red apple": 0, "evergreen tree": 1, "dolphin": 2}.items():
        pixels = pictures[name]
        assert (pixels[0, 0] == 255).all()
        drawn = pixels[(pixels < 250).any(axis=-1)].mean(axis=0)
        assert drawn.argmax() == strongest


def test_the_sample_unpacked_is_a_data_set_like_any_other(tmp_path):
    with zipfile.ZipFile(FILE) as files:
        files.extractall(tmp_path)
    for ours, listed in zip(read_sample(), read_examples(tmp_path / "sample.json"), strict=True):
        assert (ours.captions, ours.category) == (listed.captions, listed.category)
    assert open_image(listed.image).size == (96, 96)


def test_the_sample_can_be_made_again(tmp_path, monkeypatch):
    red = Image.new("RGBA", (96, 96), (255, 0, 0, 0))
    red.putpixel((5, 6), (255, 0, 0, 255))
    red.save(tmp_path / "fox.png")
    (tmp_path / "noto.json").write_text('[{"image": "fox.png", "captions": ["red fox", "sly"]}]')
    monkeypatch.setattr("miniclip.data.sample.KINDS", {"big mammal": "red fox"})
    monkeypatch.setattr("miniclip.data.sample.FILE", tmp_path / "made.zip")
    make_sample(tmp_path, tmp_path / "made.zip")
    (example,) = read_sample()
    assert (example.title, example.captions) == ("sample big_mammal/red_fox.webp", ("red fox", "sly"))
    assert (example.image.getpixel((0, 0)), example.image.getpixel((5, 6))) == ((255, 255, 255), (255, 0, 0))


# Published data sets, from a folder


@pytest.mark.parametrize("inside", [False, True])
def test_cifar10_is_read_from_its_folder(tmp_path, inside):
    folder = write_cifar(tmp_path / "cifar-10-batches-py")
    train, test = (read_dataset("cifar10", folder if inside else tmp_path, split=split) for split in ("train", "test"))
    assert (len(train), len(test)) == (10, 2)
    assert [example.captions for example in train[2:4]] == [("automobile",), ("truck",)]
    assert [example.category for example in train[3:5]] == ["vehicle", "animal"]
    assert train[2].title == "cifar10 train 2"
    # Red, green and blue planes, row by row; of the second file, whose values are one more.
    assert train[2].image.getpixel((3, 2)) == tuple((1024 * plane + 2 * 32 + 3) % 251 + 1 for plane in range(3))


def test_cifar100_is_read_from_its_folder(tmp_path):
    write_cifar100(tmp_path / "cifar-100-python")
    examples = read_dataset("cifar100", tmp_path)
    assert [example.captions[0] for example in examples] == list(CIFAR100_LABELS.values())
    assert [example.category for example in examples[2:4]] == ["large carnivores", "reptiles"]
    assert examples[4].image.getpixel((31, 31)) == (4, 4, 4)
    assert len(cifar.CIFAR100.categories) == 100 and len(set(cifar.CIFAR100.categories.values())) == 20


@pytest.mark.parametrize("place", ["", "mnist", "MNIST/raw"])
@pytest.mark.parametrize("pack", [gzip.compress, bytes])
def test_mnist_is_read_where_it_is(tmp_path, place, pack):
    write_mnist(tmp_path / "here" / place, pack)
    examples = read_dataset("mnist", tmp_path / "here")
    assert [example.captions for example in examples] == [("7",), ("8",), ("9",)]
    assert examples[1].image.size == (28, 28) and examples[1].image.getpixel((3, 2)) == (784 + 2 * 28 + 3) % 251
    assert examples[2].title == "mnist test 2"


def test_what_is_not_mnist_is_refused(tmp_path):
    folder = write_mnist(tmp_path / "mnist")
    images = folder / "t10k-images-idx3-ubyte.gz"
    labels = folder / "t10k-labels-idx1-ubyte.gz"
    whole, right = images.read_bytes(), gzip.decompress(images.read_bytes())
    swapped = labels.read_bytes()
    four = gzip.compress(struct.pack(">4i", 2051, 4, 28, 28) + bytes(4 * 784))
    for wrong in (b"", whole[:99], whole[:-9], gzip.compress(right[:-1]), gzip.compress(right + b"x"), swapped, four):
        images.write_bytes(wrong)
        with pytest.raises(DataError, match="mnist"):
            read_dataset("mnist", tmp_path)
    images.write_bytes(whole)
    labels.write_bytes(gzip.compress(struct.pack(">2i", 2049, 3) + bytes([7, 8, 10])))
    with pytest.raises(DataError, match="labels up to 10"):
        read_dataset("mnist", tmp_path)
    labels.write_bytes(swapped)
    assert len(read_dataset("mnist", tmp_path)) == 3


@pytest.mark.parametrize("name", datasets.PUBLISHED)
def test_what_is_missing_is_said(tmp_path, name):
    with pytest.raises(DataError, match=r"is missing; --download gets.*--data-root"):
        read_dataset(name, tmp_path)


def test_what_is_no_data_set_or_split_is_refused(tmp_path):
    with pytest.raises(DataError, match="cifar11 is not a data set; expected sample, cifar10, cifar100, mnist, or"):
        read_dataset("cifar11")
    with pytest.raises(DataError, match="'val'; expected train or test"):
        read_dataset("sample", split="val")
    for spec in ("sample", tmp_path):
        with pytest.raises(DataError, match="has no split 'train'"):
            read_dataset(spec, split="train")


# Published data sets, from a server


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serves files of a folder as the authors' servers do, with their checksums set to what they are here."""
    published = tmp_path / "published"
    write_mnist(published / "mnist")
    with tarfile.open(published / "cifar-10-python.tar.gz", "w:gz") as tar:
        tar.add(write_cifar(tmp_path / "a" / "cifar-10-batches-py"), "cifar-10-batches-py")
    with tarfile.open(published / "cifar-100-python.tar.gz", "w:gz") as tar:
        tar.add(write_cifar100(tmp_path / "a" / "cifar-100-python"), "cifar-100-python")

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=published)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{http.server_port}"
        digests = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in published.rglob("*.gz")}
        monkeypatch.setattr(mnist, "URL", f"{url}/mnist")
        monkeypatch.setattr(mnist, "SHA256", {name: digests[name] for name in mnist.SHA256})
        for name, data in (("cifar10", cifar.CIFAR10), ("cifar100", cifar.CIFAR100)):
            file = data.url.rpartition("/")[2]
            local = data._replace(url=f"{url}/{file}", sha256=digests[file])
            monkeypatch.setitem(datasets.PUBLISHED, name, local)
        yield published
        http.shutdown()


@pytest.mark.parametrize(("name", "count"), [("cifar10", 2), ("cifar100", 5), ("mnist", 3)])
def test_published_files_are_downloaded_once(tmp_path, server, name, count, monkeypatch):
    root = tmp_path / "cache"
    assert len(read_dataset(name, root, download=True)) == count
    monkeypatch.setenv("MINICLIP_OFFLINE", "1")
    assert len(read_dataset(name, root, download=True)) == count == len(read_dataset(name, root))


@pytest.mark.parametrize("name", datasets.PUBLISHED)
def test_a_download_that_is_not_what_was_published_is_refused(tmp_path, server, name, monkeypatch):
    for file in server.rglob("*.gz"):
        file.write_bytes(file.read_bytes() + b" ")
    with pytest.raises(DownloadError, match="expected"):
        read_dataset(name, tmp_path / "cache", download=True)
    assert not list((tmp_path / "cache").rglob("*ubyte*.gz")) and not list((tmp_path / "cache").rglob("*batch*"))


# ImageNet


def test_imagenets_classes_are_openais():
    names = datasets.imagenet_classes()
    assert len(names) == 1000 and len(read_classes("imagenet")) == 998
    assert [names[i] for i in (0, 134, 517, 999)] == ["tench", "crane bird", "construction crane", "toilet paper"]
    digest = hashlib.sha256("\n".join(names).encode()).hexdigest()  # of the list in OpenAI's notebook
    assert digest == "571ae1c583b4be7da87519494c52bf405a46af05d5815627c7a0dee997068b60"


def test_a_folder_of_imagenets_thousand_is_named_in_words(tmp_path):
    ids = [identifier for identifier, _, _ in imagenet._rows()]
    folders_of(tmp_path, ids)
    with pytest.warns(MiniclipWarning, match="1000 folders are ImageNet's classes.*n01440764 is 'tench'"):
        examples = read_dataset(tmp_path)
    assert [example.captions[0] for example in examples] == datasets.imagenet_classes()


def folders_of(path, names) -> None:
    for name in names:
        (path / name).mkdir()
        (path / name / "a.JPEG").touch()


def test_a_part_of_imagenets_folders_is_named_in_words(tmp_path):
    """As ImageNet-A and ImageNet-R have them, which share the goldfish but not the tench or the African elephant."""
    folders_of(tmp_path, ["n02504458", "n01443537"])
    with pytest.warns(MiniclipWarning, match="2 folders are ImageNet's classes, in OpenAI's wording"):
        examples = read_dataset(tmp_path)
    assert [example.captions for example in examples] == [("goldfish",), ("African bush elephant",)]
    few = {name: set(read_classes(name)) for name in ("imagenet", "imagenet-a", "imagenet-r")}
    assert {name: len(names) for name, names in few.items()} == {"imagenet": 998, "imagenet-a": 200, "imagenet-r": 200}
    assert few["imagenet-a"] | few["imagenet-r"] < few["imagenet"] and few["imagenet-a"] != few["imagenet-r"]
    assert "goldfish" in few["imagenet-r"] - few["imagenet-a"] and "tench" not in few["imagenet-a"] | few["imagenet-r"]


def test_imagenet_v2s_labels_are_numbers_not_places_in_an_alphabet(tmp_path):
    folders_of(tmp_path, map(str, range(1000)))
    with pytest.warns(MiniclipWarning, match="1000 folders"):
        examples = read_dataset(tmp_path)
    named = {example.image.parent.name: example.captions[0] for example in examples}
    assert named["2"] == "great white shark" and named["10"] == datasets.imagenet_classes()[10]


# ObjectNet


def test_of_objectnets_folders_those_that_imagenet_has_too_are_read(tmp_path):
    folders_of(tmp_path, [folder for folder, _, _ in objectnet._rows()])
    with pytest.warns(MiniclipWarning, match="313 folders are ObjectNet's classes.*the 200 that ImageNet lacks"):
        names = [example.captions[0] for example in read_dataset(tmp_path)]
    assert names == read_classes("objectnet") and len(names) == 113
    assert {"coffee/french press", "t-shirt", "tv"} < set(names) and not {"tape / duct tape", "egg"} & set(names)
    with pytest.warns(MiniclipWarning, match=r"in ObjectNet's wording$"):
        names = [example.captions[0] for example in read_dataset(tmp_path, objectnet="objectnet-313")]
    assert names == read_classes("objectnet-313") and len(set(names)) == 313


def test_a_part_of_objectnets_folders_is_objectnets_only_if_that_is_said(tmp_path):
    folders_of(tmp_path, ["coffee_french_press", "tape"])
    assert [example.captions for example in read_dataset(tmp_path)] == [("coffee french press",), ("tape",)]
    with pytest.warns(MiniclipWarning, match="the 1 that ImageNet lacks"):
        (example,) = read_dataset(tmp_path, objectnet="objectnet")
    assert example.captions == ("coffee/french press",)
    (tmp_path / "dog").mkdir()
    (tmp_path / "dog" / "a.png").touch()
    assert len(read_dataset(tmp_path, objectnet="objectnet")) == 3  # no folders of ObjectNet


def test_objectnets_classes_are_those_of_its_metadata():
    """The SHA-256 of the sorted folders, labels and shared labels in mlfoundations/wise-ft, objectnet_metadata."""
    columns = [[row[0] for row in objectnet._rows()], [row[1] for row in objectnet._rows()]]
    columns.append([label for _, label, shared in objectnet._rows() if shared])
    digests = [hashlib.sha256("\n".join(sorted(column)).encode()).hexdigest()[:16] for column in columns]
    assert digests == ["deae0b5d46edddde", "3843159e864885c2", "862ade8ee36b27f1"]


@pytest.mark.parametrize("names", [["n00007846", "cat"], ["207", "208"], [str(i) for i in range(11)]])
def test_names_that_look_like_ids_are_warned_of(tmp_path, names):
    folders_of(tmp_path, names)
    with pytest.warns(MiniclipWarning, match="look like ids"):
        assert {example.captions[0] for example in read_dataset(tmp_path)} == set(names)
    (tmp_path / "classes.txt").write_text("\n".join(names))
    with pytest.warns(MiniclipWarning, match="look like ids"):
        read_classes(tmp_path / "classes.txt")


@pytest.mark.parametrize("names", [["cat", "dog"], [str(i) for i in range(10)], ["apollo 11", "n1"]])
def test_words_and_digits_are_not(tmp_path, names):
    folders_of(tmp_path, names)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [example.captions[0] for example in read_dataset(tmp_path)] == sorted(names)


def test_the_subsets_are_those_of_their_authors():
    """The ids in hendrycks/imagenet-r and hendrycks/natural-adv-examples, eval.py, by SHA-256 of the sorted lines."""
    ids = {letter: sorted(row[0] for row in imagenet._rows() if letter in row[2]) for letter in ("", "A", "R")}
    digests = {letter: hashlib.sha256("\n".join(lines).encode()).hexdigest() for letter, lines in ids.items()}
    assert digests == {
        "": "385e0240499426c022b773be1ae4da780f057b89c9694c7f47199f62746b6edd",
        "A": "f6aa4b23244554d9b864fd715ae20048f6a9686388911b2dfbf1ada01bf0f520",
        "R": "e19a59d84e3746fafd34d2ccf6ae604a44e9a0500a596f343c878a89e30ce624",
    }
    assert [row[0] for row in imagenet._rows()] == ids[""]  # the labels number the ids in sorted order
