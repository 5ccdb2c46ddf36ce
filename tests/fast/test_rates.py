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


class Named:
    """What a build returns: its dtype alone."""

    def __init__(self, dtype):
        self.dtype = dtype


@pytest.mark.parametrize(
    ("float32", "float16", "bfloat16", "int8", "cosines", "chosen"),
    [
        (130, 20, 17, 90, {}, torch.float32),  # emulated, without FBGEMM
        (38, 85, 88, 50, {}, torch.float16),  # emulated, with it
        (370, 2300, 2400, 2500, {}, torch.float16),  # about equal: the most accurate one
        (370, 400, 2400, 2500, {}, torch.bfloat16),
        (370, 400, 2400, 4500, {}, "int8"),
        (370, 400, 2400, 4500, {"int8": 0.9985}, torch.bfloat16),
        (370, 400, 2400, 4500, {"int8": 0.9985, torch.bfloat16: float("nan")}, torch.float32),
        (370, 500, 500, 540, {}, torch.float32),  # not worth it
    ],
)
def test_the_fastest_that_is_accurate_is_taken_and_named(
    float32, float16, bfloat16, int8, cosines, chosen, monkeypatch, capsys
):
    found = {torch.float32: float32, torch.float16: float16, torch.bfloat16: bfloat16, "int8": int8}
    monkeypatch.setattr(rates, "matrix_rate", lambda dtype, rows: GIGA * found[dtype])
    monkeypatch.setattr(rates, "lowest_cosine", lambda model, exact: cosines.get(model.dtype, 0.9999))
    assert rates.fastest_model(Named).dtype == chosen
    message = capsys.readouterr().err
    assert f"computing in {rates.name(chosen)}" in message and f"float16 {float16}" in message
    assert all(f"cosine of {rates.name(dtype)} {cosine:.5f}" in message for dtype, cosine in cosines.items())


def test_the_lowest_cosine_is_of_both_towers():
    model, other = (load("tiny-ViT", device="cpu")[0] for _ in range(2))
    assert rates.lowest_cosine(model, other) > 1 - 1e-6
    with torch.no_grad():
        other.text_projection.copy_(other.text_projection.flip(1))
    assert rates.lowest_cosine(model, other) < 0.9


@pytest.mark.parametrize("fastest", [torch.bfloat16, "int8", torch.float32])
def test_load_takes_auto(fastest, monkeypatch):
    monkeypatch.setattr(rates, "matrix_rate", lambda dtype, rows: GIGA * (1 + 9 * (dtype == fastest)))
    model = load("tiny-ViT", device="cpu", dtype="auto")[0]
    assert (model.int8, model.dtype) == (fastest == "int8", torch.float32 if fastest == "int8" else fastest)
    with pytest.raises(ValueError, match=r"dtype is 'fast'; expected a torch\.dtype"):
        load("tiny-ViT", dtype="fast")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "int8"], ids=str)
def test_rates_are_measured(dtype):
    assert rates.matrix_rate(dtype, rows=2, runs=1) > 0
