"""Files that were changed at random: data sets, lists, shards and checkpoints are read, or refused with a message."""

from __future__ import annotations

import json
import random
import tarfile
import time
from dataclasses import asdict

import pytest
import torch
from test_datasets import write_cifar100, write_mnist
from test_training_cifar import write_cifar
from test_training_shards import add, png

from miniclip.data import cifar
from miniclip.data.datasets import read_dataset
from miniclip.data.lists import read_examples
from miniclip.data.mnist import read_mnist
from miniclip.data.shards import Shards
from miniclip.errors import MiniclipError
from miniclip.training.checkpoint import LAST, LEGACY, load_state, save_state
from miniclip.training.options import TrainOptions

TIMES = 150  # mutations of each file
SECONDS = 5  # that one may take


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Some bytes changed, or a part cut out, doubled or filled."""
    data = bytearray(data)
    start = rng.randrange(len(data))
    end = min(len(data), start + rng.choice([1, 2, 8, 100, len(data)]))
    match rng.randrange(5):
        case 0:
            for _ in range(rng.choice([1, 1, 4, 30])):
                place = rng.randrange(min(len(data), rng.choice([64, 1 << 30])))
                data[place] = rng.choice([0, 1, 127, 255, rng.randrange(256)])
        case 1:
            del data[start:end]
        case 2:
            data[start:start] = data[start:end]
        case 3:
            data[start:end] = rng.choice([b"\0", b"\xff", b"9", b"["]) * (end - start)
        case 4:
            del data[start:]
    return bytes(data)


def write_list(path):
    rows = [{"image": f"{i}.png", "captions": [f"a café {i}", "b"], "category": None} for i in range(4)]
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=1))


def write_csv(path):
    path.write_text('image,caption\na.png,"a ""good"" dog, in snow"\nb.png,é\n')


def write_state(path):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scaler": {}, "done": 1, "best": 0.5}
    state["options"] = asdict(TrainOptions())
    torch.save(state, path) if path.name == LEGACY else save_state(state, path.parent)


def write_shard(path):
    with tarfile.open(path, "w") as tar:
        for grey in range(6):
            add(tar, f"{grey}.png", png(grey))
            add(tar, f"{grey}.txt", b"grey") if grey % 2 else add(tar, f"{grey}.json", b'{"captions": ["grey", "x"]}')


def read_shard(path):
    pytest.importorskip("webdataset")
    return list(Shards(str(path), 8, 2, seed=0, workers=0).batches(0, 4))


CASES = {  # name of the file: what writes it, what reads it
    "list.json": (write_list, read_examples),
    "list.csv": (write_csv, read_examples),
    "s.tar": (write_shard, read_shard),
    LAST: (write_state, lambda path: load_state(path.parent)),
    LEGACY: (write_state, lambda path: load_state(path.parent)),
    "cifar-10-batches-py/test_batch": (
        lambda path: write_cifar(path.parent),
        lambda path: cifar.read_cifar10(path.parent, "test"),
    ),
    "cifar-100-python/test": (
        lambda path: write_cifar100(path.parent),
        lambda path: read_dataset("cifar100", path.parent),
    ),
    "mnist/t10k-images-idx3-ubyte.gz": (
        lambda path: write_mnist(path.parent),
        lambda path: read_mnist(path.parent, "test"),
    ),
}


@pytest.mark.slow  # eight kinds of files
@pytest.mark.parametrize("name", CASES)
def test_changed_files_are_read_or_refused(tmp_path, name, capsys):
    write, read = CASES[name]
    path = tmp_path / name
    write(path)
    whole, rng, refused = path.read_bytes(), random.Random(name), 0
    read(path)
    for number in range(TIMES):
        path.write_bytes(mutated(whole, rng))
        started = time.monotonic()
        try:
            read(path)
        except MiniclipError as error:
            refused += 1
            assert len(str(error)) < 3000, number
        assert time.monotonic() - started < SECONDS, number
    assert refused > TIMES / 20
    assert capsys.readouterr().out == ""
