"""miniclip.data.shards: WebDataset tar files, where the library is installed."""

from __future__ import annotations

import io
import json
import re
import sys
import tarfile
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from miniclip.data.lists import DataError
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


@pytest.mark.parametrize("begin", ["pipe:", "PIPE:", "s3://", "hf://", "gs://", "ftp://", "ssh:"])
def test_commands_and_other_schemes_are_refused(urls, tmp_path, begin):
    marker = tmp_path / "ran"
    for data in (f"{begin}touch {marker}; cat {tmp_path}/s-0.tar", f"{urls}::{begin}touch {marker} #.tar"):
        with pytest.raises(DataError, match=f"begins with {begin[:-2]}.*expected a file"):
            list(Shards(data, 8, 5, seed=0, workers=0).batches(0, 1))
    assert not marker.exists()


def test_an_address_is_never_part_of_a_command(tmp_path):
    """WebDataset itself gives addresses to curl, through a shell."""
    pytest.importorskip("webdataset")
    address = f"http://127.0.0.1:9/'; touch {tmp_path}/ran; echo 'x.tar"
    with pytest.raises(DataError, match=r"none of 1 shards holds a sample; the last fault: http://127\.0\.0\.1:9/"):
        list(Shards(address, 8, 5, seed=0, workers=0).batches(0, 1))
    assert not (tmp_path / "ran").exists()


def test_shards_come_from_web_servers_too(urls, tmp_path):
    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=tmp_path)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        remote = urls.replace(str(tmp_path), f"http://127.0.0.1:{http.server_port}")
        assert greys(Shards(remote, 8, 5, 0, 0), 0, 4) == greys(Shards(urls, 8, 5, 0, 0), 0, 4)
        assert greys(Shards(f"file://{urls}", 8, 5, 0, 0), 0, 4) == greys(
            Shards(urls, 8, 5, 0, 0), 0, 4
        )
        http.shutdown()


BAD_SHARDS = {
    "cut": lambda data: data[: 9 * 512 + 20],
    "a web page": lambda data: b"<!DOCTYPE html><html><body>404 not found</body></html>" * 20,
    "empty": lambda data: b"",
    "gone": None,
}


@pytest.mark.parametrize("kind", BAD_SHARDS)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_shard_is_named_and_skipped(urls, tmp_path, kind, workers):
    whole, damage = tmp_path / "s-1.tar", BAD_SHARDS[kind]
    whole.unlink() if damage is None else whole.write_bytes(damage(whole.read_bytes()))
    shards = Shards(urls, 8, 5, seed=0, workers=workers)
    batches = list(shards.batches(0, 12))
    assert [len(batch.captions) for batch in batches] == [5] * 12
    problems = {line for batch in batches for line in batch.problems}
    (line,) = problems
    assert re.match(rf"{tmp_path}/s-1\.tar: can't read the shard beyond its first \d samples: ", line)
    assert "\n" not in line and "<_io" not in line
    seen = {caption for batch in batches for captions in batch.captions for caption in captions}
    assert {f"grey {grey}" for grey in (*range(5), *range(10, 20))} <= seen
    again = [batch.captions for batch in Shards(urls, 8, 5, seed=0, workers=workers).batches(4, 12)]
    assert again == [batch.captions for batch in batches[4:]]  # a run that continues meets the same


def test_nothing_but_bad_shards_is_an_error(urls, tmp_path):
    for number in range(4):
        (tmp_path / f"s-{number}.tar").write_bytes(b"no tar file" * 100)
    for workers, shards in ((0, 4), (2, 2)):
        with pytest.raises(DataError, match=rf"^none of {shards} shards holds a sample; the last fault: [^\n]*$"):
            list(Shards(urls, 8, 5, seed=0, workers=workers).batches(0, 1))
    with pytest.raises(DataError, match=r"none of the 2 shards in .* is there; the first: /nowhere/0.tar"):
        Shards("/nowhere/{0,1}.tar", 8, 5, seed=0, workers=0)


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
        for letter, fields in zip("efgh", (b'{"caption": NaN}', b'{"captions": [""]}', b"[1]", b"{"), strict=True):
            add(tar, f"{letter}.png", png(3))
            add(tar, f"{letter}.json", fields)
        add(tar, "i.png", png(3))
        add(tar, "i.txt", b" \n")
        add(tar, "j.png", png(3))
        add(tar, "j.txt", "caf\xe9".encode("latin1"))
    batches = list(Shards(urls, 8, 5, seed=0, workers=0).batches(0, 3))
    problems = "\n".join(line for batch in batches for line in batch.problems)
    complaints = ["a: the data is not an image", "b: no caption", "c: no picture", "h: can't read", "j: can't read"]
    for complaint in (*complaints, *(f"{letter}: no caption" for letter in "defgi")):
        assert complaint in problems
