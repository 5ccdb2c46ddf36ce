"""Finding: exactly the best, in bounded memory; by words, by pictures, by several; and approximately."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from test_index import FORK

from miniclip import load, tokenize
from miniclip.commands import main
from miniclip.errors import MissingExtraError
from miniclip.io import write_json
from miniclip.search import Index, SearchError, approximate, embed_query, exact, shards, top_k, update_index
from miniclip.search.index import Settings

IMAGES = Path(__file__).parents[2] / "examples" / "images"


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def by_hand(embeddings: torch.Tensor, queries: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Everything at once in float64, the lower row first."""
    scores = queries.double() @ embeddings.double().T
    rows = scores.argsort(dim=1, descending=True, stable=True)[:, :k]
    return scores.gather(1, rows), rows


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    ("sizes", "queries", "k"),
    [((1,), 1, 1), ((7, 1, 0, 64), 3, 5), ((1000, 2500), 1, 10), ((5000, 300, 5001), 40, 10), ((30,), 2, 100)],
)
def test_exactly_the_best_rows(sizes, queries, k, threads, monkeypatch):
    monkeypatch.setattr(exact, "CONVERTED", 64 * 32)
    monkeypatch.setattr(exact, "PIECE", 200)
    blocks = [unit(size, 32, seed=size).half() for size in sizes]
    asked = unit(queries, 32, seed=1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        scores, rows = top_k(blocks, asked, k)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    expected, order = by_hand(torch.cat(blocks), asked, k)
    torch.testing.assert_close(scores.double(), expected, atol=1e-6, rtol=0)
    assert torch.equal(rows, order)


@pytest.mark.parametrize("queries", [1, 3])
def test_rows_that_get_better_and_better(queries):
    """Each beats all before it, which a filter by the best so far lets through."""
    asked = unit(queries, 64, seed=1)
    lengths = torch.linspace(0.1, 0.9, 40_000)[:, None]
    rows = (lengths * asked[:1] + 0.01 * unit(40_000, 64)).half()
    scores, found = top_k([rows], asked, 20)
    expected, order = by_hand(rows, asked, 20)
    torch.testing.assert_close(scores.double(), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(rows[found].float(), rows[order].float(), atol=2e-3, rtol=0)
    assert found[0, 0] == order[0, 0] > 39_000


@pytest.mark.parametrize("queries", [1, 4])
@pytest.mark.parametrize("width", [32, 512, 1000])
def test_how_far_products_can_be_off(queries, width):
    """The bound that exactness rests on, for rows whose roundings all point the same way too."""
    asked = 1.7 * unit(queries, width, seed=1)
    rows = torch.cat([unit(2000, width).half(), F.normalize(asked, dim=1).half(), -F.normalize(asked, dim=1).half()])
    scores, error = exact._Multiply(asked)(rows)
    off = (scores.double() - asked.double() @ rows.double().T).abs().amax(dim=1)
    assert (off <= error).all()
    assert (off > error / 1e4).all() and (error < 3e-3).all()  # nor is it a bound of no use


@pytest.mark.parametrize("kind", ["half", "float", "some are shorter", "all equal", "close"])
def test_what_a_gpu_computes(kind, monkeypatch):
    """Its answers are the CPU's, which computes those that the similarities leave in doubt."""
    monkeypatch.setattr(exact, "GPU_ROWS", 300)
    rows, asked = unit(1000, 64).half(), 1.7 * unit(40, 64, seed=1)
    if kind == "float":
        rows = unit(1000, 64)
    if kind == "some are shorter":  # so that the best cosines are not the best products
        rows = rows * torch.linspace(0.2, 1, 1000)[:, None].half()
    if kind == "all equal":
        rows, asked = rows[:1].expand(1000, -1), torch.cat([asked, torch.zeros(1, 64)])
    if kind == "close":  # by less than the rounding of the queries
        rows = F.normalize(rows[:1].float() + 4e-4 * unit(1000, 64), dim=1).half()
    blocks = rows.split([7, 293, 0, 400, 1, 299])
    on_cpu = []
    monkeypatch.setattr(exact, "top_k", lambda *arguments: on_cpu.append(len(arguments[1])) or top_k(*arguments))
    scores, found = exact.top_k_by_cosine(blocks, asked, 10)
    expected = top_k(blocks, asked, 10)
    assert torch.equal(found, expected[1])
    torch.testing.assert_close(scores, expected[0], atol=2e-7, rtol=0)
    assert (sum(on_cpu) < 3 * len(asked)) == (kind in ("half", "float"))  # of three pieces

    nothing = torch.zeros(len(asked), 10)
    monkeypatch.setattr(exact, "top_k", lambda rows, asked, k: (nothing[: len(asked)], nothing[: len(asked)].long()))
    assert torch.equal(exact.top_k_by_cosine(blocks, asked, 10)[1], found) == (not on_cpu)  # negative control


def signs(*negative: list[int]) -> torch.Tensor:
    """Rows of 1/8, and of -1/8 at these places: of unit length, and held by float16."""
    return torch.stack([torch.full((64,), 0.125).index_fill(0, torch.tensor(places), -0.125) for places in negative])


def test_what_the_rounding_of_a_query_hides(monkeypatch):
    """It makes the query's numbers equal, and with them the rows' cosines. So the last 20 rows, which are the best, are
    no candidates, and the candidates differ by more than products in float32 are off."""
    asked = 0.125 + 2.8e-5 * torch.tensor([1.0, -1.0]).repeat(32)
    assert (asked.half() == 0.125).all()
    higher, lower = [list(range(start, 64, 2)) for start in (0, 1)]
    some = [higher[i : i + 4] + lower[i : i + 4] for i in range(10)] + [higher[i : i + 8] for i in range(10)]
    rows = signs(*some, *(lower[i : i + 8] for i in range(20))).half()
    on_cpu = []
    monkeypatch.setattr(exact, "top_k", lambda *arguments: on_cpu.append(1) or top_k(*arguments))
    assert exact.top_k_by_cosine([rows], asked[None], 10)[1].tolist() == [list(range(20, 30))] and on_cpu


def test_equal_products_whose_cosines_are_rounded_apart(monkeypatch):
    asked = torch.full((64,), 0.125)
    asked[:4] += torch.tensor([80, -20, 30, 30]) * 2.0**-20
    assert asked[:2].sum() == asked[2:4].sum() and asked[:2].half().float().sum() > asked[2:4].half().float().sum()
    rows = signs([0, 1], [2, 3], *([*range(start, start + 20)] for start in range(4, 24))).half()
    monkeypatch.setattr(exact, "top_k", None)  # no query is in doubt
    assert exact.top_k_by_cosine([rows], asked[None], 2)[1].tolist() == [[0, 1]]


def test_few_rows_by_similarity():
    for sizes, k in (((3, 0), 10), ((1,), 1), ((20,), 20), ((20,), 15)):
        blocks, asked = [unit(size, 32, seed=size).half() for size in sizes], unit(4, 32, seed=9)
        for found, expected in zip(exact.top_k_by_cosine(blocks, asked, k), top_k(blocks, asked, k), strict=True):
            torch.testing.assert_close(found, expected, atol=2e-7, rtol=0)
    assert exact.top_k_by_cosine([], unit(4, 32), 3)[1].shape == top_k([], unit(4, 32), 3)[1].shape == (4, 0)


@pytest.mark.parametrize("threads", [1, 3])
def test_of_equal_rows_the_lower_comes_first(threads, monkeypatch):
    """Twelve different rows, each hundreds of times and at the ends of blocks, which products round differently."""
    monkeypatch.setattr(exact, "PIECE", 300)
    kinds = unit(12, 48).half()
    numbers = torch.randint(12, (3001,), generator=torch.Generator().manual_seed(2))
    asked = unit(5, 48, seed=3)
    torch.set_num_threads(threads)
    try:
        _, rows = top_k(kinds[numbers].split(1000), asked, 500)
    finally:
        torch.set_num_threads(1)
    best = (asked @ kinds.float().T).argsort(dim=1, descending=True)
    for line, order in zip(rows, best, strict=True):
        expected = torch.cat([(numbers == kind).nonzero().flatten() for kind in order])[:500]
        assert torch.equal(line, expected)


def make_index(directory: Path, embeddings: torch.Tensor, rows: int) -> Index:
    directory.mkdir()
    write_json(directory / "index.json", Settings("tiny-ViT", None, "", embeddings.shape[1]).content())
    for number, part in enumerate(embeddings.split(rows)):
        table = [f"/photos/{number}/{row}.jpg" for row in range(len(part))]
        stats, hashes = torch.zeros(len(part), 2, dtype=torch.int64), torch.zeros(len(part), 16, dtype=torch.uint8)
        shards.Rows(part, table, stats, hashes).write(directory, number, number, 1)
    return Index(directory)


def memory_of(work, answer) -> None:
    """How many MiB more than before are in use at most, mapped files included."""

    def status(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name)) >> 10

    Path("/proc/self/clear_refs").write_text("5")  # begin VmHWM anew
    before = status("VmRSS")
    work()
    answer.put(status("VmHWM") - before)


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="measures memory as Linux reports it")
def test_memory_does_not_grow_with_the_index(tmp_path):
    """An index of 384 MiB in shards of 16; as a control, the same search with all shards held."""
    index = make_index(tmp_path / "index", unit(1 << 14, 512).half().repeat(24, 1), 1 << 14)
    queries = unit(3, 512, seed=1)
    answers = []
    for work in (lambda: index.search(queries), lambda: top_k(list(index.blocks()), queries, 10)):
        answer = FORK.Queue()
        process = FORK.Process(target=memory_of, args=(work, answer))
        process.start()
        answers.append(answer.get(timeout=60))
        process.join()
    assert answers[0] < 100 < 350 < answers[1]


