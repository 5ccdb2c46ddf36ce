"""The benchmark: what it measures, prints and writes. How fast anything is, is not tested."""

import json
import statistics

import pytest
import torch

from miniclip.bench import measure, peers, report, run, tasks
from miniclip.bench.measure import Times, by_turns
from miniclip.commands import main


def row(name: str, setting: str = "float32", median: float = 1.0, what: str = "encode", **other) -> tasks.Row:
    return tasks.Row(what, name, setting, 10, Times(median, median, median, 0.1, 5), **other)


def test_statistics_of_times():
    seconds = [float(i) for i in range(1, 101)]
    times = Times.of(seconds)
    assert (times.mean, times.median, times.rounds) == (50.5, 50.5, 100)
    assert times.p95 == pytest.approx(95.05)
    assert times.spread == pytest.approx((75.25 - 25.75) / 50.5)
    assert times.scaled(3).median == 3 * 50.5 and times.scaled(3).spread == times.spread
    assert Times.of([2.0, 1.0, 9.0]).median == statistics.median([2.0, 1.0, 9.0])


def test_ways_take_turns(monkeypatch):
    clock = iter(range(10**6))
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(measure.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(measure, "LEAST_ROUNDS", 40)
    order = []
    times, results = by_turns({name: lambda name=name: order.append(name) or 2 * name for name in "abc"}, seconds=0)
    assert results == {"a": "aa", "b": "bb", "c": "cc"}
    assert times["a"].rounds == 40 and times["a"].median == 1
    assert "".join(order[:3]) == "abc"  # warming up, which gives the results
    turns = ["".join(order[start : start + 3]) for start in range(3, 123, 3)]
    assert set(turns) == {"abc", "acb", "bac", "bca", "cab", "cba"}  # a leaves its traces to b and to c alike


def test_ratios_are_against_the_same_precision():
    rows = [
        row("miniclip", "float32", 2.0),
        row("miniclip", "float16", 0.5),
        row("openai/CLIP", "float32", 3.0),
        row("open_clip", "float16 compiled", 1.0),
        row("other", "", 4.0),
        row("miniclip", what="something else", median=9.0),
    ]
    assert [report.ratio(rows, each) for each in rows] == [None, None, 1.5, 2.0, 8.0, None]


def test_the_best_peer_is_the_fastest_that_is_accurate():
    rows = [
        row("miniclip", "float32", 2.0, agreement=1.0),
        row("miniclip", "int8", 0.5, agreement=0.998),
        row("miniclip", "bfloat16", 1.0, agreement=0.9995),
        row("open_clip", "bfloat16", 1.5, agreement=0.9992),
        row("onnxruntime", "int8", 0.75, agreement=0.97),
        row("openai/CLIP", "float32", 3.0, agreement=1.0),
    ]
    found = report.best(rows)
    assert (found["peer"], found["miniclip"]) == ("open_clip bfloat16", "miniclip bfloat16")
    assert found["miniclip_is"] == 1.5 and found["peer_agreement"] == 0.9992
    assert report.table(rows).splitlines()[-1].split(":")[1:] == [
        " open_clip bfloat16, 1.5 s; best of miniclip",
        " miniclip bfloat16, 1 s",
        " 1.50x as fast",
    ]
    rows[3] = row("open_clip", "bfloat16", 1.5, agreement=0.99)  # wrong, so another is the best
    assert report.best(rows)["peer"] == "openai/CLIP float32"
    assert report.best(rows[:3]) is None


def test_table():
    rows = [row("miniclip", median=0.0125, agreement=1.0), row("peer", median=0.025, agreement=0.75, extrapolated=True)]
    lines = report.table(rows).splitlines()
    assert lines[0] == "encode"
    assert lines[2].split() == ["miniclip", "float32", *(3 * ["12.5", "ms"]), "10%", "800.0", "1.000000"]
    assert "2.00x" in lines[3] and "0.750000" in lines[3]
    assert "extrapolated" in report.table(rows[::-1])


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.00123456, "1.23 ms"), (0.999, "999 ms"), (45.61, "45.6 s"), (90, "1.5 min"), (9670, "2.69 h")],
)
def test_duration(seconds, text):
    assert report.duration(seconds) == text


def test_peers_are_not_timed_where_half_precision_is_emulated(monkeypatch):
    """Nor is anything compiled there; ours is timed, in one of the two precisions unless both are asked for."""
    half, rates = [torch.float16, torch.bfloat16], {"float32": 1.0, "float16": 2.0, "bfloat16": 2.0}
    asked = {}
    monkeypatch.setattr(run, "encoders", lambda model, peer, dtypes, compiled: asked.update({peer: dtypes}) or [])
    monkeypatch.setattr(tasks, "encode_texts", lambda *_: [])
    for emulated, theirs, default in ((half, [], half[:1]), ([], half, half)):
        monkeypatch.setattr(run, "EMULATED", emulated)
        settings = run.Settings(what=("text",), seconds=0)
        list(run._jobs(None, ["openai"], [torch.float32, *half], {}, settings))
        assert asked == {"miniclip": [torch.float32, *half], "openai": [torch.float32, *theirs]}
        assert run._dtypes(None, rates) == [torch.float32, *default]
        assert run._dtypes(("float16", "bfloat16"), rates) == [torch.float32, *half]

    monkeypatch.setitem(peers._MAKERS, "openai", lambda model, dtype: peers.Encoder("peer", str(dtype), abs, abs))
    monkeypatch.setattr(peers, "EMULATED", half[:1])
    made = peers.encoders(None, "openai", [torch.float32, torch.float16], compiled=True)
    assert [way.setting for way in made] == ["torch.float32", "torch.float32 compiled", "torch.float16"]


