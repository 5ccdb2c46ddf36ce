"""The command that checks and times kernels, as far as a CPU goes."""

from __future__ import annotations

import json
import math
import sys
import time
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch
from kernel_cases import HALVES

from miniclip import ops
from miniclip.bench import kernel_check as check
from miniclip.bench import kernel_errors as errors
from miniclip.bench import kernel_times as timing
from miniclip.bench.kernel_rules import as_python, rules
from miniclip.kernels import dispatch
from miniclip.kernels.dispatch import ANY, MEASURES, Rule

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def dry(tmp_path_factory) -> tuple[dict, list[dict]]:
    """What a dry run prints, and what it wrote."""
    file = tmp_path_factory.mktemp("dry") / "report.jsonl"
    patch = pytest.MonkeyPatch()
    printed = []
    patch.setattr("builtins.print", lambda text, **_: printed.append(text))
    assert check.main(["--dry", "--json", "--out", str(file)]) == 0
    patch.undo()
    (report,) = map(json.loads, printed)
    return report, [json.loads(line) for line in file.read_text().splitlines()]


def test_a_dry_run_goes_through_every_stage(dry):
    report, written = dry
    assert report["interpreted"] and report["rows"] == written
    assert {row["stage"] for row in written} == {"machine", "summary", *(stage.name for stage in check.stages())}
    assert not [row for row in written if "failed" in row]


def test_errors_of_a_dry_run(dry):
    rows = [row for row in dry[1] if row["stage"] == "errors"]
    assert {row["operation"].split(" d ")[0] for row in rows} == set(MEASURES)
    assert {row["dtype"] for row in rows} == {str(dtype).removeprefix("torch.") for dtype in HALVES}
    assert all(0 < row["kernel"] <= row["tolerance"] and row["pytorch"] > 0 for row in rows)


def test_times_of_a_dry_run(dry):
    rows = [row for row in dry[1] if "measure" in row]
    assert {row["operation"] for row in rows} == set(MEASURES)
    failed = {row["who"] for row in rows if "eager" not in row}
    assert failed == {"SDPA cuDNN", "SDPA efficient"}  # which a CPU does not have
    assert {"SDPA", "SDPA flash"} <= {row["who"] for row in rows if row["operation"] == "attention"}
    models = [row for row in dry[1] if "cosine" in row]
    assert {row["stage"] for row in models} == {"ViT-B/32", "ViT-L/14", "RN50"}
    assert all(row["cosine"] > 0.9999 and row["flops"] > 0 and row["latency"] == 1 for row in models)


def test_every_row_has_a_text(dry):
    for row in dry[1]:
        text = check.as_text(row)
        assert text and ("TOO LARGE" in text) == (not row.get("ok", True))
    assert "0 of 30 errors" in check.as_text(dry[1][-1]) and '"sm_80": {' in check.as_text(dry[1][-1])


def test_a_wrong_kernel_is_found(capsys, monkeypatch):
    wrong = lambda qkv, causal: ops.attention(qkv, causal) * 1.002  # noqa: E731
    monkeypatch.setattr(errors, "attention", wrong)
    cases = errors.cases
    monkeypatch.setattr(errors, "cases", lambda device, dry: list(cases(device, dry))[:2])
    monkeypatch.setattr(check, "compile_all", lambda *_: None)
    assert check.main(["--dry", "--stages", "errors"]) == 1
    out = capsys.readouterr().out
    assert "every time is made up" in out and out.count("TOO LARGE") == 2
    assert "2 of 2 errors are over their tolerance, or failed" in out


def test_a_kernel_that_fails_is_a_row_and_the_next_is_checked(monkeypatch):
    monkeypatch.setattr(errors, "attention", lambda qkv, causal: 1 / 0)
    cases = list(errors.cases(CPU, True))
    monkeypatch.setattr(errors, "cases", lambda device, dry: [cases[0], cases[-1]])
    rows = list(errors.check(CPU, dry=False))
    assert [row["ok"] for row in rows] == [False, True]
    assert rows[0]["failed"] == "ZeroDivisionError: division by zero"
    assert "ZeroDivisionError" in check.as_text({"stage": "errors"} | rows[0])
    assert check.summary(rows, CPU)["wrong"] == 1


