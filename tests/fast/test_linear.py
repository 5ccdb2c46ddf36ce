"""Each form of a layer against the operation that it stands for, in float64."""

import pytest
import torch
import torch.nn.functional as F

from miniclip.fast import conv, half
from miniclip.fast.conv import Geometry
from miniclip.fast.linear import FBGEMMLinear, Linear, OneDNNLinear, linear, norm, projection
from miniclip.ops import gelu_tanh

EXACT = {"none": lambda x: x, "silu": F.silu, "gelu": F.gelu, "gelu_tanh": gelu_tanh, "relu": F.relu}
ERRORS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
HALF = (torch.float16, torch.bfloat16)


def close(found: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> bool:
    return float((found.double() - exact).norm() / exact.norm()) < ERRORS[dtype]


def kinds() -> list[tuple[type[Linear], torch.dtype, torch.dtype]]:
    """Classes, with the dtypes of weights and of activations."""
    found = [(Linear, dtype, dtype) for dtype in (torch.float32, torch.float64)]
    found += [(OneDNNLinear, dtype, dtype) for dtype in ERRORS if dtype in half.ONEDNN_DTYPES]
    return found + [(FBGEMMLinear, dtype, torch.float32) for dtype in HALF if half.HAS_FBGEMM]


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("rows", [1, 7, 130])
@pytest.mark.parametrize(("kind", "stored", "dtype"), kinds(), ids=str)
@torch.no_grad()
def test_products(kind, stored, dtype, rows, has_bias):
    torch.manual_seed(0)
    weight, bias = torch.randn(48, 32).to(stored), torch.randn(48).to(stored) if has_bias else None
    x, total = torch.randn(rows, 32).to(dtype), torch.randn(rows, 48).to(dtype)
    layer = kind(weight, bias, dtype, 0.7, 1.3)
    exact = 0.7 * x.double() @ weight.double().T + (1.3 * bias.double() if has_bias else 0)
    for activation, function in EXACT.items():
        assert close(layer(x, activation), function(exact), dtype), activation
    assert not close(layer(x), 1.05 * exact, dtype)  # negative control
    assert close(layer.add(x, total.clone()), exact + total.double(), dtype)


@pytest.mark.parametrize("emulated", [frozenset(HALF), frozenset()], ids=["emulated", "native"])
def test_which_form_is_taken(emulated, monkeypatch):
    monkeypatch.setattr(half, "EMULATED", emulated)
    weight = torch.ones(4, 3, 2, 2)
    assert type(linear(weight.double(), None, torch.float64)) is Linear
    for stored in HALF:
        dtype = half.arithmetic(stored)
        expected = FBGEMMLinear if emulated else OneDNNLinear if stored in half.ONEDNN_DTYPES else Linear
        assert type(linear(weight.to(stored), None, dtype)) is expected


@torch.no_grad()
def test_projections_and_norms():
    torch.manual_seed(0)
    x, matrix, weight, bias = torch.randn(5, 32), torch.randn(32, 48), torch.randn(32), torch.randn(32)
    assert close(projection(matrix, torch.float32)(x), x.double() @ matrix.double(), torch.float32)
    exact = F.layer_norm(x.double(), (32,), weight.double(), bias.double(), 1e-3)
    assert close(norm(weight, bias, 1e-3, 1.7)(x), 1.7 * exact, torch.float32)
    assert close(norm(weight.half(), bias.half(), 1e-3)(x.half()), exact, torch.float16)


@pytest.mark.parametrize("groups", [1, 8])
@pytest.mark.parametrize("dtype", [dtype for dtype in ERRORS if dtype in {*half.ONEDNN_DTYPES, torch.float64}], ids=str)
@torch.no_grad()
def test_convolutions(dtype, groups):
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(8, 16, (3, 5), stride=(2, 1), padding=(1, 2), groups=groups)
    before = torch.nn.BatchNorm2d(16).eval()
    for tensor in (before.running_mean, before.bias, before.weight, before.running_var):
        tensor.uniform_(0.5, 2)
    if dtype is torch.float64:
        layer, before = layer.double(), before.double()
    x = torch.randn(2, 8, 12, 9).to(dtype).contiguous(memory_format=torch.channels_last)
    tensors = layer.weight, layer.bias, before.weight, before.bias, before.running_mean, before.running_var
    form = conv.conv_norm(*tensors, before.eps, dtype, Geometry.of(layer), 12, 9)
    exact = before.double()(layer.double()(x.double()))
    total = torch.randn(exact.shape).to(dtype).contiguous(memory_format=torch.channels_last)
    for activation, function in EXACT.items():
        assert close(form(x, activation), function(exact), dtype), activation
    for activation in ("none", "relu"):
        expected = EXACT[activation](exact + total.double())
        assert close(form.add(x, total.clone(), activation), expected, dtype), activation
    assert not close(form(x), 1.05 * exact, dtype)  # negative control
