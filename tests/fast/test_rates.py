"""What dtype is computed in: whichever the machine was measured to be fast at."""

import pytest
import torch

from miniclip import load
from miniclip.fast import rates

GIGA = 1e9


def test_a_rate_is_work_over_time(monkeypatch):
    clock = iter([0.0, 5.0, 5.5, 9.0, 9.25, 9.5])  # starts and ends; the first run, a warm-up, is not counted
    monkeypatch.setattr(rates.time, "perf_counter", lambda: next(clock))
    ran = 2 * 3 * 768 * (2304 + 768 + 3072 + 3072)
    assert rates.matrix_rate(torch.float32, rows=3, runs=2) == pytest.approx(ran / 0.25)


def test_weights_in_emulated_precision_are_timed_in_float32(monkeypatch):
    found = []

    def layer(weight, bias, dtype):
        return lambda x: found.append((x.dtype, weight.dtype, dtype))

    monkeypatch.setattr(rates.half, "EMULATED", frozenset([torch.float16]))
    monkeypatch.setattr(rates, "linear", layer)
    rates.matrix_rate(torch.float16, rows=1, runs=1)
    assert found == [(torch.float32, torch.float16, torch.float32)] * 8


@pytest.mark.parametrize(
    ("float32", "float16", "bfloat16", "chosen"),
    [
        (130, 20, 17, torch.float32),  # emulated, without FBGEMM
        (38, 85, 88, torch.float16),  # emulated, with it
        (370, 2300, 2400, torch.float16),  # about equal: the more accurate one
        (370, 400, 2400, torch.bfloat16),
        (370, 500, 500, torch.float32),  # not worth it
    ],
)
def test_the_fastest_is_taken_and_named(float32, float16, bfloat16, chosen, monkeypatch, capsys):
    found = {torch.float32: float32, torch.float16: float16, torch.bfloat16: bfloat16}
    monkeypatch.setattr(rates, "matrix_rate", lambda dtype, rows, runs: GIGA * found[dtype])
    assert rates.fastest_dtype("cpu") == chosen
    message = capsys.readouterr().err
    assert f"computing in {rates.name(chosen)}" in message and f"float16 {float16}" in message


def test_load_takes_auto(monkeypatch):
    monkeypatch.setattr(rates, "matrix_rate", lambda dtype, rows, runs: GIGA * (dtype == torch.bfloat16))
    assert load("tiny-ViT", device="cpu", dtype="auto")[0].dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"dtype is 'fast'; expected a torch\.dtype"):
        load("tiny-ViT", dtype="fast")
