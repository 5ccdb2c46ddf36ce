"""An index of pictures: what is in it, what a second run does, and what a process that is killed leaves behind."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_embed import CONFIG, PREPROCESS

from miniclip import parallel
from miniclip.commands import main
from miniclip.embed import embed_images
from miniclip.io import LockedError, locked, write_json
from miniclip.models import CLIP
from miniclip.search import Index, SearchError, shards, update_index
from miniclip.search import update as update_module
from miniclip.search.compare import content_hash, find
from miniclip.search.index import Settings, read_settings, shard_files
from miniclip.search.update import describe

FORK = multiprocessing.get_context("fork")  # without it every process would import PyTorch


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model") / "small.safetensors"
    save_file(CLIP(CONFIG).state_dict(), path)
    return str(path)


def draw(path: Path, number: int) -> Path:
    """A picture whose content, and size, no other number has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 256, (24 + number, 32, 3), np.uint8)
    Image.fromarray(pixels).save(path, "PNG")
    return path


@pytest.fixture
def photos(tmp_path) -> Path:
    for i in range(7):
        draw(tmp_path / "photos" / ("deep/er" if i % 2 else "") / f"{i}.png", i)
    (tmp_path / "photos" / "notes.txt").write_text("not a picture")
    return tmp_path / "photos"


def contents(index: Path) -> dict[str, bytes]:
    """Each picture's embedding."""
    opened = Index(index)
    embeddings = torch.cat([torch.empty(0, 32, dtype=torch.float16), *opened.blocks()])
    paths = opened.paths(list(range(len(opened))))
    assert len(set(paths)) == len(paths)
    return {path: row.numpy().tobytes() for path, row in zip(paths, embeddings, strict=True)}


def never_load(*_, **__):
    raise AssertionError("a model was loaded")


def test_the_format_as_it_is_documented(model, photos, tmp_path):
    """Read as another program would, from the words in index.py."""
    report = update_index(tmp_path / "index", [photos], model, batch_size=2)
    assert (report.pictures, report.added, report.unchanged, report.rejected) == (7, 7, 0, [])
    settings = json.loads((tmp_path / "index" / "index.json").read_text())
    assert settings["format"] == "miniclip search index" and settings["version"] == 2
    assert settings["model"] == model and settings["embedding"] == 32
    (file,) = sorted((tmp_path / "index").glob("*.safetensors"))
    assert file.name == "000000000-000000003-000001.safetensors"
    assert file.stat().st_mode == (tmp_path / "index" / "index.json").stat().st_mode
    with safetensors.safe_open(file, "numpy") as shard:
        assert set(shard.keys()) == {"embeddings", "paths", "stats", "hashes"}
        paths = json.loads(shard.get_tensor("paths").tobytes())
        embeddings, stats, hashes = map(shard.get_tensor, ("embeddings", "stats", "hashes"))
    assert sorted(paths) == sorted(str(path) for path in photos.rglob("*.png"))
    clip = CLIP(CONFIG).eval()
    clip.load_state_dict(load_file(model))
    expected, _ = embed_images(clip, PREPROCESS, paths, 2, dtype=torch.float16)
    assert embeddings.dtype == np.float16
    np.testing.assert_array_equal(embeddings, expected.numpy())
    for path, (size, mtime), digest in zip(paths, stats.tolist(), hashes, strict=True):
        found = os.stat(path)
        assert (size, mtime) == (found.st_size, found.st_mtime_ns)
        assert digest.tobytes() == content_hash(path)


def test_a_second_run_reads_neither_model_nor_pictures(model, photos, tmp_path, monkeypatch):
    index = tmp_path / "index"
    update_index(index, [photos], model)
    before = {file.name: file.stat().st_mtime_ns for file in index.glob("*.safetensors")}
    monkeypatch.setattr("miniclip.loading.load", never_load)
    monkeypatch.setattr(sys.modules["miniclip.loading"], "open_checkpoint", never_load)
    monkeypatch.setattr("miniclip.search.compare.content_hash", never_load)
    report = update_index(index, [photos])
    assert (report.pictures, report.added, report.unchanged) == (7, 0, 7)
    assert before == {file.name: file.stat().st_mtime_ns for file in index.glob("*.safetensors")}
    draw(photos / "new.png", 50)
    with pytest.raises(AssertionError, match="a model was loaded"):
        update_index(index, [photos])


