"""miniclip.data.shards: WebDataset tar files, where the library is installed."""

from __future__ import annotations

import io
import json
import sys
import tarfile

import pytest
from PIL import Image

from miniclip.data.shards import Shards


def test_the_extra_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "webdataset", None)
    with pytest.raises(ImportError, match=r'pip install "miniclip\[webdataset\]"'):
        Shards("x.tar", 8, 2, seed=0, workers=0)


def add(tar, name, data):
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    tar.addfile(entry, io.BytesIO(data))


def png(grey):
    stream = io.BytesIO()
    Image.new("RGB", (9, 9), (grey,) * 3).save(stream, "png")
    return stream.getvalue()


@pytest.fixture
def urls(tmp_path):
    """Four shards of five samples of the grey levels 0..19; one caption in three is in a .json."""
    pytest.importorskip("webdataset")
    for shard in range(4):
        with tarfile.open(tmp_path / f"s-{shard}.tar", "w") as tar:
            for grey in range(5 * shard, 5 * shard + 5):
                add(tar, f"{grey:03}.png", png(grey))
                captions = {"captions": [f"grey {grey}", "flat"]}
                if grey % 3:
                    add(tar, f"{grey:03}.txt", f"grey {grey}\n".encode())
                else:
                    add(tar, f"{grey:03}.json", json.dumps(captions).encode())
    return f"{tmp_path}/s-{{0..3}}.tar"


def greys(shards, start, stop):
    batches = list(shards.batches(start, stop))
    for batch in batches:
        told = [int(captions[0].removeprefix("grey ")) for captions in batch.captions]
        assert batch.pixels[:, 0, 0, 0].tolist() == told
    return [batch.pixels[:, 0, 0, 0].tolist() for batch in batches]


@pytest.mark.parametrize("workers", [0, 2])
def test_every_picture_comes_once_a_pass(urls, workers):
    shards = Shards(urls, 8, 5, seed=0, workers=workers)
    whole = greys(shards, 0, 12)
    assert [len(batch) for batch in whole] == [5] * 12
    seen = sorted(grey for batch in whole[:4] for grey in batch)
    assert workers or seen == list(range(20))
    assert greys(shards, 5, 12) == whole[5:]  # goes on anywhere
    assert greys(Shards(urls, 8, 5, seed=0, workers=workers), 0, 12) == whole
    assert greys(Shards(urls, 8, 5, seed=1, workers=workers), 0, 12) != whole


def test_ranks_share_the_shards_and_the_batch(urls):
    ranks = [greys(Shards(urls, 8, 4, 0, 0, rank, 2), 0, 5) for rank in (0, 1)]
    assert [len(batch) for batch in ranks[0]] == [2] * 5
    assert sorted(grey for batches in ranks for batch in batches for grey in batch) == list(range(20))


def test_too_few_shards(urls):
    with pytest.raises(ValueError, match="4 shards for 2 ranks with 3 workers each; expected at least 6"):
        Shards(urls, 8, 4, 0, 3, 0, 2)


def test_what_is_broken_is_told(urls, tmp_path):
    with tarfile.open(tmp_path / "s-0.tar", "w") as tar:
        add(tar, "a.png", b"not a picture")
        add(tar, "a.txt", b"a")
        add(tar, "b.png", png(1))
        add(tar, "c.txt", b"grey 2")
        add(tar, "d.png", png(3))
        add(tar, "d.json", b"{}")
    batches = list(Shards(urls, 8, 5, seed=0, workers=0).batches(0, 3))
    problems = "\n".join(line for batch in batches for line in batch.problems)
    for complaint in ("a: can't decode the picture", "b: no caption", "c: no picture", "d: no caption"):
        assert complaint in problems
