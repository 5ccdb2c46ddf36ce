"""The kernels that work row by row, add_layer_norm and bias_quick_gelu, in Triton's interpreter, against float64."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import HALVES, TOLERANCE, random, relative_error

from miniclip import ops
from miniclip.fast import ops as fused
from miniclip.kernels.add_layer_norm import add_layer_norm
from miniclip.kernels.bias_quick_gelu import bias_quick_gelu

DTYPES = [*HALVES, torch.float32]
LAYOUTS = {
    "[N, L, D]": lambda x: x,
    "[T, D]": lambda x: x.flatten(0, 1),
    "sequence first": lambda x: x.transpose(0, 1),
    "class tokens": lambda x: x[:, 0],
    "part of the width": lambda x: x[..., 1:],
    "other strides": lambda x: x.transpose(1, 2),
}


def doubles(*tensors):
    return [x.double() for x in tensors]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 64, 768, 1280, 8192])
def test_add_layer_norm(width, dtype):
    x, residual = 5 + random(2, 3, width, dtype=dtype), random(2, 3, width, dtype=dtype, seed=1)
    weight, bias = random(2, width, dtype=torch.float32, seed=2)
    total, out = add_layer_norm(x, residual, weight, bias)
    assert torch.equal(total, x + residual) and out.dtype == dtype
    expected = ops.layer_norm(*doubles(total, weight, bias))
    assert relative_error(out, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 64, 1023, 3072])
def test_bias_quick_gelu(width, dtype):
    x, bias = 3 * random(2, 3, width, dtype=dtype), random(width, dtype=dtype, seed=1)
    out = bias_quick_gelu(x, bias)
    assert out.dtype == dtype
    assert relative_error(out, fused.bias_quick_gelu(*doubles(x, bias))) < TOLERANCE[dtype]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout):
    x, residual = (LAYOUTS[layout](random(3, 5, 40, dtype=torch.float16, seed=seed)) for seed in (0, 1))
    weight, bias = random(2, x.shape[-1], dtype=torch.float32, seed=2)
    total, out = add_layer_norm(x, residual, weight, bias)
    assert torch.equal(total, x + residual)
    assert relative_error(out, ops.layer_norm(*doubles(total, weight, bias))) < 5e-4
    assert relative_error(bias_quick_gelu(x, bias.half()), fused.bias_quick_gelu(*doubles(x, bias.half()))) < 5e-4


def test_half_parameters_constant_rows_and_eps():
    x = torch.full((2, 64), 3.0).half()
    weight, bias = random(2, 64, dtype=torch.float16)
    assert torch.equal(add_layer_norm(x, x, weight, bias)[1], bias.expand(2, 64))  # no variance: the bias alone
    x = 1e-3 * random(4, 64, dtype=torch.float32)  # a variance below eps
    for eps in 1e-5, 1e-3:
        total, out = add_layer_norm(x, x, weight.float(), bias.float(), eps)
        assert relative_error(out, ops.layer_norm(*doubles(total, weight, bias), eps)) < TOLERANCE[torch.float32]


def test_extremes():
    x = torch.tensor([[0.0, -0.0, 1000.0, -1000.0, 65000.0, float("inf"), float("nan"), 1e-7]])
    for dtype in DTYPES:
        out, expected = (f(x.to(dtype), torch.zeros(8).to(dtype)) for f in (bias_quick_gelu, fused.bias_quick_gelu))
        torch.testing.assert_close(out, expected, equal_nan=True, atol=0, rtol=1e-2)
    x = torch.ones(3, 16).half()
    x[1, 2] = float("nan")
    isnan = add_layer_norm(x, x, torch.ones(16), torch.zeros(16))[1].isnan()
    assert isnan[1].all() and isnan.sum() == 16


@pytest.mark.filterwarnings("ignore")
def test_opcheck():
    x, parameter = random(2, 3, 16, dtype=torch.float16), random(16, dtype=torch.float32)
    torch.library.opcheck(torch.ops.miniclip.add_layer_norm.default, (x, x.clone(), parameter, parameter.clone(), 1e-5))
    torch.library.opcheck(torch.ops.miniclip.bias_quick_gelu.default, (x, parameter))


def test_errors():
    x, parameter = random(2, 16, dtype=torch.float16), torch.ones(16)
    with pytest.raises(ValueError, match="expected the same"):
        add_layer_norm(x, x.float(), parameter, parameter)
    with pytest.raises(ValueError, match="1 to 8192 wide"):
        add_layer_norm(*[torch.ones(1, 8193)] * 2, *[torch.ones(8193)] * 2)
    with pytest.raises(ValueError, match=r"bias is torch.float32 \[15\]; expected half precision or float32 \[16\]"):
        add_layer_norm(x, x, parameter, parameter[1:])
    with pytest.raises(ValueError, match=r"bias is torch.float32 \[16\]; expected torch.float16 \[16\]"):
        bias_quick_gelu(x, parameter)
    with pytest.raises(ValueError, match="weight is on meta; expected cpu"):
        add_layer_norm(x, x, parameter.to("meta"), parameter)
    with pytest.raises(ValueError, match="the kernel has no gradient"):
        add_layer_norm(x, x, parameter.clone().requires_grad_(), parameter)
    with pytest.raises(ValueError, match=r"x is torch.float64"):
        bias_quick_gelu(x.double(), parameter)
    with pytest.raises(ValueError, match=r"bias is torch.float16 \[15\]; expected torch.float16 \[16\]"):
        bias_quick_gelu(x, parameter[1:].half())
