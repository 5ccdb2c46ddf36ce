"""An index that several processes and threads use at once, or that is damaged, or can't be written."""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from test_embed import CONFIG, PREPROCESS
from test_index import FORK, contents, draw
from test_preprocess import mutated

from miniclip.errors import MiniclipError
from miniclip.io import LockedError, WriteError, locked
from miniclip.models import CLIP
from miniclip.search import Index, SearchError, approximate, shards, top_k, update_index
from miniclip.search import index as index_module
from miniclip.search import update as update_module

PICTURES = 40
KEYS = F.normalize(torch.randn(PICTURES, CONFIG.embed_dim, generator=torch.Generator().manual_seed(0)), dim=-1)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("models")
    for seed in range(2):
        torch.manual_seed(seed)
        save_file(CLIP(CONFIG).state_dict(), folder / f"{seed}.safetensors")
    return [str(folder / f"{seed}.safetensors") for seed in range(2)]


@pytest.fixture
def photos(tmp_path) -> Path:
    for i in range(5):
        draw(tmp_path / "photos" / f"{i}.png", i)
    return tmp_path / "photos"


class Keys(CLIP):
    """Embeds a picture of one colour as the row of KEYS that its red says."""

    def encode_image(self, image, normalize=False):
        red = image[:, 0, 0, 0] * CONFIG.preprocess.std[0] + CONFIG.preprocess.mean[0]
        return KEYS[(red * 255).round().int()]


def write_for(seconds: float, index: Path, photos: Path, model: str, mine: list[int], counts) -> None:
    torch.set_num_threads(1)
    chance = random.Random(mine[0])
    until, done = time.monotonic() + seconds, 0
    while time.monotonic() < until:
        for k in chance.sample(mine, 3):  # the name says which row of KEYS it is
            old = next(photos.rglob(f"{k}.png"), None)
            new = photos / chance.choice("abc") / f"{k}.png"
            if old is None:
                Image.new("RGB", (32, 32), (k, 0, 0)).save(new)
            elif chance.random() < 0.3:
                old.unlink()
            else:
                os.rename(old, new)
        with contextlib.suppress(LockedError):
            update_index(index, photos, model, batch_size=2, workers=1, approximate=chance.random() < 0.5)
            done += 1
    counts.put(("updates", done, []))


def read_for(seconds: float, index: Path, seed: int, counts) -> None:
    torch.set_num_threads(1)
    chance, opened, until, done, wrong = random.Random(seed), Index(index), time.monotonic() + seconds, 0, []
    search = [opened.search, lambda *asked: approximate.search(opened, *asked)][seed % 2]
    while time.monotonic() < until:
        query = KEYS[chance.randrange(PICTURES)][None]
        try:
            (hits,) = search(query, 5)
        except SearchError as error:
            if "has no approximate index, or has changed" not in str(error):
                wrong.append(str(error))
            continue
        except Exception as error:
            wrong.append(repr(error))
            continue
        done += 1
        for hit in hits:
            cosine = (KEYS[int(Path(hit.path).stem)] @ query[0]).item()
            if abs(cosine - hit.score) > 2e-3:
                wrong.append(f"{hit.path} has {cosine:.4f}, not {hit.score:.4f}")
    counts.put(("searches", done, wrong))


