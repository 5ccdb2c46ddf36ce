"""The command that checks and times kernels: as far as a CPU goes, with a clock and a GPU that are made up."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from kernel_cases import HALVES

from miniclip import ops, similarity
from miniclip.bench import kernel_check as check
from miniclip.bench import kernel_errors as correctness
from miniclip.bench import kernel_times as timing
from miniclip.config import CLIPConfig, PreprocessConfig, ResNetConfig, TextConfig, TransformerConfig, ViTConfig
from miniclip.fast import ops as fused
from miniclip.kernels import tiles

OPERATIONS = {"attention", "attention_varlen", "similarity_topk", "similarity_softmax"}
OPERATIONS |= {"contrastive_loss", "add_layer_norm", "bias_quick_gelu"}


def test_dry_run(capsys):
    assert check.main(["--dry", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    rows = report["errors"]
    assert report["interpreted"] and {row["operation"].split(" d ")[0] for row in rows} == OPERATIONS
    assert {row["dtype"] for row in rows} == {str(dtype).removeprefix("torch.") for dtype in HALVES}
    assert all(0 < row["kernel"] <= row["tolerance"] and row["pytorch"] > 0 for row in rows)


def test_a_wrong_kernel_is_found(capsys, monkeypatch):
    wrong = lambda qkv, causal: ops.attention(qkv, causal) * 1.002  # noqa: E731
    monkeypatch.setattr(correctness, "attention", wrong)
    only = lambda device, dry: (case for case in list(cases(device, dry))[:2])  # noqa: E731
    cases = correctness.cases
    monkeypatch.setattr(correctness, "cases", only)
    assert check.main(["--dry"]) == 1
    out = capsys.readouterr().out
    assert "In Triton's interpreter, on the CPU" in out and out.count("TOO LARGE") == 2
    assert "2 of 2 errors are over their tolerance" in out


def test_nan_is_over_every_tolerance():
    assert not correctness.error(torch.tensor([float("nan")]), torch.ones(1), absolute=False) <= 1e9


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(capsys):
    with pytest.raises(SystemExit):
        check.main([])
    assert "no GPU here that PyTorch can use; --dry checks" in capsys.readouterr().err


def test_winners():
    def row(size, kernel, rival):
        times = {"kernel": dict(zip(("eager", "graph"), kernel, strict=True))}
        return {"operation": "attention", "size": size, "times": times | {"a": rival, "b": {"eager_failed": "no"}}}

    rows = [
        row(16, (1, 1), {"eager": 2, "graph": 2}),
        row(32, (1, 1), {"eager": 2, "graph": 0.5}),  # slower as a graph
        row(50, (1, 1), {"eager": 2, "graph": 2}),
        row(50, (3, 1), {"eager": 2, "graph": 2}),  # another shape of the same size
        row(77, (1, 1), {"graph_failed": "no rival"}),
    ]
    assert timing.winners(rows, "sm_90") == {"attention": [16]}


def test_everything_that_is_timed_runs(monkeypatch):
    """All operations, rivals and models on small shapes, in the interpreter; SDPA's GPU backends fail and say so."""
    small = {"ATTENTION": [(1, 16, 1, 64, True, "text")], "PROMPTS": [5], "CLASSES": [(2, 20, 32)]}
    small |= {"PAIRS": [(20, 32)], "ROWS": [(2, 32)]}
    for name, value in small.items():
        monkeypatch.setattr(correctness, name, value)
    block = TransformerConfig(width=64, layers=1, heads=1, mlp_width=64)
    text = TextConfig(77, 49_408, block)
    configs = {
        "V": CLIPConfig(16, ViTConfig(16, 8, block), text, PreprocessConfig(16)),
        "R": CLIPConfig(16, ResNetConfig(32, 8, (1, 1, 1, 1), 4), text, PreprocessConfig(32)),
    }
    monkeypatch.setattr(timing, "MODELS", configs)
    monkeypatch.setattr(timing, "MODELS_TIMED", [("V", 2), ("R", 2)])
    monkeypatch.setattr(timing, "TEXTS", 3)
    monkeypatch.setattr(timing, "ceilings", lambda device: {"copy_bytes": 1e12, "float16_flops": 1e12})
    monkeypatch.setattr(timing, "set_backend", lambda model, backend: model)
    monkeypatch.setattr(torch, "compile", lambda function: function)
    for module in ops, fused, similarity:
        monkeypatch.setattr(module, "use_kernel", lambda operation, backend, *_: backend == "triton")
    gpu = SimpleNamespace(name="made up", L2_cache_size=1 << 12)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    for name in "synchronize", "reset_peak_memory_stats", "memory_allocated", "max_memory_allocated":
        monkeypatch.setattr(torch.cuda, name, lambda: 0)
    ran = []

    def clock(calls):
        ran.append(len(calls))
        return float(sum(call() is not None for call in calls[:1]))

    monkeypatch.setattr(timing, "eager_time", clock)
    monkeypatch.setattr(timing, "graph_time", clock)
    said = []
    report = timing.measure(torch.device("cpu"), lambda *words: said.append(" ".join(map(str, words))), 1000)
    rows = report["operations"]
    assert {row["operation"] for row in rows} == OPERATIONS and max(ran) > 1
    for row in rows:
        failed = {name for name, times in row["times"].items() if "eager" not in times}
        assert all("SDPA" in name for name in failed) and len(failed) < len(row["times"])
    assert "kernel" in rows[0]["times"] and "SDPA MATH" in rows[0]["times"]
    assert {row["shape"] for row in report["models"]} == {"V encode_image 2", "V encode_text 3", "R encode_image 2"}
    assert all(row["eager"] == 1.0 and row["of_ceiling"] > 0 for row in report["models"])
    assert report["faster"].keys() == OPERATIONS and tiles.architecture(torch.device("cpu")) in said[-8]
    json.dumps(report)
    said.clear()
    report = timing.measure(torch.device("cpu"), lambda *words: said.append(" ".join(map(str, words))), -1)
    assert not report["operations"] and "no time left" in "".join(said)


def test_sets_of_inputs_exceed_the_cache_twice():
    sets = timing.copies(lambda: (torch.zeros(256), 3), cache_bytes=10_000)
    assert sum(4 * x.numel() for x, _ in sets) > 20_000 and sets[0][0] is not sets[1][0]
    assert len(timing.copies(lambda: (torch.zeros(10_000),), cache_bytes=10_000)) == 1