def test_ten_thousand_unchanged_files_take_under_two_seconds(tmp_path, monkeypatch):
    folder, index = tmp_path / "photos", tmp_path / "index"
    folder.mkdir()
    index.mkdir()
    for i in range(10_000):
        (folder / f"{i:05}.jpg").write_bytes(b"%d" % i)
    files = find([folder]).scan.pictures
    write_json(index / "index.json", Settings("small", None, "0", 512).content())
    stats = torch.tensor(list(files.values()))
    empty = torch.zeros(len(files), 512, dtype=torch.float16), torch.zeros(len(files), 16, dtype=torch.uint8)
    shards.Rows(empty[0], list(files), stats, empty[1]).write(index, 0, 312, 0)
    monkeypatch.setattr("miniclip.loading.load", never_load)
    report = update_index(index, [folder])
    assert (report.pictures, report.unchanged, report.added) == (10_000, 10_000, 0)
    assert report.seconds < 2
    assert update_index(index, [folder], "small").unchanged == 10_000
    code = f"""
import sys, miniclip.commands
assert miniclip.commands.main(["index", {str(folder)!r}, "-o", {str(index)!r}]) == 0
assert "torch" not in sys.modules, "importing PyTorch takes longer than all else"
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_new_changed_touched_moved_and_deleted(model, photos, tmp_path, monkeypatch):
    index = tmp_path / "index"
    update_index(index, [photos], model, batch_size=2)
    before = contents(index)
    names = {i: str(next(photos.rglob(f"{i}.png"))) for i in range(7)}
    draw(Path(names[0]), 100)  # changed
    os.utime(names[1], ns=(5, 5))  # touched
    moved = tmp_path / "photos" / "elsewhere" / "renamed.png"
    moved.parent.mkdir()
    shutil.move(names[2], moved)
    os.unlink(names[3])  # deleted
    added = str(draw(photos / "added.png", 101))

    encoded = []
    take = update_module._Pictures.__getitem__
    monkeypatch.setattr(update_module._Pictures, "__getitem__", lambda s, i: encoded.append(s.paths[i]) or take(s, i))
    report = update_index(index, [photos])
    assert sorted(encoded) == sorted([names[0], added])
    assert report.changed == [names[0]] and report.moved == [(names[2], str(moved))] and report.deleted == [names[3]]
    assert (report.pictures, report.added, report.unchanged) == (7, 2, 4)
    after = contents(index)
    assert set(after) == {names[0], names[1], str(moved), names[4], names[5], names[6], added}
    assert after[str(moved)] == before[names[2]]
    assert after[names[1]] == before[names[1]]
    assert after[names[0]] != before[names[0]]
    monkeypatch.setattr("miniclip.loading.load", never_load)
    assert update_index(index, [photos]).unchanged == 7

    fresh = tmp_path / "fresh"
    monkeypatch.undo()
    update_index(fresh, [photos], model)
    for path, embedding in contents(fresh).items():
        a, b = (np.frombuffer(x, np.float16).astype(np.float32) for x in (embedding, after[path]))
        np.testing.assert_allclose(a, b, atol=1e-3)


def test_same_size_and_time_but_other_content_is_only_seen_by_its_time(model, tmp_path):
    """What the rule can't see, and what it can: a file of the same size is compared by its content."""
    path = tmp_path / "photos" / "a.bmp"
    path.parent.mkdir()
    Image.new("RGB", (32, 32), "red").save(path)
    update_index(tmp_path / "index", [path.parent], model)
    Image.new("RGB", (32, 32), "blue").save(path)  # of the same size
    report = update_index(tmp_path / "index", [path.parent])
    assert report.changed == [str(path)] and report.pictures == 1