def test_two_writers_and_four_readers(models, tmp_path, monkeypatch):
    pytest.importorskip("faiss")
    photos, index = tmp_path / "photos", tmp_path / "index"
    for k in range(PICTURES):
        (photos / "abc"[k % 3]).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (k, 0, 0)).save(photos / "abc"[k % 3] / f"{k}.png")
    monkeypatch.setattr("miniclip.loading.load", lambda *_, **__: (Keys(CONFIG), PREPROCESS))
    monkeypatch.setattr(shards, "SHARD_ROWS", 8)
    update_index(index, photos, models[0], approximate=True)
    counts = FORK.Queue()
    halves = [list(range(first, PICTURES, 2)) for first in range(2)]
    processes = [FORK.Process(target=write_for, args=(4, index, photos, models[0], half, counts)) for half in halves]
    processes += [FORK.Process(target=read_for, args=(4, index, seed, counts)) for seed in range(4)]
    for process in processes:
        process.start()
    results = [counts.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
    assert [wrong for _, _, faults in results for wrong in faults] == []
    for kind in ("updates", "searches"):
        assert sum(done for name, done, _ in results if name == kind) >= 4
    update_index(index, photos)
    assert set(contents(index)) == {str(path) for path in photos.rglob("*.png")}


def test_an_update_between_scores_and_names(models, photos, tmp_path, monkeypatch):
    index = tmp_path / "index"
    update_index(index, photos, models[0])
    opened, paths_of = Index(index), index_module.paths_of
    before = contents(index)

    def late(shards, rows):
        monkeypatch.setattr(index_module, "paths_of", paths_of)
        (photos / "0.png").unlink()  # all rows after it move
        update_index(index, photos)
        return paths_of(shards, rows)

    monkeypatch.setattr(index_module, "paths_of", late)
    queries = torch.stack([torch.frombuffer(bytearray(row), dtype=torch.float16) for row in before.values()]).float()
    for path, hits in zip(before, opened.search(queries, 1), strict=True):
        assert (hits[0].path == path) == (path != str(photos / "0.png"))


def test_a_shard_that_goes_while_it_is_mapped(models, photos, tmp_path, monkeypatch):
    """safetensors opens the file, and PyTorch opens it once more: in between it may be replaced."""
    index = tmp_path / "index"
    update_index(index, photos, models[0])
    opened, query = Index(index), torch.ones(1, CONFIG.embed_dim)
    expected, real = opened.search(query, 3), index_module.safe_open

    def late(file, framework):
        if framework == "pt":
            monkeypatch.setattr(index_module, "safe_open", real)
            content = file.read_bytes()
            file.unlink()
            file.with_name(file.name.replace("-000001.", "-000099.")).write_bytes(content)
            raise RuntimeError(f"unable to open file <{file}> in read-only mode: No such file or directory (2)")
        return real(file, framework)

    monkeypatch.setattr(index_module, "safe_open", late)
    assert opened.search(query, 3) == expected


@pytest.fixture
def first(monkeypatch):
    """Let another update be done between an update's call and its lock."""

    def let(other) -> None:
        def late(*arguments):
            monkeypatch.setattr(update_module, "locked", locked)
            other()
            return locked(*arguments)

        monkeypatch.setattr(update_module, "locked", late)

    return let


def test_what_another_update_adds_is_not_deleted(models, photos, tmp_path, first):
    index = tmp_path / "index"
    update_index(index, photos, models[0])

    def other():
        draw(photos / "late.png", 30)
        update_index(index, photos)

    first(other)
    report = update_index(index, photos)
    assert (report.pictures, report.deleted) == (6, [])


def test_two_first_updates_with_other_models(models, photos, tmp_path, first):
    index = tmp_path / "index"
    first(lambda: update_index(index, photos, models[1]))
    with pytest.raises(SearchError, match=r"was made with .*1\.safetensors"):
        update_index(index, photos, models[0])
    assert Index(index).settings.model == models[1]


def test_approximate_search_is_bound_to_its_shards(models, photos, tmp_path):
    pytest.importorskip("faiss")
    index = tmp_path / "index"
    update_index(index, photos, models[0], approximate=True)
    opened, query = Index(index), torch.ones(1, 32)
    assert approximate.search(opened, query, 1) == opened.search(query, 1)
    (file,) = index.glob("*.faiss")
    old = file.read_bytes()
    (photos / "0.png").unlink()
    update_index(index, photos)
    file.write_bytes(old)  # as if it were built late
    with pytest.raises(SearchError, match="has no approximate index, or has changed"):
        approximate.search(opened, query, 1)
    assert approximate.build(Index(index)).name != file.name
    update_index(index, photos)
    assert len(list(index.glob("*.faiss"))) == 1 and not file.exists()


def test_searches_leave_pytorch_its_threads():
    """Also where several run at once, and for threads that begin later."""
    rows = F.normalize(torch.randn(40_000, 32), dim=1).half()
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with ThreadPoolExecutor(6) as pool:
            found = [pool.submit(top_k, [rows], KEYS[:2], 5) for _ in range(60)]
            assert all(torch.equal(each.result()[1], found[0].result()[1]) for each in found)
            assert {pool.submit(torch.get_num_threads).result() for _ in range(20)} == {3}
        later = []
        thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert torch.get_num_threads() == 3 and later == [3]
    finally:
        torch.set_num_threads(before)


def damage(shard: Path, **tensors) -> None:
    save_file(load_file(shard) | tensors, shard)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"paths": torch.zeros(3, dtype=torch.uint8)}, "its paths are not JSON"),
        ({"paths": torch.tensor(list(b'["a"]'), dtype=torch.uint8)}, "not a list of 5 strings"),
        ({"paths": torch.tensor(list(b"[1, 2, 3, 4, 5]"), dtype=torch.uint8)}, "not a list of 5 strings"),
        ({"embeddings": torch.zeros(5, 16).half()}, "for embeddings of 32 numbers"),
        ({"embeddings": torch.zeros(4, 32).half()}, "its tensors are"),
        ({"stats": torch.zeros(5, 1, dtype=torch.int64)}, "its tensors are"),
        ({"hashes": torch.zeros(2, 16, dtype=torch.uint8)}, "its tensors are"),
    ],
)
def test_damaged_shards(models, photos, tmp_path, tensors, said):
    index = tmp_path / "index"
    update_index(index, photos, models[0])
    (file,) = index.glob("*.safetensors")
    damage(file, **tensors)
    with pytest.raises(SearchError, match=f"is damaged: .*{said}.*delete it"):
        Index(index).search(torch.ones(1, 32))
    with pytest.raises(SearchError, match="is damaged"):
        update_index(index, photos)
    file.unlink()
    assert update_index(index, photos).added == 5