def test_nan_is_over_every_tolerance():
    assert not errors.error(torch.tensor([float("nan")]), torch.ones(1), absolute=False) <= 1e9


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(capsys):
    with pytest.raises(SystemExit):
        check.main([])
    assert "no GPU here that PyTorch can use; --dry checks" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        check.main(["--dry", "--stages", "all"])
    assert "--stages is all; expected some of ceilings, errors" in capsys.readouterr().err


def test_a_stage_ends_at_its_deadline_and_a_fault_ends_no_run(monkeypatch):
    def endless(device, dry):
        while True:
            time.sleep(0.01)
            yield {"operation": "endless"}

    def faulty(device, dry):
        yield {"operation": "faulty"}
        raise RuntimeError("illegal access")

    end = time.monotonic() + 60
    rows = list(check.run_stage(check.Stage("first", 0.1, endless), CPU, False, end))
    assert 1 < len(rows) < 15 and rows[-1] == {"operation": "first", "who": "no time left"}
    rows = list(check.run_stage(check.Stage("late", 60, endless), CPU, False, time.monotonic() - 1))
    assert rows == [{"operation": "late", "who": "no time left"}]
    rows = list(check.run_stage(check.Stage("second", 60, faulty), CPU, False, end))
    assert rows[0] == {"operation": "faulty"} and rows[1]["failed"] == "RuntimeError: illegal access"
    with pytest.raises(RuntimeError, match="illegal access"):
        list(check.run_stage(check.Stage("second", 60, faulty), CPU, True, end))


WORKER = """
import json, os, sys, time
for name in sys.argv[sys.argv.index("--stages") + 1].split(","):
    print(json.dumps({"begin": name}), flush=True)
    print(json.dumps({"stage": name, "operation": "first"}), flush=True)
    if name == "illegal access": os._exit(1)
    if name == "hangs": time.sleep(60)
"""


def test_a_process_that_dies_or_hangs_is_replaced(monkeypatch):
    monkeypatch.setattr(check, "PROCESS", [sys.executable, "-c", WORKER])
    monkeypatch.setattr(check, "GRACE", 1)
    names = ["right", "illegal access", "after it", "hangs", "last"]
    stages = [check.Stage(name, 1 if name == "hangs" else 60, None) for name in names]
    rows = [row for row in check.supervised(stages, time.monotonic() + 60) if "begin" not in row]
    assert [row["stage"] for row in rows] == [*names[:2], *names[1:4], *names[3:]]  # each twice that was stopped
    assert [row["failed"] for row in rows if "failed" in row] == ["its process: 1", "its process: -9"]


def test_what_such_a_process_prints(monkeypatch, capfd):
    def noisy(device, dry):
        print("a package's greeting")
        yield {"operation": "only"}

    monkeypatch.setattr(check, "stages", lambda: [check.Stage("one", 60, noisy), check.Stage("two", 60, noisy)])
    assert check.main(["--dry", "--work", "--stages", "two"]) == 0
    printed = capfd.readouterr()
    rows = [json.loads(line) for line in printed.out.splitlines()]
    assert rows == [{"begin": "two"}, {"stage": "two", "operation": "only"}] and "greeting" in printed.err


def test_rows_are_written_as_they_are_found(tmp_path, monkeypatch):
    file, lengths = tmp_path / "rows.jsonl", []

    def rows(device, dry):
        for i in range(3):
            lengths.append(len(file.read_text().splitlines()))
            yield {"operation": str(i)}

    monkeypatch.setattr(check, "compile_all", lambda *_: None)
    options = Namespace(minutes=1, out=file, json=True, dry=True)
    list(check.measure([check.Stage("only", 60, rows)], CPU, options))
    assert lengths == [1, 2, 3]  # the first line is the machine


def test_kernels_are_compiled_by_shares(monkeypatch):
    calls = []

    def contests(device, dry):
        kernel = timing.Rival("kernel", lambda x: calls.append(x))
        for i in range(5):
            yield timing.Contest("attention", str(i), (1, 1), lambda i=i: (i,), [kernel, timing.Rival("SDPA", None)])

    monkeypatch.setattr(errors, "cases", lambda device, dry: [SimpleNamespace(kernel=lambda: calls.append("checked"))])
    for name in ("row", "attention", "packed", "similarity", "loss"):
        monkeypatch.setattr(timing, f"{name}_contests", contests if name == "row" else lambda device, dry: [])
    for share in range(3):
        check.compile_share(share, 3, CPU, True)
    assert calls == ["checked", 2, 0, 3, 1, 4]