def test_other_folders_are_left_alone_unless_their_pictures_moved(model, photos, tmp_path):
    index, other = tmp_path / "index", tmp_path / "other"
    draw(other / "x.png", 20), draw(other / "y.png", 21)
    update_index(index, [photos], model)
    assert update_index(index, [other]).pictures == 9
    shutil.move(other, tmp_path / "unplugged")
    assert update_index(index, [photos]).pictures == 9  # a drive that is not there is no reason to forget it
    report = update_index(index, [tmp_path / "unplugged" / "x.png"])
    assert report.moved == [(str(other / "x.png"), str(tmp_path / "unplugged" / "x.png"))]
    assert report.pictures == 9 and report.deleted == []


def test_a_folder_that_becomes_empty_of_what_was_indexed(model, photos, tmp_path):
    update_index(tmp_path / "index", [photos], model)
    for path in photos.rglob("*.png"):
        path.unlink()
    draw(photos / "last.png", 30)
    report = update_index(tmp_path / "index", [photos])
    assert report.pictures == 1 and len(report.deleted) == 7


def test_unreadable_pictures_are_listed_and_the_rest_indexed(model, photos, tmp_path, capsys, monkeypatch):
    broken, cut = photos / "broken.jpg", photos / "cut.png"
    broken.write_bytes(b"not a picture")
    cut.write_bytes((photos / "0.png").read_bytes()[:200])
    command = ["index", str(photos), "-o", str(tmp_path / "index")]
    assert main([*command, "--model", model]) == 1
    printed = capsys.readouterr()
    assert "7 pictures (7 new)" in printed.out
    assert f"{broken} is not an image" in printed.err and "cut.png" in printed.err and "2 of 9 inputs" in printed.err
    with monkeypatch.context() as patched:  # they are not tried again, but listed
        patched.setattr("miniclip.loading.load", never_load)
        assert main(command) == 1
        assert "broken.jpg" in capsys.readouterr().err
    draw(broken, 40)
    cut.unlink()
    assert main([*command, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["pictures"] == 8 and report["rejected"] == []
    assert json.loads((tmp_path / "index" / "rejected.json").read_text()) == {}


@pytest.mark.skipif(os.name == "nt", reason="there file names are Unicode")
def test_names_that_are_not_utf8(model, tmp_path, capsys):
    name = os.fsdecode(b"caf\xe9\x1b[31m.png")
    draw(tmp_path / "photos" / name, 1)
    assert main(["index", str(tmp_path / "photos"), "-o", str(tmp_path / "index"), "--model", model]) == 0
    assert list(contents(tmp_path / "index")) == [str(tmp_path / "photos" / name)]
    capsys.readouterr()
    assert main(["search", str(tmp_path / "index"), "coffee"]) == 0
    assert "caf\\udce9\\x1b[31m.png" in capsys.readouterr().out


def slow_update(index: Path, photos: Path, model: str, seconds: float, writing) -> None:
    """An update that takes its time, so that it can be killed in any of its moments."""
    torch.set_num_threads(1)
    write = shards.Rows.write

    def slow(*arguments):
        writing.set()
        time.sleep(seconds)
        write(*arguments)
        time.sleep(seconds)

    shards.Rows.write = slow
    update_index(index, [photos], model, batch_size=1, workers=1)


def test_killed_at_any_moment(model, tmp_path):
    """Several processes in a row are killed. What each had written is there, and can be searched."""
    photos, index = tmp_path / "photos", tmp_path / "index"
    for i in range(40):
        draw(photos / f"{i:02}.png", i)
    chance = random.Random(0)
    killed, counts = 0, [0]
    while killed < 8:
        writing = FORK.Event()
        process = FORK.Process(target=slow_update, args=(index, photos, model, 0.02, writing))
        process.start()
        if killed % 4:  # else it may be killed before it writes
            writing.wait(60)
        process.join(chance.uniform(0.05, 0.3))
        if process.exitcode is not None:
            break
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        killed += 1
        if (index / "index.json").exists():
            counts.append(len(contents(index)))  # readable, and each picture once
            assert counts[-1] >= counts[-2]
            Index(index).search(torch.ones(1, 32), 3)
    assert killed >= 3 and len(set(counts)) > 2
    report = update_index(index, [photos], model)
    assert report.unchanged == counts[-1] and report.added == 40 - counts[-1]
    fresh = tmp_path / "fresh"
    update_index(fresh, [photos], model, batch_size=1)
    assert set(contents(index)) == set(contents(fresh))
    assert len(list(index.glob("*.safetensors"))) == 1 and not list(index.glob(".*.part"))


@pytest.mark.parametrize("when", ["after the merged shard", "in the middle of deleting"])
def test_killed_in_a_merge(model, photos, tmp_path, when, monkeypatch):
    index = tmp_path / "index"
    with monkeypatch.context() as patched:
        patched.setattr(update_module, "merge", lambda *_: None)
        update_index(index, [photos], model, batch_size=2)
    before = contents(index)
    parts = sorted(index.glob("*.safetensors"))
    assert len(parts) == 4
    with monkeypatch.context() as patched:
        patched.setattr(shards, "remove_leftovers", lambda *_: None)
        shards.merge(index, replace(read_settings(index), update=2))
    if when == "in the middle of deleting":
        parts[1].unlink()
    assert len(list(index.glob("*.safetensors"))) > 2
    assert contents(index) == before
    (index / ".000000009-000000009.safetensors.77.part").write_bytes(b"half of a shar")
    assert update_index(index, [photos]).unchanged == 7
    assert contents(index) == before
    assert [file.name for file in index.glob("*.safetensors")] == ["000000000-000000003-000002.safetensors"]
    assert not list(index.glob(".*.part"))


def test_shards_within_others_are_leftovers(tmp_path):
    for first, last in ((0, 3), (0, 0), (2, 3), (4, 4), (5, 9), (6, 9), (5, 5)):
        (tmp_path / f"{first:09}-{last:09}.safetensors").touch()
    current, leftover = shard_files(tmp_path)
    assert [file.name[:19] for file in current] == [f"{a:09}-{b:09}" for a, b in ((0, 3), (4, 4), (5, 9))]
    assert len(leftover) == 4


def test_large_shards_are_not_merged(model, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_ROWS", 4)
    index = tmp_path / "index"
    update_index(index, [photos], model, batch_size=2)
    assert [shard.rows for shard in Index(index).shards] == [4, 3]
    assert len(contents(index)) == 7


def test_searching_while_shards_are_merged(model, photos, tmp_path, monkeypatch):
    index = tmp_path / "index"
    with monkeypatch.context() as patched:
        patched.setattr(update_module, "merge", lambda *_: None)
        update_index(index, [photos], model, batch_size=2)
    opened = Index(index)
    shards.merge(index, replace(read_settings(index), update=2))
    (hits,) = opened.search(torch.ones(1, 32), 7)
    assert {hit.path for hit in hits} == set(contents(index))


def test_two_writers(model, photos, tmp_path):
    index = tmp_path / "index"
    update_index(index, [photos], model)
    with locked(index / ".lock"), pytest.raises(LockedError, match="another process is updating"):
        update_index(index, [photos])
    assert update_index(index, [photos]).unchanged == 7


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "is not an index, which is a directory with an index.json"),
        ("{", "is not of an index of miniclip"),
        ("[1]", "is not of an index of miniclip"),
        ('{"format": "another", "version": 1}', "is not of an index of miniclip"),
        ('{"format": "miniclip search index", "version": 3}', "has version 3, this miniclip reads 1 and 2: update it"),
        ('{"format": "miniclip search index", "version": 1, "model": "m"}', "is damaged"),
    ],
)
def test_what_is_not_an_index(photos, tmp_path, capsys, content, said):
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine.txt").write_text("precious")
    if content:
        (other / "index.json").write_text(content)
    assert main(["index", str(photos), "-o", str(other)]) == 2
    error = capsys.readouterr().err
    assert said in error and "miniclip index FOLDER" in error
    assert main(["search", str(other), "a dog"]) == 2
    assert (said if content else "is not an index, and there are no pictures in it") in capsys.readouterr().err
    assert (other / "mine.txt").read_text() == "precious"