def test_other_damage(models, photos, tmp_path):
    pytest.importorskip("faiss")
    index = tmp_path / "index"
    update_index(index, photos, models[0], approximate=True)
    opened = Index(index)
    (file,) = index.glob("*.faiss")
    for content in (b"", b"not faiss", file.read_bytes()[:200]):
        file.write_bytes(content)
        with pytest.raises(SearchError, match="is damaged: delete it and run"):
            approximate.search(opened, torch.ones(1, 32))
    for content in ("[]", '{"a": 1}', '{"a": [1]}', "{"):
        (index / "rejected.json").write_text(content)
        with pytest.raises(SearchError, match="is damaged"):
            update_index(index, photos)
    (index / "rejected.json").unlink()
    settings = json.loads((index / "index.json").read_text())
    for change in ({"embedding": "32"}, {"model": None}):
        (index / "index.json").write_text(json.dumps(settings | change))
        with pytest.raises(SearchError, match="is damaged"):
            Index(index)


@pytest.mark.slow
def test_mutated_indexes(models, photos, tmp_path):
    """Right answers or a SearchError, to a search and to an update. The seed and number say which index it was."""
    index, right = tmp_path / "index", tmp_path / "right"
    (photos / "broken.png").write_bytes(b"not a picture")
    update_index(right, photos, models[0])
    query, started, refused = torch.ones(1, 32), time.monotonic(), 0
    expected = {hit.path for hit in Index(right).search(query)[0]}
    for number in range(2000):
        chance = random.Random(number)
        shutil.rmtree(index, ignore_errors=True)
        shutil.copytree(right, index)
        file = chance.choice(sorted(index.glob("*.*s*")))
        file.write_bytes(mutated(file.read_bytes(), chance))
        try:
            (hits,) = Index(index).search(query)
            assert len(hits) == 5 or file.suffix == ".safetensors", number
            assert {hit.path for hit in hits} == expected or file.suffix == ".safetensors", number  # changed in a name
            update_index(index, photos)
        except MiniclipError as error:
            refused += 1
            assert str(error), number
        if time.monotonic() - started > 60:
            break
    assert number > 200 and refused > number / 4


def run_limited(arguments: tuple, size: int, answer) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))  # as a full disk refuses to write
    try:
        update_index(*arguments)
    except Exception as error:
        answer.put(f"{type(error).__name__}: {error}")
    else:
        answer.put("done")


@pytest.mark.parametrize("size", [10, 1000])  # the settings, or a shard, do not fit
def test_a_full_disk(models, photos, tmp_path, size):
    index = tmp_path / "index"
    update_index(index, photos, models[0])
    before = contents(index)
    draw(photos / "new.png", 20)
    answer = FORK.Queue()
    process = FORK.Process(target=run_limited, args=((index, photos), size, answer))
    process.start()
    said = answer.get(timeout=60)
    process.join()
    assert said.startswith("WriteError: can't write") and "File too large" in said
    assert contents(index).items() >= before.items()
    assert update_index(index, photos).pictures == 6
    assert not list(index.glob(".*.part"))


def test_where_no_index_can_be_made(models, photos, tmp_path):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(WriteError, match="can't make the directory /proc/index"):
        update_index("/proc/index", photos, models[0])
    with pytest.raises((WriteError, SearchError), match="file"):
        update_index(tmp_path / "file", photos, models[0])
    with pytest.raises(WriteError, match="file/index"):
        update_index(tmp_path / "file" / "index", photos, models[0])