@pytest.fixture(scope="module")
def drawings(tmp_path_factory) -> Path:
    """An index of the twelve drawings that come with the examples."""
    directory = tmp_path_factory.mktemp("drawings") / "index"
    assert update_index(directory, [IMAGES], "tiny-ViT").pictures == 12
    return directory


def search(capsys, *arguments: str) -> list[tuple[float, str]]:
    capsys.readouterr()
    assert main(["search", *arguments, "--json"]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    return [(result["score"], Path(result.get("image", result.get("caption"))).stem) for result in results]


def test_words_find_pictures(drawings):
    model, preprocess = load("tiny-ViT", device="cpu")
    names = sorted(path.stem for path in IMAGES.glob("*.png"))
    queries = torch.cat([embed_query(model, preprocess, [name.replace("-", " ")]) for name in names])
    results = Index(drawings).search(queries, 3)
    assert all(len(hits) == 3 and hits == sorted(hits, reverse=True) for hits in results)
    found = sum(Path(hits[0].path).stem == name for hits, name in zip(results, names, strict=True))
    assert found >= 10  # by chance one


def test_the_scores_are_cosines(drawings, capsys):
    model, preprocess = load("tiny-ViT", device="cpu")
    results = {name: score for score, name in search(capsys, str(drawings), "a dog", "--top", "12")}
    with torch.no_grad():
        text = model.encode_text(tokenize(["a dog"]), normalize=True)
        for name, score in results.items():
            pixels = preprocess(Image.open(IMAGES / f"{name}.png")).unsqueeze(0)
            cosine = (model.encode_image(pixels, normalize=True) @ text.T).item()
            assert abs(cosine - score) < 1e-3  # half precision
    assert len(results) == 12


def test_a_picture_finds_itself_and_what_is_like_it(drawings, capsys):
    results = search(capsys, str(drawings), str(IMAGES / "red-apple.png"))
    assert results[0][1] == "red-apple" and results[0][0] > 0.999
    assert len(results) == 10


def test_several_queries_and_negative_ones(drawings, capsys):
    def scores(*query):
        return {name: score for score, name in search(capsys, str(drawings), *query, "--top", "12")}

    dog, fruit, apple = scores("dog"), scores("fruit"), scores("apple")
    both, without = scores("dog", "fruit"), scores("fruit", "--not", "apple")
    for name in dog:
        assert both[name] == pytest.approx((dog[name] + fruit[name]) / 2, abs=1e-5)
        assert without[name] == pytest.approx(fruit[name] - apple[name] / 2, abs=1e-5)
    rank = {name: i for i, name in enumerate(without)}
    assert rank["red-apple"] > list(fruit).index("red-apple")
    two = scores("dog", "--not", "apple", "--not", "fruit")
    assert two["pizza"] == pytest.approx(dog["pizza"] - (apple["pizza"] + fruit["pizza"]) / 4, abs=1e-5)


def test_captions_for_a_picture(tmp_path, capsys):
    captions = tmp_path / "captions.txt"
    captions.write_text("guitar\n\ndog\nelephant\ndog\n")
    results = search(capsys, str(captions), str(IMAGES / "elephant.png"), "--model", "tiny-ViT")
    assert results[0][1] == "elephant" and len(results) == 3
    captions.write_text("\n")
    assert main(["search", str(captions), "a dog", "--model", "tiny-ViT"]) == 2
    assert "has no lines" in capsys.readouterr().err
    captions.write_text("dog\n" + "word " * 80)
    assert main(["search", str(captions), "a dog", "--model", "tiny-ViT"]) == 2
    assert "tokens" in capsys.readouterr().err


def test_plain_text(drawings, capsys):
    assert main(["search", str(drawings), "guitar", "--top", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[0].endswith("examples/images/guitar.png") and float(lines[0].split()[0]) > 0.3


@pytest.mark.parametrize(
    ("query", "said"),
    [
        (["nowhere.png"], "there is no picture nowhere.png"),
        (["dog", "--not", "nowhere.JPG"], "there is no picture nowhere.JPG"),
        (["word " * 80], "82 tokens"),
        (["dog", "--html", "nowhere/page.html"], "there is no folder nowhere"),
        (["dog", "--faiss"], "run `miniclip index --faiss`"),
    ],
)
def test_wrong_queries(drawings, capsys, query, said):
    pytest.importorskip("faiss") if "--faiss" in query else None
    assert main(["search", str(drawings), *query]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("option", [["--top", "0"], ["--top", "-1"], ["--top", "x"]])
def test_wrong_options(drawings, capsys, option):
    assert main(["search", str(drawings), "dog", *option]) == 2
    assert "is not a whole number from 1" in capsys.readouterr().err


def test_a_folder_is_searched_without_an_index(tmp_path, capsys):
    assert main(["search", str(IMAGES), "a guitar", "--model", "tiny-ViT", "--top", "2"]) == 0
    assert capsys.readouterr().out.splitlines()[0].endswith("guitar.png")
    assert main(["search", str(tmp_path), "dog"]) == 2
    assert "is not an index, and there are no pictures in it" in capsys.readouterr().err


def test_a_broken_picture_as_the_query(drawings, tmp_path, capsys):
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    assert main(["search", str(drawings), str(tmp_path / "broken.png")]) == 2
    assert "broken.png is not an image" in capsys.readouterr().err


def test_queries_in_python(drawings):
    model, preprocess = load("tiny-ViT", device="cpu")
    with Image.open(IMAGES / "dog.png") as picture:
        query = embed_query(model, preprocess, [picture, IMAGES / "dog.png"])
    (hits,) = Index(drawings).search(query, 1)
    assert Path(hits[0].path).stem == "dog" and hits[0].score > 0.999
    assert torch.equal(embed_query(model, preprocess, "a dog"), embed_query(model, preprocess, ["a dog"]))
    for wrong in (query[0], query[:, :-1]):
        with pytest.raises(SearchError, match=r"queries are \[.*\]; expected \[Q, 256\]"):
            Index(drawings).search(wrong)
    with pytest.raises(SearchError, match="there is no query"):
        embed_query(model, preprocess, [])


def test_an_index_whose_pictures_are_all_gone(tmp_path, capsys):
    index = tmp_path / "index"
    make_index(index, unit(4, 256).half(), 4)
    next(index.glob("*.safetensors")).unlink()
    assert Index(index).search(unit(2, 256)) == [[], []]


def test_approximate_search(tmp_path):
    """Clustered as embeddings of pictures are. With as many cells as rows it would be exact; here it nearly is."""
    faiss = pytest.importorskip("faiss")
    faiss.omp_set_num_threads(1)
    clusters = unit(100, 64)
    embeddings = F.normalize(clusters.repeat(40, 1) + 0.1 * unit(4000, 64, seed=1), dim=1).half()
    index = make_index(tmp_path / "index", embeddings, 1500)
    queries = F.normalize(clusters[:20] + 0.1 * unit(20, 64, seed=2), dim=1)
    with pytest.raises(SearchError, match="run `miniclip index --faiss`"):
        approximate.search(index, queries)
    file = approximate.build(index)
    first = file.read_bytes()
    assert approximate.build(index).read_bytes() == first
    wanted, found = index.search(queries), approximate.search(index, queries)
    common = sum(len({hit.path for hit in a} & {hit.path for hit in b}) for a, b in zip(wanted, found, strict=True))
    assert common >= 190  # of 200
    scores = {hit.path: hit.score for hit in wanted[0]}
    assert all(abs(hit.score - scores[hit.path]) < 1e-3 for hit in found[0] if hit.path in scores)
    assert len(approximate.search(index, queries, 4000)[0]) < 4000  # it looks into some cells only


def test_approximate_search_is_never_of_other_pictures(tmp_path, capsys):
    pytest.importorskip("faiss")
    index, photos = str(tmp_path / "index"), tmp_path / "photos"
    photos.mkdir()
    for i in range(6):
        Image.new("RGB", (64, 64), (40 * i, 0, 0)).save(photos / f"{i}.png")
    assert main(["index", str(photos), "-o", index, "--model", "tiny-ViT", "--faiss"]) == 0
    exactly = search(capsys, index, "red")
    assert [name for _, name in search(capsys, index, "red", "--faiss")] == [name for _, name in exactly]
    (photos / "0.png").unlink()
    assert main(["index", str(photos), "-o", index]) == 0
    assert main(["search", index, "red", "--faiss"]) == 2
    assert "run `miniclip index --faiss`" in capsys.readouterr().err


def test_without_faiss(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(MissingExtraError, match=re.escape('pip install "miniclip[faiss]"')):
        approximate.check_installed()