def test_a_wrong_peer_is_seen():
    """Nothing is faster by being wrong: the cosine with ours is beside every figure."""
    right = peers.Encoder("miniclip", "float32", lambda x: x.flatten(1), None)
    wrong = peers.Encoder("peer", "float32", lambda x: x.flatten(1).roll(1, dims=1), None)
    rows = list(tasks._encode("encode", [right, wrong], "image", torch.randn(3, 3, 8, 8), 0.0, {"float32": 1e9}, 5e6))
    assert rows[0].agreement == pytest.approx(1)
    assert rows[1].agreement < 0.5
    assert rows[0].share == pytest.approx(5e6 * 3 / rows[0].times.median / 1e9)


def test_a_classifier_is_extrapolated(monkeypatch):
    """Ours from all sampled classes, a peer's from one; the cosines are those of the same prompts."""
    monkeypatch.setattr(tasks, "NAMES", tasks.NAMES[:2])
    monkeypatch.setattr(tasks, "PROMPTS", tasks.PROMPTS[:160])
    monkeypatch.setattr(tasks, "by_turns", once)
    model = run.random_model("tiny-ViT")
    right = peers.Encoder("peer", "float32", None, model.encode_text)
    wrong = peers.Encoder("wrong", "float32", None, lambda ids: model.encode_text(ids.flip(0)))
    with torch.no_grad():
        ways = [*peers.encoders(model, "miniclip", [torch.float32], False), right, wrong]
        rows = list(tasks.classifier(model, ways, 0.0))
    assert [row.times.median for row in rows] == [500, 1000, 1000]
    assert [row.count for row in rows] == [80_000] * 3
    assert rows[0].agreement > 0.999999 and rows[1].agreement > 0.99999 > 0.99 > rows[2].agreement


def once(ways, seconds):
    """As if each took a second."""
    return {name: Times.of([1.0, 1.0]) for name in ways}, {name: run() for name, run in ways.items()}


@pytest.mark.slow  # times every row of the table
def test_command(tmp_path, capsys):
    """Everything but loading, by ourselves, on the tiny model."""
    files = ["--json", str(tmp_path / "bench.json"), "--plot", str(tmp_path / "bench.png")]
    what = ["--what", "image,text,tokenizer,preprocess", "--batches", "2", "--seconds", "0", "--threads", "1"]
    pytest.importorskip("matplotlib")
    assert main(["bench", "--model", "tiny-ViT", "--peers", "none", *what, *files]) == 0
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "bench.json").read_text())
    tasks_done = ["encode_image, batch 2", "encode_text, 1 prompt", "encode_text, 100 prompts"]
    tasks_done += ["tokenize, 275 short prompts", "preprocess, 640 x 480"]
    assert [row["what"] for row in result["rows"]] == tasks_done
    assert all(task in printed for task in tasks_done)
    assert result["rows"][0]["agreement"] == pytest.approx(1)
    assert {"float32", "float16", "bfloat16"} == set(result["matrix_rates"])
    assert result["machine"]["threads"] == 1 and torch.__version__.startswith(result["versions"]["torch"])
    assert (tmp_path / "bench.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow  # four processes load a model
def test_loading_is_timed_in_processes_of_their_own():
    rows = list(tasks.loading(run.random_model("tiny-ViT"), [], rounds=2))
    assert [(row.name, row.setting) for row in rows] == [("miniclip", "float32"), ("miniclip", "float16")]
    assert rows[0].peak_mb > rows[1].peak_mb > 10
    assert all(0 < row.times.median < 60 for row in rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--what", "image,speed"], "--what has speed"),
        (["--peers", "tensorflow"], "there is no peer 'tensorflow'"),
        (["--dtypes", "int4"], "--dtypes has int4"),
        (["--json", "nowhere/x.json"], "there is no folder nowhere"),
    ],
)
def test_bad_arguments(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(run, "matrix_rate", lambda dtype, rows=0, runs=0: 1e9)
    assert main(["bench", "--model", "tiny-ViT", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_peer_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(peers, "find_spec", lambda module: None)
    assert peers.chosen("all") == []
    with pytest.raises(peers.MissingPeerError, match="openai is not installed: there is no module clip"):
        peers.chosen("openai")


@pytest.mark.slow  # builds each peer's model, or exports ours
@pytest.mark.parametrize("peer", list(peers.MODULES))
def test_peers_agree_live(peer):
    """Where they are installed: each gives our embeddings, in the precision that it states."""
    pytest.importorskip(peers.MODULES[peer])
    if peer == "onnxruntime":
        pytest.importorskip("onnxscript")
    model = run.random_model("tiny-ViT")
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    made = [way for name in ("miniclip", peer) for way in peers.encoders(model, name, dtypes, False)]
    assert len(made) == 3 + {"openai": 1, "onnxruntime": 1}.get(peer, 3)
    with torch.no_grad():
        rows = [*tasks.encode_images(model, made, 2, 0.0, {}), *tasks.encode_texts(model, made, 3, 0.0)]
    assert all(row.agreement > (0.99999 if row.setting == "float32" else 0.999) for row in rows)