def test_faults_of_the_system_are_not_remembered(models, photos, tmp_path, monkeypatch):
    index = tmp_path / "index"
    (photos / "broken.png").write_bytes(b"not a picture")
    draw(photos / "large.png", 100)
    with monkeypatch.context() as patched:
        patched.setattr(Image, "MAX_IMAGE_PIXELS", 110 * 32)
        report = update_index(index, photos, models[0])
        assert report.pictures == 5 and len(report.rejected) == 2
    report = update_index(index, photos)
    assert report.added == 1 and len(report.rejected) == 1

    tried = []
    take = update_module._Pictures.__getitem__
    monkeypatch.setattr(update_module._Pictures, "__getitem__", lambda s, i: tried.append(s.paths[i]) or take(s, i))
    update_index(index, photos)
    assert tried == []  # the broken one is known
    with monkeypatch.context() as patched:
        patched.setattr(update_module, "_decoder", lambda: "pillow 99")
        update_index(index, photos)
        assert tried == [str(photos / "broken.png")]  # another decoder may read it
        update_index(index, photos)
        assert len(tried) == 1
    rejected = json.loads((index / "rejected.json").read_text())
    (index / "rejected.json").write_text(json.dumps({path: fault[:3] for path, fault in rejected.items()}))
    update_index(index, photos)  # as version 1 wrote it
    assert len(tried) == 2


def test_folders_within_folders(models, photos, tmp_path):
    draw(photos / "deep" / "9.png", 9)
    for number, inputs in enumerate([[photos, photos / "deep"], [photos / "deep", photos], [photos / "0.png", photos]]):
        report = update_index(tmp_path / str(number), inputs, models[0])
        assert report.pictures == report.added == 6
    (tmp_path / "link").symlink_to(photos / "deep")
    assert update_index(tmp_path / "linked", [photos, tmp_path / "link"], models[0]).pictures == 6
    (tmp_path / "empty").mkdir()
    with pytest.raises(SearchError, match=r"there are no pictures in .*empty"):  # a drive that is not mounted
        update_index(tmp_path / "0", [photos, tmp_path / "empty"])
    assert len(contents(tmp_path / "0")) == 6


def test_what_a_scan_leaves_out(models, photos, tmp_path):
    draw(photos / ".hidden" / "h.png", 11)
    draw(photos / "@eaDir" / "t.png", 12)
    (photos / "._0.png").write_bytes(b"AppleDouble")
    (photos / "notes.txt").write_text("no picture")
    os.mkfifo(photos / "pipe.jpg")
    shutil.copy(draw(photos / "x.png", 13), photos / "no_suffix")
    report = update_index(tmp_path / "index", photos, models[0])
    assert report.pictures == 7 and report.rejected == []
    assert sum(report.left_out.values()) == 5
    assert update_index(tmp_path / "index", photos, hidden=True).pictures == 9


def test_an_index_remembers_upright(models, photos, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(photos / "0.png") as image:
        image.save(photos / "turned.png", exif=exif)
    for upright in (False, True):
        index = tmp_path / str(upright)
        update_index(index, photos, models[0], upright=upright)
        rows = contents(index)
        assert (rows[str(photos / "turned.png")] != rows[str(photos / "0.png")]) == upright
        assert Index(index).settings.upright == upright
        draw(photos / f"new {upright}.png", 50 + upright)
        assert update_index(index, photos).added == 1  # as it was
        with pytest.raises(SearchError, match="make another index"):
            update_index(index, photos, upright=not upright)


def test_an_index_of_version_1(models, photos, tmp_path):
    index = tmp_path / "index"
    update_index(index, photos, models[0])
    before = contents(index)
    (file,) = index.glob("*.safetensors")
    file.rename(index / "000000000-000000000.safetensors")
    (index / "approximate.faiss").write_bytes(b"of version 1")
    settings = json.loads((index / "index.json").read_text())
    old = {name: settings[name] for name in ("format", "model", "activation", "fingerprint", "embedding")}
    (index / "index.json").write_text(json.dumps(old | {"version": 1}))
    assert contents(index) == before
    (photos / "0.png").unlink()
    assert update_index(index, photos).pictures == 4
    assert json.loads((index / "index.json").read_text())["version"] == 2
    assert not (index / "approximate.faiss").exists()


def test_a_name_is_never_used_again(models, photos, tmp_path):
    """An edit, an index that becomes empty, and a merge, each under new names."""
    index, used = tmp_path / "index", []

    def update() -> None:
        update_index(index, photos, models[0], batch_size=2)
        used.extend(set(os.listdir(index)) - {"index.json", ".lock"})

    update()
    (photos / "0.png").unlink()
    update()
    for path in photos.glob("*.png"):
        path.unlink()
    draw(photos / "new.png", 20)
    update()
    draw(photos / "newer.png", 21)
    update()
    assert len(used) == len(set(used)) == 4


def test_the_home_directory(models, photos, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert update_index("~/index", "~/photos", models[0]).pictures == 5
    assert len(Index("~/index")) == 5
    settings = replace(Index("~/index").settings, update=1)
    assert settings == Index(tmp_path / "index").settings