def test_wrong_paths(model, photos, tmp_path, capsys):
    index = str(tmp_path / "index")
    (tmp_path / "empty").mkdir()
    for folder, said in (("nowhere", "there is no file or folder"), ("empty", "there are no pictures in")):
        assert main(["index", str(tmp_path / folder), "-o", index, "--model", model]) == 2
        assert said in capsys.readouterr().err
        assert not Path(index).exists()
    assert main(["index", str(photos), "-o", index, "--model", "nothing"]) == 2
    assert "nothing is neither a file or directory" in capsys.readouterr().err
    assert not Path(index).exists()
    assert main(["search", index, "a dog"]) == 2
    assert "there is no index" in capsys.readouterr().err


def test_a_damaged_shard_is_named(model, photos, tmp_path):
    index = tmp_path / "index"
    update_index(index, [photos], model)
    (file,) = index.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(SearchError, match=r"000000000-000000000-000001.safetensors is damaged.*delete it and run"):
        Index(index)
    file.unlink()
    assert update_index(index, [photos]).added == 7


def test_a_model_that_does_not_match(model, photos, tmp_path, capsys):
    """One bit of the image tower is another model; the text tower, the file's format and its place are not."""
    index = tmp_path / "index"
    update_index(index, [photos], model)
    tensors = load_file(model)
    other = {**tensors, "visual.proj": tensors["visual.proj"].clone()}
    other["visual.proj"][3, 4] = torch.nextafter(other["visual.proj"][3, 4], torch.tensor(9.0))
    save_file(other, tmp_path / "other.safetensors")
    for command in (["index", str(photos), "-o", str(index)], ["search", str(index), "a dog"]):
        assert main([*command, "--model", str(tmp_path / "other.safetensors")]) == 2
        assert f"was made with {model}, and" in capsys.readouterr().err
    assert main(["search", str(index), "a dog", "--activation", "gelu"]) == 2
    assert "was made with" in capsys.readouterr().err

    torch.save({**tensors, "text_projection": tensors["text_projection"] + 1}, tmp_path / "moved.pt")
    draw(photos / "new.png", 60)
    assert main(["index", str(photos), "-o", str(index), "--model", str(tmp_path / "moved.pt")]) == 0
    assert Index(index).settings.model == str(tmp_path / "moved.pt")


