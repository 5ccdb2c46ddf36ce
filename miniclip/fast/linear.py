"""Linear layers as inference runs them on a CPU: weights in the order in which a library reads them, packed once.

- float32, and half precision where the CPU has arithmetic for it: oneDNN, which also applies the activation and adds
  the residual before it writes a result. Packing makes its products up to 1.7 times as fast for few tokens.
- half precision elsewhere: FBGEMM, see half.py.
- what neither takes, such as float64: PyTorch's own products.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from miniclip.fast import half

ROWS = 50  # the packed order depends on the number of rows; this one's was as fast as any at 1 to 1,600 rows
ACTIVATIONS = {
    "none": lambda x: x,
    "silu": lambda x: F.silu(x, inplace=True),
    "gelu": torch.ops.aten.gelu_,
    "gelu_tanh": partial(torch.ops.aten.gelu_, approximate="tanh"),
    "relu": torch.relu_,
}
ONEDNN_NAMES = {"silu": "swish", "gelu_tanh": "gelu"}  # where oneDNN's name of an activation is another
ONEDNN_FORMS = {"gelu_tanh": "tanh"}  # and which form of it; of the others "none"


class Norm(NamedTuple):
    """A layer norm. PyTorch's takes half-precision x with float32 weights on the CPU, and sums in float32."""

    weight: Tensor
    bias: Tensor | None
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return torch.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


def norm(weight: Tensor, bias: Tensor | None, eps: float, scale: float = 1.0) -> Norm:
    """A Norm whose result is multiplied by `scale`; float32 where the weights have half precision."""
    weight, bias = (None if p is None else scale * (p.float() if p.element_size() == 2 else p) for p in (weight, bias))
    return Norm(weight, bias, eps)


class Linear:
    """x [T, n_in] -> (x W^T) * weight_scale + bias * bias_scale [T, n_out], by PyTorch's own products."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        weight_scale: float = 1.0,
        bias_scale: float = 1.0,
    ):
        self.weight = _scaled(weight, weight_scale, dtype)
        self.bias = None if bias is None else _scaled(bias, bias_scale, dtype)

    def __call__(self, x: Tensor, activation: str = "none") -> Tensor:
        return ACTIVATIONS[activation](F.linear(x, self.weight, self.bias))

    def add(self, x: Tensor, total: Tensor) -> Tensor:
        """The layer's result plus `total` [T, n_out], which may be overwritten."""
        return total.add_(F.linear(x, self.weight, self.bias))


class OneDNNLinear(Linear):
    """The same with oneDNN's packed weights."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight.contiguous(), ROWS)

    def __call__(self, x: Tensor, activation: str = "none") -> Tensor:
        name = ONEDNN_NAMES.get(activation, activation)
        form = ONEDNN_FORMS.get(activation, "none")
        return torch.ops.mkldnn._linear_pointwise.default(x, self.weight, self.bias, name, [], form)

    def add(self, x: Tensor, total: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise.binary(x, total, self.weight, self.bias, "add")


class FBGEMMLinear(Linear):
    """The same with half-precision weights and float32 activations, see half.py. The scale is applied to the result:
    scaled weights would be rounded again.
    """

    def __init__(self, weight, bias, dtype, weight_scale=1.0, bias_scale=1.0):  # of the types in Linear
        self.scale = weight_scale
        self.weight = half.pack(weight, None if bias is None else bias.float() * (bias_scale / weight_scale))

    def __call__(self, x: Tensor, activation: str = "none") -> Tensor:
        y = half.product(x, self.weight)
        return ACTIVATIONS[activation](y if self.scale == 1 else y.mul_(self.scale))

    def add(self, x: Tensor, total: Tensor) -> Tensor:
        return total.add_(half.product(x, self.weight), alpha=self.scale)


def linear(
    weight: Tensor, bias: Tensor | None, dtype: torch.dtype, weight_scale: float = 1.0, bias_scale: float = 1.0
) -> Linear:
    """The fastest form of a layer with this weight, [n_out, n_in] when flattened, for x of this dtype."""
    kind = OneDNNLinear if dtype in half.ONEDNN_DTYPES else Linear
    if weight.dtype in half.EMULATED and dtype is torch.float32:
        kind = FBGEMMLinear
    return kind(weight.flatten(1), bias, dtype, weight_scale, bias_scale)


def projection(matrix: Tensor, dtype: torch.dtype) -> Linear:
    """x -> x @ matrix, of a matrix [n_in, n_out]."""
    return linear(matrix.T.contiguous(), None, dtype)


def _scaled(tensor: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """scale * tensor, rounded once; no Parameter."""
    tensor = tensor.detach()
    return tensor.to(dtype) if scale == 1 else (tensor.to(torch.promote_types(dtype, torch.float32)) * scale).to(dtype)