def row(operation: str, measure: tuple[int, int], who: str, eager: float, graph: float, counts: bool = True) -> dict:
    shape = str(measure)
    return {"operation": operation, "shape": shape, "measure": measure, "who": who, "counts": counts} | {
        clock: seconds for clock, seconds in (("eager", eager), ("graph", graph)) if seconds is not None
    }


def contest(operation: str, measure: tuple[int, int], kernel: float, *rivals: float) -> list[dict]:
    return [row(operation, measure, "kernel", kernel, kernel)] + [
        row(operation, measure, f"rival {i}", seconds, seconds) for i, seconds in enumerate(rivals)
    ]


def test_rules_begin_where_the_kernel_wins_everything():
    rows = [
        *contest("attention", (50, 100), 3, 2, 4),  # a batch of one loses, and has no say about larger ones
        *contest("attention", (50, 2000), 1, 2, 4),
        *contest("attention", (50, 3000), 1, 2),
        *contest("attention", (77, 2000), 2, 1),
        *contest("attention", (197, 500), 1, 2),
        *contest("attention", (197, 1000), 2, 1),  # wins below, and loses above
        *contest("add_layer_norm", (768, 10), 2, 1),
        *contest("add_layer_norm", (512, 500), 1, 2),
        *contest("add_layer_norm", (768, 1000), 1, 2),
        *contest("attention_varlen", (14, 1000), 1, 2),
        *contest("similarity_topk", (1, 1000), 2, 1),
    ]
    found = rules(rows, "timed")
    assert found["attention"] == [Rule((50, 50), (2000, math.inf), "timed")]
    assert found["add_layer_norm"] == [Rule(ANY, (500, math.inf), "timed")]
    assert found["attention_varlen"] == [Rule((1, 14), (1000, math.inf), "timed")]
    assert found["similarity_topk"] == [Rule(ANY, (math.inf, math.inf), "timed")]
    text = as_python("sm_90", found)
    assert eval("{" + text + "}", {"Rule": Rule, "ANY": ANY, "math": math}) == {"sm_90": found}


def test_what_a_win_is():
    kernel = row("attention", (50, 9), "kernel", 2, 2)
    wins = lambda *others: bool(rules([kernel, *others], "")["attention"][0].count[0] == 9)  # noqa: E731
    assert wins(row("attention", (50, 9), "SDPA", 3, 3))
    assert not wins(row("attention", (50, 9), "SDPA", 3, 1))  # faster on the GPU itself
    assert not wins(row("attention", (50, 9), "SDPA", 1, 3))  # faster from Python
    assert not wins()  # no rival
    assert wins(row("attention", (50, 9), "SDPA", 3, 3), row("attention", (50, 9), "compiled", 1, 1, counts=False))
    assert wins(row("attention", (50, 9), "SDPA", 3, 3), row("attention", (50, 9), "cuDNN", 5, None))


def test_only_what_is_used_in_the_kernels_place_counts_as_its_rival():
    """Not a loss in bfloat16, which is less accurate, nor QuickGELU in three passes, nor other tiles of the kernel."""
    counts = {
        rival.name: rival.counts
        for contests in (timing.loss_contests, timing.row_contests, timing.attention_contests)
        for contest in contests(CPU, True)
        for rival in contest.rivals
    }
    assert not counts["in chunks, bfloat16"] and counts["in chunks, float32"]
    assert counts["SDPA"] and counts["SDPA cuDNN"] and not counts["kernel, (32, 32, 4, 2)"]


def test_sets_of_inputs_exceed_the_cache_twice():
    sets = timing.copies(lambda: (torch.zeros(256), 3), cache_bytes=10_000)
    assert sum(4 * x.numel() for x, _ in sets) > 20_000 and sets[0][0] is not sets[1][0]
    assert len(timing.copies(lambda: (torch.zeros(10_000),), cache_bytes=10_000)) == 1


def test_measures_are_those_that_dispatch_chooses_by():
    for contests in (timing.row_contests, timing.attention_contests, timing.similarity_contests, timing.loss_contests):
        for contest in contests(CPU, True):
            inputs = contest.make()
            if contest.operation in ("add_layer_norm", "bias_quick_gelu", "attention"):
                inputs = inputs[:1]
            assert dispatch.MEASURES[contest.operation].of(*inputs) == contest.measure