def test_the_recorded_file_became_another_model(model, photos, tmp_path):
    mine = tmp_path / "mine.safetensors"
    shutil.copy(model, mine)
    update_index(tmp_path / "index", [photos], mine)
    tensors = load_file(mine)
    save_file({**tensors, "visual.ln_post.bias": tensors["visual.ln_post.bias"] + 1}, mine)
    assert update_index(tmp_path / "index", [photos]).unchanged == 7  # nothing to be encoded
    draw(photos / "new.png", 60)
    with pytest.raises(SearchError, match="now has another image tower"):
        update_index(tmp_path / "index", [photos])
    assert len(contents(tmp_path / "index")) == 7


def test_fingerprints_stay_what_they_are(tmp_path):
    """Should this fail, indexes that people have would be refused: a new VERSION has to say why."""
    tensors = {name: torch.arange(x.numel()).view(x.shape) / 8 for name, x in CLIP(CONFIG).state_dict().items()}
    save_file(tensors, tmp_path / "counting.safetensors")
    assert describe(str(tmp_path / "counting.safetensors"), None).fingerprint[:16] == "2458bc2dc2b6f38e"


def test_a_model_that_gives_nan(model, photos, tmp_path):
    tensors = load_file(model)
    tensors["visual.proj"][0, 0] = torch.nan
    save_file(tensors, tmp_path / "nan.safetensors")
    with pytest.raises(SearchError, match="gives NaN"):
        update_index(tmp_path / "index", [photos], tmp_path / "nan.safetensors")


def one_of_several(rank: int, processes: int, port: int, arguments: tuple) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    parallel.setup("cpu")
    report = update_index(*arguments, batch_size=2)
    assert (report is None) == (rank > 0)
    torch.distributed.destroy_process_group()


def test_processes_make_the_index_that_one_makes(model, photos, tmp_path):
    (photos / "3_broken.png").write_bytes(b"not a picture")
    update_index(tmp_path / "one", [photos], model, batch_size=2)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = (tmp_path / "two", [photos], model)
    processes = [FORK.Process(target=one_of_several, args=(rank, 2, port, arguments)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    files = sorted(file.name for file in (tmp_path / "one").iterdir())
    assert "rejected.json" in files and files == sorted(file.name for file in (tmp_path / "two").iterdir())
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
