"""Convolutions as inference runs them on a CPU: packed once for oneDNN, which also applies the activation and adds the
residual before it writes a result. Maps are [N, C, h, w] with the channels innermost in memory (channels last).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miniclip.fast import half
from miniclip.fast.linear import ACTIVATIONS, ONEDNN_FORMS, ONEDNN_NAMES


class Geometry(NamedTuple):
    """What a convolution does besides its weight and bias."""

    padding: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    @classmethod
    def of(cls, conv: nn.Conv2d) -> Geometry:
        return cls(conv.padding, conv.stride, conv.dilation, conv.groups)


class Conv:
    """A convolution in PyTorch's own arithmetic."""

    def __init__(self, weight: Tensor, bias: Tensor | None, geometry: Geometry, height: int, width: int):
        self.weight, self.bias, self.geometry = weight, bias, geometry

    def __call__(self, x: Tensor, activation: str = "none") -> Tensor:
        padding, stride, dilation, groups = self.geometry
        return ACTIVATIONS[activation](F.conv2d(x, self.weight, self.bias, stride, padding, dilation, groups))

    def add(self, x: Tensor, total: Tensor, activation: str = "none") -> Tensor:
        """activation(the result plus `total`), which is overwritten; "none" or "relu", as oneDNN has no more."""
        return ACTIVATIONS[activation](total.add_(self(x)))


class OneDNNConv(Conv):
    """The same with oneDNN's packed weights, for maps of about this height and width."""

    def __init__(self, weight: Tensor, bias: Tensor | None, geometry: Geometry, height: int, width: int):
        size = (1, weight.shape[1] * geometry.groups, height, width)
        packed = torch.ops.mkldnn._reorder_convolution_weight(weight, *geometry, size)
        super().__init__(packed, bias, geometry, height, width)

    def __call__(self, x: Tensor, activation: str = "none") -> Tensor:
        name = ONEDNN_NAMES.get(activation, activation)
        form = ONEDNN_FORMS.get(activation, "none")
        return torch.ops.mkldnn._convolution_pointwise.default(
            x, self.weight, self.bias, *self.geometry, name, [], form
        )

    def add(self, x: Tensor, total: Tensor, activation: str = "none") -> Tensor:
        name = None if activation == "none" else ONEDNN_NAMES.get(activation, activation)
        return torch.ops.mkldnn._convolution_pointwise_.binary(
            total, x, self.weight, self.bias, *self.geometry, "add", 1.0, name, [], "none"
        )


def conv(weight: Tensor, bias: Tensor | None, dtype: torch.dtype, geometry: Geometry, height: int, width: int) -> Conv:
    """The fastest form of a convolution of maps of this dtype and about this size."""
    weight, bias = weight.detach().to(dtype), None if bias is None else bias.detach().to(dtype)
    return (OneDNNConv if dtype in half.ONEDNN_DTYPES else Conv)(weight, bias, geometry, height, width)


def conv_norm(
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    mean: Tensor,
    variance: Tensor,
    eps: float,
    dtype: torch.dtype,
    geometry: Geometry,
    height: int,
    width: int,
) -> Conv:
    """A convolution and the BatchNorm after it: the norm's scale is folded into the weight, its shift into the bias."""
    factor = scale * torch.rsqrt(variance + eps)
    shift = shift + ((0 if bias is None else bias) - mean) * factor
    folded = weight * factor[:, None, None, None]  # in float32, also where the weight has half precision
    return conv(folded, shift, dtype, geometry, height, width)
